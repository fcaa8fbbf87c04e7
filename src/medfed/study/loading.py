"""A study from its file, or by the name of a bundled one, with the settings of a command line."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medfed.core import toml
from medfed.core.checks import StudyError, nearest, plain
from medfed.core.refusals import Refusal, refuse
from medfed.study.reader import parse_value, put
from medfed.study.whole import Study, from_tables, parse


def bundled() -> dict[str, Path]:
    """Return the studies that come with medfed, by name."""
    folder = Path(__file__).parent.parent / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(study: str | Path, settings: Sequence[str] = ()) -> Study:
    """Read a study from a file or by the name of a bundled one,
    then apply settings "key=value" (TOML values).

    Raises StudyError with every key that cannot be used, its value and the way out; no data is
    touched.
    """
    loaded, refusals = read(study, settings)
    refuse(refusals)
    return loaded


def from_text(text: str, path: Path) -> Study:
    """Return the study that a text would be as the file `path`."""
    loaded = from_tables(tomllib.loads(text))
    return dataclasses.replace(loaded, folder=path.parent.resolve())


def read(study: str | Path, settings: Sequence[str] = ()) -> "tuple[Study, list[Refusal]]":
    """Return a study as far as it can be read, and what is against it: see `load`, `parse`."""
    tables, path = read_tables(study, settings)
    loaded, refusals = parse(tables)
    if not loaded.study.name:
        loaded = dataclasses.replace(
            loaded, study=dataclasses.replace(loaded.study, name=path.stem)
        )
    return dataclasses.replace(loaded, folder=path.parent.resolve()), refusals


def read_tables(study: str | Path, settings: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """Return what a study file says, with the settings put in,
    and the file's path; nothing else is checked.
    """
    path = bundled().get(str(study), Path(study))
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise StudyError(
            f"study={str(study)!r} is no file and no bundled study; "
            f"{nearest(str(study), bundled())}"
        ) from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"study={str(path)!r} cannot be read as TOML: not in UTF-8 ({error}); save it as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise StudyError(
            f"study={str(path)!r} cannot be read as TOML: {toml.explain_unreadable(text, error)}"
        ) from error
    except OSError as error:
        raise StudyError(f"study={str(path)!r} cannot be read as TOML: {plain(error)}") from error

    for setting in settings:
        key, equals, text = toml.setting(setting)
        if not equals:
            raise StudyError(
                f"--set {setting!r}; expected KEY=VALUE, as in --set training.rounds=5"
            )
        put(tables, toml.path(key.strip()), parse_value(text.strip()))
    return tables, path
