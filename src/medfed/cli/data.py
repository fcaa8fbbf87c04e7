"""`medfed data`: the sources, and what lies in a table:
the doctor that names all that is wrong with it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from medfed.cli.common import AsJson, DataFolder, Settings, console
from medfed.cli.ending import INCOMPLETE

if TYPE_CHECKING:
    from medfed.data.doubts import Doubt
    from medfed.evidence.draft import Draft
    from medfed.study import Study

app = typer.Typer(
    no_args_is_help=True, help="Look at data sources and tables; download what is public."
)


@app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List the built-in sources."""
    from medfed.data.bundled import SOURCES

    if as_json:
        print(
            json.dumps(
                {name: {"summary": s.summary, "licence": s.licence} for name, s in SOURCES.items()},
                indent=2,
            )
        )
        return
    table = Table("source", "what", "licence", box=None)
    for name, source in SOURCES.items():
        table.add_row(name, source.summary, source.licence)
    console().print(table)


@app.command("get")
def data_get(
    source: Annotated[str, typer.Argument(help="A built-in source.")], data: DataFolder = None
) -> None:
    """Download a source, checked by sha256, into the cache;
    what is at hand is not downloaded again.
    """
    from medfed.data.bundled import SOURCES, get

    rows = get(source, data)
    checked = "every file's sha256 agrees" if SOURCES[source].files else SOURCES[source].licence
    console().print(f"{source}: {rows} rows; {checked}", highlight=False)


@app.command("show")
def data_show(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|TABLE",
            help=(
                "A study file, or the name of a bundled study; or a table: a file, a folder of "
                "files, a pattern."
            ),
        ),
    ],
    set: Settings = [],  # noqa: B006
    data: DataFolder = None,
    write: Annotated[
        Path | None,
        typer.Option(help="Of a table: also write a complete, commented study of it here."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also write a figure (.html) of sizes, classes and gaps.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every site's gaps, however many sites there are.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show each site's rows, features, gaps, classes and label skew,
    and what is doubtful, without training.

    Exit code 1 where the study that is written cannot run as it is, but for its blanks.
    """
    from medfed import runs
    from medfed import study as studies
    from medfed.core import files
    from medfed.core.checks import StudyError
    from medfed.data import describe, survey_doubts
    from medfed.evidence import draft

    surveys = None
    if draft.is_table(study):
        made = _draft(study, set, write, console(as_json))
        if made is None:
            return  # blanks are for a person
        if made.unread:
            raise typer.Exit(INCOMPLETE)
        loaded = studies.from_text(made.text, write or Path("study.toml"))
        surveys = made.surveys
    elif write:
        raise StudyError(
            f"--write {str(write)!r} with the study {study!r}; expected a table. Take `medfed "
            "study fix`."
        )
    else:
        loaded = studies.load(study, set)

    surveys = surveys or runs.survey(loaded, data)
    found = describe.describe(surveys)
    doubted = survey_doubts.find(surveys, loaded.data, loaded.privacy.meant)
    if figure:
        files.write(
            figure, describe.figure(found, loaded.study.name).to_html(include_plotlyjs=True)
        )
    if as_json:
        print(json.dumps({**found, "doubts": [_to_json(doubt) for doubt in doubted]}, indent=2))
    else:
        _show(loaded, found, doubted, everything)
        if figure:
            console().print(f"figure: {figure}", highlight=False)
    if write and any(doubt.harm == "error" for doubt in doubted):
        raise typer.Exit(INCOMPLETE)  # the study that was written cannot run


def _show(
    loaded: "Study", found: dict[str, Any], doubted: "Sequence[Doubt]", everything: bool
) -> None:
    """Print what lies in a table, and what is doubtful about it."""
    from medfed.data import describe

    console().print(_roles(loaded), highlight=False, markup=False)
    for table in describe.tables(found, everything):
        console().print(table)
    _tell(doubted, console())


def _draft(
    table: str, settings: Sequence[str], write: Path | None, shown: Console
) -> "Draft | None":
    """Make a study of a table; return it, or None where something has to be said first."""
    from medfed.evidence import draft

    out = write or Path("study.toml")
    made = draft.draft(Path(table), out, settings)
    if write:
        draft.write(made, write)
        shown.print(f"study: {write}", highlight=False, soft_wrap=True)
    if made.left_out:
        shown.print(f"left out: {made.left_out}", highlight=False, markup=False, soft_wrap=True)
    if made.blanks:
        shown.print(
            f"still to be filled in: {', '.join(made.blanks)}", highlight=False, markup=False
        )
        for line in () if write else made.text.splitlines():
            shown.print(line, highlight=False, markup=False, soft_wrap=True)
        return None
    if made.unread:
        shown.print(f"not yet: {made.unread}", highlight=False, markup=False, soft_wrap=True)
    then = f"medfed run {write}" if write else f"medfed data show {table} --write study.toml"
    shown.print(f"then: {then}", highlight=False, markup=False, soft_wrap=True)
    return made


def _roles(study: "Study") -> str:
    """Say which column is what."""
    data = study.data
    known = {
        "target": data.target,
        "site": data.site or ("its file" if data.site_is_file else ""),
        "test": data.test,
    }
    known |= {"patient": data.patient or "each row"}
    return ", ".join(f"{role}: {name}" for role, name in known.items() if name)


def _to_json(doubt: "Doubt") -> dict[str, object]:
    return {
        **doubt.to_json(),
        "sites": list(doubt.sites),
        "harm": doubt.harm,
        "way_out": doubt.way_out(),
    }


def _tell(doubted: "Sequence[Doubt]", shown: Console) -> None:
    """Print what is doubtful, in order of harm, each with what settles it."""
    if not doubted:
        shown.print("nothing doubtful was found", highlight=False)
        return
    errors = sum(doubt.harm == "error" for doubt in doubted)
    stops = f"; {errors} would stop a run" if errors else ""
    shown.print(f"{len(doubted)} doubt{'s' * (len(doubted) > 1)}{stops}", highlight=False)
    for doubt in doubted:
        colour = "bold red" if doubt.harm == "error" else "yellow"
        shown.print(
            f"[{colour}]{doubt.harm}[/] {escape(doubt.sentence())}", highlight=False, soft_wrap=True
        )
