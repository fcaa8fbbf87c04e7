"""A ledger's file: its schema, the hashes of its rows, founding, the key and the anchor beside it.

`ledger` says what is kept and why; here is how SQLite and the file system keep it.
"""

import errno
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from medfed.core import files
from medfed.core.checks import LedgerError, PlanError, refuse_unprintable
from medfed.core.patient_ids import Rule
from medfed.privacy import accounting
from medfed.privacy.ledger_entries import Lifetime

KEY = "pseudonym.key"
FORMAT = 2
UNBOUNDED = 1  # the last format that knew no lifetime budget and no anchor
BUSY_SECONDS = 5.0

APPLICATION = 0x6D66_4C47  # "mfLG", in the file's header
RESTORE = "Restore it from a copy: a new ledger would forget what the patients have paid."
_RESTORE_KEY = (
    "Restore the key from a copy: under a new one every patient would look new, with nothing spent."
)
RESTORE_ALL = (
    "Restore the newest copy of the whole folder; where none is left, see `medfed privacy "
    "accept --help`."
)
SAY_LIFETIME = (
    "medfed privacy budget FOLDER --lifetime-epsilon E --delta D --operator NAME --reason TEXT"
)
_ELSEWHERE = (
    "Every charge must be on disk before data is touched: make the folder writable, or set "
    "MEDFED_HOME to one that is."
)

_UNLINKED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What shares without hard links answer."""

COLUMNS = ("seq", "time", "study", "run", "site", "cohort", "round", "label", "event", "previous")
ROW = f"{', '.join(COLUMNS)}, hash"
_TABLES = {
    "genesis": "(content TEXT, hash TEXT)",
    "cohorts": "(id TEXT PRIMARY KEY, site TEXT) WITHOUT ROWID",
    "members": "(cohort TEXT, pseudonym TEXT, PRIMARY KEY (cohort, pseudonym)) WITHOUT ROWID",
    "charges": (
        "(seq INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT, study TEXT, run TEXT, site TEXT, "
        "cohort TEXT, round INTEGER, label TEXT, event TEXT, previous TEXT, hash TEXT)"
    ),
}
# an INSERT OR REPLACE deletes without asking the DELETE triggers, so it is stopped by these
_REPEATED = {
    "genesis": "EXISTS (SELECT 1 FROM genesis)",
    "cohorts": "EXISTS (SELECT 1 FROM cohorts WHERE id = NEW.id)",
    "members": (
        "EXISTS (SELECT 1 FROM members WHERE cohort = NEW.cohort AND pseudonym = NEW.pseudonym)"
    ),
    "charges": "NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM charges)",
}
SCHEMA = [
    *(f"CREATE TABLE {name} {columns}" for name, columns in _TABLES.items()),
    *(
        f"CREATE TRIGGER {name}_{verb.lower()} BEFORE {verb} ON {name}{when} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for name in _TABLES
        for verb, when in (("UPDATE", ""), ("DELETE", ""), ("INSERT", f" WHEN {_REPEATED[name]}"))
    ),
]


# Rows and their hashes ----------------------------------------------------------------------------

write_json = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), default=lambda value: {"bytes": value.hex()}
).encode  # nobody writes bytes here, but who tampers might


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(content: object) -> str:
    return sha256(write_json(content))


def row_hash(row: Sequence[object]) -> str:
    """Return the hash of a row, of which the hash of the row before is a part."""
    return digest_of(dict(zip(COLUMNS, row, strict=True)))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# The file and its key -----------------------------------------------------------------------------


def connect(uri: str, folder: Path | None = None) -> sqlite3.Connection:
    sql = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    # A rollback journal, not WAL: between transactions the one file is the whole ledger. EXTRA is
    # FULL that flushes the folder too, without which a power cut could bring back the journal and
    # undo a charge that was acknowledged; fullfsync is what a flush takes on macOS.
    for setting in (
        "synchronous = EXTRA",
        "fullfsync = ON",
        "trusted_schema = OFF",
        "cell_size_check = ON",
    ):
        sql.execute(f"PRAGMA {setting}")
    # On a share that cannot flush its folder the journal is cut to nothing, and flushed itself:
    # deleting it would be an error after the fact.
    if folder and not files.flush_folder(folder):
        sql.execute("PRAGMA journal_mode = TRUNCATE")
    return sql


def anchor_of(path: Path) -> Path:
    """Return where the last head of the ledger at `path` is kept."""
    return path.with_suffix(".head")


def rule_of(path: Path) -> Rule | None:
    """Return the identity rule of the ledger at `path`,
    from its first row alone; None where there is no ledger.

    Raises LedgerError where it cannot be read, or is missing though its key or anchor is there.
    What an old ledger or a run's own goes by is "exact".
    """
    if not path.exists():
        refuse_lost(path)
        return None

    with explain_errors(path), closing(connect(f"{path.absolute().as_uri()}?mode=ro")) as sql:
        if sql.execute("PRAGMA application_id").fetchone() != (APPLICATION,):
            raise LedgerError(f"{path} is no ledger, or was emptied. Name another file. {RESTORE}")
        content, digest = sql.execute("SELECT content, hash FROM genesis").fetchone() or ("", "")

    if sha256(str(content)) != digest:
        raise LedgerError(
            f"{path} is damaged: row 0, its genesis, is missing or was changed. The run is "
            f"refused. {RESTORE}"
        )

    lifetime = json.loads(content).get("lifetime")
    if lifetime:
        return Lifetime(**lifetime).identity
    return "exact"


def refuse_lost(path: Path) -> None:
    """Raise LedgerError where what belongs to a ledger is there, and the ledger is not."""
    for place in (path.with_name(KEY), anchor_of(path)):
        if place.exists():
            raise LedgerError(
                f"{path} is missing, though {place.name} is there: there was a ledger, and "
                f"patients may have paid. {RESTORE} To begin anew, for other patients, the "
                "operator founds one in another folder."
            )


def refuse_unsigned(operator: str, reason: str) -> None:
    if not operator.strip() or not reason.strip():
        raise PlanError(
            f"operator={operator!r}, reason={reason!r}; expected both: what is decided stays on "
            "record"
        )
    refuse_unprintable("operator", operator)
    refuse_unprintable("reason", reason)


def create(path: Path, founding: Lifetime | None) -> None:
    """Found a ledger beside its place and link it there: nobody meets half of one, and an empty
    file is never one.

    The key follows the ledger to its place (`Ledger.open`), so that a key without a ledger means a
    lost one.
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
        sql = connect(beside.absolute().as_uri(), path.parent)
        write_genesis(sql, key, founding)
        sql.close()
        link(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            spare.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):
            beside.with_name(f"{beside.name}-journal").unlink(missing_ok=True)


def link(beside: Path, place: Path) -> None:
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


def write_genesis(sql: sqlite3.Connection, key: bytes, lifetime: Lifetime | None) -> None:
    """Write schema and genesis: a random id, what the key must fit, and the lifetime budget."""
    genesis = {
        "id": secrets.token_hex(16),
        "created": now(),
        "format": FORMAT,
        "key": fingerprint(key),
    }
    bound = {"lifetime": vars(lifetime)} if lifetime else {}
    content = write_json({**genesis, **bound, "orders": accounting.ORDERS_VERSION})
    sql.execute(f"PRAGMA application_id = {APPLICATION}")
    sql.execute(f"PRAGMA user_version = {FORMAT}")
    sql.execute("BEGIN")
    for statement in SCHEMA:
        sql.execute(statement)
    sql.execute("INSERT INTO genesis VALUES (?, ?)", (content, sha256(content)))
    sql.execute("COMMIT")


def fingerprint(key: bytes) -> str:
    return hmac.digest(key, b"medfed ledger", "sha256").hex()


def read_key(path: Path, expected: str) -> bytes:
    """Return the key beside the ledger at `path`, whose fingerprint is `expected`; raise
    LedgerError for another.
    """
    place = path.with_name(KEY)
    try:
        key = place.read_bytes()
    except OSError as error:
        raise LedgerError(
            f"{place} cannot be read: {error.strerror}; {path} needs it. {_RESTORE_KEY}"
        ) from error
    if fingerprint(key) != expected:
        raise LedgerError(f"{place} is not the key of {path}. {_RESTORE_KEY}")
    return key


@contextmanager
def explain_errors(path: Path | None) -> Iterator[None]:
    """Turn what SQLite and the system refuse into LedgerError."""
    try:
        yield
    except sqlite3.Error as error:
        raise LedgerError(
            f"{path} {_reason(getattr(error, 'sqlite_errorcode', 0) & 0xFF, error)}"
        ) from error
    except UnicodeDecodeError as error:
        raise LedgerError(f"{path} {_reason(sqlite3.SQLITE_CORRUPT, error)}") from error
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be opened or written: {error.strerror}. {_ELSEWHERE}"
        ) from error


def _reason(code: int, error: Exception) -> str:
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return (
                f"has been locked by another process for {BUSY_SECONDS:g} s. See what holds it "
                "(another run, a viewer, a backup), let that end, then run again."
            )
        case (
            sqlite3.SQLITE_READONLY
            | sqlite3.SQLITE_CANTOPEN
            | sqlite3.SQLITE_PERM
            | sqlite3.SQLITE_IOERR
        ):
            return f"cannot be opened or written: {error}. {_ELSEWHERE}"
        case sqlite3.SQLITE_FULL:
            return "cannot be written: the disk is full. Free some of it; nothing was charged."
        case sqlite3.SQLITE_NOTADB:
            return f"is no ledger, or its first bytes are damaged. Name another file. {RESTORE}"
        case _:
            return f"is damaged: {error}. The run is refused. {RESTORE}"
