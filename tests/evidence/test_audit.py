"""Audits of twins: honest runs stand, planted bugs are caught through the real code, and what has
no power says so.
"""

import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import medfed
from medfed import cli
from medfed.core.checks import PlanError, RunError
from medfed.evidence import audit
from medfed.evidence.twin import Twin, TwinTraining, explain, updates
from medfed.screens import reports
from medfed.study import Study
from tests import planted
from tests.planted import clipping_skipped, noise_off, noise_reused
from tests.tables import PRIVATE, invented, write_study

Patch = pytest.MonkeyPatch
SMALL = (
    PRIVATE.replace("rounds = 4", "rounds = 8")
    + '[model]\nname = "mlp"\noptions = {hidden = [16]}\n'
)

pytestmark = pytest.mark.usefixtures("one_thread")


def study(*settings: str) -> Study:
    return medfed.load_study("breast-cancer", settings)


@lru_cache
def twin(*settings: str) -> Twin:
    """A twin of breast-cancer, of 10 rounds; every training of it starts afresh, so tests may share
    it.
    """
    return Twin.of(study("training.rounds=10", *settings), None, np.random.default_rng(0))


def private(folder: Path, text: str = SMALL, frame: pd.DataFrame | None = None) -> Study:
    return medfed.load_study(write_study(folder, text, frame))


# Canaries


@pytest.mark.parametrize("mode", ["shared", "site"])
def test_honest_runs_stand(mode: str) -> None:
    """The bound errs once in 20; what is measured of real noise lies so far below that four runs do
    not.
    """
    for seed in range(4):
        part = audit.one_run(twin(f"privacy.noise={mode!r}"), np.random.default_rng(seed))
        assert part.passed and part.figures["epsilon"] == 1.0
        assert (part.figures["canaries"], part.figures["guesses"]) == (100, 80)


@pytest.mark.parametrize("mode", ["shared", "site"])
@pytest.mark.parametrize("bug", [noise_off, clipping_skipped, noise_reused])
def test_planted_bugs_are_caught(
    bug: Callable[[Patch], None], mode: str, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    # canaries that cancel within themselves are for another bug, and tell little of this
    if bug is clipping_skipped:
        monkeypatch.setattr(audit, "TWINS", 10**9)
    for seed in range(2):
        part = audit.one_run(twin(f"privacy.noise={mode!r}"), np.random.default_rng(seed))
        assert part.passed is False
        assert part.figures["refuted"] > 1.5  # type: ignore[operator]
        # of rows that are not clipped, both attackers guess nearly all right
        if bug is noise_reused:
            assert "one noise for all rounds" in part.told


@pytest.mark.parametrize(
    "settings",
    [
        ("privacy.clipping='adaptive'",),
        ("privacy.clipping='fixed'", "privacy.clip=0.5"),
        ("training.algorithm='fedavgm'", "training.weight_decay=0.01"),
        ("training.algorithm='fedadam'", "training.learning_rate=0.3"),
        ("training.algorithm='fedadagrad'", "training.learning_rate=0.3"),
        (
            "model.name='mlp'",
            "model.options.hidden=[16]",
            "model.options.dropout=0.3",
            "training.learning_rate=0.5",
        ),
        ("privacy.noise='site'", "training.algorithm='scaffold'"),
        ("privacy.noise='site'", "training.algorithm='fednova'"),
        ("privacy.noise='site'", "training.algorithm='fedprox'", "training.weight_decay=0.1"),
    ],
)
def test_the_attacker_works_out_what_the_code_releases(
    settings: tuple[str, ...], monkeypatch: Patch
) -> None:
    """Without noise a release is what it is without canaries, plus the canaries that are in: two
    codes, one meaning.
    """
    noise_off(monkeypatch)
    target = twin(*settings, "training.rounds=2")
    rng = np.random.default_rng(0)
    training = TwinTraining(target)
    in_M = np.array([True, False, True, True])

    for _ in range(2):
        made = {
            name: audit._make_canaries(target, training.server.w_P, 4, rng) for name in target.sites
        }
        seen = training.round(
            {name: audit._add_canaries(target.rows[name], made[name], in_M) for name in made}
        )
        for names, update_P in updates(seen, target.plan):
            rest_P, add_MP = explain(
                target, seen, names, {name: made[name] for name in names}, update_P
            )
            in_P = torch.from_numpy(np.tile(in_M, len(names))).double() @ add_MP
            assert torch.linalg.vector_norm(add_MP[0]) == pytest.approx(1, rel=0.1)
            assert torch.linalg.vector_norm(rest_P - in_P) < 0.01 * torch.linalg.vector_norm(in_P)


@pytest.mark.parametrize(
    "settings",
    [
        ("training.local_steps=5", "training.learning_rate=1.0"),
        ("training.local_steps=5", "training.learning_rate=0.05", "training.optimizer='adam'"),
        ("training.batch_size=40",),
    ],
)
def test_what_the_attacker_cannot_see_leaves_power(
    settings: tuple[str, ...], monkeypatch: Patch
) -> None:
    """Local paths and sampled batches stay inside the site; noise that is off is found all the
    same.
    """
    noise_off(monkeypatch)
    target = twin("privacy.noise='site'", *settings)
    assert audit.one_run(target, np.random.default_rng(0)).passed is False


def test_a_claim_that_no_canaries_reach_is_not_said_to_stand() -> None:
    part = audit.one_run(twin("privacy.epsilon=8.0"), np.random.default_rng(0))
    assert part.passed is None and "epsilon 8 would stand" in part.told
    few = audit.one_run(twin(), np.random.default_rng(0), canaries=10)
    assert few.passed is None and few.to_json()["guesses"] == 0


@pytest.mark.parametrize(
    "bug", [noise_off, clipping_skipped, planted.half_the_noise_in_the_sampler]
)
@pytest.mark.parametrize("mode", ["shared", "site"])
def test_where_no_guess_can_refute_the_rest_of_the_release_does(
    bug: planted.Bug, mode: str, monkeypatch: Patch
) -> None:
    """At epsilon 8 no thousand guesses tell; but what is released less what is known is the noise,
    number by number.
    """
    target = twin("privacy.epsilon=8.0", f"privacy.noise={mode!r}")
    for seed in range(3):
        honest = audit.one_run(target, np.random.default_rng(seed))
        assert honest.passed is None and honest.figures["residual"]["p"] > 0.01  # type: ignore[index]
    bug(monkeypatch)
    part = audit.one_run(target, np.random.default_rng(0))
    assert part.passed is False and part.figures["guesses"] == 0 and "that is refused" in part.told


def test_one_canary_in_ten_has_two_records_that_cancel() -> None:
    made = audit._make_canaries(twin(), twin().plan.begin().w_P, 40, np.random.default_rng(0))
    counts = torch.bincount(made.patient)
    assert counts.tolist() == ([1] * 9 + [2]) * 4
    first, second = (made.x[made.patient == 9][k] for k in range(2))
    assert torch.allclose(first, second, rtol=2e-6) and not torch.equal(first, second)
    assert made.y[made.patient == 9].unique().numel() == 2


def test_a_training_that_breaks_down_is_not_said_to_stand(monkeypatch: Patch) -> None:
    # at sites: under joint noise a sum is held to what the declared patients can make. Squared errors
    # grow from round to round whatever is drawn; units of a network may die first.
    clipping_skipped(monkeypatch)
    wild = twin(
        "privacy.noise='site'",
        "training.learning_rate=1e5",
        "data.task='regression'",
        "data.target='mean radius'",
    )
    part = audit.one_run(wild, np.random.default_rng(0))
    assert part.passed is not True and "the training ended early: round" in part.told


# Twins


def test_private_patients_are_replaced_and_nobody_pays(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    public = private(tmp_path)
    lifetime = public.set("privacy.scope", "study")
    target = Twin.of(lifetime, None, np.random.default_rng(0))
    assert {name: len(rows) for name, rows in target.rows.items()} == public.privacy.sizes
    assert audit.one_run(target, np.random.default_rng(0)).passed
    assert not (tmp_path / "home").exists()
    own = Twin.of(public, None, np.random.default_rng(0))
    assert all(torch.equal(own.rows[name].x, site.train.x) for name, site in own.sites.items())


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_small_study_with_several_records_a_patient(
    noise: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    frame = invented()
    frame = pd.concat([frame, frame[::3].assign(age=frame["age"][::3] + 3)])
    target = Twin.of(
        private(tmp_path, frame=frame).set("privacy.noise", noise), None, np.random.default_rng(0)
    )
    assert audit.one_run(target, np.random.default_rng(0)).passed
    noise_off(monkeypatch)
    assert audit.one_run(target, np.random.default_rng(0)).passed is False


@pytest.mark.parametrize("task", ["regression", "multiclass"])
def test_other_tasks(task: str, tmp_path: Path, monkeypatch: Patch) -> None:
    column = {"regression": "age", "multiclass": "ward"}[task]
    public = private(
        tmp_path, SMALL.replace('target = "died"', f'target = "{column}"\ntask = "{task}"')
    )
    for one in (public, public.set("privacy.scope", "study")):
        made = Twin.of(one, None, np.random.default_rng(0))
        assert audit.one_run(made, np.random.default_rng(0)).passed
        assert audit.membership(made, np.random.default_rng(0), retrains=8).passed
    noise_off(monkeypatch)
    assert audit.one_run(made, np.random.default_rng(0)).passed is False


@pytest.mark.parametrize(
    "settings",
    [
        ("privacy.simulation_only=true",),
        ("privacy.epsilon=inf", "privacy.delta=1", "privacy.noise='none'"),
    ],
)
def test_where_nothing_is_claimed_nothing_is_audited(settings: tuple[str, ...]) -> None:
    with pytest.raises(PlanError, match=r"claims nothing.*Set privacy\.epsilon=1\.0"):
        twin(*settings)


# Membership

MEMORISED = """
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
preprocess = "none"
test_is_public = true
[data.dictionary.died]
categories = ["0", "1"]
[training]
rounds = 30
batch_size = 0
learning_rate = 3.0
[privacy]
epsilon = 1.0
delta = 1e-4
scope = "run"
sizes = {a = 48, b = 48}
"""


@pytest.fixture
def memorised(tmp_path: Path) -> Twin:
    """Sixty columns of noise and a coin for a label: whatever is learnt is who took part."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((120, 60)), columns=[f"gene {i}" for i in range(60)])
    frame = frame.assign(died=rng.integers(0, 2, 120), hospital=["a", "b"] * 60)
    ranges = "\n".join(f'"gene {i}" = {{range = [-6, 6]}}' for i in range(60))
    return Twin.of(private(tmp_path, f"{MEMORISED}[data.dictionary]\n{ranges}\n", frame), None, rng)


def test_noise_hides_members_who_are_found_without_it(memorised: Twin, monkeypatch: Patch) -> None:
    rng = np.random.default_rng(0)
    honest = audit.membership(memorised, rng, retrains=16)
    assert honest.passed and honest.figures["allowed"] == pytest.approx(0.05 * np.e + 1e-4)
    noise_off(monkeypatch)
    caught = audit.membership(memorised, rng, retrains=16)
    assert caught.passed is False
    assert caught.figures["tpr"]["LiRA"]["low"] > 0.2  # type: ignore[index]
    assert caught.figures["refuted"] > 1  # type: ignore[operator]


def test_membership_says_where_it_cannot_tell(memorised: Twin) -> None:
    rng = np.random.default_rng(0)
    assert (
        audit.membership(memorised, rng, 8, fpr=0.001).told
        == "not run: 48 non-members in a retrain are too few at FPR 0.1%"
    )
    assert audit.membership(memorised, rng, 8, fpr=0.4).passed is None  # e^1 0.4 is above 1
    with pytest.raises(PlanError, match="retrains=7; expected 8 or more"):
        audit.membership(memorised, rng, 7)
    with pytest.raises(PlanError, match=r"fpr=0; expected a rate in \(0, 1\)"):
        audit.membership(memorised, rng, 8, fpr=0)


# Inversion


@pytest.mark.parametrize("mode", ["shared", "site", "central"])
def test_records_are_read_without_protection_and_not_with_it(mode: str, monkeypatch: Patch) -> None:
    target = twin(f"privacy.noise={mode!r}", "model.name='mlp'", "model.options.hidden=[8]")
    part = audit.inversion(target, np.random.default_rng(0))
    assert part.passed
    similarity = part.figures["similarity"]
    read = part.figures["read"]
    assert similarity["without"] > 0.99 and abs(similarity["with"]) < 0.5  # type: ignore[index]
    assert read == {"without": 16, "with": 0}
    noise_off(monkeypatch)
    assert audit.inversion(target, np.random.default_rng(0)).passed is False


def test_a_model_that_hides_its_input_proves_nothing() -> None:
    part = audit.inversion(twin("model.name='conv1d'"), np.random.default_rng(0))
    assert part.passed is None and "does not begin with a Linear layer" in part.told


# The command


def command(*words: object) -> int:
    with Patch.context() as patch:
        patch.setattr(sys, "argv", ["medfed", "audit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def test_a_study_is_audited_in_five_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private(tmp_path)
    assert command(tmp_path / "study.toml", "--retrains", 8, "--seed", 3) == 0
    said = " ".join(capsys.readouterr().out.split())

    for words in (
        "canaries epsilon 1",
        "inversion no record is read",
        "membership TPR <= 13.6% at FPR 5.0%",
        "stands",
    ):
        assert words in said

    for words in (
        "finds an sd below",
        "of what is told",
        "finds any of these patients",
        "refutes the claim from",
    ):
        assert words in said

    assert "over 8 retrains" in said and "a finished run cannot be audited with canaries" in said


def test_an_audit_above_the_claim_has_exit_code_1(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_off(monkeypatch)
    private(tmp_path)
    assert command(tmp_path / "study.toml", "--quick", "--canaries", 40) == 1
    assert "BROKEN" in capsys.readouterr().out
    assert (
        command(tmp_path / "study.toml", "--quick", "--json", "--set", "privacy.noise='site'") == 1
    )
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False

    assert [part["name"] for part in found["parts"]] == [
        "noise",
        "sensitivity",
        "canaries",
        "inversion",
    ]
    assert [part["passed"] for part in found["parts"]][:3] == [False, True, False]
    assert found["parts"][2]["refuted"] > 1


def test_a_runs_claim_gets_the_audit_of_its_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    medfed.run(private(tmp_path), tmp_path / "run")
    before = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert command(tmp_path / "run", "--quick", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    after = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert found == after["audit"] == json.loads((tmp_path / "run" / "audit.json").read_text())
    assert {**after, "audit": None} == before and found["digest"] == before["digest"]
    line = dict(reports.claim_lines(after))["audit"]
    assert "in a twin run" in line and "inversion: of 16 records, 16 are read" in line
    assert command(tmp_path / "run", "--set", "training.rounds=2") == 2
    assert "its study is frozen" in capsys.readouterr().err


def test_a_run_without_a_claim_is_refused(tmp_path: Path) -> None:
    medfed.run(medfed.load_study(write_study(tmp_path)), tmp_path / "run")
    with pytest.raises(RunError, match="holds no claim"):
        audit.audit_run(tmp_path / "run")


@pytest.mark.slow
def test_the_bundled_study_stands() -> None:
    found: dict[str, Any] = audit.audit_study(study())
    assert found["passed"] and [part["passed"] for part in found["parts"]] == [True] * 5
    assert found["parts"][4]["retrains"] == 64
