"""What can be said of code that fails at a site: at which stage, in which module. And made-up rows
to let it fail on.

Patients are charged before their records are touched, so what cannot run must be found before the
first charge: a site plays its part once on rows that nobody's are (`node.rehearse`). There an
exception may be quoted in full, as all that it can quote is made up; in a round on real records
only its kind, stage and module are told.

n records, F features, C outputs.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from medfed.core.checks import MedfedError, PlanError, SiteError
from medfed.core.types import Task
from medfed.data.encoding import Column, Encoding
from medfed.data.federated import Rows
from medfed.learn import zoo
from medfed.learn.local import sample_loss
from medfed.learn.watching import find_failing_part
from medfed.study import Feature

TABLES: tuple[tuple[int, ...], ...] = ((1,), (1, 1, 1, 1), (3, 1, 2, 1))
"""Made-up tables, as how many records each patient has:
one patient alone, one record each, and several.
"""

_ZOO = f"take a model of the zoo ({', '.join(sorted(zoo.ZOO))})"

WAYS_OUT = {
    "model": f"Correct the module, or {_ZOO}.",
    "loss": f"A model gives one row of outputs a record; correct the module, or {_ZOO}.",
    "gradient": (
        "Every patient needs a gradient of their own; correct the module's backward pass, or "
        f"{_ZOO}."
    ),
    "clipping": f"Correct the module, or {_ZOO}.",
    "training": "Lower training.learning_rate, or correct the module.",
    "link": (
        "Correct what is named: security decides how rows travel, and robustness what they may "
        "hold."
    ),
    "evaluation": (
        f"Correct what the module does in evaluation mode, also on one record, or {_ZOO}."
    ),
    "own model": (
        "Correct the module so that it trains without noise too, or leave privacy.vote_epsilon out."
    ),
}
"""What to do about a stage that fails."""

_FILES = {
    "wire": "link", "field": "link", "party": "link", "three_party": "link", "masking": "link",
    "codec": "link", "dpsgd": "gradient", "local": "gradient", "layers": "gradient",
}  # fmt: skip
_FUNCTIONS = {
    "sample_loss": "loss",
    "loss_gradient": "loss",
    "outputs": "evaluation",
    "_evaluate": "evaluation",
}
_HERE = Path(__file__).parent.parent


# Where an exception comes from --------------------------------------------------------------------


def stage_of(error: BaseException) -> str:
    """Return the stage that an exception comes from,
    by the code it passed through; "" where that says nothing.
    """
    for frame in reversed(_frames(error)):
        code = frame.f_code
        if _HERE not in Path(code.co_filename).parents:
            continue
        if stage := _FUNCTIONS.get(code.co_name) or _FILES.get(Path(code.co_filename).stem):
            return stage
    return ""


def module_of(error: BaseException, model: nn.Module | None) -> str:
    """Return the innermost of the model's modules that an exception passed through: "'head.2'
    (Linear)", or "".
    """
    if model is None:
        return ""
    names = {id(module): name for name, module in model.named_modules()}
    for frame in reversed(_frames(error)):
        owner = frame.f_locals.get("self")
        # a layer's rule stands for its layer
        for module in (owner, getattr(owner, "__dict__", {}).get("layer")):
            if isinstance(module, nn.Module) and id(module) in names:
                return _say(names[id(module)], module)
    return ""


def place_of(error: BaseException, model: nn.Module | None) -> str:
    """Return stage and module in words, of those that are known:
    " at stage gradient, in module 'gru' (GRU)".
    """
    stage = stage_of(error)
    module = module_of(error, model)
    where = ""
    if stage:
        where = f" at stage {stage}"
    if module:
        where += f", in module {module}"
    return where


def _frames(error: BaseException) -> list[FrameType]:
    """Return the frames that an exception passed through, outermost first;
    of its cause, where it was told anew.
    """
    cause = error.__cause__
    return [frame for frame, _ in traceback.walk_tb((cause or error).__traceback__)]


def _say(name: str, module: nn.Module) -> str:
    if name:
        return f"{name!r} ({type(module).__name__})"
    return type(module).__name__


# The rehearsal's stages ---------------------------------------------------------------------------


@contextmanager
def stage(name: str, model: nn.Module, x_NF: Tensor) -> Iterator[None]:
    """Turn whatever fails in the block into a SiteError that names stage and module, quotes it, and
    says the way out.

    The words of the exception may be told: every input is made up.
    """
    try:
        yield
    except Exception as error:
        where = stage_of(error) if name == "training" else name
        module = module_of(error, model)
        if not module and where == "gradient":
            module = find_failing_part(model, x_NF)

        place = f"stage {where or name}"
        if module:
            place = f"{place}, module {module}"
        told = _first_line(error)
        if not isinstance(error, MedfedError):
            told = f"{type(error).__name__}: {told}"
        raise SiteError(
            f"rehearsal on made-up rows, {place}: {told} {WAYS_OUT[where or name]} Nobody was "
            "charged."
        ) from error


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "no reason given")[:300]
    return line if line.endswith((".", "!", "?")) else f"{line}."


def check_outputs(model: nn.Module, x_NF: Tensor, outputs: int) -> Tensor:
    """Return the model's outputs [n, C]; raise PlanError where they are no such numbers."""
    mode = "training" if model.training else "evaluation"
    with torch.no_grad():
        z = model(x_NF)
    wanted = (len(x_NF), outputs)
    if not isinstance(z, Tensor) or not z.is_floating_point() or tuple(z.shape) != wanted:
        found = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise PlanError(
            f"in {mode} mode the model gives {found} for {len(x_NF)} records; expected numbers "
            f"{wanted}."
        )
    return z


def check_loss(task: Task, z_NC: Tensor, y_N: Tensor) -> Tensor:
    """Return for which records [n] the loss is a finite number; raise PlanError where it is for
    none, or has no n.
    """
    loss_N = sample_loss(task, z_NC, y_N)
    finite_N = torch.isfinite(loss_N)
    if loss_N.shape != y_N.shape or not finite_N.any():
        raise PlanError(
            f"the loss of {len(y_N)} records is {tuple(loss_N.shape)}; expected one finite "
            "number each."
        )
    return finite_N


# Made-up rows -------------------------------------------------------------------------------------


def make_up(encoding: Encoding, dictionary: Mapping[str, Feature], count: int) -> Rows:
    """Return invented patients with a record each, from the ends of what the encoding allows."""
    blocks = [
        _column(column, dictionary.get(column.name), count, at)
        for at, column in enumerate(encoding.columns)
    ]
    x = torch.cat(blocks, 1) if blocks else torch.zeros(count, 0)
    return Rows(x, _labels(encoding, count), torch.arange(count), torch.arange(count))


def share_out(rows: Rows, records: Sequence[int]) -> Rows:
    """Return the rows, in turns, as those of patients with so many records each."""
    at = torch.arange(sum(records)) % len(rows)
    patient = torch.repeat_interleave(torch.arange(len(records)), torch.tensor(records))
    return Rows(rows.x[at], rows.y[at], patient, patient.clone())


def _column(column: Column, feature: Feature | None, count: int, at: int) -> Tensor:
    """Return a feature's encoded columns: what is missing, the least and the most, in turns that
    differ by feature.
    """
    turn = torch.arange(count) + at
    if column.kind == "number":
        ends = torch.tensor([0.0, *_ends(column, feature)])
        block = ends[turn % 3][:, None]
    else:
        kinds = len(column.categories)
        hot = torch.nn.functional.one_hot(turn % kinds, kinds).float()
        block = hot[:, 1:] if kinds == 2 else hot
    if column.indicator:
        block = torch.cat([block, (turn % 3 == 0).float()[:, None]], 1)
    return block


def _ends(column: Column, feature: Feature | None) -> tuple[float, float]:
    """Return the least and the largest encoded number; 0 and 1 where no range is declared."""
    if column.cap:
        return -column.cap, column.cap
    if feature is None or not feature.range or column.log:
        return 0.0, 1.0
    low, high = feature.range
    return (low - column.centre) / column.scale, (high - column.centre) / column.scale


def _labels(encoding: Encoding, count: int) -> Tensor:
    turn = torch.arange(count)
    match encoding.target.task:
        case "binary":
            return (turn % 2).float()
        case "multiclass":
            return turn % len(encoding.target.labels)
        case "regression":
            return (turn % 3 - 1).float()
