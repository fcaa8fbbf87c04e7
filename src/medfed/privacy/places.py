"""Where budget ledgers lie: the site's own, which its operator names, or that of one run.

A study file cannot lead away from the operator's ledger: patients would have a second budget there.
"""

import os
from pathlib import Path

import platformdirs

from medfed.core.checks import LedgerError
from medfed.privacy.ledger_file import KEY, anchor_of
from medfed.study import Study

LEDGER = "ledger.sqlite"
HOME = "MEDFED_HOME"


def ledger_path(study: Study, folder: Path | None) -> Path | None:
    """Return where a study's budget ledger lies:
    the lifetime ledger, or the run's own; None keeps it in memory.

    Raises LedgerError where the study names another folder than the operator, or one without a
    ledger.
    """
    if study.privacy.scope == "run":
        if folder:
            return folder / LEDGER
        return None

    mine = operators_folder()
    if not study.privacy.ledger:
        return (mine or _default()) / LEDGER
    asked = study.folder / os.path.expanduser(study.privacy.ledger)
    told = f"privacy.ledger={study.privacy.ledger!r}"
    if mine is not None and asked.resolve() != mine.resolve():
        raise LedgerError(
            f"{told} is not the ledger of this site, in {mine}: patients would have a second "
            "budget. Leave privacy.ledger out; the site's operator names another place by "
            f"{HOME}."
        )
    if not (asked / LEDGER).exists() and mine is None:
        raise LedgerError(
            f"{told} holds no ledger {LEDGER}, and a study founds none where it likes. Leave "
            "privacy.ledger out, or have the site's operator found it: medfed privacy found "
            "FOLDER --lifetime-epsilon E --delta D --operator NAME."
        )

    return asked / LEDGER


def operators_folder() -> Path | None:
    """Return the folder that the site's operator has named: by MEDFED_HOME, or by a ledger in the
    user's data folder.

    A user without a home has no data folder.

    A ledger that is lost but for its key or anchor counts too. Raises LedgerError where MEDFED_HOME
    is relative.
    """
    if home := os.environ.get(HOME):
        place = Path(os.path.expanduser(home))  # a ~ without a home stays one, and is refused
        if not place.is_absolute():
            raise LedgerError(
                f"{HOME}={home!r} would be another ledger for each folder that somebody starts "
                "from; expected an absolute path"
            )
        return place

    if (default := _data_folder()) is None:
        return None
    place = default / LEDGER
    if any(p.exists() for p in (place, place.with_name(KEY), anchor_of(place))):
        return default

    return None


def home() -> Path:
    """Return where the site's ledger lies, or would be founded."""
    return operators_folder() or _default()


def _default() -> Path:
    """Return the user's data folder; raise LedgerError where the user has none: a ledger must not
    follow the shell.
    """
    place = _data_folder()
    if place is None:
        raise LedgerError(
            f"this user has no home folder, where the site's ledger would lie. Set {HOME} to an "
            "absolute path."
        )
    return place


def _data_folder() -> Path | None:
    """Return the user's data folder; None where the system knows no home of the user."""
    try:
        place = Path(platformdirs.user_data_dir("medfed"))
    except RuntimeError:
        return None
    if place.is_absolute():
        return place
    return None
