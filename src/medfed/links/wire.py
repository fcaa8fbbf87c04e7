"""What leaves a client, and how rows become one: links around one combine.

A link changes rows one by one at the client (`client`) and undoes at the server what it can: row by
row before they are combined (`decode`), or on the sum (`server`). Links are row-wise by law: a
cohort sent as one stack equals its clients sent one by one, bit for bit.

K clients, M numbers in a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import PlanError
from medfed.core.entropy import Entropy, Integers
from medfed.privacy.factorisation import Correlated
from medfed.privacy.guarantee import GRID, Guarantee, discrete_gaussian
from medfed.privacy.mechanisms import round_to_grid
from medfed.secure.field import encode

Remembered = Mapping[str, Tensor]
"""What each client of a stack remembers between rounds: name -> [K, M]."""


class Link:
    """One transformation of rows: clipping, fixed point, masks, shares, compression. What stands
    here changes nothing.

    Three places: at the client, which may remember something from round to round; at the server
    before rows are combined, row by row; and on the combined row.

    Guarantee: row-wise. What `client` and `decode` make of a row follows from that row and its own
    client's memory.
    """

    kept: tuple[str, ...] = ()
    """What each client remembers:
    names of vectors as long as the link's input, that nobody else has.
    """

    dtype: torch.dtype | None = None
    """The kind of number that it sends; None: as it came."""

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        """Transform each row by itself, at its client.

        Args:
            message_KM: the clients' rows, one each.
            memory: what each remembers: `kept` names -> [K, M].

        Returns the rows as they leave, and what each client will remember: name -> [K, M]. It
        counts only if the row does.
        """
        return message_KM, memory

    def length(self, numbers: int) -> int:
        """Return how many numbers a row of so many is sent as."""
        return numbers

    def decode(self, row_KM: Tensor, numbers: int) -> Tensor:
        """Undo on each row what cannot be undone on their sum;
        raise SiteError for one nobody can send.

        Args:
            row_KM: the rows as they came.
            numbers: how many a decoded row has.
        """
        return row_KM

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        """Undo on the combined row what `client` did to each.

        Args:
            mean_M: the combined row, as the link after this one left it.
            round: the round's number; noise follows it.
        """
        return mean_M


class Float32(Link):
    """Rows travel as float32, whatever they were computed in."""

    dtype = torch.float32

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        return message_KM.to(torch.float32), memory


class Grid(Link):
    """Rows are whole steps of the clipping norm's grid (int64),
    so that sums are exact; GRID steps make one norm.
    """

    dtype = torch.int64

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        return round_to_grid(message_KM, GRID), memory

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        return mean_M.double() * GRID


@dataclass(frozen=True)
class FixedPoint(Link):
    """Rows that carry no noise grid of their own, as whole steps of 2^-bits (int64), for sums that
    nobody looks into.

    Rounded to nearest: 2^-(bits+1) at most. The server's half expects the weighted mean in steps.
    """

    bits: int
    bound: float
    whole: bool = False  # whether the bound is on a row's norm, and not on each number

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        if self.whole and not (message_KM.double().norm(dim=1) <= self.bound).all():
            raise PlanError(
                f"a row is not finite or has a norm above security.bound={self.bound:g}; raise "
                "the bound"
            )
        return torch.from_numpy(encode(message_KM.double().numpy(), self.bits, self.bound)), memory

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        return mean_M.double() * 2.0**-self.bits


@dataclass(frozen=True)
class Bounded(Link):
    """Rows longer than `norm` are cut to it,
    so that no client weighs more than that, whatever its records.

    The promise rests on whoever checks rows: the coordinator, or three aggregators in secret.
    """

    norm: float

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        cut = [
            row * min(1.0, self.norm / max(float(row.double().norm()), 1e-300))
            for row in message_KM
        ]
        return (torch.stack(cut) if cut else message_KM), memory


def into_ball(row_KM: Tensor, radius_K: Sequence[float]) -> Tensor:
    """Return each row projected onto the ball of its own radius; rows that lie in it stay as they
    are, bit for bit.

    Guarantee: no row is longer than its radius, and a projection onto a convex set never moves two
    rows apart: one patient moves what is returned by no more than the row itself, however many
    patients a site has.

    Edge cases:
    - in floats two rows of radius r may move apart by r 2^-46: squares are added pairwise, of up to
      2^40 numbers. SLACK counts it;
    - more patients than declared: the row is cut, in silence, as to say so would tell of the one
      too many;
    - a row that is not finite has no place in a ball: `dpsgd.sums` makes none, `finite` refuses
      others'.

    Args:
        row_KM: the rows, in any kind of number.
        radius_K: each row's radius, in the row's own units.
    """
    held_KM = row_KM
    for k, radius in enumerate(radius_K):
        norm = math.sqrt(float(np.square(row_KM[k].double().numpy()).sum()))  # numpy adds pairwise
        if norm > radius:
            held_KM = row_KM.clone() if held_KM is row_KM else held_KM
            held_KM[k] = row_KM[k] * (radius / norm)

    return held_KM


@dataclass(frozen=True)
class NoiseShare(Link):
    """Each client's part of the joint noise, in its own row: any `holders` of them make what the
    guarantee asks for.

    Guarantee: variance sigma^2 / holders each. The sum of independent discrete Gaussians is one, up
    to a total variation of `_smoothing` (privacy.mechanisms) that is below 2^-1000 at the grid's
    widths; what others add beyond it is post-processing.

    Edge cases:
    - fewer than `holders` parts make too little noise: the protocol has to open nothing then
      (`masking.MaskingTerms`);
    - more parts than `holders` make more than is asked for, by a factor that the claim states;
    - whoever knows some parts can take away those alone, so `holders` are those who tell nobody
      theirs.
    """

    guarantee: Guarantee
    holders: int

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        draw = noise_share(self.guarantee, self.holders)
        entropy = Entropy()
        noise_KM = np.stack([draw(message_KM.shape[1], entropy) for _ in message_KM])
        return message_KM + torch.from_numpy(noise_KM), memory


def noise_share(guarantee: Guarantee, holders: int) -> Callable[[int, Entropy], Integers]:
    """Return the sampler [M] of one holder's part of a row's joint noise, which draws from the
    stream that it is given: see `NoiseShare`.

    Args:
        guarantee: the noise that the sum needs.
        holders: how many honest parties add a part; each part's standard deviation is 1 /
            sqrt(holders) of the whole's.
    """
    part = math.sqrt(holders)

    def draw(count: int, entropy: Entropy) -> Integers:
        if count != guarantee.numbers():
            raise PlanError(
                f"noise for {count} numbers; the guarantee is for {guarantee.numbers()}"
            )
        noise_M = discrete_gaussian(guarantee.sigma_units() / part).sample(count, entropy)
        if guarantee.clipping == "adaptive":
            noise_M[-1:] = discrete_gaussian(guarantee.count_sigma() / GRID / part).sample(
                1, entropy
            )
        return noise_M

    return draw


@dataclass(frozen=True)
class JointNoise(Link):
    """Noise on the sum of all rows, as the guarantee asks; with a strategy, correlated over rounds.

    Whoever combines the rows draws it. `key` seeds it in a simulation only.

    Guarantee: to all but that party a round tells of any patient no more than its release, one
    Gaussian of the guarantee's multiplier: `sigma_units()` grid steps on each number, and noise of
    its own on the count below C.

    Edge cases:
    - whoever combines the rows sees them bare: the claim's trust model says so;
    - each instance takes a key from the operating system, so a resumed run draws afresh and never
      again what it drew;
    - a strategy's noise leans on the past, which is in memory alone: such a run is one release, and
      is not resumed;
    - `simulation_only`: the noise follows from the study's seed, and nothing is claimed.
    """

    guarantee: Guarantee
    key: int

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        if self.guarantee.simulation_only:
            return mean_M + self._seed_noise(round)
        return mean_M + self._draw_noise(round)

    def _draw_noise(self, round: int) -> Tensor:
        guarantee = self.guarantee
        if guarantee.strategy:
            noise = self._correlated.next(round - 1)
        else:
            noise = self._gradient_noise(guarantee.parameters)
        if guarantee.clipping != "adaptive":
            return torch.from_numpy(noise)
        count = discrete_gaussian(guarantee.count_sigma() / GRID).sample(1, self._entropy)
        return torch.cat([torch.from_numpy(noise), torch.from_numpy(count)])

    def _seed_noise(self, round: int) -> Tensor:
        guarantee = self.guarantee
        key_1 = streams.subkey(torch.tensor([self.key]), round)
        noise_M = streams.normal(key_1, guarantee.numbers())[0]
        noise_M[: guarantee.parameters] *= guarantee.sigma_units()
        if guarantee.clipping == "adaptive":
            noise_M[-1] *= guarantee.count_sigma() / GRID
        if guarantee.strategy:
            raise AssertionError("plan.check refuses correlated noise in a simulation")
        return noise_M.round().to(torch.int64)

    def _gradient_noise(self, count: int) -> np.ndarray:
        return discrete_gaussian(self.guarantee.sigma_units()).sample(count, self._entropy)

    @cached_property
    def _entropy(self) -> Entropy:
        return Entropy()

    @cached_property
    def _correlated(self) -> Correlated:
        return Correlated(self.guarantee.strategy, self.guarantee.parameters, self._gradient_noise)


def joint_links(
    guarantee: Guarantee, key: int, aggregation: str = "plain", holders: int = 1
) -> tuple[Link, ...]:
    """Return the links of rows that get one noise on their sum.

    From whoever combines them, or from several holders. Under "three-party" the aggregators add it
    before they open, which is no link. Seeded noise stays with the server.

    Args:
        guarantee: the noise that the sum needs.
        key: the stream of seeded noise.
        aggregation: security.aggregation.
        holders: how many honest parties add a part.
    """
    if aggregation == "plain" or guarantee.simulation_only:
        return Grid(), JointNoise(guarantee, key)
    if aggregation == "masked":
        return Grid(), NoiseShare(guarantee, holders)
    return (Grid(),)


PLAIN: tuple[Link, ...] = (Float32(),)
"""The links of security.aggregation = "plain"."""


LINKS: dict[str, Link] = {}
"""Links that a study adds by name (`training.links`), after its own.
One more is an entry, wherever it is written.
"""


def send(message_KM: Tensor, links: Sequence[Link]) -> Tensor:
    """Pass rows through the clients' halves of links that remember nothing, first to last.

    Args:
        message_KM: the clients' rows, one each.
        links: from the client on.
    """
    return send_remembering(message_KM, links, {})[0]


def send_remembering(
    message_KM: Tensor, links: Sequence[Link], memory: Remembered
) -> tuple[Tensor, Remembered]:
    """Pass rows through the clients' halves of the links, first to last.

    Returns the rows as they leave, and what each client will remember of it: name -> [K, M].

    Args:
        message_KM: the clients' rows, one each.
        links: from the client on.
        memory: what each client remembers: name -> [K, M].
    """
    later: dict[str, Tensor] = {}
    for link in links:
        message_KM, kept = link.client(message_KM, {name: memory[name] for name in link.kept})
        later |= kept
    return message_KM, later


def sent_as(numbers: int, links: Sequence[Link]) -> tuple[int, torch.dtype]:
    """Return how many numbers a row of `numbers` is sent as through `links`, and of which kind."""
    dtype = torch.float32
    for link in links:
        numbers = link.length(numbers)
        dtype = link.dtype or dtype
    return numbers, dtype


def decodes(links: Sequence[Link]) -> bool:
    """Say whether `links` have rows decoded one by one before they are combined."""
    return any(type(link).decode is not Link.decode for link in links)


def decode(row_KM: Tensor, links: Sequence[Link], numbers: int) -> Tensor:
    """Return the rows as they can be combined; raise SiteError for one that nobody can send.

    Args:
        row_KM: the rows as they came.
        links: from the client on; undone last to first.
        numbers: how many a decoded row has.
    """
    given = [numbers]
    for link in links:
        given.append(link.length(given[-1]))
    for link, width in zip(reversed(links), reversed(given[:-1]), strict=True):
        row_KM = link.decode(row_KM, width)
    return row_KM


def finite(row_KM: Tensor) -> Tensor:
    """Say of each row [K] of `row_KM` whether it is finite, without a mask as large as the rows."""
    if row_KM.shape[1] == 0:
        return torch.ones(len(row_KM), dtype=torch.bool)
    low_K = row_KM.amin(1)  # NaN wins both; ten times faster than `aminmax` along an axis
    high_K = row_KM.amax(1)
    return torch.isfinite(low_K) & torch.isfinite(high_K)


def combine(
    message_KM: Tensor, weight_K: Tensor | None, links: Sequence[Link], round: int = 0
) -> Tensor:
    """Return the combined row [M]: weights times rows, through the servers' halves, last to first.

    Args:
        message_KM: the decoded rows.
        weight_K: a rule's, or the clients' public ones; None (rows on the grid): the rows are
            summed.
        links: from the client on.
        round: the round's number; noise follows it.
    """
    mean_M = message_KM.sum(0) if weight_K is None else weight_K.to(message_KM.dtype) @ message_KM
    for link in reversed(links):
        mean_M = link.server(mean_M, round)
    return mean_M
