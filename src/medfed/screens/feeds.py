"""The runs of a folder, each log read once for all who watch it."""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from medfed.core.checks import RunError, plain
from medfed.monitor.events import Event
from medfed.screens import dashboards
from medfed.screens.live import Tail
from medfed.screens.story import Story
from medfed.screens.view import Live, Narrowing

T = TypeVar("T")

EVERY = 0.05  # seconds between two looks at a log that somebody watches
KEPT = 16  # runs whose events stay in memory


class Feed:
    """A run's log, read once for all who watch it; `version` grows with each change."""

    def __init__(self, folder: Path, site: str = "") -> None:
        self.folder = folder
        self.site = site
        self.version = 0
        self.data = ""
        self._lock = threading.Lock()
        self._next = 0.0
        self._live = Live()
        self._tail = Tail(folder / "events.jsonl")
        self._trouble = ""
        self._narrow = self._make_narrow()
        self._pages: dict[str, tuple[int, bytes]] = {}

    @property
    def shown(self) -> bool:
        """Whether this server may show the run: a site's shows the runs that know the site."""
        return self._narrow is None or self._narrow.concerned

    def _make_narrow(self) -> Narrowing | None:
        """Return what leaves out other sites' parts; None where all may be seen."""
        return Narrowing(self.site) if self.site else None

    def ask(self, question: Callable[[Story], T]) -> T:
        """Return what a function of the story gives, while nobody adds to it."""
        with self._lock:
            return question(self._live.story)

    def view(self) -> dict[str, Any]:
        """Return what the live page shows."""
        return {"version": self.version, **self._live.view(), "trouble": self._trouble}

    def refresh(self) -> None:
        """Take in what was written since the last look,
        at most every `EVERY` seconds; blocks while it reads.
        """
        with self._lock:
            if time.monotonic() < self._next:
                return
            began = time.monotonic()
            changed = False
            while self._step():
                changed = True
            if changed or not self.version:
                self.version += 1
                self._beside()
                self.data = json.dumps(self.view())
            cost = time.monotonic() - began
            self._next = time.monotonic() + max(EVERY, 10 * cost if changed else 0)

    def _step(self) -> bool:
        """Read once; return whether there was something new."""
        try:
            told, restarted = self._tail.read()
        except RunError as error:
            changed = self._trouble != str(error)
            self._trouble = str(error)
            return changed

        if restarted:
            self._live = Live()
            self._narrow = self._make_narrow()

        if told or restarted:
            self._trouble = ""
        for one in told:
            event: Event | None = one.event
            if self._narrow:
                event = self._narrow(one.event)
            if event:
                self._live.add(one._replace(event=event))

        return bool(told)

    def _beside(self) -> None:
        try:
            self._live.story.read_beside(self.folder)
        except (OSError, ValueError) as error:  # being written, or damaged
            self._trouble = f"what lies beside the log cannot be read yet ({plain(error)})"

    def page(self, name: str) -> bytes:
        """Return one of the pages of `medfed report`, made from what has been read so far."""
        with self._lock:
            made, page = self._pages.get(name, (0, b""))
            if made != self.version:
                page = dashboards.page(self._live.story, name).encode()
                self._pages[name] = self.version, page
            return page


@dataclass
class Runs:
    """The runs of a folder, or the one run that the folder is."""

    folder: Path
    site: str = ""
    _feeds: OrderedDict[str, Feed] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> list[str]:
        """Return the runs' names, the newest first."""
        return list(self._newest())

    def _newest(self) -> dict[str, Path]:
        places = self._places()
        return {
            name: places[name]
            for name in sorted(places, key=lambda name: -_written_at(places[name]))
        }

    def _places(self) -> dict[str, Path]:
        if (self.folder / "events.jsonl").is_file():
            return {self.folder.resolve().name: self.folder}
        try:
            return {
                one.name: one for one in self.folder.iterdir() if (one / "events.jsonl").is_file()
            }
        except OSError as error:
            raise RunError(f"{self.folder} cannot be read: {error.strerror}") from error

    def feed(self, name: str) -> Feed | None:
        """Return a run's feed, read up to now;
        None for a name that is none of the folder's, or not to be shown.
        """
        place = self._places().get(name)
        if place is None:
            return None
        with self._lock:
            if name not in self._feeds:
                self._feeds[name] = Feed(place, self.site)
            feed = self._feeds[name]
            self._feeds.move_to_end(name)
            while len(self._feeds) > KEPT:
                self._feeds.popitem(last=False)
        feed.refresh()
        return feed if feed.shown else None

    def summaries(self) -> dict[str, Mapping[str, Any]]:
        """Return what each run came to: from summary.json where it has ended, else from its log."""
        found: dict[str, Mapping[str, Any]] = {}
        for name, place in self._newest().items():
            if (summary := _read_summary(place)) is None:
                feed = self.feed(name)
                summary = feed.ask(lambda story: story.summary) if feed else None
            if summary and (not self.site or self.site in summary["sites"]):
                found[name] = summary
        return found


def _written_at(place: Path) -> float:
    return (place / "events.jsonl").stat().st_mtime


def _read_summary(place: Path) -> Mapping[str, Any] | None:
    """Return summary.json, unless the log was written to since."""
    path = place / "summary.json"
    try:
        if path.stat().st_mtime < _written_at(place):
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(summary, dict) and {"study", "status", "sites"} <= summary.keys():
        return summary
    return None
