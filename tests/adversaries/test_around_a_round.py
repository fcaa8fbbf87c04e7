"""What a coordinator says around a round: who takes part, how records become numbers, which round it
is. Each of these read a site's row, or spent more than was charged.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import medfed
from medfed.core import codec
from medfed.core.checks import EnvelopeError, PlanError, RecordError, SiteError
from medfed.core.flat import fingerprint
from medfed.engine.port import gather
from medfed.learn.zoo import select_fixed
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
from medfed.planning.building import build_model
from medfed.planning.joining import Joining
from medfed.planning.plan import Plan
from medfed.planning.resolved import resolve
from medfed.planning.terms import masking_terms, terms_of
from medfed.rounds import aggregation
from medfed.rounds.prepare import enrol, prepare, send_encoding
from medfed.rounds.way import Way
from medfed.runs.opening import open_sites
from medfed.secure.identity import Identity, Roster, Scope
from medfed.secure.record import Record
from medfed.study import Study
from tests.adversaries.world import PRIVATE, STUDY, names_of
from tests.tables import invented, write_study

SITES = names_of(6)


def study_of(folder: Path, way: str, claim: bool = False) -> Study:
    frame = invented(180)
    frame["hospital"] = np.array(SITES)[np.arange(180) % len(SITES)]
    text = STUDY
    if claim:
        sizes = "".join(f"{name} = 24\n" for name in SITES)
        text = f"{PRIVATE.split('[privacy.sizes]')[0]}[privacy.sizes]\n{sizes}[monitor]\nbaselines = false\n"
    folder.mkdir(exist_ok=True)
    study = medfed.load_study(write_study(folder, text, frame))
    return study.set("security.aggregation", way).set("training.rounds", 3)


def opened(study: Study) -> tuple[list[Site], InProcess, Plan]:
    sites = open_sites(study, None)
    fleet = InProcess(sites)
    return sites, fleet, prepare(sites[0].study, fleet, list(SITES))


WAYS = pytest.mark.parametrize("way", ["masked", "three-party"])


@WAYS
def test_a_second_prepare_ends_what_was_agreed(way: str, tmp_path: Path) -> None:
    """It set noise, draws and divisor anew, while the ledger charged what was planned before."""
    sites, fleet, plan = opened(study_of(tmp_path, way, claim=True))
    enrol(plan, fleet, "run")
    aggregation.introduce(plan, fleet, "run")
    few = prepare(sites[0].study, fleet, list(SITES[:3]))
    send_encoding(few, fleet, SITES[:3])
    with pytest.raises(SiteError, match="agreed to no run"):
        sites[0].handle("work", codec.encode({"round": 1}, {"signed": codec.as_tensor(b"x")}))
    with pytest.raises(PlanError, match=r"privacy\.sizes declares"):
        aggregation.introduce(few, fleet, "another run")


@WAYS
def test_all_declared_sites_take_part(way: str, tmp_path: Path) -> None:
    """A site alone among the coordinator's own people added noise for as many, and was read."""
    _, _, plan = opened(study_of(tmp_path, way, claim=True))
    sizes = {name: plan.sizes[name] for name in SITES[:3]}
    few = resolve(plan.study, sizes, SITES[:3], plan.parameters, plan.encoded)
    boss = Identity.new("coordinator", "coordinator")
    roles = dict.fromkeys(SITES, "site") | dict.fromkeys(
        plan.study.security.aggregators, "aggregator"
    )
    others = [Identity.new(name, role).public for name, role in roles.items()]
    joining = Joining("run", "coordinator", Roster.of(boss.public, *others))
    with pytest.raises(PlanError, match=r"privacy\.sizes declares: s3, s4, s5"):
        joining.refuse_others(few)
    joining.refuse_others(plan)


@WAYS
def test_rows_of_two_encodings_are_not_added(way: str, tmp_path: Path) -> None:
    """The others were told of a scale that makes their records 0: the sum was one site's row."""
    _, fleet, plan = opened(study_of(tmp_path, way))
    flat = json.loads(json.dumps(plan.encoding.to_json()))
    for column in flat["columns"]:
        if column["scale"]:
            column["scale"] = 1e30
    sizes = {name: {"train": plan.sizes[name]["train"]} for name in SITES}
    asked: dict[str, object] = {"encoding": flat, "sizes": sizes, "clients": list(SITES)}
    asked["fixed"] = fingerprint(select_fixed(build_model(plan.study, plan.encoding)))
    replies = gather(fleet, SITES[1:], "prepare", codec.encode(asked), 60)
    assert not any(reply.error for reply in replies.values())
    with pytest.raises(PlanError, match="another encoding for agreed"):
        aggregation.introduce(plan, fleet, "run")


def joined(way: str, folder: Path) -> tuple[list[Site], InProcess, Plan, Way]:
    sites, fleet, plan = opened(study_of(folder, way))
    return sites, fleet, plan, aggregation.introduce(plan, fleet, "run")


@WAYS
@pytest.mark.parametrize("round", [0, 4, 28, -1])
def test_a_round_is_one_of_the_study_and_a_whole_number(
    way: str, round: int, tmp_path: Path
) -> None:
    """A round of which the public draw is a site and its false friends was played first; and round
    1.5 was confirmed twice.
    """
    _, _, plan, _ = joined(way, tmp_path)
    ask = masking_terms(plan, "run") if way == "masked" else None
    with pytest.raises(PlanError, match=r"rounds 1 to 3"):
        if ask:
            ask(SITES, round)
        else:
            drawn = terms_of(plan).drawn
            assert drawn is not None
            drawn(round)
    for odd in (1.5, True, "1", None):
        with pytest.raises(PlanError, match=r"rounds 1 to 3"):
            plan.expect(odd)
        with pytest.raises(EnvelopeError, match="whole number"):
            Scope("study", "run", odd)  # type: ignore[arg-type]


def test_a_record_with_a_round_that_is_none_is_refused(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.record")
    record.commit("list", Scope("study", "run", 1), bytes(32))
    text = (tmp_path / "a.record").read_text()
    (tmp_path / "a.record").write_text(text.replace("1,", "1.5,", 1))
    with pytest.raises(RecordError, match=r"round=1\.5"):
        Record(tmp_path / "a.record").last("list", "study", "run")
    assert (tmp_path / "a.record").stat().st_mode & 0o777 == 0o600


@WAYS
def test_a_second_run_without_noise_on_other_facts_is_not_joined(way: str, tmp_path: Path) -> None:
    """Two runs that differ by a site differ by its row."""
    sites, fleet, plan, _ = joined(way, tmp_path)
    fewer = prepare(sites[0].study, fleet, list(SITES[:5]))
    with pytest.raises(PlanError, match="facts was done for something else"):
        aggregation.introduce(fewer, fleet, "another run")
    again = prepare(sites[0].study, fleet, list(SITES))
    assert again.digest == plan.digest and aggregation.introduce(again, fleet, "a third run")


def test_a_site_is_asked_in_rounds_that_draw_it(tmp_path: Path) -> None:
    """The coordinator asked a site and its own people, whatever the study draws."""
    study = study_of(tmp_path, "three-party").set("fleet.clients_per_round", 3)
    sites, fleet, plan = opened(study)
    aggregation.introduce(plan, fleet, "run")
    out = next(name for name in SITES if name not in plan.draw(1))
    site = next(site for site in sites if site.name == out)
    with pytest.raises(SiteError, match="does not draw it"):
        site.handle("work", codec.encode({"round": 1}, {"signed": codec.as_tensor(b"x")}))
    drawn = terms_of(plan).drawn
    assert drawn is not None and list(drawn(1)) == plan.draw(1)
    assert plan.draw(1, [plan.draw(1)[0]]) == plan.draw(1)[1:]  # who is out changes no draw
