"""A site's account pays before a record is read, for what the round really costs, once; and the
coordinator counts.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medfed.core.checks import BudgetError, LedgerError
from medfed.privacy.guarantee import Guarantee, resolve
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.privacy.privacy_events import Gaussian, PoissonGaussian, from_json
from medfed.privacy.run_meter import Metered, NoClaim
from medfed.privacy.site_ledger import SiteLedger
from medfed.study import Study, from_tables

ROSTERS = {"north": [f"north-{i}" for i in range(90)], "south": [f"south-{i}" for i in range(40)]}
SIZES = {"north": 90, "south": 40}


def _study(**values: Any) -> Study:
    tables = {
        "study": {"name": "s"},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "training": {"batch_size": 0},
    }
    study = from_tables(tables).set("training.rounds", 4)
    for key, value in values.items():
        study = study.set(key.replace("__", "."), value)
    return study


def _account(
    path: Path | None = None,
    run: str = "r1",
    rosters: Mapping[str, list[str]] = ROSTERS,
    fresh: bool = True,
    **values: Any,
) -> SiteLedger:
    """Return the account of a run that has enrolled its patients."""
    study = _study(**values)
    account = SiteLedger(path, study)
    account.enrol(run, rosters, resolve(study, SIZES, 10), fresh)
    return account


def _paid(account: SiteLedger) -> list[tuple[str, int]]:
    return [
        (str(row["site"]), int(str(row["round"])))
        for row in account.ledger.rows()
        if row["label"] == "round"
    ]


def _pays(
    account: SiteLedger, round: int, sites: tuple[str, ...] = ("north", "south")
) -> dict[str, BudgetError]:
    """Pay for a round that goes well."""
    refused = account.pay(round, sites)
    account.note_answered(site for site in sites if site not in refused)
    return refused


def _pays_test(account: SiteLedger, site: str, ids: list[str]) -> None:
    """Pay for a test that goes well; raise where that is refused."""
    refused = account.pay_tests({site: ids})
    account.note_tested([site])
    if refused:
        raise refused[site]


def _test_charges(account: SiteLedger, patient: str) -> int:
    """Return how often a patient has paid for a test."""
    name = account.ledger.pseudonym(patient)
    rows = [row for row in account.ledger.rows() if row["label"] == "test"]
    members = account.ledger._sql.execute(
        "SELECT cohort FROM members WHERE pseudonym = ?", (name,)
    ).fetchall()
    return sum((row["cohort"],) in members for row in rows)


# paying -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_round_is_charged_to_each_sites_patients_as_the_event_it_is(noise: str) -> None:
    account = _account(privacy__noise=noise, training__batch_size=20)
    assert _pays(account, 1) == {}
    rows = account.ledger.rows()
    guarantee = account.guarantee
    assert guarantee is not None
    assert [(row["study"], row["run"], row["site"], row["round"]) for row in rows] == [
        ("s", "r1", "north", 1),
        ("s", "r1", "south", 1),
    ]
    for row in rows:
        release = guarantee.releases[str(row["site"])]
        event = from_json(row["event"])  # type: ignore[arg-type]
        drawn = 20 / (release.size if noise == "site" else 65)  # the mean of 90 and 40
        assert event == PoissonGaussian(drawn, release.noise_multiplier, release.steps)
    assert [account.cohorts[site].patients for site in ROSTERS] == [90, 40]


def test_enrolment_charges_nothing() -> None:
    assert _account().ledger.rows() == []


def test_the_whole_plan_is_paid_and_not_a_round_more() -> None:
    account = _account(privacy__spare_rounds=2)
    for number in range(1, 7):
        assert _pays(account, number) == {}
    assert 0.999 < float(str(account.report()["epsilon_all_runs"])) <= 1
    refused = _pays(account, 7)
    assert set(refused) == {"north", "south"}
    assert all("refused, and nothing was charged" in str(error) for error in refused.values())
    assert len(account.ledger.rows()) == 12


def test_who_cannot_pay_is_refused_alone(tmp_path: Path) -> None:
    """Patients of one site have paid elsewhere; the other site's have not, and go on."""
    path = tmp_path / "ledger.sqlite"
    both, again = _account(path), _account(path, "r2")  # both enrolled while nothing was spent
    for number in range(1, 5):
        assert _pays(both, number, ("north",)) == {}
    refused = _pays(again, 1)
    assert set(refused) == {"north"} and _paid(again)[-1] == ("south", 1)
    assert "left for one release" in str(refused["north"])


def test_what_failed_after_it_was_paid_is_not_paid_twice() -> None:
    account = _account()
    assert account.pay(1, ["north", "south"]) == {}
    account.note_answered(["south"])  # north's work failed, and is tried again
    assert account.pay(1, ["north"]) == {}
    assert _paid(account) == [("north", 1), ("south", 1)]
    account.note_answered(["north"])
    assert _pays(account, 2) == {}
    assert _paid(account) == [("north", 1), ("south", 1), ("north", 2), ("south", 2)]


def test_a_correlated_run_is_paid_in_full_by_its_first_round() -> None:
    values = {"privacy__correlated": True, "fleet__schedule": "cyclic", "fleet__groups": 2}
    account = _account(**values)
    for number in range(1, 5):
        assert _pays(account, number) == {}
    assert _paid(account) == [("north", 1), ("south", 1)]
    assert 0.999 < float(str(account.report()["epsilon_all_runs"])) <= 1


# patients of several sites ------------------------------------------------------------------------

SHARED = {"north": ["only-north", "both"], "south": ["both", "only-south"]}


@pytest.mark.parametrize("threshold", [False, True])
def test_where_a_patient_pays_at_one_of_two_sites_no_site_answers_without_the_other(
    threshold: bool,
) -> None:
    """Else that patient's records at south would be summed in rounds, or counted, that nobody paid
    for.
    """
    account = _account(
        rosters=SHARED, privacy__max_sites_per_patient=2, data__threshold="prevalence"
    )
    pay = partial(account.pay_query, "threshold") if threshold else partial(account.pay, 1)
    refused = pay(["south"])
    assert set(refused) == {"south"} and "not all sites were asked" in str(refused["south"])
    assert account.ledger.rows() == [] and pay(["north", "south"]) == {}
    assert [row["site"] for row in account.ledger.rows()] == ["north", "south"]


@pytest.mark.parametrize("threshold", [False, True])
def test_where_sites_share_patients_all_pay_or_none(tmp_path: Path, threshold: bool) -> None:
    """Patients of north have paid elsewhere: south's shared patient would else take part unpaid."""
    path = tmp_path / "ledger.sqlite"
    both = {"privacy__max_sites_per_patient": 2, "data__threshold": "prevalence"}
    again = _account(path, "r2", SHARED, **both)
    once = _account(path, "r1", {"north": ["only-north"]}, data__threshold="prevalence")
    for number in range(1, 5):
        assert _pays(once, number, ("north",)) == {}
    assert once.pay_query("threshold", ["north"]) == {}
    told = len(again.ledger.rows())
    if threshold:
        refused = again.pay_query("threshold", ["north", "south"])
    else:
        refused = again.pay(1, ["north", "south"])
    assert set(refused) == {"north", "south"} and len(again.ledger.rows()) == told


@pytest.mark.parametrize(("noise", "times"), [("shared", 1), ("site", 2)])
def test_a_patient_of_two_sites_pays_once_for_joint_noise_and_at_each_site_for_its_own(
    noise: str, times: int
) -> None:
    account = _account(rosters=SHARED, privacy__noise=noise, privacy__max_sites_per_patient=2)
    assert _pays(account, 1) == {}
    ledger = account.ledger
    guarantee = account.guarantee
    assert guarantee is not None
    one = Gaussian(guarantee.releases["north"].noise_multiplier)
    expected = guarantee.epsilon_of(Gaussian(one.noise_multiplier, times))
    delta = 1e-5 - guarantee.delta_sampler
    assert ledger.worst(delta, pseudonym=ledger.pseudonym("both")) == pytest.approx(expected)
    assert ledger.worst(delta, pseudonym=ledger.pseudonym("only-south")) == pytest.approx(
        guarantee.epsilon_of(one)
    )
    for number in range(2, 5):
        assert _pays(account, number) == {}
    assert ledger.worst(delta) <= 1


# several runs -------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = _account(path)
    assert _pays(first, 1) == {}
    with pytest.raises(
        BudgetError, match=r"epsilon=0\.\d+ of 1 .*left for one release: 0\.8\d+, asked: 0\.99"
    ) as told:
        _account(path, "r2")
    assert len(first.ledger.rows()) == 2
    # how many and who they are stays here
    assert "90" not in str(told.value) and "north-" not in str(told.value)
    _account(path, "r1", fresh=False)  # who goes on with a run is asked round by round
    assert _pays(first, 2) == {}


def test_other_patients_of_the_site_have_a_budget_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = _account(path)
    for number in range(1, 5):
        _pays(first, number)
    others = {"north": [f"new-{i}" for i in range(90)], "south": ROSTERS["south"]}
    with pytest.raises(BudgetError, match="site 'south'"):
        _account(path, "r2", others)
    fresh = {site: [f"new-{name}" for name in roster] for site, roster in ROSTERS.items()}
    assert _pays(_account(path, "r2", fresh), 1) == {}
    one_of_them = {"north": ["north-7", *(f"newer-{i}" for i in range(89))], "south": ["newer-89"]}
    with pytest.raises(BudgetError, match=r"site .north.*spent up to epsilon=0\.9999 of 1"):
        _account(path, "r3", one_of_them)


def test_another_study_is_another_account_within_the_lifetime_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, founding=Lifetime(2.0, 1e-5, operator="Ada")).close()
    first = _account(path)
    for number in range(1, 5):
        _pays(first, number)
    assert _pays(_account(path, "r2", study__name="t"), 1) == {}
    with pytest.raises(
        BudgetError, match=r"In all studies .* of 1\.2 .*privacy\.lifetime_epsilon raised"
    ):
        _account(path, "r3", study__name="u", privacy__lifetime_epsilon=1.2)


PLD = {
    "privacy__accountant": "pld",
    "privacy__scope": "run",
    "training__batch_size": 20,
    "privacy__epsilon": 0.2,
}


@pytest.mark.slow
def test_pld_is_no_filter_so_the_plans_number_and_the_lifetime_budget_refuse(
    tmp_path: Path,
) -> None:
    """Whatever the coordinator asks for: a plan of four rounds is four, after a restart too."""
    path = tmp_path / "a" / "ledger.sqlite"
    account = _account(path, **PLD)
    assert all(_pays(account, number) == {} for number in range(1, 5))
    again = _account(path, fresh=False, **PLD)
    for one in (account, again):
        refused = _pays(one, 1)  # the coordinator may call it what it likes
        assert set(refused) == {"north", "south"} and "pays for a plan of 4 (round)" in str(
            refused["south"]
        )
    assert len(account.ledger.rows()) == 8
    limited = _account(
        tmp_path / "b" / "ledger.sqlite", fresh=False, **PLD, privacy__lifetime_epsilon=0.1
    )
    assert "privacy.lifetime_epsilon raised" in str(_pays(limited, 1)["south"])


@pytest.mark.slow
def test_two_processes_of_one_pld_run_share_its_plan(tmp_path: Path) -> None:
    """Both had paid before the other did: neither goes by what it remembers."""
    path = tmp_path / "ledger.sqlite"
    one = _account(path, **PLD)
    two = _account(path, fresh=False, **PLD)
    for number, account in enumerate((one, two, one, two), 1):
        assert _pays(account, number) == {}
    assert set(_pays(one, 5)) == set(_pays(two, 5)) == {"north", "south"}
    assert len(one.ledger.rows()) == 8


def test_a_pld_run_of_another_name_is_none_and_shares_the_plan(tmp_path: Path) -> None:
    """The name is the coordinator's to say. What it enrolled before anybody paid is counted
    together; no more enrol.
    """
    path = tmp_path / "ledger.sqlite"
    values = {**PLD, "training__batch_size": 0, "data__threshold": "youden"}
    one = _account(path, **values)
    two = _account(path, "r2", fresh=False, **values)
    assert _pays(one, 1) == _pays(two, 1) == _pays(one, 2) == _pays(two, 2) == {}
    assert one.pay_query("threshold", ["north", "south"]) == {}
    for account in (one, two):
        assert set(_pays(account, 3)) == {"north", "south"}
    assert set(two.pay_query("threshold", ["north", "south"])) == {"north", "south"}
    for again in (one, SiteLedger(path, one.study)):  # in this process, and in a fresh one
        for fresh in (False, True):
            with pytest.raises(BudgetError, match="second run of study 's' on one ledger"):
                again.enrol("r3", ROSTERS, resolve(one.study, SIZES, 10), fresh)
    assert len(one.ledger.rows()) == 10


@pytest.mark.slow
def test_pld_pays_for_one_test_and_one_threshold(tmp_path: Path) -> None:
    account = _account(
        tmp_path / "ledger.sqlite", **PLD, data__threshold="youden", privacy__evaluation_epsilon=0.1
    )
    assert account.pay_query("threshold", ["north", "south"]) == {}
    # its count failed, and is asked for again
    assert account.pay_query("threshold", ["south"]) == {}
    account.note_query_answered("threshold", ["north", "south"])
    assert set(account.pay_query("threshold", ["north", "south"])) == {"north", "south"}
    _pays_test(account, "north", ["t1", "t2"])
    with pytest.raises(BudgetError, match=r"a plan of 1 \(test\)"):
        _pays_test(account, "north", ["t1", "t2"])


def test_nobody_pays_before_the_run_has_enrolled_them() -> None:
    account = SiteLedger(None, _study())
    for pay in (partial(account.pay, 1), partial(account.pay_query, "threshold")):
        with pytest.raises(BudgetError, match="nobody is enrolled"):
            pay(["north"])


def test_uses_are_those_of_this_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = _account(path)
    _pays(first, 1)
    _pays(first, 1, ("north",))  # done again after a crash
    assert first.uses() == {"north": 2, "south": 1}
    assert _account(path, "r2", fresh=False).uses() == {}
    assert _account(path, "r1", fresh=False).uses() == {"north": 2, "south": 1}


# the lifetime budget ------------------------------------------------------------------------------


def test_the_first_run_founds_with_what_its_study_says_and_no_study_after_it_has_more(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.sqlite"
    first = _account(path)
    assert first.read_founded() == Lifetime(1.0, 1e-5, reason="the first run, of study 's'")
    for number in range(1, 5):
        assert _pays(first, number) == {}
    for values in (
        {"study__name": "t"},
        {"study__name": "t", "privacy__lifetime_epsilon": 1e9},
        {"study__name": "t", "privacy__epsilon": 8.0},
        {"study__name": "t", "privacy__delta": 4e-3},
    ):
        with pytest.raises(BudgetError, match=r"In all studies .* of 1 \(delta=1e-05\)"):
            _account(path, "r2", **values)
    assert _account(path, "r1", fresh=False).read_founded() is None  # it is said once


def test_a_first_study_may_leave_room_for_others(tmp_path: Path) -> None:
    account = _account(tmp_path / "ledger.sqlite", privacy__lifetime_epsilon=3.0)
    bound = account.read_founded()
    assert bound is not None and bound.epsilon == 3.0


def test_a_run_of_its_own_has_no_lifetime(tmp_path: Path) -> None:
    account = _account(tmp_path / "ledger.sqlite", privacy__scope="run")
    assert account.read_founded() is None and account.ledger.lifetime is None
    assert account.report()["lifetime"] is None


def test_a_lifetime_is_not_charged_to_a_runs_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    _account(path, privacy__scope="run")
    with pytest.raises(LedgerError, match="has no lifetime budget"):
        _account(path, "r2")


def test_patients_named_under_another_rule_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, founding=Lifetime(1.0, 1e-5, "exact", "Ada")).close()
    with pytest.raises(LedgerError, match=r"data\.identity='canonical'.*goes by 'exact'"):
        _account(path, data__identity="canonical")
    assert _account(path, data__identity="exact").ledger.lifetime is not None


def test_a_test_patient_who_trains_later_has_paid_for_the_test(tmp_path: Path) -> None:
    """And whoever trained and is tested later, at whatever delta another study names."""
    path = tmp_path / "ledger.sqlite"
    first = _account(path)
    for number in range(1, 5):
        assert _pays(first, number) == {}
    other = _account(
        path,
        "r2",
        fresh=False,
        study__name="t",
        privacy__delta=5e-3,
        privacy__evaluation_epsilon=0.3,
    )
    with pytest.raises(BudgetError, match=r"'north \(test\)'.*all studies"):
        _pays_test(other, "north", ["north-7"])
    with pytest.raises(BudgetError, match="all studies"):
        _pays_test(other, "elsewhere", [" NORTH-7"])
    for _ in range(3):
        with contextlib.suppress(BudgetError):
            _pays_test(other, "north", ["new"])

    with pytest.raises(BudgetError, match="all studies"):
        _account(path, "r3", {"north": ["new"], "south": ["newer"]}, study__name="u")


# test patients ------------------------------------------------------------------------------------


def test_test_patients_pay_for_a_histogram_until_they_cannot() -> None:
    account = _account(privacy__evaluation_epsilon=0.3)
    patients = ["held-out-1", "held-out-2"]
    _pays_test(account, "north", patients)
    (row,) = account.ledger.rows()
    assert (row["label"], row["site"], row["event"]["epsilon"]) == ("test", "north (test)", 0.3)  # type: ignore[index]
    assert account.uses() == {}
    with pytest.raises(BudgetError, match=r"'north \(test\)'.*left for one release"):
        for _ in range(20):
            _pays_test(account, "north", patients)
    assert 1 < len(account.ledger.rows()) < 20
    assert _pays(account, 1) == {}  # training patients have a budget of their own


def test_one_who_cannot_pay_stops_the_test_of_one_site(tmp_path: Path) -> None:
    """And nothing says how many patients a site has, or how many of them cannot."""
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path, founding=Lifetime(0.7, 1e-5, operator="Ada")).close()
    spent = _account(path, fresh=False, privacy__evaluation_epsilon=0.3)
    while not spent.pay_tests({"south": ["s1"]}):
        spent.note_tested(["south"])
    account = _account(
        path, "r2", fresh=False, privacy__evaluation_epsilon=0.3, study__name="another"
    )
    refused = account.pay_tests({"north": ["n1", "n2"], "south": ["s1", "s2", "s3"]})
    assert set(refused) == {"south"}
    assert not re.search(r"\d+ of \d+ patients", str(refused["south"]))
    assert [row["site"] for row in account.ledger.rows() if row["run"] == "r2"] == ["north (test)"]


def test_who_has_paid_for_a_test_that_failed_does_not_pay_again() -> None:
    account = _account(privacy__evaluation_epsilon=0.1)
    asked = {"north": ["n1"], "south": ["s1"]}
    assert account.pay_tests(asked) == {}
    for site, ids in asked.items():  # the stack failed: the sites are asked one by one
        assert account.pay_tests({site: ids}) == {}
        account.note_tested([site])
    assert len(account.ledger.rows()) == 2
    assert account.pay_tests(asked) == {}  # the next test
    assert len(account.ledger.rows()) == 4


def test_a_held_out_patient_of_two_sites_pays_once_where_one_noise_covers_both() -> None:
    together = {"privacy__evaluation_epsilon": 0.1, "privacy__max_sites_per_patient": 2}
    for noise, times in (("central", 1), ("site", 2)):
        account = _account(privacy__noise=noise, **together)
        assert account.pay_tests({"north": ["n1", "both"], "south": ["both", "s1"]}) == {}
        assert [row["site"] for row in account.ledger.rows()] == ["north (test)", "south (test)"]
        assert _test_charges(account, "both") == times


def test_a_patient_of_a_site_whose_test_failed_pays_where_the_next_is_made() -> None:
    account = _account(
        privacy__noise="central", privacy__evaluation_epsilon=0.1, privacy__max_sites_per_patient=2
    )
    asked = {"north": ["n1", "both"], "south": ["both", "s1"]}
    for times in (1, 2, 3):
        assert account.pay_tests(asked) == {}
        account.note_tested(["south"])  # north raised
        assert _test_charges(account, "both") == times


def test_a_site_asked_alone_has_its_patient_of_two_sites_pay() -> None:
    account = _account(
        privacy__noise="central", privacy__evaluation_epsilon=0.1, privacy__max_sites_per_patient=2
    )
    asked = {"north": ["n1", "both"], "south": ["both", "s1"]}
    assert account.pay_tests(asked) == {}
    account.note_tested(asked)
    assert account.pay_tests({"south": asked["south"]}) == {}
    assert _test_charges(account, "both") == 2


# the file -----------------------------------------------------------------------------------------


def test_ids_are_never_in_the_file(tmp_path: Path) -> None:
    account = _account(tmp_path / "ledger.sqlite", privacy__evaluation_epsilon=0.3)
    _pays(account, 1)
    _pays_test(account, "north", ["held-out-1"])
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for name in ("north-7", "south-7", "held-out-1"):
        assert name.encode() not in content and name.encode().hex().encode() not in content


def test_the_head_that_is_told_is_the_ledgers(tmp_path: Path) -> None:
    account = _account(tmp_path / "ledger.sqlite")
    before = account.report()["head"]
    _pays(account, 1)
    told = account.report()
    assert told["head"] != before
    with Ledger.open(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.head() == told["head"]
        ledger.verify(str(before))


# the coordinator's count --------------------------------------------------------------------------


def _metered(**values: Any) -> tuple[Metered, Guarantee]:
    guarantee = resolve(_study(**values), SIZES, 10)
    return Metered(guarantee, "study"), guarantee


def test_a_round_beyond_the_plan_is_refused_and_counts_for_nobody() -> None:
    budget, guarantee = _metered(privacy__spare_rounds=1)
    for number in range(1, 6):
        budget.charge(number, ["south"])
    budget.charge(1, ["north"])
    with pytest.raises(
        BudgetError, match=r"round 6: site 'south' has paid for 5 rounds.*left: 0.*spare_rounds"
    ):
        budget.charge(6, ["north", "south"])
    assert budget.uses == {"north": 1, "south": 5}
    assert budget.claim()["epsilon"] == guarantee.cost({"south": 5})


def test_the_claim_grows_to_the_target() -> None:
    budget, _ = _metered()
    spent = [budget.claim()["epsilon"]]
    for number in range(1, 5):
        budget.charge(number, ["north", "south"])
        spent.append(budget.claim()["epsilon"])
    assert spent == sorted(set(spent)) and spent[0] == 0 and 0.999 < float(str(spent[-1])) <= 1  # type: ignore[type-var]
    claim = budget.claim()
    assert (claim["delta"], claim["unit"], claim["noise"], claim["scope"]) == (
        1e-5,
        "patient",
        "shared",
        "study",
    )


def test_rounds_that_a_crash_lost_are_counted() -> None:
    budget, guarantee = _metered()
    budget.charge(1, ["north", "south"])
    budget.take_over({"north": 3, "a stranger": 9})
    assert budget.uses == {"north": 3, "south": 1}
    budget.take_over({"north": 2})
    assert budget.uses["north"] == 3 and budget.claim()["epsilon"] == guarantee.cost({"north": 3})
    budget.charge(4, ["north"])
    with pytest.raises(BudgetError, match="round 5"):
        budget.charge(5, ["north"])


def test_a_round_that_was_given_up_counts_once_for_all_of_its_clients() -> None:
    """Also where no ledger tells of it: whether sites had paid is then not known."""
    budget, guarantee = _metered(privacy__spare_rounds=1)
    budget.charge(1, ["north", "south"])
    budget.write_off(2, ["north", "south"])
    assert budget.uses == {"north": 2, "south": 2}
    assert budget.claim()["epsilon"] == guarantee.cost({"north": 2, "south": 2})
    budget.take_over({"north": 2, "south": 2})  # their ledgers: the same round
    assert budget.uses == {"north": 2, "south": 2}


def test_a_round_that_was_given_up_is_not_counted_beside_what_ledgers_told_of_it() -> None:
    """North has paid for two attempts at it, south for none."""
    budget, _ = _metered(privacy__spare_rounds=1)
    budget.charge(1, ["north", "south"])
    budget.take_over({"north": 3, "south": 1})
    budget.write_off(2, ["north", "south"])
    assert budget.uses == {"north": 3, "south": 2}
    budget.write_off(3, ["north", "south"])
    assert budget.uses == {"north": 3, "south": 3}
    budget.charge(4, ["north", "south"])
    assert budget.uses == {"north": 4, "south": 4}


def test_a_round_is_not_given_up_beyond_the_plan() -> None:
    budget, _ = _metered()
    for number in range(1, 5):
        budget.charge(number, ["north"])
    with pytest.raises(BudgetError, match="round 5: site 'north' has paid for 4 rounds"):
        budget.write_off(5, ["north", "south"])
    assert budget.uses == {"north": 4, "south": 0}


def test_a_correlated_run_counts_once() -> None:
    values = {"privacy__correlated": True, "fleet__schedule": "cyclic", "fleet__groups": 2}
    budget, guarantee = _metered(**values)
    for number in range(1, 5):
        budget.charge(number, ["north"])
    assert budget.uses == {"north": 1, "south": 0} and 0.999 < guarantee.cost(budget.uses) <= 1
    budget.write_off(5, ["south"])
    assert budget.uses == {"north": 1, "south": 1}


def test_seeded_noise_claims_nothing() -> None:
    budget, _ = _metered(privacy__simulation_only=True)
    budget.charge(1, ["north"])
    claim = budget.claim()
    assert claim["epsilon"] is None and claim["delta"] is None and claim["simulation_only"] is True
    plain = NoClaim()
    plain.charge(1, ["north"])
    plain.write_off(2, ["north"])
    plain.take_over({"north": 7})
    assert plain.claim()["epsilon"] is None and not math.isnan(
        float(str(claim["noise_multiplier"]))
    )
