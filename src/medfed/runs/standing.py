"""In what a resumed run stands: what operators gave up, and who is away.

A site that answers nothing ends a resumption, until a round was given up on record: then the run
goes on without it. It is asked nothing more until the run is resumed again, pays for nothing and is
in no sum; of it stand what it told and signed when it joined. Where it is back, it joins as before,
and goes back to what it remembered when it was last there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medfed.compliance.trail import Verified
from medfed.core import codec
from medfed.core.checks import RunError, reasons
from medfed.data.encoding import Encoding
from medfed.engine.port import Fleet, Without, gather
from medfed.learn.algorithms import Server
from medfed.monitor import events
from medfed.planning.cohorts import cohort
from medfed.planning.plan import Plan
from medfed.planning.resolved import fewest_opened
from medfed.rounds.prepare import prepare
from medfed.runs.giving_up import read_given_up
from medfed.runs.stopped import check_trail
from medfed.study import Study


@dataclass(frozen=True)
class Standing:
    """What a run finds when it is resumed; of one that begins nothing."""

    given_up: Mapping[int, events.GivenUp] = field(default_factory=dict)  # by round
    away: Mapping[str, str] = field(default_factory=dict)  # by site, why
    # by site that is, or was at the last checkpoint, away: the round of the last state that it kept
    since: Mapping[str, int] = field(default_factory=dict)
    signed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # what it signed
    heads: Mapping[str, str] = field(default_factory=dict)  # and its ledger's, which it told last

    @property
    def away_since(self) -> dict[str, int]:
        """Since which round those are away who are; the others keep their state again."""
        return {name: self.since[name] for name in self.away}

    def fleet(self, fleet: Fleet) -> Fleet:
        """Return the fleet without those who are away."""
        return Without(fleet, self.away) if self.away else fleet


FRESH = Standing()
"""Of a run that begins."""


def look(
    folder: Path, study: Study, server: Server, header: Mapping[str, Any], fleet: Fleet
) -> Standing:
    """Return in what a stopped run stands.

    Args:
        folder: the run's.
        study: its study.
        server: the state that its last checkpoint holds.
        header: of that checkpoint.
        fleet: its sites; each is asked who it is, where a round was given up.

    Raises as `check_trail` and `read_given_up` do.
    """
    trail = check_trail(folder, study, server, header)
    given_up = read_given_up(folder, study, server.round, trail)
    before = header.get("away", {})
    if not given_up or trail is None:
        return Standing()
    names = list(_planned(folder).sizes)
    known = [name for name in names if name in fleet.sites()]
    away = dict.fromkeys(names, "it is not connected")
    for name, reply in gather(fleet, known, "identify", codec.encode({}), _PATIENCE).items():
        away[name] = reply.error
    why = "answered nothing when the run was resumed"
    away = {name: f"{why}: {error}" for name, error in away.items() if error}
    heads = header.get("ledger") or {}
    if isinstance(heads, str):
        heads = dict.fromkeys(names, heads)
    return Standing(
        given_up,
        away,
        dict.fromkeys(away, server.round) | before,
        _find_signed(trail),
        {name: heads[name] for name in away if name in heads},
    )


_PATIENCE = 600.0  # seconds; nothing is trained meanwhile


def prepare_again(
    folder: Path,
    study: Study,
    encoding: Encoding,
    fleet: Fleet,
    frozen: Mapping[str, Any],
    before: Mapping[str, Any],
    standing: Standing,
) -> Plan:
    """Return a resumed run's plan, every site that is there having encoded its rows.

    Args:
        folder: the run's.
        study: as its sites have it.
        encoding: the run's.
        fleet: its sites, without those who are away.
        frozen: what plan.json holds.
        before: what was surveyed, by the last checkpoint or plan.json.
        standing: in what the run stands.

    Raises RunError where a table is not what it was, or too few sites are there for any round.
    """
    if not standing.away:
        plan = prepare(study, fleet, fleet.sites(), encoding)
        if plan.surveyed != before["surveyed"]:
            raise _changed(folder)
        return plan

    planned = _planned(folder)
    told = {name: {**planned.sizes[name], "labels": planned.labels[name]} for name in standing.away}
    plan = prepare(study, fleet, list(planned.sizes), encoding, told)
    tables = frozen.get("tables", {})
    if any(tables.get(name) != digest for name, digest in plan.tables.items()):
        raise _changed(folder)
    drawn = cohort(study, plan.participants)
    least = max(plan.quorum(drawn), fewest_opened(study, drawn))
    if len(plan.present) < least:
        raise RunError(
            f"{folder}: {len(plan.present)} of {len(plan.participants)} sites are there, expected "
            f"{least} or more (training.quorum, security.min_group): no round could be opened. "
            f"{reasons(standing.away)}"
        )
    return replace(plan, surveyed=before["surveyed"])


def _changed(folder: Path) -> RunError:
    return RunError(f"{folder}: the data has changed since the run began; start the study again")


def restore(folder: Path, plan: Plan, fleet: Fleet, round: int, since: Mapping[str, int]) -> None:
    """Have the sites that are there go back to what they remembered after a round; those that were
    away, `since` a round, to what they remembered after that. Raises RunError where one cannot.
    """
    groups: dict[int, list[str]] = {}
    for name in plan.present:
        groups.setdefault(since.get(name, round), []).append(name)
    for number, names in groups.items():
        payload = codec.encode({"round": number})
        for reply in gather(fleet, names, "restore", payload, _PATIENCE).values():
            if reply.error:
                raise RunError(
                    f"{folder}: site {reply.site!r} cannot go back to round {number}: {reply.error}"
                )


def _planned(folder: Path) -> events.Planned:
    """Return what the log tells of who takes part."""
    for event in events.read(folder / "events.jsonl"):
        if isinstance(event, events.Planned):
            return event
    raise RunError(f"{folder / 'events.jsonl'} tells of no plan; restore it from a copy")


def _find_signed(trail: Verified) -> dict[str, Mapping[str, str]]:
    """Return what each site signed when it last joined, by a run's trail."""
    found: dict[str, Mapping[str, str]] = {}
    for entry in trail.entries:
        if entry["kind"] == "study":
            found |= entry["facts"]["signed"]
    return found
