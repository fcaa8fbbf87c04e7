"""A site asks whether it would do better alone; nobody else hears the answer, and nobody pays."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed import runs
from medfed.core.checks import PlanError, RunError
from medfed.evidence import alone
from medfed.monitor.events import Compared
from tests.tables import PRIVATE, SITES, STUDY, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def opposed(patients: int = 240) -> pd.DataFrame:
    """One measurement that means the opposite at the third site, which a common model
    cannot learn.
    """
    rng = np.random.default_rng(5)
    site = np.array(SITES)[np.arange(patients) % 3]
    lactate = rng.uniform(0.2, 14, patients)
    high = (lactate > 7) ^ (site == SITES[2])
    return pd.DataFrame(
        {
            "age": rng.integers(20, 90, patients),
            "lactate": lactate,
            "ward": "icu",
            "hospital": site,
            "subject": [f"p{i}" for i in range(patients)],
            "died": np.where(high, "yes", "no"),
        }
    )


def test_without_a_claim_it_finds_what_the_run_itself_found(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("monitor.baselines", True)
    told: list[Compared] = []
    runs.run(
        study,
        tmp_path / "run",
        listeners=[lambda e: told.append(e) if isinstance(e, Compared) else None],
    )
    for site in SITES:
        found = alone.compare(tmp_path / "run", site)
        records, mean, low, _ = told[0].sites[site]
        assert found.records == records
        assert (found.own_better.value, found.own_better.low) == pytest.approx(
            (mean, low), abs=1e-6
        )


def test_under_a_claim_the_site_that_is_different_is_told_and_the_run_stays_as_it_was(
    tmp_path: Path,
) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE, opposed()))
    result = runs.run(study, tmp_path / "run")
    assert result.summary["compared"] is None
    before = contents(tmp_path)

    found = {site: alone.compare(tmp_path / "run", site) for site in SITES}

    assert contents(tmp_path) == before  # neither the run nor its ledger has heard of it
    assert "errs less" in found[SITES[2]].verdict() and found[SITES[2]].own["auroc"].value == 1
    assert found[SITES[2]].federated["auroc"].value == result.summary["per_site"][SITES[2]]["auroc"]


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(medfed.load_study(write_study(tmp_path, PRIVATE)), tmp_path / "run")
    capsys.readouterr()
    assert command("alone", tmp_path / "run", "north") == 0
    assert "own model" in capsys.readouterr().out
    assert command("alone", tmp_path / "run", "north", "--json") == 0
    assert json.loads(capsys.readouterr().out)["site"] == "north"


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY))
    runs.run(study, tmp_path / "run")
    with pytest.raises(RunError, match="site 'nort' is not in this run; did you mean 'north'"):
        alone.compare(tmp_path / "run", "nort")
    with pytest.raises(RunError, match="not a run folder"):
        alone.compare(tmp_path, "north")
    runs.run(study.set("training.algorithm", "local"), tmp_path / "own")
    with pytest.raises(PlanError, match="keeps a model at each site already"):
        alone.compare(tmp_path / "own", "north")
