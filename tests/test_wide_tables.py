"""Robust scaling of columns whose middle half is one value: as good as standard scaling, and no
divergence.
"""

import hashlib
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed import runs, study
from medfed.data.preprocess import ROBUST_CAP
from medfed.study import Participation, Privacy
from tests.wide_tables import intensive_care, laboratory, narrow_counts, write

TABLES = {
    "intensive care, 189 columns": (lambda: intensive_care(1600), 0.03),
    "rare events, 17 columns": (narrow_counts, 0.03),
    "laboratory, 40 columns": (lambda: laboratory(1500), 0.03),
}


@pytest.mark.parametrize("name", TABLES)
def test_robust_is_as_good_as_standard(name: str, tmp_path: Path) -> None:
    """With the study's defaults and 20 rounds; the columns whose IQR is a scale learn at three
    quarters of the pace.

    A seed's test of 320 patients scatters by .05, so four are taken.
    """
    make, least = TABLES[name]
    found: dict[str, list[float]] = {"robust": [], "standard": []}
    frame: pd.DataFrame = make()

    for kind, seed in itertools.product(found, range(4)):
        study = write(tmp_path, frame, data__preprocess=kind, training__rounds=20).set(
            "study.seed", seed
        )
        summary = medfed.simulate(study).summary
        codes = [one["code"] for one in summary["findings"]]
        assert not {"loss-grew", "loss-high", "not-better-than-chance"} & set(codes), kind
        assert not any("training loss grew" in text for text in summary["warnings"]), kind
        found[kind].append(summary["test"]["auroc"])

    robust, standard = (statistics.mean(found[kind]) for kind in found)
    assert robust > standard - least
    assert robust > 0.7


@pytest.mark.parametrize("make", [intensive_care, narrow_counts, laboratory])
def test_no_cell_and_no_column_outweighs_a_table(
    make: Callable[[], pd.DataFrame], tmp_path: Path
) -> None:
    prepared = medfed.load_and_prepare_medical_data(write(tmp_path, make()))
    x_NM = np.concatenate([x for x, _ in prepared.train.values()])
    assert np.abs(x_NM).max() <= ROBUST_CAP
    assert np.square(x_NM).mean(0).max() < 10
    middle = np.quantile(np.abs(x_NM), 0.98, axis=0)
    assert middle.max() <= 7 + 1e-5


BITS = {
    "breast-cancer-ten": "814556fa574d006df1cbda855dc594a6",
    "breast-cancer": "24685bf1be3813165bc13d39cf1833da",
    "brief": "24685bf1be3813165bc13d39cf1833da",
    "heart": "9a0adc7280c461465811a2580b26b9d8",
    "thyroid-devices": "8529144611c5e60d0274f9f2025d7535",
}
"""Digests of what the bundled studies' sites trained and tested on before scales were widened, rows
sorted.
"""


@pytest.mark.needs("data")
@pytest.mark.parametrize("name", BITS)
def test_encodings_of_the_bundled_studies_keep_their_bits(name: str) -> None:
    asked = replace(study.load(name), privacy=Privacy())
    if asked.sites.kind == "device":
        asked = replace(asked.set("sites.kind", "hospital"), fleet=Participation())
    prepared = runs.prepare_data(asked)
    digest = hashlib.sha256()
    for part in (prepared.train, prepared.test):
        for x, y in part.values():
            rows = np.column_stack([x, y])
            digest.update(rows[np.lexsort(rows.T)].tobytes())
    assert digest.hexdigest()[:32] == BITS[name]
