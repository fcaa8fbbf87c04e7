"""Three aggregators sum rows that none of them sees:
replicated secret sharing mod 2^64 (Araki et al. 2016).

A row is x = x_0 + x_1 + x_2 mod 2^64, and aggregator i holds x_i and x_(i+1): any two know the row,
one knows nothing. x_0 and x_1 are streams of two seeds; x_2 travels once, encrypted, to the two
that hold it. The coordinator relays everything and reads nothing.

One round, as `SharingAggregator.rounds` plays it:

1. open the clients' envelopes; exchange tags of the shares that two hold, commitments to coins, a
   fresh key for the line;
2. reveal a coin: the projections of step 3 are drawn now, when every row is fixed;
3. check each row in secret: J projections on {-1, 0, 1} (odds 1:2:1) lie in [-T, T], and x.x <=
   B^2. Projections are worked out on both shares and need no message; inner products are proven
   (`products`), bitwise ones verified (`triples`); then one bit a row is opened, 1 for every row
   within the bound;
4. under a robust rule, open the Gram matrix X X^T of the accepted rows, noise and all, and let the
   rule weigh the rows: each of the three does so by itself, and they compare;
5. sum the accepted rows, add noise and a sharing of zero, and hand the result to the coordinator.

Before anything of step 4 or 5 leaves, an aggregator writes down of which rows and in which weights,
and its noise follows from these: a round that is played again opens the same or nothing.

The Gram matrix: as rows are within B by then, no entry wraps and none is above B^2. Where one
patient moves one row by s at most, the upper triangle moves by s sqrt(sum B_j^2 + 3 B_k^2), B_j
being each row's own bound: products with other rows by s B_j each, and a square by (|x| + |x'|) s
<= 2 s B_k.

Why step 3 holds (B: the norm that a client may send, in grid steps; T >= 5.5 B).
- A row of norm B passes: a projection p has P(|p| >= T) <= 2 exp(-T^2 / B^2), 2 10^-11 over 136 of
  them, as entries are subgaussian with proxy 1/2 (E exp(l r) = cosh^2(l/2) <= exp(l^2/4)).
- No number of a row that passes is above 2T: if |x_i| > 2T (centred mod 2^64), of the three values
  s, s + x_i, s - x_i that a projection takes with odds 2:1:1, s excludes both others. So it passes
  with probability at most 1/2 each time, 2^-J in all. Hence no projection wraps.
- Then E p^2 = |x|^2 / 2 and E p^4 <= 3 (E p^2)^2, and by Paley and Zygmund P(p^2 > h |x|^2/2) >= (1
  - h)^2 / 3. At h = 2/c a row of |x|^2 > c T^2 passes J times with probability (1 - (1 - h)^2/3)^J,
  below 2^-40 for J = 80 and c = 32, and for J = 136 and c = 7.9.
- Where c T^2 < 2^63, x.x does not wrap, and the comparison with B^2 is exact: T is then the next
  power of two, as one addition compares with it, and J the less that suffices. Else T = 5.5 B, and
  only |x| < 2.82 T, 16 B, is proven (`SharingTerms.exact` says which).

Trust: privacy and correctness need two honest aggregators. A third may do what it likes: it can
end a round, with nobody blamed or itself, and it can choose its own part of the noise, on the Gram
matrix within 8 standard deviations of such a part, on the sum up to what the coordinator takes for
possible. Two together read every row.

K clients, M numbers in a row, J projections. Words are uint64.
"""

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from medfed.core import codec
from medfed.core.checks import (
    AbortError,
    CodecError,
    EnvelopeError,
    PlanError,
    QuorumError,
    naming,
    plain,
    reasons,
)
from medfed.core.entropy import Entropy, Integers, Words, expand
from medfed.secure import field, triples
from medfed.secure.identity import Post, Scope, check, seal
from medfed.secure.line import Line, Pair, Sends
from medfed.secure.products import Inner, Products
from medfed.secure.record import Record

_FEW, _MANY = (80, 32.0), (136, 7.9)
"""J projections a row, and c: a row that passes has |x|^2 <= c T^2 but for once in 2^40."""

WEIGHT = 1 << 20
"""Steps of a weight that a rule gives."""

_COLUMNS = 1 << 14  # columns of the rows that are unfolded at a time
_LONG = 500_000  # numbers of a row from which threads are worth it
_ONE = np.uint64(1)
_TOP = np.uint64(1 << 63)
_SIGNS = np.uint64(1), np.uint64(2**64 - 1)
_COINS = 4  # projections, verification, folding; noise under a rule
_MAGIC = b"mfs2"  # an upload's format and version
_FRONT = struct.Struct("<4sH3IQ")  # format, lengths of the name, of three envelopes, of x_2


@dataclass(frozen=True)
class SharingTerms:
    """What all agree on: length of a row,
    the norm B that a row may have, in steps, and who holds shares.
    """

    length: int
    bound: float
    aggregators: tuple[str, str, str]
    fewest: int = 2  # rows that a sum must hold
    fewest_kept: int = 2  # rows that a rule must keep
    # whose rows may count in a round, which else is no round; None: whoever is a site
    drawn: Callable[[int], Sequence[str]] | None = None
    facts: bytes = bytes(32)  # a hash of what site and aggregator must have resolved alike
    # the norm that each client's row may have, where it is less than B and compared exactly
    bounds: Mapping[str, float] = dataclass_field(default_factory=dict)

    def bound_of(self, client: str) -> float:
        """Return the norm that a client's row may have, in steps."""
        return self.bounds.get(client, self.bound)

    @property
    def reach(self) -> int:
        """T, the projections' bound: a power of two where the norm is compared exactly."""
        return self._power if self.exact else math.ceil(5.5 * self.bound)

    @property
    def _power(self) -> int:
        return 1 << math.ceil(math.log2(5.5 * self.bound))

    @property
    def exact(self) -> bool:
        """Whether the norm is compared exactly, and not by projections alone."""
        return _MANY[1] * self._power**2 < 2.0**63

    @property
    def projections(self) -> int:
        """J: as few as keep squares from wrapping, or the norm from being far above the bound."""
        few, c = _FEW
        return few if c * self._power**2 < 2.0**63 else _MANY[0]

    @property
    def proven(self) -> float:
        """The norm that no accepted row exceeds."""
        return self.bound if self.exact else 2.82 * self.reach

    def check(self, gram: bool = False, apart: bool = False) -> None:
        """Raise PlanError where projections of honest rows, or with `gram` products of accepted
        ones, could wrap; with `apart`, where rows could not be held each to its own bound.
        """
        if apart and not self.exact:
            raise PlanError(
                f"rows of norm {self.bound:g} steps are not compared exactly among three "
                "aggregators, so that no site would be held to its own. Set a smaller "
                "robustness.cap, or declare smaller sites."
            )
        if gram and not self.exact:
            raise PlanError(
                f"a robust rule under 'three-party' and rows of norm {self.bound:g} steps do not "
                "compose: their products must stay below 2^63. Lower security.fraction_bits or "
                "security.bound, declare smaller sites, or set noise='site'."
            )
        if self.length * 2.0 * self.reach >= 2.0**62:
            raise PlanError(
                f"rows of {self.length:,} numbers and norm {self.bound:g} steps; expected room "
                "below 2^63 for their projections. Lower security.fraction_bits, or declare "
                "smaller sites."
            )


@dataclass(frozen=True)
class Selection:
    """How rows that nobody sees are weighed: by a rule that reads their Gram matrix, opened for it.

    rule: G_KK in steps squared -> w_K, which sums to 1, of rows times `scale` (public; 1 where not
    given). The noises draw one party's part, any two of which must suffice: on the upper triangle
    of K rows, and on a sum of M numbers in which no row has a weight above `most`.
    """

    rule: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    scale: Mapping[str, float] | None = None
    gram_noise: Callable[[int, Entropy], Integers] | None = None
    gram_spread: Callable[[int], float] | None = None  # standard deviation of one party's part
    sum_noise: Callable[[int, int, Entropy], Integers] | None = None

    def __post_init__(self) -> None:
        if (self.gram_noise is None) != (self.gram_spread is None):
            raise PlanError("noise on the Gram matrix has a standard deviation; give both or none")

    def weigh(self, names: Sequence[str], gram_KK: Integers) -> dict[str, int]:
        """Return each row's weight in steps of 1 / WEIGHT of the largest scale.

        Raises AbortError where the rule gives no weights, or has too few rows for any.
        """
        scale_K = np.array([self.scale[name] if self.scale else 1.0 for name in names])
        try:
            w_K = np.asarray(
                self.rule(gram_KK.astype(np.float64) * np.outer(scale_K, scale_K)), np.float64
            )
        except QuorumError as error:
            raise AbortError(str(error), error.excluded) from error
        if w_K.shape != (len(names),) or not np.isfinite(w_K).all() or abs(w_K).sum() > 2:
            raise AbortError(f"the rule gave no weights to {len(names)} rows; the round ends")
        steps = np.rint(WEIGHT * w_K * scale_K / scale_K.max()).astype(np.int64)
        return dict(zip(names, steps.tolist(), strict=True))


def count_rows(w_K: NDArray[np.float64], gram_KK: NDArray[np.float64]) -> int:
    """Return how many rows a sum w X really holds: those whose weight |w_k| or part |w_k x_k| is a
    tenth of the largest or more.

    A rule may leave every weight above 0 and nearly all of it on one row, which the sum then is. A
    row that a rule shrinks to the length of others has little weight, and hides as much as they.
    """
    weight_K = np.abs(w_K)
    part_K = weight_K * np.sqrt(gram_KK.diagonal().clip(0))
    real_K = (weight_K >= weight_K.max() / 10) | (part_K >= part_K.max() / 10)
    return int((real_K & (w_K != 0)).sum())


# The client ---------------------------------------------------------------------------------------


def share(
    post: Post, scope: Scope, row_M: Integers, terms: SharingTerms, model: bytes = bytes(32)
) -> bytes:
    """Return a client's upload: an envelope for each aggregator with its secrets sealed, and x_2
    encrypted once.

    8 M bytes and about 1 kB. Sealed in beside the shares are the hash of the global `model` that
    the row was made from, 32 bytes, and what the client takes for agreed: each aggregator compares.
    Raises PlanError for a row of another length.
    """
    if row_M.shape != (terms.length,) or row_M.dtype != np.int64:
        raise PlanError(f"a row of {row_M.dtype} {row_M.shape}; expected int64 ({terms.length},)")
    seeds = (os.urandom(32), os.urandom(32))
    key = os.urandom(32)
    last_M = row_M.view(np.uint64) - expand(seeds[0], terms.length)
    last_M -= expand(seeds[1], terms.length)
    hidden = _crypt(key, last_M.data.cast("B"))
    secrets = (seeds[0] + seeds[1], seeds[1] + key, key + seeds[0])
    bound_to = sha256(hidden).digest() + terms.facts + model
    envelopes = [
        post.wrap(
            scope,
            "shares",
            name,
            seal(post.roster[name], secret + bound_to, _purpose(scope, post.me.name)),
        )
        for name, secret in zip(terms.aggregators, secrets, strict=True)
    ]
    name = post.me.name.encode()
    front = _FRONT.pack(_MAGIC, len(name), *map(len, envelopes), len(hidden))

    return b"".join([front, name, *envelopes, hidden])


def _cut(upload: bytes) -> tuple[str, list[bytes], memoryview]:
    """Return who an upload says it is of, its three envelopes, and the encrypted x_2, which may
    have been left out.

    Raises CodecError where it is no upload; nothing is believed before an envelope's signature is
    checked.
    """
    try:
        magic, *lengths, rest = _FRONT.unpack_from(upload)
        ends = list(accumulate(lengths, initial=_FRONT.size))
        if magic != _MAGIC or len(upload) not in (ends[-1], ends[-1] + rest):
            raise ValueError(f"expected format {_MAGIC!r} and {ends[-1] + rest} bytes")
        name = upload[ends[0] : ends[1]].decode()
    except (struct.error, ValueError) as error:
        raise CodecError(
            f"{len(upload)} bytes are no shares: {error}. Ask the client again."
        ) from error

    return (
        name,
        [upload[start:end] for start, end in pairwise(ends[1:])],
        memoryview(upload)[ends[-1] :],
    )


def _purpose(scope: Scope, client: str) -> bytes:
    return repr(("shares", scope.study, scope.run, scope.round, client)).encode()


def _crypt(key: bytes, data: bytes | memoryview, start: int = 0) -> bytes:
    """Encrypt or decrypt under a key used once; `data` begins at byte `start`, a multiple of 16."""
    return Cipher(AES256(key), CTR((start // 16).to_bytes(16, "big"))).encryptor().update(data)


# An aggregator ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A client's two shares as aggregator i holds them: seeds, or the key and ciphertext of x_2."""

    first: bytes
    second: bytes
    hidden: memoryview
    digest: bytes  # sha256 of the ciphertext of x_2
    model: bytes  # sha256 of the global model that the row was made from

    def words(self, place: int, which: int, start: int, count: int) -> Words:
        """Return words of the share x_(place + which)."""
        secret = self.second if which else self.first
        if (place + which) % 3 != 2:
            return expand(secret, count, start)
        piece = self.hidden[8 * start : 8 * (start + count)]
        return np.frombuffer(_crypt(secret, piece, 8 * start), np.uint64)

    def tag(self, which: int) -> str:
        """Return what both holders of a share can compare."""
        secret = self.second if which else self.first
        return sha256(b"tag" + secret + self.digest).hexdigest()

    def tags(self) -> list[str]:
        """Return what the others compare: the tags of both shares, and the model."""
        return [self.tag(0), self.tag(1), self.model.hex()]


def _noise_of(chosen: Selection, weights: Mapping[str, int]) -> "Noise | None":
    """Return what draws one party's part of the noise on a sum in which rows count so much."""
    draw = chosen.sum_noise
    if draw is None:
        return None
    most = max(map(abs, weights.values()))
    return lambda length, entropy: draw(length, most, entropy)


Noise = Callable[[int, Entropy], Integers]
Toss = Callable[[], Generator[Sends, Sends, bytes]]
"""Tosses the next coin of the three."""

Steps = Generator[Sends, Sends, bytes]
"""Yields what goes to the other two, receives what they sent;
returns the message to the coordinator.
"""


@dataclass
class SharingAggregator:
    """One of the three, in one run of one study, which it has agreed to.

    `noise` draws its part of the joint noise on a sum of M numbers; any two parts must suffice.
    `record` is what it has opened: it outlasts a restart where the aggregator's keys do.
    """

    post: Post
    terms: SharingTerms
    study: str
    run: str
    noise: Noise | None = None
    weights: Mapping[str, int] | None = None  # public; without, each row counts once
    selection: Selection | None = None  # in place of both
    record: Record = dataclass_field(default_factory=Record)

    def __post_init__(self) -> None:
        self.place = self.terms.aggregators.index(self.post.me.name)
        self.left, self.right = (self.terms.aggregators[(self.place + d) % 3] for d in (2, 1))
        self._steps: Steps | None = None
        self._scope = Scope(self.study, self.run, 0)
        self._uploads = dict[str, bytes]()
        self._drawn: frozenset[str] | None = None

    def handle(self, op: str, payload: bytes) -> bytes:
        """Serve the relay: "begin" a round,
        "upload" client by client, "start", then "step" until done.

        Raises AbortError; the next "begin" starts anew.
        """
        try:
            return self._serve(op, payload)
        except StopIteration as done:
            self._stop()
            return codec.encode({"done": True}, {"result": codec.as_tensor(done.value)})
        except AbortError:
            self._stop()
            raise
        except CodecError as error:
            self._stop()
            raise AbortError(
                f"{self.post.me.name!r} was sent what it cannot read for {op!r}: {error} The "
                "coordinator must begin the round anew."
            ) from error

    def _serve(self, op: str, payload: bytes) -> bytes:
        if op == "begin":
            self._stop()
            self._scope = self._begin(payload)
            return b""
        if op == "upload":
            self._uploads[_cut(payload)[0]] = payload
            return b""
        if op == "start" and self._scope.round:
            self._steps = self.rounds(self._scope, self._uploads)
            return _outgoing(next(self._steps))
        if op != "step" or self._steps is None:
            raise AbortError(
                f"{self.post.me.name!r} was asked to {op!r} with no round begun; begin the "
                "round anew"
            )
        _, tensors = codec.decode(payload)
        return _outgoing(self._steps.send({name: codec.as_bytes(t) for name, t in tensors.items()}))

    def _begin(self, payload: bytes) -> Scope:
        """Return the scope of a round of this run, which is not before the last that was played."""
        round = codec.decode(payload)[0].get("round")
        last, _ = self.record.last("rows", self.study, self.run)
        if type(round) is not int or round < max(1, last):
            raise AbortError(
                f"round={round!r} was begun at {self.post.me.name!r}; expected {max(1, last)} or "
                "later, as none before is played again"
            )
        if self.terms.drawn:
            try:
                self._drawn = frozenset(self.terms.drawn(round))
            except PlanError as error:
                raise AbortError(f"{self.post.me.name!r}: {error}") from error
        return Scope(self.study, self.run, round)

    def _stop(self) -> None:
        self._scope = Scope(self.study, self.run, 0)
        self._steps = None
        self._uploads = {}

    def rounds(self, scope: Scope, uploads: Mapping[str, bytes]) -> Steps:
        """Play one round; see the module's docstring."""
        # 1. Open the envelopes, and greet the other two: tags of shares that two hold, a commitment
        #    to a coin, a fresh key for the line.
        held, refused = self._open_all(scope, uploads)
        once = self.record.names("rows", scope)
        for name in [name for name in held if once is not None and name not in once]:
            del held[name]
            refused[name] = "this round was opened without it"
        names = sorted(held)
        tags = {name: held[name].tags() for name in names}
        line = Line(self.post.me.name, self.terms.aggregators, _purpose(scope, "line"))
        coins = [os.urandom(32) for _ in range(_COINS)]
        committed = [sha256(b"coin" + coin).hexdigest() for coin in coins]
        mine = _Hello(tags, refused, committed, line.public.hex())
        arrived = yield {name: self._greet(scope, name, mine) for name in (self.left, self.right)}
        hellos = {
            name: self._read_greeting(scope, name, arrived) for name in (self.left, self.right)
        }
        said = {self.post.me.name: mine, **hellos}
        line.connect(
            {name: bytes.fromhex(hello.line) for name, hello in hellos.items()},
            [vars(said[name]) for name in self.terms.aggregators],
        )
        tosses = iter([(coin, hellos, i) for i, coin in enumerate(coins)])

        def toss() -> Generator[Sends, Sends, bytes]:
            return self._toss(line, *next(tosses))

        names, why = self._common(refused, tags, hellos)
        # 2 and 3. Check each row in secret, and open one bit of each.
        inner: Inner | None = None
        if names:
            good, inner = yield from self._check(line, {name: held[name] for name in names}, toss)
            why |= {
                n: "its row is out of bound" for n, ok in zip(names, good, strict=True) if not ok
            }
            chosen = [k for k, ok in enumerate(good) if ok]
            names = [names[k] for k in chosen]
        if len(names) < self.terms.fewest:
            left = (
                f"{len(names)} rows are left; expected {self.terms.fewest} or more "
                "(security.min_group besides security.colluding, training.quorum): nothing is "
                "opened."
            )
            raise AbortError(f"{left} {reasons(why)}".rstrip(), why)
        # Of which rows this round is, for ever: see `_commit`.
        fixed = self._commit("rows", scope, [[name, *tags[name]] for name in names], names)
        tensors: dict[str, torch.Tensor] = {}

        # 4. Under a rule: open the Gram matrix, and weigh the rows by it.
        weights = self.weights or dict.fromkeys(names, 1)
        noise = self.noise
        if self.selection:
            drawn = self._entropy("gram", scope, fixed)
            assert inner is not None
            upper = inner.upper(chosen)
            gram_KK, weights = yield from self._weigh(line, scope, names, upper, why, drawn, toss)
            noise = _noise_of(self.selection, weights)
            tensors["gram"] = torch.from_numpy(gram_KK)

        # 5. Sum the accepted rows, with noise and a sharing of zero; without noise, what two
        #    parties hold is told by one and hashed by the other.
        counted = [weights[name] for name in names]
        fixed += self._commit("weights", scope, counted)
        rows = [held[name] for name in names]
        part_M = self._sum(rows, counted, 0)
        told: dict[str, Any] = {"accepted": names, "excluded": why, "place": self.place}
        told["weights"] = {name: weights[name] for name in names}
        if noise is not None:
            drawn = self._entropy("sum", scope, fixed)
            part_M += noise(self.terms.length, drawn).view(np.uint64)
            part_M += line.zero(self.terms.length)
        else:
            told["beside"] = sha256(self._sum(rows, counted, 1).tobytes()).hexdigest()
        tensors["part"] = torch.from_numpy(part_M.view(np.int64))
        return codec.encode(told, tensors)

    def _commit(self, act: str, scope: Scope, facts: object, names: Sequence[str] = ()) -> bytes:
        """Write down for what a round is, and return the hash of it: of which rows, in which
        weights, each before anything that depends on it leaves but bits that say who is within its
        bound.

        A round that is played again, after an abort or a restart, is for the same or nothing; and
        as noise follows from the hashes (`_entropy`), it opens the same number or none. Once a
        later one was begun, in whatever process, it opens nothing.
        """
        self.record.refuse_behind(scope)
        digest = sha256(json.dumps([facts, self.terms.facts.hex()]).encode()).digest()
        self.record.commit(act, scope, digest, names)
        return digest

    def _entropy(self, what: str, scope: Scope, fixed: bytes) -> Entropy:
        """Return the stream of this party's noise on what is opened: of its secret keys and of all
        that the opening depends on, so that none is drawn twice for one number, and two numbers
        have never the same.
        """
        return Entropy(self.post.me.derive(_purpose(scope, f"noise on the {what}") + fixed))

    def _toss(
        self, line: Line, coin: bytes, hellos: Mapping[str, "_Hello"], number: int
    ) -> Generator[Sends, Sends, bytes]:
        """Return what the three coins come to;
        raise AbortError where one is not the coin that was committed to.
        """
        found = yield from line.swap(coin, coin)
        coins = dict(zip((self.left, self.right), found, strict=True))
        for name in (self.left, self.right):
            if sha256(b"coin" + coins[name]).hexdigest() != hellos[name].coins[number]:
                raise AbortError(
                    f"{name!r} opened another coin than it committed to; the round ends"
                )
        tosses = {self.post.me.name: coin, **coins}
        return sha256(b"toss" + b"".join(tosses[name] for name in self.terms.aggregators)).digest()

    def _weigh(
        self,
        line: Line,
        scope: Scope,
        names: Sequence[str],
        upper: Pair,
        why: Mapping[str, str],
        drawn: Entropy,
        toss: Toss,
    ) -> Generator[Sends, Sends, tuple[Integers, dict[str, int]]]:
        """Return the opened Gram matrix and the rule's weights, alike for all three: see step 4."""
        chosen = self.selection
        assert chosen is not None
        gram_KK = yield from self._gram(line, scope, len(names), upper, drawn, toss)
        with naming(why):
            weights = chosen.weigh(names, gram_KK)
        yield from self._agree(line, gram_KK.tobytes() + repr(weights).encode())

        count = count_rows(np.array([*weights.values()], np.float64), gram_KK.astype(np.float64))
        if count < self.terms.fewest_kept:
            kept = (
                f"the rule keeps {count} rows; expected {self.terms.fewest_kept} or more "
                "(security.min_group besides security.colluding)"
            )
            raise AbortError(f"{kept}: their sum is not opened. {reasons(why)}".rstrip(), dict(why))
        return gram_KK, weights

    def _gram(
        self, line: Line, scope: Scope, K: int, upper: Pair, drawn: Entropy, toss: Toss
    ) -> Generator[Sends, Sends, Integers]:
        """Return the Gram matrix [K, K] of the rows, with all three parts of its noise: step 4.

        Each party's part is shared by it, and held to what such noise can be: an aggregator cannot
        move the matrix further. Once a later round was begun, in whatever process, while the noise
        was shared, it is not opened.
        """
        chosen = self.selection
        assert chosen is not None
        if chosen.gram_noise:
            assert chosen.gram_spread is not None
            most = math.ceil(field.HEADROOM * chosen.gram_spread(K))
            own = chosen.gram_noise(K, drawn).view(np.uint64)
            parts = yield from line.put(own)
            limits = np.array([most], np.uint64)
            both = [part.times(sign).plus(limits, self.place) for part in parts for sign in _SIGNS]
            bits = yield from line.to_bits(Pair.join(both))
            made = yield from triples.prepare(line)
            yield from triples.verify(line, made, (yield from toss()))
            yield from line.see_zero(
                bits.mask(_TOP), "parts of the noise on products that are within their range"
            )
            for part in parts:
                upper = upper.add(part)
        self.record.refuse_behind(scope)
        opened = yield from line.reveal(upper, additive=True)
        gram_KK = np.zeros((K, K), np.int64)
        gram_KK[np.triu_indices(K)] = opened.view(np.int64)
        return gram_KK + np.triu(gram_KK, 1).T

    def _agree(self, line: Line, what: bytes) -> Generator[Sends, Sends, None]:
        """Raise AbortError unless the other two have the same."""
        digest = sha256(what).digest()
        found = yield from line.swap(digest, digest)
        for name, other in zip((self.left, self.right), found, strict=True):
            if other != digest:
                raise AbortError(
                    f"{name!r} has another Gram matrix or other weights; nothing more is opened"
                )

    def _open_all(
        self, scope: Scope, uploads: Mapping[str, bytes]
    ) -> tuple[dict[str, _Held], dict[str, str]]:
        held: dict[str, _Held] = {}
        refused: dict[str, str] = {}
        for client, upload in uploads.items():
            try:
                self._refuse_stranger(client)
                held[client] = self._open(scope, client, upload)
            except (CodecError, KeyError) as error:
                refused[client] = f"its shares cannot be used: {error}"
        return held, refused

    def _refuse_stranger(self, client: str) -> None:
        """Refuse a row of whoever is no site of the study."""
        role = self.post.roster[client].role
        if role != "site" or (self._drawn is not None and client not in self._drawn):
            raise EnvelopeError(f"{client!r} ({role}) is no site that this round draws")

    def _open(self, scope: Scope, client: str, upload: bytes) -> _Held:
        _, envelopes, hidden = _cut(upload)
        # The same envelope may come again: of which shares a round is, the record says.
        me = self.post.me
        envelope = envelopes[self.place]
        check(envelope, self.post.roster[client], scope, "shares", me.name)
        secret = me.unseal(Post.body(envelope), _purpose(scope, client))
        if len(secret) != 160:
            raise EnvelopeError(f"{len(secret)} bytes of secrets; expected 160")
        if secret[96:128] != self.terms.facts:
            raise EnvelopeError(
                "it takes another study, other participants or other sizes for agreed; the "
                "coordinator may have told it others"
            )
        expected = 0 if self.place == 0 else 8 * self.terms.length
        if len(hidden) != expected:
            raise EnvelopeError(f"{len(hidden)} bytes of shares; expected {expected}")
        if expected and sha256(hidden).digest() != secret[64:96]:
            raise EnvelopeError("its shares were changed on the way")
        return _Held(secret[:32], secret[32:64], hidden, secret[64:96], secret[128:])

    def _greet(self, scope: Scope, to: str, mine: "_Hello") -> bytes:
        plain = codec.encode(vars(mine))
        body = seal(self.post.roster[to], plain, _purpose(scope, self.post.me.name))
        return self.post.wrap(scope, "hello", to, body)

    def _read_greeting(self, scope: Scope, sender: str, arrived: Sends) -> "_Hello":
        try:
            body = self.post.unwrap(arrived[sender], scope, "hello", sender)
            return _Hello.read(codec.decode(self.post.me.unseal(body, _purpose(scope, sender)))[0])
        except (CodecError, KeyError) as error:
            raise AbortError(
                f"{sender!r} sent no greeting that can be read, or the coordinator did not carry "
                f"it ({error}); the round ends"
            ) from error

    def _common(
        self,
        refused: Mapping[str, str],
        tags: Mapping[str, list[str]],
        hellos: Mapping[str, "_Hello"],
    ) -> tuple[list[str], dict[str, str]]:
        """Return who is left, the same for all three: opened by all, with the same shares where two
        hold one, and made from the model that most rows were made from.
        """
        everyone = {
            self.post.me.name: tags,
            **{name: hello.tags for name, hello in hellos.items()},
        }
        order = [everyone[name] for name in self.terms.aggregators]
        why = dict(refused)
        for other, hello in hellos.items():
            # its words are not passed on: it may not say of a site what it likes
            why |= {c: f"{other!r} {_OTHER}" for c in hello.refused if c not in why}

        # Whose shares all three have, the same.
        model: dict[str, str] = {}
        for client in sorted(set().union(*order)):
            if any(client not in one for one in order):
                why.setdefault(client, "not all aggregators have its shares")
            elif any(order[i][client][1] != order[(i + 1) % 3][client][0] for i in range(3)):
                why[client] = "it, or an aggregator, tells different shares of its row"
            elif len({one[client][2] for one in order}) > 1:
                why[client] = "it, or an aggregator, tells different models of its row"
            else:
                model[client] = order[0][client][2]

        # Of one model.
        count = Counter(model.values())
        most = max(count, key=lambda digest: (count[digest], digest), default="")
        odd = [client for client in model if model[client] != most]
        why |= dict.fromkeys(
            odd, "its row is of another model; the coordinator sent it one, or it did not follow"
        )
        return [client for client in model if model[client] == most], why

    def _columns(self, held: Sequence[_Held], which: int, start: int, count: int) -> Words:
        return np.stack([one.words(self.place, which, start, count) for one in held])

    def _sum(self, held: Sequence[_Held], weights: Sequence[int], which: int) -> Words:
        """Return the weighted sum of the rows' shares: of the first ones, or the second ones."""
        total_M = np.zeros(self.terms.length, np.uint64)
        for one, weight in zip(held, weights, strict=True):
            words = one.words(self.place, which, 0, self.terms.length)
            total_M += np.uint64(weight % 2**64) * words
        return total_M

    def _check(
        self, line: Line, held_of: Mapping[str, _Held], toss: Toss
    ) -> Generator[Sends, Sends, tuple[NDArray[np.bool_], Inner | None]]:
        """Return whether each row is within its bound, and the rows' inner products, shared: steps
        2 and 3.

        What the three multiply is verified before a bit is opened, so that a bit is 1 by a row's
        fault alone.
        """
        held = list(held_of.values())
        K = len(held)
        T = np.uint64(self.terms.reach)
        J = self.terms.projections
        exact = self.terms.exact
        rule = self.selection is not None
        multiplied = exact or rule

        # Project each row on J random vectors, both shares alike: no message is needed. Work out
        # cross terms of inner products.
        public = yield from toss()
        draw = sha256(b"projections" + public).digest()
        p_KJ = Pair(*(np.zeros((K, J), np.uint64) for _ in range(2)))
        products = Products(K, self.terms.length, every=rule)
        for start in range(0, self.terms.length, _COLUMNS):
            count = min(_COLUMNS, self.terms.length - start)
            first, second = (self._columns(held, which, start, count) for which in (0, 1))
            random_JM = _ternary(draw, J, start, count)
            digits = [field.digits(first), field.digits(second)]
            p_KJ.first[:] += field.project(random_JM, digits[0])
            p_KJ.second[:] += field.project(random_JM, digits[1])
            if multiplied:
                products.add(first, second, digits)
        inner = (yield from products.tell(line)) if multiplied else None

        # Compare: T + p is below 2T, so that no bit from 2T on is set, and B^2 - x.x not negative.
        # Where T is no power of two, neither T + p nor T - p is negative.
        columns = [p_KJ.plus(T, self.place)]
        masks = [np.full(J, ~(2 * T - _ONE) if exact else _TOP)]
        if not exact:
            columns.append(p_KJ.times(_SIGNS[1]).plus(T, self.place))
            masks *= 2
        if inner and exact:
            most_K = [int(self.terms.bound_of(name) ** 2) for name in held_of]
            limit_K = np.array(most_K, np.uint64)
            square = inner.squares(K).times(_SIGNS[1]).plus(limit_K, self.place)
            columns.append(square.at((slice(None), None)))
            masks.append(np.full(1, _TOP))
        bits = yield from line.to_bits(Pair.beside(columns))

        # Fold a row's bits that are out of range into one: 1 where any is set.
        bad_K = _fold(bits.mask(np.concatenate(masks)), sha256(b"parities" + public).digest())
        bad_K = yield from line.any_bit(bad_K)

        # Verify all products, of numbers and of bits.
        made = yield from triples.prepare(line)
        coin = yield from toss()
        if inner:
            yield from products.prove(
                line,
                lambda which, start, count: self._columns(held, which, start, count),
                sha256(b"products" + coin).digest(),
                toss,
            )
        yield from triples.verify(line, made, sha256(b"order" + coin).digest())

        # Open that bit.
        opened = yield from line.reveal(bad_K)
        good_K: NDArray[np.bool_] = opened == 0
        return good_K, inner


def _ternary(seed: bytes, J: int, start: int, count: int) -> NDArray[np.float64]:
    """Return columns start .. start + count of R [J, M]: -1, 0, 1 at odds 1:2:1, two bits each.

    J is a multiple of 4, and start of 32.
    """
    words = expand(seed, -(-count * J // 32), start * J // 32)
    two = np.frombuffer(words.tobytes(), np.uint8)[: count * J // 4].reshape(count, J // 4)
    ones = np.unpackbits(two, axis=1).view(np.int8)  # [count, 2 J]
    return (ones[:, :J] - ones[:, J:]).T.astype(np.float64)


def _fold(bits: Pair, seed: bytes) -> Pair:
    """Return a word [K] of 64 random parities of each row's bits [K, any]: 0 where all are 0,
    else 0 once in 2^64.
    """
    width = bits.first.shape[1]
    mask = expand(seed, 64 * width).reshape(64, width)
    return Pair(_parity(bits.first, mask), _parity(bits.second, mask))


def _parity(words: Words, mask: Words) -> Words:
    found = np.zeros(len(words), np.uint64)
    for bit, one in enumerate(mask):
        folded = np.bitwise_xor.reduce(words & one, axis=1)
        for d in (32, 16, 8, 4, 2, 1):
            folded ^= folded >> np.uint64(d)
        found |= (folded & _ONE) << np.uint64(bit)
    return found


@dataclass(frozen=True)
class _Hello:
    """What an aggregator tells each of the others first."""

    tags: Mapping[str, list[str]]  # by client: of its two shares, and of the model; see _Held.tags
    refused: Mapping[str, str]  # by client: why
    coins: list[str]  # the commitments to them, in the order in which they are tossed
    line: str  # a fresh public key

    @classmethod
    def read(cls, header: Mapping[str, Any]) -> "_Hello":
        """Return what a greeting says; raise CodecError where it is none."""
        tags: Any = header.get("tags")
        refused: Any = header.get("refused")
        coins: Any = header.get("coins")
        line = header.get("line")
        read = (
            isinstance(tags, dict)
            and all(isinstance(t, list) and len(t) == 3 for t in tags.values())
            and all(_is_hex(one) for t in tags.values() for one in t)
            and isinstance(refused, dict)
            and all(isinstance(reason, str) for reason in refused.values())
            and isinstance(coins, list)
            and len(coins) == _COINS
            and all(map(_is_hex, coins))
            and _is_hex(line)
        )
        if not read:
            raise CodecError("expected tags of shares, reasons, commitments and a key")
        return cls(tags, refused, coins, str(line))


def _is_hex(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


# The coordinator ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """The sum, noise and all, [M] int64; whose rows are in it, how often, and why others are not;
    bytes by phase.

    Under a robust rule also the Gram matrix that it read, in the order of `accepted`.
    """

    total_M: Integers
    accepted: list[str]
    excluded: dict[str, str]
    phases: dict[str, int]
    weights: dict[str, int] = dataclass_field(default_factory=dict)
    gram_KK: Integers | None = None


Ask = Callable[[str, Mapping[str, bytes]], Mapping[str, bytes]]
"""(op, payload of each aggregator) -> answer of each; raises AbortError where one gives none."""


def relay(
    ask: Ask, scope: Scope, uploads: Mapping[str, bytes], terms: SharingTerms, spread: float = 0.0
) -> Opened:
    """Carry messages until each aggregator has handed in its part, and add the three.

    `spread` is the standard deviation of the noise on a sum in which no row counts more than once.
    Raises AbortError where one stops, disagrees with the others, or the sum is larger than accepted
    rows and noise can make it.

    Guarantee: what is opened, here and nowhere before, is the sum of rows that are each within
    `SharingTerms.proven`, and the noise of all three aggregators; two parts of it are enough for
    the claim. A single row stays uniform to this party and to each aggregator.

    Edge cases:
    - a row that cannot be read, is out of bound or was shared unequally is left out, and named with
      the reason;
    - fewer than `SharingTerms.fewest` rows are left, or a rule keeps fewer than `fewest_kept`:
      nothing is opened;
    - under joint noise an aggregator that adds a wrong number, as its part of it, moves the sum
      unseen, up to that bound; without noise each part is known to two of them, and compared;
    - two aggregators that work together read every row: nothing here can keep it;
    - a round that was aborted opens the same sum of the same shares, noise and all, or nothing.
    """
    phases = {"shares": 0, "check": 0, "open": 0}

    # Shares: to each aggregator its own.
    unread: dict[str, str] = {}
    head = codec.encode({"round": scope.round})
    ask("begin", dict.fromkeys(terms.aggregators, head))
    for client, upload in uploads.items():
        if (parts := _for_each(client, upload, terms)) is None:
            unread[client] = "its shares cannot be read"
            continue
        phases["shares"] += sum(map(len, parts.values()))
        ask("upload", parts)

    # Check and open: the three talk, and each hands in its part of the sum.
    with naming(unread):
        answers = _carry(ask, terms, phases)
    opened = _add_parts(answers, terms, phases)

    # What no accepted rows can come to is not used.
    weights = np.abs(list(opened.weights.values()))
    most = weights.sum() * terms.proven + field.HEADROOM * spread * weights.max(initial=0)
    if np.abs(opened.total_M.astype(np.float64)).max(initial=0) > most:
        raise AbortError(
            f"the opened sum has a number above {most:g} steps, which no accepted rows make; an "
            "aggregator did not follow the protocol. Nothing is used; run the round again."
        )
    return replace(opened, excluded=unread | opened.excluded)


_Answers = Mapping[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]


def _carry(ask: Ask, terms: SharingTerms, phases: dict[str, int]) -> _Answers:
    """Carry the aggregators' messages to each other until done; return what each hands in."""
    answers = _decode(ask("start", dict.fromkeys(terms.aggregators, b"")))
    while not any(header.get("done") for header, _ in answers.values()):
        post: dict[str, dict[str, torch.Tensor]] = {name: {} for name in terms.aggregators}
        for sender, (_, tensors) in answers.items():
            for to, message in tensors.items():
                if to in post and to != sender:
                    post[to][sender] = message
        carried = {name: codec.encode({}, mine) for name, mine in post.items()}
        phases["check"] += sum(map(len, carried.values()))
        answers = _decode(ask("step", carried))
    return answers


def _decode(
    answers: Mapping[str, bytes],
) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    found = {}
    for name, answer in answers.items():
        try:
            found[name] = codec.decode(answer)
        except CodecError as error:
            raise AbortError(
                f"{name!r} answered with what cannot be read ({error}); the round ends"
            ) from error
    return found


def _for_each(client: str, upload: bytes, terms: SharingTerms) -> dict[str, bytes] | None:
    """Return what each aggregator needs of a client's upload;
    None where it is none, or another client's.
    """
    try:
        name, _, hidden = _cut(upload)
    except CodecError:
        return None
    whole = upload
    short = upload[: len(upload) - len(hidden)]
    if name == client:
        return dict(zip(terms.aggregators, (short, whole, whole), strict=True))
    return None


def _add_parts(
    answers: Mapping[str, tuple[dict[str, object], Mapping[str, torch.Tensor]]],
    terms: SharingTerms,
    phases: dict[str, int],
) -> Opened:
    total_M = np.zeros(terms.length, np.uint64)
    said = []
    digests: list[str] = []
    beside: list[object] = []
    excluded: list[dict[str, str]] = []
    for name in terms.aggregators:
        try:
            header, tensors = codec.decode(codec.as_bytes(answers[name][1]["result"]))
            part = tensors["part"].numpy()
            if part.shape != (terms.length,) or part.dtype != np.int64:
                raise CodecError(
                    f"a part of {part.dtype} {part.shape}; expected int64 ({terms.length},)"
                )
            total_M += part.view(np.uint64)
            digests.append(sha256(part.tobytes()).hexdigest())
            beside.append(header.get("beside"))
            gram = tensors["gram"].numpy() if "gram" in tensors else None
            said.append(
                (header["accepted"], header["weights"], None if gram is None else gram.tobytes())
            )
            excluded.append(_read_reasons(header["excluded"]))
            phases["open"] = phases["open"] + part.nbytes
        except (CodecError, KeyError) as error:
            raise AbortError(
                f"{name!r} handed in no part ({error}); run the round again"
            ) from error

    if any(one != said[0] for one in said):
        raise AbortError(
            "the aggregators disagree on whose rows are in the sum; run the round again"
        )
    # without noise each part is known to two of them
    if any(beside) and beside != [*digests[1:], digests[0]]:
        raise AbortError(
            "the aggregators disagree on the shares of the sum; one of them did not follow the "
            "protocol. Nothing is used; run the round again."
        )

    # what all three say is so; what one says is its word alone, and told as such
    accepted = said[0][0]
    reasons_of = dict(zip(terms.aggregators, excluded, strict=True))
    out = {name for one in excluded for name in one} - set(accepted)
    why = {name: _join_reasons(name, reasons_of) for name in sorted(out)}
    return Opened(total_M.view(np.int64), accepted, why, phases, said[0][1], gram)


DISPUTED = "not all aggregators take its shares"
"""How a reason begins that not all three give."""


def _join_reasons(name: str, reasons_of: Mapping[str, Mapping[str, str]]) -> str:
    told = {one.get(name) for one in reasons_of.values()}
    if len(told) == 1:
        return str(told.pop())
    words = [
        f"{party!r} says: {one[name]}"
        for party, one in reasons_of.items()
        if name in one and _OTHER not in one[name]
    ]
    return ". ".join([DISPUTED, *words])


_OTHER = "does not take its shares"


def _read_reasons(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise CodecError("reasons that are none")
    return value


def _outgoing(sent: Sends) -> bytes:
    return codec.encode({}, {name: codec.as_tensor(data) for name, data in sent.items()})


def run_protocol(
    posts: Mapping[str, Post],
    scope: Scope,
    rows: Mapping[str, Integers],
    terms: SharingTerms,
    noise: Noise | None = None,
    weights: Mapping[str, int] | None = None,
    selection: Selection | None = None,
    spread: float = math.inf,
) -> Opened:
    """Play every party in order, in one process: clients share, aggregators check and sum, the
    coordinator adds.
    """
    uploads = {client: share(posts[client], scope, row_M, terms) for client, row_M in rows.items()}
    aggregators = {
        name: SharingAggregator(
            posts[name], terms, scope.study, scope.run, noise, weights, selection
        )
        for name in terms.aggregators
    }
    return relay(in_turn(aggregators), scope, uploads, terms, spread)


def in_turn(aggregators: Mapping[str, SharingAggregator]) -> Ask:
    """Return a way to ask aggregators that live in this process."""
    handles = {name: one.handle for name, one in aggregators.items()}
    return asking(handles, max(one.terms.length for one in aggregators.values()))


def asking(handles: Mapping[str, Callable[[str, bytes], bytes]], length: int) -> Ask:
    """Return a way to ask aggregators by their `handle`:
    in turn, or for rows of a great `length` a thread each.
    """
    long = length > _LONG

    def one(name: str, op: str, payload: bytes) -> bytes:
        try:
            return handles[name](op, payload)
        except OSError as error:
            raise AbortError(
                f"{name!r} stopped ({plain(error)}); the round ends. Resume the run when it "
                "is back."
            ) from error

    def ask(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        if not long or op in ("begin", "upload"):  # too little to do
            return {name: one(name, op, payload) for name, payload in payloads.items()}
        with ThreadPoolExecutor(3) as pool:
            answers = pool.map(lambda name: one(name, op, payloads[name]), payloads)
            return dict(zip(payloads, answers, strict=True))

    return ask
