"""Parties as processes of this machine: each site with its own records, state and ledger, each
aggregator with its own keys, behind a pipe.

Each has the study as a file and resolves it for itself. The coordinator, who drives the run, reads
no record: `run_apart` and `resume_apart` are `medfed run` and `medfed resume` with `--processes`.
Between hospitals an engine takes the place of this module.
"""

import dataclasses
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import torch

from medfed import study as studies
from medfed.core import codec, own
from medfed.core.checks import AbortError, DataError, MedfedError, PlanError, describe
from medfed.data import sources
from medfed.monitor.events import Listener
from medfed.node.pipes import Handle, Pipes, handler, serve
from medfed.privacy import guarantee
from medfed.rounds.aggregator import Aggregator
from medfed.runs.execute import resume, run
from medfed.runs.folders import OWN_LOG
from medfed.runs.opening import complete, open_site, settle_identity
from medfed.runs.results import Result
from medfed.runs.simulation import Opener
from medfed.study import KINDS, Study

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """A party's copy of the study: a file, and the folder that its paths start from."""

    file: Path
    base: Path

    def read(self) -> Study:
        """Return the study that the party has."""
        return dataclasses.replace(studies.load(self.file), folder=self.base)


def serve_site(
    pipe: Connection, study: Copy, threads: int, name: str, folder: Path, data: Path | None = None
) -> None:
    """Run the node of one site until its pipe is closed.

    Args:
        pipe: where questions come from.
        study: the study as the site has it.
        threads: how many threads it computes with, which may decide bits.
        name: the site.
        folder: where it keeps its state, its log, and the ledger of a run of scope "run".
        data: where downloaded data is looked for.

    What stands against opening the node is the answer to every question: the coordinator tells it.
    """
    _await_the_end_only()
    torch.set_num_threads(threads)
    with own.keep():
        handle = _refuse_on_error(
            lambda: _with_log(open_site(study.read(), name, data, folder).handle, folder)
        )
        serve(handle, pipe)


def serve_aggregator(pipe: Connection, study: Copy, threads: int, name: str) -> None:
    """Run the node of one aggregator until its pipe is closed."""
    _await_the_end_only()
    torch.set_num_threads(threads)
    serve(_refuse_on_error(lambda: Aggregator(name, study.read()).handle), pipe)


def tell_sites(pipe: Connection, study: Copy, threads: int, data: Path | None = None) -> None:
    """Tell which sites a table names and which columns are its features, and nothing else of it,
    where only records say so.
    """
    _await_the_end_only()

    def handle(op: str, payload: bytes) -> bytes:
        frames, completed = sources.frames(study.read(), data)
        return codec.encode({"sites": list(frames), "features": list(completed.features)})

    serve(handle, pipe)


def _await_the_end_only() -> None:
    """Leave Ctrl-C to the coordinator: a party ends when its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _refuse_on_error(make: Callable[[], Handle]) -> Handle:
    """Return a party's `handle` or, where it cannot be set up, one that always says why."""
    try:
        return make()
    except MedfedError as error:
        reason = str(error)
    except Exception as error:
        logger.error("the party was not set up", exc_info=error)
        reason = describe(error)

    def refuse(op: str, payload: bytes) -> bytes:
        raise PlanError(reason)

    return refuse


_BEFORE = {"survey", "answer", "prepare", "identify", "rehearse"}
"""What is asked before a run is written down: until then a site leaves nothing behind."""


def _with_log(handle: Handle, folder: Path) -> Handle:
    """Return a site's `handle`, which begins the site's own log with its first part in a run."""
    begun = False

    def logging_handle(op: str, payload: bytes) -> bytes:
        nonlocal begun
        if not begun and op not in _BEFORE:
            own.write_to(folder / OWN_LOG)
            begun = True
        return handle(op, payload)

    return logging_handle


@dataclass(frozen=True)
class Processes:
    """Sites and aggregators, each in a process of its own; closing ends them."""

    fleet: Pipes
    aggregators: Mapping[str, Handle]
    processes: Sequence[BaseProcess]
    pipes: Sequence[Connection]
    agreed: Study | None = None  # what all were started with, where it was settled for them

    @property
    def baselines(self) -> None:
        """Nobody trains baselines: no process has the records of all."""

    def resolve(self, study: Study) -> Study:
        """Return the study as each party works it out, from its file alone."""
        return self.agreed or complete(study)

    @classmethod
    def start(
        cls,
        study: Path,
        sites: Sequence[str],
        folder: Path,
        data: Path | None = None,
        base: Path | None = None,
    ) -> Self:
        """Start a process for each site and,
        where the study shares rows among three, for each aggregator.

        Args:
            study: the file that every party reads; it must stay until all have answered once.
            sites: their names.
            folder: each site keeps what is its own in a folder of its name in here.
            data: where sites look for downloaded data.
            base: the folder that the study's paths start from; default: the file's.
        """
        copy = Copy(study, base or study.parent)
        security = copy.read().security
        three = security.aggregators if security.aggregation == "three-party" else ()
        processes: list[BaseProcess] = []

        def begin(target: Callable[..., None], *arguments: Any) -> Connection:
            process, pipe = _begin(target, copy, *arguments)
            processes.append(process)
            return pipe

        at_sites = {
            name: begin(serve_site, name, folder / quote(name, safe=" "), data) for name in sites
        }
        at_three = {name: begin(serve_aggregator, name) for name in three}
        handles = {name: handler(name, pipe) for name, pipe in at_three.items()}
        return cls(Pipes(at_sites), handles, processes, [*at_sites.values(), *at_three.values()])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            _end(process)


def _begin(
    target: Callable[..., None], study: Copy, *arguments: Any
) -> tuple[BaseProcess, Connection]:
    """Start a party; return its process and this end of its pipe."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(
        target=target, args=(theirs, study, torch.get_num_threads(), *arguments), daemon=True
    )
    process.start()
    theirs.close()
    return process, mine


def _end(process: BaseProcess) -> None:
    """Wait until a party whose pipe is closed has ended."""
    process.join(10)
    if process.is_alive():
        process.kill()


def run_apart(
    study: Study,
    out: Path | None = None,
    data: Path | None = None,
    listeners: Sequence[Listener] = (),
) -> Result:
    """Run a study as `runs.run` does, every site and aggregator in a process of its own.

    Raises PlanError for devices, which are too many, and whatever `runs.run` raises.
    """
    with _starting(data) as start:
        return run(study, out, data, listeners, parties=start)


def resume_apart(
    folder: Path, data: Path | None = None, listeners: Sequence[Listener] = ()
) -> Result:
    """Go on with a run of `run_apart`, its parties started anew from what each has kept."""
    with _starting(data) as start:
        return resume(folder, data, listeners, parties=start)


@contextmanager
def _starting(data: Path | None) -> Iterator[Opener]:
    """Yield how a study's parties are started; they end with the block."""
    started: list[Processes] = []

    with TemporaryDirectory(prefix="medfed-") as place:

        def start(study: Study, folder: Path) -> Processes:
            agreed, sites = _agree(study, data, Path(place))
            file = _write(agreed, Path(place))
            started.append(Processes.start(file, sites, folder, data, agreed.folder))
            return dataclasses.replace(started[-1], agreed=agreed)

        try:
            yield start
        finally:
            for parties in started:
                parties.__exit__(None, None, None)


def _write(study: Study, place: Path) -> Path:
    """Write the file that every party reads; return it."""
    file = place / "study.toml"
    file.write_text(study.toml(), encoding="utf-8")
    return file


def _agree(study: Study, data: Path | None, place: Path) -> tuple[Study, Sequence[str]]:
    """Return a study with nothing left for a party's own records to decide, and its sites.

    No record is read here. Where only records name the sites, or say which columns are numbers, a
    process of its own reads them and tells just that; under a claim both are declared.
    """
    if study.sites.kind == "device":
        raise PlanError(
            "--processes and sites.kind='device' do not compose: a process for each device is "
            "too many. Leave --processes out."
        )
    if study.training.algorithm == "pooled":
        raise PlanError(
            "--processes and training.algorithm='pooled' do not compose: no process holds the rows "
            "of all sites. Leave --processes out."
        )
    if study.robustness.sight == "all":
        raise PlanError(
            "--processes and robustness.sight='all' do not compose: no process holds the rows of "
            "others. Leave --processes out."
        )
    study = complete(study)
    if guarantee.asked(study):
        names = tuple(study.privacy.sizes) if study.data.site else study.sites.names
        return settle_identity(study, None), names
    if study.sites.names and not study.data.site and not {*KINDS} & {*study.data.features}:
        return study, study.sites.names

    told = _ask_sites(Copy(_write(study, place), study.folder), data)
    features = tuple(told["features"])
    return dataclasses.replace(
        study, data=dataclasses.replace(study.data, features=features)
    ), told["sites"]


def _ask_sites(study: Copy, data: Path | None) -> dict[str, Any]:
    process, pipe = _begin(tell_sites, study, data)
    try:
        return codec.decode(handler("the table's reader", pipe)("sites", b""))[0]
    except AbortError as error:
        raise DataError(str(error)) from error
    finally:
        pipe.close()
        _end(process)
