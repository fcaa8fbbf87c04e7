"""A look at a module before any record is:
on made-up rows, which path trains it rightly, or why none does.

No list of good or bad layers: the module is run. It must compute each row by itself, keep nothing
from one call to the next, and draw at random in training only, from torch's generator. Then the
fastest path whose gradients are those of autograd, one record at a time, is taken: layer rules,
torch.func, else that loop itself. Whatever cannot be right is refused by the name of the part that
does it.

B made-up rows, F inputs, C outputs, P parameters.
"""

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from medfed.core.checks import PlanError
from medfed.core.flat import select_trained, select_untrained, vector
from medfed.core.types import Task
from medfed.data.federated import Patients, Rows, Stack
from medfed.learn import dpsgd, local
from medfed.learn.layers import without_rule
from medfed.learn.local import LocalPlan, Path, drawing
from medfed.learn.watching import ModuleWatch, find_failing_part
from medfed.learn.zoo import Dropout, seeded

PATHS: tuple[Path, ...] = ("rules", "func", "loop")
"""Fastest first."""

ROWS = 6
"""Made-up rows that a probe needs."""

_GRADIENT = 1e-3  # how far gradients of two paths may differ, as a share of their norm
_ROW = 1e-4  # how far a row's outputs may differ among others and alone, as a share of all outputs
_BITS = 1e-12  # how far a patient's norm may hang on who else is there: float64's rounding of a sum


@dataclass(frozen=True)
class Probed:
    """The path that trains a module, and for each faster one why it does not."""

    path: Path
    reasons: tuple[str, ...] = ()


def probe(
    model: nn.Module,
    where: str,
    x_BF: Tensor,
    task: Task,
    outputs: int,
    private: bool,
    asked: Path = "auto",
) -> Probed:
    """Return how a module is trained; raise PlanError for what cannot be trained or tested rightly.

    The error begins with `where` and names the part. The module is left as it was.

    Args:
        model: the module.
        where: what an error begins with.
        x_BF: ROWS made-up rows, all different.
        task: what the outputs are.
        outputs: how many a row has, C.
        private: the gradient of each patient is asked for, else that of each client.
        asked: the path that a study names.
    """
    _check_parameters(model, where)
    case = _Case(model, where, x_BF, task, outputs, private, vector(model), _attributes(model))
    with _restore_after(model):
        case = case.with_rows_it_takes()
        case = case.with_draws()
        case.check_memory()
        case.check_rows()
        case.check_single_rows()
        return _find_fastest(case, PATHS if asked == "auto" else (asked,))


def _check_parameters(model: nn.Module, where: str) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise PlanError(
                f"{where}: parameter {name!r} has no size yet. Give its layer the number of inputs."
            )
        if not parameter.is_floating_point() and parameter.requires_grad:
            raise PlanError(
                f"{where}: parameter {name!r} is of {parameter.dtype}. Train real numbers."
            )


@contextmanager
def _restore_after(model: nn.Module) -> Iterator[None]:
    """Put everybody's generators, and the module's numbers and mode, back afterwards."""
    before = _numbers(model)
    mode = model.training
    try:
        with seeded(0):
            yield
    finally:
        model.train(mode)
        with torch.no_grad():
            for name, value in _parts(model).items():
                value.grad = None
                if name in before and value.shape == before[name].shape:
                    value.copy_(before[name])


def _parts(model: nn.Module) -> dict[str, Tensor]:
    return {**select_trained(model), **select_untrained(model)}


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _parts(model).items()}


def _attributes(model: nn.Module) -> dict[str, object]:
    """Return a fingerprint of all parts' attributes that are no parameter, buffer, part or hook."""
    found: dict[str, object] = {}
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            if attribute not in _REGISTRIES and not (
                isinstance(part, Dropout) and attribute == "key"
            ):
                found[f"{name}.{attribute}"] = _print_of(value)
    return found


_REGISTRIES = {
    "training",
    "_is_full_backward_hook",
    "_flat_weights",
    "_flat_weight_refs",
    *vars(nn.Module()),
}
"""What torch keeps itself: of every module, and of recurrent ones,
which look at their weights anew in each call.
"""


def _print_of(value: object) -> object:
    """Return what tells two states of a value apart:
    its bytes where it can be written down, else only its kind.
    """
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    try:
        return hashlib.sha256(pickle.dumps(value)).digest()
    except Exception:  # a function, a weak reference, a file
        return type(value)


@dataclass(frozen=True)
class _Case:
    """A module, made-up rows for it, and what a refusal begins with."""

    model: nn.Module
    where: str
    x_BF: Tensor
    task: Task
    outputs: int
    private: bool
    w_P: Tensor  # the module's first weights
    attributes: Mapping[str, object]  # what else its parts hold, before any call
    draws: str = ""  # the part that draws from torch's generator in training

    @property
    def y_B(self) -> Tensor:
        """Made-up targets."""
        number_B = torch.arange(len(self.x_BF))
        match self.task:
            case "binary":
                return (number_B % 2).to(self.x_BF.dtype)
            case "multiclass":
                return number_B % self.outputs
            case "regression":
                return number_B.to(self.x_BF.dtype) / 4 - 0.7

    def refusal(self, what: str, action: str) -> PlanError:
        return PlanError(f"{self.where}: {what}. {action}")

    def run(
        self, training: bool, x_BF: Tensor | None = None, watch: ModuleWatch | None = None
    ) -> Tensor:
        """Return the module's outputs, all draws from one seed; raise PlanError where it fails,
        naming the part.
        """
        x_BF = self.x_BF if x_BF is None else x_BF
        watch = watch or ModuleWatch(self.model)
        self.model.train(training)
        try:
            with watch.watch(), seeded(1), drawing(self.model, torch.tensor(1)):
                z_BC = self.model(x_BF.clone())
        except Exception as error:  # rows are made up: its words quote no patient
            rows = _rows(x_BF)
            mode = "training" if training else "evaluation"
            raise self.refusal(
                f"{watch.innermost} fails on {rows} in {mode}: {_words(error)}",
                "Correct the module, or what the study says of its inputs.",
            ) from error

        shape = (len(x_BF), self.outputs)
        if not isinstance(z_BC, Tensor) or z_BC.shape != shape or not z_BC.is_floating_point():
            if isinstance(z_BC, Tensor):
                told = f"outputs {tuple(z_BC.shape)}"
            else:
                told = f"a {type(z_BC).__name__}"
            raise self.refusal(
                f"it gives {told} for {_rows(x_BF)}; expected real numbers of shape {shape}",
                "Return one row of outputs for each row of features.",
            )
        if x_BF.isfinite().all() and not z_BC.isfinite().all():
            raise self.refusal(
                f"its outputs for {_rows(x_BF)} are not finite", "Scale its first weights."
            )
        return z_BC.detach()

    def with_rows_it_takes(self) -> "_Case":
        """Return the case with rows that the module takes: as made up, small indices, or blank."""
        tries = [self.x_BF, self.x_BF.abs().round().clamp(max=1), torch.zeros_like(self.x_BF)]
        failures: list[PlanError] = []
        for x_BF in tries:
            case = replace(self, x_BF=x_BF)
            try:
                case.run(False)
                return case
            except PlanError as failure:
                failures.append(failure)
        raise failures[0]

    def with_draws(self) -> "_Case":
        """Return the case with what draws in training;
        refuse draws that no prediction, or no seed, would repeat.
        """
        for training in (False, True):
            watch = ModuleWatch(self.model)
            self.run(training, watch=watch)
            if watch.drew and not training:
                raise self.refusal(
                    f"{watch.drew} draws at random in evaluation, so that no prediction would "
                    "repeat",
                    "Draw only where self.training is set (F.dropout takes "
                    "training=self.training).",
                )

        if watch.drew and not watch.drew_of_torch:
            raise self.refusal(
                f"{watch.drew} draws from the generator of numpy or of Python, which no stream "
                "of a client reaches",
                "Draw from torch's (torch.rand, nn.Dropout).",
            )

        for name, part in self.model.named_modules():
            if isinstance(part, Dropout) and watch.calls[name] > 1:
                raise self.refusal(
                    f"Dropout {name!r} is used {watch.calls[name]} times in one pass and would "
                    "drop the same units",
                    "Give each use an nn.Dropout of its own.",
                )
        return replace(self, draws=watch.drew)

    def check_memory(self) -> None:
        """Refuse what a call leaves behind:
        it would be neither averaged nor saved, and may tell of patients.
        """
        # parameters and buffers
        before = _numbers(self.model)
        first = [self.run(training) for training in (True, False)]
        after = _numbers(self.model)
        for name in sorted(before.keys() | after.keys()):
            if name not in after or name not in before or not _same(before[name], after[name]):
                kind = "parameter" if name in dict(self.model.named_parameters()) else "buffer"
                owner = self.model.get_submodule(name.rpartition(".")[0])
                part = ModuleWatch(self.model).name_of(owner)
                raise self.refusal(
                    f"{part} changes its {kind} {name!r} when it is "
                    "called: that is neither averaged nor under the clip",
                    "Take a layer that keeps nothing: nn.LayerNorm or nn.GroupNorm for a norm "
                    "over the batch, weight_norm for spectral_norm.",
                )

        # what else its parts hold
        for name, value in _attributes(self.model).items():
            if self.attributes.get(name) != value:
                part, _, attribute = name.rpartition(".")
                told = ModuleWatch(self.model).name_of(self.model.get_submodule(part))
                raise self.refusal(
                    f"{told} changes its attribute {attribute!r} when it is called: that "
                    "is not saved, and may hand on what it has seen of a patient",
                    "Keep nothing between calls; make what does not change in __init__, as a "
                    "buffer.",
                )

        # what no look at it shows: another answer
        watches = [ModuleWatch(self.model) for _ in range(2)]
        second = [
            self.run(training, watch=w) for training, w in zip((True, False), watches, strict=True)
        ]
        if not all(_same(a, b) for a, b in zip(first, second, strict=True)):
            raise self.refusal(
                "a second call with the same rows and the same draws gives other outputs: the "
                "module keeps something",
                "Keep nothing between calls, and no generator of its own.",
            )

    def check_rows(self) -> None:
        """Refuse a row whose outputs follow from the other rows, in training or in evaluation."""
        for training in (False, True):
            watch = ModuleWatch(self.model)
            z_BC = self.run(training, watch=watch)
            for other_BF in self._others():
                changed = ModuleWatch(self.model)
                try:
                    z2_BC = self.run(training, other_BF, changed)
                except PlanError:
                    continue  # a value that the module does not take
                if not _near(z_BC[:-1], z2_BC[:-1]):
                    raise self._mixing(_find_mixer(watch, changed, self.model))

    def check_single_rows(self) -> None:
        """Refuse what a row alone is given otherwise than among others;
        draws apart, which are then others.
        """
        random_masks = any(isinstance(part, Dropout) and part.p for part in self.model.modules())
        for training in (False, True):
            z_BC = self.run(training)
            for n in (0, len(z_BC) - 1):
                alone_1C = self.run(training, self.x_BF[n : n + 1])
                if not _near(z_BC[n], alone_1C[0]) and not (
                    training and (self.draws or random_masks)
                ):
                    raise self._mixing(ModuleWatch(self.model).name_of(self.model))

    def _others(self) -> Iterator[Tensor]:
        """Yield the rows with the last one changed:
        into another's, into a large one, into one that is not finite.
        """
        for last_F in (
            self.x_BF[0],
            self.x_BF[-1] * 50 + 10,
            torch.full_like(self.x_BF[0], torch.nan),
        ):
            yield torch.cat([self.x_BF[:-1], last_F[None]])

    def _mixing(self, part: str) -> PlanError:
        return self.refusal(
            f"{part} mixes the rows of a batch: what it gives for one patient follows from the "
            "others",
            "Compute each row by itself (over axis 1, not over axis 0).",
        )


def _find_mixer(one: ModuleWatch, other: ModuleWatch, model: nn.Module) -> str:
    """Return the part in which rows that went in alike came out different."""
    for (told, before, y), (_, before2, y2) in zip(one.seen, other.seen, strict=False):
        rows = len(y) - 1 if y.dim() else 0
        if y.shape != y2.shape or _near(y[:rows], y2[:rows]):
            continue
        if (
            before is None
            or before2 is None
            or len(before) != len(y)
            or _near(before[:rows], before2[:rows])
        ):
            return told
    return one.name_of(model)


def _near(a: Tensor, b: Tensor) -> bool:
    if a.dtype in (torch.bfloat16, torch.float16):
        a = a.float()
        b = b.float()
    if not a.is_floating_point():
        return bool((a == b).all())
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= _ROW * (scale + 1e-6)).all())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _rows(x_BF: Tensor) -> str:
    return f"{len(x_BF)} made-up row{'s' if len(x_BF) > 1 else ''}"


def _words(error: Exception) -> str:
    """Return an error's kind and the first line of its text."""
    text = str(error).strip().splitlines()
    if text:
        return f"{type(error).__name__}: {text[0][:120]}"
    return type(error).__name__


# Which path is right ------------------------------------------------------------------------------


def _find_fastest(case: _Case, paths: tuple[Path, ...]) -> Probed:
    """Return the first path that does what autograd does, one record at a time."""
    reasons: list[str] = []
    try:
        wanted = _gradients(case, "loop")
    except Exception as error:
        part = find_failing_part(case.model, case.x_BF) or ModuleWatch(case.model).name_of(
            case.model
        )
        told = f"the gradient of {part} cannot be taken: {_words(error)}"
        raise case.refusal(told, "Correct its backward pass.") from error
    if not wanted.isfinite().all():
        raise case.refusal("its gradient on made-up rows is not finite", "Scale its first weights.")
    for path in paths:
        if why := _say_why_unfit(case, path, wanted):
            reasons.append(why)
        else:
            return Probed(path, tuple(reasons))
    raise case.refusal(
        f"training.path={paths[0]!r} does not serve it: {reasons[0]}", "Set training.path='auto'."
    )


def _say_why_unfit(case: _Case, path: Path, wanted: Tensor) -> str:
    """Return why a path does not train the module as it is; empty where it does."""
    if path == "rules" and (part := without_rule(case.model)):
        return f"no layer rule for {part}"
    if path != "loop" and case.draws:
        return f"{case.draws} draws from torch's generator"
    if path == "func" and (part := _find_registered_twice(case.model)):
        return f"torch.func cannot take {part}, which the module has under two names"
    try:
        with warnings.catch_warnings():
            # it would be slower than the loop
            warnings.filterwarnings("error", message=".*batching rule.*")
            found = _gradients(case, path)
            moves = case.private and path != "loop" and _moves_with_company(case, path)
    except Exception as error:
        return _say_why(path, error)
    difference = float((found - wanted).norm())
    size = float(wanted.norm())
    if not difference <= _GRADIENT * size + 1e-9:
        return (
            f"its gradients by {path!r} are not those of autograd (off by "
            f"{difference / (size + 1e-30):.1%})"
        )
    if moves:
        return "its gradients hang on who else is in the batch, on this machine"
    return ""


def _say_why(path: Path, error: Exception) -> str:
    """Return in a few words why a path failed."""
    if path != "func":
        return _words(error)
    if missing := re.search(r"batching rule for ([\w:]+)", str(error)):
        return f"torch.func has no batching rule for {missing[1]}"
    return f"torch.func cannot take it ({_words(error)})"


def _find_registered_twice(model: nn.Module) -> str:
    """Return a part with two names: torch.func.functional_call leaves its tensors in such."""
    seen = set[int]()
    for _, part in model.named_modules(remove_duplicate=False):
        if id(part) in seen and any(True for _ in part.parameters()):
            return ModuleWatch(model).name_of(part)
        seen.add(id(part))
    return ""


def _gradients(case: _Case, path: Path) -> Tensor:
    """Return what a path makes of the rows: patients' gradients, or how far two clients move."""
    if case.private:
        return _of_patients(case, path)
    return _of_clients(case, path)


def _of_clients(case: _Case, path: Path) -> Tensor:
    size_K = torch.tensor([4, 2])
    stack = Stack(case.x_BF, case.y_B, torch.tensor([0, 4]), size_K)
    plan = LocalPlan(case.task, steps=2, batch_size=3, learning_rate=1e-2)
    start_P = case.w_P
    result = local.train(
        case.model, start_P.expand(2, -1), stack, plan, torch.tensor([3, 4]), path=path
    )
    return (result.theta_KP - start_P).double() / plan.learning_rate


def _patients(case: _Case, clients: list[list[int]]) -> Patients:
    """Return clients with made-up patients, by number: the first has three records, others one."""
    rows = [[0, 1, 2], [3], [4], [5]]
    held = []
    for order in clients:
        taken = [row for patient in order for row in rows[patient]]
        number = [n for n, patient in enumerate(order) for _ in rows[patient]]
        key = torch.tensor([patient for patient in order for _ in rows[patient]])
        held.append(Rows(case.x_BF[taken], case.y_B[taken], torch.tensor(number), key))
    return Patients.of(held)


def _of_patients(case: _Case, path: Path) -> Tensor:
    """Return each patient's gradient [4, P], taken alone."""
    found = [
        dpsgd.gradients(case.model, case.w_P, _patients(case, [[n]]), case.task, path)[0]
        for n in range(4)
    ]
    return torch.cat(found)


def _moves_with_company(case: _Case, path: Path) -> bool:
    """Say whether a patient's norm is another in a larger batch,
    at another place, in a stack of clients.
    """
    few = [0, 1, 2, 3]
    many = [3, 2, 1, 0] + [1, 2, 3] * 24
    alone_4 = _norms(case, path, [few])[0][:4]
    crowded_4 = _norms(case, path, [many])[0][:4].flip(0)
    stacked_4 = _norms(case, path, [many, few, [1]])[1][:4]
    return any(
        not bool(((alone_4 - other_4).abs() <= _BITS * alone_4).all())
        for other_4 in (crowded_4, stacked_4)
    )


def _norms(case: _Case, path: Path, clients: list[list[int]]) -> Tensor:
    return dpsgd.gradients(case.model, case.w_P, _patients(case, clients), case.task, path)[1]
