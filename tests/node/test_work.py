"""What a site's node answers to a coordinator that asks for work, and tells of its ledger."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import SiteError
from medfed.learn import zoo
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
from medfed.rounds.prepare import prepare
from medfed.study import Study
from tests.tables import PRIVATE, STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(study: Study) -> Site:
    sites = runs.open_sites(study, None)
    prepare(sites[0].study, InProcess(sites), [node.name for node in sites])
    return sites[0]


def study_of(folder: Path, text: str = STUDY) -> Study:
    return medfed.load_study(write_study(folder, text))


def work(node: Site, weight: float = 0.0, **header: Any) -> torch.Tensor:
    w_P = torch.full((zoo.count(node.model),), weight)
    payload = codec.encode({"round": 1, **header}, {"w": w_P})
    return codec.decode(node.handle("work", payload))[1]["row"]


@pytest.mark.parametrize("rate", [None, 0.0, -0.1, 1, True, "0.1"])
def test_a_rate_that_is_left_open_must_be_a_number_above_zero(rate: object, tmp_path: Path) -> None:
    node = prepared(study_of(tmp_path).set("training.learning_rate", 0.0))
    assert work(node, rate=0.1).any()
    with pytest.raises(SiteError, match=r"learning_rate is open and the coordinator sends none"):
        work(node, **({} if rate is None else {"rate": rate}))


def test_training_that_does_not_stay_finite_sends_no_row(tmp_path: Path) -> None:
    node = prepared(study_of(tmp_path))
    assert work(node).any()
    with pytest.raises(SiteError, match="training did not stay finite"):
        work(node, weight=math.nan)


@pytest.mark.parametrize("claim", [True, False])
def test_a_ledger_is_told_of_only_where_its_patients_pay(claim: bool, tmp_path: Path) -> None:
    study = study_of(tmp_path, PRIVATE)
    node = prepared(study if claim else study.set("privacy.simulation_only", True))
    assert node.account is not None
    asked = codec.encode({"holds": None, "whole": True})
    told = codec.decode(node.handle("statement", asked))[0]["statement"]
    assert (told is not None) == claim
    node.guarantee = None  # it is not yet prepared
    assert codec.decode(node.handle("statement", asked))[0]["statement"] is None
    node.account = None
    assert codec.decode(node.handle("statement", asked))[0]["statement"] is None
