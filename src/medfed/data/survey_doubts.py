"""What is doubtful about several sites' tables,
found from their surveys by whoever compares them: see `doubts`.

A site's own doubts come in with its survey (`surveys.survey`); the others show only between sites:
one label in two spellings, a column that names the site, one unit here and another there.
"""

import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from medfed.core import quotes, toml
from medfed.core.checks import DataError, some, those
from medfed.core.refusals import Refusal, refuse
from medfed.data import clinical, numerals, scales
from medfed.data import units as measures
from medfed.data.doubts import (
    FEMALE,
    GAPS,
    HARMS,
    MALE,
    NO,
    YES,
    Doubt,
    Mend,
    fold,
    is_accepted,
    leave_out_column,
    name_mend,
    quote_cells,
)
from medfed.study import Data, Feature, described


def find(
    surveys: Mapping[str, Mapping[str, Any]], data: Data, claimed: bool = False
) -> list[Doubt]:
    """Return what is doubtful about the sites' tables,
    from what they tell (`surveys.survey`), in order of harm.

    Under a claim, which is for who holds the table alone, no cell is quoted.
    """
    with quotes.withhold(claimed):
        found = [
            *_merge_alike(surveys),
            *_find_site_spellings(surveys, data),
            *_find_in_labels(surveys, data),
            *_find_mixed_units(surveys, data),
            *_find_kinds(surveys, data),
        ]
        found += [
            *_find_text_spellings(surveys, data),
            *_find_units(surveys, data),
            *_find_scales(surveys),
            *_find_constants(surveys),
        ]

    order = list(HARMS)
    wrong = {doubt.column for doubt in found if doubt.harm == "error"}
    told = [doubt for doubt in found if doubt.harm == "error" or doubt.column not in wrong]
    kept = [doubt for doubt in told if not is_accepted(doubt, data)]

    return sorted(kept, key=lambda doubt: (order.index(doubt.code), doubt.column))


def check(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> None:
    """Raise every doubt that would change a result in silence."""
    errors = [doubt for doubt in find(surveys, data) if doubt.harm == "error"]
    refuse(
        [
            Refusal(DataError(doubt.sentence()), dict(list(doubt.mend.items())[:1]))
            for doubt in errors
        ]
    )


def warnings(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> list[str]:
    """Return what a run goes on with, said in sentences."""
    return [doubt.sentence() for doubt in find(surveys, data) if doubt.harm == "warning"]


def _merge_alike(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield what sites doubt of their own, once where several doubt alike."""
    alike: dict[tuple[str, str, str], list[Doubt]] = {}
    for site, survey in surveys.items():
        for told in survey.get("doubts", ()):
            doubt = Doubt.from_json(told, site)
            # several tables are joined by one column
            which = doubt.text if doubt.code == "unjoined" else ""
            alike.setdefault((doubt.code, doubt.column, which), []).append(doubt)
    for doubts in alike.values():
        # whose it is, no site knows
        sites = tuple(doubt.sites[0] for doubt in doubts if doubt.code != "footer")
        mend: dict[toml.Path, Any] = {}
        for path, value in (item for doubt in doubts for item in doubt.mend.items()):
            several = isinstance(value, list) and path in mend  # sites may have codes of their own
            mend[path] = (
                [*dict.fromkeys([*mend[path], *value])] if several else mend.get(path, value)
            )
        yield replace(doubts[0], sites=sites, count=sum(doubt.count for doubt in doubts), mend=mend)


def _find_site_spellings(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield that one site is two by the spelling of its name."""
    if data.site:
        words = YES | NO | FEMALE | MALE  # of which several mean one, but not as names
        rows = {
            site: survey["train"] + survey["test"]
            for site, survey in surveys.items()
            if fold(site) not in words
        }
        yield from _find_spellings("site-spelling", data.site, rows)


def _find_in_labels(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    counts = Counter[str]()
    for survey in surveys.values():
        counts.update(survey.get("labels", {}))
    if data.dictionary.get(data.target) and data.dictionary[data.target].categories:
        return
    yield from _find_second_header(counts, data)
    if len(counts) > _MOST_LABELS and (respelt := _doubt_numbers_as_text(data.target, counts)):
        yield respelt
        return

    if (
        data.task == "auto"
        and len(counts) > _MOST_LABELS
        and all(_NUMBER.fullmatch(label) for label in counts)
    ):
        text = (
            f"has {len(counts)} different numbers, which would be as many classes without an order"
        )
        mend: Mend = {("data", "task"): "regression"}
        yield Doubt("label-numbers", data.target, text, mend=mend, examples=quotes.examples(counts))

    yield from _find_spellings("label-spelling", data.target, counts)
    if gaps := [label for label in counts if label.casefold() in GAPS]:
        text = f"has the label {some(map(repr, gaps))}, which stands for no value in other tables"
        mend = {("data", "missing_values"): [*data.missing_values, *gaps]}
        yield Doubt(
            "label-missing", data.target, text, count=sum(counts[g] for g in gaps), mend=mend
        )


_MOST_LABELS = 10
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_WITH_UNIT = re.compile(r"[<>≤≥]?\s*[+-]?\d+(?:[.,]\d+)?\s*(%|°?[^\W\d_][\w/%²³°.-]{0,11})")


def units_of(texts: Iterable[str]) -> list[str]:
    """Return what stands behind numbers, the longest first,
    where it does so in most texts; else nothing.
    """
    every = list(texts)
    units = Counter(match[1] for text in every if (match := _WITH_UNIT.fullmatch(str(text))))
    if units.total() * 2 > len(every):
        return sorted(units, key=len, reverse=True)
    return []


def _find_kinds(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns that are numbers at one site and texts at another, and numbers with their
    unit in the cell.
    """
    for name in dict.fromkeys(
        name for survey in surveys.values() for name in survey.get("texts", ())
    ):
        if described(data.dictionary.get(name, Feature())):
            continue
        texts = {
            site: survey["texts"][name]
            for site, survey in surveys.items()
            if survey.get("texts", {}).get(name)
        }
        every = [text for found in texts.values() for text in found]
        declared = data.dictionary.get(name, Feature()).suffix

        if (units := units_of(every)) and len(measures.apart([*declared, *units])) > 1:
            if len(measures.apart(declared)) < 2:  # else it is told already
                one_each = [next(text for text in every if text.endswith(unit)) for unit in units]
                doubt = _doubt_units(
                    name, "" if quotes.are_withheld() else some(map(repr, [*declared, *units]))
                )
                yield replace(doubt, examples=quote_cells(name, one_each))
            continue

        if units:
            units = [*declared, *units]
            text, mend = name_mend(
                "holds numbers with their unit in the cell", name, "suffix", units
            )
            yield Doubt("units-in-cells", name, text, mend=mend, examples=quote_cells(name, every))
            continue

        if respelt := _doubt_numbers_as_text(name, every):
            yield respelt
            continue

        rows = {site: survey["train"] + survey["test"] for site, survey in surveys.items()}
        numbers = [
            s
            for s, one in surveys.items()
            if name in one["numbers"] and one["missing"][name] < rows[s]
        ]
        if numbers and texts:
            text = f"is a number at {those(numbers)} and text at {those(list(texts))}"
            yield Doubt(
                "kinds", name, text, mend=leave_out_column(name), examples=quote_cells(name, every)
            )


def _doubt_numbers_as_text(name: str, texts: Collection[str]) -> Doubt | None:
    """Return that most texts of a column are numbers,
    once their decimal signs or thousands are taken as such.
    """
    if (form := numerals.form_of(texts)) is None:
        return None
    path = ("data", "dictionary", name, "numbers")
    if form:
        either = ""
    else:
        either = f"; decimals or thousands, no cell says: {toml.key(*path)} = '1,5' or '1,234.5'"
    text = f"holds numbers spelt as texts, which would be categories{either}"
    mend: Mend = {path: form} if form else {}
    return Doubt("numbers-as-text", name, text, mend=mend, examples=quote_cells(name, texts))


def _find_mixed_units(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns of which a study takes off several units as if they were one."""
    used = {
        data.target,
        *(name for survey in surveys.values() for name in survey.get("missing", ())),
    }
    for name, feature in data.dictionary.items():
        if name in used and len(measures.apart(feature.suffix)) > 1:
            yield _doubt_units(name, some(map(repr, feature.suffix)))


def _doubt_units(name: str, told: str) -> Doubt:
    text = (
        f"holds numbers in several units{f' ({told})' if told else ''}, which would be taken "
        "for one"
    )
    return Doubt("units-mixed", name, f"{text}: a site's map has suffix and factor")


def _find_second_header(counts: Mapping[str, int], data: Data) -> Iterator[Doubt]:
    """Yield that a label is the column's own name: two exports were pasted with both headers."""
    names = [label for label in counts if fold(label) == fold(data.target)]
    if names:
        text = (
            f"has its own name as a label ({names[0]!r}): a second header among the records. "
            "Delete that row"
        )
        yield Doubt("label-header", data.target, text)


def _find_text_spellings(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the text columns whose categories differ by spelling alone."""
    for name in dict.fromkeys(
        name for survey in surveys.values() for name in survey.get("texts", ())
    ):
        if name in data.dictionary and data.dictionary[name].categories:
            continue
        counts = Counter(
            text for survey in surveys.values() for text in survey.get("texts", {}).get(name, ())
        )
        yield from _find_spellings("spelling", name, counts)


def _find_units(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns whose sites' medians belong to
    different units of the variable that the name says.
    """
    for name in dict.fromkeys(
        name for survey in surveys.values() for name in survey.get("medians", ())
    ):
        units: dict[str, list[tuple[str, float]]] = {}
        for site, survey in surveys.items():
            median = survey.get("medians", {}).get(name)
            if median is not None and (likely := clinical.proposal(name, median)):
                units.setdefault(likely[0].unit, []).append((site, median))

        typical = [statistics.median(median for _, median in found) for found in units.values()]
        if len(units) < 2 or min(typical) <= 0 or max(typical) < _APART * min(typical):
            continue
        told = "; ".join(
            (
                f"{those([site for site, _ in found])} about {found[0][1]:.3g}, as in "
                f"{unit or 'no unit'}"
            )
            for unit, found in units.items()
        )
        yield Doubt(
            "units-differ", name, f"seems to be in several units: {told}; a site's map has factor"
        )


def _find_scales(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield the columns whose medians lie a factor between units apart,
    while all sites are spread alike.
    """
    for name in dict.fromkeys(
        name for survey in surveys.values() for name in survey.get("spreads", ())
    ):
        spreads = {
            site: told
            for site, survey in surveys.items()
            if (told := survey.get("spreads", {}).get(name))
        }
        usual = sorted(spreads.values(), key=lambda told: told[3])[(len(spreads) - 1) // 2]
        apart: dict[tuple[float, bool], list[str]] = {}
        for site, told in spreads.items():
            if times := scales.factor(usual, told):
                apart.setdefault((times, told[3] > usual[3]), []).append(site)

        if not apart:
            continue
        odd = {site for sites in apart.values() for site in sites}
        usual_sites = [site for site in spreads if site not in odd]
        told_of = [f"about {_write_digits(usual[3])} at {those(usual_sites)}"]

        for (times, more), sites in apart.items():
            median = _write_digits(spreads[sites[0]][3])
            part = "" if more else "1/"
            told_of.append(f"about {median} at {those(sites)}, {part}{times:,.6g} times as much")

        text = (
            f"is spread alike at all sites, and its median is {' and '.join(told_of)}: another "
            "unit?"
        )
        yield Doubt("units-apart", name, f"{text} A site's map has factor")


def _write_digits(number: float) -> str:
    """Return a number with three digits, or all of a large one's before the point."""
    if number >= 1000:
        return f"{number:,.0f}"
    return f"{number:.3g}"


_APART = 5.0  # times, by which medians of sites in one unit hardly differ


def _find_constants(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield the columns that hold nothing, or one value, at all sites."""
    for name in dict.fromkeys(
        name for survey in surveys.values() for name in survey.get("missing", ())
    ):
        told = [survey for survey in surveys.values() if name in survey.get("missing", ())]
        leave = leave_out_column(name)
        if all(survey["missing"][name] == survey["train"] + survey["test"] for survey in told):
            yield Doubt("empty", name, "has no value at any site", mend=leave)
            continue

        single = [survey.get("single", {}).get(name) for survey in told]
        held = [value for value in single if value is not None]
        if len(held) < len(told) or not held:
            continue
        cells = quote_cells(
            name, (f"{value:.15g}" if isinstance(value, float) else value for value in held)
        )

        if len(set(held)) == 1:
            yield Doubt("constant", name, "has one value in all rows", mend=leave, examples=cells)
        elif len(set(held)) == len(held):
            text = "has one value at each site, and another at each: it names the site"
            yield Doubt("names-site", name, text, mend=leave, examples=cells)


def _find_spellings(code: str, column: str, counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Yield that texts mean the same: they differ in case,
    width or blanks, or are yes and no in several ways.
    """
    groups: dict[str, list[str]] = {}
    for text in counts:
        groups.setdefault(fold(text), []).append(text)
    for one, other in ((YES, NO), (FEMALE, MALE)):
        if len(groups) > 2 and set(groups) <= one | other:
            sides = [[text for text in counts if fold(text) in words] for words in (one, other)]
            groups = {side[0]: side for side in sides if side}

    recode: dict[str, str] = {}
    for texts in groups.values():
        best = max(texts, key=lambda text: (counts[text], text.islower(), text))
        recode |= {text: best for text in sorted(texts) if text != best}

    if recode:
        told = some(f"{text!r} beside {best!r}" for text, best in recode.items())
        text = "spells one value in several ways" + ("" if quotes.are_withheld() else f": {told}")
        text, mend = name_mend(text, column, "recode", recode)
        yield Doubt(code, column, text, mend=mend)
