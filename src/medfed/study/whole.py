"""A whole study: a frozen value, made of plain tables and written back to them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from medfed.core import decision, toml
from medfed.core.refusals import Refusal, refuse
from medfed.study.keys import (
    About,
    Data,
    Model,
    Monitor,
    Participation,
    Privacy,
    Robustness,
    Security,
    Sites,
    Training,
)
from medfed.study.reader import put, read_tables_as, written
from medfed.study.relations import out_of_range


@dataclass(frozen=True)
class Study:
    """A whole study. Change a value with `study.set("training.rounds", 5)`; a study is never
    changed in place.
    """

    study: About = field(default_factory=About)
    data: Data = field(default_factory=Data)
    sites: Sites = field(default_factory=Sites)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    privacy: Privacy = field(default_factory=Privacy)
    security: Security = field(default_factory=Security)
    robustness: Robustness = field(default_factory=Robustness)
    fleet: Participation = field(default_factory=Participation)
    monitor: Monitor = field(default_factory=Monitor)
    # where `data.table` is looked for
    folder: Path = field(default=Path(), metadata={"hidden": True})
    # which keys are written down (None: all), and of the others which a recipe has chosen, and why
    given: frozenset[str] | None = field(default=None, compare=False, metadata={"hidden": True})
    chosen: Mapping[str, str] = field(
        default_factory=dict, compare=False, metadata={"hidden": True}
    )

    def rule(self) -> decision.ThresholdRule:
        """Return how the threshold of a binary target is found."""
        found = decision.parse(self.data.threshold)
        assert found is not None  # `relations.out_of_range` has seen to it
        return found

    def set(self, key: str, value: Any) -> "Study":
        """Return the study with one value changed, `key` being dotted: "training.rounds"."""
        return self._with({key: value})

    def _with(self, values: Mapping[str, Any]) -> "Study":
        """Return the study with several values changed at once: what must fit needs no order."""
        tables = self.tables()
        for key, value in values.items():
            put(tables, toml.path(key), value)

        given = self.given
        if given is not None:
            given = given | written(dict.fromkeys(values)) | written(values)
        kept = {key: why for key, why in self.chosen.items() if key not in values}
        return dataclasses.replace(
            from_tables(tables), folder=self.folder, given=given, chosen=kept
        )

    def left_open(self, key: str) -> bool:
        """Say whether nobody has written down a value of this dotted key."""
        return self.given is not None and key not in self.given

    def choices(self) -> dict[str, dict[str, Any]]:
        """Return what was chosen where the study left it open: key -> its value, and why."""
        return {key: {"value": self.value(key), "why": why} for key, why in self.chosen.items()}

    def value(self, key: str) -> Any:
        """Return the value of a dotted key."""
        found: Any = self
        for part in key.split("."):
            found = getattr(found, part)
        return found

    def as_written(self) -> "Study":
        """Return the study with what was chosen for it back at its defaults."""
        default = Study()
        open_ = self._with({key: default.value(key) for key in self.chosen})
        return dataclasses.replace(open_, given=self.given, chosen={})

    def tables(self) -> dict[str, Any]:
        """Return the study as plain tables, every value written out."""
        tables = dataclasses.asdict(self)
        return {
            name: table
            for name, table in tables.items()
            if name not in ("folder", "given", "chosen")
        }

    def toml(self) -> str:
        """Return the study as TOML with every value written out."""
        return tomli_w.dumps(self.tables())

    def digest(self) -> str:
        """Return the sha256 of the study: two studies of one digest ask for the same run."""
        # a range (6, 30) comes back from study.toml as [6.0, 30.0]
        read_back = from_tables(self.tables()).tables()
        return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def from_tables(tables: Mapping[str, Any]) -> Study:
    """Build a study from plain tables, checking names, types and ranges.

    Raises StudyError naming every key that cannot be used.
    """
    study, refusals = parse(tables)
    refuse(refusals)
    return study


def parse(tables: Mapping[str, Any]) -> "tuple[Study, list[Refusal]]":
    """Build a study from plain tables as far as they can be read, and return what stands against
    names, types, ranges.

    A misspelt key counts for the one that it may mean; what cannot be used is left at its default.
    """
    study, refusals = read_tables_as(Study, tables)
    if study is None:
        return Study(given=frozenset()), refusals
    study = dataclasses.replace(study, given=written(tables))
    return study, [*refusals, *out_of_range(study)]
