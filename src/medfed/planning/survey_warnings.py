"""What surveys of the sites' tables say before training:
columns that are renamed, values to be warned of.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from medfed.core import toml
from medfed.core.checks import DataError, closest, rows_of, some, those
from medfed.core.refusals import Refusal
from medfed.data import survey_doubts
from medfed.data.encoding import Encoding
from medfed.planning.resolved import algorithm_name
from medfed.privacy import guarantee as guarantees
from medfed.robust import attacks
from medfed.study import Data, Study


def find_renamed(surveys: Mapping[str, Mapping[str, Any]], study: Study) -> Iterator[Refusal]:
    """Yield what a site lacks for another name's sake: it alone has a column of that kind that
    nobody else has.

    A site with a map has said how its columns differ, so whatever it lacks then is to be declared
    absent.
    """
    if study.sites.kind == "device" or not study.data.site or len(surveys) < 2:
        return

    known = {name: _shares_known(survey) for name, survey in surveys.items()}
    for name, survey in surveys.items():
        own = known[name]
        others = [known[other] for other in surveys if other != name]
        declared = study.data.absent.get(name, ())

        lacks = [
            column for column in survey["missing"] if not own[column] and column not in declared
        ]
        usual = [
            column for column in lacks if any(other.get(column, 0) >= _USUAL for other in others)
        ]
        alone = [
            n
            for n, share in own.items()
            if share >= _USUAL and not any(other.get(n) for other in others)
        ]

        for column in usual:
            kind = _kind_of(column, surveys.values())
            alike = [n for n in alone if _kind_of(n, [survey]) == kind]
            by_chance = not alike or survey["train"] + survey["test"] < _ENOUGH
            if by_chance and name not in study.data.site_maps:
                continue
            yield Refusal(DataError(_say_missing(name, column, kind, alike)))


_USUAL = 0.5
"""Share of a column's cells that are known, from which it is missing elsewhere by no chance."""

_ENOUGH = 5
"""Rows of a site, from which a column is missing by no chance."""


def _kind_of(column: str, surveys: Iterable[Mapping[str, Any]]) -> str:
    """Return "text" or "number": what a column holds at these sites."""
    if any(survey["texts"].get(column) for survey in surveys):
        return "text"
    return "number"


def _shares_known(survey: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of each column's cells that are known."""
    rows = max(1, survey["train"] + survey["test"])
    return {name: 1 - count / rows for name, count in survey["missing"].items()}


def _say_missing(site: str, column: str, kind: str, alike: Sequence[str]) -> str:
    """Say that a site lacks a column that others have, and what it may be called there."""
    beside = f"; {some(map(repr, alike))} of the same kind is there alone" if alike else ""
    meant = closest(column, alike)
    if meant is None and len(alike) == 1:
        meant = alike[0]
    name = toml.key(meant) if meant else "ITS_NAME"
    return (
        f"site {site!r}, column {column!r}: expected a {kind}, as at other sites, found no "
        f"value{beside}. Where it has another name, say so in the site's map: [rename] {name} = "
        f"{toml.literal(column)}. Where it is not measured, declare it: "
        f"{toml.key('data', 'absent', site)} = [{toml.literal(column)}]"
    )


def warn(surveys: Mapping[str, Mapping[str, Any]], encoding: Encoding, study: Study) -> list[str]:
    """Return what a person should know before training; under a claim nothing that tells of
    training patients.
    """
    warnings = _warn_of_study(list(surveys), encoding, study)
    if guarantees.asked(study):
        return warnings

    return [
        *warnings,
        *_warn_of_dropped(surveys),
        *survey_doubts.warnings(surveys, study.data),
        *_warn_of_strange_values(surveys, study),
        *_warn_of_lacking(surveys, encoding, study.data),
    ]


def _warn_of_study(sites: Sequence[str], encoding: Encoding, study: Study) -> list[str]:
    """Tell what the study asks for that is easily overlooked."""
    found = []
    robust = study.robustness
    if robust.attack:
        liars = attacks.liars(sites, robust.malicious, study.study.seed)
        found.append(
            f"robustness.attack={robust.attack!r}: a simulation in which {some(liars)} lie; its "
            "model is for no use"
        )
    if robust.malicious > robust.max_malicious:
        found.append(
            f"robustness.malicious={robust.malicious:g} is more than the rule is set to bear "
            f"(max_malicious={robust.max_malicious:g})"
        )

    if algorithm_name(study) != study.training.algorithm:
        found.append(
            f"training.algorithm={study.training.algorithm!r} is FedAvg here: privacy.noise="
            f"{guarantees.mode(study)!r} takes one step a round, where both are the same"
        )
    if encoding.target.task == "binary" and _is_guessed(encoding.target.labels, study):
        other, positive = encoding.target.labels
        found.append(
            f"data.positive is left open: {positive!r} counts as positive, as it follows "
            f"{other!r} in the alphabet, and precision, recall and F1 are of it. Write down "
            "which one is meant."
        )

    if guarantees.asked(study) and study.privacy.simulation_only:
        found.append("privacy.simulation_only=true: noise is seeded, so nothing is claimed")
    return found


def _warn_of_dropped(surveys: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tell how many rows data.drop leaves out; those of no site once, as they are nobody's."""
    found = []
    for name, survey in surveys.items():
        for what, count in survey.get("dropped", {}).items():
            where = "" if what == "rows without site" else f"site {name!r}: "
            found.append(f"{where}{count} {what} left out, as data.drop says")
    return list(dict.fromkeys(found))


NEGATIVE = (
    "nein",
    "non",
    "0",
    "no",
    "n",
    "false",
    "f",
    "negative",
    "neg",
    "alive",
    "benign",
    "control",
    "healthy",
)
"""Texts that name the absence of what is looked for, whatever their case."""


def _is_guessed(labels: Sequence[str], study: Study) -> bool:
    """Say whether nobody has written which label is positive, and the labels do not say it."""
    return (
        study.left_open("data.positive")
        and not study.data.positive
        and labels[0].lower() not in NEGATIVE
    )


def _warn_of_lacking(
    surveys: Mapping[str, Mapping[str, Any]], encoding: Encoding, data: Data
) -> list[str]:
    """Tell what sites lack; what many lack alike is told once."""
    said: dict[str, list[str]] = {}

    def say(what: str, name: str) -> None:
        said.setdefault(what, []).append(name)

    for name, survey in surveys.items():
        if survey["train"] == 0:
            say("has no training row: it validates from outside, tested and never trained on", name)
        if survey["test"] == 0:
            say("has no test patient; its own figures are null", name)
        if encoding.target.task != "regression" and len(survey["train_labels"]) == 1:
            label = next(iter(survey["train_labels"]))
            say(
                f"trains on one class only ({label!r}); its own model cannot tell classes apart",
                name,
            )

        rows = survey["train"] + survey["test"]
        declared = data.absent.get(name, ())
        empty = [c.name for c in encoding.columns if survey["missing"].get(c.name, 0) == rows]
        absent = [column for column in empty if column not in declared]
        if absent:
            say(
                f"has no value at all of {some(absent, 8)}; they are set to the other sites' "
                "centre",
                name,
            )

    found: list[str] = []
    for what, names in said.items():
        if len(names) > _FEW:
            found.append(f"each of {those(names)} {what}")
        else:
            found.extend(f"site {name!r} {what}" for name in names)
    return found


_FEW = 5
"""Sites that are told of one by one."""


def _warn_of_strange_values(surveys: Mapping[str, Mapping[str, Any]], study: Study) -> list[str]:
    """Tell which numbers lie beyond their declared range, or absurdly far from the others where
    none is declared.
    """
    found = []

    devices = study.sites.kind == "device"
    for whose, column, rows in _tell_rows(surveys, "outside", devices):
        low, high = study.data.dictionary[column].range
        if column != study.data.target:
            done = "they were set to its ends"
        else:
            done = "they are taken as they are"
        found.append(
            f"{whose}, column {column!r}: {rows} outside the declared range [{low:g}, {high:g}]; "
            f"{done}. Correct them, or {toml.key('data', 'dictionary', column, 'range')}"
        )

    for whose, column, rows in _tell_rows(surveys, "far", devices):
        found.append(
            f"{whose}, column {column!r}: {rows} at least 1,000 times as far from the median as "
            "any other. Correct them, name the text in data.missing_values, or declare "
            f"{toml.key('data', 'dictionary', column, 'range')} = [low, high], which values are "
            "then held to"
        )
    return found


def _tell_rows(
    surveys: Mapping[str, Mapping[str, Any]], kind: str, devices: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield whose, column and rows of what a survey found; all devices as one, many sites too."""
    columns: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, survey in surveys.items():
        for column, told in survey.get(kind, {}).items():
            whose = "all devices" if devices else name
            columns.setdefault(column, {}).setdefault(whose, []).append(told)

    for column, sites in columns.items():
        if len(sites) > _FEW:
            counts = {name: sum(told["rows"] for told in parts) for name, parts in sites.items()}
            most = max(counts, key=counts.__getitem__)
            yield f"{len(sites)} sites (most at {most!r})", column, f"{sum(counts.values())} values"
            continue
        for name, parts in sites.items():
            count = sum(told["rows"] for told in parts)
            first = [row for told in parts for row in told["first"]]
            word = "rows" if count > 1 else "row"
            yield f"site {name!r}", column, f"{word} {rows_of(first[:5], count)}"
