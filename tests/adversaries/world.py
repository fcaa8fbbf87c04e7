"""Parties of which some lie, over real messages, and what must hold of whatever they did.

Sites and aggregators are the product's own nodes, asked by `handle`: only their training is left
out, and their keys and records lie in memory, where they outlast a restart. The coordinator is all
lies: it keeps what it has seen and asks for whatever a program says. Sites that work with it are
played by it, with their keys.

What is opened is known by rows of random numbers: a sum that equals one over some of them is that
sum. `World.check` says what must hold.
"""

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import medfed
from medfed.compliance import consortium
from medfed.core import codec
from medfed.core.checks import MedfedError, PlanError
from medfed.core.entropy import Integers
from medfed.node import work
from medfed.node.site import Answer, Header, Site
from medfed.planning import terms
from medfed.planning.resolved import Resolved, colluding, holders, least_rows, resolve
from medfed.rounds.aggregator import Aggregator
from medfed.secure import masking, party, three_party
from medfed.secure.chain import FIRST, Publisher
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.record import Record
from medfed.study import Study
from tests.adversaries.watching import watch
from tests.tables import PRIVATE, STUDY

COORDINATOR = "coordinator"
AGGREGATORS = ("aggregator 1", "aggregator 2", "aggregator 3")
NUMBERS = 6
"""Numbers in a row: 20 random bits each tell any two sums apart."""


BLINDING = 1e30
"""A model under which rows are 0, as gradients vanish."""


def names_of(count: int) -> tuple[str, ...]:
    """Return the names of so many sites."""
    return tuple(f"s{i}" for i in range(count))


def sizes_of(names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the declared patients of sites: all different."""
    return {name: {"train": 40 + 5 * i} for i, name in enumerate(names)}


@cache
def study_of(way: str, claim: bool, sites: int = 5) -> Study:
    """Return a study of one way to add rows; with a claim, its noise is joint."""
    text = STUDY
    if claim:
        declared = "".join(
            f"{name} = {size['train']}\n" for name, size in sizes_of(names_of(sites)).items()
        )
        text = f"{PRIVATE.split('[privacy.sizes]')[0]}[privacy.sizes]\n{declared}[monitor]\nbaselines = false\n"
    path = Path(mkdtemp(prefix="medfed-adversaries-")) / "study.toml"
    path.write_text(text)
    study = medfed.load_study(path)
    study = study.set("security.aggregation", way).set("training.quorum", 0.5)
    return study.set("training.rounds", 50)


@cache
def facts_of(study: Study, told: tuple[tuple[str, int], ...]) -> Resolved:
    """Return what follows for a party that is told these participants and sizes."""
    sizes = {name: {"train": size} for name, size in told}
    return resolve(study, sizes, tuple(sizes), NUMBERS)


def tell(sizes: Mapping[str, Mapping[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return participants and sizes as `facts_of` takes them."""
    return tuple((name, size["train"]) for name, size in sizes.items())


def loose_terms(facts: Resolved, run: str) -> Callable[[Sequence[str], int], masking.MaskingTerms]:
    """Return the terms of a masked round of whoever is told: what a party does that checks nothing."""

    def choose(clients: Sequence[str], round: int) -> masking.MaskingTerms:
        n = len(clients)
        stay = min(n, least_rows(facts.study, n))
        seed = json.dumps([run, round, facts.digest]).encode()
        return masking.MaskingTerms.choose(
            clients, facts.message, (n - stay) / n, colluding(facts.study, n), seed
        )

    return choose


@dataclass(frozen=True)
class Row:
    """A row that left a site: of which round and model, and what it was on the wire, weight and all."""

    site: str
    round: int
    model: bytes
    row_M: Integers = field(repr=False, compare=False)

    @property
    def which(self) -> tuple[str, int, bytes]:
        return self.site, self.round, self.model


@dataclass(frozen=True)
class Opened:
    """A sum that liars have read: over which honest rows, and what it was without their own."""

    rows: frozenset[tuple[str, int, bytes]]
    total_M: tuple[int, ...]
    noise_M: tuple[int, ...] | None = None
    parts: int = 0  # parts of the joint noise in it that liars do not know


@dataclass
class Till:
    """A site's account, which never runs dry: who has paid, by round."""

    paid: Counter[tuple[str, int]] = field(default_factory=Counter)
    guarantee: None = None  # the product's own is enrolled for one
    shares_patients: bool = False
    _owing: set[str] = field(default_factory=set)

    def pay(self, round: int, sites: Sequence[str]) -> dict[str, MedfedError]:
        for site in sites:
            if site not in self._owing:
                self.paid[site, round] += 1
                self._owing.add(site)
        return {}

    def note_answered(self, sites: Sequence[str]) -> None:
        self._owing.difference_update(sites)


class World:
    """All parties of one run, and what became known to liars.

    `liars` are sites and aggregators that work with the coordinator. `told` are participants with
    sizes, as the coordinator tells all; `told_to` what it tells one party instead. `settings` are
    the study's besides.
    """

    run = "run"

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        way: str,
        *,
        claim: bool = False,
        sites: int = 5,
        liars: Collection[str] = (),
        told: Mapping[str, Mapping[str, int]] | None = None,
        told_to: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.study = study_of(way, claim, sites)._with(dict(settings or {}))
        self.names = names_of(sites)
        self.liars = frozenset({COORDINATOR, *liars})
        self.told = told or sizes_of(self.names)
        self.told_to = dict(told_to or {})
        self.watcher = watch(patch)
        self.rows: list[Row] = []
        self.opened: list[Opened] = []
        self.faults: list[str] = []
        self.errors: list[tuple[str, str]] = []
        self.tills = {name: Till() for name in self.names}

        # Keys and records that outlast a restart.
        roles = {name: "site" for name in self.names} | {name: "aggregator" for name in AGGREGATORS}
        self.keys = {name: Identity.new(name, role) for name, role in roles.items()}
        self.keys[COORDINATOR] = Identity.new(COORDINATOR, "coordinator")
        self.roster = Roster.of(*(key.public for key in self.keys.values()))
        self.records = {name: Record() for name in self.keys}
        members = consortium.Consortium(
            self.roster, self.keys[COORDINATOR].public, [], "", [], Path()
        )
        patch.setattr(consortium, "own_keys", lambda study, name, role: self.keys[name])
        patch.setattr(consortium, "record_of", lambda study, name: self.records[name])
        patch.setattr(consortium, "members_of", lambda study, names: members)

        # Rows in place of training, and what leaves with them.
        patch.setattr(work, "_train_or_sum", self._train)
        for kind in (party.Masker, party.Sharer):
            patch.setattr(kind, "upload", self._noting(kind.upload))

        honest = [name for name in self.names if name in self.told and name not in self.liars]
        self.sites = {name: self._open_site(name) for name in honest}
        for name in self.sites:
            self.join(name)

    # Sites ----------------------------------------------------------------------------------------

    def facts(self, name: str = "") -> Resolved:
        """Return what a party takes for agreed, from what it was told."""
        return facts_of(self.study, tell(self.told_to.get(name, self.told)))

    @property
    def claim(self) -> bool:
        return self.facts().joint

    def _open_site(self, name: str) -> Site:
        site = Site(name, None, self.study, account=self.tills[name])  # type: ignore[arg-type]
        site.facts = self.facts(name)
        site.links = site.facts.links
        site.guarantee = site.facts.guarantee
        return site

    def join(self, name: str) -> None:
        """Have a site join the run, if it will."""
        self.ask(name, "join", {"run": self.run, "coordinator": COORDINATOR})

    def restart(self, name: str) -> None:
        """Start a site anew: it keeps its keys and its record alone."""
        self.sites[name] = self._open_site(name)
        self.join(name)

    def ask(
        self,
        name: str,
        op: str,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> bytes | None:
        """Return what an honest site answers; None where it refuses, which is noted."""
        try:
            return self.sites[name].handle(op, codec.encode(dict(header), dict(tensors or {})))
        except MedfedError as error:
            self.errors.append((name, str(error)))
            return None

    def work(
        self, name: str, round: int, model: float = 0, inner: int | None = None
    ) -> bytes | None:
        """Ask a site for its row of a round from one of several models; return what leaves it."""
        envelope = self.sign(name, round, model, inner)
        header = {"round": round}
        answer = self.ask(name, "work", header, {"signed": codec.as_tensor(envelope)})
        if answer is None:
            return None
        return codec.as_bytes(codec.decode(answer)[1]["upload"])

    def message(self, round: int, model: float, inner: int | None = None) -> bytes:
        """Return the message of a round: one of several global models."""
        w_P = torch.full((NUMBERS,), float(model))
        return codec.encode({"round": round if inner is None else inner}, {"w": w_P})

    def sign(self, name: str, round: int, model: float, inner: int | None = None) -> bytes:
        """Return a model as the coordinator signs it for one site: it follows what that site has."""
        party = self.sites[name].party
        last = party.follower.model if party else FIRST
        publisher = Publisher(self.post(COORDINATOR), self.study.digest(), self.run, model=last)
        return publisher.sign(round, self.message(round, model, inner))

    def post(self, name: str) -> Post:
        """Return a fresh post of a liar's."""
        return Post(self.keys[name], self.roster)

    def scope(self, round: int) -> Scope:
        return Scope(self.study.digest(), self.run, round)

    def _train(
        self, sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
    ) -> list[Answer]:
        """Answer with a row that follows from site, round and model, as training's would."""
        found = []
        for site in sites:
            key = f"{site.name} {header['round']} {tensors['w'].tolist()}".encode()
            rng = np.random.default_rng(list(sha256(key).digest()))
            row_M = torch.from_numpy(rng.uniform(-1, 1, NUMBERS))
            if float(tensors["w"].abs().max()) > 1e20:
                row_M = torch.zeros(NUMBERS, dtype=torch.float64)
            found.append(row_M)
        return work._send_rows(sites, header, torch.stack(found), [{"steps": 1} for _ in sites])

    def _noting(self, upload: Callable[..., bytes]) -> Callable[..., bytes]:
        def leave(party: Any, round: int, row_M: Integers) -> bytes:
            left = upload(party, round, row_M)
            mine = party.follower
            counted = row_M * getattr(party, "weight", 1)
            self.rows.append(Row(mine.post.me.name, mine.round, mine.model, counted))
            return left

        return leave

    # What was opened ------------------------------------------------------------------------------

    def note_sum(
        self,
        total_M: Integers,
        rows: Sequence[Row],
        weights: Mapping[str, int] | None = None,
        noise_M: Integers | None = None,
        parts: int | None = None,
    ) -> Opened | None:
        """Find of which honest rows a number is the sum; note it, or return None where it is of none.

        Args:
            total_M: the number, without what liars put in.
            rows: those that may be in it.
            weights: of each site; None: 1.
            noise_M: what aggregators drew for it.
            parts: of the joint noise; None: as many as there are rows.
        """
        bare_M = total_M - (noise_M if noise_M is not None else 0)
        weights = weights or {}
        for size in range(len(rows), 0, -1):
            for chosen in itertools.combinations(rows, size):
                if (sum(weights.get(row.site, 1) * row.row_M for row in chosen) == bare_M).all():
                    opened = Opened(
                        frozenset(row.which for row in chosen),
                        tuple(total_M.tolist()),
                        None if noise_M is None else tuple(noise_M.tolist()),
                        size if parts is None else parts,
                    )
                    self.opened.append(opened)
                    return opened
        return None

    # What must hold -------------------------------------------------------------------------------

    @property
    def least(self) -> int:
        """Honest rows that must be in a sum: colluding sites know their own."""
        return self.study.security.min_group

    def check(self) -> None:
        """Raise AssertionError unless all holds, whatever the liars did."""
        faults = [*self.faults, *self.watcher.faults]
        for one in self.opened:
            faults += self._look_at(one)
        faults += self._look_at_differences() + self._look_at_charges()
        faults += [fault for said in self.errors for fault in self._look_at_blame(*said)]
        assert not faults, "\n".join(dict.fromkeys(faults))

    def _look_at(self, one: Opened) -> list[str]:
        sites = sorted({site for site, _, _ in one.rows})
        needed = holders(self.study, self.names)
        found = []
        if len(sites) < self.least:
            found.append(f"opened: a sum of {sites}; expected {self.least} honest rows or more")
        if len({(round, model) for _, round, model in one.rows}) > 1 or len(sites) < len(one.rows):
            found.append(f"opened: a sum over rows of several rounds or models, of {sites}")
        if self.claim and one.parts < needed:
            found.append(f"opened: {one.parts} parts of the noise; {needed} were claimed")
        return found

    def _look_at_differences(self) -> list[str]:
        """No row is in two sums, but for the same sum again, and no noise on two."""
        sums: dict[tuple[str, int], set[frozenset[Any]]] = {}
        for one in self.opened:
            for site, round, _ in one.rows:
                sums.setdefault((site, round), set()).add(one.rows)
        found = [
            f"opened: the row of {site}, round {round}, is in {len(sets)} different sums"
            for (site, round), sets in sums.items()
            if len(sets) > 1
        ]
        noises: dict[tuple[int, ...], tuple[int, ...]] = {}
        for one in self.opened:
            if one.noise_M is None or not any(one.noise_M):
                continue
            if noises.setdefault(one.noise_M, one.total_M) != one.total_M:
                found.append("opened: the same noise on two sums")
        return found

    def _look_at_charges(self) -> list[str]:
        """Every number that holds a site's row of a round was paid for by it."""
        if not self.claim:
            return []
        read: dict[tuple[str, int], set[tuple[int, ...]]] = {}
        for one in self.opened:
            for site, round, _ in one.rows:
                read.setdefault((site, round), set()).add(one.total_M)
        return [
            f"{site} paid {self.tills[site].paid[site, round]} times for round {round}, of which "
            f"{len(numbers)} numbers were opened"
            for (site, round), numbers in read.items()
            if len(numbers) > self.tills[site].paid[site, round]
        ]

    def _look_at_blame(self, who: str, text: str) -> list[str]:
        """Who refuses says of nobody honest that it did wrong."""
        honest = [name for name in self.keys if name not in self.liars and name != who]
        return [
            f"{who} blames {name}, who did nothing wrong: {text}"
            for name in honest
            if re.search(rf"'{name}' {_WRONG}", text) and not re.search(_OR_ANOTHER, text)
        ]

    def rows_of_liars(self, round: int, names: Collection[str] | None = None) -> dict[str, bytes]:
        """Return shares of rows of nothing, by liars, sites or not, that are otherwise as they should be."""
        model = self.rows[-1].model if self.rows else bytes(32)
        agreed = terms.terms_of(self.facts())
        nothing_M = np.zeros(NUMBERS, np.int64)
        with self.watcher.quiet():
            return {
                name: three_party.share(
                    self.post(name), self.scope(round), nothing_M, agreed, model
                )
                for name in sorted(names or self.liars)
            }

    # A masked round -------------------------------------------------------------------------------

    def terms(self, round: int, told: Sequence[str] = ()) -> masking.MaskingTerms:
        """Return the terms of a masked round: the study's or, of others than it draws, made alike."""
        told = told or self.names
        try:
            return terms.masking_terms(self.facts(), self.run)(told, round)
        except PlanError:
            return loose_terms(self.facts(), self.run)(told, round)

    def play_masked(
        self,
        round: int,
        *,
        told: Sequence[str] | None = None,
        models: Mapping[str, float] | None = None,
        silent: Collection[str] = (),
        lists: Sequence[Collection[str]] = ((),),
        second: Collection[str] = (),
        meddle: Callable[[str, str, bytes], bytes] | None = None,
    ) -> list[Opened]:
        """Play a masked round as a server that lies; return what it could read.

        Args:
            round: its number.
            told: who the sites are told takes part; None: all that do.
            models: by site, which of several models it is sent.
            silent: who is not asked for rows.
            lists: up to two lists of survivors, each as those left out of it.
            second: who is told the second list.
            meddle: (phase, site, message) -> the message that is sent instead.
        """
        told = sorted(told or self.names)
        models = models or {}
        meddle = meddle or (lambda phase, name, message: message)
        agreed = self.terms(round, told)
        scope = self.scope(round)
        server = masking.MaskingServer(self.post(COORDINATOR), agreed, scope)
        honest = [name for name in told if name in self.sites]
        liars = {
            name: masking.Client(self.post(name), agreed, scope, COORDINATOR)
            for name in told
            if name in self.liars
        }

        def ask(
            phase: str, names: Collection[str], messages: Mapping[str, bytes]
        ) -> dict[str, bytes]:
            found = {}
            for name in names:
                message = meddle(phase, name, messages.get(name, b""))
                header = {"phase": phase, "round": round, "told": told}
                answer = self.ask(name, "phase", header, {"message": codec.as_tensor(message)})
                if answer is not None:
                    found[name] = codec.as_bytes(codec.decode(answer)[1]["message"])
            return found

        try:
            # Keys and shares.
            keys = server.keys(
                ask("keys", honest, {}) | {name: one.keys() for name, one in liars.items()}
            )
            came = ask("shares", honest, dict.fromkeys(honest, keys))
            with self.watcher.quiet():
                came |= {name: one.share(keys) for name, one in liars.items()}
            boxes = server.shares(came)

            # Rows.
            before = len(self.rows)
            ready = ask(
                "boxes", [name for name in honest if name in boxes and name not in silent], boxes
            )
            uploads = {name: self.work(name, round, models.get(name, 0)) for name in ready}
            sent = {name: upload for name, upload in uploads.items() if upload is not None}
            model = sha256(self.message(round, 0)).digest()
            nothing_M = np.zeros(agreed.length, np.int64)
            with self.watcher.quiet():
                for name, one in liars.items():
                    sent[name] = one.mask(boxes[name], nothing_M, model)
            rows = self.rows[before:]
        except MedfedError as error:
            self._note_server(server, error)
            return []

        # Lists: a server of its own for each, and liars who sign both.
        found = []
        for number, left_out in enumerate(lists[:2]):
            mine = copy.deepcopy(server)
            twins = copy.deepcopy(liars)
            asked = [
                name for name in sent if name in self.sites and (name in second) == (number == 1)
            ]
            try:
                listed = {name: row for name, row in sent.items() if name not in left_out}
                of_list = next((models.get(name, 0) for name in listed if name in self.sites), 0)
                survivors = mine.rows(listed, sha256(self.message(round, of_list)).digest())
                signed = ask("confirm", asked, dict.fromkeys(asked, survivors))
                signed |= {
                    name: one.confirm(survivors) for name, one in twins.items() if name in listed
                }
                confirmed = mine.confirm(signed)
                parts = ask("unmask", [name for name in asked if name in confirmed], confirmed)
                parts |= {
                    name: one.unmask(confirmed[name])
                    for name, one in twins.items()
                    if name in confirmed
                }
                total_M, _ = mine.unmask(parts)
            except MedfedError as error:
                self._note_server(mine, error)
                continue
            if opened := self.note_sum(total_M, rows):
                found.append(opened)
        return found

    def _note_server(self, server: masking.MaskingServer, error: MedfedError) -> None:
        """What a server that follows the protocol would have said of it: the liar played it."""
        self.server_said = str(error), dict(server.refused)

    # A round among three --------------------------------------------------------------------------

    def open_aggregators(self, study: Study | None = None) -> "Three":
        """Return the three aggregators, asked to join the run."""
        return Three(self, study or self.study)


_WRONG = r"(sent|opened|gave|told|handed|has|lied|signed|did|answered|stopped|shared|leaves|advertised)\b"
_OR_ANOTHER = r"coordinator|on the way|relay|network|carries"


class Three:
    """The three aggregators of a study, as a coordinator that relays what it likes reaches them."""

    def __init__(self, world: World, study: Study) -> None:
        self.world = world
        self.study = study
        self.nodes: dict[str, Aggregator] = {}
        self.greetings: dict[tuple[str, str], list[bytes]] = {}
        self.noises: dict[str, list[Integers]] = {}
        for name in AGGREGATORS:
            self.restart(name)

    def restart(self, name: str, told: Mapping[str, Mapping[str, int]] | None = None) -> None:
        """Start an aggregator anew: it keeps its keys and its record; and ask it to join."""
        self.nodes[name] = Aggregator(name, self.study)
        self.join(name, told)

    def join(self, name: str, told: Mapping[str, Mapping[str, int]] | None = None) -> bool:
        """Ask an aggregator to join the run with what it is told; say whether it does."""
        world = self.world
        if name in world.liars:
            world.records[name] = Record()  # as if it had done nothing yet
            self.nodes[name].record = world.records[name]
        sizes = dict(told or world.told_to.get(name, world.told))
        if self.ask(name, "join", codec.encode(self.joining(sizes))) is None:
            return False
        declared = dict(self.study.privacy.sizes)
        if declared and any(size["train"] != declared.get(one) for one, size in sizes.items()):
            world.faults.append(f"joined: {name} takes sizes that its study does not declare")
        side: Any = self.nodes[name]._side
        side.noise = side.noise and self._noting(name, side.noise)
        return True

    def joining(self, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """Return the question to join, with these participants and sizes."""
        return {
            "run": self.world.run,
            "coordinator": COORDINATOR,
            "participants": list(sizes),
            "sizes": dict(sizes),
            "parameters": NUMBERS,
        }

    def _noting(self, name: str, draw: three_party.Noise) -> three_party.Noise:
        def drawn(length: int, entropy: Any) -> Integers:
            noise_M = draw(length, entropy)
            self.noises.setdefault(name, []).append(noise_M.copy())
            return noise_M

        return drawn

    def ask(self, name: str, op: str, payload: bytes) -> bytes | None:
        """Return what an aggregator answers; None where it refuses, which is noted."""
        try:
            return self.nodes[name].handle(op, payload)
        except MedfedError as error:
            if name not in self.world.liars:
                self.world.errors.append((name, str(error)))
            return None

    def play(
        self,
        round: int,
        uploads: Mapping[str, bytes],
        *,
        instead: Mapping[str, Mapping[str, bytes]] | None = None,
        old_greeting: bool = False,
        stop_at: int | None = None,
        meddle: Callable[[int, str, str, bytes], bytes | None] | None = None,
    ) -> Opened | None:
        """Relay a round; return what was opened.

        Args:
            round: its number.
            uploads: by client, for all three alike.
            instead: by aggregator, what it is given in their place.
            old_greeting: hand the second aggregator the first's greeting of an earlier attempt.
            stop_at: the step from which nothing is carried any more.
            meddle: (step, sender, to, message) -> what is carried instead; None: nothing.
        """
        self.noises.clear()
        header = codec.encode({"round": round})
        for name in AGGREGATORS:
            mine = (instead or {}).get(name, uploads)
            if self.ask(name, "begin", header) is None:
                return None
            for client, upload in mine.items():
                parts = three_party._for_each(client, upload, _ANY_TERMS)
                if parts is not None:
                    self.ask(name, "upload", parts[name])

        answers = {name: self.ask(name, "start", b"") for name in AGGREGATORS}
        for step in itertools.count():
            if None in answers.values():
                return None
            said = {
                name: codec.decode(answer) for name, answer in answers.items() if answer is not None
            }
            if all(header.get("done") for header, _ in said.values()):
                return self._note(round, said)
            if step == stop_at:
                return None
            carried: dict[str, dict[str, Tensor]] = {name: {} for name in AGGREGATORS}
            for sender, (_, tensors) in said.items():
                for to, tensor in tensors.items():
                    if to not in carried:
                        continue
                    message: bytes | None = codec.as_bytes(tensor)
                    if step == 0:
                        before = self.greetings.setdefault((sender, to), [])
                        before.append(message or b"")
                        if old_greeting and (sender, to) == AGGREGATORS[:2] and len(before) > 1:
                            message = before[-2]
                    if meddle:
                        message = meddle(step, sender, to, message or b"")
                    if message is not None:
                        carried[to][sender] = codec.as_tensor(message)
            answers = {
                name: self.ask(name, "step", codec.encode({}, mine))
                for name, mine in carried.items()
            }
        return None

    def _note(
        self, round: int, said: Mapping[str, tuple[dict[str, Any], dict[str, Tensor]]]
    ) -> Opened | None:
        """Add the three parts, and find of what they are the sum."""
        world = self.world
        total_M = np.zeros(NUMBERS, np.uint64)
        weights: dict[str, int] = {}
        for header, tensors in (
            codec.decode(codec.as_bytes(t["result"])) for _, t in said.values()
        ):
            total_M += tensors["part"].numpy().view(np.uint64)
            weights |= header["weights"]
        whole_M = total_M.view(np.int64)
        noise_M = None
        secret = 0
        for name, drawn in self.noises.items():
            noise_M = drawn[-1] + (0 if noise_M is None else noise_M)
            secret += name not in world.liars
        newest = {row.which: row for row in world.rows if weights.get(row.site)}
        opened = world.note_sum(whole_M, list(newest.values()), weights, noise_M, secret)
        if opened and world.facts().rule is None:
            agreed = {
                name: 1 if world.claim else size["train"] for name, size in world.told.items()
            }
            odd = sorted(site for site, _, _ in opened.rows if weights[site] != agreed.get(site))
            if odd:
                world.faults.append(
                    f"opened: rows of {odd} with other weights than sites agreed to"
                )
        return opened


_ANY_TERMS = three_party.SharingTerms(NUMBERS, math.inf, AGGREGATORS)
