"""Every benchmark runs, at a tiny size, and leaves no file: what no test runs is broken at the next
change.
"""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import _need

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
ELSEWHERE = {"audit_power": "tests/evidence/test_exact.py::test_the_benchmark_of_power_runs"}
"""Benchmarks whose tiny run another test holds to what it must find."""

NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text())
HOW = (
    "give it main(argv) with common.parser, whose --tiny makes it as small as can be and writes "
    "nothing"
)


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark's module, found beside what all share; peers run from a folder of their own and
    are not imported.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    place = importlib.util.spec_from_file_location(
        f"benchmark_{request.param}", FOLDER / f"{request.param}.py"
    )
    assert place and place.loader
    module = importlib.util.module_from_spec(place)
    monkeypatch.setitem(sys.modules, place.name, module)
    place.loader.exec_module(module)
    return module


@pytest.fixture
def kept() -> Iterator[None]:
    """Nothing that a benchmark could write is another afterwards."""
    before = _written()
    yield
    assert _written() == before, "a tiny run wrote a file; write results only without --tiny"


def _written() -> dict[Path, bytes]:
    folders = (FOLDER / "results", ROOT / "docs", ROOT / "runs")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in [*files, ROOT / "README.md"]}


def test_there_are_benchmarks() -> None:
    assert len(NAMES) >= 17 and "cohort" in NAMES
    for name, test in ELSEWHERE.items():
        file, _, function = test.partition("::")
        text = (ROOT / file).read_text()
        assert f"def {function}(" in text and f"{name}.py" in text and "--tiny" in text


@pytest.mark.parametrize(
    "benchmark", [name for name in NAMES if name not in ELSEWHERE], indirect=True
)
@pytest.mark.usefixtures("one_thread", "kept")
def test_a_benchmark_runs_at_a_tiny_size(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    name = benchmark.__name__.removeprefix("benchmark_")
    for kind in getattr(benchmark, "NEEDS", ()):
        _need(kind)
    if not inspect.signature(benchmark.main).parameters:
        pytest.fail(f"benchmarks/{name}.py has no tiny size: {HOW}", pytrace=False)
    try:
        benchmark.main(["--tiny"])
    except SystemExit as stopped:
        if stopped.code == 2:
            pytest.fail(f"benchmarks/{name}.py has no tiny size: {HOW}", pytrace=False)
        raise
    assert capsys.readouterr().out.strip()
