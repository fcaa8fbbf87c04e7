"""The consortium's list of who takes part: requests, approvals, revocations, signed and chained.

The list is a trail (`compliance.trail`) that only the consortium's key writes: nobody else can add
a line, and nobody, not even the consortium, can change one unseen. Members compare that key's
fingerprint once, over a channel of their own.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from medfed.compliance import trail
from medfed.compliance.trail import Trail
from medfed.core import files
from medfed.core.checks import SignatureError, TrailError
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


def request(identity: Identity, old: Identity | None = None) -> dict[str, Any]:
    """Return an enrolment request: the party's public keys, signed with them and, to replace `old`,
    with those too.
    """
    facts = to_json(identity.public)
    asked = {**facts, "signature": identity.sign(_signing_input(facts)).hex()}
    if old:
        asked["replaces"] = old.sign(_signing_input(facts)).hex()
    return asked


def begin(folder: Path, authority: Identity) -> None:
    """Begin a consortium's list in a folder. Raises TrailError where it has one."""
    if (folder / "members.jsonl").exists():
        raise TrailError(
            f"{folder} holds members.jsonl already; give another folder, or approve members into "
            "this one"
        )
    _append(folder, authority, "founded", to_json(authority.public))


def approve(
    folder: Path, authority: Identity, asked: Mapping[str, Any], fingerprint: str = ""
) -> Public:
    """Put the party of an enrolment request on the list, and return what was approved.

    `fingerprint` is what the party told over another channel. Raises SignatureError where the
    request has another, is not signed by its own keys, or comes for a member in good standing and
    is not signed by that member's present keys too.
    """
    member = from_json(asked)
    now = read(folder, authority.public)
    data = _signing_input(to_json(member))
    name = member.name
    if fingerprint and not _matches(fingerprint, member):
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
    return member


def revoke(folder: Path, authority: Identity, name: str, reason: str) -> None:
    """Take a member off the list: from now on its messages count nowhere.
    Raises SignatureError, RevokedError.
    """
    _ = read(folder, authority.public).roster[name]
    _append(folder, authority, "revoked", {"name": name, "reason": reason})


def read(folder: Path, authority: Public | None = None, fingerprint: str = "") -> Consortium:
    """Return a consortium's list, every line checked.

    Raises TrailError where a line was changed or another key than the founder's wrote one, or the
    founder's is not `authority` or has not this `fingerprint`.
    """
    path = folder / "members.jsonl"
    verified = trail.verify(path, holds)
    members: dict[str, Public] = {}
    revoked: set[str] = set()
    founder: Public | None = None

    for number, entry in enumerate(verified.entries, 1):
        facts = entry["facts"]
        match entry["kind"]:
            case "opened" if founder is None or facts.get("public") == founder.signing.hex():
                continue
            case "founded" if founder is None and number == 2:
                founder = from_json(facts)
                if verified.entries[0]["facts"].get("public") == founder.signing.hex():
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
    if authority and authority.signing != founder.signing:
        raise TrailError(
            f"{path} belongs to the key {founder.fingerprint}; {authority.fingerprint} may not "
            "write it"
        )
    if fingerprint and not _matches(fingerprint, founder):
        raise TrailError(
            f"{path} has the fingerprint {founder.fingerprint}; expected {fingerprint}. Ask the "
            "consortium."
        )

    return Consortium(Roster(members, frozenset(revoked)), founder, verified.entries, verified.head)


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
    security = study.security
    if not security.federation:
        return Identity.new(name, role)
    file = study.folder / security.keys / f"{quote(name, safe=' ')}.key"
    return key_files.load(file, os.environ.get("MEDFED_PASSPHRASE", ""))


def record_of(study: Study, name: str) -> Record:
    """Return what a party has done in secure rounds: beside its key file where its keys outlast a
    run, in memory where they end with it.
    """
    security = study.security
    if not security.federation:
        return Record()
    return Record(study.folder / security.keys / f"{quote(name, safe=' ')}.record")


def members_of(study: Study) -> Consortium | None:
    """Return the list of members that a study names, checked; None where a run makes its keys."""
    security = study.security
    if not security.federation:
        return None
    return read(study.folder / security.federation, fingerprint=security.fingerprint)


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


def _matches(fingerprint: str, public: Public) -> bool:
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
