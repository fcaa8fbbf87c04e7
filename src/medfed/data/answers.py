"""Sites' answers to the questions by which scales are agreed:
counts and sums of training values, never a value.

A float64 is asked for as a `word`, a uint64 of the same order, so that quantiles are found digit by
digit.

F features of the table, K sites, N rows, Q quantiles.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medfed.core.checks import DataError
from medfed.data.site_table import SiteTable

HELD = 7.0
"""Spans from a centre to which cells are held where robust scaling asks how they scatter."""


def answer(
    table: SiteTable,
    question: str,
    names: Sequence[str],
    logs: dict[str, float],
    ask: dict[str, Tensor],
) -> Tensor:
    """Answer a coordinator's question about the site's training values:
    counts (int64) or sums (float64).

    "known": how many values each feature has. "below": how many lie below thresholds [F, Q, 16].
    "sum": their sum. "squares": the sum of squared distances from the centres [F]. "held": sums of
    distances from the centres, in spans and held to `HELD` of them, and of their squares [F, 2].

    Args:
        table: the site's cleaned records.
        question: one of the five.
        names: the features asked for, F of them; "" is the target.
        logs: features whose logarithm is meant, each with the floor that values are raised to
        before it.
        ask: what the question brings: "threshold", words as int64, or "centre", or "centre" and
        "span", each float64 [F].

    Raises:
        DataError: the question is none that is known here.
    """
    values_F = [training_values(table, name, logs) for name in names]
    match question:
        case "known":
            return torch.tensor([len(v) for v in values_F], dtype=torch.int64)
        case "below":
            return _count_below([np.sort(to_word(v)) for v in values_F], ask["threshold"])
        case "sum":
            return torch.tensor([float(v.sum()) for v in values_F], dtype=torch.float64)
        case "squares":
            centres = ask["centre"].tolist()
            return torch.tensor(
                [float(((v - c) ** 2).sum()) for v, c in zip(values_F, centres, strict=True)],
                dtype=torch.float64,
            )
        case "held":
            spans = zip(values_F, ask["centre"].tolist(), ask["span"].tolist(), strict=True)
            return torch.tensor([_sum_held(*each) for each in spans], dtype=torch.float64)

    raise DataError(f"question={question!r} is not known; run the same medfed everywhere")


def _sum_held(values: np.ndarray, centre: float, span: float) -> tuple[float, float]:
    """Return the sum of distances from a centre, in spans and held, and that of their squares."""
    with np.errstate(over="ignore"):  # what is too large is held
        distance = np.clip((values - centre) / span, -HELD, HELD)
    return float(distance.sum()), float(np.square(distance).sum())


def answer_each(
    tables: Sequence[SiteTable],
    question: str,
    names: Sequence[str],
    logs: dict[str, float],
    ask: dict[str, Tensor],
) -> Tensor:
    """Return `answer` of each of `tables`, [K, ...];
    `question`, `names`, `logs` and `ask` as there.

    Counts of many sites come from one pass over all values of a feature.
    """
    if question == "below" and _is_worth_sorting(tables, names):
        asked = ask["threshold"]
        return torch.stack(
            [_count_below([_sort_words(t, name, logs) for name in names], asked) for t in tables]
        )

    if question not in ("known", "below") or len(tables) == 1:
        return torch.stack([answer(table, question, names, logs, ask) for table in tables])
    train_N = ~np.concatenate([table.test for table in tables])
    every_N = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    counts_F = []

    for place, name in enumerate(names):
        columns = [table.label if name == "" else table.numbers.get(name) for table in tables]
        gaps = [
            np.full(len(t), np.nan) if c is None else c
            for t, c in zip(tables, columns, strict=True)
        ]
        column_N = np.concatenate(gaps).astype(np.float64)
        known_N = train_N & ~np.isnan(column_N)
        values = _take_log(column_N[known_N], name, logs)
        site_N = every_N[known_N]

        if question == "known":
            counts_F.append(np.bincount(site_N, minlength=len(tables)))
        else:
            counts_F.append(
                _count_below_each(
                    values, site_N, len(tables), ask["threshold"][place].numpy().view(np.uint64)
                )
            )

    return torch.from_numpy(np.stack(counts_F, 1).astype(np.int64))


_LARGE = 5_000
_MOST_SORTED = 30_000_000
"""Rows of a site from which its values are kept in order between questions; and numbers of all
sites that are kept.
"""


def _is_worth_sorting(tables: Sequence[SiteTable], names: Sequence[str]) -> bool:
    """Say whether sites are few and large,
    so that values in order answer sooner than a pass over all of them.
    """
    rows = sum(map(len, tables))
    return rows >= _LARGE * len(tables) and rows * len(names) <= _MOST_SORTED


def _sort_words(table: SiteTable, name: str, logs: dict[str, float]) -> np.ndarray:
    key = (name, logs.get(name))
    if key not in table.sorted_words:
        table.sorted_words[key] = np.sort(to_word(training_values(table, name, logs)))
    return table.sorted_words[key]


def _count_below(words_F: Sequence[np.ndarray], thresholds: Tensor) -> Tensor:
    """Return how many of each feature's words, in order, lie below each threshold [F, Q, 16]."""
    asked_F = thresholds.numpy().view(np.uint64)
    counts = [
        np.searchsorted(w, t.ravel()).reshape(t.shape)
        for w, t in zip(words_F, asked_F, strict=True)
    ]
    return torch.from_numpy(np.stack(counts).astype(np.int64))


def _count_below_each(
    values: np.ndarray, site_N: np.ndarray, sites: int, threshold: np.ndarray
) -> np.ndarray:
    """Return how many of each site's values lie below each threshold [Q, 16], [K, Q, 16]."""
    steps, back = np.unique(threshold.ravel(), return_inverse=True)
    # the first threshold that lies above the value
    place_N = np.searchsorted(steps, to_word(values), side="right")
    held = np.bincount(site_N * (len(steps) + 1) + place_N, minlength=sites * (len(steps) + 1))
    below_KT = held.reshape(sites, -1)[:, :-1].cumsum(1)
    found: np.ndarray = below_KT[:, back.ravel()].reshape(sites, *threshold.shape)
    return found


def training_values(table: SiteTable, name: str, logs: dict[str, float]) -> np.ndarray:
    """Return the known training values [n] of a feature
    of `table` or (`name` "") of its target, float64.

    Of a feature in `logs` it is the logarithm, of values raised to the floor that stands there.
    """
    values = table.label if name == "" else table.numbers.get(name, np.zeros(0))
    if len(values):
        values = values[~table.test].astype(np.float64)
    return _take_log(values[~np.isnan(values)], name, logs)


def _take_log(values: np.ndarray, name: str, logs: dict[str, float]) -> np.ndarray:
    if name in logs:
        values = np.log(np.maximum(values, logs[name]))
    return values


def to_word(value: np.ndarray) -> np.ndarray:
    """Map float64 to uint64 so that order is kept:
    flip all bits of negatives, the sign bit of the others.
    """
    bits = (np.asarray(value, dtype=np.float64) + 0.0).view(np.uint64)  # + 0.0 makes -0 a 0
    return np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(1 << 63))


def from_word(word: np.ndarray) -> np.ndarray:
    return np.where(word >> np.uint64(63) == 1, word ^ np.uint64(1 << 63), ~word).view(np.float64)
