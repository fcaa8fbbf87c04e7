"""What a party has done once for ever: of each run and act the last round, and what it was for.

Whoever asks twice, out of turn or for something else gets nothing more, also after a restart: a
party whose keys outlast a run keeps its record beside them. One whose keys end with the process
needs no file, as nothing that was made for those keys opens for others.
"""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from medfed.core import codec, files
from medfed.core.checks import RecordError
from medfed.secure.identity import Scope

_FORM = "medfed record 1"

ROUNDS = ("list", "rows", "weights")
"""Acts by which it is written down of which rows a round is."""


class Record:
    """A party's record: on disk before a commitment returns, where it has a `path`."""

    def __init__(self, path: Path | None = None) -> None:
        """Set up the record in a file, or in memory alone; nothing is read yet."""
        self.path = path
        self._runs: dict[str, dict[str, tuple[int, str, list[str]]]] = {}
        self._answer: tuple[bytes, bytes] | None = None

    def last(self, act: str, study: str, run: str) -> tuple[int, bytes]:
        """Return the last round of an act in a run, and what it was done for; round 0 for none."""
        self._read()
        round, what, _ = self._find(act, study, run)
        return round, bytes.fromhex(what)

    def names(self, act: str, scope: Scope) -> list[str] | None:
        """Return whom an act of this scope was done with; None where it was not done."""
        self._read()
        round, what, names = self._find(act, scope.study, scope.run)
        return names if what and round == scope.round else None

    def _find(self, act: str, study: str, run: str) -> tuple[int, str, list[str]]:
        return self._runs.get(_name(study, run), {}).get(act, (0, "", []))

    def refuse_behind(self, scope: Scope) -> None:
        """Raise RecordError where any act of a later round of this run was done.

        Guarantee: what was begun for a round and not ended goes no further once this party has
        answered a later one, in whatever process: a round that was given up is not opened beside
        the rounds that followed it.
        """
        self._read()
        acts = self._runs.get(_name(scope.study, scope.run), {})
        last = max((round for round, _, _ in acts.values()), default=0)
        if last > scope.round:
            raise RecordError(
                f"round={scope.round} is over (run {scope.run!r}): round {last} was begun since, "
                "and none before it is opened any more"
            )

    def commit(self, act: str, scope: Scope, what: bytes, names: Sequence[str] = ()) -> None:
        """Write down that an act of this scope is done for `what`, 32 bytes, with these `names`.

        Guarantee: of one act in one run, rounds never fall, and a round has one `what`; so for
        whoever holds this file, also after a crash between here and the act itself.

        Edge cases:
        - a round before the last, or the last one for something else: RecordError, nothing written;
        - the same again passes: what is repeated must then be the same bytes;
        - a file that cannot be read is a RecordError, never an empty record;
        - a file that was put back to an older state is not noticed: keep it out of backups that
          are restored alone;
        - two processes with one record: the second is refused while the first writes.

        Raises RecordError, and WriteError where the disk refuses.
        """
        if self.path is None:
            self._commit(act, scope, what, names)
            return
        files.make_folder(self.path.parent)
        with files.hold(self.path.parent, f".{self.path.name}.lock"):
            self._read()
            if self._commit(act, scope, what, names):
                files.write(
                    self.path, json.dumps({"form": _FORM, "runs": self._runs}), private=True
                )

    def _commit(self, act: str, scope: Scope, what: bytes, names: Sequence[str]) -> bool:
        """Return whether anything is new."""
        acts = self._runs.setdefault(_name(scope.study, scope.run), {})
        round, before, _ = acts.get(act, (0, "", []))
        if (scope.round, what.hex()) == (round, before):
            return False
        if scope.round < round or (scope.round == round and before):
            kind = "for something else" if scope.round == round else "after it"
            way = "start a new run"
            if act in ROUNDS and scope.round == round:
                way = "bring who is missing back, or give the round up (`medfed give-up RUN`)"
            raise RecordError(
                f"round={scope.round}: {act} was done {kind} already (round {round}, run "
                f"{scope.run!r}), and is done once; {way}"
            )
        acts[act] = (scope.round, what.hex(), list(names))
        return True

    def keep(self, scope: Scope, what: bytes, answer: bytes, memory: Mapping[str, Tensor]) -> None:
        """Keep the answer of a round, in place of the last, so that a repeated question gets it.

        Args:
            scope: of the round.
            what: what was answered, 32 bytes.
            answer: the bytes that leave the party.
            memory: what the party will remember if its row counts.
        """
        blob = codec.encode({}, {"answer": codec.as_tensor(answer), **memory})
        key = _key(scope, what)
        self._answer = key, blob
        if self.path is not None:
            files.write(self._beside, key + sha256(blob).digest() + blob, private=True)

    def recall(self, scope: Scope, what: bytes) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return the answer that was kept, and the memory beside it; None for another question's,
        which is let go of.
        """
        key = _key(scope, what)
        if self._answer is None or self._answer[0] != key:
            self._answer = self._load(key)
        if self._answer is None:
            return None
        _, tensors = codec.decode(self._answer[1])
        return codec.as_bytes(tensors.pop("answer")), tensors

    def _load(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Return what is kept on disk under a key."""
        if self.path is None or not self._beside.exists():
            return None
        with files.explained(self._beside), open(self._beside, "rb") as file:
            if file.read(32) != key:
                return None
            digest = file.read(32)
            blob = file.read()
        if sha256(blob).digest() != digest:
            raise RecordError(
                f"{self._beside} is damaged; restore it, or start a new run without it"
            )
        return key, blob

    @property
    def _beside(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".answer")

    def _read(self) -> None:
        if self.path is None or not self.path.exists():
            return
        with files.explained(self.path):
            text = self.path.read_text(encoding="utf-8")
        try:
            found = json.loads(text)
            if found["form"] != _FORM:
                raise ValueError(f"form={found['form']!r}")
            self._runs = {
                run: {
                    act: (_whole(round), bytes.fromhex(what).hex(), list(map(str, names)))
                    for act, (round, what, names) in acts.items()
                }
                for run, acts in found["runs"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecordError(
                f"{self.path} is no record of secure rounds ({error}); restore it. Without it this "
                "party cannot know what it has done: give it new keys."
            ) from error


def _whole(round: object) -> int:
    if type(round) is not int:
        raise ValueError(f"round={round!r}")
    return round


def _name(study: str, run: str) -> str:
    return f"{study} {run}"


def _key(scope: Scope, what: bytes) -> bytes:
    return sha256(json.dumps([scope.study, scope.run, scope.round, what.hex()]).encode()).digest()
