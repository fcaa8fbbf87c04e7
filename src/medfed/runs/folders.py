"""A run's folder: made, frozen, committed round by round, read again.

The folder holds study.toml (frozen), plan.json (how records become numbers), events.jsonl,
checkpoints/, sites/ (what sites remember, in a simulation), and at the end model.safetensors and
summary.json.
"""

import dataclasses
import itertools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from medfed import study as studies
from medfed.compliance.trail import Trail
from medfed.core import codec, files, own
from medfed.core.checks import (
    MedfedError,
    PlanError,
    RunError,
    WriteError,
    advising,
    plain,
)
from medfed.core.flat import Layout
from medfed.data import site_maps
from medfed.data.encoding import Encoding
from medfed.engine.port import Fleet, gather
from medfed.learn.algorithms import Server
from medfed.monitor import events
from medfed.monitor.events import Log
from medfed.planning.building import build_model
from medfed.planning.plan import Plan
from medfed.privacy.statement import Heads, compact
from medfed.rounds import checkpoints, ranges
from medfed.study import Study

OWN_LOG = "own.log"
"""What the sites alone may read of a run: `core.own`."""


MODEL = "model.safetensors"
"""What a run has trained, when it has ended."""

NOBODY: Mapping[str, int] = {}

SITE_MAPS = "maps.json"
"""How each site's columns differ, as the run has applied it: file, sha256 and text."""


@contextmanager
def hold_fresh(out: Path | None, study: str) -> Iterator[Path]:
    """Hold a folder that is this run's alone until the block ends;
    what was made and stayed empty is taken away.
    """
    made: list[Path] = []
    if out is None:
        folder = _make_numbered(Path("runs"), study, made)
    else:
        folder = out
        _make_folder(folder, made)
    try:
        _refuse_used(folder)
        with files.hold(folder):
            _refuse_used(folder, mine=True)
            yield folder
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _make_numbered(parent: Path, study: str, made: list[Path]) -> Path:
    """Make a folder named by study and time;
    by a number too where another run of this second has that name.
    """
    if not studies.names_a_folder(study):
        raise PlanError(
            f"study.name={study!r}; expected a printable name without slashes. {studies.CHANGE_IT}"
        )
    _make_folder(parent, made)
    name = f"{study}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError), files.explained(folder, FileExistsError):
            folder.mkdir()
            made.insert(0, folder)
            return folder
    raise AssertionError("there is always a next number")


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; `made` gets those not there before, innermost first."""
    absent: list[Path] = []
    place = folder
    with files.explained(folder):
        while not place.exists():
            absent.append(place)
            place = place.parent
        folder.mkdir(parents=True, exist_ok=True)
    made[:0] = absent


def _refuse_used(folder: Path, mine: bool = False) -> None:
    """Raise RunError where a folder holds anything;
    where a run writes into it just now, it says which.
    """
    with files.explained(folder):
        if not folder.is_dir():
            raise RunError(f"--out {str(folder)!r} is not an empty folder; give another")
        inside = {path.name for path in folder.iterdir()}
    if files.LOCK in inside and not mine:
        with files.hold(folder):  # raises where it is in use
            pass
    if inside - {files.LOCK}:
        raise RunError(
            f"--out {str(folder)!r} is not an empty folder; give another, or `medfed resume "
            f"{folder}`"
        )


def freeze(
    plan: Plan, told: Sequence[events.Event], folder: Path, name: str, processes: bool = False
) -> None:
    """Write down what a run is, and what was `told` of its ranges and ledger: all that follows can
    be resumed. `processes`: its parties are started as such, and keep what is theirs.
    """
    spent = ranges.tell_paid(plan.study) if plan.encoding.found_ranges() else "Nothing was trained."
    with advising(f"{spent} {folder} holds no whole run: a next one needs another --out."):
        own.write_to(folder / "sites" / OWN_LOG)
        if maps := site_maps.texts(plan.study):
            files_of = {
                name: {
                    "file": plan.study.data.site_maps[name],
                    "sha256": site_maps.sha256(text),
                    "text": text,
                }
                for name, text in maps.items()
            }
            files.write(
                folder / "sites" / SITE_MAPS, json.dumps(files_of, indent=2, ensure_ascii=False)
            )

        first = [json.loads(events.line(events.screen(event))) for event in told]
        frozen = {
            "digest": plan.study.digest(),
            "folder": str(plan.study.folder.resolve()),
            "encoding": plan.encoding.to_json(),
            "run": name,
            "chosen": dict(plan.study.chosen),
            "told": first,
            "surveyed": plan.surveyed,
            "tables": dict(plan.tables),
            "processes": processes,
        }
        files.write(folder / "study.toml", plan.study.toml())
        files.write(folder / "plan.json", json.dumps(frozen))


def read_plan(folder: Path) -> tuple[Study, Encoding]:
    """Return a run's frozen study and its encoding; raise RunError where they do not agree."""
    try:
        frozen = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        study = studies.load(folder / "study.toml")
        study = dataclasses.replace(
            study, folder=Path(frozen["folder"]), chosen=frozen.get("chosen", {})
        )
    except (OSError, ValueError, MedfedError) as error:
        raise RunError(f"{str(folder)!r} is not a run folder: {plain(error)}") from error
    if study.digest() != frozen["digest"]:
        raise RunError(
            f"{folder}/study.toml was changed after the run began; start a new run with your change"
        )
    return study, Encoding.from_json(frozen["encoding"])


def read_name(folder: Path) -> str:
    """Return what a run is called in trail and ledgers, of a folder that `read_plan` reads."""
    return str(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["run"])


def versions() -> dict[str, str]:
    """Return the versions that decide a run's bits."""
    packages = {
        name: version(name) for name in ("medfed", "torch", "numpy", "scikit-learn", "pandas")
    }
    return {"python": platform.python_version(), **packages}


def write_checkpoint(
    folder: Path,
    server: Server,
    plan: Plan,
    fleet: Fleet,
    log: Log,
    heads: Heads,
    trail: Trail | None = None,
    since: Mapping[str, int] = NOBODY,
) -> None:
    """Let the sites write down what they remember, then commit the round, with the `heads` of their
    ledgers, how far the `trail` goes, and `since` which round a site is away.
    """
    keep = plan.study.monitor.checkpoints
    if plan.keeps and server.round > 0:
        payload = codec.encode({"round": server.round, "keep": keep + 1})
        for reply in gather(fleet, plan.present, "save", payload, 600).values():
            if reply.error:
                raise WriteError(f"site {reply.site!r} cannot save its state: {reply.error}")
    header: dict[str, Any] = {"events": log.offset(), "surveyed": plan.surveyed}
    if kept := compact(heads):
        header["ledger"] = kept
    if trail:
        header |= checkpoints.vouch(server, trail)
    if since:
        header["away"] = dict(since)
    checkpoints.write(folder / "checkpoints", server, header, keep)


def write_model(
    folder: Path,
    server: Server,
    plan: Plan,
    kept: Mapping[str, Tensor],
    decision: Mapping[str, Any] | None,
) -> None:
    """Write all that the model's outputs follow from: the released weights, what was not trained;
    and the threshold.
    """
    layout = Layout.of(build_model(plan.study, plan.encoding))
    tensors = {name: piece.contiguous() for name, piece in layout.pieces(server.released_P)}
    tensors |= {name: value.detach().clone().contiguous() for name, value in kept.items()}
    # one entry
    about = {
        "study": plan.study.digest(),
        "encoding": plan.encoding.to_json(),
        "decision": decision,
    }
    files.write(folder / MODEL, safetensors.torch.save(tensors, {"medfed": json.dumps(about)}))
