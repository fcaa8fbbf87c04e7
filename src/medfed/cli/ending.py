"""How a command ends: its exit code, and what is said of a failure,
in one line unless `--debug` asks for more.
"""

import errno
import io
import os
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from medfed.core import files
from medfed.core.checks import MedfedError

DONE = 0
INCOMPLETE = 1
REFUSED = 2
UNEXPECTED = 3
INTERRUPTED = 130
"""As shells count SIGINT."""

_PACKAGE = Path(__file__).parent.parent


class Commands(TyperGroup):
    """The command line as a whole: it says itself what Ctrl-C leaves."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; end with 130 where it is interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(tell(error, debug=False)) from error


def replace_unprintable() -> None:
    """Have standard output print a replacement for what its encoding cannot say: a name is no
    reason to end a run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in (
        "strict",
        "surrogateescape",
    ):
        sys.stdout.reconfigure(errors="replace")


def tell(error: BaseException, debug: bool) -> int:
    """Say on standard error why a command could not end as asked; return the exit code."""
    if isinstance(error, BrokenPipeError):  # nobody reads any more: `| head`
        return INCOMPLETE
    if debug:
        traceback.print_exception(error)
    code, text = _word(error)
    notes = " ".join(getattr(error, "__notes__", []))
    if text.rstrip()[-1:] not in (".", ":", "!", "?") and notes:
        text += "."
    _print(f"{text} {notes}".rstrip())
    return code


def flush(code: int) -> int:
    """Return the exit code once standard output is written out:
    quietly where nobody reads it any more.
    """
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        _drop_output()
        return tell(OSError(error.errno, error.strerror, "standard output"), debug=False)
    return code


def _word(error: BaseException) -> tuple[int, str]:
    match error:
        case MedfedError():
            return REFUSED, str(error)
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case MemoryError():
            return (
                REFUSED,
                f"memory does not suffice ({_where(error)}): end other programs, or ask for less",
            )
        case RuntimeError() if "can't allocate memory" in str(error):  # torch
            return (
                REFUSED,
                f"memory does not suffice ({_where(error)}): end other programs, or ask for less",
            )
        case OSError() if error.filename is not None or error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EIO,
        ):
            if isinstance(error.filename, str | bytes | Path):
                what = error.filename
            else:
                what = "a file, or standard output,"
            return (
                REFUSED,
                f"{os.fsdecode(what)} cannot be used: {error.strerror}. {files.way_out(error)}.",
            )
        case _:
            kind = type(error).__name__  # its words may quote a cell
            return (
                UNEXPECTED,
                f"unexpected {kind} at {_where(error)}; run again with --debug for the whole of "
                "it.",
            )


def _where(error: BaseException) -> str:
    """Return the innermost line of this package that an exception came through."""
    found: tuple[FrameType, int] | None = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if found is None or Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
            found = frame, line
    if found is None:
        return "an unknown place"
    frame, line = found
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE) else Path(path.name)
    return f"{name.as_posix()}, line {line}"


def _print(text: str) -> None:
    try:
        Console(stderr=True).print(
            f"[bold red]error[/] {escape(text)}", highlight=False, soft_wrap=True
        )
    except OSError:
        _ = text  # nobody can be told any more; the exit code says it


def _drop_output() -> None:
    """Point standard output at nothing,
    so that the interpreter's own last flush does not fail too.
    """
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
