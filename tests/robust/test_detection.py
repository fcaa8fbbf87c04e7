"""Suspicion from the Gram matrix: it finds loud liars with power, spares the honest, and is blind
to what rotates.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from medfed.core.checks import PlanError
from medfed.robust.detection import NOTED, SURE, TOLERATED, Finding, inspect, suspicion

K = 10
F = 3
M = 60


def rows(seed: int, spread: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 1 + spread * torch.randn(K, M, generator=random, dtype=torch.float64)


LIES = {
    "sign-flip": lambda x: -4 * x,
    "scaled": lambda x: 10 * x,
    "gaussian": lambda x: (
        200 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    ),
    "against": lambda x: -x,
    "nan": lambda x: x * float("nan"),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_liars_score_above_the_honest(name: str, noise: float) -> None:
    scores = []
    labels = [1] * F + [0] * (K - F)
    for seed in range(20):
        x = rows(seed)
        x[:F] = LIES[name](x[:F])
        shaken = noise * torch.randn(
            K, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        scores.append(suspicion(x @ x.T + (shaken + shaken.T) / 2**0.5, F, noise).numpy())
    found = [roc_auc_score(labels, one) for one in scores]
    assert np.mean(found) > 0.99
    assert np.mean(np.stack(scores)[:, F:] >= TOLERATED) < 0.02


def test_honest_rows_score_low_and_noise_alone_does_too() -> None:
    """Of 50 draws: hardly an honest row reaches what is tolerated for good."""
    found = torch.stack([suspicion(x @ x.T, F) for x in (rows(seed) for seed in range(50))])
    assert (found >= TOLERATED).double().mean() < 0.01
    random = torch.Generator().manual_seed(2)
    noises = [5 * torch.randn(K, K, generator=random, dtype=torch.float64) for _ in range(50)]
    found = torch.stack([suspicion((n + n.T) / 2**0.5, F, noise=5.0) for n in noises])
    assert (found >= TOLERATED).double().mean() < 0.03


def test_larger_noise_says_less() -> None:
    x = rows(1)
    x[0] *= 4
    by_noise = [float(suspicion(x @ x.T, F, noise)[0]) for noise in (0.0, 100.0, 1000.0, 100000.0)]
    assert by_noise == sorted(by_noise, reverse=True) and by_noise[0] > TOLERATED > by_noise[-1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100))
def test_order_rotation_and_scale_change_nothing(seed: int, scale: float) -> None:
    x = rows(seed)
    x[0] *= 5
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    turn = torch.linalg.qr(
        torch.randn(M, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]
    found = suspicion(x @ x.T, F)
    y = scale * (x @ turn)[order]
    torch.testing.assert_close(suspicion(y @ y.T, F), found[order], atol=1e-6, rtol=1e-6)


def test_a_finding_names_client_kind_and_evidence() -> None:
    x = rows(3)
    x[0] = -3 * x[0]
    x[1] = x[3]
    x[2] = x[2] * 1e-4
    names = list("abcdefghij")
    found = inspect(names, x @ x.T, F, refused={"k": "its row is out of bound"})
    kinds = {(one.client, one.kind) for one in found}

    assert {
        ("a", "turned"),
        ("a", "far"),
        ("b", "alike"),
        ("d", "alike"),
        ("c", "small"),
        ("k", "refused"),
    } <= kinds
    assert all(NOTED <= one.score <= SURE and one.evidence for one in found)
    x[0] = float("nan")
    first = inspect(names, x @ x.T, F)[0]
    assert first == Finding("a", SURE, "refused", "its row is not finite")


def test_what_cannot_be_compared_scores_nothing() -> None:
    assert not suspicion(torch.zeros(K, K), F).any()  # all zero
    assert not suspicion(torch.ones(K, K), F).any()  # all the same
    assert not suspicion(torch.eye(2), 0).any()  # two rows


def test_bad_questions_are_refused() -> None:
    eye = torch.eye(K)
    with pytest.raises(PlanError, match="one row and column"):
        suspicion(eye[:3], 1)
    with pytest.raises(PlanError, match="at least 11 clients"):
        suspicion(eye, 5)
    with pytest.raises(PlanError, match="standard deviation"):
        suspicion(eye, 1, float("nan"))
    with pytest.raises(PlanError, match="one name a row"):
        inspect(["a"] * K, eye, 1)
    with pytest.raises(PlanError, match="Clamp"):
        Finding("a", float("nan"), "far", "")
