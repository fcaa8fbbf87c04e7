"""The study that would be accepted: every decision that has a safe answer made, a blank for what
only a person knows.

What a blank asks for (ranges, categories, sizes, which column names the patient) must be known
without these patients, so nothing here reads a record: a table's header names its columns, and no
more. `from_records` is for records that are public anyway; what it reads is marked in the file, and
the claim says it.
"""

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medfed import study as studies
from medfed.core import files, toml
from medfed.core.checks import PlanError, StudyError
from medfed.core.refusals import LEAVE_OUT, Refusal, mends, refuse
from medfed.core.toml import Ask
from medfed.data import raw_columns, sources, tables
from medfed.planning import recipe
from medfed.study import Privacy, Study, put

MOST_PASSES = 8
"""A mended study may be refused for what its mending asks for; more often than this it is not
looked at again.
"""

RELATIVE = (
    "data.table",
    "robustness.reference",
    "privacy.ledger",
    "security.federation",
    "security.keys",
)
"""Keys whose paths are relative to the study's file."""

READ = "read from the records"


@dataclass(frozen=True)
class Fixed:
    """A mended study: its TOML, what was against it, the blanks left, and what nothing mends."""

    text: str
    stood: tuple[str, ...]
    blanks: tuple[str, ...]  # keys
    left: tuple[str, ...]


def load(study: str | Path, settings: Sequence[str] = ()) -> Study:
    """Read a study as `study.load` does;
    where a key cannot be used, tell what else stands against it too.
    """
    loaded, unread = studies.read(study, settings)
    refuse([*unread, *_beside(unread, loaded)])
    return loaded


def _beside(unread: Sequence[Refusal], study: Study) -> Iterator[Refusal]:
    """Yield what else stands against a study that could not be wholly read,
    but what follows from that alone.
    """
    keys = [str(refusal.error).split("=")[0] for refusal in unread]
    if unread:
        yield from (
            one
            for one in recipe.examine(study)[1]
            if not any(key in str(one.error) for key in keys)
        )


def check(study: str | Path, settings: Sequence[str] = ()) -> Study:
    """Return a study that nothing stands against, as far as its file and its table's header tell;
    else raise it all.
    """
    loaded = load(study, settings)
    refuse(recipe.examine(loaded)[1])
    return loaded


def fix(
    study: str | Path,
    settings: Sequence[str] = (),
    data: Path | None = None,
    from_records: bool = False,
    out: Path | None = None,
) -> Fixed:
    """Return the study that would be accepted;
    nothing is written, `out` is where its paths shall hold.

    `from_records` fills blanks from the records of a study that declares them public; `data` as in
    `runs.run`. Raises StudyError where the file is no TOML, PlanError for records that are not
    declared public.
    """
    asked, path = studies.read_tables(study, settings)
    if from_records:
        _refuse_patients(_parse(asked, path))
        put(asked, ("data", "read_from_records"), True)
    stood = _tell(_find_refusals(asked, path))
    settled, mended = _mend(asked, path)

    read: dict[toml.Path, Any] = {}
    if from_records:
        read = _read_from_records(_parse(settled, path), _blanks(settled, path), data)
        for key, value in read.items():
            put(settled, key, value)

    blanks = _blanks(settled, path)
    left = _tell(refusal for refusal in _find_refusals(settled, path) if not refusal.mend)
    notes = {key: _note(key, asked) for key in mended if key not in blanks} | dict.fromkeys(
        read, READ
    )
    for key, blank in blanks.items():
        _set_blank(settled, key, blank)
    _move(settled, path.parent, out)
    lines = [*_preface(stood, left, bool(read)), *toml.document(_in_order(settled), notes), ""]
    return Fixed(
        "\n".join(lines), tuple(stood), tuple(toml.key(*key) for key in blanks), tuple(left)
    )


def _mend(asked: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[toml.Path, Any]]:
    """Return the tables with what mends them put in, blanks among it, and what that was."""
    settled = deepcopy(dict(asked))
    mended = dict[toml.Path, Any]()
    for _ in range(MOST_PASSES):
        found = mends(_find_refusals(settled, path)).items()
        new = {
            key: value
            for key, value in found
            if mended.get(key) != value and not _is_so(settled, key, value)
        }
        for key, value in new.items():
            put(settled, key, value)
        mended |= new
        if not new:
            break
    return settled, mended


def write(fixed: Fixed, out: Path) -> None:
    """Write a mended study. Raises StudyError where the file is there: none is overwritten."""
    if out.exists():
        raise StudyError(f"--out {str(out)!r} is there already; give the name of a new file")
    files.make_folder(out.parent)
    files.write(out, fixed.text)


def _parse(settings: Mapping[str, Any], path: Path) -> Study:
    return replace(studies.parse(settings)[0], folder=path.parent.resolve())


def _find_refusals(settings: Mapping[str, Any], path: Path) -> list[Refusal]:
    unread = studies.parse(settings)[1]
    return [*unread, *recipe.examine(_parse(settings, path))[1]]


def _is_so(settings: Mapping[str, Any], key: toml.Path, value: Any) -> bool:
    """Say whether a key that is left out has this value by default, or is to be left out; or has no
    table to be in.
    """
    place: Any = settings
    for name in key:
        if not isinstance(place, Mapping):
            return True
        if name not in place:
            default: Any = Study()
            for part in key:
                default = getattr(default, part, LEAVE_OUT)
            return bool(value is LEAVE_OUT or value == default)
        place = place[name]
    return False


def _tell(refusals: Iterable[Refusal]) -> list[str]:
    return list(dict.fromkeys(str(refusal.error) for refusal in refusals))


def _blanks(settings: Mapping[str, Any], path: Path) -> dict[toml.Path, Ask]:
    """Return the blanks that a study is still refused for, by key."""
    asked = {
        key: value
        for key, value in mends(_find_refusals(settings, path)).items()
        if isinstance(value, Ask)
    }
    return {
        key: blank for key, blank in asked.items() if _at(settings, key) == blank.blank is not None
    }


def _at(settings: Mapping[str, Any], key: toml.Path) -> Any:
    """Return the value of a key in plain tables; None where there is none."""
    place: Any = settings
    for name in key:
        place = place.get(name) if isinstance(place, Mapping) else None
    return place


def _set_blank(settings: dict[str, Any], key: toml.Path, blank: Ask) -> None:
    place = settings
    for name in key[:-1]:
        place = place[name]
    place[key[-1]] = blank


def _note(key: toml.Path, asked: Mapping[str, Any]) -> str:
    """Return what is said beside a value that was put in: what was there before."""
    before = _at(asked, key)
    if before is None:
        return "mended"
    return f"mended; was {toml.literal(before)}"


def _in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables in the order of the study's page."""
    order = [field.name for field in fields(Study)]
    return dict(
        sorted(
            settings.items(),
            key=lambda item: order.index(item[0]) if item[0] in order else len(order),
        )
    )


def _move(settings: dict[str, Any], folder: Path, out: Path | None) -> None:
    """Have relative paths hold from where the study is written to."""
    if out is None or out.parent.resolve() == folder.resolve():
        return
    for key in RELATIVE:
        table, name = key.split(".")
        value = settings[table].get(name) if isinstance(settings.get(table), dict) else None
        if isinstance(value, str):
            settings[table][name] = _move_path(value, folder, out)
    data = settings.get("data")
    joins = data.get("join", ()) if isinstance(data, dict) else ()
    for join in joins if isinstance(joins, (list, tuple)) else ():
        if isinstance(join, dict) and isinstance(join.get("table"), str):
            join["table"] = _move_path(join["table"], folder, out)
    maps = data.get("site_maps") if isinstance(data, dict) else None
    if isinstance(maps, dict):
        maps.update({site: _move_path(str(value), folder, out) for site, value in maps.items()})


def _move_path(value: str, folder: Path, out: Path) -> str:
    """Return a path as it is from where the study is written to."""
    if not value or Path(value).expanduser().is_absolute():
        return value
    return os.path.relpath(folder.resolve() / value, out.parent.resolve())


def _preface(stood: Sequence[str], left: Sequence[str], read: bool) -> Iterator[str]:
    """Yield what is said at the top of the file."""
    if stood:
        yield (
            "# What stood against this study. What was put in is marked `mended`; a blank is "
            "refused until filled in."
        )
    for text in stood:
        yield from textwrap.wrap(text, 118, initial_indent="# - ", subsequent_indent="#   ")
    if left:
        yield "# Left for you to decide, as nothing mends it in your place:"
    for text in left:
        yield from textwrap.wrap(text, 118, initial_indent="# - ", subsequent_indent="#   ")
    if read:
        yield from textwrap.wrap(_WARNING, 118, initial_indent="# ", subsequent_indent="# ")


_WARNING = (
    "WARNING: what is marked `read from the records` was read off patients by --from-data. No "
    "claim covers it. It is for public or simulated records alone, and data.read_from_records = "
    "true has the claim say so."
)


# from records that are public ---------------------------------------------------------------------


def _refuse_patients(study: Study) -> None:
    """Refuse to read records that the study does not declare public."""
    if study.data.source or (study.data.test_is_public and study.privacy.scope == "run"):
        return
    raise PlanError(
        "--from-data reads ranges, categories and sizes off the records, which no claim covers: "
        "it is for public or simulated records alone. If these are, declare it: "
        "data.test_is_public=true and privacy.scope='run'; if they are patients', fill in the "
        "blanks from your data dictionary."
    )


def _read_from_records(
    study: Study, blanks: Mapping[toml.Path, Ask], folder: Path | None
) -> dict[toml.Path, Any]:
    """Return what records say of blanks: features' ranges and categories, labels, sites' sizes."""
    frames, data = sources.frames(replace(study, privacy=Privacy()), folder)
    frame = pd.concat(frames.values())
    found: dict[toml.Path, Any] = {}

    for key in blanks:
        if key[:2] != ("data", "dictionary") or key[2] not in frame.columns:
            continue
        for name, value in raw_columns.suggest_entry(frame[key[2]], data).items():
            if len(key) == 3:
                found |= {(*key, other): LEAVE_OUT for other in ("range", "categories")} | {
                    (*key, name): value
                }
            elif key[3] == name:
                found[key] = value

    if any(key[:2] == ("privacy", "sizes") for key in blanks):
        for name, rows in frames.items():
            patients = tables.name_patients(rows, data, private=False).nunique()
            found["privacy", "sizes", name] = round_down(patients * (1 - data.test_fraction))

    return found


def round_down(number: float) -> int:
    """Return a number rounded down to two digits, 1 at least."""
    whole = int(number)
    step = 10 ** max(0, len(str(whole)) - 2)
    return max(1, whole - whole % int(step))
