"""The agreement on numbers: exact over all sites without a row leaving, and free of test rows."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import RobustScaler, StandardScaler
from torch import Tensor

from medfed.core.checks import DataError, PlanError
from medfed.data import encoding, preprocess
from medfed.data.answers import answer
from medfed.data.encoding import Column, Encoding
from medfed.data.preprocess import Ask, agree
from medfed.data.site_table import SiteTable
from medfed.data.surveys import survey
from medfed.study import Data, Feature

Cells = dict[str, list[Any]]


def _table(
    columns: Cells, label: list[Any] | None = None, test: list[int] | None = None
) -> SiteTable:
    rows = len(next(iter(columns.values())))
    texts = {
        n: np.array(v, dtype=object)
        for n, v in columns.items()
        if any(isinstance(x, str) for x in v)
    }
    numbers = {n: np.array(v, dtype=np.float64) for n, v in columns.items() if n not in texts}
    labels = np.array(label if label is not None else ["0", "1"] * rows, dtype=object)[:rows]
    if label and not isinstance(label[0], str):
        labels = labels.astype(np.float64)
    ids = np.array([f"p{i}" for i in range(rows)], dtype=object)
    return SiteTable(
        numbers, texts, labels, np.arange(rows), np.array(test or [0] * rows, dtype=bool), ids
    )


def _ask(
    tables: dict[str, SiteTable], spy: Callable[[str, dict[str, Any], Tensor], None] | None = None
) -> Ask:
    def ask(question: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        answers = [
            answer(t, question, header["names"], header["logs"], tensors) for t in tables.values()
        ]
        for each in answers:
            if spy:
                spy(question, header, each)
        return torch.stack(answers).sum(0)

    return ask


def _agree(tables: dict[str, SiteTable], data: Data) -> Encoding:
    return agree({name: survey(t, data) for name, t in tables.items()}, data, _ask(tables))


def _unasked(*_: object) -> Tensor:
    raise AssertionError("a patient was asked")


def _every(table: SiteTable) -> np.ndarray:
    return np.ones(len(table), dtype=bool)


def _columns(encoding: Encoding) -> dict[str, Column]:
    return {column.name: column for column in encoding.columns}


ROBUST = Data(target="y", preprocess="robust")
DICTIONARY = Data(target="y", preprocess="dictionary")

# centres and scales -------------------------------------------------------------------------------

TINY = 5e-324
HUGE = 1e300
CELL = st.one_of(
    st.floats(-HUGE, HUGE, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, TINY, -TINY, 1.0, 1.0, HUGE, -HUGE, float("nan")]),
    st.integers(-3, 3).map(float),
)
SITES = st.lists(st.lists(CELL, max_size=12), min_size=1, max_size=5)


def _fit(kind: Any, sites: list[list[float]]) -> tuple[float, float]:
    tables = {str(i): _table({"a": cells}) for i, cells in enumerate(sites)}
    return preprocess.fit(kind, ["a"], {}, _ask(tables))["a"]


@given(SITES)
@settings(max_examples=80, deadline=None)
def test_median_and_iqr_equal_numpys_on_the_pooled_values(sites: list[list[float]]) -> None:
    pooled = np.array([x for cells in sites for x in cells], dtype=np.float64)
    pooled = pooled[~np.isnan(pooled)]
    centre, scale = _fit("robust", sites)
    if len(pooled) == 0:
        assert (centre, scale) == (0.0, 1.0)
        return
    low, middle, high = np.quantile(pooled, [0.25, 0.5, 0.75])
    assert centre == middle
    assert scale == (high - low if high > low else 1.0)


@pytest.mark.parametrize("sizes", [(1, 0, 0), (2, 3, 5), (40, 1, 7), (100, 101, 99)])
def test_robust_scaling_equals_scikit_learns(sizes: tuple[int, ...]) -> None:
    random = np.random.default_rng(sum(sizes))
    sites = [random.lognormal(3, 2, n).tolist() for n in sizes]
    pooled = np.concatenate([np.array(s) for s in sites])[:, None]
    scaler = RobustScaler().fit(pooled)
    centre, scale = _fit("robust", sites)
    assert scale == scaler.scale_[0]
    # its median is (a + b) / 2: a last bit may differ
    assert centre == pytest.approx(scaler.center_[0], rel=1e-15)


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), min_size=1, max_size=4).filter(any))
@settings(max_examples=60, deadline=None)
def test_standard_scaling_equals_scikit_learns(sites: list[list[float]]) -> None:
    pooled = np.array([x for cells in sites for x in cells])[:, None]
    centre, scale = _fit("standard", sites)
    size = np.abs(pooled).max()
    assert centre == pytest.approx(pooled.mean(), rel=1e-12, abs=1e-12 * size)
    if pooled.std() > 1e-9 * size:
        assert scale == pytest.approx(
            StandardScaler().fit(pooled).scale_[0], rel=1e-12, abs=1e-12 * size
        )


@pytest.mark.parametrize("kind", ["robust", "standard"])
def test_a_constant_feature_has_scale_one(kind: Any) -> None:
    assert _fit(kind, [[4.0, 4.0], [4.0], []]) == (4.0, 1.0)


def _fit_widely(sites: list[list[float]]) -> tuple[float, float]:
    tables = {str(i): _table({"a": cells}) for i, cells in enumerate(sites)}
    return preprocess.fit_widely(["a"], {}, _ask(tables))["a"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda random, n: random.poisson(0.3, n) * 10.0,  # an IQR of 10 or 0
        lambda random, n: np.exp(random.normal(0, 2.5, n)),
        lambda random, n: (random.random(n) < 0.04).astype(float),
        lambda random, n: 98.6 + (random.random(n) < 0.005) * 300.0,  # no quantile differs
        lambda random, n: random.choice([0.0, 3.0], n, p=[0.4, 0.6]) + random.random(n),
    ],
)
def test_a_column_whose_iqr_is_no_scale_has_mean_0_and_deviation_1_once_held(
    draw: Callable[[np.random.Generator, int], np.ndarray],
) -> None:
    """Over all sites, as numpy finds it from the pooled cells; an IQR that is a scale stays."""
    cells = np.append(draw(np.random.default_rng(0), 2000), [])
    centre, scale = _fit_widely([cells[:300].tolist(), cells[300:].tolist(), []])
    low, middle, high = np.quantile(cells, [0.25, 0.5, 0.75])
    spans = [(0.05, 0.95, 4.0), (0.01, 0.99, 7.0)]
    wide = max(np.subtract(*np.quantile(cells, [b, a])) / by for a, b, by in spans)
    span = max(high - low, wide) or np.sqrt(np.square(cells - middle).mean())
    held = middle + np.clip(cells - middle, -7 * span, 7 * span)

    if span == high - low and held.std() <= span:
        assert (centre, scale) == (middle, span)
    else:
        assert centre == pytest.approx(held.mean(), rel=1e-9)
        assert scale == pytest.approx(held.std(), rel=1e-9)


@given(SITES)
@settings(max_examples=80, deadline=None)
def test_a_robust_scale_is_a_number_above_0_whatever_the_cells(sites: list[list[float]]) -> None:
    centre, scale = _fit_widely(sites)
    assert np.isfinite(centre) and 0 < scale < np.inf


def test_bell_shaped_columns_keep_median_and_iqr() -> None:
    cells = np.random.default_rng(0).normal(70, 10, 3000).tolist()
    assert _fit_widely([cells[:999], cells[999:]]) == _fit("robust", [cells])


def test_training_rows_alone_are_asked() -> None:
    table = _table({"a": [1.0, 2.0, 3.0, 1000.0]}, test=[0, 0, 0, 1])
    assert preprocess.fit("robust", ["a"], {}, _ask({"s": table}))["a"] == (2.0, 1.0)


def test_a_logarithm_comes_before_the_median() -> None:
    data = replace(ROBUST, dictionary={"a": Feature(range=(0, 100), log=True)})
    encoding = _agree({"s": _table({"a": [0.0, 1.0, 10.0, 100.0, 50.0]})}, data)
    logs = np.log([1, 1, 10, 100, 50])  # the floor is 1 % of 100
    assert encoding.columns[0].centre == np.quantile(logs, 0.5)
    assert encoding.columns[0].scale == np.quantile(logs, 0.75) - np.quantile(logs, 0.25)


def test_no_row_leaves() -> None:
    """Only counts and sums leave, of shapes that do not grow with the patients."""
    seen: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def spy(question: str, header: dict[str, Any], value: Tensor) -> None:
        assert set(header) == {"names", "logs"}
        seen.append((question, value.dtype, tuple(value.shape)))

    random = np.random.default_rng(0)
    for rows in (7, 100):
        tables = {
            n: _table({"a": random.normal(size=rows), "b": random.normal(size=rows)}) for n in "xyz"
        }
        for kind in ("robust", "standard"):
            surveys = {n: survey(t, ROBUST) for n, t in tables.items()}
            agree(surveys, replace(ROBUST, preprocess=kind), _ask(tables, spy))
    assert set(seen) == {
        ("known", torch.int64, (2,)),
        ("below", torch.int64, (2, 14, 16)),
        ("sum", torch.float64, (2,)),
        ("squares", torch.float64, (2,)),
        ("held", torch.float64, (2, 2)),
    }


def test_counts_are_counts_of_the_site() -> None:
    table = _table({"a": [3.0, np.nan, 1.0, 2.0, 9.0], "b": [1.0] * 5}, test=[0, 0, 0, 0, 1])
    assert answer(table, "known", ["a", "b"], {}, {}).tolist() == [3, 4]
    assert answer(table, "sum", ["a", "b"], {}, {}).tolist() == [6.0, 4.0]
    centre = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert answer(table, "squares", ["a", "b"], {}, {"centre": centre}).tolist() == [2.0, 4.0]
    span = torch.tensor([0.1, 1.0], dtype=torch.float64)
    held = answer(table, "held", ["a", "b"], {}, {"centre": centre, "span": span})
    assert held.tolist() == [[0.0, 2 * 7.0**2], [4.0, 4.0]]  # 10 spans on either side are held to 7
    with pytest.raises(DataError, match="question='rows' is not known"):
        answer(table, "rows", ["a"], {}, {})


# the dictionary -----------------------------------------------------------------------------------

RANGES = {
    "a": Feature(range=(10, 30)),
    "b": Feature(range=(0, 100), log=True),
    "c": Feature(categories=("u", "v")),
}


def test_the_dictionary_asks_no_patient() -> None:
    data = replace(DICTIONARY, dictionary=RANGES)
    found = []
    for cells in (
        {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": ["u", "v"]},
        {"a": [9.0] * 4, "b": [5.0] * 4, "c": ["v"] * 4},
    ):
        table = _table(cells)
        found.append(agree({"s": survey(table, data)}, data, _unasked))
    assert found[0] == found[1]


def test_public_ranges_map_to_two_and_are_clipped() -> None:
    data = replace(DICTIONARY, dictionary={n: RANGES[n] for n in "ab"})
    table = _table({"a": [10.0, 30.0, 20.0, -5.0, 99.0], "b": [1.0, 100.0, 10.0, 0.0, 1e9]})
    rows = agree({"s": survey(table, data)}, data, _unasked).encode(
        table, _every(table), _every(table)
    )
    expected = torch.tensor([[-2.0, -2], [2, 2], [0, 0], [-2, -2], [2, 2]])
    torch.testing.assert_close(rows.x, expected, atol=1e-6, rtol=0)


def test_a_wide_range_squeezes_patients_unless_it_is_logarithmic() -> None:
    cells = {"a": [0.5, 1.0, 2.0, 4.0]}
    spread = []
    for log in (False, True):
        data = replace(DICTIONARY, dictionary={"a": Feature(range=(0.1, 1000), log=log)})
        table = _table(cells)
        x = (
            agree({"s": survey(table, data)}, data, _unasked)
            .encode(table, _every(table), _every(table))
            .x
        )
        spread.append(float(x.max() - x.min()))
    assert spread[0] < 0.02 and spread[1] > 0.7  # of the 4 between the range's ends


def test_a_number_without_a_public_range_is_refused() -> None:
    table = _table({"a": [1.0, 2.0]})
    with pytest.raises(PlanError, match="no public range for 'a'"):
        agree({"s": survey(table, DICTIONARY)}, DICTIONARY, _unasked)


def test_a_regression_target_needs_a_public_range_too() -> None:
    data = replace(DICTIONARY, task="regression", dictionary={"a": Feature(range=(0, 4))})
    table = _table({"a": [1.0, 2.0]}, [3.0, 4.0])
    with pytest.raises(PlanError, match=r"needs data\.dictionary\.y\.range for the target"):
        agree({"s": survey(table, data)}, data, _unasked)
    ranged = replace(data, dictionary={**data.dictionary, "y": Feature(range=(0, 8))})
    target = agree({"s": survey(table, ranged)}, ranged, _unasked).target
    assert (target.centre, target.scale) == (4.0, 2.0)


def test_none_takes_numbers_as_they_are() -> None:
    data = replace(DICTIONARY, preprocess="none")
    table = _table({"a": [1.5, -20.0]})
    rows = agree({"s": survey(table, data)}, data, _unasked).encode(
        table, _every(table), _every(table)
    )
    assert rows.x.tolist() == [[1.5], [-20.0]]


# gaps ---------------------------------------------------------------------------------------------


def test_a_gap_gets_an_indicator_and_the_sites_own_training_median() -> None:
    tables = {
        "x": _table({"a": [0.0, 2.0, 10.0, np.nan, 500.0]}, test=[0, 0, 0, 0, 1]),
        "y": _table({"a": [100.0, np.nan, 104.0]}),
    }
    encoding = _agree(tables, replace(ROBUST, preprocess="none"))
    assert encoding.names() == ["a", "a missing"]
    x, y = (encoding.encode(t, _every(t), ~t.test).x.tolist() for t in tables.values())
    assert x == [[0, 0], [2, 0], [10, 0], [2, 1], [500, 0]]
    assert y == [[100, 0], [102, 1], [104, 0]]


def test_a_feature_that_a_whole_site_lacks_is_zero_there() -> None:
    tables = {
        "x": _table({"a": [1.0, 2.0, 3.0]}),
        "swiss": _table({"a": [np.nan] * 3}),
        "z": _table({"b": [1.0, 2.0]}),
    }
    encoding = _agree(tables, ROBUST)
    assert encoding.names() == ["a", "a missing", "b", "b missing"]
    encoded = {name: encoding.encode(t, _every(t), _every(t)).x for name, t in tables.items()}
    assert encoded["swiss"][:, :2].tolist() == [[0, 1]] * 3
    assert encoded["z"][:, :2].tolist() == [[0, 1]] * 2
    assert encoded["x"][:, 0].tolist() == [-1, 0, 1]


def test_no_gap_no_indicator() -> None:
    assert _agree({"s": _table({"a": [1.0, 2.0]})}, ROBUST).names() == ["a"]


# categories ---------------------------------------------------------------------------------------


def test_categories_are_those_of_all_sites() -> None:
    tables = {
        "x": _table({"c": ["b", "a"]}),
        "y": _table({"c": ["c", "a"]}),
        "z": _table({"c": [np.nan, np.nan]}),
    }
    encoding = _agree(tables, ROBUST)
    assert encoding.names() == ["c=a", "c=b", "c=c", "c missing"]
    assert encoding.encode(tables["x"], _every(tables["x"]), _every(tables["x"])).x.tolist() == [
        [0, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert (
        encoding.encode(tables["z"], _every(tables["z"]), _every(tables["z"])).x.tolist()
        == [[0, 0, 0, 1]] * 2
    )


def test_the_dictionarys_categories_stand_in_its_order_even_where_nobody_has_one() -> None:
    data = replace(ROBUST, dictionary={"c": Feature(categories=("w", "v", "u"))})
    assert _agree({"s": _table({"c": ["u", "v"]})}, data).names() == ["c=w", "c=v", "c=u"]


def test_two_categories_are_one_column() -> None:
    table = _table({"c": ["f", "m", "m"]})
    encoding = _agree({"s": table}, ROBUST)
    assert encoding.names() == ["c=m"]
    assert encoding.encode(table, _every(table), _every(table)).x.tolist() == [[0], [1], [1]]


def test_an_unknown_category_counts_as_missing() -> None:
    encoding = _agree({"s": _table({"c": ["a", "b", "c", None]})}, ROBUST)
    late = _table({"c": ["a", "a", "b", "zz"]})
    assert encoding.encode(late, _every(late), _every(late)).x[3].tolist() == pytest.approx(
        [2 / 3, 1 / 3, 0, 1]
    )


def test_number_here_and_text_there_is_refused() -> None:
    tables = {"x": _table({"c": [1.0, 2.0]}), "y": _table({"c": ["low", "high"]})}
    with pytest.raises(
        DataError,
        match=r"column 'c' is a number at site 'x' and text elsewhere.*dictionary\.c\.cat",
    ):
        _agree(tables, ROBUST)


# test rows ----------------------------------------------------------------------------------------

_TEST = [0, 0, 0, 0, 0, 1, 1, 1]
_TRAINING: Cells = {"a": [1.0, 2.0, 3.0, 5.0, 8.0], "c": ["u", "v", "v", "u", "u"]}


@given(
    st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=3, max_size=3),
    st.lists(st.sampled_from(["u", "v", "new", None]), min_size=3, max_size=3),
    st.sampled_from(["robust", "standard"]),
)
@settings(max_examples=40, deadline=None)
def test_test_rows_never_influence_the_encoding(
    numbers: list[float], texts: list[Any], kind: Any
) -> None:
    data = replace(ROBUST, preprocess=kind)
    table = _table({"a": _TRAINING["a"] + numbers, "c": _TRAINING["c"] + texts}, test=_TEST)
    alone = _table({"a": _TRAINING["a"] + [0.0] * 3, "c": _TRAINING["c"] + ["u"] * 3}, test=_TEST)
    encoding = _agree({"s": table}, data)
    assert encoding == _agree({"s": alone}, data)
    one, other = (encoding.encode(t, ~t.test, ~t.test).x for t in (table, alone))
    assert torch.equal(one, other)
    assert bool(torch.isfinite(encoding.encode(table, table.test, ~table.test).x).all())


def test_a_column_known_in_test_rows_only_is_missing() -> None:
    table = _table({"c": [None, None, "u", "v"]}, test=[0, 0, 1, 1])
    encoding = _agree({"s": table}, ROBUST)
    assert encoding.names() == ["c", "c missing"]
    assert encoding.encode(table, _every(table), ~table.test).x.tolist() == [[0, 1]] * 4


# targets ------------------------------------------------------------------------------------------


def _target(data: Data, *labels: list[str]) -> encoding.Target:
    tables = {str(i): _table({"a": [1.0] * len(each)}, each) for i, each in enumerate(labels)}
    return _agree(tables, data).target


def test_the_last_of_two_labels_is_positive_unless_said() -> None:
    assert _target(ROBUST, ["0", "1"]).labels == ("0", "1")
    assert _target(ROBUST, ["dead", "alive"]).labels == ("alive", "dead")
    assert _target(replace(ROBUST, positive="alive"), ["dead", "alive"]).labels == ("dead", "alive")


def test_labels_are_those_of_all_sites() -> None:
    target = _target(ROBUST, ["no", "no"], ["yes", "no"])
    assert (target.task, target.labels, target.outputs) == ("binary", ("no", "yes"), 1)
    assert _target(ROBUST, ["a"], ["b"], ["c"]).labels == ("a", "b", "c")


def test_more_than_two_labels_are_several_classes() -> None:
    target = _target(ROBUST, ["a", "b", "c"])
    assert (target.task, target.outputs) == ("multiclass", 3)
    assert _target(replace(ROBUST, task="multiclass"), ["a", "b"]).outputs == 2


@pytest.mark.parametrize("change", [{"task": "binary"}, {"positive": "a"}])
def test_a_binary_target_of_three_labels_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(
        DataError, match=r"data\.target='y' has 3 labels \(a, b, c\); a binary target has two"
    ):
        _target(replace(ROBUST, **change), ["a", "b", "c"])


def test_one_value_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.target='y' has one value, \['a'\]"):
        _target(ROBUST, ["a", "a"], ["a"])


def test_an_unknown_positive_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.positive='sick' is not a label; labels: ill, well"):
        _target(replace(ROBUST, positive="sick"), ["ill", "well"])


def test_labels_become_codes() -> None:
    binary = _table({"a": [1.0] * 3}, ["n", "y", "n"])
    several = _table({"a": [1.0] * 3}, ["b", "c", "a"])
    codes = [_agree({"s": t}, ROBUST).encode(t, _every(t), _every(t)).y for t in (binary, several)]
    assert codes[0].dtype == torch.float32 and codes[0].tolist() == [0, 1, 0]
    assert codes[1].dtype == torch.int64 and codes[1].tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", ["robust", "standard"])
def test_a_regression_target_is_scaled_by_training_rows(kind: Any) -> None:
    values = [1.0, 2.0, 4.0, 8.0, 1000.0]
    table = _table({"a": [0.0, 1.0, 2.0, 3.0, 4.0]}, values, test=[0, 0, 0, 0, 1])
    encoding = _agree({"s": table}, Data(target="y", task="regression", preprocess=kind))
    known = np.array(values[:4])
    centre = encoding.target.centre
    scale = encoding.target.scale
    iqr = np.quantile(known, 0.75) - np.quantile(known, 0.25)
    assert (centre, scale) == pytest.approx(
        (np.median(known), iqr) if kind == "robust" else (known.mean(), known.std()), rel=1e-12
    )
    y = encoding.encode(table, _every(table), ~table.test).y
    torch.testing.assert_close(
        y.double() * scale + centre, torch.tensor(values, dtype=torch.float64)
    )


# JSON ---------------------------------------------------------------------------------------------


def test_an_encoding_survives_json_and_encodes_alike() -> None:
    data = replace(ROBUST, dictionary={"b": Feature(range=(0, 50), log=True)})
    table = _table(
        {"a": [0.1, np.nan, 1 / 3, 7.0], "b": [1.0, 2.0, 3.0, 40.0], "c": ["u", "v", None, "w"]}
    )
    encoding = _agree({"s": table}, data)
    again = Encoding.from_json(json.loads(json.dumps(encoding.to_json())))
    assert again == encoding
    one, two = (e.encode(table, _every(table), _every(table)) for e in (encoding, again))
    assert torch.equal(one.x, two.x) and torch.equal(one.y, two.y)
    assert one.x.shape == (4, len(encoding.names()))


def test_a_survey_is_plain_counts_and_names() -> None:
    table = _table(
        {"a": [1.0, np.nan, 3.0], "c": ["u", None, "v"]}, ["n", "y", "n"], test=[0, 0, 1]
    )
    assert survey(table, ROBUST) == {
        "train": 2,
        "test": 1,
        "patients": 3,
        "numbers": ["a"],
        "texts": {"c": ["u"]},
        "missing": {"a": 1, "c": 1},
        "train_missing": {"a": 1, "c": 1},
        "labels": {"n": 2, "y": 1},
        "train_labels": {"n": 1, "y": 1},
        "outside": {},
        "far": {},
        "single": {},
        "medians": {},
        "spreads": {},
        "doubts": [],
    }


def test_rows_keep_their_patients() -> None:
    table = replace(_table({"a": [1.0, 2.0, 3.0]}), patient=np.array([0, 0, 1]))
    rows = _agree({"s": table}, ROBUST).encode(table, np.array([True, False, True]), _every(table))
    assert rows.patient.tolist() == [0, 1] and len(rows) == 2


def test_pandas_is_not_needed_to_pool() -> None:
    """Power of the exactness above: the mean of the sites' medians is not the median."""
    sites = [[1.0, 2.0, 3.0], [10.0]]
    centre, _ = _fit("robust", sites)
    assert (
        centre
        == pd.Series([1.0, 2.0, 3.0, 10.0]).median()
        != np.mean([np.median(s) for s in sites])
    )
