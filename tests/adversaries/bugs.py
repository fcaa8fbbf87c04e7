"""Bugs to plant: each takes one check out of the product, everywhere that it is made."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from pytest import MonkeyPatch

from medfed.core import codec
from medfed.core.entropy import Entropy
from medfed.node import work
from medfed.planning import resolved, terms
from medfed.planning.joining import Joining
from medfed.rounds import aggregator
from medfed.secure import line, masking, party, three_party
from medfed.secure.chain import Follower
from medfed.secure.identity import Scope
from medfed.secure.record import Record
from tests.adversaries.world import loose_terms


def forget(*acts: str) -> Callable[[MonkeyPatch], None]:
    """Return the bug of a party that writes none of these acts down."""

    def plant(patch: MonkeyPatch) -> None:
        commit = Record.commit

        def lose(self: Record, act: str, scope: Scope, what: bytes, *names: Any) -> None:
            if act not in acts:
                commit(self, act, scope, what, *names)

        patch.setattr(Record, "commit", lose)

    plant.__name__ = f"forget_{'_'.join(acts)}"
    return plant


def record_nothing(patch: MonkeyPatch) -> None:
    patch.setattr(Record, "commit", lambda self, *said: None)


def believe_who_takes_part(patch: MonkeyPatch) -> None:
    patch.setattr(terms, "masking_terms", loose_terms)


def take_anybody_for_a_site(patch: MonkeyPatch) -> None:
    patch.setattr(Joining, "refuse_others", lambda self, participants: None)
    patch.setattr(party.Masker, "_refuse_strangers", lambda self, agreed: None)
    patch.setattr(three_party.SharingAggregator, "_refuse_stranger", lambda self, client: None)


def mask_without_the_model(patch: MonkeyPatch) -> None:
    real = masking._pair_seed
    patch.setattr(masking, "_pair_seed", lambda *said: real(*said[:-1], b""))


def share_without_the_model(patch: MonkeyPatch) -> None:
    real = three_party.share
    patch.setattr(
        three_party,
        "share",
        lambda post, scope, row_M, agreed, model: real(post, scope, row_M, agreed),
    )


def share_without_the_facts(patch: MonkeyPatch) -> None:
    real = terms.terms_of
    patch.setattr(terms, "terms_of", lambda facts: replace(real(facts), facts=bytes(32)))


def keep_one_key_for_the_line(patch: MonkeyPatch) -> None:
    def connect(self: Any, publics: Mapping[str, bytes], said: object) -> None:
        seeds = {}
        for name in (self.left, self.right):
            key = sha256(f"{sorted((self.me, name))}".encode() + self._purpose).digest()
            self._keys[name] = line.AESGCM(key)
            seeds[name] = sha256(key).digest()
        self._seeds = seeds[self.left], seeds[self.right]

    patch.setattr(line.Line, "connect", connect)


def believe_sizes(patch: MonkeyPatch) -> None:
    patch.setattr(resolved, "_refuse_other_sizes", lambda study, told: None)


def take_a_second_model(patch: MonkeyPatch) -> None:
    forget("model")(patch)
    patch.setattr(Follower, "_check", lambda self, round, body: None)


def draw_noise_afresh(patch: MonkeyPatch) -> None:
    patch.setattr(
        three_party.SharingAggregator, "_entropy", lambda self, what, scope, fixed: Entropy()
    )


def draw_noise_of_the_round_alone(patch: MonkeyPatch) -> None:
    """And let a round be of other shares when it is played again."""
    forget("rows", "weights")(patch)
    patch.setattr(
        three_party.SharingAggregator,
        "_entropy",
        lambda self, what, scope, fixed: Entropy(self.post.me.derive(f"{what} {scope}".encode())),
    )


def open_uploads_of_any_study(patch: MonkeyPatch) -> None:
    """An aggregator opens what is sealed to it, wherever that was meant for."""
    share_without_the_facts(patch)
    check = three_party.check
    purpose = three_party._purpose
    patch.setattr(
        three_party, "check",
        lambda envelope, sender, scope, kind, to: check(envelope, sender, _scope_of(envelope), kind, to),
    )  # fmt: skip
    patch.setattr(three_party, "_purpose", lambda scope, client: purpose(Scope("", "", 0), client))


def _scope_of(envelope: bytes) -> Scope:
    end = envelope.index(b"}") + 1
    said = json.loads(envelope[16:end])
    return Scope(said["study"], said["run"], said["round"])


def open_any_number_of_rows(patch: MonkeyPatch) -> None:
    real = terms.terms_of
    patch.setattr(terms, "terms_of", lambda facts: replace(real(facts), fewest=1))


def keep_any_number_of_honest_rows(patch: MonkeyPatch) -> None:
    """A rule keeps as many rows as must be in a sum, of which those who collude know their own."""
    real = terms.terms_of
    patch.setattr(
        terms,
        "terms_of",
        lambda facts: replace(real(facts), fewest_kept=facts.study.security.min_group),
    )


def confirm_any_number_of_rows(patch: MonkeyPatch) -> None:
    """Masked: as few as hold the shares that rebuild a seed, and those who collude count."""
    patch.setattr(terms, "least_rows", lambda study, n: n // 2 + 1)
    patch.setattr(terms, "colluding", lambda study, n: 0)


def answer_unpaid(patch: MonkeyPatch) -> None:
    patch.setattr(work, "charge", lambda sites, round: {})


def leave_noise_to_the_others(patch: MonkeyPatch) -> None:
    """An aggregator whose study claims noise adds none."""
    real = terms.aggregator_of
    patch.setattr(aggregator, "aggregator_of", lambda *said: replace(real(*said), noise=None))


def believe_the_inner_round(patch: MonkeyPatch) -> None:
    """A model counts for the round that it says, whatever round it was signed for."""

    def accept(sites: Sequence[Any], header: Any, tensors: Any) -> Any:
        message = b""
        refused = {}
        for site in sites:
            try:
                envelope = codec.as_bytes(tensors["signed"])
                message = work._party(site).follower.accept(header["round"], envelope)
            except work.MedfedError as error:
                refused[site.name] = work.SiteError(str(error))
        if not message:
            return header, {}, refused
        return (*codec.decode(message), refused)

    patch.setattr(work, "_accept_signed", accept)


def seal_under_one_nonce_and_key(patch: MonkeyPatch) -> None:
    """Boxes between two clients are sealed under a key of the two alone, in every round."""

    def seal(self: Any, purpose: str, sender: str, to: str) -> bytes:
        return sha256(f"{purpose} {sorted((sender, to))}".encode()).digest()

    patch.setattr(masking.Client, "_line_key", seal)


MASKED = (
    record_nothing,
    forget("list"),
    believe_who_takes_part,
    take_anybody_for_a_site,
    mask_without_the_model,
    take_a_second_model,
    confirm_any_number_of_rows,
    answer_unpaid,
    seal_under_one_nonce_and_key,
)
SHARED = (
    record_nothing,
    forget("rows", "weights"),
    take_anybody_for_a_site,
    share_without_the_model,
    share_without_the_facts,
    keep_one_key_for_the_line,
    believe_sizes,
    draw_noise_afresh,
    draw_noise_of_the_round_alone,
    open_uploads_of_any_study,
    open_any_number_of_rows,
    answer_unpaid,
    leave_noise_to_the_others,
    believe_the_inner_round,
)
