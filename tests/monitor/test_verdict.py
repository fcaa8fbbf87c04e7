"""What figures mean, over made-up summaries: each finding where it is due, and none where a model
is good.
"""

from typing import Any

import pytest

from medfed.monitor import verdict
from medfed.monitor.verdict import CODES, findings, lines

BINARY = {
    "accuracy": 0.8,
    "auroc": 0.85,
    "precision": 0.7,
    "recall": 0.6,
    "f1": 0.65,
    "brier": 0.14,
    "ece": 0.02,
}


def _summary(**changes: Any) -> dict[str, Any]:
    """Return the summary of a good binary model on 200 records, 60 of them positive, with some
    parts changed.
    """
    return {
        "algorithm": "fedavg",
        "test": {**BINARY, "n": 200},
        "intervals": {"auroc": [0.79, 0.9], "accuracy": [0.74, 0.85]},
        "baselines": {},
        "loss": {"first": 0.65, "last": 0.42, "test": 0.44},
        "learning_rate": {"first": 0.1, "chosen": True},
        "labels": ["no", "yes"],
        "confusion": [[125, 15], [24, 36]],
        "compared": None,
        "privacy": {"noise": "none"},
        **changes,
    }


PRIVATE = {"noise": "shared", "epsilon": 0.98, "target_epsilon": 1.0, "scope": "study"}
SEVERAL = {
    "test": {**BINARY, "accuracy": 0.41, "brier": 0.7, "n": 100},
    "intervals": {"accuracy": [0.31, 0.51], "auroc": None},
    "labels": ["a", "b", "c"],
    "confusion": [[30, 5, 5], [20, 6, 4], [22, 3, 5]],
    "loss": {"first": 1.1, "last": 1.05, "test": 1.2},
}
NUMBER = {"mae": 2.0, "rmse": 3.0, "r2": 0.4, "n": 200}


def _number(**changes: Any) -> dict[str, Any]:
    base = {
        "labels": [],
        "confusion": [],
        "intervals": {"mae": [1.9, 2.1], "rmse": None, "r2": None},
    }
    return _summary(**{**base, "test": NUMBER, **changes})


def _compared(value: float, low: float, high: float, **sites: list[float | None]) -> dict[str, Any]:
    return {"compared": {"n": 200, "own_better": value, "interval": [low, high], "sites": sites}}


def _codes(summary: dict[str, Any]) -> list[str]:
    return [one["code"] for one in findings(summary)]


def test_a_good_model_has_no_finding() -> None:
    assert findings(_summary()) == findings(_number()) == []
    assert findings(_summary(**_compared(-0.01, -0.02, 0.0, north=[100, -0.01, -0.03, 0.01]))) == []


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"loss": {"first": 0.6, "last": 0.7, "test": 0.44}}, ["loss-grew"]),
        ({"loss": {"first": 0.6, "last": 0.61, "test": 0.44}}, []),
        ({"loss": {"first": 0.6, "last": None, "test": 0.44}}, ["loss-grew"]),
        ({"loss": {"first": None, "last": None, "test": 0.44}}, []),
        ({"loss": {"first": 70.0, "last": 65.0, "test": 0.44}}, ["loss-high"]),
        ({"intervals": {"auroc": [0.49, 0.6]}}, ["not-better-than-chance"]),
        ({"intervals": {"auroc": [0.5, 0.6]}}, ["not-better-than-chance"]),
        ({"intervals": {"auroc": [0.51, 0.6]}}, []),
        ({"intervals": {"auroc": None}}, []),
        (
            {"intervals": {}, "test": {**BINARY, "auroc": 0.56, "n": 200}},
            ["not-better-than-chance"],
        ),
        ({"test": {**BINARY, "brier": 0.2101, "n": 200}}, ["chances-worse-than-constant"]),
        ({"test": {**BINARY, "brier": 0.2099, "n": 200}}, []),
        ({"loss": {"first": 0.65, "last": 0.42, "test": 0.62}}, ["chances-worse-than-constant"]),
        ({"confusion": [[140, 0], [60, 0]]}, ["one-class"]),
        ({"confusion": [[0, 140], [0, 60]]}, ["one-class"]),
        ({"confusion": [[140, 0], [59, 1]]}, ["one-class"]),
        ({"confusion": [[140, 0], [50, 10]]}, []),
        (
            {"confusion": [[200, 0], [0, 0]], "test": {**BINARY, "auroc": None, "n": 200}},
            ["one-class-tested"],
        ),
        ({"test": None, "intervals": None, "confusion": [], "labels": []}, []),
        (SEVERAL, ["not-better-than-chance"]),
        ({**SEVERAL, "intervals": {"accuracy": [0.45, 0.6]}}, ["chances-worse-than-constant"]),
        (
            {
                **SEVERAL,
                "test": {**BINARY, "brier": 0.5},
                "loss": {"first": 1.1, "last": 0.9, "test": 0.9},
            },
            [],
        ),
        (
            {**SEVERAL, "confusion": [[40, 0, 0], [30, 0, 0], [30, 0, 0]]},
            ["not-better-than-chance", "one-class"],
        ),
    ],
)
def test_classes(changes: dict[str, Any], codes: list[str]) -> None:
    assert _codes(_summary(**changes)) == codes


@pytest.mark.parametrize(
    ("late", "changes", "codes"),
    [
        (0.44, {}, ["loss-falls"]),  # 0.02 of 0.23
        (0.43, {}, []),
        (0.42, {}, []),
        (0.41, {}, []),
        (None, {}, []),
        (0.44, {"rounds": 7}, []),
        (0.44, {"status": "incomplete"}, []),
        (0.44, {"privacy": PRIVATE}, []),
        (0.44, {"confusion": [[140, 0], [60, 0]]}, ["one-class", "loss-falls"]),
    ],
)
def test_a_loss_that_was_still_falling_is_said_last(
    late: float | None, changes: dict[str, Any], codes: list[str]
) -> None:
    loss = {"first": 0.65, "late": late, "last": 0.42, "test": 0.44}
    told = {"status": "complete", "rounds": 12, "loss": loss, **changes}
    assert [one for one in _codes(_summary(**told)) if one != "not-compared"] == codes


@pytest.mark.parametrize(
    ("r2", "codes"), [(0.01, []), (0.0, ["not-better-than-constant"]), (None, [])]
)
def test_a_regression_is_held_to_the_mean(r2: float | None, codes: list[str]) -> None:
    assert _codes(_number(test={**NUMBER, "r2": r2})) == codes


def test_a_regression_that_diverged_says_both() -> None:
    found = findings(
        _number(
            test={**NUMBER, "r2": -3.7},
            loss={"first": 5.0, "last": 60.0, "test": 99.0},
            learning_rate={"first": 0.1, "chosen": False},
        )
    )
    assert [one["code"] for one in found] == ["loss-grew", "not-better-than-constant"]
    assert "Lower training.learning_rate (it is 0.1), or leave it out" in found[0]["next"]


@pytest.mark.parametrize(
    ("compared", "codes"),
    [
        (_compared(0.01, 0.002, 0.018, north=[100, 0.01, -0.01, 0.03]), ["own-better"]),
        (_compared(0.001, -0.002, 0.018, north=[100, 0.05, 0.04, 0.06]), ["own-better-at-some"]),
        (
            _compared(
                0.001, -0.002, 0.018, north=[100, 0.05, 0.001, 0.1], south=[5, -0.1, -0.2, 0.0]
            ),
            [],
        ),
        (
            _compared(
                0.001, -0.002, 0.018, north=[1, 0.05, None, None], south=[0, None, None, None]
            ),
            [],
        ),
    ],
)
def test_sites_own_models(compared: dict[str, Any], codes: list[str]) -> None:
    """Of several sites an interval must hold for all of them together: 97.5 % each for two."""
    assert _codes(_summary(**compared)) == codes


def test_a_private_run_that_learned_nothing_says_what_hides_it() -> None:
    found = findings(
        _summary(privacy=PRIVATE, intervals={"auroc": [0.4, 0.6]}, confusion=[[0, 140], [0, 60]])
    )
    assert [one["code"] for one in found] == ["not-better-than-chance", "one-class", "not-compared"]
    assert [one["level"] for one in found] == ["warning", "warning", "note"]
    assert all(
        "At epsilon 1 " in one["next"] and "medfed privacy plan" in one["next"] for one in found[:2]
    )


def test_a_histogram_of_few_cells_is_not_judged_by_its_log_loss() -> None:
    """Its cells are a logit wide: chances of a good model are rounded, not wrong."""
    coarse = {"loss": {"first": None, "last": None, "test": 0.62}}
    assert _codes(_summary(privacy=PRIVATE, test_noised=True, **coarse)) == ["not-compared"]
    assert _codes(_summary(**coarse)) == ["chances-worse-than-constant"]


def test_a_baseline_run_is_judged_by_its_own_test() -> None:
    own = {"test": {**BINARY, "n": 200}, "intervals": {"auroc": [0.45, 0.6]}}
    summary = _summary(algorithm="pooled", test=None, intervals=None, baselines={"pooled": own})
    assert _codes(summary) == ["not-better-than-chance"]


def test_every_finding_is_listed_and_says_what_to_do_next() -> None:
    seen = {}
    for summary in (
        _summary(
            privacy=PRIVATE,
            loss={"first": 0.6, "last": 9.0, "test": 0.4},
            confusion=[[140, 0], [60, 0]],
        ),
        _number(test={**NUMBER, "r2": -1.0}, **_compared(0.01, 0.002, 0.018)),
    ):
        for one, line in zip(
            findings(summary), lines({**summary, "findings": findings(summary)}), strict=True
        ):
            seen[one["code"]] = one
            assert one["text"].endswith(".") and one["next"].endswith(".")
            assert line == f"{one['level']}: {one['text']} {one['next']}"
    assert set(seen) <= set(CODES) and len(seen) >= 5


def test_the_interval_of_hanley_and_mcneil_is_their_own() -> None:
    """Their example: an area of .893 of 51 abnormal and 58 normal images has standard
    error .032.
    """
    low, high = verdict._hanley_interval(0.893, 58, 51)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=1e-3)


@pytest.mark.parametrize(
    "confusion", [[[0, 47], [1, 805]], [[804, 2], [43, 0]], [[4, 37], [1, 800]]]
)
def test_a_class_that_is_hardly_ever_found_is_told(confusion: list[list[int]]) -> None:
    """A single record called otherwise does not silence it: the class is missed all the same."""
    assert "one-class" in _codes(_summary(confusion=confusion))


def test_a_rare_class_that_is_found_is_no_finding() -> None:
    assert "one-class" not in _codes(_summary(confusion=[[20, 27], [30, 775]]))


def test_a_test_too_noisy_to_tell_is_not_blamed_on_the_model() -> None:
    wide = {"privacy": PRIVATE, "test_noised": True, "intervals": {"auroc": [0.06, 1.0]}}
    (finding, *_) = findings(_summary(**wide))
    assert (
        finding["code"] == "not-better-than-chance"
        and "says nothing of the model" in finding["next"]
    )


def test_a_noised_test_without_an_auroc_is_said_to_be_void() -> None:
    """Accuracy .983 of a handful that the noise left over is no praise."""
    void = {**BINARY, "accuracy": 0.983, "auroc": None, "brier": 0.0, "n": 59}
    told = _summary(
        privacy=PRIVATE,
        test_noised=True,
        test=void,
        intervals={"auroc": None, "accuracy": [0.59, 1.0]},
    )
    (finding, *_) = findings(told)
    assert finding["code"] == "not-better-than-chance" and "is not known" in finding["text"]
    assert finding["level"] == "warning" and "says nothing of the model" in finding["next"]


def test_a_noised_test_says_nothing_of_chances() -> None:
    worse = {"test": {**BINARY, "brier": 0.3, "n": 200}, "intervals": {"auroc": [0.7, 0.9]}}
    assert "chances-worse-than-constant" in _codes(_summary(**worse))
    assert "chances-worse-than-constant" not in _codes(
        _summary(**worse, privacy=PRIVATE, test_noised=True)
    )


def test_a_threshold_that_misses_its_sensitivity_is_told() -> None:
    decided = {
        "positive": "b",
        "threshold": 0.05,
        "decided": "chosen on noised counts",
        "rule": "sensitivity>=0.8",
    }
    missed = _summary(decision=decided, intervals={"auroc": [0.7, 0.9], "recall": [0.5, 0.74]})
    assert "sensitivity-missed" in _codes(missed)
    kept = _summary(decision=decided, intervals={"auroc": [0.7, 0.9], "recall": [0.7, 0.86]})
    assert "sensitivity-missed" not in _codes(kept)


def test_a_loss_that_is_high_and_falling_wants_more_rounds_not_a_lower_rate() -> None:
    """The newcomer's: 3 in a hundred positive, ten rounds, .652 to .259; a lower rate made it
    worse.
    """
    rare = {
        "confusion": [[196, 0], [4, 0]],
        "loss": {"first": 0.652, "last": 0.259, "test": 0.26},
        "rounds": 10,
    }
    (high, *_) = findings(_summary(**rare))
    assert high["code"] == "loss-high" and "still falling" in high["text"]
    assert high["next"] == "Train for more rounds (it had 10)."
    exploded = {**rare, "loss": {"first": 70.0, "last": 65.0, "test": 0.44}}
    assert "Lower training.learning_rate" in findings(_summary(**exploded))[0]["next"]


def test_a_model_that_ranks_backwards_is_not_said_to_be_chance() -> None:
    (found, *_) = findings(
        _summary(intervals={"auroc": [0.291, 0.479]}, test={**BINARY, "auroc": 0.384, "n": 200})
    )
    assert found["code"] == "not-better-than-chance" and "the wrong way round" in found["text"]


def test_counts_that_are_noise_say_nothing_of_a_class() -> None:
    """The newcomer's: a good private model was told to miss all of 25 where the test's noise hid
    everything.
    """
    noised = {
        "test_noised": True,
        "privacy": PRIVATE,
        "confusion": [[75, 0], [23, 2]],
        "loss": {"first": None, "last": None, "test": None},
    }
    void = _summary(**noised, test={**BINARY, "auroc": None, "n": 100}, intervals={"auroc": None})
    assert "one-class" not in _codes(void) and "not-better-than-chance" in _codes(void)
    sure = _summary(**noised, intervals={"auroc": [0.81, 0.89]})
    assert "one-class" in _codes(sure)
