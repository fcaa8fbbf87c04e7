"""A secure round that its sites wrote down and never opened, one of them gone for good: it is given
up on record, and the run goes on after it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medfed
from medfed import runs
from medfed.compliance import consortium
from medfed.compliance.trail import Trail
from medfed.core import files
from medfed.core.checks import AbortError, RunError, TrailError
from medfed.monitor import events
from medfed.privacy.ledger import Ledger
from medfed.rounds import checkpoints
from medfed.runs import claims, decisions, drive, sealing
from medfed.runs.verification import verify_run
from medfed.secure import key_files, party, three_party
from medfed.secure.chain import Follower
from medfed.secure.identity import Identity
from medfed.secure.masking import MaskingServer
from medfed.study import Study
from tests.runs.test_once import approved, crashed
from tests.tables import PRIVATE, STUDY, invented, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = tuple(f"s{i}" for i in range(6))
GONE = SITES[-1]
WAYS = ("masked", "three-party")


class Crash(BaseException):
    """What a kill looks like from inside."""


def study_of(folder: Path, way: str, text: str = STUDY) -> Study:
    """Return a study of six sites whose keys, and so records, outlast a run."""
    frame = invented(240)
    frame["hospital"] = np.array(SITES)[np.arange(len(frame)) % len(SITES)]
    if "[privacy.sizes]" in text:
        sizes = "".join(f"{name} = 40\n" for name in SITES)
        text = f"{text.split('[privacy.sizes]')[0]}[privacy.sizes]\n{sizes}"
        text += "[monitor]\nevaluate_every = 4\nbaselines = false\n"
    study = medfed.load_study(write_study(folder, text, frame))
    study = study.set("security.aggregation", way).set("training.quorum", 0.5)
    return approved(study, folder, SITES)


def stop(study: Study, folder: Path, round: int, run: Callable[..., Any] = medfed.run) -> None:
    """Run until a round's rows are written down by all, and crash before it is opened."""
    confirm = MaskingServer.confirm
    add = three_party._add_parts

    def crash(self: MaskingServer, envelopes: Any) -> Any:
        found = confirm(self, envelopes)
        if self.scope.round == round:
            raise Crash
        return found

    calls = [0]

    def crash_shared(*said: Any) -> Any:
        calls[0] += 1
        if calls[0] == round:
            raise Crash
        return add(*said)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskingServer, "confirm", crash)
        patch.setattr(three_party, "_add_parts", crash_shared)
        with pytest.raises(Crash):
            run(study, folder)


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have a site gone for all rounds to come."""

    def gone(real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: Any, *said: Any) -> Any:
            if getattr(self, "follower", self).post.me.name == GONE:
                raise AbortError(f"{GONE!r} is gone")
            return real(self, *said)

        return refuse

    def do() -> None:
        monkeypatch.setattr(party.Masker, "answer", gone(party.Masker.answer))
        monkeypatch.setattr(Follower, "accept", gone(Follower.accept))

    return do


def weights(folder: Path) -> torch.Tensor:
    return checkpoints.read_last(folder / "checkpoints")[0].w_P


def told(folder: Path, kind: type[events.Event]) -> list[Any]:
    return [one for one in events.read(folder / "events.jsonl") if isinstance(one, kind)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / sealing.TRAIL).read_bytes().splitlines()]


@pytest.mark.parametrize(("way", "algorithm"), [("masked", "scaffold"), ("three-party", "fedavg")])
def test_a_round_whose_site_is_gone_is_given_up_and_the_run_goes_on(
    way: str, algorithm: str, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Before, every resumption ended at the same round."""
    study = study_of(tmp_path, way).set("training.algorithm", algorithm)
    run = tmp_path / "run"
    stop(study, run, 2)
    before = weights(run)
    leave()
    for _ in range(2):
        stopped = medfed.resume(run)
        assert (
            not stopped.complete
            and "give the round up (`medfed give-up" in stopped.summary["reason"]
        )
    assert runs.give_up(run, "its machine burnt down", "Ada") == 2

    ended = medfed.resume(run)
    skipped = {"round": 2, "operator": "Ada", "reason": "its machine burnt down"}
    assert ended.summary["given_up"] == [skipped]
    assert ended.summary["rounds"] == 3 and ended.summary["status"] == "incomplete"
    assert ended.summary["reason"].startswith("rounds given up: 2; some sites were left out")
    assert [one.round for one in told(run, events.RoundFinished)] == [1, 3, 4]
    assert told(run, events.GivenUp) == [events.GivenUp(**skipped)]
    second = next(run.glob("checkpoints/round-000002.checkpoint"))
    assert torch.equal(checkpoints._read(second)[0].w_P, before)
    assert not torch.equal(ended.w_P, before)

    checked = verify_run(run, tmp_path / "members")
    assert checked.rounds == 3
    assert "Given up, on record: round 2 by Ada (its machine burnt down)." in checked.told
    assert medfed.resume(run).summary["given_up"] == [skipped]  # is not told a second time
    assert told(run, events.GivenUp) == [events.GivenUp(**skipped)]
    assert verify_run(run).rounds == 3


@pytest.mark.parametrize("tries", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_what_was_paid_for_a_round_that_is_given_up_stays_counted(
    way: str, tries: int, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """The plan holds what ledgers hold, without a round to spare for the one that was given up."""
    spare = tries if way == "masked" else 0  # masked rounds are paid for each time
    text = PRIVATE.replace("[privacy]", f"[privacy]\nspare_rounds = {spare}")
    study = study_of(tmp_path, way, text)
    run = tmp_path / "run"
    stop(study, run, 2)
    leave()
    for _ in range(tries):
        assert "already (round 2" in medfed.resume(run).summary["reason"]
    runs.give_up(run, "gone", "Ada")
    ended = medfed.resume(run)
    assert ended.summary["rounds"] == 3, ended.summary["reason"]

    with Ledger.open(run / "sites" / "ledger.sqlite", read_only=True) as book:
        rows = [row for row in book.rows() if row["label"] == "round"]
    paid = Counter(str(row["site"]) for row in rows)
    claim = claims.read(run)
    assert paid[GONE] == 2 and {paid[name] for name in SITES[:-1]} == {4 + spare}
    assert claim["rounds"]["paid"] == 4 + spare == max(paid.values())
    assert 0.99 * study.privacy.epsilon < claim["epsilon"] <= study.privacy.epsilon
    assert claim["epsilon"] >= claim["composition"]["ledger"]["epsilon_all_runs"] - 1e-9
    verify_run(run, tmp_path / "members")


@pytest.mark.parametrize(
    ("way", "at"),
    [
        *(("masked", at) for at in ("trail", "event", "checkpoint", "after")),
        ("three-party", "trail"),
    ],
)
def test_a_crash_while_a_round_is_given_up_gives_it_up_once(
    way: str, at: str, tmp_path: Path, leave: Callable[[], None]
) -> None:
    study = study_of(tmp_path, way)
    run = tmp_path / "run"
    stop(study, run, 3)
    leave()
    runs.give_up(run, "gone", "Ada")

    append = Trail.append
    emit = events.Log.emit
    write = drive.write_checkpoint

    def cut(self: Trail, kind: str, facts: Any) -> None:
        append(self, kind, facts)
        if kind == "given up":
            raise Crash

    def cut_log(self: events.Log, event: events.Event) -> None:
        emit(self, event)
        if isinstance(event, events.GivenUp):
            raise Crash

    def cut_checkpoint(folder: Path, server: Any, *more: Any) -> None:
        if at == "after":
            write(folder, server, *more)
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        if at == "trail":
            patch.setattr(Trail, "append", cut)
        elif at == "event":
            patch.setattr(events.Log, "emit", cut_log)
        else:
            patch.setattr(drive, "write_checkpoint", cut_checkpoint)
        with pytest.raises(Crash):
            medfed.resume(run)
    if at != "after":
        with pytest.raises(RunError, match="round 3 is given up already"):
            runs.give_up(run, "gone", "Ada")
    else:
        with pytest.raises(RunError, match="round 4 has not failed since"):
            runs.give_up(run, "gone", "Ada")

    ended = medfed.resume(run)
    assert [one.round for one in told(run, events.RoundFinished)] == [1, 2, 4]
    assert [one["round"] for one in ended.summary["given_up"]] == [3]
    kinds = [(one["kind"], one["facts"].get("round")) for one in lines(run)]
    assert kinds.count(("given up", 3)) == 1
    assert verify_run(run, tmp_path / "members").rounds == 3


def test_a_damaged_checkpoint_of_a_round_that_was_given_up_leads_back_to_it(
    tmp_path: Path, leave: Callable[[], None]
) -> None:
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    leave()
    runs.give_up(run, "gone", "Ada")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "run_round", stop_here)
        with pytest.raises(Crash):
            medfed.resume(run)
    (run / "checkpoints" / "round-000002.checkpoint").write_bytes(b"torn")
    ended = medfed.resume(run)
    assert ended.summary["rounds"] == 3 and [o["round"] for o in ended.summary["given_up"]] == [2]
    assert verify_run(run).rounds == 3


def stop_here(*said: Any) -> Any:
    raise Crash


def test_the_last_round_is_given_up(tmp_path: Path, leave: Callable[[], None]) -> None:
    study = study_of(tmp_path, "masked")
    run = tmp_path / "run"
    stop(study, run, 4)
    before = weights(run)
    leave()
    runs.give_up(run, "gone", "Ada")
    ended = medfed.resume(run)
    assert torch.equal(ended.w_P, before) and ended.summary["reason"] == "rounds given up: 4"
    assert ended.summary["test"] is not None and verify_run(run).rounds == 3
    with pytest.raises(RunError, match="all 4 rounds are behind"):
        runs.give_up(run, "gone", "Ada")


def test_what_cannot_be_given_up_is_refused(tmp_path: Path) -> None:
    study = study_of(tmp_path, "masked").set("training.rounds", 2)
    run = tmp_path / "run"
    stop(study, run, 1)
    for reason, operator in (("", "Ada"), ("gone", " ")):
        with pytest.raises(RunError, match="expected both"):
            runs.give_up(run, reason, operator)
    with files.hold(run), pytest.raises(RunError, match="is in use by another run"):
        runs.give_up(run, "gone", "Ada")
    with pytest.raises(RunError, match="is not a run folder"):
        runs.give_up(tmp_path, "gone", "Ada")
    assert not (run / runs.GIVEN_UP).exists()
    assert medfed.resume(run).complete
    with pytest.raises(RunError, match="is complete"):
        runs.give_up(run, "gone", "Ada")

    medfed.run(study.set("security.aggregation", "plain"), tmp_path / "open")
    (tmp_path / "open" / "summary.json").unlink()
    with pytest.raises(RunError, match="played again with whoever is there"):
        runs.give_up(tmp_path / "open", "gone", "Ada")


def test_a_plain_round_is_not_given_up_by_a_file_put_there(tmp_path: Path) -> None:
    study = study_of(tmp_path, "plain")
    crashed(study, tmp_path / "run", 2)
    line = {"round": 2, "operator": "Eve", "reason": "none"}
    (tmp_path / "run" / runs.GIVEN_UP).write_text(json.dumps(line) + "\n")
    with pytest.raises(RunError, match="so no round is given up; remove"):
        medfed.resume(tmp_path / "run")


@pytest.mark.parametrize("claim", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_opened_round_is_given_up_only_where_noise_hides_its_rows(
    way: str, claim: bool, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Its sum and the next one's are of one model: their difference is the row of who is gone."""
    text = PRIVATE.replace("[privacy]", "[privacy]\nspare_rounds = 1") if claim else STUDY
    study = study_of(tmp_path, way, text)
    run = tmp_path / "run"
    crashed(study, run, 2)
    with pytest.raises(RunError, match="round 2 has not failed since"):
        runs.give_up(run, "gone", "Ada")  # it ended, and is played again
    leave()
    assert "give the round up" in medfed.resume(run).summary["reason"]
    if not claim:
        with pytest.raises(RunError, match="it would tell those of whoever is gone"):
            runs.give_up(run, "gone", "Ada")
        return
    runs.give_up(run, "gone", "Ada")
    assert medfed.resume(run).summary["rounds"] == 3
    verify_run(run)


# who writes in the folder, without the coordinator's key -------------------------------------------


def write_signed(run: Path, study: Study, **facts: Any) -> None:
    """Write what the operator's own command would refuse, with the coordinator's keys."""
    name = json.loads((run / "plan.json").read_text())["run"]
    word = decisions.sign_off("gone", "Ada", "a test")
    decisions.write_down(run / runs.GIVEN_UP, study, name, word | facts)


def cut_from(run: Path, kind: str, round: int) -> None:
    """Cut a trail before its last line of this kind and round."""
    path = run / sealing.TRAIL
    kept = path.read_bytes().splitlines(keepends=True)
    told = [(one["kind"], one["facts"].get("round")) for one in map(json.loads, kept)]
    at = len(told) - 1 - told[::-1].index((kind, round))
    path.write_bytes(b"".join(kept[:at]))


def by_hand(run: Path, **facts: Any) -> None:
    """Write a line into what operators have given up, as whoever can write there does."""
    line = {"round": 2, "reason": "gone", "operator": "Ada", "time": "2026-01-01T00:00:00+00:00"}
    with open(run / runs.GIVEN_UP, "a", encoding="utf-8") as file:
        file.write(json.dumps(line | facts) + "\n")


@pytest.mark.parametrize("round", [2, 3])
def test_a_line_by_hand_gives_nothing_up(
    round: int, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Before, it was taken for the operator's word, of whatever round, and signed as such."""
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    leave()
    by_hand(run, round=round)
    before = (run / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match="is not what `medfed give-up` writes"):
        medfed.resume(run)
    with pytest.raises(RunError, match="is not what `medfed give-up` writes"):
        runs.give_up(run, "gone", "Ada")
    assert (run / "events.jsonl").read_bytes() == before


def signed_by(key: Identity, run: Path, /, **facts: Any) -> str:
    """Return a line as `medfed give-up` writes it, under a key of somebody's."""
    name = json.loads((run / "plan.json").read_text())["run"]
    entry = {"run": name, "number": 0, "round": 2, **decisions.sign_off("gone", "Ada", "a test")}
    entry |= {"key": key.public.signing.hex(), **facts}
    signature = key.sign(decisions._signing_input(run / runs.GIVEN_UP, entry)).hex()
    return json.dumps({**entry, "signature": signature}) + "\n"


FORGED: dict[str, Callable[[Identity, Identity, Path], str]] = {
    "a site's key": lambda me, site, run: signed_by(site, run),
    "another run": lambda me, site, run: signed_by(me, run, run="another"),
    "another place": lambda me, site, run: signed_by(me, run, number=1),
    "twice": lambda me, site, run: signed_by(me, run) * 2,
    "a round that is none": lambda me, site, run: signed_by(me, run, round=True),
    "a round in the future": lambda me, site, run: signed_by(me, run, round=3),
    "a round that is behind": lambda me, site, run: signed_by(me, run, round=1),
    "another reason": lambda me, site, run: signed_by(me, run).replace("gone", "lost"),
    "a second reason": lambda me, site, run: signed_by(me, run).replace(
        '"reason"', '"reason": "a", "reason"'
    ),
    "an escape": lambda me, site, run: signed_by(me, run, reason="gone\x1b[2J"),
    "half a letter": lambda me, site, run: signed_by(me, run, operator="\ud800"),
    "a book": lambda me, site, run: signed_by(me, run, reason="a" * 100_000),
}


@pytest.fixture(scope="module")
def stuck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is stuck in round 2."""
    place = tmp_path_factory.mktemp("stuck")
    stop(study_of(place, "masked"), place / "run", 2)
    return place


@pytest.mark.parametrize("forgery", FORGED)
def test_a_line_that_no_operator_of_this_run_signed_for_this_round_is_refused(
    forgery: str, stuck: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stuck / "run", run)
    me, site = (key_files.load(stuck / "keys" / f"{n}.key") for n in ("coordinator", SITES[0]))
    (run / runs.GIVEN_UP).write_text(FORGED[forgery](me, site, run))
    with pytest.raises(RunError, match=r"given-up\.jsonl.*(restore|take the line out)"):
        medfed.resume(run)


def test_what_was_given_up_is_not_read_through_a_link(stuck: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stuck / "run", run)
    me = key_files.load(stuck / "keys" / "coordinator.key")
    (tmp_path / "elsewhere").write_text(signed_by(me, run))
    (run / runs.GIVEN_UP).symlink_to(tmp_path / "elsewhere")
    for go_on in (medfed.resume, lambda folder: runs.give_up(folder, "gone", "Ada")):
        with pytest.raises(TrailError, match="is a link"):
            go_on(run)


def test_a_revoked_coordinator_gives_nothing_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    study = study_of(tmp_path, "masked")
    stop(study, run, 2)
    runs.give_up(run, "gone", "Ada")
    found = consortium.read(tmp_path / "members")
    boss = key_files.load(tmp_path / "keys" / "consortium.key")
    assert found.authority == boss.public
    consortium.revoke(tmp_path / "members", boss, "coordinator", "stolen")
    with pytest.raises(RunError, match="no key of a coordinator on the list"):
        medfed.resume(run)


def test_the_file_is_removed_between_trail_and_checkpoint(
    tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Before, the round was played after all, and the run lost: found by `verify` alone."""
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    leave()
    runs.give_up(run, "gone", "Ada")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "write_checkpoint", stop_here)
        with pytest.raises(Crash):
            medfed.resume(run)
    (run / runs.GIVEN_UP).unlink()
    ended = medfed.resume(run)
    assert ended.summary["given_up"] == [{"round": 2, "operator": "Ada", "reason": "gone"}]
    assert verify_run(run).rounds == 3


def test_rounds_are_not_given_up_where_no_record_outlasts_the_run(tmp_path: Path) -> None:
    """Nobody could sign it, and nobody needs it: parties without keys of their own forget."""
    study = study_of(tmp_path, "masked")
    study = study._with({"security.federation": "", "security.keys": ""})
    stop(study, tmp_path / "run", 2)
    with pytest.raises(RunError, match=r"security\.federation is not set.*with whoever is there"):
        runs.give_up(tmp_path / "run", "gone", "Ada")
    by_hand(tmp_path / "run")
    with pytest.raises(RunError, match=r"so no round is given up; remove given-up\.jsonl"):
        medfed.resume(tmp_path / "run")
    (tmp_path / "run" / runs.GIVEN_UP).unlink()
    assert medfed.resume(tmp_path / "run").complete


@pytest.mark.parametrize("way", WAYS)
def test_an_opened_round_is_not_given_up_by_the_operators_own_line(
    way: str, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """The command alone looked at what was opened: the difference of the two sums was the row of
    whoever is gone, and the trail held.
    """
    run = tmp_path / "run"
    study = study_of(tmp_path, way)
    crashed(study, run, 2)
    leave()
    write_signed(run, study, round=2)
    with pytest.raises(RunError, match="it would tell those of whoever is gone"):
        medfed.resume(run)


@pytest.mark.parametrize("at", ["crashed", "stopped", "resumed"])
def test_a_trail_that_was_cut_by_what_was_opened_is_not_gone_on_with(
    at: str, tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Without its last opened sum the round could be given up, and the trail still held."""
    run = tmp_path / "run"
    crashed(study_of(tmp_path, "masked"), run, 2)
    leave()
    if at != "crashed":
        assert "give the round up" in medfed.resume(run).summary["reason"]
    if at == "resumed":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drive, "run_round", stop_here)
            with pytest.raises(Crash):
                medfed.resume(run)
    cut_from(run, "opened sum", 2)
    for go_on in (medfed.resume, lambda folder: runs.give_up(folder, "gone", "Ada")):
        with pytest.raises(TrailError, match="lines are missing"):
            go_on(run)


def test_a_trail_that_others_wrote_lines_into_is_not_gone_on_with(
    tmp_path: Path, leave: Callable[[], None]
) -> None:
    """Under a key of its own, a round that is given up, as its trail alone would tell."""
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    leave()
    eve = Identity.new("coordinator", "coordinator")
    trail = Trail.open(run / sealing.TRAIL, eve.name, eve.public.signing, eve.sign)
    facts = {"round": 2, "operator": "Ada", "reason": "gone", "model": "00", "previous": "00"}
    trail.append("given up", facts)
    with pytest.raises(TrailError, match=r"signed with keys that .* never approved"):
        medfed.resume(run)


# who changes what is on record ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def given_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of which round 2 was given up."""
    place = tmp_path_factory.mktemp("given-up")
    stop(study_of(place, "masked"), place / "run", 2)
    runs.give_up(place / "run", "gone", "Ada")
    medfed.resume(place / "run")
    verify_run(place / "run", place / "members")
    return place


@pytest.fixture
def run(given_up: Path, tmp_path: Path) -> Path:
    shutil.copytree(given_up / "run", tmp_path / "run")
    return tmp_path / "run"


def rewrite(
    run: Path, key: Identity, change: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    """Write a trail anew as its coordinator can, with an end that binds the folder as it is now."""
    old = lines(run)
    (run / sealing.TRAIL).unlink()
    trail: Trail | None = None
    previous = {0: bytes(32).hex()}
    for one in [made for entry in old for made in change(entry)]:
        facts = one["facts"]
        if one["kind"] == "opened":
            trail = Trail.open(run / sealing.TRAIL, key.name, key.public.signing, key.sign)
            continue
        assert trail
        if one["kind"] in ("opened sum", "given up"):
            facts = facts | {"previous": previous.get(facts["round"] - 1, facts["previous"])}
            previous[facts["round"]] = facts["model"]
        if one["kind"] == "finished":
            log = sealing.digest_file(run / "events.jsonl")
            facts = facts | {"files": facts["files"] | {"events.jsonl": log}}
        trail.append(one["kind"], facts)
    assert trail
    summary = json.loads((run / "summary.json").read_text())
    summary["trail"] = {"entries": trail.number, "head": trail.head}
    (run / "summary.json").write_text(json.dumps(summary))


def edit_log(run: Path, change: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> None:
    path = run / "events.jsonl"
    made = [one for line in path.read_text().splitlines() for one in change(json.loads(line))]
    path.write_text("".join(json.dumps(one) + "\n" for one in made))


def drop_event(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if one["event"] == "given_up" else [one]


def invent_event(one: dict[str, Any]) -> list[dict[str, Any]]:
    if one["event"] != "given_up":
        return [one]
    return [one, one | {"round": 3}]


def other_reason(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [one | {"reason": "no reason"} if one["event"] == "given_up" else one]


def drop_line(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [] if one["kind"] == "given up" else [one]


def drop_line_and_chain(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Have the next round follow nothing: what no line says is not what one says."""
    if one["kind"] == "opened sum" and one["facts"]["round"] == 3:
        return [one | {"facts": one["facts"] | {"previous": None}}]
    return drop_line(one)


def twice(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [one, one] if one["kind"] == "given up" else [one]


def open_it_too(one: dict[str, Any]) -> list[dict[str, Any]]:
    if one["kind"] != "given up":
        return [one]
    facts = one["facts"] | {"accepted": list(SITES), "excluded": {}, "uploads": {}, "sum": ""}
    return [one, one | {"kind": "opened sum", "facts": facts}]


def open_it_first(one: dict[str, Any]) -> list[dict[str, Any]]:
    """As a line by hand had it signed."""
    return open_it_too(one)[::-1]


def invent_line(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Say that a round was given up that was not."""
    if one["kind"] != "opened sum" or one["facts"]["round"] != 3:
        return [one]
    return [
        one | {"kind": "given up", "facts": one["facts"] | {"operator": "Ada", "reason": "gone"}}
    ]


def same(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [one]


TOLD = "tells of rounds given up"
ATTACKS = {
    "opened before": (same, open_it_first, "was opened before it was given up, and no noise"),
    "event removed": (drop_event, same, TOLD),
    "event invented": (invent_event, same, TOLD),
    "another reason": (other_reason, same, TOLD),
    "line removed": (same, drop_line, "does not follow the one before"),
    "line removed, chain mended": (same, drop_line_and_chain, "does not follow the one before"),
    "both removed": (drop_event, drop_line_and_chain, "does not follow the one before"),
    "given up twice": (same, twice, "is given up a second time"),
    "opened afterwards": (same, open_it_too, "is opened after it was given up"),
    "line invented": (same, invent_line, TOLD),
    "both invented": (invent_event, invent_line, "round 3 was neither"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_record_of_what_was_given_up_that_its_coordinator_changed_is_refused(
    attack: str, given_up: Path, run: Path
) -> None:
    """Even who holds the coordinator's key must tell log and trail alike, and every round."""
    key = key_files.load(given_up / "keys" / "coordinator.key")
    rewrite(run, key, same)
    verify_run(run, given_up / "members")
    change_log, change_trail, found = ATTACKS[attack]
    edit_log(run, change_log)
    rewrite(run, key, change_trail)
    with pytest.raises(TrailError, match=found):
        verify_run(run, given_up / "members")


@pytest.mark.parametrize("change", [drop_event, invent_event, other_reason])
def test_an_event_that_others_changed_is_refused(
    change: Callable[[dict[str, Any]], list[dict[str, Any]]], given_up: Path, run: Path
) -> None:
    edit_log(run, change)
    with pytest.raises(TrailError, match=r"events\.jsonl has sha256"):
        verify_run(run, given_up / "members")


def test_a_line_that_others_took_out_is_refused(given_up: Path, run: Path) -> None:
    path = run / sealing.TRAIL
    kept = [line for line in path.read_bytes().splitlines() if b'"given up"' not in line]
    path.write_bytes(b"".join(line + b"\n" for line in kept))
    with pytest.raises(TrailError, match="does not follow the line before"):
        verify_run(run, given_up / "members")


@pytest.mark.parametrize("text", ["{}\n", '{"round": 2}\n', "garbage\n", '{"round": "2"}\n'])
def test_a_damaged_file_of_what_was_given_up_is_never_an_empty_one(text: str, run: Path) -> None:
    (run / runs.GIVEN_UP).write_text(text)
    with pytest.raises(RunError, match="is not what `medfed give-up` writes"):
        medfed.resume(run)


KILLED = """
import os, signal, sys
import medfed
from medfed.secure.masking import MaskingServer

confirm = MaskingServer.confirm

def kill(self, envelopes):
    if self.scope.round == 2:
        confirm(self, envelopes)
        os.kill(os.getpid(), signal.SIGKILL)
    return confirm(self, envelopes)

MaskingServer.confirm = kill
place = sys.argv[1]
study = medfed.load_study(place + "/study.toml").set("security.aggregation", "masked")
study = study.set("training.quorum", 0.5).set("security.federation", place + "/members")
medfed.run(study.set("security.keys", place + "/keys"), place + "/run")
"""


def test_a_killed_coordinators_round_is_given_up(tmp_path: Path, leave: Callable[[], None]) -> None:
    study_of(tmp_path, "masked")
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    ended = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    leave()
    assert runs.give_up(tmp_path / "run", "gone", "Ada") == 2
    assert medfed.resume(tmp_path / "run").summary["rounds"] == 3
    verify_run(tmp_path / "run", tmp_path / "members")


def test_the_command_gives_up_and_shows(
    tmp_path: Path, leave: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    stop(study_of(tmp_path, "masked"), run, 2)
    leave()
    words = ("give-up", run, "--reason", "mail me: ada@example.org", "--operator", "Ada")
    assert command(*words) == 0
    assert "round 2 is given up; on record: Ada" in capsys.readouterr().out
    assert command("resume", run) == 1  # not all rounds were played
    assert "round 2 was given up by Ada: [withheld" in capsys.readouterr().out
    assert command("show", run) == 0
    assert "round 2 was given up by Ada: [withheld" in capsys.readouterr().out
    assert command("report", run) == 0
    pages = "".join(path.read_text() for path in (run / "reports").glob("*.html"))
    assert "<h2>Rounds given up</h2>" in pages and "example.org" not in pages
    assert command("trail", "verify", run) == 0
