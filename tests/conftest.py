"""What every test shares: how a test says what it needs, and as many threads for everybody.

A test that needs something not every machine has says so: `@pytest.mark.needs("data")`, or by the
fixture `data_dir`. Where it is absent the test is skipped with the reason, unless the environment's
MEDFED_REQUIRE (a comma list of kinds) names the kind: then it fails. CI sets MEDFED_REQUIRE, so
that nothing is skipped there unseen.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["pytester"]

# The same split of sums on every machine, and no fight for cores: two threads, or one where two
# workers share the machine (pytest-xdist). Commands that a test starts inherit it.
THREADS = 1 if os.environ.get("PYTEST_XDIST_WORKER") else 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
# No ledger of whoever runs the tests is read, and none is left behind.
os.environ["MEDFED_HOME"] = tempfile.mkdtemp(prefix="medfed-home-")

settings.register_profile("medfed", deadline=None)  # a busy machine is no failure
settings.load_profile("medfed")


def _no_data() -> str | None:
    folder = os.environ.get("MEDFED_DATA", "")
    if not folder:
        return "MEDFED_DATA is not set; expected the folder that holds fed_heart_disease"
    if not (Path(folder) / "fed_heart_disease").is_dir():
        return f"MEDFED_DATA={folder} does not hold the folder fed_heart_disease"
    return None


def _absent(*programs: str) -> Callable[[], str | None]:
    return lambda: (
        None
        if any(map(shutil.which, programs))
        else f"no {programs[0]} on the PATH; apt install {programs[0]}"
    )


# kind -> why it is absent here, or None where it is at hand
KINDS: dict[str, Callable[[], str | None]] = {
    "data": _no_data,
    "chromium": _absent("chromium"),
    "prometheus": _absent("prometheus"),
}


def _required() -> set[str]:
    return {kind.strip() for kind in os.environ.get("MEDFED_REQUIRE", "").split(",")} - {""}


def _need(kind: str) -> None:
    """Skip where `kind` is absent; fail where it is absent and required."""
    if kind not in KINDS:
        pytest.fail(
            f"needs({kind!r}): unknown kind; expected one of {sorted(KINDS)}", pytrace=False
        )
    reason = KINDS[kind]()
    if reason is None:
        return
    if kind in _required():
        pytest.fail(f"{kind} is required (MEDFED_REQUIRE) but absent: {reason}", pytrace=False)
    pytest.skip(f"needs {kind}: {reason}")


def pytest_configure() -> None:
    if unknown := _required() - KINDS.keys():
        raise pytest.UsageError(
            f"MEDFED_REQUIRE={sorted(unknown)}: unknown kind; expected of {sorted(KINDS)}"
        )


@pytest.hookimpl(tryfirst=True)  # before any fixture looks for what is absent
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for kind in mark.args:
            _need(kind)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder MEDFED_DATA."""
    _need("data")
    return Path(os.environ["MEDFED_DATA"])


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    import torch  # here, so that collecting stays quick

    torch.set_num_threads(THREADS)
    yield
    shutil.rmtree(os.environ["MEDFED_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand the sites' own log up, so that `caplog` hears it."""
    from medfed.core.own import LOGGER

    monkeypatch.setattr(LOGGER, "propagate", True)


@pytest.fixture(autouse=True)
def _nobody_has_seen_a_list() -> None:
    """Forget the lists of members that the test before has read: each test plays a machine of its
    own.
    """
    (Path(os.environ["MEDFED_HOME"]) / "members.lists").unlink(missing_ok=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tests of tiny tensors: waking a second one would be most of their time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
