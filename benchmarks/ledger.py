"""The budget ledger on disk: charges a second, and what its checks cost over plain inserts.

    python benchmarks/ledger.py [--repeats 5] [--folder FOLDER]

The control inserts the same 10,000 rows into SQLite in one transaction with the same flushes,
without chain, filter or accounts. Ours then charges 10,000 in one call: to one site of 10,000
patients; and to 10,000 devices of one patient each, whose first round also reads 10,000 rosters.
Last, one charge a call, which waits for the disk each time; and what a run pays to open, verify and
ask a ledger of 100,000 rows.
"""

import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import common
from common import table, write_result

from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Charge, Cohort, Lifetime, Limits
from medfed.privacy.privacy_events import Gaussian

DELTA = 1e-6
LIMITS = Limits(1.0, DELTA)
LIFETIME = Lifetime(8.0, DELTA, operator="benchmark")
EVENT = Gaussian(2000.0)


@dataclass(frozen=True)
class Sizes:
    """How many charges are made in one call, how many one by one, and in how many rounds devices
    are charged.
    """

    charges: int = 10_000
    singles: int = 100
    rounds: int = 10


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the ledgers are written; default: the system's temporary one",
    )
    args = parser.parse_args(argv)
    sizes = Sizes(50, 3, 3) if args.tiny else Sizes()
    seconds: dict[str, list[float]] = {}
    counts: dict[str, int] = {}

    for _ in range(1 if args.tiny else args.repeats):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for name, (count, took) in repeat(Path(folder), sizes).items():
                seconds.setdefault(name, []).append(took)
                counts[name] = count

    report(seconds, counts)
    if not args.tiny:
        write_result("ledger", {"seconds": seconds, "charges": counts})


def repeat(folder: Path, sizes: Sizes) -> dict[str, tuple[int, float]]:
    """Return what was timed once, by name: how many charges or rows, and seconds."""
    found: dict[str, tuple[int, float]] = {}
    count = sizes.charges
    patients = [f"patient {i}" for i in range(sizes.charges)]

    with Ledger.open(folder / "site" / "ledger.sqlite", founding=LIFETIME) as ledger:
        site = ledger.enrol("site", patients)
        batch = [charge(site, number) for number in range(count)]
        ours = timed(lambda: ledger.charge(batch, LIMITS))
        rows = [
            tuple(v if isinstance(v, int) else str(v) for v in row.values())
            for row in ledger.rows()
        ]
        ledger.head()  # what was charged is read back, as before any next charge
        found["control: plain inserts, one transaction"] = (
            count,
            timed(lambda: plain(folder / "plain.sqlite", rows)),
        )
        found[f"one call, one site of {count:,} patients"] = count, ours
        singles = timed(
            lambda: [
                ledger.charge([charge(site, number)], LIMITS) for number in range(sizes.singles)
            ]
        )

    with Ledger.open(folder / "devices" / "ledger.sqlite", founding=LIFETIME) as ledger:
        devices = ledger.enrol_all({f"device {i}": [patient] for i, patient in enumerate(patients)})
        rounds = [
            [charge(device, number) for device in devices.values()]
            for number in range(sizes.rounds)
        ]
        took = [timed(lambda batch=batch: ledger.charge(batch, LIMITS)) for batch in rounds]
        found[f"one call, {count:,} devices, first round"] = count, took[0]
        found[f"one call, {count:,} devices, later rounds"] = count, median(took[1:])

    found["one charge a call"] = sizes.singles, singles
    opened: list[Ledger] = []
    many = count * sizes.rounds
    found[f"open and verify {many:,} rows"] = (
        many,
        timed(lambda: opened.append(Ledger.open(folder / "devices" / "ledger.sqlite"))),
    )

    with opened[0] as ledger:
        found[f"worst of {count:,} devices x {sizes.rounds} rounds"] = (
            many,
            timed(lambda: ledger.worst(DELTA)),
        )

    return found


def charge(cohort: Cohort, number: int) -> Charge:
    return Charge("study", "run", cohort, number, "round", EVENT)


def plain(path: Path, rows: list[tuple[object, ...]]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA synchronous = EXTRA")
        sql.execute(f"CREATE TABLE charges ({', '.join(f'c{i}' for i in range(len(rows[0])))})")
        sql.execute("BEGIN IMMEDIATE")
        sql.executemany(f"INSERT INTO charges VALUES ({', '.join('?' * len(rows[0]))})", rows)
        sql.execute("COMMIT")


def timed(once: Callable[[], object]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


def report(seconds: dict[str, list[float]], counts: dict[str, int]) -> None:
    lines = []
    for name, times in seconds.items():
        middle = median(times)
        spread = f"{min(times):.3f} - {max(times):.3f}"
        lines.append(
            [name, f"{middle:.3f}", spread, str(len(times)), f"{counts[name] / middle:,.0f}"]
        )
    print(table(["what", "median s", "min - max", "n", "charges a second"], lines))


if __name__ == "__main__":
    main()
