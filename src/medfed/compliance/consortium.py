"""The consortium's list of who takes part: requests, approvals, revocations, signed and chained.

The list is a trail (`compliance.trail`) that only the consortium's key writes: nobody else can add
a line, and nobody, not even the consortium, can change one unseen. Members compare that key's
fingerprint once, over a channel of their own; from the first list that a party has seen it takes no
older one, and no other (`compliance.seen`).
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medfed.compliance import seen, trail
from medfed.compliance.trail import Trail
from medfed.core import files
from medfed.core.checks import SignatureError, TrailError, refuse_unprintable
from medfed.secure import key_files
from medfed.secure.identity import Identity, Public, Roster, holds
from medfed.secure.record import Record
from medfed.study import Study

ROLES = ("site", "aggregator", "coordinator", "consortium")
"""What a key is for. The consortium's signs the list of members and takes no part in runs."""


@dataclass(frozen=True)
class Consortium:
    """A list of members that holds: who they are, under whose key, and all that led to it."""

    roster: Roster
    authority: Public
    history: list[dict[str, Any]]
    head: str
    hashes: list[str]  # of each line
    path: Path

    def tell_head(self) -> dict[str, Any]:
        """Return how far the list goes, as a trail records it."""
        return {"lines": len(self.hashes), "head": self.head}

    def as_of(self, told: Mapping[str, Any]) -> Roster:
        """Return who was on the list where `tell_head` told this of it.

        Raises TrailError where the list lacks that line: it is older, or another.
        """
        lines = told["lines"]
        if type(lines) is not int or lines < 1 or self.hashes[lines - 1 : lines] != [told["head"]]:
            raise TrailError(
                f"{self.path} has {len(self.hashes)} lines and lacks line {lines} with hash "
                f"{str(told['head'])[:16]}..., under which the run began: it is older, rolled "
                "back or forked. Get the newest list from the consortium."
            )
        return _walk(self.path, self.history[:lines])[0]

    def revoked_keys(self) -> set[bytes]:
        """Return the signing keys that were revoked, and not approved again since.

        A key that its owner replaced is not among them.
        """
        current: dict[str, bytes] = {}
        found: set[bytes] = set()
        for entry in self.history:
            facts = entry["facts"]
            if entry["kind"] == "approved":
                current[facts["name"]] = from_json(facts).signing
                found.discard(current[facts["name"]])
            elif entry["kind"] == "revoked":
                found.add(current[facts["name"]])
        return found

    def approved_keys(self) -> set[tuple[str, str]]:
        """Return the names and signing keys, in hex, that the consortium ever approved."""
        return {
            (entry["facts"]["name"], entry["facts"]["signing"])
            for entry in self.history
            if entry["kind"] == "approved"
        }

    def vouched_keys(self) -> set[tuple[str, str]]:
        """Return the names and signing keys, in hex, that were approved and not revoked since, also
        those that their owner has replaced.
        """
        gone = {key.hex() for key in self.revoked_keys()}
        return {(name, key) for name, key in self.approved_keys() if key not in gone}

    def keep_up(self, own: Path) -> None:
        """Refuse this list where it lacks the head last seen by a party, and remember it for it.

        `own` is where the party keeps what it has seen; raises as `seen.keep_up` does.
        """
        seen.keep_up(own, self.authority.fingerprint, self.hashes, self.path)


def request(identity: Identity, old: Identity | None = None) -> dict[str, Any]:
    """Return an enrolment request: the party's public keys, signed with them and, to replace `old`,
    with those too.
    """
    facts = to_json(identity.public)
    asked = {**facts, "signature": identity.sign(_signing_input(facts)).hex()}
    if old:
        asked["replaces"] = old.sign(_signing_input(facts)).hex()
    return asked


def begin(folder: Path, authority: Identity, own: Path | None = None) -> None:
    """Begin a consortium's list in a folder.

    `own` is where the consortium keeps what it has seen (`seen.beside` its key file). Raises
    TrailError where the folder has a list, or the key has begun one before.
    """
    if own and (last := seen.read(own).get(authority.public.fingerprint)):
        raise TrailError(
            f"{own}: this key has begun a list, of {last.lines} lines; members would take a second "
            "one for a fork. Restore that list, or make another key."
        )
    if (folder / "members.jsonl").exists():
        raise TrailError(
            f"{folder} holds members.jsonl already; give another folder, or approve members into "
            "this one"
        )
    _append(folder, authority, "founded", to_json(authority.public))
    if own:
        read(folder, authority.public, own=own)


def approve(
    folder: Path,
    authority: Identity,
    asked: Mapping[str, Any],
    fingerprint: str = "",
    own: Path | None = None,
) -> Public:
    """Put the party of an enrolment request on the list, and return what was approved.

    `fingerprint` is what the party told over another channel. Raises SignatureError where the
    request has another, is not signed by its own keys, or comes for a member in good standing and
    is not signed by that member's present keys too. `own` is as for `begin`: a list that was rolled
    back is refused, as what is added to it would be a fork.
    """
    member = from_json(asked)
    now = read(folder, authority.public, own=own)
    data = _signing_input(to_json(member))
    name = member.name
    if fingerprint and not matches(fingerprint, member):
        raise SignatureError(
            f"the request of {name!r} has fingerprint {member.fingerprint}, told was "
            f"{fingerprint}; ask the party again"
        )
    if not holds(member.signing, _parse_hex(asked.get("signature")), data):
        raise SignatureError(
            f"the request of {name!r} is not signed by its own keys; have it made anew"
        )
    if name in list(now.roster) and not holds(
        now.roster[name].signing, _parse_hex(asked.get("replaces")), data
    ):
        raise SignatureError(
            f"{name!r} is a member with other keys; expected a request signed by those too "
            "(`medfed key request --replaces`), or revoke it first"
        )

    _append(folder, authority, "approved", to_json(member))
    if own:
        read(folder, authority.public, own=own)
    return member


def revoke(
    folder: Path, authority: Identity, name: str, reason: str, own: Path | None = None
) -> None:
    """Take a member off the list: from now on its messages count nowhere.
    Raises SignatureError, RevokedError, RunError for a reason that is no printable line; `own` is
    as for `approve`.
    """
    _ = read(folder, authority.public, own=own).roster[name]
    refuse_unprintable("reason", reason)
    _append(folder, authority, "revoked", {"name": name, "reason": reason})
    if own:
        read(folder, authority.public, own=own)


def read(
    folder: Path, authority: Public | None = None, fingerprint: str = "", own: Path | None = None
) -> Consortium:
    """Return a consortium's list, every line checked.

    `own` is where its reader keeps what it has seen: a list that does not go on from there is
    refused, and this one is remembered. Raises TrailError where that is so, where a line was
    changed or another key than the founder's wrote one, or the founder's is not `authority` or has
    not this `fingerprint`.
    """
    path = folder / "members.jsonl"
    verified = trail.verify(path, holds)
    roster, founder = _walk(path, verified.entries)
    if authority and authority.signing != founder.signing:
        raise TrailError(
            f"{path} belongs to the key {founder.fingerprint}; {authority.fingerprint} may not "
            "write it"
        )
    if fingerprint and not matches(fingerprint, founder):
        raise TrailError(
            f"{path} has the fingerprint {founder.fingerprint}; expected {fingerprint}. Ask the "
            "consortium."
        )

    found = Consortium(roster, founder, verified.entries, verified.head, verified.hashes, path)
    if own:
        found.keep_up(own)
    return found


def _walk(path: Path, entries: Iterable[Mapping[str, Any]]) -> tuple[Roster, Public]:
    """Return who is on a list after these lines, and its founder.

    Raises TrailError at a line that is none of the founder's.
    """
    members: dict[str, Public] = {}
    revoked: set[str] = set()
    founder: Public | None = None
    first: object = None

    for number, entry in enumerate(entries, 1):
        facts = entry["facts"]
        if number == 1:
            first = facts.get("public")
        match entry["kind"]:
            case "opened" if founder is None or facts.get("public") == founder.signing.hex():
                continue
            case "founded" if founder is None and number == 2:
                founder = from_json(facts)
                if first == founder.signing.hex():
                    continue
            case "approved":
                member = from_json(facts)
                members[member.name] = member
                revoked.discard(member.name)
                continue
            case "revoked" if facts.get("name") in members:
                revoked.add(facts["name"])
                continue

        raise TrailError(
            f"{path}, line {number}: not written by the consortium's key, or no entry of a list "
            "of members"
        )

    if founder is None:
        raise TrailError(f"{path} names no founder; make a list with `medfed federation new`")
    return Roster(members, frozenset(revoked)), founder


def _append(folder: Path, authority: Identity, kind: str, facts: Mapping[str, Any]) -> None:
    path = folder / "members.jsonl"
    files.make_folder(folder)
    with files.hold(folder):  # two lines at once would both follow the same one
        if kind == "founded" and path.exists():
            raise TrailError(
                f"{folder} was begun by somebody else just now; look at it by `medfed federation "
                "show`"
            )
        Trail.open(path, authority.name, authority.public.signing, authority.sign).append(
            kind, facts
        )


def own_keys(study: Study, name: str, role: str) -> Identity:
    """Return a party's own keys:
    made now, or from its key file where the study names a list of members.

    The passphrase is MEDFED_PASSPHRASE. Raises KeyFileError where there is none, or it cannot be
    opened.
    """
    if not study.security.federation:
        return Identity.new(name, role)
    return key_files.load(_key_file(study, name), os.environ.get("MEDFED_PASSPHRASE", ""))


def record_of(study: Study, name: str) -> Record:
    """Return what a party has done in secure rounds: beside its key file where its keys outlast a
    run, in memory where they end with it.
    """
    if not study.security.federation:
        return Record()
    return Record(_key_file(study, name).with_suffix(".record"))


def members_of(study: Study, names: Iterable[str]) -> Consortium | None:
    """Return the list of members that a study names, checked; None where a run makes its keys.

    Each of the parties `names` remembers its head beside its own key file, and refuses a list that
    lacks the head that it remembers. Raises as `read` does.
    """
    security = study.security
    if not security.federation:
        return None
    found = read(study.folder / security.federation, fingerprint=security.fingerprint)
    for name in names:
        found.keep_up(seen.beside(_key_file(study, name)))
    return found


def _key_file(study: Study, name: str) -> Path:
    return study.folder / study.security.keys / f"{quote(name, safe=' ')}.key"


def tell_writer(writer: Public, members: Consortium | None) -> dict[str, Any]:
    """Return what a trail's writer tells of itself: its keys, whose list it is on, and how far that
    list went.
    """
    return {
        "coordinator": to_json(writer),
        "consortium": members.authority.fingerprint if members else "",
        "members": members.tell_head() if members else None,
    }


def refuse_unapproved(members: Consortium, public: Public, role: str) -> None:
    """Raise SignatureError unless these are the keys that the consortium approved, in this role;
    RevokedError too.
    """
    approved = members.roster[public.name]
    if approved != public or public.role != role:
        raise SignatureError(
            f"{public.name!r}: the key file is not what the consortium approved as {role} "
            f"({approved.role}, {approved.fingerprint}); request a rotation, or restore it"
        )


def matches(fingerprint: str, public: Public) -> bool:
    """Say whether keys have a fingerprint, however it is spaced."""
    return fingerprint.replace(" ", "").lower() == public.fingerprint.replace(" ", "")


def to_json(public: Public) -> dict[str, Any]:
    """Return public keys as plain values."""
    return {
        "name": public.name,
        "role": public.role,
        "signing": public.signing.hex(),
        "sealing": public.sealing.hex(),
    }


def from_json(facts: Mapping[str, Any]) -> Public:
    """Return public keys that somebody tells; raise SignatureError where they are none."""
    name = facts.get("name")
    role = facts.get("role")
    signing = _parse_hex(facts.get("signing"))
    sealing = _parse_hex(facts.get("sealing"))
    if (
        not isinstance(name, str)
        or not name
        or role not in ROLES
        or len(signing) != 32
        or len(sealing) != 32
    ):
        raise SignatureError(
            f"name={name!r}, role={role!r} with keys of {len(signing)} and {len(sealing)} bytes "
            f"is no party; expected a role of {', '.join(ROLES)} and 32 bytes each. Have the "
            "request made anew."
        )
    return Public(name, str(role), signing, sealing)


def _signing_input(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(["medfed enrolment 1", facts], sort_keys=True).encode()


def _parse_hex(text: object) -> bytes:
    try:
        return bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return b""
