"""Secure aggregation: seconds, bytes and memory of a round, all parties in one process; accuracy
under it; peers.

    python benchmarks/secure.py [--accuracy] [--peers] [--masked]

Three parties: clients share, aggregators check every row in secret and open the sum, or the Gram
matrix and then the sum. Masked: a tenth of the clients drop out before their rows arrive, in a
sparse graph a twentieth; whole rounds of 49 hospitals with a short row, and bytes that a site sends
in each way, beside a row in plain sight; `--masked` measures these alone. `--peers` adds Flower's
SecAgg+ primitives and CKKS by TenSEAL, in an environment of their own (benchmarks/.venvs/secure,
made on first use). `--accuracy` runs the breast-cancer study on 20 seeds
in each way besides.
"""

import json
import resource
import statistics
import subprocess
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import write_result

import medfed
from medfed import study as studies
from medfed.secure import masking, three_party
from medfed.secure.agreements import Agreements
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.three_party import Selection

HERE = Path(__file__).parent
PARTIES = ("first", "second", "third")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = common.parser(__doc__)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--masked", action="store_true", help="masked rounds alone")
    options = parser.parse_args(argv)
    shapes: list[tuple[int, int, int, float]] = [(10, 200_000, 5, 0.5), (50, 1_000_000, 3, 6.0)]
    gram = (10, 200_000, 5)
    masks = (50, 200_000, 3)
    sparse = (1000, 1000, 1)
    short = (49, 31, 6)

    if options.tiny:
        shapes = [(5, 2000, 1, 0.5)]
        gram = (5, 2000, 1)
        masks = (10, 2000, 1)
        sparse = (150, 20, 1)
        short = (5, 31, 2)

    if options.masked:
        rounds = measure_masks(masks, sparse, short)
        if not options.tiny:
            write_result("masked", rounds)
        return

    found: dict[str, object] = {}
    for clients, numbers, times, aim in shapes:
        seconds, carried = zip(*(three(clients, numbers, n + 1) for n in range(times)), strict=True)
        middle = statistics.median(seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"three-party n={clients} M={numbers:,}: {middle:.2f} s (aim {aim}), "
            f"upload {carried[0]:.3f} x, {peak:.2f} GiB"
        )
        found[f"three-party {clients} x {numbers}"] = {
            "seconds": seconds,
            "upload_ratio": carried[0],
            "peak_gib": peak,
        }

    clients, numbers, times = gram
    chosen = Selection(lambda gram_KK: np.full(len(gram_KK), 1 / len(gram_KK)))
    grams = [three(clients, numbers, n + 1, chosen)[0] for n in range(times)]
    print(
        f"three-party n={clients} M={numbers:,}, Gram matrix opened too: "
        f"{statistics.median(grams):.2f} s (aim 1.5)"
    )
    found[f"three-party {clients} x {numbers}, gram"] = {"seconds": grams}
    rounds = measure_masks(masks, sparse, short)
    found |= rounds
    of_masks = rounds[f"masked {masks[0]} x {masks[1]}"]
    client, unmask = (of_masks[kind] for kind in ("client_seconds", "unmask_seconds"))
    if options.peers:
        found["peers"] = peer = peers()
        for what, ours in (("client", client), ("unmask", unmask)):
            theirs = statistics.median(peer[what])
            print(
                f"Flower's {what}: {theirs:.2f} s, {theirs / statistics.median(ours):.1f} times "
                "ours (aim 10)"
            )
        ckks = peer["ckks"]
        print(
            f"CKKS (TenSEAL): encrypt {1e3 * ckks['encrypt']:.0f} ms a client, add "
            f"{ckks['add']:.2f} s, decrypt {ckks['decrypt']:.2f} s, upload "
            f"{ckks['bytes'] / 1.6e6:.1f} x"
        )

    if options.accuracy:
        found["accuracy"] = accuracy()
    if not options.tiny:
        write_result("secure", found)


def measure_masks(
    masks: tuple[int, int, int], sparse: tuple[int, int, int], short: tuple[int, int, int]
) -> dict[str, Any]:
    """Measure masked rounds of three shapes (clients, numbers, rounds) and bytes; print and return
    them.
    """
    found: dict[str, Any] = {}
    for (clients, numbers, times), leave, aims in ((masks, 0.1, (30, 1)), (sparse, 0.05, (100, 2))):
        done = masked(clients, numbers, times, 0.1, leave)
        found[f"masked {clients} x {numbers}"] = many = done
        client, unmask = (
            statistics.median(done[kind]) for kind in ("client_seconds", "unmask_seconds")
        )
        print(
            f"masked n={clients} M={numbers:,}, {done['neighbours']} neighbours: client "
            f"{1e3 * client:.0f} ms (aim {aims[0]}), in its first round "
            f"{1e3 * done['first_seconds'][0]:.0f}; unmask {unmask:.2f} s (aim {aims[1]}), "
            f"upload {done['upload_ratio']:.3f} x"
        )
    clients, numbers, times = short
    done = masked(clients, numbers, times, 0.35, 0.0)
    found[f"masked {clients} x {numbers}"] = done
    print(
        f"masked n={clients} M={numbers}: a whole round {statistics.median(done['round_seconds']):.2f}"
        f" s in one process (aim .5), the first {done['round_seconds'][0]:.2f}"
    )
    found["bytes"] = sent = {
        f"M={size:,}": count_bytes(size, short, done["bytes"], sparse, many["bytes"])
        for size in (short[1], masks[1])
    }
    for shape, ways in sent.items():
        print(f"bytes that a site sends in a round, {shape}: {ways}")
    return found


def rows_of(names: list[str], numbers: int) -> dict[str, np.ndarray]:
    """Return rows of norm 2^24."""
    random = np.random.default_rng(0)
    return {
        name: (random.standard_normal(numbers) * 2**24 * 0.9 / numbers**0.5).astype(np.int64)
        for name in names
    }


def posts_of(names: list[str]) -> dict[str, Post]:
    """Return parties that know each other."""
    keys = [Identity.new(name, "site") for name in names]
    roster = Roster.of(*(key.public for key in keys))
    return {key.name: Post(key, roster) for key in keys}


def peers() -> dict[str, Any]:
    """Return what Flower's primitives and TenSEAL take on rows of the same length, with as many
    neighbours as ours.
    """
    folder = HERE / ".venvs/secure"
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "flwr==1.23.0", "tenseal==0.3.18"],
            check=True,
        )
    degree = masking.MaskingTerms.choose([f"{i:02d}" for i in range(50)], 200_000, 0.1, 15).degree
    command = [str(python), str(HERE / "peers/secure_peers.py"), f"--neighbours={degree}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def three(
    clients: int, numbers: int, round: int, selection: Selection | None = None
) -> tuple[float, float]:
    """Return seconds of a round, and bytes of an upload over a plain row's."""
    names = [f"site {i}" for i in range(clients)]
    rows = rows_of(names, numbers)
    posts = posts_of([*names, *PARTIES])
    terms = three_party.SharingTerms(numbers, 2.0**24, PARTIES)
    began = time.perf_counter()
    opened = three_party.run_protocol(
        posts, Scope("study", "run", round), rows, terms, selection=selection
    )
    seconds = time.perf_counter() - began
    assert selection or (opened.total_M == sum(rows.values())).all()
    upload = three_party.share(posts[names[0]], Scope("study", "run", 10**6), rows[names[0]], terms)
    return seconds, len(upload) / (8 * numbers)


def masked(clients: int, numbers: int, rounds: int, gone: float, leave: float) -> dict[str, Any]:
    """Return what rounds take whose lines are kept, in seconds of the processor (all of it is one
    thread, and others on the machine do not count): one client's whole work (the first round, where
    it meets the others, apart), the server's unmasking and all parties; bytes
    that the client sends by phase, and those of its upload over a row's.

    A share `gone` may drop out, and a share `leave` does before its rows arrive. 30 % may lie.
    """
    names = sorted(f"site {i:04d}" for i in range(clients))
    rows = rows_of(names, numbers)
    posts = posts_of([*names, "server"])
    terms = masking.MaskingTerms.choose(names, numbers, gone, clients * 3 // 10, b"round")
    lines = {name: Agreements() for name in names}
    stay = names[int(clients * leave) :]
    watched = names[-1]
    spent: list[float] = []
    unmasking: list[float] = []
    whole: list[float] = []
    sent: dict[str, int] = {}

    for number in range(1, rounds + 2):
        scope = Scope("study", "run", number)
        parties = {
            name: masking.Client(posts[name], terms, scope, "server", lines=lines[name])
            for name in names
        }
        server = masking.MaskingServer(posts["server"], terms, scope)
        spent.append(0.0)
        started = time.process_time()

        def each(phase: str, work: Callable[[str], bytes], among: list[str]) -> dict[str, bytes]:
            said = {}
            for name in among:
                began = time.process_time()
                said[name] = work(name)
                spent[-1] += (time.process_time() - began) * (name == watched)
            sent[phase] = len(said[watched])
            return said

        told = server.keys(each("keys", lambda n, c=parties: c[n].keys(), names))
        if terms.sparse:
            told = server.reveal(each("reveal", lambda n, c=parties, t=told: c[n].reveal(t), names))
        boxes = server.shares(each("shares", lambda n, c=parties, t=told: c[n].share(t), names))
        uploads = each(
            "rows", lambda n, c=parties, b=boxes: c[n].mask(b[n], rows[n], b"model"), stay
        )
        told = server.rows(uploads, b"model")
        confirmed = server.confirm(
            each("confirm", lambda n, c=parties, t=told: c[n].confirm(t), stay)
        )
        given = each("unmask", lambda n, c=parties, t=confirmed: c[n].unmask(t[n]), stay)
        began = time.process_time()
        total_M, _ = server.unmask(given)
        unmasking.append(time.process_time() - began)
        whole.append(time.process_time() - started)
        assert (total_M == sum(rows[name] for name in stay)).all()

    return {
        "first_seconds": spent[:1],
        "client_seconds": spent[1:],
        "unmask_seconds": unmasking,
        "round_seconds": whole,
        "neighbours": terms.degree,
        "upload_ratio": sent["rows"] / (8 * numbers),
        "bytes": sent,
    }


def count_bytes(
    size: int,
    few: tuple[int, int, int],
    sent_few: dict[str, int],
    many: tuple[int, int, int],
    sent_many: dict[str, int],
) -> dict[str, int]:
    """Return the bytes that one site sends in a round of rows of `size` numbers, by way; of masked
    rounds from what was sent in rounds of other rows, as those have 8 bytes a number.
    """
    names = [f"site {i:04d}" for i in range(3)]
    posts = posts_of([*names, *PARTIES])
    terms = three_party.SharingTerms(size, 2.0**24, PARTIES)
    row = rows_of(names[:1], size)[names[0]]
    upload = three_party.share(posts[names[0]], Scope("study", "run", 1), row, terms)
    return {
        "plain": 4 * size,
        f"masked, {few[0]} sites": sum(sent_few.values()) + 8 * (size - few[1]),
        f"masked, {many[0]} sites": sum(sent_many.values()) + 8 * (size - many[1]),
        "three-party": len(upload),
    }


def accuracy(seeds: int = 20) -> dict[str, object]:
    """Return mean and deviation of test accuracy over seeds, by way of aggregation, at the study's
    epsilon.
    """
    base = (
        studies.load("breast-cancer")
        .set("monitor.baselines", False)
        .set("monitor.evaluate_every", 30)
    )
    found: dict[str, object] = {}
    for way in ("plain", "three-party", "masked"):
        study = base.set("security.aggregation", way)
        every = [
            medfed.simulate(study.set("study.seed", seed)).summary["test"]["accuracy"]
            for seed in range(seeds)
        ]
        print(f"accuracy, {way}: {np.mean(every):.4f} +- {np.std(every):.4f}")
        found[way] = every
    return found


if __name__ == "__main__":
    main()
