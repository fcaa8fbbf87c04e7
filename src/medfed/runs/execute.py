"""A run: one execution of a study in a folder of its own, from the first survey to the summary; and
how it resumes.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from medfed.core import files, own
from medfed.core.checks import (
    LedgerError,
    RunError,
    advising,
)
from medfed.data.encoding import Encoding
from medfed.data.features import open_columns
from medfed.monitor import events
from medfed.monitor.events import Listener, Log
from medfed.monitor.summary import main_model
from medfed.planning.plan import Plan
from medfed.privacy.statement import Statement
from medfed.rounds import aggregation as ways
from medfed.rounds import checkpoints, ranges
from medfed.rounds.aggregation import Keys
from medfed.rounds.prepare import enrol, prepare, rehearse
from medfed.runs.drive import Drive, tell_start
from medfed.runs.folders import OWN_LOG, freeze, hold_fresh, read_plan
from medfed.runs.results import Result, load
from medfed.runs.simulation import Opener, Parties, Simulation
from medfed.runs.standing import FRESH, look, prepare_again, restore
from medfed.runs.statements import ask_statements, tell_founding
from medfed.study import Study


@own.keep()
def run(
    study: Study,
    out: str | Path | None = None,
    data: Path | None = None,
    listeners: Sequence[Listener] = (),
    progress: bool = False,
    parties: Parties | Opener | None = None,
) -> Result:
    """Run a study in a fresh folder: `out`, or runs/<study>-<time>.
    `data` is where downloaded data is looked for.

    `parties` are the sites and aggregators, where they run elsewhere: each with a study, records,
    keys and a ledger of its own, so that `data` is theirs to find; or what starts them once there
    is a folder (`runs.parties`). Without it all are made in this process: a `Simulation`.

    Raises a MedfedError before any training for whatever is wrong with study, data or folder. The
    folder belongs to this run alone from the first moment on, and is gone again where the plan does
    not stand. A round that loses its quorum ends the run, which can be resumed.
    """
    name = secrets.token_hex(8)
    with (
        advising("Nothing was trained."),
        hold_fresh(Path(out) if out else None, study.study.name) as folder,
    ):
        started = callable(parties)
        cast = _open_parties(parties, study, data, folder, progress)
        study = cast.resolve(study)
        fleet = cast.fleet
        plan = prepare(study, fleet, fleet.sites())
        keys = ways.identify(plan, fleet, cast.aggregators or None)
        rehearse(plan, fleet)
        enrol(plan, fleet, name)

        with advising(_tell_spent(plan)):
            plan, told = ranges.find(plan, fleet)
            told += tell_founding(ask_statements(plan, fleet))
            freeze(plan, told, folder, name, started)

        with advising(f"Nothing was trained; `{_resuming(folder, started)}` begins."):
            plan = ranges.encode(plan, fleet)
            return _begin(plan, cast, folder, name, started, keys, listeners, told)


def _open_parties(
    parties: Parties | Opener | None,
    study: Study,
    data: Path | None,
    folder: Path,
    progress: bool = False,
) -> Parties:
    """Return a run's parties: those that were given, started, or else made in this process."""
    if parties is None:
        return Simulation.open(study, data, folder / "sites", progress)
    if callable(parties):
        return parties(study, folder / "sites")
    return parties


def _resuming(folder: Path, started: bool) -> str:
    """Return the command that goes on with a run."""
    return f"medfed resume {folder}{' --processes' if started else ''}"


def _begin(
    plan: Plan,
    cast: Parties,
    folder: Path,
    name: str,
    started: bool,
    keys: Keys | None = None,
    listeners: Sequence[Listener] = (),
    told: Sequence[events.Event] = (),
) -> Result:
    """Drive a run that is written down from its first round."""
    with Log(folder / "events.jsonl", listeners) as log:
        drive = Drive(plan, cast, plan.begin(), log, name, folder)
        tell_start(plan, log, told)
        drive.checkpoint()
        with advising(_way_on(plan, folder, started)):
            return drive.to_the_end(keys)


def _refuse_begun(plan: Plan, told: Mapping[str, Statement], folder: Path) -> None:
    """Raise RunError where a run without a checkpoint has trained,
    LedgerError where its ranges are not charged.
    """
    if plan.guarantee is None or not told:
        return
    if any(one.uses for one in told.values()):
        raise RunError(
            f"{folder}: its checkpoints are gone, and patients have paid for rounds; start the "
            "study again"
        )
    paid = max(one.queries.get("ranges", 0) for one in told.values())
    if "ranges" in plan.guarantee.queries and paid < plan.guarantee.queries["ranges"].times:
        raise LedgerError(
            f"{folder}: the ledger lacks what patients have paid for ranges. Restore it from a "
            "copy."
        )


def _way_on(plan: Plan, folder: Path, started: bool) -> str:
    """Say how a run that is cut short goes on."""
    if plan.guarantee and plan.guarantee.strategy:
        return "A run with correlated noise cannot be resumed: start the study again."
    return f"`{_resuming(folder, started)}` goes on from its last whole round."


@own.keep()
def resume(
    folder: str | Path,
    data: Path | None = None,
    listeners: Sequence[Listener] = (),
    parties: Parties | Opener | None = None,
) -> Result:
    """Go on with a run from its last whole round; it ends with the bits of an uninterrupted one.

    `parties` are those of the run, where they do not live in this process: see `run`.

    A damaged checkpoint is passed over for the one before, and the log says so; a complete run is
    returned as it is. Raises RunError where the folder is no run, was changed, or holds no whole
    checkpoint.
    """
    folder = Path(folder)
    study, encoding = read_plan(folder)
    if (folder / "summary.json").exists() and (finished := load(folder)).complete:
        return finished
    with files.hold(folder):
        # by whoever held it before
        if (folder / "summary.json").exists() and (finished := load(folder)).complete:
            return finished
        with advising(
            f"`{_resuming(folder, callable(parties))}` goes on from its last whole round."
        ):
            return _go_on(folder, study, encoding, data, listeners, parties)


def _go_on(
    folder: Path,
    study: Study,
    encoding: Encoding,
    data: Path | None,
    listeners: Sequence[Listener],
    parties: Parties | Opener | None,
) -> Result:
    """Drive a run from its last whole checkpoint."""
    frozen = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    started = bool(frozen.get("processes"))
    _refuse_other_parties(folder, started, parties)
    unbegun = "told" in frozen and not any((folder / "checkpoints").glob("*"))
    if not unbegun:
        server, header, note = checkpoints.read_last(folder / "checkpoints")
    own.write_to(folder / "sites" / OWN_LOG)
    cast = _open_parties(parties, study, data, folder)
    study = cast.resolve(study)
    before = frozen if unbegun else header
    standing = FRESH if unbegun else look(folder, study, server, header, cast.fleet)
    fleet = standing.fleet(cast.fleet)
    plan = prepare_again(folder, study, encoding, fleet, frozen, before, standing)
    if plan.guarantee and plan.guarantee.strategy and not unbegun:
        raise RunError(
            f"{folder}: a run with correlated noise cannot be resumed, as its past noise is kept "
            "nowhere on purpose; start the study again"
        )

    name = frozen["run"]
    if kept := before.get("ledger"):
        ask_statements(plan, fleet, holds=kept)
    rehearse(plan, fleet)
    enrol(plan, fleet, name, fresh=False)
    paid_before = ask_statements(plan, fleet)

    if unbegun:
        _refuse_begun(plan, paid_before, folder)
        with files.explained(folder):
            (folder / "events.jsonl").unlink(missing_ok=True)
        told = [events.parse(json.dumps(one)).event for one in frozen["told"]]
        return _begin(plan, cast, folder, name, started, listeners=listeners, told=told)

    if plan.keeps:
        restore(folder, plan, fleet, server.round, standing.since)

    record = folder / "events.jsonl"
    if not record.exists() or record.stat().st_size < header["events"]:
        raise RunError(
            f"{record} is missing or was cut; without its events the run cannot be told. Start "
            "the study again"
        )

    if server.round == study.training.rounds:
        paid = _paid_for(record, header["events"], plan)
    else:
        paid = []

    keys = ways.identify(plan, fleet, cast.aggregators or None)
    with files.explained(record):
        os.truncate(record, header["events"])
    with Log(record, listeners) as log:
        log.emit(events.Resumed(server.round, study.training.rounds, note))
        for event in paid:
            log.emit(event)
        drive = Drive(plan, cast, server, log, name, folder, standing)
        drive.take_down(paid_before)  # what a crash lost, of sites that say no more either
        return drive.to_the_end(keys, known={type(event) for event in paid})


def _refuse_other_parties(folder: Path, started: bool, parties: Parties | Opener | None) -> None:
    """Raise RunError where a run would go on with parties that do not hold what its own have kept.

    Args:
        folder: the run's.
        started: whether its parties were processes that the run started.
        parties: those of now.
    """
    if started and parties is None:
        raise RunError(
            f"{folder}: each party of this run was a process with a folder of its own. Resume it "
            "with --processes."
        )
    if not started and callable(parties):
        raise RunError(
            f"{folder}: the parties of this run were one process. Resume it without --processes."
        )


def _paid_for(record: Path, after: int, plan: Plan) -> list[events.Event]:
    """Return what a log tells of the last model after its byte `after`,
    where patients have paid for any of it.

    That is kept: the same model is not tested, and not voted on, twice, nor its threshold chosen
    anew. Baselines are.
    """
    before = record.read_bytes()[:after].count(b"\n")
    told = list(events.read(record))[before:]
    queried = plan.guarantee is not None and plan.guarantee.queries
    if not any(
        isinstance(e, events.Voted) or (isinstance(e, events.Tested) and (e.noised or queried))
        for e in told
    ):
        return []

    main = main_model(plan.study.training.algorithm)
    again = events.RunFinished | events.Resumed | events.Compared
    return [
        e
        for e in told
        if not isinstance(e, again) and not (isinstance(e, events.Tested) and e.model != main)
    ]


def simulate(study: Study, data: Path | None = None, listeners: Sequence[Listener] = ()) -> Result:
    """Run a study in memory: no folder, no checkpoints. For experiments that run many studies."""
    cast = Simulation.open(study, data)
    fleet = cast.fleet
    plan = prepare(cast.study, fleet, fleet.sites())
    name = secrets.token_hex(8)
    rehearse(plan, fleet)
    enrol(plan, fleet, name)
    with advising(_tell_spent(plan)):
        plan, told = ranges.find(plan, fleet)
    plan = ranges.encode(plan, fleet)
    with Log(None, listeners) as log:
        drive = Drive(plan, cast, plan.begin(), log, name)
        tell_start(plan, log, [*told, *tell_founding(ask_statements(plan, fleet))])
        return drive.to_the_end()


def _tell_spent(plan: Plan) -> str:
    """Say what a run has cost that ends while ranges are asked for."""
    if open_columns(plan.study):
        return ranges.tell_paid(plan.study)
    return "Nothing was trained."
