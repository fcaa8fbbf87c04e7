"""Who is one patient: the rule by which two texts in an id column name the same person, and the
texts that name nobody.

A ledger keeps its rule for life: under another rule, patients who have paid would look new. Typing
errors, and letters of other alphabets that look alike, are beyond any rule here.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

Rule = Literal["canonical", "exact"]
"""canonical: one person however an id is written; exact: where zeros or case carry meaning, only
blanks are cut off.
"""

NOBODY = (
    *(
        "",
        "?",
        "-",
        "--",
        ".",
        "NA",
        "N/A",
        "n.a.",
        "#N/A",
        "<NA>",
        "NaN",
        "NaT",
        "null",
        "nil",
        "None",
    ),
    *("unknown", "missing"),
)
"""Texts that name no patient, in any case, whatever data.missing_values says."""

_NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:e([+-]?[0-9]{1,6}))?")
_PLAIN = 64  # digits; a number of more is told with an exponent


def identify(text: str, rule: Rule) -> str:
    """Return the one name of a patient whose id is written `text`.

    Guarantee: naming a name again changes nothing; under "canonical" two numbers have one name
    exactly where they are equal, of any length, and a text has one whatever its case, width, blanks
    and invisible characters.

    Edge cases:
    - "canonical" takes `1E5` and `100000`, `007` and `7` for one patient: where those are two, the
      ledger is founded with "exact", which cuts off blanks alone;
    - letters of other alphabets that look alike, and typing errors, are two patients;
    - an exponent of more than 6 digits makes a text, and no number.
    """
    if rule == "exact":
        return text.strip()
    return _canonicalise(text)


def nobodies(missing_values: Iterable[str]) -> frozenset[str]:
    """Return the canonical names that stand for no patient: NOBODY and the study's own."""
    return frozenset(_canonicalise(text) for text in (*NOBODY, *missing_values))


def is_nobody(text: str, absent: frozenset[str]) -> bool:
    """Say whether a text names no patient; `absent` is from `nobodies`."""
    return _canonicalise(text) in absent


def _canonicalise(text: str) -> str:
    """Return the canonical name;
    a table of a million ids has mostly plain numbers, which need no folding.
    """
    if len(text) <= _PLAIN and text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    return _canonicalise_text(text)


@lru_cache(maxsize=65536)
def _canonicalise_text(text: str) -> str:
    """Fold width, case, other scripts' digits, blanks and what is invisible; a number is its value.

    Works on text alone: a float would make one of two ids above 2^53.
    """
    folded = _fold(text)
    # letters that fold once more after they were composed; two turns do for all that is assigned
    for _ in range(8):
        if (again := _fold(folded)) == folded:
            break
        folded = again
    return _spell_number(folded) or folded


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(map(_fold_character, text)).split())


def _fold_character(letter: str) -> str:
    if letter.isascii():
        return letter
    # soft hyphens, joiners, marks of order and of direction
    if unicodedata.category(letter) == "Cf":
        return ""
    digit = unicodedata.decimal(letter, None)
    return letter if digit is None else str(digit)


def _spell_number(text: str) -> str:
    """Return a decimal number's one spelling; empty where the text is none."""
    found = _NUMBER.fullmatch(text)
    if not found or not (found[2] or found[3]):
        return ""
    whole = found[2]
    fraction = found[3] or ""
    digits = (whole + fraction).lstrip("0")
    exponent = int(found[4] or 0) - len(fraction)
    exponent += len(digits) - len(digits.rstrip("0"))
    digits = digits.rstrip("0")
    if not digits:
        return "0"
    sign = "-" if found[1] == "-" else ""
    if 0 <= exponent <= _PLAIN:
        return sign + digits + "0" * exponent
    if -_PLAIN <= exponent < 0:
        digits = digits.rjust(1 - exponent, "0")
        return f"{sign}{digits[:exponent]}.{digits[exponent:]}"

    return f"{sign}{digits}e{exponent}"
