"""A run that ended incomplete goes on and is killed: what it came to before is not shown as what it
comes to.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import medfed
from medfed import runs
from medfed.core.checks import KeyFileError, NoEndError, QuorumError, RunError, TrailError
from medfed.privacy.ledger import Ledger
from medfed.rounds import checkpoints
from medfed.runs import claims, drive
from medfed.runs.results import is_complete
from medfed.runs.verification import verify_run
from medfed.study import Study
from tests.runs.test_giving_up import stop, study_of
from tests.runs.test_once import federated
from tests.tables import PRIVATE
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return federated(tmp_path, PRIVATE, {"security.aggregation": "masked"})


def end_at(round: int, error: BaseException, go_on: Any) -> Any:
    """Have a run end by an error where it comes to a round."""
    real = drive.run_round

    def play(server: Any, *rest: Any) -> Any:
        if server.round + 1 == round:
            raise error
        return real(server, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "run_round", play)
        return go_on()


def paid(run: Path) -> int:
    """Return how many rounds the ledger holds of the site that has paid for most."""
    with Ledger.open(run / "sites" / "ledger.sqlite", read_only=True) as book:
        told = Counter(row["site"] for row in book.rows() if row["label"] == "round")
    return max(told.values())


def test_what_a_killed_resumption_leaves_tells_nothing_below_the_ledger(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, claim and summary stayed as the earlier end had written them, and told less than
    patients had spent.
    """
    run = tmp_path / "run"
    stopped = end_at(2, QuorumError("one site is away"), lambda: medfed.run(study, run))
    assert not stopped.complete and claims.read(run)["rounds"]["paid"] == 1 == paid(run)
    with pytest.raises(KeyboardInterrupt):
        end_at(4, KeyboardInterrupt(), lambda: medfed.resume(run))
    assert paid(run) == 3

    with pytest.raises(RunError, match=r"holds no claim: .* the run has not ended"):
        claims.read(run)
    assert not (run / "summary.json").exists()
    with pytest.raises(RunError, match=r"`medfed resume .*` finishes the run"):
        medfed.load(run)
    with pytest.raises(NoEndError, match="medfed resume"):
        verify_run(run)
    capsys.readouterr()
    assert command("show", run, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "incomplete" and told["rounds"] == 3 and told["reason"] is None
    assert command("report", run) == 0
    assert "the run has not ended" in (run / "reports" / "privacy_audit.html").read_text()

    assert medfed.resume(run).complete
    assert claims.read(run)["rounds"]["paid"] == paid(run)
    assert json.loads((run / "summary.json").read_text())["status"] == "complete"
    assert command("report", run) == 0
    verify_run(run)


def test_a_resumption_that_is_refused_leaves_all_as_it_was(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    end_at(2, QuorumError("one site is away"), lambda: medfed.run(study, run))
    names = ("summary.json", "privacy.json", "model.safetensors", "events.jsonl")
    before = {name: (run / name).read_bytes() for name in names}
    key = next((tmp_path / "keys").glob("north.key"))
    key.rename(tmp_path / "elsewhere.key")
    with pytest.raises(KeyFileError):
        medfed.resume(run)
    assert {name: (run / name).read_bytes() for name in names} == before
    verify_run(run)
    (tmp_path / "elsewhere.key").rename(key)
    assert medfed.resume(run).complete


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"trail": 5}', '{"trail": {"head": ""}}', "\ud800", "[" * 100_000]
)
def test_a_damaged_summary_is_told_by_name(text: str, study: Study, tmp_path: Path) -> None:
    """Before, whoever asked whether a run was complete got a traceback."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RunError, match=r"summary\.json is damaged .*medfed resume"):
        is_complete(run)


# a state that is not the coordinator's ------------------------------------------------------------


@pytest.mark.parametrize("way", ["masked", "three-party"])
def test_an_older_model_under_a_later_rounds_name_is_not_gone_on_with(
    tmp_path: Path, way: str
) -> None:
    """Who writes in the folder needs no key for it: round 1's weights in the checkpoint of round 2,
    so that a model is played twice over other sites, and their sums' difference is a row.
    """
    run = tmp_path / "run"
    stop(study_of(tmp_path, way), run, 3)
    folder = run / "checkpoints"
    first, last = sorted(folder.glob("*"))[-2:]
    old, before = checkpoints._read(first)
    new, header = checkpoints._read(last)
    assert (old.round, new.round) == (1, 2)
    signed = {"signature", "trail"}
    lies = {
        "weights": (replace(new, w_P=old.w_P), header),
        "with the old signature": (
            replace(old, round=2),
            {**header, **{name: before[name] for name in signed}},
        ),
        "unsigned": (
            replace(new, w_P=old.w_P),
            {name: value for name, value in header.items() if name not in signed},
        ),
        "no signature": (new, {**header, "signature": None}),
    }
    for server, told in lies.values():
        checkpoints._write(folder, server, {k: v for k, v in told.items() if k != "round"})
        with pytest.raises(TrailError, match="is not what the coordinator signed"):
            medfed.resume(run)
        with pytest.raises(TrailError, match="is not what the coordinator signed"):
            runs.give_up(run, "the site is gone", "Ada")
    checkpoints._write(folder, new, {k: v for k, v in header.items() if k != "round"})
    assert medfed.resume(run).complete
