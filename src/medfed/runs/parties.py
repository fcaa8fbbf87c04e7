"""What runs at a party on its own: a site with its own records, keys and ledger; an aggregator with
its own keys.

Each has the study as a file of its own and resolves it for itself. `Processes` starts them on this
machine, for tests and demonstrations; between hospitals an engine does.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from medfed import study as studies
from medfed.node.pipes import Pipes, handler, serve
from medfed.rounds.aggregator import Aggregator
from medfed.runs.opening import complete, open_site
from medfed.study import Study


def serve_site(
    pipe: Connection, study: Path, name: str, folder: Path, data: Path | None = None
) -> None:
    """Run the node of one site until its pipe is closed; `folder` is where it keeps its state, its
    ledger too.
    """
    torch.set_num_threads(1)
    serve(open_site(studies.load(study), name, data, folder).handle, pipe)


def serve_aggregator(pipe: Connection, study: Path, name: str) -> None:
    """Run the node of one aggregator until its pipe is closed."""
    serve(Aggregator(name, studies.load(study)).handle, pipe)


@dataclass(frozen=True)
class Processes:
    """Sites and aggregators, each in a process of its own; closing ends them."""

    fleet: Pipes
    aggregators: Mapping[str, Callable[[str, bytes], bytes]]
    processes: Sequence[BaseProcess]
    pipes: Sequence[Connection]

    @property
    def baselines(self) -> None:
        """Nobody trains baselines: no process has the records of all."""

    def resolve(self, study: Study) -> Study:
        """Return the study as each party works it out, from its file alone."""
        return complete(study)

    @classmethod
    def start(
        cls, study: Path, sites: Sequence[str], folder: Path, data: Path | None = None
    ) -> Self:
        """Start a process for each site and, where the study shares rows among three, for each
        aggregator.
        """
        security = studies.load(study).security
        three = security.aggregators if security.aggregation == "three-party" else ()
        context = multiprocessing.get_context("spawn")
        processes: list[BaseProcess] = []

        def begin(target: Callable[..., None], *arguments: object) -> Connection:
            mine, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, study, *arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            return mine

        at_sites = {name: begin(serve_site, name, folder / name, data) for name in sites}
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
            process.join(10)
            if process.is_alive():
                process.kill()
