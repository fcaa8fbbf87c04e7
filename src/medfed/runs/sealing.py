"""What the end of a run's trail binds: the model, and all that pages and reports are made of.

The end holds the sha256 of each file that does not change after the run. Of the claim it holds the
digest without its audit, which is made later and has a line of its own; of the summary that without
the trail's head, which follows from the end. What else lies in a run's folder is made from these
(reports/, export/), or is the sites' own (sites/, the ledger).
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from medfed.compliance import consortium
from medfed.compliance.trail import Trail, read_file
from medfed.core.types import JSON
from medfed.rounds.aggregation import COORDINATOR
from medfed.study import Study

BOUND = ("study.toml", "plan.json", "model.safetensors", "events.jsonl")
"""Files that the end of a trail binds byte by byte."""

SUMMARY = "summary.json"
CLAIM = "privacy.json"
AUDIT = "audit.json"
TRAIL = Path("trail") / "trail.jsonl"

_RESTORE = "The end of the trail binds it: restore it from a copy."


def describe_end(
    folder: Path, rounds: int, summary: Mapping[str, Any], claim: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the facts of a run's end, from the files of its folder.

    Args:
        folder: the run's; it holds the files that are bound, as they stay.
        rounds: how many the model has behind it.
        summary: what the run came to, as it will be written.
        claim: what it guarantees; None where nothing is.
    """
    digests = {name: digest_file(folder / name) for name in BOUND}
    return {
        "rounds": rounds,
        "status": summary["status"],
        "model": digests["model.safetensors"],
        "files": digests,
        "summary": digest(without_head(summary)),
        "claim": digest(without_audit(claim)) if claim else None,
    }


def without_head(summary: Mapping[str, Any]) -> JSON:
    """Return a summary without what it tells of the trail, which ends after it."""
    return {name: value for name, value in summary.items() if name != "trail"}


def without_audit(claim: Mapping[str, Any]) -> JSON:
    """Return a claim without the audit of it, which is made after the run."""
    return {**claim, "audit": None}


def digest(content: object) -> str:
    """Return the sha256 of plain values as JSON, whatever their order and spacing in a file."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file; raise TrailError where there is none."""
    return sha256(read_file(path, _RESTORE)).hexdigest()


def open_auditor(folder: Path, study: Study) -> Callable[[Mapping[str, Any]], None] | None:
    """Return what signs an audit into a run's trail; None where the run has none.

    An audit is signed as the run is: by the coordinator's own keys where the study names a list of
    members, else by keys made for it. Raises KeyFileError where those are not here, and what
    reading the list raises; so ask before the work.
    """
    path = folder / TRAIL
    if not path.exists():
        return None
    members = consortium.members_of(study, [COORDINATOR])
    me = consortium.own_keys(study, COORDINATOR, "coordinator")
    if members:
        consortium.refuse_unapproved(members, me.public, "coordinator")

    def sign(audit: Mapping[str, Any]) -> None:
        trail = Trail.open(path, me.name, me.public.signing, me.sign)
        facts = consortium.tell_writer(me.public, members)
        trail.append("audited", facts | {"audit": digest(audit)})

    return sign
