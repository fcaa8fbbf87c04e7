"""A footer that reads like a record:
"Total,,312" below the last one, with as many cells as the header.

Under a claim nobody looks: there a footer is declared (`data.format.footer`).
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from medfed.core import quotes
from medfed.data import readers
from medfed.data.doubts import FEW, Doubt, Mend, fold
from medfed.study import Data

_WORD = re.compile(
    r"(grand |sub-?|sous-)?(totals?|totale?|totaux|totali|gesamt\w*|insgesamt|summen?|sum|somme|"
    r"somma|suma|mean|average|mittelwert|durchschnitt|moyenne|media|median|médiane|mediana|std|"
    r"stabw|standardabweichung|écart-type|anzahl|count)[^\w]*(n ?= ?\d+\W*)?"
)
_SHORT = {"n", "sd", "s.d.", "se", "min", "max", "min.", "max.", "%"}
"""What may stand below or above such a word, and is none by itself: a label may say so."""

_MOST = 5  # rows of a footer
_SHARE = 1 / 3  # of the columns, up to which a row without a name is filled but for a few cells


@dataclass(frozen=True)
class Footer:
    """Last rows that are no records: which [rows], how many in each file (0: that differs), what
    column shows it.
    """

    which_N: np.ndarray
    lines: int
    column: str

    def words(self, frame: pd.DataFrame) -> tuple[str, ...]:
        """Return the words in its column that show it, as examples."""
        cells = frame[self.column][self.which_N].astype(str)
        return quotes.examples(cell for cell in cells if _WORD.fullmatch(fold(cell)))

    def doubt(self, frame: pd.DataFrame, data: Data) -> Doubt:
        """Say it, with the line that leaves them out."""
        rows = frame.index[self.which_N]
        already = max(0, data.format.footer)
        mend: Mend = {("data", "format", "footer"): already + self.lines} if self.lines else {}
        text = (
            "shows that the last rows are a footer and no records: what all are together, or "
            "hardly a cell"
        )
        first = tuple(rows[:_MOST].tolist())
        return Doubt(
            "footer", self.column, text, first, len(rows), mend, examples=self.words(frame)
        )


def find(frame: pd.DataFrame, roles: Sequence[str]) -> Footer | None:
    """Return the footer of a table, at the end of each of its files;
    `roles`: the columns that name a record.

    A row is one where the first column or one of the roles says a word such as Total, which stands
    there nowhere else; or where the roles are all empty (of fewer than two: and hardly a cell is
    filled), which no other row is.
    """
    frame = frame.drop(columns=readers.SITE, errors="ignore")
    known = [name for name in roles if name in frame.columns]
    ends = list(_ends(frame.index))
    counts = []
    columns = list[str]()
    which_N = np.zeros(len(frame), dtype=bool)

    for start, end in ends:
        count, column = _last(frame.iloc[start:end], known)
        which_N[end - count : end] = True
        counts.append(count)
        columns += [column] * bool(count)

    if not columns:
        return None
    lines = counts[0] if len(set(counts)) == 1 else 0
    return Footer(which_N, lines, columns[0])


def _ends(rows: pd.Index) -> Iterator[tuple[int, int]]:
    """Yield where each file's rows begin and end: a row is named by its number, in a folder behind
    its file's name.
    """
    start = 0
    while start < len(rows):
        file = _file(rows[start])
        places = range(start, len(rows))
        end = start + bisect.bisect_left(places, True, key=lambda place: _file(rows[place]) != file)
        yield start, end
        start = end


def _file(row: object) -> str:
    return str(row).rpartition(":")[0]


def _last(frame: pd.DataFrame, roles: Sequence[str]) -> tuple[int, str]:
    """Return how many last rows of a file are a footer, and the column that shows it."""
    tail = frame.iloc[max(0, len(frame) - _MOST - 1) :]
    text = (
        tail.astype(object)
        .where(tail.notna(), "")
        .astype(str)
        .apply(lambda column: column.str.strip())
    )
    named = list(dict.fromkeys([str(frame.columns[0]), *roles]))
    count = 0
    shown = ""
    bare = ""

    for row in reversed(text.to_dict("records")):
        word = next((name for name in named if _WORD.fullmatch(fold(row[name]))), "")
        nameless = len(frame) >= FEW and not any(row[name] for name in roles)
        if nameless and (len(roles) > 1 or sum(map(bool, row.values())) <= _SHARE * len(row)):
            bare = named[-1]
        elif not word and not any(fold(row[name]) in _SHORT for name in named):
            break
        count = count + 1
        shown = word or shown

    above = frame.iloc[: len(frame) - count]
    footer = text.iloc[len(text) - count :]
    if not (shown or bare) or count > _MOST or not len(above):
        return 0, ""
    usual = _repeats(above, footer, named) if shown else _nameless(above, roles)
    if usual:
        return (0, "")

    return (count, shown or bare)


def _repeats(above: pd.DataFrame, footer: pd.DataFrame, named: Sequence[str]) -> bool:
    """Say whether a record says what the footer says, in the same column."""
    for name in named:
        words = [word for word in footer[name] if _WORD.fullmatch(fold(word))]
        if words and above[name].astype(str).str.strip().isin(words).any():
            return True
    return False


def _nameless(above: pd.DataFrame, roles: Sequence[str]) -> bool:
    """Say whether a record names nothing either."""
    filled = np.column_stack([_is_filled(above[name]) for name in roles or above.columns])
    return bool((filled.sum(1) <= (0 if roles else _SHARE * filled.shape[1])).any())


def _is_filled(values: pd.Series) -> np.ndarray:
    filled: np.ndarray = (values.notna() & (values.astype(str).str.strip() != "")).to_numpy(
        dtype=bool
    )
    return filled
