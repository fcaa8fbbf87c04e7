"""Keys at rest: one file a party, mode 0600, under a passphrase where its owner gives one.

The file is JSON: name, role, and the two private keys in hex or, under a passphrase, in a box.
scrypt (RFC 7914; N = 2^17, r = 8, p = 1) makes the box's AES-256-GCM key; name and role are bound
into it.
"""

import json
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from medfed.core import files
from medfed.core.checks import KeyFileError
from medfed.secure.identity import Identity

_FORMAT = "medfed key 1"


def save(identity: Identity, path: Path, passphrase: str = "") -> None:
    """Write a party's keys into a new file that only its owner can read.

    Raises KeyFileError where a file is there already, as keys are never overwritten, or the folder
    cannot be written.
    """
    entry: dict[str, str] = {"format": _FORMAT, "name": identity.name, "role": identity.role}
    if passphrase:
        salt = os.urandom(16)
        box = AESGCM(_stretch(passphrase, salt)).encrypt(bytes(12), identity.secret(), _bind(entry))
        entry |= {"salt": salt.hex(), "box": box.hex()}
    else:
        entry |= {"keys": identity.secret().hex()}

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # half a key is none, and would be in the way of the next
            raise
        files.flush_folder(path.parent)
    except FileExistsError as error:
        raise KeyFileError(
            f"{path} exists; keys are never overwritten. Give another file, or move it away."
        ) from error
    except OSError as error:
        way = files.way_out(error) if files.is_full(error) else "Give a folder that you may write"
        raise KeyFileError(f"{path} cannot be written: {error.strerror}. {way}.") from error


def load(path: Path, passphrase: str = "") -> Identity:
    """Read a party's keys.
    Raises KeyFileError where they cannot be read or others could have read them.
    """
    try:
        mode = path.stat().st_mode
        entry = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}")
        name = entry["name"]
        role = entry["role"]
        if "keys" in entry:
            if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
                raise KeyFileError(
                    f"{path} has mode {stat.S_IMODE(mode):04o} and no passphrase; others may "
                    f"have read it. Expected 0600: `chmod 600 {path}`, or make new keys."
                )
            return Identity.of(name, role, bytes.fromhex(entry["keys"]))
        salt = bytes.fromhex(entry["salt"])
        box = bytes.fromhex(entry["box"])
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be read: {error.strerror}. Make keys with `medfed key new`."
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise KeyFileError(
            f"{path} is no key file ({error}); restore it, or make new keys and enrol them"
        ) from error

    if not passphrase:
        raise KeyFileError(
            f"{path} is under a passphrase; set MEDFED_PASSPHRASE, or type it when asked"
        )

    try:
        secret = AESGCM(_stretch(passphrase, salt)).decrypt(bytes(12), box, _bind(entry))
        return Identity.of(name, role, secret)
    except (InvalidTag, ValueError) as error:
        raise KeyFileError(
            f"{path} does not open: the passphrase is wrong, or the file was changed"
        ) from error


def _stretch(passphrase: str, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=2**17, r=8, p=1).derive(passphrase.encode())


def _bind(entry: dict[str, str]) -> bytes:
    return json.dumps([_FORMAT, entry["name"], entry["role"]]).encode()
