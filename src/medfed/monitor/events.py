"""The event log: everything printed, summarised or drawn is a function of it.

One JSON object a line, written when it happens: `schema`, `event`, `time` (UTC), then the event's
fields. Schema 1. A field may be added within a schema; a renamed or removed one raises it. No event
holds anything of one patient.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from medfed.core import files
from medfed.core.checks import RunError, printable, strip_name
from medfed.monitor.metrics import Figure

SCHEMA = 1


@dataclass(frozen=True)
class Event:
    """Base of all events; the class name in snake case is the event's name."""


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins. digest: sha256 of the study; machine: processor kind and threads."""

    study: str
    purpose: str
    digest: str
    seed: int
    rounds: int
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]


@dataclass(frozen=True)
class Planned(Event):
    """The parts agree. sizes: training and test rows of each site; message: numbers in a row."""

    algorithm: str
    model: str
    parameters: int
    features: int
    message: int
    path: str
    sizes: Mapping[str, Mapping[str, int]]
    # null under a privacy claim: counts are not told
    labels: Mapping[str, Mapping[str, int | None]]
    privacy: Mapping[str, object]
    bytes_up: int  # what the survey and the agreement on the encoding took
    bytes_down: int
    sees: Mapping[str, str] = field(default_factory=dict)  # what each party could see of the rows
    bears: str = ""  # what malicious clients can do to the model
    positive: str = ""  # the label whose probability a binary model tells
    # data.threshold: from which probability that label is called, or how it is chosen
    threshold: str = ""
    # key -> value and why (`recipe`)
    chosen: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    learning_rate: float = 0.0  # of the first round
    rate_chosen: str = ""  # why it is that, where the study leaves it open

    @property
    def devices(self) -> bool:
        """Whether nobody holds more than one record:
        a fleet, each device one patient's, of which none is named.
        """
        return all(one["train"] + one["test"] <= 1 for one in self.sizes.values())


@dataclass(frozen=True)
class RangesFound(Event):
    """The ranges of columns that declare none,
    from noised counts of the training patients of `sites` sites.

    ranges: column -> [low, high]; noise_sd: standard deviation of the noise on each count, in
    patients.
    """

    sites: int
    ranges: Mapping[str, Sequence[float]]
    noise_sd: float


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know; the run goes on."""

    text: str


@dataclass(frozen=True)
class RoundStarted(Event):
    """Clients are drawn and asked to work."""

    round: int
    clients: Sequence[str]


@dataclass(frozen=True)
class SiteExcluded(Event):
    """A drawn site does not count in this round; the reason names no patient."""

    round: int
    site: str
    reason: str


@dataclass(frozen=True)
class RoundFinished(Event):
    """Rows are combined and the server has moved. Per client, in the order of `clients`: loss,
    seconds, steps.
    """

    round: int
    clients: Sequence[str]
    loss: float | None
    losses: Sequence[float | None]
    site_seconds: Sequence[float]
    steps: Sequence[int]
    seconds: float
    bytes_up: int
    bytes_down: int
    privacy: Mapping[str, object] = field(default_factory=dict)  # spent so far
    # bytes of each phase of a round whose rows nobody sees
    phases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspected(Event):
    """What a round under a robust rule says of its clients: weights, and findings (client, score,
    kind, evidence).
    """

    round: int
    weights: Mapping[str, float]
    findings: Sequence[Mapping[str, object]]
    most: int  # clients that the rule bears
    sit_out: int | None = None  # of them, how many may be left out at once; None: all


@dataclass(frozen=True)
class RolledBack(Event):
    """A round's model was taken back: its loss on the coordinator's reference grew too much. The
    round was paid for.
    """

    round: int
    before: float | None
    after: float | None  # null: it was no number


@dataclass(frozen=True)
class GivenUp(Event):
    """A round that could not be ended was given up: the model stays as it was, and the round counts
    as paid for.
    """

    round: int
    operator: str  # who decided it
    reason: str


@dataclass(frozen=True)
class SecurityAudit(Event):
    """What is done about a client, and why. level: 0 none to 4 critical.

    action: warn, quarantine, probation, clear; lift is an operator's, whose name and reason are the
    evidence.
    """

    round: int
    client: str
    level: int
    total: float
    action: str
    evidence: Sequence[str]


@dataclass(frozen=True)
class Tested(Event):
    """A model was tested on held-out patients. model: federated, local (each site's own) or pooled.

    Of all sites together: confusion, records of each label (row) predicted as each (column), in the
    order of labels; calibration, (records, mean probability said, share that was so) of each tenth.
    Noised where the test is.
    threshold: from which probability the positive label is called; null where there is none.
    decided: from what.
    """

    round: int
    model: str
    n: int
    loss: float | None
    all_sites: Mapping[str, Figure]
    macro: Mapping[str, Figure]
    per_site: Mapping[str, Mapping[str, Figure]]
    site_n: Mapping[str, int]
    seconds: float
    bytes_up: int
    bytes_down: int
    labels: Sequence[str] = field(default_factory=list)
    confusion: Sequence[Sequence[int]] = field(default_factory=list)
    calibration: Sequence[Sequence[float]] = field(default_factory=list)
    threshold: float | None = None
    decided: str = ""
    noised: bool = False  # whether the figures are of noised counts, n too


@dataclass(frozen=True)
class Compared(Event):
    """The federated model against each site's own,
    on the same held-out records. n: those of all sites.

    own_better: by how much the own models' squared error is less, a record on average, with its
    paired 95 % interval;
    sites: of each site [records, mean, low, high].
    """

    round: int
    n: int
    own_better: Figure
    sites: Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Voted(Event):
    """How many votes `sites` have for models of their own:
    each from 0 to 1, noised; half of them is a draw.

    A site's vote is 1 where its own model's mean squared error on its held-out records is less than
    the federated one's by .02 or more, 0 where it is more by as much, else between. own_better:
    their sum, which noise of standard deviation `noise_sd` hides, with a 95 % interval that holds
    the noise and the most that such votes scatter.
    """

    round: int
    sites: int
    own_better: Figure
    noise_sd: float


@dataclass(frozen=True)
class Resumed(Event):
    """A run goes on after round `round` of `rounds`; `note` says what was damaged, if anything."""

    round: int
    rounds: int
    note: str


@dataclass(frozen=True)
class RunFinished(Event):
    """A run ends. status: complete (all asked rounds with all asked sites) or incomplete.

    spread: (epsilon spent in this run, declared patients who spent that much), from public sizes
    and rounds.
    """

    status: str
    rounds: int
    seconds: float
    reason: str
    privacy: Mapping[str, object] = field(default_factory=dict)  # spent in all
    spread: Sequence[Sequence[float]] = field(default_factory=list)


def group_alike(excluded: Iterable[SiteExcluded]) -> dict[tuple[int, str], list[SiteExcluded]]:
    """Return by round and reason who was left out;
    a site's own name in its reason makes no other reason.

    A reason that several are told word for word may name one of them: who pays together is refused
    together.
    """
    told = list(excluded)
    often = Counter((event.round, event.reason) for event in told)
    found: dict[tuple[int, str], list[SiteExcluded]] = {}
    for event in told:
        shared = often[event.round, event.reason] > 1
        reason = event.reason if shared else strip_name(event.site, event.reason)
        found.setdefault((event.round, reason), []).append(event)
    return found


EVENTS: dict[str, type[Event]] = {
    "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__).lstrip("_"): kind
    for kind in (
        RunStarted, Planned, RangesFound, Warned, RoundStarted, SiteExcluded, RoundFinished,
        Inspected, RolledBack, GivenUp, SecurityAudit, Tested, Compared, Voted, Resumed,
        RunFinished,
    )
}  # fmt: skip
_NAMES = {kind: name for name, kind in EVENTS.items()}

Listener = Callable[[Event], None]


def name_of(event: Event) -> str:
    """Return what an event is called in the log."""
    return _NAMES[type(event)]


class Log:
    """Appends events to a file and tells listeners; without a file it keeps them in memory."""

    def __init__(self, path: Path | None = None, listeners: Sequence[Listener] = ()) -> None:
        self.listeners = list(listeners)
        self._path = path
        self._kept: list[Event] = []
        self.latest: dict[type[Event], Event] = {}
        with files.explained(path or Path()):
            self._file = open(path, "ab") if path else None  # noqa: SIM115 (closed by close)

    def emit(self, event: Event) -> None:
        """Write the event, without what looks like an identifier, then tell every listener."""
        event = screen(event)
        self.latest[type(event)] = event
        if self._file:
            with files.explained(Path(self._file.name)):
                self._file.write(line(event).encode() + b"\n")
                self._file.flush()
        else:
            self._kept.append(event)
        for listener in self.listeners:
            listener(event)

    def events(self) -> Sequence[Event]:
        """Return all events so far, those before a resumption too."""
        return list(read(self._path)) if self._path else self._kept

    def offset(self) -> int:
        """Return how many bytes of the file are on disk, after flushing them there."""
        if not self._file:
            return 0
        with files.explained(Path(self._file.name)):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            with suppress(OSError):  # emit has told already what could not be written
                self._file.close()


WITHHELD = "[withheld: it looks like a direct identifier]"

_WORDS = r"\b(?:mrn|ssn|nhs|dob|patient (?:id|name|number)|born)\b"

# Each part looks at a letter a few times at most, however long a text is.
_IDENTIFIERS = re.compile(
    r"(?<![\w.+-])[\w.+-]++@[\w-]++\.\w"  # an address
    r"|\b\d{3}-\d{2}-\d{4}\b"  # a social security number
    r"|\b\d{3}[-. ]\d{3}[-. ]\d{4}\b"  # a telephone or NHS number
    r"|\b(?:19|20)\d\d-\d\d-\d\d\b"  # a date of somebody's
    rf"|{_WORDS}[:=# ]*+(?:(?!{_WORDS})[^\s\d])*+\d",  # up to the next such word
    re.IGNORECASE,
)


def screen(event: Event) -> Event:
    """Return an event whose free texts hold no address, number or date that could be somebody's,
    and nothing that does not print, such as a terminal's escape; a warning may have several lines.

    Reasons and warnings can carry words of a site's own code. Names of people are not told from
    other words.
    """
    if isinstance(event, Warned) and _IDENTIFIERS.search(event.text):
        return Warned(WITHHELD)
    return _reword(event, lambda text: WITHHELD if _IDENTIFIERS.search(text) else printable(text))


def _reword(event: Event, change: Callable[[str], str]) -> Event:
    """Return an event with its free texts changed; a warning's line by line."""
    match event:
        case Warned(text=text):
            return Warned("\n".join(map(change, text.split("\n"))))
        case SiteExcluded(reason=reason) | RunFinished(reason=reason):
            return dataclasses.replace(event, reason=change(reason))
        case GivenUp(operator=operator, reason=reason):
            return dataclasses.replace(event, operator=change(operator), reason=change(reason))
        case SecurityAudit(evidence=evidence):
            return dataclasses.replace(event, evidence=[change(text) for text in evidence])
    return event


def line(event: Event) -> str:
    """Return an event as one line of JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    fields = {"schema": SCHEMA, "event": _NAMES[type(event)], "time": now, **vars(event)}
    # figures, of which a test has thousands
    return json.dumps(fields, default=vars, allow_nan=False)


class Stamped(NamedTuple):
    """An event, and when it was written (UTC)."""

    time: datetime
    event: Event


def parse(text: str) -> Stamped:
    """Read one line; raise RunError for a newer schema or an unknown event, ValueError where it is
    none.
    """
    fields = json.loads(text)
    if "\\ud" in text.lower():  # half a letter, which no page can hold
        json.dumps(fields, ensure_ascii=False).encode()
    schema = fields.pop("schema")
    name = fields.pop("event")
    time = datetime.fromisoformat(fields.pop("time"))
    if schema != SCHEMA or name not in EVENTS:
        raise RunError(
            f"event {name!r} of schema={schema}; this medfed reads schema {SCHEMA}. Use the "
            "medfed that wrote it."
        )
    if name == "tested":
        fields["all_sites"] = _figures(fields["all_sites"])
        fields["macro"] = _figures(fields["macro"])
        fields["per_site"] = {site: _figures(f) for site, f in fields["per_site"].items()}
    if name in ("compared", "voted"):
        fields["own_better"] = Figure(**fields["own_better"])
    # a later medfed may have added some
    known = {field.name for field in dataclasses.fields(EVENTS[name])}
    event = EVENTS[name](**{key: value for key, value in fields.items() if key in known})
    return Stamped(time, _reword(event, printable))


def read(path: Path) -> Iterator[Event]:
    """Yield the events of a log; a last line that was cut off by a crash is left out."""
    return (told.event for told in read_stamped(path))


def read_stamped(path: Path) -> Iterator[Stamped]:
    """Yield the events of a log, as `read` does, with their times."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    for number, text in enumerate(lines):
        if not text:
            continue
        try:
            yield parse(text.decode())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) - 1:
                return
            raise RunError(f"{path}, line {number + 1} is damaged ({error})") from error


def _figures(raw: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    return {name: Figure(**value) for name, value in raw.items()}
