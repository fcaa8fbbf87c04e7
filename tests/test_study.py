"""The study file: what is written is read, what is misspelt is named, what cannot be is refused."""

import re
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core.checks import StudyError
from medfed.planning.objections import check
from medfed.study import Feature, Study, bundled, from_tables, load, names_a_folder, parse_value


def _refusal(tables: dict[str, Any]) -> str:
    with pytest.raises(StudyError) as caught:
        from_tables(tables)
    return str(caught.value)


def _nested(key: str, value: Any) -> dict[str, Any]:
    *path, last = key.split(".")
    tables: dict[str, Any] = {last: value}
    for part in reversed(path):
        tables = {part: tables}
    return tables


# loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled())
def test_bundled_studies_load_under_their_own_name(name: str) -> None:
    study = load(name)
    assert study.study.name == name
    assert study.folder == bundled()[name].parent
    check(study)


def test_a_file_lends_its_name_and_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[training]\nrounds = 3\n")
    study = load(tmp_path / "mine.toml", ["training.mu=0.5"])
    assert (study.study.name, study.folder, study.training.rounds, study.training.mu) == (
        "mine",
        tmp_path,
        3,
        0.5,
    )


@pytest.mark.parametrize("content", [b"rounds = = 3", b"\xff\xfe", b"[a]\n[a]\n"])
def test_what_is_not_toml_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(StudyError, match=r"bad\.toml' cannot be read as TOML"):
        load(tmp_path / "bad.toml")


def test_no_such_study_offers_the_nearest() -> None:
    with pytest.raises(
        StudyError, match=r"study='hart' is no file and no bundled study; did you mean 'heart'\?"
    ):
        load("hart")


def test_a_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="is no file and no bundled study"):
        load(tmp_path)


# keys and types -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "close"),
    [
        ("trainin", "training"),
        ("training.round", "rounds"),
        ("data.targt", "target"),
        ("data.dictionary.age.rnage", "range"),
        ("sites.name", "names"),
        ("folderr", None),
        ("folder", None),  # where the study lies is no key
    ],
)
def test_an_unknown_key_offers_the_nearest(key: str, close: str | None) -> None:
    error = _refusal(_nested(key, {} if "." not in key else 1))
    assert f"unknown key {key!r}" in error
    assert (f"did you mean {close!r}?" if close else "known: ") in error


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("training.rounds", 1.5, "a number"),
        ("training.rounds", "ten", "a number"),
        ("training.rounds", True, "a number"),
        ("training.learning_rate", True, "a number"),
        ("training.learning_rate", "fast", "a number"),
        ("monitor.baselines", 1, "bool"),
        ("study.name", True, "str"),
        ("study.name", ["a"], "str"),
        ("data.features", 3, "a list"),
        ("data.features", {"a": 1}, "a list"),
        ("sites.shares", [0.5, "half"], "a number"),
        ("data.preprocess", "robst", "one of 'robust', 'standard', 'dictionary', 'none'"),
        ("data.preprocess", ["robust"], "one of"),
        ("training", 5, "a table [training]"),
        ("data.dictionary", 5, "a table [data.dictionary]"),
        ("data.dictionary.age", 5, "a table [data.dictionary.age]"),
        ("model.options", [1], "a table [model.options]"),
    ],
)
def test_a_wrong_type_is_named(key: str, value: Any, expected: str) -> None:
    error = _refusal(_nested(key, value))
    assert error.startswith(f"{key}=") and f"expected {expected}" in error


def test_kind_conversions() -> None:
    study = from_tables(
        {"data": {"positive": 1, "features": "age"}, "training": {"learning_rate": 1}}
    )
    assert (study.data.positive, study.data.features) == ("1", ("age",))
    assert type(study.training.learning_rate) is float
    codes = from_tables(_nested("data.dictionary.cp.categories", [1, 2.0, "3", 1.5]))
    assert codes.data.dictionary["cp"].categories == ("1", "2", "3", "1.5")


# ranges -------------------------------------------------------------------------------------------

NAN = float("nan")
INF = float("inf")
TWO = {"names": ["a", "b"], "shares": [0.5, 0.5]}
VIOLATIONS: list[tuple[str, Any]] = [
    ("study.seed", -1),
    ("training.rounds", 0),
    ("training.local_epochs", 0),
    ("training.local_steps", -1),
    ("training.batch_size", -1),
    ("training.learning_rate", -0.1),
    ("training.learning_rate", NAN),
    ("training.learning_rate", INF),
    ("training.momentum", 1.0),
    ("training.momentum", -0.1),
    ("training.beta1", 1.0),
    ("training.beta1", -0.1),
    ("training.beta2", 1.0),
    ("training.beta2", 0.0),
    ("training.weight_decay", -1e-9),
    ("training.mu", -1.0),
    ("training.mu", INF),
    ("training.server_learning_rate", -0.1),
    ("training.server_momentum", 1.0),
    ("training.server_beta2", 1.0),
    ("training.server_epsilon", 0.0),
    ("training.quorum", 0.0),
    ("training.quorum", 1.01),
    ("training.deadline", 0.0),
    ("training.deadline", NAN),
    ("data.test_fraction", 0.0),
    ("data.test_fraction", 1.0),
    ("training.average", 1.0),
    ("training.average", -0.1),
    ("privacy.epsilon", 0.0),
    ("privacy.epsilon", -1.0),
    ("privacy.epsilon", NAN),
    ("privacy.delta", 0.0),
    ("privacy.delta", 1.1),
    ("privacy.delta", NAN),
    ("privacy.clip", 0.0),
    ("privacy.clip", NAN),
    ("privacy.quantile", 0.0),
    ("privacy.quantile", 1.0),
    ("privacy.batch_cap", -1),
    ("privacy.sizes.north", 0),
    ("privacy.max_sites_per_patient", 0),
    ("privacy.lifetime_epsilon", 0.0),
    ("privacy.lifetime_epsilon", NAN),
    ("privacy.spare_rounds", -1),
    ("privacy.evaluation_epsilon", -0.1),
    ("privacy.evaluation_epsilon", INF),
    ("robustness.max_malicious", 0.5),
    ("robustness.malicious", -0.1),
    ("robustness.bound", -1.0),
    ("robustness.bound", INF),
    ("robustness.tolerance", -0.1),
    ("robustness.tolerance", NAN),
    ("security.min_group", 1),
    ("security.colluding", 0.5),
    ("security.fraction_bits", 41),
    ("security.bound", 0.0),
    ("data.dictionary.age.factor", 0.0),
    ("data.dictionary.age.offset", NAN),
    ("fleet.groups", 0),
    ("fleet.clients_per_round", -1),
    ("monitor.evaluate_every", -1),
    ("monitor.checkpoints", 1),
    ("data.dictionary.age.range", [1.0]),
    ("data.dictionary.age.range", [1.0, 2.0, 3.0]),
    ("data.dictionary.age.range", [2.0, 1.0]),
    ("data.dictionary.age.range", [1.0, 1.0]),
    ("data.dictionary.age.range", [0.0, INF]),
    ("data.dictionary.age.range", [NAN, 1.0]),
]


@pytest.mark.parametrize(
    ("key", "value"), VIOLATIONS, ids=[f"{key}={value}" for key, value in VIOLATIONS]
)
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    error = _refusal(_nested(key, value))
    assert error.startswith(f"{key}={value!r}; expected ")
    assert "Change it in the study file or with --set." in error


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ({"names": ["a", "a"], "shares": [0.5, 0.5]}, "each name once"),
        ({"names": ["a", ""], "shares": [0.5, 0.5]}, "no empty name"),
        ({"names": ["a", "b"], "shares": [1.0]}, "2 shares, one a name"),
        ({"names": ["a", "b"], "shares": [1.5, -0.5]}, "shares above 0"),
        ({"names": ["a", "b"], "shares": [0.5, 0.4]}, "shares that sum to 1, not 0.9"),
        ({"names": ["a", "b"], "shares": [NAN, 0.5]}, "shares above 0"),
    ],
)
def test_shares_that_do_not_fit_are_refused(sites: dict[str, Any], expected: str) -> None:
    assert f"expected {expected}" in _refusal({"sites": sites})


@pytest.mark.parametrize("low_high", [[], [-1.0, 5.0]])
def test_a_logarithm_needs_a_range_from_zero(low_high: list[float]) -> None:
    error = _refusal({"data": {"dictionary": {"age": {"range": low_high, "log": True}}}})
    assert "data.dictionary.age.range" in error and "from 0 for log = true" in error


# set ----------------------------------------------------------------------------------------------


def test_set_returns_another_study() -> None:
    study = replace(Study(), folder=Path("/somewhere"))
    other = study.set("training.rounds", 5)
    assert (study.training.rounds, other.training.rounds) == (10, 5)
    assert other.folder == study.folder
    assert study.set("data.dictionary.age.range", [0, 9]).data.dictionary["age"] == Feature(
        range=(0.0, 9.0)
    )


@pytest.mark.parametrize("key", ["training.rounds.x", "nothing.x", "rounds", "study.name.a.b"])
def test_set_of_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(StudyError, match="unknown key"):
        Study().set(key, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ('{a = 1, b = "x"}', {"a": 1, "b": "x"}),
        ('"5"', "5"),
        ("fedprox", "fedprox"),
        ("St. Mary", "St. Mary"),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_values_are_toml_or_else_text(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_settings_change_lists_tables_and_strings() -> None:
    settings_ = [
        "training.algorithm = fedprox",
        "model.options={hidden = [8, 4]}",
        'data.features=["a", "b"]',
    ]
    study = load("breast-cancer", [*settings_, "study.seed=9"])
    assert study.training.algorithm == "fedprox" and study.model.options == {"hidden": [8, 4]}
    assert study.data.features == ("a", "b") and study.study.seed == 9


@pytest.mark.parametrize("turn", [1, -1])
def test_settings_that_must_agree_need_no_order(turn: int) -> None:
    assert load(
        "breast-cancer", ['sites.names=["a", "b"]', "sites.shares=[0.5, 0.5]"][::turn]
    ).sites.names == (
        "a",
        "b",
    )


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(StudyError, match=r"--set 'training\.rounds'; expected KEY=VALUE"):
        load("heart", ["training.rounds"])


# round trip and digest ----------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    TEXT.filter(names_a_folder),  # others are refused: tests/test_folders.py
    st.integers(0, 2**63 - 1),
    st.floats(1e-9, 1e5),
    st.lists(TEXT, max_size=3, unique=True),
    st.dictionaries(
        TEXT, st.tuples(st.floats(0, 1), st.floats(2, 9), st.booleans(), TEXT), max_size=2
    ),
    st.dictionaries(
        st.text("abc", min_size=1), st.integers() | st.booleans() | TEXT | st.lists(st.integers())
    ),
)
@settings(max_examples=50, deadline=None)
def test_toml_round_trip(
    name: str,
    seed: int,
    rate: float,
    features: list[str],
    entries: dict[str, Any],
    options: dict[str, Any],
) -> None:
    dictionary = {
        n: {"range": [low, high], "log": log, "unit": u}
        for n, (low, high, log, u) in entries.items()
    }

    study = from_tables(
        {
            "study": {"name": name, "seed": seed},
            "training": {"learning_rate": rate},
            "data": {"features": features, "dictionary": dictionary},
            "model": {"options": options},
        }
    )
    again = from_tables(tomllib.loads(study.toml()))
    assert again == study and again.digest() == study.digest()


@pytest.mark.parametrize("name", bundled())
def test_bundled_studies_survive_toml(name: str) -> None:
    study = load(name)
    assert from_tables(tomllib.loads(study.toml())) == replace(study, folder=Path())


@pytest.mark.parametrize(
    "line", ["Höhenklinik = 110", "Nord West = 1", "Süd= 3", "[data.dictionary.Größe]"]
)
def test_a_name_that_needs_quotes_is_told_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "study.toml").write_text(f"[privacy.sizes]\n{line}\n", encoding="utf-8")
    with pytest.raises(StudyError) as caught:
        load(tmp_path / "study.toml")
    name = line.split("=")[0].strip("[] ").split(".")[-1]
    assert "line 2" in str(caught.value) and line in str(caught.value)
    assert f'needs quotes: "{name}"' in str(caught.value)


@pytest.mark.parametrize("line", ["north = ", 'north = "x', "= 3", "north 110", "[data"])
def test_a_line_that_is_no_toml_is_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "study.toml").write_text(f"[privacy.sizes]\n{line}\n", encoding="utf-8")
    with pytest.raises(StudyError, match=re.escape(line.strip())) as caught:
        load(tmp_path / "study.toml")
    assert "quotes:" not in str(caught.value)


def _changed(key: str, value: Any) -> Any:
    """Return another value of the same kind, in range, for any key of the study."""
    known = {
        "data.task": "binary",
        "data.on_missing": "refuse",
        "data.on_outside": "refuse",
        "data.split": "stratified",
        "training.path": "loop",
    }
    known |= {
        "data.preprocess": "none",
        "training.optimizer": "adam",
        "training.weighting": "uniform",
    }
    known |= {"privacy.clipping": "fixed", "privacy.scope": "run", "privacy.accountant": "rdp"}
    known |= {"data.identity": "exact", "data.missing_patient": "own", "data.threshold": "youden"}
    known |= {
        "data.join": ({"table": "x"},),
        "data.format.separator": ";",
        "data.format.decimal": ",",
    }
    known |= {
        "data.format.thousands": "'",
        "data.format.encoding": "cp1252",
        "data.format.labels": "labels",
    }
    known |= {"robustness.sight": "all"}
    known |= {"privacy.noise": "site", "privacy.sizes": {"a": 1}, "fleet.schedule": "cyclic"}
    known |= {
        "data.drop": ("rows without target",),
        "data.absent": {"a": ("x",)},
        "data.test_from": "2024-01-01",
    }
    known |= {"robustness.max_malicious": 0.25, "robustness.malicious": 0.25}
    known |= {"data.site_maps": {"a": "a.toml"}, "data.site_maps_sha256": {"a": "00"}}
    if key in known:
        return known[key]
    if isinstance(value, bool):
        return not value
    if value == INF:
        return 1.0
    if isinstance(value, (int, float)):
        return (value / 2 or 0.5) if isinstance(value, float) else value + 1

    return (
        value + "x"
        if isinstance(value, str)
        else {"a": {}}
        if isinstance(value, dict)
        else (*value, "x")
    )


def _keys() -> list[tuple[str, Any]]:
    study = Study()
    found = []
    for table in fields(study):
        part = getattr(study, table.name)
        if is_dataclass(part):
            found += [(f"{table.name}.{f.name}", getattr(part, f.name)) for f in fields(part)]
    nested = [(key, value) for key, value in found if is_dataclass(value)]
    found += [
        (f"{key}.{f.name}", getattr(value, f.name)) for key, value in nested for f in fields(value)
    ]
    found = [one for one in found if one not in nested]
    only = ("privacy.unit", "security.aggregation")  # they know one value so far
    return [
        (key, value) for key, value in found if key not in only and not key.startswith("sites.")
    ]


@pytest.mark.parametrize(("key", "value"), _keys(), ids=[key for key, _ in _keys()])
def test_a_changed_value_changes_the_digest(key: str, value: Any) -> None:
    study = Study()
    assert study.set(key, value).digest() == study.digest()
    assert study.set(key, _changed(key, value)).digest() != study.digest()


def test_sites_change_the_digest_and_the_folder_does_not() -> None:
    study = from_tables({"sites": TWO})
    assert (
        study.digest()
        != from_tables({"sites": {**TWO, "shares": [0.4, 0.6]}}).digest()
        != Study().digest()
    )
    assert replace(study, folder=Path("/else")).digest() == study.digest()
