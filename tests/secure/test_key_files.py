"""Key files: what is kept, who can read it, and every way one can be wrong."""

import json
from pathlib import Path

import pytest

from medfed.core.checks import KeyFileError
from medfed.secure import key_files
from medfed.secure.identity import Identity

ANN = Identity.new("ann", "site")


@pytest.mark.parametrize("passphrase", ["", "three words here"])
def test_what_is_saved_is_loaded_and_only_its_owner_can_read_it(
    tmp_path: Path, passphrase: str
) -> None:
    path = tmp_path / "deep" / "ann.key"
    key_files.save(ANN, path, passphrase)
    found = key_files.load(path, passphrase)
    assert (found.name, found.role, found.secret()) == ("ann", "site", ANN.secret())
    assert path.stat().st_mode & 0o777 == 0o600
    assert (ANN.secret().hex() in path.read_text()) == (not passphrase)


def test_keys_are_never_printed() -> None:
    assert ANN.secret().hex() not in repr(ANN) and "Private" not in repr(ANN)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    key_files.save(ANN, tmp_path / "a.key")
    with pytest.raises(KeyFileError, match="never overwritten"):
        key_files.save(Identity.new("ben", "site"), tmp_path / "a.key")
    assert key_files.load(tmp_path / "a.key").name == "ann"


def test_a_file_that_others_could_read_is_refused(tmp_path: Path) -> None:
    key_files.save(ANN, tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        key_files.load(tmp_path / "a.key")


def test_a_wrong_passphrase_and_a_changed_name_do_not_open(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    key_files.save(ANN, path, "right")
    for passphrase, said in (("", "under a passphrase"), ("wrong", "passphrase is wrong")):
        with pytest.raises(KeyFileError, match=said):
            key_files.load(path, passphrase)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "eve"}))
    with pytest.raises(KeyFileError, match="file was changed"):
        key_files.load(path, "right")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "\x00",
        '{"format": "medfed key 1"}',
        '{"format": "medfed key 1", "name": "a", "role": "site", "keys": "ab"}',
        '{"format": "medfed key 1", "name": "a", "role": "site", "keys": 3}',
        '{"format": "medfed key 2", "name": "a", "role": "site", "keys": ""}',
    ],
)
def test_what_is_no_key_file_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="no key file"):
        key_files.load(path)


def test_a_missing_file_and_a_closed_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="medfed key new"):
        key_files.load(tmp_path / "none.key")
    with pytest.raises(KeyFileError, match="folder that you may write"):
        key_files.save(ANN, Path("/proc") / "medfed" / "a.key")
