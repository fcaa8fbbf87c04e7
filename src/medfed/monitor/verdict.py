"""What a run's figures mean, said first:
it learned nothing, calls one class only, its sites do better alone.

A function of the summary. Each finding has a stable code, a sentence, what to do next, and a level:
`warning` where the model is not what one would want, `note` where something is not known.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from medfed.core import decision
from medfed.core.checks import some

Summary = Mapping[str, Any]

CODES = {
    "loss-grew": "the training loss ended above where it began: the steps are too long",
    "loss-falls": "the training loss was still falling when the rounds were over",
    "loss-high": "the training loss ended above twice that of a constant predictor",
    "not-better-than-chance": (
        "AUROC's interval holds one half, or several classes are told no better than by share"
    ),
    "not-better-than-constant": "a regression's R2 is 0 or less",
    "chances-worse-than-constant": (
        "patients are ranked, but their chances err more than one chance for all would"
    ),
    "one-class": "all or nearly all of a class is called another, or all are called one",
    "sensitivity-missed": "the threshold finds fewer positives than its rule asks for",
    "one-class-tested": "the held-out records are of one class, so that little can be said",
    "own-better": "each site's own model errs less than the federated one, over all sites",
    "own-better-at-some": "so at some sites",
    "own-better-by-vote": "by a noised vote of the sites, own models err less",
    "federated-better-by-vote": "by a noised vote of the sites, the federated model errs less",
    "vote-open": "a noised vote of the sites does not tell whether own models err less",
    "untested": "nothing is known of the model, as it was not tested",
    "not-compared": "whether sites' own models would do better is not known",
}
"""What a finding says, by its code."""


def findings(summary: Summary) -> list[dict[str, str]]:
    """Return what a run's figures mean, most important first; nothing of a run without a test."""
    test, intervals = _main_test(summary)
    found = list(_judge_loss(summary))
    grew = bool(found)
    if test:
        found += (
            _judge_regression(summary, test)
            if "r2" in test
            else _judge_classes(summary, test, intervals)
        )
        found += _judge_own_models(summary)
    elif summary.get("status") == "complete":
        text = "The model was not tested: nothing is known of how good it is."
        following = (
            "Test it on patients who are declared public, or at each site (`medfed alone RUN "
            "SITE`)."
        )
        found.append(_finding("untested", text, following, "note"))
    return found if grew else [*found, *_judge_pace(summary)]


def lines(summary: Summary) -> list[str]:
    """Return the findings as lines of text, each with its next action."""
    return [f"{one['level']}: {one['text']} {one['next']}" for one in summary.get("findings", [])]


def _finding(code: str, text: str, following: str, level: str = "warning") -> dict[str, str]:
    assert code in CODES
    return {"code": code, "level": level, "text": text, "next": following}


def _main_test(summary: Summary) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the figures and intervals of the model that the run is about."""
    if summary["test"]:
        return summary["test"], summary["intervals"]
    main = summary["baselines"].get(summary["algorithm"])
    if main is None:
        return {}, {}
    return main["test"], main["intervals"]


def _is_private(summary: Summary) -> bool:
    return (summary["privacy"] or {}).get("epsilon") is not None


def _advise(summary: Summary) -> str:
    """Say what to try where too little was learned."""
    privacy = summary["privacy"] or {}
    if _is_private(summary):
        return (
            f"At epsilon {privacy.get('target_epsilon', privacy['epsilon']):g} noise, or too few "
            "or too short steps, hide what there is to learn: see `medfed privacy plan`; more "
            "patients, more rounds or a larger privacy.epsilon help."
        )
    return (
        "Do not use it. Train for more rounds, and see by `medfed data show` whether features "
        "and target are right."
    )


# Training


def _judge_loss(summary: Summary) -> Iterator[dict[str, str]]:
    first = summary["loss"]["first"]
    last = summary["loss"]["last"]
    rate = summary["learning_rate"] or {}
    lower = "Lower training.learning_rate"
    if rate.get("first"):
        lower += f" (it is {rate['first']:g})"

    if rate.get("chosen"):
        lower += "."
    else:
        lower += ", or leave it out: one that cannot diverge is then chosen."

    if first is not None and (last is None or last > 1.1 * first):
        now = "no number" if last is None else f"{last:.4g}"
        text = f"The training loss grew from {first:.4g} in the first round to {now} in the last."
        yield _finding("loss-grew", text, lower)
        return

    constant = _entropy(_shares(summary))
    if last is not None and constant and last > 2 * constant:
        text = (
            f"The training loss ended at {last:.4g}; one chance for everybody has {constant:.3g}."
        )
        if first is not None and last < _FALLING * first < _FALLING * _KNOWS_NOTHING * math.log(
            len(summary["labels"])
        ):
            rounds = f" (it had {summary['rounds']})" if summary.get("rounds") else ""
            text = f"{text[:-1]}, and it was still falling, from {first:.4g}."
            yield _finding("loss-high", text, f"Train for more rounds{rounds}.")
        else:
            yield _finding("loss-high", text, lower)


def _judge_pace(summary: Summary) -> Iterator[dict[str, str]]:
    """Say that more rounds would help; under a claim rounds are what epsilon buys."""
    first, late, last = (summary["loss"].get(key) for key in ("first", "late", "last"))
    rounds = summary.get("rounds") or 0
    told = None not in (first, late, last) and rounds >= _ENOUGH_TO_TELL
    if not told or summary.get("status") != "complete" or _is_private(summary):
        return
    fell = first - last
    if late - last > _LATE * fell > 0:
        text = (
            f"The training loss was still falling when the {rounds} rounds were over: by "
            f"{(late - last) / fell:.0%} of all it fell, in their last quarter."
        )
        yield _finding("loss-falls", text, f"Set training.rounds above {rounds}.", "note")


_ENOUGH_TO_TELL = 8
_LATE = 0.05
"""What falls as 1 / t, as on a model that is nearly there, falls by less in the last quarter."""

_FALLING = 0.98
_KNOWS_NOTHING = 1.5
"""Where the first loss is about that of equal chances, and the last is less by this share: it
learns, slowly.
"""


# Against a constant predictor


def _judge_regression(summary: Summary, test: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    if test["r2"] is not None and test["r2"] <= 0:
        text = (
            f"The model predicts no better than the mean does for everybody: R2 {test['r2']:.3f}."
        )
        yield _finding("not-better-than-constant", text, _advise(summary))


def _judge_classes(
    summary: Summary, test: Mapping[str, Any], intervals: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    shares = _shares(summary)
    if sum(share > 0 for share in shares) < 2:
        if summary["confusion"]:
            text = (
                "All held-out records are of one class: how well the model tells classes apart "
                "is not known."
            )
            yield _finding(
                "one-class-tested", text, "Raise data.test_fraction, or hold out more patients."
            )
        return

    chance = _describe_chance(summary, test, intervals, shares)
    if chance:
        yield _finding(
            "not-better-than-chance",
            chance,
            _describe_noise(summary, intervals) or _advise(summary),
        )
    elif worse := _describe_worse_chances(summary, test, shares):
        text = (
            f"The model ranks patients, but its chances are worse than one for everybody: {worse}."
        )
        following = (
            "Use its ranking, not its chances; train for more rounds, or with smaller steps."
        )
        yield _finding("chances-worse-than-constant", text, following)

    one = _describe_one_class(summary)
    counts_are_noise = chance and _describe_noise(summary, intervals)
    if one and not counts_are_noise:
        at = (summary.get("decision") or {}).get("threshold", 0.5)
        following = (
            f"Its AUROC says whether it ranks patients; the decision threshold is {at:.3g}: "
            "declare another, such as the known share of positives, in data.threshold."
        )
        yield _finding("one-class", one, _advise(summary) if chance else following)

    if short := _describe_sensitivity(summary, test, intervals):
        yield _finding("sensitivity-missed", short, "Declare a lower number in data.threshold.")


def _describe_chance(
    summary: Summary, test: Mapping[str, Any], intervals: Mapping[str, Any], shares: Sequence[float]
) -> str:
    """Say that a model tells classes apart no better than chance; empty where it does."""
    auroc = test.get("auroc")
    if len(shares) == 2:
        if auroc is None:
            if _is_noised(summary):
                return "How well the model tells classes apart is not known: no AUROC."
            return ""

        low, high = intervals.get("auroc") or _hanley_interval(auroc, *_counts(summary))
        if low > 0.5:
            return ""
        if high < 0.5:
            return (
                f"The model ranks the wrong way round: AUROC {auroc:.3f}, with 95 % between "
                f"{low:.3f} and {high:.3f}."
            )

        return (
            f"The model cannot be told from chance: AUROC {auroc:.3f}, with 95 % between "
            f"{low:.3f} and {high:.3f}."
        )

    most = max(shares)
    low = (intervals.get("accuracy") or [test["accuracy"]])[0]
    if low > most or not _describe_worse_chances(summary, test, shares):
        return ""

    return (
        f"The model tells {len(shares)} classes no better than by their shares: accuracy "
        f"{test['accuracy']:.3f}, of the largest class alone {most:.3f}."
    )


def _describe_noise(summary: Summary, intervals: Mapping[str, Any]) -> str:
    """Say that the test, not the model, is what says nothing; empty where it could."""
    low, high = intervals.get("auroc") or (None, None)
    if not _is_noised(summary) or (low is not None and high is not None and high - low < 0.25):
        return ""
    return (
        "The noise of the test alone does this: it says nothing of the model. Hold out more "
        "patients, raise privacy.evaluation_epsilon, or test on public patients "
        "(data.test_is_public)."
    )


def _describe_worse_chances(
    summary: Summary, test: Mapping[str, Any], shares: Sequence[float]
) -> str:
    """Say in figures that chances err more than the shares of the classes would;
    empty where they do not.

    A noised test rounds chances to few cells, and its shares are noised too: it does not tell.
    """
    if _is_noised(summary):
        return ""
    constant = 1 - sum(share**2 for share in shares)
    if len(shares) == 2:
        constant /= 2  # a binary Brier score counts one of the two
    if test.get("brier") is not None and test["brier"] >= constant:
        return f"Brier score {test['brier']:.4f}, of the shares alone {constant:.4f}"
    loss = summary["loss"]["test"]
    least = _entropy(shares)
    if loss is not None and loss >= least:
        return f"log loss {loss:.4f}, of the shares alone {least:.4f}"

    return ""


def _is_noised(summary: Summary) -> bool:
    """Whether the test is a noised histogram of few cells, which rounds chances."""
    return bool(summary.get("test_noised"))


def _describe_one_class(summary: Summary) -> str:
    """Say that the model misses all or nearly all of a class; empty where it does not.

    Counts of a noised test may be off, so that a few found where many are say nothing: one in
    twenty is nobody.
    """
    confusion = summary["confusion"]
    labels = summary["labels"]
    total = sum(_counts(summary))
    missed = [
        i for i, row in enumerate(confusion) if sum(row) and confusion[i][i] <= 0.1 * sum(row)
    ]
    if not missed:
        return ""
    called = [sum(column) for column in zip(*confusion, strict=True)]
    top = max(range(len(called)), key=called.__getitem__)
    names = [labels[i] if i < len(labels) else str(i) for i in range(len(confusion))]
    others = total - called[top]
    if others <= 0.02 * (total - sum(confusion[top])):
        who = "everybody" if others <= 0 else f"all but {others} of {total:,} held-out records"
        return f"The model calls {who} {names[top]!r}; {total - sum(confusion[top]):,} are not."

    told = " and ".join(
        f"{confusion[i][i]:,} of {sum(confusion[i]):,} {names[i]!r}" for i in missed
    )
    return (
        f"The model finds hardly any of a class: {told}. It is no better than to leave that "
        "class out."
    )


def _describe_sensitivity(
    summary: Summary, test: Mapping[str, Any], intervals: Mapping[str, Any]
) -> str:
    """Say that less of the positives is found than the study's rule asks for, beyond chance;
    empty where not.
    """
    rule = decision.parse((summary.get("decision") or {}).get("rule", ""))
    recall = test.get("recall")
    high = (intervals.get("recall") or (None, None))[1]
    if rule is None or rule.name != "sensitivity" or recall is None:
        return ""
    most = recall if high is None else high
    if most >= rule.level:
        return ""
    return f"The threshold was to find {rule.level:.0%} of the positives, and finds {recall:.1%}."


# Against sites' own models

_DIFFER = (
    "Sites differ: compare their classes and codings by `medfed data show`, train for more "
    "rounds, or let each site keep its own model."
)
_AT_HOME = "Each site can see for itself, at home: `medfed alone RUN SITE`."


def _judge_own_models(summary: Summary) -> Iterator[dict[str, str]]:
    if summary["algorithm"] in summary["baselines"]:
        return
    compared = summary["compared"]
    vote = summary.get("vote")

    if compared is None:
        if vote:
            yield from _judge_vote(vote)
        elif _is_private(summary) and "local" not in summary["baselines"]:
            text = (
                "Not compared: whether sites' own models do better is not known; under a claim "
                "it takes a paid vote."
            )
            yield _finding("not-compared", text, _AT_HOME, "note")
        return

    low, high = compared["interval"]
    better = _sites_better_alone(compared["sites"])
    if low is not None and low > 0:
        where = ""
        if better:
            where = f" (clearly at {', '.join(better[:5])})"
        text = (
            "Sites' own models are better than the federated one: their squared error is less "
            f"by {compared['own_better']:.4g} a record, with 95 % between {low:.4g} and "
            f"{high:.4g}{where}."
        )
        yield _finding("own-better", text, _DIFFER)
    elif better:
        text = (
            f"At {len(better)} of {len(compared['sites'])} sites ({some(better, 5)}) the own "
            "model is better than the federated one."
        )
        yield _finding("own-better-at-some", text, _DIFFER)


def _judge_vote(vote: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Say what a vote of sites comes to."""
    sites = vote["sites"]
    (low, high) = vote["interval"]
    if low > sites or high < 0:
        text = f"The vote on own models came out beyond all its {sites} sites: it tells nothing."
        yield _finding("vote-open", text, _AT_HOME, "note")
        return

    told = (
        f"{max(0.0, low):.0f} to {min(sites, high):.0f} of {sites} votes are for own models, "
        "where half is a draw"
    )
    if low > sites / 2:
        yield _finding(
            "own-better-by-vote",
            f"Sites' own models are better than the federated one: {told}.",
            _DIFFER,
        )
    elif high >= sites / 2:
        text = f"Whether sites' own models are better cannot be told by their noised vote: {told}."
        yield _finding("vote-open", text, _AT_HOME, "note")
    else:
        text = f"The federated model is better than sites' own, by their noised vote: {told}."
        yield _finding("federated-better-by-vote", text, _AT_HOME, "note")


def _sites_better_alone(sites: Mapping[str, Sequence[float | None]]) -> list[str]:
    """Return the sites whose own model is better at 95 % for all sites together (Bonferroni)."""
    tested = {
        name: told for name, told in sites.items() if told[2] is not None and told[3] is not None
    }
    wider = NormalDist().inv_cdf(1 - 0.025 / max(1, len(tested))) / NormalDist().inv_cdf(0.975)
    return [
        name
        for name, (_, mean, low, _) in tested.items()
        if mean is not None and low is not None and mean - (mean - low) * wider > 0
    ]


# What the labels alone tell


def _counts(summary: Summary) -> list[int]:
    return [sum(row) for row in summary["confusion"]]


def _shares(summary: Summary) -> list[float]:
    """Return the share of each label among the held-out records."""
    counts = _counts(summary)
    total = sum(counts)
    return [count / total for count in counts] if total else []


def _entropy(shares: Sequence[float]) -> float:
    """Return the log loss of saying the labels' shares to everybody."""
    return -sum(share * math.log(share) for share in shares if share > 0)


def _hanley_interval(auroc: float, negative: int, positive: int) -> tuple[float, float]:
    """Return an AUROC's 95 % interval from value and numbers alone (Hanley and McNeil 1982)."""
    q1 = auroc / (2 - auroc)
    q2 = 2 * auroc**2 / (1 + auroc)
    spread = (
        auroc * (1 - auroc) + (positive - 1) * (q1 - auroc**2) + (negative - 1) * (q2 - auroc**2)
    )
    half = 1.96 * math.sqrt(max(0.0, spread) / max(1, positive * negative))
    return auroc - half, auroc + half
