"""Where budget ledgers lie: the site's own, which its operator names, or that of one run.

A study file cannot lead away from the operator's ledger: patients would have a second budget there.
"""

import os
from pathlib import Path

import platformdirs

from medfed.core.checks import LedgerError
from medfed.privacy.ledger import KEY, anchor_of
from medfed.study import Study

LEDGER = "ledger.sqlite"
HOME = "MEDFED_HOME"


def ledger_path(study: Study, folder: Path | None) -> Path | None:
    """Return where a study's budget ledger lies: the lifetime ledger, or the run's own; None keeps it in memory.

    Raises LedgerError where the study names another folder than the operator, or one without a ledger.
    """
    if study.privacy.scope == "run":
        return folder / LEDGER if folder else None
    mine = operators_folder()
    if not study.privacy.ledger:
        return (mine or _default()) / LEDGER
    asked, told = study.folder / Path(study.privacy.ledger).expanduser(), f"privacy.ledger={study.privacy.ledger!r}"
    if mine is not None and asked.resolve() != mine.resolve():
        raise LedgerError(
            f"{told} is not the ledger of this site, in {mine}: patients would have a second budget. Leave "
            f"privacy.ledger out; the site's operator names another place by {HOME}."
        )
    if not (asked / LEDGER).exists() and mine is None:
        raise LedgerError(
            f"{told} holds no ledger {LEDGER}, and a study founds none where it likes. Leave privacy.ledger out, or "
            "have the site's operator found it: medfed privacy found FOLDER --lifetime-epsilon E --delta D "
            "--operator NAME."
        )
    return asked / LEDGER


def operators_folder() -> Path | None:
    """Return the folder that the site's operator has named: by MEDFED_HOME, or by a ledger in the user's data folder.

    A ledger that is lost but for its key or anchor counts too. Raises LedgerError where MEDFED_HOME is relative.
    """
    if home := os.environ.get(HOME):
        if not Path(home).expanduser().is_absolute():
            raise LedgerError(
                f"{HOME}={home!r} would be another ledger for each folder that somebody starts from; expected an "
                "absolute path"
            )
        return Path(home).expanduser()
    place = _default() / LEDGER
    return _default() if any(p.exists() for p in (place, place.with_name(KEY), anchor_of(place))) else None


def home() -> Path:
    """Return where the site's ledger lies, or would be founded."""
    return operators_folder() or _default()


def _default() -> Path:
    return Path(platformdirs.user_data_dir("medfed"))
