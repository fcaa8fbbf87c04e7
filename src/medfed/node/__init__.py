"""What runs at a site, and the engines that reach it; each module here registers the operations
that it answers.
"""

from medfed.node import evaluation, paying, queries, rehearse, setup, state, work

__all__ = ["evaluation", "paying", "queries", "rehearse", "setup", "state", "work"]
