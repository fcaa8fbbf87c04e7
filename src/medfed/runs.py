"""A run: one execution of a study in a folder of its own, from the first survey to the summary; and how it resumes.

The folder holds study.toml (frozen), plan.json (how records become numbers), events.jsonl, checkpoints/, sites/ (what
sites remember, in a simulation), and at the end model.safetensors and summary.json.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import platform
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from medfed import aggregation as ways
from medfed import checkpoints, claims, federation, models, ranges, rates, recipe
from medfed import study as studies
from medfed.aggregation import Keys, bears, who_sees
from medfed.algorithms import Server
from medfed.building import build_model
from medfed.compliance import trail
from medfed.compliance.trail import Verified
from medfed.core import codec, files, own, quotes
from medfed.core.checks import (
    BudgetError,
    DataError,
    LedgerError,
    MedfedError,
    PlanError,
    QuorumError,
    RunError,
    TrailError,
    WriteError,
    advising,
    nearest,
    some,
)
from medfed.core.flat import Layout, fill, trained
from medfed.core.refusals import refuse
from medfed.core.streams import Streams
from medfed.data import mapping, partition, schema, site_maps, sources
from medfed.data.encoding import Encoding
from medfed.data.frames import Frames, number_rows
from medfed.data.readers import Reading
from medfed.data.tables import clean, read
from medfed.engine.inprocess import InProcess
from medfed.engine.port import gather
from medfed.features import open_columns
from medfed.foretell import foretell, paid_test
from medfed.learners import LEARNERS
from medfed.local import outputs
from medfed.monitor import events
from medfed.monitor.events import Listener, Log
from medfed.monitor.summary import BASELINES, main_model, summarise
from medfed.own_model import without_protection
from medfed.plan import POOLED, Plan
from medfed.prepare import ask_surveys, enrol, prepare, rehearse
from medfed.privacy import guarantee, ledger_file
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.privacy.places import LEDGER, home, ledger_path, operators_folder
from medfed.privacy.site_ledger import SiteLedger
from medfed.rates import Pace
from medfed.robust.detection import Finding
from medfed.robust.reputation import Ruling, Watch
from medfed.rollback import Rollback
from medfed.round import compare_own, decide, run_round, test, vote
from medfed.secure.chain import FIRST
from medfed.secure.identity import ANYBODY, Public, Scope, holds
from medfed.secure.identity import check as check_envelope
from medfed.site import Site
from medfed.study import Study

logger = logging.getLogger(__name__)  # the sites' own log, in a simulation

OWN_LOG = "own.log"
"""What the sites alone may read of a run: `core.own`."""

SITE_MAPS = "maps.json"
"""How each site's columns differ, as the run has applied it: file, sha256 and text."""


@dataclass(frozen=True)
class Result:
    """What a run came to: `summary` as in summary.json, the model, and the folder (None for a simulation in memory)."""

    summary: dict[str, Any]
    study: Study
    encoding: Encoding
    w_P: Tensor
    folder: Path | None
    fixed: Mapping[str, Tensor] = field(default_factory=dict)  # of the model: frozen parameters and buffers

    @property
    def complete(self) -> bool:
        """Whether all asked rounds ran with all asked sites."""
        return bool(self.summary["status"] == "complete")

    @property
    def model(self) -> nn.Module:
        """The model as it was tested, in evaluation mode."""
        module = fill(build_model(self.study, self.encoding), self.w_P)
        own = models.fixed(module)
        with torch.no_grad():
            for name, value in self.fixed.items():
                own[name].copy_(value)
        return module.eval()

    def predict(self, table: pd.DataFrame | str | Path, unseen: schema.Unseen = "missing") -> pd.DataFrame:
        """Return the model's prediction for each row of a table with the study's feature columns.

        A path is read as the study reads its table; rows are then named as in the file.

        Columns: a probability for each label (binary: the positive one), or the predicted number. What is missing, and
        with `unseen` = "missing" a category that no site had, is set to the centre of all sites, so that a row's
        prediction does not depend on the other rows. Raises DataError for what was otherwise in training; also for a
        column of which most categories are such.
        """
        target = self.encoding.target
        filler = target.labels[0] if target.labels else 0.0
        frame, named = schema.fit(self._frame(table), self.encoding, self.study.data)
        filled = mapping.apply(frame, named).assign(**{named.target: filler})
        known = {**named.dictionary, **schema.categories(self.encoding)}
        named = dataclasses.replace(named, dictionary=known)
        framed = number_rows(schema.hold(filled, self.encoding, named, unseen))
        cleaned = clean("prediction", framed, named, Streams(0))
        every = np.ones(len(cleaned), dtype=bool)
        rows = self.encoding.encode(cleaned, every, ~every)
        z = outputs(self.model, self.w_P, rows.x)
        if target.task == "regression":
            return pd.DataFrame({target.name: (z[:, 0] * target.scale + target.centre).numpy()}, index=frame.index)
        if target.task == "binary":
            return pd.DataFrame({target.labels[1]: torch.sigmoid(z[:, 0]).numpy()}, index=frame.index)
        return pd.DataFrame(z.softmax(-1).numpy(), columns=list(target.labels), index=frame.index)

    def _frame(self, table: pd.DataFrame | str | Path) -> pd.DataFrame:
        """Return the table to predict; one of a path is read as the study's, without what is joined to that."""
        if isinstance(table, pd.DataFrame):
            return table
        if not isinstance(table, (str, Path)):
            raise DataError(f"predict takes a DataFrame, or the path of a table; got {type(table).__name__}")
        return read(Path(table), data=dataclasses.replace(self.study.data, site_is_file=False))

    def decide(self, table: pd.DataFrame | str | Path) -> pd.Series:
        """Return the label that is called for each row: the positive one from the run's threshold on.

        Of several labels the likeliest. Raises RunError for a regression, which calls nothing.
        """
        target, told = self.encoding.target, self.predict(table)
        if target.task == "regression":
            raise RunError(f"data.task='regression' of {target.name!r} has no labels to call; use predict")
        if target.task == "multiclass":
            return told.idxmax(axis=1).rename(target.name)
        decision = self.summary["decision"]
        if decision is None:
            raise RunError("the run ended before its model was tested, so no threshold is known; resume it")
        called = (told[target.labels[1]] >= decision["threshold"]).to_numpy().astype(int)
        return pd.Series(np.array(target.labels)[called], index=told.index, name=target.name)


@own.keep()
def run(
    study: Study,
    out: str | Path | None = None,
    data: Path | None = None,
    listeners: Sequence[Listener] = (),
    progress: bool = False,
) -> Result:
    """Run a study in a fresh folder: `out`, or runs/<study>-<time>. `data` is where downloaded data is looked for.

    Raises a MedfedError before any training for whatever is wrong with study, data or folder. The folder belongs to
    this run alone from the first moment on, and is gone again where the plan does not stand. A round that loses its
    quorum ends the run, which can be resumed.
    """
    name = secrets.token_hex(8)
    with advising("Nothing was trained."), _fresh(Path(out) if out else None, study.study.name) as folder:
        sites = open_sites(study, data, folder / "sites", progress)
        fleet, plan = _ready(sites[0].study, sites)
        keys = ways.coordinator_keys(plan)
        rehearse(plan, fleet)
        enrol(plan, fleet, name)
        with advising(ranges.paid(plan.study) if open_columns(plan.study) else "Nothing was trained."):
            plan, told = ranges.find(plan, fleet)
            told += _founding(sites)
            _freeze(plan, told, folder, name)
        with advising(f"Nothing was trained; `medfed resume {folder}` begins."):
            plan = ranges.encode(plan, fleet)
            return _begun(plan, fleet, sites, folder, name, keys, listeners, told)


@contextmanager
def _fresh(out: Path | None, study: str) -> Iterator[Path]:
    """Hold a folder that is this run's alone until the block ends; what was made and stayed empty is taken away."""
    made: list[Path] = []
    if out is None:
        folder = _numbered(Path("runs"), study, made)
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


def _numbered(parent: Path, study: str, made: list[Path]) -> Path:
    """Make a folder named by study and time; by a number too where another run of this second has that name."""
    if not studies.names_a_folder(study):
        raise PlanError(f"study.name={study!r}; expected a printable name without slashes. {studies.CHANGE_IT}")
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
    """Make a folder and those above it; `made` gets those that were not there, the innermost first."""
    absent: list[Path] = []
    place = folder
    with files.explained(folder):
        while not place.exists():
            absent.append(place)
            place = place.parent
        folder.mkdir(parents=True, exist_ok=True)
    made[:0] = absent


def _refuse_used(folder: Path, mine: bool = False) -> None:
    """Raise RunError where a folder holds anything; where a run writes into it just now, it says which."""
    with files.explained(folder):
        if not folder.is_dir():
            raise RunError(f"--out {str(folder)!r} is not an empty folder; give another")
        inside = {path.name for path in folder.iterdir()}
    if files.LOCK in inside and not mine:
        with files.hold(folder):  # raises where it is in use
            pass
    if inside - {files.LOCK}:
        raise RunError(f"--out {str(folder)!r} is not an empty folder; give another, or `medfed resume {folder}`")


def _freeze(plan: Plan, told: Sequence[events.Event], folder: Path, name: str) -> None:
    """Write down what a run is, and what was `told` of its ranges and ledger: all that follows can be resumed."""
    spent = ranges.paid(plan.study) if plan.encoding.found_ranges() else "Nothing was trained."
    with advising(f"{spent} {folder} holds no whole run: a next one needs another --out."):
        own.write_to(folder / "sites" / OWN_LOG)
        if maps := site_maps.texts(plan.study):
            files_of = {
                name: {"file": plan.study.data.site_maps[name], "sha256": site_maps.sha256(text), "text": text}
                for name, text in maps.items()
            }
            files.write(folder / "sites" / SITE_MAPS, json.dumps(files_of, indent=2, ensure_ascii=False))
        first = [json.loads(events.line(events.screen(event))) for event in told]
        frozen = {
            "digest": plan.study.digest(),
            "folder": str(plan.study.folder.resolve()),
            "encoding": plan.encoding.to_json(),
            "run": name,
            "chosen": dict(plan.study.chosen),
            "told": first,
            "surveyed": plan.surveyed,
        }
        files.write(folder / "study.toml", plan.study.toml())
        files.write(folder / "plan.json", json.dumps(frozen))


def _begun(
    plan: Plan,
    fleet: InProcess,
    sites: Sequence[Site],
    folder: Path,
    name: str,
    keys: Keys | None = None,
    listeners: Sequence[Listener] = (),
    told: Sequence[events.Event] = (),
) -> Result:
    """Drive a run that is written down from its first round."""
    with Log(folder / "events.jsonl", listeners) as log:
        server = plan.begin()
        _tell_start(plan, log, told)
        _checkpoint(folder, server, plan, fleet, log, sites[0].account)
        with advising(_way_on(plan, folder)):
            return _drive(plan, fleet, sites, server, log, folder, name, keys)


def _refuse_begun(plan: Plan, account: SiteLedger | None, folder: Path) -> None:
    """Raise RunError where a run without a checkpoint has trained, LedgerError where its ranges are not charged."""
    g = plan.guarantee
    if account is None or g is None or g.simulation_only:
        return
    if account.uses():
        raise RunError(f"{folder}: its checkpoints are gone, and patients have paid for rounds; start the study again")
    if "ranges" in g.queries and account.queries().get("ranges", 0) < g.queries["ranges"].times:
        raise LedgerError(f"{folder}: the ledger lacks what patients have paid for ranges. Restore it from a copy.")


def _way_on(plan: Plan, folder: Path) -> str:
    """Say how a run that is cut short goes on."""
    if plan.guarantee and plan.guarantee.strategy:
        return "A run with correlated noise cannot be resumed: start the study again."
    return f"`medfed resume {folder}` goes on from its last whole round."


@own.keep()
def resume(folder: str | Path, data: Path | None = None, listeners: Sequence[Listener] = ()) -> Result:
    """Go on with a run from its last whole round; it ends with the bits of an uninterrupted one.

    A damaged checkpoint is passed over for the one before, and the log says so; a complete run is returned as it is.
    Raises RunError where the folder is no run, was changed, or holds no whole checkpoint.
    """
    folder = Path(folder)
    study, encoding = read_plan(folder)
    if (folder / "summary.json").exists() and (finished := load(folder)).complete:
        return finished
    with files.hold(folder):
        if (folder / "summary.json").exists() and (finished := load(folder)).complete:  # by whoever held it before
            return finished
        with advising(f"`medfed resume {folder}` goes on from its last whole round."):
            return _resumed(folder, study, encoding, data, listeners)


def _resumed(
    folder: Path, study: Study, encoding: Encoding, data: Path | None, listeners: Sequence[Listener]
) -> Result:
    """Drive a run from its last whole checkpoint."""
    frozen = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    unbegun = "told" in frozen and not any((folder / "checkpoints").glob("*"))
    if not unbegun:
        server, header, note = checkpoints.read_last(folder / "checkpoints")
    own.write_to(folder / "sites" / OWN_LOG)
    sites = open_sites(study, data, folder / "sites")
    fleet, plan = _ready(sites[0].study, sites, encoding)
    before = frozen if unbegun else header
    if plan.surveyed != before["surveyed"]:
        raise RunError(f"{folder}: the data has changed since the run began; start the study again")
    if plan.guarantee and plan.guarantee.strategy and not unbegun:
        raise RunError(
            f"{folder}: a run with correlated noise cannot be resumed, as its past noise is kept nowhere on purpose; "
            "start the study again"
        )
    name = frozen["run"]
    if (account := sites[0].account) and (head := before.get("ledger")):
        account.refuse_without(head)
    rehearse(plan, fleet)
    enrol(plan, fleet, name, fresh=False)
    if unbegun:
        _refuse_begun(plan, account, folder)
        with files.explained(folder):
            (folder / "events.jsonl").unlink(missing_ok=True)
        told = [events.parse(json.dumps(one)).event for one in frozen["told"]]
        return _begun(plan, fleet, sites, folder, name, listeners=listeners, told=told)
    if plan.keeps:
        for reply in gather(fleet, plan.participants, "restore", codec.encode({"round": server.round}), 600).values():
            if reply.error:
                raise RunError(f"{folder}: site {reply.site!r} cannot go back to round {server.round}: {reply.error}")
    record = folder / "events.jsonl"
    if not record.exists() or record.stat().st_size < header["events"]:
        raise RunError(
            f"{record} is missing or was cut; without its events the run cannot be told. Start the study again"
        )
    paid = _paid_for(record, header["events"], plan) if server.round == study.training.rounds else []
    with files.explained(record):
        os.truncate(record, header["events"])
    with Log(record, listeners) as log:
        log.emit(events.Resumed(server.round, study.training.rounds, note))
        for event in paid:
            log.emit(event)
        return _drive(plan, fleet, sites, server, log, folder, name, known={type(event) for event in paid})


def _paid_for(record: Path, after: int, plan: Plan) -> list[events.Event]:
    """Return what a log tells of the last model after its byte `after`, where patients have paid for any of it.

    That is kept: the same model is not tested, and not voted on, twice, nor its threshold chosen anew. Baselines are.
    """
    before = record.read_bytes()[:after].count(b"\n")
    told = list(events.read(record))[before:]
    queried = plan.guarantee is not None and plan.guarantee.queries
    if not any(isinstance(e, events.Voted) or (isinstance(e, events.Tested) and (e.noised or queried)) for e in told):
        return []
    main = main_model(plan.study.training.algorithm)
    again = events.RunFinished | events.Resumed | events.Compared
    return [e for e in told if not isinstance(e, again) and not (isinstance(e, events.Tested) and e.model != main)]


def simulate(study: Study, data: Path | None = None, listeners: Sequence[Listener] = ()) -> Result:
    """Run a study in memory: no folder, no checkpoints. For experiments that run many studies."""
    sites = open_sites(study, data)
    fleet, plan = _ready(sites[0].study, sites)
    name = secrets.token_hex(8)
    rehearse(plan, fleet)
    enrol(plan, fleet, name)
    with advising(ranges.paid(plan.study) if open_columns(plan.study) else "Nothing was trained."):
        plan, told = ranges.find(plan, fleet)
    plan = ranges.encode(plan, fleet)
    with Log(None, listeners) as log:
        _tell_start(plan, log, [*told, *_founding(sites)])
        return _drive(plan, fleet, sites, plan.begin(), log, None, name)


def load(folder: str | Path) -> Result:
    """Return what a finished run came to, from its folder; raise RunError where it has not finished or is damaged."""
    folder = Path(folder)
    study, encoding = read_plan(folder)
    try:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder}: no model ({error}); `medfed resume {folder}` finishes the run") from error
    module = build_model(study, encoding)
    wanted = {**trained(module), **models.fixed(module)}
    if absent := [name for name in wanted if name not in tensors]:
        raise RunError(f"{folder}/model.safetensors lacks {some(absent)}; it was not written by this study")
    w_P = torch.cat([tensors[name].reshape(-1) for name in Layout.of(module).shapes])
    kept = {name: tensors[name] for name in models.fixed(module)}
    return Result(summarise(events.read(folder / "events.jsonl")), study, encoding, w_P, folder, kept)


def open_sites(
    study: Study,
    data: Path | None,
    folder: Path | None = None,
    progress: bool = False,
    table: Reading | None = None,
) -> list[Site]:
    """Return a node for each site of the study; their study has its data table completed by the source.

    `table` is the study's, where it is read already.
    """
    with quotes.withhold(study.privacy.meant):
        return _open_sites(study, data, folder, progress, table)


def planned(study: Study) -> Study:
    """Return a study as its sites have it, from its file alone: what it leaves open chosen, its data completed.

    What a party that holds no record needs: the coordinator, an aggregator. Raises what stands against the study.
    """
    study, refusals = recipe.examine(study)
    refuse(refusals)
    return rates.settle(study)


def open_site(study: Study, name: str, data: Path | None = None, folder: Path | None = None) -> Site:
    """Return the node of one site, with its own records and ledger alone; raise RunError where it has no record."""
    with quotes.withhold(study.privacy.meant):
        return _open_sites(study, data, folder, False, None, only=name)[0]


def _open_sites(
    study: Study, data: Path | None, folder: Path | None, progress: bool, table: Reading | None, only: str = ""
) -> list[Site]:
    study = planned(study)  # what needs no record is refused before one is read, and before a ledger is founded
    private = guarantee.asked(study)
    if private:
        study = _identified(study, folder)
    frames, completed = sources.frames(study, data, progress, private, table)
    study = dataclasses.replace(study, data=completed)
    if only:
        if only not in frames:
            raise RunError(f"site {only!r} has no record in this table; {nearest(only, frames)}")
        frames = Frames.one(only, frames[only])
    account = SiteLedger(ledger_path(study, folder), study) if private else None
    devices = study.sites.kind == "device"
    sites = (Site.devices if devices else Site.open_all)(frames, study, folder)
    del frames
    pa.default_memory_pool().release_unused()  # a large table's texts, which else stay resident while rows are encoded
    if devices:
        study = recipe.settle(study, [site.name for site in sites if site.table and not site.table.test.all()])
        for site in sites:
            site.study = study
    if private:
        _check_places(sites, study)
        _check_scope(sites, study)
    for site in sites:
        site.account = account
    return sites


def _identified(study: Study, folder: Path | None) -> Study:
    """Return the study with the identity rule of the site's ledger; refuse another: everybody would look new."""
    asked, mine = study.data.identity, operators_folder()
    if study.privacy.simulation_only:
        path = None
    elif study.privacy.scope == "run":
        path = mine / LEDGER if mine else None
    else:
        path = ledger_path(study, folder)
    rule = ledger_file.rule_of(path) if path else None
    if rule and asked not in ("auto", rule):
        raise PlanError(
            f"data.identity={asked!r} and the site's ledger, which goes by {rule!r}, do not compose: patients who have "
            "paid would look new. Leave data.identity out."
        )
    rule = rule or ("exact" if asked == "exact" else "canonical")  # written out, so that a resumed run has it too
    return dataclasses.replace(study, data=dataclasses.replace(study.data, identity=rule))


def _check_places(sites: Sequence[Site], study: Study) -> None:
    """Refuse patients at more sites than the study attests, where their names can be compared: in one process."""
    if not study.data.patient:
        return
    seen = Counter(
        name for site in sites if site.table for name in site.table.ids if not str(name).startswith(partition.OWN)
    )
    most = study.privacy.max_sites_per_patient
    if many := sum(count > most for count in seen.values()):
        logger.warning("%d patients have records at more than %d sites, up to %d", many, most, max(seen.values()))
        raise PlanError(
            f"privacy.max_sites_per_patient={most}, but there are patients with records at more sites; the noise would "
            f"hide less than it claims. Raise it, or correct the table: they are those whose name in column "
            f"{study.data.patient!r} stands at more sites."
        )


def _check_scope(sites: Sequence[Site], study: Study) -> None:
    """Refuse a ledger for this run alone where some of its patients have a lifetime budget at this site."""
    mine, p = operators_folder(), study.privacy
    if p.scope != "run" or p.simulation_only or not mine or not (mine / LEDGER).exists():
        return
    if not study.data.patient:
        if study.data.source:  # a built-in source is public
            return
        raise PlanError(
            "privacy.scope='run' without data.patient and the site's ledger do not compose: whether these patients "
            "have a lifetime budget cannot be told. Set data.patient='column', which names the patient."
        )
    with Ledger.open(mine / LEDGER, read_only=True) as book:
        known = book.knows(name for site in sites if site.table for name in site.table.ids)
    if known:
        logger.warning("%d patients of this table have a lifetime budget in %s", known, mine)
        raise PlanError(
            "privacy.scope='run' and the site's ledger do not compose: some of these patients have a lifetime budget, "
            "which this run would not count. Set privacy.scope='study'."
        )


def survey(
    study: Study, data: Path | None = None, progress: bool = False, table: Reading | None = None
) -> dict[str, dict[str, Any]]:
    """Return what each site tells of its table, without training: sizes, gaps, classes.

    Under a claim too, as whoever holds the table sees all of it; but then no cell is quoted. `table` is the study's,
    where it is read already.
    """
    looked_at = Study(study.study, study.data, study.sites, folder=study.folder)  # whoever holds the table sees it all
    with quotes.withhold(study.privacy.meant):
        sites = open_sites(looked_at, data, None, progress, table)
    fleet = InProcess(sites)
    told = ask_surveys(fleet, fleet.sites())
    written = {site.name: site.table.spellings for site in sites if site.table}  # seen here, and told to nobody else
    return {name: {**one, "spellings": written[name]} for name, one in told.items()}


def privacy_outlook(study: Study, data: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """Return what a study's target asks for and what it will cost, without training.

    The noise as in `claims.outlook`; "chosen": what the recipe has chosen; "foretold": usefulness, see `foretell`.
    """
    sites = open_sites(study, data, None, progress)
    _, plan = _ready(sites[0].study, sites)
    found = claims.outlook(plan)
    told = [dataclasses.asdict(one) for one in foretell(plan)]
    test = paid_test(plan)
    return {
        **found,
        "chosen": plan.study.choices(),
        "foretold": told,
        "paid_test": dataclasses.asdict(test) if test else None,
        "ledger": _charged_where(plan.study),
    }


def _charged_where(study: Study) -> dict[str, Any]:
    """Return in which ledger a run of the study would be charged, and whether it would found it."""
    path = None if study.privacy.scope == "run" else ledger_path(study, None)
    return {"path": str(path) if path else None, "founded": path is not None and path.exists()}


def ledger_accounts(place: Path | None, delta: float | None = None, heads: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a ledger holds, its chain checked: of a run's folder, a ledger's folder, or the lifetime ledger.

    `delta` None takes the ledger's own. Raises LedgerError where one of `heads`, or a head that the run was told, is
    no longer in the chain.
    """
    folder = place or home()
    path = next((p for p in (folder / "sites" / LEDGER, folder / LEDGER) if p.exists()), None)
    if path is None and (folder / "plan.json").exists() and guarantee.asked(study := read_plan(folder)[0]):
        path = ledger_path(study, folder / "sites")
    if path is None:
        ledger_file.rule_of(folder / LEDGER)  # says where one is lost
        raise LedgerError(f"{str(folder)!r} holds no {LEDGER}; give a run's folder, or the ledger's")
    with Ledger.open(path, read_only=True) as ledger:
        for head in (*heads, *_told_heads(folder)):
            ledger.refuse_without(head)
        delta = delta or (ledger.lifetime.delta if ledger.lifetime else 1e-6)
        spent = [dataclasses.asdict(account) for account in ledger.spent(delta)]
        return {
            "delta": delta,
            "head": ledger.head(),
            "charges": len(ledger.rows()),
            "lifetime": dataclasses.asdict(ledger.lifetime) if ledger.lifetime else None,
            "decisions": ledger.decisions(),
            "accounts": spent,
        }


def _told_heads(folder: Path) -> list[str]:
    """Return the heads that a run's folder keeps: of its last checkpoint, and of its claim."""
    found = []
    if (folder / "checkpoints").is_dir():
        found.append(checkpoints.read_last(folder / "checkpoints")[1].get("ledger"))
    if (folder / "privacy.json").exists():
        found.append(((claims.read(folder).get("composition") or {}).get("ledger") or {}).get("head"))
    return [head for head in found if head]


def found_ledger(folder: Path | None, founding: Lifetime) -> Path:
    """Found a site's ledger by its operator's word; return its folder.

    Raises LedgerError where there is, or was, one; PlanError without a name.
    """
    path = (folder or home()) / LEDGER
    if not founding.operator.strip():
        raise PlanError("operator=''; expected who decides: it stays on record. Set --operator.")
    if path.exists():
        raise LedgerError(f"{path} is a ledger already; its budget changes by `medfed privacy budget`")
    with Ledger.open(path, founding=founding) as ledger:
        if ledger.lifetime != founding:
            raise LedgerError(f"{path} was founded by somebody else just now; look at it by `medfed privacy ledger`")
    return path.parent


def decide_budget(folder: Path | None, epsilon: float, delta: float | None, operator: str, reason: str) -> Lifetime:
    """Have a site's operator change its lifetime budget, on record; without `delta` that one stays."""
    path = (folder or home()) / LEDGER
    if not path.exists():
        raise LedgerError(f"{path} does not exist; found it by `medfed privacy found`")
    with Ledger.open(path) as ledger:
        if delta is None and ledger.lifetime is None:
            raise PlanError("delta is not known: this ledger has no lifetime budget yet. Set --delta.")
        kept = ledger.lifetime.delta if ledger.lifetime else 0.0
        return ledger.decide(epsilon, kept if delta is None else delta, operator, reason)


def name_column(folder: Path | None, column: str, operator: str, reason: str) -> None:
    """Have a site's operator say that a column of tables names patients by the ids that its ledger knows, on record."""
    path = (folder or home()) / LEDGER
    if not path.exists():
        raise LedgerError(f"{path} does not exist; found it by `medfed privacy found`")
    with Ledger.open(path) as ledger:
        ledger.know_column(column, operator or " ", reason)


def accept_ledger(folder: Path | None, head: str, operator: str, reason: str) -> None:
    """Have a site's operator take a copy of its ledger as the newest there is, on record: see `Ledger.accept`."""
    Ledger.accept((folder or home()) / LEDGER, head, operator, reason)


def verify_trail(folder: Path, members: Path | None = None) -> Verified:
    """Return a run's trail, its head compared with summary.json's; raise TrailError where it does not hold.

    With `members`, the folder of a consortium's list, its writers and the sites' keys must be keys that the consortium
    approved at some time: only then nobody else can have written the whole trail anew.
    """
    summary = folder / "summary.json"
    head = json.loads(summary.read_text(encoding="utf-8")).get("trail", {}).get("head", "") if summary.exists() else ""
    found = trail.verify(folder / "trail" / "trail.jsonl", holds, head)
    if members:
        history = federation.read(members).history
        approved = {(e["facts"]["name"], e["facts"]["signing"]) for e in history if e["kind"] == "approved"}
        used = [(e["writer"], e["facts"]["public"]) for e in found.entries if e["kind"] == "opened"]
        signed = [e["facts"]["signed"] for e in found.entries if e["kind"] == "study"]
        used += [(name, one["public"]) for sites in signed for name, one in sites.items()]
        if strange := [name for name, key in used if (name, key) not in approved]:
            raise TrailError(
                f"{folder}: {some(strange)} signed with keys that {members} never approved; run with "
                "security.federation, or give the run's own consortium"
            )
    return found


OVERRIDES = "overrides.jsonl"
"""What operators decided about quarantined clients, one line each; a run takes it in before its next round."""


def quarantined(folder: str | Path) -> list[dict[str, Any]]:
    """Return who has something held against it in a run: its sum, and the last round that it sits out (0: none)."""
    recorded = _recorded(Path(folder))
    most = max((event.most for event in recorded if isinstance(event, events.Inspected)), default=0)
    held = _replayed(recorded, most).standings
    return [
        {"client": name, "total": round(one.total, 3), "until": one.until, "reputation": round(one.reputation, 3)}
        for name, one in sorted(held.items(), key=lambda item: -item[1].total)
        if one.total or one.until
    ]


def lift_quarantine(folder: str | Path, client: str, reason: str, operator: str) -> None:
    """Have a run hold nothing against a client from its next round on: an appeal that an operator grants, on record.

    Raises RunError for a client that the run does not know, without reason or name, or where the run is complete.
    """
    folder = Path(folder)
    planned = next((event for event in _recorded(folder) if isinstance(event, events.Planned)), None)
    known = list(planned.sizes) if planned else []
    if client not in known:
        raise RunError(f"client={client!r} takes no part in {folder}; expected one of {some(known)}")
    if not reason.strip() or not operator.strip():
        raise RunError(f"reason={reason!r}, operator={operator!r}; expected both: an override stays on record")
    summary = folder / "summary.json"
    if summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["status"] == "complete":
        raise RunError(f"{folder} is complete; there is no next round to take part in")
    asked = {"client": client, "reason": reason.strip(), "operator": operator.strip()}
    line = json.dumps({**asked, "time": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n"
    with files.hold(folder, f"{OVERRIDES}.lock"):  # the run itself goes on meanwhile, and reads what is whole
        files.write(folder / OVERRIDES, "".join(_overrides(folder)) + line)


def _overrides(folder: Path) -> list[str]:
    """Return the whole lines of what operators have decided, each with its end."""
    if not (folder / OVERRIDES).exists():
        return []
    lines = (folder / OVERRIDES).read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _recorded(folder: Path) -> list[events.Event]:
    return list(events.read(folder / "events.jsonl"))


def verify_model_integrity(folder: str | Path, members: Path | None = None) -> dict[str, Any]:
    """Check that a run's model is the one its trail ends with, each model following the one before; the brief's name.

    Every site's signature under the study is checked too. Returns the model's sha256, the rounds whose models follow
    each other, and who signed; raises TrailError where something does not hold.
    """
    folder = Path(folder)
    entries = verify_trail(folder, members).entries
    before, rounds, sites = FIRST.hex(), 0, set[str]()
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
                    raise TrailError(f"{folder}: the model of round {facts['round']} does not follow the one before")
                before, rounds = facts["model"], rounds + 1
    last = entries[-1]
    if last["kind"] != "finished":
        raise TrailError(f"{folder}: its trail has no end; `medfed resume {folder}` finishes the run")
    model = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if model != last["facts"]["model"]:
        raise TrailError(
            f"{folder}/model.safetensors has sha256 {model[:16]}..., its trail ends with "
            f"{last['facts']['model'][:16]}...; the model was changed after the run. Do not use it."
        )
    return {"model": model, "rounds": rounds, "signed_by": last["writer"], "sites": sorted(sites)}


@dataclass(frozen=True)
class PreparedData:
    """Encoded rows of every site: site -> (x [n, M] float32, y [n])."""

    features: list[str]
    labels: tuple[str, ...]
    train: dict[str, tuple[np.ndarray, np.ndarray]]
    test: dict[str, tuple[np.ndarray, np.ndarray]]


def load_and_prepare_medical_data(study: str | Study = "breast-cancer", data: Path | None = None) -> PreparedData:
    """Load a study's records, split them by patient and encode them as its sites would. The brief's function.

    For the default study: 569 patients, 30 features and 2 products of them, scaled by median and IQR over all sites.
    Everything comes back in one place, so this is for looking and for simulations.
    """
    sites = open_sites(study if isinstance(study, Study) else studies.load(study), data)
    plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
    ranges.refuse_unfound(plan)
    return PreparedData(
        features=plan.encoding.names(),
        labels=plan.encoding.target.labels,
        train={site.name: (site.train.x.numpy(), site.train.y.numpy()) for site in sites},
        test={site.name: (site.test.x.numpy(), site.test.y.numpy()) for site in sites},
    )


def read_plan(folder: Path) -> tuple[Study, Encoding]:
    """Return a run's frozen study and its encoding; raise RunError where they do not agree."""
    try:
        frozen = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        study = studies.load(folder / "study.toml")
        study = dataclasses.replace(study, folder=Path(frozen["folder"]), chosen=frozen.get("chosen", {}))
    except (OSError, ValueError, MedfedError) as error:
        raise RunError(f"{str(folder)!r} is not a run folder: {error}") from error
    if study.digest() != frozen["digest"]:
        raise RunError(f"{folder}/study.toml was changed after the run began; start a new run with your change")
    return study, Encoding.from_json(frozen["encoding"])


def versions() -> dict[str, str]:
    """Return the versions that decide a run's bits."""
    packages = {name: version(name) for name in ("medfed", "torch", "numpy", "scikit-learn", "pandas")}
    return {"python": platform.python_version(), **packages}


def _ready(study: Study, sites: Sequence[Site], encoding: Encoding | None = None) -> tuple[InProcess, Plan]:
    """Return a fleet of the sites, prepared, and the plan; for the baseline `pooled` one more site holds every row."""
    fleet = InProcess(sites)
    plan = prepare(study, fleet, fleet.sites(), encoding)
    return (InProcess([*sites, Site.pooled(sites)]) if plan.participants == (POOLED,) else fleet), plan


def _drive(
    plan: Plan,
    fleet: InProcess,
    sites: Sequence[Site],
    server: Server,
    log: Log,
    folder: Path | None,
    run: str,
    keys: Keys | None = None,
    known: Collection[type[events.Event]] = (),
) -> Result:
    """Run the rounds that are left, then test, vote, measure the baselines, and write down what came of it.

    `known`: what the log already tells of the last model, paid for by patients.
    """
    began, budget, study = time.perf_counter(), plan.budget(), plan.study
    aggregation = ways.introduce(plan, fleet, run, folder, keys)
    for number in range(1, server.round + 1):  # a resumed run has paid for these
        budget.charge(number, plan.on_turn(number))
    for _ in range(plan.guarantee.queries["ranges"].times if plan.guarantee and plan.encoding.found_ranges() else 0):
        budget.ask("ranges")  # before this; the ledger says how often, where one was charged
    if (account := sites[0].account) and not study.privacy.simulation_only:
        budget.take_over(account.uses(), account.queries())
    name, reason, every = main_model(study.training.algorithm), "", study.monitor.evaluate_every
    watch, gate = _watched(plan, log), Rollback.of(plan)
    pace = _paced(log.events(), plan)
    public = study.privacy.scope == "run" and study.data.test_is_public  # baselines train and are tested without noise
    private = plan.guarantee is not None and not public
    try:
        while server.round < study.training.rounds:
            watch = _overridden(watch, folder, server.round, log)
            before = server
            server = run_round(server, plan, fleet, budget, log, aggregation, watch.out(server.round + 1))
            watch = _judge(watch, log)
            if gate:
                server = _gated(gate, before, server, log)
            server, pace = _eased(server, pace, plan, log)
            if every and server.round % every == 0 and server.round < study.training.rounds:
                test(server, plan, fleet, log, name)
            if folder:
                _checkpoint(folder, server, plan, fleet, log, account)
        if every and events.Tested not in known:
            decision = decide(server, plan, fleet, budget, log)
            test(server, plan, fleet, log, name, intervals=True, decision=decision)
        if events.Voted not in known:
            vote(server, plan, fleet, budget, log)
        if account and not study.privacy.simulation_only:
            budget.take_over(account.uses(), account.queries())  # who was refused has not paid
        if study.monitor.baselines and every and name == "federated" and not private:
            for baseline in _baselines(study):
                _baseline(baseline, study, sites, plan.encoding, log, server)
    except (QuorumError, BudgetError) as error:
        reason = str(error)
    recorded = log.events()
    if not reason and any(isinstance(event, events.SiteExcluded) for event in recorded):
        reason = "some sites were left out of some rounds"
    log.emit(
        events.RunFinished(
            status="incomplete" if reason else "complete",
            rounds=server.round,
            seconds=round(time.perf_counter() - began, 3),
            reason=reason,
            privacy=budget.claim(),
            spread=budget.spread(),
        )
    )
    summary = summarise(log.events())
    if folder:
        _write_model(folder, server, plan, models.fixed(sites[0].model), summary["decision"])
        if written := getattr(aggregation, "trail", None):
            model = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            written.append("finished", {"rounds": server.round, "status": summary["status"], "model": model})
            summary["trail"] = {"entries": written.number, "head": written.head}
        if plan.guarantee:
            claim = claims.claim(plan, budget, sites[0].account)
            files.write(folder / "privacy.json", json.dumps(claim, indent=2, allow_nan=False))
        files.write(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False))
    return Result(summary, study, plan.encoding, server.released_P, folder, models.fixed(sites[0].model))


def _watched(plan: Plan, log: Log) -> Watch:
    """Return what is held against the clients by the rounds that a resumed run has behind it."""
    return _replayed(log.events(), plan.rule.f if plan.rule else 0)


def _replayed(recorded: Iterable[events.Event], most: int) -> Watch:
    watch = Watch(most)
    for event in recorded:
        match event:
            case events.Inspected():
                watch, _ = _step(watch, event)
            case events.SecurityAudit(action="lift"):
                watch = watch.lift(event.client)
    return watch


def _overridden(watch: Watch, folder: Path | None, round: int, log: Log) -> Watch:
    """Take in what operators have decided since the last round, and tell it."""
    if folder is None:
        return watch
    done = sum(isinstance(event, events.SecurityAudit) and event.action == "lift" for event in log.events())
    for line in _overrides(folder)[done:]:
        asked = json.loads(line)
        watch = watch.lift(asked["client"])
        why = (f"operator {asked['operator']}: {asked['reason']}",)
        log.emit(events.SecurityAudit(round, asked["client"], 0, 0.0, "lift", why))
    return watch


def _paced(recorded: Iterable[events.Event], plan: Plan) -> Pace:
    """Return the training losses of the rounds that a resumed run has behind it."""
    losses = {event.round: event for event in recorded if isinstance(event, events.RoundFinished)}
    pace = Pace()
    for _, event in sorted(losses.items()):
        pace, _ = pace.step(_common_loss(event, plan), len(event.clients) == len(plan.participants))
    return pace


def _common_loss(event: events.RoundFinished, plan: Plan) -> float | None:
    """Return a round's training loss; where sites may lie the median of theirs, so that no liar can slow all down."""
    told = [loss for loss in event.losses if loss is not None]
    return statistics.median(told) if plan.malicious and told else event.loss


def _eased(server: Server, pace: Pace, plan: Plan, log: Log) -> tuple[Server, Pace]:
    """Tell where a round's training loss has grown; a rate that was chosen is halved then, one that was set stays.

    Under a claim, and where nobody sees a site's loss, there is nothing to go by.
    """
    last = log.latest.get(events.RoundFinished)
    if plan.guarantee or plan.study.security.aggregation != "plain" or not isinstance(last, events.RoundFinished):
        return server, pace
    if last.round != server.round:
        return server, pace
    loss = _common_loss(last, plan)
    following, grew = pace.step(loss, len(last.clients) == len(plan.participants))
    if not grew:
        return server, following
    now = "no number" if loss is None else f"{loss:.3g}"
    what = f"round {last.round}: the training loss grew to {now}"
    if pace.lowest is not None:
        what += f", from {pace.lowest:.3g} at its lowest"
    if plan.chosen:
        server = rates.halve(server)
        log.emit(events.Warned(f"{what}; the learning rate is halved to {float(server.slots['rate']):.3g}"))
    else:
        rate = plan.study.training.learning_rate
        log.emit(events.Warned(f"{what}. Lower training.learning_rate={rate:g}, or leave it out"))
    return server, following


def _gated(gate: Rollback, before: Server, after: Server, log: Log) -> Server:
    """Return the round's state, or the one before where the gate takes the round back."""
    stands, was, now = gate.passes(before, after)
    if stands:
        return after
    log.emit(events.RolledBack(after.round, was, now if math.isfinite(now) else None))
    return dataclasses.replace(before, round=after.round)


def _judge(watch: Watch, log: Log) -> Watch:
    """Take in what the last round said against its clients, and tell what is done about it."""
    last, started = log.latest.get(events.Inspected), log.latest.get(events.RoundStarted)
    if not isinstance(last, events.Inspected) or not isinstance(started, events.RoundStarted):
        return watch
    if last.round != started.round:
        return watch
    watch, decisions = _step(watch, last)
    for one in decisions:
        log.emit(
            events.SecurityAudit(one.round, one.client, int(one.level), round(one.total, 3), one.action, one.evidence)
        )
    return watch


def _step(watch: Watch, event: events.Inspected) -> tuple[Watch, list[Ruling]]:
    findings = [Finding(**one) for one in event.findings]  # type: ignore[arg-type]
    return watch.step(event.round, event.weights.keys(), findings)


def baseline_plan(name: str, study: Study, sites: Sequence[Site], encoding: Encoding) -> tuple[InProcess, Plan]:
    """Return a fleet of these sites, and the plan by which a baseline is trained."""
    other = without_protection(study, name)
    return _ready(other, [site.under(other) for site in sites], encoding)


def _train_in_silence(plan: Plan, fleet: InProcess) -> Server:
    """Run all rounds of a baseline; nobody is told. Raises QuorumError or DataError."""
    server, pace, quiet = plan.begin(), Pace(), Log()
    for _ in range(plan.study.training.rounds):
        server = run_round(server, plan, fleet, plan.budget(), quiet)
        server, pace = _eased(server, pace, plan, quiet)
    return server


def _baselines(study: Study) -> tuple[str, ...]:
    """Return what the federated model is measured against: no device trains alone, nor do learners without gradient."""
    if study.sites.kind == "device" or study.model.name in LEARNERS:
        return ("pooled",)
    return BASELINES


def _baseline(name: str, study: Study, sites: Sequence[Site], encoding: Encoding, log: Log, federated: Server) -> None:
    """Train a baseline and tell what it is worth; sites' own models also beside the federated one, by record."""
    try:
        fleet, plan = baseline_plan(name, study, sites, encoding)
        server = _train_in_silence(plan, fleet)
        decision = decide(server, plan, fleet, plan.budget(), log)
        test(server, plan, fleet, log, name, intervals=True, decision=decision)
        if name == "local":
            compare_own(server, federated, plan, fleet, log)
    except (QuorumError, DataError) as error:
        log.emit(events.Warned(f"baseline {name!r} was not measured: {error}"))


def _tell_start(plan: Plan, log: Log, told: Sequence[events.Event]) -> None:
    """Tell what a run is, and what was `told` of its ranges and ledger before."""
    study, training = plan.study, plan.study.training
    machine: dict[str, str | int] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    log.emit(
        events.RunStarted(
            study=study.study.name,
            purpose=study.study.purpose,
            digest=study.digest(),
            seed=study.study.seed,
            rounds=training.rounds,
            versions=versions(),
            machine=machine,
        )
    )
    log.emit(
        events.Planned(
            algorithm=training.algorithm,
            model=study.model.name,
            parameters=plan.parameters,
            features=len(plan.encoding.names()),
            message=plan.message,
            path=plan.path,
            sizes=plan.sizes,
            labels=plan.label_counts,
            privacy=plan.budget().claim(),
            bytes_up=plan.bytes_up,
            bytes_down=plan.bytes_down,
            sees=who_sees(plan),
            bears=bears(plan),
            positive=plan.encoding.target.labels[1] if plan.encoding.target.task == "binary" else "",
            threshold=study.data.threshold if plan.encoding.target.task == "binary" else "",
            chosen=study.choices(),
            learning_rate=plan.chosen.rate if plan.chosen else training.learning_rate,
            rate_chosen=plan.chosen.why() if plan.chosen else "",
        )
    )
    for event in (*told, *map(events.Warned, [*plan.warnings, *_void_test(plan)])):
        log.emit(event)


def _void_test(plan: Plan) -> Iterator[str]:
    """Yield that the test that held-out patients pay for will tell hardly anything, before anybody has paid."""
    paid = paid_test(plan)
    void = [f"{float(share):.0%}" for share, told in paid.intervals.items() if told is None] if paid else []
    if paid and void:
        yield (
            f"the test that about {paid.held_out} held-out patients pay for (privacy.evaluation_epsilon="
            f"{paid.epsilon:g}) will hardly tell anything where {some(void)} are positive: too much noise. Hold out "
            "more, raise it, or test on public patients (data.test_is_public)"
        )


def _founding(sites: Sequence[Site]) -> list[events.Event]:
    """Say with which budget a ledger was founded by this run, as nobody has been asked."""
    account = sites[0].account
    bound = account.founded() if account else None
    if not bound:
        return []
    return [
        events.Warned(
            f"the site's budget ledger was founded: no patient may spend more than epsilon {bound.epsilon:g} at "
            f"delta {bound.delta:g} over all studies, ever. Its operator changes that: medfed privacy budget "
            "--lifetime-epsilon E --operator NAME --reason TEXT"
        )
    ]


def _checkpoint(
    folder: Path, server: Server, plan: Plan, fleet: InProcess, log: Log, account: SiteLedger | None
) -> None:
    """Let the sites write down what they remember, then commit the round: a crash between leaves the round before."""
    keep = plan.study.monitor.checkpoints
    if plan.keeps and server.round > 0:
        payload = codec.encode({"round": server.round, "keep": keep + 1})
        for reply in gather(fleet, plan.participants, "save", payload, 600).values():
            if reply.error:
                raise WriteError(f"site {reply.site!r} cannot save its state: {reply.error}")
    header: dict[str, Any] = {"events": log.offset(), "surveyed": plan.surveyed}
    if account and plan.guarantee and not plan.guarantee.simulation_only:
        header["ledger"] = account.ledger.head()
    checkpoints.write(folder / "checkpoints", server, header, keep)


def _write_model(
    folder: Path, server: Server, plan: Plan, kept: Mapping[str, Tensor], decision: Mapping[str, Any] | None
) -> None:
    """Write all that the model's outputs follow from: the released weights, what was not trained; and the threshold."""
    layout = Layout.of(build_model(plan.study, plan.encoding))
    tensors = {name: piece.contiguous() for name, piece in layout.pieces(server.released_P)}
    tensors |= {name: value.detach().clone().contiguous() for name, value in kept.items()}
    about = {"study": plan.study.digest(), "encoding": plan.encoding.to_json(), "decision": decision}  # one entry
    files.write(folder / "model.safetensors", safetensors.torch.save(tensors, {"medfed": json.dumps(about)}))
