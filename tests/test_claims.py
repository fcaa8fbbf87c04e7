"""The claim: every item that a reviewer asks for, and numbers that the ledger's events
give again.
"""

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dp_accounting as dp
import pytest
from scipy import optimize, stats

import medfed
from medfed.core.checks import PlanError, RunError
from medfed.privacy import accounting
from medfed.privacy.guarantee import GRID
from medfed.privacy.ledger import Ledger
from medfed.runs import claims
from medfed.study import Study
from tests.tables import PRIVATE, SITES, invented, plain, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {},
    "central, spare rounds": {"privacy.noise": "central", "privacy.spare_rounds": 2},
    "site, steps": {"privacy.noise": "site", "training.local_steps": 3},
    "site, two places": {"privacy.noise": "site", "privacy.max_sites_per_patient": 2},
    "adaptive": {"privacy.clipping": "adaptive"},
    "sampled": {"training.batch_size": 20},
    "sampled at sites": {"training.batch_size": 20, "privacy.noise": "site"},
    "capped": {"training.batch_size": 20, "privacy.batch_cap": 40, "privacy.accountant": "rdp"},
    "in turns": {"fleet.schedule": "cyclic", "fleet.groups": 2, "privacy.correlated": True},
}


# the second accountant takes seconds where patients are sampled
SLOW = ("sampled", "sampled at sites", "capped")
EVERY = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SETTINGS]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return medfed.load_study(write_study(tmp_path_factory.mktemp("study"), PRIVATE))


Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_of(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the folder of a run with some settings, which is made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("runs") / "run"
            _run(study, made[name], SETTINGS[name])
        return made[name]

    return folder


def _run(study: Study, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    for key, value in settings.items():
        study = study.set(key, value)
    medfed.run(study, folder)
    return claims.read(folder)


def _rows(folder: Path) -> list[dict[str, Any]]:
    with Ledger.open(folder / "sites" / "ledger.sqlite", read_only=True) as book:
        return book.rows()


# Epsilon from the ledger's events, without the accountant that made the claim ---------------------


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return the epsilon at which one Gaussian has delta (Balle and Wang 2018, theorem 8), by root
    finding.
    """

    def excess(epsilon: float) -> float:
        high, low = stats.norm.logcdf(
            [0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma]
        )
        return float(math.exp(high) - math.exp(epsilon + low)) - delta

    return float(optimize.brentq(excess, 0, 50, xtol=1e-14, rtol=1e-14))


def _epsilon(events: list[dict[str, Any]], delta: float) -> float:
    """Return what a patient has paid who paid for these events."""
    if all(event["kind"] == "gaussian" for event in events):
        mu2 = sum(event["count"] / event["noise_multiplier"] ** 2 for event in events)
        return _gaussian_epsilon(mu2**-0.5, delta)
    accountant = dp.rdp.RdpAccountant(accounting.ORDERS)
    for event in events:
        assert event["kind"] == "poisson_gaussian"
        once = dp.PoissonSampledDpEvent(
            event["probability"], dp.GaussianDpEvent(event["noise_multiplier"])
        )
        accountant.compose(once, event["count"])
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("name", [case for case in EVERY if case.values[0] != "capped"])
def test_epsilon_follows_from_the_ledgers_events(run_of: Runs, name: str) -> None:
    claim = claims.read(run_of(name))
    delta = claim["target"]["delta"] - claim["accountant"]["delta_taken_by_the_noise_sampler"]
    paid: dict[str, list[dict[str, Any]]] = {site: [] for site in SITES}
    for row in _rows(run_of(name)):
        paid[row["site"]].append(row["event"])
    copies = claim["max_sites_per_patient"] if claim["noise"]["mode"] == "site" else 1
    found = max(_epsilon(events * copies, delta) for events in paid.values())
    assert claim["epsilon"] == pytest.approx(found, rel=1e-6)
    if copies == 1:
        assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(found, rel=1e-6)
    assert found <= claim["target"]["epsilon"] == 1
    rounds = {"planned": 4, "spare": SETTINGS[name].get("privacy.spare_rounds", 0), "paid": 4}
    assert claim["rounds"] == (rounds if name != "in turns" else {**rounds, "paid": 1})


@pytest.mark.parametrize(
    "name", [case for case in EVERY if case.values[0] not in ("in turns", "adaptive")]
)
def test_the_noise_that_is_told_is_that_of_the_events(run_of: Runs, name: str) -> None:
    claim = claims.read(run_of(name))
    # a full batch: one patient in, another out; its event has half the noise
    moved = 2 if name == "capped" else 1
    told = {row["site"]: moved * row["event"]["noise_multiplier"] for row in _rows(run_of(name))}
    multiplier = claim["noise"]["multiplier"]
    assert (
        multiplier if isinstance(multiplier, dict) else dict.fromkeys(SITES, multiplier)
    ) == told
    norm = (1 + claim["clipping"]["slack"]) * (1 / GRID) + math.sqrt(
        6
    )  # six weights, each rounded by half a step at most
    sd = claim["noise"]["sd_in_grid_steps"]
    for site, each in told.items():
        assert (sd[site] if isinstance(sd, dict) else sd) == pytest.approx(each * norm)


# What a reviewer asks -----------------------------------------------------------------------------

ASKED = {
    # NIST SP 800-226 and what the house adds -> where it stands
    "unit": "unit",
    "adjacency": "adjacency",
    "trust model": "trust_model",
    "mechanism": "mechanism",
    "clip": "clipping.norm",
    "clipping": "clipping.kind",
    "noise multiplier": "noise.multiplier",
    "grid": "noise.grid",
    "sampling law": "sampling",
    "epsilon": "epsilon",
    "delta": "delta",
    "delta against 1/n": "patients.one_over_n",
    "accountant": "accountant.name",
    "accountant's version": "accountant.version",
    "second accountant": "second_accountant.epsilon",
    "composition": "composition.scope",
    "ledger": "composition.ledger.head",
    "unprotected": "unprotected",
    "assumptions": "assumptions",
    "random generator": "random_generator",
    "patients at several sites": "max_sites_per_patient",
}


def _at(claim: dict[str, Any], place: str) -> Any:
    for key in place.split("."):
        claim = claim[key]
    return claim


@pytest.mark.parametrize("name", EVERY)
def test_the_claim_holds_every_item_that_is_asked(run_of: Runs, name: str) -> None:
    claim = claims.read(run_of(name))
    for item, place in ASKED.items():
        assert _at(claim, place) not in (None, "", [], {}), item
    assert "audit" in claim and claim["audit"] is None
    assert claim["claimed"] is True and 0.7 < claim["epsilon"] <= 1 and claim["delta"] == 1e-4
    assert claim["patients"] == {
        "declared": 192,
        "one_over_n": 1 / 192,
        "delta_below_one_over_n": True,
    }
    assert claim["adjacency"] == "add or remove one patient" and claim["unit"].startswith(
        "patient: all records"
    )
    assert claim["accountant"]["version"] == f"dp-accounting {version('dp-accounting')}"
    assert claim["second_accountant"]["name"] != claim["accountant"]["name"]
    assert 0.5 * claim["epsilon"] < claim["second_accountant"]["epsilon"] < 1.2 * claim["epsilon"]
    assert "AES-256" in claim["random_generator"]


def test_what_is_told_follows_the_study(study: Study, run_of: Runs, tmp_path: Path) -> None:
    found = {name: claims.read(run_of(name)) for name in SETTINGS if name not in SLOW}
    assert "nobody else need be trusted" in found["site, steps"]["trust_model"]
    assert "security.aggregation='plain'" in found["shared"]["trust_model"]
    assert "coordinator" in found["central, spare rounds"]["trust_model"]
    assert "no amplification" in found["shared"]["sampling"]

    assert (
        found["in turns"]["mechanism"].startswith("Matrix mechanism")
        and found["in turns"]["noise"]["strategy"]
    )
    assert (
        found["adaptive"]["noise"]["count_noise"]
        and found["shared"]["noise"]["count_noise"] is None
    )
    assert found["site, steps"]["steps_per_round"] == dict.fromkeys(SITES, 3)
    assert found["shared"]["steps_per_round"] == 1
    assert all("public test data" in " ".join(claim["unprotected"]) for claim in found.values())
    assert all("how long they took" in " ".join(claim["unprotected"]) for claim in found.values())
    assert not any("baselines" in " ".join(claim["unprotected"]) for claim in found.values())
    measured = _run(study, tmp_path / "measured", {"monitor.baselines": True})
    assert any(text.startswith("baselines") for text in measured["unprotected"])


@pytest.mark.slow
def test_what_is_told_follows_how_patients_are_sampled(run_of: Runs) -> None:
    sampled, at_sites, capped = (claims.read(run_of(name)) for name in SLOW)
    assert "Poisson" in sampled["sampling"] and "20 expected" in sampled["sampling"]
    assert at_sites["steps_per_round"] == {"north": 5, "south": 3, "east": 2}
    assert "truncated to 40 patients" in capped["sampling"]


@pytest.mark.slow
def test_sites_that_take_all_their_patients_are_told_beside_those_that_sample(
    study: Study, tmp_path: Path
) -> None:
    alone = {"training.batch_size": 50, "privacy.noise": "site"}
    sampling = _run(study, tmp_path / "run", alone)["sampling"]  # east has 38
    assert "50 expected" in sampling and "sites of no more patients take all of them" in sampling


def test_seeded_noise_claims_nothing(study: Study, tmp_path: Path) -> None:
    claim = _run(study, tmp_path / "run", {"privacy.simulation_only": True})
    assert claim["claimed"] is False
    assert (
        claim["epsilon"]
        is claim["delta"]
        is claim["second_accountant"]
        is claim["composition"]["ledger"]
        is None
    )
    assert "nothing is claimed" in claim["random_generator"]
    page = claims.write_page(tmp_path / "run").read_text()
    assert "Nothing is claimed" in page and "e<sup>" not in page


def test_a_run_without_a_guarantee_has_no_claim(study: Study, tmp_path: Path) -> None:
    medfed.run(plain(study), tmp_path / "run")
    assert not (tmp_path / "run" / "privacy.json").exists()
    with pytest.raises(RunError, match="holds no claim: no epsilon was asked for"):
        claims.read(tmp_path / "run")
    with pytest.raises(RunError, match="holds no claim"):
        claims.write_page(tmp_path / "nowhere")


# The outlook --------------------------------------------------------------------------------------


def test_the_outlook_tells_noise_and_signal_before_training(study: Study, run_of: Runs) -> None:
    claim = claims.read(run_of("shared"))
    found = medfed.runs.privacy_outlook(study)
    assert (found["epsilon"], found["delta"], found["patients"], found["parameters"]) == (
        1,
        1e-4,
        192,
        6,
    )
    assert set(found["modes"]) == {"shared", "site"}
    (shared, *_) = found["modes"]["shared"]
    (site, *_) = found["modes"]["site"]
    assert shared["noise_multiplier"] == claim["noise"]["multiplier"] == site["noise_multiplier"]
    assert shared["epsilon_of_a_round"] < shared["epsilon"] == pytest.approx(claim["epsilon"])
    assert shared["snr_step"] == pytest.approx(192 / (claim["noise"]["multiplier"] * math.sqrt(6)))
    assert shared["snr_run"] == pytest.approx(2 * shared["snr_step"])  # four rounds
    assert shared["snr_step"] > site["snr_step"]


def test_the_other_mode_of_a_correlated_study_is_one_without_correlation(study: Study) -> None:
    turns = study.set("fleet.schedule", "cyclic").set("fleet.groups", 2)
    one, other = (
        medfed.runs.privacy_outlook(turns.set("privacy.correlated", c))["modes"]
        for c in (True, False)
    )
    assert one["site"] == other["site"] and one["shared"] != other["shared"]


def test_a_study_without_a_target_has_no_outlook(study: Study) -> None:
    with pytest.raises(PlanError, match=r"asks for no guarantee\. Set privacy\.epsilon=1\.0"):
        medfed.runs.privacy_outlook(plain(study))


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def finished(run_of: Runs) -> Path:
    return run_of("site, steps")


def test_privacy_plan(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    path = study.folder / "study.toml"
    assert command("privacy", "plan", path) == 0
    said = capsys.readouterr().out
    assert "epsilon 1 at delta 0.0001 for each of 192 declared training patients" in said
    assert (
        "noise = 'shared'" in said
        and "noise = 'site'" in said
        and "snr" in said
        and "north" in said
    )
    assert command("privacy", "plan", path, "--json", "--set", "privacy.epsilon=3") == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == 3
    assert command("privacy", "plan", path, "--set", "privacy.delta=0.5") == 2
    assert "privacy.delta=0.5 with 192 patients" in capsys.readouterr().err


def test_privacy_ledger(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("privacy", "ledger", finished, "--delta", "1e-4") == 0
    said = capsys.readouterr().out

    assert (
        "12 charges, chain intact" in said
        and all(name in said for name in SITES)
        and "invented private" in said
    )
    assert command("privacy", "ledger", finished, "--delta", "1e-4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["site"]: row["charges"] for row in found["accounts"]} == dict.fromkeys(SITES, 4)
    assert all(row["epsilon"] == pytest.approx(1, abs=1e-3) for row in found["accounts"])
    assert found["head"] == claims.read(finished)["composition"]["ledger"]["head"]
    monkeypatch.setenv("MEDFED_HOME", str(finished / "sites"))
    assert command("privacy", "ledger", "--json") == 0
    assert json.loads(capsys.readouterr().out)["charges"] == 12
    assert command("privacy", "ledger", finished / "checkpoints") == 2
    assert "holds no ledger.sqlite" in capsys.readouterr().err


def test_privacy_claim(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("privacy", "claim", finished) == 0
    said = capsys.readouterr().out

    items = (
        "unit",
        "adjacency",
        "trust model",
        "mechanism",
        "accountant",
        "not protected",
        "assumptions",
        "audit",
    )
    assert all(item in said for item in items) and "0.99" in said
    assert command("privacy", "claim", finished, "--json") == 0
    assert json.loads(capsys.readouterr().out) == claims.read(finished)
    assert command("privacy", "claim", finished, "--report", tmp_path / "claim.html") == 0
    assert (tmp_path / "claim.html").read_text().startswith("<!doctype html>")
    assert command("privacy", "claim", tmp_path) == 2
    assert "holds no claim" in capsys.readouterr().err


def test_a_private_run_says_what_it_promises_and_what_it_spent(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("run", study.folder / "study.toml", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "privacy: epsilon 1 at delta 0.0001 for every training patient, noise 'shared'" in said
    assert (
        "privacy spent: epsilon 1.0000 of 1 at delta 0.0001, patient level" in said
        and "loss -" in said
    )
    assert command("show", tmp_path / "run", "--json") == 0
    assert (
        json.loads(capsys.readouterr().out)["privacy"]["epsilon"]
        == claims.read(tmp_path / "run")["epsilon"]
    )


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"north": "[bold]north[/]", "south": "<b>south</b>", "east": "[/red]"}
    text = PRIVATE.replace('name = "invented private"', 'name = "<script>[x]"')
    for plain_name, name in names.items():
        text = text.replace(f"{plain_name} = ", f'"{name}" = ')
    frame = invented()
    path = write_study(tmp_path, text, frame.assign(hospital=frame["hospital"].map(names)))
    assert command("run", path, "--out", tmp_path / "run", "--set", "privacy.noise=site") == 0
    for words in (["plan", path], ["claim", tmp_path / "run"], ["ledger", tmp_path / "run"]):
        capsys.readouterr()
        assert command("privacy", *words) == 0
        said = capsys.readouterr().out
        assert "<script>[x]" in said and all(name in said for name in names.values())
    page = claims.write_page(tmp_path / "run").read_text()
    assert "<script" not in page and "<b>south" not in page
    assert "&lt;script&gt;[x]" in page and "&lt;b&gt;south&lt;/b&gt;" in page
