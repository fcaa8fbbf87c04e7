"""The house's own rules: what is pinned, and that a test which cannot run never passes for one that did."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _name(requirement: str) -> str:
    """The normalised name (PEP 503) at the head of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def _pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_torch_is_pinned_for_every_platform() -> None:
    assert "torch==2.13.0" in _pins()  # no +cpu: macOS has no such build


def test_constraints_are_plain_pins() -> None:
    strange = [line for line in _pins() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)]
    assert strange == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = {_name(line) for line in project["dependencies"] + extras} - {"medfed"}  # dev takes the other extras
    assert wanted - {_name(line) for line in _pins()} == set()


@pytest.fixture
def needy(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our conftest.py and three tests: two that need data, one that does not."""
    monkeypatch.delenv("MEDFED_DATA", raising=False)
    monkeypatch.delenv("MEDFED_REQUIRE", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    # Without hypothesis, whose plugin would be imported anew in each of these runs, a second at a time.
    pytester.makeini("[pytest]\naddopts = -ra --strict-markers -p no:hypothesispytest\nmarkers = needs(kind): ours\n")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.needs("data")
        def test_marked(): pass

        def test_fixture(data_dir): assert (data_dir / "fed_heart_disease").is_dir()

        def test_free(): pass
        """
    )
    return pytester


def test_absent_data_skips_with_the_reason(needy: pytest.Pytester) -> None:
    result = needy.runpytest()
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*needs data: MEDFED_DATA is not set*"])


def test_absent_required_data_fails(needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFED_REQUIRE", "data")
    monkeypatch.setenv("MEDFED_DATA", str(needy.path))  # set, but holds no data
    result = needy.runpytest()
    result.assert_outcomes(passed=1, errors=2)  # pytest calls a failure before the test's first line an error
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*data is required (MEDFED_REQUIRE) but absent: MEDFED_DATA=*fed_heart_disease*"])


@pytest.mark.parametrize("required", ["", "data", " data ,"])
def test_present_data_runs(needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    needy.mkdir("fed_heart_disease")
    monkeypatch.setenv("MEDFED_DATA", str(needy.path))
    monkeypatch.setenv("MEDFED_REQUIRE", required)
    needy.runpytest().assert_outcomes(passed=3)


def test_unknown_kinds_are_refused(needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    needy.makepyfile(test_typo="import pytest\n\n@pytest.mark.needs('dat')\ndef test_typo(): pass\n")
    result = needy.runpytest("test_typo.py")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*unknown kind; expected one of*data*"])
    monkeypatch.setenv("MEDFED_REQUIRE", "dat")
    assert needy.runpytest().ret == pytest.ExitCode.USAGE_ERROR


TEXTS = {"open", "fdopen", "read_text", "write_text", "TextIOWrapper", "NamedTemporaryFile", "FileHandler"}
"""What opens a text file, in the locale's encoding unless it is told another."""


def _in_the_locale_s_encoding(path: Path) -> Iterator[int]:
    """Yield the lines that open a text file without saying its encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        modes = (
            []
            if name.endswith("_text")
            else [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        )
        binary = any(re.fullmatch(r"[rwxab+]*b[rwxab+]*", mode) for mode in modes)
        whose = ast.unparse(node.func)
        ours = re.fullmatch(r"(os|Ledger|Trail|webbrowser|Site|cls|self|archive)\.open|_open", whose)
        if name in TEXTS and not binary and not ours and "encoding" not in {one.arg for one in node.keywords}:
            yield node.lineno


@pytest.mark.parametrize("folder", ["src", "scripts"])
def test_no_text_file_is_opened_in_the_locale_s_encoding(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := list(_in_the_locale_s_encoding(path)))
    }
    assert found == {}


def test_text_files_in_the_locale_s_encoding_are_found(tmp_path: Path) -> None:
    right = ["open(p, 'rb')", "p.read_text(encoding='utf-8')", "os.open(p, 1)", "open(p, 'ab')", "io.BytesIO()"]
    wrong = ["open(p)", "p.open('w')", "p.read_text()", "p.write_text('bbb')", "gzip.open(p, 'rt')"]
    lines = [*right, *wrong]
    (tmp_path / "code.py").write_text("\n".join(lines))
    assert list(_in_the_locale_s_encoding(tmp_path / "code.py")) == [6, 7, 8, 9, 10]
