"""The notebook is the tour, executed: its cells run from a clean kernel, are short, and leave no
path of a machine.
"""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from make_notebook import NOTEBOOK, TOUR, executed, made  # noqa: E402


def test_the_notebook_is_the_tour() -> None:
    fresh = made(TOUR.read_text())
    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert [(c.cell_type, c.source) for c in fresh.cells] == [
        (c.cell_type, c.source) for c in kept.cells
    ], "docs/tour.md has changed; run `python scripts/make_notebook.py`"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert len(code) >= 9 and all(len(cell.source.splitlines()) <= 15 for cell in code)
    assert all(cell.outputs for cell in code if "print(" in cell.source)
    assert NOTEBOOK.stat().st_size < 500_000


@pytest.mark.long
def test_it_runs_from_a_clean_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    notebook = executed(made(TOUR.read_text()))
    told = "".join(
        o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs
    )
    assert "epsilon spent 1.0000" in told and "rounds whose models follow each other: 30" in told
    assert "no significant difference" in told and "training_dashboard.html" in told
