"""What the dictionary declares under a privacy claim, as it may not be read off patients' cells."""

from collections.abc import Iterator, Sequence

from medfed.core import toml
from medfed.core.checks import PlanError, some
from medfed.core.refusals import Refusal, refuse
from medfed.study import Data, Feature, describe, described


def declared_labels(data: Data) -> tuple[str, ...]:
    """Return the labels that the dictionary declares;
    raise PlanError where a claim needs them and it does not.
    """
    refuse(refuse_unlabelled(data))
    return data.dictionary[data.target].categories


def refuse_unlabelled(data: Data) -> Iterator[Refusal]:
    """Yield that a claim needs declared labels, where they are not."""
    if data.dictionary.get(data.target, Feature()).categories:
        return
    text = (
        f"a privacy claim and the labels of data.target={data.target!r} taken from patients do "
        f"not compose; declare {toml.key('data', 'dictionary', data.target, 'categories')} = "
        "[...], the labels that may occur"
    )
    yield Refusal(PlanError(text), {("data", "dictionary", data.target, "categories"): LABELS})


LABELS = toml.Ask([], "the labels that may occur, publicly known")


def declared_range(data: Data) -> tuple[float, ...]:
    """Return the range of a number that is predicted;
    raise PlanError where a claim needs one and there is none.
    """
    ends = data.dictionary.get(data.target, Feature()).range
    if not ends:
        where = toml.key("data", "dictionary", data.target, "range")
        raise PlanError(
            f"a privacy claim and data.task='regression' without {where} do not compose: "
            f"nothing bounds what one patient's target says. Declare {where} = [low, high]."
        )
    return ends


def refuse_undescribed(names: Sequence[str], data: Data, otherwise: str = "") -> Iterator[Refusal]:
    """Yield, as one, the features that a claim needs described and the dictionary does not.

    `otherwise` says, in a sentence, what else there is for numbers.
    """
    absent = [name for name in names if not described(data.dictionary.get(name, Feature()))]
    if not absent:
        return
    first = absent[0]

    several = len(absent) > 1
    if several:
        which = f"{len(absent)} features ({some(map(repr, absent))})"
    else:
        which = f"the feature {first!r}"

    what = "what their" if several else "what its"
    one, other = (toml.key("data", "dictionary", first, name) for name in ("range", "categories"))
    if several:
        more = ", and so on: a range for a number, categories for a text; or leave them"
    else:
        more = ", or leave it"

    text = (
        f"a privacy claim and {which} without a public range or categories do not compose: "
        f"{what} cells are would be counted from patients. Declare {one} or {other}{more} out of "
        f"data.features.{otherwise}"
    )
    yield Refusal(PlanError(text), describe(absent, data.dictionary))
