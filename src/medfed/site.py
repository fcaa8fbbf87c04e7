"""A site: what runs at a hospital, and the only code that sees its records.

It is reached through `handle(op, payload)`, bytes in and bytes out. A stack of sites in one process answers through the
same functions (`handle_many`), so a hospital's node is a stack of one.
"""

import logging
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medfed import dpsgd, federation, models, rates, rehearsal
from medfed.algorithms import ALGORITHMS, Task
from medfed.building import build_model, find_path, local_plan
from medfed.core import codec, decision, files
from medfed.core.checks import MedfedError, PlanError, SiteError, some
from medfed.core.entropy import Entropy
from medfed.core.flat import fingerprint, vector
from medfed.core.streams import Streams
from medfed.data import answers, preprocess, surveys
from medfed.data.encoding import Encoding
from medfed.data.federated import Patients, Rows, Stack
from medfed.data.frames import Frames
from medfed.data.site_table import SiteTable
from medfed.data.tables import clean_all
from medfed.features import open_columns
from medfed.learners import LEARNERS, Work, work_of
from medfed.local import Path as LocalPath
from medfed.local import outputs, train
from medfed.monitor.per_site import scores_each
from medfed.own_model import errs_less, train_own
from medfed.plan import POOLED
from medfed.privacy import guarantee, quantiles
from medfed.privacy.guarantee import SLACK, Guarantee
from medfed.privacy.mechanisms import geometric_noise
from medfed.privacy.site_ledger import SiteLedger
from medfed.resolved import Resolved, algorithm_name, algorithm_of, blank, resolve, robust_rule
from medfed.robust import attacks
from medfed.robust.attacks import Attack, Records, Sight, Stage
from medfed.secure.chain import Follower
from medfed.secure.identity import Identity, Post, Roster
from medfed.secure.party import Party, Rehearser
from medfed.study import LARGEST, LEAST_CLIP, Study
from medfed.terms import party_of
from medfed.wire import PLAIN, Link, finite, into_ball, send, send_remembering

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
        self.path: LocalPath = "auto"  # which local training serves the model, as the site itself has found
        self.guarantee: Guarantee | None = None
        self.account: SiteLedger | None = None
        self.links: Sequence[Link] = PLAIN
        self.identity: Identity | None = None  # its keys, once it was asked who it is
        self.facts: Resolved  # what follows from its study and public facts
        self.party: Party | None = None  # what it keeps of a run's secure rounds, once it has joined
        self.liars = Liars()  # in a simulated attack: who lies, and how
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
        (site,) = cls.open_all(Frames.one(name, frame), study, folder)
        return site

    @classmethod
    def open_all(cls, frames: Frames, study: Study, folder: Path | None = None) -> "list[Site]":
        """Return the nodes of several sites of this process, each as `open` returns it."""
        streams, private = Streams(study.study.seed), guarantee.asked(study)
        tables = clean_all(frames, study.data, streams, private, open_columns(study))
        return [cls(name, table.sort_by_patient(), study, folder) for name, table in zip(frames, tables, strict=True)]

    @classmethod
    def devices(cls, frames: Frames, study: Study, folder: Path | None = None) -> "list[Site]":
        """Return a node for every patient of every site: a fleet of devices.

        A device's name, which decides its turn, is the site's and a keyed hash of who the patient is: a number in order
        would let one patient's joining rename others. Who knows the seed can tell from names who has a device.
        """
        streams, private = Streams(study.study.seed), guarantee.asked(study)
        nodes: list[Site] = []
        tables = clean_all(frames, study.data, streams, private, open_columns(study))
        for site, together in zip(frames, tables, strict=True):
            of_each = together.sort_by_patient().by_patient()
            named = {f"{site} {streams.key('device', table.ids[0]) % 2**64:016x}": table for table in of_each}
            nodes.extend(cls(name, named[name], study, folder) for name in sorted(named))
        return nodes

    def under(self, study: Study) -> "Site":
        """Return a node on the same records for another study, which keeps nothing."""
        return Site(self.name, self.table.keep_taking_part() if self.table else None, study)

    @classmethod
    def pooled(cls, sites: Sequence["Site"]) -> "Site":
        """Return a site that holds the training rows of all: the baseline that a federation is measured against.

        Only a simulation can do this, where all sites are in one process; it breaks what a federation is for.
        """
        first = sites[0]
        pooled = cls(POOLED, None, first.study, first.folder)
        pooled.encoding, pooled.model, pooled.path = first.encoding, first.model, first.path
        pooled.links = first.links
        pooled.train = _joined([site.train for site in sites])
        pooled.test = Rows(first.test.x[:0], first.test.y[:0], first.test.patient[:0])
        pooled.forget()
        return pooled

    def forget(self) -> None:
        """Remember nothing of earlier rounds."""
        algorithm = algorithm_of(self.study)
        keeps = algorithm.kept or any(link.kept for link in self.links)
        self.memory = blank(algorithm, self.links, vector(self.model)) if keeps else {}


@dataclass(frozen=True)
class Liars:
    """Who lies in a simulated attack, and how; nobody unless the study says so."""

    names: tuple[str, ...] = ()
    attack: Attack | None = None
    clients: int = 0
    streams: Streams = field(default_factory=lambda: Streams(0))
    rule: Callable[[Tensor], Tensor] | None = None  # that "adaptive" knows; None stands for the mean

    @classmethod
    def of(cls, study: Study, clients: Sequence[str]) -> "Liars":
        """Return the liars of a study: every site draws the same."""
        robust = study.robustness
        if not robust.attack:
            return cls()
        found = attacks.liars(clients, robust.malicious, study.study.seed)
        rule = robust_rule(study, len(clients))
        known = rule if rule and rule.needs == "gram" else None
        return cls(found, attacks.named(robust.attack), len(clients), Streams(study.study.seed), known)

    def taught(self, name: str, rows: Rows, encoding: Encoding) -> Rows:
        """Return the records that a liar trains on."""
        assert self.attack is not None
        labels = len(encoding.target.labels) if encoding.target.task != "regression" else 0
        found = self.attack.records(Records(rows.x, rows.y, labels, self.streams.key("attack", name)))
        return replace(rows, x=found.x_ND, y=found.y_N)

    def sent(self, sites: Sequence["Site"], round: int, row_KM: Tensor, stage: Stage = "row") -> Tensor:
        """Return the rows with the lies of those who lie in place of their own."""
        at = [k for k, site in enumerate(sites) if site.name in self.names]
        if not at or self.attack is None or self.attack.stage != stage:
            return row_KM
        own = [sites[k].name for k in at]
        sight = Sight(row_KM[at], own, self.streams, round, self.clients, len(self.names), rule=self.rule)
        lies = row_KM.clone()
        lies[at] = self.attack.rows(sight, stage)
        return lies


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
        if len(sites) > 1 and op == "prepare":  # a cell of one site is no other's fault
            return [handle_many([site], op, payload)[0] for site in sites]
        return [error if isinstance(error, SiteError) else SiteError(str(error)) for _ in sites]
    except Exception as error:
        if len(sites) > 1:
            return [handle_many([site], op, payload)[0] for site in sites]
        return [_foreign(sites[0], op, error)]


def _foreign(site: Site, op: str, error: Exception) -> SiteError:
    """Return what may leave the site of an unforeseen error: its kind, stage, module and line.

    Not its words, which may quote a record.
    """
    logger.error("op %r failed at site %r", op, site.name, exc_info=error)
    line = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(line.filename).name}, line {line.lineno}"
    place = rehearsal.place_of(error, getattr(site, "model", None))
    kind = type(error).__name__
    return SiteError(f"op {op!r} failed at site {site.name!r}: {kind} ({where}){place}; what it says is in its own log")


def _done(sites: Sequence[Site]) -> list[Answer]:
    """Return the answer of sites that have nothing to tell."""
    return [codec.encode({})] * len(sites)


def _survey(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    return [codec.encode({"survey": _told(site)}) for site in sites]


def _told(site: Site) -> dict[str, Any]:
    """Return what a site tells of its table; under a privacy claim only what is public anyway."""
    table, study = _table(site), site.study
    if not guarantee.asked(study):
        return surveys.survey(table, study.data)
    held_out = study.sites.kind == "device" and bool(table.test.all())
    test = int((table.test & table.taking_part()).sum()) if study.data.test_is_public else int(held_out)
    return surveys.public_survey(table, study.data, 0 if held_out else guarantee.declared_size(study, site.name), test)


def _answer(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    if guarantee.asked(sites[0].study):
        raise SiteError(
            "a question about records has no answer under a privacy claim; use data.preprocess='dictionary'"
        )
    tables, names, logs = [_table(site) for site in sites], header["names"], header["logs"]
    answer_K = answers.answer_each(tables, header["question"], names, logs, dict(tensors))
    return list(codec.encode_each({}, "answer", answer_K))


def _prepare(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    encoding = Encoding.from_json(header["encoding"])
    model = build_model(sites[0].study, encoding)
    if fingerprint(models.fixed(model)) != header["fixed"]:
        raise SiteError("the model's frozen parts or buffers are not the coordinator's; run the same code everywhere")
    path = find_path(sites[0].study, encoding, model).path
    if guarantee.asked(sites[0].study):
        _check_encoding(sites[0], encoding)
        for name in header["clients"]:  # noise and divisor follow from them: not the coordinator's to say
            size = header["sizes"][name]["train"]
            if size != guarantee.declared_size(sites[0].study, name):
                raise SiteError(
                    f"the coordinator says {size} patients for site {name!r}; the study declares another number"
                )
    facts = resolve(sites[0].study, header["sizes"], header["clients"], models.count(model))
    promised = facts.guarantee
    tables = [_table(site) for site in sites]
    for table in tables:
        table.sorted_words.clear()  # nothing more is asked
    for site, table, rows in zip(sites, tables, _encoded(tables, encoding), strict=True):
        site.encoding, site.model, site.path, site.guarantee = encoding, model, path, promised
        site.facts, site.links = facts, facts.links
        held, counts = torch.tensor(table.test), torch.tensor(table.taking_part())
        keyed = replace(rows, key=_patient_keys(site, table)) if promised else rows
        site.train, site.test = keyed.at(~held & counts), rows.at(held & counts)
        told = header["sizes"].get(site.name)
        if promised is None and told and told["train"] != len(site.train):
            raise SiteError(
                f"the coordinator says {told['train']} training rows for site {site.name!r}, which has others"
            )
        site.forget()
        site.liars = Liars.of(site.study, header["clients"])
        if site.name in site.liars.names:
            site.train = site.liars.taught(site.name, site.train, encoding)
    if not rates.left_open(sites[0].study):
        return _done(sites)
    batch = sites[0].study.training.batch_size
    return [codec.encode({"bend": rates.bend(site.train.x, batch)}) for site in sites]


def _identify(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Tell each site's public keys."""
    return [codec.encode({"public": federation.to_json(_own(site).public)}) for site in sites]


def _own(site: Site) -> Identity:
    if site.identity is None:
        site.identity = federation.own_keys(site.study, site.name, "site")
    return site.identity


def _join(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Join a run: sign the study as the site has it, and work out for itself what its rounds agree on.

    Whose keys count is the consortium's list to say, where the site's own study names one, and else the coordinator.
    """
    members = federation.members_of(sites[0].study)
    roster = members.roster if members else Roster.of(*map(federation.from_json, header["roster"]))
    coordinator = header["coordinator"]
    if roster[coordinator].role != "coordinator":
        raise SiteError(f"{coordinator!r} is no coordinator on the list of members, and may not run this study")
    answers: list[Answer] = []
    for site in sites:
        follower = Follower(Post(_own(site), roster), site.study.digest(), header["run"], coordinator)
        site.party = party_of(site.facts, follower)
        answers.append(codec.encode({}, {"signed": codec.as_tensor(follower.agree())}))
    return answers


def _check_encoding(site: Site, encoding: Encoding) -> None:
    """Refuse, under a claim, an encoding that is not the site's own dictionary's.

    A coordinator that leaves out a label, or cuts a range, could else read from an error whether anybody has it. For
    a column that is open in the site's own study any range will do: whatever the values are, they are held to it.
    """
    given = {column.name: column.found for column in encoding.columns if column.found}
    found = {name: given[name] for name in open_columns(site.study) if name in given}
    if not all(map(_is_range, found.values())):
        raise SiteError("the coordinator sends a range that is none; expected two numbers within 3e38, low below high")
    if len(found) < len(open_columns(site.study)):
        raise SiteError("the coordinator sends no range for some open columns; give every party the same study file")
    own = preprocess.agree({site.name: _told(site)}, site.study.data, _unasked, public=True, found=found)
    columns = {column.name: column for column in own.columns}
    strange = [column.name for column in encoding.columns if column != columns.get(column.name, column)]
    if strange or encoding.target != own.target or not encoding.public:
        raise SiteError(
            f"the coordinator's encoding of {some(strange or [encoding.target.name])} is not that of the study's data "
            "dictionary; give every party the same study file"
        )


def _is_range(ends: Sequence[object]) -> bool:
    """Say whether a range that was found can be one that is declared."""
    numbers = [end for end in ends if isinstance(end, float) and abs(end) <= LARGEST]
    return len(ends) == len(numbers) == 2 and numbers[0] < numbers[1]


def _unasked(*_: object) -> Tensor:
    raise SiteError("a public encoding asks nothing of patients")


def _encoded(tables: Sequence[SiteTable], encoding: Encoding) -> Iterable[Rows]:
    """Encode all records of each table, gaps filled from its own training records; many small tables in one go."""
    if not encoding.public and sum(map(len, tables)) > _SMALL * len(tables):
        return (encoding.encode(table, np.ones(len(table), dtype=bool), ~table.test) for table in tables)
    every, sizes = SiteTable.join(tables), [len(table) for table in tables]
    site_N = np.repeat(np.arange(len(tables)), sizes)
    rows = encoding.encode(every, np.ones(len(every), dtype=bool), ~every.test, site_N)
    parts = zip(torch.split(rows.x, sizes), torch.split(rows.y, sizes), tables, strict=True)
    return [Rows(x, y, torch.from_numpy(table.patient)) for x, y, table in parts]


_SMALL = 1000
"""Rows of a table on average, up to which tables are laid end to end before they are encoded."""


def _patient_keys(site: Site, table: SiteTable) -> Tensor:
    """Return the stream of each record's patient: a function of who it is, whoever else is at the site."""
    seed = Streams(site.study.study.seed)
    return torch.tensor([seed.key("patient", who) for who in table.ids], dtype=torch.int64)[table.patient]


def _enrol(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Enrol the sites' training patients in their ledger; refuse a plan that their budget does not bear."""
    account, promised = sites[0].account, sites[0].guarantee
    if account and promised:
        rosters = {site.name: _training_ids(_table(site)) for site in sites}
        account.enrol(header["run"], rosters, promised, header["fresh"])
    return _done(sites)


def _rehearse(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Play a round and a test once on made-up rows, before anybody pays; refuse with stage, module and way out.

    The sites of a process run the same code, so one stands for all. No record of a site is read and nothing is kept: a
    node of its own plays, whose model, memory, keys and rows are thrown away.
    """
    first = sites[0]
    promised = first.guarantee
    if promised is None:
        raise SiteError("a rehearsal was asked for before the plan; the coordinator must prepare the site first")
    with torch.random.fork_rng(devices=[]):  # a module that draws must not move what comes later
        _play(_double(first, promised), promised)
    return _done(sites)


def _double(site: Site, promised: Guarantee) -> Site:
    """Return a node without records in a site's place."""
    double = Site(site.name, None, site.study)
    double.encoding, double.model, double.path = site.encoding, build_model(site.study, site.encoding), site.path
    double.guarantee, double.links = promised, site.links
    double.party = Rehearser(_length(site, promised))
    double.forget()
    return double


def _length(site: Site, promised: Guarantee) -> int:
    length = algorithm_of(site.study).length
    return promised.numbers() if promised.joint else length(promised.parameters)


def _play(double: Site, promised: Guarantee) -> None:
    """Play stage by stage, in the order in which a run would come to them."""
    model, target, study = double.model, double.encoding.target, double.study
    drawn = rehearsal.make_up(double.encoding, study.data.dictionary, 12)
    w_P = vector(model)

    with rehearsal.stage("model", model, drawn.x):
        model.train()
        z_NC = torch.cat([rehearsal.check_outputs(model, x[None], target.outputs) for x in drawn.x])
    with rehearsal.stage("loss", model, drawn.x):
        drawn = drawn.at(rehearsal.check_loss(target.task, z_NC, drawn.y))

    everybody = replace(promised.releases[double.name], probability=1.0, steps=1, cap=0)
    whole = replace(promised, releases={double.name: everybody})
    key_K = torch.zeros(1, dtype=torch.int64)
    for records in rehearsal.TABLES:
        rows = rehearsal.share_out(drawn, records)
        with rehearsal.stage("gradient", model, drawn.x):
            patients = Patients.of([rows])
            found = dpsgd.sums(
                model, w_P, patients, target.task, whole, promised.clip, [double.name], key_K, double.path
            )
            if found.dropped == len(records):
                raise PlanError(f"no gradient of {len(records)} patients is finite.")
        with rehearsal.stage("clipping", model, drawn.x):
            longest = len(records) * (1 + SLACK)
            if not float(found.total_KP.norm()) <= longest:
                raise PlanError(f"{len(records)} clipped gradients sum to more than {longest:g} times privacy.clip.")

    double.train = double.test = rehearsal.share_out(drawn, rehearsal.TABLES[-1])
    server = ALGORITHMS[algorithm_name(study)].begin(w_P, study.training)
    task = ALGORITHMS[algorithm_name(study)].task(server)
    sent = {"w": task.w_P, **{f"slot.{name}": value for name, value in task.slots.items()}}
    header = {"round": 0} | ({"clip": promised.clip} if promised.clipping == "adaptive" else {})
    with rehearsal.stage("training", model, drawn.x):
        work = _summed([double], header, sent, promised) if promised.joint else _trained([double], header, sent)
        _check_answer(work[0], _length(double, promised))
    made_up_edges = torch.linspace(-4, 4, decision.CHOOSING_CELLS - 1, dtype=torch.float64)
    for records in rehearsal.TABLES:
        double.test = rehearsal.share_out(drawn, records)
        with rehearsal.stage("evaluation", model, drawn.x):
            rehearsal.check_outputs(model.eval(), double.test.x, target.outputs)
            _check_answer(_evaluate([double], {}, {"w": w_P, "edges": made_up_edges})[0])
    if study.rule().chosen and target.task == "binary":
        double.train = rehearsal.share_out(drawn, rehearsal.TABLES[-1])
        with rehearsal.stage("evaluation", model, drawn.x):
            _check_answer(_count([double], {}, {"w": w_P, "edges": made_up_edges})[0])
    if "vote" in promised.queries:
        with rehearsal.stage("own model", model, drawn.x):
            own_P = train_own(double.name, drawn, double.encoding, study)
            errs_less(model, own_P, w_P, drawn, target)


def _check_answer(answer: Answer, length: int = 0) -> None:
    """Raise where a site's answer is an error, or its row is not `length` numbers."""
    if isinstance(answer, SiteError):
        raise answer
    _, tensors = codec.decode(answer)
    if "row" in tensors and tensors["row"].shape != (length,):
        raise PlanError(f"a row has shape {tuple(tensors['row'].shape)}; expected {length} numbers.")


def _training_ids(table: SiteTable) -> np.ndarray:
    ids: np.ndarray = table.ids[np.unique(table.patient[~table.test])]
    return ids


def _work(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Train, and answer with one row a site; under a claim each site's patients pay first.

    Where rows are secret, the coordinator signs what it sends, and each site checks that before anything else.
    """
    refused: dict[str, SiteError] = {}
    if sites[0].study.security.aggregation != "plain":
        header, tensors, refused = _signed(sites, header, tensors)
    refused |= _charged([site for site in sites if site.name not in refused], header["round"])
    willing = [site for site in sites if site.name not in refused]
    answers = iter(_worked(willing, header, tensors)) if willing else iter(())
    if sites[0].account:
        sites[0].account.note_answered(site.name for site in willing)
    return [refused[site.name] if site.name in refused else next(answers) for site in sites]


def _signed(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> tuple[Header, Mapping[str, Tensor], dict[str, SiteError]]:
    """Return what the coordinator signed for this round, and which sites do not take it, with the reasons."""
    if "signed" not in tensors:
        raise SiteError("the coordinator has not signed its model; run the same medfed everywhere")
    envelope, refused = codec.as_bytes(tensors["signed"]), dict[str, SiteError]()
    message = b""
    for site in sites:
        try:
            message = _party(site).follower.accept(header["round"], envelope)
        except MedfedError as error:
            refused[site.name] = SiteError(str(error))
    return (*codec.decode(message), refused) if message else (header, {}, refused)


def _charged(sites: Sequence[Site], round: int) -> dict[str, SiteError]:
    """Charge the patients of each site for a round, all sites of one ledger at once; return who refuses."""
    paying = [site for site in sites if site.account and site.guarantee and not site.guarantee.simulation_only]
    if not paying:
        return {}
    account = paying[0].account
    assert account is not None
    return {name: SiteError(str(reason)) for name, reason in account.pay(round, [s.name for s in paying]).items()}


def _worked(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    promised = sites[0].guarantee
    if promised is None:
        return _trained(sites, header, tensors)
    if promised.joint:
        return _summed(sites, header, tensors, promised)
    return _trained(sites, header, tensors)


def _summed(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor], promised: Guarantee) -> list[Answer]:
    """Answer with each site's sum of clipped per-patient gradients, on the grid.

    However many patients a site has, its sum is held to what the declared number can make: else one patient more would
    decide whether the row is within the bound that others check.
    """
    first, names = sites[0], [site.name for site in sites]
    clip = _clip(header, promised)
    key_K = Streams(first.study.study.seed).key_K("batches", header["round"], names)
    path, task = first.path, first.encoding.target.task
    patients = Patients.of([site.train for site in sites])
    found = dpsgd.sums(first.model, tensors["w"], patients, task, promised, clip, names, key_K, path)
    if found.dropped:
        logger.warning("%d patients' gradients were not finite and count as zero", found.dropped)
    size_K = [promised.releases[name].size for name in names]
    message_KM = into_ball(found.total_KP, size_K)
    if promised.clipping == "adaptive":
        half_K = torch.tensor(size_K, dtype=torch.float64) / 2
        message_KM = torch.cat([message_KM, found.below_K.clamp(-half_K, half_K)[:, None]], 1)
    return _sent(sites, header, tensors["w"], message_KM, [{"steps": 1} for _ in sites])


def _clip(header: Header, promised: Guarantee) -> float:
    """Return the clipping norm: the study's own; only adaptive clipping takes it from the coordinator, within reason.

    A sum is in units of it, so that any norm keeps the guarantee; one that is no number would tell of single patients.
    """
    if promised.clipping != "adaptive":
        return promised.clip
    clip = header.get("clip")
    if not isinstance(clip, float) or not LEAST_CLIP <= clip < math.inf:
        raise SiteError(f"the coordinator sends no clipping norm; expected a number from {LEAST_CLIP:g} on")
    return clip


def _trained(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with what each site's local training came to."""
    first, promised = sites[0], sites[0].guarantee
    study = _at_rate(first.study, header)
    algorithm, hyper, learner = algorithm_of(study), study.training, LEARNERS.get(study.model.name)
    slots = {name: tensors[f"slot.{name}"] for name in algorithm.sent}
    task = Task(tensors["w"], slots)
    memory = {name: torch.stack([site.memory[name] for site in sites]) for name in algorithm.kept}
    names = [site.name for site in sites]
    key_K = Streams(first.study.study.seed).key_K("batches", header["round"], names)
    rows = [site.train for site in sites]
    if learner:
        work = work_of(learner, task, memory, rows)
        return _report(sites, header, tensors["w"], work, finite(work.message_KM))
    start_KP, plan = algorithm.starts_KP(task, memory, len(sites)), local_plan(study, first.encoding)
    correction = algorithm.correct(task, memory, hyper)
    if promised is None:
        local = train(first.model, start_KP, Stack.of(rows), plan, key_K, correction, first.path)
    else:
        average = 0.0 if algorithm.plain_sgd or algorithm.any_sgd else hyper.average
        patients = Patients.of(rows)
        local = dpsgd.train(
            first.model, start_KP, patients, plan, promised, names, key_K, correction, average, first.path
        )
    message_KM, later = algorithm.message(task, memory, local, hyper)
    work = Work(message_KM, later, local.loss_K, local.steps_K)
    return _report(sites, header, tensors["w"], work, finite(local.theta_KP))


def _report(sites: Sequence[Site], header: Header, w_P: Tensor, work: Work, good_K: Tensor) -> list[Answer]:
    """Answer with the rows of those whose training stayed finite, and hold ready what each will remember."""
    losses, steps = work.loss_K.tolist(), work.steps_K.tolist()
    open_losses = sites[0].study.security.aggregation == "plain"  # else nothing of one site is told
    reports: list[Report] = []
    for k, (site, good) in enumerate(zip(sites, good_K.tolist(), strict=True)):
        if not good:
            reports.append(SiteError("training did not stay finite; lower training.learning_rate"))
            continue
        site.pending = {name: value[k].clone() for name, value in work.memory.items()}
        loss = losses[k] if open_losses and math.isfinite(losses[k]) else None
        reports.append({"loss": loss, "steps": steps[k]})
    return _sent(sites, header, w_P, work.message_KM, reports)


def _at_rate(study: Study, header: Header) -> Study:
    """Return the study with this round's learning rate, which the coordinator says where the study leaves it open."""
    if not rates.left_open(study):
        return study
    rate = header.get("rate")
    if not isinstance(rate, float) or not 0 < rate < math.inf:
        raise SiteError("training.learning_rate is open and the coordinator sends none; run the same medfed everywhere")
    return rates.at(study, rate)


Report = dict[str, Any] | SiteError
"""What is told beside a row, or why there is none."""


def _sent(
    sites: Sequence[Site], header: Header, w_P: Tensor, message_KM: Tensor, reports: Sequence[Report]
) -> list[Answer]:
    """Pass the rows through the clients' halves of the links and answer with them, in the study's aggregation."""
    first = sites[0]
    message_KM = first.liars.sent(sites, header["round"], message_KM)
    if first.study.security.aggregation == "plain":
        kept = [name for link in first.links for name in link.kept]
        memory = {name: torch.stack([site.memory[name] for site in sites]) for name in kept}
        row_KM, later = send_remembering(message_KM, first.links, memory)
        for k, site in enumerate(sites):
            site.pending |= {name: value[k].clone() for name, value in later.items()}
        told = [{} if isinstance(report, SiteError) else report for report in reports]
        messages = codec.RowFormat("row", row_KM[0]).encode(told, row_KM)
        pairs = zip(reports, messages, strict=True)
        return [report if isinstance(report, SiteError) else message for report, message in pairs]
    round, model = header["round"], sha256(w_P.numpy().tobytes()).digest()
    answers: list[Answer] = []
    for site, report, message_M in zip(sites, reports, message_KM, strict=True):
        if isinstance(report, SiteError):
            answers.append(report)
            continue
        try:  # one by one: a row that is out of bound is its own site's fault
            (row_M,) = site.liars.sent([site], header["round"], send(message_M[None], site.links), "wire")
            answers.append(
                codec.encode(report, {"upload": codec.as_tensor(_party(site).upload(round, row_M.numpy(), model))})
            )
        except MedfedError as error:
            refused = SiteError(str(error))
            refused.__cause__ = error  # by which a rehearsal knows the stage
            answers.append(refused)
    return answers


def _phase(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Play a phase of a masked round, other than the row's."""
    message, answers = codec.as_bytes(tensors["message"]), list[Answer]()
    for site in sites:
        try:
            found = _party(site).answer(header["phase"], header["round"], header["told"], message)
            answers.append(codec.encode({}, {"message": codec.as_tensor(found)}))
        except MedfedError as error:
            answers.append(SiteError(str(error)))
    return answers


def _party(site: Site) -> Party:
    if site.party is None:
        raise SiteError(f"site {site.name!r} has agreed to no run; the coordinator must ask it to first")
    return site.party


def _keep(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Remember what the last work left: its row has counted."""
    for site in sites:
        site.memory, site.pending = site.pending or site.memory, {}
    return _done(sites)


def _evaluate(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Test the global model, or each site's own, on each site's held-out patients."""
    first = sites[0]
    if guarantee.asked(first.study) and not first.study.data.test_is_public:
        return _noised_evaluation(sites, tensors)
    personal = ALGORITHMS[first.study.training.algorithm].personal
    target = first.encoding.target
    if personal:
        z = torch.cat([outputs(site.model, tensors["w"] + site.memory["offset"], site.test.x) for site in sites])
    else:
        z = outputs(first.model, tensors["w"], torch.cat([site.test.x for site in sites]))
    y, sizes = torch.cat([site.test.y for site in sites]), [len(site.test) for site in sites]
    strange = _strange(z, sizes)
    scores = scores_each(target.task, z.nan_to_num(0.0, 0.0, 0.0), y, sizes, target.scale)
    return [
        SiteError("the model's outputs are not finite") if bad else codec.encode({}, one.tensors())
        for bad, one in zip(strange, scores, strict=True)
    ]


def _strange(z_NC: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Say at which sites an output is no finite number; site k owns the next sizes[k] rows."""
    site_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    bad_N = ~torch.isfinite(z_NC).all(-1)
    found: list[bool] = (torch.bincount(site_N[bad_N], minlength=len(sizes)) > 0).tolist()
    return found


def _compare(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Tell by how much each site's own model errs less than another, on its held-out records.

    Sums over records of the difference of squared errors: their number, sum, sum of squares [3].
    """
    first = sites[0]
    if guarantee.asked(first.study):
        raise SiteError("own models are not compared under a privacy claim: nobody has paid for it")
    replies: list[Answer] = []
    for site in sites:
        own_P = tensors["w"] + site.memory["offset"]
        less_N = errs_less(site.model, own_P, tensors["other"], site.test, site.encoding.target)
        if not torch.isfinite(less_N).all():
            replies.append(SiteError("a model's outputs are not finite"))
            continue
        sums = torch.stack([torch.tensor(float(len(less_N))).double(), less_N.sum(), less_N.square().sum()])
        replies.append(codec.encode({}, {"paired": sums}))
    return replies


def _vote(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with each site's noised `_ballot` on whether its own model is better than the common one.

    All patients whose records the answer follows from pay: a site's training patients, and its held-out ones unless
    they are public. A site that cannot tell votes 1/2, so that no error tells of a patient.
    """
    first, names = sites[0], [site.name for site in sites]
    promised, study = first.guarantee, first.study
    if promised is None or "vote" not in promised.queries:
        raise SiteError("privacy.vote_epsilon=0: nobody has paid for a vote")
    w_P = tensors.get("w", torch.empty(0))
    if w_P.shape != vector(first.model).shape:
        raise SiteError("the coordinator sends no model to vote on; run the same medfed everywhere")
    account = None if promised.simulation_only else first.account
    refused: Mapping[str, Exception] = {}
    if account:
        refused = account.pay_query("vote", names)
        if not study.data.test_is_public:
            held_out = {
                site.name: sorted(set(_table(site).ids[site.test.patient.numpy()]))
                for site in sites
                if site.name not in refused
            }
            refused = {**refused, **account.pay_query_held_out("vote", held_out)}
    replies: list[Answer] = []
    for site in sites:
        if site.name in refused:
            replies.append(SiteError(str(refused[site.name])))
            continue
        vote = np.array([_ballot(site, w_P)])
        if not guarantee.counted_together(study):
            vote = vote + _query_noise(site, promised, "vote", guarantee.VOTE_SENSITIVITY, 1)
        replies.append(codec.encode({}, {"vote": torch.from_numpy(vote)}))
    if account:
        account.note_query_answered("vote", names)
    return replies


def _ballot(site: Site, w_P: Tensor) -> float:
    """Return a site's vote in [0, 1]: 1 where its own model's mean squared error is less by FULL_VOTE or more.

    0 where it is more by as much, between them in proportion.

    Guarantee: within [0, 1] whatever the records are, so that one patient moves it by VOTE_SENSITIVITY at most. It is
    told to nobody as it is, as any patient may move it wholly: the noise is paid for (`Account.pay_query`).

    Edge cases:
    - training or testing the own model fails, or does not stay finite: 0.5, and the reason in the site's own log;
    - no held-out record: 0.5.
    """
    try:
        own_P = train_own(site.name, site.train, site.encoding, site.study)
        target = site.encoding.target
        less = float(errs_less(site.model, own_P, w_P, site.test, target).mean()) / target.scale**2
    except Exception:
        logger.exception("%s: its own model could not be trained or tested; it votes neither way", site.name)
        return 0.5
    if not math.isfinite(less):  # no held-out record, or training that did not stay finite
        return 0.5
    return 0.5 + 0.5 * min(1.0, max(-1.0, less / guarantee.FULL_VOTE))


def _noised_evaluation(sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Test the model on patients who are not public: their histogram of scores, paid for.

    Noised here, unless whoever combines rows is trusted with sums without noise, and noises the sum of all sites.

    Guarantee: each held-out patient counts in one cell, with the first record alone, so that two-sided geometric noise
    of scale 1 / epsilon makes the histogram epsilon-private; every patient has paid before it is made.

    Edge cases:
    - edges that are none, or not in order, are refused whoever is in the table;
    - who cannot pay keeps one site's histogram back, and no number of patients is told;
    - nobody is held out at a site: it answers all the same, with counts of zero under whatever noise there is;
    - `simulation_only`: nobody pays, and nothing is claimed.
    """
    study, edges = sites[0].study, _edges(tensors)
    together = guarantee.counted_together(study)
    rows = [_one_each(site.test) for site in sites]
    account = None if study.privacy.simulation_only else sites[0].account
    refused: Mapping[str, Exception] = {}
    if account:
        ids = {site.name: _table(site).ids[own.patient.numpy()] for site, own in zip(sites, rows, strict=True)}
        refused = account.pay_tests(ids)

    replies: list[Answer] = []
    for site, own in zip(sites, rows, strict=True):
        if site.name in refused:
            replies.append(SiteError(str(refused[site.name])))
            continue
        counts = _tally(site, own, tensors["w"], edges)
        if not together:
            counts = counts + geometric_noise(counts.shape, study.privacy.evaluation_epsilon, Entropy())
        replies.append(codec.encode({}, {"counts": torch.from_numpy(counts)}))
    if account:
        account.note_tested(site.name for site in sites)
    return replies


def _count(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with what the study's rule needs of training rows to choose the threshold; under a claim paid and noised.

    Guarantee: under a claim one record of each patient counts, so that a patient moves the vector by the rule's
    sensitivity; it carries the noise that is paid for, here or on the sum of all sites, and is paid before it is made.

    Edge cases:
    - other than the cells that are paid for, or a rule that needs no rows: refused, and nobody is charged;
    - asked again after an answer: paid anew, until the plan holds no more;
    - without a claim every record counts, and nothing is noised.
    """
    first, edges = sites[0], _edges(tensors)
    rule, promised = first.study.rule(), first.guarantee
    if not rule.chosen:
        raise SiteError(f"data.threshold={first.study.data.threshold!r} needs no training row; none is counted")
    refused: Mapping[str, Exception] = {}
    if promised:
        if len(edges) + 1 != decision.CHOOSING_CELLS:
            raise SiteError(f"{len(edges)} edges between cells; {decision.CHOOSING_CELLS} cells are paid for")
        if first.account and not promised.simulation_only:
            refused = first.account.pay_query("threshold", [site.name for site in sites])
    replies: list[Answer] = []
    for site in sites:
        if site.name in refused:
            replies.append(SiteError(str(refused[site.name])))
            continue
        rows = _one_each(site.train) if promised else site.train
        vector = rule.vector(_tally(site, rows, tensors["w"], edges)).astype(np.float64)
        if promised and not guarantee.counted_together(first.study):
            vector = vector + _query_noise(site, promised, "threshold", rule.sensitivity(), len(vector))
        replies.append(codec.encode({}, {"counts": torch.from_numpy(vector)}))
    if first.account:
        first.account.note_query_answered("threshold", [site.name for site in sites])
    return replies


def _ranges(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with how many training patients have each open column's value in which cell, paid and noised.

    Of each patient the middle one of the known cells counts, so that it moves one count of each column by one; who has
    none counts nowhere. No count is above the declared size: so no patient decides whether the site is left out.
    """
    first, names = sites[0], [site.name for site in sites]
    promised, columns = first.guarantee, open_columns(first.study)
    if promised is None or "ranges" not in promised.queries:
        raise SiteError("privacy.ranges_epsilon=0, or no column is open: nobody has paid for a range")
    edges = _range_edges(header, tensors, len(columns))
    account = None if promised.simulation_only else first.account
    refused = account.pay_query("ranges", names) if account else {}
    replies: list[Answer] = []
    for site in sites:
        if site.name in refused:
            replies.append(SiteError(str(refused[site.name])))
            continue
        counts = quantiles.count([_one_cell_each(_table(site), name) for name in columns], edges).astype(np.float64)
        counts = np.minimum(counts, guarantee.declared_size(first.study, site.name))  # as the coordinator holds it to
        if not guarantee.counted_together(first.study):
            most, turn = guarantee.ranges_sensitivity(len(columns)), header["turn"]
            counts = counts + _query_noise(site, promised, "ranges", most, counts.size, turn).reshape(counts.shape)
        replies.append(codec.encode({}, {"counts": torch.from_numpy(counts)}))
    if account:
        account.note_query_answered("ranges", names)
    return replies


def _range_edges(header: Header, tensors: Mapping[str, Tensor], columns: int) -> np.ndarray:
    """Return the coordinator's edges between cells [F, C - 1]; refuse what is not paid for, or not sound."""
    turn: Any = header.get("turn")
    edges = tensors["edges"].numpy() if "edges" in tensors else np.empty(0)
    if type(turn) is not int or turn not in range(quantiles.TIMES):
        raise SiteError(f"turn={turn!r} of counts for ranges; {quantiles.TIMES} are paid for, 0 the first")
    if edges.shape != (columns, quantiles.CELLS[turn] - 1):
        raise SiteError(
            f"edges of {' x '.join(map(str, edges.shape))} numbers for ranges; {columns} columns are open, and "
            f"{quantiles.CELLS[turn]} cells of each are paid for in turn {turn}"
        )
    if edges.dtype != np.float64 or not all(map(decision.sound, edges)):
        raise SiteError("the coordinator sends no edges between cells of values; run the same medfed everywhere")
    return edges


def _one_cell_each(table: SiteTable, name: str) -> np.ndarray:
    """Return a value of each training patient who has one: the middle one of the known, in the order of records."""
    values = table.numbers.get(name, np.full(len(table), np.nan))
    known = ~table.test & table.taking_part() & ~np.isnan(values)
    _, first, count = np.unique(table.patient[known], return_index=True, return_counts=True)
    found: np.ndarray = values[known][first + (count - 1) // 2]
    return found


def _query_noise(
    site: Site, promised: Guarantee, label: str, sensitivity: float, numbers: int, *turn: int
) -> np.ndarray:
    """Draw a site's own noise on its answer to a query, in its turn where it is asked several times."""
    key = Streams(site.study.study.seed).key(label, site.name, *turn)
    return guarantee.query_noise(promised, label, sensitivity, numbers, key)


def _edges(tensors: Mapping[str, Tensor]) -> np.ndarray:
    edges = tensors["edges"].numpy() if "edges" in tensors else np.empty(0)
    if edges.ndim != 1 or not decision.sound(edges):
        raise SiteError("the coordinator sends no edges between cells of scores; run the same medfed everywhere")
    return edges


def _one_each(rows: Rows) -> Rows:
    """Return the first record of each patient."""
    _, first = np.unique(rows.patient, return_index=True)
    return rows.at(torch.from_numpy(first))


def _tally(site: Site, rows: Rows, w_P: Tensor, edges: np.ndarray) -> np.ndarray:
    own = ALGORITHMS[site.study.training.algorithm].personal
    z_NC = outputs(site.model, w_P + site.memory["offset"] if own else w_P, rows.x)
    return decision.tally(z_NC[:, 0].double().numpy(), rows.y.numpy(), edges)


def _save(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Write down what the sites remember after a round; sites that share a folder share a file."""
    for folder, members in _by_folder(sites).items():
        files.make_folder(folder)
        names = [site.name for site in members]
        stacks = {name: torch.stack([site.memory[name] for site in members]) for name in members[0].memory}
        files.write(_memory_file(folder, header["round"]), codec.encode({"sites": names}, stacks))
        for old in sorted(folder.glob("memory-*.safetensors"))[: -header["keep"]]:
            with files.explained(old):
                old.unlink()
    return _done(sites)


def _restore(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Go back to what was remembered after a round; round 0 is before the first."""
    if header["round"] == 0:
        for site in sites:
            site.forget()
        return _done(sites)
    for folder, members in _by_folder(sites).items():
        path = _memory_file(folder, header["round"])
        if not path.exists():
            raise SiteError(f"no saved state of round {header['round']}; resume from an earlier round")
        kept, stacks = codec.decode(path.read_bytes())
        for site in members:
            row = kept["sites"].index(site.name)
            site.memory = {name: stack[row].clone() for name, stack in stacks.items()}
    return _done(sites)


OPS: dict[str, Callable[[Sequence[Site], Header, Mapping[str, Tensor]], list[Answer]]] = {
    "survey": _survey,
    "answer": _answer,
    "prepare": _prepare,
    "identify": _identify,
    "join": _join,
    "rehearse": _rehearse,
    "enrol": _enrol,
    "work": _work,
    "phase": _phase,
    "keep": _keep,
    "ranges": _ranges,
    "count": _count,
    "evaluate": _evaluate,
    "compare": _compare,
    "vote": _vote,
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
