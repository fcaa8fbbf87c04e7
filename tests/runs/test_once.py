"""A run that a crash ended between opening a sum and keeping it: nobody answers twice, and the
resumed run comes to the same bits.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import medfed
from medfed.compliance import consortium
from medfed.privacy.ledger import Ledger
from medfed.runs import claims, drive
from medfed.secure import key_files
from medfed.secure.identity import Identity
from medfed.study import Study
from tests.compliance.test_consortium import place, study
from tests.tables import PRIVATE, write_study

__all__ = ["place", "study"]


def federated(folder: Path, text: str, changes: dict[str, Any]) -> Study:
    """Return a study whose parties' keys a consortium has approved."""
    study = medfed.load_study(write_study(folder, text))._with(changes)
    return approved(study, folder, tuple(study.privacy.sizes))


def approved(study: Study, folder: Path, sites: Sequence[str]) -> Study:
    """Return a study whose parties, sites and others, have keys that a consortium has approved."""
    boss = Identity.new("the consortium", "consortium")
    key_files.save(boss, folder / "keys" / "consortium.key")
    consortium.begin(folder / "members", boss)
    roles = dict.fromkeys(sites, "site") | {"coordinator": "coordinator"}
    roles |= dict.fromkeys(study.security.aggregators, "aggregator")
    for name, role in roles.items():
        one = Identity.new(name, role)
        consortium.approve(
            folder / "members", boss, consortium.request(one), one.public.fingerprint
        )
        key_files.save(one, folder / "keys" / f"{name}.key")
    return study._with(
        {"security.federation": str(folder / "members"), "security.keys": str(folder / "keys")}
    )


class CrashError(Exception):
    """What ends a process where a test says so."""


def crashed(study: Study, folder: Path, round: int) -> None:
    """Run until a round has been opened, and crash before it is kept."""
    keep = drive.write_checkpoint

    def crash(place: Path, server: Any, *rest: Any) -> None:
        if server.round == round:
            raise CrashError
        keep(place, server, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "write_checkpoint", crash)
        with pytest.raises(CrashError):
            medfed.run(study, folder)


def interrupted(study: Study, folder: Path) -> None:
    """Run until the model is tested for the first time, and stop there as by Ctrl-C."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "test", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            medfed.run(study, folder)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.parametrize("way", ["masked", "three-party"])
def test_a_round_that_a_crash_lost_is_played_again_to_the_same_bits(
    way: str, algorithm: str, round: int, study: Study, tmp_path: Path
) -> None:
    study = study._with({"security.aggregation": way, "training.algorithm": algorithm})
    whole = medfed.run(study, tmp_path / "whole")
    crashed(study, tmp_path / "run", round)
    resumed = medfed.resume(tmp_path / "run")
    assert resumed.complete and torch.equal(resumed.w_P, whole.w_P)
    assert medfed.verify_model_integrity(tmp_path / "run")["rounds"] >= study.training.rounds


def test_a_round_that_is_answered_again_is_paid_once_and_counted_once(tmp_path: Path) -> None:
    """The coordinator counted it twice: the resumed run had no round left."""
    study = federated(tmp_path, PRIVATE, {"security.aggregation": "three-party"})
    study = study._with({"training.rounds": 3, "privacy.spare_rounds": 0})
    crashed(study, tmp_path / "run", 2)
    resumed = medfed.resume(tmp_path / "run")
    assert resumed.complete
    claim = claims.read(tmp_path / "run")
    assert claim["rounds"]["paid"] == 3
    assert 0.99 * study.privacy.epsilon < claim["epsilon"] <= study.privacy.epsilon
    with Ledger.open(tmp_path / "run" / "sites" / "ledger.sqlite", read_only=True) as book:
        paid = Counter(
            (row["site"], row["round"]) for row in book.rows() if row["label"] == "round"
        )
    assert set(paid.values()) == {1}


def test_a_site_whose_record_is_gone_ends_the_round_that_was_opened(
    study: Study, tmp_path: Path
) -> None:
    """Its new shares are not those that the aggregators have opened: they refuse, by reason."""
    crashed(study, tmp_path / "run", 2)
    keys = study.folder / study.security.keys
    record = next(path for path in sorted(keys.glob("*.answer")))
    record.unlink()
    stopped = medfed.resume(tmp_path / "run")
    assert not stopped.complete
    assert "rows was done for something else" in str(stopped.summary["reason"])


def test_a_damaged_record_is_never_an_empty_one(study: Study, tmp_path: Path) -> None:
    medfed.run(study, tmp_path / "run")
    keys = study.folder / study.security.keys
    record = next(path for path in sorted(keys.glob("*.record")))
    record.write_text("{}")
    with pytest.raises(medfed.MedfedError, match="is no record of secure rounds"):
        medfed.run(study, tmp_path / "again")
