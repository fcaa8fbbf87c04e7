"""Cells that errors and doubts quote as examples:
up to three, as they were read, cut short; under a claim none.

Every example is made here, so that one switch (`withhold`) keeps all of them back. The site's own
log is another matter: it may quote rows. A patient's id is never an example: rows are told by their
numbers.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MOST = 3
LONGEST = 24  # signs of a cell

_withheld: ContextVar[bool] = ContextVar("withheld", default=False)


@contextmanager
def withhold(claimed: bool = True) -> Iterator[None]:
    """Have no cell quoted in here where something is `claimed`;
    what an outer block keeps back stays back.
    """
    token = _withheld.set(claimed or _withheld.get())
    try:
        yield
    finally:
        _withheld.reset(token)


def are_withheld() -> bool:
    """Say whether no cell may be quoted."""
    return _withheld.get()


def examples(cells: Iterable[object]) -> tuple[str, ...]:
    """Return the first different cells as texts, cut short; nothing where they are withheld."""
    if are_withheld():
        return ()
    found: dict[str, None] = {}
    for cell in cells:
        text = str(cell)
        if len(text) > LONGEST:
            text = text[: LONGEST - 3] + "..."
        found[text] = None
        if len(found) == MOST:
            break
    return tuple(found)


def quote(texts: Iterable[str]) -> str:
    """Return examples as the end of a clause: ", as '<5', 'n.d.'"; nothing of none."""
    told = ", ".join(map(repr, texts))
    return f", as {told}" if told else ""


def there(cells: Iterable[object]) -> str:
    """Return examples among cells as an error's end: " (there: '<5', 'n.d.')"; nothing of none."""
    told = ", ".join(map(repr, examples(cells)))
    return f" (there: {told})" if told else ""
