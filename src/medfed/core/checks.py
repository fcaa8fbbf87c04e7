"""Errors a user can act on. Every message gives name=value, what was expected, and the next action.

MedfedError
├── StudyError       the study file or a --set value cannot be used
├── DataError        a table, a column, a row or a download cannot be used
├── PlanError        parts that are fine alone do not compose
├── CodecError       bytes from another party are not what they claim to be
│   └── EnvelopeError     a signed or sealed message is damaged, belongs elsewhere or came twice
│       ├── SignatureError    nobody who is enrolled signed it
│       └── RevokedError      its sender's keys no longer count
├── SiteError        a site could not do what it was asked; the reason holds no patient data
├── QuorumError      too few sites answered for the round to count
│   └── AbortError        a secure round ended without opening anything; the reason names the party
├── KeyFileError     a key file is missing, open to others, damaged, or its passphrase is wrong
├── TrailError       a trail cannot be read, or was changed
│   └── NoEndError        a trail has no end: the run was cut off, or its last lines are missing
├── RunError         a run folder, checkpoint or model file cannot be used
│   └── WriteError        the system refuses to write a file or a folder
├── ServeError       a run cannot be shown as asked: port, token, TLS
├── ExportError      a run cannot be exported: a library is missing, a place cannot be reached
├── LedgerError      a budget ledger cannot be read, written or trusted
└── BudgetError      the patients' privacy budget does not bear what is asked
"""

import difflib
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class MedfedError(Exception):
    """Base of everything medfed raises on purpose; the command line prints it without a traceback.

    `refusals` holds what stands against a study, where the error tells that.
    """

    refusals: tuple[Any, ...] = ()  # of `core.refusals.Refusal`


class StudyError(MedfedError):
    """The study file or a --set value cannot be used."""


class DataError(MedfedError):
    """A table, a column, a row or a download cannot be used."""


class PlanError(MedfedError):
    """Parts that are fine alone do not compose."""


class CodecError(MedfedError):
    """Bytes from another party are not what they claim to be."""


class SiteError(MedfedError):
    """A site could not do what it was asked. The reason names no patient and quotes no value."""


class QuorumError(MedfedError):
    """Too few sites answered for the round to count; `excluded` says why, by site."""

    def __init__(self, text: str, excluded: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.excluded = dict(excluded or {})


class KeyFileError(MedfedError):
    """A party cannot open its keys: the file is missing,
    open to others, damaged, or under another passphrase.
    """


class TrailError(MedfedError):
    """A trail cannot be read, or was changed."""


class NoEndError(TrailError):
    """A trail has no end: the run was cut off, or its last lines are missing."""


class RunError(MedfedError):
    """A run folder, a checkpoint or a model file cannot be used."""


class WriteError(RunError):
    """The system refuses to write a file or a folder: it is full, read-only, or fails."""


class ServeError(MedfedError):
    """A run cannot be shown as asked: port, token, TLS."""


class ExportError(MedfedError):
    """A run cannot be exported as asked: a library is missing, or a place cannot be reached."""


class EnvelopeError(CodecError):
    """A signed or sealed message is damaged, belongs elsewhere or came twice."""


class SignatureError(EnvelopeError):
    """Nobody who is enrolled signed the message."""


class RevokedError(EnvelopeError):
    """The sender's keys no longer count."""


class AbortError(QuorumError):
    """A secure round ended without opening anything.
    The reason names the party; the run can be resumed.
    """


class RecordError(AbortError):
    """A party was asked for what it has done already, or cannot read its record of it."""


class LedgerError(MedfedError):
    """A budget ledger cannot be read, written or trusted."""


class BudgetError(MedfedError):
    """The patients' privacy budget does not bear what is asked; nothing was charged."""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one may mean."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)


_MOST_KNOWN = 20
"""Names that a hint lists: a table may have thousands of columns."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt `name`: "did you mean 'x'?" or the list of what is known."""
    choices = sorted(known)
    close = closest(name, choices)
    if close:
        return f"did you mean {close!r}?"
    return f"known: {some(choices, _MOST_KNOWN)}."


def plain(error: BaseException) -> str:
    """Return what an error says, for a message: of what the system refuses its words alone, no
    number of its and no path, which the message has named.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def some(items: Iterable[object], most: int = 5) -> str:
    """Join the first `most` items for an error message: "3, 9, 12 and 40 more"."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:most])
    if len(listed) > most:
        shown += f" and {len(listed) - most} more"
    return shown


_FEW = 5
"""So many names need no count beside them."""


def reasons(excluded: Mapping[str, object], most: int = 20) -> str:
    """Say why whom, those who share a reason together:
    "north, south: late; east: its row is not finite".
    """
    return "; ".join(
        f"{those(names, most)}: {reason}" for reason, names in sharing(excluded).items()
    )


LONGEST = 1000
"""Letters of what a person writes for the record; more is no reason but a document."""


def refuse_unprintable(name: str, text: str) -> None:
    """Raise RunError for words of a person that cannot stand in one line of a page or terminal."""
    if len(text) > LONGEST or not text.isprintable():
        raise RunError(
            f"{name}={text[:60]!r} ({len(text)} letters); expected at most {LONGEST} letters, all "
            "in one line and all printable. Say it shorter, or without such signs."
        )


def printable(text: str) -> str:
    """Return a text with a space for what does not print: a line's end, a terminal's escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " for letter in text)


def describe(error: BaseException) -> str:
    """Return what may leave a party of an unforeseen error: its kind, module and line.

    Not its words, which may quote a record.
    """
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(line.filename).name}, line {line.lineno})"


def rows_of(first: Sequence[int], count: int) -> str:
    """List the first of `count` rows: "2, 3 and 5 more"."""
    shown = ", ".join(map(str, first))
    if count > len(first):
        shown += f" and {count - len(first)} more"
    return shown


def sharing(excluded: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the reasons, each with those who share it;
    a site's own name in its reason makes no other reason.

    A reason that several are told word for word may name one of them: who pays together is refused
    together.
    """
    plain = {
        name: str(reason).removeprefix(f"site {name!r}: ") for name, reason in excluded.items()
    }
    often = Counter(plain.values())
    found: dict[str, list[str]] = {}
    for name, text in plain.items():
        reason = text if often[text] > 1 else strip_name(name, text)
        found.setdefault(reason, []).append(name)
    return found


def strip_name(name: str, reason: object) -> str:
    """Return a reason without the name of the site that it is told of."""
    return str(reason).replace(f" at site {name!r}", "").replace(f"site {name!r}", "the site")


def those(names: Sequence[str], most: int = 5) -> str:
    """Name sites, and how many where many: "1,000 sites, c0, c1, c2, c3, c4 and 995 more"."""
    count = f"{len(names):,} sites, " if len(names) > _FEW else ""
    return count + some(names, most)


@contextmanager
def naming(excluded: Mapping[str, object]) -> Iterator[None]:
    """Have a QuorumError that leaves the block say whom it was without, and why:
    in its text and in `excluded`.

    Whom its own `excluded` names, its text has told already. `excluded` may grow while the block
    runs.
    """
    try:
        yield
    except QuorumError as error:
        more = {
            name: str(reason) for name, reason in excluded.items() if name not in error.excluded
        }
        if not more:
            raise
        raise type(error)(f"{error} {reasons(more)}", {**more, **error.excluded}) from error


@contextmanager
def advising(then: str) -> Iterator[None]:
    """Have what ends the block early carry, as a note, what to do next;
    of several, the innermost speaks.

    A refusal that medfed words says so itself: only where the system refuses to write is there more
    to say.
    """
    try:
        yield
    except BaseException as error:
        worded = isinstance(error, MedfedError) and not isinstance(error, WriteError)
        if not worded and not getattr(error, "__notes__", None):
            error.add_note(then)
        raise
