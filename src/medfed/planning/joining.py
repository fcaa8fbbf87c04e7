"""Joining a run: what a coordinator says of it, and what each party makes sure of by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self

from medfed.compliance import consortium
from medfed.compliance.consortium import Consortium
from medfed.core.checks import CodecError, PlanError, SignatureError, some
from medfed.planning.resolved import Resolved
from medfed.secure.identity import Roster, Scope
from medfed.secure.record import Record


@dataclass(frozen=True)
class Joining:
    """A run that a coordinator asks a party to join, and whose keys count in it."""

    run: str
    coordinator: str
    roster: Roster

    @classmethod
    def read(cls, header: Mapping[str, Any], members: Consortium | None) -> Self:
        """Return what a question to join says.

        Raises CodecError where it is none, SignatureError or RevokedError where the coordinator is
        none of the roster.

        Args:
            header: the question's: `run`, `coordinator` and, without a list of members, `roster`.
            members: the consortium's list as this party has it; None: the coordinator says whose
            keys count.
        """
        run = header.get("run")
        coordinator = header.get("coordinator")
        if not isinstance(run, str) or not run or not isinstance(coordinator, str):
            raise CodecError(
                f"run={run!r}, coordinator={coordinator!r} are no run to join; expected two names. "
                "Run the same medfed everywhere."
            )
        if members:
            roster = members.roster
        else:
            told = header.get("roster")
            if not isinstance(told, list):
                raise CodecError("roster: expected the public keys of all parties")
            roster = Roster.of(*map(consortium.from_json, told))
        if roster[coordinator].role != "coordinator":
            raise SignatureError(
                f"{coordinator!r} is no coordinator on the list of members, and may not run this "
                "study"
            )
        return cls(run, coordinator, roster)

    def refuse_others(self, facts: Resolved) -> None:
        """Raise SignatureError unless all who are to send rows are sites on the roster, and those
        who hold shares aggregators; PlanError unless all sites take part whom the study declares.

        Who could leave sites out could leave one among its own people, and choose how many are
        taken for such.
        """
        study = facts.study
        participants = facts.participants
        declared = {name for name, size in study.privacy.sizes.items() if size}
        if facts.guarantee and study.sites.kind != "device" and declared != set(participants):
            odd = sorted(declared ^ set(participants))
            raise PlanError(
                f"participants differ from the sites that privacy.sizes declares: {some(odd)}. "
                "Give every party the same study."
            )
        three = study.security.aggregators if study.security.aggregation == "three-party" else ()
        strange = [name for name in three if self.roster[name].role != "aggregator"]
        if strange:
            raise SignatureError(
                f"security.aggregators={some(strange)} are no aggregators on the list of members"
            )
        odd = [name for name in participants if self.roster[name].role != "site"]
        if odd:
            raise SignatureError(
                f"participants={some(odd)} are no sites on the list of members; expected sites "
                "alone, whose rows count"
            )

    def commit(self, record: Record, facts: Resolved) -> None:
        """Write into a party's `record` that it joins this run, on these facts, under this
        coordinator: once, and never on others; without noise in no run of the study on others, as
        two runs that differ by a site tell its row. Raises RecordError for a second way to join.
        """
        head = self.roster[self.coordinator]
        what = sha256(bytes.fromhex(facts.digest) + head.signing + head.sealing).digest()
        record.commit("join", Scope(facts.study.digest(), self.run, 0), what)
        if facts.guarantee is None:
            every = Scope(facts.study.digest(), _EVERY_RUN, 0)
            record.commit("facts", every, bytes.fromhex(facts.digest))


_EVERY_RUN = "*"
