"""A site's node: the only code that holds its records, and how it is asked.

It is reached through `handle(op, payload)`, bytes in and bytes out. A stack of sites in one process
answers through the same functions (`handle_many`), so a hospital's node is a stack of one. What it
answers to is in the modules beside this one: each operation is a function that `operation`
registers.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medfed.core import codec
from medfed.core.checks import MedfedError, SiteError, describe
from medfed.core.flat import vector
from medfed.core.streams import Streams
from medfed.data.encoding import Encoding
from medfed.data.features import open_columns
from medfed.data.federated import Rows
from medfed.data.frames import Frames
from medfed.data.site_table import SiteTable
from medfed.data.tables import clean_all
from medfed.learn.local import Path as LocalPath
from medfed.links.wire import PLAIN, Link
from medfed.node.consent import Consent, everybody
from medfed.planning import rehearsal
from medfed.planning.plan import POOLED
from medfed.planning.resolved import Resolved, algorithm_of, blank, robust_rule
from medfed.privacy import guarantee as guarantees
from medfed.privacy.guarantee import Guarantee
from medfed.privacy.site_ledger import SiteLedger
from medfed.robust import attacks
from medfed.robust.attacks import Attack, Records, Sight, Stage
from medfed.secure.identity import Identity
from medfed.secure.party import Party
from medfed.secure.record import Record
from medfed.study import Study

logger = logging.getLogger(__name__)


class Site:
    """One site's node. Holds its cleaned table; after `prepare` its encoded rows and what its
    algorithm remembers.
    """

    def __init__(
        self,
        name: str,
        table: SiteTable | None,
        study: Study,
        folder: Path | None = None,
        account: SiteLedger | None = None,
        consent: Consent = everybody,
    ) -> None:
        """Set up the node.

        Args:
            name: the site, as the study calls it.
            table: its cleaned records; None for a node that holds none.
            study: the study as the site has it.
            folder: where the site keeps its own state; without it nothing is kept.
            account: what pays for its patients, shared by the sites of one ledger; None: nobody
            pays.
            consent: who may be read, asked before every charge and every reading.
        """
        self.name = name
        self.study = study
        self.folder = folder
        self.account = account
        self.consent = consent
        self.table = table
        self.train: Rows
        self.test: Rows
        self.encoding: Encoding
        self.model: nn.Module
        # which local training serves the model, as the site itself has found
        self.path: LocalPath = "auto"
        self.guarantee: Guarantee | None = None
        self.links: Sequence[Link] = PLAIN
        self.identity: Identity | None = None  # its keys, once it was asked who it is
        self.record: Record | None = None  # what it has done in secure rounds, once it joins one
        self.facts: Resolved  # what follows from its study and public facts
        # what it keeps of a run's secure rounds, once it has joined
        self.party: Party | None = None
        self.liars = Liars()  # in a simulated attack: who lies, and how
        self.memory: dict[str, Tensor] = {}
        # what a round would leave in memory, if its row counts
        self.pending: dict[str, Tensor] = {}

    def handle(self, op: str, payload: bytes) -> bytes:
        """Do operation `op` on `payload`; raise SiteError with a reason that names no patient."""
        reply = handle_many([self], op, payload)[0]
        if isinstance(reply, SiteError):
            raise reply
        return reply

    @classmethod
    def open(
        cls, name: str, frame: pd.DataFrame, study: Study, folder: Path | None = None
    ) -> "Site":
        """Return the node of a site with these records;
        raise DataError for what is wrong with them.

        Args:
            name: the site's.
            frame: its table, a record a row.
            study: as the site has it.
            folder: where its ledger and keys lie; None: nothing is kept.
        """
        return cls(name, _clean_tables(Frames.one(name, frame), study)[name], study, folder)

    def under(self, study: Study) -> "Site":
        """Return a node on the same records for another study, which keeps nothing."""
        return Site(
            self.name,
            self.table.keep_taking_part() if self.table else None,
            study,
            consent=self.consent,
        )

    def like(self, study: Study, guarantee: Guarantee) -> "Site":
        """Return a node that does what this one does,
        for another study and guarantee; it keeps nothing.

        For a simulation: the twin of a study is such nodes.
        """
        other = self.under(study)
        other.encoding = self.encoding
        other.model = self.model
        other.path = self.path
        other.guarantee = guarantee
        other.links = self.links
        other.train = self.train
        other.forget()
        return other

    def bare(self, study: Study) -> "Site":
        """Return a node on the same model for a study without protection, trained by the plain
        loop; a simulation's.
        """
        other = self.under(study)
        # right for any module
        other.encoding = self.encoding
        other.model = self.model
        other.path = "loop"
        return other

    def hold(self, rows: Rows) -> None:
        """Train on these rows instead of its own: only a simulation, such as a twin, can say so."""
        self.train = rows

    @classmethod
    def pooled(cls, sites: Sequence["Site"]) -> "Site":
        """Return a site that holds the training rows of all: the baseline that a federation is
        measured against.

        Only a simulation can do this, where all sites are in one process; it breaks what a
        federation is for.
        """
        first = sites[0]
        pooled = cls(POOLED, None, first.study, first.folder)
        pooled.encoding = first.encoding
        pooled.model = first.model
        pooled.path = first.path
        pooled.links = first.links
        pooled.train = _join_rows([site.train for site in sites])
        pooled.test = Rows(first.test.x[:0], first.test.y[:0], first.test.patient[:0])
        pooled.forget()
        return pooled

    def ask_consent(self) -> None:
        """Ask who may be read now, and let go of everybody else;
        raise TypeError where no mask comes of it.

        Who is let go of stays so until the node is opened anew.
        """
        if self.table is None or self.consent is everybody:
            return
        ids = self.table.ids
        keep_I = np.asarray(
            self.consent([str(name) for name in ids], self.study.study.purpose, datetime.now(UTC))
        )
        if keep_I.shape != ids.shape or keep_I.dtype != bool:
            raise TypeError("a register of consent answers with a mask over its patients, bool")
        if keep_I.all():
            return

        number_I = np.cumsum(keep_I) - 1
        self.table = _narrow(self.table, keep_I, number_I)
        for held in ("train", "test"):
            if rows := getattr(self, held, None):
                rows = rows.at(torch.from_numpy(keep_I[rows.patient.numpy()]))
                setattr(
                    self,
                    held,
                    replace(rows, patient=torch.from_numpy(number_I[rows.patient.numpy()])),
                )

    def forget(self) -> None:
        """Remember nothing of earlier rounds."""
        algorithm = algorithm_of(self.study)
        keeps = algorithm.kept or any(link.kept for link in self.links)
        self.memory = blank(algorithm, self.links, vector(self.model)) if keeps else {}
        if self.liars.attack:
            self.memory[OWN_ROW] = torch.zeros(self.facts.message, dtype=torch.float64)


def _narrow(table: SiteTable, keep_I: np.ndarray, number_I: np.ndarray) -> SiteTable:
    """Return the records of some patients alone, numbered anew; what was found in the others' is
    not kept either.
    """
    rows = keep_I[table.patient]
    return SiteTable(
        numbers={name: values[rows] for name, values in table.numbers.items()},
        texts={name: values[rows] for name, values in table.texts.items()},
        label=table.label[rows],
        patient=number_I[table.patient[rows]],
        test=table.test[rows],
        ids=table.ids[keep_I],
        left_out=None if table.left_out is None else table.left_out[rows],
    )


def open_tables(frames: Frames, study: Study) -> dict[str, SiteTable]:
    """Return each client's cleaned table, by its name; raise DataError for what is wrong with one.

    A client is a site or, where the study says so, a device: one patient. A device's name, which
    decides its turn, is the site's and a keyed hash of who the patient is: a number in order would
    let one patient's joining rename others. Who knows the seed can tell from names who has a
    device.
    """
    tables = _clean_tables(frames, study)
    if study.sites.kind != "device":
        return tables
    streams = Streams(study.study.seed)
    devices: dict[str, SiteTable] = {}

    for site, together in tables.items():
        named = {
            f"{site} {streams.key('device', table.ids[0]) % 2**64:016x}": table
            for table in together.by_patient()
        }
        devices |= {name: named[name] for name in sorted(named)}

    return devices


def _clean_tables(frames: Frames, study: Study) -> dict[str, SiteTable]:
    streams = Streams(study.study.seed)
    private = guarantees.asked(study)
    cleaned = clean_all(frames, study.data, streams, private, open_columns(study))
    return {name: table.sort_by_patient() for name, table in zip(frames, cleaned, strict=True)}


OWN_ROW = "own row"
"""What a site remembers in a simulated attack: its honest row of when its row last counted."""


@dataclass(frozen=True)
class Liars:
    """Who lies in a simulated attack, and how; nobody unless the study says so."""

    names: tuple[str, ...] = ()
    attack: Attack | None = None
    clients: int = 0
    streams: Streams = field(default_factory=lambda: Streams(0))
    # that "adaptive" knows; None stands for the mean
    rule: Callable[[Tensor], Tensor] | None = None
    sees_all: bool = False  # the honest rows, too, of those that are asked in one process
    rounds: int = 0  # of the whole run

    @classmethod
    def of(cls, study: Study, clients: Sequence[str]) -> "Liars":
        """Return the liars of a study among `clients`: every site draws the same."""
        robust = study.robustness
        if not robust.attack:
            return cls()
        found = attacks.liars(clients, robust.malicious, study.study.seed)
        rule = robust_rule(study, len(clients))
        known = rule if rule and rule.needs == "gram" else None
        return cls(
            found,
            attacks.find(robust.attack),
            len(clients),
            Streams(study.study.seed),
            known,
            robust.sight == "all",
            study.training.rounds,
        )

    def teach(self, name: str, rows: Rows, encoding: Encoding) -> Rows:
        """Return the records that a liar trains on.

        Args:
            name: the liar's.
            rows: its own records.
            encoding: of the run; it says what labels there are.
        """
        assert self.attack is not None
        labels = len(encoding.target.labels) if encoding.target.task != "regression" else 0
        found = self.attack.records(
            Records(rows.x, rows.y, labels, self.streams.key("attack", name))
        )
        return replace(rows, x=found.x_ND, y=found.y_N)

    def replace_rows(
        self,
        sites: Sequence["Site"],
        round: int,
        row_KM: Tensor,
        stage: Stage = "row",
        limit_K: Sequence[float] | None = None,
    ) -> Tensor:
        """Return the rows with the lies of those who lie in place of their own.

        Args:
            sites: the rows' sites, in their order.
            round: the round's number, from 1.
            row_KM: their rows.
            stage: "row" before the links, "wire" behind them.
            limit_K: to what length each row will be cut; None: it will not.
        """
        at = [k for k, site in enumerate(sites) if site.name in self.names]
        if not at or self.attack is None or self.attack.stage != stage:
            return row_KM
        own = [sites[k].name for k in at]
        honest = [k for k, site in enumerate(sites) if site.name not in self.names]
        before_FM = torch.stack([sites[k].memory[OWN_ROW] for k in at])
        sight = Sight(
            row_KM[at],
            own,
            self.streams,
            round,
            self.clients,
            len(self.names),
            row_KM[honest] if self.sees_all and honest else None,
            before_FM if before_FM.any() else None,
            self.rule,
            None if limit_K is None else torch.tensor(limit_K, dtype=torch.float64)[at],
            self.rounds,
        )
        lies = row_KM.clone()
        lies[at] = self.attack.rows(sight, stage)
        return lies


Header = Mapping[str, Any]


Answer = bytes | SiteError
Operation = Callable[[Sequence["Site"], Header, Mapping[str, Tensor]], list[Answer]]


OPS: dict[str, Operation] = {}
"""What a site answers to, by name."""

BLIND: set[str] = set()
"""Those that read no record and charge nobody: before every other one consent is asked."""


def operation(op: str, blind: bool = False) -> Callable[[Operation], Operation]:
    """Register what answers operation `op`; `blind`: it reads no record and charges nobody."""

    def register(operation: Operation) -> Operation:
        OPS[op] = operation
        if blind:
            BLIND.add(op)
        return operation

    return register


def handle_many(sites: Sequence[Site], op: str, payload: bytes) -> list[Answer]:
    """Answer one question for several sites of this process, in their order.

    A site that cannot gives a SiteError. Where a whole stack fails, the sites are asked one by one,
    so that only the guilty one is left out.

    Args:
        sites: those asked.
        op: the operation's name: a key of OPS.
        payload: the question, as `codec` lays it out.
    """
    try:
        header, tensors = codec.decode(payload)
        if op not in OPS:
            raise SiteError(f"op={op!r} is not known; run the same medfed everywhere")
        if op not in BLIND:
            for site in sites:
                site.ask_consent()
        return OPS[op](sites, header, tensors)
    except MedfedError as error:
        if len(sites) > 1 and op == "prepare":  # a cell of one site is no other's fault
            return [handle_many([site], op, payload)[0] for site in sites]
        return [error if isinstance(error, SiteError) else SiteError(str(error)) for _ in sites]
    except Exception as error:
        if len(sites) > 1:
            return [handle_many([site], op, payload)[0] for site in sites]
        return [_explain(sites[0], op, error)]


def _explain(site: Site, op: str, error: Exception) -> SiteError:
    """Return what may leave the site of an unforeseen error: its kind, stage, module and line.

    Not its words, which may quote a record.
    """
    logger.error("op %r failed at site %r", op, site.name, exc_info=error)
    place = rehearsal.place_of(error, getattr(site, "model", None))
    return SiteError(
        f"op {op!r} failed at site {site.name!r}: {describe(error)}{place}; what it says is in "
        "its own log"
    )


def tell_nothing(sites: Sequence[Site]) -> list[Answer]:
    """Return the answer of sites that have nothing to tell."""
    return [codec.encode({})] * len(sites)


def table_of(site: Site) -> SiteTable:
    if site.table is None:
        raise SiteError(f"site {site.name!r} holds no table")
    return site.table


def _join_rows(rows: Sequence[Rows]) -> Rows:
    starts = torch.tensor([0] + [int(r.patient.max()) + 1 if len(r) else 0 for r in rows]).cumsum(0)
    patients = torch.cat([r.patient + starts[i] for i, r in enumerate(rows)])
    return Rows(torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows]), patients)
