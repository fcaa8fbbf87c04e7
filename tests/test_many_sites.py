"""Thousands of sites of one process: each says, bit for bit, what its node alone would say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import DataError, SiteError
from medfed.core.streams import Streams
from medfed.data import answers
from medfed.data.encoding import Encoding
from medfed.data.frames import Frames
from medfed.data.tables import clean_all
from medfed.node import setup
from medfed.node.inprocess import InProcess
from medfed.node.site import Site, handle_many
from medfed.rounds.prepare import prepare
from medfed.study import Data, Study
from tests.tables import PRIVATE, STUDY, invented, plain, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

SITES = 60
KINDS = ("robust", "standard", "dictionary", "private", "devices")


def _study(folder: Path, kind: str) -> Study:
    """Return a study of sixty sites of one to eight records, some of which lack a column wholly."""
    random = np.random.default_rng(1)
    frame = invented(SITES * 4)
    names = [f"clinic {k:02d}" for k in range(SITES)]
    frame["hospital"] = np.concatenate([names, random.choice(names, len(frame) - SITES)])
    frame.loc[frame["hospital"].isin(names[:5]), "lactate"] = np.nan
    frame.loc[random.random(len(frame)) < 0.1, "ward"] = np.nan
    frame["set"] = np.where(frame.groupby("hospital").cumcount() % 3 == 1, "test", "train")
    study = medfed.load_study(
        write_study(folder, STUDY if kind in ("robust", "standard") else PRIVATE, frame)
    )
    if kind in ("robust", "standard"):
        study = study.set("data.preprocess", kind)
    if kind == "dictionary":
        study = plain(study).set("data.preprocess", "dictionary")

    if kind == "devices":
        study = study._with({"sites.kind": "device", "privacy.sizes": {}})
    elif kind == "private":
        study = study.set("privacy.sizes", dict.fromkeys(names, 4))

    return study.set("data.test", "set")


@pytest.fixture(params=KINDS)
def sites(request: pytest.FixtureRequest, tmp_path: Path) -> list[Site]:
    return runs.open_sites(_study(tmp_path, request.param), None)


def _asked(sites: list[Site], op: str, payload: bytes) -> None:
    """Hold every answer of the stack against that of the site alone."""
    together = handle_many(sites, op, payload)
    for one, answer in zip(sites, together, strict=True):
        alone = handle_many([one], op, payload)[0]
        assert (str(answer) if isinstance(answer, SiteError) else answer) == (
            str(alone) if isinstance(alone, SiteError) else alone
        )


def test_surveys_answers_encodings_and_scores_are_those_of_each_site_alone(
    sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], str, bytes]] = []
    real = InProcess.submit_many

    def submit_many(
        self: InProcess, names: Any, op: str, payload: bytes, deadline: float
    ) -> list[int]:
        asked.append((list(names), op, payload))
        return real(self, names, op, payload, deadline)

    monkeypatch.setattr(InProcess, "submit_many", submit_many)
    fleet = InProcess(sites)
    plan = prepare(sites[0].study, fleet, fleet.sites())
    together = {one.name: (one.train, one.test) for one in sites}
    for _, op, payload in asked:
        _asked(sites, op, payload)
    for one in sites:
        # prepared alone, last
        for rows, alone in zip(together[one.name], (one.train, one.test), strict=True):
            assert torch.equal(rows.x, alone.x) and torch.equal(rows.y, alone.y)
            assert torch.equal(rows.patient, alone.patient)
    tested = [one for one in sites if one.name in plan.testers]
    _asked(tested, "evaluate", codec.encode({}, {"w": torch.randn(plan.parameters) * 2}))
    _asked(tested, "evaluate", codec.encode({}, {"w": torch.full((plan.parameters,), 1e38)}))


@pytest.mark.parametrize("question", ["known", "below", "sum", "squares", "held"])
def test_a_question_to_many_is_answered_as_by_each(tmp_path: Path, question: str) -> None:
    sites = runs.open_sites(_study(tmp_path, "robust"), None)
    tables = [one.table for one in sites if one.table]
    names = ["lactate", "age", "absent"]
    logs = {"lactate": 0.5}
    word = torch.from_numpy(
        answers.to_word(np.random.default_rng(0).normal(50, 30, (3, 6, 16))).view(np.int64)
    )
    ask = {"threshold": word, "centre": torch.tensor([1.0, 50.0, 0.0], dtype=torch.float64)}
    ask["span"] = torch.tensor([0.1, 20.0, 1.0], dtype=torch.float64)
    each = torch.stack([answers.answer(table, question, names, logs, ask) for table in tables])
    assert torch.equal(answers.answer_each(tables, question, names, logs, ask), each)


def test_large_tables_are_encoded_one_by_one_as_small_ones_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = runs.open_sites(_study(tmp_path, "robust"), None)
    encoding = prepare(sites[0].study, InProcess(sites), [one.name for one in sites]).encoding
    tables = [one.table for one in sites if one.table]
    together = setup._encode(tables, encoding)
    monkeypatch.setattr(setup, "_SMALL", 0)
    for rows, alone in zip(together, setup._encode(tables, encoding), strict=True):
        assert torch.equal(rows.x, alone.x) and torch.equal(rows.y, alone.y)
        assert torch.equal(rows.patient, alone.patient)


def test_a_site_of_many_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    study = _study(tmp_path, "robust")
    frame = pd.read_csv(tmp_path / "cohort.csv").astype({"age": object})
    row = int(np.flatnonzero(frame["hospital"] == "clinic 41")[0])
    frame.loc[row, "age"] = "old"
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    frames = frame[frame["hospital"] == "clinic 41"]
    if len(frames) > 1:
        with pytest.raises(
            DataError,
            match=f"site 'clinic 41', column 'age': text in a numeric column, row {row + 2}",
        ):
            runs.open_sites(study, None)


def test_messages_made_and_read_at_once_are_those_of_one_after_the_other() -> None:
    rows = torch.randn(7, 3, 2, dtype=torch.float64)
    payloads = codec.encode_each({"a": 1}, "answer", rows)
    assert payloads == [codec.encode({"a": 1}, {"answer": row}) for row in rows]
    alike = codec.decode_alike(payloads)
    assert alike and alike[0]["a"] == 1 and torch.equal(alike[1]["answer"], rows)
    assert codec.encode_each({}, "answer", rows[:0]) == [] and codec.decode_alike([]) is None

    two = [
        codec.encode({}, {"n": torch.tensor(k), "x": torch.arange(k, k + 4.0)}) for k in range(5)
    ]
    alike = codec.decode_alike(two)
    assert (
        alike
        and alike[1]["n"].tolist() == list(range(5))
        and alike[1]["x"][3].tolist() == [3.0, 4.0, 5.0, 6.0]
    )


@pytest.mark.parametrize(
    "other",
    [codec.encode({"a": 2}, {"answer": torch.zeros(3)}), codec.encode({"a": 1}, {"answer": torch.zeros(4)}),
     codec.encode({"a": 1}, {"reply": torch.zeros(3)}), codec.encode({"a": 1}, {"answer": torch.zeros(3).int()}), b""],
)  # fmt: skip
def test_messages_that_differ_in_more_than_numbers_are_not_read_at_once(other: bytes) -> None:
    one = codec.encode({"a": 1}, {"answer": torch.zeros(3)})
    assert codec.decode_alike([one, one]) and codec.decode_alike([one, other]) is None


def test_an_encoding_of_several_sites_needs_each_row_owned(tmp_path: Path) -> None:
    sites = runs.open_sites(_study(tmp_path, "standard"), None)
    encoding: Encoding = prepare(
        sites[0].study, InProcess(sites), [one.name for one in sites]
    ).encoding
    table = sites[0].table
    assert table is not None
    every = np.ones(len(table), dtype=bool)
    alone = encoding.encode(table, every, ~table.test)
    owned = encoding.encode(table, every, ~table.test, np.zeros(len(table), dtype=np.int64))
    assert torch.equal(alone.x, owned.x)
    assert replace(encoding, public=True).encode(table, every, ~table.test).x.shape == alone.x.shape


def test_what_many_sites_lack_alike_is_told_once_with_their_number(tmp_path: Path) -> None:
    study = _study(tmp_path, "robust")
    told: list[str] = []
    medfed.simulate(
        study.set("training.rounds", 1),
        listeners=[lambda event: told.append(getattr(event, "text", ""))],
    )
    warned = [text for text in told if text]
    assert sum("trains on one class only" in text for text in warned) <= 10
    assert any(
        text.startswith("each of ") and " sites, clinic " in text and "more " in text
        for text in warned
    )
    assert sum("has no value at all of lactate" in text for text in warned) <= 6


@pytest.mark.parametrize("question", ["below", "known"])
def test_few_large_sites_answer_from_values_in_order_as_the_plain_twin(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    frames = {
        name: pd.DataFrame(
            {"a": rng.normal(size=n), "b": rng.gamma(1, size=n), "y": rng.choice(["0", "1"], n)}
        )
        for name, n in (("x", 300), ("z", 211))
    }
    tables = clean_all(Frames.of(frames), Data(target="y"), Streams(0))
    names = ["a", "b"]
    logs = {"b": 0.01}
    word = answers.to_word(rng.normal(0, 2, (2, 3, 16))).view(np.int64)
    ask = {"threshold": torch.from_numpy(word)}
    each = torch.stack([answers.answer(table, question, names, logs, ask) for table in tables])

    for large in (1, 10**6):
        monkeypatch.setattr(answers, "_LARGE", large)
        for _ in range(2):  # the second time from what is kept
            assert torch.equal(answers.answer_each(tables, question, names, logs, ask), each)
        assert bool(tables[0].sorted_words) == (question == "below")  # kept by the first

    assert not replace(tables[0], spellings=1).sorted_words  # another table's values are its own
