"""Which way a study's rows come together, and how the parties join a run of it: keys, roster,
signatures, terms.

The ways themselves are in `plain`, `masked` and `shared` beside this module. What each party could
see of rows, and what malicious sites can do, is said here.

K clients of a round.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfed.compliance import consortium
from medfed.compliance.trail import Trail
from medfed.core import codec
from medfed.core.checks import (
    CodecError,
    KeyFileError,
    PlanError,
    SignatureError,
    SiteError,
    reasons,
)
from medfed.engine.port import Fleet, gather
from medfed.planning.cohorts import cohort
from medfed.planning.plan import Plan
from medfed.planning.terms import gram_split, masking_terms, terms_of
from medfed.privacy.guarantee import GRID
from medfed.rounds.aggregator import Aggregator
from medfed.rounds.masked import Masked
from medfed.rounds.plain import PLAIN
from medfed.rounds.shared import Shared
from medfed.rounds.way import GIVEN_UP, OPENED, Way, read_rounds
from medfed.secure import three_party
from medfed.secure.chain import FIRST, Publisher
from medfed.secure.identity import ANYBODY, Identity, Post, Public, Roster, Scope
from medfed.secure.identity import check as check_envelope

NOTHING: Mapping[str, Mapping[str, str]] = {}

Handler = Callable[[str, bytes], bytes]
"""A party as others reach it: (op, payload) -> answer."""


@dataclass(frozen=True)
class Keys:
    """Who takes part in a run: the coordinator's own keys, everybody's public ones, and the three.

    `members` is the consortium's list, where the study names one.
    """

    coordinator: Identity
    roster: Roster
    aggregators: Mapping[str, Handler]
    members: consortium.Consortium | None = None


def identify(
    plan: Plan, fleet: Fleet, aggregators: Mapping[str, Handler] | None = None
) -> Keys | None:
    """Have all parties tell their public keys; None for plain rows.

    Each party reads its own key file, and the coordinator no other than its own. `aggregators` are
    the three, where they live elsewhere; else they are made in this process.

    Raises KeyFileError where a party cannot open its keys, SignatureError or RevokedError where
    they are not what the consortium approved, TrailError where its list does not hold.
    """
    study = plan.study
    if study.security.aggregation == "plain":
        return None

    # The coordinator: its own keys, and the list that says whose count.
    members = consortium.members_of(study, [COORDINATOR])
    me = consortium.own_keys(study, COORDINATOR, "coordinator")
    if members:
        consortium.refuse_unapproved(members, me.public, "coordinator")

    # The others: what they tell of themselves.
    three = study.security.aggregators if study.security.aggregation == "three-party" else ()
    handlers = aggregators or {name: Aggregator(name, study).handle for name in three}
    publics = _ask_keys(plan, fleet, handlers, members)
    roster = members.roster if members else Roster.of(me.public, *publics)
    return Keys(me, roster, handlers, members)


COORDINATOR = "coordinator"
"""The coordinator's name on every roster."""


def introduce(
    plan: Plan,
    fleet: Fleet,
    run: str,
    folder: Path | None = None,
    keys: Keys | None = None,
    behind: int = 0,
    before: Mapping[str, Mapping[str, str]] = NOTHING,
) -> Way:
    """Have all parties join the run, and return how rows come together. `folder` gets the trail.

    Every site signs the study as it has it; one that has another is refused here. Each party works
    out bounds, weights and noise for itself. `keys` are those of `identify`, where it was asked
    before; `behind` the rounds that a resumed run has behind it, whose last model the next one
    follows; `before` what those who are away signed when they joined it. Raises PlanError for a
    party that has not signed.
    """
    keys = keys or identify(plan, fleet)
    if keys is None:
        return PLAIN
    study = plan.study.digest()
    security = plan.study.security
    me = keys.coordinator
    roster = keys.roster
    publisher = Publisher(Post(me, roster), study, run)
    agreed = bytes.fromhex(plan.digest)

    # Join: every site signs the study.
    joining: dict[str, Any] = {"run": run, "coordinator": me.name}
    joining["roster"] = [consortium.to_json(roster[name]) for name in roster]
    payload = codec.encode(joining)
    signed = _join_sites(publisher, fleet, plan.present, payload, roster, agreed)
    away = [name for name in plan.participants if name in plan.away]
    signed |= {name: _recall(publisher, name, before, agreed) for name in away}

    # Record: the trail begins with what they signed.
    trail = None
    if folder:
        path = folder / "trail" / "trail.jsonl"
        trail = Trail.open(path, me.name, me.public.signing, me.sign)
        facts: dict[str, Any] = {"digest": study, "run": run, "signed": signed}
        if away:
            facts["away"] = away
        trail.append("study", facts | consortium.tell_writer(me.public, keys.members))
        publisher.model = _last_model(path, behind)
    if security.aggregation == "masked":
        return Masked(publisher, masking_terms(plan, run), trail)

    # The three join too, and work out their terms by themselves.
    terms = terms_of(plan)
    terms.check(gram=plan.rule is not None)
    sizes = {name: {"train": plan.sizes[name]["train"]} for name in plan.participants}
    joining |= {
        "participants": list(plan.participants),
        "sizes": sizes,
        "parameters": plan.parameters,
        "encoding": plan.encoded,
    }
    for name, handle in keys.aggregators.items():
        _check_signed(publisher, name, handle("join", codec.encode(joining)), agreed)
    ask = three_party.asking(keys.aggregators, terms.length)
    return _share(plan, ask, publisher, terms, trail)


def _share(
    plan: Plan,
    ask: three_party.Ask,
    publisher: Publisher,
    terms: three_party.SharingTerms,
    trail: Trail | None,
) -> Shared:
    """Return the way among three aggregators, with how far their noise may move what they open."""
    guarantee = plan.guarantee
    if guarantee is None or not plan.joint or guarantee.simulation_only:
        return Shared(ask, publisher, terms, trail)
    parts = math.sqrt(1.5)  # three add noise, any two parts of which suffice
    if plan.rule is None:
        return Shared(
            ask,
            publisher,
            terms,
            trail,
            parts * max(guarantee.sigma_units(), guarantee.count_sigma() / GRID),
        )
    gram, total = gram_split(guarantee, terms)
    return Shared(ask, publisher, terms, trail, total * parts, lambda K: gram(K) * parts)


def _ask_keys(
    plan: Plan,
    fleet: Fleet,
    aggregators: Mapping[str, Handler],
    members: consortium.Consortium | None,
) -> list[Public]:
    """Return the public keys that sites and aggregators tell, each its own and, where there is a
    list of members, as it was approved.
    """
    replies = gather(fleet, plan.present, "identify", codec.encode({}), _PATIENCE)
    if failed := {name: reply.error for name, reply in replies.items() if reply.error}:
        raise KeyFileError(reasons(failed))
    told = {name: reply.payload for name, reply in replies.items()}
    told |= {name: handle("identify", codec.encode({})) for name, handle in aggregators.items()}
    publics: list[Public] = []

    for name, payload in told.items():
        role = "aggregator" if name in aggregators else "site"
        public = consortium.from_json(codec.decode(payload)[0]["public"])
        if (public.name, public.role) != (name, role):
            raise SignatureError(
                f"{name!r} tells keys of {public.name!r}, {public.role}; expected its own, as "
                f"{role}"
            )
        if members:
            consortium.refuse_unapproved(members, public, role)
        publics.append(public)

    return publics


_PATIENCE = 600.0  # seconds; nothing is trained yet


def _join_sites(
    publisher: Publisher,
    fleet: Fleet,
    sites: Sequence[str],
    payload: bytes,
    roster: Roster,
    facts: bytes,
) -> dict[str, dict[str, str]]:
    """Have the sites join;
    return each one's signature under the study, and the key that it holds under.

    Raises PlanError where one has another study.
    """
    signed: dict[str, dict[str, str]] = {}
    for name, reply in gather(fleet, sites, "join", payload, _PATIENCE).items():
        if reply.error:
            raise _unsigned(publisher, name, SiteError(reply.error))
        envelope = _check_signed(publisher, name, reply.payload, facts)
        signed[name] = {"public": roster[name].signing.hex(), "envelope": envelope.hex()}

    return signed


def _recall(
    publisher: Publisher, name: str, before: Mapping[str, Mapping[str, str]], facts: bytes
) -> dict[str, str]:
    """Return what a site that is away signed when it joined this run; raise PlanError where it has
    not, or for something else than is agreed now, or under keys that are not its own any more.
    """
    scope = Scope(publisher.study, publisher.run, 0)
    public = publisher.post.roster[name]
    try:
        envelope = bytes.fromhex(before[name]["envelope"])
        check_envelope(envelope, public, scope, "study", ANYBODY)
        if Post.body(envelope) != facts:
            raise CodecError("it took other participants, sizes or another encoding for agreed.")
    except (CodecError, KeyError, ValueError) as error:
        raise _unsigned(publisher, name, error) from error
    return {"public": public.signing.hex(), "envelope": envelope.hex()}


def _check_signed(publisher: Publisher, name: str, payload: bytes, facts: bytes) -> bytes:
    """Return a party's signature under the study, the run and what is agreed; raise PlanError where
    it is none.
    """
    scope = Scope(publisher.study, publisher.run, 0)
    try:
        envelope = codec.as_bytes(codec.decode(payload)[1]["signed"])
        if publisher.post.unwrap(envelope, scope, "study", name, ANYBODY) != facts:
            raise CodecError("it takes other participants, sizes or another encoding for agreed.")
    except (CodecError, KeyError) as error:
        raise _unsigned(publisher, name, error) from error
    return envelope


def _unsigned(publisher: Publisher, name: str, error: Exception) -> PlanError:
    return PlanError(
        f"{publisher.post.roster[name].role} {name!r} has not signed this study (digest "
        f"{publisher.study[:16]}...): "
        f"{error} Give every party the same study file."
    )


def _last_model(path: Path, behind: int) -> bytes:
    """Return the hash of the model of the last round that is behind, as the trail has it."""
    told = read_rounds(path)
    facts = told.get((behind, OPENED)) or told.get((behind, GIVEN_UP))
    return bytes.fromhex(facts["model"]) if facts else FIRST


def bears(plan: Plan) -> str:
    """Say what malicious clients of a `plan` can do, and how well its rule tells them apart.

    Under joint noise the rule reads a noised matrix.
    """
    if plan.rule is None or plan.guarantee is None or not plan.joint:
        return plan.bears()
    terms = terms_of(plan)
    K = cohort(plan.study, plan.participants)
    gram, _ = gram_split(plan.guarantee, terms)
    ratio = gram(K) * math.sqrt(1.5) / terms.bound**2
    how = "good"
    if ratio > 0.1:
        how = "possible"
    if ratio > 0.5:
        how = "weak: liars and honest sites look alike"
    return (
        f"{plan.bears()}; noise on how rows compare is {ratio:.2g} of the longest row's square, "
        f"so selection is {how}"
    )


def who_sees(plan: Plan) -> dict[str, str]:
    """Return what each party could see of the rows, one line each: see docs/threat-model.md."""
    noised = plan.guarantee is not None and not plan.guarantee.simulation_only
    joint = "the bare sum"
    if noised:
        joint = "the noised sum" if plan.joint else "the sum of noised rows"

    alone = {"a site": "its own row"}
    if not plan.study.security.federation:
        alone["a coordinator that lies"] = (
            "every row: without a list of members (security.federation) it says whose keys count"
        )
    match plan.study.security.aggregation:
        case "masked":
            return {"the coordinator": f"masked rows, and {joint} of those who stayed", **alone}
        case "three-party":
            return {
                "the coordinator": f"ciphertext, and {joint} of the accepted rows",
                "one aggregator": "random shares, and whether a row is within its bound",
                "two aggregators together": "every row: two of the three must be honest",
                **alone,
            }

    row = "every site's row, which is noised" if noised and not plan.joint else "every site's row"
    return {"the coordinator": row, "a site": "its own row"}
