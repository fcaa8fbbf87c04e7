"""The budget ledger: what has been spent of each patient's privacy, on disk before data is touched.

One row says that the patients of a cohort (a site's roster, enrolled once) paid for one event. A patient's balance is
the composition of all rows whose cohort holds the patient; accounts by study and by site are views of the same rows.
The event itself is the record, as JSON; everything else is worked out from it and can be worked out again.

*The filter.* A charge passes if the worst patient of its cohort stays within (epsilon, delta) with it, however events
were chosen. Where all that a patient pays for is Gaussian, mu^2 adds up against a limit (Smith and Thakurta 2022,
arXiv:2210.17520); else Rényi divergences add up at one order, which the target fixes (Feldman and Zrnic 2021,
arXiv:2008.11193; Whitehouse et al. 2023, arXiv:2203.05481). So the *kind* of events picks the filter, and a study
settles it before it sees a release; who lets releases steer even that is held to 2 delta, as one of two filters held.

*The chain.* Every row holds the hash of the one before it, so a changed, moved or missing row is found when the file is
opened, and the run refused. It holds no secret: who rewrites the whole file is found by comparing `head()` with the one
told in an earlier claim. Patients appear as HMAC-SHA256 under a key that stays beside the ledger; sites, studies, runs
and labels appear as they are given.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from medfed.core.checks import BudgetError, LedgerError, PlanError
from medfed.core.types import JSON
from medfed.privacy import accounting
from medfed.privacy.accounting import Event, Floats

KEY = "pseudonym.key"
FORMAT = 1
BUSY_SECONDS = 5.0

_APPLICATION = 0x6D66_4C47  # "mfLG", in the file's header
_ROUNDING = 1e-12  # of a sum of floats, relative
_RESTORE = "Restore it from a copy: a new ledger would forget what the patients have paid."
_RESTORE_KEY = "Restore the key from a copy: under a new one every patient would look new, with nothing spent."
_ELSEWHERE = "Every charge must be on disk before data is touched: make the folder writable, or set privacy.ledger."

_COLUMNS = ("seq", "time", "study", "run", "site", "cohort", "round", "label", "event", "previous")
_ROW = f"{', '.join(_COLUMNS)}, hash"
_TABLES = {
    "genesis": "(content TEXT, hash TEXT)",
    "cohorts": "(id TEXT PRIMARY KEY, site TEXT) WITHOUT ROWID",
    "members": "(cohort TEXT, pseudonym TEXT, PRIMARY KEY (cohort, pseudonym)) WITHOUT ROWID",
    "charges": "(seq INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT, study TEXT, run TEXT, site TEXT, cohort TEXT, "
    "round INTEGER, label TEXT, event TEXT, previous TEXT, hash TEXT)",
}
_REPEATED = {  # an INSERT OR REPLACE deletes without asking the DELETE triggers, so it is stopped by these
    "genesis": "EXISTS (SELECT 1 FROM genesis)",
    "cohorts": "EXISTS (SELECT 1 FROM cohorts WHERE id = NEW.id)",
    "members": "EXISTS (SELECT 1 FROM members WHERE cohort = NEW.cohort AND pseudonym = NEW.pseudonym)",
    "charges": "NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM charges)",
}
_SCHEMA = [
    *(f"CREATE TABLE {name} {columns}" for name, columns in _TABLES.items()),
    *(
        f"CREATE TRIGGER {name}_{verb.lower()} BEFORE {verb} ON {name}{when} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for name in _TABLES
        for verb, when in (("UPDATE", ""), ("DELETE", ""), ("INSERT", f" WHEN {_REPEATED[name]}"))
    ),
]


@dataclass(frozen=True)
class Cohort:
    """A site's roster of patients, enrolled; `id` is the digest of site and pseudonyms."""

    id: str
    site: str
    patients: int


@dataclass(frozen=True)
class Charge:
    """What each patient of a cohort pays for: an event of a run's round."""

    study: str
    run: str
    cohort: Cohort
    round: int
    label: str
    event: Event


@dataclass(frozen=True)
class Limits:
    """What no patient may exceed, at one delta: over all runs of a study, and over all studies. inf sets no limit."""

    epsilon: float
    delta: float
    lifetime_epsilon: float = math.inf


@dataclass(frozen=True)
class Spent:
    """A study's account at one site: the epsilon of the `worst` of its `patients`, those who have paid most there."""

    study: str
    site: str
    epsilon: float
    delta: float
    charges: int
    patients: int
    worst: int


class Ledger:
    """An append-only file of charges, shared by all processes of a site; open it with `Ledger.open`."""

    def __init__(self, sql: sqlite3.Connection, path: Path | None, key: bytes | None) -> None:
        self.path = path
        self._sql = sql
        self._key = key
        self._genesis: dict[str, str] = {}
        self._seq, self._head = 0, ""  # of the last row that was read and verified
        self._accounts = _Accounts()
        self._lock = threading.Lock()  # the threads of a process take turns; SQLite sees to processes

    @classmethod
    def open(cls, path: Path | None, read_only: bool = False) -> "Ledger":
        """Open the ledger at `path` and verify all of it; where none is, found one. None keeps it in memory.

        Unless `read_only`, proves by writing that charges can be written. Raises LedgerError where the ledger is
        damaged, locked, not writable, of a newer version or no ledger, or where its pseudonym key is missing.
        """
        if path is None:
            ledger = cls(_connect(":memory:"), None, key := secrets.token_bytes(32))
            _found(ledger._sql, key)
        else:
            with _explained(path):
                if not path.exists():
                    if read_only:
                        raise LedgerError(f"{path}: there is no ledger yet. The first run under a guarantee founds it.")
                    _create(path)
                ledger = cls(_connect(f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rw'}"), path, None)
        try:
            with ledger._transaction("DEFERRED" if read_only else "IMMEDIATE"):
                ledger._load()
                if not read_only:
                    ledger.pseudonym("")  # raises where the key is not the ledger's
                    ledger._sql.execute(f"PRAGMA user_version = {FORMAT}")  # the same value, and yet a real write
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close the file; what was charged stays charged."""
        self._sql.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Patients ---------------------------------------------------------------------------------------------------------

    def pseudonym(self, patient: str) -> str:
        """Return a patient's name in this ledger: HMAC-SHA256 under its key, hexadecimal."""
        if self._key is None:
            assert self.path is not None
            self._key = _read_key(self.path, self._genesis["key"])
        return hmac.digest(self._key, patient.encode("utf-8", "surrogatepass"), "sha256").hex()

    def enrol(self, site: str, patients: Iterable[str]) -> Cohort:
        """Enrol a site's patients, under pseudonyms, as one cohort; the same roster gives the same cohort again."""
        return self.enrol_all({site: patients})[site]

    def enrol_all(self, rosters: Mapping[str, Iterable[str]]) -> dict[str, Cohort]:
        """Enrol the patients of many sites (or devices) in one transaction."""
        names = {site: sorted({self.pseudonym(patient) for patient in roster}) for site, roster in rosters.items()}
        cohorts = {site: Cohort(_digest([site, mine]), site, len(mine)) for site, mine in names.items()}
        with self._transaction("IMMEDIATE"):
            for site, cohort in cohorts.items():
                if not self._sql.execute("SELECT 1 FROM cohorts WHERE id = ?", (cohort.id,)).fetchone():
                    self._sql.execute("INSERT INTO cohorts VALUES (?, ?)", (cohort.id, site))
                    members = ((cohort.id, name) for name in names[site])
                    self._sql.executemany("INSERT INTO members VALUES (?, ?)", members)
        return cohorts

    # Paying -----------------------------------------------------------------------------------------------------------

    def charge(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Pay for all of `charges` or for none; when this returns they are on disk.

        Raises BudgetError, naming what is left, where a patient would exceed a limit, counting what other processes
        have charged by now; LedgerError where the ledger cannot be trusted or written.
        """
        with self._transaction("IMMEDIATE"):
            self._refuse_overspend(charges, limits)
            self._append(charges)

    def check(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Raise what `charge` would raise now; charge nothing."""
        with self._transaction("DEFERRED"):
            self._refuse_overspend(charges, limits)

    def _refuse_overspend(self, charges: Sequence[Charge], limits: Limits) -> None:
        self._catch_up()
        for charge in charges:
            self._admit(charge.cohort.id)
        self._accounts.refuse_overspend(charges, limits)

    def _append(self, charges: Sequence[Charge]) -> None:
        time, head, rows = _now(), self._head, []
        for seq, c in enumerate(charges, self._seq + 1):
            row = (seq, time, c.study, c.run, c.cohort.site, c.cohort.id, c.round, c.label, _text(c.event), head)
            head = _row_hash(row)
            rows.append((*row, head))
        self._sql.executemany(f"INSERT INTO charges ({_ROW}) VALUES ({', '.join('?' * 11)})", rows)

    # Reading ----------------------------------------------------------------------------------------------------------

    def worst(
        self, delta: float, study: str | None = None, site: str | None = None, pseudonym: str | None = None
    ) -> float:
        """Return the epsilon at `delta` of the patient who has paid most, over the charges that are asked for."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._accounts.worst(delta, study, site, pseudonym)

    def spent(
        self, delta: float, study: str | None = None, site: str | None = None, pseudonym: str | None = None
    ) -> list[Spent]:
        """Return the account of each study at each site, of those asked for, at `delta`.

        Each counts what was paid at its own site; for patients of several sites, `worst` counts all of it.
        """
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._accounts.spent(delta, study, site, pseudonym)

    def rows(self) -> list[JSON]:
        """Return every charge as stored, oldest first, its event parsed."""
        with self._transaction("DEFERRED"):
            found = self._sql.execute(f"SELECT {_ROW} FROM charges ORDER BY seq").fetchall()
        rows = [dict(zip((*_COLUMNS, "hash"), row, strict=True)) for row in found]
        return [{**row, "event": json.loads(row["event"])} for row in rows]

    def head(self) -> str:
        """Return the hash of the last row, which stands for all that was ever charged."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._head

    def verify(self, expected_head: str | None = None) -> None:
        """Read and verify everything again, and that a head told by an earlier claim is still part of it.

        Raises LedgerError where the ledger is damaged, was cut short or replaced.
        """
        with self._transaction("DEFERRED"):
            self._load()
            heads = self._sql.execute("SELECT hash FROM charges UNION ALL SELECT hash FROM genesis")
            if expected_head is not None and (expected_head,) not in heads:
                raise self._damaged(f"head {expected_head[:12]}... of an earlier claim is not in it: cut or replaced")

    # The chain --------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Read and verify everything: header, pages, schema, genesis, every row and every cohort that paid."""
        if self._one("PRAGMA application_id") != _APPLICATION:
            raise LedgerError(f"{self.path} is no ledger, or was emptied. Name another file. {_RESTORE}")
        if (version := self._one("PRAGMA user_version")) > FORMAT:
            raise LedgerError(f"{self.path} has format={version}; expected at most {FORMAT}. Update medfed.")
        if (found := self._one("PRAGMA integrity_check(1)")) != "ok":
            raise self._damaged(str(found))
        if not set(_SCHEMA) <= {text for (text,) in self._sql.execute("SELECT sql FROM sqlite_master")}:
            raise self._damaged("a table or a trigger is missing or was changed")
        content, digest = self._sql.execute("SELECT content, hash FROM genesis").fetchone() or ("", "")
        if _sha256(str(content)) != digest:
            raise self._damaged("row 0, its genesis, is missing or was changed")
        self._genesis, self._seq, self._head, self._accounts = json.loads(content), 0, digest, _Accounts()
        self._catch_up()
        if (last := self._one("SELECT max(seq) FROM sqlite_sequence") or 0) != self._seq:  # SQLite's own count
            raise self._damaged(f"row {self._seq + 1} is missing, as {last} were written")

    def _catch_up(self) -> None:
        """Read and verify the rows that were appended since the last time, by whichever process."""
        if self._seq and self._one(f"SELECT hash FROM charges WHERE seq = {self._seq}") != self._head:
            raise self._damaged(f"row {self._seq} is missing or was changed while the ledger was open")
        for row in self._sql.execute(f"SELECT {_ROW} FROM charges WHERE seq > {self._seq} ORDER BY seq"):
            seq, _, study, _, _, cohort, _, _, event, previous, digest = row
            if seq != self._seq + 1 or previous != self._head or _row_hash(row[:-1]) != digest:
                raise self._damaged(f"row {self._seq + 1} is missing or was changed")
            self._admit(cohort)
            self._accounts.charged[cohort][study][event] += 1
            self._seq, self._head = seq, digest

    def _admit(self, cohort: str) -> None:
        """Read the patients of a cohort, verified against its digest; once."""
        if cohort in self._accounts.sites:
            return
        site = self._one("SELECT site FROM cohorts WHERE id = ?", cohort)
        members = self._sql.execute("SELECT pseudonym FROM members WHERE cohort = ? ORDER BY pseudonym", (cohort,))
        names = [name for (name,) in members]
        if _digest([site, names]) != cohort:
            raise self._damaged(f"cohort {cohort[:12]}... is not enrolled, or its patients were changed")
        self._accounts.admit(cohort, site, names)

    def _one(self, query: str, *values: object) -> Any:
        row = self._sql.execute(query, values).fetchone()
        return row[0] if row else None

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(f"{self.path} is damaged: {what}. The run is refused. {_RESTORE}")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        """Do all of what is inside or nothing, while other threads and processes wait."""
        with self._lock, _explained(self.path):
            self._sql.execute(f"BEGIN {kind}")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._sql.execute("ROLLBACK")
                raise


# The accounts ---------------------------------------------------------------------------------------------------------

Charged = defaultdict[str, defaultdict[str, Counter[str]]]
"""cohort -> study -> event -> how often."""

Group = frozenset[str]
"""The cohorts that some patients are in, and no others: they share every balance."""

History = frozenset[tuple[str, int]]
"""What was paid for: events, as JSON, each with how often. Equal histories share one evaluation."""


def _charged() -> Charged:
    return defaultdict(lambda: defaultdict(Counter))


class _Accounts:
    """Who has paid for what: a view of the verified rows, in memory."""

    def __init__(self) -> None:
        self.charged = _charged()
        self.sites: dict[str, str] = {}  # of each cohort
        self._group: dict[str, Group] = {}  # of each patient
        self._patients: Counter[Group] = Counter()  # how many are in a group
        self._groups: defaultdict[str, set[Group]] = defaultdict(set)  # of each cohort

    def admit(self, cohort: str, site: str, names: Sequence[str]) -> None:
        """Put the patients of a new cohort into the groups that they form with it."""
        self.sites[cohort] = site
        leaving = Counter(self._group.get(name, Group()) for name in names)
        joined = {group: group | {cohort} for group in leaving}
        self._group.update({name: joined[self._group.get(name, Group())] for name in names})
        for group, patients in leaving.items():
            self._patients[group] -= patients
            if self._patients[group] <= 0:  # nobody is left in it
                del self._patients[group]
                for other in group:
                    self._groups[other].remove(group)
            self._patients[joined[group]] = patients
            for other in joined[group]:
                self._groups[other].add(joined[group])

    def refuse_overspend(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Raise BudgetError where `charges` together exceed a limit for any patient."""
        asked = _charged()
        for c in charges:
            asked[c.cohort.id][c.study][_text(c.event)] += 1
        for c in {(c.study, c.cohort.id): c for c in reversed(charges)}.values():  # told by the first of its kind
            for study, epsilon in ((c.study, limits.epsilon), (None, limits.lifetime_epsilon)):
                if epsilon != math.inf:  # NaN is refused below
                    self._refuse_over(c, asked, study, epsilon, limits.delta)

    def _refuse_over(self, c: Charge, asked: Charged, study: str | None, epsilon: float, delta: float) -> None:
        over: dict[Group, tuple[History, History]] = {}
        for group in self._groups[c.cohort.id]:
            before, more = _history(self.charged, group, study), _history(asked, group, study)
            if not _fits(before, more, epsilon, delta):
                over[group] = before, more
        if not over:
            return
        before, more = min(over.values(), key=lambda case: _left(case[0], epsilon, delta))
        where, key = ("this study", "epsilon") if study is not None else ("all studies", "lifetime_epsilon")
        raise BudgetError(
            f"study {c.study!r}, site {c.cohort.site!r}, round {c.round}: refused, and nothing was charged. In {where} "
            f"{sum(self._patients[group] for group in over)} of {c.cohort.patients} patients have spent up to epsilon="
            f"{_epsilon(before, delta):.4g} of {epsilon:g} (delta={delta:g}); left for one release: "
            f"{_left(before, epsilon, delta):.4g}, asked: {_epsilon(more, delta):.4g}. Ask for less (fewer rounds, "
            f"more noise), or have privacy.{key} raised."
        )

    def worst(self, delta: float, study: str | None, site: str | None, pseudonym: str | None) -> float:
        """Return the epsilon of the patient who has paid most, over what is asked for."""
        groups = self._patients if pseudonym is None else [self._group.get(pseudonym, Group())]
        histories = {_history(self.charged, self._at(site, group), study) for group in groups}
        return max((_epsilon(history, delta) for history in histories), default=0.0)

    def spent(self, delta: float, study: str | None, site: str | None, pseudonym: str | None) -> list[Spent]:
        """Return the accounts of each study at each site, over what is asked for."""
        cohorts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for cohort in self._at(site, self.charged if pseudonym is None else self._group.get(pseudonym, Group())):
            for name in self.charged.get(cohort, ()):
                if study in (None, name):
                    cohorts[name, self.sites[cohort]].add(cohort)
        return [self._spent(*where, mine, delta, pseudonym) for where, mine in sorted(cohorts.items())]

    def _spent(self, study: str, site: str, cohorts: set[str], delta: float, pseudonym: str | None) -> Spent:
        if pseudonym is None:
            size = {group: self._patients[group] for cohort in cohorts for group in self._groups[cohort]}
        else:
            size = {self._group[pseudonym]: 1}
        patients: Counter[float] = Counter()
        for group, count in size.items():
            patients[_epsilon(_history(self.charged, group & cohorts, study), delta)] += count
        epsilon = max(patients, default=0.0)
        charges = sum(self.charged[cohort][study].total() for cohort in cohorts)
        return Spent(study, site, epsilon, delta, charges, patients.total(), patients[epsilon])

    def _at(self, site: str | None, cohorts: Iterable[str]) -> list[str]:
        return [cohort for cohort in cohorts if site in (None, self.sites[cohort])]


def _history(charged: Charged, cohorts: Iterable[str], study: str | None) -> History:
    """Return what a patient of these cohorts paid for in a study; None: in all."""
    total: Counter[str] = Counter()
    for cohort in cohorts:
        for name, events in charged[cohort].items() if cohort in charged else ():
            if study in (None, name):
                total.update(events)
    return frozenset(total.items())


@lru_cache(maxsize=4096)
def _fits(before: History, more: History, epsilon: float, delta: float) -> bool:
    """Say whether the filter lets `more` pass; see the head of this file."""
    mu = _mu(frozenset((Counter(dict(before)) + Counter(dict(more))).items()))
    if mu is None:
        return accounting.fits(_rdp(before), _rdp(more), epsilon, delta)
    return mu <= accounting.budget_mu(epsilon, delta) * (1 + _ROUNDING)


def _left(history: History, epsilon: float, delta: float) -> float:
    """Return the epsilon of the largest Gaussian that may follow."""
    mu = _mu(history)
    if mu is None:
        return accounting.left(_rdp(history), epsilon, delta)
    rest = accounting.budget_mu(epsilon, delta) ** 2 - mu**2
    return accounting.gaussian_epsilon(rest**-0.5, delta) if rest > 0 else 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    """Return the epsilon of what was paid for: exact for Gaussians, else by Rényi divergences."""
    mu = _mu(history)
    if mu is None:
        return accounting.epsilon_from_rdp(_rdp(history), delta)
    return accounting.gaussian_epsilon(1 / mu, delta) if mu > 0 else 0.0


def _mu(history: History) -> float | None:
    """Return the mu of what was paid for; None unless all of it is Gaussian."""
    squares = 0.0
    for event, count in sorted(history):
        mu = accounting.gdp_mu(_event(event))
        if mu is None:
            return None
        squares += count * mu**2
    return math.sqrt(squares)


def _rdp(history: History) -> Floats:
    """Return the Rényi divergences, at accounting.ORDERS, of what was paid for."""
    zero = np.zeros(len(accounting.ORDERS))
    return sum((count * accounting.rdp(_event(event)) for event, count in sorted(history)), zero)


# Events, rows and their hashes ----------------------------------------------------------------------------------------

_canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), default=lambda value: {"bytes": value.hex()}
).encode  # nobody writes bytes here, but who tampers might


@lru_cache(maxsize=4096)
def _text(event: Event) -> str:
    return _canonical(accounting.to_json(event))


@lru_cache(maxsize=4096)
def _event(text: str) -> Event:
    try:
        return accounting.from_json(json.loads(text))
    except (PlanError, ValueError) as error:
        raise LedgerError(f"event {text} cannot be accounted: {error} If a newer medfed wrote it, update.") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(content: object) -> str:
    return _sha256(_canonical(content))


def _row_hash(row: Sequence[object]) -> str:
    """Return the hash of a row, of which the hash of the row before is a part."""
    return _digest(dict(zip(_COLUMNS, row, strict=True)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# The file and its key -------------------------------------------------------------------------------------------------


def _connect(uri: str) -> sqlite3.Connection:
    sql = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    # A rollback journal, not WAL: between transactions the one file is the whole ledger. EXTRA is FULL that flushes the
    # folder too, without which a power cut could bring back the journal and undo a charge that was acknowledged;
    # fullfsync is what a flush takes on macOS.
    for setting in ("synchronous = EXTRA", "fullfsync = ON", "trusted_schema = OFF", "cell_size_check = ON"):
        sql.execute(f"PRAGMA {setting}")
    return sql


def _create(path: Path) -> None:
    """Found a ledger beside its place and link it there: nobody meets half of one, and an empty file is never one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside, key = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), path.with_name(KEY)
    try:
        if not key.exists():
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            _link(beside, key)
        sql = _connect(beside.absolute().as_uri())
        _found(sql, key.read_bytes())
        sql.close()
        _link(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _link(beside: Path, place: Path) -> None:
    """Move a file to its place, unless another process has put one there."""
    with suppress(FileExistsError):
        os.link(beside, place)
    beside.unlink()


def _found(sql: sqlite3.Connection, key: bytes) -> None:
    """Write schema and genesis: a random id, and what the key must agree with."""
    genesis = {"id": secrets.token_hex(16), "created": _now(), "format": FORMAT, "key": _fingerprint(key)}
    content = _canonical({**genesis, "orders": accounting.ORDERS_VERSION})
    sql.execute(f"PRAGMA application_id = {_APPLICATION}")
    sql.execute(f"PRAGMA user_version = {FORMAT}")
    sql.execute("BEGIN")
    for statement in _SCHEMA:
        sql.execute(statement)
    sql.execute("INSERT INTO genesis VALUES (?, ?)", (content, _sha256(content)))
    sql.execute("COMMIT")


def _fingerprint(key: bytes) -> str:
    return hmac.digest(key, b"medfed ledger", "sha256").hex()


def _read_key(path: Path, fingerprint: str) -> bytes:
    place = path.with_name(KEY)
    try:
        key = place.read_bytes()
    except OSError as error:
        raise LedgerError(f"{place} cannot be read: {error.strerror}; {path} needs it. {_RESTORE_KEY}") from error
    if _fingerprint(key) != fingerprint:
        raise LedgerError(f"{place} is not the key of {path}. {_RESTORE_KEY}")
    return key


@contextmanager
def _explained(path: Path | None) -> Iterator[None]:
    """Turn what SQLite and the system refuse into LedgerError."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(f"{path} {_reason(getattr(error, 'sqlite_errorcode', 0) & 0xFF, error)}") from error
    except UnicodeDecodeError as error:
        raise LedgerError(f"{path} {_reason(sqlite3.SQLITE_CORRUPT, error)}") from error
    except OSError as error:
        raise LedgerError(f"{path} cannot be opened or written: {error.strerror}. {_ELSEWHERE}") from error


def _reason(code: int, error: Exception) -> str:
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return (
                f"has been locked by another process for {BUSY_SECONDS:g} s. See what holds it (another run, a viewer, "
                "a backup), let that end, then run again."
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_IOERR:
            return f"cannot be opened or written: {error}. {_ELSEWHERE}"
        case sqlite3.SQLITE_FULL:
            return "cannot be written: the disk is full. Free some of it; nothing was charged."
        case sqlite3.SQLITE_NOTADB:
            return f"is no ledger, or its first bytes are damaged. Name another file. {_RESTORE}"
        case _:
            return f"is damaged: {error}. The run is refused. {_RESTORE}"
