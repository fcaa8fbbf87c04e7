"""A run driven from its first round to its summary, by messages alone."""

import dataclasses
import json
import logging
import math
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from medfed.compliance.trail import Trail
from medfed.core import files
from medfed.core.checks import (
    BudgetError,
    QuorumError,
    some,
)
from medfed.core.types import JSON
from medfed.learn import zoo
from medfed.learn.algorithms import Server
from medfed.monitor import events
from medfed.monitor.events import Log
from medfed.monitor.summary import main_model, summarise
from medfed.planning.building import build_model
from medfed.planning.foretell import paid_test
from medfed.planning.plan import Plan
from medfed.privacy.statement import Statement
from medfed.rounds import aggregation as ways
from medfed.rounds import checkpoints
from medfed.rounds.aggregation import Keys, bears, who_sees
from medfed.rounds.masked import Masked
from medfed.rounds.plain import PLAIN
from medfed.rounds.rollback import Rollback
from medfed.rounds.round import ask_of, decide, run_round, test, vote
from medfed.rounds.shared import Shared
from medfed.rounds.way import Way, read_rounds, record_given_up
from medfed.runs import claims, sealing
from medfed.runs.folders import MODEL, versions, write_checkpoint, write_model
from medfed.runs.giving_up import refuse_opened
from medfed.runs.pacing import ease, replay_pace
from medfed.runs.quarantine import judge, replay_watch, take_overrides
from medfed.runs.results import Result
from medfed.runs.simulation import Parties, Simulation
from medfed.runs.standing import FRESH, Standing
from medfed.runs.statements import hear_statements

logger = logging.getLogger(__name__)


class Drive:
    """A coordinator driving one run to its end. It knows other parties by their messages alone."""

    def __init__(
        self,
        plan: Plan,
        parties: Parties,
        server: Server,
        log: Log,
        run: str,
        folder: Path | None = None,
        standing: Standing = FRESH,
    ) -> None:
        """Set up the drive of a run that is enrolled, from the state `server`; `folder` None keeps
        nothing. `standing`: in what a resumed run stands.
        """
        self.plan = plan
        self.study = plan.study
        self.parties = parties
        self.fleet = standing.fleet(parties.fleet)
        self.server = server
        self.log = log
        self.run = run
        self.folder = folder
        self.budget = plan.budget()
        self.budget.leave(plan.away)
        self.model = main_model(plan.study.training.algorithm)
        self.told: dict[str, Statement] = {}  # by site: the last that it told of its ledger
        self.heads: dict[str, str] = {}  # and its head since, which every checkpoint asks for
        self.aggregation: Way = PLAIN
        self.watch = replay_watch(plan, log)
        self.standing = standing
        self.heads |= standing.heads
        self.gate = Rollback.of(plan)
        self.pace = replay_pace(log.events(), plan)

    def to_the_end(
        self, keys: Keys | None = None, known: Collection[type[events.Event]] = ()
    ) -> Result:
        """Run the rounds that are left, test, vote,
        measure the baselines, and write down what came of it.

        `known`: what the log already tells of the last model, paid for by patients.
        """
        began = time.perf_counter()
        reason = ""
        self.introduce(keys)
        self.remove_earlier_end()
        self.count_the_paid(known)

        try:
            while self.server.round < self.study.training.rounds:
                if decided := self.standing.given_up.get(self.server.round + 1):
                    self.skip_round(decided)
                else:
                    self.play_round()
            self.ask_for_figures(known)
            self.measure_baselines()
        except (QuorumError, BudgetError) as error:
            reason = str(error)

        self.finish(reason, time.perf_counter() - began)
        return self.write()

    def introduce(self, keys: Keys | None) -> None:
        """Have all parties join the run, each by its own study; keep how far the trail goes."""
        keys = keys or ways.identify(self.plan, self.fleet, self.parties.aggregators or None)
        self.aggregation = ways.introduce(
            self.plan,
            self.fleet,
            self.run,
            self.folder,
            keys,
            self.server.round,
            self.standing.signed,
        )
        if self.folder and self.trail:
            more = checkpoints.vouch(self.server, self.trail)
            more["away"] = dict(self.standing.since)
            checkpoints.amend(self.folder / "checkpoints", self.server.round, more)

    @property
    def trail(self) -> Trail | None:
        """Where the way records what it opens."""
        return self.aggregation.trail

    def remove_earlier_end(self) -> None:
        """Remove what an earlier end of the run came to: from here on patients may pay for more
        than that claim tells. The log and the checkpoints hold all of it, and the next end writes
        it anew.
        """
        if self.folder is None:
            return
        for name in (sealing.SUMMARY, sealing.CLAIM, MODEL):
            path = self.folder / name
            with files.explained(path):
                path.unlink(missing_ok=True)

    def count_the_paid(self, known: Collection[type[events.Event]]) -> None:
        """Count what patients have paid for before: by the rounds behind, by what is `known`, and
        by their ledgers.
        """
        for number in range(1, self.server.round + 1):
            self.budget.charge(number, self.plan.on_turn(number))
        queries = self.plan.guarantee.queries if self.plan.guarantee else {}
        if "ranges" in queries and self.plan.encoding.found_ranges():
            for _ in range(queries["ranges"].times):
                self.budget.ask("ranges")
        for event, label in ((events.Tested, "threshold"), (events.Voted, "vote")):
            if event in known and label in queries:
                self.budget.ask(label)
        self.hear_ledgers()

    def hear_ledgers(self) -> list[str]:
        """Have sites tell of their ledgers, and count what was paid for;
        the last word of a silent one stands. Return the silent ones.
        """
        heard = self.hear(whole=True)
        self.told |= heard
        asked: Counter[str] = Counter()
        for one in self.told.values():
            asked |= Counter(one.queries)
        self.budget.take_over({name: one.uses for name, one in self.told.items()}, asked)
        return [name for name in self.plan.participants if name not in heard]

    def hear(self, whole: bool) -> dict[str, Statement]:
        """Return what sites tell of their ledgers, `whole` or the head alone; keep the heads."""
        told, refused = hear_statements(self.plan, self.fleet, None, whole)
        for name, why in refused.items():
            logger.warning("site %r tells nothing of its ledger: %s", name, why)
        self.take_down(told)
        return told

    def take_down(self, told: Mapping[str, Statement]) -> None:
        """Keep the heads of what sites have told; and of who tells nothing else, all of it."""
        for name, one in told.items():
            self.heads[name] = one.head
            self.told.setdefault(name, one)

    def play_round(self) -> None:
        """Run one round, judge what its rows say, and keep its state."""
        study = self.study
        log = self.log
        self.watch = take_overrides(
            self.watch, self.plan, self.run, self.folder, self.server.round, log
        )
        before = self.server
        out = self.watch.out(before.round + 1)
        self.server = run_round(
            before, self.plan, self.fleet, self.budget, log, self.aggregation, out
        )
        self.watch = judge(self.watch, log)
        if self.gate:
            self.server = _roll_back(self.gate, before, self.server, log)
        self.server, self.pace = ease(self.server, self.pace, self.plan, log)
        every = study.monitor.evaluate_every
        if every and self.server.round % every == 0 and self.server.round < study.training.rounds:
            test(self.server, self.plan, self.fleet, log, self.model)
        self.checkpoint()

    def skip_round(self, decided: events.GivenUp) -> None:
        """Count a round that was given up as spent, with the model as it was, in budget, trail and
        log; nothing is tested after it, as nothing has changed. Raises as `refuse_opened` does.

        A crash before the checkpoint leaves the round before: it is then skipped again, alike.
        """
        number = decided.round
        way = self.aggregation
        assert isinstance(way, Masked | Shared) and self.folder and way.trail
        refuse_opened(self.folder, self.study, number, read_rounds(way.trail.path))
        self.budget.write_off(number, self.plan.on_turn(number))
        facts = {"operator": decided.operator, "reason": decided.reason}
        question = ask_of(self.server, self.plan)
        record_given_up(way.trail, way.publisher, number, question, facts)
        self.log.emit(decided)
        self.server = replace(self.server, round=number)
        self.checkpoint()

    def checkpoint(self) -> None:
        """Let the sites write down what they remember, then commit:
        a crash between leaves the round before.
        """
        if self.folder is None:
            return
        self.hear(whole=False)
        write_checkpoint(
            self.folder,
            self.server,
            self.plan,
            self.fleet,
            self.log,
            self.heads,
            self.trail,
            self.standing.away_since,
        )

    def ask_for_figures(self, known: Collection[type[events.Event]]) -> None:
        """Have the last model tested and voted on, where the log does not tell of it yet."""
        if self.study.monitor.evaluate_every and events.Tested not in known:
            decision = decide(self.server, self.plan, self.fleet, self.budget, self.log)
            test(
                self.server,
                self.plan,
                self.fleet,
                self.log,
                self.model,
                intervals=True,
                decision=decision,
            )
        if events.Voted not in known:
            vote(self.server, self.plan, self.fleet, self.budget, self.log)

    def measure_baselines(self) -> None:
        """Measure what the federation is held against, where one can and no claim forbids it."""
        study = self.study
        # trained and tested without noise
        public = study.privacy.scope == "run" and study.data.test_is_public
        if self.plan.guarantee is not None and not public:
            return
        asked = (
            study.monitor.baselines and study.monitor.evaluate_every and self.model == "federated"
        )
        if asked and self.parties.baselines:
            self.parties.baselines.measure(self.plan, self.server, self.log)

    def finish(self, reason: str, seconds: float) -> None:
        """Tell how the run ended, by what the sites' ledgers hold, however it came to that.

        Guarantee: the claim counts all that a site has paid for, also where its answer came late,
        got lost or was never made. A site answers questions in their order, so that what it tells
        now is all that it was asked before; of one that tells nothing the worst is assumed.
        """
        self.budget.assume(self.hear_ledgers())
        recorded = self.log.events()
        reason = reason or _find_missing(recorded)
        self.log.emit(
            events.RunFinished(
                status="incomplete" if reason else "complete",
                rounds=self.server.round,
                seconds=round(seconds, 3),
                reason=reason,
                privacy=self.budget.claim(),
                spread=self.budget.spread(),
            )
        )

    def write(self) -> Result:
        """Write model, trail, claim and summary, and return what the run came to."""
        summary = summarise(self.log.events())
        plan = self.plan
        folder = self.folder
        kept = zoo.select_fixed(build_model(plan.study, plan.encoding))
        if folder:
            write_model(folder, self.server, plan, kept, summary["decision"])
            claim = self.write_claim(folder)
            # The end binds all that pages are made of, so the log must be on disk before it.
            self.log.offset()
            if self.trail:
                end = sealing.describe_end(folder, self.server.round, summary, claim)
                self.trail.append("finished", end)
                summary["trail"] = self.trail.tell_head()
            files.write(folder / sealing.SUMMARY, json.dumps(summary, indent=2, allow_nan=False))
        return Result(summary, self.study, plan.encoding, self.server.released_P, folder, kept)

    def write_claim(self, folder: Path) -> JSON | None:
        """Write what the run guarantees, and return it; None where nothing was asked for."""
        if not self.plan.guarantee:
            return None
        told = {name: replace(one, head=self.heads[name]) for name, one in self.told.items()}
        claim = claims.claim(self.plan, self.budget, told, isinstance(self.parties, Simulation))
        files.write(folder / sealing.CLAIM, json.dumps(claim, indent=2, allow_nan=False))
        return claim


def _find_missing(recorded: Sequence[events.Event]) -> str:
    """Return why a run that came to its end is not all that was asked for; empty where it is."""
    given_up = sorted({event.round for event in recorded if isinstance(event, events.GivenUp)})
    found = []
    if given_up:
        found.append(f"rounds given up: {some(given_up)}")
    if any(isinstance(event, events.SiteExcluded) for event in recorded):
        found.append("some sites were left out of some rounds")
    return "; ".join(found)


def _roll_back(gate: Rollback, before: Server, after: Server, log: Log) -> Server:
    """Return the round's state, or the one before where the gate takes the round back."""
    stands, was, now = gate.passes(before, after)
    if stands:
        return after
    log.emit(events.RolledBack(after.round, was, now if math.isfinite(now) else None))
    return dataclasses.replace(before, round=after.round)


def tell_start(plan: Plan, log: Log, told: Sequence[events.Event]) -> None:
    """Tell what a run is, and what was `told` of its ranges and ledger before."""
    study = plan.study
    training = plan.study.training
    machine: dict[str, str | int] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    log.emit(
        events.RunStarted(
            study=study.study.name,
            purpose=study.study.purpose,
            digest=study.digest(),
            seed=study.study.seed,
            rounds=training.rounds,
            versions=versions(),
            machine=machine,
        )
    )

    positive = ""
    threshold = ""
    if plan.encoding.target.task == "binary":
        positive = plan.encoding.target.labels[1]
        threshold = study.data.threshold
    rate = training.learning_rate
    why = ""
    if plan.chosen:
        rate = plan.chosen.rate
        why = plan.chosen.why()
    log.emit(
        events.Planned(
            algorithm=training.algorithm,
            model=study.model.name,
            parameters=plan.parameters,
            features=len(plan.encoding.names()),
            message=plan.message,
            path=plan.path,
            sizes=plan.sizes,
            labels=plan.label_counts,
            privacy=plan.budget().claim(),
            bytes_up=plan.bytes_up,
            bytes_down=plan.bytes_down,
            sees=who_sees(plan),
            bears=bears(plan),
            positive=positive,
            threshold=threshold,
            chosen=study.choices(),
            learning_rate=rate,
            rate_chosen=why,
        )
    )
    for event in (*told, *map(events.Warned, [*plan.warnings, *_void_test(plan)])):
        log.emit(event)


def _void_test(plan: Plan) -> Iterator[str]:
    """Yield that the test that held-out patients pay for will tell hardly anything,
    before anybody has paid.
    """
    paid = paid_test(plan)
    if paid:
        void = [f"{float(share):.0%}" for share, told in paid.intervals.items() if told is None]
    else:
        void = []
    if paid and void:
        yield (
            f"the test that about {paid.held_out} held-out patients pay for "
            f"(privacy.evaluation_epsilon={paid.epsilon:g}) will hardly tell anything where "
            f"{some(void)} are positive: too much noise. Hold out more, raise it, or test on "
            "public patients (data.test_is_public)"
        )
