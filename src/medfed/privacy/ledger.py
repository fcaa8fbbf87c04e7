"""The budget ledger: what has been spent of each patient's privacy, on disk before data is touched.

One row says that the patients of a cohort (a site's roster, enrolled once) paid for one event. A
patient's balance is the composition of all rows whose cohort holds the patient; accounts by study
and by site are views of the same rows. The event itself is the record, as JSON; everything else is
worked out from it and can be worked out again.

*The filter.* A charge passes if the worst patient of its cohort stays within (epsilon, delta) with
it, however events were chosen: see `balances`.

*The lifetime.* What no patient of the site may exceed over all studies, at which delta, and who is
one patient (`Lifetime`) is stored when the ledger is founded. Only its operator changes epsilon and
delta, by name and with a reason, as one more row of the chain; the rule of identity never changes.
No study can ask for more, and a study's own delta moves nothing here. A ledger without a lifetime
is that of one run.

*The chain.* Every row holds the hash of the one before it, so a changed, moved or missing row is
found when the file is opened, and the run refused. It holds no secret: who rewrites the whole file
is found by comparing `head()` with the one told in an earlier claim. Patients appear as HMAC-SHA256
under a key that stays beside the ledger; sites, studies, runs and labels appear as they are given.

*The anchor.* Beside key and ledger a small file holds the last head: an older copy of the ledger
alone is refused, as is a ledger that is gone while one of the two is there. It is written after
each charge, so it may lag behind by what a crash cut off, and is never ahead. Who puts back an old
copy of the whole folder is found by the heads that runs keep.
"""

import hmac
import json
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from medfed.core import files, patient_ids
from medfed.core.checks import BudgetError, LedgerError, RunError
from medfed.core.types import JSON
from medfed.privacy.balances import Balances, write_event
from medfed.privacy.ledger_entries import Anchor, Charge, Cohort, Lifetime, Limits, Spent
from medfed.privacy.ledger_file import (
    APPLICATION,
    COLUMNS,
    FORMAT,
    KEY,
    RESTORE,
    RESTORE_ALL,
    ROW,
    SAY_LIFETIME,
    SCHEMA,
    UNBOUNDED,
    anchor_of,
    connect,
    create,
    digest_of,
    explain_errors,
    fingerprint,
    link,
    now,
    read_key,
    refuse_lost,
    refuse_unsigned,
    row_hash,
    sha256,
    write_genesis,
    write_json,
)


class Ledger:
    """An append-only file of charges, shared by a site's processes; open it by `Ledger.open`."""

    def __init__(self, sql: sqlite3.Connection, path: Path | None, key: bytes | None) -> None:
        self.path = path
        self.founded = False  # whether this very `open` founded it
        self.columns: tuple[str, ...] = ()  # of tables, by which patients are named
        # of the last row that was read; None: the ledger of one run
        self.lifetime: Lifetime | None = None
        self._sql = sql
        self._key = key
        self._lasting = False  # whether it may only be charged under a lifetime budget
        self._genesis: dict[str, Any] = {}
        self._seq = 0  # of the last row that was read and verified
        self._head = ""  # its hash
        self._balances = Balances()
        # the threads of a process take turns; SQLite sees to processes
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path | None, read_only: bool = False, founding: Lifetime | None = None
    ) -> "Ledger":
        """Open the ledger at `path` and verify all of it;
        where none is, found one. None keeps it in memory.

        `founding` is the lifetime budget that a new ledger gets; who names one can charge no ledger
        without. Unless `read_only`, proves by writing that charges can be written. Raises
        LedgerError where the ledger is damaged, locked, not writable, older than its anchor, of a
        newer version or no ledger, where its pseudonym key is missing, or where it is missing
        itself though key or anchor are there.
        """
        ledger = cls._connect(path, read_only, founding)
        try:
            # To read: the anchor before the rows,
            # as others may charge meanwhile, and then tell theirs.
            if read_only:
                anchor = ledger._read_anchor()
                with ledger._transaction("DEFERRED"):
                    ledger._load()
                    ledger._refuse_older_than(anchor)

            # To charge: all of it under one lock,
            # with a write that proves that charges can be written.
            else:
                with ledger._transaction("IMMEDIATE"):
                    ledger._load()
                    ledger._complete_founding()
                    ledger.pseudonym("")  # raises where the key is not the ledger's
                    ledger._refuse_older_than(ledger._read_anchor())
                    ledger._advance_anchor(ledger._seq, ledger._head)
                    version = ledger._one("PRAGMA user_version")
                    # the same value, and yet a real write
                    ledger._sql.execute(f"PRAGMA user_version = {version}")
        except BaseException:
            ledger.close()
            raise
        return ledger

    @classmethod
    def _connect(cls, path: Path | None, read_only: bool, founding: Lifetime | None) -> "Ledger":
        """Return the ledger at `path`, with nothing in it read; found it where there is none."""
        if path is None:
            key = secrets.token_bytes(32)
            ledger = cls(connect(":memory:"), None, key)
            write_genesis(ledger._sql, key, founding)
            ledger.founded = True
            ledger._lasting = founding is not None
            return ledger

        with explain_errors(path):
            missing = not path.exists()
            if missing:
                refuse_lost(path)
                if read_only:
                    raise LedgerError(
                        f"{path}: there is no ledger yet. The first run under a guarantee founds "
                        "it."
                    )
                create(path, founding)

            uri = path.absolute().as_uri()
            sql = connect(f"{uri}?mode=ro") if read_only else connect(f"{uri}?mode=rw", path.parent)
            ledger = cls(sql, path, None)
        ledger.founded = missing
        ledger._lasting = founding is not None
        return ledger

    def close(self) -> None:
        """Close the file; what was charged stays charged."""
        self._sql.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    # Patients -------------------------------------------------------------------------------------

    def pseudonym(self, patient: str) -> str:
        """Return a patient's name in this ledger: HMAC-SHA256 under its key, hexadecimal; one
        however it is written.
        """
        if self._key is None:
            assert self.path is not None
            self._key = read_key(self.path, self._genesis["key"])
        if self.lifetime:
            patient = patient_ids.identify(patient, self.lifetime.identity)
        return hmac.digest(self._key, patient.encode("utf-8", "surrogatepass"), "sha256").hex()

    def enrol(self, site: str, patients: Iterable[str]) -> Cohort:
        """Enrol a site's patients, under pseudonyms, as one cohort;
        the same roster gives the same cohort again.
        """
        return self.enrol_all({site: patients})[site]

    def enrol_all(self, rosters: Mapping[str, Iterable[str]]) -> dict[str, Cohort]:
        """Enrol the patients of many sites (or devices) in one transaction."""
        names = {
            site: sorted({self.pseudonym(patient) for patient in roster})
            for site, roster in rosters.items()
        }
        cohorts = {
            site: Cohort(digest_of([site, mine]), site, len(mine)) for site, mine in names.items()
        }
        with self._transaction("IMMEDIATE"):
            for site, cohort in cohorts.items():
                if not self._sql.execute(
                    "SELECT 1 FROM cohorts WHERE id = ?", (cohort.id,)
                ).fetchone():
                    self._sql.execute("INSERT INTO cohorts VALUES (?, ?)", (cohort.id, site))
                    members = ((cohort.id, name) for name in names[site])
                    self._sql.executemany("INSERT INTO members VALUES (?, ?)", members)
        return cohorts

    def knows(self, patients: Iterable[str]) -> int:
        """Return how many of these patients are enrolled here."""
        names = {self.pseudonym(patient) for patient in patients}
        with self._transaction("DEFERRED"):
            return sum(
                name in names
                for (name,) in self._sql.execute("SELECT DISTINCT pseudonym FROM members")
            )

    # Deciding -------------------------------------------------------------------------------------

    def decide(self, epsilon: float, delta: float, operator: str, reason: str) -> Lifetime:
        """Write down a new lifetime budget, by whom and why; it holds from the next charge on.

        It is a filter of its own, with its own order, and asked of all that was charged since the
        founding. The rule of identity stays: under another, patients who have paid would look new.
        Raises PlanError without name or reason.
        """
        refuse_unsigned(operator, reason)
        with self._transaction("IMMEDIATE"):
            self._catch_up()
            # as pseudonyms of old ledgers were made
            rule = self.lifetime.identity if self.lifetime else "exact"
            new = Lifetime(epsilon, delta, rule, operator.strip(), reason.strip())
            written = self._append_decision({"kind": "lifetime", **vars(new)})
            # an older medfed would not heed it
            self._sql.execute(f"PRAGMA user_version = {FORMAT}")
            self._catch_up()
        self._tell_head(*written)
        return new

    @classmethod
    def accept(cls, path: Path, head: str, operator: str, reason: str) -> None:
        """Take the ledger at `path` as the newest there is,
        though its anchor is lost or knows a later head.

        On record, by whom and why; what was charged after its last row is forgotten. `head` is its
        own head, as the operator has compared it with the last claim. Raises LedgerError where it
        is not, or the chain does not hold.
        """
        refuse_unsigned(operator, reason)
        with explain_errors(path):
            if not path.exists():
                refuse_lost(path)
                raise LedgerError(f"{path}: there is no ledger. {RESTORE}")

        with cls._connect(path, False, None) as ledger:
            with ledger._transaction("IMMEDIATE"):
                ledger._load()
                ledger.pseudonym("")
                if head != ledger._head:
                    raise LedgerError(
                        f"{path} has head {ledger._head}, not {head[:16]}...; compare, then say "
                        "its own"
                    )
                told = {"operator": operator.strip(), "reason": reason.strip()}
                seq, head = ledger._append_decision({"kind": "accepted", **told})
            ledger._write_anchor(Anchor(ledger._genesis["id"], seq, head))

    def know_column(self, column: str, operator: str = "", reason: str = "") -> None:
        """Hold that patients are named by this column of tables:
        by an operator's word, or the first study's.

        Under another column the same people would look new. Raises PlanError for an operator
        without name or reason.
        """
        if operator or reason:
            refuse_unsigned(operator, reason)
        with self._transaction("IMMEDIATE"):
            self._catch_up()
            if column in self.columns:
                return
            told = {"operator": operator.strip() or "the first study", "reason": reason.strip()}
            written = self._append_decision({"kind": "column", "column": column, **told})
            self._catch_up()
        self._tell_head(*written)

    def refuse_column(self, column: str) -> None:
        """Raise BudgetError where patients are named by other columns than this one; take over the
        first there is.
        """
        with self._transaction("DEFERRED"):
            self._catch_up()
        if not self.columns:
            self.know_column(column)
        if column not in self.columns:
            known = ", ".join(map(repr, self.columns))
            raise BudgetError(
                f"data.patient={column!r} and the site's ledger, which knows patients by "
                f"{known}, do not compose: by another column the same people would look new, "
                "with nothing spent. Name that column; or, where both hold the same ids, have "
                f"the site's operator say so: medfed privacy column {column!r} --operator NAME "
                "--reason TEXT"
            )

    def _append_decision(self, content: dict[str, object]) -> tuple[int, str]:
        """Append a row that charges nobody."""
        row = (self._seq + 1, now(), "", "", "", "", 0, "decision", write_json(content), self._head)
        digest = row_hash(row)
        self._sql.execute(
            f"INSERT INTO charges ({ROW}) VALUES ({', '.join('?' * 11)})", (*row, digest)
        )
        return self._seq + 1, digest

    # Paying ---------------------------------------------------------------------------------------

    def charge(self, charges: Sequence[Charge], limits: Limits) -> None:
        """Pay for all of `charges` or for none; when this returns they are on disk.

        Raises BudgetError, naming what is left, where a patient would exceed a limit; LedgerError
        where the ledger cannot be trusted or written.

        Guarantee: no charge is written with which a patient's charges, of all studies, runs and
        processes since the founding, would compose to more than the ledger's lifetime budget at its
        delta, or those of one study to more than `limits`. What is written is never changed or
        taken back.

        Edge cases:
        - killed at any time, a charge stands whole or not at all; where the caller has not heard,
          it may stand;
        - other processes' charges are counted within the same transaction;
        - a patient of two cohorts in `charges` pays for both;
        - the ledger of one run has no lifetime budget: `limits` alone hold;
        - a full or failing disk refuses, and what stood stands;
        - an older copy, a changed row or a missing key refuses everything (`open`); a whole folder
          put back does not show here (`refuse_without`).
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
                f"{self.path} has no lifetime budget: an older medfed founded it, or a single "
                f"run. Its operator says one: {SAY_LIFETIME}"
            )
        for charge in charges:
            self._admit(charge.cohort.id)
        self._balances.refuse_overspend(charges, limits, self.lifetime)

    def _refuse_unplanned(self, charges: Sequence[Charge], limits: Limits) -> None:
        column = "study" if limits.alone else "run"
        asked = Counter(
            (getattr(c, column), c.cohort.site, c.label)
            for c in charges
            if c.label in limits.planned
        )
        for (name, site, label), more in asked.items():
            where = (name, site, label)
            (paid,) = self._sql.execute(
                f"SELECT COUNT(*) FROM charges WHERE {column} = ? AND site = ? AND label = ? AND "
                "cohort != ''",
                where,
            ).fetchone()
            if paid + more > limits.planned[label]:
                raise BudgetError(
                    f"site {site!r}, {label}: refused, and nothing was charged. The run pays for "
                    f"a plan of {limits.planned[label]} ({label}), and {paid} are paid. Start a "
                    "new run; for rounds that are lost, set privacy.spare_rounds before it."
                )

    def _append(self, charges: Sequence[Charge]) -> tuple[int, str]:
        """Write the rows; return the last one's number and hash."""
        time = now()
        head = self._head
        rows = []

        for seq, c in enumerate(charges, self._seq + 1):
            row = (
                seq,
                time,
                c.study,
                c.run,
                c.cohort.site,
                c.cohort.id,
                c.round,
                c.label,
                write_event(c.event),
                head,
            )
            head = row_hash(row)
            rows.append((*row, head))

        self._sql.executemany(f"INSERT INTO charges ({ROW}) VALUES ({', '.join('?' * 11)})", rows)
        return self._seq + len(rows), head

    # Reading --------------------------------------------------------------------------------------

    def worst(
        self,
        delta: float,
        study: str | None = None,
        site: str | None = None,
        pseudonym: str | None = None,
    ) -> float:
        """Return the epsilon at `delta` of the patient who has paid most,
        over the charges that are asked for.
        """
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._balances.worst(delta, study, site, pseudonym)

    def list_spent(
        self,
        delta: float,
        study: str | None = None,
        site: str | None = None,
        pseudonym: str | None = None,
    ) -> list[Spent]:
        """Return the account of each study at each site, of those asked for, at `delta`.

        Each counts what was paid at its own site; for patients of several sites, `worst` counts all
        of it.
        """
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._balances.list_spent(delta, study, site, pseudonym)

    def rows(self) -> list[JSON]:
        """Return every charge as stored, oldest first, its event parsed."""
        with self._transaction("DEFERRED"):
            found = self._sql.execute(
                f"SELECT {ROW} FROM charges WHERE cohort != '' ORDER BY seq"
            ).fetchall()
        rows = [dict(zip((*COLUMNS, "hash"), row, strict=True)) for row in found]
        return [{**row, "event": json.loads(row["event"])} for row in rows]

    def decisions(self) -> list[JSON]:
        """Return what was decided of the lifetime budget, founding first: when, by whom, why."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            found = self._sql.execute(
                "SELECT time, event FROM charges WHERE cohort = '' ORDER BY seq"
            ).fetchall()
        first = {
            "kind": "founded",
            **(self._genesis.get("lifetime") or {}),
            "time": self._genesis["created"],
        }
        return [first, *({**json.loads(event), "time": time} for time, event in found)]

    def head(self) -> str:
        """Return the hash of the last row, which stands for all that was ever charged."""
        with self._transaction("DEFERRED"):
            self._catch_up()
            return self._head

    def verify(self, expected_head: str | None = None) -> None:
        """Read and verify everything again,
        and that a head told by an earlier claim is still part of it.

        Raises LedgerError where the ledger is damaged, was cut short or replaced.
        """
        with self._transaction("DEFERRED"):
            self._load()
            if expected_head is not None:
                self._refuse_without(expected_head)

    def refuse_without(self, head: str) -> None:
        """Raise LedgerError unless a head told by an earlier claim,
        or kept by a run, is still part of the chain.
        """
        with self._transaction("DEFERRED"):
            self._catch_up()
            self._refuse_without(head)

    def _refuse_without(self, head: str) -> None:
        known = (
            "SELECT EXISTS (SELECT 1 FROM charges WHERE hash = ?) OR EXISTS (SELECT 1 FROM "
            "genesis WHERE hash = ?)"
        )
        if not self._one(known, head, head):
            raise self._damage(
                f"head {head[:12]}... of an earlier claim is not in it: cut or replaced"
            )

    # The chain ------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Read and verify everything: header, pages, schema,
        genesis, every row and every cohort that paid.
        """
        if self._one("PRAGMA application_id") != APPLICATION:
            raise LedgerError(
                f"{self.path} is no ledger, or was emptied. Name another file. {RESTORE}"
            )
        if (version := self._one("PRAGMA user_version")) > FORMAT:
            raise LedgerError(
                f"{self.path} has format={version}; expected at most {FORMAT}. Update medfed."
            )
        if (found := self._one("PRAGMA integrity_check(1)")) != "ok":
            raise self._damage(str(found))
        if not set(SCHEMA) <= {
            text for (text,) in self._sql.execute("SELECT sql FROM sqlite_master")
        }:
            raise self._damage("a table or a trigger is missing or was changed")
        content, digest = self._sql.execute("SELECT content, hash FROM genesis").fetchone() or (
            "",
            "",
        )
        if sha256(str(content)) != digest:
            raise self._damage("row 0, its genesis, is missing or was changed")

        # From the genesis on, row by row.
        self._genesis = json.loads(content)
        self._seq = 0
        self._head = digest
        self._balances = Balances()
        self.columns = ()
        self.lifetime = None
        if bound := self._genesis.get("lifetime"):
            self.lifetime = Lifetime(**bound)
        self._catch_up()
        # SQLite's own count
        if (last := self._one("SELECT max(seq) FROM sqlite_sequence") or 0) != self._seq:
            raise self._damage(f"row {self._seq + 1} is missing, as {last} were written")

    def _catch_up(self) -> None:
        """Read and verify the rows that were appended since the last time, by whichever process."""
        if (
            self._seq
            and self._one(f"SELECT hash FROM charges WHERE seq = {self._seq}") != self._head
        ):
            raise self._damage(
                f"row {self._seq} is missing or was changed while the ledger was open"
            )

        for row in self._sql.execute(
            f"SELECT {ROW} FROM charges WHERE seq > {self._seq} ORDER BY seq"
        ):
            seq, _, study, _, _, cohort, _, _, event, previous, digest = row
            if seq != self._seq + 1 or previous != self._head or row_hash(row[:-1]) != digest:
                raise self._damage(f"row {self._seq + 1} is missing or was changed")
            if cohort:
                self._admit(cohort)
                self._balances.charged[cohort][study][event] += 1
            else:
                self._heed(event)
            self._seq = seq
            self._head = digest

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
                raise LedgerError(
                    f"{self.path} holds a decision of kind={kind!r}, which is not known. Update "
                    "medfed."
                )

    def _admit(self, cohort: str) -> None:
        """Read the patients of a cohort, verified against its digest; once."""
        if cohort in self._balances.sites:
            return
        site = self._one("SELECT site FROM cohorts WHERE id = ?", cohort)
        members = self._sql.execute(
            "SELECT pseudonym FROM members WHERE cohort = ? ORDER BY pseudonym", (cohort,)
        )
        names = [name for (name,) in members]
        if digest_of([site, names]) != cohort:
            raise self._damage(
                f"cohort {cohort[:12]}... is not enrolled, or its patients were changed"
            )
        self._balances.admit(cohort, site, names)

    def _one(self, query: str, *values: object) -> Any:
        row = self._sql.execute(query, values).fetchone()
        if row:
            return row[0]
        return None

    def _damage(self, what: str) -> LedgerError:
        return LedgerError(f"{self.path} is damaged: {what}. The run is refused. {RESTORE}")

    # The anchor -----------------------------------------------------------------------------------

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
                f"{place} cannot be read: {error.strerror}; {self.path} needs it. {RESTORE_ALL}"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(
                f"{place} is damaged; {self.path} cannot be trusted without it. {RESTORE_ALL}"
            ) from error

    def _refuse_older_than(self, anchor: Anchor | None) -> None:
        """Raise LedgerError where the ledger is not the one that was left here last,
        or an older copy of it.
        """
        if self.path is None:
            return
        if anchor is None:
            old = self._one("PRAGMA user_version") <= UNBOUNDED
            if (
                old
                or self._read_anchor()
                or (self._seq == 0 and not self.path.with_name(KEY).exists())
            ):
                # founded by an older medfed; by another process right now;
                # or only half, and looked at
                return
            raise LedgerError(
                f"{anchor_of(self.path)} is missing: nothing says that {self.path} is the "
                f"newest. {RESTORE_ALL}"
            )
        where = f"{self.path} is not what was left here, by {anchor_of(self.path)}"
        if anchor.ledger != self._genesis["id"]:
            raise LedgerError(
                f"{where}: it is another ledger, or was founded anew. The run is refused. "
                f"{RESTORE_ALL}"
            )
        if anchor.seq:
            known = "SELECT hash FROM charges WHERE seq = ?"
        else:
            known = "SELECT hash FROM genesis WHERE 0 = ?"
        if self._one(known, anchor.seq) != anchor.head:
            raise LedgerError(
                f"{where}: it is older than the last head that was told here, and would forget "
                f"what patients have paid since. The run is refused. {RESTORE_ALL}"
            )

    def _complete_founding(self) -> None:
        """Put anchor and key in place where a crash, or a process not yet there, has not."""
        if self.path is None or self.path.with_name(KEY).exists():
            return
        for spare in self.path.parent.glob(f".{self.path.name}.*.key"):
            if fingerprint(spare.read_bytes()) == self._genesis["key"]:
                self._write_anchor(Anchor(self._genesis["id"], self._seq, self._head))
                link(spare, self.path.with_name(KEY))
            else:
                spare.unlink()  # of somebody who came second, or died before

    def _tell_head(self, seq: int, head: str) -> None:
        """Write down beside the ledger what was charged, unless a later head is there already."""
        if self.path is not None:
            # one process at a time; nothing is written into the ledger
            with self._transaction("IMMEDIATE"):
                self._advance_anchor(seq, head)

    def _advance_anchor(self, seq: int, head: str) -> None:
        if self.path is None:
            return
        if (last := self._read_anchor()) is None or last.seq < seq:
            self._write_anchor(Anchor(self._genesis["id"], seq, head))

    def _write_anchor(self, anchor: Anchor) -> None:
        assert self.path is not None
        try:
            files.write(anchor_of(self.path), write_json(vars(anchor)))
        except RunError as error:
            raise LedgerError(f"{error} What was charged stays charged.") from error

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        """Do all of what is inside or nothing, while other threads and processes wait."""
        with self._lock, explain_errors(self.path):
            self._sql.execute(f"BEGIN {kind}")
            try:
                yield
                self._sql.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._sql.execute("ROLLBACK")
                raise
