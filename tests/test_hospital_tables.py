"""From three hospitals' own exports to a model: the same bits as from one clean csv."""

from pathlib import Path

import torch

from medfed import runs
from medfed import study as studies
from medfed.data import sources
from tests.tables import STUDY, invented

SEMICOLONS = STUDY.replace(
    'table = "cohort.csv"', 'table = "exports"\nsite_is_file = true'
).replace('site = "hospital"', "")


def test_exports_of_hospitals_train_the_model_of_the_clean_table(tmp_path: Path) -> None:
    frame = invented().rename(columns={"age": "größe"})
    frame.drop(columns="lactate").to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "clean.toml").write_text(STUDY.replace("rounds = 4", "rounds = 2"))

    (tmp_path / "exports").mkdir()
    for site, part in frame.drop(columns="lactate").groupby("hospital"):
        text = part.drop(columns="hospital").to_csv(
            index=False, sep=";", decimal=",", lineterminator="\r\n"
        )
        (tmp_path / "exports" / f"{site}.CSV").write_bytes(
            f"Export 31.12.2024\r\n{text}".encode("cp1252")
        )
    (tmp_path / "exports.toml").write_text(SEMICOLONS.replace("rounds = 4", "rounds = 2"))

    study = studies.load(tmp_path / "exports.toml")
    completed = sources.complete(study)
    # as a run keeps it
    assert completed == sources.complete(study.set("data.site", completed.site))
    weights = [
        runs.simulate(studies.load(tmp_path / name), tmp_path / f"{name}.run").w_P
        for name in ("clean.toml", "exports.toml")
    ]
    assert torch.equal(*weights)
