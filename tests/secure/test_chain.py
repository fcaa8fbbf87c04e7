"""Signed, chained global models: a site takes one a round, from the coordinator alone, each after
the one before.
"""

import pytest

from medfed.core.checks import EnvelopeError, SignatureError
from medfed.secure.chain import Follower, Publisher
from medfed.secure.identity import ANYBODY, Identity, Post, Roster, Scope

BOSS = Identity.new("boss", "coordinator")
ANN = Identity.new("ann", "site")
EVE = Identity.new("eve", "site")
ROSTER = Roster.of(BOSS.public, ANN.public, EVE.public)


def publisher(run: str = "run", by: Identity = BOSS) -> Publisher:
    return Publisher(Post(by, ROSTER), "study", run)


def follower(study: str = "study") -> Follower:
    return Follower(Post(ANN, ROSTER), study, "run", "boss")


def test_a_chain_is_followed_and_the_same_message_may_come_again() -> None:
    boss = publisher()
    site = follower()
    for round in (1, 2, 3):
        envelope = boss.sign(round, b"model %d" % round)
        assert site.accept(round, envelope) == site.accept(round, envelope) == b"model %d" % round


def test_a_site_that_missed_rounds_goes_on() -> None:
    boss = publisher()
    site = follower()
    envelopes = [boss.sign(round, bytes([round])) for round in (1, 2, 3, 4)]
    for round in (1, 3, 4):
        assert site.accept(round, envelopes[round - 1]) == bytes([round])


def test_two_models_in_one_round_are_refused() -> None:
    boss = publisher()
    site = follower()
    site.accept(1, boss.sign(1, b"one"))
    with pytest.raises(EnvelopeError, match="may not send two"):
        site.accept(1, boss.sign(1, b"another"))


def test_a_model_that_does_not_follow_is_refused() -> None:
    site = follower()
    site.accept(1, publisher().sign(1, b"one"))
    other = publisher()
    other.sign(1, b"another one")
    with pytest.raises(EnvelopeError, match="lost its place"):
        site.accept(2, other.sign(2, b"two"))


def test_an_earlier_round_is_refused() -> None:
    boss = publisher()
    site = follower()
    first = boss.sign(1, b"one")
    second = boss.sign(2, b"two")
    site.accept(2, second)
    with pytest.raises(EnvelopeError, match="round=1"):
        site.accept(1, first)


def test_others_rounds_runs_studies_and_senders_are_refused() -> None:
    envelope = publisher().sign(1, b"one")
    for site, round in ((follower(), 2), (follower("changed"), 1)):
        with pytest.raises(EnvelopeError, match="expected"):
            site.accept(round, envelope)
    with pytest.raises(EnvelopeError, match="run='other'"):
        follower().accept(1, publisher("other").sign(1, b"one"))
    with pytest.raises(EnvelopeError, match="sender='eve'"):
        follower().accept(1, publisher(by=EVE).sign(1, b"one"))
    with pytest.raises(SignatureError, match="did not sign"):
        follower().accept(1, envelope[:-64] + bytes(64))
    short = Post(BOSS, ROSTER).wrap(Scope("study", "run", 1), "model", ANYBODY, b"short")
    with pytest.raises(EnvelopeError, match="expected 32"):
        follower().accept(1, short)


def test_a_signature_under_the_study_holds_for_that_study_alone() -> None:
    boss = Post(BOSS, ROSTER)
    assert boss.unwrap(follower().agree(), Scope("study", "run", 0), "study", "ann", ANYBODY) == b""
    with pytest.raises(EnvelopeError, match="study='changed'"):
        boss.unwrap(follower("changed").agree(), Scope("study", "run", 0), "study", "ann", ANYBODY)
