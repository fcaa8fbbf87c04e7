"""Random programs of lies: nothing that must hold gives way, and each planted bug is found."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.adversaries import bugs
from tests.adversaries.programs import Bug, Liar, MaskedLies, SharedLies

MACHINES = (MaskedLies, SharedLies)


def play(
    machine: type[Liar], programs: int, bug: Bug | None = None, derandomize: bool = False
) -> None:
    """Play so many programs of up to six acts."""
    planted = type(machine.__name__, (machine,), {"bug": staticmethod(bug) if bug else None})
    run_state_machine_as_test(
        planted,
        settings=settings(
            max_examples=programs,
            stateful_step_count=5,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_whatever_liars_do_what_must_hold_holds(machine: type[Liar]) -> None:
    play(machine, 100)


@pytest.mark.long  # MEDFED_NIGHT=1: thousands, a night's work
@pytest.mark.timeout(14400)  # a second a program, and a busy machine
@pytest.mark.parametrize("machine", MACHINES)
def test_thousands_of_programs(machine: type[Liar]) -> None:
    play(machine, 3000 if os.environ.get("MEDFED_NIGHT") else 600)


PLANTED = [(MaskedLies, bug) for bug in bugs.MASKED] + [(SharedLies, bug) for bug in bugs.SHARED]


@pytest.mark.long
@pytest.mark.parametrize(("machine", "bug"), PLANTED)
def test_a_planted_bug_is_found(
    machine: type[Liar], bug: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.raises(AssertionError, match=r"opened|joined|paid|AES-GCM|stream"):
        play(machine, 500, bug, derandomize=True)
