"""`medfed export`: a run in other tools."""

from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import RunFolder, console


def export(
    run: RunFolder,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write TensorBoard events.")
    ] = None,
    mlflow: Annotated[
        str, typer.Option(metavar="URI", help="Log to an MLflow tracking server or store.")
    ] = "",
    otlp: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Send spans to a collector: http://localhost:4318/v1/traces"
        ),
    ] = "",
) -> None:
    """Send a run to other tools: rounds and figures to TensorBoard or MLflow, spans to an
    OpenTelemetry collector.

    Prometheus reads /metrics of `medfed serve`. No device and no patient is named anywhere.
    """
    from medfed.core.checks import ExportError
    from medfed.screens import exporters

    if not (tensorboard or mlflow or otlp):
        raise ExportError(
            "nothing to export to; give --tensorboard FOLDER, --mlflow URI or --otlp URL"
        )
    if tensorboard:
        count = exporters.to_tensorboard(run, tensorboard)
        console().print(
            f"tensorboard: {count:,} figures in {tensorboard}", highlight=False, soft_wrap=True
        )
    if mlflow:
        console().print(
            f"mlflow: run {exporters.to_mlflow(run, mlflow)} at {mlflow}",
            highlight=False,
            soft_wrap=True,
        )
    if otlp:
        console().print(
            f"otlp: {exporters.trace(run, exporters.otlp(otlp))} rounds sent", highlight=False
        )
