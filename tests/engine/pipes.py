"""Sites behind pipes whose only data is a csv of their own, each in a process of its own."""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

from medfed import study as studies
from medfed.data.tables import read
from medfed.node import pipes
from medfed.node.site import Site


def _serve(pipe: Connection, study: Path, name: str, table: Path) -> None:
    pipes.serve(Site.open(name, read(table), studies.load(study)).handle, pipe)


class Pipes(pipes.Pipes):
    """The coordinator's side: one child a site."""

    def __init__(self, study: Path, tables: dict[str, Path]) -> None:
        context = multiprocessing.get_context("spawn")
        ends = dict[str, Connection]()
        self.children = {}
        for name, table in tables.items():
            ends[name], theirs = context.Pipe()
            self.children[name] = context.Process(
                target=_serve, args=(theirs, study, name, table), daemon=True
            )
            self.children[name].start()
            theirs.close()
        self.ends = ends
        super().__init__(ends)

    def close(self) -> None:
        for name, child in self.children.items():
            self.ends[name].close()
            child.kill()
            child.join()
