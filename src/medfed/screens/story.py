"""A run's story: its events by kind, and what lies beside the log. All that is shown of a run is a
function of it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medfed.core.checks import RunError
from medfed.monitor import events
from medfed.monitor.events import Event, Inspected, Planned, Resumed, Tested
from medfed.monitor.summary import Tally

POINTS = 1000  # of a curve; of more, each stretch keeps its lowest and highest
SHOWN = 200  # sites that are named
LEVELS = ("none", "low", "elevated", "high", "critical")


class Story(Tally):
    """A run's events by kind, with its claim and the length of its trail.
    cut: the log ends within a line.

    `tests` of the model that the run is about, and `inspected`, by round. `sites`: those that are
    named, none of a fleet of devices, `SHOWN` of many.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tests: dict[int, Tested] = {}
        self.inspected: dict[int, Inspected] = {}
        self.sites: list[str] = []
        self.cut = False
        self.trail = 0
        self.claim: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, folder: Path) -> "Story":
        """Read a run's folder; raises RunError where there is no log, or one of a newer schema."""
        log = folder / "events.jsonl"
        recorded = list(events.read(log))
        if not recorded:
            raise RunError(f"{log} tells nothing yet; wait for the run to begin")
        found = cls.from_events(recorded)
        with open(log, "rb") as file:
            file.seek(-1, os.SEEK_END)
            found.cut = file.read() != b"\n"
        found.read_beside(folder)
        return found

    def read_beside(self, folder: Path) -> None:
        """Take in what lies beside the log: the claim, and how long the signed trail is."""
        claim = folder / "privacy.json"
        trail = folder / "trail" / "trail.jsonl"
        self.claim = json.loads(claim.read_text(encoding="utf-8")) if claim.exists() else None
        self.trail = len(trail.read_bytes().splitlines()) if trail.exists() else 0

    @classmethod
    def from_events(cls, recorded: Iterable[Event]) -> "Story":
        """Return the story that events tell."""
        story = cls()
        for event in recorded:
            story.add(event)
        return story

    def add(self, event: Event) -> None:
        """Take in the next event."""
        super().add(event)
        match event:
            case Planned():
                self.sites = [] if event.devices else list(event.sizes)[:SHOWN]
            case Tested(model=model) if model == self.main:
                self.tests[event.round] = event
            case Inspected():
                self.inspected[event.round] = event
            case Resumed(round=last):
                self.tests = {number: one for number, one in self.tests.items() if number <= last}
                self.inspected = {
                    number: one for number, one in self.inspected.items() if number <= last
                }

    @property
    def baselines(self) -> dict[str, Tested]:
        """The last test of each model that the run is measured against."""
        return {name: one for name, one in self.latest.items() if name != self.main}

    def last_test(self) -> Tested | None:
        """Return the newest test of the model that the run is about."""
        return self.tests[max(self.tests)] if self.tests else None

    def left_out(self) -> Counter[str]:
        """Return how often each site did not count."""
        return Counter(one.site for one in self.excluded)

    def seconds(self) -> dict[str, list[float]]:
        """Return each site's seconds, round by round that it took part in."""
        found: dict[str, list[float]] = {}
        for one in self.rounds.values():
            for name, seconds in zip(one.clients, one.site_seconds, strict=True):
                found.setdefault(name, []).append(seconds)
        return found

    def suspicion(self) -> dict[str, dict[int, float]]:
        """Return each site's strongest score by round, of the rounds that a rule inspected."""
        found: dict[str, dict[int, float]] = {}
        for number, one in self.inspected.items():
            for client in one.weights:
                found.setdefault(client, {})[number] = 0.0
            for finding in one.findings:
                mine = found.setdefault(str(finding["client"]), {})
                mine[number] = max(mine.get(number, 0.0), float(str(finding["score"])))
        return found


def thin(points: Mapping[int, float | None], most: int = POINTS) -> list[tuple[int, float]]:
    """Return at most about `most` points of a curve:
    of each stretch the lowest and the highest, and both ends.
    """
    known = [(t, float(value)) for t, value in sorted(points.items()) if value is not None]
    if len(known) <= most:
        return known
    width = -(-2 * len(known) // most)
    kept = {0, len(known) - 1}
    for start in range(0, len(known), width):
        stretch = range(start, min(start + width, len(known)))
        kept |= {min(stretch, key=lambda i: known[i][1]), max(stretch, key=lambda i: known[i][1])}
    return [known[i] for i in sorted(kept)]
