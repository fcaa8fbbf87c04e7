"""From cleaned columns to numbers, agreed between sites without pooling a row.

An `Encoding` is the agreement: plain numbers and names that go to every site and into the model
file. Its centres and scales come from the data dictionary, or from counts and sums that sites
answer. The median and other quantiles are
exact: a float64 is found digit by digit, each time by asking how many values lie below sixteen
thresholds.

F features of the table, Q quantiles, M columns after encoding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medfed.core import toml
from medfed.core.checks import DataError, PlanError, some
from medfed.core.refusals import Refusal, refuse
from medfed.data.answers import HELD, from_word
from medfed.data.declared import declared_range
from medfed.data.encoding import Column, Encoding, Target
from medfed.data.features import features_of
from medfed.study import RANGE, Data, Feature

Ask = Callable[[str, dict[str, Any], dict[str, Tensor]], Tensor]
"""Put a question to every site and return the sum of the answers."""

NOTHING_FOUND: Mapping[str, tuple[float, ...]] = MappingProxyType({})

UNKNOWN = (-1.0, 1.0)
"""Stands for a range until it is found."""

_QUARTILES = (0.25, 0.5, 0.75)
_OUTER = ((0.05, 0.95, 4.0), (0.01, 0.99, 7.0))
_DIGIT_BITS = 4

ROBUST_CAP = HELD
"""Robust scaling: no encoded number is larger, so that one wrong cell cannot outweigh a table. It
cuts nothing of the bundled studies, whose largest is 5."""


def agree(
    surveys: dict[str, dict[str, Any]],
    data: Data,
    ask: Ask,
    public: bool = False,
    found: Mapping[str, tuple[float, ...]] = NOTHING_FOUND,
) -> Encoding:
    """Make the encoding that all sites will use, from their surveys and their answers to `ask`.

    With `public` nothing may come from patients: preprocess is then dictionary or none, and `ask`
    is not used. `found`: ranges of columns that declare none, which patients have paid for.

    Raises DataError or PlanError where sites' tables do not fit together, naming the sites.
    """
    # What there is: the target, the columns, and which of them get an indicator of gaps.
    data = _with_ranges(data, found)
    target = _agree_target(surveys, data)
    texts = _merge_categories(surveys, data)
    names = _order_features(surveys, data)
    indicators = _choose_indicators(surveys, names, data, public)

    # Centre and scale of each number: from the dictionary, none, or from what sites answer.
    numbers = [name for name in names if name not in texts]
    logged = [n for n in numbers if n in data.dictionary and data.dictionary[n].log]
    logs = {n: _log_floor(data.dictionary[n]) for n in logged}
    scales, fills, target = _agree_scales(numbers, logs, target, data, ask, public)

    # The columns, in one order for everybody.
    cap = {"dictionary": 2.0, "robust": ROBUST_CAP}.get(data.preprocess, 0.0)

    def make_column(name: str) -> Column:
        if name in texts:
            categories = data.dictionary.get(name, Feature()).categories or texts[name]
            return Column(name, "category", categories=categories, indicator=name in indicators)
        centre, scale = scales[name]
        return Column(
            name,
            "number",
            centre,
            scale,
            log=name in logs,
            floor=logs.get(name, 0.0),
            cap=cap,
            indicator=name in indicators,
            fill=fills.get(name, 0.0),
            found=tuple(found.get(name, ())),
        )

    columns = tuple(make_column(name) for name in names)
    return Encoding(columns, target, public or data.preprocess == "dictionary")


def _agree_scales(
    numbers: Sequence[str],
    logs: dict[str, float],
    target: Target,
    data: Data,
    ask: Ask,
    public: bool,
) -> tuple[dict[str, tuple[float, float]], dict[str, float], Target]:
    """Return each number's centre and scale, what fills its gaps where that is not the centre, and
    the target with its own.
    """
    fills: dict[str, float] = {}
    if data.preprocess == "dictionary":
        refuse(_refuse_unranged(numbers, data))
        scales = {name: _public_scale(data.dictionary[name]) for name in numbers}
        if target.task == "regression":
            target = _scale_by_dictionary(target, data)

    elif data.preprocess == "none":
        scales = dict.fromkeys(numbers, (0.0, 1.0))
        if public:
            refuse(_refuse_unranged(numbers, data))
            fills = {name: _public_scale(data.dictionary[name])[0] for name in numbers}

    else:
        asked = [*numbers, ""] if target.task == "regression" else numbers
        if data.preprocess == "robust":
            fitted = fit_widely(asked, logs, ask)
        else:
            fitted = fit("standard", asked, logs, ask)
        scales = {name: fitted[name] for name in numbers}
        if target.task == "regression":
            centre, scale = fitted[""]
            target = dataclasses.replace(target, centre=centre, scale=scale)

    if public and target.task == "regression":
        declared_range(data)
    return scales, fills, target


def _choose_indicators(
    surveys: dict[str, dict[str, Any]], names: Sequence[str], data: Data, public: bool
) -> set[str]:
    """Return the features that get a column of gaps:
    those that declare it, and with gaps in training rows.

    `public`: the first alone, as gaps are patients'. A column that a site lacks is a gap in all of
    its rows.
    """
    indicators = {
        name for name in names if name in data.dictionary and data.dictionary[name].indicator
    }
    if public:
        return indicators
    for survey in surveys.values():
        indicators |= {name for name, count in survey["train_missing"].items() if count}
        indicators |= {name for name in names if name not in survey["missing"]}
    return indicators


def _scale_by_dictionary(target: Target, data: Data) -> Target:
    """Return a regression's target with the centre and scale of its declared range,
    which becomes [-2, 2].
    """
    low, high = data.dictionary.get(data.target, Feature()).range or (0.0, 0.0)
    if low == high:
        where = toml.key("data", "dictionary", data.target, "range")
        raise PlanError(f"data.preprocess='dictionary' needs {where} for the target")
    return dataclasses.replace(target, centre=(low + high) / 2, scale=(high - low) / 4)


def with_range(column: Column, ends: tuple[float, ...]) -> Column:
    """Return a column with the range that was found for it."""
    centre, scale = _public_scale(Feature(range=ends))
    return dataclasses.replace(column, centre=centre, scale=scale, found=ends)


def _with_ranges(data: Data, found: Mapping[str, tuple[float, ...]]) -> Data:
    """Return the data table with the ranges that were found in its dictionary."""
    entries = {
        n: dataclasses.replace(data.dictionary.get(n, Feature()), range=tuple(r))
        for n, r in found.items()
    }
    if entries:
        return dataclasses.replace(data, dictionary={**data.dictionary, **entries})
    return data


def fit(
    kind: Literal["robust", "standard"], names: Sequence[str], logs: dict[str, float], ask: Ask
) -> dict[str, tuple[float, float]]:
    """Return each feature's (centre, scale) over all sites' training values;
    a constant feature has scale 1.

    Args:
        kind: robust is median and interquartile range, equal to numpy.quantile of the pooled values
            to the last bit; standard is mean and standard deviation (divided by n).
        names: the features, F of them; "" is the target.
        logs: features whose logarithm is meant, with its floor.
        ask: puts a question to every site and returns the sum of the answers.
    """
    if not names:
        return {}
    header = {"names": list(names), "logs": logs}
    known_F = ask("known", header, {})

    if kind == "robust":
        q_FQ = _find_quantiles(_QUARTILES, known_F, header, ask)
        centres = q_FQ[:, 1]
        scales = q_FQ[:, 2] - q_FQ[:, 0]
    else:
        count_F = np.maximum(known_F.numpy(), 1)
        centres = ask("sum", header, {}).numpy() / count_F
        scales = np.sqrt(
            ask("squares", header, {"centre": torch.from_numpy(centres)}).numpy() / count_F
        )

    scales = np.where((scales > 0) & np.isfinite(scales), scales, 1.0)
    return {n: (float(c), float(s)) for n, c, s in zip(names, centres, scales, strict=True)}


def fit_widely(
    names: Sequence[str], logs: dict[str, float], ask: Ask
) -> dict[str, tuple[float, float]]:
    """Return each feature's (centre, scale) for robust scaling: `fit`'s median and IQR where they
    are a scale, else mean and standard deviation of cells that are held.

    An IQR is no scale of mostly zero counts, rare events or heavy tails. So a span of at least a
    quarter of that of the middle 90 %, and a seventh of that of the middle 98 %, says how far cells
    may lie from the median before they are held: at most 7 such spans, which 98 of a hundred do.
    Where all those quantiles coincide the span is the root mean square distance from the median.

    A column whose span is wider than its IQR, or whose held cells lie more than a span from the
    median in the root mean square, takes the mean and the standard deviation of its held cells:
    it would else outweigh the others, and push the intercept. Of bell-shaped columns the IQR is the
    widest of the three, and `fit`'s bits stay.
    """
    if not names:
        return {}
    header = {"names": list(names), "logs": logs}
    known_F = ask("known", header, {})
    outer = [q for low, high, _ in _OUTER for q in (low, high)]
    q_FQ = _find_quantiles((*_QUARTILES, *outer), known_F, header, ask)
    count_F = np.maximum(known_F.numpy(), 1)
    centre_F = q_FQ[:, 1]
    iqr_F = q_FQ[:, 2] - q_FQ[:, 0]

    # The span: the widest of three, or the distance from the median where all three are nothing.
    span_F = iqr_F
    for place, (_, _, spans) in enumerate(_OUTER):
        low_F = q_FQ[:, 3 + 2 * place]
        high_F = q_FQ[:, 4 + 2 * place]
        wide_F = high_F / spans - low_F / spans
        span_F = np.where(np.isfinite(wide_F), np.maximum(span_F, wide_F), span_F)

    centre = torch.from_numpy(centre_F.copy())
    if (flat_F := (span_F == 0) & (known_F.numpy() > 1)).any():
        square_F = ask("squares", header, {"centre": centre}).numpy()
        span_F = np.where(flat_F, np.sqrt(square_F / count_F), span_F)
    span_F = np.where((span_F > 0) & np.isfinite(span_F), span_F, 1.0)

    # Mean and standard deviation of what is held, in spans from the median.
    held = ask("held", header, {"centre": centre, "span": torch.from_numpy(span_F)}).numpy()
    mean_F, square_F = (held / count_F[:, None]).T
    deviation_F = np.sqrt(np.maximum(square_F - mean_F**2, 0))
    taken_F = ((span_F != iqr_F) | (deviation_F > 1)) & (deviation_F > 0)
    mean_F = centre_F + mean_F * span_F
    deviation_F = deviation_F * span_F
    taken_F &= (deviation_F > 0) & np.isfinite(mean_F) & np.isfinite(deviation_F)

    centre_F = np.where(taken_F, mean_F, centre_F)
    scale_F = np.where(taken_F, deviation_F, span_F)
    return {n: (float(c), float(s)) for n, c, s in zip(names, centre_F, scale_F, strict=True)}


def _find_quantiles(
    quantiles: Sequence[float], known_F: Tensor, header: dict[str, Any], ask: Ask
) -> np.ndarray:
    """Return quantiles [F, Q], as numpy.quantile finds them; of a feature nobody has, zeros."""
    known = known_F.numpy()
    place_FQ = np.maximum(known - 1, 0)[:, None] * np.array(quantiles)
    low_FQ = np.floor(place_FQ).astype(np.int64)
    high_FQ = np.minimum(low_FQ + 1, np.maximum(known - 1, 0)[:, None])
    found = _find_order_statistics(np.concatenate([low_FQ, high_FQ], 1), header, ask)
    low = found[:, : len(quantiles)]
    high = found[:, len(quantiles) :]
    t = place_FQ - low_FQ
    # as numpy.quantile does
    between = np.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1 - t))
    return np.where(known[:, None] > 0, between, 0.0)


def _find_order_statistics(rank_FQ: np.ndarray, header: dict[str, Any], ask: Ask) -> np.ndarray:
    """Return the values of given ranks,
    digit by digit from the highest, sixteen thresholds a question.
    """
    prefix_FQ = np.zeros(rank_FQ.shape, dtype=np.uint64)
    digits = np.arange(1 << _DIGIT_BITS, dtype=np.uint64)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        threshold = prefix_FQ[..., None] | (digits << np.uint64(shift))
        below = ask(
            "below", header, {"threshold": torch.from_numpy(threshold.view(np.int64))}
        ).numpy()
        # the highest threshold with at most `rank` values below
        digit_FQ = (below <= rank_FQ[..., None]).sum(-1) - 1
        prefix_FQ |= digits[np.maximum(digit_FQ, 0)] << np.uint64(shift)
    return from_word(prefix_FQ)


def _agree_target(surveys: dict[str, dict[str, Any]], data: Data) -> Target:
    if data.task == "regression":
        return Target(data.target, "regression")
    return classes(sorted({label for s in surveys.values() for label in s["labels"]}), data)


def classes(labels: Sequence[str], data: Data) -> Target:
    """Return a target of these labels, sorted; raise DataError where they do not fit the task or
    the positive one.
    """
    labels = list(labels)
    if len(labels) < 2:
        raise DataError(
            f"data.target={data.target!r} has one value, {labels}; there is nothing to learn"
        )
    if data.positive and data.positive not in labels:
        raise DataError(
            f"data.positive={data.positive!r} is not a label; labels: {some(labels, 10)}"
        )
    if data.task == "multiclass" or (data.task == "auto" and len(labels) > 2 and not data.positive):
        return Target(data.target, "multiclass", tuple(labels))
    if len(labels) > 2:
        raise DataError(
            f"data.target={data.target!r} has {len(labels)} labels ({some(labels)}); a binary "
            "target has two. Set data.task='multiclass' and leave data.positive empty."
        )

    positive = data.positive or labels[-1]
    return Target(
        data.target, "binary", (next(name for name in labels if name != positive), positive)
    )


def _merge_categories(surveys: dict[str, dict[str, Any]], data: Data) -> dict[str, tuple[str, ...]]:
    """Return the union of each text column's categories; a site may miss a column wholly."""
    union: dict[str, set[str]] = {}
    for survey_ in surveys.values():
        for name, categories in survey_["texts"].items():
            union.setdefault(name, set()).update(categories)
    for site, survey_ in surveys.items():
        for name in survey_["numbers"]:
            size = survey_["train"] + survey_["test"]
            if name in union and survey_["missing"][name] < size:
                raise DataError(
                    f"column {name!r} is a number at site {site!r} and text elsewhere. Make them "
                    f"alike, or declare {toml.key('data', 'dictionary', name, 'categories')}."
                )
    declared = {name for name, feature in data.dictionary.items() if feature.categories}
    return {name: tuple(sorted(c)) for name, c in union.items() if c or name in declared}


def _order_features(surveys: dict[str, dict[str, Any]], data: Data) -> list[str]:
    names = list(dict.fromkeys(n for s in surveys.values() for n in s["missing"]))
    return features_of(sorted(names), data)


def _refuse_unranged(names: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield, as one, the numbers without a public range."""
    absent = [name for name in names if not data.dictionary.get(name, Feature()).range]
    if absent:
        first = absent[0]
        several = len(absent) > 1
        if several:
            which = f"{len(absent)} columns of numbers ({some(map(repr, absent))})"
        else:
            which = repr(first)
        more = " and so on" if several else ""
        text = (
            f"no public range for {which}. Give "
            f"{toml.key('data', 'dictionary', first, 'range')}{more}, or set "
            "data.preprocess='robust' (no privacy claim is possible then)."
        )
        yield Refusal(
            PlanError(text), {("data", "dictionary", name, "range"): RANGE for name in absent}
        )


def _public_scale(feature: Feature) -> tuple[float, float]:
    """Map the public range onto [-2, 2]."""
    low, high = feature.range
    if feature.log:
        low = float(np.log(_log_floor(feature)))
        high = float(np.log(high))
    return (low + high) / 2, (high - low) / 4


def _log_floor(feature: Feature) -> float:
    low, high = feature.range
    if low > 0:
        return low
    return high / 100
