"""Whole runs whose rows nobody sees: the same model as in the open, bit for bit, and noise from
several holders.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import MedfedError, PlanError
from medfed.core.entropy import Entropy
from medfed.links.wire import NoiseShare, noise_share
from medfed.node import site
from medfed.node.inprocess import InProcess
from medfed.planning import terms
from medfed.planning.resolved import holders, least_rows
from medfed.privacy.guarantee import GRID, resolve
from medfed.rounds.prepare import prepare
from medfed.study import Study
from tests.tables import PRIVATE, SITES, STUDY, invented, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = ("masked", "three-party")


@pytest.fixture
def open_study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, STUDY))


@pytest.fixture
def private(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, PRIVATE))


# the same model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova", "fedadam"])
def test_masked_and_three_party_train_the_same_bits(open_study: Study, algorithm: str) -> None:
    """Both sum the same whole numbers, so masks and shares leave no trace; the open run differs by
    rounding alone.
    """
    study = open_study.set("training.algorithm", algorithm)
    masked, shared = (medfed.simulate(study.set("security.aggregation", way)).w_P for way in WAYS)
    assert torch.equal(masked, shared)
    torch.testing.assert_close(masked, medfed.simulate(study).w_P, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_seeded_joint_noise_gives_the_bits_of_the_open_run(private: Study, way: str) -> None:
    """Rows on the noise's grid are whole numbers already: a secure sum is the open sum, exactly."""
    study = private.set("privacy.simulation_only", True)
    secure = medfed.simulate(study.set("security.aggregation", way))
    assert torch.equal(secure.w_P, medfed.simulate(study).w_P)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "settings", [{}, {"privacy.clipping": "adaptive"}, {"privacy.noise": "site"}]
)
def test_a_private_run_keeps_its_promise_and_says_who_is_trusted(
    private: Study, way: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    study = private.set("security.aggregation", way)
    for key, value in settings.items():
        study = study.set(key, value)
    result = medfed.run(study, tmp_path / "run")
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert result.complete and claim["epsilon"] <= 1
    trusted = {"masked": "stay to the end", "three-party": "any two of the three"}[way]
    assert (trusted in claim["trust_model"]) == (study.privacy.noise != "site")
    if not settings.get("privacy.noise"):
        excess = {"masked": 1, "three-party": math.sqrt(3 / 2)}[way]
    else:
        excess = 1
    assert claim["noise"]["noise_sd_ratio"] == pytest.approx(excess)


def test_a_lost_loss_is_not_told(open_study: Study) -> None:
    """One site's loss is a number of that site alone."""
    told: list[Any] = []
    medfed.simulate(open_study.set("security.aggregation", "three-party"), listeners=[told.append])
    rounds = [event for event in told if type(event).__name__ == "RoundFinished"]
    assert rounds and all(event.loss is None and set(event.losses) == {None} for event in rounds)


# noise from several holders -----------------------------------------------------------------------


@pytest.mark.parametrize("holders", [1, 2, 4])
def test_any_holders_make_the_variance_that_is_asked(private: Study, holders: int) -> None:
    g = resolve(private, dict(private.privacy.sizes), 2000)
    parts = sum(noise_share(g, holders)(2000, Entropy()).astype(float) for _ in range(holders))
    said = stats.chi2(2000).cdf(float(((parts / g.sigma_units()) ** 2).sum()))
    assert 1e-4 < said < 1 - 1e-4
    wrong = stats.chi2(2000).cdf(float(((parts / (1.5 * g.sigma_units())) ** 2).sum()))
    assert wrong < 1e-6  # the test would see it


def test_each_client_adds_its_own_part(private: Study) -> None:
    g = resolve(private, dict(private.privacy.sizes), 500)
    noised_KM, _ = NoiseShare(g, 2).client(torch.zeros(4, 500, dtype=torch.int64), {})
    rows = noised_KM.double() / g.sigma_units()
    assert np.allclose(rows.square().mean(1), 0.5, atol=0.2)
    assert abs(np.corrcoef(rows.numpy()) - np.eye(4)).max() < 0.25


# plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "colluding", "expected"),
    [(4, 0.3, (4, 3)), (10, 0.3, (7, 4)), (3, 0.3, (3, 3)), (10, 0.0, (6, 6))],
)
def test_least_rows_and_holders(
    open_study: Study, n: int, colluding: float, expected: tuple[int, int]
) -> None:
    study = open_study.set("security.aggregation", "masked").set("security.colluding", colluding)
    assert (least_rows(study, n), holders(study, [str(i) for i in range(n)])) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "central": ({"privacy.noise": "central"}, "privacy.noise='central'"),
    "correlated": (
        {"fleet.schedule": "cyclic", "fleet.groups": 2, "privacy.correlated": True},
        "correlated",
    ),
    "small": ({"fleet.clients_per_round": 2}, "min_group=3"),
    "names": ({"security.aggregators": ["a", "a", "b"]}, "three different names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_is_refused_before_training(private: Study, name: str) -> None:
    settings, said = REFUSED[name]
    study = private.set("security.aggregation", "three-party")._with(settings)
    with pytest.raises(MedfedError, match=said):
        medfed.simulate(study)


def test_sums_that_could_wrap_are_refused(open_study: Study) -> None:
    study = (
        open_study.set("security.aggregation", "masked")
        .set("security.bound", 1e8)
        .set("security.fraction_bits", 40)
    )
    with pytest.raises(PlanError, match="bound"):
        medfed.simulate(study)


def test_a_row_out_of_bound_is_refused_at_its_site(open_study: Study) -> None:
    study = open_study.set("security.aggregation", "three-party").set("security.bound", 1e-6)
    told: list[Any] = []
    result = medfed.simulate(study, listeners=[told.append])
    assert not result.complete and "security.bound=1e-06" in told[-1].reason


# more patients than declared ----------------------------------------------------------------------

DECLARED = 20


def _alike(patients: int) -> pd.DataFrame:
    """Return three sites; at north `patients` people with one record, so that their gradients point
    the same way.
    """
    frame = invented(400)
    one = (
        frame[frame["hospital"] == "north"]
        .iloc[:1]
        .assign(age=95.0, lactate=14.0, died="yes", held=0)
    )
    north = one.loc[one.index.repeat(patients)]
    others = (
        frame[frame["hospital"] != "north"].groupby("hospital").head(DECLARED + 4).assign(held=0)
    )
    held = frame.head(60).assign(held=1)
    both = pd.concat([north, others, held], ignore_index=True)
    return both.assign(subject=[f"p{i}" for i in range(len(both))])


def _crowded(folder: Path, patients: int, **settings: Any) -> Study:
    text = PRIVATE.replace(
        'target = "died"', 'target = "died"\ntest = "held"\nfeatures = ["age", "lactate", "ward"]'
    )
    study = medfed.load_study(write_study(folder, text, _alike(patients)))
    sizes = dict.fromkeys(("north", "south", "east"), DECLARED)
    study = replace(study, privacy=replace(study.privacy, sizes=sizes))
    return study._with(
        {"privacy.clipping": "fixed", "privacy.clip": 1e-3, "training.rounds": 2, **settings}
    )


CROWDS = (DECLARED - 1, DECLARED, DECLARED + 1, DECLARED * 3 // 2, 10 * DECLARED)


@pytest.mark.parametrize("clipping", ["fixed", "automatic", "adaptive"])
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_no_patient_decides_whether_a_row_is_accepted(
    tmp_path: Path, way: str, clipping: str
) -> None:
    """All of north's gradients are alike, so its sum is as long as it has patients; three
    aggregators hold it to what the declared number can make."""
    for patients in CROWDS if clipping == "fixed" else CROWDS[-1:]:
        settings = {"security.aggregation": way, "privacy.clipping": clipping, "training.rounds": 1}
        result = medfed.simulate(_crowded(tmp_path, patients, **settings))
        assert result.complete, (patients, result.summary["excluded"])
        assert result.summary["participation"] == dict.fromkeys(SITES, 1)


@pytest.mark.parametrize("clipping", ["fixed", "automatic", "adaptive"])
def test_a_crowded_site_sends_a_row_within_the_bound_that_one_patient_moves_by_the_sensitivity(
    tmp_path: Path, clipping: str
) -> None:
    rows = []
    for patients in (CROWDS[-1], CROWDS[-1] + 1, CROWDS[2], CROWDS[1], CROWDS[0]):
        study = _crowded(tmp_path, patients, **{"privacy.clipping": clipping})
        sites = runs.open_sites(study, None)
        plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
        sites[0].account = None
        header = {"round": 1, **({"clip": study.privacy.clip} if clipping == "adaptive" else {})}
        reply = sites[0].handle("work", codec.encode(header, {"w": plan.first_weights()}))
        rows.append(codec.decode(reply)[1]["row"].double())
    g = plan.guarantee
    bound = terms.terms_of(plan.__class__(**{**plan.__dict__, "study": _secret(study)})).bound
    assert g is not None and max(float(row.norm()) for row in rows) <= bound
    for one, other in ((rows[0], rows[1]), (rows[2], rows[3]), (rows[3], rows[4])):
        assert float((one - other)[: g.parameters].norm()) <= g.sensitivity_units()
        if clipping == "adaptive":
            assert abs(float(one[-1] - other[-1])) <= 0.5 / GRID
    shortest = 0.99 if clipping == "automatic" else 1
    # as many patients as declared are not cut
    assert float(rows[3].norm()) >= DECLARED * shortest / GRID


def _secret(study: Study) -> Study:
    return study.set("security.aggregation", "three-party")


@pytest.mark.parametrize("batch_size", [0, 8])
@pytest.mark.parametrize("noise", ["site", "shared"])
def test_a_site_answers_alike_with_nobody_with_one_and_with_one_of_many_records(
    tmp_path: Path, noise: str, batch_size: int
) -> None:
    """Alone, as at a hospital: whoever is there, the answer has the same form and nobody is named
    in a reason.
    """
    answers = []
    for patients, records in ((0, 0), (1, 1), (1, 64), (64, 1)):
        study = _crowded(tmp_path, 1, **{"privacy.noise": noise, "training.batch_size": batch_size})
        sites = runs.open_sites(study, None)
        frame = _alike(max(patients, records))
        mine = frame[(frame["hospital"] == "north") | (frame.index >= len(frame) - 60)].assign(
            hospital="north"
        )
        mine.loc[mine["held"] == 0, "subject"] = [
            f"n{i % max(patients, 1)}" for i in range(max(patients, records))
        ]
        north = site.Site.open("north", mine, sites[0].study)
        plan = prepare(sites[0].study, InProcess([north, *sites[1:]]), list(SITES))
        assert len(north.train) == max(patients, records)
        header, tensors = codec.decode(
            north.handle("work", codec.encode({"round": 1}, {"w": plan.first_weights()}))
        )
        answers.append((header, tensors["row"].shape, tensors["row"].dtype))

    assert all(answer == answers[0] for answer in answers)
