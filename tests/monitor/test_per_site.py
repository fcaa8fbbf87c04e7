"""Figures of many sites in one go are those of each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfed.core.types import Task
from medfed.monitor.metrics import Scores, measure
from medfed.monitor.per_site import measure_each, scores_each

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=12)


def _tested(
    task: Task, sizes: list[int], seed: int, ties: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [N, C] and targets [N] of all sites; `ties`: outputs that often agree, or are
    the threshold.
    """
    random = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    classes = 3 if task == "multiclass" else 1
    z = torch.randn(n, classes, generator=random)
    y = torch.randint(0, max(2, classes), (n,), generator=random)
    z = z.round() if ties else z * 3
    return z, y if task == "multiclass" else y.float()


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@given(sizes=SIZES, seed=st.integers(0, 99), ties=st.booleans())
def test_what_sites_tell_together_is_what_each_tells_alone(
    task: Task, sizes: list[int], seed: int, ties: bool
) -> None:
    z, y = _tested(task, sizes, seed, ties)
    together = scores_each(task, z, y, sizes, 2.0)
    alone = [
        Scores.of(task, a, b, 2.0) for a, b in zip(z.split(sizes), y.split(sizes), strict=True)
    ]
    for one, other in zip(together, alone, strict=True):
        assert one.task == other.task
        for name, tensor in one.tensors().items():
            assert (
                torch.equal(tensor, other.tensors()[name])
                and tensor.dtype == other.tensors()[name].dtype
            )


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@given(sizes=SIZES, seed=st.integers(0, 99), ties=st.booleans())
def test_figures_of_many_sites_are_those_of_each_alone(
    task: Task, sizes: list[int], seed: int, ties: bool
) -> None:
    """The plain twin: `measure`, site after site; one class only and no record at all
    among them.
    """
    scores = {
        f"s{k}": one
        for k, one in enumerate(scores_each(task, *_tested(task, sizes, seed, ties), sizes))
    }
    for name, figures in measure_each(scores).items():
        alone = measure(scores[name], intervals=False)
        assert list(figures) == list(alone)
        for figure, one in figures.items():
            assert (one.low, one.high) == (alone[figure].low, alone[figure].high)
            other = alone[figure].value
            if other is None:
                same = one.value is None
            else:
                same = one.value == pytest.approx(other, rel=1e-14, abs=1e-15)
            assert same, (name, figure)


def test_a_thousand_small_sites_and_a_large_one() -> None:
    sizes = [*[4] * 1000, 5000]
    scores = {
        f"s{k}": one
        for k, one in enumerate(scores_each("binary", *_tested("binary", sizes, 1, False), sizes))
    }
    found = measure_each(scores)
    for name in ("s0", "s1", "s500", "s999", "s1000"):
        alone = measure(scores[name], intervals=False)
        for figure, one in alone.items():
            assert (found[name][figure].value is None) == (one.value is None)
            assert found[name][figure].value == (one.value and pytest.approx(one.value, rel=1e-13))
    defined = np.mean([one["auroc"].value is not None for one in found.values()])
    assert 0.5 < defined < 1  # some sites of four have one class only
