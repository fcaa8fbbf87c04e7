"""What other packages add: algorithms, rules, links, selectors, learners, operations, each an entry
in its registry.

An installed package names a module under the entry point `medfed.extensions`; importing that module
makes the entries. So a study names what is added as it names what is bundled, at every party that
has the package; and what a site has not installed cannot run there.
"""

from functools import cache
from importlib.metadata import entry_points

from medfed.core.checks import PlanError, plain

GROUP = "medfed.extensions"


@cache
def load() -> tuple[str, ...]:
    """Import what installed packages add, once a process; return the names of the entry points."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    for entry in found:
        try:
            entry.load()
        except Exception as error:
            raise PlanError(
                f"the extension {entry.name!r} ({entry.value}) cannot be imported: "
                f"{type(error).__name__}: {plain(error)}. Mend or uninstall its package."
            ) from error
    return tuple(entry.name for entry in found)
