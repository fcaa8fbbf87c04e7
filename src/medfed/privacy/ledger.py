"""The budget ledger: what has been spent of each patient's privacy, on disk before data is touched.

One row says that the patients of a cohort (a site's roster, enrolled once) paid for one event. A patient's balance is
the composition of all rows whose cohort holds the patient; accounts by study and by site are views of the same rows.
The event itself is the record, as JSON; everything else is worked out from it and can be worked out again.

*The filter.* A charge passes if the worst patient of its cohort stays within (epsilon, delta) with it, however events
were chosen. Where all that a patient pays for is Gaussian, mu^2 adds up against a limit (Smith and Thakurta 2022,
arXiv:2210.17520); else Rényi divergences add up at one order, which the target fixes (Feldman and Zrnic 2021,
arXiv:2008.11193; Whitehouse et al. 2023, arXiv:2203.05481). So the *kind* of events picks the filter, and a study
settles it before it sees a release; who lets releases steer even that is held to 2 delta, as one of two filters held.

*The lifetime.* What no patient of the site may exceed over all studies, at which delta, and who is one patient
(`Lifetime`) is stored when the ledger is founded. Only its operator changes epsilon and delta, by name and with a
reason, as one more row of the chain; the rule of identity never changes. No study can ask for more, and a study's own
delta moves nothing here. A ledger without a lifetime is that of one run.

*The chain.* Every row holds the hash of the one before it, so a changed, moved or missing row is found when the file is
opened, and the run refused. It holds no secret: who rewrites the whole file is found by comparing `head()` with the one
told in an earlier claim. Patients appear as HMAC-SHA256 under a key that stays beside the ledger; sites, studies, runs
and labels appear as they are given.

*The anchor.* Beside key and ledger a small file holds the last head: an older copy of the ledger alone is refused, as
is a ledger that is gone while one of the two is there. It is written after each charge, so it may lag behind by what a
crash cut off, and is never ahead. Who puts back an old copy of the whole folder is found by the heads that runs keep.
"""

import errno
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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from medfed.core import files, patient_ids
from medfed.core.checks import BudgetError, LedgerError, PlanError, RunError
from medfed.core.patient_ids import Rule
from medfed.core.types import JSON
from medfed.privacy import accounting
from medfed.privacy.accounting import Event, Floats

KEY = "pseudonym.key"
FORMAT = 2
UNBOUNDED = 1  # the last format that knew no lifetime budget and no anchor
BUSY_SECONDS = 5.0

_APPLICATION = 0x6D66_4C47  # "mfLG", in the file's header
_ROUNDING = 1e-12  # of a sum of floats, relative
_RESTORE = "Restore it from a copy: a new ledger would forget what the patients have paid."
_RESTORE_KEY = "Restore the key from a copy: under a new one every patient would look new, with nothing spent."
_RESTORE_ALL = "Restore the newest copy of the whole folder; where none is left, see `medfed privacy accept --help`."
_SAY = "medfed privacy budget FOLDER --lifetime-epsilon E --delta D --operator NAME --reason TEXT"
_ELSEWHERE = (
    "Every charge must be on disk before data is touched: make the folder writable, or set MEDFED_HOME to one that is."
)

_UNLINKED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What shares without hard links answer."""

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
    """What a study wants no patient to exceed, at its delta: over its own runs, and over all studies. inf: no limit.

    The ledger's `Lifetime` holds beside them. `sampler`: the part of any delta that the noise sampler takes. `planned`:
    how many charges of a label a site may have in one run, where a fixed plan is what epsilon was worked out for;
    `alone`: in all runs of the study together, as nothing but the plan limits what is asked, and a run's name is the
    coordinator's to say.
    """

    epsilon: float
    delta: float
    lifetime_epsilon: float = math.inf
    sampler: float = 0.0
    planned: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Lifetime:
    """What no patient of a site may exceed over all studies, who is one patient, and who decided so, and why."""

    epsilon: float
    delta: float
    identity: Rule = "canonical"
    operator: str = ""  # empty: nobody, the first run took what its study says
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse what bounds nothing."""
        if not 0 < self.epsilon < math.inf:
            raise PlanError(f"lifetime epsilon={self.epsilon:g}; expected a number above 0, and not inf")
        if not 0 < self.delta < 1:
            raise PlanError(f"lifetime delta={self.delta:g}; expected a number in (0, 1), below 1 / number of patients")
        if self.identity not in ("canonical", "exact"):
            raise PlanError(f"identity={self.identity!r}; expected 'canonical' or 'exact'")


@dataclass(frozen=True)
class Anchor:
    """The last head that a ledger told, as its own file beside the ledger."""

    ledger: str  # the id of its genesis
    seq: int
    head: str


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
        self.founded = False  # whether this very `open` founded it
        self.columns: tuple[str, ...] = ()  # of tables, by which patients are named
        self.lifetime: Lifetime | None = None  # of the last row that was read; None: the ledger of one run
        self._sql = sql
        self._key = key
        self._lasting = False  # whether it may only be charged under a lifetime budget
        self._genesis: dict[str, Any] = {}
        self._seq, self._head = 0, ""  # of the last row that was read and verified
        self._accounts = _Accounts()
        self._lock = threading.Lock()  # the threads of a process take turns; SQLite sees to processes

    @classmethod
    def open(cls, path: Path | None, read_only: bool = False, founding: Lifetime | None = None) -> "Ledger":
        """Open the ledger at `path` and verify all of it; where none is, found one. None keeps it in memory.

        `founding` is the lifetime budget that a new ledger gets; who names one can charge no ledger without. Unless
        `read_only`, proves by writing that charges can be written. Raises LedgerError where the ledger is damaged,
        locked, not writable, older than its anchor, of a newer version or no ledger, where its pseudonym key is
        missing, or where it is missing itself though key or anchor are there.
        """
        ledger = cls._connected(path, read_only, founding)
        try:
            if read_only:
                anchor = ledger._read_anchor()  # before the rows: others may charge, and then tell theirs
                with ledger._transaction("DEFERRED"):
                    ledger._load()
                    ledger._refuse_older_than(anchor)
            else:
                with ledger._transaction("IMMEDIATE"):
                    ledger._load()
                    ledger._complete_founding()
                    ledger.pseudonym("")  # raises where the key is not the ledger's
                    ledger._refuse_older_than(ledger._read_anchor())
                    ledger._advance_anchor(ledger._seq, ledger._head)
                    version = ledger._one("PRAGMA user_version")
                    ledger._sql.execute(f"PRAGMA user_version = {version}")  # the same value, and yet a real write
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def _connected(cls, path: Path | None, read_only: bool, founding: Lifetime | None) -> "Ledger":
        """Return the ledger at `path` before anything in it was read; found it where there is none."""
        if path is None:
            ledger = cls(_connect(":memory:"), None, key := secrets.token_bytes(32))
            _found(ledger._sql, key, founding)
            ledger.founded = True
        else:
            with _explained(path):
                if missing := not path.exists():
                    _refuse_lost(path)
                    if read_only:
                        raise LedgerError(f"{path}: there is no ledger yet. The first run under a guarantee founds it.")
                    _create(path, founding)
                mode, writable = ("ro", None) if read_only else ("rw", path.parent)
                ledger = cls(_connect(f"{path.absolute().as_uri()}?mode={mode}", writable), path, None)
                ledger.founded = missing
        ledger._lasting = founding is not None
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
        """Return a patient's name in this ledger: HMAC-SHA256 under its key, hexadecimal; one however it is written."""
        if self._key is None:
            assert self.path is not None
            self._key = _read_key(self.path, self._genesis["key"])
        if self.lifetime:
            patient = patient_ids.identify(patient, self.lifetime.identity)
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

    def knows(self, patients: Iterable[str]) -> int:
        """Return how many of these patients are enrolled here."""
        names = {self.pseudonym(patient) for patient in patients}
        with self._transaction("DEFERRED"):
            return sum(name in names for (name,) in self._sql.execute("SELECT DISTINCT pseudonym FROM members"))

    # Deciding ---------------------------------------------------------------------------------------------------------

    def decide(self, epsilon: float, delta: float, operator: str, reason: str) -> Lifetime:
        """Write down a new lifetime budget, by whom and why; it is in force from the next charge on.

        It is a filter of its own, with its own order, and asked of all that was charged since the founding.
        The rule of identity stays: under another, patients who have paid would look new. Raises PlanError without
        name or reason.
        """
        _refuse_unsigned(operator, reason)
        with self._transaction("IMMEDIATE"):
            self._catch_up()
            rule = self.lifetime.identity if self.lifetime else "exact"  # as pseudonyms of old ledgers were made
            new = Lifetime(epsilon, delta, rule, operator.strip(), reason.strip())
            written = self._append_decision({"kind": "lifetime", **vars(new)})
            self._sql.execute(f"PRAGMA user_version = {FORMAT}")  # an older medfed would not heed it
            self._catch_up()
        self._tell_head(*written)
        return new

    @classmethod
    def accept(cls, path: Path, head: str, operator: str, reason: str) -> None:
        """Take the ledger at `path` as the newest there is, though its anchor is lost or knows a later head.

        On record, by whom and why; what was charged after its last row is forgotten. `head` is its own head, as the
        operator has compared it with the last claim. Raises LedgerError where it is not, or the chain does not hold.
        """
        _refuse_unsigned(operator, reason)
        with _explained(path):
            if not path.exists():
                _refuse_lost(path)
                raise LedgerError(f"{path}: there is no ledger. {_RESTORE}")
        with cls._connected(path, False, None) as ledger:
            with ledger._transaction("IMMEDIATE"):
                ledger._load()
                ledger.pseudonym("")
                if head != ledger._head:
                    raise LedgerError(f"{path} has head {ledger._head}, not {head[:16]}...; compare, then say its own")
                told = {"operator": operator.strip(), "reason": reason.strip()}
                seq, head = ledger._append_decision({"kind": "accepted", **told})
            ledger._write_anchor(Anchor(ledger._genesis["id"], seq, head))

    def know_column(self, column: str, operator: str = "", reason: str = "") -> None:
        """Hold that patients are named by this column of tables: by an operator's word, or the first study's.

        Under another column the same people would look new. Raises PlanError for an operator without name or reason.
        """
        if operator or reason:
            _refuse_unsigned(operator, reason)
        with self._transaction("IMMEDIATE"):
            self._catch_up()
            if column in self.columns:
                return
            told = {"operator": operator.strip() or "the first study", "reason": reason.strip()}
            written = self._append_decision({"kind": "column", "column": column, **told})
            self._catch_up()
        self._tell_head(*written)

    def refuse_column(self, column: str) -> None:
        """Raise BudgetError where patients are named by other columns than this one; take over the first there is."""
        with self._transaction("DEFERRED"):
            self._catch_up()
        if not self.columns:
            self.know_column(column)
        if column not in self.columns:
            known = ", ".join(map(repr, self.columns))
            raise BudgetError(
                f"data.patient={column!r} and the site's ledger, which knows patients by {known}, do not compose: by "
                "another column the same people would look new, with nothing spent. Name that column; or, where both "
                "hold the same ids, have the site's operator say so: medfed privacy column "
                f"{column!r} --operator NAME --reason TEXT"
            )

    def _append_decision(self, content: dict[str, object]) -> tuple[int, str]:
        """Append a row that charges nobody."""
        row = (self._seq + 1, _now(), "", "", "", "", 0, "decision", _canonical(content), self._head)
        digest = _row_hash(row)
        self._sql.execute(f"INSERT INTO charges ({_ROW}) VALUES ({', '.join('?' * 11)})", (*row, digest))
        return self._seq + 1, digest

    # Paying -----------------------------------------------------------------------------------------------------------

    def charge(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Pay for all of `charges` or for none; when this returns they are on disk.

        Raises BudgetError, naming what is left, where a patient would exceed a limit; LedgerError where the ledger
        cannot be trusted or written.

        Guarantee: no charge is written with which a patient's charges, of all studies, runs and processes since the
        founding, would compose to more than the ledger's lifetime budget at its delta, or those of one study to more
        than `limits`. What is written is never changed or taken back.

        Edge cases:
        - killed at any time, a charge stands whole or not at all; where the caller has not heard, it may stand;
        - other processes' charges are counted within the same transaction;
        - a patient of two cohorts in `charges` pays for both;
        - the ledger of one run has no lifetime budget: `limits` alone hold;
        - a full or failing disk refuses, and what stood stands;
        - an older copy, a changed row or a missing key refuses everything (`open`); a whole folder put back does not
          show here (`refuse_without`).
        """
        with self._transaction("IMMEDIATE"):
            self._refuse_overspend(charges, limits)
            self._refuse_unplanned(charges, limits)
            written = self._append(charges)
        self._tell_head(*written)

    def check(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Raise what `charge` would raise now for want of budget; charge nothing.

        Guarantee: the same composition as `charge`, over the charges together.

        Edge cases:
        - it promises nothing: until the charge itself, others may spend;
        - whether a run's plan still holds them (`Limits.planned`) is asked by `charge` alone.
        """
        with self._transaction("DEFERRED"):
            self._refuse_overspend(charges, limits)

    def _refuse_overspend(self, charges: Sequence[Charge], limits: Limits) -> None:
        self._catch_up()
        if self._lasting and self.lifetime is None:
            raise LedgerError(
                f"{self.path} has no lifetime budget: an older medfed founded it, or a single run. Its operator says "
                f"one: {_SAY}"
            )
        for charge in charges:
            self._admit(charge.cohort.id)
        self._accounts.refuse_overspend(charges, limits, self.lifetime)

    def _refuse_unplanned(self, charges: Sequence[Charge], limits: Limits) -> None:
        column = "study" if limits.alone else "run"
        asked = Counter((getattr(c, column), c.cohort.site, c.label) for c in charges if c.label in limits.planned)
        for (name, site, label), more in asked.items():
            where = (name, site, label)
            (paid,) = self._sql.execute(
                f"SELECT COUNT(*) FROM charges WHERE {column} = ? AND site = ? AND label = ? AND cohort != ''", where
            ).fetchone()
            if paid + more > limits.planned[label]:
                raise BudgetError(
                    f"site {site!r}, {label}: refused, and nothing was charged. The run pays for a plan of "
                    f"{limits.planned[label]} ({label}), and {paid} are paid. Start a new run; for rounds "
                    "that are lost, set privacy.spare_rounds before it."
                )

    def _append(self, charges: Sequence[Charge]) -> tuple[int, str]:
        """Write the rows; return the last one's number and hash."""
        time, head, rows = _now(), self._head, []
        for seq, c in enumerate(charges, self._seq + 1):
            row = (seq, time, c.study, c.run, c.cohort.site, c.cohort.id, c.round, c.label, _text(c.event), head)
            head = _row_hash(row)
            rows.append((*row, head))
        self._sql.executemany(f"INSERT INTO charges ({_ROW}) VALUES ({', '.join('?' * 11)})", rows)
        return self._seq + len(rows), head

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
            found = self._sql.execute(f"SELECT {_ROW} FROM charges WHERE cohort != '' ORDER BY seq").fetchall()
        rows = [dict(zip((*_COLUMNS, "hash"), row, strict=True)) for row in found]
        return [{**row, "event": json.loads(row["event"])} for row in rows]

    def decisions(self) -> list[JSON]:
        """Return what was decided of the lifetime budget, its founding first: when, by whom, why."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            found = self._sql.execute("SELECT time, event FROM charges WHERE cohort = '' ORDER BY seq").fetchall()
        first = {"kind": "founded", **(self._genesis.get("lifetime") or {}), "time": self._genesis["created"]}
        return [first, *({**json.loads(event), "time": time} for time, event in found)]

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
            if expected_head is not None:
                self._refuse_without(expected_head)

    def refuse_without(self, head: str) -> None:
        """Raise LedgerError unless a head told by an earlier claim, or kept by a run, is still part of the chain."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            self._refuse_without(head)

    def _refuse_without(self, head: str) -> None:
        known = "SELECT EXISTS (SELECT 1 FROM charges WHERE hash = ?) OR EXISTS (SELECT 1 FROM genesis WHERE hash = ?)"
        if not self._one(known, head, head):
            raise self._damaged(f"head {head[:12]}... of an earlier claim is not in it: cut or replaced")

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
        self.columns = ()
        self.lifetime = Lifetime(**bound) if (bound := self._genesis.get("lifetime")) else None
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
            if cohort:
                self._admit(cohort)
                self._accounts.charged[cohort][study][event] += 1
            else:
                self._heed(event)
            self._seq, self._head = seq, digest

    def _heed(self, decision: str) -> None:
        """Take over what an operator decided."""
        found = json.loads(decision)
        match found.pop("kind", None):
            case "lifetime":
                self.lifetime = Lifetime(**found)
            case "accepted":
                pass
            case "column":
                self.columns = (*self.columns, found["column"])
            case kind:
                raise LedgerError(f"{self.path} holds a decision of kind={kind!r}, which is not known. Update medfed.")

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

    # The anchor -------------------------------------------------------------------------------------------------------

    def _read_anchor(self) -> Anchor | None:
        """Return the last head that was told; None where there is no anchor, and in memory."""
        if self.path is None:
            return None
        place = anchor_of(self.path)
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
            return Anchor(str(found["ledger"]), int(found["seq"]), str(found["head"]))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(
                f"{place} cannot be read: {error.strerror}; {self.path} needs it. {_RESTORE_ALL}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{place} is damaged; {self.path} cannot be trusted without it. {_RESTORE_ALL}"
            ) from error

    def _refuse_older_than(self, anchor: Anchor | None) -> None:
        """Raise LedgerError where the ledger is not the one that was left here last, or an older copy of it."""
        if self.path is None:
            return
        if anchor is None:
            old = self._one("PRAGMA user_version") <= UNBOUNDED
            if old or self._read_anchor() or (self._seq == 0 and not self.path.with_name(KEY).exists()):
                return  # founded by an older medfed; by another process right now; or only half, and looked at
            raise LedgerError(
                f"{anchor_of(self.path)} is missing: nothing says that {self.path} is the newest. {_RESTORE_ALL}"
            )
        where = f"{self.path} is not what was left here, by {anchor_of(self.path)}"
        if anchor.ledger != self._genesis["id"]:
            raise LedgerError(f"{where}: it is another ledger, or was founded anew. The run is refused. {_RESTORE_ALL}")
        known = "SELECT hash FROM charges WHERE seq = ?" if anchor.seq else "SELECT hash FROM genesis WHERE 0 = ?"
        if self._one(known, anchor.seq) != anchor.head:
            raise LedgerError(
                f"{where}: it is older than the last head that was told here, and would forget what patients have "
                f"paid since. The run is refused. {_RESTORE_ALL}"
            )

    def _complete_founding(self) -> None:
        """Put anchor and key in their places where a crash, or a process that is not yet there, has not."""
        if self.path is None or self.path.with_name(KEY).exists():
            return
        for spare in self.path.parent.glob(f".{self.path.name}.*.key"):
            if _fingerprint(spare.read_bytes()) == self._genesis["key"]:
                self._write_anchor(Anchor(self._genesis["id"], self._seq, self._head))
                _link(spare, self.path.with_name(KEY))
            else:
                spare.unlink()  # of somebody who came second, or died before

    def _tell_head(self, seq: int, head: str) -> None:
        """Write down beside the ledger what was charged, unless a later head is there already."""
        if self.path is not None:
            with self._transaction("IMMEDIATE"):  # one process at a time; nothing is written into the ledger
                self._advance_anchor(seq, head)

    def _advance_anchor(self, seq: int, head: str) -> None:
        if self.path is None:
            return
        if (last := self._read_anchor()) is None or last.seq < seq:
            self._write_anchor(Anchor(self._genesis["id"], seq, head))

    def _write_anchor(self, anchor: Anchor) -> None:
        assert self.path is not None
        try:
            files.write(anchor_of(self.path), _canonical(vars(anchor)))
        except RunError as error:
            raise LedgerError(f"{error} What was charged stays charged.") from error

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

    def refuse_overspend(self, charges: Sequence[Charge], limits: Limits, lifetime: Lifetime | None) -> None:
        """Raise BudgetError where `charges` together exceed a limit for any patient."""
        asked = _charged()
        for c in charges:
            asked[c.cohort.id][c.study][_text(c.event)] += 1
        another = (
            "A study's runs share privacy.epsilon, all of which a whole one takes: resume it, or set another study.name"
        )
        less = "Lower privacy.epsilon, all of which a whole run takes, or have"
        for c in {(c.study, c.cohort.id): c for c in reversed(charges)}.values():  # told by the first of its kind
            for study, epsilon, way in (
                (c.study, limits.epsilon, another),
                (None, limits.lifetime_epsilon, f"{less} privacy.lifetime_epsilon raised"),
            ):
                if epsilon != math.inf:  # NaN is refused below
                    self._refuse_over(c, asked, study, epsilon, limits.delta, way)
            if lifetime:
                delta, way = lifetime.delta - limits.sampler, f"{less} the site's operator raise it: {_SAY}"
                self._refuse_over(c, asked, None, lifetime.epsilon, delta, way)

    def _refuse_over(
        self, c: Charge, asked: Charged, study: str | None, epsilon: float, delta: float, way: str
    ) -> None:
        over: dict[Group, tuple[History, History]] = {}
        for group in self._groups[c.cohort.id]:
            before, more = _history(self.charged, group, study), _history(asked, group, study)
            if not _fits(before, more, epsilon, delta):
                over[group] = before, more
        if not over:
            return
        before, more = min(over.values(), key=lambda case: _left(case[0], epsilon, delta))
        where = "this study" if study is not None else "all studies"
        raise BudgetError(
            f"study {c.study!r}, site {c.cohort.site!r}, round {c.round}: refused, and nothing was charged. In {where} "
            f"{sum(self._patients[group] for group in over)} of {c.cohort.patients} patients have spent up to epsilon="
            f"{_epsilon(before, delta):.4g} of {epsilon:g} (delta={delta:g}); left for one release: "
            f"{_left(before, epsilon, delta):.4g}, asked: {_epsilon(more, delta):.4g}. {way}."
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


def _connect(uri: str, folder: Path | None = None) -> sqlite3.Connection:
    sql = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    # A rollback journal, not WAL: between transactions the one file is the whole ledger. EXTRA is FULL that flushes the
    # folder too, without which a power cut could bring back the journal and undo a charge that was acknowledged;
    # fullfsync is what a flush takes on macOS.
    for setting in ("synchronous = EXTRA", "fullfsync = ON", "trusted_schema = OFF", "cell_size_check = ON"):
        sql.execute(f"PRAGMA {setting}")
    # On a share that cannot flush its folder the journal is cut to nothing, and flushed itself: deleting it would be
    # an error after the fact.
    if folder and not files.flush_folder(folder):
        sql.execute("PRAGMA journal_mode = TRUNCATE")
    return sql


def anchor_of(path: Path) -> Path:
    """Return where the last head of the ledger at `path` is kept."""
    return path.with_suffix(".head")


def rule_of(path: Path) -> Rule | None:
    """Return the identity rule of the ledger at `path`, from its first row alone; None where there is no ledger.

    Raises LedgerError where it cannot be read, or is missing though its key or anchor is there. What an old ledger
    or a run's own goes by is "exact".
    """
    if not path.exists():
        _refuse_lost(path)
        return None
    with _explained(path), closing(_connect(f"{path.absolute().as_uri()}?mode=ro")) as sql:
        if sql.execute("PRAGMA application_id").fetchone() != (_APPLICATION,):
            raise LedgerError(f"{path} is no ledger, or was emptied. Name another file. {_RESTORE}")
        content, digest = sql.execute("SELECT content, hash FROM genesis").fetchone() or ("", "")
    if _sha256(str(content)) != digest:
        raise LedgerError(
            f"{path} is damaged: row 0, its genesis, is missing or was changed. The run is refused. {_RESTORE}"
        )
    lifetime = json.loads(content).get("lifetime")
    return Lifetime(**lifetime).identity if lifetime else "exact"


def _refuse_lost(path: Path) -> None:
    """Raise LedgerError where what belongs to a ledger is there, and the ledger is not."""
    for place in (path.with_name(KEY), anchor_of(path)):
        if place.exists():
            raise LedgerError(
                f"{path} is missing, though {place.name} is there: there was a ledger, and patients may have paid. "
                f"{_RESTORE} To begin anew, for other patients, the operator founds one in another folder."
            )


def _refuse_unsigned(operator: str, reason: str) -> None:
    if not operator.strip() or not reason.strip():
        raise PlanError(f"operator={operator!r}, reason={reason!r}; expected both: what is decided stays on record")


def _create(path: Path, founding: Lifetime | None) -> None:
    """Found a ledger beside its place and link it there: nobody meets half of one, and an empty file is never one.

    The key follows the ledger to its place (`_complete_founding`), so that a key without a ledger means a lost one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    beside, spare = (path.with_name(f".{path.name}.{mark}.{kind}") for kind in ("tmp", "key"))
    key = secrets.token_bytes(32)
    try:
        with open(os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        sql = _connect(beside.absolute().as_uri(), path.parent)
        _found(sql, key, founding)
        sql.close()
        _link(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            spare.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):
            beside.with_name(f"{beside.name}-journal").unlink(missing_ok=True)


def _link(beside: Path, place: Path) -> None:
    """Move a file to its place, unless another process has put one there."""
    try:
        os.link(beside, place)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _UNLINKED:
            raise
        with files.hold(place.parent, ".founding.lock"):
            if not place.exists():
                os.replace(beside, place)
                return
    beside.unlink()


def _found(sql: sqlite3.Connection, key: bytes, lifetime: Lifetime | None) -> None:
    """Write schema and genesis: a random id, what the key must agree with, and the lifetime budget."""
    genesis = {"id": secrets.token_hex(16), "created": _now(), "format": FORMAT, "key": _fingerprint(key)}
    bound = {"lifetime": vars(lifetime)} if lifetime else {}
    content = _canonical({**genesis, **bound, "orders": accounting.ORDERS_VERSION})
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
