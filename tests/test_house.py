"""The house's own rules: what is pinned, what a guarantee names, and that a test which cannot run
passes for none.
"""

import ast
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medfed.core.checks import plain

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import guarantees  # noqa: E402


def _name(requirement: str) -> str:
    """The normalised name (PEP 503) at the head of a requirement."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def _pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_torch_is_pinned_for_every_platform() -> None:
    assert "torch==2.13.0" in _pins()  # no +cpu: macOS has no such build


def test_constraints_are_plain_pins() -> None:
    strange = [
        line for line in _pins() if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)
    ]
    assert strange == []


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    # dev takes the other extras
    wanted = {_name(line) for line in project["dependencies"] + extras} - {"medfed"}
    assert wanted - {_name(line) for line in _pins()} == set()


@pytest.fixture
def needy(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with our conftest.py and three tests: two that need data, one that does not."""
    monkeypatch.delenv("MEDFED_DATA", raising=False)
    monkeypatch.delenv("MEDFED_REQUIRE", raising=False)
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    # Without hypothesis, whose plugin would be imported anew in each of these runs, a second at a
    # time.
    pytester.makeini(
        "[pytest]\naddopts = -ra --strict-markers -p no:hypothesispytest\nmarkers = needs(kind): "
        "ours\n"
    )
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


def test_absent_required_data_fails(
    needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFED_REQUIRE", "data")
    monkeypatch.setenv("MEDFED_DATA", str(needy.path))  # set, but holds no data
    result = needy.runpytest()
    # pytest calls a failure before the test's first line an error
    result.assert_outcomes(passed=1, errors=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*data is required (MEDFED_REQUIRE) but absent: MEDFED_DATA=*fed_heart_disease*"]
    )


@pytest.mark.parametrize("required", ["", "data", " data ,"])
def test_present_data_runs(
    needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str
) -> None:
    needy.mkdir("fed_heart_disease")
    monkeypatch.setenv("MEDFED_DATA", str(needy.path))
    monkeypatch.setenv("MEDFED_REQUIRE", required)
    needy.runpytest().assert_outcomes(passed=3)


def test_unknown_kinds_are_refused(needy: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    needy.makepyfile(
        test_typo="import pytest\n\n@pytest.mark.needs('dat')\ndef test_typo(): pass\n"
    )
    result = needy.runpytest("test_typo.py")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*unknown kind; expected one of*data*"])
    monkeypatch.setenv("MEDFED_REQUIRE", "dat")
    assert needy.runpytest().ret == pytest.ExitCode.USAGE_ERROR


TEXTS = {
    "open",
    "fdopen",
    "read_text",
    "write_text",
    "TextIOWrapper",
    "NamedTemporaryFile",
    "FileHandler",
}
"""What opens a text file, in the locale's encoding unless it is told another."""


def _in_the_locale_s_encoding(path: Path) -> Iterator[int]:
    """Yield the lines that open a text file without saying its encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            name = node.func.attr
        else:
            name = getattr(node.func, "id", "")

        if name.endswith("_text"):
            modes = []
        else:
            modes = [
                one.value
                for one in node.args
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            ]

        binary = any(re.fullmatch(r"[rwxab+]*b[rwxab+]*", mode) for mode in modes)
        whose = ast.unparse(node.func)
        ours = re.fullmatch(
            r"(os|Ledger|Trail|webbrowser|Site|Simulation|runs\.Simulation|cls|self|archive|way|self\.inner)\.open"
            r"|_open",
            whose,
        )

        if (
            name in TEXTS
            and not binary
            and not ours
            and "encoding" not in {one.arg for one in node.keywords}
        ):
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
    right = [
        "open(p, 'rb')",
        "p.read_text(encoding='utf-8')",
        "os.open(p, 1)",
        "open(p, 'ab')",
        "io.BytesIO()",
    ]
    wrong = ["open(p)", "p.open('w')", "p.read_text()", "p.write_text('bbb')", "gzip.open(p, 'rt')"]
    lines = [*right, *wrong]
    (tmp_path / "code.py").write_text("\n".join(lines))
    assert list(_in_the_locale_s_encoding(tmp_path / "code.py")) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("folder", ["benchmarks", "scripts", "src", "tests"])
def test_no_line_is_over_120_columns(folder: str) -> None:
    """Where ruff does not look, as tables and texts may be wider than code."""
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line.partition("  # type: ")[0]) > 120
    ]
    assert wide == []


SYSTEM = {"OSError", "Exception", "BaseException", "PermissionError", "FileNotFoundError"}


def _raw_words(folder: Path) -> Iterator[str]:
    """Yield where a message takes the words of what the system refused as they are, so with
    "[Errno 13]": it takes `checks.plain` of it.
    """
    for path in sorted(folder.rglob("*.py")):
        for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(handler, ast.ExceptHandler) or handler.type is None:
                continue
            caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
            if not caught & SYSTEM:
                continue
            for node in ast.walk(handler):
                match node:
                    case (
                        ast.FormattedValue(value=ast.Name(id=name))
                        | ast.Call(func=ast.Name(id="str"), args=[ast.Name(id=name)])
                    ) if name == handler.name:
                        yield f"{path.name}:{node.lineno}"


def test_no_message_shows_a_number_of_the_system() -> None:
    assert list(_raw_words(ROOT / "src")) == []


def test_messages_with_a_number_of_the_system_are_found(tmp_path: Path) -> None:
    raw = "try:\n    x()\nexcept (OSError, ValueError) as error:\n    "
    (tmp_path / "one.py").write_text(raw + 'raise RunError(f"no: {error}") from error\n')
    (tmp_path / "two.py").write_text(raw + "tell(str(error))\n")
    (tmp_path / "fine.py").write_text(raw + 'raise RunError(f"no: {plain(error)}") from error\n')
    assert list(_raw_words(tmp_path)) == ["one.py:4", "two.py:4"]


def test_what_the_system_refuses_is_said_in_its_words() -> None:
    refused = PermissionError(13, "Permission denied", "somewhere.csv")
    assert "[Errno 13]" in str(refused)
    assert plain(refused) == "Permission denied"
    assert plain(OSError("no number")) == "no number"
    assert plain(ValueError("13 is no age")) == "13 is no age"


def test_what_contributing_shows_is_what_a_test_does() -> None:
    done = (ROOT / "tests" / "test_adding.py").read_text(encoding="utf-8")
    shown = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(shown) >= 6
    for block in shown:
        assert block in done


# the registry of guarantees -----------------------------------------------------------------------

ROW = guarantees.Guarantee(
    sentence="A row may be long.",
    handled="It is cut.",
    severity="high",
    symbol="medfed.links.wire.into_ball",
    tests=("tests/links/test_wire.py::test_a_projection_never_moves_two_rows_apart",),
)

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such test": ({"tests": ("tests/links/test_wire.py::test_a_row_is_cut",)}, "does not exist"),
    "no such file": ({"tests": ("tests/test_ball.py::test_a_row_is_cut",)}, "does not exist"),
    "no test's name": ({"tests": ("tests/links/test_wire.py::finite",)}, "is no test id"),
    "a file alone": ({"tests": ("tests/links/test_wire.py",)}, "is no test id"),
    "a test twice": ({"tests": ROW.tests * 2}, "a test stands there twice"),
    "no test and no reason": ({"tests": ()}, "expected `tests`, or `untested`"),
    "a test and a reason for none": ({"untested": "hard"}, "not both"),
    "no such function": ({"symbol": "medfed.links.wire.into_cube"}, "is nothing in src/"),
    "no such method": ({"symbol": "medfed.links.wire.JointNoise.clients"}, "is nothing in src/"),
    "no such module": ({"symbol": "medfed.wires.into_ball"}, "is nothing in src/"),
    "nobody's symbol": ({"symbol": ""}, "expected `symbol`"),
    "no severity": ({"severity": "severe"}, "expected one of critical, high"),
    "half a row": ({"handled": ""}, "expected `sentence` and `handled`"),
    "two kinds of row": (
        {"party": "a site", "learns": "nothing"},
        "expected `sentence` and `handled`",
    ),
}


def _faults(*rows: guarantees.Guarantee, introduction: str = "") -> list[str]:
    section = guarantees.Section("Trust", introduction, rows=rows)
    return list(guarantees.faults([guarantees.Page("page.md", "Page", "", (section,))]))


def test_every_guarantee_names_code_and_tests_that_are_there() -> None:
    assert list(guarantees.faults(guarantees.read())) == []


def test_every_symbol_of_a_guarantee_imports() -> None:
    rows = [row for page in guarantees.read() for section in page.sections for row in section.rows]
    assert len(rows) > 150
    for row in rows:
        if row.symbol:
            pkgutil.resolve_name(row.symbol)


def test_pages_of_guarantees_are_as_the_registry_has_them() -> None:
    import make_docs

    for path, text in make_docs.registered_pages().items():
        assert path.read_text(encoding="utf-8") == text, "run `make docs`"


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_of_a_guarantee_is_found(name: str) -> None:
    changes, said = WRONG[name]
    assert _faults(ROW) == []
    assert any(said in fault for fault in _faults(replace(ROW, **changes)))


def test_a_guarantee_that_stands_twice_and_a_page_that_names_no_file_are_found() -> None:
    again = replace(ROW, sentence=ROW.sentence.upper(), handled="It is not.")
    assert [fault.split(": ")[-1] for fault in _faults(ROW, again)] == ["stands there twice"]
    assert "is no file" in _faults(introduction="Shown by `tests/test_ball.py`.")[0]
