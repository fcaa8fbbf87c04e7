"""Who wrote a run's trail and who signed its study, held to the list of members.

A trail is written in sessions: each begins where its writer opens it, for the run, a resumption or
an audit, and tells in its next line whose keys those are and how far the list of members went.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfed.compliance import consortium, seen
from medfed.compliance.consortium import Consortium
from medfed.compliance.trail import Verified
from medfed.core.checks import CodecError, NoEndError, TrailError, printable, some
from medfed.monitor import events
from medfed.privacy import places
from medfed.rounds.aggregation import COORDINATOR
from medfed.rounds.way import GIVEN_UP
from medfed.secure.identity import ANYBODY, Public, Scope
from medfed.secure.identity import check as check_envelope
from medfed.study import Study


@dataclass(frozen=True)
class Session:
    """The lines of a trail from one opening to the next."""

    path: Path
    first: int  # number of the opening line in the file, from 1
    entries: Sequence[Mapping[str, Any]]  # without that line
    writer: str

    @property
    def where(self) -> str:
        """Its opening line, for what an error says."""
        return f"{self.path}, line {self.first}"

    @property
    def where_told(self) -> str:
        """The line after that."""
        return f"{self.path}, line {self.first + 1}"

    @property
    def told(self) -> Mapping[str, Any]:
        """What its writer tells of itself, of the study and of whoever signed that."""
        facts: Mapping[str, Any] = self.entries[0]["facts"]
        return facts

    @property
    def public(self) -> Public:
        """Its writer's keys."""
        return consortium.from_json(self.told["coordinator"])


def split(path: Path, found: Verified) -> Iterator[Session]:
    """Yield a trail's sessions; each is one writer's, and begins with what that tells of itself.

    Raises TrailError where one is not, NoEndError where the last one is empty.
    """
    openings = [n for n, entry in enumerate(found.entries) if entry["kind"] == "opened"]
    for start, stop in zip(openings, [*openings[1:], len(found.entries)], strict=True):
        opening = found.entries[start]
        inside = found.entries[start + 1 : stop]
        where = f"{path}, line {start + 1}"
        writer = opening["writer"]
        if other := {entry["writer"] for entry in inside} - {writer}:
            raise TrailError(
                f"{where}: {some(other)} wrote lines of a session that {writer!r} opened; expected "
                "one writer. Do not use it."
            )
        if not inside and stop < len(found.entries):
            continue  # a crash came before the next line; nothing was written under this key
        if not inside:
            raise no_end(path, f"line {stop} opens it again, for a resumption or an audit")
        if inside[0]["kind"] not in ("study", "audited"):
            raise TrailError(
                f"{where}: {inside[0]['kind']!r} follows the opening; expected what its writer "
                "tells of itself. Check it with the medfed that wrote it."
            )
        session = Session(path, start + 1, inside, writer)
        public = session.public
        if (public.name, public.signing.hex()) != (writer, opening["facts"]["public"]):
            raise TrailError(
                f"{where}: {writer!r} opens with another key than the next line tells of "
                f"{public.name!r}. Do not use it."
            )
        if public.role != "coordinator":
            raise TrailError(
                f"{where}: {writer!r} is {public.role}; only a coordinator writes a run's trail. "
                "Do not use it."
            )
        if writer != COORDINATOR:
            raise TrailError(
                f"{where}: {writer!r} wrote it; expected {COORDINATOR!r}, as a run's coordinator "
                "is called on every list. Do not use it."
            )
        yield session


def no_end(path: Path, last: str) -> NoEndError:
    """Return what is said of a trail without an end; `last` says with what it stops."""
    run = path.parent.parent
    return NoEndError(
        f"{path} has no end ({last}): the run was cut off, or its last lines are missing. "
        f"`medfed resume {run}` goes on with it; if the run had ended, restore the trail from a "
        "copy (or, where an audit was cut off, repeat it)."
    )


def check_signatures(session: Session, planned: events.Planned) -> None:
    """Raise TrailError unless every participant has signed this study for this run."""
    told = session.told
    where = session.where_told
    participants = {name for name, size in planned.sizes.items() if size["train"]}
    signed = told["signed"]
    if lacking := sorted(participants - set(signed)):
        raise TrailError(
            f"{where}: {some(lacking)} took part and did not sign the study. Do not use it; ask "
            "them for their study files."
        )
    if strange := sorted(set(signed) - participants):
        raise TrailError(
            f"{where}: {some(strange)} signed and took no part by events.jsonl. Do not use it."
        )
    for name, one in signed.items():
        site = Public(name, "site", bytes.fromhex(one["public"]), bytes(32))
        scope = Scope(told["digest"], told["run"], 0)
        try:
            check_envelope(bytes.fromhex(one["envelope"]), site, scope, "study", ANYBODY)
        except CodecError as error:
            raise TrailError(
                f"{where}: the signature of {name!r} under the study does not hold: {error}"
            ) from error
    for entry in session.entries[1:]:
        if strange := sorted(set(entry["facts"].get("accepted", ())) - set(signed)):
            raise TrailError(
                f"{where}: {some(strange)} is in a sum (line {entry['number'] + 1}) and did not "
                "sign the study. Do not use it."
            )


def check_keys(
    folder: Path, study: Study, sessions: Sequence[Session], given: Path | None, covered: int
) -> Consortium | None:
    """Return the list of members under which a run's keys hold; None where its study names none.

    `covered` is the number of the line whose head was told; -1 for none. Raises TrailError for a
    key that the consortium never approved, approved in another role or revoked, and for a list that
    is older than the run's, or than one that was seen here.
    """
    named = study.security.federation
    if not given and not named:
        if any(session.told["consortium"] for session in sessions):
            raise TrailError(
                f"{folder}: the trail tells of a consortium and study.toml names no list. Do not "
                "use it."
            )
        return None

    # The list: the reader's own, or the one that the study names.
    try:
        listed = consortium.read(
            given or study.folder / named, fingerprint="" if given else study.security.fingerprint
        )
    except TrailError as error:
        if given:
            raise
        raise TrailError(
            f"{error} The study names this list of members: give your copy by --federation FOLDER."
        ) from error
    used = [(session.where, session.writer, session.public.signing.hex()) for session in sessions]
    for session in sessions:
        signed = session.told.get("signed", {})
        used += [(session.where, name, one["public"]) for name, one in signed.items()]
    approved = listed.approved_keys()
    if strange := {name: where for where, name, key in used if (name, key) not in approved}:
        raise TrailError(
            f"{next(iter(strange.values()))}: {some(strange)} signed with keys that "
            f"{listed.path.parent} never approved; run with security.federation, or give the "
            "run's own consortium"
        )

    # The keys: approved in their role, as of when each session began.
    before = 0
    for session in sessions:
        _check_session_keys(session, listed)
        lines = session.told["members"]["lines"]
        if lines < before:
            raise TrailError(
                f"{session.where}: its list of members had {lines} lines, {before} were known "
                "before: it was rolled back. Do not use the run's model."
            )
        before = lines
    revoked = listed.revoked_keys()
    for session in sessions:
        if session.public.signing in revoked and covered < session.entries[-1]["number"]:
            raise TrailError(
                f"{session.where}: the key of {session.writer!r} is revoked by now; whoever has "
                "it could have written this trail since. Give the head that was told before the "
                "revocation (--head), or run the study again."
            )

    # The reader's own state: no list older than one that it has seen.
    listed.keep_up(places.home() / seen.READER)
    return listed


def _check_session_keys(session: Session, listed: Consortium) -> None:
    """Raise TrailError unless a session's keys were approved, in their role, when it began."""
    where = session.where
    told = session.told
    if told["consortium"] != listed.authority.fingerprint:
        raise TrailError(
            f"{where}: it was written under the consortium {told['consortium'] or 'of nobody'}, "
            f"and {listed.path.parent} is that of {listed.authority.fingerprint}; give the run's "
            "own consortium"
        )
    roster = listed.as_of(told["members"])
    used = [(session.writer, "coordinator", session.public.signing.hex())]
    used += [(name, "site", one["public"]) for name, one in told.get("signed", {}).items()]
    for name, role, key in used:
        try:
            member = roster[name]
        except CodecError as error:
            raise TrailError(
                f"{where}: when this began, {error} Do not use the run's model."
            ) from error
        if member.role != role or member.signing.hex() != key:
            raise TrailError(
                f"{where}: {name!r} signs as {role}; {listed.path.parent} had it as {member.role}, "
                f"{member.fingerprint}. Do not use the run's model."
            )
    if roster[session.writer] != session.public:
        raise TrailError(
            f"{where}: {session.writer!r} tells other keys than {listed.path.parent} had for it"
        )


def check_fingerprints(sessions: Sequence[Session], told: Collection[str]) -> None:
    """Raise TrailError for a session under other keys than the coordinator's that were told."""
    for session in sessions:
        if told and not any(consortium.matches(one, session.public) for one in told):
            raise TrailError(
                f"{session.where}: the key has the fingerprint {session.public.fingerprint}; "
                f"expected {' or '.join(told)}. Ask the coordinator; do not use it before."
            )


def tell(
    end: Mapping[str, Any],
    sessions: Sequence[Session],
    listed: Consortium | None,
    given: bool,
    told: Collection[str],
) -> Iterator[str]:
    """Yield what a reader must know of a run that holds, and of who vouches for it.

    Args:
        end: the line that ends the run.
        sessions: the trail's.
        listed: the list of members; None where the study names none.
        given: whether it is the reader's own copy.
        told: the coordinator's fingerprints that the reader was told.
    """
    if end["facts"]["status"] != "complete":
        yield f"The run is {end['facts']['status']}: summary.json says why."
    entries = [entry for session in sessions for entry in session.entries]
    for facts in [entry["facts"] for entry in entries if entry["kind"] == GIVEN_UP]:
        yield (
            f"Given up, on record: round {facts['round']} by {printable(facts['operator'])} "
            f"({printable(facts['reason'])})."
        )
    if away := {name for session in sessions for name in session.told.get("away", ())}:
        yield (
            f"Away when the run was resumed: {some(sorted(away))}; the signature is the one from "
            "when it joined, and in those sums it is not."
        )
    if listed is None and not told:
        yield (
            "Whose key signed this nobody can tell: the study names no list of members "
            "(security.federation). Ask the coordinator for its fingerprint, and compare "
            "(--coordinator)."
        )
    if listed is None:
        yield "The sites' keys are those that the coordinator tells: it may have made them itself."
        return
    if not given:
        yield (
            "The list of members is the one that the study names: compare the consortium's "
            "fingerprint, or give your own copy (--federation)."
        )
    gone = {name for session in sessions for name in session.told.get("signed", {})}
    if gone := gone & listed.roster.revoked:
        yield f"Revoked since, on the list when the run began: {some(sorted(gone))}."
    if any(session.public.signing in listed.revoked_keys() for session in sessions):
        yield "The coordinator's key is revoked by now: the head that was told vouches for it."
