"""A hospital in another unit shows by a factor; hospitals that merely differ do not, in real tables
and long tails.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, STUDY, invented, real_tables, write_study

import medfed
from medfed import runs
from medfed.data import doubts, scales, survey_doubts
from medfed.data.scales import FACTORS
from medfed.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")


def units(
    folder: Path, south: float, text: str = STUDY, name: str = "marker x", sd: float = 0.4
) -> Study:
    """Return a study of a column that no dictionary knows, at one hospital in another unit."""
    frame = invented()
    values = np.random.default_rng(0).lognormal(1.5, sd, len(frame))
    frame[name] = np.where(frame["hospital"] == "south", values * south, values)
    return medfed.load_study(write_study(folder, text, frame))


def found(study: Study) -> list[doubts.Doubt]:
    return survey_doubts.find(runs.survey(study), study.data)


@pytest.mark.parametrize("factor", [*FACTORS, *(1 / factor for factor in FACTORS)])
def test_a_factor_is_named_with_both_medians_as_a_warning(tmp_path: Path, factor: float) -> None:
    study = units(tmp_path, factor)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column, doubt.harm) == ("units-apart", "marker x", "warning")
    times = f"{factor:,.6g} times" if factor > 1 else f"1/{1 / factor:,.6g} times"
    assert times in doubt.text and "at south" in doubt.text and "at east, north" in doubt.text
    assert doubt.sentence() in medfed.simulate(study).summary["warnings"]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 3.0, 5.0, 13.5, 200.0])
def test_other_patients_are_no_other_unit(tmp_path: Path, factor: float) -> None:
    assert found(units(tmp_path, factor)) == []


def test_a_wide_column_may_be_a_factor_apart_by_its_patients(tmp_path: Path) -> None:
    assert found(units(tmp_path, 10.0, sd=2.0)) == []


def test_what_has_a_range_or_a_known_unit_is_told_as_that(tmp_path: Path) -> None:
    assert (
        found(units(tmp_path, 10.0, STUDY + '[data.dictionary."marker x"]\nrange = [0, 1000]\n'))
        == []
    )
    assert [doubt.code for doubt in found(units(tmp_path, 1000.0, name="creatinine"))] == [
        "units-differ"
    ]


def test_under_a_claim_no_site_tells(tmp_path: Path) -> None:
    study = units(
        tmp_path,
        1000.0,
        PRIVATE.replace(
            "[training]", '[data.dictionary."marker x"]\nrange = [0, 9000]\n[training]'
        ),
    )
    assert not any("another unit" in text for text in medfed.simulate(study).summary["warnings"])


def columns(
    data_dir: Path, rng: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Yield columns of real tables and of made-up tails, with the site of each row: by chance, by
    another column.
    """
    tables = {
        name: table.select_dtypes("number")
        for name, table in real_tables(data_dir).items()
        if "X_uV" not in name
    }
    tables["tails"] = pd.DataFrame(
        {
            "lognormal": rng.lognormal(0, 3, 4000),
            "gamma": rng.gamma(0.3, 1, 4000),
            "counts": rng.negative_binomial(0.5, 0.01, 4000) + 1.0,
            "power": rng.pareto(0.7, 4000) + 0.01,
        }
    )
    for name, table in tables.items():
        if len(table) < 80 or table.shape[1] < 2:
            continue
        part = table.sample(
            min(len(table), int(rng.choice([80, 200, 1000]))),
            random_state=int(rng.integers(1 << 30)),
        )
        sites = int(rng.integers(2, 8))
        by = str(rng.choice(part.columns.astype(str)))
        order = part.rename(columns=str)[by].rank(method="first").fillna(0).to_numpy()
        halves = {
            "chance": rng.integers(0, sites, len(part)),
            "another column": (order * sites // (len(part) + 1)).astype(int),
        }

        for kind, site in halves.items():
            for column in part.columns:
                if kind == "chance" or str(column) != by:
                    yield f"{name} {column}", kind, part[column].to_numpy(dtype=float), site


def told(values: np.ndarray, site: np.ndarray) -> Mapping[str, Mapping[str, object]]:
    parts = {f"s{k}": scales.spread(values[site == k], doubts.FEW) for k in np.unique(site)}
    return {name: {"spreads": {"c": spread}} for name, spread in parts.items() if spread}


def test_real_tables_split_by_site_raise_no_doubt_and_a_factor_is_found_in_most(
    data_dir: Path,
) -> None:
    rng = np.random.default_rng(1)
    drawn = missed = planted = 0
    for _ in range(12):
        for where, kind, values, site in columns(data_dir, rng):
            drawn += 1
            assert [*survey_doubts._find_scales(told(values, site))] == [], (where, kind)
            plain = told(values, site)
            if kind == "chance" and len(plain) > 1 and "tails" not in where:
                odd = int(next(iter(plain))[1:])
                planted += 1
                missed += not [
                    *survey_doubts._find_scales(
                        told(np.where(site == odd, values * rng.choice(FACTORS), values), site)
                    )
                ]
    assert drawn > 1000 and planted > 200 and missed < 0.2 * planted


def test_the_hospitals_and_patients_of_real_tables_differ_by_no_unit(data_dir: Path) -> None:
    tables = real_tables(data_dir)
    heart = {name: table for name, table in tables.items() if name.startswith("processed.")}
    tables["heart"] = pd.concat([table.assign(site=name) for name, table in heart.items()])
    looked = 0

    for name, table in tables.items():
        for key in {"patient_id", "id", "referral_source", "subject#", "site"} & {
            *map(str, table.columns)
        }:
            if table[key].nunique() > 100:
                continue
            for column in table.columns.drop(key):
                values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
                looked += 1
                assert [
                    *survey_doubts._find_scales(told(values, pd.factorize(table[key])[0]))
                ] == [], (
                    name,
                    column,
                    key,
                )

    assert looked >= 14
