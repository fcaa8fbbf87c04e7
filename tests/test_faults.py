"""The law of failing, for every command under every fault of `faults`: one line that names place
and way out, and what was whole before is whole after. A few cells are real processes; the whole
grid is in `make test-long`.
"""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

import medfed
from medfed import cli, runs
from medfed.compliance import consortium
from medfed.core.checks import MedfedError
from medfed.runs import drive
from medfed.secure import key_files
from tests.faults import FAULTS, Fault
from tests.tables import PRIVATE, STUDY, invented, write_study

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform != "linux", reason="the faults ask /proc for a file's name"),
]

ROOT = Path(__file__).parent.parent
KEY = "keys/consortium.key"
FRESH = "keys/fresh.key"  # of a consortium that has begun no list yet: one key, one list

COMMANDS: dict[str, str] = {
    "run": "run study.toml --out new",
    "run, JSON": "run study.toml --out new --json",
    "run, logged": "run study.toml --out new --log text",
    "run, named by time": "run study.toml --quiet",
    "run under a claim": "run private.toml --out new --quiet",
    "resume": "resume stopped",
    "resume under a claim": "resume private-stopped --quiet",
    "show": "show run",
    "show, JSON": "show run --json",
    "watch": "watch run --once",
    "alone": "alone run north",
    "report": "report run",
    "report, tables": "report run --export csv,json,parquet",
    "report elsewhere": "report run --out pages",
    "export": "export run --tensorboard board",
    "studies": "studies",
    "data list": "data list",
    "data get": "data get breast-cancer",
    "data show": "data show study.toml --figure figure.html",
    "data show, written": "data show cohort.csv --write drafted.toml",
    "study check": "study check study.toml",
    "study fix": "study fix study.toml",
    "study fix, written": "study fix study.toml --out fixed/study.toml",
    "trail verify": "trail verify run",
    "quarantine list": "quarantine list stopped",
    "quarantine lift": "quarantine lift stopped north --reason repaired",
    "give-up": "give-up stopped --reason gone --operator Ada",
    "privacy plan": "privacy plan private.toml",
    "privacy ledger": "privacy ledger private",
    "privacy claim": "privacy claim private --report claim.html",
    "privacy found": "privacy found ledger --lifetime-epsilon 3 --delta 1e-5 --operator Ada",
    "privacy budget": "privacy budget site --lifetime-epsilon 2 --operator Ada --reason less",
    "privacy column": "privacy column subject --operator Ada --reason same site",
    "privacy accept": "privacy accept site --head 0 --operator Ada --reason lost",
    "the lifetime ledger": "privacy ledger",
    "key new": "key new north",
    "key show": f"key show {KEY}",
    "key request": f"key request {KEY} --out asked.json",
    "federation new": f"federation new others --key {FRESH}",
    "federation approve": f"federation approve members asked-north.json --key {KEY} --fingerprint FINGERPRINT",
    "federation revoke": f"federation revoke members south --key {KEY} --reason left",
    "federation show": "federation show members",
    "compare": (
        "compare study.toml --algorithms fedavg,fedprox --seeds 2 --workers 1 --out compared.html"
    ),
    "audit": "audit private --quick",
}
SLOW = {"compare", "audit"}
"""Commands that take seconds."""

NO_COMMANDS = {"serve"}  # it listens until it is ended


class Crash(BaseException):
    """What a kill looks like from inside."""


@dataclass
class Said:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def told(words: str, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medfed", *words.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr()
    return Said(int(ended.value.code or 0), said.out, said.err)


# What is whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two studies, a finished and a stopped run of each, a site's ledger, keys and a
    consortium.
    """
    place = tmp_path_factory.mktemp("whole")
    masked = STUDY.replace("rounds = 4", "rounds = 2") + '[security]\naggregation = "masked"\n'
    (place / "private.toml").write_text(PRIVATE.replace("rounds = 4", "rounds = 2"))
    write_study(place, masked, invented(90))
    sizes = invented(90)["hospital"].value_counts()
    text = (place / "private.toml").read_text()
    for name, size in (("north", 96), ("south", 58), ("east", 38)):
        text = text.replace(f"{name} = {size}", f"{name} = {int(sizes[name] * 0.8)}")
    (place / "private.toml").write_text(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MEDFED_PASSPHRASE", "")
        for study, name in (("study.toml", "run"), ("private.toml", "private")):
            medfed.run(medfed.load_study(study), name)
        for study, name in (("study.toml", "stopped"), ("private.toml", "private-stopped")):
            _stop(study, name)
        said: dict[str, str] = {}
        for words in (
            "privacy found site --lifetime-epsilon 3 --delta 1e-5 --operator Ada",
            "key new consortium --role consortium",
            "key new fresh --role consortium",
            f"federation new members --key {KEY}",
            *(f"key new {name}" for name in ("west", "south")),
            *(f"key request keys/{name}.key --out asked-{name}.json" for name in ("west", "south")),
        ):
            patch.setattr(sys, "argv", ["medfed", *words.split()])
            with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as quiet:
                quiet.setattr(sys, "stdout", out := io.StringIO())
                cli.main()
            said[words] = out.getvalue()
        prints = {
            name: said[f"key new {name}"].split("fingerprint ")[1].strip()
            for name in ("west", "south")
        }
        consortium.approve(
            Path("members"),
            key_files.load(Path(KEY)),
            json.loads(Path("asked-south.json").read_text()),
            prints["south"],
        )
    (place / "asked-west.json").rename(place / "asked-north.json")
    (place / "fingerprint").write_text(prints["west"].replace(" ", ""))
    return place


def _stop(study: str, name: str) -> None:
    """Leave a run that was killed after its first round."""

    def die(*_: object, **__: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        real = drive.write_checkpoint

        def write(folder: Path, server: object, *more: object) -> None:
            real(folder, server, *more)  # type: ignore[arg-type]
            if server.round == 1:  # type: ignore[attr-defined]
                raise Crash

        patch.setattr(drive, "write_checkpoint", write)
        with pytest.raises(Crash):
            medfed.run(medfed.load_study(study), name)


@pytest.fixture
def work(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `whole`, as the working folder."""
    place = tmp_path / "work"
    shutil.copytree(whole, place)
    for key in (place / "keys").iterdir():
        key.chmod(0o600)
    monkeypatch.chdir(place)
    monkeypatch.setenv("MEDFED_PASSPHRASE", "")
    monkeypatch.setenv("MEDFED_HOME", str(place / "site"))
    return place


def words_of(name: str, place: Path) -> str:
    """Return a command's words."""
    return COMMANDS[name].replace("FINGERPRINT", (place / "fingerprint").read_text())


WAYS_OUT = (
    r"\. (Free|Make|Look|Name|Set|Give|Wait|Restore|Try|Back|Start|See)|--out|--operator|MEDFED_HOME|make new keys|"
    r"another file|compare, then|medfed resume|run the study again|Every charge|end other programs"
)


def hold_the_law(words: str, said: Said, place: Path, whole: Path) -> None:
    """See that a command ended in words, and left whole what was."""
    assert said.code in (0, 1, 2), said
    assert "Traceback" not in said.err and "Traceback" not in said.out, said
    if said.code == 2:
        assert re.search(r"^error ", said.err, re.M), said
        assert re.search(WAYS_OUT, said.err), said.err
        assert any(
            word in said.err
            for word in (*words.split(), str(place), "runs", "MEDFED_HOME", "--operator")
        ), said
    stay_whole(place, whole)


def stay_whole(place: Path, whole: Path) -> None:
    """See that finished runs, ledgers, keys and lists hold as before, and that a stopped run
    resumes.
    """
    for name in ("run", "private"):
        for path in (
            "model.safetensors",
            "summary.json",
            "events.jsonl",
            "study.toml",
            "plan.json",
        ):
            assert (place / name / path).read_bytes() == (whole / name / path).read_bytes(), (
                name,
                path,
            )

    if not _same("run/trail", place, whole):
        runs.verify_model(place / "run")
    for name in ("private", "private-stopped", "site"):
        if not _same(name, place, whole):
            runs.ledger_accounts(place / name)

    if not _same("members", place, whole):
        consortium.read(place / "members")
    if not _same("stopped", place, whole):
        assert medfed.resume(place / "stopped").complete
        model = (place / "stopped" / "model.safetensors").read_bytes()
        assert model == (whole / "run" / "model.safetensors").read_bytes()
        runs.verify_model(place / "stopped")

    assert not [path for path in place.rglob(".lock*")]


def _same(name: str, place: Path, whole: Path) -> bool:
    """Say whether a folder is as it was, to the byte."""
    return _contents(place / name) == _contents(whole / name)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def resumes_or_is_none(folder: Path) -> None:
    """See that what a run left behind goes on, or says that it cannot."""
    if not folder.exists():
        return
    try:
        done = medfed.resume(folder)
        paid_twice = "privacy.spare_rounds" in done.summary["reason"]  # a round, as is told
        assert done.complete or paid_twice, done.summary["reason"]
    except MedfedError as error:
        assert re.search(
            r"is not a run folder|no whole checkpoint.*Start the study again", str(error), re.S
        ), error


# The grid -----------------------------------------------------------------------------------------

STEPS = (1, 2, 3, 5, 8, 13, 21, 34)
"""At which chance a fault strikes that could strike at any; of a command with fewer, the last cells
are quick.
"""

EVER = {"folders unflushed", "folders unflushed, ENOTSUP", "folders closed", "read-only", "forbidden", "no locks",
        "homeless", "backwards", "zone ahead", "no such zone"}  # fmt: skip
"""Faults of a place or a machine: they strike at each chance."""

HARMLESS = {"folders unflushed", "folders unflushed, ENOTSUP", "folders closed", "no locks", "backwards",
            "zone ahead", "no such zone"}  # fmt: skip
"""Faults under which everything ends as without them."""

REFUSED_ANYWAY = {"privacy accept", "give-up"}
"""Commands that say no to what they are asked here."""

HOME = ("run under a claim", "resume", "quarantine lift", "privacy ledger", "the lifetime ledger", "privacy budget",
        "data get", "key new")  # fmt: skip
"""Commands that ask for a user's home or name, or may."""

FAST = [
    *(
        (name, fault, 0)
        for name in ("run", "resume", "quarantine lift")
        for fault in sorted(HARMLESS)
    ),
    *((name, "homeless", 0) for name in HOME),
    *((name, "zone ahead", 0) for name in ("run", "quarantine lift")),
    *(
        (name, "read-only", 0)
        for name in ("run", "resume", "report", "report elsewhere", "privacy claim", "key new")
    ),
    *(
        (name, "forbidden", 0)
        for name in ("export", "study fix, written", "data show", "privacy found")
    ),
    *(("run", "full", at) for at in (1, 2, 3, 5, 8, 13)),
    *(("resume", "full", at) for at in (1, 2, 4, 6)),
    *(("run under a claim", fault, 4) for fault in ("full", "unflushed", "no rename")),
    *(("resume under a claim", fault, 2) for fault in ("full", "unflushed", "no rename")),
    *(
        (name, "full", 1)
        for name in (
            "report",
            "quarantine lift",
            "key new",
            "federation approve",
            "federation revoke",
        )
    ),
    *((name, "no rename", 1) for name in ("resume", "report", "privacy budget", "key request")),
    *(("run", "unflushed", at) for at in (1, 3, 6, 9)),
]


@contextmanager
def own_zone() -> Iterator[None]:
    """Go back to the zone of before."""
    zone = os.environ.get("TZ")
    try:
        yield
    finally:
        os.environ.pop("TZ", None)
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()


def strike(
    name: str, fault: str, at: int, work: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> int:
    """Run a command under a fault, see that the law holds, and return how often the
    fault struck.
    """
    words = words_of(name, work)
    with pytest.MonkeyPatch.context() as patch, own_zone():
        put = Fault(work, patch.setattr, at)
        FAULTS[fault](put)
        said = told(words, capsys)
    hold_the_law(words, said, work, whole)
    for left in (work / "new", *(work / "runs").glob("*")):
        resumes_or_is_none(left)
    if not put.hits or fault in HARMLESS:
        assert said.code == (2 if name in REFUSED_ANYWAY else 0), said
    elif fault in ("full", "unflushed", "no rename") and said.code == 0:
        raise AssertionError(f"{put.hits} writes were refused, and nobody was told: {said}")
    return put.hits


@pytest.mark.parametrize(("name", "fault", "at"), FAST)
def test_a_command_under_a_fault(
    name: str, fault: str, at: int, work: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strike(name, fault, at, work, whole, capsys)


FEW = ("full", "homeless", "forbidden", "backwards")
"""What commands that take seconds are put under."""

GRID = [
    (name, fault)
    for name in COMMANDS
    for fault in (FEW if name in SLOW else FAULTS)
    # a zone is the process's: fast cells, and real processes, have them
    if fault not in ("zone ahead", "no such zone")
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "fault"), GRID)
def test_every_command_under_every_fault(
    name: str,
    fault: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for at in (0,) if fault in EVER else STEPS:
        with monkeypatch.context() as patch:
            place = tmp_path / str(at) / "work"
            shutil.copytree(whole, place)
            patch.chdir(place)
            patch.setenv("MEDFED_PASSPHRASE", "")
            patch.setenv("MEDFED_HOME", str(place / "site"))
            hits = strike(name, fault, at, place, whole, capsys)
        if not hits:
            break


def own_code() -> dict[str, str]:
    """Return an environment in which a process finds this package, and the shim that puts a fault
    under it.
    """
    paths = (ROOT / "tests" / "shim", ROOT, Path(medfed.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "at"),
    [
        ("run", "full", 5),
        ("resume under a claim", "unflushed", 3),
        pytest.param("run", "folders unflushed", 0, marks=pytest.mark.long),
        pytest.param("run", "homeless", 0, marks=pytest.mark.long),
    ],
)
def test_a_real_process_under_a_fault(
    name: str, fault: str, at: int, work: Path, whole: Path
) -> None:
    words = words_of(name, work)
    command = [sys.executable, "-m", "medfed", *words.split()]
    environment = {**own_code(), "MEDFED_FAULT": f"{fault}:{at}:{work}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    hold_the_law(words, Said(done.returncode, done.stdout, done.stderr), work, whole)
    assert done.returncode in ((1, 2) if at else (0,)), done.stderr
    resumes_or_is_none(work / "new")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_real_full_disk_under_a_claim_forgets_no_charge(
    share: float, work: Path, whole: Path
) -> None:
    """The ledger too: SQLite asks no Python for its writes."""

    limit = int(share * (whole / "private" / "sites" / "ledger.sqlite").stat().st_size)

    def no_larger_file() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = words_of("run under a claim", work)
    command = [sys.executable, "-m", "medfed", *words.split()]
    done = subprocess.run(
        command, env=own_code(), preexec_fn=no_larger_file, capture_output=True, text=True
    )
    hold_the_law(words, Said(done.returncode, done.stdout, done.stderr), work, whole)
    assert done.returncode in (1, 2), done
    if (work / "new" / "sites" / "ledger.sqlite").exists():
        runs.ledger_accounts(work / "new" / "sites")
    resumes_or_is_none(work / "new")


def test_every_command_is_put_under_faults() -> None:
    """A new command comes into the grid, or says why not."""

    def leaves(command: object, path: tuple[str, ...] = ()) -> Iterator[str]:
        inner = getattr(command, "commands", None)
        if not inner:
            yield " ".join(path)
        for name, one in (inner or {}).items():
            yield from leaves(one, (*path, name))

    known = set(leaves(typer.main.get_command(cli.app)))
    tried = {name for name in known for words in COMMANDS.values() if words.startswith(name)}
    assert known - tried == NO_COMMANDS
