"""One clean table, and how to write it in the forms that hospitals export."""

import csv
import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from medfed.study import Data

DATA = Data(target="died", site="hospital", patient="subject")
HEADER = ["subject", "hospital", "größe", "lactate", "cost", "ward", "died"]
NUMBERS = {"größe": 1, "lactate": 2, "cost": 1}
"""Columns of numbers, and their decimals."""

Cells = list[list[str]]


def clean() -> Cells:
    """Return header and records as texts: ids with zeros in front, gaps, umlauts, numbers with
    decimals.
    """
    random = np.random.default_rng(0)
    rows = [HEADER]
    for i in range(36):
        height = f"{random.normal(170, 10):.1f}"
        lactate = "" if i % 7 == 3 else f"{random.gamma(2, 1):.2f}"
        cost = f"{random.uniform(800, 90_000):.1f}"
        ward = ("Männer", "Frauen", "Größere Kinder")[i % 3]
        rows.append(
            [
                f"{i // 2:05d}",
                ("Nord", "Süd")[i // 18],
                height,
                lactate,
                cost,
                ward,
                ("no", "yes")[i // 2 % 2],
            ]
        )

    return rows


def spelt(
    rows: Cells, decimal: str = ".", thousands: str = "", numbers: Sequence[str] = tuple(NUMBERS)
) -> Cells:
    """Return the rows with numbers in another spelling."""
    places = [rows[0].index(name) for name in numbers]
    return [rows[0], *([_spelt(row, places, decimal, thousands) for row in rows[1:]])]


def _spelt(row: list[str], places: Sequence[int], decimal: str, thousands: str) -> list[str]:
    cells = list(row)
    for place in places:
        if cells[place]:
            whole, _, part = (
                f"{float(cells[place]):,.{len(cells[place].partition('.')[2])}f}".partition(".")
            )
            cells[place] = whole.replace(",", thousands) + (decimal + part if part else "")
    return cells


def text(rows: Cells, separator: str = ",", end: str = "\n") -> str:
    """Return rows as a text table."""
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator=end).writerows(rows)
    return stream.getvalue()


def packed(path: Path, content: bytes) -> Path:
    """Write bytes, packed as the suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(path.name.removesuffix(".zip"), content)
    else:
        path.write_bytes(content)
    return path
