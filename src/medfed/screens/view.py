"""What the live page shows of a run, as numbers: a function of the events so far.

A site's page is the same function of fewer events: `Narrowing` leaves out what events say of other
sites.
"""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from medfed.monitor import verdict
from medfed.monitor.events import (
    Compared,
    Event,
    Inspected,
    Planned,
    RoundFinished,
    RoundStarted,
    RunFinished,
    SecurityAudit,
    SiteExcluded,
    Stamped,
    Tested,
    Warned,
)
from medfed.screens.sentences import SCORES, sentence
from medfed.screens.story import LEVELS, Story, thin

LINES = 100  # of the log that the page shows
ROUNDS = 20  # in the table of rounds
POINTS = 300  # of a curve
OTHERS = "[about another site]"


class Live:
    """A run's story with its last lines and the time of the last event."""

    def __init__(self) -> None:
        self.story = Story()
        self.lines = deque[tuple[str, str]](maxlen=LINES)
        self.last: datetime | None = None

    def add(self, told: Stamped) -> None:
        """Take in the next event."""
        self.story.add(told.event)
        self.last = told.time
        if text := sentence(told.event, bool(self.story.sites)):
            self.lines.append((f"{told.time:%H:%M:%S}", text))

    def view(self) -> dict[str, Any]:
        """Return what the page shows, ready for JSON."""
        story = self.story
        s = self.story.summary
        last = story.last_test()
        name = next((n for n in SCORES if last and n in last.all_sites), "")
        rounds = [story.rounds[t] for t in sorted(story.rounds)]
        score = {
            t: one.all_sites[name].value for t, one in story.tests.items() if name in one.all_sites
        }
        suspects = [one["site"] for one in s["suspects"]]
        warnings = s["warnings"][:20]
        if story.finished:
            warnings = [*verdict.lines(s), *warnings]

        return {
            "study": s["study"],
            "status": s["status"] if story.finished else "no end yet",
            "reason": s["reason"] or "",
            "last": self.last.strftime("%Y-%m-%d %H:%M:%S UTC") if self.last else None,
            "rounds": s["rounds"],
            "rounds_asked": s["rounds_asked"],
            "score": {"name": name, "value": score.get(max(score, default=0))},
            "test": s["test"],
            "privacy": s["privacy"],
            "seconds_per_round": s["seconds"]["per_round"],
            "bytes": s["bytes"],
            "participants": len(s["sites"]),
            "sites": self._sites(),
            "curves": {
                "score": thin(score, POINTS),
                "loss": thin({one.round: one.loss for one in rounds}, POINTS),
                "seconds": thin({one.round: one.seconds for one in rounds}, POINTS),
            },
            "recent": [
                {
                    "round": one.round,
                    "clients": len(one.clients),
                    "loss": one.loss,
                    "score": score.get(one.round),
                    "seconds": one.seconds,
                    "epsilon": one.privacy.get("epsilon"),
                }
                for one in rounds[: -ROUNDS - 1 : -1]
            ],
            "suspects": suspects if story.sites else len(suspects),
            "warnings": warnings,
            "log": list(self.lines),
        }

    def _sites(self) -> list[dict[str, Any]]:
        story = self.story
        s = self.story.summary
        left_out = story.left_out()
        done = {one.client: one.action for one in story.audits}
        threat = {
            one["site"]: f"{LEVELS[one['level']]}; last: {done[one['site']]}"
            for one in s["suspects"]
        }
        last: dict[str, tuple[float | None, float | None]] = {}

        if story.rounds:
            newest = story.rounds[max(story.rounds)]
            told = zip(newest.clients, newest.losses, newest.site_seconds, strict=True)
            last = {name: (loss, seconds) for name, loss, seconds in told}

        sizes = story.planned.sizes if story.planned else {}
        return [
            {
                "site": name,
                "train": sizes[name]["train"],
                "test": sizes[name]["test"],
                "rounds": s["participation"].get(name, 0),
                "left_out": left_out[name],
                "loss": last.get(name, (None, None))[0],
                "seconds": last.get(name, (None, None))[1],
                "threat": threat.get(name, LEVELS[0]),
            }
            for name in story.sites
        ]


class Narrowing:
    """Leaves in events what a site may see: what is told of all together, and what is its own.

    Figures over all sites stay. Texts that name another site are withheld, and so are other sites'
    sizes, losses, times, tests and suspicions. `concerned` is False where the run does not know the
    site.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.concerned = False
        self._others: re.Pattern[str] | None = None

    def __call__(self, event: Event) -> Event | None:
        """Return the event without other sites' parts; None where nothing is left."""
        match event:
            case Planned():
                self.concerned = self.site in event.sizes
                if others := [re.escape(name) for name in event.sizes if name != self.site]:
                    self._others = re.compile(rf"(?<!\w)(?:{'|'.join(others)})(?!\w)")
                sizes = self._keep_own(event.sizes)
                labels = self._keep_own(event.labels)
                return replace(
                    event, sizes=sizes, labels=labels, rate_chosen=self._withhold(event.rate_chosen)
                )
            case RoundStarted():
                return replace(event, clients=[name for name in event.clients if name == self.site])
            case RoundFinished():
                mine = [i for i, name in enumerate(event.clients) if name == self.site]
                return replace(
                    event,
                    clients=[event.clients[i] for i in mine],
                    losses=[event.losses[i] for i in mine],
                    site_seconds=[event.site_seconds[i] for i in mine],
                    steps=[event.steps[i] for i in mine],
                )
            case Inspected():
                findings = [one for one in event.findings if one["client"] == self.site]
                kept = [
                    one | {"evidence": self._withhold(str(one["evidence"]))}
                    for one in map(dict, findings)
                ]
                return replace(event, weights=self._keep_own(event.weights), findings=kept)
            case Tested():
                return replace(
                    event,
                    per_site=self._keep_own(event.per_site),
                    site_n=self._keep_own(event.site_n),
                )
            case Compared():
                return replace(event, sites=self._keep_own(event.sites))
            case SiteExcluded(site=name) | SecurityAudit(client=name) if name != self.site:
                return None
            case SiteExcluded(reason=text):
                return replace(event, reason=self._withhold(text))
            case SecurityAudit(evidence=evidence):
                return replace(event, evidence=list(map(self._withhold, evidence)))
            case Warned(text=text):
                return Warned(self._withhold(text))
            case RunFinished(reason=text):
                return replace(event, reason=self._withhold(text))

        return event

    def _keep_own(self, by_site: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in by_site.items() if name == self.site}

    def _withhold(self, text: str) -> str:
        if self._others and self._others.search(text):
            return OTHERS
        return text
