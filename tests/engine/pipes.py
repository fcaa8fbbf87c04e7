"""A test double of the port: every site in a process of its own, bytes over pipes, its own csv its only data."""

import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from medfed.engine.port import Reply

_FRAME = struct.Struct("<?QQ")  # ok, length of the op, length of the payload


def send(pipe: BinaryIO, op: str, payload: bytes, ok: bool = True) -> None:
    pipe.write(_FRAME.pack(ok, len(op.encode()), len(payload)) + op.encode() + payload)
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[bool, str, bytes] | None:
    head = pipe.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    ok, op, size = _FRAME.unpack(head)
    return ok, pipe.read(op).decode(), pipe.read(size)


class Pipes:
    """The coordinator's side: one child a site."""

    def __init__(self, study: Path, tables: dict[str, Path]) -> None:
        command = [sys.executable, __file__, str(study)]
        self.children = {
            name: subprocess.Popen([*command, name, str(table)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for name, table in tables.items()
        }
        self.selector = selectors.DefaultSelector()
        for name, child in self.children.items():
            assert child.stdout
            self.selector.register(child.stdout, selectors.EVENT_READ, name)
        self.asked: dict[str, tuple[int, float]] = {}
        self.tickets = 0

    def sites(self) -> list[str]:
        return list(self.children)

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        self.tickets += 1
        self.asked[site] = (self.tickets, time.perf_counter())
        try:
            pipe = self.children[site].stdin
            assert pipe
            send(pipe, op, payload)
        except BrokenPipeError:
            pass  # the dead child's end of file becomes its reply
        return self.tickets

    def submit_many(self, sites: Sequence[str], op: str, payload: bytes, deadline: float) -> list[int]:
        return [self.submit(site, op, payload, deadline) for site in sites]

    def poll(self, wait: float) -> list[Reply]:
        replies = []
        for key, _ in self.selector.select(wait):
            name = str(key.data)
            if name not in self.asked:
                continue
            ticket, began = self.asked.pop(name)
            pipe = self.children[name].stdout
            assert pipe
            frame = receive(pipe)
            seconds = time.perf_counter() - began
            if frame is None:
                replies.append(Reply(ticket, name, b"", seconds, "the site's process has ended"))
            else:
                ok, text, payload = frame
                replies.append(Reply(ticket, name, payload, seconds, "" if ok else text))
        return replies

    def close(self) -> None:
        for child in self.children.values():
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # what a dead child did not read
                        pipe.close()
        self.selector.close()


def main(study: str, name: str, table: str) -> None:
    """The child: one site's node, answering until its input ends."""
    from medfed.core.checks import SiteError
    from medfed.data.tables import read
    from medfed.site import Site
    from medfed.study import load

    site = Site.open(name, read(Path(table)), load(study))
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    while (frame := receive(source)) is not None:
        _, op, payload = frame
        try:
            send(sink, op, site.handle(op, payload))
        except SiteError as error:
            send(sink, str(error), b"", ok=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
