"""A run's folder, held to its trail: whole, of this run, signed by whom it must be, and nothing
altered that pages are made of.

What is asked for is the reader's: the list of members that it gives, the head and fingerprints that
it was told, and what it has itself seen of that list before.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfed.compliance import trail
from medfed.compliance.trail import Verified, read_file
from medfed.core.checks import RunError, TrailError, some
from medfed.monitor import events
from medfed.rounds.way import GIVEN_UP, OPENED
from medfed.runs import sealing
from medfed.runs.folders import read_plan
from medfed.runs.giving_up import hides_rows
from medfed.runs.signers import (
    Session,
    check_fingerprints,
    check_keys,
    check_signatures,
    no_end,
    split,
    tell,
)
from medfed.screens import dashboards, flat_logs, reports
from medfed.screens.story import Story
from medfed.secure.chain import FIRST
from medfed.secure.identity import holds
from medfed.study import Study


@dataclass(frozen=True)
class Checked:
    """A run that holds: its trail, and who vouches for it."""

    trail: Verified
    model: str  # sha256 of model.safetensors
    rounds: int  # whose models follow each other
    signed_by: str
    fingerprints: list[str]  # of its coordinator's keys; a resumed run may have several
    consortium: str  # fingerprint of the list's key; empty where the run's keys are nobody's
    sites: list[str]  # who signed the study
    told: list[str]  # what a reader must know of it, in words


def verify_run(
    folder: str | Path,
    members: Path | None = None,
    head: str = "",
    coordinator: Collection[str] = (),
) -> Checked:
    """Check a run's folder against its trail, and return what was found.

    Raises TrailError for what does not hold, with the file, the line, what was expected and what
    to do; NoEndError where the trail has no end.

    Guarantee: the trail is whole and ends, and is this folder's: of its study and its run. It was
    written by a coordinator, of the list of members where the study names one, in good standing
    when the run began and not revoked since. Every participant has signed this study for this run.
    Model, events, plan, study, summary, claim and its audit, and pages and tables that lie in the
    folder, are those that it binds, or follow from them.

    Edge cases:
    - a study without a list: the key is whatever the trail tells, and whose it is nobody can tell;
      `told` says so, `coordinator` checks it;
    - a coordinator revoked after the run is refused: with its key a trail could have been written
      since, and no time in it is worth anything. A `head` that was told before lets it pass;
    - a site revoked after the run is told, not refused: the coordinator vouches for when it signed;
    - lines after the end that sign an audit can be cut unseen, unless `head` is one of theirs;
    - a folder put back as a whole to how an earlier end left it (before a resumption) holds.

    Args:
        folder: the run's.
        members: the folder of the list of members; default: the one that the study names.
        head: a hash of one of its lines that was kept elsewhere.
        coordinator: fingerprints of the keys that the coordinator may have had; any, where empty.
    """
    folder = Path(folder)
    path = folder / sealing.TRAIL
    if path.parent.is_symlink():
        raise TrailError(f"{path.parent} is a link; expected a folder. Restore it from a copy.")
    found = trail.verify(path, holds)
    if head and head not in found.hashes:
        raise TrailError(
            f"{path}: no line has hash {head[:16]}..., which was told; lines are missing, or it "
            "was written anew. Restore it from a copy."
        )

    with _explained(path):
        sessions = list(split(path, found))
        end = _find_end(path, sessions)
        _check_run(folder, sessions)
        _check_files(folder, end)
        study = _read_study(folder)
        planned = _read_planned(folder)
        runs = [session for session in sessions if session.entries[0]["kind"] == "study"]
        for session in runs:
            check_signatures(session, planned)
        covered = found.hashes.index(head) if head else -1
        listed = check_keys(folder, study, sessions, members, covered)
        check_fingerprints(sessions, coordinator)
        _check_summary(folder, end, found)
        _check_claim(folder, end, sessions)
        rounds = _count_rounds(path, runs)
        _check_given_up(folder, study, end, runs)
        told = list(tell(end, sessions, listed, members is not None, coordinator))
    _check_pages(folder)

    last = sessions[-1]
    return Checked(
        found,
        end["facts"]["model"],
        rounds,
        last.writer,
        list(dict.fromkeys(session.public.fingerprint for session in sessions)),
        listed.authority.fingerprint if listed else "",
        sorted(runs[-1].told["signed"]),
        told,
    )


def verify_trail(
    folder: Path, members: Path | None = None, head: str = "", coordinator: Collection[str] = ()
) -> Verified:
    """Return a run's trail; raise as `verify_run` does where the run does not hold."""
    return verify_run(folder, members, head, coordinator).trail


def verify_model(folder: str | Path, members: Path | None = None) -> dict[str, Any]:
    """Check that a run's model is the one its trail ends with, and all else that `verify_run` does.

    Returns the model's sha256, the rounds whose models follow each other, who signed, and what a
    reader must know beside it; raises TrailError where something does not hold.
    """
    found = verify_run(folder, members)
    return {
        "model": found.model,
        "rounds": found.rounds,
        "signed_by": found.signed_by,
        "sites": found.sites,
        "told": found.told,
    }


# The trail itself ---------------------------------------------------------------------------------


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Have facts of another form than a run writes end as a TrailError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TrailError(
            f"{path}: a line tells not what a run of this medfed tells ({error!r}); check it with "
            "the medfed that wrote it, or restore it from a copy"
        ) from error


def _find_end(path: Path, sessions: Sequence[Session]) -> Mapping[str, Any]:
    """Return the line that ends the run: nothing follows it but audits."""
    runs = [session for session in sessions if session.entries[0]["kind"] == "study"]
    if not runs:
        raise TrailError(f"{path}: no line says which study was signed, and by whom; do not use it")
    last = runs[-1].entries[-1]
    if last["kind"] != "finished":
        raise no_end(path, f"line {last['number'] + 1}, {last['kind']!r}, is the run's last")
    for session in runs:
        kinds = [entry["kind"] for entry in session.entries]
        if strange := set(kinds[1:]) - {OPENED, GIVEN_UP, "finished"}:
            raise TrailError(f"{session.where}: {some(strange)} is no line of a run; do not use it")
        if "finished" in kinds[:-1]:
            raise TrailError(f"{session.where}: the session goes on after its end; do not use it")
    for session in sessions:
        if session not in runs and len(session.entries) > 1:
            raise TrailError(f"{session.where}: more than an audit; do not use it")
    return last


def _check_run(folder: Path, sessions: Sequence[Session]) -> None:
    """Raise TrailError where the trail is another run's, or another study's, than the folder."""
    plan = json.loads(read_file(folder / "plan.json", "Restore it from a copy."))
    for session in sessions:
        if session.entries[0]["kind"] != "study":
            continue
        for name, of in (("run", "run"), ("digest", "study")):
            if session.told[name] != plan[name]:
                raise TrailError(
                    f"{session.where_told}: it is the trail of {of} "
                    f"{str(session.told[name])[:16]}..., and {folder / 'plan.json'} that of "
                    f"{str(plan[name])[:16]}...: one of them is from elsewhere. Restore the "
                    "folder from a copy."
                )


def _read_study(folder: Path) -> Study:
    """Return the folder's study; raise TrailError where its digest is not the plan's."""
    try:
        return read_plan(folder)[0]
    except RunError as error:
        raise TrailError(str(error)) from error


# What the end binds -------------------------------------------------------------------------------


def _check_files(folder: Path, end: Mapping[str, Any]) -> None:
    """Raise TrailError for a file that is not the one that the end binds."""
    bound = end["facts"]["files"]
    if set(bound) != set(sealing.BOUND) or bound["model.safetensors"] != end["facts"]["model"]:
        raise TrailError(
            f"{folder / sealing.TRAIL}, line {end['number'] + 1}: it binds {some(bound)}; expected "
            f"{some(sealing.BOUND)}. Check it with the medfed that wrote it."
        )
    for name, digest in bound.items():
        now = sealing.digest_file(folder / name)
        if now != digest:
            raise _altered(folder, folder / name, now, digest)


def _altered(folder: Path, path: Path, now: str, bound: str) -> TrailError:
    return TrailError(
        f"{path} has sha256 {now[:16]}..., the trail ends with {bound[:16]}...; it was changed "
        f"after the run. Restore it from a copy; nothing that is made of {folder} can be used."
    )


def _read_planned(folder: Path) -> events.Planned:
    """Return what the log tells of who takes part."""
    told = list(events.read(folder / "events.jsonl"))
    planned = [event for event in told if isinstance(event, events.Planned)]
    if not planned:
        raise TrailError(
            f"{folder / 'events.jsonl'} tells of no plan; expected who takes part. Restore it."
        )
    return planned[-1]


def _check_summary(folder: Path, end: Mapping[str, Any], found: Verified) -> None:
    """Raise TrailError where the summary, or the head in it, is not what the run ended with."""
    path = folder / sealing.SUMMARY
    way = f"The trail binds it: restore it from a copy, or `medfed resume {folder}` ends the run."
    told = _read_json(path, way)
    now = sealing.digest(sealing.without_head(told))
    if now != end["facts"]["summary"]:
        raise _altered(folder, path, now, end["facts"]["summary"])
    expected = {"entries": end["number"] + 1, "head": found.hashes[end["number"]]}
    if told.get("trail") != expected:
        raise TrailError(
            f"{path}: trail={told.get('trail')!r}; expected {expected!r}, the trail's end. It was "
            "changed after the run; restore it from a copy."
        )


def _check_claim(folder: Path, end: Mapping[str, Any], sessions: Sequence[Session]) -> None:
    """Raise TrailError where the claim, or the audit in it, is not one that was signed."""
    path = folder / sealing.CLAIM
    bound = end["facts"]["claim"]
    if bound is None:
        if path.exists() or path.is_symlink():
            raise TrailError(f"{path}: the run made no claim; remove it, and do not rely on it")
        return

    claim = _read_json(path, "The trail binds it: restore it from a copy.")
    now = sealing.digest(sealing.without_audit(claim))
    if now != bound:
        raise _altered(folder, path, now, bound)

    audits = [
        session.told["audit"]
        for session in sessions
        if session.entries[0]["number"] > end["number"]
    ]
    audit = claim.get("audit")
    if audits and (audit is None or sealing.digest(audit) != audits[-1]):
        raise TrailError(
            f"{path}: its audit is not the one that was signed into the trail. Restore it from "
            f"{folder / sealing.AUDIT}, or repeat it with `medfed audit {folder}`."
        )
    if audit is not None and not audits:
        raise TrailError(
            f"{path}: nobody signed its audit into the trail. Repeat it with `medfed audit "
            f"{folder}`."
        )
    beside = folder / sealing.AUDIT
    if audits and sealing.digest(_read_json(beside, "Restore it from a copy.")) != audits[-1]:
        raise TrailError(
            f"{beside} is not the audit that was signed into the trail. Repeat it with `medfed "
            f"audit {folder}`."
        )


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return a file's object; raise TrailError where readers may differ in what they take from it:
    a name that stands twice, a number that is none.
    """
    try:
        told = json.loads(
            read_file(path, advice), object_pairs_hook=_take_once, parse_constant=_refuse_constant
        )
        if not isinstance(told, dict):
            raise ValueError("expected an object")
    except (ValueError, RecursionError) as error:
        raise TrailError(
            f"{path} is not what a run writes ({error}): it was changed. {advice}"
        ) from error
    return told


def _take_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{some(sorted({n for n in names if names.count(n) > 1}))} stands twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


# What follows -------------------------------------------------------------------------------------


def _count_rounds(path: Path, sessions: Sequence[Session]) -> int:
    """Return how many models follow each other; raise TrailError where one does not."""
    rounds = 0
    models = {0: FIRST.hex()}  # by round: the last one's, also where a resumed run plays it again
    for session in sessions:
        for entry in session.entries:
            if entry["kind"] not in (OPENED, GIVEN_UP):
                continue
            facts = entry["facts"]
            if facts["previous"] != models.get(facts["round"] - 1, ""):
                raise TrailError(
                    f"{path}, line {entry['number'] + 1}: the model of round {facts['round']} does "
                    "not follow the one before. Do not use it."
                )
            models[facts["round"]] = facts["model"]
            rounds += entry["kind"] == OPENED
    return rounds


def _check_given_up(
    folder: Path, study: Study, end: Mapping[str, Any], sessions: Sequence[Session]
) -> None:
    """Raise TrailError unless every round of the run was opened or given up, and its log says so
    too: which, by whom and why; or where one was opened after it was given up, or before it without
    noise that hides its rows.
    """
    path = folder / sealing.TRAIL
    given: dict[int, tuple[str, str]] = {}
    opened: set[int] = set()
    for entry in (entry for session in sessions for entry in session.entries):
        facts = entry["facts"]
        if entry["kind"] == GIVEN_UP:
            if facts["round"] in given:
                raise TrailError(
                    f"{path}, line {entry['number'] + 1}: round {facts['round']} is given up a "
                    "second time. Do not use it."
                )
            if facts["round"] in opened and not hides_rows(study):
                raise TrailError(
                    f"{path}, line {entry['number'] + 1}: round {facts['round']} was opened before "
                    "it was given up, and no noise hides its rows: beside the next sum it tells "
                    "those of whoever was gone. Do not use it."
                )
            given[facts["round"]] = facts["operator"], facts["reason"]
        elif entry["kind"] == OPENED:
            if facts["round"] in given:
                raise TrailError(
                    f"{path}, line {entry['number'] + 1}: round {facts['round']} is opened after "
                    "it was given up. Do not use it."
                )
            opened.add(facts["round"])

    log = folder / "events.jsonl"
    told = list(events.read(log))
    skipped = [event for event in told if isinstance(event, events.GivenUp)]
    finished = {event.round for event in told if isinstance(event, events.RoundFinished)}
    rounds = range(1, end["facts"]["rounds"] + 1)
    behind = {number: given[number] for number in rounds if number in given}
    if [(o.round, (o.operator, o.reason)) for o in skipped] != sorted(behind.items()):
        raise TrailError(
            f"{log} tells of rounds given up ({some(o.round for o in skipped) or 'none'}) "
            f"otherwise than {path} ({some(sorted(behind)) or 'none'}). Do not use it."
        )
    for number in rounds:
        if (number in behind) == (number in finished) or number not in opened | set(behind):
            raise TrailError(
                f"{path}: round {number} was neither opened nor given up, or {log} tells it "
                "otherwise. Do not use it."
            )


def _check_pages(folder: Path) -> None:
    """Raise TrailError for a page or table of a run that does not follow from its files."""
    made = [path for path in _list_made(folder) if path.exists() or path.is_symlink()]
    if not made:
        return
    story = Story.of(folder)
    for path in made:
        if read_file(path, "Remove it.") != _make_again(story, path):
            raise TrailError(
                f"{path} is not what follows from the run's files: it was changed, or made before "
                f"the last audit or by another medfed. `medfed report {folder}` makes pages anew "
                "(tables: --export); or remove it."
            )


def _list_made(folder: Path) -> Iterator[Path]:
    """Yield where pages and tables of a run are written, unless another place is named."""
    reports_of = folder / "reports"
    yield from (reports_of / name for name in (*dashboards.PAGES, _CLAIM_PAGE))
    for place in (folder / "export", reports_of / "export"):
        yield from (place / f"{t}.{kind}" for t in flat_logs.TABLES for kind in flat_logs.FORMATS)


_CLAIM_PAGE = "privacy.html"


def _make_again(story: Story, path: Path) -> bytes:
    """Return what a page or a table says where nobody has changed it."""
    if path.name in dashboards.PAGES:
        made: bytes | str = dashboards.page(story, path.name)
    elif path.name == _CLAIM_PAGE:
        made = reports.privacy_page(story.claim) if story.claim else ""
    else:
        made = flat_logs.serialise(path.suffix[1:], flat_logs.tables(story)[path.stem])
    return made.encode() if isinstance(made, str) else made
