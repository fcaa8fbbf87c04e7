"""The study file: the whole description of one federation, as frozen dataclasses.

A study is TOML. Each table is one dataclass here, each key one field; `docs/study.md` is generated from them. A key
that is not here does not exist: it is refused with the nearest right name. What a later version adds is added here.
"""

import dataclasses
import hashlib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from medfed.core import decision, toml
from medfed.core.checks import StudyError, closest, nearest, some
from medfed.core.refusals import LEAVE_OUT, Refusal, refuse
from medfed.core.toml import Ask

_T = TypeVar("_T")

LEAST_CLIP = 1e-6
"""Least clipping norm: a smaller one would weigh rounding as if it were a gradient."""


LARGEST = 3e38
"""Largest end of a range: about what float32 has."""


def _key(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class About:
    """What the study is."""

    name: str = _key("", "Name of the study; default: the file's name.")
    purpose: str = _key(
        "HRESCH", "Purpose of use, an HL7 v3 ActReason code, told in events and summary; HRESCH is healthcare research."
    )
    seed: int = _key(0, "Seed of split, partition, initial weights, batch order and dropout. Same seed, same bits.")


@dataclass(frozen=True)
class Feature:
    """What is publicly known of one feature, before any patient is looked at: an entry of the data dictionary."""

    range: tuple[float, ...] = _key(
        (),
        "Plausible [low, high]: a feature's values beyond it are held to its ends, and told; with preprocess = "
        "'dictionary' it maps to [-2, 2]. A target is held to it under a privacy claim alone.",
    )
    log: bool = _key(False, "Take the logarithm first; values are floored at low, or at 1 % of high where low is 0.")
    categories: tuple[str, ...] = _key((), "The categories of a text feature, in order; others count as missing.")
    missing: tuple[str, ...] = _key((), "Texts that mean 'not measured' for this feature, besides data.missing_values.")
    indicator: bool = _key(
        False, "One more column, 1 where the value is missing; under a privacy claim only declared ones exist."
    )
    recode: dict[str, str] = field(
        default_factory=dict,
        hash=False,
        metadata={
            "doc": "Texts that mean another: recode = { Yes = 'yes', \"1\" = 'yes' }; a feature's or the target's. "
            "Before anything else is read of a cell; a number is compared as 1, not 1.0. An empty text means 'not "
            "measured'."
        },
    )
    suffix: tuple[str, ...] = _key(
        (), "What stands behind the numbers of this column, and is taken off: suffix = ['%', 'mg/l']."
    )
    numbers: Literal["", "1,5", "1.234,5", "1 234,5", "1'234,5", "1,234.5", "1 234.5", "1'234.5"] = _key(
        "", "How this column's texts spell numbers, where the table spells them otherwise: '1,5' for 4,2 in a workbook."
    )
    boolean: bool = _key(
        False,
        "Yes or no in any spelling (y/n, true/false, t/f, 1/0, ja/nein, oui/non, sí/no, +/-, pos/neg): the cells "
        "become the categories 'no' and 'yes'.",
    )
    factor: float = _key(1.0, "Numbers are multiplied by it, into the study's unit; `range` is of the result.")
    offset: float = _key(
        0.0, "Added to a number after `factor`: factor = 0.5556, offset = -17.78 for degrees Fahrenheit."
    )
    limits: Literal["", "limit", "half", "indicator"] = _key(
        "",
        "What a result beyond a detection limit (<0.3, > 100, ≤ 5) becomes. limit: the limit; half: half of a lower "
        "one, an upper one itself; indicator: the limit, and beside it two columns of 0 and 1, `NAME below limit` and "
        "`NAME above limit`. Without it such a cell is refused.",
    )
    date: Literal[
        "",
        "iso",
        "dd.mm.yyyy",
        "dd/mm/yyyy",
        "dd-mm-yyyy",
        "mm/dd/yyyy",
        "mm-dd-yyyy",
        "mm.dd.yyyy",
        "yyyy/mm/dd",
        "yyyy.mm.dd",
        "yyyymmdd",
    ] = _key(
        "",
        "How the column writes its dates; a time of day may follow. Never guessed. A column with a date and without "
        "`becomes` is no feature: it may be another's `reference`, or `data.time`.",
    )
    becomes: Literal["", "age", "days since", "days until", "year", "month", "weekday"] = _key(
        "",
        "The number that a date becomes. age: years from it to the reference; days since: from the reference to it; "
        "days until: from it to the reference; month: 1 to 12; weekday: 1, Monday, to 7.",
    )
    reference: str = _key(
        "", "What age and days are counted to or from: a date 2024-12-31, or the name of a date column."
    )
    unit: str = _key("", "Unit, for people.")
    doc: str = _key("", "What the feature is, for people.")


@dataclass(frozen=True)
class Format:
    """How a table's file is written. What is left open is guessed and told; under a claim from its header alone."""

    separator: Literal["auto", ",", ";", "\t", "|"] = _key("auto", "What parts the columns of a text table.")
    decimal: Literal["auto", ".", ","] = _key(
        "auto", "The decimal sign of a text table; under a claim auto is a point."
    )
    thousands: Literal["auto", "none", ".", ",", "'", " "] = _key(
        "auto", "What parts thousands in a text table; a blank stands for every kind of blank. Under a claim none."
    )
    encoding: Literal["auto", "utf-8", "utf-16", "latin-1", "cp1252", "iso8859-15", "cp1250", "cp850", "mac-roman"] = (
        _key("auto", "The encoding of a text table; a byte order mark at its beginning counts before this.")
    )
    skip: int = _key(-1, "Title lines above the header; -1: found by their shape, under a claim none.")
    footer: int = _key(-1, "Lines below the last record; -1: what stands after a blank line, under a claim none.")
    sheet: str = _key("", "The sheet of a workbook; needed where several hold something.")
    member: str = _key("", "The file in a zip archive; needed where it holds several.")
    labels: Literal["codes", "labels"] = _key("codes", "What SPSS and Stata files give: the codes, or their labels.")


@dataclass(frozen=True)
class Join:
    """One more table whose columns stand beside those of `data.table`: at most one row of it for each value of `on`."""

    table: str = _key("", "A file of any kind that `data.table` may be; its path is relative to the study file.")
    on: tuple[str, ...] = _key(
        (), "The columns that both have, and by which rows find each other; default: `data.patient`."
    )


@dataclass(frozen=True)
class Data:
    """Where records come from, what is predicted, and how records become numbers."""

    source: str = _key("", "A built-in source (`medfed data list`); or give `table`.")
    table: str = _key(
        "",
        "A file, relative to the study file: csv, tsv or txt (also .gz, .zst, .zip), parquet, Excel, ods, SPSS, Stata "
        "or SAS; a folder, or a pattern such as exports/*.csv, of which every file holds some of the rows.",
    )
    site_is_file: bool = _key(
        False, "With a folder or a pattern: the name of a row's file, without suffix, is its site."
    )
    database: str = _key(
        "",
        "In place of `table`: an address such as duckdb:///lab.duckdb, sqlite:///lab.sqlite or that of any SQLAlchemy "
        "dialect; its password as ${NAME}, which is taken from the environment.",
    )
    query: str = _key("", "What `database` is asked: one SELECT; nothing is written.")
    target: str = _key("", "Column to predict.")
    task: Literal["auto", "binary", "multiclass", "regression"] = _key(
        "auto", "auto: two labels are binary, more are multiclass; a number needs task = 'regression'."
    )
    positive: str = _key(
        "", "The positive label of a binary target; default: the last in alphabetical order, so 1 of 0 and 1."
    )
    threshold: str = _key(
        "0.5",
        "From which probability a record of a binary target is called positive: a number in (0, 1), which costs "
        "nothing; or chosen on training rows after the last round: prevalence (as many are called as are positive), "
        "sensitivity>=S (the highest that calls a share S of the positives), youden (the largest sensitivity + "
        "specificity). Under a privacy claim that is noised and paid for: `privacy.threshold_epsilon`.",
    )
    site: str = _key("", "Column that names the site; without it `[sites]` says how patients are shared out.")
    patient: str = _key("", "Column that names the patient; without it one row is one patient.")
    identity: Literal["auto", "canonical", "exact"] = _key(
        "auto",
        "When two ids are one patient. canonical: whatever their case, width, blanks, invisible signs, and a number is "
        "its value (17, 17.0, 00017); exact: where zeros or case carry meaning, only outer blanks are cut off; auto: "
        "the rule of the site's budget ledger where there is one, else canonical. The ledger's rule cannot be changed.",
    )
    missing_patient: Literal["refuse", "own"] = _key(
        "refuse",
        "Rows whose id is missing (empty, NA, ?, null, unknown, or in `missing_values`). refuse: an error; own: each "
        "is a patient of its own, not under a lifetime budget.",
    )
    drop: tuple[
        Literal["rows without target", "rows without site", "rows without patient", "rows without time"], ...
    ] = _key(
        (), "Rows that are left out, counted and told of; else they are refused. Under a privacy claim nobody is told."
    )
    features: tuple[str, ...] = _key(
        (),
        "Feature columns; default: every column that is nothing else. A pattern takes many: 'lab_*'; 'numbers' and "
        "'texts' take all of that kind, which no privacy claim bears.",
    )
    exclude: tuple[str, ...] = _key((), "Columns and patterns ('note_*') that are no features, whatever they hold.")
    absent: dict[str, tuple[str, ...]] = field(
        default_factory=dict,
        metadata={"doc": "`[data.absent]`: SITE = ['troponin'], the features that a site does not measure at all."},
    )
    site_maps: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "doc": "`[data.site_maps]`: SITE = 'maps/bern.toml', how a site's columns differ (see docs/cells.md); "
            "relative to the study file."
        },
    )
    site_maps_sha256: dict[str, str] = field(
        default_factory=dict,
        metadata={"doc": "The sha256 of each site's map, which a run writes down; one that differs is refused."},
    )
    missing_values: tuple[str, ...] = _key(
        ("", "?", "NA", "N/A", "NaN", "nan", "null", "None"), "Texts that mean 'not measured' in every column."
    )
    on_missing: Literal["impute", "refuse"] = _key(
        "impute",
        "impute: an indicator column, and the site's own training median; refuse: an error naming the rows, which no "
        "privacy claim bears.",
    )
    on_outside: Literal["hold", "refuse"] = _key(
        "hold",
        "What becomes of a feature's values beyond its declared range. hold: they are held to its ends, and told; "
        "refuse: an error naming the rows, which no privacy claim bears.",
    )
    test_fraction: float = _key(0.2, "Share of patients held out for testing, in (0, 1).")
    split: Literal["patient", "stratified"] = _key(
        "patient",
        "patient: each patient's keyed hash alone decides, so no patient moves another and class shares agree in "
        "expectation; stratified: exact shares in each site and class, by rank of the hash, so one patient may move "
        "one other.",
    )
    test: str = _key("", "Column that marks held-out rows (test/train, 1/0, yes/no); it takes the place of `split`.")
    test_values: tuple[str, ...] = _key(
        (), "Which texts of column `test` mean held out; every other one means training. Case does not matter."
    )
    time: str = _key(
        "", "Column of the dates that `test_from` goes by: ISO dates, or as its dictionary entry says by `date`."
    )
    test_from: str = _key(
        "",
        "A date 2024-01-01: patients with a row of that day or later are held out, with all their rows; it takes the "
        "place of `split` and `test`.",
    )
    test_is_public: bool = _key(
        False,
        "Declare held-out patients public test data: under a privacy claim only then may raw test figures be told.",
    )
    preprocess: Literal["robust", "standard", "dictionary", "none"] = _key(
        "robust",
        "robust: median and IQR, exact over all sites by counting; standard: mean and standard deviation; "
        "dictionary: public ranges, nothing is computed from patients; none: numbers are taken as they are.",
    )
    accept: tuple[str, ...] = _key(
        (),
        "Doubts of `medfed data show` about the table that are right as they are: CODE for every column, or "
        "CODE:COLUMN. Without it a doubt that would change a result in silence stops the run.",
    )
    read_from_records: bool = _key(
        False,
        "Say that ranges, categories or sizes of this study were read off its records, as `medfed study fix "
        "--from-data` does: no claim covers that. For public records with privacy.scope = 'run' alone.",
    )
    dictionary: dict[str, Feature] = field(
        default_factory=dict, metadata={"doc": "`[data.dictionary.NAME]`: what is publicly known of feature NAME."}
    )
    format: Format = field(default=Format(), metadata={"doc": "`[data.format]`: how the table's file is written."})
    join: tuple[Join, ...] = field(default=(), metadata={"doc": "`[[data.join]]`: more tables, joined by a column."})


@dataclass(frozen=True)
class Sites:
    """How patients are shared out to sites where the data has no site column (a simulation of hospitals)."""

    names: tuple[str, ...] = _key((), "Names of the sites.")
    shares: tuple[float, ...] = _key((), "Share of patients of each site; they sum to 1.")
    kind: Literal["hospital", "device"] = _key(
        "hospital", "hospital: a client holds many patients; device: every patient is a client of its own."
    )


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = _key("logistic", "logistic, mlp, medical-mlp, or package.module:factory (your torch.nn.Module).")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"doc": "`[model.options]`: passed to the factory; the zoo's networks take hidden, dropout and norm."},
    )


@dataclass(frozen=True)
class Training:
    """How the model is trained: the algorithm, the local steps, the server's step."""

    algorithm: str = _key(
        "fedavg", "fedavg, fedprox, scaffold, fednova, fedavgm, fedadam, fedyogi, fedadagrad, local or pooled."
    )
    rounds: int = _key(10, "Rounds, 1 or more.")
    local_epochs: int = _key(1, "Passes of each site over its own rows in a round.")
    local_steps: int = _key(0, "If above 0: that many steps a round instead of epochs.")
    batch_size: int = _key(32, "Rows in a batch; 0 takes all rows of the site.")
    optimizer: Literal["sgd", "adam"] = _key("sgd", "The local optimiser; its state starts afresh each round.")
    learning_rate: float = _key(
        0.0,
        "Local learning rate; 0 takes one that cannot diverge, from how large the sites' encoded inputs are, at most "
        "0.1 (0.01 for adam), and halves it where the training loss grows. Under a privacy claim the recipe chooses.",
    )
    momentum: float = _key(0.0, "Momentum of local SGD.")
    beta1: float = _key(0.9, "Adam's beta1.")
    beta2: float = _key(0.999, "Adam's beta2.")
    weight_decay: float = _key(0.0, "L2 penalty: weight_decay times the weights is added to the gradient.")
    mu: float = _key(0.01, "FedProx: strength of the pull towards the global model.")
    server_learning_rate: float = _key(
        0.0, "Step of the server; 0 takes the algorithm's own: 1, or 0.1 for fedadam, fedyogi and fedadagrad."
    )
    server_momentum: float = _key(0.9, "FedAvgM's momentum; beta1 of fedadam and fedyogi.")
    server_beta2: float = _key(0.99, "beta2 of fedadam and fedyogi.")
    server_epsilon: float = _key(1e-3, "tau of fedadam, fedyogi and fedadagrad: how far they adapt.")
    average: float = _key(
        0.0,
        "Under a privacy claim: share of the last rounds whose models are averaged into the released one, in [0, 1). "
        "With noise = 'site' also the share of a round's last local steps. Averaging costs no privacy.",
    )
    weighting: Literal["samples", "uniform"] = _key("samples", "Weight of a site in the mean: its training rows, or 1.")
    quorum: float = _key(1.0, "Share of the drawn sites that must answer for a round to count, in (0, 1].")
    deadline: float = _key(600.0, "Seconds after which a site that has not answered is left out of the round.")
    links: tuple[str, ...] = _key(
        (),
        "Links that a site's row passes beside the study's own, by name, such as a compression; none comes with "
        "medfed, they are added (CONTRIBUTING). With plain aggregation, and where no noise is added jointly.",
    )
    path: Literal["auto", "rules", "func", "loop"] = _key(
        "auto",
        "Local training by layer rules, torch.func or the plain loop (under a privacy claim: record by record); auto "
        "takes the first of them that a probe on made-up rows finds right.",
    )


@dataclass(frozen=True)
class Privacy:
    """What protects a patient in what leaves the sites. epsilon and delta ask for a guarantee; the rest says how."""

    epsilon: float = _key(
        math.inf, "What the whole run may spend for any patient, over all its records; inf asks for no guarantee."
    )
    delta: float = _key(1.0, "The guarantee's delta; below 1/n for n patients. 1 asks for no guarantee.")
    unit: Literal["patient"] = _key("patient", "Whose presence is hidden: a patient, with all records.")
    noise: Literal["auto", "site", "shared", "central", "none"] = _key(
        "auto",
        "site: each site adds noise at every local step and trusts nobody; shared: one step a round, noise is added "
        "jointly to the sum of all sites; central: as shared, by a trusted coordinator; none: nothing is claimed; "
        "auto: shared where an epsilon is set, else none.",
    )
    clipping: Literal["automatic", "fixed", "adaptive"] = _key(
        "automatic",
        "How a patient's gradient is held to norm `clip`. automatic: scaled to just below it (Bu et al. 2022); fixed: "
        "cut to it; adaptive: cut to a norm that follows the median (Andrew et al. 2021), for shared and central.",
    )
    clip: float = _key(1.0, "Largest norm of one patient's gradient; for adaptive, the norm to begin with.")
    quantile: float = _key(0.5, "adaptive: the share of patients whose gradients shall lie below the norm, in (0, 1).")
    batch_cap: int = _key(
        0,
        "With training.batch_size above 0: most patients that a Poisson batch may hold, where memory forbids more. It "
        "costs twice the noise, as a full batch lets one patient put another out; 0 holds all that are drawn.",
    )
    sizes: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "doc": "`[privacy.sizes]`: the declared, public number of training patients of each site. Sums are divided "
            "by it; it never follows the data. With data.site its names are the sites, in this order: one without a "
            "row takes part, and a row of another is refused."
        },
    )
    max_sites_per_patient: int = _key(1, "At how many sites one patient may have records: attested, not measured.")
    scope: Literal["study", "run"] = _key(
        "study",
        "study: all runs of the study on the same patients share one budget, in the lifetime ledger; run: a fresh "
        "ledger for each run, for public data and benchmarks only, and the claim says so.",
    )
    lifetime_epsilon: float = _key(
        math.inf,
        "What all studies together may have spent for any patient when this one has run, at this study's delta: it can "
        "ask for less than the site's ledger allows, never for more.",
    )
    ledger: str = _key(
        "",
        "Folder of the lifetime ledger, which its operator has founded (`medfed privacy found`); refused where the "
        "operator has said another, by MEDFED_HOME or by a ledger in the user's data folder, which are the default.",
    )
    spare_rounds: int = _key(0, "Rounds paid for in the plan beyond training.rounds, for those that a crash loses.")
    accountant: Literal["auto", "rdp", "pld"] = _key(
        "auto",
        "What calibrates the noise: auto is exact for Gaussian steps on all patients, else rdp; pld is tighter for "
        "sampled steps, and for scope = 'run' only, as its schedule is fixed in advance.",
    )
    correlated: bool = _key(
        False,
        "Correlate the joint noise of successive rounds (banded matrix factorisation); needs fleet.schedule='cyclic'.",
    )
    evaluation_epsilon: float = _key(
        0.0, "Above 0: test figures come from a noised histogram that costs each test patient this epsilon."
    )
    threshold_epsilon: float = _key(
        0.0,
        "What choosing `data.threshold` on training rows would cost alone, as a part of `epsilon`, which the whole run "
        "stays within; 0: a quarter of it. Training then has about 4 % more noise.",
    )
    ranges_epsilon: float = _key(
        0.0,
        "Above 0: features that the dictionary does not describe are numbers, whose ranges are found before training "
        "from noised counts of training patients, one known cell of each patient and column. It is what that would "
        "cost alone, as a part of `epsilon`, which the whole run stays within; 0: such a feature is refused. At a "
        "quarter of `epsilon` training has about 4 % more noise.",
    )
    vote_epsilon: float = _key(
        0.0,
        "Above 0: whether sites' own models do better than the federated one is told by a noised vote of the sites, "
        "after training. It is what the vote would cost alone, as a part of `epsilon`, which the whole run stays "
        "within; 0: no vote. Left out, a quarter of `epsilon` where so many sites vote that noise leaves an answer "
        "(from about 130 at epsilon 1, 30 at epsilon 8, with plain aggregation) and have 20 patients or more in the "
        "mean; training has about 4 % more noise.",
    )
    simulation_only: bool = _key(
        False,
        "Seeded float noise, reproducible and fast; for experiments: the claim then says that nothing is claimed.",
    )

    @property
    def meant(self) -> bool:
        """Whether a claim is meant: by epsilon, delta or noise, also where these do not go together yet."""
        return self.epsilon < math.inf or self.delta < 1 or self.noise not in ("auto", "none")


@dataclass(frozen=True)
class Security:
    """Who can read a site's row."""

    aggregation: Literal["plain", "masked", "three-party"] = _key(
        "plain",
        "plain: the coordinator sees every site's row; masked: rows travel under masks that cancel in the sum; "
        "three-party: rows are shared among three aggregators, who open the sum alone.",
    )
    aggregators: tuple[str, ...] = _key(
        ("aggregator 1", "aggregator 2", "aggregator 3"), "Names of the three parties of 'three-party'."
    )
    min_group: int = _key(3, "A sum of fewer rows is never opened, 2 or more.")
    colluding: float = _key(
        0.3,
        "masked: share of sites that may work with the server, in [0, 0.5); their part of the noise is not counted.",
    )
    federation: str = _key(
        "",
        "Folder of the consortium's list of members (`medfed federation`); empty: keys are made for the run and end "
        "with it.",
    )
    fingerprint: str = _key("", "Of the consortium's key; a list under another key is refused.")
    keys: str = _key("keys", "Folder with each party's NAME.key (`medfed key`), where `federation` is given.")
    fraction_bits: int = _key(
        20, "Fixed point of a row that is not on the noise's grid: steps of 2^-fraction_bits, 1 to 40."
    )
    bound: float = _key(64.0, "Fixed point: no number of such a row may be larger; a site refuses to send it.")


@dataclass(frozen=True)
class Robustness:
    """What malicious sites can do."""

    rule: str = _key(
        "mean",
        "mean: no protection, one site can move the model at will; auto: 'nnm+geometric-median' while clients can be "
        "compared two by two (2,000 a round), then the mean of rows held to `bound`; or krum, "
        "multi-krum, geometric-median, centred-clipping, norm-clipping, minimum-diameter, smea, caf, each also after "
        "'nnm+' or 'bucketing+'. Sites count alike, whatever their size.",
    )
    max_malicious: float = _key(0.0, "Share of a round's clients that the rule must bear, in [0, 0.5).")
    bound: float = _key(
        0.0,
        "Norm that no site's row may exceed; 0: none. Longer ones are cut at the site, left out where they are not. "
        "With rule = 'mean' this is what fleets too large to compare rest on: malicious clients move a round's mean by "
        "at most twice their share of it.",
    )
    reference: str = _key(
        "",
        "A public table at the coordinator, relative to the study file: a round after which the model's loss on it has "
        "grown too much is taken back.",
    )
    tolerance: float = _key(0.5, "How much of itself the loss on the reference may grow in a round; 0 or more.")
    attack: str = _key("", "Simulation: what malicious sites do, such as 'sign-flip'; empty: none is malicious.")
    malicious: float = _key(0.0, "Simulation: share of the sites that are malicious, drawn from the seed, in [0, 0.5).")


@dataclass(frozen=True)
class Fleet:
    """Who takes part in a round."""

    clients_per_round: int = _key(0, "Sites drawn at random each round; 0 takes all.")
    schedule: str = _key(
        "random",
        "random: clients are drawn; cyclic: clients fall into `groups` by a keyed hash, and the groups take turns, so "
        "that nobody is used twice within `groups` rounds; or another selector that was added (CONTRIBUTING).",
    )
    groups: int = _key(1, "How many groups take turns with schedule = 'cyclic'.")


@dataclass(frozen=True)
class Monitor:
    """What is measured and kept."""

    evaluate_every: int = _key(
        1, "Test the global model after every so many rounds, and after the last; 0 tests nothing, and the run says so."
    )
    baselines: bool = _key(
        True,
        "Also train each site alone, and one model on pooled rows (a simulation only, without noise; left out under a "
        "privacy claim of scope 'study').",
    )
    checkpoints: int = _key(3, "How many past rounds can be resumed from, 2 or more.")


@dataclass(frozen=True)
class Study:
    """A whole study. Change a value with `study.set("training.rounds", 5)`; a study is never changed in place."""

    study: About = About()
    data: Data = Data()
    sites: Sites = Sites()
    model: Model = Model()
    training: Training = Training()
    privacy: Privacy = Privacy()
    security: Security = Security()
    robustness: Robustness = Robustness()
    fleet: Fleet = Fleet()
    monitor: Monitor = Monitor()
    folder: Path = field(default=Path(), metadata={"hidden": True})  # where `data.table` is looked for
    # which keys are written down (None: all), and of the others which a recipe has chosen, and why
    given: frozenset[str] | None = field(default=None, compare=False, metadata={"hidden": True})
    chosen: Mapping[str, str] = field(default_factory=dict, compare=False, metadata={"hidden": True})

    def rule(self) -> decision.ThresholdRule:
        """Return how the threshold of a binary target is found."""
        found = decision.parse(self.data.threshold)
        assert found is not None  # `_check_ranges` has seen to it
        return found

    def set(self, key: str, value: Any) -> "Study":
        """Return the study with one value changed, `key` being dotted: "training.rounds"."""
        return self._with({key: value})

    def _with(self, values: Mapping[str, Any]) -> "Study":
        """Return the study with several values changed at once: those that must agree need no order."""
        tables = self.tables()
        for key, value in values.items():
            put(tables, toml.path(key), value)
        given = None if self.given is None else self.given | _written(dict.fromkeys(values)) | _written(values)
        kept = {key: why for key, why in self.chosen.items() if key not in values}
        return dataclasses.replace(from_tables(tables), folder=self.folder, given=given, chosen=kept)

    def left_open(self, key: str) -> bool:
        """Say whether nobody has written down a value of this dotted key."""
        return self.given is not None and key not in self.given

    def choices(self) -> dict[str, dict[str, Any]]:
        """Return what was chosen where the study left it open: key -> its value, and why."""
        return {key: {"value": self.value(key), "why": why} for key, why in self.chosen.items()}

    def value(self, key: str) -> Any:
        """Return the value of a dotted key."""
        found: Any = self
        for part in key.split("."):
            found = getattr(found, part)
        return found

    def as_written(self) -> "Study":
        """Return the study with what was chosen for it back at its defaults."""
        default = Study()
        open_ = self._with({key: default.value(key) for key in self.chosen})
        return dataclasses.replace(open_, given=self.given, chosen={})

    def tables(self) -> dict[str, Any]:
        """Return the study as plain tables, every value written out."""
        tables = dataclasses.asdict(self)
        return {name: table for name, table in tables.items() if name not in ("folder", "given", "chosen")}

    def toml(self) -> str:
        """Return the study as TOML with every value written out."""
        return tomli_w.dumps(self.tables())

    def digest(self) -> str:
        """Return the sha256 of the study: two studies of one digest ask for the same run."""
        read_back = from_tables(self.tables()).tables()  # a range (6, 30) comes back from study.toml as [6.0, 30.0]
        return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def bundled() -> dict[str, Path]:
    """Return the studies that come with medfed, by name."""
    folder = Path(__file__).parent / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(study: str | Path, settings: Sequence[str] = ()) -> Study:
    """Read a study from a file or by the name of a bundled one, then apply settings "key=value" (TOML values).

    Raises StudyError with every key that cannot be used, its value and the way out; no data is touched.
    """
    loaded, refusals = read(study, settings)
    refuse(refusals)
    return loaded


def from_text(text: str, path: Path) -> Study:
    """Return the study that a text would be as the file `path`."""
    loaded = from_tables(tomllib.loads(text))
    return dataclasses.replace(loaded, folder=path.parent.resolve())


def read(study: str | Path, settings: Sequence[str] = ()) -> "tuple[Study, list[Refusal]]":
    """Return a study as far as it can be read, and what stands against it: see `load` and `parse`."""
    tables, path = read_tables(study, settings)
    loaded, refusals = parse(tables)
    if not loaded.study.name:
        loaded = dataclasses.replace(loaded, study=dataclasses.replace(loaded.study, name=path.stem))
    return dataclasses.replace(loaded, folder=path.parent.resolve()), refusals


def read_tables(study: str | Path, settings: Sequence[str] = ()) -> tuple[dict[str, Any], Path]:
    """Return what a study file says, with the settings put in, and the file's path; nothing else is checked."""
    path, text = bundled().get(str(study), Path(study)), ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tables = tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise StudyError(
            f"study={str(study)!r} is no file and no bundled study; {nearest(str(study), bundled())}"
        ) from None
    except UnicodeDecodeError as error:
        raise StudyError(
            f"study={str(path)!r} cannot be read as TOML: not in UTF-8 ({error}); save it as UTF-8"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise StudyError(f"study={str(path)!r} cannot be read as TOML: {toml.unreadable(text, error)}") from error
    except OSError as error:
        raise StudyError(f"study={str(path)!r} cannot be read as TOML: {error}") from error
    for setting in settings:
        key, equals, text = toml.setting(setting)
        if not equals:
            raise StudyError(f"--set {setting!r}; expected KEY=VALUE, as in --set training.rounds=5")
        put(tables, toml.path(key.strip()), parse_value(text.strip()))
    return tables, path


def put(tables: dict[str, Any], path: toml.Path, value: Any) -> None:
    """Set one value in plain tables, a blank as it is refused; LEAVE_OUT takes the key out."""
    *parents, last = path
    place = tables
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise StudyError(f"unknown key {toml.key(*path)!r}; {name!r} is a value, not a table")
    if value is LEAVE_OUT:
        place.pop(last, None)
    else:
        place[last] = deepcopy(value.blank if isinstance(value, Ask) else value)


def parse_value(text: str) -> Any:
    """Read a command-line value as TOML; what is not TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def from_tables(tables: Mapping[str, Any]) -> Study:
    """Build a study from plain tables, checking names, types and ranges.

    Raises StudyError naming every key that cannot be used.
    """
    study, refusals = parse(tables)
    refuse(refusals)
    return study


def parse(tables: Mapping[str, Any]) -> "tuple[Study, list[Refusal]]":
    """Build a study from plain tables as far as they can be read, and return what stands against names, types, ranges.

    A misspelt key counts for the one that it may mean; what cannot be used is left at its default.
    """
    reader = _Reader([])
    study = reader.read(Study, tables, ())
    if study is _UNREAD:
        return Study(given=frozenset()), reader.refusals
    study = dataclasses.replace(study, given=_written(tables))
    return study, [*reader.refusals, *out_of_range(study)]


def read_as(kind: type[_T], tables: Mapping[str, Any]) -> "tuple[_T, list[Refusal]]":
    """Read plain tables into a dataclass as a study's are read, and return what stands against its keys and values."""
    reader = _Reader([])
    read = reader.read(kind, tables, ())
    return (kind() if read is _UNREAD else read), reader.refusals


def _written(tables: Mapping[str, Any], prefix: str = "") -> frozenset[str]:
    """Return the dotted keys of all values, and of the tables that they lie in."""
    found: set[str] = set()
    for name, value in tables.items():
        found.add(prefix + name)
        if isinstance(value, Mapping):
            found |= _written(value, f"{prefix}{name}.")
    return frozenset(found)


_hints = cache(get_type_hints)

_UNREAD: Any = object()
"""What cannot be read."""


@dataclass(frozen=True)
class _Reader:
    """Converts TOML values to fields' types, and keeps what cannot be read."""

    refusals: list[Refusal]

    def read(self, kind: Any, value: Any, path: toml.Path) -> Any:
        """Return a TOML value in a field's type, or _UNREAD, with a refusal that names its key."""
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self._read_table(kind, value, path)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            if value in arguments:
                return value
            close = closest(value, arguments) if isinstance(value, str) else None
            return self._refuse(path, value, f"one of {', '.join(map(repr, arguments))}", close)
        if origin is dict:
            if not isinstance(value, Mapping):
                return self._refuse(path, value, f"a table [{toml.key(*path)}]")
            items = {name: self.read(arguments[1], item, (*path, name)) for name, item in value.items()}
            return {name: item for name, item in items.items() if item is not _UNREAD}
        if origin is tuple:
            listed = [value] if isinstance(value, str) else value
            if not isinstance(listed, Sequence):
                return self._refuse(path, value, "a list")
            read = tuple(self.read(arguments[0], item, path) for item in listed)
            return _UNREAD if any(item is _UNREAD for item in read) else read
        if origin in (Union, types.UnionType):
            raise AssertionError(f"{path}: union types are not read")
        return self._read_scalar(kind, value, path)

    def _read_table(self, kind: Any, value: Any, path: toml.Path) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(path, value, f"a table [{toml.key(*path)}]")
        hints = _hints(kind)
        known = {f.name for f in dataclasses.fields(kind) if not f.metadata.get("hidden")}
        fields = {name: self.read(hints[name], value[name], (*path, name)) for name in value if name in known}

        for name in value:
            if name in known:
                continue
            meant = closest(name, known)
            mend = {} if meant is None or meant in value else {(*path, name): LEAVE_OUT, (*path, meant): value[name]}
            where = toml.key(*path, name)
            self.refusals.append(Refusal(StudyError(f"unknown key {where!r}; {nearest(name, known)}"), mend))
            if meant and meant not in value:
                fields[meant] = _Reader([]).read(hints[meant], value[name], (*path, meant))
        return kind(**{name: item for name, item in fields.items() if item is not _UNREAD})

    def _read_scalar(self, kind: Any, value: Any, path: toml.Path) -> Any:
        if kind is Any:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            whole = isinstance(value, float) and value.is_integer()
            return str(int(value) if whole else value)  # `positive = 1`, or 1.0, means the label "1"
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return self._refuse(path, value, "a number" if kind in (int, float) else kind.__name__)
        return value

    def _refuse(self, path: toml.Path, value: Any, expected: str, close: str | None = None) -> Any:
        mend = {path: close} if close else {}
        self.refusals.append(Refusal(StudyError(f"{toml.key(*path)}={value!r}; expected {expected}"), mend))
        return _UNREAD


def out_of_range(study: Study) -> list[Refusal]:
    """Return what no plan could use: values out of their range, a key once."""
    t, data, sites, p, security = study.training, study.data, study.sites, study.privacy, study.security
    rules: list[tuple[str, object, bool, str]] = [
        (
            "study.name",
            study.study.name,
            names_a_folder(study.study.name),
            f"a printable name without slashes, of at most {MOST_BYTES} bytes: runs are named by it",
        ),
        ("study.seed", study.study.seed, study.study.seed >= 0, "0 or more"),
        ("training.rounds", t.rounds, t.rounds >= 1, "1 or more"),
        ("training.local_epochs", t.local_epochs, t.local_epochs >= 1, "1 or more"),
        ("training.local_steps", t.local_steps, t.local_steps >= 0, "0 (use local_epochs) or more"),
        ("training.batch_size", t.batch_size, t.batch_size >= 0, "0 (all rows) or more"),
        ("training.learning_rate", t.learning_rate, 0 <= t.learning_rate < 1e6, "0 (chosen) or more"),
        ("training.momentum", t.momentum, 0 <= t.momentum < 1, "in [0, 1)"),
        ("training.beta1", t.beta1, 0 <= t.beta1 < 1, "in [0, 1)"),
        ("training.beta2", t.beta2, 0 < t.beta2 < 1, "in (0, 1)"),
        ("training.weight_decay", t.weight_decay, 0 <= t.weight_decay < 1e6, "0 or more"),
        ("training.mu", t.mu, 0 <= t.mu < 1e6, "0 or more"),
        ("training.server_learning_rate", t.server_learning_rate, 0 <= t.server_learning_rate < 1e6, "0 or more"),
        ("training.server_momentum", t.server_momentum, 0 <= t.server_momentum < 1, "in [0, 1)"),
        ("training.server_beta2", t.server_beta2, 0 < t.server_beta2 < 1, "in (0, 1)"),
        ("training.server_epsilon", t.server_epsilon, 0 < t.server_epsilon < 1e6, "above 0"),
        ("training.quorum", t.quorum, 0 < t.quorum <= 1, "in (0, 1]"),
        ("training.deadline", t.deadline, t.deadline > 0, "seconds above 0"),
        ("data.features", data.features, len(set(data.features)) == len(data.features), "each feature once"),
        ("data.format.skip", data.format.skip, data.format.skip >= -1, "-1 (guessed), 0 or more lines"),
        ("data.format.footer", data.format.footer, data.format.footer >= -1, "-1 (guessed), 0 or more lines"),
        (
            "data.format.thousands",
            data.format.thousands,
            data.format.thousands == "auto" or data.format.thousands != data.format.decimal,
            f"another sign than data.format.decimal={data.format.decimal!r}",
        ),
        ("data.test_fraction", data.test_fraction, 0 < data.test_fraction < 1, "in (0, 1)"),
        (
            "fleet.clients_per_round",
            study.fleet.clients_per_round,
            study.fleet.clients_per_round >= 0,
            "0 (all) or more",
        ),
        ("training.average", t.average, 0 <= t.average < 1, "in [0, 1)"),
        ("privacy.epsilon", p.epsilon, p.epsilon > 0, "a number above 0 (inf asks for no guarantee)"),
        ("privacy.delta", p.delta, 0 < p.delta <= 1, "a number in (0, 1), below 1 / number of patients"),
        ("privacy.clip", p.clip, LEAST_CLIP <= p.clip < 1e6, f"from {LEAST_CLIP:g} on, below 1e6"),
        ("privacy.quantile", p.quantile, 0 < p.quantile < 1, "in (0, 1)"),
        ("privacy.batch_cap", p.batch_cap, p.batch_cap >= 0, "0 (no cap) or more"),
        ("privacy.max_sites_per_patient", p.max_sites_per_patient, p.max_sites_per_patient >= 1, "1 or more"),
        ("privacy.lifetime_epsilon", p.lifetime_epsilon, p.lifetime_epsilon > 0, "a number above 0"),
        ("privacy.spare_rounds", p.spare_rounds, p.spare_rounds >= 0, "0 or more"),
        (
            "privacy.evaluation_epsilon",
            p.evaluation_epsilon,
            0 <= p.evaluation_epsilon < math.inf,
            "0 (none) or a number above 0",
        ),
        (
            "privacy.threshold_epsilon",
            p.threshold_epsilon,
            p.threshold_epsilon == 0 or 0 < p.threshold_epsilon < p.epsilon,
            "0 (a quarter of privacy.epsilon) or a number below it",
        ),
        (
            "privacy.ranges_epsilon",
            p.ranges_epsilon,
            p.ranges_epsilon == 0 or 0 < p.ranges_epsilon < p.epsilon,
            "0 (ranges are declared) or a number below privacy.epsilon",
        ),
        (
            "privacy.vote_epsilon",
            p.vote_epsilon,
            p.vote_epsilon == 0 or 0 < p.vote_epsilon < p.epsilon,
            "0 (no vote) or a number below privacy.epsilon",
        ),
        (
            "data.threshold",
            data.threshold,
            decision.parse(data.threshold) is not None,
            "a number in (0, 1), 'prevalence', 'sensitivity>=S' or 'youden'",
        ),
        ("security.min_group", security.min_group, security.min_group >= 2, "2 or more: a sum of one row is that row"),
        ("security.colluding", security.colluding, 0 <= security.colluding < 0.5, "in [0, 0.5)"),
        ("security.fraction_bits", security.fraction_bits, 1 <= security.fraction_bits <= 40, "1 to 40"),
        ("security.bound", security.bound, 0 < security.bound < 1e9, "above 0"),
        ("fleet.groups", study.fleet.groups, study.fleet.groups >= 1, "1 or more"),
        (
            "monitor.evaluate_every",
            study.monitor.evaluate_every,
            study.monitor.evaluate_every >= 0,
            "0 (no test) or more",
        ),
        ("monitor.checkpoints", study.monitor.checkpoints, study.monitor.checkpoints >= 2, "2 or more"),
        ("sites.names", sites.names, len(set(sites.names)) == len(sites.names), "each name once"),
        ("sites.names", sites.names, all(sites.names), "no empty name"),
        ("sites.shares", sites.shares, len(sites.shares) == len(sites.names), f"{len(sites.names)} shares, one a name"),
        ("sites.shares", sites.shares, all(s > 0 for s in sites.shares), "shares above 0"),
        (
            "sites.shares",
            sites.shares,
            not sites.shares or abs(sum(sites.shares) - 1) < 1e-6,
            f"shares that sum to 1, not {sum(sites.shares):g}",
        ),
    ]
    rules.append(("data.test_from", data.test_from, not data.test_from or is_day(data.test_from), "such as 2024-01-01"))
    for name, feature in data.dictionary.items():
        rules += _of_cells(name, feature, data)
        where, low_high = toml.key("data", "dictionary", name, "range"), feature.range
        rules.append((where, low_high, len(low_high) in (0, 2), "[low, high]"))
        ordered = len(low_high) != 2 or -math.inf < low_high[0] < low_high[1] < math.inf
        rules.append((where, low_high, ordered, "low below high"))
        whole = all(abs(end) <= LARGEST for end in low_high)
        rules.append((where, low_high, whole, "ends within 3e38, as float32 has"))
        if feature.log:
            rules.append(
                (where, low_high, len(low_high) == 2 and low_high[0] >= 0, "[low, high] from 0 for log = true")
            )
    found: dict[str, Refusal] = {}
    for key, value, holds, expected in rules:
        if not holds and key not in found:
            shown = list(value) if isinstance(value, tuple) else value
            error = StudyError(f"{key}={shown!r}; expected {expected}. {CHANGE_IT}")
            found[key] = Refusal(error, _in_range(toml.path(key)))
    return [*found.values(), *_sizes_out_of_range(p.sizes)]


def _of_cells(name: str, feature: Feature, data: Data) -> "list[tuple[str, object, bool, str]]":
    """Return what holds of an entry that changes cells: key, value, whether it holds, what is expected."""
    counted = feature.becomes in ("age", "days since", "days until")
    numbers = bool(feature.limits or (feature.factor, feature.offset) != (1.0, 0.0))
    one = sum((feature.boolean, bool(feature.date), numbers)) <= 1
    beside = feature.limits != "indicator" or name != data.target

    def key(last: str) -> str:
        return toml.key("data", "dictionary", name, last)

    return [
        (
            key("becomes"),
            feature.becomes,
            not feature.becomes or bool(feature.date),
            'date = "dd.mm.yyyy", or another form',
        ),
        (key("reference"), feature.reference, not counted or bool(feature.reference), "a date, or a date column"),
        (key("reference"), feature.reference, counted or not feature.reference, "none, unless becomes is age or days"),
        (key("factor"), feature.factor, math.isfinite(feature.factor) and feature.factor != 0, "a number but 0"),
        (key("offset"), feature.offset, math.isfinite(feature.offset), "a number"),
        (key("boolean"), feature.boolean, one, "one of boolean, date, and limits with factor and offset"),
        (key("limits"), feature.limits, beside, "'limit' or 'half': columns beside the target would give it away"),
        (key("boolean"), feature.boolean, not (feature.boolean and feature.range), "no range beside it"),
    ]


def is_day(text: str) -> bool:
    """Say whether a text is an ISO date."""
    try:
        return len(text) == 10 and bool(date.fromisoformat(text))
    except ValueError:
        return False


MOST_BYTES = 200  # of a study's name: file systems end names at 255


def names_a_folder(name: str) -> bool:
    """Say whether a study's name can be a part of a folder's name; the empty one is the file's own."""
    whole = not {"/", "\\"} & set(name) and name not in (".", "..")
    return whole and name.isprintable() and len(name.encode("utf-8", "replace")) <= MOST_BYTES


CHANGE_IT = "Change it in the study file or with --set."

RANGE = Ask([], "the public, plausible [low, high]: from your data dictionary or a textbook, not from these patients")
SIZE = Ask(0, "the number of each site's training patients that may be published; it never follows the data")
CATEGORIES = Ask([], "the texts that may occur, publicly known")
FEATURE = Ask(
    {"range": [], "categories": []},
    "one of the two for each feature: a number's public, plausible range = [low, high], or a text's categories = "
    '["a", "b"], from your data dictionary or a textbook, not from these patients. To leave columns out, list the '
    "others in data.features. Ranges of numbers that nobody can say: privacy.ranges_epsilon, at a price.",
)
EPSILON = Ask(0.0, "what the whole run may spend for any patient, such as 1.0")


KINDS = ("numbers", "texts")
"""In data.features: every column of the kind."""


def is_pattern(name: str) -> bool:
    """Say whether an entry of data.features or data.exclude stands for many columns."""
    return "*" in name or "?" in name or name in KINDS


def described(feature: Feature) -> bool:
    """Say whether it is publicly known what may stand in a column."""
    return bool(feature.range or feature.categories or feature.boolean)


def describe(names: Sequence[str], dictionary: Mapping[str, Feature]) -> dict[toml.Path, Ask]:
    """Return the blanks that describe these features: a line each, or two keys more where an entry is there already."""
    blanks: dict[toml.Path, Ask] = {}
    for name in names:
        path = ("data", "dictionary", name)
        if dictionary.get(name, Feature()) == Feature():
            blanks[path] = FEATURE
        else:
            blanks |= {(*path, "range"): RANGE, (*path, "categories"): CATEGORIES}
    return blanks


def _sizes_out_of_range(sizes: Mapping[str, int]) -> list[Refusal]:
    """Return what stands against declared sizes: one refusal, however many sites."""
    low = {name: size for name, size in sizes.items() if size < 1}
    if not low:
        return []
    first, *more = low
    what = f"{toml.key('privacy', 'sizes', first)}={low[first]}"
    if more:
        what = f"privacy.sizes of {len(low)} sites below 1 ({some(map(repr, low))})"
    error = StudyError(f"{what}; expected the declared number of training patients, 1 or more. {CHANGE_IT}")
    return [Refusal(error, {("privacy", "sizes", name): SIZE for name in low})]


def _in_range(path: toml.Path) -> dict[toml.Path, Any]:
    """Return what mends a value out of its range: its default, or a blank where that is no answer."""
    if path[:2] == ("data", "dictionary"):
        return {path: RANGE} if path[-1] == "range" else {}
    if path == ("privacy", "epsilon"):
        return {path: EPSILON}
    if path == ("privacy", "delta"):
        return {path: 1e-6}
    if path[0] == "sites" or path in _TO_CHOOSE:
        return {}
    default: Any = Study()
    for name in path:
        default = getattr(default, name)
    return {path: default}


_TO_CHOOSE = {("data", "features"), ("data", "test_from")}
"""Keys for which no value is right whatever the records are."""
