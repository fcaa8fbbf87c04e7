"""Algorithms are compared seed by seed on the same splits; what is chance is said to be, and what
is not is found.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

import medfed
from medfed.core.checks import PlanError
from medfed.evidence import compare
from medfed.evidence.compare import Comparison, Trained, holm, wilcoxon
from medfed.screens.reports import comparison_page
from medfed.study import Study
from tests.tables import PRIVATE, STUDY, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = ("fedavg", "fedprox", "scaffold", "fednova")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, STUDY)).set("training.rounds", 3)


def made(**curves: list[list[float]]) -> Comparison:
    """A comparison of invented runs: of each algorithm a curve a seed."""
    runs = [
        Trained(name, seed, "auroc", tuple(curve), {"accuracy": 0.9}, None, 1.0, 100)
        for name, all_of_it in curves.items()
        for seed, curve in enumerate(all_of_it)
    ]
    return Comparison("invented", "none", tuple(runs))


def test_every_algorithm_gets_the_same_seeds_and_is_really_trained(study: Study) -> None:
    found = compare.compare(study, FOUR, seeds=2)
    assert (
        [run.seed for run in found.of("fedavg")]
        == [run.seed for run in found.of("scaffold")]
        == [3, 4]
    )
    alone = medfed.simulate(
        study.set("training.algorithm", "scaffold").set("study.seed", 4)
    ).summary
    assert found.of("scaffold")[1].curve_T[-1] == alone["test"]["auroc"]
    assert len({run.curve_T for run in found.runs}) > 2 and all(
        len(run.curve_T) == 3 for run in found.runs
    )
    # control variates travel too
    assert found.of("scaffold")[0].bytes_up > found.of("fedavg")[0].bytes_up


def test_processes_find_what_one_does(study: Study) -> None:
    one, two = (compare.compare(study, FOUR[:2], seeds=2, workers=workers) for workers in (1, 2))
    assert [run.curve_T for run in one.runs] == [run.curve_T for run in two.runs]


def test_the_same_twice_is_no_difference() -> None:
    curve = [[0.6 + 0.01 * s, 0.8 + 0.01 * s] for s in range(10)]
    found = made(a=curve, b=curve)
    assert all(one.p == 1 and one.mean == 0 for one in found.differences())
    assert found.verdicts()[:2] == [
        "final score: no significant difference",
        "rounds to target: no significant difference",
    ]
    assert "no significant difference" in found.verdicts()[-1]


def test_what_is_worse_is_found(study: Study) -> None:
    """Ten seeds, one algorithm a little lower in each: chance gives that in 2 of 1,024."""
    good = [[0.6, 0.8 + 0.001 * s] for s in range(10)]
    bad = [[0.6, 0.79 + 0.001 * s] for s in range(10)]
    found = made(good=good, bad=bad)
    (final,) = [one for one in found.differences() if one.figure == "final score"]
    assert (
        final.significant
        and final.p == pytest.approx(2 / 1024)
        and final.mean == pytest.approx(0.01)
    )
    assert "final score: good leads, significantly better than bad" in found.verdicts()


def test_what_scatters_is_found() -> None:
    still = [[0.5, 0.8 + 0.0001 * s] for s in range(10)]
    wild = [[0.5, 0.8 + 0.02 * (s % 5 - 2)] for s in range(10)]
    assert (
        made(still=still, wild=wild)
        .verdicts()[-1]
        .startswith("scatter over seeds: still scatters least")
    )


def test_rounds_are_counted_to_the_target() -> None:
    found = made(a=[[0.5, 0.9, 1.0]] * 2, b=[[0.5, 0.6, 0.7]] * 2)
    assert found.target == 0.99
    assert [found.rounds_to_target(run) for run in found.runs] == [3, 3, 4, 4]
    assert [line["reached"] for line in found.table()] == [2, 0]


def test_p_values_are_wilcoxons_and_holms() -> None:
    assert wilcoxon([0.0, 0.0]) == 1
    assert wilcoxon([1.0, 2, 3, -4, 5]) == stats.wilcoxon([1, 2, 3, -4, 5]).pvalue
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_equal_epsilon_under_each_sites_noise(tmp_path: Path) -> None:
    private = medfed.load_study(write_study(tmp_path, PRIVATE)).set("training.rounds", 2)
    found = compare.compare(private, FOUR[:2], seeds=2, noise="site")
    spent = [line["epsilon"] for line in found.table()]
    assert spent[0] == pytest.approx(spent[1]) and spent[0] <= private.privacy.epsilon
    with pytest.raises(PlanError, match="coincide"):
        compare.compare(private, FOUR)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"algorithms": ("fedavg", "scafold")}, "did you mean 'scaffold'"),
    "twice": ({"algorithms": ("fedavg", "fedavg")}, "each once"),
    "alone": ({"algorithms": ("fedavg",)}, "two or more"),
    "one seed": ({"seeds": 1}, "2 or more"),
    "noise": ({"noise": "loud"}, "expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused(study: Study, name: str) -> None:
    words, said = REFUSED[name]
    with pytest.raises(PlanError, match=said):
        compare.compare(**({"study": study, "algorithms": FOUR} | words))


def test_the_command_shows_and_writes(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "compare",
        tmp_path / "study.toml",
        "--algorithms",
        "fedavg,fedprox",
        "--seeds",
        2,
        "--workers",
        1,
    )

    assert command(*words, "--set", "training.rounds=2", "--out", tmp_path / "page.html") == 0
    out = capsys.readouterr().out
    assert "fedprox" in out and "scatter over seeds" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count("<polyline") == 2 and "http" not in page
    assert command(*words, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 4


def test_a_page_escapes_what_it_is_told() -> None:
    found = {
        **made(a=[[0.5, 0.6]] * 2, b=[[0.5, 0.7]] * 2).to_json(),
        "study": "<script>alert(1)</script>",
    }
    assert "<script>" not in comparison_page(found)
