"""The learning rate of a run that chose it: eased where the training loss grows."""

import statistics
from collections.abc import Iterable

from medfed.learn.algorithms import Server
from medfed.monitor import events
from medfed.monitor.events import Log
from medfed.planning import rates
from medfed.planning.plan import Plan
from medfed.planning.rates import Pace


def replay_pace(recorded: Iterable[events.Event], plan: Plan) -> Pace:
    """Return the training losses of the rounds that a resumed run has behind it."""
    losses = {event.round: event for event in recorded if isinstance(event, events.RoundFinished)}
    pace = Pace()
    for _, event in sorted(losses.items()):
        pace, _ = pace.step(_common_loss(event, plan), len(event.clients) == len(plan.participants))
    return pace


def _common_loss(event: events.RoundFinished, plan: Plan) -> float | None:
    """Return a round's training loss;
    where sites may lie the median of theirs, so that no liar can slow all down.
    """
    told = [loss for loss in event.losses if loss is not None]
    if plan.malicious and told:
        return statistics.median(told)
    return event.loss


def ease(server: Server, pace: Pace, plan: Plan, log: Log) -> tuple[Server, Pace]:
    """Tell where a round's training loss has grown;
    a rate that was chosen is halved then, one that was set stays.

    Under a claim, and where nobody sees a site's loss, there is nothing to go by.
    """
    last = log.latest.get(events.RoundFinished)
    if (
        plan.guarantee
        or plan.study.security.aggregation != "plain"
        or not isinstance(last, events.RoundFinished)
    ):
        return server, pace
    if last.round != server.round:
        return server, pace
    loss = _common_loss(last, plan)
    following, grew = pace.step(loss, len(last.clients) == len(plan.participants))
    if not grew:
        return server, following
    now = "no number" if loss is None else f"{loss:.3g}"
    what = f"round {last.round}: the training loss grew to {now}"
    if pace.lowest is not None:
        what += f", from {pace.lowest:.3g} at its lowest"

    if plan.chosen:
        server = rates.halve(server)
        log.emit(
            events.Warned(
                f"{what}; the learning rate is halved to {float(server.slots['rate']):.3g}"
            )
        )
    else:
        rate = plan.study.training.learning_rate
        log.emit(events.Warned(f"{what}. Lower training.learning_rate={rate:g}, or leave it out"))

    return server, following
