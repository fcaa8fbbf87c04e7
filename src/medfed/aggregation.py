"""How the rows of a round come together: in the coordinator's sight, under masks, or through three aggregators.

Each way asks the clients for their work, says whose rows count and why others do not, and returns the combination of
those that do. `round` knows no more of it.

K clients, M numbers in a row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medfed import federation
from medfed.aggregator import Aggregator
from medfed.compliance.trail import Trail
from medfed.core import codec
from medfed.core.checks import CodecError, PlanError, QuorumError, SignatureError, SiteError, naming, reasons
from medfed.core.entropy import Integers
from medfed.engine.port import Fleet, Reply, gather
from medfed.plan import Plan
from medfed.privacy.guarantee import GRID
from medfed.resolved import cohort
from medfed.robust import rules
from medfed.secure import masking, three_party
from medfed.secure.chain import Publisher
from medfed.secure.identity import ANYBODY, Identity, Post, Roster, Scope
from medfed.terms import gram_split, masking_terms, scales, terms_of
from medfed.wire import combine, finite


@dataclass(frozen=True)
class RoundRows:
    """What a cohort's work came to."""

    names: list[str]  # whose rows count
    reports: Mapping[str, Mapping[str, Any]]
    replies: Mapping[str, Reply]
    combined_M: Tensor  # through the servers' halves of the links
    excluded: Mapping[str, str]  # why the others' rows do not
    more_up: int = 0  # bytes beyond the question and the replies
    more_down: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)  # bytes of each phase
    weights: Mapping[str, float] = field(default_factory=dict)  # that a rule gave, by name
    gram_KK: Tensor | None = None  # that it read, in the order of `names`
    gram_noise: float = 0.0  # standard deviation of the noise on each entry


class Aggregation(Protocol):
    """One way for rows to come together."""

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> RoundRows:
        """Have the clients work on `payload` in round `number`, and combine their rows.

        Raises QuorumError where fewer answer than training.quorum asks for.
        """
        ...


class Plain:
    """The coordinator reads every row."""

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> RoundRows:
        """Ask, check and combine."""
        replies = gather(fleet, clients, "work", payload, plan.study.training.deadline)
        reports, names, row_KM, excluded = _read_rows(replies, plan)
        good_K = finite(row_KM).tolist()
        if bound := plan.study.robustness.bound:
            long_K = [float(row.double().norm()) > bound * (1 + 1e-6) for row in row_KM]
        else:
            long_K = [False] * len(names)
        for name, good, long in zip(names, good_K, long_K, strict=True):
            if not good:
                excluded[name] = "its row is not finite"
            elif long:
                excluded[name] = f"its row is out of bound: robustness.bound={bound:g}"
        counted = [k for k, name in enumerate(names) if name not in excluded]
        if len(counted) < len(names):
            names, row_KM = [names[k] for k in counted], row_KM[counted]
        enough(plan, number, names, clients, excluded)
        with naming(excluded):  # a rule may have too few rows where the quorum has enough
            return self._combined(plan, number, names, row_KM, reports, replies, excluded)

    def _combined(
        self,
        plan: Plan,
        number: int,
        names: list[str],
        row_KM: Tensor,
        reports: Mapping[str, dict[str, Any]],
        replies: Mapping[str, Reply],
        excluded: Mapping[str, str],
    ) -> RoundRows:
        rule = plan.rule
        if rule:
            gram_KK, weights = rules.gram(rules.blocks_of(row_KM)), dict.fromkeys(names, 1 / len(names))
            if rule.needs == "rows":  # no weights to tell
                combined_M = combine(plan.fitting(len(names)).combine(row_KM)[None], torch.ones(1), plan.links, number)
            else:
                w_K = plan.weigh(gram_KK)
                combined_M = combine(row_KM, w_K, plan.links, number)
                weights = dict(zip(names, w_K.tolist(), strict=True))
            return RoundRows(names, reports, replies, combined_M, excluded, weights=weights, gram_KK=gram_KK)
        weight_K = torch.tensor([plan.weight(name) for name in names], dtype=torch.float64)
        combined_M = combine(row_KM, None if plan.joint else weight_K / weight_K.sum(), plan.links, number)
        return RoundRows(names, reports, replies, combined_M, excluded)


PLAIN = Plain()
"""The one instance: it keeps nothing."""


@dataclass(frozen=True)
class ThreeParty:
    """The coordinator relays shares that it cannot read; three aggregators check rows in secret and open the sum."""

    ask: three_party.Ask
    publisher: Publisher
    terms: three_party.SharingTerms
    trail: Trail | None = None
    spread: float = 0.0  # standard deviation of the noise on a sum, in steps
    gram_spread: Callable[[int], float] = lambda K: 0.0  # and on an entry of K rows' Gram matrix, in steps squared

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> RoundRows:
        """Gather the sites' shares, carry them to the aggregators, and combine what those open."""
        replies = gather(fleet, clients, "work", _signed(self.publisher, number, payload), plan.study.training.deadline)
        reports, uploads, excluded = read(replies, "upload")
        enough(plan, number, uploads, clients, excluded)
        scope = Scope(self.publisher.study, self.publisher.run, number)
        sent = {name: codec.as_bytes(upload) for name, upload in uploads.items()}
        with naming(excluded):
            opened = three_party.relay(self.ask, scope, sent, self.terms, self.spread)
        _record(self.trail, self.publisher, number, sent, opened.total_M, opened.accepted, excluded | opened.excluded)
        return RoundRows(
            names=[name for name in clients if name in set(opened.accepted)],
            reports=reports,
            replies=replies,
            combined_M=_combined(opened.total_M, plan, opened.accepted, number),
            excluded=excluded | opened.excluded,
            **self._weighed(plan, opened),
            more_down=opened.phases["shares"] + opened.phases["check"],
            more_up=opened.phases["check"] + opened.phases["open"],
            phases=opened.phases,
        )

    def _weighed(self, plan: Plan, opened: three_party.Opened) -> dict[str, Any]:
        """Return what the rule read and gave, of rows as means where they are sums."""
        if opened.gram_KK is None:
            return {}
        scale_K = np.array([scales(plan).get(name, 1.0) for name in opened.accepted])
        weights = {name: opened.weights[name] / three_party.WEIGHT for name in opened.accepted}
        noise = self.gram_spread(len(scale_K)) * float(scale_K.max()) ** 2
        gram_KK = torch.from_numpy(opened.gram_KK * np.outer(scale_K, scale_K))
        return {"weights": weights, "gram_KK": gram_KK, "gram_noise": noise}


@dataclass(frozen=True)
class Masked:
    """Rows travel under masks that cancel; the coordinator is the server of `masking`."""

    publisher: Publisher
    choose: Callable[[Sequence[str], int], masking.MaskingTerms]
    trail: Trail | None = None

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> RoundRows:
        """Play the five phases with the clients, and combine the rows of those who stayed."""
        talk = _Talk(plan, fleet, number)
        mine = self.publisher
        server = masking.MaskingServer(mine.post, self.choose(clients, number), Scope(mine.study, mine.run, number))
        with naming(talk.lost), naming(server.refused):
            return self._played(plan, clients, payload, talk, server)

    def _played(
        self, plan: Plan, clients: Sequence[str], payload: bytes, talk: "_Talk", server: masking.MaskingServer
    ) -> RoundRows:
        number = talk.number
        keys = server.keys(talk.ask("keys", clients, told=clients))
        boxes = server.shares(talk.ask("shares", clients, keys))
        for name, box in boxes.items():
            talk.ask("boxes", [name], box)
        ready = [name for name in boxes if name not in talk.lost]
        replies = gather(talk.fleet, ready, "work", _signed(self.publisher, number, payload), talk.deadline)
        reports, uploads, refused = read(replies, "upload")
        talk.lost |= refused
        sent = {name: codec.as_bytes(upload) for name, upload in uploads.items()}
        survivors = server.rows(sent)
        came = [name for name in sent if name not in server.refused]
        enough(plan, number, came, clients, talk.lost | _said(server.refused))
        confirmed = server.confirm(talk.ask("confirm", list(uploads), survivors))
        total_M, stayed = server.unmask(talk.ask("unmask", list(uploads), confirmed))
        names = [name for name in clients if name in stayed]
        refusals = _said(server.refused)
        _record(self.trail, self.publisher, number, sent, total_M, names, talk.lost | refusals)
        return RoundRows(
            names=names,
            reports=reports,
            replies=replies,
            combined_M=_combined(total_M, plan, names, number),
            excluded={name: why for name, why in (talk.lost | refusals).items() if name not in stayed},
            more_up=sum(talk.up.values()),
            more_down=talk.down,
            phases={**talk.up, "rows": sum(len(reply.payload) for reply in replies.values())},
        )


def _said(refused: Mapping[str, CodecError]) -> dict[str, str]:
    return {name: str(error) for name, error in refused.items()}


class _Talk:
    """The coordinator's words with the clients in a masked round: who was lost, and bytes."""

    def __init__(self, plan: Plan, fleet: Fleet, number: int) -> None:
        self.fleet, self.number, self.deadline = fleet, number, plan.study.training.deadline
        self.lost: dict[str, str] = {}
        self.up: dict[str, int] = {}
        self.down = 0

    def ask(
        self, phase: str, clients: Sequence[str], message: bytes = b"", told: Sequence[str] = ()
    ) -> dict[str, bytes]:
        """Tell all clients the same; return the answers of those that gave one."""
        header = {"phase": phase, "round": self.number, "told": list(told)}
        payload = codec.encode(header, {"message": codec.as_tensor(message)})
        replies = gather(self.fleet, clients, "phase", payload, self.deadline)
        self.down += len(payload) * len(clients)
        self.up[phase] = self.up.get(phase, 0) + sum(len(reply.payload) for reply in replies.values())
        found: dict[str, bytes] = {}
        for name, reply in replies.items():
            try:
                if reply.error:
                    raise SiteError(reply.error)
                found[name] = codec.as_bytes(codec.decode(reply.payload)[1]["message"])
            except (SiteError, CodecError, KeyError) as error:
                self.lost[name] = str(error)
        return found


def _signed(publisher: Publisher, number: int, payload: bytes) -> bytes:
    return codec.encode({"round": number}, {"signed": codec.as_tensor(publisher.sign(number, payload))})


def _record(
    trail: Trail | None,
    publisher: Publisher,
    number: int,
    sent: Mapping[str, bytes],
    total_M: Integers,
    names: Sequence[str],
    excluded: Mapping[str, str],
) -> None:
    """Write into the trail what was opened: hashes of the model that was sent and the one before it, of all uploads and
    of the sum; who is in it, who is not and why.
    """
    if trail:
        uploads = {name: sha256(upload).hexdigest() for name, upload in sent.items()}
        facts = {"round": number, "accepted": list(names), "excluded": dict(excluded), "uploads": uploads}
        facts |= {"model": publisher.model.hex(), "previous": publisher.previous.hex()}
        trail.append("opened sum", {**facts, "sum": sha256(total_M.tobytes()).hexdigest()})


def _combined(total_M: Integers, plan: Plan, names: Sequence[str], number: int) -> Tensor:
    """Return the servers' halves of an opened sum; without joint noise, of the mean that the sum is of."""
    combined_M = torch.from_numpy(total_M)
    if plan.rule and plan.joint:  # a mean of means, as the sum that `round` expects
        size, scale = scales(plan), max(scales(plan)[name] for name in names)
        combined_M = combined_M.double() * (scale / three_party.WEIGHT * sum(1 / size[name] for name in names))
    elif plan.rule:
        combined_M = combined_M.double() / three_party.WEIGHT
    elif not plan.joint:
        combined_M = combined_M.double() / sum(plan.weight(name) for name in names)
    for link in reversed(plan.links):
        combined_M = link.server(combined_M, number)
    return combined_M


Handler = Callable[[str, bytes], bytes]
"""A party as others reach it: (op, payload) -> answer."""


@dataclass(frozen=True)
class Keys:
    """The coordinator's own keys, and the consortium's list where the study names one."""

    coordinator: Identity
    members: federation.Consortium | None = None


def coordinator_keys(plan: Plan) -> Keys | None:
    """Return the coordinator's keys; None for plain rows. In this engine every party's key file is looked at, too.

    Raises SignatureError, RevokedError, KeyFileError or TrailError where one is not what the consortium approved.
    """
    study = plan.study
    if study.security.aggregation == "plain":
        return None
    members = federation.members_of(study)
    roles = {COORDINATOR: "coordinator"} | dict.fromkeys(plan.participants, "site")
    if study.security.aggregation == "three-party":
        roles |= dict.fromkeys(study.security.aggregators, "aggregator")
    held = {name: federation.own_keys(study, name, role) for name, role in roles.items() if members}
    for name, identity in held.items():
        assert members is not None
        federation.refuse_unapproved(members, identity.public, roles[name])
    return Keys(held.get(COORDINATOR) or Identity.new(COORDINATOR, "coordinator"), members)


COORDINATOR = "coordinator"
"""The coordinator's name on every roster."""


def introduced(
    plan: Plan,
    fleet: Fleet,
    run: str,
    folder: Path | None = None,
    keys: Keys | None = None,
    aggregators: Mapping[str, Handler] | None = None,
) -> Aggregation:
    """Have all parties tell their public keys and join the run; return how rows come together. `folder` gets the trail.

    Every site signs the study as it has it; one that has another is refused here. Each party works out bounds, weights
    and noise for itself. `aggregators` are the three, where they live elsewhere; else they are made in this process.
    """
    keys = keys or coordinator_keys(plan)
    if keys is None:
        return PLAIN
    study, security, me = plan.study.digest(), plan.study.security, keys.coordinator
    three = security.aggregators if security.aggregation == "three-party" else ()
    handlers = aggregators or {name: Aggregator(name, plan.study).handle for name in three}
    roster = _roster(plan, fleet, keys, handlers)
    publisher = Publisher(Post(me, roster), study, run)
    joining: dict[str, Any] = {"run": run, "coordinator": me.name}
    joining["roster"] = [federation.to_json(roster[name]) for name in roster]
    signed = _joined(publisher, fleet, plan.participants, codec.encode(joining), roster)
    trail = None
    if folder:
        path = folder / "trail" / "trail.jsonl"
        trail = Trail.open(path, me.name, me.public.signing, me.sign)
        consortium = keys.members.authority.fingerprint if keys.members else ""
        trail.append("study", {"digest": study, "run": run, "consortium": consortium, "signed": signed})
    if security.aggregation == "masked":
        return Masked(publisher, masking_terms(plan, run), trail)
    terms = terms_of(plan)
    terms.check(gram=plan.rule is not None)
    sizes = {name: {"train": plan.sizes[name]["train"]} for name in plan.participants}
    joining |= {"participants": list(plan.participants), "sizes": sizes, "parameters": plan.parameters}
    for handle in handlers.values():
        handle("join", codec.encode(joining))
    ask, g = three_party.asking(handlers, terms.length), plan.guarantee
    if g is None or not plan.joint or g.simulation_only:
        return ThreeParty(ask, publisher, terms, trail)
    spread = math.sqrt(1.5) * max(g.sigma_units(), g.count_sigma() / GRID)
    if plan.rule is None:
        return ThreeParty(ask, publisher, terms, trail, spread)
    gram, total = gram_split(g, terms)
    return ThreeParty(ask, publisher, terms, trail, total * math.sqrt(1.5), lambda K: gram(K) * math.sqrt(1.5))


def _roster(plan: Plan, fleet: Fleet, keys: Keys, handlers: Mapping[str, Handler]) -> Roster:
    """Return the public keys of all parties: those that they tell or, with a list of members, those on it."""
    replies = gather(fleet, plan.participants, "identify", codec.encode({}), _PATIENCE)
    if failed := {name: reply.error for name, reply in replies.items() if reply.error}:
        raise SignatureError(reasons(failed))
    told = {name: reply.payload for name, reply in replies.items()}
    told |= {name: handle("identify", codec.encode({})) for name, handle in handlers.items()}
    publics = [federation.from_json(codec.decode(payload)[0]["public"]) for payload in told.values()]
    for name, public in zip(told, publics, strict=True):
        role = "aggregator" if name in handlers else "site"
        if (public.name, public.role) != (name, role):
            raise SignatureError(f"{name!r} tells keys of {public.name!r}, {public.role}; expected its own, as {role}")
        if keys.members:
            federation.refuse_unapproved(keys.members, public, role)
    return keys.members.roster if keys.members else Roster.of(keys.coordinator.public, *publics)


_PATIENCE = 600.0  # seconds; nothing is trained yet


def _joined(
    publisher: Publisher, fleet: Fleet, sites: Sequence[str], payload: bytes, roster: Roster
) -> dict[str, dict[str, str]]:
    """Have the sites join; return each one's signature under the study, and the key that it holds under.

    Raises PlanError where one has another study.
    """
    signed: dict[str, dict[str, str]] = {}
    for name, reply in gather(fleet, sites, "join", payload, _PATIENCE).items():
        try:
            if reply.error:
                raise SiteError(reply.error)
            envelope = codec.as_bytes(codec.decode(reply.payload)[1]["signed"])
            publisher.post.unwrap(envelope, Scope(publisher.study, publisher.run, 0), "study", name, ANYBODY)
        except (CodecError, KeyError, SiteError) as error:
            raise PlanError(
                f"site {name!r} has not signed this study (digest {publisher.study[:16]}...): {error} "
                "Give every site the same study file."
            ) from error
        signed[name] = {"public": roster[name].signing.hex(), "envelope": envelope.hex()}
    return signed


Reports = dict[str, dict[str, Any]]
"""What each site tells beside its row."""


def read(replies: Mapping[str, Reply], tensor: str) -> tuple[Reports, dict[str, Tensor], dict[str, str]]:
    """Return reports, the named tensor of each reply, and the reasons of those that sent none; all by site."""
    reports: Reports = {}
    tensors: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, reply in replies.items():
        try:
            if reply.error:
                raise SiteError(reply.error)
            reports[name], found = codec.decode(reply.payload)
            tensors[name] = found[tensor]
        except SiteError as error:
            reasons[name] = str(error)
        except (CodecError, KeyError) as error:
            reasons[name] = f"its reply cannot be read: {error}"
    return reports, tensors, reasons


def _read_rows(replies: Mapping[str, Reply], plan: Plan) -> tuple[Reports, list[str], Tensor, dict[str, str]]:
    """Return reports, the names of those whose rows can be read, these rows as message_KM, and the others' reasons."""
    kind = torch.int64 if plan.joint else torch.float32
    row_KM = torch.empty(len(replies), plan.message, dtype=kind)
    expected = codec.RowFormat("row", torch.empty(plan.message, dtype=kind))
    reports, names, reasons = Reports(), list[str](), dict[str, str]()
    for name, reply in replies.items():
        try:
            reports[name] = _read_row(reply, expected, plan, row_KM[len(names)])
            names.append(name)
        except SiteError as error:
            reasons[name] = str(error)
        except (CodecError, KeyError) as error:
            reasons[name] = f"its reply cannot be read: {error}"
    return reports, names, row_KM[: len(names)], reasons


def _read_row(reply: Reply, expected: codec.RowFormat, plan: Plan, place_M: Tensor) -> dict[str, Any]:
    """Write a reply's row into its place and return the report beside it.

    It must have the plan's length and kind of number; one of another width is converted.
    """
    if reply.error:
        raise SiteError(reply.error)
    report = expected.decode(reply.payload, place_M)
    if report is None:
        report, found = codec.decode(reply.payload)
        _check_row(found["row"], plan)
        place_M.copy_(found["row"])
    return report


def _check_row(row: Tensor, plan: Plan) -> None:
    if row.shape != (plan.message,) or row.is_floating_point() == plan.joint:
        kind = "whole grid steps" if plan.joint else "numbers"
        raise SiteError(f"its row has shape {tuple(row.shape)}; expected {plan.message} {kind}")


def enough(
    plan: Plan, number: int, rows: Sequence[str] | Mapping[str, object], clients: Sequence[str], why: Mapping[str, str]
) -> None:
    """Raise QuorumError unless rows of enough of the drawn clients count."""
    if len(rows) < plan.quorum(len(clients)):
        quorum = plan.study.training.quorum
        answered = f"round {number}: {len(rows)} of {len(clients)} sites answered, training.quorum={quorum:g}."
        raise QuorumError(f"{answered} {reasons(why)}", why)


def bears(plan: Plan) -> str:
    """Say what malicious clients can do, and how well a rule that reads a noised matrix can tell them apart."""
    if plan.rule is None or plan.guarantee is None or not plan.joint:
        return plan.bears()
    terms, K = terms_of(plan), cohort(plan.study, plan.participants)
    gram, _ = gram_split(plan.guarantee, terms)
    ratio = gram(K) * math.sqrt(1.5) / terms.bound**2
    how = "weak: liars and honest sites look alike" if ratio > 0.5 else "possible" if ratio > 0.1 else "good"
    return (
        f"{plan.bears()}; noise on how rows compare is {ratio:.2g} of the longest row's square, so selection is {how}"
    )


def who_sees(plan: Plan) -> dict[str, str]:
    """Return what each party could see of the rows, one line each: see docs/threat-model.md."""
    noised = plan.guarantee is not None and not plan.guarantee.simulation_only
    joint = "the noised sum" if noised and plan.joint else "the sum of noised rows" if noised else "the bare sum"
    match plan.study.security.aggregation:
        case "masked":
            return {
                "the coordinator": f"masked rows, and {joint} of those who stayed",
                "a site": "its own row",
            }
        case "three-party":
            return {
                "the coordinator": f"ciphertext, and {joint} of the accepted rows",
                "one aggregator": "random shares, and whether a row is within its bound",
                "two aggregators together": "every row: two of the three must be honest",
                "a site": "its own row",
            }
    row = "every site's row, which is noised" if noised and not plan.joint else "every site's row"
    return {"the coordinator": row, "a site": "its own row"}
