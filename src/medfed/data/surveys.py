"""What a site tells of its table before a study: sizes, columns, categories, gaps. Under a claim,
what is declared.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medfed.data import clinical, doubts, scales
from medfed.data.declared import declared_labels
from medfed.data.site_table import SiteTable
from medfed.study import Data


def survey(table: SiteTable, data: Data) -> dict[str, Any]:
    """Return what a site tells of its table before a study: sizes, columns, categories, labels and
    missing counts.

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
        "texts": {
            n: sorted({x for x in v[train] if x is not None})
            for n, v in sorted(table.texts.items())
        },
        "missing": {n: int(gaps[n].sum()) for n in table.features()},
        "train_missing": {n: int(gaps[n][train].sum()) for n in table.features()},
        "labels": {} if data.task == "regression" else _count_labels(table.label),
        "train_labels": {} if data.task == "regression" else _count_labels(table.label[train]),
        "outside": {n: _count_rows(rows) for n, rows in table.findings.outside.items()},
        "far": {n: _count_rows(rows) for n, rows in table.findings.far.items()},
        "single": _single_values(table),
        "medians": _medians(table, data),
        "spreads": _spreads(table, data),
        "doubts": [doubt.to_json() for doubt in table.findings.doubts],
        **({"dropped": dict(table.findings.dropped)} if table.findings.dropped else {}),
    }


def _medians(table: SiteTable, data: Data) -> dict[str, float]:
    """Return the median of each number that may be in several units,
    at a site of more than a few records.
    """
    if len(table) < doubts.FEW:
        return {}
    known = {
        name: values[np.isfinite(values)]
        for name, values in table.numbers.items()
        if name not in data.dictionary and clinical.may_be_in_several_units(name)
    }
    return {
        name: float(np.median(values))
        for name, values in known.items()
        if len(values) >= doubts.FEW
    }


def _spreads(table: SiteTable, data: Data) -> dict[str, list[float]]:
    """Return quantiles of each number without a range,
    by which units show, at a site of more than a few records.
    """
    if len(table) < doubts.FEW:
        return {}
    names = [
        name
        for name in table.numbers
        if name not in data.dictionary or not data.dictionary[name].range
    ]
    found = {name: scales.spread(table.numbers[name], doubts.FEW) for name in names}
    return {name: told for name, told in found.items() if told}


def _single_values(table: SiteTable) -> dict[str, float | str]:
    """Return the value of each feature that has one value in all rows."""
    found: dict[str, float | str] = {}
    for name, values in table.numbers.items():
        if len(values) and values[0] == values[-1] and (values == values[0]).all():
            found[name] = float(values[0])
    for name, texts in table.texts.items():
        if (
            len(texts)
            and texts[0] is not None
            and texts[0] == texts[-1]
            and (texts == texts[0]).all()
        ):
            found[name] = str(texts[0])
    return found


def _count_rows(rows: Sequence[int]) -> dict[str, Any]:
    return {"rows": len(rows), "first": list(rows[:5])}


def public_survey(table: SiteTable, data: Data, declared: int, test: int) -> dict[str, Any]:
    """Return a survey that tells nothing of private patients: the declared size, and what the
    dictionary declares.

    `test`: how many records are held out, where they are public. Raises PlanError for what is not
    declared.
    """
    return declared_survey(table.features(), data, declared, test)


def declared_survey(names: Sequence[str], data: Data, declared: int, test: int) -> dict[str, Any]:
    """Return a public survey of features of these `names`: `declared` training records and `test`
    that are held out.

    Categories and labels are those of `data`'s dictionary; see `public_survey`.
    """
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


def _count_labels(label: np.ndarray) -> dict[str, int]:
    names, counts = np.unique(label.astype(str), return_counts=True)
    return {str(n): int(c) for n, c in zip(names, counts, strict=True)}
