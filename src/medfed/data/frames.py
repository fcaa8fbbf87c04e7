"""Several sites' rows as one frame, end to end, before they are cleaned.

K sites, N rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from medfed.data.doubts import Doubt


def number_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Number the rows as a person sees them in the file: the header is row 1."""
    return frame.set_axis(pd.RangeIndex(2, len(frame) + 2), axis=0)


@dataclass(frozen=True)
class Frames(Mapping[str, pd.DataFrame]):
    """Several sites' rows as one frame, end to end: site k owns rows ends[k] .. ends[k+1] - 1."""

    frame: pd.DataFrame
    names: tuple[str, ...]
    ends: np.ndarray  # int64 [K + 1]
    # by site: rows left out, by what they lack
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # by site: met before its cells are looked at
    doubts: Mapping[str, Sequence[Doubt]] = field(default_factory=dict)

    @classmethod
    def split(cls, frame: pd.DataFrame, site: np.ndarray, names: Sequence[str]) -> "Frames":
        """Give each row to the site that it names [rows], in the order of rows;
        one of no such site is left out.
        """
        code_N = pd.Index(names).get_indexer(pd.Index(site))
        order = np.argsort(code_N, kind="stable")
        ends = np.searchsorted(code_N[order], np.arange(len(names) + 1))
        kept = order[ends[0] :]
        return cls(frame.take(kept), tuple(names), ends - ends[0])

    @classmethod
    def one(cls, site: str, frame: pd.DataFrame) -> "Frames":
        """Return a site alone."""
        return cls(frame, (site,), np.array([0, len(frame)]))

    @classmethod
    def of(cls, frames: Mapping[str, pd.DataFrame]) -> "Frames":
        """Lay frames of the same columns end to end."""
        sizes = [len(frame) for frame in frames.values()]
        return cls(pd.concat(list(frames.values())), tuple(frames), np.cumsum([0, *sizes]))

    def __getitem__(self, name: str) -> pd.DataFrame:
        k = self._places[name]
        return self.frame.iloc[self.ends[k] : self.ends[k + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.names)}

    @cached_property
    def site_N(self) -> np.ndarray:
        """Which site owns each row, int64 [rows]."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends))

    def part(self, first: int, last: int) -> "Frames":
        """Return sites first .. last - 1."""
        start = self.ends[first]
        end = self.ends[last]
        own = self.frame.iloc[start:end]
        return replace(
            self, frame=own, names=self.names[first:last], ends=self.ends[first : last + 1] - start
        )

    def count(self, which_N: np.ndarray) -> np.ndarray:
        """Return how many marked rows each site has, int64 [K]."""
        return np.bincount(self.site_N[which_N], minlength=len(self))

    def rows(self, which_N: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Yield each site that has marked rows, and their numbers in the file."""
        at = np.flatnonzero(which_N)
        cuts = np.flatnonzero(np.diff(self.site_N[at])) + 1
        for part in np.split(at, cuts) if len(at) else ():
            yield int(self.site_N[part[0]]), self.frame.index[part].tolist()
