"""What a run came to: its model, what it predicts and decides;
and a finished run read from its folder.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from medfed.core.checks import (
    DataError,
    RunError,
    plain,
    some,
)
from medfed.core.flat import Layout, fill, select_trained
from medfed.core.streams import Streams
from medfed.data import mapping, schema
from medfed.data.encoding import Encoding
from medfed.data.frames import number_rows
from medfed.data.tables import clean, read
from medfed.learn import zoo
from medfed.learn.local import outputs
from medfed.monitor import events
from medfed.monitor.summary import summarise
from medfed.planning.building import build_model
from medfed.runs.folders import read_plan
from medfed.study import Study


@dataclass(frozen=True)
class Result:
    """What a run came to: `summary` as in summary.json, the model, and the folder (None for a
    simulation in memory).
    """

    summary: dict[str, Any]
    study: Study
    encoding: Encoding
    w_P: Tensor
    folder: Path | None
    # of the model: frozen parameters and buffers
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all asked rounds ran with all asked sites."""
        return bool(self.summary["status"] == "complete")

    @property
    def model(self) -> nn.Module:
        """The model as it was tested, in evaluation mode."""
        module = fill(build_model(self.study, self.encoding), self.w_P)
        own = zoo.select_fixed(module)
        with torch.no_grad():
            for name, value in self.fixed.items():
                own[name].copy_(value)
        return module.eval()

    def predict(
        self, table: pd.DataFrame | str | Path, unseen: schema.Unseen = "missing"
    ) -> pd.DataFrame:
        """Return the model's prediction for each row of a table with the study's feature columns.

        A path is read as the study reads its table; rows are then named as in the file.

        Columns: a probability for each label (binary: the positive one), or the predicted number.
        What is missing, and with `unseen` = "missing" a category that no site had, is set to the
        centre of all sites, so that a row's prediction does not depend on the other rows. Raises
        DataError for what was otherwise in training; also for a column of which most categories are
        such.
        """
        target = self.encoding.target
        filler = target.labels[0] if target.labels else 0.0
        frame, named = schema.fit(self._frame(table), self.encoding, self.study.data)
        filled = mapping.apply(frame, named).assign(**{named.target: filler})
        known = {**named.dictionary, **schema.categories(self.encoding)}
        named = dataclasses.replace(named, dictionary=known)
        framed = number_rows(schema.hold(filled, self.encoding, named, unseen))
        cleaned = clean("prediction", framed, named, Streams(0))
        every = np.ones(len(cleaned), dtype=bool)
        rows = self.encoding.encode(cleaned, every, ~every)
        z = outputs(self.model, self.w_P, rows.x)
        if target.task == "regression":
            return pd.DataFrame(
                {target.name: (z[:, 0] * target.scale + target.centre).numpy()}, index=frame.index
            )
        if target.task == "binary":
            return pd.DataFrame(
                {target.labels[1]: torch.sigmoid(z[:, 0]).numpy()}, index=frame.index
            )

        return pd.DataFrame(z.softmax(-1).numpy(), columns=list(target.labels), index=frame.index)

    def _frame(self, table: pd.DataFrame | str | Path) -> pd.DataFrame:
        """Return the table to predict;
        one of a path is read as the study's, without what is joined to that.
        """
        if isinstance(table, pd.DataFrame):
            return table
        if not isinstance(table, (str, Path)):
            raise DataError(
                f"predict takes a DataFrame, or the path of a table; got {type(table).__name__}"
            )
        return read(Path(table), data=dataclasses.replace(self.study.data, site_is_file=False))

    def decide(self, table: pd.DataFrame | str | Path) -> pd.Series:
        """Return the label called for each row: the positive one from the run's threshold on.

        Of several labels the likeliest. Raises RunError for a regression, which calls nothing.
        """
        target = self.encoding.target
        told = self.predict(table)
        if target.task == "regression":
            raise RunError(
                f"data.task='regression' of {target.name!r} has no labels to call; use predict"
            )
        if target.task == "multiclass":
            return told.idxmax(axis=1).rename(target.name)
        decision = self.summary["decision"]
        if decision is None:
            raise RunError(
                "the run ended before its model was tested, so no threshold is known; resume it"
            )

        called = (told[target.labels[1]] >= decision["threshold"]).to_numpy().astype(int)
        return pd.Series(np.array(target.labels)[called], index=told.index, name=target.name)


def is_complete(folder: Path) -> bool:
    """Say whether a run has ended with all that was asked for; raise as `read_summary` does."""
    summary = read_summary(folder)
    return summary is not None and summary.get("status") == "complete"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return what a run came to when it last ended; None where it has not, or goes on.

    Raises RunError for a file that is damaged.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected an object")
        if (end := found.get("trail")) and type(end["entries"]) is not int:
            raise ValueError(f"trail={end!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({plain(error)}); restore it from a copy, or remove it: `medfed "
            f"resume {folder}` writes it anew"
        ) from error
    return found


def load(folder: str | Path) -> Result:
    """Return what a finished run came to, from its folder;
    raise RunError where it has not finished or is damaged.
    """
    folder = Path(folder)
    study, encoding = read_plan(folder)
    try:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: no model ({plain(error)}); `medfed resume {folder}` finishes the run"
        ) from error

    module = build_model(study, encoding)
    wanted = {**select_trained(module), **zoo.select_fixed(module)}
    if absent := [name for name in wanted if name not in tensors]:
        raise RunError(
            f"{folder}/model.safetensors lacks {some(absent)}; it was not written by this study"
        )

    w_P = torch.cat([tensors[name].reshape(-1) for name in Layout.of(module).shapes])
    kept = {name: tensors[name] for name in zoo.select_fixed(module)}
    return Result(
        summarise(events.read(folder / "events.jsonl")), study, encoding, w_P, folder, kept
    )
