"""Reading a large table: pandas, pyarrow and polars as they come, and what this project makes of
the file.

    python benchmarks/reading.py [--tiny] [--rows N] [--repeats N] [--folder FOLDER]

One file of 10 million rows: an id with zeros in front, a site, eight numbers, a category, a label;
as csv and as parquet. Each reader runs in a process of its own. `texts`: every cell as a text,
which keeps ids and what is written;
`types`: columns as the reader takes them. `memory` is the peak above the interpreter with its
libraries, `x numbers` how many times the numbers of the file at 8 bytes each. `exact`: the id is
still its text, and the numbers are those that were written. `processor`: seconds of all cores,
which other processes hardly lengthen. `faults`: what becomes of a line with a field too few, one
too many, an open quote, a byte that is no UTF-8.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa
from common import table, write_result

ROWS = 10_000_000
TINY_ROWS = 2_000
NUMBERS = [f"x{i}" for i in range(8)]


# readers ------------------------------------------------------------------------------------------


def pandas_texts(path: Path) -> Any:
    import pandas as pd

    return pd.read_csv(path, dtype=str, keep_default_na=False)


def pandas_types(path: Path) -> Any:
    import pandas as pd

    return pd.read_csv(path)


def arrow_texts(path: Path) -> Any:
    import pyarrow.csv as pacsv

    with path.open() as file:
        names = next(csv.reader(file))
    kinds = pacsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
    )
    return pacsv.read_csv(
        path, convert_options=kinds, parse_options=pacsv.ParseOptions(newlines_in_values=True)
    )


def arrow_pandas(path: Path) -> Any:
    return arrow_texts(path).to_pandas(split_blocks=True, self_destruct=True)


def arrow_types(path: Path) -> Any:
    import pyarrow.csv as pacsv

    return pacsv.read_csv(path)


def polars_texts(path: Path) -> Any:
    import polars as pl

    return pl.read_csv(path, infer_schema=False)


def polars_types(path: Path) -> Any:
    import polars as pl

    return pl.read_csv(path)


def ours(path: Path) -> Any:
    from medfed.data import tables

    return tables.read(path)


def pandas_parquet(path: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(path)


def arrow_parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def polars_parquet(path: Path) -> Any:
    import polars as pl

    return pl.read_parquet(path)


Reader = Callable[[Path], Any]
CSV: dict[str, Reader] = {
    "pandas, texts": pandas_texts,
    "pyarrow, texts": arrow_texts,
    "pyarrow, texts, to pandas": arrow_pandas,
    "polars, texts": polars_texts,
    "medfed": ours,
    "pandas, types": pandas_types,
    "pyarrow, types": arrow_types,
    "polars, types": polars_types,
}
PARQUET: dict[str, Reader] = {
    "pandas, parquet": pandas_parquet,
    "pyarrow, parquet": arrow_parquet,
    "polars, parquet": polars_parquet,
    "medfed, parquet": ours,
}
FAULTS = {
    "too few": b"id,a\n1,2\n3\n4,5\n",
    "too many": b"id,a\n1,2\n3,4,5\n6,7\n",
    "open quote": b'id,a\n1,"2\n3,4\n5,6"\n7,8\n',
    "no UTF-8": b"id,a\n1,2\n\xe4,3\n",
}


# one reader in a process of its own ---------------------------------------------------------------


def measured(reader: Reader, path: Path) -> dict[str, Any]:
    """Return seconds, the peak of memory above that of the libraries, and whether cells are as
    written.
    """
    small = path.with_name(f"small{path.suffix}")
    reader(small)  # the libraries
    before = _peak()
    began = time.perf_counter()
    busy = time.process_time()
    found = reader(path)
    seconds = time.perf_counter() - began
    processor = time.process_time() - busy
    return {
        "seconds": seconds,
        "processor": processor,
        "memory": _peak() - before,
        "exact": _exact(found),
    }


def _peak() -> int:
    """Return this process's peak of memory in bytes; `ru_maxrss` may be that of the process that
    began it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _exact(found: Any) -> bool:
    """Say whether the first records are those that were written."""
    head = found.slice(0, 100) if hasattr(found, "slice") else found.head(100)
    ids = [str(cell) for cell in _column(head, "id")]
    numbers = np.array([float(cell) for cell in _column(head, "x0")])
    return ids == [f"{i:08d}" for i in range(len(ids))] and bool(
        (numbers == _numbers(len(ids))).all()
    )


def _column(found: Any, name: str) -> list[Any]:
    column = found[name]
    values: list[Any] = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
    return values


def _numbers(rows: int) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(0).normal(100, 20, 100)[:rows].round(3)
    return values


def faulty(reader: Reader, folder: Path) -> dict[str, str]:
    """Return what a reader does with each faulty line: how many records it gives, or that it
    refuses.
    """
    found = {}
    for name, content in FAULTS.items():
        path = folder / "faulty.csv"
        path.write_bytes(content)
        try:
            found[name] = f"{len(reader(path))} rows"
        except ImportError:
            found[name] = "absent"
        except Exception as error:
            row = "row" in str(error).lower() or "line" in str(error).lower()
            found[name] = "refused by row" if row else "refused"
    return found


# the file -----------------------------------------------------------------------------------------


def write(folder: Path, rows: int) -> None:
    """Write the table as csv and parquet, in parts, and a small one of its first records."""
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    part = 500_000
    first = random.normal(100, 20, 100).round(3)
    schema = pa.schema(
        [("id", pa.string()), ("site", pa.string()), *((n, pa.float64()) for n in NUMBERS)]
    )
    schema = schema.append(pa.field("ward", pa.string())).append(pa.field("y", pa.int64()))
    with (
        pacsv.CSVWriter(folder / "t.csv", schema) as text,
        pq.ParquetWriter(folder / "t.parquet", schema) as parquet,
    ):
        for start in range(0, rows, part):
            many = min(part, rows - start)
            columns: dict[str, Any] = {"id": [f"{i:08d}" for i in range(start, start + many)]}
            columns["site"] = random.choice(["north", "south", "east"], many)
            columns |= {name: random.normal(100, 20, many).round(3) for name in NUMBERS}
            if start == 0:
                columns["x0"][: len(first)] = first[:many]
            columns["ward"] = random.choice(["icu", "ward", "er"], many)
            columns["y"] = random.integers(0, 2, many)
            batch = pa.table(columns, schema=schema)
            text.write_table(batch)
            parquet.write_table(batch)
            if start == 0:
                pacsv.write_csv(batch.slice(0, 100), folder / "small.csv")
                pq.write_table(batch.slice(0, 100), folder / "small.parquet")


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where tables are written; default: the system's temporary one"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.child:
        name, path = args.child
        print(json.dumps(measured({**CSV, **PARQUET}[name], Path(path))))
        return

    rows = TINY_ROWS if args.tiny else args.rows
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        write(folder, rows)
        readers = {"medfed": ours} if args.tiny else {**CSV, **PARQUET}
        found = run(folder, rows, readers, 1 if args.tiny else args.repeats)
        faults = {
            name: faulty(reader, folder) for name, reader in CSV.items() if "types" not in name
        }

    head = ["reader", "s", "processor s", "memory GiB", "x numbers", "exact"]
    print(table(head, [_line(name, one) for name, one in found.items()]), end="\n\n")
    print(
        table(
            ["reader", *FAULTS], [[name, *(one[f] for f in FAULTS)] for name, one in faults.items()]
        )
    )
    if not args.tiny:
        write_result("reading", {"rows": rows, "readers": found, "faults": faults})


def run(
    folder: Path, rows: int, readers: dict[str, Reader], repeats: int
) -> dict[str, dict[str, Any]]:
    """Return each reader's figures, of its fastest run."""
    found = {}
    for name in readers:
        path = folder / ("t.parquet" if "parquet" in name else "t.csv")
        command = [sys.executable, __file__, "--child", name, str(path)]
        told = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for _ in range(repeats)
        ]
        one = min(
            (json.loads(lines.splitlines()[-1]) for lines in told),
            key=lambda one: float(one["seconds"]),
        )
        found[name] = {
            **one,
            "ratio": one["memory"] / (rows * (len(NUMBERS) + 1) * 8),
            "bytes": path.stat().st_size,
        }

    return found


def _line(name: str, one: dict[str, Any]) -> list[str]:
    exact = "yes" if one["exact"] else "no"
    return [
        name,
        f"{one['seconds']:.2f}",
        f"{one['processor']:.2f}",
        f"{one['memory'] / 2**30:.2f}",
        f"{one['ratio']:.2f}",
        exact,
    ]


if __name__ == "__main__":
    main()
