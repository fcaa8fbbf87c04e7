"""A consortium's list of members: only its key writes it, and a run takes no other keys than those
on it.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import medfed
from medfed import runs
from medfed.cli import app
from medfed.compliance import consortium
from medfed.compliance.trail import Trail
from medfed.core.checks import (
    KeyFileError,
    MedfedError,
    PlanError,
    RevokedError,
    RunError,
    SignatureError,
    TrailError,
)
from medfed.runs import simulation
from medfed.secure import key_files
from medfed.secure.identity import Identity
from medfed.secure.three_party import SharingAggregator
from medfed.study import Study
from tests.tables import STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

BOSS = Identity.new("the consortium", "consortium")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    consortium.begin(tmp_path / "members", BOSS)
    return tmp_path / "members"


def enrolled(place: Path, name: str, role: str = "site") -> Identity:
    one = Identity.new(name, role)
    consortium.approve(place, BOSS, consortium.request(one), one.public.fingerprint)
    return one


# the list -----------------------------------------------------------------------------------------


def test_who_is_approved_is_on_it_until_revoked(place: Path) -> None:
    ann = enrolled(place, "ann")
    ben = enrolled(place, "ben", "aggregator")
    found = consortium.read(place, fingerprint=BOSS.public.fingerprint)
    assert (
        dict(found.roster) == {"ann": ann.public, "ben": ben.public}
        and found.authority == BOSS.public
    )
    with pytest.raises(RunError, match="all in one line and all printable"):
        consortium.revoke(place, BOSS, "ann", "its server\x1b[2J")
    consortium.revoke(place, BOSS, "ann", "its server was stolen")
    now = consortium.read(place)
    assert (
        list(now.roster) == ["ben"]
        and now.history[-1]["facts"]["reason"] == "its server was stolen"
    )
    with pytest.raises(RevokedError, match="'ann' is revoked"):
        now.roster["ann"]
    again = enrolled(place, "ann")
    assert consortium.read(place).roster["ann"] == again.public != ann.public


def test_keys_are_rotated_by_who_holds_the_old_ones(place: Path) -> None:
    ann = enrolled(place, "ann")
    fresh = Identity.new("ann", "site")
    with pytest.raises(SignatureError, match="a member with other keys"):
        consortium.approve(place, BOSS, consortium.request(fresh))
    with pytest.raises(SignatureError, match="a member with other keys"):
        consortium.approve(place, BOSS, consortium.request(fresh, Identity.new("ann", "site")))
    consortium.approve(place, BOSS, consortium.request(fresh, ann))
    assert consortium.read(place).roster["ann"] == fresh.public


@pytest.mark.parametrize("field", ["name", "role", "signing", "sealing", "signature"])
def test_a_changed_request_is_refused(place: Path, field: str) -> None:
    asked = consortium.request(Identity.new("ann", "site"))
    other = consortium.request(Identity.new("eve", "aggregator"))
    with pytest.raises(SignatureError):
        consortium.approve(place, BOSS, {**asked, field: other[field]})
    for broken in (
        {**asked, field: 3},
        {k: v for k, v in asked.items() if k != field},
        {**asked, field: "zz"},
    ):
        with pytest.raises(SignatureError):
            consortium.approve(place, BOSS, broken)
    assert not list(consortium.read(place).roster)


def test_another_fingerprint_than_told_is_refused(place: Path) -> None:
    asked = consortium.request(Identity.new("ann", "site"))
    with pytest.raises(SignatureError, match="told was 0000"):
        consortium.approve(place, BOSS, asked, "0000")
    with pytest.raises(TrailError, match="expected 0000"):
        consortium.read(place, fingerprint="0000")


def test_nobody_else_writes_the_list(place: Path, tmp_path: Path) -> None:
    eve = Identity.new("the consortium", "consortium")
    with pytest.raises(TrailError, match="may not write it"):
        consortium.approve(place, eve, consortium.request(eve))
    facts = consortium.request(Identity.new("eve", "site"))
    Trail.open(place / "members.jsonl", eve.name, eve.public.signing, eve.sign).append(
        "approved", facts
    )
    with pytest.raises(TrailError, match="line 3: not written by the consortium's key"):
        consortium.read(place)
    with pytest.raises(TrailError, match="already"):
        consortium.begin(place, eve)
    with pytest.raises(TrailError):
        consortium.read(tmp_path / "nowhere")


def test_a_line_that_is_no_entry_of_a_list_is_refused(place: Path) -> None:
    Trail.open(place / "members.jsonl", BOSS.name, BOSS.public.signing, BOSS.sign).append(
        "revoked", {"name": "ann"}
    )
    with pytest.raises(TrailError, match="no entry of a list"):
        consortium.read(place)


# runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, place: Path) -> Study:
    """A three-party study whose parties' keys the consortium approved."""
    study = medfed.load_study(write_study(tmp_path, STUDY)).set(
        "security.aggregation", "three-party"
    )
    roles = dict.fromkeys(runs.survey(study), "site") | dict.fromkeys(
        study.security.aggregators, "aggregator"
    )
    for name, role in {**roles, "coordinator": "coordinator"}.items():
        key_files.save(enrolled(place, name, role), tmp_path / "keys" / f"{name}.key")
    return study.set("security.federation", str(place)).set("security.keys", str(tmp_path / "keys"))


def test_a_run_under_the_consortiums_keys_is_checked_against_them(
    study: Study, place: Path, tmp_path: Path
) -> None:
    result = medfed.run(study, tmp_path / "run")
    assert result.complete
    found = medfed.verify_model_integrity(tmp_path / "run", place)
    assert found["signed_by"] == "coordinator" and found["sites"] == sorted(runs.survey(study))
    assert found["rounds"] == study.training.rounds
    secret = key_files.load(tmp_path / "keys" / "coordinator.key").secret().hex()

    assert not any(
        secret[:64] in path.read_text(errors="ignore") for path in (tmp_path / "run").rglob("*.*")
    )
    others = tmp_path / "others"
    consortium.begin(others, BOSS)
    with pytest.raises(TrailError, match="never approved"):
        runs.verify_trail(tmp_path / "run", others)
    made = medfed.run(study.set("security.federation", ""), tmp_path / "made")
    assert torch.equal(made.w_P, result.w_P)
    with pytest.raises(TrailError, match="never approved"):
        runs.verify_trail(tmp_path / "made", place)


def test_revoked_unknown_and_swapped_keys_are_refused_before_a_folder_is_made(
    study: Study, place: Path, tmp_path: Path
) -> None:
    name, other = list(runs.survey(study))[:2]
    file = tmp_path / "keys" / f"{name}.key"
    kept = tmp_path / "kept.key"
    file.rename(kept)
    with pytest.raises(KeyFileError, match="medfed key new"):
        medfed.run(study, tmp_path / "run")
    key_files.save(Identity.new(name, "site"), file)
    with pytest.raises(SignatureError, match="not what the consortium approved"):
        medfed.run(study, tmp_path / "run")
    kept.replace(file)
    consortium.revoke(place, BOSS, other, "left")
    with pytest.raises(RevokedError, match=other):
        medfed.run(study, tmp_path / "run")
    with pytest.raises(TrailError, match="fingerprint"):
        medfed.run(study.set("security.fingerprint", "00"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_with_another_study_has_not_signed_this_one(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = runs.open_sites

    def changed(*args: object, **more: object) -> list[object]:
        sites = opened(*args, **more)  # type: ignore[arg-type]
        sites[-1].study = sites[-1].study.set("training.learning_rate", 0.5)
        return list(sites)

    monkeypatch.setattr(simulation, "open_sites", changed)
    with pytest.raises(PlanError, match="has not signed this study"):
        medfed.simulate(study)


@pytest.mark.parametrize("file", ["model.safetensors", "trail/trail.jsonl"])
def test_a_changed_model_or_trail_is_found(study: Study, tmp_path: Path, file: str) -> None:
    medfed.run(study, tmp_path / "run")
    path = tmp_path / "run" / file
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(TrailError):
        medfed.verify_model_integrity(tmp_path / "run")


@pytest.mark.parametrize("way", ["three-party", "masked"])
def test_a_coordinator_that_signs_nothing_gets_no_row(
    study: Study, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medfed.rounds import masked, shared

    for module in (masked, shared):
        monkeypatch.setattr(module, "sign", lambda publisher, number, payload: payload)
    result = medfed.simulate(study.set("security.aggregation", way))
    assert not result.complete and result.summary["rounds"] == 0


def test_an_aggregator_that_stops_ends_the_round_and_the_run_goes_on_when_it_is_back(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = medfed.run(study, tmp_path / "whole")
    handle = SharingAggregator.handle
    calls = 0

    def stopping(self: SharingAggregator, *args: object) -> object:
        nonlocal calls
        calls += args[0] == "begin"
        if calls > 3:  # the three began round 1
            raise ConnectionError("gone")
        return handle(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(SharingAggregator, "handle", stopping)
        stopped = medfed.run(study, tmp_path / "run")
    assert not stopped.complete and 0 < stopped.summary["rounds"] < study.training.rounds
    resumed = medfed.resume(tmp_path / "run")
    assert resumed.summary["rounds"] == study.training.rounds and torch.equal(
        resumed.w_P, whole.w_P
    )
    assert medfed.verify_model_integrity(tmp_path / "run")["rounds"] == study.training.rounds


def test_bytes_of_each_phase_are_told(study: Study) -> None:
    phases = medfed.simulate(study).summary["bytes_by_phase"]
    assert set(phases) >= {"shares", "check", "open"} and min(phases.values()) > 0


# the commands -------------------------------------------------------------------------------------


def test_a_consortium_is_made_by_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFED_PASSPHRASE", "")
    run = CliRunner().invoke

    def said(*words: str) -> str:
        result = run(app, list(words))
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    said("key", "new", "consortium", "--role", "consortium")
    said("key", "new", "north")
    told = json.loads(said("key", "show", "keys/north.key", "--json"))["fingerprint"]
    said("key", "request", "keys/north.key", "--out", "north.json")
    said("federation", "new", "members", "--key", "keys/consortium.key")
    said(
        "federation",
        "approve",
        "members",
        "north.json",
        "--key",
        "keys/consortium.key",
        "--fingerprint",
        told,
    )
    assert "north" in said("federation", "show", "members")
    said(
        "federation",
        "revoke",
        "members",
        "north",
        "--key",
        "keys/consortium.key",
        "--reason",
        "left",
    )
    assert json.loads(said("federation", "show", "members", "--json"))["revoked"] == ["north"]
    for words in (
        ["key", "new", "north"],
        ["key", "new", "x", "--role", "king"],
        ["key", "show", "none.key"],
        [
            "federation",
            "approve",
            "members",
            "none",
            "--key",
            "keys/consortium.key",
            "--fingerprint",
            told,
        ],
        [
            "federation",
            "approve",
            "members",
            "north.json",
            "--key",
            "keys/north.key",
            "--fingerprint",
            told,
        ],
    ):
        assert isinstance(run(app, words).exception, MedfedError)


def test_each_key_file_is_read_once_by_its_own_party(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator opens no key but its own: the sites and the three tell their public ones."""
    opened: list[Path] = []
    callers: list[str] = []
    load = key_files.load

    def load_seen(path: Path, passphrase: str = "") -> Identity:
        opened.append(path)
        callers.append(sys._getframe(2).f_globals["__name__"])
        return load(path, passphrase)

    monkeypatch.setattr(key_files, "load", load_seen)
    assert medfed.run(study, tmp_path / "run").complete
    assert sorted(opened) == sorted((tmp_path / "keys").glob("*.key"))
    own = {path.stem: caller for path, caller in zip(opened, callers, strict=True)}
    assert own.pop("coordinator") == "medfed.rounds.aggregation"
    assert {own.pop(name) for name in study.security.aggregators} == {"medfed.rounds.aggregator"}
    assert set(own) == set(runs.survey(study)) and set(own.values()) == {"medfed.node.setup"}
