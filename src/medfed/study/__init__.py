"""The study file: the whole description of one federation, as frozen dataclasses.

A study is TOML. Each table is one dataclass, each key one field, and `docs/study.md` is generated
from them. A key that is not there does not exist: it is refused with the nearest right name.

`keys` declares every key; `domains` which values one may have; `reader` turns TOML into fields;
`whole` is the study as a value; `relations` says what stands against its values; `loading` reads
files; `blanks` and `dictionary` ask for what only a person knows.
"""

from medfed.study.blanks import CATEGORIES, EPSILON, FEATURE, RANGE, SIZE
from medfed.study.dictionary import KINDS, describe, described, is_pattern
from medfed.study.domains import LARGEST, is_day, names_a_folder
from medfed.study.keys import (
    LEAST_CLIP,
    About,
    Data,
    Feature,
    Format,
    Join,
    Model,
    Monitor,
    Participation,
    Privacy,
    Robustness,
    Security,
    Sites,
    Training,
)
from medfed.study.loading import bundled, from_text, load, read, read_tables
from medfed.study.reader import parse_value, put, read_as
from medfed.study.relations import CHANGE_IT, beyond, out_of_range
from medfed.study.whole import Study, from_tables, parse

__all__ = [
    "CATEGORIES",
    "CHANGE_IT",
    "EPSILON",
    "FEATURE",
    "KINDS",
    "LARGEST",
    "LEAST_CLIP",
    "RANGE",
    "SIZE",
    "About",
    "Data",
    "Feature",
    "Format",
    "Join",
    "Model",
    "Monitor",
    "Participation",
    "Privacy",
    "Robustness",
    "Security",
    "Sites",
    "Study",
    "Training",
    "beyond",
    "bundled",
    "describe",
    "described",
    "from_tables",
    "from_text",
    "is_day",
    "is_pattern",
    "load",
    "names_a_folder",
    "out_of_range",
    "parse",
    "parse_value",
    "put",
    "read",
    "read_as",
    "read_tables",
]
