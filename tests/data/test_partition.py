"""Who is held out and who belongs where: laws of a keyed hash, and its statistics with power."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.core.checks import DataError
from medfed.core.streams import Streams, patient_fraction
from medfed.data.frames import number_rows
from medfed.data.partition import id_texts, is_test, patients, row_patients, site_of, spellings

STREAMS = Streams(7)
IDS = st.lists(st.text("abcdef0123456789", min_size=1, max_size=6), min_size=1, max_size=30)


def _series(ids: list[str]) -> pd.Series:
    return pd.Series(ids, dtype=object)


def _held(ids: list[str], fraction: float = 0.3, seed: int = 7) -> dict[str, bool]:
    held = is_test(_series(ids), None, fraction, Streams(seed), exact=False)
    return dict(zip(ids, held.tolist(), strict=True))


def _held_exactly(labels: dict[str, str], fraction: float) -> dict[str, bool]:
    ids = list(labels)
    held = is_test(_series(ids), pd.Series([labels[i] for i in ids]), fraction, STREAMS, exact=True)
    return dict(zip(ids, held.tolist(), strict=True))


@given(IDS, st.booleans())
def test_all_records_of_a_patient_are_on_one_side(ids: list[str], exact: bool) -> None:
    ids = ids * 2 + ids[:3]
    label = pd.Series(["ab"[i % 2] for i in range(len(ids))])
    held = is_test(_series(ids), label, 0.4, STREAMS, exact)
    assert held.groupby(np.array(ids)).nunique().max() == 1


@given(IDS, st.text("xyz", min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_nobody_moves_when_others_come_go_or_change_places(
    ids: list[str], other: str, random: object
) -> None:
    before = _held(ids)
    shuffled = [*ids, other]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    after = _held(shuffled)
    assert {name: after[name] for name in ids} == before
    assert _held(ids[1:]) == {name: before[name] for name in ids[1:]}


def test_a_larger_fraction_keeps_who_was_held_out() -> None:
    ids = [f"p{i}" for i in range(500)]
    few = _held(ids, 0.1)
    more = _held(ids, 0.3)
    assert all(more[name] for name in ids if few[name])


def _binomial_p(held: int, of: int, fraction: float) -> float:
    return float(stats.binomtest(held, of, fraction).pvalue)


def test_the_expected_fraction_is_held_out_and_another_would_be_noticed() -> None:
    held = sum(_held([f"p{i}" for i in range(20_000)], 0.2).values())
    assert _binomial_p(held, 20_000, 0.2) > 1e-3
    assert _binomial_p(held, 20_000, 0.18) < 1e-6
    assert _binomial_p(held, 20_000, 0.22) < 1e-6


def test_seeds_split_independently_of_each_other() -> None:
    ids = [f"p{i}" for i in range(5000)]
    one, two = (np.array(list(_held(ids, 0.3, seed).values())) for seed in (1, 2))
    table = [
        [int((one & two).sum()), int((one & ~two).sum())],
        [int((~one & two).sum()), int((~one & ~two).sum())],
    ]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    same = [[int(one.sum()), 0], [0, int((~one).sum())]]
    assert stats.chi2_contingency(same).pvalue < 1e-9


def test_split_and_partition_are_independent() -> None:
    ids = _series([f"p{i}" for i in range(5000)])
    held = is_test(ids, None, 0.3, STREAMS, False)
    site = site_of(ids, ["a", "b"], [0.5, 0.5], STREAMS)
    table = pd.crosstab(held, site.to_numpy())
    assert stats.chi2_contingency(table).pvalue > 1e-3


@given(st.dictionaries(st.text("abc0123", min_size=1, max_size=5), st.sampled_from("abc"), min_size=1, max_size=40),
       st.floats(0.05, 0.95))  # fmt: skip
def test_stratified_shares_are_exact_in_each_class(labels: dict[str, str], fraction: float) -> None:
    held = _held_exactly(labels, fraction)
    for name in set(labels.values()):
        members = [patient for patient in labels if labels[patient] == name]
        expected = min(math.ceil(len(members) * fraction - 1e-9), len(members) - 1)
        assert sum(held[patient] for patient in members) == expected


@given(
    st.dictionaries(
        st.text("abc0123", min_size=1, max_size=5), st.sampled_from("ab"), min_size=1, max_size=40
    ),
    st.text("xyz", min_size=1, max_size=5),
    st.sampled_from("ab"),
    st.floats(0.05, 0.95),
)
@settings(deadline=None)
def test_one_more_patient_moves_at_most_one_other_and_only_in_its_class(
    labels: dict[str, str], other: str, label: str, fraction: float
) -> None:
    before = _held_exactly(labels, fraction)
    after = _held_exactly({**labels, other: label}, fraction)
    moved = [patient for patient in labels if before[patient] != after[patient]]
    assert len(moved) <= 1
    assert all(labels[patient] == label for patient in moved)


def test_a_stratified_split_does_not_depend_on_row_order() -> None:
    labels = {f"p{i}": "ab"[i % 3 == 0] for i in range(60)}
    turned = dict(reversed(labels.items()))
    assert _held_exactly(labels, 0.25) == _held_exactly(turned, 0.25)


def test_a_patient_of_two_sites_may_fall_apart_under_exact_shares_alone() -> None:
    companions = [[f"{site} {i}" for i in range(5)] for site in range(10)]
    patients = [f"p{i}" for i in range(20)]
    exact = [
        {_held_exactly(dict.fromkeys([name, *ids], "a"), 0.5)[name] for ids in companions}
        for name in patients
    ]
    hashed = [{_held([name, *ids], 0.5)[name] for ids in companions} for name in patients]
    assert any(len(sides) == 2 for sides in exact) and all(len(sides) == 1 for sides in hashed)


def test_those_of_lowest_hash_are_held_out() -> None:
    key = STREAMS.key("split")
    ids = [f"p{i}" for i in range(50)]
    lowest = sorted(ids, key=lambda name: patient_fraction(key, name))[:10]
    held = _held_exactly(dict.fromkeys(ids, "a"), 0.2)
    assert {name for name in ids if held[name]} == set(lowest)


def test_without_labels_the_share_is_exact_over_all() -> None:
    assert (
        is_test(_series([f"p{i}" for i in range(50)]), None, 0.2, STREAMS, exact=True).sum() == 10
    )


def test_sites_get_their_shares_and_other_shares_would_be_noticed() -> None:
    names = ["a", "b", "c", "d"]
    shares = [0.35, 0.25, 0.22, 0.18]
    site = site_of(_series([f"p{i}" for i in range(20_000)]), names, shares, STREAMS)
    counts = site.value_counts().reindex(names).to_numpy()
    assert stats.chisquare(counts, np.array(shares) * 20_000).pvalue > 1e-3
    assert stats.chisquare(counts, np.array([0.33, 0.27, 0.22, 0.18]) * 20_000).pvalue < 1e-6


@given(IDS, st.text("xyz", min_size=1, max_size=4))
def test_a_patient_keeps_its_site_whoever_comes(ids: list[str], other: str) -> None:
    names = ["a", "b"]
    shares = [0.4, 0.6]
    before = site_of(_series(ids), names, shares, STREAMS).tolist()
    assert site_of(_series([other, *ids]), names, shares, STREAMS).tolist()[1:] == before


def test_unequal_seeds_place_patients_differently() -> None:
    ids = _series([f"p{i}" for i in range(200)])
    placed = [site_of(ids, ["a", "b"], [0.5, 0.5], Streams(seed)).tolist() for seed in (1, 2, 1)]
    assert placed[0] == placed[2] != placed[1]


ROWS = st.lists(
    st.tuples(st.sampled_from(["1", "2", None]), st.sampled_from(["x", "y"])),
    min_size=1,
    max_size=12,
)


@given(ROWS, st.randoms(use_true_random=False))
def test_row_patients_do_not_depend_on_row_order(
    rows: list[tuple[str | None, str]], random: object
) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = (row_patients(pd.DataFrame(r, columns=["a", "b"])) for r in (rows, shuffled))
    assert sorted(one) == sorted(two)
    assert one.nunique() == len(rows)


def test_equal_rows_are_different_patients() -> None:
    named = row_patients(pd.DataFrame({"a": [1, 1, 2], "b": ["x", "x", "x"]}))
    assert named.nunique() == 3


def test_columns_cannot_run_into_each_other() -> None:
    named = row_patients(pd.DataFrame({"a": ["1", "11"], "b": ["11", "1"]}))
    assert named.nunique() == 2


def test_a_gap_is_the_same_gap_in_csv_and_in_parquet() -> None:
    csv = pd.DataFrame({"a": ["1.5", ""]})
    parquet = pd.DataFrame({"a": [1.5, np.nan]})
    assert row_patients(csv).tolist() == row_patients(parquet).tolist()


@pytest.mark.parametrize("gap", ["", "  ", None, np.nan])
def test_a_row_that_names_no_patient_is_refused(gap: object) -> None:
    frame = pd.DataFrame({"id": pd.Series(["p1", gap, "p2"], dtype=object)}, index=[2, 3, 4])
    with pytest.raises(DataError, match=r"column 'id': no patient named in row 3"):
        patients(frame, "id")


@pytest.mark.parametrize(
    "gap", ["NA", " na", "?", "null", "<NA>", "unknown", "-", pd.NA, pd.NaT, "-9.0"]
)
def test_a_text_that_means_missing_names_no_patient(gap: object) -> None:
    frame = number_rows(pd.DataFrame({"id": pd.Series(["p1", gap, "p2", gap], dtype=object)}))
    with pytest.raises(DataError, match=r"no patient named in row 3, 5\..*missing_patient='own'"):
        patients(frame, "id", missing_values=("-9",))
    with pytest.raises(
        DataError, match=r"in some rows; at the site `medfed data show` says which"
    ) as told:
        patients(frame, "id", missing_values=("-9",), claimed=True)
    assert not any(digit in str(told.value) for digit in "345")


def test_rows_that_name_nobody_can_be_a_patient_each_whatever_their_order() -> None:
    frame = pd.DataFrame({"id": ["p1", "NA", "p1", "", "NA"], "a": [1, 2, 3, 2, 4]})
    one = patients(frame, "id", missing_patient="own")
    assert one.nunique() == 4 and one[0] == one[2] == "p1"
    other = patients(frame[::-1], "id", missing_patient="own")
    assert sorted(one) == sorted(other)
    content = pd.Series([row_patients(frame)[1]])
    # nobody can take such a name
    assert not set(one) & set(patients(pd.DataFrame({"id": content}), "id"))


def test_an_id_is_the_same_in_every_kind_of_column() -> None:
    texts = ["17", "", "0", "9007199254740991"]
    numbers = [17, None, 0, 9007199254740991]
    columns = {
        "csv": pd.Series(texts),
        "float64": pd.Series(numbers, dtype="float64"),
        "Int64": pd.Series(numbers, dtype="Int64"),
        "object": pd.Series([17.0, None, 0, 9007199254740991], dtype=object),
        "string": pd.Series([None if t == "" else t for t in texts], dtype="string"),
        "bytes": pd.Series([None if t == "" else t.encode() for t in texts], dtype=object),
        "category": pd.Series([None if t == "" else t for t in texts], dtype="category"),
    }
    for kind, column in columns.items():
        assert id_texts(column, "here").tolist() == texts, kind
    assert id_texts(pd.Series([17.0, 1.5], dtype="float32"), "here").tolist() == ["17", "1.5"]


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([9007199254740993.0, 1.0]),
        pd.Series([2.0**24, 1.0], dtype="float32"),
        pd.Series([1e300, "p1"], dtype=object),
        pd.Series([float("inf")]),
    ],
)
def test_ids_that_floats_have_rounded_are_refused(column: pd.Series) -> None:
    """Two patients may have become one, and nothing in the column tells."""
    with pytest.raises(DataError, match=r"column 'id': ids of .* are rounded.*Write ids as"):
        patients(pd.DataFrame({"id": column}), "id")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(DataError, match="is bytes and no text"):
        patients(pd.DataFrame({"id": [b"\xff", b"a"]}), "id")


def test_the_rule_says_who_is_one_patient_and_spellings_are_counted_under_both() -> None:
    column = pd.Series(["17", "017", "17.0", "A1", "a1", "b", " b", "NA", "na", "c"])
    frame = pd.DataFrame({"id": column[column.str.upper() != "NA"]})
    assert patients(frame, "id").nunique() == 4
    assert patients(frame, "id", "exact").nunique() == 7
    assert spellings(column) == 2  # 17 and a1; b differs in outer blanks alone


@pytest.mark.parametrize("rounded", ["1.23457E+17", "9007199254740992.0", "1,5e+18"])
def test_ids_that_a_spreadsheet_rounded_are_refused(rounded: str) -> None:
    """Of 220 patients 112 were left: their ids had gone through floats."""
    frame = pd.DataFrame({"id": ["17", rounded, "18"]}, index=[2, 3, 4])
    with pytest.raises(DataError, match=r"column 'id': ids that were rounded .* in row 3"):
        patients(frame, "id")
    # bounded together, and told to the site alone
    assert len(patients(frame, "id", claimed=True)) == 3


def test_whole_ids_of_any_length_are_not_taken_for_rounded() -> None:
    ids = ["17.0", "9007199254740993", "1e5", "2.5", "p1.5e+17x", "123456789012345678901234567890"]
    assert patients(pd.DataFrame({"id": ids}), "id").nunique() == len(ids)
