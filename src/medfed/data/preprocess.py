"""From cleaned columns to numbers, agreed between sites without pooling a row.

An `Encoding` is the agreement: plain numbers and names that go to every site and into the model file. Its centres and
scales come from the data dictionary, or from counts and sums that sites answer. The median and other quantiles are
exact: a float64 is found digit by digit, each time by asking how many values lie below sixteen thresholds.

F features of the table, Q quantiles, M columns after encoding.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medfed.core import toml
from medfed.core.checks import DataError, PlanError, some
from medfed.core.refusals import Refusal, refuse
from medfed.core.types import Task
from medfed.data import doubts, scales
from medfed.data.federated import Rows
from medfed.data.tables import SiteTable, declared_labels, declared_range
from medfed.features import features_of
from medfed.study import RANGE, Data, Feature

Ask = Callable[[str, dict[str, Any], dict[str, Tensor]], Tensor]
"""Put a question to every site and return the sum of the answers."""

NOTHING_FOUND: Mapping[str, tuple[float, ...]] = MappingProxyType({})

UNKNOWN = (-1.0, 1.0)
"""Stands for a range until it is found."""

_QUARTILES = (0.25, 0.5, 0.75)
_OUTER = ((0.05, 0.95, 4.0), (0.01, 0.99, 7.0))
_DIGIT_BITS = 4

ROBUST_CAP = 10.0
"""Robust scaling: no encoded number is larger, so that one wrong cell cannot outweigh a table. It cuts nothing of the
bundled studies, whose largest is 5."""


@dataclass(frozen=True)
class Column:
    """How one feature becomes numbers."""

    name: str
    kind: Literal["number", "category"]
    centre: float = 0.0
    scale: float = 1.0
    log: bool = False
    floor: float = 0.0  # values are raised to it before the logarithm
    cap: float = 0.0  # above 0: encoded values are held in [-cap, cap]
    categories: tuple[str, ...] = ()
    indicator: bool = False  # one more column: 1 where the value is missing
    fill: float = 0.0  # what a public encoding puts into a gap, encoded
    found: tuple[float, ...] = ()  # the range, where none is declared: from noised counts of training patients

    def names(self) -> list[str]:
        """Return the names of the encoded columns."""
        if self.kind == "number":
            values = [self.name]
        elif len(self.categories) == 2:
            values = [f"{self.name}={self.categories[1]}"]
        else:
            values = [f"{self.name}={category}" for category in self.categories]
        return [*values, f"{self.name} missing"] if self.indicator else values


@dataclass(frozen=True)
class Target:
    """What is predicted: the labels in order (the last of two is positive), or a number's centre and scale."""

    name: str
    task: Task
    labels: tuple[str, ...] = ()
    centre: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """C, the model's outputs."""
        return len(self.labels) if self.task == "multiclass" else 1


@dataclass(frozen=True)
class Encoding:
    """The agreement between sites on how records become numbers."""

    columns: tuple[Column, ...]
    target: Target
    public: bool = False  # nothing in it was computed from patients, and a gap becomes the middle of the public range

    def names(self) -> list[str]:
        """Return the names of the encoded columns, M of them."""
        return [name for column in self.columns for name in column.names()]

    def found(self) -> dict[str, tuple[float, ...]]:
        """Return the ranges that were found for columns which declare none."""
        return {column.name: column.found for column in self.columns if column.found}

    def invented(self, rows: int) -> Tensor:
        """Return made-up rows [rows, M], float32, all different and the same for everybody: nobody's records."""
        rng = np.random.default_rng(0)
        blocks = []
        for column in self.columns:
            if column.kind == "number":
                blocks.append(np.clip(rng.standard_normal((rows, 1)), -2, 2))
            else:
                hot = np.eye(len(column.categories))[rng.integers(len(column.categories), size=rows)]
                blocks.append(hot[:, 1:] if len(column.categories) == 2 else hot)
            if column.indicator:
                blocks.append(rng.integers(2, size=(rows, 1)).astype(np.float64))
        return torch.from_numpy(np.concatenate(blocks, 1).astype(np.float32)) if blocks else torch.zeros(rows, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the encoding as plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Encoding":
        """Read what `to_json` wrote."""
        listed = ("categories", "found")
        columns = tuple(Column(**{**c, **{key: tuple(c.get(key, ())) for key in listed}}) for c in value["columns"])
        target = Target(**{**value["target"], "labels": tuple(value["target"]["labels"])})
        return cls(columns, target, value["public"])

    def encode(self, table: SiteTable, rows: np.ndarray, fit_rows: np.ndarray, site: np.ndarray | None = None) -> Rows:
        """Encode the rows marked in `rows`; what is missing is filled from those marked in `fit_rows`.

        A number is filled with the median of the site's own encoded training values, a category with the share of each
        category among them; a feature that the whole site lacks with zero, the centre of all sites. A public encoding
        fills every gap with a constant, so that no patient moves another's row. A table of several sites says which
        owns each row (`site` [rows], ascending).
        """
        site_N = np.zeros(len(table), dtype=np.int64) if site is None else site
        blocks = [self._block(column, table, rows, fit_rows, site_N) for column in self.columns]
        x = np.concatenate(blocks, 1) if blocks else np.zeros((int(rows.sum()), 0))
        large = np.flatnonzero((np.abs(x) > np.finfo(np.float32).max).any(0))
        if len(large):
            names = [self.names()[column] for column in large]
            raise DataError(
                f"{some(names)}: values beyond 3e38 after encoding; give another unit or preprocess='robust'"
            )
        return Rows(
            torch.from_numpy(x.astype(np.float32)), self._labels(table, rows), torch.from_numpy(table.patient[rows])
        )

    def _block(
        self, column: Column, table: SiteTable, rows: np.ndarray, fit_rows: np.ndarray, site_N: np.ndarray
    ) -> np.ndarray:
        if column.kind == "number":
            values = _encode_number(column, table.numbers.get(column.name, np.full(len(table), np.nan)))[:, None]
        else:
            values = _encode_category(column, table.texts.get(column.name, np.full(len(table), None)))
        missing = np.isnan(values[:, 0])
        sites, known = int(site_N[-1]) + 1 if len(site_N) else 1, fit_rows & ~missing
        fill_K = np.full((sites, values.shape[1]), column.fill)
        if known.any() and missing.any() and not self.public:
            centre = _medians if column.kind == "number" else _means
            of, found = centre(values[known], site_N[known])
            fill_K[of] = found
        filled: np.ndarray = np.where(missing[:, None], fill_K[site_N], values)
        if column.indicator:
            filled = np.concatenate([filled, missing[:, None]], 1)
        chosen: np.ndarray = filled[rows]
        return chosen

    def _labels(self, table: SiteTable, rows: np.ndarray) -> Tensor:
        label = table.label[rows]
        if self.target.task == "regression":
            return torch.from_numpy(((label - self.target.centre) / self.target.scale).astype(np.float32))
        code = {name: number for number, name in enumerate(self.target.labels)}
        if unknown := sorted({str(name) for name in label} - code.keys()):
            which = "" if self.public else f": {some(unknown)}"
            raise DataError(
                f"target {self.target.name!r} has a label that is not declared{which}. Declare it in "
                f"{toml.key('data', 'dictionary', self.target.name, 'categories')}, or correct the rows."
            )
        codes = torch.tensor([code[name] for name in label], dtype=torch.int64)
        return codes.float() if self.target.task == "binary" else codes


def _medians(values: np.ndarray, site_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sites that have values [n, 1], and the median of each [K, 1]."""
    of, size_K = np.unique(site_N, return_counts=True)
    if len(of) == 1:
        return of, np.median(values, 0)[None]
    ordered = values[np.lexsort((values[:, 0], site_N))]
    start_K = np.cumsum(size_K) - size_K
    return of, (ordered[start_K + (size_K - 1) // 2] + ordered[start_K + size_K // 2]) / 2


def _means(values: np.ndarray, site_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sites that have values [n, C], zeros and ones, and the mean of each [K, C]."""
    of, first, size_K = np.unique(site_N, return_index=True, return_counts=True)
    return of, np.add.reduceat(values, first, 0) / size_K[:, None]


def survey(table: SiteTable, data: Data) -> dict[str, Any]:
    """Return what a site tells of its table before a study: sizes, columns, categories, labels and missing counts.

    Categories, and the gaps that decide on indicator columns, are those of the training rows.
    """
    train = ~table.test
    gaps = {n: np.isnan(v) for n, v in table.numbers.items()}
    gaps |= {n: np.array([x is None for x in v], dtype=bool) for n, v in table.texts.items()}
    return {
        "train": int(train.sum()),
        "test": int(table.test.sum()),
        "patients": len(np.unique(table.patient)),
        "numbers": sorted(table.numbers),
        "texts": {n: sorted({x for x in v[train] if x is not None}) for n, v in sorted(table.texts.items())},
        "missing": {n: int(gaps[n].sum()) for n in table.features()},
        "train_missing": {n: int(gaps[n][train].sum()) for n in table.features()},
        "labels": {} if data.task == "regression" else _label_counts(table.label),
        "train_labels": {} if data.task == "regression" else _label_counts(table.label[train]),
        "outside": {n: _counted(rows) for n, rows in table.found.outside.items()},
        "far": {n: _counted(rows) for n, rows in table.found.far.items()},
        "single": _single(table),
        "medians": _medians_of(table, data),
        "spreads": _spreads_of(table, data),
        "doubts": [doubt.told() for doubt in table.found.doubts],
        **({"dropped": dict(table.found.dropped)} if table.found.dropped else {}),
    }


def _medians_of(table: SiteTable, data: Data) -> dict[str, float]:
    """Return the median of each number that may be in several units, at a site of more than a few records."""
    if len(table) < doubts.FEW:
        return {}
    known = {
        name: values[np.isfinite(values)]
        for name, values in table.numbers.items()
        if name not in data.dictionary and doubts.may_be_in_several_units(name)
    }
    return {name: float(np.median(values)) for name, values in known.items() if len(values) >= doubts.FEW}


def _spreads_of(table: SiteTable, data: Data) -> dict[str, list[float]]:
    """Return quantiles of each number without a range, by which units show, at a site of more than a few records."""
    if len(table) < doubts.FEW:
        return {}
    names = [name for name in table.numbers if name not in data.dictionary or not data.dictionary[name].range]
    found = {name: scales.spread(table.numbers[name], doubts.FEW) for name in names}
    return {name: told for name, told in found.items() if told}


def _single(table: SiteTable) -> dict[str, float | str]:
    """Return the value of each feature that has one value in all rows."""
    found: dict[str, float | str] = {}
    for name, values in table.numbers.items():
        if len(values) and values[0] == values[-1] and (values == values[0]).all():
            found[name] = float(values[0])
    for name, texts in table.texts.items():
        if len(texts) and texts[0] is not None and texts[0] == texts[-1] and (texts == texts[0]).all():
            found[name] = str(texts[0])
    return found


def _counted(rows: Sequence[int]) -> dict[str, Any]:
    return {"rows": len(rows), "first": list(rows[:5])}


def public_survey(table: SiteTable, data: Data, declared: int, test: int) -> dict[str, Any]:
    """Return a survey that tells nothing of private patients: the declared size, and what the dictionary declares.

    `test`: how many records are held out, where they are public. Raises PlanError for what is not declared.
    """
    return declared_survey(table.features(), data, declared, test)


def declared_survey(names: Sequence[str], data: Data, declared: int, test: int) -> dict[str, Any]:
    """Return a public survey of features of these names; see `public_survey`."""
    categories = {n: data.dictionary[n].categories for n in names if n in data.dictionary}
    labels = {} if data.task == "regression" else dict.fromkeys(declared_labels(data))
    return {
        "train": declared,
        "test": test,
        "patients": None,
        "numbers": [n for n in names if not categories.get(n)],
        "texts": {n: sorted(c) for n, c in sorted(categories.items()) if c},
        "missing": dict.fromkeys(names, 0),
        "train_missing": dict.fromkeys(names, 0),
        "labels": labels,
        "train_labels": labels,
    }


def answer(
    table: SiteTable, question: str, names: Sequence[str], logs: dict[str, float], ask: dict[str, Tensor]
) -> Tensor:
    """Answer a coordinator's question about the site's training values: counts (int64) or sums (float64).

    "known": how many values each feature has. "below": how many lie below thresholds [F, Q, 16]. "sum": their sum.
    "squares": the sum of squared distances from the centres [F].
    """
    values_F = [training_values(table, name, logs) for name in names]
    match question:
        case "known":
            return torch.tensor([len(v) for v in values_F], dtype=torch.int64)
        case "below":
            return _ranks([np.sort(_word(v)) for v in values_F], ask["threshold"])
        case "sum":
            return torch.tensor([float(v.sum()) for v in values_F], dtype=torch.float64)
        case "squares":
            centres = ask["centre"].tolist()
            return torch.tensor(
                [float(((v - c) ** 2).sum()) for v, c in zip(values_F, centres, strict=True)], dtype=torch.float64
            )
    raise DataError(f"question={question!r} is not known; run the same medfed everywhere")


def answer_each(
    tables: Sequence[SiteTable], question: str, names: Sequence[str], logs: dict[str, float], ask: dict[str, Tensor]
) -> Tensor:
    """Return `answer` of each table, [K, ...]. Counts of many sites come from one pass over all values of a feature."""
    if question == "below" and _worth_sorting(tables, names):
        asked = ask["threshold"]
        return torch.stack([_ranks([_sorted_words(t, name, logs) for name in names], asked) for t in tables])
    if question not in ("known", "below") or len(tables) == 1:
        return torch.stack([answer(table, question, names, logs, ask) for table in tables])
    train_N = ~np.concatenate([table.test for table in tables])
    every_N = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    counts_F = []
    for place, name in enumerate(names):
        columns = [table.label if name == "" else table.numbers.get(name) for table in tables]
        gaps = [np.full(len(t), np.nan) if c is None else c for t, c in zip(tables, columns, strict=True)]
        column_N = np.concatenate(gaps).astype(np.float64)
        known_N = train_N & ~np.isnan(column_N)
        values, site_N = _logged(column_N[known_N], name, logs), every_N[known_N]
        if question == "known":
            counts_F.append(np.bincount(site_N, minlength=len(tables)))
        else:
            counts_F.append(_below(values, site_N, len(tables), ask["threshold"][place].numpy().view(np.uint64)))
    return torch.from_numpy(np.stack(counts_F, 1).astype(np.int64))


_LARGE, _MOST_SORTED = 5_000, 30_000_000
"""Rows of a site from which its values are kept in order between questions; and numbers of all sites that are kept."""


def _worth_sorting(tables: Sequence[SiteTable], names: Sequence[str]) -> bool:
    """Say whether sites are few and large, so that values in order answer sooner than a pass over all of them."""
    rows = sum(map(len, tables))
    return rows >= _LARGE * len(tables) and rows * len(names) <= _MOST_SORTED


def _sorted_words(table: SiteTable, name: str, logs: dict[str, float]) -> np.ndarray:
    key = (name, logs.get(name))
    if key not in table.sorted_words:
        table.sorted_words[key] = np.sort(_word(training_values(table, name, logs)))
    return table.sorted_words[key]


def _ranks(words_F: Sequence[np.ndarray], thresholds: Tensor) -> Tensor:
    """Return how many of each feature's words, in order, lie below each threshold [F, Q, 16]."""
    asked_F = thresholds.numpy().view(np.uint64)
    counts = [np.searchsorted(w, t.ravel()).reshape(t.shape) for w, t in zip(words_F, asked_F, strict=True)]
    return torch.from_numpy(np.stack(counts).astype(np.int64))


def _below(values: np.ndarray, site_N: np.ndarray, sites: int, threshold: np.ndarray) -> np.ndarray:
    """Return how many of each site's values lie below each threshold [Q, 16], [K, Q, 16]."""
    steps, back = np.unique(threshold.ravel(), return_inverse=True)
    place_N = np.searchsorted(steps, _word(values), side="right")  # the first threshold that lies above the value
    held = np.bincount(site_N * (len(steps) + 1) + place_N, minlength=sites * (len(steps) + 1))
    below_KT = held.reshape(sites, -1)[:, :-1].cumsum(1)
    found: np.ndarray = below_KT[:, back.ravel()].reshape(sites, *threshold.shape)
    return found


def training_values(table: SiteTable, name: str, logs: dict[str, float]) -> np.ndarray:
    """Return the known training values of a feature or (by "") of the target, after the logarithm if it has one."""
    column = table.label if name == "" else table.numbers.get(name, np.zeros(0))
    values: np.ndarray = column[~table.test].astype(np.float64) if len(column) else column
    return _logged(values[~np.isnan(values)], name, logs)


def _logged(values: np.ndarray, name: str, logs: dict[str, float]) -> np.ndarray:
    return np.log(np.maximum(values, logs[name])) if name in logs else values


def agree(
    surveys: dict[str, dict[str, Any]],
    data: Data,
    ask: Ask,
    public: bool = False,
    found: Mapping[str, tuple[float, ...]] = NOTHING_FOUND,
) -> Encoding:
    """Make the encoding that all sites will use, from their surveys and their answers to `ask`.

    With `public` nothing may come from patients: preprocess is then dictionary or none, and `ask` is not used. `found`:
    ranges of columns that declare none, which patients have paid for.

    Raises DataError or PlanError where sites' tables do not fit together, naming the sites.
    """
    data = _with_ranges(data, found)
    target = _target(surveys, data)
    texts = _text_columns(surveys, data)
    names = _feature_order(surveys, data)
    indicators = {n for s in surveys.values() for n, count in s["train_missing"].items() if count}
    indicators |= {n for n in names if any(n not in s["missing"] for s in surveys.values())}
    if public:
        indicators = set()
    indicators |= {n for n in names if n in data.dictionary and data.dictionary[n].indicator}
    numbers = [n for n in names if n not in texts]
    logs = {n: _floor(data.dictionary[n]) for n in numbers if n in data.dictionary and data.dictionary[n].log}
    fills: dict[str, float] = {}
    if data.preprocess == "dictionary":
        refuse(_unranged(numbers, data))
        scales = {n: _public_scale(data.dictionary[n]) for n in numbers}
        if target.task == "regression":
            low, high = data.dictionary.get(data.target, Feature()).range or (0.0, 0.0)
            if low == high:
                where = toml.key("data", "dictionary", data.target, "range")
                raise PlanError(f"data.preprocess='dictionary' needs {where} for the target")
            target = dataclasses.replace(target, centre=(low + high) / 2, scale=(high - low) / 4)
    elif data.preprocess == "none":
        scales = dict.fromkeys(numbers, (0.0, 1.0))
        if public:
            refuse(_unranged(numbers, data))
            fills = {n: _public_scale(data.dictionary[n])[0] for n in numbers}
    else:
        asked = [*numbers, ""] if target.task == "regression" else numbers
        robust = data.preprocess == "robust"
        fitted = fit_widely(asked, logs, ask) if robust else fit("standard", asked, logs, ask)
        scales = {n: fitted[n] for n in numbers}
        if target.task == "regression":
            target = dataclasses.replace(target, centre=fitted[""][0], scale=fitted[""][1])
    if public and target.task == "regression":
        declared_range(data)
    columns = []
    for n in names:
        if n in texts:
            categories = data.dictionary.get(n, Feature()).categories or texts[n]
            columns.append(Column(n, "category", categories=categories, indicator=n in indicators))
        else:
            centre, scale = scales[n]
            cap = {"dictionary": 2.0, "robust": ROBUST_CAP}.get(data.preprocess, 0.0)
            floor, fill = logs.get(n, 0.0), fills.get(n, 0.0)
            range_ = tuple(found.get(n, ()))
            columns.append(Column(n, "number", centre, scale, n in logs, floor, cap, (), n in indicators, fill, range_))
    return Encoding(tuple(columns), target, public or data.preprocess == "dictionary")


def with_range(column: Column, ends: tuple[float, ...]) -> Column:
    """Return a column with the range that was found for it."""
    centre, scale = _public_scale(Feature(range=ends))
    return dataclasses.replace(column, centre=centre, scale=scale, found=ends)


def _with_ranges(data: Data, found: Mapping[str, tuple[float, ...]]) -> Data:
    """Return the data table with the ranges that were found in its dictionary."""
    entries = {n: dataclasses.replace(data.dictionary.get(n, Feature()), range=tuple(r)) for n, r in found.items()}
    return dataclasses.replace(data, dictionary={**data.dictionary, **entries}) if entries else data


def fit(
    kind: Literal["robust", "standard"], names: Sequence[str], logs: dict[str, float], ask: Ask
) -> dict[str, tuple[float, float]]:
    """Return each feature's (centre, scale) over all sites' training values; a constant feature has scale 1.

    robust: median and interquartile range, equal to numpy.quantile of the pooled values to the last bit.
    standard: mean and standard deviation (divided by n).
    """
    if not names:
        return {}
    header = {"names": list(names), "logs": logs}
    known_F = ask("known", header, {})
    if kind == "robust":
        q_FQ = _quantiles(_QUARTILES, known_F, header, ask)
        centres, scales = q_FQ[:, 1], q_FQ[:, 2] - q_FQ[:, 0]
    else:
        count_F = np.maximum(known_F.numpy(), 1)
        centres = ask("sum", header, {}).numpy() / count_F
        scales = np.sqrt(ask("squares", header, {"centre": torch.from_numpy(centres)}).numpy() / count_F)
    scales = np.where((scales > 0) & np.isfinite(scales), scales, 1.0)
    return {n: (float(c), float(s)) for n, c, s in zip(names, centres, scales, strict=True)}


def fit_widely(names: Sequence[str], logs: dict[str, float], ask: Ask) -> dict[str, tuple[float, float]]:
    """Return each feature's (median, scale) for robust scaling: `fit`'s IQR where it is one, wider where it is not.

    An IQR is no scale of mostly zero counts, rare events or heavy tails. So the scale is at least a quarter of the span
    of the middle 90 %, and a seventh of that of the middle 98 %: nine cells of ten lie within 4 of the median, 98 of a
    hundred within 7. Where all those quantiles coincide it is the root mean square distance from the median.
    Of bell-shaped columns the IQR is the widest of the three, and `fit`'s bits stay.
    """
    if not names:
        return {}
    header = {"names": list(names), "logs": logs}
    known_F = ask("known", header, {})
    outer = [q for low, high, _ in _OUTER for q in (low, high)]
    q_FQ = _quantiles((*_QUARTILES, *outer), known_F, header, ask)
    centre_F, scale_F = q_FQ[:, 1], q_FQ[:, 2] - q_FQ[:, 0]
    for place, (_, _, spans) in enumerate(_OUTER):
        low_F, high_F = q_FQ[:, 3 + 2 * place], q_FQ[:, 4 + 2 * place]
        span_F = high_F / spans - low_F / spans
        scale_F = np.where(np.isfinite(span_F), np.maximum(scale_F, span_F), scale_F)
    if (flat_F := (scale_F == 0) & (known_F.numpy() > 1)).any():
        square_F = ask("squares", header, {"centre": torch.from_numpy(centre_F.copy())}).numpy()
        scale_F = np.where(flat_F, np.sqrt(square_F / np.maximum(known_F.numpy(), 1)), scale_F)
    scale_F = np.where((scale_F > 0) & np.isfinite(scale_F), scale_F, 1.0)
    return {n: (float(c), float(s)) for n, c, s in zip(names, centre_F, scale_F, strict=True)}


def _quantiles(quantiles: Sequence[float], known_F: Tensor, header: dict[str, Any], ask: Ask) -> np.ndarray:
    """Return quantiles [F, Q], as numpy.quantile finds them; a feature that nobody has gets zeros."""
    known = known_F.numpy()
    place_FQ = np.maximum(known - 1, 0)[:, None] * np.array(quantiles)
    low_FQ = np.floor(place_FQ).astype(np.int64)
    high_FQ = np.minimum(low_FQ + 1, np.maximum(known - 1, 0)[:, None])
    found = _order_statistics(np.concatenate([low_FQ, high_FQ], 1), header, ask)
    low, high, t = found[:, : len(quantiles)], found[:, len(quantiles) :], place_FQ - low_FQ
    between = np.where(t < 0.5, low + (high - low) * t, high - (high - low) * (1 - t))  # as numpy.quantile does
    return np.where(known[:, None] > 0, between, 0.0)


def _order_statistics(rank_FQ: np.ndarray, header: dict[str, Any], ask: Ask) -> np.ndarray:
    """Return the values of given ranks, digit by digit from the highest, sixteen thresholds a question."""
    prefix_FQ = np.zeros(rank_FQ.shape, dtype=np.uint64)
    digits = np.arange(1 << _DIGIT_BITS, dtype=np.uint64)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        threshold = prefix_FQ[..., None] | (digits << np.uint64(shift))
        below = ask("below", header, {"threshold": torch.from_numpy(threshold.view(np.int64))}).numpy()
        digit_FQ = (below <= rank_FQ[..., None]).sum(-1) - 1  # the highest threshold with at most `rank` values below
        prefix_FQ |= digits[np.maximum(digit_FQ, 0)] << np.uint64(shift)
    return _unword(prefix_FQ)


def _word(value: np.ndarray) -> np.ndarray:
    """Map float64 to uint64 so that order is kept: flip all bits of negatives, the sign bit of the others."""
    bits = (np.asarray(value, dtype=np.float64) + 0.0).view(np.uint64)  # + 0.0 makes -0 a 0
    return np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(1 << 63))


def _unword(word: np.ndarray) -> np.ndarray:
    return np.where(word >> np.uint64(63) == 1, word ^ np.uint64(1 << 63), ~word).view(np.float64)


def _target(surveys: dict[str, dict[str, Any]], data: Data) -> Target:
    if data.task == "regression":
        return Target(data.target, "regression")
    return classes(sorted({label for s in surveys.values() for label in s["labels"]}), data)


def classes(labels: Sequence[str], data: Data) -> Target:
    """Return a target of these labels, sorted; raise DataError where they do not fit the task or the positive one."""
    labels = list(labels)
    if len(labels) < 2:
        raise DataError(f"data.target={data.target!r} has one value, {labels}; there is nothing to learn")
    if data.positive and data.positive not in labels:
        raise DataError(f"data.positive={data.positive!r} is not a label; labels: {some(labels, 10)}")
    if data.task == "multiclass" or (data.task == "auto" and len(labels) > 2 and not data.positive):
        return Target(data.target, "multiclass", tuple(labels))
    if len(labels) > 2:
        raise DataError(
            f"data.target={data.target!r} has {len(labels)} labels ({some(labels)}); a binary target has two. "
            "Set data.task='multiclass' and leave data.positive empty."
        )
    positive = data.positive or labels[-1]
    return Target(data.target, "binary", (next(name for name in labels if name != positive), positive))


def _text_columns(surveys: dict[str, dict[str, Any]], data: Data) -> dict[str, tuple[str, ...]]:
    """Return the union of each text column's categories; a column may be wholly missing at a site."""
    union: dict[str, set[str]] = {}
    for survey_ in surveys.values():
        for name, categories in survey_["texts"].items():
            union.setdefault(name, set()).update(categories)
    for site, survey_ in surveys.items():
        for name in survey_["numbers"]:
            size = survey_["train"] + survey_["test"]
            if name in union and survey_["missing"][name] < size:
                raise DataError(
                    f"column {name!r} is a number at site {site!r} and text elsewhere. Make them alike, or declare "
                    f"{toml.key('data', 'dictionary', name, 'categories')}."
                )
    declared = {name for name, feature in data.dictionary.items() if feature.categories}
    return {name: tuple(sorted(c)) for name, c in union.items() if c or name in declared}


def _feature_order(surveys: dict[str, dict[str, Any]], data: Data) -> list[str]:
    names = list(dict.fromkeys(n for s in surveys.values() for n in s["missing"]))
    return features_of(sorted(names), data)


def _unranged(names: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield, as one, the numbers without a public range."""
    absent = [name for name in names if not data.dictionary.get(name, Feature()).range]
    if absent:
        first, several = absent[0], len(absent) > 1
        which = f"{len(absent)} columns of numbers ({some(map(repr, absent))})" if several else repr(first)
        more = " and so on" if several else ""
        text = (
            f"no public range for {which}. Give {toml.key('data', 'dictionary', first, 'range')}{more}, or set "
            "data.preprocess='robust' (no privacy claim is possible then)."
        )
        yield Refusal(PlanError(text), {("data", "dictionary", name, "range"): RANGE for name in absent})


def _public_scale(feature: Feature) -> tuple[float, float]:
    """Map the public range onto [-2, 2]."""
    low, high = feature.range
    if feature.log:
        low, high = float(np.log(_floor(feature))), float(np.log(high))
    return (low + high) / 2, (high - low) / 4


def _floor(feature: Feature) -> float:
    low, high = feature.range
    return low if low > 0 else high / 100


def _encode_number(column: Column, values: np.ndarray) -> np.ndarray:
    if column.log:
        values = np.log(np.maximum(values, column.floor))
    with np.errstate(over="ignore"):  # a cap holds what is too large
        encoded = (values - column.centre) / column.scale
    return np.clip(encoded, -column.cap, column.cap) if column.cap else encoded


def _encode_category(column: Column, values: np.ndarray) -> np.ndarray:
    """One column a category, or one for the second of two; a missing or unknown category is NaN."""
    hot = np.stack([values == category for category in column.categories], 1).astype(np.float64)
    hot[~hot.any(1)] = np.nan
    return hot[:, 1:] if len(column.categories) == 2 else hot


def _label_counts(label: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(label.astype(str), return_counts=True)
    return {str(n): int(c) for n, c in zip(names, counts, strict=True)}
