"""The sites' own log: Python's logger `medfed`. It may quote rows and counts, so a run neither
prints nor sends it.

A run writes it to `sites/own.log` of its folder, for the owner alone to read. A program that wants
it adds a handler to that logger: it is not handed up, as some library may have set the root logger
to print. What a refused run logged before it had a folder is kept nowhere.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from logging.handlers import MemoryHandler
from pathlib import Path

from medfed.core import files

LOGGER = logging.getLogger("medfed")
# else Python prints warnings where nobody has set up logging
LOGGER.addHandler(logging.NullHandler())
LOGGER.propagate = False

_held: ContextVar[MemoryHandler] = ContextVar("held")


@contextmanager
def keep() -> Iterator[None]:
    """Hold what is logged in here until `write_to` says where it goes."""
    handler = MemoryHandler(1 << 20, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    LOGGER.addHandler(handler)
    token = _held.set(handler)
    try:
        yield
    finally:
        _held.reset(token)
        LOGGER.removeHandler(handler)
        if handler.target:
            handler.target.close()
        handler.close()


class _OwnFile(logging.FileHandler):
    """A log file that is refused like any file, where Python would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise WriteError for what the system refuses."""
        with files.explained(Path(self.baseFilename)):
            raise

    def close(self) -> None:
        """Close the file; what could not be written was told already."""
        with suppress(OSError):
            super().close()


def write_to(path: Path) -> None:
    """Append what `keep` holds to a file, and from now on what follows."""
    files.make_folder(path.parent)
    with files.explained(path):
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        file = _OwnFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler = _held.get()
    handler.setTarget(file)
    handler.flushLevel = logging.NOTSET
    handler.flush()
