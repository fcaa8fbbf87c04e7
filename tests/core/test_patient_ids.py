"""One person, one name: laws of the identity rule, and what it must keep apart."""

import random
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.core import patient_ids
from medfed.core.patient_ids import NOBODY, identify, is_nobody, nobodies

SEVENTEEN = [
    "17",
    "17.0",
    "00017",
    "1.7e1",
    "1.7E+1",
    "+17",
    " 17 ",
    "17.",
    "170e-1",
    "\uff11\uff17",
    "\u0661\u0667",
]


@pytest.mark.parametrize("text", SEVENTEEN)
def test_a_number_is_its_value(text: str) -> None:
    assert identify(text, "canonical") == "17"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("MRN-7", "mrn-7"),
        ("Stra\u00dfe", "STRASSE"),
        ("a  b", " a\u00a0b\t"),
        ("\u00e9", "e\u0301"),
        ("\ufb01ve", "five"),
        ("\u00adp1", "p1\u200b"),
        ("\ufeff12", "12"),
        ("0", "-0.00"),
        ("1e70", "10" + "0" * 69),
        ("\u0130d", "i\u0307d"),
    ],
)
def test_one_person_in_two_spellings_has_one_name(one: str, other: str) -> None:
    assert identify(one, "canonical") == identify(other, "canonical")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("9007199254740993", "9007199254740992"),  # above 2^53, where floats cannot tell them apart
        ("123456789012345678901234567890", "123456789012345678901234567891"),
        ("1.0000000000000000000000000000001", "1"),
        ("17", "-17"),
        ("17a", "017a"),
        ("a b", "ab"),
        ("1e999999", "1e999998"),
        ("0x11", "17"),
        ("1_7", "17"),
    ],
)
def test_two_people_keep_two_names(one: str, other: str) -> None:
    assert identify(one, "canonical") != identify(other, "canonical")


@pytest.mark.parametrize(
    "text", ["1e" + "9" * 5000, "9" * 50_000, "1e999999", "0." + "0" * 9999 + "1", "e", ".", "+"]
)
def test_odd_numbers_take_no_time_and_no_memory(text: str) -> None:
    assert len(identify(text, "canonical")) <= len(text) + 8


@given(st.text(max_size=12))
def test_a_name_is_its_own_name(text: str) -> None:
    for rule in ("canonical", "exact"):
        once = identify(text, rule)  # type: ignore[arg-type]
        assert identify(once, rule) == once  # type: ignore[arg-type]


def test_every_assigned_character_is_its_own_name_after_one_turn() -> None:
    chance = random.Random(0)
    letters = [
        chr(i) for i in range(0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")
    ]
    for first in letters:
        once = identify(first + chance.choice(letters), "canonical")
        assert identify(once, "canonical") == once, ascii(first)


DECIMAL = st.from_regex(r"\A[+-]?0{0,2}[0-9]{0,6}(\.[0-9]{0,4})?(e[+-]?[0-9]{1,2})?\Z")


@given(DECIMAL, DECIMAL)
def test_numbers_have_one_name_exactly_where_they_are_equal(one: str, other: str) -> None:
    values = [_value(text) for text in (one, other)]
    if None not in values:
        assert (identify(one, "canonical") == identify(other, "canonical")) == (
            values[0] == values[1]
        )


def _value(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except ValueError:
        return None


def test_the_exact_rule_cuts_blanks_alone() -> None:
    texts = ["017", "17", "17.0", "A1", "a1", "a  1", "a 1"]
    assert [identify(f" {text}\t", "exact") for text in texts] == texts


def test_nobody_is_nobody_in_any_spelling_and_the_study_adds_its_own() -> None:
    absent = nobodies(("-9", "Dummy"))
    for text in (*NOBODY, "na", " NA ", "NONE", "\uff2e\uff21", "-9.0", "DUMMY", "\u00a0"):
        assert is_nobody(text, absent), text
    for text in ("nadia", "0", "9", "a?", "p-"):
        assert not is_nobody(text, absent), text
    assert is_nobody("NA", nobodies(()))  # a study cannot make a patient of it


@given(st.text("0123456789", min_size=1, max_size=80))
def test_plain_numbers_take_a_short_way_to_the_same_name(text: str) -> None:
    assert patient_ids._canonicalise(text) == patient_ids._canonicalise_text(text)
