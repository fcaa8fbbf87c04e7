"""Bugs to plant in the code that runs, each by patching it where the real one would sit: for tests
and benchmarks.

A bug is a function of a pytest.MonkeyPatch; undo it and the code is whole again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medfed.core.entropy import Entropy, Integers, expand
from medfed.core.types import Task
from medfed.data.federated import Patients
from medfed.learn import dpsgd
from medfed.learn.local import loss_gradient
from medfed.links import wire
from medfed.node import work
from medfed.planning import terms
from medfed.privacy import guarantee, mechanisms

Patch = pytest.MonkeyPatch
Bug = Callable[[Patch], None]

_sample = mechanisms.DiscreteGaussian.sample


def _sampler(patch: Patch, sample: Callable[[Any, int, Entropy], Any]) -> None:
    patch.setattr(mechanisms.DiscreteGaussian, "sample", sample)


# How much noise


def noise_off(patch: Patch) -> None:
    _sampler(patch, lambda self, count, entropy: np.zeros(count, np.int64))


def half_the_noise_in_the_sampler(patch: Patch) -> None:
    _sampler(
        patch,
        lambda self, count, entropy: _sample(
            mechanisms.DiscreteGaussian(self.sigma / 2), count, entropy
        ),
    )


def half_the_noise_in_sigma_units(patch: Patch) -> None:
    whole = guarantee.Guarantee.sigma_units
    patch.setattr(
        guarantee.Guarantee, "sigma_units", lambda self, client="": whole(self, client) / 2
    )


def half_the_noise_in_resolve(patch: Patch) -> None:
    """Calibrate to half of what the target asks for: everything that is printed follows."""
    whole = guarantee._noise_for
    patch.setattr(guarantee, "_noise_for", lambda found, release: whole(found, release) / 2)


def twice_the_noise(patch: Patch) -> None:
    _sampler(
        patch,
        lambda self, count, entropy: _sample(
            mechanisms.DiscreteGaussian(self.sigma * 2), count, entropy
        ),
    )


def one_holder_of_many(patch: Patch) -> None:
    """Let only one of each four parts of the joint noise (three among aggregators) be drawn."""
    whole = wire.noise_share

    def lazy(every: int) -> Callable[..., Callable[..., Integers]]:
        calls = [0]

        def share(promised: Any, holders: int) -> Callable[..., Integers]:
            draw = whole(promised, holders)

            def some(count: int, entropy: Any) -> Integers:
                calls[0] += 1
                drawn = draw(count, entropy)
                if calls[0] % every == 0:
                    return drawn
                return np.zeros_like(drawn)

            return some

        return share

    patch.setattr(wire, "noise_share", lazy(4))
    patch.setattr(terms, "noise_share", lazy(3))


# What kind of noise


def one_number_bare(patch: Patch) -> None:
    def sample(self: Any, count: int, entropy: Entropy) -> Integers:
        drawn = _sample(self, count, entropy)
        drawn[::33] = 0  # of each row: the study's model has 33
        return drawn

    _sampler(patch, sample)


def floats_for_noise(patch: Patch) -> None:
    rng = np.random.default_rng()
    _sampler(patch, lambda self, count, entropy: self.sigma * rng.standard_normal(count))


def laplace_for_noise(patch: Patch) -> None:
    """The right variance, another law."""
    rng = np.random.default_rng()
    _sampler(
        patch,
        lambda self, count, entropy: np.rint(rng.laplace(0, self.sigma / np.sqrt(2), count)).astype(
            np.int64
        ),
    )


def noise_reused(patch: Patch) -> None:
    """Make every round begin the same stream again."""
    patch.setattr(wire.JointNoise, "_entropy", property(lambda self: Entropy(bytes(32))))
    patch.setattr(dpsgd, "Entropy", lambda: Entropy(bytes(32)))


def counter_reset(patch: Patch) -> None:
    """One key, and every call for words counts from 0."""
    patch.setattr(Entropy, "words", lambda self, count: expand(bytes(32), count))


def _reused(patch: Patch, sign: Callable[[int], float]) -> None:
    first: dict[tuple[float, int], Integers] = {}
    calls = [0]

    def sample(self: Any, count: int, entropy: Entropy) -> Integers:
        calls[0] += 1
        kept = first.setdefault((self.sigma, count), _sample(self, count, entropy))
        return np.rint(sign(calls[0]) * kept).astype(np.int64)

    _sampler(patch, sample)


def noise_reused_with_signs(patch: Patch) -> None:
    rng = np.random.default_rng(0)
    _reused(patch, lambda call: float(rng.choice([-1, 1])))


def noise_reused_scaled(patch: Patch) -> None:
    """The first vector times a new number in each round: the variance of each coordinate over
    rounds looks right.
    """
    rng = np.random.default_rng(0)
    _reused(patch, lambda call: float(rng.standard_normal()))


def noise_reused_shifted(patch: Patch) -> None:
    """The first vector, each round one place further."""
    first: dict[float, Integers] = {}
    calls = [0]

    def sample(self: Any, count: int, entropy: Entropy) -> Integers:
        calls[0] += 1
        return np.roll(first.setdefault(self.sigma, _sample(self, count, entropy)), calls[0])

    _sampler(patch, sample)


def one_noise_for_all_sites(patch: Patch) -> None:
    """Draw once for each four calls: sites of one stack share a vector."""
    last: dict[float, Integers] = {}
    calls = [0]

    def sample(self: Any, count: int, entropy: Entropy) -> Integers:
        if calls[0] % 4 == 0:
            last[0] = _sample(self, count, entropy)
        calls[0] += 1
        return last[0].copy()

    _sampler(patch, sample)


# How far one patient moves the sum


def clipping_skipped(patch: Patch) -> None:
    patch.setattr(dpsgd, "clip_factor", lambda kind, clip: torch.ones_like)


def clipped_at_five_times(patch: Patch) -> None:
    whole = dpsgd.clip_factor
    patch.setattr(dpsgd, "clip_factor", lambda kind, clip: lambda norm: 5 * whole(kind, clip)(norm))


def sensitivity_a_fifth(patch: Patch) -> None:
    whole = guarantee.Guarantee.sensitivity_units
    patch.setattr(guarantee.Guarantee, "sensitivity_units", lambda self: whole(self) / 5)


def clipped_by_record(patch: Patch) -> None:
    """Take each record for a patient of its own."""

    class ByRecord:
        @staticmethod
        def of(clients: Any) -> Patients:
            return Patients.of([replace(rows, patient=torch.arange(len(rows))) for rows in clients])

    patch.setattr(work, "Patients", ByRecord)


def norm_by_cancellation(patch: Patch) -> None:
    """Take a linear model's norms from products of pairs of records, in float32: near-duplicates
    cancel to 0.
    """

    def by_pairs(
        weights: list[Tensor], x: Tensor, y: Tensor, step: Any, task: Task, factor: Any
    ) -> tuple[Tensor, Tensor]:
        x_ABF = x.flatten(2)
        z_ABC = x_ABF @ weights[0].transpose(1, 2) + weights[1][:, None]
        dz_ABC = torch.where(step.valid_AB[..., None], loss_gradient(task, z_ABC, y), 0)
        x_AIRF, dz_AIRC = (part.unflatten(1, (-1, step.records)) for part in (x_ABF, dz_ABC))

        pairs_AIRR = (dz_AIRC @ dz_AIRC.mT) * (x_AIRF @ x_AIRF.mT + 1)
        norm_AI = pairs_AIRR.sum((2, 3)).clamp(min=0).sqrt().double()
        g_AIP = torch.cat(
            [(dz_AIRC.mT.double() @ x_AIRF.double()).flatten(2), dz_AIRC.sum(2).double()], 2
        )
        weight_AI = torch.where(norm_AI.isfinite(), factor(norm_AI), 0)
        g_AIP = torch.where(norm_AI.isfinite()[..., None], g_AIP, 0)
        return (weight_AI[:, None] @ g_AIP)[:, 0], norm_AI

    patch.setattr(dpsgd, "_choose_summer", lambda model, path: by_pairs)


NOISE: tuple[Bug, ...] = (
    noise_off,
    half_the_noise_in_the_sampler,
    half_the_noise_in_sigma_units,
    half_the_noise_in_resolve,
    twice_the_noise,
    one_number_bare,
    floats_for_noise,
    laplace_for_noise,
    noise_reused,
    counter_reset,
    noise_reused_with_signs,
    noise_reused_scaled,
    noise_reused_shifted,
    sensitivity_a_fifth,
)
"""What is wrong with the noise itself."""

SENSITIVITY: tuple[Bug, ...] = (
    clipping_skipped,
    clipped_at_five_times,
    clipped_by_record,
    norm_by_cancellation,
)
"""What lets one patient move more than the noise is for."""
