"""What breaks a guarantee is refused before any record is read: both sides by name, the reason, and
a way out.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core.checks import PlanError
from medfed.planning.objections import check
from medfed.privacy import claim_refusals
from medfed.study import Study, from_tables

SOUND: dict[str, Any] = {
    "data": {
        "target": "died",
        "patient": "id",
        "preprocess": "dictionary",
        "test_is_public": True,
        "dictionary": {"died": {"range": [0, 9]}, "age": {"range": [0, 100]}},
    },
    "training": {"rounds": 6, "batch_size": 0},
    "privacy": {"epsilon": 1.0, "delta": 1e-6},
}


def _study(values: Mapping[str, Any]) -> Study:
    study = from_tables(SOUND)
    for key, value in values.items():
        study = study.set(key, value)
    return study


def _refusal(study: Study) -> str | None:
    """Return the text of the refusal, or None."""
    try:
        claim_refusals.check(study)
    except PlanError as error:
        return str(error)
    return None


def _followed(study: Study, text: str) -> Study:
    """Return the study after the first piece of advice: each `key=value` after "Set", up to an
    alternative.
    """
    advice = text.rsplit(" Set ", 1)[1]
    advice = re.split(r", or |, and declare|, and raise| and choose|; take", advice)[0]
    found = re.findall(r"([a-z_]+(?:\.[a-z_]+)?)=('[a-z]+'|true|false|[\d.e+-]*\d)", advice)
    assert found, advice
    table = "privacy"
    for name, value in found:
        table, key = name.split(".") if "." in name else (_table_of(name, table), name)
        study = study.set(f"{table}.{key}", _parsed(value))
    return study


def _table_of(key: str, usual: str) -> str:
    """Return the table of a key that is told without: the one told before it, or where it is
    a key.
    """
    study = from_tables({})
    return next(
        t
        for t in (usual, "training", "privacy", "fleet", "data")
        if hasattr(getattr(study, t), key)
    )


def _parsed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    number = float(text) if not text.startswith("'") else None
    return text.strip("'") if number is None else int(number) if number.is_integer() else number


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    # name, what is set, one side, the other side
    *(
        (f"{kind} scaling", {"data.preprocess": kind}, "privacy.epsilon=1", f"data.preprocess='{kind}'")
        for kind in ("robust", "standard")
    ),
    ("an error about a gap", {"data.on_missing": "refuse"}, "privacy.epsilon=1", "data.on_missing='refuse'"),
    ("an error about a value", {"data.on_outside": "refuse"}, "privacy.epsilon=1", "data.on_outside='refuse'"),
    *(
        (
            f"an input that nothing bounds, {kind}",
            {"data.features": ["age", "note"], "data.preprocess": kind},
            "privacy.epsilon=1",
            "data.features='note'",
        )
        for kind in ("dictionary", "none")
    ),
    *(
        (
            f"a target that nothing bounds, {kind}",
            {"data.task": "regression", "data.target": "days", "data.preprocess": kind},
            "privacy.epsilon=1",
            "data.task='regression' without data.dictionary.days.range",
        )
        for kind in ("dictionary", "none")
    ),
    ("exact shares", {"data.split": "stratified"}, "privacy.epsilon=1", "data.split='stratified'"),
    ("raw test figures", {"data.test_is_public": False}, "privacy.epsilon=1", "test figures without noise"),
    *(
        (name, {"training.algorithm": name}, "privacy.epsilon=1", f"training.algorithm='{name}'")
        for name in ("local", "pooled")
    ),
    (
        "a filter by pld",
        {"privacy.accountant": "pld"},
        "privacy.accountant='pld'",
        "privacy.scope='study'",
    ),
    (
        "unlike sites by pld",
        {
            "privacy.accountant": "pld",
            "privacy.scope": "run",
            "privacy.noise": "site",
            "privacy.max_sites_per_patient": 2,
        },
        "privacy.accountant='pld'",
        "privacy.max_sites_per_patient=2 with privacy.noise='site'",
    ),
    ("patients without a name", {"data.patient": ""}, "privacy.scope='study'", "data.patient=''"),
    (
        "devices without a name",
        {"data.patient": "", "sites.kind": "device"},
        "privacy.scope='study'",
        "data.patient=''",
    ),
    (
        "rows that name nobody",
        {"data.missing_patient": "own"},
        "data.missing_patient='own'",
        "privacy.scope='study'",
    ),
    (
        "a norm that follows one site",
        {"privacy.clipping": "adaptive", "privacy.noise": "site"},
        "privacy.clipping='adaptive'",
        "privacy.noise='site'",
    ),
    *(
        (f"{name} of several labels", {"data.test_is_public": False, "privacy.evaluation_epsilon": 0.5,
         "monitor.evaluate_every": 6, **values}, "privacy.evaluation_epsilon=0.5", f"data.task='{name}'")
        for name, values in {
            "multiclass": {"data.task": "multiclass"},
            "regression": {"data.task": "regression"},
            "auto": {"data.dictionary.died.categories": ["a", "b", "c"]},
        }.items()
    ),
    (
        "a noised test in every round",
        {"data.test_is_public": False, "privacy.evaluation_epsilon": 0.5},
        "privacy.evaluation_epsilon=0.5",
        "monitor.evaluate_every=1",
    ),
    (
        "a test that no patient can pay",
        {"data.test_is_public": False, "privacy.evaluation_epsilon": 0.9, "monitor.evaluate_every": 6},
        "privacy.evaluation_epsilon=0.9",
        "privacy.epsilon=1",
    ),
    *(
        (f"{noise} noise and {key}={value}", {"privacy.noise": noise, f"training.{key}": value},
         f"privacy.noise='{noise}'", side)
        for noise in ("shared", "central")
        for key, value, side in (
            ("local_steps", 3, "training.local_steps=3"),
            ("local_epochs", 2, "training.local_epochs=2"),
            ("optimizer", "adam", "training.optimizer='adam' with momentum=0"),
            ("momentum", 0.9, "training.optimizer='sgd' with momentum=0.9"),
            ("weighting", "uniform", "training.weighting='uniform'"),
        )
    ),
    (
        "turns and a draw",
        {"fleet.schedule": "cyclic", "fleet.groups": 3, "fleet.clients_per_round": 2},
        "fleet.schedule='cyclic'",
        "fleet.clients_per_round=2",
    ),
    *(
        (f"two places and {key}", {"privacy.max_sites_per_patient": 2, key: value},
         "privacy.max_sites_per_patient=2", f"{key}={value!r}")
        for key, value in (
            ("fleet.clients_per_round", 2),
            ("fleet.schedule", "cyclic"),
            ("training.quorum", 0.5),
            ("training.batch_size", 32),
        )
    ),
    (
        "correlated noise at sites",
        {"privacy.correlated": True, "fleet.schedule": "cyclic", "fleet.groups": 3, "privacy.noise": "site"},
        "privacy.correlated=true",
        "privacy.noise='site'",
    ),
    (
        "correlated noise and everybody in every round",
        {"privacy.correlated": True},
        "privacy.correlated=true",
        "fleet.schedule='random' with groups=1",
    ),
    (
        "correlated noise and one group",
        {"privacy.correlated": True, "fleet.schedule": "cyclic"},
        "privacy.correlated=true",
        "fleet.schedule='cyclic' with groups=1",
    ),
    (
        "correlated noise and one round",
        {"privacy.correlated": True, "fleet.schedule": "cyclic", "fleet.groups": 2, "training.rounds": 1},
        "privacy.correlated=true",
        "training.rounds=1",
    ),
    *(
        (f"correlated noise and {side}",
         {"privacy.correlated": True, "fleet.schedule": "cyclic", "fleet.groups": 3, key: value},
         "privacy.correlated=true", side)
        for key, value, side in (
            ("training.batch_size", 32, "training.batch_size above 0"),
            ("privacy.clipping", "adaptive", "privacy.clipping='adaptive'"),
            ("privacy.simulation_only", True, "privacy.simulation_only=true"),
        )
    ),
]  # fmt: skip
NO_ADVICE = {
    "training.batch_size above 0",
    "privacy.clipping='adaptive'",
    "privacy.simulation_only=true",
    "data.features='note'",  # only a person knows the range
    "data.task='regression' without data.dictionary.days.range",
}
IDS = [name for name, *_ in CASES]


def test_the_sound_study_is_not_refused() -> None:
    assert _refusal(_study({})) is None
    check(_study({}))
    for noise in ("site", "central"):
        assert _refusal(_study({"privacy.noise": noise})) is None


@pytest.mark.parametrize(("name", "values", "side", "other"), CASES, ids=IDS)
def test_what_does_not_compose_names_both_sides(
    name: str, values: dict[str, Any], side: str, other: str
) -> None:
    text = _refusal(_study(values))
    assert text is not None
    assert text.startswith(f"{side} and {other}") and " do not compose: " in text
    reason, action = text.split(" do not compose: ")[1].split(". ", 1)
    assert (
        len(reason) > 20
        and action.split()[0] in ("Set", "Take", "Hold", "Leave", "Raise")
        and text.endswith(".")
    )


@pytest.mark.parametrize(("name", "values", "side", "other"), CASES, ids=IDS)
def test_the_whole_plan_refuses_it_too(
    name: str, values: dict[str, Any], side: str, other: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(f"{side} and {other}")):
        check(_study(values))


ADVISED = [(name, values, other) for name, values, _, other in CASES if other not in NO_ADVICE]


@pytest.mark.parametrize(("name", "values", "other"), ADVISED, ids=[name for name, *_ in ADVISED])
def test_the_advice_takes_the_refusal_away(name: str, values: dict[str, Any], other: str) -> None:
    study = _study(values)
    text = _refusal(study)
    assert text is not None
    if " Set " in text:
        study = _followed(study, text)
    else:  # told in words
        study = study.set("training.algorithm", "fedavg").set("data.test_is_public", True)
        study = study.set("training.rounds", max(2, study.training.rounds))
    again = _refusal(study)
    assert again is None or other not in again


@pytest.mark.parametrize(("name", "values", "side", "other"), CASES, ids=IDS)
def test_without_a_claim_none_of_it_is_refused(
    name: str, values: dict[str, Any], side: str, other: str
) -> None:
    study = _study(values)
    none = replace(
        study, privacy=replace(study.privacy, epsilon=float("inf"), delta=1.0, noise="none")
    )
    text = _refusal(none)
    # what has no meaning without it
    about_noise = ("privacy.correlated" in side) or ("fleet.schedule" in side)
    assert text is None or about_noise


SETTINGS: dict[str, list[Any]] = {
    "data.preprocess": ["dictionary", "robust", "none"],
    "data.split": ["patient", "stratified"],
    "data.patient": ["id", ""],
    "data.missing_patient": ["refuse", "own"],
    "data.test_is_public": [True, False],
    "training.algorithm": ["fedavg", "fedprox", "fedadam"],
    "training.path": ["auto", "loop", "func"],
    "training.local_epochs": [1, 4],
    "training.local_steps": [0, 1, 5],
    "training.batch_size": [0, 16],
    "training.optimizer": ["sgd", "adam"],
    "training.momentum": [0.0, 0.5],
    "training.weighting": ["samples", "uniform"],
    "training.quorum": [1.0, 0.5],
    "privacy.epsilon": [1.0, 0.01],
    "privacy.noise": ["auto", "site", "shared", "central"],
    "privacy.clipping": ["automatic", "fixed", "adaptive"],
    "privacy.accountant": ["auto", "pld"],
    "privacy.scope": ["study", "run"],
    "privacy.evaluation_epsilon": [0.0, 0.5],
    "privacy.max_sites_per_patient": [1, 2],
    "privacy.correlated": [False, True],
    "fleet.schedule": ["random", "cyclic"],
    "fleet.groups": [1, 3],
    "fleet.clients_per_round": [0, 2],
}


@given(
    st.fixed_dictionaries(
        {}, optional={key: st.sampled_from(values) for key, values in SETTINGS.items()}
    )
)
@settings(max_examples=60)
def test_whoever_follows_the_advice_arrives_at_a_study_that_is_not_refused(
    values: dict[str, Any],
) -> None:
    """From any mixture of settings, one piece of advice after another, without going round in a
    circle.
    """
    study = _study(values)
    seen = []
    while (text := _refusal(study)) is not None:
        assert text not in seen, f"following the advice leads back to: {text}"
        seen.append(text)
        if "Leave one of them out" in text:
            study = study.set("privacy.correlated", False)
        else:
            study = _followed(study, text)
    assert len(seen) <= len(SETTINGS)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(1.0, 1e-6), (0.3, 1e-6), (0.01, 1e-9), (8.0, 1e-4)]
)
def test_the_noised_test_that_is_suggested_can_be_paid(epsilon: float, delta: float) -> None:
    values = {"privacy.epsilon": epsilon, "privacy.delta": delta, "data.test_is_public": False}
    text = _refusal(_study(values))
    assert text is not None
    suggested = float(re.findall(r"privacy\.evaluation_epsilon=([\d.e-]+) to pay", text)[0])
    assert epsilon / 200 < suggested <= epsilon / 2
    values |= {"privacy.evaluation_epsilon": suggested, "monitor.evaluate_every": 6}
    assert _refusal(_study(values)) is None


def test_one_step_is_one_step_however_it_is_said() -> None:
    assert _refusal(_study({"training.local_steps": 1, "training.local_epochs": 9})) is None


@pytest.mark.parametrize(
    "marks", [{"data.test": "part"}, {"data.test_from": "2024-01-01", "data.time": "admitted"}]
)
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_nobody_is_trained_on_here_and_tested_there(marks: dict[str, Any], accountant: str) -> None:
    """The attack: a patient's later row at a second site was published as a public test."""
    both = {**marks, "privacy.max_sites_per_patient": 2, "privacy.accountant": accountant}
    with pytest.raises(PlanError, match=r"max_sites_per_patient=2 and data\.test"):
        check(_study(both))
    told = [
        str(one.error)
        for one in claim_refusals.find(_study({**both, "privacy.max_sites_per_patient": 1}))
    ]
    assert not any("max_sites" in text for text in told)


@pytest.mark.parametrize(
    ("on", "refused"), [(["stay"], True), ([], False), (["id"], False), (["id", "stay"], False)]
)
def test_tables_are_joined_by_the_patient(on: list[str], refused: bool) -> None:
    """The attack: one patient's row in the joined table bore another's number of stay, and emptied
    it.
    """
    told = [
        str(one.error)
        for one in claim_refusals.find(_study({"data.join": [{"table": "labs.csv", "on": on}]}))
    ]
    assert any("data.join[0].on" in text for text in told) == refused
