"""Rules of stacked layers:
forward and backward of K clients at once by batched products into kept buffers.

No autograd. A rule knows one kind of layer and four things about it:

    forward        x -> y, each client with its own parameters
    backward       dL/dy -> dL/dx; what the parameters' gradient needs is kept, not multiplied out
    square_norms   of each patient's gradient, from what is kept
    accumulate     target <- beta * target + alpha * gradient by parameter, one product a layer

Because the last is separate, plain SGD writes its step straight into the weights (target = weights,
alpha = -lr), a gradient is the same call with beta = 0, and a sum of clipped gradients is the same
call with a weight per patient: one backward pass, norms, one weighted product a layer
(book-keeping: Bu et al. 2022, arXiv:2210.00038).

What is summed is what was measured. A patient's records may cancel: a norm worked out from products
of pairs is then near zero while each record's part is huge, and a weighted sum of the parts is not
bounded by weight times norm, nor does it leave the other patients' parts in place. So parts of
several slots are brought into a form whose own size is the norm (an orthonormal basis, or the
gradient itself), and that form is both measured and summed.

K clients, B batch (padded), I inputs, O outputs of a layer. Under clipping a batch is N patients of
R records each, in neighbouring slots, and a patient's gradient is a sum over its S records and
positions. Buffers are made once for K clients; a step that only the first A clients still take uses
their first A entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medfed.core import streams
from medfed.learn.zoo import Dropout, Embedding, Series

_aten: Any = torch.ops.aten

LARGEST = 2.0**100
"""A norm above it counts as not finite:
a weight of 1 / norm would be subnormal in float32, and no longer exact.
"""

# columns of a product that are enough for a row's bits not to depend on its place or company
_COLUMNS = 16

CANCELLATION = 2.0**-20
"""Least norm of a patient's gradient, as a share of the sum of its records' norms, that clipping
tells apart from 0.

Rounding in float64 moves what cancels further by up to 2^-53 S of that sum, in a direction that may
follow from how slots are laid out; held to this floor, by 2^-33 S of the clip at most.
"""


class Buffers:
    """Named tensors that are made once and handed out cut to the first A clients."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[object, ...], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor of `shape` [A,
        ...] and `dtype`, kept under `name`.
        """
        wanted = (name, dtype, *shape)
        view = self._views.get(wanted)
        if view is None:
            size = prod(shape)
            kept = self._kept.get((name, dtype))
            if kept is None or len(kept) < size:
                kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
                self._views.clear()
            view = self._views[wanted] = kept[:size].view(tuple(shape))
        return view


class LayerRule(ABC):
    """A layer without parameters of its own; the base of all rules."""

    names: tuple[str, ...] = ()  # the parameters, in the order of `named_parameters()`
    # by `backward`: tensors that begin with clients and slots
    remembered: ClassVar[tuple[str, ...]] = ()
    # [A, N, *shape] of each parameter, where `square_norms` had to make them
    gradients: Sequence[Tensor] = ()
    # other factors of the gradients, [A, N, S, .], where `square_norms` had to make those
    basis: Sequence[Tensor] = ()
    mass_AN: Tensor | None = None  # the sum of a patient's records' norms, where records may cancel

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.buffers = Buffers()

    @abstractmethod
    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        """Return y [A, B, ...] for x [A, B, ...].

        Args:
            x: the layer's input.
            params: the layer's own, [A, *shape] each.
            key_K: this step's streams, of clients [A] or slots [A, B].
        """

    @abstractmethod
    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        """Return dL/dx for dL/dy; may overwrite dy.

        Args:
            dy: dL/dy, shaped like y.
            params: the layer's own, [A, *shape] each.
            first: it is the first layer with parameters: nothing below needs dL/dx, and anything
                may be returned.
        """

    def square_norms(self, records: int) -> Tensor | None:
        """Return |gradient|^2 [A, N] (float64) of each patient's `records` neighbouring slots; None
        without parameters.

        A patient whose gradient is not finite has a norm that is not finite. With several records,
        `mass_AN` is set.
        """
        return None

    # a layer without parameters has nothing to add
    def accumulate(  # noqa: B027
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor | None = None
    ) -> None:
        """Set each target [A, *shape] to beta * target + alpha * (gradient summed over the batch).

        `weight_AB` multiplies each slot's part, the same for all slots of a patient; it is of the
        targets' type, in which products and sums are then taken. What `backward` remembered is used
        up by it.
        """

    def forget(self, patient_AN: Tensor) -> None:
        """Take the patients of `patient_AN` out of what is remembered.

        A weight of zero would not, as 0 * NaN is NaN.
        """
        gone = patient_AN.reshape(-1, 1)

        def without(kept: Tensor) -> Tensor:
            return torch.where(gone, 0, kept.reshape(len(gone), -1)).view(kept.shape)

        for name in self.remembered:
            setattr(self, name, without(getattr(self, name)))
        self.gradients = [without(g) for g in self.gradients]
        self.basis = [without(part) for part in self.basis]

    def _remember_gradients(self, gradients: Sequence[Tensor], records: int) -> Tensor:
        """Keep gradients [A, N, *shape], summed over records [A, N * records, *shape]; return their
        squares [A, N].

        Sums over records are taken in float64, as records may cancel.
        """
        wide = [self._copy_wide(f"gradient {i}", g, torch.float64) for i, g in enumerate(gradients)]
        if records == 1:
            self.gradients = wide
            return _sum([_square(g.flatten(2)) for g in wide])
        each_AB = _sum([_square(g.flatten(2)) for g in wide]).sqrt_()
        self.mass_AN = each_AB.view(len(each_AB), -1, records).sum(2)
        self.gradients = [g.view(len(g), -1, records, *g.shape[2:]).sum(2) for g in wide]
        return _sum([_square(g.flatten(2)) for g in self.gradients])

    def _accumulate_gradients(
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor
    ) -> None:
        """Do what `accumulate` does, from the gradients that `square_norms` made."""
        for target, gradient in zip(targets, self.gradients, strict=True):
            weight_A1N = weight_AB[:, None, :: weight_AB.shape[1] // gradient.shape[1]].double()
            _blend(
                target, torch.bmm(weight_A1N, gradient.flatten(2)).view(target.shape), beta, alpha
            )

    def _copy_wide(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x as numbers of this type."""
        if x.dtype == dtype:
            return x
        return self.buffers.take(name, x.shape, dtype).copy_(x)

    def _weigh(self, dy: Tensor, weight_AB: Tensor) -> Tensor:
        """Return dy [A, B * positions, O] times each slot's weight, as numbers of the weight's
        type; overwrites dy.
        """
        positions = dy.shape[1] // weight_AB.shape[1]
        weight = (
            weight_AB if positions == 1 else weight_AB.repeat_interleave(positions, 1)
        ).unsqueeze(-1)
        return self._copy_wide("dy wide", dy, weight.dtype).mul_(weight)


class LinearRule(LayerRule):
    """y = x W^T + b. The gradient of W is a sum of products dy_s x_s^T over slots and positions."""

    remembered = ("x", "dy")

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(layer)
        self.names = ("weight", "bias") if layer.bias is not None else ("weight",)
        self.widened: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.slots = x.shape[:2]
        self.x = _rows(x)
        bias = params[1].unsqueeze(1) if len(params) == 2 else None
        y = self._times("y", self.x, params[0].mT, bias)
        return y if x.dim() == 3 else y.reshape(*x.shape[:-1], -1)

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = _rows(dy)
        self.gradients = ()
        self.basis = ()
        self.mass_AN = None
        if first:
            return dy
        dx = self._times("dx", self.dy, params[0])
        return dx if dy.dim() == 3 else dx.reshape(*dy.shape[:-1], -1)

    def _times(self, name: str, x: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x [A, S, I] times `right` [A, I, N], plus bias [A, 1, N]; a row's bits do not
        depend on the others.

        They would with few columns (by place, and by how many clients are in the stack), and are
        then taken of more. Seen with MKL on AVX2 and AVX-512; probe.py looks on each machine.
        """
        outputs = right.shape[2]
        if outputs >= _COLUMNS:
            y = self.buffers.take(name, (x.shape[0], x.shape[1], outputs), x.dtype)
            if bias is None:
                return torch.bmm(x, right, out=y)
            return torch.baddbmm(bias, x, right, out=y)

        wide, one, y, cut = self._widen(name, x, right)
        if outputs == 1:  # the bias goes to every column
            torch.mul(right, one, out=wide)
            torch.bmm(x, wide, out=y) if bias is None else torch.baddbmm(bias, x, wide, out=y)
            return cut

        wide[..., :outputs].copy_(right)
        torch.bmm(x, wide, out=y)
        return cut if bias is None else cut.add_(bias)

    def _widen(self, name: str, x: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what a narrow product is taken with, made once: room for `right`, a one, room for
        it and cut to size.

        Behind the columns of `right` and behind the one stand zeros.
        """
        key = (name, x.shape, right.shape, x.dtype)
        found = self.widened.get(key)
        if found is None:
            wide = right.new_zeros(*right.shape[:2], _COLUMNS)
            y = x.new_empty(*x.shape[:2], _COLUMNS)
            one = torch.eye(1, _COLUMNS, dtype=x.dtype)[0]
            if len(self.widened) > 8:  # shapes of batches that are gone
                self.widened.clear()
            found = self.widened[key] = wide, one, y, y[..., : right.shape[2]]
        return found

    def square_norms(self, records: int) -> Tensor:
        """One slot: |dy|^2 (|x|^2 + 1). S of them:
        of their basis, or of the gradients where those are smaller.
        """
        x = self.x
        dy = self.dy
        if records == 1 and x.shape[:2] == self.slots:
            dy2 = _square(dy)
            x2 = _square(x)
            if len(self.names) == 2:
                return dy2.addcmul_(dy2, x2)
            return dy2.mul_(x2)
        A, B = self.slots
        positions = x.shape[0] * x.shape[1] // (A * B)
        inputs = x.shape[-1]
        outputs = dy.shape[-1]
        # which way must not follow from other patients' records
        slots = positions if positions > 1 else records
        if slots * (inputs + outputs) < inputs * outputs:
            return self._square_norms_in_basis(A, B // records)
        if positions == 1:
            return self._square_norms_of_products(A, B // records)
        gradients = [self._product(dy, x, A * B), self._total(dy, A * B)][: len(self.names)]
        return self._remember_gradients([g.view(A, B, *g.shape[1:]) for g in gradients], records)

    def _square_norms_of_products(self, A: int, N: int) -> Tensor:
        """Make each patient's gradient in float64: products of float32 numbers are then exact."""
        x = self.x.double()
        dy = self.dy.double()
        gradients = [self._product(dy, x, A * N), self._total(dy, A * N)][: len(self.names)]
        square_AN = self._remember_gradients([g.view(A, N, *g.shape[1:]) for g in gradients], 1)
        self.mass_AN = self._mass(
            x.view(A * N, -1, x.shape[-1]), dy.view(A * N, -1, dy.shape[-1])
        ).view(A, N)
        return square_AN

    def _mass(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the sum over slots of |dy_s| |(x_s, 1)|, for x [N, S, I] and dy [N, S, O]."""
        inputs = _square(x) + (len(self.names) - 1)
        return (inputs.sqrt_() * _square(dy).sqrt_()).sum(1)

    def _square_norms_in_basis(self, A: int, N: int) -> Tensor:
        """Write each patient's sum of dy_s (x_s, 1)^T over its S slots as a sum over an orthonormal
        basis of (x_s, 1).

        x = R^T Q^T with Q^T Q = 1, so the gradient is (R dy)^T Q^T: its norm is that of R dy, and
        no term of the sum is larger. What is remembered is R dy and Q^T, in float64, in place of dy
        and x.
        """
        x, dy = (t.reshape(A * N, -1, t.shape[-1]).double() for t in (self.x, self.dy))
        self.mass_AN = self._mass(x, dy).view(A, N)
        if len(self.names) == 2:
            x = nn.functional.pad(x, (0, 1), value=1.0)
        known = self.mass_AN.isfinite().view(-1, 1, 1)
        x = torch.where(known, x, 0)
        dy = torch.where(known, dy, 0)
        q, r = torch.linalg.qr(x.mT)
        self.basis = [
            torch.bmm(r, dy).view(A, N, -1, dy.shape[-1]),
            q.mT.reshape(A, N, -1, x.shape[-1]),
        ]
        square_AN = _square(self.basis[0].flatten(2))

        return torch.where(known.view(A, N), square_AN, torch.nan)

    def accumulate(
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor | None = None
    ) -> None:
        x = self.x
        dy = self.dy
        if weight_AB is not None:
            if self.basis:
                return self._accumulate_basis(targets, beta, alpha, weight_AB)
            if self.gradients:
                return self._accumulate_gradients(targets, beta, alpha, weight_AB)
            x = self._copy_wide("x wide", x, weight_AB.dtype)
            dy = self._weigh(dy, weight_AB)
        self._add_product(targets[0], dy, x, beta, alpha)
        if len(targets) == 2:
            _blend(targets[1], self._total(dy, targets[1].shape[0]), beta, alpha)

    def _accumulate_basis(
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor
    ) -> None:
        """Do what `accumulate` does, from what `_square_norms_in_basis` made."""
        dy, q = self.basis
        weight_AN11 = weight_AB[:, :: weight_AB.shape[1] // dy.shape[1]].double()[..., None, None]
        total = torch.bmm((dy * weight_AN11).flatten(1, 2).mT, q.flatten(1, 2))
        inputs = self.x.shape[-1]
        _blend(targets[0], total[..., :inputs].reshape(targets[0].shape), beta, alpha)
        if len(targets) == 2:
            _blend(targets[1], total[..., inputs], beta, alpha)

    def _add_product(
        self, target: Tensor, dy: Tensor, x: Tensor, beta: float, alpha: float
    ) -> None:
        """Blend the sum of dy_s x_s^T over a client's slots into the target [A, O, I]."""
        if target.is_contiguous():
            target.baddbmm_(dy.mT, x, beta=beta, alpha=alpha)
        else:  # a piece of rows [A, P]: batched products straight into one are slow
            _blend(
                target,
                torch.bmm(dy.mT, x, out=self.buffers.take("dw", target.shape, dy.dtype)),
                beta,
                alpha,
            )

    def _product(self, dy: Tensor, x: Tensor, groups: int) -> Tensor:
        """Return sums of dy_s x_s^T over each of `groups` equal runs of slots, [groups, O, I]."""
        return torch.bmm(
            dy.reshape(groups, -1, dy.shape[-1]).mT, x.reshape(groups, -1, x.shape[-1])
        )

    def _total(self, dy: Tensor, groups: int) -> Tensor:
        """Return the sums of dy over each of `groups` equal runs of slots, [groups, O]."""
        total = self.buffers.take("db", (groups, dy.shape[-1]), dy.dtype)
        return torch.sum(
            dy if groups == dy.shape[0] else dy.reshape(groups, -1, dy.shape[-1]), 1, out=total
        )


class ConvRule(LinearRule):
    """Conv1d and Conv2d:
    a Linear on patches of C channels and Q places of the kernel, at S positions.

    Patches lie as [A * B, C * Q, S], along the signal: made, multiplied and folded back without a
    transposition. `x` and `dy` are remembered as [A * B, S, .], views of what lies the other way
    round.
    """

    layer: nn.Conv1d | nn.Conv2d

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.slots = x.shape[:2]
        self.shape = x.shape
        padding: Any = self.layer.padding  # numbers: see `_is_plain`
        flat = x.reshape(-1, *x.shape[2:]).contiguous()
        if any(padding):
            flat = nn.functional.pad(flat, [cells for cells in reversed(padding) for _ in range(2)])
        patches = self._patches(flat)
        sizes = patches.shape[2 + len(padding) :]
        self.padded = flat.shape
        kept = self.buffers.take("x", patches.shape, x.dtype).copy_(patches)
        self.x, weight = kept.view(len(flat), -1, prod(sizes)).mT, self._weight(params[0])
        y = self.buffers.take("y", (len(flat), weight.shape[1], self.x.shape[1]), x.dtype)
        if len(params) == 2:
            bias = params[1][:, None, :, None].expand(*self.slots, -1, 1).reshape(len(flat), -1, 1)
            torch.baddbmm(bias, weight, self.x.mT, out=y)
        else:
            torch.bmm(weight, self.x.mT, out=y)
        return y.view(*self.slots, -1, *sizes)

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = dy.reshape(prod(self.slots), dy.shape[2], -1).mT
        self.gradients = ()
        self.basis = ()
        self.mass_AN = None
        if first:
            return dy
        flat = self.buffers.take("dpatches", self.x.mT.shape, dy.dtype)
        torch.bmm(self._weight(params[0]).mT, self.dy.mT, out=flat)
        dx = self.buffers.take("dx", self.padded, dy.dtype).zero_()
        reads = self._patches(dx)
        places: Any = product(*map(range, self.layer.kernel_size))
        for place in places:  # one after another: patches overlap
            reads[:, :, *place].add_(flat.view(reads.shape)[:, :, *place])
        margins = [
            (outer - inner) // 2
            for outer, inner in zip(self.padded[2:], self.shape[3:], strict=True)
        ]
        inside = [slice(m, m + size) for m, size in zip(margins, self.shape[3:], strict=True)]

        return dx[:, :, *inside].reshape(self.shape)

    def _patches(self, x: Tensor) -> Tensor:
        """Return the view [A * B, C, *kernel, *sizes] of padded x:
        what each place of the kernel reads.
        """
        kernel = self.layer.kernel_size
        stride = self.layer.stride
        dilation = self.layer.dilation
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
        steps = x.stride()
        places = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
        moves = [step * s for step, s in zip(steps[2:], stride, strict=True)]
        return x.as_strided((*x.shape[:2], *kernel, *sizes), (*steps[:2], *places, *moves))

    def _weight(self, weight: Tensor) -> Tensor:
        """Return the kernel [A * B, O, C * Q] of each slot's client;
        a view where there is one client.
        """
        flat = weight.flatten(2)
        return flat[:, None].expand(*self.slots, -1, -1).reshape(-1, *flat.shape[1:])

    def _add_product(
        self, target: Tensor, dy: Tensor, x: Tensor, beta: float, alpha: float
    ) -> None:
        _blend(target, self._product(dy, x, len(target)).view(target.shape), beta, alpha)

    def _weigh(self, dy: Tensor, weight_AB: Tensor) -> Tensor:
        return super()._weigh(dy, weight_AB.view(-1, 1))

    def _product(self, dy: Tensor, x: Tensor, groups: int) -> Tensor:
        each = self.buffers.take("dw", (len(dy), dy.shape[-1], x.shape[-1]), dy.dtype)
        return _sum_runs(torch.bmm(dy.mT, x, out=each), groups)

    def _total(self, dy: Tensor, groups: int) -> Tensor:
        return _sum_runs(dy.sum(1), groups)


class EmbeddingRule(LayerRule):
    """Rows of a table by index. A patient's gradient sums the slots and positions that read the
    same row first.
    """

    remembered = ("dy",)

    def __init__(self, layer: Embedding) -> None:
        super().__init__(layer)
        self.names = ("weight",)

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        table = params[0]  # [A, rows, width]
        self.shape = x.shape
        self.rows = table.shape[1]
        width = table.shape[2]
        self.index = x.reshape(len(x), -1).long()
        y = table.gather(1, self.index[..., None].expand(-1, -1, width))
        return y.view(*x.shape, width)

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = dy.reshape(*self.index.shape, -1)
        self.mass_AN = None
        return dy if first else dy.new_zeros(self.shape)

    def square_norms(self, records: int) -> Tensor:
        """Sum in float64 what a patient's slots and positions add to each row; keep those sums."""
        A = self.shape[0]
        N = self.shape[1] // records
        self.records = records
        patient = torch.arange(A * N)[:, None]
        own = (patient * self.rows + self.index.reshape(A * N, -1)).view(-1)
        self.place, group = torch.unique(own, return_inverse=True)
        width = self.dy.shape[-1]
        each = self.dy.reshape(-1, width).double()
        self.summed = torch.zeros(len(self.place), width, dtype=torch.float64).index_add_(
            0, group, each
        )
        owner = self.place // self.rows

        if records > 1:
            mass = torch.zeros(len(self.place), dtype=torch.float64).index_add_(
                0, group, _square(each).sqrt_()
            )
            self.mass_AN = (
                torch.zeros(A * N, dtype=torch.float64).index_add_(0, owner, mass).view(A, N)
            )

        square = torch.zeros(A * N, dtype=torch.float64)
        return square.index_add_(0, owner, self.summed.square().sum(1)).view(A, N)

    def forget(self, patient_AN: Tensor) -> None:
        super().forget(patient_AN)
        self.summed = torch.where(
            patient_AN.reshape(-1)[self.place // self.rows, None], 0, self.summed
        )

    def accumulate(
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor | None = None
    ) -> None:
        A = self.shape[0]
        if weight_AB is None:
            each = self.dy.reshape(-1, self.dy.shape[-1])
            row = (self.index + self.rows * torch.arange(A)[:, None]).view(-1)
        else:
            owner = self.place // self.rows
            N = weight_AB.shape[1] // self.records
            each = self.summed * weight_AB[:, :: self.records].reshape(-1)[owner, None].double()
            row = owner // N * self.rows + self.place % self.rows
        total = each.new_zeros(A * self.rows, each.shape[-1]).index_add_(0, row, each)
        _blend(targets[0], total.view(targets[0].shape), beta, alpha)


class NormRule(LayerRule):
    """y = (x - mean) / sd * g + b, with mean and sd of one patient's units: what LayerNorm and
    GroupNorm share.
    """

    remembered = ("n", "dy")

    def __init__(self, layer: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__(layer)
        self.names = ()
        if layer.weight is not None:
            self.names = ("weight", "bias") if layer.bias is not None else ("weight",)

    @abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """Return x normalised, remembering mean and 1/sd."""

    @abstractmethod
    def denormalise(self, dn: Tensor) -> Tensor:
        """Return dL/dx for dL/d(normalised x)."""

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.x = x
        self.n = self.normalise(x)
        if not params:
            return self.n
        y = self.buffers.take("y", x.shape, x.dtype)
        torch.mul(self.n, self._spread(params[0], x), out=y)
        return y.add_(self._spread(params[1], x)) if len(params) == 2 else y

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = dy
        self.gradients = ()
        self.mass_AN = None
        if first:
            return dy
        if not params:
            return self.denormalise(dy)
        dn = self.buffers.take("dn", dy.shape, dy.dtype)
        return self.denormalise(torch.mul(dy, self._spread(params[0], dy), out=dn))

    def square_norms(self, records: int) -> Tensor | None:
        if not self.names:
            return None
        A, B = self.dy.shape[:2]
        gathered = [self._gather(part.reshape(A * B, 1, *part.shape[2:])) for part in self._parts()]
        return self._remember_gradients([g.view(A, B, *g.shape[1:]) for g in gathered], records)

    def accumulate(
        self, targets: Sequence[Tensor], beta: float, alpha: float, weight_AB: Tensor | None = None
    ) -> None:
        if weight_AB is not None:
            return self._accumulate_gradients(targets, beta, alpha, weight_AB)
        for target, part in zip(targets, self._parts(), strict=True):
            _blend(target, self._gather(part), beta, alpha)

    def _parts(self) -> list[Tensor]:
        """Return what each parameter's gradient is the sum of, [A, B, *]."""
        if not self.names:
            return []
        scaled = torch.mul(
            self.dy, self.n, out=self.buffers.take("product", self.dy.shape, self.dy.dtype)
        )
        return [scaled, self.dy][: len(self.names)]

    @abstractmethod
    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        """Shape a parameter [A, *units] so that it multiplies x [A, B, *]."""

    @abstractmethod
    def _gather(self, dy: Tensor) -> Tensor:
        """Sum dy [A, B, *] over the axes along which `_spread` repeats a parameter: [A, *units]."""


class LayerNormRule(NormRule):
    """LayerNorm over the last axes."""

    layer: nn.LayerNorm

    def normalise(self, x: Tensor) -> Tensor:
        n, self.mean, self.rstd = torch.native_layer_norm(
            x, self.layer.normalized_shape, None, None, self.layer.eps
        )
        return n

    def denormalise(self, dn: Tensor) -> Tensor:
        shape = self.layer.normalized_shape
        dx, _, _ = _aten.native_layer_norm_backward(
            dn, self.x, shape, self.mean, self.rstd, None, None, [True, False, False]
        )
        return dx  # type: ignore[no-any-return]

    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        return param.reshape(
            len(param), *(1 for _ in range(x.dim() - param.dim())), *param.shape[1:]
        )

    def _gather(self, dy: Tensor) -> Tensor:
        return _sum_slots(dy.reshape(len(dy), -1, *self.layer.normalized_shape))


class GroupNormRule(NormRule):
    """GroupNorm over groups of channels, channels on axis 1 of a sample [B, C, ...]."""

    layer: nn.GroupNorm

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0] * x.shape[1], x.shape[2], prod(x.shape[3:]), self.layer.num_groups

    def normalise(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1, *x.shape[2:])
        n, self.mean, self.rstd = torch.native_group_norm(
            flat, None, None, *self._sizes(x), self.layer.eps
        )
        return n.view(x.shape)

    def denormalise(self, dn: Tensor) -> Tensor:
        flat = self.x.contiguous().view(-1, *self.x.shape[2:])
        dx, _, _ = _aten.native_group_norm_backward(
            dn.contiguous().view(flat.shape),
            flat,
            self.mean,
            self.rstd,
            None,
            *self._sizes(dn),
            [True, False, False],
        )
        return dx.view(dn.shape)  # type: ignore[no-any-return]

    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        return param.reshape(len(param), 1, -1, *(1 for _ in range(x.dim() - 3)))

    def _gather(self, dy: Tensor) -> Tensor:
        return _sum_slots(dy.flatten(3).sum(3) if dy.dim() > 3 else dy)


class DropoutRule(LayerRule):
    """The keyed dropout of `medfed.learn.zoo`:
    each client's mask, or each slot's, comes from its own stream.
    """

    layer: Dropout

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        units = prod(x.shape[key_K.dim() :])
        draw = streams.uniform(streams.subkey(key_K, self.layer.salt), units).view(x.shape)
        self.scale = (draw >= self.layer.p).to(x.dtype).div_(1 - self.layer.p)
        return torch.mul(x, self.scale, out=self.buffers.take("y", x.shape, x.dtype))

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        return dy.mul_(self.scale)


class ShapeRule(LayerRule):
    """Flatten from a sample's first axis on,
    cut a sample into series or pictures, or do nothing (Identity).
    """

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.shape = x.shape
        if isinstance(self.layer, Series):
            return x.view(*x.shape[:2], self.layer.channels, -1)
        if isinstance(self.layer, nn.Unflatten):
            return x.reshape(*x.shape[:2], *self.layer.unflattened_size, *x.shape[3:])
        return x.flatten(2) if isinstance(self.layer, nn.Flatten) else x

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        return dy.reshape(self.shape)


class PoolRule(LayerRule):
    """Pooling: no parameters, sample by sample, so autograd may do this one layer for all samples
    of all clients.
    """

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.slots = x.shape[:2]
        self.x = x.detach().flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            self.y: Tensor = self.layer(self.x)
        y: Tensor = self.y.detach()
        return y.view(*self.slots, *y.shape[1:])

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        (dx,) = torch.autograd.grad(self.y, self.x, dy.reshape(self.y.shape))
        return dx.contiguous().view(*self.slots, *self.x.shape[1:])


class MeanRule(LayerRule):
    """The mean of each channel."""

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.shape = x.shape
        y: Tensor = x.flatten(3).mean(3)
        return y.view(*x.shape[:3], *(1 for _ in x.shape[3:]))

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        dx = self.buffers.take("dx", self.shape, dy.dtype)
        return torch.div(dy.expand(self.shape), prod(self.shape[3:]), out=dx)


class ActivationRule(LayerRule):
    """An elementwise function, by torch's own forward and backward kernels."""

    # layer type -> (forward of (layer, x), backward of (layer, dy, x, y))
    KERNELS: ClassVar[
        dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]]
    ] = {
        nn.ReLU: (
            lambda _, x: torch.relu_(x),
            lambda _, dy, x, y: _aten.threshold_backward(dy, y, 0),
        ),
        nn.Tanh: (lambda _, x: torch.tanh(x), lambda _, dy, x, y: _aten.tanh_backward(dy, y)),
        nn.Sigmoid: (
            lambda _, x: torch.sigmoid(x),
            lambda _, dy, x, y: _aten.sigmoid_backward(dy, y),
        ),
        nn.SiLU: (
            lambda _, x: nn.functional.silu(x),
            lambda _, dy, x, y: _aten.silu_backward(dy, x),
        ),
        nn.GELU: (
            lambda m, x: nn.functional.gelu(x, approximate=m.approximate),
            lambda m, dy, x, y: _aten.gelu_backward(dy, x, approximate=m.approximate),
        ),
        nn.LeakyReLU: (
            lambda m, x: nn.functional.leaky_relu(x, m.negative_slope),
            lambda m, dy, x, y: _aten.leaky_relu_backward(dy, x, m.negative_slope, False),
        ),
        nn.ELU: (
            lambda m, x: nn.functional.elu(x, m.alpha),
            lambda m, dy, x, y: _aten.elu_backward(dy, m.alpha, 1, 1, False, x),
        ),
    }

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.x, self.y = x, self.KERNELS[type(self.layer)][0](self.layer, x)
        return self.y

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        if isinstance(self.layer, nn.ReLU):  # the hot one: in place
            return _aten.threshold_backward.grad_input(dy, self.y, 0, grad_input=dy)  # type: ignore[no-any-return]
        return self.KERNELS[type(self.layer)][1](self.layer, dy, self.x, self.y)


RULES: dict[type[nn.Module], type[LayerRule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.GroupNorm: GroupNormRule,
    Dropout: DropoutRule,
    nn.Flatten: ShapeRule,
    nn.Unflatten: ShapeRule,
    nn.Identity: ShapeRule,
    Series: ShapeRule,
    nn.AvgPool1d: PoolRule,
    nn.AvgPool2d: PoolRule,
    nn.MaxPool1d: PoolRule,
    nn.MaxPool2d: PoolRule,
    nn.AdaptiveAvgPool1d: MeanRule,
    nn.AdaptiveAvgPool2d: MeanRule,
    **dict.fromkeys(ActivationRule.KERNELS, ActivationRule),
}
"""Which rule serves which layer;
a layer type not listed here sends its model to the torch.func fallback.
"""


class RuledModel:
    """A Sequential of known layers as a list of rules, its parameters in the module's order."""

    def __init__(self, module: nn.Module) -> None:
        self.rules = [RULES[type(layer)](layer) for layer in _leaves(module)]
        self.random = any(isinstance(rule, DropoutRule) for rule in self.rules)
        self.one_slot = not any(
            isinstance(rule.layer, nn.Conv1d | nn.Conv2d | Embedding | Series | nn.Unflatten)
            for rule in self.rules
        )
        ends = [0]
        for rule in self.rules:
            ends.append(ends[-1] + len(rule.names))
        self.spans = [slice(a, b) for a, b in pairwise(ends)]
        self.first = next((i for i, rule in enumerate(self.rules) if rule.names), len(self.rules))

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        """Return outputs [A, B, C] for x [A, B, ...]; `params` are [A, *shape] in
        `named_parameters()` order.

        `key_K` are the streams that drop units: a client's [A], or a slot's [A, B].
        """
        for rule, span in zip(self.rules, self.spans, strict=True):
            x = rule.forward(x, params[span], key_K)
        return x

    def backward(
        self,
        dz: Tensor,
        params: Sequence[Tensor],
        targets: Sequence[Tensor],
        beta: float,
        alpha: float,
    ) -> None:
        """Go back from dL/dz [A, B, C]; blend every gradient into its target (which may be the
        parameter itself).
        """
        for index in range(len(self.rules) - 1, self.first - 1, -1):
            rule = self.rules[index]
            span = self.spans[index]
            dz = rule.backward(dz, params[span], first=index == self.first)
            rule.accumulate(targets[span], beta, alpha)

    def clipped_backward(
        self,
        dz: Tensor,
        params: Sequence[Tensor],
        targets: Sequence[Tensor],
        records: int,
        factor: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Set each target [A, *shape] to the sum over patients of factor(norm) * gradient; return
        the norms [A, N].

        Args:
            dz: dL/dz [A, B, C] of every slot; zero where a slot is not filled.
            params: [A, *shape] in `named_parameters()` order, those of `forward`.
            targets: where the sums go; with several records in float64.
            records: slots of a patient.
            factor: maps norms to weights, float64 [A, N].

        Patient n of a client owns slots n * records .. (n + 1) * records - 1 of dz [A, B, C] and of
        `forward`'s x; its gradient is the sum over them. `factor` maps norms to weights, float64
        [A, N]. A patient whose norm is above LARGEST, or not a number, adds nothing and is told as
        infinite. A norm is at least CANCELLATION of the sum of the patient's records' norms. Norms
        are float64; sums are taken in the targets' type: in float64 one patient moves them by at
        most weight * norm, up to 1e-12; in float32 the rounding of n terms may add 1e-7 n of the
        sum of norms. With several records targets are float64.
        """
        for index in range(len(self.rules) - 1, self.first - 1, -1):
            dz = self.rules[index].backward(
                dz, params[self.spans[index]], first=index == self.first
            )

        squares = [
            square for rule in self.rules if (square := rule.square_norms(records)) is not None
        ]
        norm_AN = _sum(squares).sqrt_()
        if records > 1:
            masses = [rule.mass_AN for rule in self.rules if rule.mass_AN is not None]
            norm_AN = torch.maximum(norm_AN, CANCELLATION * _sum(masses))

        weight_AN = factor(norm_AN)
        if not float(norm_AN.amax()) <= LARGEST:
            gone_AN = ~(norm_AN <= LARGEST)
            norm_AN = torch.where(gone_AN, torch.inf, norm_AN)
            weight_AN = torch.where(gone_AN, 0, weight_AN)
            for rule in self.rules:
                rule.forget(gone_AN)

        weight_AB = (weight_AN if records == 1 else weight_AN.repeat_interleave(records, 1)).to(
            targets[0].dtype
        )
        for rule, span in zip(self.rules, self.spans, strict=True):
            rule.accumulate(targets[span], 0, 1, weight_AB)
        return norm_AN


def has_rules(module: nn.Module) -> bool:
    """Say whether every layer of the module has a rule, so that no autograd is needed."""
    return not without_rule(module)


def without_rule(module: nn.Module) -> str:
    """Return the kind and name of the first part that has no rule; empty where all have one.

    The rules' parameters must be the module's, each of them once and trained: none shared,
    reparametrised or frozen. Nothing may be hooked in, as rules do not call the layers.
    """
    names = {id(part): name for name, part in module.named_modules()}

    def describe(part: nn.Module) -> str:
        if names[id(part)]:
            return f"{type(part).__name__} {names[id(part)]!r}"
        return type(part).__name__

    if hooked := [part for part in module.modules() if _is_hooked(part)]:
        return f"the hooks of {describe(hooked[0])}"
    try:
        layers = _leaves(module)
    except _NoSequenceError as error:
        return describe(error.args[0])
    for layer in layers:
        if type(layer) not in RULES or not _is_plain(layer):
            return describe(layer)
    ruled = [getattr(layer, name) for layer in layers for name in RULES[type(layer)](layer).names]
    if not all(p.requires_grad for p in ruled):
        return "frozen parameters"
    if [*map(id, ruled)] != [*map(id, module.parameters())]:
        return "parameters that are shared or computed from others"
    return ""


class _NoSequenceError(TypeError):
    """A container that is no Sequential; it is the first argument."""


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Return the layers of nested Sequentials in order; _NoSequenceError for other containers."""
    if type(module) is nn.Sequential:
        return [leaf for child in module for leaf in _leaves(child)]
    if any(True for _ in module.children()):
        raise _NoSequenceError(module)
    return [module]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_hooked(module: nn.Module) -> bool:
    """Say whether calling the module does more, or something else, than its class says."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    on_parameters = any(
        p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in own
    )
    return (
        on_parameters or "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)
    )


def _is_plain(layer: nn.Module) -> bool:
    """Say whether the layer is set up as its rule assumes."""
    match layer:
        case nn.Flatten():
            return (layer.start_dim, layer.end_dim) == (1, -1)
        case nn.Unflatten():
            return layer.dim == 1 and all(isinstance(size, int) for size in layer.unflattened_size)
        case nn.Conv1d() | nn.Conv2d():
            return (
                layer.groups == 1
                and layer.padding_mode == "zeros"
                and not isinstance(layer.padding, str)
            )
        case Embedding():
            unusual = (
                (layer.padding_idx, layer.max_norm) != (None, None)
                or layer.scale_grad_by_freq
                or layer.sparse
            )
            return not unusual
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d():
            return layer.output_size in (1, (1,), (1, 1))
        case nn.MaxPool1d() | nn.MaxPool2d():
            return not layer.return_indices

    return True


def _rows(x: Tensor) -> Tensor:
    """Return x [A, B, ..., I] as [A, B * positions, I]."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def _square(x: Tensor) -> Tensor:
    """Return |x|^2 over the last axis, in float64."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norm.square_()


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum, taken in the first of the terms."""
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total


def _sum_slots(x: Tensor) -> Tensor:
    """Sum over axis 1."""
    return x[:, 0] if x.shape[1] == 1 else x.sum(1)


def _sum_runs(x: Tensor, groups: int) -> Tensor:
    """Sum x [slots, ...] over each of `groups` equal runs of slots."""
    return _sum_slots(x.view(groups, -1, *x.shape[1:]))


def _blend(target: Tensor, value: Tensor, beta: float, alpha: float) -> None:
    """target <- beta * target + alpha * value; beta = 0 overwrites even what is not finite."""
    if beta == 0:
        target.copy_(value)
        if alpha != 1:
            target.mul_(alpha)
    elif beta == 1:
        target.add_(value, alpha=alpha)
    else:
        target.mul_(beta).add_(value, alpha=alpha)
