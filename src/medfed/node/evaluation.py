"""Testing at a site: scores of its held-out patients, or noised counts of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import SiteError
from medfed.core.entropy import Entropy
from medfed.learn.algorithms import ALGORITHMS
from medfed.learn.local import outputs
from medfed.monitor.per_site import scores_each
from medfed.node.own_model import errs_less
from medfed.node.queries import one_each, read_edges, tally
from medfed.node.site import Answer, Header, Site, operation, table_of
from medfed.privacy import guarantee as guarantees
from medfed.privacy.mechanisms import geometric_noise


@operation("evaluate")
def evaluate(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Test the global model, or each site's own, on each site's held-out patients.

    Args:
        sites: those asked, of one process.
        header: the question's.
        tensors: the question's: `w`, the model [P], or a histogram's edges.
    """
    first = sites[0]
    if guarantees.asked(first.study) and not first.study.data.test_is_public:
        return _count_scores(sites, tensors)
    personal = ALGORITHMS[first.study.training.algorithm].personal
    target = first.encoding.target

    if personal:
        z = torch.cat(
            [
                outputs(site.model, tensors["w"] + site.memory["offset"], site.test.x)
                for site in sites
            ]
        )
    else:
        z = outputs(first.model, tensors["w"], torch.cat([site.test.x for site in sites]))

    y = torch.cat([site.test.y for site in sites])
    sizes = [len(site.test) for site in sites]
    strange = _find_strange(z, sizes)
    scores = scores_each(target.task, z.nan_to_num(0.0, 0.0, 0.0), y, sizes, target.scale)

    return [
        SiteError("the model's outputs are not finite") if bad else codec.encode({}, one.tensors())
        for bad, one in zip(strange, scores, strict=True)
    ]


def _find_strange(z_NC: Tensor, sizes: Sequence[int]) -> list[bool]:
    """Say at which sites an output is no finite number; site k owns the next sizes[k] rows."""
    site_N = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    bad_N = ~torch.isfinite(z_NC).all(-1)
    found: list[bool] = (torch.bincount(site_N[bad_N], minlength=len(sizes)) > 0).tolist()
    return found


@operation("compare")
def _compare(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Tell by how much each site's own model errs less than another, on its held-out records.

    Sums over records of the difference of squared errors: their number, sum, sum of squares [3].
    """
    first = sites[0]
    if guarantees.asked(first.study):
        raise SiteError("own models are not compared under a privacy claim: nobody has paid for it")
    replies: list[Answer] = []

    for site in sites:
        own_P = tensors["w"] + site.memory["offset"]
        less_N = errs_less(site.model, own_P, tensors["other"], site.test, site.encoding.target)
        if not torch.isfinite(less_N).all():
            replies.append(SiteError("a model's outputs are not finite"))
            continue
        sums = torch.stack(
            [torch.tensor(float(len(less_N))).double(), less_N.sum(), less_N.square().sum()]
        )
        replies.append(codec.encode({}, {"paired": sums}))

    return replies


def _count_scores(sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Test the model on patients who are not public: their histogram of scores, paid for.

    Noised here, unless whoever combines rows is trusted with sums without noise, and noises the sum
    of all sites.

    Guarantee: each held-out patient counts in one cell, with the first record alone, so that
    two-sided geometric noise of scale 1 / epsilon makes the histogram epsilon-private; every
    patient has paid before it is made.

    Edge cases:
    - edges that are none, or not in order, are refused whoever is in the table;
    - who cannot pay keeps one site's histogram back, and no number of patients is told;
    - nobody is held out at a site: it answers all the same, with counts of zero under whatever
      noise there is;
    - `simulation_only`: nobody pays, and nothing is claimed.
    """
    study = sites[0].study
    edges = read_edges(tensors)
    together = guarantees.counted_together(study)
    rows = [one_each(site.test) for site in sites]
    account = None if study.privacy.simulation_only else sites[0].account
    refused: Mapping[str, Exception] = {}
    if account:
        ids = {
            site.name: table_of(site).ids[own.patient.numpy()]
            for site, own in zip(sites, rows, strict=True)
        }
        refused = account.pay_tests(ids)

    replies: list[Answer] = []
    for site, own in zip(sites, rows, strict=True):
        if site.name in refused:
            replies.append(SiteError(str(refused[site.name])))
            continue
        counts = tally(site, own, tensors["w"], edges)
        if not together:
            counts = counts + geometric_noise(
                counts.shape, study.privacy.evaluation_epsilon, Entropy()
            )
        replies.append(codec.encode({}, {"counts": torch.from_numpy(counts)}))
    if account:
        account.note_tested(site.name for site in sites)
    return replies
