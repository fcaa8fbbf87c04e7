"""How many clients rounds draw: what public facts say before any is drawn."""

from collections.abc import Sequence

from medfed.core.streams import Streams
from medfed.fleet import selection
from medfed.study import Study


def cohort(study: Study, clients: Sequence[str]) -> int:
    """Return how many clients the smallest round draws."""
    return min(cohorts(study, clients))


def cohorts(study: Study, clients: Sequence[str]) -> set[int]:
    """Return how many clients rounds draw: one number, or one of each group."""
    fleet = study.fleet
    selector = selection.SELECTORS[study.fleet.schedule]
    if selector.law != "turns":
        return {fleet.clients_per_round or len(clients)}
    streams = Streams(study.study.seed)
    return {
        len(selector.eligible(clients, n + 1, fleet.groups, streams)) for n in range(fleet.groups)
    }
