"""Secure aggregation: seconds, bytes and memory of a round, all parties in one process; accuracy
under it; peers.

    python benchmarks/secure.py [--accuracy] [--peers]

Three parties: clients share, aggregators check every row in secret and open the sum, or the Gram
matrix and then the sum. Masked: a tenth of the clients drop out before their rows arrive. `--peers`
adds Flower's SecAgg+ primitives and CKKS by TenSEAL, in an environment of their own
(benchmarks/.venvs/secure, made on first use). `--accuracy` runs the breast-cancer study on 20 seeds
in each way besides.
"""

import json
import resource
import statistics
import subprocess
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import write_result

import medfed
from medfed import study as studies
from medfed.secure import masking, three_party
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.three_party import Selection

HERE = Path(__file__).parent
PARTIES = ("first", "second", "third")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = common.parser(__doc__)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args(argv)
    shapes: list[tuple[int, int, int, float]] = [(10, 200_000, 5, 0.5), (50, 1_000_000, 3, 6.0)]
    gram = (10, 200_000, 5)
    masks = (50, 200_000, 3)

    if options.tiny:
        shapes = [(5, 2000, 1, 0.5)]
        gram = (5, 2000, 1)
        masks = (10, 2000, 1)

    found: dict[str, object] = {}
    for clients, numbers, times, aim in shapes:
        seconds, carried = zip(*(three(clients, numbers, n) for n in range(times)), strict=True)
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
    grams = [three(clients, numbers, n, chosen)[0] for n in range(times)]
    print(
        f"three-party n={clients} M={numbers:,}, Gram matrix opened too: "
        f"{statistics.median(grams):.2f} s (aim 1.5)"
    )
    found[f"three-party {clients} x {numbers}, gram"] = {"seconds": grams}
    clients, numbers, times = masks
    client, unmask, ratio = zip(*(masked(clients, numbers) for _ in range(times)), strict=True)
    print(
        f"masked n={clients} M={numbers:,}: client {1e3 * statistics.median(client):.0f} ms (aim "
        f"50), unmask {statistics.median(unmask):.2f} s (aim 1), upload {ratio[0]:.3f} x"
    )
    found[f"masked {clients} x {numbers}"] = {
        "client_seconds": client,
        "unmask_seconds": unmask,
        "upload_ratio": ratio[0],
    }

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


def masked(clients: int, numbers: int) -> tuple[float, float, float]:
    """Return seconds of one client's whole work, of the server's unmasking, and bytes of an upload
    over a row's.
    """
    names = sorted(f"site {i:02d}" for i in range(clients))
    rows = rows_of(names, numbers)
    posts = posts_of([*names, "server"])
    scope = Scope("study", "run", 1)
    terms = masking.MaskingTerms.choose(names, numbers, 0.1, clients * 3 // 10, b"round 1")
    server = masking.MaskingServer(posts["server"], terms, scope)
    parties = {name: masking.Client(posts[name], terms, scope, "server") for name in names}
    spent = 0.0
    watched = names[-1]

    def each(work: object, among: list[str]) -> dict[str, bytes]:
        nonlocal spent
        found = {}
        for name in among:
            began = time.perf_counter()
            found[name] = work(name)  # type: ignore[operator]
            spent += (time.perf_counter() - began) * (name == watched)
        return found

    keys = server.keys(each(lambda n: parties[n].keys(), names))
    boxes = server.shares(each(lambda n: parties[n].share(keys), names))
    stay = names[clients // 10 :]
    sent = each(lambda n: parties[n].mask(boxes[n], rows[n]), stay)
    told = server.rows(sent)
    confirmed = server.confirm(each(lambda n: parties[n].confirm(told, b"model"), stay))
    given = each(lambda n: parties[n].unmask(confirmed), stay)
    began = time.perf_counter()
    total_M, _ = server.unmask(given)
    unmask = time.perf_counter() - began
    assert (total_M == sum(rows[name] for name in stay)).all()
    return spent, unmask, len(sent[watched]) / (8 * numbers)


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
