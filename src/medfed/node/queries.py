"""Queries of training patients, each paid for: a vote on own models, counts for the threshold,
counts for ranges.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfed.core import codec, decision
from medfed.core.checks import SiteError
from medfed.core.flat import vector
from medfed.core.streams import Streams
from medfed.data.features import open_columns
from medfed.data.federated import Rows
from medfed.data.site_table import SiteTable
from medfed.learn.algorithms import ALGORITHMS
from medfed.learn.local import outputs
from medfed.node.own_model import errs_less, train_own
from medfed.node.site import Answer, Header, Site, operation, table_of
from medfed.privacy import guarantee as guarantees
from medfed.privacy import quantiles
from medfed.privacy.guarantee import Guarantee

logger = logging.getLogger(__name__)


@operation("vote")
def vote(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with each site's noised `_ballot`: is its own model better than the common one?

    All patients whose records the answer follows from pay: a site's training patients, and its
    held-out ones unless they are public. A site that cannot tell votes 1/2, so that no error tells
    of a patient.

    Args:
        sites: those asked, of one process.
        header: the question's.
        tensors: the question's: `w`, the common model [P].
    """
    first = sites[0]
    guarantee = first.guarantee
    study = first.study
    if guarantee is None or "vote" not in guarantee.queries:
        raise SiteError("privacy.vote_epsilon=0: nobody has paid for a vote")
    w_P = tensors.get("w", torch.empty(0))
    if w_P.shape != vector(first.model).shape:
        raise SiteError("the coordinator sends no model to vote on; run the same medfed everywhere")
    held_out = {}
    if not study.data.test_is_public:
        held_out = {
            site.name: sorted(set(table_of(site).ids[site.test.patient.numpy()])) for site in sites
        }

    def tell(site: Site) -> np.ndarray:
        vote = np.array([_ballot(site, w_P)])
        return _noise(site, guarantee, "vote", guarantees.VOTE_SENSITIVITY, vote)

    return _answer_query(sites, "vote", "vote", tell, held_out)


def _answer_query(
    sites: Sequence[Site],
    label: str,
    tensor: str,
    tell: Callable[[Site], np.ndarray],
    held_out: Mapping[str, Sequence[str]] = {},
) -> list[Answer]:
    """Answer a query of training patients:
    they pay, who cannot is refused, the others' numbers are told.

    Guarantee: `tell` is called for no site whose patients have not paid. Where `held_out` names
    patients, by site, these pay too.
    """
    first = sites[0]
    names = [site.name for site in sites]
    account = first.account
    if first.guarantee is None or first.guarantee.simulation_only:
        account = None
    refused: Mapping[str, Exception] = {}
    if account:
        refused = account.pay_query(label, names)
        if asked := {name: ids for name, ids in held_out.items() if name not in refused}:
            refused = {**refused, **account.pay_query_held_out(label, asked)}

    answers: list[Answer] = []
    for site in sites:
        if site.name in refused:
            answers.append(SiteError(str(refused[site.name])))
        else:
            answers.append(codec.encode({}, {tensor: torch.from_numpy(tell(site))}))
    if account:
        account.note_query_answered(label, names)
    return answers


def _ballot(site: Site, w_P: Tensor) -> float:
    """Return a site's vote in [0, 1]: 1 where its own model's mean squared error is less by
    FULL_VOTE or more.

    0 where it is more by as much, between them in proportion.

    Guarantee: within [0, 1] whatever the records are, so that one patient moves it by
    VOTE_SENSITIVITY at most. It is told to nobody as it is, as any patient may move it wholly: the
    noise is paid for (`SiteLedger.pay_query`).

    Edge cases:
    - training or testing the own model fails, or does not stay finite: 0.5, and the reason in the
      site's own log;
    - no held-out record: 0.5.
    """
    try:
        own_P = train_own(site.name, site.train, site.encoding, site.study)
        target = site.encoding.target
        less = float(errs_less(site.model, own_P, w_P, site.test, target).mean()) / target.scale**2
    except Exception:
        logger.exception(
            "%s: its own model could not be trained or tested; it votes neither way", site.name
        )
        return 0.5

    if not math.isfinite(less):  # no held-out record, or training that did not stay finite
        return 0.5
    return 0.5 + 0.5 * min(1.0, max(-1.0, less / guarantees.FULL_VOTE))


@operation("count")
def count_scores(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> list[Answer]:
    """Answer with what the study's rule needs of training rows to choose the threshold; under a
    claim paid and noised.

    Guarantee: under a claim one record of each patient counts, so that a patient moves the vector
    by the rule's sensitivity; it carries the noise that is paid for, here or on the sum of all
    sites, and is paid before it is made.

    Edge cases:
    - other than the cells that are paid for, or a rule that needs no rows: refused, and nobody is
      charged;
    - asked again after an answer: paid anew, until the plan holds no more;
    - without a claim every record counts, and nothing is noised.
    """
    first = sites[0]
    edges = read_edges(tensors)
    rule = first.study.rule()
    guarantee = first.guarantee
    if not rule.chosen:
        raise SiteError(
            f"data.threshold={first.study.data.threshold!r} needs no training row; none is counted"
        )
    if guarantee and len(edges) + 1 != decision.CHOOSING_CELLS:
        raise SiteError(
            f"{len(edges)} edges between cells; {decision.CHOOSING_CELLS} cells are paid for"
        )

    def tell(site: Site) -> np.ndarray:
        rows = one_each(site.train) if guarantee else site.train
        vector: np.ndarray = rule.vector(tally(site, rows, tensors["w"], edges)).astype(np.float64)
        if guarantee is None:
            return vector
        return _noise(site, guarantee, "threshold", rule.sensitivity(), vector)

    return _answer_query(sites, "threshold", "counts", tell)


@operation("ranges")
def _ranges(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Answer with how many training patients have each
    open column's value in which cell, paid and noised.

    Of each patient the middle one of the known cells counts, so that it moves one count of each
    column by one; who has none counts nowhere. No count is above the declared size: so no patient
    decides whether the site is left out.
    """
    first = sites[0]
    guarantee = first.guarantee
    columns = open_columns(first.study)
    if guarantee is None or "ranges" not in guarantee.queries:
        raise SiteError(
            "privacy.ranges_epsilon=0, or no column is open: nobody has paid for a range"
        )
    edges = _range_edges(header, tensors, len(columns))
    most = guarantees.ranges_sensitivity(len(columns))
    turn = header["turn"]

    def tell(site: Site) -> np.ndarray:
        counts = quantiles.count(
            [_one_cell_each(table_of(site), name) for name in columns], edges
        ).astype(np.float64)
        # as the coordinator holds it to
        counts = np.minimum(counts, guarantees.declared_size(first.study, site.name))
        return _noise(site, guarantee, "ranges", most, counts, turn)

    return _answer_query(sites, "ranges", "counts", tell)


def _range_edges(header: Header, tensors: Mapping[str, Tensor], columns: int) -> np.ndarray:
    """Return the coordinator's edges between cells [F, C - 1];
    refuse what is not paid for, or not sound.
    """
    turn: Any = header.get("turn")
    edges = tensors["edges"].numpy() if "edges" in tensors else np.empty(0)
    if type(turn) is not int or turn not in range(quantiles.TIMES):
        raise SiteError(
            f"turn={turn!r} of counts for ranges; {quantiles.TIMES} are paid for, 0 the first"
        )
    if edges.shape != (columns, quantiles.CELLS[turn] - 1):
        raise SiteError(
            f"edges of {' x '.join(map(str, edges.shape))} numbers for ranges; {columns} columns "
            f"are open, and {quantiles.CELLS[turn]} cells of each are paid for in turn {turn}"
        )
    if edges.dtype != np.float64 or not all(map(decision.sound, edges)):
        raise SiteError(
            "the coordinator sends no edges between cells of values; run the same medfed everywhere"
        )

    return edges


def _one_cell_each(table: SiteTable, name: str) -> np.ndarray:
    """Return a value of each training patient who has one: the middle one of the known, in the
    order of records.
    """
    values = table.numbers.get(name, np.full(len(table), np.nan))
    known = ~table.test & table.taking_part() & ~np.isnan(values)
    _, first, count = np.unique(table.patient[known], return_index=True, return_counts=True)
    found: np.ndarray = values[known][first + (count - 1) // 2]
    return found


def _noise(
    site: Site, guarantee: Guarantee, label: str, sensitivity: float, value: np.ndarray, *turn: int
) -> np.ndarray:
    """Return a site's answer to a query with its own noise, unless the sum of all sites is noised.

    `turn` is the site's where it is asked several times.
    """
    if guarantees.counted_together(site.study):
        return value
    key = Streams(site.study.study.seed).key(label, site.name, *turn)
    noise = guarantees.query_noise(guarantee, label, sensitivity, value.size, key)
    noised: np.ndarray = value + noise.reshape(value.shape)
    return noised


def read_edges(tensors: Mapping[str, Tensor]) -> np.ndarray:
    edges = tensors["edges"].numpy() if "edges" in tensors else np.empty(0)
    if edges.ndim != 1 or not decision.sound(edges):
        raise SiteError(
            "the coordinator sends no edges between cells of scores; run the same medfed everywhere"
        )
    return edges


def one_each(rows: Rows) -> Rows:
    """Return the first record of each patient."""
    _, first = np.unique(rows.patient, return_index=True)
    return rows.at(torch.from_numpy(first))


def tally(site: Site, rows: Rows, w_P: Tensor, edges: np.ndarray) -> np.ndarray:
    own = ALGORITHMS[site.study.training.algorithm].personal
    z_NC = outputs(site.model, w_P + site.memory["offset"] if own else w_P, rows.x)
    return decision.tally(z_NC[:, 0].double().numpy(), rows.y.numpy(), edges)
