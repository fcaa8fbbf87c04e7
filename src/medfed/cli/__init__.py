"""The command line: thin. Each command reads its words, calls one function of the package, and
shows what came.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medfed.cli.alone import alone
from medfed.cli.budget import accept, budget, column, found
from medfed.cli.common import (
    Apart,
    AsJson,
    DataFolder,
    LogForm,
    Operator,
    Quiet,
    Reason,
    RunFolder,
    Settings,
    StudyName,
    find_operator,
)
from medfed.cli.common import console as _console
from medfed.cli.compare import compare
from medfed.cli.data import app as data_app
from medfed.cli.ending import DONE, Commands, flush, replace_unprintable, tell
from medfed.cli.export import export
from medfed.cli.keys import federation_app, key_app
from medfed.cli.quarantine import app as quarantine_app
from medfed.cli.report import report
from medfed.cli.serve import serve
from medfed.cli.study import app as study_app
from medfed.cli.watch import watch

DEBUG = "--debug"

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
app.add_typer(data_app, name="data")
privacy_app = typer.Typer(
    no_args_is_help=True, help="What the noise will be, what has been spent, what is claimed."
)
app.add_typer(privacy_app, name="privacy")
privacy_app.command()(found)
privacy_app.command()(budget)
privacy_app.command()(column)
privacy_app.command()(accept)

trail_app = typer.Typer(no_args_is_help=True, help="What happened in a run, signed and chained.")
app.add_typer(trail_app, name="trail")

app.add_typer(study_app, name="study")
app.add_typer(key_app, name="key")
app.add_typer(federation_app, name="federation")
app.add_typer(quarantine_app, name="quarantine")
app.command()(alone)
app.command()(compare)
app.command()(export)
app.command()(report)
app.command()(serve)
app.command()(watch)


def main() -> None:
    """Run the command line.

    Exit code 0: done, also where the model is no good, which the first lines say; 1: the run is not
    complete, or an audit found more than is claimed; 2: it could not be done, with the reason; 3:
    an error of medfed's own; 130: interrupted.
    """
    words = [word for word in sys.argv[1:] if word != DEBUG]
    debug = DEBUG in sys.argv[1:]
    replace_unprintable()
    try:
        app(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else DONE
    except BaseException as error:
        code = tell(error, debug)
    sys.exit(flush(code))


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show a failure with its traceback; wherever it stands.")
    ] = False,
) -> None:
    """Federated learning for hospitals and medical devices."""


@app.command()
def run(
    study: StudyName,
    set: Settings = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Run folder to make; default: runs/STUDY-TIME.")
    ] = None,
    data: DataFolder = None,
    processes: Apart = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    log: LogForm = None,
) -> None:
    """Run a study: train, test, and leave a run folder."""
    from medfed import runs
    from medfed.planning import fix

    console = _console(quiet or as_json)
    loaded = fix.load(study, set)
    heard = _listeners(console, log)
    if processes:
        from medfed.runs.parties import run_apart

        _finish(run_apart(loaded, out, data, heard), console, as_json, " --processes")
        return
    _finish(
        runs.run(loaded, out, data, heard, progress=not (quiet or as_json or log)), console, as_json
    )


@app.command()
def resume(
    run: RunFolder,
    data: DataFolder = None,
    processes: Apart = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    log: LogForm = None,
) -> None:
    """Go on with a run from its last whole round."""
    from medfed import runs

    console = _console(quiet or as_json)
    if processes:
        from medfed.runs.parties import resume_apart

        found = resume_apart(run, data, _listeners(console, log))
        _finish(found, console, as_json, " --processes")
        return
    _finish(runs.resume(run, data, _listeners(console, log)), console, as_json)


@app.command("give-up")
def give_up(run: RunFolder, reason: Reason, operator: Operator = "") -> None:
    """Give up the round that a stopped run cannot end, as sites that it needs are gone: the next
    `resume` counts it as spent, and goes on after it with the same model.
    """
    from medfed import runs

    who = operator or find_operator()
    number = runs.give_up(run, reason, who)
    _console().print(
        f"round {number} is given up; on record: {who}: {reason}\ngo on: medfed resume {run}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def show(run: RunFolder, as_json: AsJson = False) -> None:
    """Show what a run came to, finished or not, from its events."""
    from medfed.core.checks import RunError
    from medfed.monitor import events, summary
    from medfed.screens import console as view
    from medfed.screens.sentences import merge_alike, sentence

    if not (run / "events.jsonl").exists():
        raise RunError(f"{str(run)!r} is not a run folder: it holds no events.jsonl")
    found = summary.summarise(events.read(run / "events.jsonl"))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = _console()
    console.print(
        f"[bold]{escape(str(found['study']))}[/]  {found['status']}, "
        f"{found['rounds']} of {found['rounds_asked']} rounds"
    )
    view.tell_findings(found, console)
    if found["test"] or found["baselines"]:
        console.print(view.results(found))
    for line in view.decision_lines(found):
        console.print(line, highlight=False, markup=False)
    for line in view.suspects(found):
        console.print(line, highlight=False, markup=False)
    if found["reason"]:
        console.print(f"{found['status']}: {found['reason']}", highlight=False, markup=False)
    for item in found["given_up"]:
        text = sentence(events.GivenUp(**item))
        console.print(text, highlight=False, markup=False)
    for one in merge_alike([events.SiteExcluded(**item) for item in found["excluded"]]):
        console.print(
            f"round {one.round}: without {one.site}: {one.reason}", highlight=False, markup=False
        )


@app.command()
def audit(
    target: Annotated[
        str, typer.Argument(metavar="STUDY|RUN", help="A study, as for `run`; or a run's folder.")
    ],
    set: Settings = [],  # noqa: B006
    data: DataFolder = None,
    canaries: Annotated[
        int, typer.Option(min=0, help="Made-up patients to hide; 0: as many as the claim needs.")
    ] = 0,
    retrains: Annotated[
        int, typer.Option(help="Trainings for membership inference; 64 or more to quote.")
    ] = 64,
    fpr: Annotated[float, typer.Option(help="Its rate of false alarms, in (0, 1).")] = 0.05,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out membership inference.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Coins from a seed; default: the operating system.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test and attack a twin of a study or run against its claim; exit code 1 where a part finds
    that it is broken.
    """
    from medfed.core.checks import RunError
    from medfed.evidence import audit as audits
    from medfed.planning import fix

    console = _console(as_json)
    if Path(target).is_dir() and set:
        raise RunError(
            f"--set {set[0]!r} with the run {target!r}: its study is frozen. Audit a study file "
            "instead."
        )
    options: Any = dict(canaries=canaries, retrains=retrains, fpr=fpr, quick=quick, seed=seed)
    with console.status("attacking a twin"):
        if Path(target).is_dir():
            found = audits.audit_run(Path(target), data, **options)
        else:
            found = audits.audit_study(fix.load(target, set), data, **options)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        table = Table("part", "claimed", "measured", "verdict", "power", box=None, padding=(0, 1))
        for part in found["parts"]:
            verdict = {True: "stands", False: "[bold red]BROKEN[/]", None: "cannot tell"}[
                part["passed"]
            ]
            table.add_row(part["name"], part["claimed"], part["measured"], verdict, part["power"])
        console.print(
            f"[bold]{escape(found['study'])}[/]  a twin's patients: {found['patients']}",
            highlight=False,
        )
        console.print(table)
        for text in (
            *(f"{part['name']}: {part['told']}." for part in found["parts"]),
            found["limits"],
        ):
            console.print(text, highlight=False, markup=False)
    if not found["passed"]:
        raise typer.Exit(1)


@app.command()
def studies(as_json: AsJson = False) -> None:
    """List the bundled studies."""
    from medfed.study import bundled, load

    found = {name: load(name) for name in bundled()}
    if as_json:
        print(json.dumps({name: str(bundled()[name]) for name in found}, indent=2))
        return
    table = Table("study", "data", "model", "algorithm", "rounds", "sites", box=None)
    for name, study in found.items():
        t = study.training
        sites = str(len(study.sites.names)) if study.sites.names else "from data"
        table.add_row(name, study.data.source, study.model.name, t.algorithm, str(t.rounds), sites)
    _console().print(table)


@trail_app.command("verify")
def trail_verify(
    run: RunFolder,
    federation: Annotated[
        Path | None,
        typer.Option(help="Your copy of the list of members; default: the one the study names."),
    ] = None,
    head: Annotated[
        str,
        typer.Option(help="A hash of one of the trail's lines that you were told, or have kept."),
    ] = "",
    coordinator: Annotated[
        list[str],
        typer.Option(help="The fingerprint of the coordinator's keys that you were told; one of."),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check a run's folder against its trail: every line signed, by a coordinator on the list of
    members and not revoked; of this study and this run, which every participant has signed; with
    its end.

    Model, events, plan, study, summary, claim, audit and the pages that lie there must be those
    that the end binds, or follow from them.
    """
    from dataclasses import asdict

    from medfed.runs.verification import verify_run

    checked = verify_run(run, federation, head, coordinator)
    found = checked.trail
    if as_json:
        told = {name: value for name, value in asdict(checked).items() if name != "trail"}
        print(json.dumps({"entries": len(found.entries), "head": found.head, **told}))
        return
    kinds = ", ".join(dict.fromkeys(entry["kind"] for entry in found.entries))
    prints = ", ".join(checked.fingerprints)
    lines = [
        f"{len(found.entries)} lines hold ({kinds})",
        f"head {found.head}",
        f"signed by {checked.signed_by}, fingerprint {prints}",
    ]
    if checked.consortium:
        lines.append(f"on the list of the consortium {checked.consortium}")
    _console().print(
        "\n".join([*lines, *checked.told]), highlight=False, markup=False, soft_wrap=True
    )


@privacy_app.command("plan")
def privacy_plan(
    study: StudyName,
    set: Settings = [],  # noqa: B006
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Say before training what noise the target asks for, and what signal can be left."""
    from medfed import runs
    from medfed.planning import fix
    from medfed.screens.console import outlook

    found = runs.privacy_outlook(fix.load(study, set), data)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for part in outlook(found):
        _console().print(part, highlight=False)


@privacy_app.command("ledger")
def privacy_ledger(
    ledger: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|FOLDER", help="A run's folder, or a ledger's; default: the lifetime one."
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(help="At which delta to tell epsilon; default: the ledger's, or 1e-6."),
    ] = None,
    check_head: Annotated[
        list[str],
        typer.Option(
            help="A head told by an earlier claim, which must still be in the chain; repeatable."
        ),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Check a budget ledger's chain and tell what each study and site has spent; for a run, also
    that it is the ledger whose heads the run was told.
    """
    from medfed import runs
    from medfed.screens.console import accounts, lifetime

    found = runs.ledger_accounts(ledger, delta, check_head)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _console().print(accounts(found))
    for line in lifetime(found):
        _console().print(line, highlight=False, markup=False, soft_wrap=True)


@privacy_app.command("claim")
def privacy_claim(
    run: RunFolder,
    report: Annotated[
        Path | None, typer.Option(help="Also write the claim as a page (.html).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a finished run guarantees to a patient,
    in words and numbers a reviewer can check.
    """
    from medfed.runs import claims
    from medfed.screens.console import claim

    found = claims.read(run)
    if report:
        claims.write_page(run, report)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _console().print(claim(found))
    if report:
        _console().print(f"report: {report}", highlight=False)


def _listeners(console: Console, log: LogForm = None) -> list[Callable[[Any], None]]:
    """Show progress, or lines for a collector of logs; else only what went wrong. The latter two on
    standard error.
    """
    from medfed.screens.console import Progressing, Warnings

    if log:
        from medfed.screens.sentences import Structured

        return [Structured(sys.stderr, log)]
    return [Warnings(Console(stderr=True)) if console.quiet else Progressing(console)]


def _finish(result: Any, console: Console, as_json: bool, parties: str = "") -> None:
    """Show what a run came to; exit with 1 where not all asked rounds ran with all asked sites.

    `parties` is the option that a run whose parties are processes is resumed with.
    """
    from medfed.screens.console import decision_lines, results, suspects, tell_findings

    tell_findings(result.summary, Console(stderr=True) if console.quiet else console)
    if as_json:
        print(json.dumps({"folder": str(result.folder), **result.summary}, indent=2))
    else:
        console.print(results(result.summary))
        for line in decision_lines(result.summary):
            console.print(line, highlight=False, markup=False)
        for line in suspects(result.summary):
            console.print(line, highlight=False, markup=False)
        console.print(f"run folder: {result.folder}", highlight=False, soft_wrap=True)
        console.print(f"pages: medfed report {result.folder}", highlight=False, soft_wrap=True)
        if parties and result.summary["rounds"] < result.summary["rounds_asked"]:
            way = f"go on: medfed resume {result.folder}{parties}"
            console.print(way, highlight=False, soft_wrap=True)
    if not result.complete:
        raise typer.Exit(1)
