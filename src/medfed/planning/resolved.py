"""What follows from a signed study and public facts, worked out once, by every party itself.

Nobody takes these from the coordinator. A party that knows the study, who takes part, their public
sizes and how many numbers the model has, knows how long a row is, which noise it bears, which rule
weighs it and what its round agrees on.

K clients of a round, P parameters, M numbers in a row.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from medfed.core import extensions
from medfed.core.checks import PlanError, QuorumError
from medfed.core.streams import Streams
from medfed.fleet import selection
from medfed.fleet.selection import Profile, Selector
from medfed.learn.algorithms import ALGORITHMS, Algorithm
from medfed.learn.learners import LEARNERS
from medfed.links.wire import LINKS, PLAIN, Bounded, FixedPoint, Link, joint_links
from medfed.planning.cohorts import cohort, cohorts
from medfed.planning.row_limits import cap, hold_by_liars, holds_rows
from medfed.privacy import guarantee as guarantees
from medfed.privacy.guarantee import Guarantee
from medfed.privacy.run_meter import Metered, NoClaim, RunMeter
from medfed.robust.rules import RobustRule, augment, rule_of
from medfed.secure import graph
from medfed.study import Study

MOST_ROWS = 2000
"""Clients of a round that a rule may compare two by two."""

GRAM_SHARE = 0.5
"""The part of a round's budget, in 1 / z^2, that pays for the Gram matrix; the sum has the rest."""

DEFAULT_RULE = "nnm+geometric-median"
"""What rule = "auto" takes where clients can be compared."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A study's derived facts. Sizes are public: training and test rows of each site."""

    study: Study
    sizes: Mapping[str, Mapping[str, int]]
    participants: tuple[str, ...]  # who trains
    parameters: int
    message: int  # M, numbers in a row
    guarantee: Guarantee | None = None
    links: Sequence[Link] = PLAIN
    encoded: str = ""  # the sha256 of the encoding, which only those who have records know whole

    @property
    def algorithm(self) -> Algorithm:
        """What the server does with the combined row: the study's algorithm, or its learner's."""
        return algorithm_of(self.study)

    @property
    def selector(self) -> Selector:
        """Who takes part in a round, and by which law."""
        return selection.SELECTORS[self.study.fleet.schedule]

    @property
    def keeps(self) -> bool:
        """Whether a site remembers anything from one round to the next."""
        lies = self.study.robustness.attack  # a simulated liar remembers its own honest row
        return bool(lies or self.algorithm.kept or any(link.kept for link in self.links))

    @property
    def rule(self) -> RobustRule | None:
        """What weighs rows where some may lie; None takes the clients' public weights."""
        return robust_rule(self.study, cohort(self.study, self.participants))

    def weigh(self, gram_KK: Tensor) -> Tensor:
        """Return the rule's weights [K] of the rows with this Gram matrix; see `fitting`.

        Bucketing's pairs follow from a hash of the matrix, so that parties who compute them apart
        agree.
        """
        rule = self.fitting(len(gram_KK))
        key = int.from_bytes(hashlib.sha256(gram_KK.contiguous().numpy().tobytes()).digest()[:7])
        if rule.needs != "reference":
            return rule(gram_KK, key)
        return rule(augment(gram_KK, torch.zeros(len(gram_KK), dtype=torch.float64), 0.0), key)[:-1]

    def fitting(self, rows: int) -> RobustRule:
        """Return the rule for as many rows as came:
        who did not come counts as malicious where it needs that.

        Raises QuorumError where even so they are too few.
        """
        rule = self.rule
        n = cohort(self.study, self.participants)
        assert rule is not None
        least = max(0, rule.f - (n - rows))
        f = next((f for f in range(rule.f, least - 1, -1) if rule.smallest_n(f) <= rows), None)
        if f is None:
            raise QuorumError(
                f"robustness.rule={rule.name!r} bears {least} malicious rows among "
                f"{rule.smallest_n(least)} or more; {rows} came. Run the round again, or lower "
                "robustness.max_malicious."
            )
        return replace(rule, f=f)

    def quorum(self, clients: int) -> int:
        """Return how many rows of so many clients must count;
        malicious ones may stay out, or be left out.
        """
        return max(1, math.ceil(self.study.training.quorum * clients - 1e-9) - self.malicious)

    @property
    def malicious(self) -> int:
        """How many of the smallest round's clients may be malicious."""
        return of_clients(
            self.study.robustness.max_malicious, cohort(self.study, self.participants)
        )

    @property
    def may_sit_out(self) -> int | None:
        """How many clients may be put aside at once; None: as many as may lie.

        Where rows are secret what a rule keeps of the rest must still be opened: a round of which
        too many sat out would open nothing, and so would every later one.
        """
        if self.rule is None or self.study.security.aggregation != "three-party":
            return None
        n = cohort(self.study, self.participants)
        return min(self.rule.f, max(0, n - self.rule.f - fewest_opened(self.study, n)))

    def bears(self) -> str:
        """Say what malicious clients can do to the model, in one line."""
        n = cohort(self.study, self.participants)
        f = self.malicious
        robust = self.study.robustness
        if self.rule:
            spare = n - fewest_opened(self.study, n)
            if self.study.security.aggregation == "three-party" and spare < f:
                return (
                    f"{f} of {n} are borne by {self.rule.name}; a round that leaves out more than "
                    f"{spare} opens nothing (security.min_group, security.colluding)"
                )
            return f"{f} of {n} are borne by {self.rule.name}"
        if not bounded(self.study):
            return f"one of {n} moves the model at will"
        f = max(f, 1)
        if self.joint and self.guarantee and (share := cap(self.study, self.guarantee)) < 1:
            part = hold_by_liars(self.study, self.guarantee, f)
            return (
                f"{f} of {n} hold at most {part:.0%} of the length that a round's rows may have "
                f"(robustness.cap={share:.2g})"
            )

        sizes = {
            name: float(self.sizes[name]["train"]) if self.joint else self.weight(name)
            for name in self.participants
        }
        weights = sorted(sizes.values(), reverse=True)
        # the largest lie, the smallest are honest
        share = 2 * sum(weights[:f]) / sum(weights[:f] + weights[f - n :])
        if robust.bound:
            what = f"robustness.bound={robust.bound:g}"
        else:
            what = "the clipping norm of a patient's gradient"
        return f"{f} of {n} move a round's mean by at most {share:.3g} times {what}"

    @property
    def streams(self) -> Streams:
        return Streams(self.study.study.seed)

    @cached_property
    def digest(self) -> str:
        """The sha256 of what all parties of a secure round must have alike:
        the study, who trains, their declared rows, how records become numbers, and the lengths of
        model and row.
        """
        rows = [[name, self.sizes[name]["train"]] for name in self.participants]
        lengths = [self.parameters, self.message]
        facts = [self.study.digest(), sorted(rows), self.encoded, *lengths]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def budget(self) -> RunMeter:
        """Return a fresh count of what the run spends."""
        if self.guarantee:
            recalls = self.study.security.aggregation == "three-party"
            return Metered(self.guarantee, self.study.privacy.scope, recalls)
        return NoClaim()

    @property
    def joint(self) -> bool:
        """Whether rows are sums that get one noise together."""
        return self.guarantee is not None and self.guarantee.joint

    def on_turn(self, round: int) -> Sequence[str]:
        """Return who may take part in a round: all, or the group whose turn it is."""
        return self.selector.eligible(
            self.participants, round, self.study.fleet.groups, self.streams
        )

    def draw(self, round: int, out: Collection[str] = ()) -> list[str]:
        """Return who takes part in a round, without those who are `out`:
        a function of the seed and public facts.

        Where rows are secret, who is out is left out of the draw of all: whoever says so could else
        choose the draw.
        """
        if out and self.study.security.aggregation != "plain":
            return [name for name in self.draw(round) if name not in out]
        rng = self.streams.generator("selection", round)
        able = {
            name: Profile(self.sizes[name]["train"])
            for name in self.on_turn(round)
            if name not in out
        }
        return list(self.selector.pick(able, self.study.fleet.clients_per_round, rng))

    def expect(self, round: object) -> list[str]:
        """Return who takes part in a round, as a party that was told its number finds out; raise
        PlanError where the study has no such round.
        """
        last = self.study.training.rounds
        if type(round) is not int or not 1 <= round <= last:
            raise PlanError(
                f"round={round!r} is asked for; the study has rounds 1 to {last}. The coordinator "
                "may not choose others."
            )
        return self.draw(round)

    def weight(self, site: str) -> float:
        """Return a site's public weight, not normalised."""
        if self.study.training.weighting == "uniform":
            return 1.0
        return float(self.sizes[site]["train"])


def resolve(
    study: Study,
    sizes: Mapping[str, Mapping[str, int]],
    participants: Sequence[str],
    parameters: int,
    encoded: str = "",
) -> Resolved:
    """Return what follows for these participants;
    under a claim from the sizes that the study declares. `encoded` is the sha256 of the encoding.

    Raises PlanError where the study's target cannot be met.
    """
    extensions.load()
    guarantee = None
    if guarantees.asked(study):
        declared = {name: sizes[name]["train"] for name in participants}
        _refuse_other_sizes(study, declared)
        guarantee = guarantees.resolve(study, declared, parameters)

    if guarantee is not None and guarantee.joint:
        message = guarantee.numbers()
    else:
        message = algorithm_of(study).length(parameters)
    return Resolved(
        study=study,
        sizes=sizes,
        participants=tuple(participants),
        parameters=parameters,
        message=message,
        guarantee=guarantee,
        links=links_of(study, guarantee, participants),
        encoded=encoded,
    )


def _refuse_other_sizes(study: Study, told: Mapping[str, int]) -> None:
    """Raise PlanError unless patients are told as the study declares them: noise, bound and divisor
    follow from them, and are nobody else's to say.
    """
    for name, size in told.items():
        declared = guarantees.declared_size(study, name)
        if size != declared:
            raise PlanError(
                f"{size} patients for site {name!r} were told; the study declares {declared}. Give "
                "every party the same study."
            )


def algorithm_name(study: Study) -> str:
    """Return the algorithm that runs: where a round is one joint step, some are FedAvg."""
    name = study.training.algorithm
    joint = guarantees.mode(study) in ("shared", "central")
    if joint and ALGORITHMS[name].joint == "coincides":
        return "fedavg"
    return name


def algorithm_of(study: Study) -> Algorithm:
    """Return what runs at the server: the study's algorithm or,
    of a model that no gradient trains, its learner's.
    """
    learner = LEARNERS.get(study.model.name)
    if learner is None:
        return ALGORITHMS[algorithm_name(study)]
    return Algorithm(
        learner.paper,
        learner.apply,
        start=lambda h: learner.start,
        sent=learner.sent,
        kept=learner.kept,
        length=learner.length,
    )


def blank(algorithm: Algorithm, links: Sequence[Link], w_P: Tensor) -> dict[str, Tensor]:
    """Return what a site remembers before its first round,
    of its algorithm and of its links: name -> vector.
    """
    memory = algorithm.blank(w_P)
    numbers = algorithm.length(len(w_P))
    for link in links:
        memory |= {name: torch.zeros(numbers) for name in link.kept}
        numbers = link.length(numbers)
    return memory


def links_of(study: Study, guarantee: Guarantee | None, clients: Sequence[str]) -> Sequence[Link]:
    """Return the links between clients and whoever combines their rows."""
    security = study.security
    key = Streams(study.study.seed).key("noise")
    if guarantee and guarantee.joint:
        return joint_links(guarantee, key, security.aggregation, holders(study, clients))
    robust = study.robustness
    cut: tuple[Link, ...] = (Bounded(robust.bound),) if robust.bound else ()
    if security.aggregation == "plain":
        return (*cut, *PLAIN, *(LINKS[name] for name in study.training.links))
    whole = robust.rule != "mean" or robust.bound > 0
    return (
        *cut,
        FixedPoint(
            security.fraction_bits, robust.bound * (1 + 1e-6) or security.bound, whole=whole
        ),
    )


def holders(study: Study, clients: Sequence[str]) -> int:
    """Return how many parties' parts make the joint noise: those that must answer and do not work
    with the server.

    masked: `least_rows` without the f that may work with the server, nor those whom it can cut off
    from a sparse graph. three-party: two.
    """
    security = study.security
    if security.aggregation != "masked":
        return 2 if security.aggregation == "three-party" else 1
    # the least of all rounds: a sparse graph of n may promise more rows than all pairs of n + 1
    return min(_honest_rows(study, n) for n in cohorts(study, clients))


def _honest_rows(study: Study, n: int) -> int:
    """Return how many rows of those who do not work with the server a sum of n clients holds at
    least.
    """
    sparse = graph_of(study, n)
    return least_rows(study, n) - colluding(study, n) - (sparse.lost if sparse else 0)


def excess(study: Study, clients: Sequence[str]) -> float:
    """Return how many times one release's standard deviation a round's sum carries: every site's,
    or every holder's.
    """
    drawn = cohort(study, clients)
    mode = guarantees.mode(study)
    if mode == "site":
        return math.sqrt(drawn)
    if mode == "central" or study.security.aggregation == "plain":
        return 1.0
    parts = 3 if study.security.aggregation == "three-party" else drawn
    ratio = math.sqrt(parts / holders(study, clients))
    if study.security.aggregation == "three-party" and robust_rule(study, drawn):
        ratio /= math.sqrt(1 - GRAM_SHARE)  # the rest pays for the Gram matrix that the rule reads
    return ratio


def threshold(study: Study, n: int) -> int:
    """Return how many of n clients must stay to the end of a masked round so that there is one list
    of them: the least t with 2t > n + f.
    """
    return (n + colluding(study, n)) // 2 + 1


def colluding(study: Study, n: int) -> int:
    """Return f: how many of n clients may work with the coordinator."""
    return math.floor(study.security.colluding * n + 1e-9)  # .3 x 10 is below 3 in floats


def fewest_opened(study: Study, n: int) -> int:
    """Return how many rows of n clients a sum must hold to be opened: `security.min_group` besides
    those of the f who know their own, and may tell the coordinator.
    """
    return study.security.min_group + colluding(study, n)


DROPOUT = 0.1
"""The share of a large cohort that may drop out of a masked round, where training.quorum lets no
more stay away: a sparse graph need not bear more.
"""


def least_rows(study: Study, n: int) -> int:
    """Return how many rows of n clients must be in a masked sum:
    the threshold, and `security.min_group` rows besides those of the f who may know them.

    More where a sparse graph then does: as many as training.quorum asks for, up to all but DROPOUT.
    """
    least = max(threshold(study, n), fewest_opened(study, n))
    asked = math.ceil(study.training.quorum * n - 1e-9)
    more = max(least, min(asked, n - math.floor(DROPOUT * n + 1e-9)))
    return more if _fits(study, n, more) else least


def graph_of(study: Study, n: int) -> graph.Sparse | None:
    """Return the law of the sparse graph on which n clients mask; None for all pairs."""
    return _fits(study, n, least_rows(study, n))


def _fits(study: Study, n: int, stay: int) -> graph.Sparse | None:
    """Return the law of a graph that leaves security.min_group honest rows in the sum of those
    who stay.
    """
    f = colluding(study, n)
    found = graph.design(n, f, n - stay)
    return found if found and stay - found.lost >= fewest_opened(study, n) else None


def robust_rule(study: Study, clients: int) -> RobustRule | None:
    """Return a study's rule for a round of so many clients; None for the mean."""
    robust = study.robustness
    name = robust.rule
    noised = guarantees.asked(study) and guarantees.mode(study) != "site"
    if name == "auto":  # where noise hides how rows compare, their length is held instead
        name = DEFAULT_RULE if clients <= MOST_ROWS and not holds_rows(study) else "mean"
    if name == "mean":
        return None

    radius = None
    if noised and name.endswith("geometric-median"):
        radius = 0.1
    return rule_of(name, of_clients(robust.max_malicious, clients), radius=radius)


def of_clients(share: float, clients: int) -> int:
    return math.floor(share * clients + 1e-9)  # .3 x 10 is below 3 in floats


def bounded(study: Study) -> bool:
    """Say whether somebody holds every row to a norm: the study's own bound, or that of clipped
    sums, in secret.
    """
    return study.robustness.bound > 0 or holds_rows(study)
