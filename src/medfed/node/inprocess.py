"""The embedded engine: sites in this process, a cohort served as one stack. The default."""

import time
from collections import deque
from collections.abc import Sequence

from medfed.core.checks import SiteError
from medfed.engine.port import Reply
from medfed.node.site import Site, handle_many
from medfed.planning.plan import POOLED


class InProcess:
    """Sites side by side in one process. Only bytes pass between them and the coordinator.

    A question waits until the coordinator polls; then it is answered for all its sites at once.
    Each site is charged its share of the stack's time.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = {site.name: site for site in sites}
        self._waiting: deque[tuple[list[int], list[str], str, bytes, float]] = deque()
        self._tickets = 0

    def sites(self) -> list[str]:
        """Return the names of all sites."""
        return list(self._sites)

    def site(self, name: str) -> Site:
        """Return a site itself: only a simulation has it at hand.

        The baseline `pooled` is a site that holds the rows of all, made when it is first named.
        """
        if name == POOLED and name not in self._sites:
            self._sites[name] = Site.pooled(list(self._sites.values()))
        return self._sites[name]

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        """Ask one site."""
        return self.submit_many([site], op, payload, deadline)[0]

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Ask several sites the same; they will be served as one stack."""
        tickets = list(range(self._tickets, self._tickets + len(sites)))
        self._tickets += len(sites)
        self._waiting.append((tickets, list(sites), op, payload, deadline))
        return tickets

    def poll(self, wait: float) -> list[Reply]:
        """Answer the question that has waited longest; nothing runs while nobody polls."""
        if not self._waiting:
            return []
        tickets, names, op, payload, deadline = self._waiting.popleft()
        began = time.perf_counter()
        answers = handle_many([self.site(name) for name in names], op, payload)
        seconds = (time.perf_counter() - began) / max(1, len(names))
        late = f"no answer within {deadline:g} s" if seconds > deadline else ""

        replies = []
        for ticket, name, answer in zip(tickets, names, answers, strict=True):
            if isinstance(answer, SiteError):
                error = str(answer) or type(answer).__name__
                replies.append(Reply(ticket, name, b"", seconds, error))
            else:
                replies.append(Reply(ticket, name, answer, seconds, late))
        return replies
