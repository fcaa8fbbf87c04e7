"""Awkward tables: each is read as the clean one, or refused in words that name row, column and fix.
None is silent.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.awkward.formats import AS_CLEAN, FORMAT, TABLES, UNDER_CLAIM, Awkward
from tests.data.awkward.forms import DATA, NUMBERS, clean, text

from medfed.core.checks import MedfedError
from medfed.core.streams import Streams
from medfed.data import sources, tables
from medfed.data.site_table import SiteTable
from medfed.study import Data, Feature, Format, Privacy, Study

DICTIONARY = {
    **{name: Feature(range=(0, 100_000)) for name in NUMBERS},
    "ward": Feature(categories=("Männer", "Frauen", "Größere Kinder")),
    "died": Feature(categories=("no", "yes")),
}
SIZES = {"Nord": 9, "Süd": 9}


def _data(table: str, declared: Mapping[str, Any]) -> Data:
    changes = {key: value for key, value in declared.items() if key != FORMAT}
    return replace(DATA, table=table, format=Format(**declared.get(FORMAT, {})), **changes)


def _read(folder: Path, data: Data, private: bool = False) -> dict[str, SiteTable]:
    """Return each site's cleaned table."""
    if private:
        data = replace(data, dictionary=DICTIONARY)
    study = Study(data=data, folder=folder, privacy=Privacy(sizes=SIZES) if private else Privacy())
    frames, completed = sources.frames(study, private=private)
    sources.columns_of(study, private)
    return dict(zip(frames, tables.clean_all(frames, completed, Streams(0), private), strict=True))


@pytest.fixture(scope="module", params=[False, True])
def right(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, SiteTable]]:
    """The clean table, and whether under a claim."""
    folder = tmp_path_factory.mktemp("clean")
    (folder / "t.csv").write_text(text(clean()), encoding="utf-8")
    return request.param, _read(folder, replace(DATA, table="t.csv"), request.param)


def _same(found: Mapping[str, SiteTable], right: Mapping[str, SiteTable]) -> None:
    assert list(found) == list(right)
    for site, table in right.items():
        for kind in ("numbers", "texts"):
            one = getattr(table, kind)
            other = getattr(found[site], kind)
            assert sorted(one) == sorted(other)
            for name, values in one.items():
                assert np.array_equal(values, other[name], equal_nan=kind == "numbers"), name
        for name in ("label", "patient", "test", "ids"):
            assert getattr(table, name).tolist() == getattr(found[site], name).tolist(), name


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_an_awkward_table_is_read_as_the_clean_one_or_refused(
    table: Awkward, right: tuple[bool, dict[str, SiteTable]], tmp_path: Path
) -> None:
    private, expected = right
    answer = table.right if not private or table.private is None else table.private
    declared = {
        **table.declared,
        FORMAT: {**table.declared.get(FORMAT, {}), **(table.claimed if private else {})},
    }
    data = _data(table.make(tmp_path), declared)
    if answer == AS_CLEAN:
        _same(_read(tmp_path, data, private), expected)
        return

    refused = ""
    try:
        _read(tmp_path, data, private)
    except MedfedError as error:
        refused = str(error)

    assert answer == UNDER_CLAIM or re.search(answer, refused), refused
    if private:
        cells = {cell for row in clean()[1:] for cell in (row[0], *row[2:6]) if len(cell) > 2}
        assert not [cell for cell in cells if cell in refused.replace(str(tmp_path), "")], refused
