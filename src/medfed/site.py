"""A site: what runs at a hospital, and the only code that sees its records.

It is reached through `handle(op, payload)`, bytes in and bytes out. A stack of sites in one process answers through the
same functions (`handle_many`), so a hospital's node is a stack of one.
"""

import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from medfed.algorithms import ALGORITHMS, Task
from medfed.core import codec, files
from medfed.core.checks import MedfedError, SiteError
from medfed.core.flat import vector
from medfed.core.streams import Streams
from medfed.data import preprocess
from medfed.data.federated import Rows, Stack
from medfed.data.preprocess import Encoding
from medfed.data.tables import SiteTable, clean
from medfed.local import outputs, train
from medfed.monitor.metrics import Scores
from medfed.plan import POOLED, build_model, local_plan
from medfed.study import Study
from medfed.wire import PLAIN, finite, send

logger = logging.getLogger(__name__)


class Site:
    """One site's node. Holds its cleaned table; after `prepare` its encoded rows and what its algorithm remembers."""

    def __init__(self, name: str, table: SiteTable | None, study: Study, folder: Path | None = None) -> None:
        """Set up the node. `folder` is where the site keeps its own state; without it nothing is kept."""
        self.name, self.table, self.study, self.folder = name, table, study, folder
        self.train: Rows
        self.test: Rows
        self.encoding: Encoding
        self.model: nn.Module
        self.memory: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}  # what a round would leave in memory, if its row counts

    def handle(self, op: str, payload: bytes) -> bytes:
        """Do what is asked; raise SiteError with a reason that names no patient."""
        reply = handle_many([self], op, payload)[0]
        if isinstance(reply, SiteError):
            raise reply
        return reply

    @classmethod
    def open(cls, name: str, frame: pd.DataFrame, study: Study, folder: Path | None = None) -> "Site":
        """Return the node of a site with these records; raise DataError for what is wrong with them."""
        return cls(name, clean(name, frame, study.data, Streams(study.study.seed)), study, folder)

    def under(self, study: Study) -> "Site":
        """Return a node on the same records for another study, which keeps nothing."""
        return Site(self.name, self.table, study)

    @classmethod
    def pooled(cls, sites: Sequence["Site"]) -> "Site":
        """Return a site that holds the training rows of all: the baseline that a federation is measured against.

        Only a simulation can do this, where all sites are in one process; it breaks what a federation is for.
        """
        first = sites[0]
        pooled = cls(POOLED, None, first.study, first.folder)
        pooled.encoding, pooled.model = first.encoding, first.model
        pooled.train = _joined([site.train for site in sites])
        pooled.test = Rows(first.test.x[:0], first.test.y[:0], first.test.patient[:0])
        pooled.forget()
        return pooled

    def forget(self) -> None:
        """Remember nothing of earlier rounds."""
        self.memory = ALGORITHMS[self.study.training.algorithm].blank(vector(self.model))


Header = Mapping[str, Any]
Answer = bytes | SiteError


def handle_many(sites: Sequence[Site], op: str, payload: bytes) -> list[Answer]:
    """Answer one question for several sites of this process, in their order; a site that cannot gives a SiteError.

    Where a whole stack fails, the sites are asked one by one, so that only the guilty one is left out.
    """
    try:
        header, tensors = codec.decode(payload)
        if op not in OPS:
            raise SiteError(f"op={op!r} is not known; run the same medfed everywhere")
        return OPS[op](sites, header, tensors)
    except MedfedError as error:
        return [error if isinstance(error, SiteError) else SiteError(str(error)) for _ in sites]
    except Exception as error:
        if len(sites) > 1:
            return [handle_many([site], op, payload)[0] for site in sites]
        return [_foreign(sites[0], op, error)]


def _foreign(site: Site, op: str, error: Exception) -> SiteError:
    """Return what may leave the site of an unforeseen error: its kind and place; its words may quote a record."""
    logger.error("op %r failed at site %r", op, site.name, exc_info=error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}, line {place.lineno}"
    return SiteError(f"op {op!r} failed at site {site.name!r}: {type(error).__name__} ({where}); its own log says more")


def _survey(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    return [codec.encode({"survey": preprocess.survey(_table(site), site.study.data)}) for site in sites]


def _answer(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    ask, names, logs = dict(tensors), header["names"], header["logs"]
    replies: list[Answer] = []
    for site in sites:
        value = preprocess.answer(_table(site), header["question"], names, logs, ask)
        replies.append(codec.encode({}, {"answer": value}))
    return replies


def _prepare(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    encoding = Encoding.from_json(header["encoding"])
    for site in sites:
        table = _table(site)
        site.encoding, site.model = encoding, build_model(site.study, encoding)
        site.train = encoding.encode(table, ~table.test, ~table.test)
        site.test = encoding.encode(table, table.test, ~table.test)
        site.forget()
    return [codec.encode({"train": len(site.train), "test": len(site.test)}) for site in sites]


def _work(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Train, and answer with one row a site."""
    first = sites[0]
    algorithm, hyper = ALGORITHMS[first.study.training.algorithm], first.study.training
    slots = {name: tensors[f"slot.{name}"] for name in algorithm.sent}
    task = Task(tensors["w"], slots)
    memory = {name: torch.stack([site.memory[name] for site in sites]) for name in algorithm.kept}
    local = train(
        first.model,
        algorithm.starts_KP(task, memory, len(sites)),
        Stack.of([site.train for site in sites]),
        local_plan(first.study, first.encoding),
        Streams(first.study.study.seed).key_K("batches", header["round"], [site.name for site in sites]),
        algorithm.correct(task, memory, hyper),
        hyper.path,
    )
    message_KM, memory_next = algorithm.message(task, memory, local, hyper)
    row_KM = send(message_KM, PLAIN)
    finite_K = finite(local.theta_KP)
    losses, steps = local.loss_K.tolist(), local.steps_K.tolist()
    replies: list[Answer] = []
    for k, site in enumerate(sites):
        if not finite_K[k]:
            replies.append(SiteError("training did not stay finite; lower training.learning_rate"))
            continue
        site.pending = {name: memory_next[name][k].clone() for name in algorithm.kept}
        loss = losses[k] if math.isfinite(losses[k]) else None
        replies.append(codec.encode({"loss": loss, "steps": steps[k]}, {"row": row_KM[k]}))
    return replies


def _keep(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Remember what the last work left: its row has counted."""
    for site in sites:
        site.memory, site.pending = site.pending or site.memory, {}
    return [codec.encode({}) for _ in sites]


def _evaluate(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Test the global model, or each site's own, on each site's held-out patients."""
    first = sites[0]
    personal = ALGORITHMS[first.study.training.algorithm].personal
    target = first.encoding.target
    if personal:
        z = [outputs(site.model, tensors["w"] + site.memory["offset"], site.test.x) for site in sites]
    else:
        x = torch.cat([site.test.x for site in sites])
        z = list(torch.split(outputs(first.model, tensors["w"], x), [len(site.test) for site in sites]))
    replies: list[Answer] = []
    for site, z_NC in zip(sites, z, strict=True):
        if not torch.isfinite(z_NC).all():
            replies.append(SiteError("the model's outputs are not finite"))
            continue
        scores = Scores.of(target.task, z_NC, site.test.y, target.scale)
        replies.append(codec.encode({}, scores.tensors()))
    return replies


def _save(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Write down what the sites remember after a round; sites that share a folder share a file."""
    for folder, members in _by_folder(sites).items():
        folder.mkdir(parents=True, exist_ok=True)
        names = [site.name for site in members]
        stacks = {name: torch.stack([site.memory[name] for site in members]) for name in members[0].memory}
        files.write(_memory_file(folder, header["round"]), codec.encode({"sites": names}, stacks))
        for old in sorted(folder.glob("memory-*.safetensors"))[: -header["keep"]]:
            old.unlink()
    return [codec.encode({}) for _ in sites]


def _restore(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Go back to what was remembered after a round; round 0 is before the first."""
    if header["round"] == 0:
        for site in sites:
            site.forget()
        return [codec.encode({}) for _ in sites]
    for folder, members in _by_folder(sites).items():
        path = _memory_file(folder, header["round"])
        if not path.exists():
            raise SiteError(f"no saved state of round {header['round']}; resume from an earlier round")
        kept, stacks = codec.decode(path.read_bytes())
        for site in members:
            row = kept["sites"].index(site.name)
            site.memory = {name: stack[row].clone() for name, stack in stacks.items()}
    return [codec.encode({}) for _ in sites]


OPS: dict[str, Callable[[Sequence[Site], Header, Mapping[str, Tensor]], list[Answer]]] = {
    "survey": _survey,
    "answer": _answer,
    "prepare": _prepare,
    "work": _work,
    "keep": _keep,
    "evaluate": _evaluate,
    "save": _save,
    "restore": _restore,
}


def _table(site: Site) -> SiteTable:
    if site.table is None:
        raise SiteError(f"site {site.name!r} holds no table")
    return site.table


def _joined(rows: Sequence[Rows]) -> Rows:
    starts = torch.tensor([0] + [int(r.patient.max()) + 1 if len(r) else 0 for r in rows]).cumsum(0)
    patients = torch.cat([r.patient + starts[i] for i, r in enumerate(rows)])
    return Rows(torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows]), patients)


def _by_folder(sites: Sequence[Site]) -> dict[Path, list[Site]]:
    groups: dict[Path, list[Site]] = {}
    for site in sites:
        if site.folder is not None:
            groups.setdefault(site.folder, []).append(site)
    return groups


def _memory_file(folder: Path, round: int) -> Path:
    return folder / f"memory-{round:06d}.safetensors"
