"""Thousands of small sites in one process: opening, preparing, five rounds and their tests.

    python benchmarks/many_sites.py [--sites 5000] [--repeats 3] [--devices]

5,000 sites of 4 rows (six numbers, a category, gaps), 500 drawn a round, 5 rounds, each tested at
every site. One study without privacy (robust scaling, which sites agree on) and one under a claim
with joint noise, in which every site takes part; `--devices` runs 9,172 thyroid records besides,
each on a device of its own (MEDFED_DATA names the data folder). The control opens each site by
itself, and asks, encodes and tests each by itself, on a part of the sites: told for all of them, in
the same run.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import common
import numpy as np
import pandas as pd
import torch
from common import table, write_result

import medfed
from medfed.data import sources
from medfed.monitor.events import Event, Log, Planned, RoundFinished, Tested
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
from medfed.planning.plan import Plan
from medfed.rounds.prepare import prepare
from medfed.rounds.round import test
from medfed.runs import simulation
from medfed.study import Study

ROWS = 4
ROUNDS = 5
CONTROL = 100
STAGES = ("opening", "preparing", "a round", "a test", "all", "all, of the processor")

STUDY = """
[study]
name = "many sites"
[data]
table = "many.csv"
target = "ill"
site = "site"
patient = "id"
preprocess = "{preprocess}"
{split}
test_is_public = true
[data.dictionary.ill]
categories = ["no", "yes"]
[data.dictionary.ward]
categories = ["er", "icu", "ward"]
{ranges}
[training]
rounds = {rounds}
local_epochs = 1
batch_size = 0
learning_rate = 0.5
[fleet]
clients_per_round = {drawn}
[monitor]
baselines = false
evaluate_every = 1
{privacy}
"""
PRIVACY = """
[privacy]
epsilon = 8.0
delta = 1e-6
noise = "shared"
scope = "run"
[privacy.sizes]
{sizes}
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sites", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--devices", action="store_true", help="9,172 thyroid records, each a device, besides"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    sites, repeats = (40, 1) if args.tiny else (args.sites, args.repeats)

    with tempfile.TemporaryDirectory() as folder:
        studies = {
            "without privacy": written(Path(folder), sites, False),
            "shared noise": written(Path(folder), sites, True),
        }
        if args.devices:
            studies["thyroid devices"] = medfed.load_study("thyroid-devices")._with(
                {
                    "training.rounds": ROUNDS,
                    "monitor.evaluate_every": 1,
                    "fleet.groups": 1,
                    "fleet.schedule": "random",
                    "privacy.correlated": False,
                }
            )

        seconds: dict[str, dict[str, list[float]]] = {
            name: {stage: [] for stage in STAGES} for name in studies
        }
        for _ in range(repeats):
            for name, study in studies.items():
                for stage, took in measured(study).items():
                    seconds[name][stage].append(took)

        alone = one_by_one(studies["without privacy"], sites, 5 if args.tiny else CONTROL)

    report(sites, seconds, alone)
    if not args.tiny:
        found = {"seconds": seconds, "one by one, told for all": alone}
        write_result("many-sites", {"sites": sites, "rows": ROWS, "rounds": ROUNDS, **found})


def written(folder: Path, sites: int, private: bool) -> Study:
    """Write the table and a study of it; return the study."""
    random = np.random.default_rng(0)
    n = sites * ROWS
    frame = pd.DataFrame(random.normal(size=(n, 6)).round(3), columns=[f"x{i}" for i in range(6)])
    risk = 1 / (1 + np.exp(-2 * frame["x0"] + frame["x1"]))
    frame = frame.mask(random.random(frame.shape) < 0.05).assign(
        ward=random.choice(["er", "icu", "ward"], n),
        ill=np.where(random.random(n) < risk, "yes", "no"),
        fold=np.tile(["train", "train", "train", "test"], sites),
        site=[f"clinic {i // ROWS:05d}" for i in range(n)],
        id=[f"p{i:06d}" for i in range(n)],
    )
    frame.to_csv(folder / "many.csv", index=False)
    sizes = "\n".join(f'"clinic {i:05d}" = {ROWS}' for i in range(sites))
    text = STUDY.format(
        preprocess="dictionary" if private else "robust",
        split='test = "fold"'
        if private
        else 'split = "stratified"\nfeatures = ["x0", "x1", "x2", "x3", "x4", "x5", "ward"]',
        ranges="\n".join(f"[data.dictionary.x{i}]\nrange = [-5.0, 5.0]" for i in range(6))
        if private
        else "",
        rounds=ROUNDS,
        drawn=0 if private else max(1, sites // 10),
        privacy=PRIVACY.format(sizes=sizes) if private else "",
    )
    path = folder / f"{'private' if private else 'plain'}.toml"
    path.write_text(text)

    return medfed.load_study(path)


def measured(study: Study) -> Mapping[str, float]:
    """Run a study in memory; return the seconds of each stage."""
    rounds: list[float] = []
    tests: list[float] = []
    prepared: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Planned):
            prepared.append(time.perf_counter())
        if isinstance(event, RoundFinished):
            rounds.append(event.seconds)
        if isinstance(event, Tested):
            tests.append(event.seconds)

    began = time.perf_counter()
    used = time.process_time()
    opened = [began]
    real = simulation.open_sites

    def open_sites(*args: object, **more: object) -> list[Site]:
        sites = real(*args, **more)  # type: ignore[arg-type]
        opened.append(time.perf_counter())
        return sites

    simulation.open_sites = open_sites
    try:
        medfed.simulate(study, listeners=[listen])
    finally:
        simulation.open_sites = real
    ended = time.perf_counter()
    return {
        "opening": opened[-1] - began,
        "preparing": prepared[0] - opened[-1],
        "a round": median(rounds),
        "a test": median(tests),
        "all": ended - began,
        "all, of the processor": time.process_time() - used,
    }


def one_by_one(study: Study, sites: int, part: int) -> dict[str, float]:
    """Return the seconds of stages in which each site is served by itself, of `part` sites, as of
    all.
    """
    frames, data = sources.frames(study)
    study = dataclasses.replace(study, data=data)
    took = {}

    def timed(stage: str, once: Callable[[], object]) -> None:
        began = time.perf_counter()
        once()
        took[stage] = (time.perf_counter() - began) * sites / part

    opened: list[Site] = []
    timed(
        "opening",
        lambda: opened.extend(Site.open(name, frames[name], study) for name in list(frames)[:part]),
    )
    fleet = OneByOne(opened)
    few = study.set("fleet.clients_per_round", 0)
    plans: list[Plan] = []
    timed("preparing", lambda: plans.append(prepare(few, fleet, fleet.sites())))
    timed("a test", lambda: test(plans[0].begin(), plans[0], fleet, Log()))
    return took


class OneByOne(InProcess):
    """Sites that are asked one after the other, as if each were a stack of one."""

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Ask each site by itself."""
        tickets: list[int] = []
        for site in sites:
            tickets += super().submit_many([site], op, payload, deadline)
        return tickets


def report(
    sites: int, seconds: Mapping[str, Mapping[str, Sequence[float]]], alone: Mapping[str, float]
) -> None:
    """Print a line a study: the median seconds of each stage; below it the control."""
    rows = [
        [name, *(f"{median(stages[stage]):.2f}" for stage in STAGES)]
        for name, stages in seconds.items()
    ]
    rows.append(
        [
            "control: one by one",
            *(f"{alone[stage]:.2f}" if stage in alone else "-" for stage in STAGES),
        ]
    )
    print(f"{sites:,} sites of {ROWS} rows, {ROUNDS} rounds, median seconds")
    print(table(["study", *STAGES], rows))


if __name__ == "__main__":
    main()
