"""What stands against a study: told all at once, each with what would mend it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medfed.core import toml
from medfed.core.checks import MedfedError, some
from medfed.core.toml import Path

MOST_LINES = 24
"""A longer block of settings is not printed in an error."""

MOST_CHARACTERS = 1000
"""Nor is one with a longer line: a list of thousands of columns."""

MOST_TOLD = 40
"""More things than these are counted in an error, not told."""

_MOST_SITES = 20
"""Of more sites that share what stands against them the others are counted."""

LEAVE_OUT = toml.Ask(None, "")
"""In a refusal's `mend`: the key goes."""


@dataclass(frozen=True)
class Refusal:
    """One thing that stands against a study:
    the error that tells it, and the settings by path that would mend it.

    A value is one that is right whatever the records are, or a blank (`toml.Ask`). Without any, a
    person has to choose.
    """

    error: MedfedError
    mend: Mapping[Path, Any] = field(default_factory=dict)


def refuse(found: Iterable[Refusal]) -> None:
    """Raise what stands against a study: one thing as it is, several as an error of the first's
    kind that tells all.
    """
    refusals = tuple({str(refusal.error): refusal for refusal in found}.values())
    if not refusals:
        return
    error = refusals[0].error
    if len(refusals) > 1:
        told = _merge_sites([str(refusal.error) for refusal in refusals])
        lines = told
        if len(told) > 1:
            lines = [f"{len(told)} things stand against this study:"]
            lines += [f" {number}. {text}" for number, text in enumerate(told[:MOST_TOLD], 1)]
        if len(told) > MOST_TOLD:
            lines += [f" and {len(told) - MOST_TOLD} more"]
        error = type(error)("\n".join([*lines, *_way_out(refusals)]))
    error.refusals = refusals
    raise error


_OF_A_SITE = re.compile(r"site ('[^']*'|\"[^\"]*\"), (.*)", re.DOTALL)
_DIFFERENT = re.compile(r"(\d+) different")


def _merge_sites(told: Sequence[str]) -> list[str]:
    """Return what stands against sites once where they share it: with all of them, and how many
    values from to.
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for text in told:
        match = _OF_A_SITE.fullmatch(text)
        if match:
            site = match[1]
            what = match[2]
            alike.setdefault(_DIFFERENT.sub("", what), []).append((site, what))
        else:
            alike.setdefault(f"site {text}", []).append(("", text))

    lines = []
    for group in alike.values():
        site, what = group[0]
        counts = [int(count) for _, what in group for count in _DIFFERENT.findall(what)]
        if counts and min(counts) < max(counts) and len(counts) == len(group):
            what = _DIFFERENT.sub(f"{min(counts)} to {max(counts)} different", what)
        if site:
            sites = some((site for site, _ in group), _MOST_SITES)
            what = f"site{'s' * (len(group) > 1)} {sites}, {what}"
        lines.append(what)

    return lines


def gather(check: Callable[[], object]) -> list[Refusal]:
    """Return what a check refuses, in place of raising it."""
    try:
        check()
    except MedfedError as error:
        return list(error.refusals) or [Refusal(error)]
    return []


def mends(refusals: Iterable[Refusal]) -> dict[Path, Any]:
    """Return the settings that would mend all of them; of two for one key the first counts, of two
    nested the outer.
    """
    settings: dict[Path, Any] = {}
    for refusal in refusals:
        for path, value in refusal.mend.items():
            settings.setdefault(path, value)
    return {
        path: value
        for path, value in settings.items()
        if not any(path[:n] in settings for n in range(len(path)))
    }


def _way_out(refusals: Sequence[Refusal]) -> list[str]:
    """Return how to mend them, where settings can: those where they are few, and the command that
    writes the study.
    """
    settings = mends(refusals)
    if not settings:
        return []
    block = list(
        toml.document(toml.nest({path: v for path, v in settings.items() if v is not LEAVE_OUT}))
    )
    command = (
        "`medfed study fix STUDY` prints the study that would be accepted, with blanks for what "
        "only you know."
    )
    if not block or len(block) > MOST_LINES or max(map(len, block)) > MOST_CHARACTERS:
        return [command]
    return ["Settings that mend this, to be put into their tables:", *block, "", command]
