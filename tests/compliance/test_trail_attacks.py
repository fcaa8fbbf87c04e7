"""Liars with a run's folder, or with an older list of members: each changes what `medfed trail verify` relies on,
and is found.

Each attack was first seen to pass on the code before its defence; what it found then, its test says.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import medfed
from medfed import runs
from medfed.compliance import consortium, seen
from medfed.compliance.trail import Trail
from medfed.core.checks import KeyFileError, MedfedError, NoEndError, QuorumError, TrailError
from medfed.evidence import audit as audits
from medfed.runs import drive
from medfed.runs.verification import verify_run
from medfed.secure import key_files
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.study import Study
from tests.tables import PRIVATE, SITES, STUDY, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

BOSS = Identity.new("the consortium", "consortium")
EVE = Identity.new("coordinator", "coordinator")
"""A coordinator of nobody's."""


def enrol(place: Path, name: str, role: str, keys: Path) -> Identity:
    one = Identity.new(name, role)
    consortium.approve(place, BOSS, consortium.request(one))
    key_files.save(one, keys / f"{name}.key")
    return one


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two private runs of one study, masked, under a consortium's list; and one that makes its own keys."""
    place = tmp_path_factory.mktemp("world")
    consortium.begin(place / "members", BOSS)
    for name in SITES:
        enrol(place / "members", name, "site", place / "keys")
    enrol(place / "members", "coordinator", "coordinator", place / "keys")
    enrol(place / "members", "second", "coordinator", place / "keys")
    enrol(place / "members", "agg", "aggregator", place / "keys")
    text = PRIVATE.replace("rounds = 4", "rounds = 2").replace("every = 4", "every = 2")
    study = medfed.load_study(write_study(place, text)).set("security.aggregation", "masked")
    medfed.run(study, place / "made")
    study = study.set("security.federation", str(place / "members"))
    study = study.set("security.keys", str(place / "keys"))
    for name in ("run", "other"):
        medfed.run(study, place / name)
    medfed.run(study.set("study.seed", 5), place / "foreign")
    return place


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `world`, on a machine that has seen nothing yet."""
    shutil.copytree(world, tmp_path / "here")
    for key in (tmp_path / "here" / "keys").glob("*.key"):
        key.chmod(0o600)
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEDFED_PASSPHRASE", "")
    return tmp_path / "here"


@pytest.fixture
def said(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Check a run by the command; return its status and its words."""

    def check(name: str = "run", *words: object, listed: bool = True) -> tuple[int, str]:
        capsys.readouterr()
        more = ("--federation", here / "members") if listed else ()
        code = command("trail", "verify", here / name, *more, *words)
        told = capsys.readouterr()
        return code, told.out + told.err

    return check


def trail_of(folder: Path) -> Path:
    return folder / "trail" / "trail.jsonl"


def lines_of(folder: Path) -> list[bytes]:
    return trail_of(folder).read_bytes().splitlines()


def put(folder: Path, lines: list[bytes]) -> None:
    trail_of(folder).write_bytes(b"".join(line + b"\n" for line in lines))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a file of JSON, as anybody can who has it."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content, indent=2))


def rewrite(
    folder: Path,
    by: Identity,
    change: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda kind, facts: facts,
    role: dict[str, str] | None = None,
) -> None:
    """Write a run's trail anew under another's key, its facts changed (None: left out), and the
    summary's head with it.
    """
    old = [json.loads(line) for line in lines_of(folder)]
    trail_of(folder).unlink()
    trail = Trail.open(trail_of(folder), by.name, by.public.signing, by.sign)
    for entry in old:
        if entry["kind"] != "opened" and (facts := change(entry["kind"], entry["facts"])):
            if "coordinator" in facts:
                facts = facts | {"coordinator": consortium.to_json(by.public) | (role or {})}
            trail.append(entry["kind"], facts)
    told = {"entries": trail.number, "head": trail.head}
    if (folder / "summary.json").exists():
        edit(folder / "summary.json", lambda summary: summary | {"trail": told})


def key_of(here: Path, name: str) -> Identity:
    return key_files.load(here / "keys" / f"{name}.key")


def test_an_honest_run_holds(said: Callable[..., tuple[int, str]]) -> None:
    for name in ("run", "other", "foreign"):
        code, told = said(name)
        assert code == 0, told
    code, told = said("made", listed=False)
    assert code == 0, told
    code, told = said(listed=False)  # by the list that the study names
    assert code == 0 and "compare the consortium's fingerprint" in told


# a cut --------------------------------------------------------------------------------------------


def cut(here: Path, count: int = 1) -> None:
    put(here / "run", lines_of(here / "run")[:-count])


def cut_without_summary(here: Path) -> None:
    cut(here)
    (here / "run" / "summary.json").unlink()


def cut_deep_without_summary(here: Path) -> None:
    cut(here, 2)
    (here / "run" / "summary.json").unlink()


def cut_with_another_head(here: Path) -> None:
    cut(here, 2)
    head = sha256(lines_of(here / "run")[-1]).hexdigest()
    number = len(lines_of(here / "run"))
    edit(here / "run" / "summary.json", lambda s: s | {"trail": {"entries": number, "head": head}})


def cut_with_no_head(here: Path) -> None:
    cut(here, 2)
    edit(here / "run" / "summary.json", lambda s: s | {"trail": {}})


# a foreign trail ----------------------------------------------------------------------------------


def trail_of_another_run(here: Path) -> None:
    shutil.copy(trail_of(here / "other"), trail_of(here / "run"))
    (here / "run" / "summary.json").unlink()


def trail_head_and_model_of_another_run(here: Path) -> None:
    for name in ("trail/trail.jsonl", "summary.json", "model.safetensors"):
        shutil.copy(here / "other" / name, here / "run" / name)


def trail_head_and_model_of_another_study(here: Path) -> None:
    for name in ("trail/trail.jsonl", "summary.json", "model.safetensors"):
        shutil.copy(here / "foreign" / name, here / "run" / name)


def study_of_another_run(here: Path) -> None:
    for name in ("study.toml", "plan.json"):
        shutil.copy(here / "foreign" / name, here / "run" / name)


# altered figures ----------------------------------------------------------------------------------


def altered_event(here: Path) -> None:
    path = here / "run" / "events.jsonl"
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        event = json.loads(line)
        if event["event"] == "round_finished":
            lines[number] = json.dumps(event | {"loss": 0.001})
    path.write_text("\n".join(lines) + "\n")


def appended_event(here: Path) -> None:
    path = here / "run" / "events.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with open(path, "a") as file:
        file.write(json.dumps(last | {"status": "complete", "seconds": 1.0}) + "\n")


def cut_events(here: Path) -> None:
    path = here / "run" / "events.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")


def altered_summary(here: Path) -> None:
    edit(here / "run" / "summary.json", lambda s: s | {"rounds": 200})


def altered_claim(here: Path) -> None:
    edit(here / "run" / "privacy.json", lambda claim: claim | {"epsilon": 0.01})


def removed_summary(here: Path) -> None:
    (here / "run" / "summary.json").unlink()


def removed_claim(here: Path) -> None:
    (here / "run" / "privacy.json").unlink()


def invented_audit(here: Path) -> None:
    audit = {"passed": True, "parts": [{"name": "all attacks", "told": "nothing found"}]}
    edit(here / "run" / "privacy.json", lambda claim: claim | {"audit": audit})
    (here / "run" / "audit.json").write_text(json.dumps(audit))


def altered_plan(here: Path) -> None:
    edit(here / "run" / "plan.json", lambda plan: plan | {"surveyed": "0" * 64})


def altered_encoding(here: Path) -> None:
    def scale(plan: dict[str, Any]) -> None:
        plan["encoding"]["columns"][0]["centre"] = 1.0

    edit(here / "run" / "plan.json", scale)


def altered_study(here: Path) -> None:
    path = here / "run" / "study.toml"
    path.write_text(path.read_text().replace("epsilon = 1.0", "epsilon = 0.5", 1))


def altered_study_and_its_digest(here: Path) -> None:
    altered_study(here)
    digest = medfed.load_study(here / "run" / "study.toml").digest()
    edit(here / "run" / "plan.json", lambda plan: plan | {"digest": digest})


def older_model(here: Path) -> None:
    shutil.copy(here / "foreign" / "model.safetensors", here / "run" / "model.safetensors")


def altered_page(here: Path) -> None:
    assert command("report", here / "run") == 0
    page = here / "run" / "reports" / "privacy_audit.html"
    assert "1.0" in page.read_text()
    page.write_text(page.read_text().replace("1.0", "0.1"))


# a wrong role -------------------------------------------------------------------------------------


def by_an_aggregator(here: Path) -> None:
    rewrite(here / "run", key_of(here, "agg"))


def by_an_aggregator_that_calls_itself_coordinator(here: Path) -> None:
    rewrite(here / "run", key_of(here, "agg"), role={"role": "coordinator"})


def by_an_aggregator_under_the_coordinators_name(here: Path) -> None:
    key = key_of(here, "agg")
    rewrite(here / "run", Identity.of("coordinator", "coordinator", key.secret()))


def by_a_site(here: Path) -> None:
    rewrite(here / "run", key_of(here, SITES[0]))


def by_nobody_known(here: Path) -> None:
    rewrite(here / "run", EVE)


def half_by_a_second_coordinator(here: Path) -> None:
    """Cut the end, and have another coordinator of the list write it."""
    entries = [json.loads(line) for line in lines_of(here / "run")]
    cut(here)
    second = key_of(here, "second")
    trail = Trail.open(trail_of(here / "run"), second.name, second.public.signing, second.sign)
    trail.append("study", entries[1]["facts"] | {"coordinator": consortium.to_json(second.public)})
    trail.append("finished", entries[-1]["facts"])
    told = {"entries": trail.number, "head": trail.head}
    edit(here / "run" / "summary.json", lambda s: s | {"trail": told})


def by_a_second_coordinator(here: Path) -> None:
    """Another coordinator of the list writes all of it, the sites' signatures copied."""
    rewrite(here / "run", key_of(here, "second"))


def approved_in_another_role(here: Path) -> None:
    """A list of the same key on which "coordinator" is an aggregator's name."""
    shutil.rmtree(here / "members")
    consortium.begin(here / "members", BOSS)
    me = key_of(here, "coordinator")
    other = Identity.of("coordinator", "aggregator", me.secret())
    for one in (other, *(key_of(here, name) for name in SITES)):
        consortium.approve(here / "members", BOSS, consortium.request(one))
    head = consortium.read(here / "members").tell_head()
    rewrite(
        here / "run",
        me,
        lambda kind, facts: facts | ({"members": head} if kind == "study" else {}),
    )


# a revoked signer ---------------------------------------------------------------------------------


def by_a_revoked_site(here: Path) -> None:
    consortium.revoke(here / "members", BOSS, SITES[0], "stolen")
    rewrite(
        here / "run",
        key_of(here, SITES[0]),
        lambda kind, facts: facts | ({"signed": {}} if kind == "study" else {}),
    )


def revoked_coordinator(here: Path) -> None:
    consortium.revoke(here / "members", BOSS, "coordinator", "stolen")


def by_a_revoked_site_that_calls_itself_coordinator(here: Path) -> None:
    consortium.revoke(here / "members", BOSS, SITES[0], "stolen")
    rewrite(here / "run", key_of(here, SITES[0]), role={"role": "coordinator"})


def signed_by_a_site_revoked_before(here: Path) -> None:
    """The site is revoked, and the run begins after: its coordinator lets it in all the same."""
    consortium.revoke(here / "members", BOSS, SITES[0], "stolen")
    found = consortium.read(here / "members")
    now = {"lines": len(found.history), "head": found.head}
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: facts | ({"members": now} if kind == "study" else {}),
    )


# signatures under the study -----------------------------------------------------------------------


def without_a_participants_signature(here: Path) -> None:
    def leave_out(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
        if kind == "study":
            signed = {name: one for name, one in facts["signed"].items() if name != SITES[0]}
            return facts | {"signed": signed}
        return facts

    rewrite(here / "run", key_of(here, "coordinator"), leave_out)


def without_any_signature(here: Path) -> None:
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: facts | ({"signed": {}} if kind == "study" else {}),
    )


def signed_for_another_run(here: Path) -> None:
    other = json.loads(lines_of(here / "other")[1])["facts"]["signed"]
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: facts | ({"signed": other} if kind == "study" else {}),
    )


def signed_with_made_up_keys(here: Path) -> None:
    def make_up(kind: str, facts: dict[str, Any]) -> dict[str, Any]:
        if kind != "study":
            return facts
        signed = {}
        for name in facts["signed"]:
            liar = Identity.new(name, "site")
            post = Post(liar, Roster.of(liar.public))
            envelope = post.wrap(Scope(facts["digest"], facts["run"], 0), "study", "*", b"")
            signed[name] = {
                "public": liar.public.signing.hex(),
                "envelope": envelope.hex(),
            }
        return facts | {"signed": signed}

    rewrite(here / "run", key_of(here, "coordinator"), make_up)


def no_study_at_all(here: Path) -> None:
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: None if kind == "study" else facts,
    )


# a missing end ------------------------------------------------------------------------------------


def no_end(here: Path) -> None:
    """As a killed run leaves it: whole lines, no end, no summary."""
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: None if kind == "finished" else facts,
    )
    (here / "run" / "summary.json").unlink()


def opened_after_the_end(here: Path) -> None:
    me = key_of(here, "coordinator")
    Trail.open(trail_of(here / "run"), me.name, me.public.signing, me.sign)


# odd files ----------------------------------------------------------------------------------------


def doubled_key_in_the_last_line(here: Path) -> None:
    """Which of two a reader takes is its own matter: some take the first."""
    lines = lines_of(here / "run")
    lines[-1] = lines[-1].replace(b'"rounds": 2', b'"rounds": 9, "rounds": 2')
    assert b'"rounds": 9' in lines[-1]
    put(here / "run", lines)
    head = sha256(lines[-1]).hexdigest()
    edit(here / "run" / "summary.json", lambda s: s | {"trail": s["trail"] | {"head": head}})


def doubled_key_in_the_claim(here: Path) -> None:
    path = here / "run" / "privacy.json"
    path.write_text(path.read_text().replace("{", '{"epsilon": 0.01,', 1))


def doubled_key_in_the_summary(here: Path) -> None:
    path = here / "run" / "summary.json"
    path.write_text(path.read_text().replace("{", '{"rounds": 200,', 1))


def no_number_in_the_claim(here: Path) -> None:
    edit(here / "run" / "privacy.json", lambda claim: claim | {"epsilon": float("nan")})


def no_number_in_the_trail(here: Path) -> None:
    lines = lines_of(here / "run")
    lines[-1] = lines[-1].replace(b'"rounds": 2', b'"rounds": NaN')
    put(here / "run", lines)


def link_to_the_trail(here: Path) -> None:
    path = trail_of(here / "run")
    path.rename(here / "elsewhere.jsonl")
    path.symlink_to(here / "elsewhere.jsonl")


def link_to_the_folder(here: Path) -> None:
    (here / "run" / "trail").rename(here / "elsewhere")
    (here / "run" / "trail").symlink_to(here / "elsewhere")


def link_to_the_events(here: Path) -> None:
    path = here / "run" / "events.jsonl"
    path.rename(here / "elsewhere.jsonl")
    path.symlink_to(here / "elsewhere.jsonl")


def folder_in_the_trails_place(here: Path) -> None:
    trail_of(here / "run").unlink()
    trail_of(here / "run").mkdir()


def pipe_in_the_trails_place(here: Path) -> None:
    trail_of(here / "run").unlink()
    os.mkfifo(trail_of(here / "run"))


CUT = r"trail\.jsonl has no end .*lines are missing.*medfed resume"
FOREIGN = r"trail\.jsonl, line 2: it is the trail of (run|study) .*plan\.json that of"
CHANGED = r"%s has sha256 .*the trail ends with .*changed after the run.*Restore"
ROLE = r"trail\.jsonl, line 1: '\w+' is \w+; only a coordinator writes"
NAME = r"trail\.jsonl, line \d: '\w+' wrote it; expected 'coordinator'"
STRANGE = r"trail\.jsonl, line 1: .* signed with keys that .* never approved"
UNSIGNED = r"trail\.jsonl, line 2: .*took part and did not sign the study"
UNREADABLE = r"%s is not what a run writes \(%s\): it was changed.*restore"
LINE = r"trail\.jsonl, line 5: no entry"
NO_FILE = r"%s is %s; expected a file of this folder itself\. Restore"

ATTACKS: dict[Callable[[Path], None], str] = {
    cut: CUT,
    cut_without_summary: CUT,
    cut_deep_without_summary: CUT,
    cut_with_another_head: CUT,
    cut_with_no_head: CUT,
    trail_of_another_run: FOREIGN,
    trail_head_and_model_of_another_run: FOREIGN,
    trail_head_and_model_of_another_study: FOREIGN,
    study_of_another_run: FOREIGN,
    altered_event: CHANGED % r"events\.jsonl",
    appended_event: CHANGED % r"events\.jsonl",
    cut_events: CHANGED % r"events\.jsonl",
    altered_summary: CHANGED % r"summary\.json",
    altered_claim: CHANGED % r"privacy\.json",
    removed_summary: r"summary\.json cannot be read.*restore it",
    removed_claim: r"privacy\.json cannot be read.*restore it",
    invented_audit: r"privacy\.json: nobody signed its audit.*Repeat it",
    altered_plan: CHANGED % r"plan\.json",
    altered_encoding: CHANGED % r"plan\.json",
    altered_study: CHANGED % r"study\.toml",
    altered_study_and_its_digest: FOREIGN,
    older_model: CHANGED % r"model\.safetensors",
    altered_page: r"privacy_audit\.html is not what follows from the run's files",
    by_an_aggregator: ROLE,
    by_an_aggregator_that_calls_itself_coordinator: NAME,
    by_an_aggregator_under_the_coordinators_name: STRANGE,
    by_a_site: ROLE,
    by_nobody_known: STRANGE,
    half_by_a_second_coordinator: NAME,
    by_a_second_coordinator: NAME,
    by_a_revoked_site: ROLE,
    by_a_revoked_site_that_calls_itself_coordinator: NAME,
    revoked_coordinator: r"line 1: the key of 'coordinator' is revoked by now.*--head",
    approved_in_another_role: r"line 1: 'coordinator' signs as coordinator; .* had it as aggregator",
    signed_by_a_site_revoked_before: r"line 1: when this began, 'north' is revoked",
    without_a_participants_signature: UNSIGNED,
    without_any_signature: UNSIGNED,
    signed_for_another_run: r"line 2: the signature of 'north' under the study does not hold: .*run=",
    signed_with_made_up_keys: STRANGE,
    no_study_at_all: r"line 1: 'opened sum' follows the opening",
    no_end: CUT,
    opened_after_the_end: CUT,
    doubled_key_in_the_last_line: LINE,
    doubled_key_in_the_claim: UNREADABLE % (r"privacy\.json", "epsilon stands twice"),
    doubled_key_in_the_summary: UNREADABLE % (r"summary\.json", "rounds stands twice"),
    no_number_in_the_claim: UNREADABLE % (r"privacy\.json", "NaN is no number"),
    no_number_in_the_trail: LINE,
    link_to_the_trail: NO_FILE % (r"trail\.jsonl", "a link"),
    link_to_the_folder: r"trail is a link; expected a folder",
    link_to_the_events: NO_FILE % (r"events\.jsonl", "a link"),
    folder_in_the_trails_place: NO_FILE % (r"trail\.jsonl", "a folder"),
    pipe_in_the_trails_place: NO_FILE % (r"trail\.jsonl", "no file"),
}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_an_attack_is_found(
    attack: Callable[[Path], None], here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """On the code before, `medfed trail verify --federation` said "lines hold" to 41 of these 52 attacks.

    It found a cut alone, a trail or a model beside another's, keys that were never approved, a signature for another
    run, an opening without more after the end, a NaN within a line, and a folder; before the pipe it waited forever.
    """
    attack(here)
    code, told = said()
    assert code == 2, told
    assert re.search(ATTACKS[attack], told, re.S), told


def test_a_claim_that_a_run_never_made_is_found(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """Before, any privacy.json that somebody put there was shown on pages, and verified."""
    study = medfed.load_study(write_study(here, STUDY.replace("rounds = 4", "rounds = 1")))
    medfed.run(study.set("security.aggregation", "masked"), here / "open")
    assert said("open", listed=False)[0] == 0
    shutil.copy(here / "run" / "privacy.json", here / "open" / "privacy.json")
    code, told = said("open", listed=False)
    assert code == 2 and re.search(r"privacy\.json: the run made no claim; remove it", told)


@pytest.mark.parametrize(
    ("round", "found"),
    [
        (1, r"the model of round 2 does not follow the one before"),
        (2, r"round 2 was neither opened nor given up"),
    ],
)
def test_a_round_that_the_log_tells_of_and_no_line_opens_is_found(
    round: int, found: str, here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """Its coordinator leaves out whose rows were in the sum, and from which model: of the last
    round no other line tells.
    """

    def leave_out(kind: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        return None if (kind, facts.get("round")) == ("opened sum", round) else facts

    rewrite(here / "run", key_of(here, "coordinator"), leave_out)
    code, told = said()
    assert code == 2 and re.search(found, told), told


def test_a_trail_is_not_written_through_a_link(here: Path) -> None:
    """Before, a resumed run appended its lines to whatever file a link led to."""
    link_to_the_trail(here)
    before = (here / "elsewhere.jsonl").read_bytes()
    me = key_of(here, "coordinator")
    with pytest.raises(TrailError, match="is a link"):
        Trail.open(trail_of(here / "run"), me.name, me.public.signing, me.sign)
    assert (here / "elsewhere.jsonl").read_bytes() == before


# who vouches --------------------------------------------------------------------------------------


def test_a_head_told_before_vouches_for_a_coordinator_that_is_revoked_since(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """Before, a revoked coordinator's trail held, whenever it was written."""
    head = verify_run(here / "run").trail.head
    revoked_coordinator(here)
    code, told = said("run", "--head", head)
    assert code == 0 and "revoked by now" in told
    early = sha256(lines_of(here / "run")[1]).hexdigest()
    code, told = said("run", "--head", early)  # what follows that line could be new
    assert code == 2 and "revoked by now" in told
    code, told = said("run", "--head", "0" * 64)
    assert code == 2 and "no line has hash" in told


def test_a_site_revoked_after_the_run_is_told_and_a_replaced_key_still_holds(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    consortium.revoke(here / "members", BOSS, SITES[1], "left")
    fresh = Identity.new("coordinator", "coordinator")
    old = key_of(here, "coordinator")
    consortium.approve(here / "members", BOSS, consortium.request(fresh, old))
    code, told = said()
    assert code == 0 and f"Revoked since, on the list when the run began: {SITES[1]}" in told


def test_without_a_list_nobody_can_tell_whose_key_it_is_and_a_fingerprint_checks_it(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """Before, a trail under a new key held, and nothing said that anybody could have written it."""
    code, told = said("made", listed=False)
    assert code == 0 and "Whose key signed this nobody can tell" in told
    (fingerprint,) = verify_run(here / "made").fingerprints
    code, told = said("made", "--coordinator", fingerprint, listed=False)
    assert code == 0 and "nobody can tell" not in told
    rewrite(here / "made", EVE)
    code, told = said("made", listed=False)
    assert code == 0 and "nobody can tell" in told and EVE.public.fingerprint in told
    code, told = said("made", "--coordinator", fingerprint, listed=False)
    assert code == 2 and f"expected {fingerprint}" in told
    code, told = said("made")  # the reader has a list, which this run is not under
    assert code == 2 and "never approved" in told


def test_who_opens_a_trail_again_is_found_by_the_fingerprint_alone_where_there_is_no_list(
    here: Path,
) -> None:
    """Without a list anybody can go on with a trail, with a copy of the sites' signatures: what that binds holds."""
    (fingerprint,) = verify_run(here / "made").fingerprints
    folder = here / "made"
    entries = [json.loads(line) for line in lines_of(folder)]
    trail = Trail.open(trail_of(folder), EVE.name, EVE.public.signing, EVE.sign)
    trail.append("study", entries[1]["facts"] | {"coordinator": consortium.to_json(EVE.public)})
    trail.append("finished", entries[-1]["facts"])
    told = {"entries": trail.number, "head": trail.head}
    edit(folder / "summary.json", lambda summary: summary | {"trail": told})
    found = verify_run(folder)
    assert len(found.fingerprints) == 2 and "nobody can tell" in found.told[0]
    with pytest.raises(TrailError, match=f"line 6: the key has .* expected {fingerprint}"):
        verify_run(folder, coordinator=[fingerprint])


def test_a_trail_of_an_earlier_medfed_is_told_from_a_whole_one(here: Path) -> None:
    rewrite(
        here / "run",
        key_of(here, "coordinator"),
        lambda kind, facts: {k: v for k, v in facts.items() if k not in ("files", "coordinator")},
    )
    with pytest.raises(TrailError, match="check it with the medfed that wrote it"):
        runs.verify_trail(here / "run")


# runs that did not end as asked -------------------------------------------------------------------

KILLED = """
import os, signal, sys
import medfed
from medfed.monitor.events import RoundFinished

def kill(event):
    if isinstance(event, RoundFinished) and event.round == 2:
        os.kill(os.getpid(), signal.SIGKILL)

study = medfed.load_study(sys.argv[1]).set("security.aggregation", "masked")
study = study.set("security.federation", sys.argv[2] + "/members").set("security.keys", sys.argv[2] + "/keys")
medfed.run(study, sys.argv[3], listeners=[kill])
"""


def test_a_killed_run_has_no_end_until_it_is_resumed(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """Before, what a killed run left held: as much as any cut that somebody made."""
    text = PRIVATE.replace("rounds = 4", "rounds = 3").replace("every = 4", "every = 0")
    study = write_study(here, text.replace("[privacy]", "[privacy]\nspare_rounds = 1"))
    code = [sys.executable, "-c", KILLED, str(study), str(here), str(here / "killed")]
    ended = subprocess.run(code, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(NoEndError, match=r"was cut off.*medfed resume"):
        runs.verify_trail(here / "killed", here / "members")
    assert medfed.resume(here / "killed").complete
    code, told = said("killed")
    assert code == 0, told
    kinds = [entry["kind"] for entry in verify_run(here / "killed").trail.entries]
    assert kinds.count("opened") == 2 and kinds.count("finished") == 1


def test_a_run_that_ends_early_has_an_end_that_says_so(
    here: Path, said: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = medfed.load_study(here / "run" / "study.toml").set("training.rounds", 3)
    study = study.set("security.federation", str(here / "members"))
    study = study.set("security.keys", str(here / "keys"))
    study = study.set("privacy.spare_rounds", 1).set("monitor.evaluate_every", 0)
    played = drive.Drive.play_round

    def lose(self: drive.Drive) -> None:
        if self.server.round == 1:
            raise QuorumError("round 2: all sites are gone", {})
        played(self)

    with monkeypatch.context() as patch:
        patch.setattr(drive.Drive, "play_round", lose)
        assert not medfed.run(dataclasses.replace(study, folder=here), here / "early").complete
    code, told = said("early")
    assert code == 0 and "The run is incomplete" in told
    assert medfed.resume(here / "early").complete
    code, told = said("early")
    assert code == 0 and "incomplete" not in told
    kinds = [entry["kind"] for entry in verify_run(here / "early").trail.entries]
    assert kinds.count("finished") == 2
    lines = lines_of(here / "early")
    put(here / "early", lines[: kinds.index("finished") + 1])  # back to the first end
    code, told = said("early")
    assert code == 2 and "changed after the run" in told


# pages and audits ---------------------------------------------------------------------------------


def test_pages_and_tables_that_are_made_later_hold(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    assert command("report", here / "run", "--export", "csv,json,parquet") == 0
    assert (
        command(
            "privacy", "claim", here / "run", "--report", here / "run" / "reports" / "privacy.html"
        )
        == 0
    )
    code, told = said()
    assert code == 0, told
    for name in ("export/tests.csv", "privacy.html"):
        page = here / "run" / "reports" / name
        text = page.read_text()
        page.write_text(text.replace("0.", "0.9", 1))
        code, told = said()
        assert code == 2 and name in told
        page.write_text(text)


def audited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Audit a run by an audit that takes no time."""
    parts = [{"name": "noise", "told": "as claimed", "passed": True}]
    found = {"schema": 1, "passed": True, "parts": parts}
    monkeypatch.setattr(audits, "audit_study", lambda *_, **__: found)
    return audits.audit_run(folder)


@pytest.mark.parametrize("name", ["run", "made"])
def test_an_audit_is_signed_into_the_trail_and_its_figures_cannot_be_changed(
    here: Path, said: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before, whoever had the folder could write "passed" into claim and audit.json."""
    folder = here / name
    audited(folder, monkeypatch)
    listed = name == "run"
    code, told = said(name, listed=listed)
    assert code == 0, told

    whole = {path: path.read_text() for path in (folder / "privacy.json", folder / "audit.json")}
    failed = {"schema": 1, "passed": False, "parts": []}
    for change in (
        lambda: edit(folder / "privacy.json", lambda claim: claim | {"audit": failed}),
        lambda: edit(folder / "privacy.json", lambda claim: claim | {"audit": None}),
        lambda: edit(folder / "audit.json", lambda audit: audit | {"passed": False}),
        lambda: (folder / "audit.json").unlink(),
    ):
        change()
        code, told = said(name, listed=listed)
        assert code == 2 and re.search("audit", told), told
        for path, text in whole.items():
            path.write_text(text)
    assert said(name, listed=listed)[0] == 0


def test_who_has_not_the_coordinators_keys_signs_no_audit(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = world / "keys" / "coordinator.key"  # where the run's study has it
    before = lines_of(here / "run")
    key.rename(world / "moved.key")
    try:
        with pytest.raises(KeyFileError, match="medfed key new"):
            audited(here / "run", monkeypatch)
    finally:
        (world / "moved.key").rename(key)
    assert lines_of(here / "run") == before and not (here / "run" / "audit.json").exists()


# the list of members ------------------------------------------------------------------------------


@pytest.fixture
def study(here: Path) -> Study:
    """A run's study of this machine's own list and keys, its rows shared among three."""
    study = medfed.load_study(write_study(here, STUDY.replace("rounds = 4", "rounds = 1")))
    for name in study.security.aggregators:
        enrol(here / "members", name, "aggregator", here / "keys")
    study = study.set("security.aggregation", "three-party")
    study = study.set("security.federation", str(here / "members"))
    return study.set("security.keys", str(here / "keys"))


def roll_back(place: Path, name: str = "agg") -> None:
    """Revoke a member, let everybody see it, and put the older list back."""
    before = (place / "members" / "members.jsonl").read_bytes()
    consortium.revoke(place / "members", BOSS, name, "stolen")
    after = consortium.read(place / "members")
    assert name not in list(after.roster)
    for own in place.glob("keys/*.lists"):
        after.keep_up(own)
    (place / "members" / "members.jsonl").write_bytes(before)
    assert name in list(consortium.read(place / "members").roster)  # it holds in itself


def name_of(own: Path) -> str:
    """Return whose file it is."""
    return own.name.removesuffix(".key.lists")


def test_a_rolled_back_list_is_refused_at_every_party_by_what_it_has_seen(
    study: Study, here: Path, tmp_path: Path
) -> None:
    """Before, an older members.jsonl put back was taken by every party, and a revoked member was back on it."""
    assert medfed.run(study, tmp_path / "run").complete
    parties = {"coordinator", *SITES, *study.security.aggregators}
    assert {name_of(own) for own in (here / "keys").glob("*.lists")} == parties
    roll_back(here)

    for number, party in enumerate(sorted(parties)):  # each by itself: the others have seen nothing
        kept = {own: own.read_bytes() for own in (here / "keys").glob("*.lists")}
        for own in kept:
            if name_of(own) != party:
                own.unlink()
        with pytest.raises(MedfedError, match="rolled back or forked"):
            medfed.run(study, tmp_path / f"refused {number}")
        for own, content in kept.items():
            own.write_bytes(content)

    for own in (here / "keys").glob("*.lists"):  # what a new machine has seen
        own.unlink()
    assert medfed.run(study, tmp_path / "unseen").complete


def test_a_rolled_back_list_is_refused_by_its_readers_and_its_consortium(
    here: Path, said: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before, `trail verify` took a list from before a revocation, and `federation approve` added to one."""
    key_files.save(BOSS, here / "keys" / "boss.key")
    members = here / "members"
    assert command("federation", "show", members) == 0
    assert said()[0] == 0
    old = (members / "members.jsonl").read_bytes()
    words = ("--key", here / "keys" / "boss.key")
    assert (
        command("federation", "revoke", members, "coordinator", "--reason", "stolen", *words) == 0
    )
    code, told = said()
    assert code == 2 and "revoked by now" in told
    assert command("federation", "show", members) == 0
    (members / "members.jsonl").write_bytes(old)

    code, told = said()  # the list of today is not believed to be the newest
    assert code == 2 and "rolled back or forked" in told and "Restore the newest list" in told
    for acts in (
        ("show", members),
        ("revoke", members, "agg", "--reason", "left", *words),
        ("new", here / "again", *words),
    ):
        capsys.readouterr()
        assert command("federation", *acts) == 2
        assert re.search("rolled back or forked|would take a second one", capsys.readouterr().err)


def test_a_list_that_is_older_than_the_run_is_refused_by_who_has_seen_none(
    here: Path, said: Callable[..., tuple[int, str]]
) -> None:
    """The trail says how far the list went when the run began."""
    path = here / "members" / "members.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]))  # without the aggregator, who is not needed
    code, told = said()
    assert code == 2 and re.search(r"lacks line \d+ .* under which the run began", told)


def test_a_fork_under_the_consortiums_own_key_is_refused(here: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.lists"
    old = (here / "members" / "members.jsonl").read_bytes()
    consortium.revoke(here / "members", BOSS, "agg", "stolen")
    consortium.read(here / "members", own=own)
    (here / "members" / "members.jsonl").write_bytes(old)
    for name in ("new 1", "new 2"):
        consortium.approve(here / "members", BOSS, consortium.request(Identity.new(name, "site")))
    with pytest.raises(TrailError, match="another list was written under the same key"):
        consortium.read(here / "members", own=own)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"format": "medfed lists seen 2", "lists": {}}',
        b'{"format": "medfed lists seen 1", "lists": {"f": {"lines": 0, "head": ""}}}',
        b'{"format": "medfed lists seen 1", "lists": {"f": {"lines": true, "head": "'
        + b"0" * 64
        + b'"}}}',
        b'{"format": "medfed lists seen 1", "lists": {"f": 3}}',
        "folder",
        "link",
    ],
)
def test_what_was_seen_is_never_silently_none(
    here: Path, tmp_path: Path, content: bytes | str
) -> None:
    own = tmp_path / "own.lists"
    if content == "folder":
        own.mkdir()
    elif content == "link":
        own.symlink_to(tmp_path / "nowhere")
    else:
        assert isinstance(content, bytes)
        own.write_bytes(content)
    with pytest.raises(
        TrailError, match=r"own\.lists is .*(Restore it from a copy|remove the file)"
    ):
        consortium.read(here / "members", own=own)


def test_two_processes_at_once_lose_nothing_that_was_seen(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from medfed.compliance import seen
for n in range(1, 21):
    hashes = [f"{i:064x}" for i in range(n)]
    seen.keep_up(Path(sys.argv[1]), sys.argv[2], hashes, Path("members.jsonl"))
"""
    own = tmp_path / "own.lists"
    names = ["north", "south", "south", "east"]  # two of them on one list
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(own), name], stderr=subprocess.PIPE)
        for name in names
    ]
    errors = [one.communicate()[1].decode() for one in started]
    expected = seen.Head(20, f"{19:064x}")
    assert seen.read(own) == dict.fromkeys(names, expected), errors
    behind = [error for error in errors if error]  # of the two, one may be told that it is behind
    assert all("rolled back or forked" in error for error in behind) and len(behind) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.lists"]
