"""How the rows of a round come together: in the coordinator's sight, under masks, or through three aggregators.

Each way asks the clients for their work, says whose rows count and why others do not, and returns the combination of
those that do. `round` knows no more of it.

K clients, M numbers in a row.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed import federation
from medfed.compliance.trail import Trail
from medfed.core import codec
from medfed.core.checks import CodecError, PlanError, QuorumError, SignatureError, SiteError, naming, reasons
from medfed.core.entropy import Entropy, Integers
from medfed.engine.port import Fleet, Reply, gather
from medfed.plan import Plan
from medfed.privacy.guarantee import GRID, SLACK, Guarantee, discrete_gaussian
from medfed.resolved import cohort, threshold
from medfed.robust import rules
from medfed.secure import keys, masking, three_party
from medfed.secure.identity import ANYBODY, Identity, Post, Roster, Scope
from medfed.secure.models import Follower, Publisher
from medfed.secure.party import Masker, Sharer
from medfed.site import Site
from medfed.wire import combine, finite, noise_share


@dataclass(frozen=True)
class Answer:
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

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> Answer:
        """Have the clients work on `payload` in round `number`, and combine their rows.

        Raises QuorumError where fewer answer than training.quorum asks for.
        """
        ...


class Plain:
    """The coordinator reads every row."""

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> Answer:
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
    ) -> Answer:
        rule = plan.rule
        if rule:
            gram_KK, weights = rules.gram(rules.blocks_of(row_KM)), dict.fromkeys(names, 1 / len(names))
            if rule.needs == "rows":  # no weights to tell
                combined_M = combine(plan.fitting(len(names)).combine(row_KM)[None], torch.ones(1), plan.links, number)
            else:
                w_K = plan.weigh(gram_KK)
                combined_M = combine(row_KM, w_K, plan.links, number)
                weights = dict(zip(names, w_K.tolist(), strict=True))
            return Answer(names, reports, replies, combined_M, excluded, weights=weights, gram_KK=gram_KK)
        weight_K = torch.tensor([plan.weight(name) for name in names], dtype=torch.float64)
        combined_M = combine(row_KM, None if plan.joint else weight_K / weight_K.sum(), plan.links, number)
        return Answer(names, reports, replies, combined_M, excluded)


PLAIN = Plain()
"""The one instance: it keeps nothing."""


@dataclass(frozen=True)
class ThreeParty:
    """The coordinator relays shares that it cannot read; three aggregators check rows in secret and open the sum."""

    ask: three_party.Ask
    publisher: Publisher
    terms: three_party.Terms
    trail: Trail | None = None
    spread: float = 0.0  # standard deviation of the noise on a sum, in steps
    gram_spread: Callable[[int], float] = lambda K: 0.0  # and on an entry of K rows' Gram matrix, in steps squared

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> Answer:
        """Gather the sites' shares, carry them to the aggregators, and combine what those open."""
        replies = gather(fleet, clients, "work", _signed(self.publisher, number, payload), plan.study.training.deadline)
        reports, uploads, excluded = read(replies, "upload")
        enough(plan, number, uploads, clients, excluded)
        scope = Scope(self.publisher.study, self.publisher.run, number)
        sent = {name: codec.as_bytes(upload) for name, upload in uploads.items()}
        with naming(excluded):
            opened = three_party.relay(self.ask, scope, sent, self.terms, self.spread)
        _record(self.trail, self.publisher, number, sent, opened.total_M, opened.accepted, excluded | opened.excluded)
        return Answer(
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
    choose: Callable[[Sequence[str], int], masking.Terms]
    trail: Trail | None = None

    def collect(self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes) -> Answer:
        """Play the five phases with the clients, and combine the rows of those who stayed."""
        talk = _Talk(plan, fleet, number)
        mine = self.publisher
        server = masking.Server(mine.post, self.choose(clients, number), Scope(mine.study, mine.run, number))
        with naming(talk.lost), naming(server.refused):
            return self._played(plan, clients, payload, talk, server)

    def _played(
        self, plan: Plan, clients: Sequence[str], payload: bytes, talk: "_Talk", server: masking.Server
    ) -> Answer:
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
        return Answer(
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


@dataclass(frozen=True)
class Ring:
    """The keys of a run whose parties all live in this process, and the roster that they are on."""

    keys: Mapping[str, Identity]
    roster: Roster
    consortium: str = ""  # the fingerprint of the key that approved them; empty: keys made for this run

    def post(self, name: str) -> Post:
        """Return a party's way to send and to receive."""
        return Post(self.keys[name], self.roster)


def ring(plan: Plan) -> Ring | None:
    """Return the keys of a run's parties: of the consortium's members, or made for this run; None for plain rows.

    Raises SignatureError, RevokedError, KeyFileError or TrailError where a party's key file is not what the consortium
    approved.
    """
    security = plan.study.security
    if security.aggregation == "plain":
        return None
    roles = {"coordinator": "coordinator"} | dict.fromkeys(plan.participants, "site")
    if security.aggregation == "three-party":
        roles |= dict.fromkeys(security.aggregators, "aggregator")
    if not security.federation:
        made = {name: Identity.new(name, role) for name, role in roles.items()}
        return Ring(made, Roster.of(*(one.public for one in made.values())))
    place, passphrase = plan.study.folder / security.keys, os.environ.get("MEDFED_PASSPHRASE", "")
    members = federation.read(plan.study.folder / security.federation, fingerprint=security.fingerprint)
    held = {name: keys.load(place / f"{quote(name, safe=' ')}.key", passphrase) for name in roles}
    for name, role in roles.items():
        if members.roster[name] != held[name].public or held[name].role != role:
            raise SignatureError(
                f"{name!r}: the key file is not what the consortium approved as {role} "
                f"({members.roster[name].role}, {members.roster[name].fingerprint}); request a rotation, or restore it"
            )
    return Ring(held, members.roster, members.authority.fingerprint)


def introduced(
    plan: Plan, sites: Sequence[Site], run: str, folder: Path | None = None, keys: Ring | None = None
) -> Aggregation:
    """Return how rows come together in a run whose parties all live in this process; `folder` gets their trail.

    Every site signs the study as it has it; one that has another is refused here. The aggregators take the weights and
    the noise from the plan, never from a message.
    """
    keys = keys or ring(plan)
    if keys is None:
        return PLAIN
    study, coordinator = plan.study.digest(), keys.keys["coordinator"]
    sites = [site for site in sites if site.name in set(plan.participants)]  # who is only tested sends no row
    publisher = Publisher(keys.post("coordinator"), study, run)
    follow = {site.name: Follower(keys.post(site.name), site.study.digest(), run, coordinator.name) for site in sites}
    signed = _agreed(publisher, follow, keys.roster)
    trail = None
    if folder:
        path = folder / "trail" / "trail.jsonl"
        trail = Trail.open(path, coordinator.name, coordinator.public.signing, coordinator.sign)
        trail.append("study", {"digest": study, "run": run, "consortium": keys.consortium, "signed": signed})
    if plan.study.security.aggregation == "masked":
        return _masked(plan, sites, publisher, follow, trail)
    terms = terms_of(plan)
    terms.check(gram=plan.rule is not None)
    for site in sites:
        site.party = Sharer(follow[site.name], terms)
    g = plan.guarantee
    noise = noise_share(g, 2) if g is not None and plan.joint and not g.simulation_only else None
    weights = None if plan.joint else {name: int(plan.weight(name)) for name in plan.participants}
    chosen, names = selection(plan, terms), plan.study.security.aggregators
    parties = {name: three_party.Aggregator(keys.post(name), terms, noise, weights, chosen) for name in names}
    ask = three_party.in_turn(parties)
    if g is None or not noise:
        return ThreeParty(ask, publisher, terms, trail)
    spread = math.sqrt(1.5) * max(g.sigma_units(), g.count_sigma() / GRID)
    if not chosen:
        return ThreeParty(ask, publisher, terms, trail, spread)
    gram, total = gram_split(g, terms)
    return ThreeParty(ask, publisher, terms, trail, total * math.sqrt(1.5), lambda K: gram(K) * math.sqrt(1.5))


def _agreed(publisher: Publisher, follow: Mapping[str, Follower], roster: Roster) -> dict[str, dict[str, str]]:
    """Return each site's signature under the study, with the key that it holds under; refuse where one has another."""
    signed: dict[str, dict[str, str]] = {}
    for name, site in follow.items():
        envelope = site.agree()
        try:
            publisher.post.unwrap(envelope, Scope(publisher.study, publisher.run, 0), "study", name, ANYBODY)
        except CodecError as error:
            raise PlanError(
                f"site {name!r} has not signed this study (digest {publisher.study[:16]}...): {error} "
                "Give every site the same study file."
            ) from error
        signed[name] = {"public": roster[name].signing.hex(), "envelope": envelope.hex()}
    return signed


def _masked(
    plan: Plan, sites: Sequence[Site], publisher: Publisher, follow: Mapping[str, Follower], trail: Trail | None
) -> Masked:
    def choose(clients: Sequence[str], round: int) -> masking.Terms:
        n, stay = len(clients), threshold(plan.study, len(clients))
        liars = math.floor(plan.study.security.colluding * n)
        return masking.Terms.choose(clients, plan.message, (n - stay) / n, liars, f"{publisher.run} {round}".encode())

    for site in sites:
        site.party = Masker(follow[site.name], choose, 1 if plan.joint else int(plan.weight(site.name)))
    return Masked(publisher, choose, trail)


GRAM_SHARE = 0.5
"""The part of a round's budget, in 1 / z^2, that pays for the Gram matrix; the sum has the rest."""


def gram_split(g: Guarantee, terms: three_party.Terms) -> tuple[Callable[[int], float], float]:
    """Return the noise of both openings: on an entry of K rows' Gram matrix (K -> sigma), and on a sum of weight 1.

    The two Gaussian releases cost together what the round's one would have: 1 / z^2 = 1 / z_G^2 + 1 / z_A^2.
    """
    s_z = g.sigma_units()  # z times what one patient moves a row by
    return (
        lambda K: s_z * terms.bound * math.sqrt(K + 3) / math.sqrt(GRAM_SHARE),
        s_z / math.sqrt(1 - GRAM_SHARE),
    )


def scales(plan: Plan) -> dict[str, float]:
    """Return what makes each site's row a mean where it is a sum over its declared patients; else nothing."""
    g = plan.guarantee
    if g is None or not plan.joint:
        return {}
    return {name: 1 / (release.size * release.probability) for name, release in g.releases.items()}


def selection(plan: Plan, terms: three_party.Terms) -> three_party.Selection | None:
    """Return how three aggregators weigh rows under the study's rule, with their noise; None without a rule."""
    g = plan.guarantee
    if plan.rule is None:
        return None

    def weigh(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = plan.weigh(torch.from_numpy(gram_KK)).numpy()
        return found

    if g is None or not plan.joint:
        return three_party.Selection(weigh)
    gram, total = gram_split(g, terms)
    entropy = Entropy()

    def on_gram(K: int) -> Integers:
        return discrete_gaussian(gram(K) / math.sqrt(2)).sample(K * (K + 1) // 2, entropy)

    def on_sum(length: int, most: int) -> Integers:
        return discrete_gaussian(total * most / math.sqrt(2)).sample(length, entropy)

    return three_party.Selection(weigh, scales(plan), on_gram, on_sum)


def terms_of(plan: Plan) -> three_party.Terms:
    """Return what three aggregators hold rows to: under joint noise the norm of the largest declared site's sum.

    Every site holds its own sum to its declared size (`site._summed`), so no honest row is beyond, whoever is in it.
    """
    g, security = plan.guarantee, plan.study.security
    if g is not None and plan.joint:
        largest = max(release.size for release in g.releases.values())
        count = 0.5 if g.clipping == "adaptive" else 0.0
        bound = largest * math.hypot(1 + SLACK, count) / GRID + math.sqrt(plan.message)
    else:  # under a rule the bound is on the norm, else on each number
        norm = plan.study.robustness.bound
        numbers = 1 if plan.rule or norm else plan.message
        steps = (norm * (1 + 1e-6) or security.bound) * 2.0**security.fraction_bits
        bound = steps * math.sqrt(numbers) + math.sqrt(plan.message)
    first, second, third = security.aggregators
    fewest = max(security.min_group, plan.quorum(cohort(plan.study, plan.participants)))
    return three_party.Terms(plan.message, bound, (first, second, third), fewest, security.min_group)


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
