"""Events in words: for the live page's log, for spans, and as lines for what collects logs."""

from collections.abc import Sequence
from typing import Any, Literal, TextIO

import structlog

from medfed.core.checks import some, those
from medfed.monitor.events import (
    Compared,
    Event,
    GivenUp,
    Planned,
    RangesFound,
    Resumed,
    RolledBack,
    RoundFinished,
    RunFinished,
    RunStarted,
    SecurityAudit,
    SiteExcluded,
    Tested,
    Voted,
    Warned,
    group_alike,
    name_of,
)

SCORES = ("auroc", "accuracy", "r2", "rmse")  # the first that a run measures stands for a test


def sentence(event: Event, named: bool = True) -> str:
    """Return an event in words; empty where the tables say it. A fleet of devices is not named."""
    match event:
        case RunStarted():
            return f"{event.study} began: {event.rounds} rounds"
        case Planned():
            return f"planned: {event.algorithm}, {event.model}, {len(event.sizes)} participants"
        case RangesFound():
            ends = [f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in event.ranges.items()]
            noise = f"noise of sd {event.noise_sd:.3g} patients on each count"
            return (
                f"ranges found from noised counts of training patients ({noise}): {some(ends, 8)}"
            )
        case Warned():
            return f"warning: {event.text}"
        case SiteExcluded():
            if named:
                return f"round {event.round}: without {event.site}: {event.reason}"
        case RoundFinished():
            return f"round {event.round}: {len(event.clients)} took part, {event.seconds:.3f} s"
        case RolledBack():
            return f"round {event.round} was taken back: its loss on the public table grew too much"
        case GivenUp():
            return f"round {event.round} was given up by {event.operator}: {event.reason}"
        case SecurityAudit():
            who = event.client if named else "a device"
            return f"round {event.round}: {event.action}, {who}: {'; '.join(event.evidence)}"
        case Tested():
            shown = {
                n: f.value
                for n, f in event.all_sites.items()
                if n in SCORES and f.value is not None
            }
            figures = ", ".join(f"{name} {value:.4f}" for name, value in shown.items())
            return f"{event.model} model tested after round {event.round}: {figures}"
        case Compared():
            if event.own_better.value is not None:
                return f"sites' own models err less by {event.own_better.value:.4g} a record"
        case Voted():
            return (
                f"{event.own_better.value:.1f} of {event.sites} votes of sites for models of "
                "their own (noise included)"
            )
        case Resumed():
            note = f" ({event.note})" if event.note else ""
            return f"resumed after round {event.round}{note}"
        case RunFinished():
            why = f": {event.reason}" if event.reason else ""
            return f"{event.status} after {event.rounds} rounds{why}"

    return ""


class LeftOut:
    """Holds the sites that a round goes on without until something else happens:
    an equal reason is told once.
    """

    def __init__(self) -> None:
        self._held: list[SiteExcluded] = []

    def before(self, event: Event) -> list[SiteExcluded]:
        """Take in the next event; return what is told before it. One that is held is told later."""
        if isinstance(event, SiteExcluded):
            self._held.append(event)
            return []
        held = self._held
        self._held = []
        return merge_alike(held)


def merge_alike(held: Sequence[SiteExcluded]) -> list[SiteExcluded]:
    """Return the events, those of a round that share a reason as one whose site is all of them: "9
    sites, a, ...".
    """
    found: list[SiteExcluded] = []
    for (round, reason), events in group_alike(held).items():
        if len(events) < _MANY:
            found.extend(events)
        else:
            found.append(SiteExcluded(round, those([event.site for event in events]), reason))
    return found


_MANY = 3
"""Sites that share a reason and are told together."""


class Structured:
    """A listener that writes each event as one line of JSON or of key=value text,
    for whatever collects logs.
    """

    def __init__(self, stream: TextIO, form: Literal["json", "text"]) -> None:
        renderers: dict[str, Any] = {
            "json": structlog.processors.JSONRenderer,
            "text": structlog.processors.KeyValueRenderer,
        }
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        self._log = structlog.wrap_logger(
            structlog.PrintLogger(stream),
            processors=[structlog.processors.add_log_level, stamp, renderers[form]()],
            wrapper_class=structlog.BoundLogger,
        )
        self._named = True
        self._left_out = LeftOut()

    def __call__(self, event: Event) -> None:
        """Write one event: its kind, its round, and what it says in words; sites left out before
        what comes next.
        """
        if isinstance(event, Planned):
            self._named = not event.devices
        for one in self._left_out.before(event):
            self._write(one)
        if not isinstance(event, SiteExcluded):
            self._write(event)

    def _write(self, event: Event) -> None:
        text = sentence(event, self._named)
        if not text:
            return
        fields: dict[str, Any] = {"kind": name_of(event)}
        if hasattr(event, "round"):
            fields["round"] = event.round
        if isinstance(event, Warned | SiteExcluded | RolledBack | GivenUp | SecurityAudit):
            self._log.warning(text, **fields)
        else:
            self._log.info(text, **fields)
