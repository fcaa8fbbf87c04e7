"""A site's account: its patients' side of the budget. It pays from the ledger before a record is
read, or refuses.

The coordinator cannot overdraw it: what a round costs is worked out here from the study and the
declared sizes.
"""

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medfed.core.checks import BudgetError, LedgerError
from medfed.core.patient_ids import Rule
from medfed.core.types import JSON
from medfed.privacy.guarantee import Guarantee, counted_together
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Charge, Cohort, Lifetime, Limits
from medfed.privacy.privacy_events import Event, RandomisedResponse
from medfed.study import Study

ROUND = "round"
TEST = "test"
"""Labels of charges; a query has its own."""

logger = logging.getLogger(__name__)


class SiteLedger:
    """The ledger of this process's sites, opened when the first of them enrols its patients."""

    def __init__(self, path: Path | None, study: Study) -> None:
        """`path` is the ledger's file; None keeps it in memory."""
        self.path = path
        self.study = study
        self.run = ""
        self.cohorts: dict[str, Cohort] = {}
        self.guarantee: Guarantee | None = None
        self._ledger: Ledger | None = None
        self._payer: dict[str, str] = {}  # joint noise: at which of its sites a patient pays
        self._test_payer: dict[str, str] = {}  # the same of held-out patients
        self._test_ids: dict[str, Sequence[str]] = {}  # whose histogram is asked for, by site
        # by label: sites that paid and have not answered yet
        self._paid: defaultdict[str, set[str]] = defaultdict(set)

    @property
    def ledger(self) -> Ledger:
        """The open ledger; raises LedgerError where it cannot be opened, trusted or written."""
        if self._ledger is None:
            self._ledger = Ledger.open(self.path, founding=self._founding())
            self._refuse_another_rule()
        return self._ledger

    def refuse_without(self, head: str) -> None:
        """Raise LedgerError unless the ledger is there and still holds a head that it told;
        found none instead.
        """
        if self._ledger is None and (self.path is None or not self.path.exists()):
            raise LedgerError(
                f"{self.path} is missing, though this run was charged there. Restore its whole "
                "folder from a copy."
            )
        self.ledger.refuse_without(head)

    def read_founded(self) -> Lifetime | None:
        """Return the lifetime budget of a ledger founded just now, with what the study says."""
        if self._ledger and self._ledger.founded:
            return self._ledger.lifetime
        return None

    def _founding(self) -> Lifetime | None:
        """Return what a lifetime ledger is founded with where its operator has said nothing: no
        more than is asked.
        """
        p = self.study.privacy
        if p.scope == "run":
            return None

        epsilon = p.epsilon
        if p.lifetime_epsilon < math.inf:
            epsilon = p.lifetime_epsilon
        rule: Rule = "exact" if self.study.data.identity == "exact" else "canonical"
        return Lifetime(
            epsilon, p.delta, rule, reason=f"the first run, of study {self.study.study.name!r}"
        )

    def _refuse_another_rule(self) -> None:
        """Raise LedgerError where patients were named under another rule than the ledger's,
        founded in between.
        """
        asked = self.study.data.identity
        bound = self._ledger.lifetime if self._ledger else None
        if bound and asked not in ("auto", bound.identity):
            raise LedgerError(
                f"data.identity={asked!r}, and the site's ledger goes by {bound.identity!r}; "
                "expected the same. Leave data.identity out and run again."
            )

    def enrol(
        self, run: str, rosters: Mapping[str, Iterable[str]], guarantee: Guarantee, fresh: bool
    ) -> None:
        """Enrol the training patients of sites; before a fresh run, see that the whole plan fits
        what they have left.

        Under joint noise a patient of several sites is charged once a round: the noise covers all
        its sites. Raises BudgetError naming what is left; nothing is charged here.
        """
        self.run = run
        self.guarantee = guarantee
        if self.study.privacy.scope == "study":
            self.ledger.refuse_column(self.study.data.patient)
        if guarantee.accountant == "pld":
            self._refuse_another_run()

        # Who pays where: under joint noise at the first of a patient's sites alone.
        if guarantee.joint:
            rosters = {
                site: [name for name in roster if self._payer.setdefault(name, site) == site]
                for site, roster in rosters.items()
            }
        self.cohorts |= self.ledger.enrol_all(rosters)

        # Whether all that is planned still fits.
        if fresh:
            whole = [self._charge(site, 0, guarantee.whole(site)) for site in rosters]
            try:
                self.ledger.check(whole, self._limits())
            except BudgetError as error:
                raise _discreet(error) from error

    def _refuse_another_run(self) -> None:
        """Raise BudgetError where this ledger holds another run of the study: PLD composes one
        fixed plan, no two.
        """
        study = self.study.study.name
        if any(row["study"] == study and row["run"] != self.run for row in self.ledger.rows()):
            raise BudgetError(
                f"privacy.accountant='pld' and a second run of study {study!r} on one ledger do "
                "not compose: PLD holds for one plan that is fixed. Nothing was charged. Resume "
                "the first, or start anew with another --out."
            )

    def pay(self, round: int, sites: Sequence[str]) -> dict[str, BudgetError]:
        """Charge the patients of each site for a round; return the sites whose patients cannot pay,
        with the reason.

        Guarantee: when this returns, every enrolled patient of every site that is not in the answer
        has paid for the round, on disk. What it costs is worked out here, from the study and
        declared sizes, and by nobody's word.

        Edge cases:
        - who has paid does not pay twice before `note_answered` (the work failed, and is tried
          again);
        - a crash after it leaves the charge, and the round is paid anew;
        - where patients of several sites pay at one of them, all sites that were asked pay or none;
        - a correlated run is paid in full by its first round;
        - a refusal tells how much is left to the one who has least, and never how many patients
          there are;
        - nobody has been enrolled: BudgetError, whoever asks.
        """
        guarantee = self._require_guarantee()
        if refused := self._refuse_apart(sites):
            return refused

        owing = [site for site in sites if site not in self._paid[ROUND]]
        charges = {
            site: self._charge(site, round, guarantee.releases[site].event()) for site in owing
        }
        refused = self._charge_all(charges)
        self._paid[ROUND].update(site for site in owing if site not in refused)
        return refused

    def note_answered(self, sites: Iterable[str]) -> None:
        """Note that what these sites paid for has been computed: the next round is paid anew.

        A correlated run is one release: paid in full by its first round.
        """
        if self.guarantee and not self.guarantee.strategy:
            self._paid[ROUND].difference_update(sites)

    def pay_tests(self, asked: Mapping[str, Sequence[str]]) -> dict[str, BudgetError]:
        """Charge held-out patients, by site, for one noised histogram each; return the sites whose
        patients cannot pay.

        It is recorded as randomised response, the worst of all mechanisms of its epsilon with delta
        0. Where the sum of all sites is noised once, a patient of several pays once. Who has paid
        does not pay twice before `note_tested`.
        """
        # Who has not paid yet, and where: at the first site that asks, if all are counted together.
        self._test_ids |= asked
        owing = {site: ids for site, ids in asked.items() if site not in self._paid[TEST]}
        if counted_together(self.study):
            owing = {
                site: [name for name in ids if self._test_payer.setdefault(name, site) == site]
                for site, ids in owing.items()
            }

        event = RandomisedResponse(2, self.study.privacy.evaluation_epsilon)
        charges = {}
        for site, ids in owing.items():
            cohort = self.ledger.enrol(_held_out(site), ids)
            charges[site] = Charge(self.study.study.name, self.run, cohort, 0, TEST, event)

        refused = self._charge_all(charges)
        self._forget_payers(refused)
        self._paid[TEST].update(site for site in charges if site not in refused)
        return refused

    def note_tested(self, sites: Iterable[str]) -> None:
        """Note that these sites' histograms have been made: the next ones are paid anew."""
        made = set(sites)
        self._paid[TEST] -= made
        there = {name for site in made for name in self._test_ids.pop(site, ())}
        self._test_payer = {
            name: site for name, site in self._test_payer.items() if name not in there
        }

    def _forget_payers(self, sites: Collection[str]) -> None:
        """Forget who pays at these sites for held-out patients: elsewhere they are asked to."""
        self._test_payer = {
            name: site for name, site in self._test_payer.items() if site not in sites
        }

    def pay_query(self, label: str, sites: Sequence[str]) -> dict[str, BudgetError]:
        """Charge the training patients of each site for a query; return who cannot pay, or has for
        all that is planned.

        Who has paid does not pay twice before `note_query_answered`. What a crash lost is not
        bought again: the room in the plan is another query's.
        """
        if refused := self._refuse_apart(sites):
            return refused
        event = self._require_guarantee().query_event(label)
        owing = [site for site in sites if site not in self._paid[label]]
        charges = {site: replace(self._charge(site, 0, event), label=label) for site in owing}
        refused = self._charge_all(charges)
        self._paid[label].update(site for site in owing if site not in refused)
        return refused

    def pay_query_held_out(
        self, label: str, asked: Mapping[str, Sequence[str]]
    ) -> dict[str, BudgetError]:
        """Charge held-out patients, by site, for a query that follows from them too; each pays at
        each of its sites.
        """
        event = self._require_guarantee().query_event(label)
        charges = {}
        for site, ids in asked.items():
            if _held_out(site) not in self._paid[label]:
                cohort = self.ledger.enrol(_held_out(site), ids)
                charges[site] = Charge(self.study.study.name, self.run, cohort, 0, label, event)
        refused = self._charge_all(charges)
        self._paid[label].update(_held_out(site) for site in charges if site not in refused)
        return refused

    def note_query_answered(self, label: str, sites: Iterable[str]) -> None:
        """Note that these sites have answered a query: the next one is paid anew."""
        self._paid[label].difference_update(
            party for site in sites for party in (site, _held_out(site))
        )

    def _require_guarantee(self) -> Guarantee:
        if self.guarantee is None:
            raise BudgetError(
                "nobody is enrolled for this run, so nobody can pay; the coordinator must enrol "
                "them first"
            )
        return self.guarantee

    def _refuse_apart(self, sites: Iterable[str]) -> dict[str, BudgetError]:
        """Return why nobody may answer where a patient might pay at a site that was not asked."""
        if not self.shares_patients or set(sites) >= set(self.cohorts):
            return {}
        error = BudgetError(
            f"patients of up to {self.study.privacy.max_sites_per_patient} sites pay at one of "
            "them, and not all sites were asked; nothing was charged. Ask all, or take "
            "privacy.noise='site'."
        )
        return dict.fromkeys(sites, error)

    @property
    def shares_patients(self) -> bool:
        """Whether a patient of one site may pay at another: one noise for both, and one charge."""
        return self.guarantee is not None and self.guarantee.joint and self.guarantee.max_sites > 1

    def _charge_all(self, charges: Mapping[str, Charge]) -> dict[str, BudgetError]:
        """Charge sites all at once;
        where that is refused one by one, or nobody where they share patients.
        """
        limits = self._limits()
        try:
            self.ledger.charge(list(charges.values()), limits)
            return {}
        except BudgetError as error:
            if self.shares_patients:
                return dict.fromkeys(charges, _discreet(error))
        refused: dict[str, BudgetError] = {}
        for site, charge in charges.items():
            try:
                self.ledger.charge([charge], limits)
            except BudgetError as error:
                refused[site] = _discreet(error)
        return refused

    def _paid_kinds(self) -> Counter[tuple[str, str]]:
        """Return how often each site has paid in this run, by (site, label): in every process,
        before a crash too.
        """
        rows = self.ledger.rows()
        return Counter(
            (str(row["site"]), str(row["label"])) for row in rows if row["run"] == self.run
        )

    def uses(self) -> dict[str, int]:
        """Return for how many rounds each site's patients have paid in this run,
        those that a crash lost too.
        """
        return {site: n for (site, label), n in self._paid_kinds().items() if label == ROUND}

    def queries(self) -> dict[str, int]:
        """Return how many queries of each label some site's patients have paid for in this run."""
        most: Counter[str] = Counter()
        for (_, label), answers in self._paid_kinds().items():
            if label not in (ROUND, TEST):
                most[label] = max(most[label], answers)
        return dict(most)

    def report(self) -> JSON:
        """Return what the ledger holds for this study: epsilon of the worst patient over all its
        runs, and its head.

        Under scope = "study" the lifetime budget too, over all studies, and the rule of identity.
        """
        assert self.guarantee is not None
        worst = self.ledger.worst(
            self.study.privacy.delta - self.guarantee.delta_sampler, self.study.study.name
        )
        bound = self.ledger.lifetime
        lifetime = (
            {"epsilon": bound.epsilon, "delta": bound.delta, "identity": bound.identity}
            if bound
            else None
        )
        return {"epsilon_all_runs": worst, "head": self.ledger.head(), "lifetime": lifetime}

    def _charge(self, site: str, round: int, event: Event) -> Charge:
        return Charge(self.study.study.name, self.run, self.cohorts[site], round, ROUND, event)

    def _limits(self) -> Limits:
        privacy = self.study.privacy
        guarantee = self._require_guarantee()
        sampler = guarantee.delta_sampler
        limits = Limits(privacy.epsilon, privacy.delta - sampler, privacy.lifetime_epsilon, sampler)
        planned = {label: one.times for label, one in guarantee.queries.items()}
        if guarantee.accountant != "pld":
            return replace(limits, planned=planned)

        planned |= {ROUND: guarantee.uses, TEST: 1}
        # PLD is no filter; its plan is fixed instead, whatever the coordinator calls the run
        return replace(limits, epsilon=math.inf, planned=planned, alone=True)


def _held_out(site: str) -> str:
    """Return under which name the held-out patients of a site are enrolled."""
    return f"{site} (test)"


def _discreet(error: BudgetError) -> BudgetError:
    """Return a refusal fit to leave the site: its number of patients is in its own log alone."""
    logger.warning("%s", error)
    return BudgetError(re.sub(r"\d+ of \d+ patients", "patients", str(error)))
