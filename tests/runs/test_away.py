"""A site that answers nothing at all, after its round was given up: the run goes on without it, and
with it where it is back.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import medfed
from medfed import runs
from medfed.compliance import consortium
from medfed.core import codec
from medfed.core.checks import MedfedError, PlanError, RunError, SiteError
from medfed.monitor import events
from medfed.node import inprocess
from medfed.node.site import Answer, Site
from medfed.privacy.ledger import Ledger
from medfed.runs import claims, drive, parties
from medfed.runs.verification import verify_run
from medfed.secure import key_files
from medfed.secure.identity import Identity
from tests.runs.test_giving_up import GONE, SITES, WAYS, Crash, stop, stop_here, study_of, told
from tests.tables import PRIVATE, STUDY

pytestmark = pytest.mark.usefixtures("one_thread")


class Silence:
    """Sites that answer nothing, by name, and what the others were asked meanwhile."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.asked: Counter[str] = Counter()

    def handle_many(self, sites: Sequence[Site], op: str, payload: bytes) -> list[Answer]:
        there = [site for site in sites if site.name not in self.names]
        self.asked.update(site.name for site in sites)
        answers = dict(zip((site.name for site in there), real(there, op, payload), strict=True))
        silent = SiteError("no answer within 600 s")
        return [answers.get(site.name, silent) for site in sites]


real = inprocess.handle_many


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Silence:
    made = Silence()
    monkeypatch.setattr(inprocess, "handle_many", made.handle_many)
    return made


@pytest.mark.parametrize(
    ("way", "algorithm"), [("masked", "fedavg"), ("masked", "scaffold"), ("three-party", "fedavg")]
)
def test_the_run_goes_on_without_a_site_that_answers_nothing(
    way: str, algorithm: str, tmp_path: Path, silence: Silence
) -> None:
    """Before, no resumption came past the survey, whatever had been given up."""
    run = tmp_path / "run"
    stop(study_of(tmp_path, way).set("training.algorithm", algorithm), run, 2)
    silence.names = {GONE}
    with pytest.raises(MedfedError, match="no answer within 600 s"):
        medfed.resume(run)  # nobody has given anything up
    assert runs.give_up(run, "its machine burnt down", "Ada") == 2
    silence.asked.clear()

    ended = medfed.resume(run)
    assert silence.asked[GONE] == 1  # who are you?
    assert ended.summary["rounds"] == 3 and [o["round"] for o in ended.summary["given_up"]] == [2]
    finished = {one.round: list(one.clients) for one in told(run, events.RoundFinished)}
    assert finished == {1: list(SITES), 3: list(SITES[:-1]), 4: list(SITES[:-1])}
    left_out = [one for one in ended.summary["excluded"] if one["site"] == GONE]
    assert {one["round"] for one in left_out} == {3, 4}
    assert all("answered nothing when the run was resumed" in one["reason"] for one in left_out)
    checked = verify_run(run, tmp_path / "members")
    assert checked.rounds == 3 and checked.sites == sorted(SITES)
    assert any(one.startswith(f"Away when the run was resumed: {GONE};") for one in checked.told)

    again = medfed.resume(run)  # and again, as the round stays given up
    assert torch.equal(again.w_P, ended.w_P)
    verify_run(run, tmp_path / "members")


@pytest.mark.parametrize("way", WAYS)
def test_a_site_that_is_away_is_charged_nothing_and_counted_for_the_whole_plan(
    way: str, tmp_path: Path, silence: Silence
) -> None:
    text = PRIVATE.replace("[privacy]", "[privacy]\nspare_rounds = 2")
    run = tmp_path / "run"
    study = study_of(tmp_path, way, text)
    stop(study, run, 2)
    before = paid(run)
    silence.names = {GONE}
    runs.give_up(run, "gone", "Ada")
    ended = medfed.resume(run)
    assert ended.summary["rounds"] == 3, ended.summary["reason"]

    now = paid(run)
    assert now[GONE] == before[GONE] == 2
    assert all(now[name] >= 4 for name in SITES[:-1])
    claim = claims.read(run)
    assert claim["rounds"]["paid"] == 6  # nobody can ask how often it has paid
    assert claim["epsilon"] <= study.privacy.epsilon
    assert claim["epsilon"] >= claim["composition"]["ledger"]["epsilon_all_runs"] - 1e-9
    assert any(f"{GONE} answered nothing" in one for one in claim["assumptions"])
    assert all(
        one.privacy["epsilon"] == pytest.approx(claim["epsilon"])
        for one in told(run, events.RoundFinished)
        if one.round > 2
    )
    verify_run(run, tmp_path / "members")


def paid(run: Path) -> Counter[str]:
    with Ledger.open(run / "sites" / "ledger.sqlite", read_only=True) as book:
        return Counter(str(row["site"]) for row in book.rows() if row["label"] == "round")


@pytest.mark.parametrize("text", [STUDY, PRIVATE.replace("[privacy]", "[privacy]\nspare_rounds=2")])
@pytest.mark.parametrize("way", WAYS)
def test_a_site_that_is_back_takes_part_again(
    way: str, text: str, tmp_path: Path, silence: Silence
) -> None:
    run = tmp_path / "run"
    stop(study_of(tmp_path, way, text), run, 2)
    silence.names = {GONE}
    runs.give_up(run, "gone", "Ada")
    stop_at(run, 4)
    silence.names = set()
    ended = medfed.resume(run)
    finished = {one.round: list(one.clients) for one in told(run, events.RoundFinished)}
    assert finished == {1: list(SITES), 3: list(SITES[:-1]), 4: list(SITES)}
    assert ended.summary["rounds"] == 3
    verify_run(run, tmp_path / "members")
    if text != STUDY:
        assert not any("answered nothing" in one for one in claims.read(run)["assumptions"])
        assert claims.read(run)["rounds"]["paid"] == max(paid(run).values())


def stop_at(run: Path, round: int) -> None:
    """Resume a run, and kill it where it comes to a round."""
    play = drive.run_round

    def stop_there(server: Any, *rest: Any) -> Any:
        return stop_here() if server.round + 1 == round else play(server, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "run_round", stop_there)
        with pytest.raises(Crash):
            medfed.resume(run)


def test_a_site_that_is_back_remembers_what_it_did_when_it_was_last_there(
    tmp_path: Path, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site has a folder of its own, so that others' states take none of its away."""
    monkeypatch.setattr(Site, "__init__", own_folder(Site.__init__))
    run = tmp_path / "run"
    study = study_of(tmp_path, "masked").set("training.algorithm", "scaffold")
    stop(study.set("training.rounds", 6), run, 3)
    kept = (run / "sites" / GONE / "memory-000002.safetensors").read_bytes()
    silence.names = {GONE}
    runs.give_up(run, "gone", "Ada")
    stop_at(run, 6)
    assert not (run / "sites" / GONE / "memory-000005.safetensors").exists()
    assert (run / "sites" / GONE / "memory-000002.safetensors").read_bytes() == kept

    silence.names = set()
    restored: list[tuple[str, int]] = []
    listen = inprocess.handle_many

    def note(sites: Sequence[Site], op: str, payload: bytes) -> list[Answer]:
        if op == "restore":
            number = codec.decode(payload)[0]["round"]
            restored.extend((site.name, number) for site in sites)
        return listen(sites, op, payload)

    monkeypatch.setattr(inprocess, "handle_many", note)
    stop_at(run, 6)  # before anything of it is kept
    restored.clear()
    ended = medfed.resume(run)
    assert dict(restored) == {name: 5 for name in SITES[:-1]} | {GONE: 2}
    assert ended.summary["rounds"] == 5
    assert {one.round: len(one.clients) for one in told(run, events.RoundFinished)}[6] == 6
    verify_run(run, tmp_path / "members")


def own_folder(init: Callable[..., None]) -> Callable[..., None]:
    def made(self: Site, name: str, table: Any, study: Any, folder: Any = None, *more: Any) -> None:
        init(self, name, table, study, folder / name if folder else None, *more)

    return made


# what is not taken for granted --------------------------------------------------------------------


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is stuck in round 2, which is given up."""
    place = tmp_path_factory.mktemp("stuck")
    stop(study_of(place, "masked"), place / "run", 2)
    runs.give_up(place / "run", "gone", "Ada")
    return place


@pytest.fixture
def run(stuck: Path, tmp_path: Path) -> Path:
    shutil.copytree(stuck / "run", tmp_path / "run")
    return tmp_path / "run"


def test_too_few_sites_open_no_round(run: Path, silence: Silence) -> None:
    silence.names = set(SITES[2:])
    before = (run / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"2 of 6 sites are there, expected . or more"):
        medfed.resume(run)
    assert (run / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["train", "labels", "left out"])
def test_what_is_told_of_a_site_that_is_away_is_what_it_signed(
    change: str, run: Path, silence: Silence
) -> None:
    """Who writes in the folder can make it larger or smaller: its signature is under other sizes."""
    silence.names = {GONE}
    path = run / "events.jsonl"
    made = []
    for line in path.read_text().splitlines():
        one = json.loads(line)
        if one["event"] == "planned" and change == "train":
            one["sizes"][GONE]["train"] += 1
        if one["event"] == "planned" and change == "left out":
            del one["sizes"][GONE]
        if one["event"] == "planned" and change == "labels":
            counts = one["labels"][GONE]
            one["labels"][GONE] = dict(zip(counts, reversed(counts.values()), strict=True))
        made.append(json.dumps(one))
    path.write_text("\n".join(made) + "\n")
    if change == "labels":  # shown, and nothing follows from them
        assert medfed.resume(run).summary["rounds"] == 3
        return
    with pytest.raises(MedfedError, match=r"has not signed this study|no answer within"):
        medfed.resume(run)


def test_a_site_that_changes_its_records_is_refused_also_when_others_are_away(
    run: Path, stuck: Path, silence: Silence
) -> None:
    silence.names = {GONE}
    frozen = json.loads((run / "plan.json").read_text())
    frozen["tables"][SITES[0]] = "0" * 64
    (run / "plan.json").write_text(json.dumps(frozen))
    with pytest.raises(RunError, match="the data has changed since the run began"):
        medfed.resume(run)


def test_a_site_whose_keys_were_replaced_has_signed_nothing(
    tmp_path: Path, silence: Silence
) -> None:
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    runs.give_up(run, "gone", "Ada")
    silence.names = {GONE}
    old = key_files.load(tmp_path / "keys" / f"{GONE}.key")
    boss = key_files.load(tmp_path / "keys" / "consortium.key")
    asked = consortium.request(Identity.new(GONE, "site"), old)
    consortium.approve(tmp_path / "members", boss, asked)
    with pytest.raises(PlanError, match=f"site '{GONE}' has not signed this study"):
        medfed.resume(run)


@pytest.mark.long
def test_a_process_that_cannot_answer_is_away(tmp_path: Path) -> None:
    run = tmp_path / "run"
    study = study_of(tmp_path, "masked").set("training.algorithm", "scaffold")
    study = study.set("training.rounds", 3)
    stop(study, run, 2, parties.run_apart)
    (tmp_path / "keys" / f"{GONE}.key").rename(tmp_path / "elsewhere.key")
    runs.give_up(run, "gone", "Ada")
    ended = parties.resume_apart(run)
    assert {one.round: len(one.clients) for one in told(run, events.RoundFinished)} == {1: 6, 3: 5}
    assert ended.summary["rounds"] == 2
    verify_run(run, tmp_path / "members")
