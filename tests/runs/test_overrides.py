"""An operator's word on a quarantined client, in a folder that others can write into."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import medfed
from medfed import runs
from medfed.core.checks import RunError, TrailError
from medfed.monitor import events
from medfed.runs import decisions
from medfed.secure import key_files
from medfed.secure.identity import Identity
from tests.runs.test_once import approved, crashed
from tests.tables import write_study

SITES = ("north", "south", "west")


@pytest.fixture(scope="module")
def cut_short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain run of parties on a list of members, that a crash ended in round 2."""
    place = tmp_path_factory.mktemp("cut")
    study = approved(medfed.load_study(write_study(place)), place, SITES)
    crashed(study, place / "run", 2)
    return place


@pytest.fixture
def run(cut_short: Path, tmp_path: Path) -> Path:
    shutil.copytree(cut_short / "run", tmp_path / "run")
    return tmp_path / "run"


def lifted(run: Path) -> list[str]:
    told = events.read(run / "events.jsonl")
    return [one.client for one in told if isinstance(one, events.SecurityAudit)]


def signed_by(key: Identity, folder: Path, /, **facts: Any) -> str:
    """Return a line as `medfed quarantine lift` writes it, under a key of somebody's."""
    name = json.loads((folder / "plan.json").read_text())["run"]
    entry = {"run": name, "number": 0, "client": "north"}
    entry |= {**decisions.sign_off("repaired", "Ada", "a test"), "key": key.public.signing.hex()}
    entry |= facts
    signature = key.sign(decisions._signing_input(folder / runs.OVERRIDES, entry)).hex()
    return json.dumps({**entry, "signature": signature}) + "\n"


def test_an_operators_word_is_signed_and_taken(run: Path) -> None:
    runs.lift_quarantine(run, "north", "repaired", "Ada")
    runs.lift_quarantine(run, "south", "looked at", "Ada")
    assert medfed.resume(run).complete and lifted(run) == ["north", "south"]


FORGED: dict[str, Callable[[Identity, Identity, Path], str]] = {
    "by hand": lambda me, site, run: '{"client": "north", "reason": "r", "operator": "Ada"}\n',
    "garbage": lambda me, site, run: "garbage\n",
    "no object": lambda me, site, run: "[]\n",
    "no text": lambda me, site, run: "\udcff\n",
    "a site's key": lambda me, site, run: signed_by(site, run),
    "another run": lambda me, site, run: signed_by(me, run, run="another"),
    "another client": lambda me, site, run: signed_by(me, run).replace("north", "south"),
    "nobody": lambda me, site, run: signed_by(me, run, client="nobody"),
    "granted twice": lambda me, site, run: signed_by(me, run) * 2,
    "an escape": lambda me, site, run: signed_by(me, run, reason="\x1b[2J"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_line_that_no_operator_of_this_run_signed_is_refused(
    forgery: str, cut_short: Path, run: Path
) -> None:
    """Before, whoever could write in the folder granted appeals in the operator's name; and what
    was no line ended the run with a traceback.
    """
    me, site = (key_files.load(cut_short / "keys" / f"{n}.key") for n in ("coordinator", "north"))
    text = FORGED[forgery](me, site, run)
    (run / runs.OVERRIDES).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunError, match=r"overrides\.jsonl.*(restore|take the line out)"):
        medfed.resume(run)
    assert not lifted(run) or forgery == "nobody"


def test_decisions_are_not_read_through_a_link(cut_short: Path, run: Path, tmp_path: Path) -> None:
    me = key_files.load(cut_short / "keys" / "coordinator.key")
    (tmp_path / "elsewhere").write_text(signed_by(me, run))
    (run / runs.OVERRIDES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrailError, match="is a link"):
        medfed.resume(run)
    with pytest.raises(TrailError, match="is a link"):
        runs.lift_quarantine(run, "north", "repaired", "Ada")


def test_a_word_that_was_taken_in_is_not_taken_out(run: Path) -> None:
    """Else the next one would pass for it, and never be taken."""
    runs.lift_quarantine(run, "north", "repaired", "Ada")

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        medfed.resume(run, listeners=[stop])
    (run / runs.OVERRIDES).unlink()
    with pytest.raises(RunError, match="lacks decisions that were taken in"):
        medfed.resume(run)
    runs.lift_quarantine(run, "south", "looked at", "Ada")
    with pytest.raises(RunError, match="lacks decisions that were taken in"):
        medfed.resume(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reason", "two\nlines"),
        ("reason", "an \x1b[31mescape"),
        ("operator", "a\u2028b"),
        ("operator", "half a letter \ud800"),
        ("reason", "a" * 1001),
        ("operator", "A" * 100_000),
    ],
)
def test_a_word_is_one_printable_line(name: str, text: str, run: Path) -> None:
    word = {"reason": "repaired", "operator": "Ada", name: text}
    with pytest.raises(RunError, match=f"{name}=.*at most 1000 letters, all in one line"):
        runs.lift_quarantine(run, "north", word["reason"], word["operator"])
    with pytest.raises(RunError, match=f"{name}=.*at most 1000 letters, all in one line"):
        runs.give_up(run, word["reason"], word["operator"])
    assert not (run / runs.OVERRIDES).exists()
