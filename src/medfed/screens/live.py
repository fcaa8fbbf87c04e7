"""Following a run while it goes: its event log as it grows, by any process that may read it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from medfed.core.checks import RunError
from medfed.monitor.events import RunFinished, Stamped, parse

CHUNK = 1 << 18  # bytes read at once


class Tail:
    """Reads a growing event log, and never a line that is half written.

    A resumed run cuts its log back to the last whole round. Then what was read last is no longer
    there, and the tail starts again from the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._number = 0
        self._last = b""

    def read(self) -> tuple[list[Stamped], bool]:
        """Return the events written since the last call, and whether they start over.

        Raises RunError where the file cannot be read, or at a line that is damaged or of a newer
        schema.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset - len(self._last))
                restarted = file.read(len(self._last)) != self._last
                if restarted:
                    self._reset()
                    file.seek(0)
                data = file.read(CHUNK)
                while data and b"\n" not in data and (more := file.read(CHUNK)):
                    data += more
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be read: {error.strerror}. Check the run's folder."
            ) from error

        told: list[Stamped] = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                told.append(self._parse(line))
            except RunError:
                if told or restarted:  # first what was written before it; the next call raises
                    break
                raise

        return told, restarted

    def _parse(self, line: bytes) -> Stamped:
        try:
            told = parse(line.decode())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"{self.path}, line {self._number + 1} is damaged ({error}); what is shown ends "
                "before it. `medfed resume` writes the log anew from the last whole round."
            ) from error
        self._offset = self._offset + len(line)
        self._number = self._number + 1
        self._last = line
        return told


def follow(
    path: Path, once: bool = False, every: float = 0.2, wait: Callable[[float], None] = time.sleep
) -> Iterator[Stamped]:
    """Yield a log's events as they are written, until the run has finished;
    with `once`, those that are there.

    After a resumption the events come again from the first. Raises RunError as `Tail.read` does.
    """
    tail = Tail(path)
    last: Stamped | None = None
    while True:
        told, _ = tail.read()
        for last in told:
            yield last
        if not told:
            if once or (last and isinstance(last.event, RunFinished)):
                return
            wait(every)
