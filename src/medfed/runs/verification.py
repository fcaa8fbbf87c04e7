"""A run's trail and model, checked against each other."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from medfed.compliance import consortium, trail
from medfed.compliance.trail import Verified
from medfed.core.checks import (
    TrailError,
    some,
)
from medfed.secure.chain import FIRST
from medfed.secure.identity import ANYBODY, Public, Scope, holds
from medfed.secure.identity import check as check_envelope


def verify_trail(folder: Path, members: Path | None = None) -> Verified:
    """Return a run's trail, its head compared with summary.json's;
    raise TrailError where it does not hold.

    With `members`, the folder of a consortium's list, its writers and the sites' keys must be keys
    that the consortium approved at some time: only then nobody else can have written the whole
    trail anew.
    """
    summary = folder / "summary.json"
    if summary.exists():
        head = json.loads(summary.read_text(encoding="utf-8")).get("trail", {}).get("head", "")
    else:
        head = ""

    found = trail.verify(folder / "trail" / "trail.jsonl", holds, head)
    if members:
        history = consortium.read(members).history
        approved = {
            (e["facts"]["name"], e["facts"]["signing"]) for e in history if e["kind"] == "approved"
        }
        used = [(e["writer"], e["facts"]["public"]) for e in found.entries if e["kind"] == "opened"]
        signed = [e["facts"]["signed"] for e in found.entries if e["kind"] == "study"]
        used += [(name, one["public"]) for sites in signed for name, one in sites.items()]
        if strange := [name for name, key in used if (name, key) not in approved]:
            raise TrailError(
                f"{folder}: {some(strange)} signed with keys that {members} never approved; run "
                "with security.federation, or give the run's own consortium"
            )

    return found


def verify_model(folder: str | Path, members: Path | None = None) -> dict[str, Any]:
    """Check that a run's model is the one its trail ends with, each model following the one before.

    Every site's signature under the study is checked too. Returns the model's sha256, the rounds
    whose models follow each other, and who signed; raises TrailError where something does not hold.
    """
    folder = Path(folder)
    entries = verify_trail(folder, members).entries
    before = FIRST.hex()
    rounds = 0
    sites = set[str]()

    for entry in entries:
        facts = entry["facts"]
        match entry["kind"]:
            case "opened":
                before = FIRST.hex()  # a resumed run's first model
            case "study":
                for name, one in facts["signed"].items():
                    site = Public(name, "site", bytes.fromhex(one["public"]), bytes(32))
                    scope = Scope(facts["digest"], facts["run"], 0)
                    check_envelope(bytes.fromhex(one["envelope"]), site, scope, "study", ANYBODY)
                    sites.add(name)
            case "opened sum":
                if facts["previous"] != before:
                    raise TrailError(
                        f"{folder}: the model of round {facts['round']} does not follow the one "
                        "before"
                    )
                before = facts["model"]
                rounds = rounds + 1

    last = entries[-1]
    if last["kind"] != "finished":
        raise TrailError(
            f"{folder}: its trail has no end; `medfed resume {folder}` finishes the run"
        )

    model = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if model != last["facts"]["model"]:
        raise TrailError(
            f"{folder}/model.safetensors has sha256 {model[:16]}..., its trail ends with "
            f"{last['facts']['model'][:16]}...; the model was changed after the run. Do not use "
            "it."
        )

    return {"model": model, "rounds": rounds, "signed_by": last["writer"], "sites": sorted(sites)}
