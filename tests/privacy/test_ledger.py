"""The budget ledger: the filter against a plain twin, real processes, real kills, and a chain that
shows tampering.
"""

import errno
import math
import os
import random
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core import files
from medfed.core.checks import BudgetError, LedgerError, PlanError, RunError
from medfed.privacy import accounting, ledger_file, privacy_events
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Charge, Cohort, Lifetime, Limits, Spent
from medfed.privacy.ledger_file import rule_of
from medfed.privacy.privacy_events import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    PoissonGaussian,
    TruncatedPoissonGaussian,
)

DELTA = 1e-6
FREE = Limits(math.inf, DELTA)
ONE = Limits(1.0, DELTA)
# 5 of them fit into epsilon 1 at delta 1e-6, as sigma 4.2247 is what it takes
STEP = Gaussian(10.0)
PATIENTS = [f"MRN-{i:05d}-Muster" for i in range(12)]

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and file modes of POSIX")


def charge(
    cohort: Cohort, event: Event = STEP, study: str = "s", run: str = "r1", round: int = 1
) -> Charge:
    return Charge(study, run, cohort, round, "round", event)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "ledger.sqlite"


# Opening ------------------------------------------------------------------------------------------


def test_a_ledger_is_founded_with_its_folders_and_opens_again(path: Path) -> None:
    with Ledger.open(path) as first:
        first.charge([charge(first.enrol("a", PATIENTS))], ONE)
        head = first.head()
        worst = first.worst(DELTA)
    with Ledger.open(path) as second:
        assert (second.head(), second.worst(DELTA)) == (head, worst)
        second.verify(head)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "ledger.head",
        "ledger.sqlite",
        "pseudonym.key",
    ]


def test_on_a_share_that_cannot_flush_folders_the_journal_is_cut_short(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite flushes the folder after it has deleted its journal: an error there would deny a
    charge that stands.
    """
    monkeypatch.setattr(files, "flush_folder", lambda folder: False)
    with Ledger.open(path) as first:
        first.charge([charge(first.enrol("a", PATIENTS))], ONE)
        assert first._one("PRAGMA journal_mode") == "truncate"

    journal = path.with_name("ledger.sqlite-journal")
    assert journal.stat().st_size == 0
    assert {p.name for p in path.parent.iterdir()} == {
        "ledger.head",
        "ledger.sqlite",
        "pseudonym.key",
        journal.name,
    }
    monkeypatch.undo()
    with Ledger.open(path) as second:  # and from elsewhere, where folders can be flushed
        second.charge([charge(second.enrol("a", PATIENTS), round=2)], ONE)
        assert len(second.rows()) == 2

    with Ledger.open(path, read_only=True) as third:
        assert len(third.rows()) == 2


@on_posix
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_on_a_share_without_hard_links_a_ledger_is_founded_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with Ledger.open(path) as first:
        first.charge([charge(first.enrol("a", PATIENTS))], ONE)
        founded = first._genesis
    ledger_file.create(path, None)  # of somebody who came second
    with Ledger.open(path) as second:
        assert second._genesis == founded and len(second.rows()) == 1
    # who came second leaves its key
    told = {p.name for p in path.parent.iterdir() if not p.name.startswith(".")}
    assert told == {"ledger.head", "ledger.sqlite", "pseudonym.key"}


@on_posix
def test_the_key_is_for_its_owner_only(path: Path) -> None:
    Ledger.open(path).close()
    key = path.with_name("pseudonym.key")
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32


def test_two_ledgers_differ_from_their_first_row(tmp_path: Path) -> None:
    one = tmp_path / "a" / "ledger.sqlite"
    two = tmp_path / "b" / "ledger.sqlite"
    with Ledger.open(one) as a, Ledger.open(two) as b, Ledger.open(None) as c:
        assert len({a.head(), b.head(), c.head()}) == 3


def test_in_memory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Ledger.open(None) as book:
        book.charge([charge(book.enrol("a", PATIENTS))], ONE)
        book.verify(book.head())
        assert book.worst(DELTA) > 0
    assert list(tmp_path.iterdir()) == []


def test_ids_are_never_in_a_file(path: Path) -> None:
    with Ledger.open(path) as book:
        cohort = book.enrol("a", PATIENTS)
        book.charge([charge(cohort)], ONE)
        names = {book.pseudonym(patient) for patient in PATIENTS}
    content = b"".join(p.read_bytes() for p in path.parent.iterdir())
    for patient in PATIENTS:
        assert patient.encode() not in content
        assert patient.encode().hex().encode() not in content
    assert all(name.encode() in content for name in names)  # and the search finds what is there
    assert len(names) == len(PATIENTS)


def test_pseudonyms_need_the_key(path: Path) -> None:
    with Ledger.open(path) as book, Ledger.open(None) as other:
        assert book.pseudonym("x") == book.pseudonym("x") != other.pseudonym("x")
        assert re.fullmatch("[0-9a-f]{64}", book.pseudonym("x"))
        assert book.pseudonym("\ud800") != book.pseudonym("?")  # even what is no text has a name


# What fits ----------------------------------------------------------------------------------------


def test_a_roster_is_enrolled_once() -> None:
    with Ledger.open(None) as book:
        first = book.enrol("a", PATIENTS)
        assert book.enrol("a", [*reversed(PATIENTS), PATIENTS[0]]) == first
        assert book.enrol("b", PATIENTS).id != first.id
        assert book.enrol("a", PATIENTS[1:]).id != first.id
        assert book.enrol_all({"a": PATIENTS, "c": ["x"]}) == {
            "a": first,
            "c": book.enrol("c", ["x"]),
        }
        assert book.enrol("empty", []).patients == 0
        book.charge([charge(book.enrol("empty", []), Gaussian(1e-3))], ONE)  # nobody pays


def test_overspend_is_refused_whole_and_names_what_is_left() -> None:
    with Ledger.open(None) as book:
        a = book.enrol("Charité", PATIENTS)
        b = book.enrol("b", ["other"])
        book.charge([charge(a)] * 4, ONE)
        head = book.head()
        with pytest.raises(BudgetError) as error:
            book.charge([charge(b), charge(a, round=7), charge(a, round=8)], ONE)
        left = accounting.gaussian_epsilon(
            1 / math.sqrt(accounting.budget_mu(1.0, DELTA) ** 2 - 0.04), DELTA
        )
        asked = accounting.gaussian_epsilon(10 / math.sqrt(2), DELTA)
        spent = accounting.gaussian_epsilon(5.0, DELTA)

        for part in (
            "study 's'",
            "site 'Charité'",
            "round 7",
            "12 of 12 patients",
            f"spent up to epsilon={spent:.4g} of 1 (delta=1e-06)",
            f"left for one release: {left:.4g}",
            f"asked: {asked:.4g}",
            "nothing was charged",
            "privacy.epsilon",
        ):
            assert part in str(error.value)

        assert book.head() == head
        assert book.worst(DELTA, site="b") == 0
        book.charge([charge(b), charge(a)], ONE)  # what is left is left


def test_check_says_what_charge_would_and_charges_nothing() -> None:
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS)
        head = book.head()
        book.check([charge(a)] * 5, ONE)
        with pytest.raises(BudgetError, match="refused"):
            book.check([charge(a)] * 6, ONE)
        assert book.head() == head


def test_runs_of_a_study_share_a_budget_and_studies_share_the_lifetime() -> None:
    limits = Limits(1.0, DELTA, lifetime_epsilon=1.5)
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS)
        book.charge([charge(a, run="r1")] * 3, limits)
        book.charge([charge(a, run="r2")] * 2, limits)
        with pytest.raises(BudgetError, match=r"this study .* privacy\.epsilon"):
            book.charge([charge(a, run="r3")], limits)
        book.charge([charge(a, study="t")] * 4, limits)
        with pytest.raises(BudgetError, match=r"all studies .* privacy\.lifetime_epsilon"):
            book.charge([charge(a, study="u")] * 5, limits)
        assert book.worst(DELTA, study="t") == pytest.approx(
            accounting.gaussian_epsilon(5.0, DELTA)
        )
        assert book.worst(DELTA) == pytest.approx(accounting.gaussian_epsilon(10 / 3, DELTA))


def test_a_patient_of_two_sites_pays_at_both() -> None:
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS[:8])
        b = book.enrol("b", PATIENTS[6:])
        book.charge([charge(a)] * 3, ONE)
        book.charge([charge(b)] * 2, ONE)
        with pytest.raises(BudgetError, match="2 of 6 patients"):
            book.charge([charge(b)], ONE)
        assert [(x.site, x.charges, x.patients, x.worst) for x in book.list_spent(DELTA)] == [
            ("a", 3, 8, 8),
            ("b", 2, 6, 6),
        ]
        assert book.worst(DELTA) == pytest.approx(
            accounting.gaussian_epsilon(10 / math.sqrt(5), DELTA)
        )
        both = book.pseudonym(PATIENTS[7])
        one = book.pseudonym(PATIENTS[0])
        assert book.worst(DELTA, pseudonym=both) == book.worst(DELTA)
        assert (
            book.worst(DELTA, pseudonym=one)
            == book.worst(DELTA, site="a")
            == book.list_spent(DELTA, site="a")[0].epsilon
        )
        assert [(x.site, x.patients, x.worst) for x in book.list_spent(DELTA, pseudonym=both)] == [
            ("a", 1, 1),
            ("b", 1, 1),
        ]
        assert book.list_spent(DELTA, pseudonym="nobody") == []
        assert book.worst(DELTA, pseudonym="nobody") == 0


def test_an_account_counts_those_who_paid_most() -> None:
    with Ledger.open(None) as book:
        early = book.enrol("a", PATIENTS[:10])
        late = book.enrol("a", PATIENTS)
        book.charge([charge(early)], ONE)
        book.charge([charge(late), charge(late, study="t")], ONE)
        epsilon = accounting.gaussian_epsilon(10 / math.sqrt(2), DELTA)
        assert book.list_spent(DELTA, study="s") == [
            Spent("s", "a", pytest.approx(epsilon), DELTA, 2, 12, 10)
        ]
        assert [(x.study, x.charges, x.worst) for x in book.list_spent(DELTA)] == [
            ("s", 2, 10),
            ("t", 1, 12),
        ]


@pytest.mark.parametrize(
    ("accountant", "event"),
    [
        ("gdp", lambda z, n: Gaussian(z, n)),
        ("rdp", lambda z, n: PoissonGaussian(0.1, z, 3 * n)),
        ("rdp", lambda z, n: Composed((Gaussian(z, n), Laplace(200.0, n)))),
    ],
)
@pytest.mark.parametrize("rounds", [1, 30])
def test_a_calibrated_plan_fits_to_its_last_round(
    accountant: str, event: Callable[[float, int], Event], rounds: int
) -> None:
    z = accounting.calibrate(lambda noise: event(noise, rounds), 1.0, DELTA, accountant)
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS)
        book.check([charge(a, event(z, rounds))], ONE)
        for number in range(rounds):
            book.charge([charge(a, event(z, 1), round=number)], ONE)
        with pytest.raises(BudgetError):
            book.charge([charge(a, event(z, 1))], ONE)


def test_the_capped_event_of_older_ledgers_is_read_and_counted_for_any_number_of_patients(
    path: Path,
) -> None:
    """Whoever paid by the declared number of patients has spent more than was claimed, and finds
    less left.
    """
    old = TruncatedPoissonGaussian(100, 0.25, 45, 6.0, 20)
    half = PoissonGaussian(0.25, 3.0, 20)
    with Ledger.open(path) as book:
        book.charge([charge(book.enrol("a", PATIENTS), old)], FREE)
        book.charge([charge(book.enrol("b", ["another"]), half)], FREE)
    with Ledger.open(path) as book:
        assert book.worst(DELTA, site="a") == book.worst(DELTA, site="b") > 1
        assert book.rows()[0]["event"] == {**privacy_events.to_json(old)}  # as it was written
        with pytest.raises(BudgetError, match="left for one release: 0"):
            book.charge([charge(book.enrol("a", PATIENTS))], ONE)


def test_impossible_limits_are_refused() -> None:
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS)
        for epsilon, delta in [
            (-1.0, DELTA),
            (0.0, DELTA),
            (math.nan, DELTA),
            (1.0, 0.0),
            (1.0, math.nan),
        ]:
            for limits in (Limits(epsilon, delta), Limits(math.inf, delta, epsilon)):
                with pytest.raises(PlanError, match="expected"):
                    book.charge([charge(a)], limits)
        assert book.rows() == []


def test_a_cohort_of_another_ledger_is_refused() -> None:
    with Ledger.open(None) as book, Ledger.open(None) as other:
        with pytest.raises(LedgerError, match="not enrolled"):
            book.charge([charge(other.enrol("a", PATIENTS))], ONE)
        assert book.rows() == []


EVENTS: list[Event] = [
    Gaussian(8.0),
    Gaussian(15.0, 2),
    PoissonGaussian(0.1, 1.5),
    Laplace(20.0),
    Gaussian(40.0),
]


@settings(max_examples=60)
@given(
    kinds=st.sampled_from([1, 2, len(EVENTS)]),
    limits=st.builds(
        Limits, st.sampled_from([0.5, 1.0]), st.just(DELTA), st.sampled_from([1.0, 1.5, math.inf])
    ),
    rosters=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=4),
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9)), max_size=3),
        max_size=25,
    ),
)
def test_what_is_accepted_is_what_a_plain_sum_per_patient_accepts(
    kinds: int, limits: Limits, rosters: list[set[int]], batches: list[list[tuple[int, bool, int]]]
) -> None:
    twin: list[list[tuple[str, Event]]] = [[] for _ in range(6)]
    with Ledger.open(None) as book:
        cohorts: dict[int, Cohort] = {}
        for batch in batches:
            charges = []
            after = [list(paid) for paid in twin]
            for site, second, kind in batch:
                site = site % len(rosters)
                study = "st"[second]
                event = EVENTS[kind % kinds]
                if site not in cohorts:  # enrolled late, when others have paid
                    cohorts[site] = book.enrol(f"site {site}", [PATIENTS[i] for i in rosters[site]])
                charges.append(charge(cohorts[site], event, study))
                for patient in rosters[site]:
                    after[patient].append((study, event))

            try:
                book.charge(charges, limits)
                twin = after
                accepted = True
            except BudgetError:
                accepted = False

            assert accepted == all(_within(paid, limits) for paid in after)

        for patient, paid in zip(PATIENTS, twin, strict=False):
            name = book.pseudonym(patient)
            assert _within(paid, limits)
            assert book.worst(DELTA, pseudonym=name) == pytest.approx(
                _plain_epsilon([event for _, event in paid])
            )

        assert book.worst(DELTA) == pytest.approx(
            max(_plain_epsilon([event for _, event in paid]) for paid in twin)
        )
        before = book.list_spent(DELTA), book.worst(DELTA)
        book.verify()  # what is read again from rows alone is the same
        assert (book.list_spent(DELTA), book.worst(DELTA)) == before


def _within(paid: list[tuple[str, Event]], limits: Limits) -> bool:
    scopes = [[event for study, event in paid if study == name] for name in "st"]
    pairs = [
        *((events, limits.epsilon) for events in scopes),
        ([event for _, event in paid], limits.lifetime_epsilon),
    ]
    return all(_plain_fits(events, epsilon) for events, epsilon in pairs)


def _plain_fits(events: list[Event], epsilon: float) -> bool:
    if epsilon == math.inf:
        return True
    if all(isinstance(event, Gaussian) for event in events):
        return (
            sum(accounting.gdp_mu(event) ** 2 for event in events)
            <= accounting.budget_mu(epsilon, DELTA) ** 2
        )
    total = sum((accounting.rdp(event) for event in events), np.zeros(len(accounting.ORDERS)))
    return bool((total <= accounting.budget_rdp(epsilon, DELTA)).any())


def _plain_epsilon(events: list[Event]) -> float:
    if not events:
        return 0.0
    if all(isinstance(event, Gaussian) for event in events):
        return accounting.gaussian_epsilon(
            sum(accounting.gdp_mu(e) ** 2 for e in events) ** -0.5, DELTA
        )
    return accounting.epsilon_from_rdp(sum(accounting.rdp(event) for event in events), DELTA)


def test_rows_tell_everything() -> None:
    with Ledger.open(None) as book:
        a = book.enrol("a", PATIENTS)
        genesis = book.head()
        book.charge(
            [
                Charge("s", "r9", a, 3, "round", STEP),
                Charge("s", "r9", a, 3, "count", Laplace(9.0)),
            ],
            FREE,
        )
        first, second = book.rows()
        assert first == {
            **{
                "seq": 1,
                "study": "s",
                "run": "r9",
                "site": "a",
                "cohort": a.id,
                "round": 3,
                "label": "round",
            },
            **{
                "event": privacy_events.to_json(STEP),
                "previous": genesis,
                "time": first["time"],
                "hash": first["hash"],
            },
        }
        assert second["previous"] == first["hash"]
        assert second["event"] == privacy_events.to_json(Laplace(9.0))
        assert book.head() == second["hash"]


# Several at once ----------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from pathlib import Path
from medfed.core.checks import BudgetError, LedgerError
from medfed.privacy import ledger as module
from medfed.privacy.privacy_events import Gaussian
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Charge, Limits

path, name = Path(sys.argv[1]), sys.argv[2]
def charge(number, z=10.0):
    ledger.charge([Charge("s", name, cohort, number, "round", Gaussian(z))], LIMITS)
LIMITS = Limits(1.0, 1e-6)
"""

ENROL = """
ledger = Ledger.open(path)
cohort = ledger.enrol("a", ["p", "q"])
"""

UNTIL_REFUSED = """
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    try:
        charge(number, 30.0)
    except BudgetError:
        break
    print(number, flush=True)
"""

FOR_EVER = """
LIMITS = Limits(1e9, 1e-6)
for number in range(1, 10**9):
    charge(number)
    print(number, flush=True)
"""


def _start(path: Path, name: str, *code: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "".join((CHILD, *code)), str(path), name]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_found_one_ledger_and_spend_one_budget(path: Path) -> None:
    children = [_start(path, name, ENROL, UNTIL_REFUSED) for name in ("one", "two")]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    acknowledged = {}
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for name, child in zip(("one", "two"), children, strict=True):
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, "")
        acknowledged[name] = [int(line) for line in out.split()]
    with Ledger.open(path) as book:
        rows = book.rows()
        # 50: none lost, none twice
        assert len(rows) == math.floor((30 * accounting.budget_mu(1.0, DELTA)) ** 2)
        for name, numbers in acknowledged.items():
            assert [row["round"] for row in rows if row["run"] == name] == numbers
        assert book.worst(DELTA) <= 1
        with pytest.raises(BudgetError):
            book.charge([charge(book.enrol("b", ["q"]), Gaussian(30.0))], ONE)


def test_an_open_ledger_sees_what_others_append(path: Path) -> None:
    with Ledger.open(path) as one, Ledger.open(path) as two:
        a = one.enrol("a", PATIENTS)
        b = two.enrol("b", PATIENTS)
        for book, cohort in [(one, a), (two, b), (two, a), (one, b), (one, a)]:
            book.charge([charge(cohort)], ONE)
            assert one.head() == two.head()
        for book in (one, two):
            with pytest.raises(BudgetError, match="12 of 12"):
                book.charge([charge(a)], ONE)
        assert one.list_spent(DELTA) == two.list_spent(DELTA)


def test_threads_of_a_process_share_a_ledger(path: Path) -> None:
    refused = []

    def spend() -> None:
        for _ in range(3):
            try:
                book.charge([charge(a)], ONE)
            except BudgetError as error:
                refused.append(error)

    with Ledger.open(path) as book:
        a = book.enrol("a", PATIENTS)
        threads = [threading.Thread(target=spend) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(book.rows()), len(refused)) == (5, 7)
        book.verify()


# Crashes ------------------------------------------------------------------------------------------


@on_posix
@pytest.mark.parametrize("seed", range(6))
def test_a_kill_at_any_time_loses_no_acknowledged_charge(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    acknowledged = 0
    for life in range(2):
        child = _start(path, f"life {life}", ENROL, FOR_EVER)
        assert child.stdout is not None
        # it charges; now at any time, most of which a charge spends in its commit
        out = child.stdout.readline()
        select.select([], [], [], chance.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        rest, err = child.communicate(timeout=60)
        assert err == ""
        # of whole lines; some between lie in readline's buffer
        last = int((out + rest).split("\n")[-2])
        with Ledger.open(path) as book:
            rows = [row for row in book.rows() if row["run"] == f"life {life}"]
            assert [row["round"] for row in rows][:last] == list(range(1, last + 1))
            assert len(rows) <= last + 1  # at most the one that it died in
            acknowledged += last
            assert len(book.rows()) >= acknowledged
            # and life goes on
            book.charge([charge(book.enrol("a", ["p", "q"]))], Limits(1e9, DELTA))


DIES = """
def die(statement):
    if statement.startswith(POINT):
        os.kill(os.getpid(), signal.SIGKILL)
charge(1)
print(1, flush=True)
ledger._sql.set_trace_callback(die)
charge(2)
print(2, flush=True)
os.kill(os.getpid(), signal.SIGKILL)  # between charge and training
"""


@on_posix
@pytest.mark.parametrize(
    ("point", "stands"), [("BEGIN", 1), ("SELECT", 1), ("INSERT", 1), ("COMMIT", 1), ("never", 2)]
)
def test_a_charge_stands_from_its_acknowledgement_on(path: Path, point: str, stands: int) -> None:
    child = _start(path, "r", ENROL, f"POINT = {point!r}", DIES)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (-signal.SIGKILL, "")
    assert out.split() == [str(number) for number in range(1, stands + 1)]
    with Ledger.open(path) as book:
        assert [row["round"] for row in book.rows()] == list(range(1, stands + 1))
        book.charge([charge(book.enrol("a", ["p", "q"]))] * (5 - stands), ONE)
        with pytest.raises(BudgetError):
            book.charge([charge(book.enrol("a", ["p", "q"]))], ONE)


DIES_FOUNDING = """
from medfed.privacy import ledger_file
for place in (module, ledger_file):  # wherever it is called from
    place.NAME = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Ledger.open(path)
"""


@on_posix
@pytest.mark.parametrize("place", ["write_genesis", "link", "now", "read_key"])
def test_a_crash_while_founding_leaves_nothing_half_made(path: Path, place: str) -> None:
    child = _start(path, "r", DIES_FOUNDING.replace("NAME", place))
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (-signal.SIGKILL, "")
    with Ledger.open(path) as book:
        book.charge([charge(book.enrol("a", PATIENTS))], ONE)


FULL_DISK = """
import resource
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    for number in range(1000):
        charge(number, 1e6)
        print(number, flush=True)
except LedgerError as error:
    print(error)
    sys.exit(3)
"""


@on_posix
def test_a_full_disk_refuses_and_keeps_what_stands(path: Path) -> None:
    child = _start(path, "r", ENROL, FULL_DISK)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (3, "")
    *acknowledged, told = out.splitlines()
    assert str(path) in told
    with Ledger.open(path) as book:
        assert [row["round"] for row in book.rows()] == [int(line) for line in acknowledged]


# Append-only, and what shows tampering ------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with Ledger.open(folder / "ledger.sqlite") as book:
        a = book.enrol("a", PATIENTS[:7])
        b = book.enrol("b", PATIENTS[5:])
        book.charge([charge(a), charge(b), charge(a, Laplace(99.0))], FREE)
        book.charge([charge(b, study="t"), charge(a, round=2)], FREE)
    return folder


@pytest.fixture
def written(original: Path, path: Path) -> Path:
    """A ledger of five charges to two cohorts, and its key."""
    shutil.copytree(original, path.parent)
    return path


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path)) as sql, sql:
        sql.execute("PRAGMA synchronous = OFF")
        yield sql


@pytest.mark.parametrize("table", ["genesis", "cohorts", "members", "charges"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {table} SET {column} = {column}",
        "DELETE FROM {table}",
        "INSERT OR REPLACE INTO {table} SELECT * FROM {table} LIMIT 1",
        "REPLACE INTO {table} SELECT * FROM {table}",
    ],
)
def test_sql_can_only_append(written: Path, table: str, statement: str) -> None:
    with raw(written) as sql:
        column = sql.execute(f"SELECT name FROM pragma_table_info('{table}')").fetchone()[0]
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            sql.execute(statement.format(table=table, column=column))
    Ledger.open(written).close()


def tamper(path: Path, *statements: str) -> None:
    """Change the file as one who knows SQLite: without the triggers, which are put back."""
    with raw(path) as sql:
        triggers = sql.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        for name, _ in triggers:
            sql.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            sql.execute(statement)
        for _, text in triggers:
            sql.execute(text)


SWAP = [f"UPDATE charges SET seq = {a} WHERE seq = {b}" for a, b in ((99, 2), (2, 3), (3, 99))]


@pytest.mark.parametrize(
    ("row", "statements"),
    [
        ("row 1", ["UPDATE charges SET time = '2020' WHERE seq = 1"]),
        ("row 2", ["UPDATE charges SET study = 't' WHERE seq = 2"]),
        ("row 2", ["UPDATE charges SET run = 'r2' WHERE seq = 2"]),
        ("row 3", ["UPDATE charges SET site = 'b' WHERE seq = 3"]),
        ("row 3", ["UPDATE charges SET cohort = (SELECT cohort FROM charges WHERE seq = 2) WHERE seq = 3"]),
        ("row 4", ["UPDATE charges SET round = 2 WHERE seq = 4"]),
        ("row 4", ["UPDATE charges SET round = 1.5 WHERE seq = 4"]),
        ("row 4", ["UPDATE charges SET label = '' WHERE seq = 4"]),
        ("row 4", ["UPDATE charges SET label = NULL WHERE seq = 4"]),
        ("row 5", ["UPDATE charges SET event = replace(event, '10.0', '11.0') WHERE seq = 5"]),
        ("row 5", ["UPDATE charges SET event = CAST(event AS BLOB) WHERE seq = 5"]),
        ("row 5", ["UPDATE charges SET previous = hash WHERE seq = 5"]),
        ("row 5", ["UPDATE charges SET hash = previous WHERE seq = 5"]),
        ("row 1", ["DELETE FROM charges WHERE seq = 1"]),
        ("row 3", ["DELETE FROM charges WHERE seq = 3"]),
        ("row 3", ["DELETE FROM charges WHERE seq = 3", "UPDATE charges SET seq = seq - 1 WHERE seq > 3"]),
        ("row 5", ["DELETE FROM charges WHERE seq = 5"]),
        ("row 1", ["DELETE FROM charges"]),
        ("row 6", ["INSERT INTO charges SELECT 6, time, study, run, site, cohort, round, label, event, "
            "previous, hash FROM charges WHERE seq = 5"]),
        ("row 2", SWAP),
        ("row 0", ["UPDATE genesis SET content = replace(content, '\"format\":2', '\"format\":0')"]),
        ("row 0", ["DELETE FROM genesis"]),
        ("row 0", ["UPDATE genesis SET content = CAST(content AS BLOB)"]),
        ("cohort", ["DELETE FROM members"]),
        ("cohort", ["DELETE FROM members WHERE pseudonym = (SELECT min(pseudonym) FROM members)"]),
        ("cohort", ["UPDATE members SET pseudonym = 'f' || substr(pseudonym, 2) WHERE pseudonym < 'f'"]),
        ("cohort", ["UPDATE members SET pseudonym = CAST(pseudonym AS BLOB)"]),
        ("cohort", ["INSERT INTO members SELECT id, 'one more' FROM cohorts"]),
        ("cohort", ["UPDATE cohorts SET site = 'c' WHERE site = 'a'"]),
        ("cohort", ["DELETE FROM cohorts"]),
    ],
)  # fmt: skip
def test_tampering_is_found_and_the_run_refused(
    written: Path, row: str, statements: list[str]
) -> None:
    tamper(written, *statements)
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=rf"{row}\b.*The run is refused.*Restore it"):
            Ledger.open(written, read_only)


def test_a_changed_row_with_its_hash_made_good_is_found_at_the_next(written: Path) -> None:
    with raw(written) as sql:
        row = list(sql.execute("SELECT * FROM charges WHERE seq = 2").fetchone()[:-1])
    row[8] = row[8].replace("10.0", "99.0")  # a cheaper event
    tamper(
        written,
        f"UPDATE charges SET event = '{row[8]}', hash = '{ledger_file.row_hash(row)}' WHERE seq "
        "= 2",
    )
    with pytest.raises(LedgerError, match="row 3 "):
        Ledger.open(written)


def test_pages_that_do_not_add_up_are_found(written: Path) -> None:
    content = bytearray(written.read_bytes())
    # of the header: how many pages are free; a later charge would be written over others
    content[39] += 1
    written.write_bytes(content)
    with pytest.raises(LedgerError, match="is damaged"):
        Ledger.open(written)


@pytest.mark.parametrize("statement", ["DROP TRIGGER charges_update", "DROP TABLE members"])
def test_a_missing_guard_is_found(written: Path, statement: str) -> None:
    with raw(written) as sql:
        sql.execute(statement)
    with pytest.raises(LedgerError, match="a table or a trigger is missing"):
        Ledger.open(written)


def test_an_honest_copy_passes_the_tamper_harness(written: Path) -> None:
    tamper(written)
    Ledger.open(written).close()


def test_tampering_while_it_is_open_is_found(written: Path) -> None:
    with Ledger.open(written) as book:
        tamper(written, "UPDATE charges SET hash = 'x' WHERE seq = 5")
        with pytest.raises(LedgerError, match="row 5"):
            book.charge([charge(book.enrol("a", PATIENTS[:7]))], FREE)
    with raw(written) as sql:
        assert sql.execute("SELECT count(*) FROM charges").fetchone() == (5,)


def test_a_ledger_cut_short_with_care_is_found_by_its_head(written: Path) -> None:
    with Ledger.open(written) as book:
        told = [book.rows()[3]["hash"], book.head()]
    tamper(written, "DELETE FROM charges WHERE seq = 5", "UPDATE sqlite_sequence SET seq = 4")
    with pytest.raises(LedgerError, match="older than the last head"):
        Ledger.open(written)
    anchor = written.with_name("ledger.head")
    anchor.write_text(
        anchor.read_text().replace(str(told[1]), str(told[0])).replace('"seq":5', '"seq":4')
    )
    with Ledger.open(written) as book:  # the chain is whole: nothing in the file can tell
        book.verify()
        book.verify(str(told[0]))
        with pytest.raises(LedgerError, match="of an earlier claim is not in it"):
            book.verify(str(told[1]))
        book.charge([charge(book.enrol("a", PATIENTS[:7]))], FREE)
        with pytest.raises(LedgerError, match="of an earlier claim is not in it"):
            book.verify(str(told[1]))


def test_heads_of_earlier_claims_stay_part_of_it(path: Path) -> None:
    with Ledger.open(path) as book:
        heads = [book.head()]
        for _ in range(3):
            book.charge([charge(book.enrol("a", PATIENTS))], ONE)
            heads.append(book.head())
        for head in heads:
            book.verify(head)


def test_a_truncated_file_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for size in (0, 1, 99, 100, 4096, len(content) // 2, len(content) - 4096, len(content) - 1):
        written.write_bytes(content[:size])
        with pytest.raises(LedgerError, match="Restore it"):
            Ledger.open(written)


def test_a_damaged_byte_is_refused_or_changes_nothing(written: Path) -> None:
    content = written.read_bytes()
    chance = random.Random(0)
    with Ledger.open(written, read_only=True) as book:
        expected = (book.rows(), book.list_spent(DELTA), book.head())
    used = [i for i, byte in enumerate(content) if byte]  # a page's unused middle is nobody's
    refused = 0
    for _ in range(250):
        damaged = bytearray(content)
        damaged[chance.choice(used)] ^= chance.randrange(1, 256)
        written.write_bytes(damaged)
        try:
            with Ledger.open(written, read_only=True) as book:
                assert (book.rows(), book.list_spent(DELTA), book.head()) == expected
        except LedgerError as error:
            assert str(written) in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"age,sex\n50,f\n" * 99, bytes(range(256)) * 64])
def test_what_is_no_ledger_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "ledger.sqlite"
    place.write_bytes(content)
    with pytest.raises(LedgerError, match="is no ledger"):
        Ledger.open(place)
    assert place.read_bytes() == content


def test_another_database_is_refused_and_stays(tmp_path: Path) -> None:
    place = tmp_path / "patients.sqlite"
    with raw(place) as sql:
        sql.execute("CREATE TABLE patients (id TEXT)")
    content = place.read_bytes()
    with pytest.raises(LedgerError, match="is no ledger"):
        Ledger.open(place)
    assert place.read_bytes() == content


def test_a_newer_ledger_is_refused(written: Path) -> None:
    with raw(written) as sql:
        sql.execute(f"PRAGMA user_version = {ledger_file.FORMAT + 1}")
    with pytest.raises(LedgerError, match=r"format=3; expected at most 2\. Update medfed"):
        Ledger.open(written)


def test_an_event_of_a_newer_medfed_is_refused(path: Path) -> None:
    with Ledger.open(path) as book, pytest.MonkeyPatch.context() as patch:
        patch.setattr("medfed.privacy.ledger.write_event", lambda event: '{"kind":"of tomorrow"}')
        a = book.enrol("a", PATIENTS)
        book.charge([charge(a)], FREE)
    with Ledger.open(path) as book:
        for use in (lambda: book.charge([charge(a)], ONE), lambda: book.worst(DELTA)):
            with pytest.raises(LedgerError, match=r"of tomorrow.* cannot be accounted"):
                use()


def test_without_its_key_a_ledger_cannot_be_charged(written: Path) -> None:
    key = written.with_name("pseudonym.key")
    good = key.read_bytes()
    key.write_bytes(bytes(32))
    with pytest.raises(LedgerError, match=r"is not the key of .*Restore the key"):
        Ledger.open(written)
    key.unlink()
    with pytest.raises(LedgerError, match=r"cannot be read.*Restore the key"):
        Ledger.open(written)
    assert not key.exists()
    with Ledger.open(written, read_only=True) as book:  # reading needs none
        assert book.worst(DELTA) > 0
        with pytest.raises(LedgerError, match="Restore the key"):
            book.pseudonym("x")
    key.write_bytes(good)
    Ledger.open(written).close()


# Refusals of the system ---------------------------------------------------------------------------


def test_a_locked_ledger_is_told(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "BUSY_SECONDS", 0.05)
    with (
        Ledger.open(written) as book,
        closing(sqlite3.connect(written, isolation_level=None)) as other,
    ):
        a = book.enrol("a", PATIENTS[:7])
        other.execute("BEGIN EXCLUSIVE")
        for use in (
            lambda: Ledger.open(written),
            lambda: book.charge([charge(a)], FREE),
            book.head,
        ):
            with pytest.raises(
                LedgerError, match=f"{re.escape(str(written))} has been locked by another process"
            ):
                use()

        other.execute("ROLLBACK")
        book.charge([charge(a)], FREE)  # and goes on when it is free
        other.execute("BEGIN")
        other.execute("SELECT * FROM charges").fetchone()  # a reader keeps a commit waiting
        with pytest.raises(LedgerError, match="locked"):
            book.charge([charge(a)], FREE)
        other.execute("ROLLBACK")
        assert len(book.rows()) == 6
        book.charge([charge(a)], FREE)
        book.verify()


def test_it_waits_for_others_as_long_as_it_says() -> None:
    assert ledger_file.BUSY_SECONDS == 5
    with Ledger.open(None) as book:
        assert book._sql.execute("PRAGMA busy_timeout").fetchone() == (5000,)


def test_it_is_flushed_at_every_commit(path: Path) -> None:
    with Ledger.open(path) as book:
        # EXTRA: FULL and the folder
        assert book._sql.execute("PRAGMA synchronous").fetchone() == (3,)
        assert book._sql.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that any user of this machine can reach, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@contextmanager
def powerless() -> Iterator[None]:
    """Be nobody for a while, if root: whom file modes do not bind."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@on_posix
@pytest.mark.parametrize(
    ("folder_mode", "file_mode"), [(0o555, 0o666), (0o777, 0o444), (0o555, 0o444)]
)
def test_a_disk_that_cannot_be_written_is_refused_at_once(
    shared_folder: Path, folder_mode: int, file_mode: int
) -> None:
    place = shared_folder / "ledger.sqlite"
    with Ledger.open(place) as book:
        book.charge([charge(book.enrol("a", PATIENTS))], ONE)
        head = book.head()
    place.with_name("pseudonym.key").chmod(0o644)  # for nobody to read
    place.chmod(file_mode)
    shared_folder.chmod(folder_mode)
    with powerless():
        with pytest.raises(LedgerError, match=r"cannot be opened or written.*set MEDFED_HOME"):
            Ledger.open(place)
        with Ledger.open(place, read_only=True) as book:
            assert book.head() == head
            with pytest.raises(LedgerError, match="cannot be opened or written"):
                book.charge([charge(book.enrol("a", PATIENTS))], ONE)


@on_posix
def test_a_folder_that_cannot_be_written_is_refused_at_once(shared_folder: Path) -> None:
    shared_folder.chmod(0o555)
    with powerless():
        for place in (shared_folder / "ledger.sqlite", shared_folder / "below" / "ledger.sqlite"):
            with pytest.raises(
                LedgerError, match=r"cannot be opened or written: Permission denied"
            ):
                Ledger.open(place)
    assert list(shared_folder.iterdir()) == []


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(LedgerError, match="cannot be opened or written"):
        Ledger.open(tmp_path / "ledger.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot be opened or written"):
        Ledger.open(tmp_path / "file" / "ledger.sqlite")


def test_reading_founds_nothing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger yet"):
        Ledger.open(tmp_path / "ledger.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []


# The lifetime budget ------------------------------------------------------------------------------

BOUND = Lifetime(1.0, DELTA, "canonical", "Ada", "the ethics board, 2026-3")
WIDE = Limits(1e9, 1e-2)  # what a study might ask for


def test_a_lifetime_budget_bounds_every_study_at_its_own_delta() -> None:
    """Neither another name, nor a larger epsilon, nor a larger delta buys one charge more."""
    with Ledger.open(None, founding=BOUND) as book:
        a = book.enrol("a", PATIENTS)
        book.charge([charge(a, study="s")] * 3, WIDE)
        book.charge([charge(a, study="t")] * 2, WIDE)
        for study, limits in [
            ("s", WIDE),
            ("t", WIDE),
            ("u", ONE),
            ("v", Limits(math.inf, 0.5, math.inf)),
        ]:
            for use in (book.check, book.charge):
                with pytest.raises(
                    BudgetError,
                    match=r"In all studies .* of 1 \(delta=1e-06\).*medfed privacy budget",
                ):
                    use([charge(a, study=study)], limits)
        assert book.worst(DELTA) <= 1
        # a study may ask for less
        with pytest.raises(BudgetError, match=r"privacy\.lifetime_epsilon"):
            book.charge(
                [charge(book.enrol("b", ["new"]))] * 2, Limits(1.0, DELTA, lifetime_epsilon=0.5)
            )


def test_it_holds_without_being_named_and_for_whoever_opens_the_ledger(path: Path) -> None:
    Ledger.open(path, founding=BOUND).close()
    # what another founds where there is one, is not heeded
    for founding in (None, Lifetime(1e9, 0.5)):
        with Ledger.open(path, founding=founding) as book:
            assert book.lifetime == BOUND and not book.founded
            with pytest.raises(BudgetError, match="all studies"):
                book.charge([charge(book.enrol("a", PATIENTS))] * 6, WIDE)


def test_the_operator_changes_it_on_record_and_an_open_ledger_heeds_it(path: Path) -> None:
    with Ledger.open(path, founding=BOUND) as book, Ledger.open(path) as other:
        a = book.enrol("a", PATIENTS)
        book.charge([charge(a)] * 5, WIDE)
        head = book.head()
        assert other.decide(1.5, 1e-7, " Bo ", "a second trial") == Lifetime(
            1.5, 1e-7, "canonical", "Bo", "a second trial"
        )
        book.charge([charge(a)], WIDE)
        with pytest.raises(BudgetError, match=r"of 1\.5 \(delta=1e-07\)"):
            book.charge([charge(a)] * 4, WIDE)
        other.decide(0.5, DELTA, "Bo", "less again")
        with pytest.raises(BudgetError, match=r"of 0\.5 "):
            book.charge([charge(a, Gaussian(1e6))], WIDE)
        assert [row["round"] for row in book.rows()] == [1] * 6  # no charge among them
        book.verify(head)

    with Ledger.open(path, read_only=True) as book:
        told = [(d["kind"], d["epsilon"], d["operator"], d["reason"]) for d in book.decisions()]
        assert told == [
            ("founded", 1.0, "Ada", "the ethics board, 2026-3"),
            ("lifetime", 1.5, "Bo", "a second trial"),
            ("lifetime", 0.5, "Bo", "less again"),
        ]
        assert book.lifetime is not None and book.lifetime.epsilon == 0.5


@pytest.mark.parametrize(("operator", "reason"), [("", "why"), ("Bo", " "), ("\t", "")])
def test_nothing_is_decided_by_nobody_or_for_no_reason(operator: str, reason: str) -> None:
    with Ledger.open(None, founding=BOUND) as book:
        with pytest.raises(PlanError, match="expected both"):
            book.decide(2.0, DELTA, operator, reason)
        assert book.lifetime == BOUND and len(book.decisions()) == 1


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "half a letter \ud800", "a" * 1001])
def test_an_operators_word_is_one_printable_line(text: str) -> None:
    with Ledger.open(None, founding=BOUND) as book:
        for operator, reason in ((text, "asked"), ("Ada", text)):
            with pytest.raises(RunError, match="all in one line and all printable"):
                book.decide(2.0, DELTA, operator, reason)


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(math.inf, 1e-6), (0.0, 1e-6), (math.nan, 1e-6), (1.0, 1.0), (1.0, 0.0)]
)
def test_what_bounds_nothing_is_no_lifetime_budget(epsilon: float, delta: float) -> None:
    with pytest.raises(PlanError, match="expected a number"):
        Lifetime(epsilon, delta)
    with (
        Ledger.open(None, founding=BOUND) as book,
        pytest.raises(PlanError, match="expected a number"),
    ):
        book.decide(epsilon, delta, "Bo", "why")


def test_a_changed_decision_is_found(path: Path) -> None:
    with Ledger.open(path, founding=BOUND) as book:
        book.decide(1.5, DELTA, "Bo", "why")
        book.charge([charge(book.enrol("a", PATIENTS))], WIDE)
    tamper(path, "UPDATE charges SET event = replace(event, '1.5', '9.5') WHERE seq = 1")
    with pytest.raises(LedgerError, match="row 1 is missing or was changed"):
        Ledger.open(path)


def old_ledger(path: Path, *patients: str) -> None:
    """Leave what medfed wrote before there were lifetime budgets: format 1, no anchor, no rule."""
    with Ledger.open(path) as book:
        book.charge([charge(book.enrol("a", patients))], FREE)
        rows = book.rows()

    with raw(path) as sql:
        content = (
            sql.execute("SELECT content FROM genesis")
            .fetchone()[0]
            .replace('"format":2', '"format":1')
        )
        row = list(sql.execute("SELECT * FROM charges").fetchone()[:-1])
        row[-1] = ledger_file.sha256(content)

    assert len(rows) == 1
    tamper(
        path,
        f"UPDATE genesis SET content = '{content}', hash = '{row[-1]}'",
        f"UPDATE charges SET previous = '{row[-1]}', hash = '{ledger_file.row_hash(row)}'",
        "PRAGMA user_version = 1",
    )
    path.with_name("ledger.head").unlink()


def test_an_old_ledger_opens_and_is_charged_when_the_operator_has_said_its_budget(
    path: Path,
) -> None:
    old_ledger(path, "P-017")
    with Ledger.open(path, read_only=True) as book:
        assert book.lifetime is None and len(book.rows()) == 1
    assert not path.with_name("ledger.head").exists()
    with Ledger.open(path, founding=BOUND) as book:
        a = book.enrol("a", ["P-017"])
        for use in (book.charge, book.check):
            with pytest.raises(LedgerError, match=r"has no lifetime budget.*medfed privacy budget"):
                use([charge(a)], ONE)
        book.decide(1.0, DELTA, "Ada", "it was founded before budgets were")
        book.charge([charge(a)] * 4, WIDE)  # one was paid long ago
        with pytest.raises(BudgetError, match="all studies"):
            book.charge([charge(a)], WIDE)
        # its pseudonyms were made of texts as they are
        assert book.pseudonym("P-017") != book.pseudonym("p-017")
    assert rule_of(path) == "exact"
    with raw(path) as sql:
        # an older medfed would not heed the budget
        assert sql.execute("PRAGMA user_version").fetchone() == (2,)


def test_one_run_s_ledger_needs_none(path: Path) -> None:
    with Ledger.open(path) as book:
        assert book.lifetime is None
        book.charge([charge(book.enrol("a", PATIENTS))] * 50, FREE)


# Who is one patient -------------------------------------------------------------------------------


def test_a_name_has_one_pseudonym_however_it_is_written(path: Path) -> None:
    with Ledger.open(path, founding=BOUND) as book:
        assert (
            len({book.pseudonym(text) for text in ("17", "17.0", "00017", "1.7e1", "+17", " 17")})
            == 1
        )
        assert book.pseudonym("MRN-7") == book.pseudonym("mrn-7") != book.pseudonym("mrn-8")
        book.charge([charge(book.enrol("a", ["17", "Erika"]))] * 5, WIDE)
        with pytest.raises(BudgetError):
            book.charge([charge(book.enrol("b", ["ERIKA "]), study="t")], WIDE)
        assert (book.knows(["erika", "017.0", "new"]), book.knows(["new"])) == (2, 0)
    assert rule_of(path) == "canonical"


def test_where_zeros_and_case_carry_meaning_they_do(path: Path) -> None:
    with Ledger.open(path, founding=Lifetime(1.0, DELTA, "exact", "Ada")) as book:
        assert len({book.pseudonym(text) for text in ("17", "017", "17.0", "a", "A")}) == 5
        assert book.pseudonym(" 17 ") == book.pseudonym("17")
        book.decide(2.0, DELTA, "Ada", "more")
        # no decision makes anybody new
        assert book.lifetime is not None and book.lifetime.identity == "exact"
    assert rule_of(path) == "exact"


def test_the_rule_of_no_ledger_is_none_and_reading_it_founds_nothing(tmp_path: Path) -> None:
    assert rule_of(tmp_path / "ledger.sqlite") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ledger.sqlite").write_bytes(b"not a ledger" * 999)
    with pytest.raises(LedgerError, match="is no ledger"):
        rule_of(tmp_path / "ledger.sqlite")


# What lies beside it ------------------------------------------------------------------------------


@pytest.fixture
def yesterday(written: Path, tmp_path: Path) -> Path:
    """A copy of the ledger's folder, before one more charge."""
    shutil.copytree(written.parent, tmp_path / "yesterday")
    with Ledger.open(written) as book:
        book.charge([charge(book.enrol("a", PATIENTS[:7]))], FREE)
    return tmp_path / "yesterday" / "ledger.sqlite"


def everywhere_refused(path: Path, words: str) -> None:
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=words):
            Ledger.open(path, read_only)


def test_yesterdays_ledger_is_refused(written: Path, yesterday: Path) -> None:
    shutil.copy(yesterday, written)
    everywhere_refused(written, r"older than the last head .*medfed privacy accept")


def test_a_rolled_back_ledger_that_was_charged_again_is_refused(
    written: Path, yesterday: Path
) -> None:
    """As many rows as before, and other ones."""
    with Ledger.open(yesterday) as book:
        book.charge([charge(book.enrol("b", PATIENTS[5:]))] * 2, FREE)
    shutil.copy(yesterday, written)
    everywhere_refused(written, "older than the last head")


@pytest.mark.parametrize("kept", ["pseudonym.key", "ledger.head"])
def test_a_ledger_that_is_gone_is_refused_and_not_founded_anew(written: Path, kept: str) -> None:
    for place in written.parent.iterdir():
        if place.name != kept:
            place.unlink()
    everywhere_refused(written, rf"is missing, though {kept} is there.*in another folder")
    with pytest.raises(LedgerError, match="is missing"):
        rule_of(written)
    assert [place.name for place in written.parent.iterdir()] == [kept]


def test_without_its_anchor_a_ledger_is_refused(written: Path, yesterday: Path) -> None:
    written.with_name("ledger.head").unlink()
    everywhere_refused(written, r"ledger\.head is missing: nothing says that .* is the newest")
    shutil.copy(yesterday, written)
    everywhere_refused(written, "ledger.head is missing")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"ledger": "x", "seq": "many", "head": ""}', "\0" * 200]
)
def test_a_damaged_anchor_is_refused(written: Path, content: str) -> None:
    written.with_name("ledger.head").write_text(content)
    everywhere_refused(written, r"ledger\.head is damaged")


def test_two_sites_ledgers_cannot_be_swapped(tmp_path: Path) -> None:
    sites = [tmp_path / name / "ledger.sqlite" for name in "ab"]
    for path in sites:
        with Ledger.open(path, founding=BOUND) as book:
            book.charge([charge(book.enrol("a", PATIENTS))] * (1 + (path == sites[1])), WIDE)

    for swapped in (["ledger.sqlite"], ["ledger.sqlite", "pseudonym.key"]):
        for name in swapped:
            one, two = (path.with_name(name) for path in sites)
            one.rename(tmp_path / "aside")
            two.rename(one)
            (tmp_path / "aside").rename(two)

        for path in sites:
            with pytest.raises(
                LedgerError, match=r"is not the key of|is another ledger, or was founded anew"
            ):
                Ledger.open(path)
            with pytest.raises(LedgerError, match="is another ledger, or was founded anew"):
                Ledger.open(path, read_only=True)

        for name in swapped:
            one, two = (path.with_name(name) for path in sites)
            one.rename(tmp_path / "aside")
            two.rename(one)
            (tmp_path / "aside").rename(two)

    for path in sites:
        Ledger.open(path).close()


def test_whose_whole_folder_is_yesterdays_is_found_by_a_head_told_elsewhere(
    written: Path, yesterday: Path
) -> None:
    """Nothing in the folder can tell: that is what the heads in claims and run folders are for."""
    with Ledger.open(written) as book:
        head = book.head()
        book.refuse_without(head)
    with (
        Ledger.open(yesterday) as book,
        pytest.raises(LedgerError, match="of an earlier claim is not in it"),
    ):
        book.refuse_without(head)


def test_the_anchor_of_two_processes_is_the_last_head_of_both(path: Path) -> None:
    with Ledger.open(path) as one, Ledger.open(path) as two:
        a = one.enrol("a", PATIENTS)
        for book in (one, two, two, one, two):
            book.charge([charge(a, Gaussian(1e3))], FREE)
            anchor = book._read_anchor()
            assert anchor is not None and anchor.head == one.head() == two.head()
        two._tell_head(1, "an old one")  # of a process that was slow
        assert book._read_anchor() == anchor


DIES_TELLING = """
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
charge(1)
print(1, flush=True)
module.Ledger.POINT = die
charge(2)
"""


@on_posix
@pytest.mark.parametrize("place", ["_tell_head", "_advance_anchor", "_write_anchor"])
def test_a_kill_between_charge_and_anchor_leaves_a_ledger_that_opens(
    path: Path, place: str
) -> None:
    """The anchor may lag behind the ledger, by what the crash cut off; it is never ahead of it."""
    child = _start(path, "r", ENROL, DIES_TELLING.replace("POINT", place))
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err, out) == (-signal.SIGKILL, "", "1\n")
    yesterday = path.read_bytes()
    with Ledger.open(path, read_only=True) as book:
        assert [row["round"] for row in book.rows()] == [1, 2]
        anchor = book._read_anchor()
        assert anchor is not None and anchor.seq == 1
    with Ledger.open(path) as book:  # which catches up
        anchor = book._read_anchor()
        assert anchor is not None and (anchor.seq, anchor.head) == (2, book.head())
        book.charge([charge(book.enrol("a", ["p", "q"]))], ONE)
    path.write_bytes(yesterday)
    everywhere_refused(path, "older than the last head")


DIES_COMPLETING = """
real, times = module.files.write, []
def write(*arguments):
    if "WHEN" == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
module.files.write = write
Ledger.open(path)
"""


@on_posix
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_between_ledger_and_key_is_completed(path: Path, when: str) -> None:
    child = _start(path, "r", DIES_COMPLETING.replace("WHEN", when))
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (-signal.SIGKILL, "")
    assert path.exists() and not path.with_name("pseudonym.key").exists()
    Ledger.open(path, read_only=True).close()
    with Ledger.open(path) as book:
        book.charge([charge(book.enrol("a", PATIENTS))], ONE)
    names = {place.name for place in path.parent.iterdir() if not place.name.endswith(".tmp")}
    assert names == {"ledger.sqlite", "ledger.head", "pseudonym.key"}


@on_posix
def test_many_processes_found_one_ledger(path: Path) -> None:
    code = (
        "ledger = Ledger.open(path)\nprint(ledger._genesis['id'], ledger.pseudonym('p'), "
        "ledger.founded)\n"
    )
    children = [_start(path, str(number), code) for number in range(5)]
    told = []
    for child in children:
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, "")
        told.append(out.split())
    assert len({(one[0], one[1]) for one in told}) == 1
    assert sorted(place.name for place in path.parent.iterdir()) == [
        "ledger.head",
        "ledger.sqlite",
        "pseudonym.key",
    ]


def test_an_operator_accepts_an_old_copy_by_its_head_and_it_stays_on_record(
    written: Path, yesterday: Path
) -> None:
    shutil.copy(yesterday, written)
    with Ledger.open(yesterday, read_only=True) as book:
        head = book.head()
    for mine, operator, reason, words in [
        ("0" * 64, "Ada", "the disk died", "has head"),
        (head, "", "the disk died", "expected both"),
        (head, "Ada", "", "expected both"),
    ]:
        with pytest.raises((LedgerError, PlanError), match=words):
            Ledger.accept(written, mine, operator, reason)

    everywhere_refused(written, "older than the last head")
    Ledger.accept(written, head, "Ada", "the disk died")
    with Ledger.open(written) as book:
        assert (
            book.decisions()[-1].items()
            >= {"kind": "accepted", "operator": "Ada", "reason": "the disk died"}.items()
        )
        assert len(book.rows()) == 5
        book.charge([charge(book.enrol("a", PATIENTS[:7]))], FREE)

    Ledger.open(written).close()


def test_a_plan_is_counted_inside_the_transaction(tmp_path: Path) -> None:
    """Two processes that looked at the same moment: the second finds what the first has written."""
    limits = Limits(math.inf, DELTA, planned={"round": 2})
    with (
        Ledger.open(tmp_path / "ledger.sqlite") as one,
        Ledger.open(tmp_path / "ledger.sqlite") as two,
    ):
        cohort = one.enrol("a", ["p", "q"])
        one.charge([charge(cohort)], limits)
        two.charge([charge(two.enrol("a", ["p", "q"]))], limits)
        for book in (one, two):
            with pytest.raises(BudgetError, match=r"plan of 2 \(round\), and 2 are paid"):
                book.charge([charge(cohort)], limits)
        with pytest.raises(BudgetError, match=r"plan of 2 \(round\), and 0 are paid"):
            one.charge([replace(charge(cohort), run="another")] * 3, limits)
        with pytest.raises(BudgetError, match=r"plan of 2 \(round\), and 2 are paid"):
            one.charge([replace(charge(cohort), run="another")], replace(limits, alone=True))
        assert len(two.rows()) == 2
