"""The keys of a study file: each table is one frozen dataclass, each key one field.

Beside a key stand its default, what it means, and which values it may have: the check, the refusal
and docs/study.md say what is declared here. What relates two keys is in `relations`.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from medfed.study.blanks import EPSILON, RANGE, SIZE
from medfed.study.domains import (
    DAY,
    FINITE,
    FOLDER_NAME,
    NO_EMPTY_NAME,
    NOT_ZERO,
    RANGE_ENDS,
    SHARES,
    THRESHOLD,
    Domain,
    Interval,
    above,
    at_least,
    between,
    each_once,
    within,
)

LEAST_CLIP = 1e-6
"""Least clipping norm: a smaller one would weigh rounding as if it were a gradient."""

LARGE = 1e6
"""End of rates and penalties: what is larger is a slip of the hand."""

DEFAULT: Any = object()
"""As `mend`: a value out of range is mended by the key's default."""

CHOOSE: Any = object()
"""As `mend`: no value is right whatever the records are, so a person has to choose."""


def key(default: Any, doc: str, *domains: Domain, mend: Any = DEFAULT) -> Any:
    """Declare a key.

    Args:
        default: what counts where the key is left out.
        doc: what it means, for docs/study.md; its range is not repeated there.
        domains: which values it may have, all of which must hold.
        mend: what `medfed study fix` puts in place of a value out of range; DEFAULT, CHOOSE, a
        value or a blank.
    """
    return field(default=default, metadata={"doc": doc, "domains": domains, "mend": mend})


def entries(doc: str, each: Domain | None = None, of: str = "entries", mend: Any = CHOOSE) -> Any:
    """Declare a table of the user's own names, empty by default.

    Args:
        doc: what it means, for docs/study.md.
        each: which values an entry may have.
        of: whose entries these are, where a refusal counts them.
        mend: what `medfed study fix` puts in place of an entry out of range.
    """
    metadata = {"doc": doc, "each": each, "of": of, "mend": mend}
    return field(default_factory=dict, hash=False, metadata=metadata)


@dataclass(frozen=True)
class About:
    """What the study is."""

    name: str = key("", "Name of the study; default: the file's name.", FOLDER_NAME)
    purpose: str = key(
        "HRESCH",
        "Purpose of use, an HL7 v3 ActReason code, told in events and summary; HRESCH is "
        "healthcare research.",
    )
    seed: int = key(
        0,
        "Seed of split, partition, initial weights, batch order and dropout. Same seed, same bits.",
        at_least(0),
    )


@dataclass(frozen=True)
class Feature:
    """What is publicly known of one feature, before any patient is looked at:
    an entry of the data dictionary.
    """

    range: tuple[float, ...] = key(
        (),
        "Plausible [low, high]: a feature's values beyond it are held to its ends, and told; "
        "with preprocess = 'dictionary' it maps to [-2, 2]. A target is held to it under a "
        "privacy claim alone.",
        *RANGE_ENDS,
        mend=RANGE,
    )
    log: bool = key(
        False,
        "Take the logarithm first; values are floored at low, or at 1 % of high where low is 0.",
    )
    categories: tuple[str, ...] = key(
        (), "The categories of a text feature, in order; others count as missing."
    )
    missing: tuple[str, ...] = key(
        (), "Texts that mean 'not measured' for this feature, besides data.missing_values."
    )
    indicator: bool = key(
        False,
        "One more column, 1 where the value is missing; under a privacy claim only declared ones "
        "exist.",
    )
    recode: dict[str, str] = entries(
        "Texts that mean another: recode = { Yes = 'yes', \"1\" = 'yes' }; a feature's or the "
        "target's. Before anything else is read of a cell; a number is compared as 1, not 1.0. "
        "An empty text means 'not measured'."
    )
    suffix: tuple[str, ...] = key(
        (),
        "What stands behind the numbers of this column, and is taken off: suffix = ['%', 'mg/l'].",
    )
    numbers: Literal[
        "", "1,5", "1.234,5", "1 234,5", "1'234,5", "1,234.5", "1 234.5", "1'234.5"
    ] = key(
        "",
        "How this column's texts spell numbers, where the table spells them otherwise: '1,5' for "
        "4,2 in a workbook.",
    )
    boolean: bool = key(
        False,
        "Yes or no in any spelling (y/n, true/false, t/f, 1/0, ja/nein, oui/non, sí/no, +/-, "
        "pos/neg): the cells become the categories 'no' and 'yes'.",
    )
    factor: float = key(
        1.0,
        "Numbers are multiplied by it, into the study's unit; `range` is of the result.",
        NOT_ZERO,
        mend=CHOOSE,
    )
    offset: float = key(
        0.0,
        "Added to a number after `factor`: factor = 0.5556, offset = -17.78 for degrees "
        "Fahrenheit.",
        FINITE,
        mend=CHOOSE,
    )
    limits: Literal["", "limit", "half", "indicator"] = key(
        "",
        "What a result beyond a detection limit (<0.3, > 100, ≤ 5) becomes. limit: the limit; "
        "half: half of a lower one, an upper one itself; indicator: the limit, and beside it two "
        "columns of 0 and 1, `NAME below limit` and `NAME above limit`. Without it such a cell "
        "is refused.",
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
    ] = key(
        "",
        "How the column writes its dates; a time of day may follow. Never guessed. A column with "
        "a date and without `becomes` is no feature: it may be another's `reference`, or "
        "`data.time`.",
    )
    becomes: Literal["", "age", "days since", "days until", "year", "month", "weekday"] = key(
        "",
        "The number that a date becomes. age: years from it to the reference; days since: from "
        "the reference to it; days until: from it to the reference; month: 1 to 12; weekday: 1, "
        "Monday, to 7.",
    )
    reference: str = key(
        "",
        "What age and days are counted to or from: a date 2024-12-31, or the name of a date "
        "column.",
    )
    unit: str = key("", "Unit, for people.")
    doc: str = key("", "What the feature is, for people.")


@dataclass(frozen=True)
class Format:
    """How a table's file is written. What is left open is guessed and told;
    under a claim from its header alone.
    """

    separator: Literal["auto", ",", ";", "\t", "|"] = key(
        "auto", "What parts the columns of a text table."
    )
    decimal: Literal["auto", ".", ","] = key(
        "auto", "The decimal sign of a text table; under a claim auto is a point."
    )
    thousands: Literal["auto", "none", ".", ",", "'", " "] = key(
        "auto",
        "What parts thousands in a text table; a blank stands for every kind of blank. Under a "
        "claim none.",
    )
    encoding: Literal[
        "auto", "utf-8", "utf-16", "latin-1", "cp1252", "iso8859-15", "cp1250", "cp850", "mac-roman"
    ] = key(
        "auto",
        "The encoding of a text table; a byte order mark at its beginning counts before this.",
    )
    skip: int = key(
        -1,
        "Title lines above the header. Found: by their shape, under a claim none.",
        at_least(-1, {-1: "found"}),
    )
    footer: int = key(
        -1,
        "Lines below the last record. Found: what stands after a blank line, under a claim none.",
        at_least(-1, {-1: "found"}),
    )
    sheet: str = key("", "The sheet of a workbook; needed where several hold something.")
    member: str = key("", "The file in a zip archive; needed where it holds several.")
    labels: Literal["codes", "labels"] = key(
        "codes", "What SPSS and Stata files give: the codes, or their labels."
    )


@dataclass(frozen=True)
class Join:
    """One more table whose columns stand beside those of `data.table`: at most one row of it for
    each value of `on`.
    """

    table: str = key(
        "", "A file of any kind that `data.table` may be; its path is relative to the study file."
    )
    on: tuple[str, ...] = key(
        (),
        "The columns that both have, and by which rows find each other; default: `data.patient`.",
    )


@dataclass(frozen=True)
class Data:
    """Where records come from, what is predicted, and how records become numbers."""

    source: str = key("", "A built-in source (`medfed data list`); or give `table`.")
    table: str = key(
        "",
        "A file, relative to the study file: csv, tsv or txt (also .gz, .zst, .zip), parquet, "
        "Excel, ods, SPSS, Stata or SAS; a folder, or a pattern such as exports/*.csv, of which "
        "every file holds some of the rows.",
    )
    site_is_file: bool = key(
        False, "With a folder or a pattern: the name of a row's file, without suffix, is its site."
    )
    database: str = key(
        "",
        "In place of `table`: an address such as duckdb:///lab.duckdb, sqlite:///lab.sqlite or "
        "that of any SQLAlchemy dialect; its password as ${NAME}, which is taken from the "
        "environment.",
    )
    query: str = key("", "What `database` is asked: one SELECT; nothing is written.")
    target: str = key("", "Column to predict.")
    task: Literal["auto", "binary", "multiclass", "regression"] = key(
        "auto",
        "auto: two labels are binary, more are multiclass; a number needs task = 'regression'.",
    )
    positive: str = key(
        "",
        "The positive label of a binary target; default: the last in alphabetical order, so 1 of "
        "0 and 1.",
    )
    threshold: str = key(
        "0.5",
        "From which probability a record of a binary target is called positive: a number in (0, "
        "1), which costs nothing; or chosen on training rows after the last round: prevalence "
        "(as many are called as are positive), sensitivity>=S (the highest that calls a share S "
        "of the positives), youden (the largest sensitivity + specificity). Under a privacy "
        "claim that is noised and paid for: `privacy.threshold_epsilon`.",
        THRESHOLD,
    )
    site: str = key(
        "", "Column that names the site; without it `[sites]` says how patients are shared out."
    )
    patient: str = key("", "Column that names the patient; without it one row is one patient.")
    identity: Literal["auto", "canonical", "exact"] = key(
        "auto",
        "When two ids are one patient. canonical: whatever their case, width, blanks, invisible "
        "signs, and a number is its value (17, 17.0, 00017); exact: where zeros or case carry "
        "meaning, only outer blanks are cut off; auto: the rule of the site's budget ledger "
        "where there is one, else canonical. The ledger's rule cannot be changed.",
    )
    missing_patient: Literal["refuse", "own"] = key(
        "refuse",
        "Rows whose id is missing (empty, NA, ?, null, unknown, or in `missing_values`). refuse: "
        "an error; own: each is a patient of its own, not under a lifetime budget.",
    )
    drop: tuple[
        Literal[
            "rows without target", "rows without site", "rows without patient", "rows without time"
        ],
        ...,
    ] = key(
        (),
        "Rows that are left out, counted and told of; else they are refused. Under a privacy "
        "claim nobody is told.",
    )
    features: tuple[str, ...] = key(
        (),
        "Feature columns; default: every column that is nothing else. A pattern takes many: "
        "'lab_*'; 'numbers' and 'texts' take all of that kind, which no privacy claim bears.",
        each_once("feature"),
        mend=CHOOSE,
    )
    exclude: tuple[str, ...] = key(
        (), "Columns and patterns ('note_*') that are no features, whatever they hold."
    )
    absent: dict[str, tuple[str, ...]] = entries(
        "`[data.absent]`: SITE = ['troponin'], the features that a site does not measure at all."
    )
    site_maps: dict[str, str] = entries(
        "`[data.site_maps]`: SITE = 'maps/bern.toml', how a site's columns differ (see "
        "docs/cells.md); relative to the study file."
    )
    site_maps_sha256: dict[str, str] = entries(
        "The sha256 of each site's map, which a run writes down; one that differs is refused."
    )
    missing_values: tuple[str, ...] = key(
        ("", "?", "NA", "N/A", "NaN", "nan", "null", "None"),
        "Texts that mean 'not measured' in every column.",
    )
    on_missing: Literal["impute", "refuse"] = key(
        "impute",
        "impute: an indicator column, and the site's own training median; refuse: an error "
        "naming the rows, which no privacy claim bears.",
    )
    on_outside: Literal["hold", "refuse"] = key(
        "hold",
        "What becomes of a feature's values beyond its declared range. hold: they are held to "
        "its ends, and told; refuse: an error naming the rows, which no privacy claim bears.",
    )
    test_fraction: float = key(0.2, "Share of patients held out for testing.", between(0, 1))
    split: Literal["patient", "stratified"] = key(
        "patient",
        "patient: each patient's keyed hash alone decides, so no patient moves another and class "
        "shares agree in expectation; stratified: exact shares in each site and class, by rank "
        "of the hash, so one patient may move one other.",
    )
    test: str = key(
        "",
        "Column that marks held-out rows (test/train, 1/0, yes/no); it takes the place of `split`.",
    )
    test_values: tuple[str, ...] = key(
        (),
        "Which texts of column `test` mean held out; every other one means training. Case does "
        "not matter.",
    )
    time: str = key(
        "",
        "Column of the dates that `test_from` goes by: ISO dates, or as its dictionary entry "
        "says by `date`.",
    )
    test_from: str = key(
        "",
        "A date 2024-01-01: patients with a row of that day or later are held out, with all "
        "their rows; it takes the place of `split` and `test`.",
        DAY,
        mend=CHOOSE,
    )
    test_is_public: bool = key(
        False,
        "Declare held-out patients public test data: under a privacy claim only then may raw "
        "test figures be told.",
    )
    preprocess: Literal["robust", "standard", "dictionary", "none"] = key(
        "robust",
        "robust: median and IQR, exact over all sites by counting, or where the IQR is no scale "
        "mean and standard deviation of held values; standard: mean and standard deviation; "
        "dictionary: public ranges, nothing is computed from patients; none: numbers are taken as "
        "they are.",
    )
    accept: tuple[str, ...] = key(
        (),
        "Doubts of `medfed data show` about the table that are right as they are: CODE for every "
        "column, or CODE:COLUMN. Without it a doubt that would change a result in silence stops "
        "the run.",
    )
    read_from_records: bool = key(
        False,
        "Say that ranges, categories or sizes of this study were read off its records, as "
        "`medfed study fix --from-data` does: no claim covers that. For public records with "
        "privacy.scope = 'run' alone.",
    )
    dictionary: dict[str, Feature] = entries(
        "`[data.dictionary.NAME]`: what is publicly known of feature NAME."
    )
    format: Format = field(
        default=Format(), metadata={"doc": "`[data.format]`: how the table's file is written."}
    )
    join: tuple[Join, ...] = field(
        default=(), metadata={"doc": "`[[data.join]]`: more tables, joined by a column."}
    )


@dataclass(frozen=True)
class Sites:
    """How patients are shared out to sites where the data
    has no site column (a simulation of hospitals).
    """

    names: tuple[str, ...] = key(
        (), "Names of the sites.", each_once("name"), NO_EMPTY_NAME, mend=CHOOSE
    )
    shares: tuple[float, ...] = key(
        (), "Share of patients of each site, one a name.", *SHARES, mend=CHOOSE
    )
    kind: Literal["hospital", "device"] = key(
        "hospital",
        "hospital: a client holds many patients; device: every patient is a client of its own.",
    )


@dataclass(frozen=True)
class Model:
    """What is trained."""

    name: str = key(
        "logistic", "logistic, mlp, medical-mlp, or package.module:factory (your torch.nn.Module)."
    )
    options: dict[str, Any] = entries(
        "`[model.options]`: passed to the factory; the zoo's networks take hidden, dropout and "
        "norm."
    )


@dataclass(frozen=True)
class Training:
    """How the model is trained: the algorithm, the local steps, the server's step."""

    algorithm: str = key(
        "fedavg",
        "fedavg, fedprox, scaffold, fednova, fedavgm, fedadam, fedyogi, fedadagrad, local or "
        "pooled.",
    )
    rounds: int = key(10, "Rounds.", at_least(1))
    local_epochs: int = key(1, "Passes of each site over its own rows in a round.", at_least(1))
    local_steps: int = key(
        0, "That many steps a round instead of epochs.", at_least(0, {0: "use local_epochs"})
    )
    batch_size: int = key(32, "Rows of the site in a batch.", at_least(0, {0: "all rows"}))
    optimizer: Literal["sgd", "adam"] = key(
        "sgd", "The local optimiser; its state starts afresh each round."
    )
    learning_rate: float = key(
        0.0,
        "Local learning rate. Chosen: one that cannot diverge, from how large the sites' encoded "
        "inputs are, at most 0.1 (0.01 for adam), halved where the training loss grows. Under a "
        "privacy claim the recipe chooses.",
        within(0, LARGE, {0: "chosen"}),
    )
    momentum: float = key(0.0, "Momentum of local SGD.", within(0, 1))
    beta1: float = key(0.9, "Adam's beta1.", within(0, 1))
    beta2: float = key(0.999, "Adam's beta2.", between(0, 1))
    weight_decay: float = key(
        0.0,
        "L2 penalty: weight_decay times the weights is added to the gradient.",
        within(0, LARGE),
    )
    mu: float = key(
        0.01, "FedProx: strength of the pull towards the global model.", within(0, LARGE)
    )
    server_learning_rate: float = key(
        0.0,
        "Step of the server; the algorithm's own is 1, or 0.1 for fedadam, fedyogi and fedadagrad.",
        within(0, LARGE, {0: "the algorithm's own"}),
    )
    server_momentum: float = key(
        0.9, "FedAvgM's momentum; beta1 of fedadam and fedyogi.", within(0, 1)
    )
    server_beta2: float = key(0.99, "beta2 of fedadam and fedyogi.", between(0, 1))
    server_epsilon: float = key(
        1e-3, "tau of fedadam, fedyogi and fedadagrad: how far they adapt.", between(0, LARGE)
    )
    average: float = key(
        0.0,
        "Under a privacy claim: share of the last rounds whose models are averaged into the "
        "released one. With noise = 'site' also the share of a round's last local steps. "
        "Averaging costs no privacy.",
        within(0, 1),
    )
    weighting: Literal["samples", "uniform"] = key(
        "samples", "Weight of a site in the mean: its training rows, or 1."
    )
    quorum: float = key(
        1.0,
        "Share of the drawn sites that must answer for a round to count.",
        Interval(0, 1, open_low=True),
    )
    deadline: float = key(
        600.0,
        "Time after which a site that has not answered is left out of the round.",
        above(0, unit="seconds", infinite=True),
    )
    links: tuple[str, ...] = key(
        (),
        "Links that a site's row passes beside the study's own, by name, such as a compression; "
        "none comes with medfed, they are added (CONTRIBUTING). With plain aggregation, and "
        "where no noise is added jointly.",
    )
    path: Literal["auto", "rules", "func", "loop"] = key(
        "auto",
        "Local training by layer rules, torch.func or the plain loop (under a privacy claim: "
        "record by record); auto takes the first of them that a probe on made-up rows finds "
        "right.",
    )


@dataclass(frozen=True)
class Privacy:
    """What protects a patient in what leaves the sites.
    epsilon and delta ask for a guarantee; the rest says how.
    """

    epsilon: float = key(
        math.inf,
        "What the whole run may spend for any patient, over all its records.",
        above(0, {math.inf: "no guarantee"}, infinite=True),
        mend=EPSILON,
    )
    delta: float = key(
        1.0,
        "The guarantee's delta; below 1/n for n patients.",
        Interval(0, 1, open_low=True, special={1: "no guarantee"}),
        mend=1e-6,
    )
    unit: Literal["patient"] = key(
        "patient", "Whose presence is hidden: a patient, with all records."
    )
    noise: Literal["auto", "site", "shared", "central", "none"] = key(
        "auto",
        "site: each site adds noise at every local step and trusts nobody; shared: one step a "
        "round, noise is added jointly to the sum of all sites; central: as shared, by a trusted "
        "coordinator; none: nothing is claimed; auto: shared where an epsilon is set, else none.",
    )
    clipping: Literal["automatic", "fixed", "adaptive"] = key(
        "automatic",
        "How a patient's gradient is held to norm `clip`. automatic: scaled to just below it (Bu "
        "et al. 2022); fixed: cut to it; adaptive: cut to a norm that follows the median (Andrew "
        "et al. 2021), for shared and central.",
    )
    clip: float = key(
        1.0,
        "Largest norm of one patient's gradient; for adaptive, the norm to begin with.",
        within(LEAST_CLIP, LARGE),
    )
    quantile: float = key(
        0.5,
        "adaptive: the share of patients whose gradients shall lie below the norm.",
        between(0, 1),
    )
    batch_cap: int = key(
        0,
        "With training.batch_size above 0: most patients that a Poisson batch may hold, where "
        "memory forbids more. It costs twice the noise, as a full batch lets one patient put "
        "another out.",
        at_least(0, {0: "no cap"}),
    )
    sizes: dict[str, int] = entries(
        "`[privacy.sizes]`: the declared, public number of training patients of each site. Sums "
        "are divided by it; it never follows the data. With data.site its names are the sites, "
        "in this order: one without a row takes part, and a row of another is refused.",
        each=at_least(1, unit="patients"),
        of="sites",
        mend=SIZE,
    )
    max_sites_per_patient: int = key(
        1, "At how many sites one patient may have records: attested, not measured.", at_least(1)
    )
    scope: Literal["study", "run"] = key(
        "study",
        "study: all runs of the study on the same patients share one budget, in the lifetime "
        "ledger; run: a fresh ledger for each run, for public data and benchmarks only, and the "
        "claim says so.",
    )
    lifetime_epsilon: float = key(
        math.inf,
        "What all studies together may have spent for any patient when this one has run, at this "
        "study's delta: it can ask for less than the site's ledger allows, never for more.",
        above(0, {math.inf: "the ledger's own"}, infinite=True),
    )
    ledger: str = key(
        "",
        "Folder of the lifetime ledger, which its operator has founded (`medfed privacy found`); "
        "refused where the operator has said another, by MEDFED_HOME or by a ledger in the "
        "user's data folder, which are the default.",
    )
    spare_rounds: int = key(
        0,
        "Rounds paid for in the plan beyond training.rounds, for those that a crash loses.",
        at_least(0),
    )
    accountant: Literal["auto", "rdp", "pld"] = key(
        "auto",
        "What calibrates the noise: auto is exact for Gaussian steps on all patients, else rdp; "
        "pld is tighter for sampled steps, and for scope = 'run' only, as its schedule is fixed "
        "in advance.",
    )
    correlated: bool = key(
        False,
        "Correlate the joint noise of successive rounds (banded matrix factorisation); needs "
        "fleet.schedule='cyclic'.",
    )
    evaluation_epsilon: float = key(
        0.0,
        "Above 0: test figures come from a noised histogram that costs each test patient this "
        "epsilon.",
        at_least(0, {0: "none"}),
    )
    threshold_epsilon: float = key(
        0.0,
        "What choosing `data.threshold` on training rows would cost alone, as a part of "
        "`epsilon`, which the whole run stays within. Training then has about 4 % more noise.",
        at_least(0, {0: "a quarter of epsilon"}),
    )
    ranges_epsilon: float = key(
        0.0,
        "Above 0: features that the dictionary does not describe are numbers, whose ranges are "
        "found before training from noised counts of training patients, one known cell of each "
        "patient and column. It is what that would cost alone, as a part of `epsilon`, which the "
        "whole run stays within; without it such a feature is refused. At a quarter of `epsilon` "
        "training has about 4 % more noise.",
        at_least(0, {0: "ranges are declared"}),
    )
    vote_epsilon: float = key(
        0.0,
        "Above 0: whether sites' own models do better than the federated one is told by a noised "
        "vote of the sites, after training. It is what the vote would cost alone, as a part of "
        "`epsilon`, which the whole run stays within. Left out, a quarter of `epsilon` where so "
        "many sites vote that noise leaves an answer (from about 130 at epsilon 1, 30 at epsilon "
        "8, with plain aggregation) and have 20 patients or more in the mean; training has about "
        "4 % more noise.",
        at_least(0, {0: "no vote"}),
    )
    simulation_only: bool = key(
        False,
        "Seeded float noise, reproducible and fast; for experiments: the claim then says that "
        "nothing is claimed.",
    )

    @property
    def meant(self) -> bool:
        """Whether a claim is meant: by epsilon, delta or noise, also where these do not fit yet."""
        return self.epsilon < math.inf or self.delta < 1 or self.noise not in ("auto", "none")


@dataclass(frozen=True)
class Security:
    """Who can read a site's row."""

    aggregation: Literal["plain", "masked", "three-party"] = key(
        "plain",
        "plain: the coordinator sees every site's row; masked: rows travel under masks that "
        "cancel in the sum; three-party: rows are shared among three aggregators, who open the "
        "sum alone.",
    )
    aggregators: tuple[str, ...] = key(
        ("aggregator 1", "aggregator 2", "aggregator 3"),
        "Names of the three parties of 'three-party'.",
    )
    min_group: int = key(
        3,
        "A sum of fewer rows is never opened, besides those of the `colluding` ones, who know "
        "their own.",
        at_least(2, why="a sum of one row is that row"),
    )
    colluding: float = key(
        0.3,
        "Share of sites that may work with whoever opens the sum: their rows do not count towards "
        "min_group and, masked, their part of the noise does not either.",
        within(0, 0.5),
    )
    federation: str = key(
        "",
        "Folder of the consortium's list of members (`medfed federation`); empty: keys are made "
        "for the run and end with it.",
    )
    fingerprint: str = key("", "Of the consortium's key; a list under another key is refused.")
    keys: str = key(
        "keys", "Folder with each party's NAME.key (`medfed key`), where `federation` is given."
    )
    fraction_bits: int = key(
        20,
        "Fixed point of a row that is not on the noise's grid: steps of 2^-fraction_bits.",
        Interval(1, 40),
    )
    bound: float = key(
        64.0,
        "Fixed point: no number of such a row may be larger; a site refuses to send it.",
        between(0, 1e9),
    )


@dataclass(frozen=True)
class Robustness:
    """What malicious sites can do."""

    rule: str = key(
        "mean",
        "mean: no protection but what `bound` and `cap` give, without which one site can move the "
        "model at will; auto: 'nnm+geometric-median' while clients can be compared two by two "
        "(2,000 a round), then the mean of rows held to `bound`; among three aggregators under "
        "one joint noise the mean of rows held to `cap`; or krum, multi-krum, geometric-median, "
        "centred-clipping, norm-clipping, minimum-diameter, smea, caf, each also after 'nnm+' or "
        "'bucketing+'. Under a rule sites count alike, whatever their size.",
    )
    max_malicious: float = key(
        0.0,
        "Share of a round's clients that the rule must bear.",
        within(0, 0.5, why="no rule bears a half"),
        mend=CHOOSE,
    )
    bound: float = key(
        0.0,
        "Norm that no site's row may exceed. Longer ones are cut at the site, left out where "
        "they are not. With rule = 'mean' this is what fleets too large to compare rest on: "
        "malicious clients move a round's mean by at most twice their share of it.",
        at_least(0, {0: "none"}),
        mend=CHOOSE,
    )
    cap: float = key(
        0.0,
        "Under one joint noise among three aggregators: how long a site's clipped sum may be, as a "
        "share of a mean site's patients times privacy.clip (1: of its own declared patients). "
        "Longer ones are cut at the site, left out where they are not. The smaller, the less "
        "malicious sites can do, and the more rounds it takes.",
        Interval(0, 1, special={0: "from public figures where some may lie, else 1"}),
        mend=CHOOSE,
    )
    reference: str = key(
        "",
        "A public table at the coordinator, relative to the study file: a round after which the "
        "model's loss on it has grown too much is taken back.",
    )
    tolerance: float = key(
        0.5, "How much of itself the loss on the reference may grow in a round.", at_least(0)
    )
    attack: str = key(
        "", "Simulation: what malicious sites do, such as 'sign-flip'; empty: none is malicious."
    )
    malicious: float = key(
        0.0,
        "Simulation: share of the sites that are malicious, drawn from the seed.",
        within(0, 0.5, why="no rule bears a half"),
        mend=CHOOSE,
    )
    sight: Literal["own", "all"] = key(
        "own",
        "Simulation: what malicious sites know when they lie. own: what they would send honestly; "
        "all: every honest row of the round, the worst case.",
    )


@dataclass(frozen=True)
class Participation:
    """Who takes part in a round."""

    clients_per_round: int = key(0, "Sites drawn at random each round.", at_least(0, {0: "all"}))
    schedule: str = key(
        "random",
        "random: clients are drawn; cyclic: clients fall into `groups` by a keyed hash, and the "
        "groups take turns, so that nobody is used twice within `groups` rounds; or another "
        "selector that was added (CONTRIBUTING).",
    )
    groups: int = key(1, "How many groups take turns with schedule = 'cyclic'.", at_least(1))


@dataclass(frozen=True)
class Monitor:
    """What is measured and kept."""

    evaluate_every: int = key(
        1,
        "Test the global model after every so many rounds, and after the last; where there is "
        "none the run says so.",
        at_least(0, {0: "no test"}),
    )
    baselines: bool = key(
        True,
        "Also train each site alone, and one model on pooled rows (a simulation only, without "
        "noise; left out under a privacy claim of scope 'study').",
    )
    checkpoints: int = key(3, "How many past rounds can be resumed from.", at_least(2))
