"""What a terminal shows of a run: progress while it goes, and the table at its end."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from medfed.core import decision
from medfed.core.checks import some
from medfed.monitor import verdict
from medfed.monitor.events import (
    Event,
    GivenUp,
    Planned,
    RangesFound,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteExcluded,
    Tested,
    Warned,
)
from medfed.screens import reports
from medfed.screens.sentences import LeftOut, sentence

_SHOWN = {
    "binary": ("accuracy", "auroc", "precision", "recall", "f1"),
    "number": ("mae", "rmse", "r2"),
}
_TITLES = {
    "accuracy": "Accuracy",
    "auroc": "AUROC",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
}
_TITLES |= {"mae": "MAE", "rmse": "RMSE", "r2": "R2"}
_MODELS = {"local": "each site's own", "pooled": "pooled rows (simulation)"}


class Progressing:
    """A listener that shows a run's progress: a moving line in a terminal, else a line a round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rounds = 0
        self.last_test = ""
        # a round is told when its test is in, if it has one
        self.untold: RoundFinished | None = None
        self.left_out = LeftOut()
        self.bar = Progress(
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=console,
        )
        self.task = self.bar.add_task("", total=1)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if not isinstance(event, Tested | SiteExcluded):
            self._tell_round()
        for one in self.left_out.before(event):
            text = f"[red]round {one.round}: without {escape(one.site)}[/]: {escape(one.reason)}"
            self.console.print(text, highlight=False)

        match event:
            case RunStarted():
                self.rounds = event.rounds
                self.console.print(
                    f"[bold]{escape(event.study)}[/]  seed {event.seed}, {event.rounds} rounds"
                )
                self.bar.update(self.task, total=event.rounds)
            case Planned():
                self._tell_plan(event)
            case RangesFound():
                self.console.print(sentence(event), highlight=False, markup=False)
            case Warned():
                self.console.print(f"[yellow]warning[/] {escape(event.text)}", highlight=False)
            case Resumed():
                self.rounds = event.rounds
                note = f" ({escape(event.note)})" if event.note else ""
                self.console.print(f"resumed after round {event.round}{note}", highlight=False)
            case GivenUp():
                self.console.print(f"[red]{escape(sentence(event))}[/]", highlight=False)
            case RoundFinished():
                self.untold = event
            case Tested() if self.untold:
                self._note_test(event)
                self._tell_round()
            case RunFinished():
                self.bar.stop()
                if event.privacy.get("epsilon") is not None:
                    self.console.print(
                        _describe_spending(event.privacy), highlight=False, markup=False
                    )
                if event.reason:
                    self.console.print(
                        f"[red]{event.status}[/]: {escape(event.reason)}", highlight=False
                    )

    def close(self) -> None:
        """Show what is still untold, where nothing more will come."""
        self._tell_round()
        self.bar.stop()

    def _tell_plan(self, event: Planned) -> None:
        # else nobody says how many are held out
        tested = any(size["test"] for size in event.sizes.values())
        sizes = some(
            (f"{site} {n['train']}" + f"+{n['test']}" * tested for site, n in event.sizes.items()),
            8,
        )
        model = event.model
        if model == "logistic" and not any(event.labels.values()):
            model = "linear"  # the same layer, of a regression
        self.console.print(
            f"{event.algorithm}, model {model}: {event.parameters:,} parameters, "
            f"{event.features} inputs\nsites (training{' + test' * tested} rows): {sizes}",
            highlight=False,
            markup=False,
        )
        if event.rate_chosen:
            why = f"learning rate {event.learning_rate:.3g}, chosen: {event.rate_chosen}"
            self.console.print(why, highlight=False, markup=False)

        if event.positive:
            self.console.print(
                f"positive: {event.positive!r}, {_describe_threshold(event.threshold)}",
                highlight=False,
                markup=False,
            )

        self.console.print(_describe_guarantee(event.privacy), highlight=False, markup=False)
        for line in choice_lines(event.chosen):
            self.console.print(line, highlight=False, markup=False)
        for party, sight in event.sees.items():
            self.console.print(f"{party} could see: {sight}", highlight=False, markup=False)
        if event.bears:
            self.console.print(f"malicious clients: {event.bears}", highlight=False, markup=False)
        if self.console.is_terminal:
            self.bar.start()

    def _tell_round(self) -> None:
        event = self.untold
        self.untold = None
        if event is None:
            return
        loss = _format(event.loss, 4)
        parts = (
            f"{len(event.clients)} sites",
            f"loss {loss}",
            self.last_test,
            f"{event.seconds:.3f} s",
        )
        text = "  ".join(filter(None, parts))
        self.bar.update(
            self.task, completed=event.round, total=self.rounds or event.round, description=text
        )

        if not self.console.is_terminal:
            self.console.print(
                f"round {event.round}/{self.rounds or '?'}  {text}", highlight=False, soft_wrap=True
            )
            self.last_test = ""  # a line tells of its own round; the bar keeps what was known last

    def _note_test(self, event: Tested) -> None:
        name = "auroc" if "auroc" in event.all_sites else "rmse"
        self.last_test = f"{_TITLES[name]} {_format(event.all_sites[name].value, 4)}"


def _format(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _describe_threshold(threshold: str) -> str:
    """Say from where on a label is called, before training has shown it."""
    if (rule := decision.parse(threshold)) and rule.chosen:
        return f"called from a probability on that is chosen after training by {threshold!r}"
    return f"called from probability {threshold} on"


def decision_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the line that says from where on which label is called; none but of two labels."""
    if (one := summary.get("decision")) is None:
        return []
    return [
        f"{one['positive']!r} is called from probability {one['threshold']:.4g} on "
        f"({one['decided']})"
    ]


def choice_lines(choices: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Say what the recipe has chosen where the study left it open, and why."""
    if not choices:
        return []
    return ["chosen, as the study leaves it open (docs/privacy.md, the recipe):"] + [
        f"  {key} = {json.dumps(one['value'])}: {one['why']}" for key, one in choices.items()
    ]


def _describe_guarantee(privacy: Mapping[str, Any]) -> str:
    """Say what is guaranteed, before the first round."""
    if privacy["noise"] == "none":
        return "privacy: none claimed (privacy.noise = 'none')"
    if privacy["simulation_only"]:
        return "privacy: none claimed (privacy.simulation_only: noise from a seed)"
    return (
        f"privacy: epsilon {privacy['target_epsilon']:g} at delta {privacy['delta']:g} for every "
        f"training patient, noise '{privacy['noise']}', multiplier "
        f"{privacy['noise_multiplier']:.4g}"
    )


def _describe_spending(privacy: Mapping[str, Any]) -> str:
    scope = "all runs of the study (scope 'study')"
    if privacy["scope"] == "run":
        scope = "this run alone (scope 'run')"
    return (
        f"privacy spent: epsilon {privacy['epsilon']:.4f} of {privacy['target_epsilon']:g} at "
        f"delta {privacy['delta']:g}, patient level; budget of {scope}"
    )


class Warnings:
    """A listener that shows only what went wrong."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.left_out = LeftOut()

    def __call__(self, event: Event) -> None:
        """Show one event, if something is wrong with it; sites left out before what comes next."""
        for one in self.left_out.before(event):
            self._print(f"round {one.round}: without {one.site}: {one.reason}")
        match event:
            case Warned():
                self._print(f"warning: {event.text}")
            case GivenUp():
                self._print(sentence(event))
            case RunFinished() if event.reason:
                self._print(f"{event.status}: {event.reason}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def tell_findings(summary: Mapping[str, Any], console: Console) -> None:
    """Print what the figures of a run mean, before the figures: warnings loud, notes plain."""
    for text in verdict.lines(summary):
        style = "bold red" if text.startswith("warning") else ""
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def results(summary: Mapping[str, Any]) -> Table:
    """Return the table of a summary:
    federated, pooled and each site's own model, over all sites and per site.
    """
    test: Mapping[str, Any] = summary["test"] or next(
        (b["test"] for b in summary["baselines"].values()), {}
    )
    names = _SHOWN["number" if "mae" in test else "binary"]
    table = Table(
        box=None,
        padding=(0, 1),
        title="Held-out patients (95 % interval below)",
        title_justify="left",
    )
    noised = bool(summary["test"] and summary.get("test_noised"))
    if noised:
        table.caption = "about: a noised count of patients"
        table.caption_justify = "left"
    for title in ("tested on", "model", "n"):
        table.add_column(title, justify="right" if title == "n" else "left")
    for name in names:
        table.add_column(_TITLES[name], justify="right")

    if summary["test"]:
        _add(
            table,
            "all sites",
            f"federated ({summary['algorithm']})",
            summary["test"],
            summary["intervals"],
            names,
            noised=noised,
        )

    for model, baseline in summary["baselines"].items():
        _add(table, "all sites", _MODELS[model], baseline["test"], baseline["intervals"], names)
    own = summary["baselines"].get("local", {}).get("per_site", {})

    several = list(summary["per_site"])[:12] if len(summary["sites"]) > 1 else []
    for site in several:
        _add(table, site, "federated", summary["per_site"][site], {}, names, noised=noised)
        if site in own:
            _add(table, "", "its own", own[site], {}, names)

    if len(summary["per_site"]) > 12:
        table.add_row("...", f"{len(summary['per_site']) - 12} more sites in summary.json")
    return table


def suspects(summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each suspected site: since when, what was done, on what evidence."""
    lines = []
    for one in summary["suspects"]:
        first = one["actions"][0]
        done = some(
            (f"{action['action']} in round {action['round']}" for action in one["actions"]), 3
        )
        lines.append(f"suspect: {one['site']}: {done} ({'; '.join(first['evidence'])})")
    return lines


def _add(
    table: Table,
    where: str,
    model: str,
    figures: Mapping[str, Any],
    intervals: Mapping[str, Sequence[float] | None],
    names: Sequence[str],
    noised: bool = False,
) -> None:
    cells = []
    for name in names:
        cell = _format(figures[name], 3)
        if interval := intervals.get(name):
            cell += f"\n[dim]{_format_share(interval[0])}-{_format_share(interval[1])}[/]"
        cells.append(cell)
    count = f"about {figures['n']}" if noised else str(figures["n"])
    table.add_row(escape(where), model, count, *cells)


def _format_share(value: float) -> str:
    """Write a share without its leading zero: .932."""
    text = f"{value:.3f}"
    if text.startswith("0."):
        return text[1:]
    return text


def outlook(found: Mapping[str, Any]) -> list[Table | str]:
    """Return what `medfed privacy plan` shows."""
    parts: list[Table | str] = [
        f"{escape(found['study'])}: epsilon {found['epsilon']:g} at delta {found['delta']:g} for "
        f"each of {found['patients']:,} declared training patients, {found['parameters']:,} "
        f"parameters, {found['rounds']} rounds\naccountant: {found['accountant']}"
    ]
    parts += choice_lines(found["chosen"])
    parts.append(_table_of_losses(found["foretold"]))
    parts += [
        *_describe_ranges(found["ranges"], found["patients"]),
        *_describe_test(found["paid_test"]),
    ]
    parts += [_describe_ledger(found["ledger"], found["epsilon"])]

    for mode, rows in found["modes"].items():
        table = Table(title=f"noise = '{mode}'", title_justify="left", box=None, padding=(0, 1))
        for title in (
            "site",
            "patients",
            "in a step",
            "steps a round",
            "noise",
            "a round",
            "the run",
            "a step",
            "the run",
        ):
            table.add_column(title, justify="left" if title == "site" else "right")

        table.add_row(
            "",
            "",
            "",
            "",
            "[dim]multiplier[/]",
            "[dim]epsilon[/]",
            "[dim]epsilon[/]",
            "[dim]snr[/]",
            "[dim]snr[/]",
        )
        for row in rows:
            share = "all" if row["probability"] == 1 else f"{row['probability']:.3g}"
            figures = [
                f"{row[k]:.4g}"
                for k in (
                    "noise_multiplier",
                    "epsilon_of_a_round",
                    "epsilon",
                    "snr_step",
                    "snr_run",
                )
            ]
            table.add_row(
                escape(row["site"]),
                str(row["declared"]),
                share,
                str(row["steps_per_round"]),
                *figures,
            )

        parts.append(table)

    parts.append(
        "snr: the most that all gradients together can weigh against the noise, if every patient "
        "pulls the same way; below 1 in a step, only the mean over many steps can learn. It says "
        "nothing of usefulness: the first table does."
    )
    return parts


def _describe_ranges(ranges: Mapping[str, Any] | None, patients: int) -> list[str]:
    """Say with how much noise ranges will be found."""
    if ranges is None:
        return []
    columns = ranges["columns"]
    return [
        f"ranges: of {len(columns)} column{'s' * (len(columns) > 1)} "
        f"({escape(some(columns, 5))}) they are found from counts of training patients, which "
        f"cost epsilon {ranges['epsilon']:g} alone; noise of sd {ranges['noise_sd']:.3g} "
        f"patients lies on each, {patients:,} are declared, {ranges['least']:,.0f} needed."
    ]


def _describe_test(test: Mapping[str, Any] | None) -> list[str]:
    """Say what the test that held-out patients pay for will be able to tell."""
    if test is None:
        return []
    told = []
    for share, ends in test["intervals"].items():
        if ends:
            told.append(f"as {ends[0]:.2f} to {ends[1]:.2f} with {float(share):.0%} positive")
        else:
            told.append(f"hardly ever with {float(share):.0%}")
    return [
        f"test: about {test['held_out']:,} held-out patients pay epsilon {test['epsilon']:g} for "
        f"one; an AUROC of .80 would be told {', '.join(told)}. More held-out patients, or "
        "public ones, tell more."
    ]


def _describe_ledger(ledger: Mapping[str, Any], epsilon: float) -> str:
    """Say where a run is charged, and what a trial would cost."""
    if ledger["path"] is None:
        return (
            "ledger: a run is charged in its own folder alone (privacy.scope = 'run'): for "
            "public records."
        )
    if ledger["founded"]:
        return escape(
            f"ledger: a run is charged in this site's, {ledger['path']}, for the life of its "
            "patients."
        )
    return escape(
        f"ledger: the first run founds this site's, {ledger['path']}, with epsilon {epsilon:g} "
        "for a patient's life: a trial spends it. Rehearse on public or made-up records with "
        "privacy.scope = 'run', or found it with more: medfed privacy found."
    )


def _table_of_losses(foretold: Sequence[Mapping[str, Any]]) -> Table:
    """Return what each epsilon will cost, as foretold on made-up tables of the declared shape."""
    name = foretold[0]["figure"]
    title = (
        f"what it costs: loss of {name} against no privacy, foretold on made-up tables of this "
        "shape"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for head in ("epsilon", "expected loss", "least", "most"):
        table.add_column(head, justify="right")
    for one in foretold:
        table.add_row(
            f"{one['epsilon']:g}", *(f"{one[key]:.3f}" for key in ("loss", "low", "high"))
        )
    return table


def accounts(found: Mapping[str, Any]) -> Table:
    """Return what `medfed privacy ledger` shows."""
    title = f"{found['charges']} charges, chain intact, head {found['head'][:16]}..."
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for name in ("study", "site", "patients", "charges", f"epsilon at delta {found['delta']:g}"):
        table.add_column(name, justify="left" if name in ("study", "site") else "right")
    for row in found["accounts"]:
        epsilon = f"{row['epsilon']:.4f}"
        table.add_row(
            escape(row["study"]),
            escape(row["site"]),
            str(row["patients"]),
            str(row["charges"]),
            epsilon,
        )
    return table


def lifetime(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that say what a ledger allows, and who has decided what."""
    if (bound := found["lifetime"]) is None:
        return ["no lifetime budget: the ledger of one run, or of an older medfed"]
    lines = [
        f"lifetime budget: epsilon {bound['epsilon']:g} at delta {bound['delta']:g} over all "
        f"studies; identity rule {bound['identity']!r}"
    ]
    for one in found["decisions"]:
        what = "this copy is the newest"
        if "epsilon" in one:
            what = f"epsilon {one['epsilon']:g} at delta {one['delta']:g}"
        by = one.get("operator") or "nobody was asked"
        lines.append(
            f"{str(one['time'])[:10]} {one['kind']}: {what}; {by}: {one.get('reason', '')}".rstrip(
                ": "
            )
        )
    return lines


def claim(found: Mapping[str, Any]) -> Table:
    """Return what `medfed privacy claim` shows: one line an item of the claim."""
    head = "Claim"
    if not found["claimed"]:
        head = "NOT a claim: noise from a seed (privacy.simulation_only)"
    table = Table(
        title=f"{head}: {escape(found['study'])}",
        title_justify="left",
        box=None,
        padding=(0, 1),
        show_header=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in reports.claim_lines(found):
        table.add_row(name, escape(text))
    return table
