"""A run in other tools: Prometheus, OpenTelemetry, MLflow, TensorBoard.
Each is a function of the event log.

Labels and attributes name runs, studies and hospitals, never a device (each is one patient's) and
never a patient.
"""

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from medfed.core import files
from medfed.core.checks import ExportError, plain
from medfed.monitor.events import (
    GivenUp,
    Resumed,
    RolledBack,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    SecurityAudit,
    SiteExcluded,
    Stamped,
    Tested,
    read_stamped,
)
from medfed.screens.sentences import sentence
from medfed.screens.story import Story

PROMETHEUS_TYPE = CONTENT_TYPE_LATEST


def _read(folder: Path) -> tuple[list[Stamped], Story]:
    told = list(read_stamped(folder / "events.jsonl"))
    return told, Story.from_events(one.event for one in told)


# Prometheus


@dataclass(frozen=True)
class Sample:
    """One number of a run:
    a metric, the values of its labels after the run (its study first), and the value.
    """

    metric: str
    labels: tuple[str, ...]
    value: float


def prometheus(found: Mapping[str, Sequence[Sample]]) -> str:
    """Return the samples of runs, by name, in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Families(found))
    return generate_latest(registry).decode()


class _Families(Collector):
    def __init__(self, found: Mapping[str, Sequence[Sample]]) -> None:
        self.found = found

    def collect(self) -> Iterator[Metric]:
        """Yield every family of metrics."""
        whole = ("run", "study")
        gauges: dict[str, tuple[str, Sequence[str]]] = {
            "medfed_round": ("The last finished round.", whole),
            "medfed_rounds_asked": ("Rounds that the study asks for.", whole),
            "medfed_finished": ("1: the run ended, complete or not.", whole),
            "medfed_complete": ("1: all asked rounds ran with all asked sites.", whole),
            "medfed_round_seconds": ("Time of the last round.", whole),
            "medfed_training_loss": ("Training loss of the last round.", whole),
            "medfed_test": ("The last test on held-out records of all sites.", (*whole, "figure")),
            "medfed_epsilon_spent": (
                "Epsilon of all that was released so far, patient level.",
                whole,
            ),
            "medfed_epsilon_target": ("Epsilon that the study allows.", whole),
            "medfed_suspects": ("Participants that were warned or left out.", whole),
            "medfed_site_seconds": (
                "Local work of a site in the last round that it took part in.",
                (*whole, "site"),
            ),
            "medfed_site_suspicion": (
                "The strongest evidence against a site in the last round.",
                (*whole, "site"),
            ),
        }
        counters: dict[str, tuple[str, Sequence[str]]] = {
            "medfed_bytes": ("Bytes sent: up from sites, down to them.", (*whole, "direction")),
            "medfed_rounds_taken_back": ("Rounds whose model was taken back.", whole),
            "medfed_rounds_given_up": ("Rounds that were given up by an operator.", whole),
            "medfed_left_out": ("Rows that did not count.", whole),
            "medfed_site_rounds": ("Rounds that a site took part in.", (*whole, "site")),
            "medfed_site_left_out": ("Rounds in which a site did not count.", (*whole, "site")),
        }
        families: dict[str, Metric] = {
            name: GaugeMetricFamily(name, text, labels=labels)
            for name, (text, labels) in gauges.items()
        }
        families |= {
            name: CounterMetricFamily(name, text, labels=labels)
            for name, (text, labels) in counters.items()
        }
        for run, mine in self.found.items():
            for one in mine:
                families[one.metric].add_metric([run, *one.labels], one.value)  # type: ignore[attr-defined]

        return iter(families.values())


def samples(story: Story) -> list[Sample]:
    """Return what is known of a run; sites are named where hospitals are, devices never."""
    study = str(story.summary["study"])
    told = ((name, labels, value) for name, labels, value in _samples(story) if value is not None)
    return [Sample(name, (study, *labels), float(value)) for name, labels, value in told]


def _samples(story: Story) -> Iterator[tuple[str, tuple[str, ...], float | None]]:
    """Yield (metric, labels after run and study, value) of one run."""
    s = story.summary
    yield "medfed_round", (), max(story.rounds, default=0)
    yield "medfed_rounds_asked", (), s["rounds_asked"]
    yield "medfed_finished", (), story.finished is not None
    yield "medfed_complete", (), s["status"] == "complete"
    if story.rounds:
        last = story.rounds[max(story.rounds)]
        yield "medfed_round_seconds", (), last.seconds
        yield "medfed_training_loss", (), last.loss

    if tested := story.last_test():
        for name, figure in tested.all_sites.items():
            yield "medfed_test", (name,), figure.value
    privacy = s["privacy"] or {}
    yield "medfed_epsilon_spent", (), privacy.get("epsilon")
    yield "medfed_epsilon_target", (), privacy.get("target_epsilon")
    yield "medfed_suspects", (), len(s["suspects"])
    for direction, count in s["bytes"].items():
        yield "medfed_bytes", (direction,), count
    yield "medfed_rounds_taken_back", (), len(story.taken_back)
    yield "medfed_rounds_given_up", (), len(story.given_up)
    yield "medfed_left_out", (), len(story.excluded)

    if not story.sites:  # devices, of which none is named
        return
    seconds = story.seconds()
    suspicion = story.suspicion()
    newest = max(story.inspected, default=0)
    left_out = story.left_out()
    for site in story.sites:
        yield "medfed_site_rounds", (site,), s["participation"].get(site, 0)
        yield "medfed_site_left_out", (site,), left_out[site]
        yield "medfed_site_seconds", (site,), next(reversed(seconds.get(site, [])), None)
        yield "medfed_site_suspicion", (site,), suspicion.get(site, {}).get(newest)


# OpenTelemetry


def trace(folder: Path, exporter: Any) -> int:
    """Send a run as spans to an OpenTelemetry exporter:
    the run, in it the rounds, in them the sites' work.

    Return the number of rounds sent. What happened beside (a site left out, a test, a suspicion) is
    an event of its round's span. Raises ExportError where the library is missing, or where the
    exporter does not take the spans.
    """
    sdk = _import("opentelemetry.sdk.trace", "otel")
    export = _import("opentelemetry.sdk.trace.export", "otel")
    resources = _import("opentelemetry.sdk.resources", "otel")
    told, story = _read(folder)
    kept = _Kept(exporter, export.SpanExportResult.SUCCESS)
    provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": "medfed"}))
    provider.add_span_processor(export.BatchSpanProcessor(kept))
    _send_spans(provider.get_tracer("medfed"), told, story, folder.resolve().name)
    provider.shutdown()
    if kept.failed:
        raise ExportError(
            f"{kept.failed} batches of spans were not taken; check the address, and that a "
            "collector runs"
        )

    return len(story.rounds)


class _Kept:
    """An exporter that remembers whether it failed: the batch processor tells nobody."""

    def __init__(self, inner: Any, good: Any) -> None:
        self.inner = inner
        self.good = good
        self.failed = 0

    def export(self, spans: Any) -> Any:
        """Pass spans on."""
        result = self.inner.export(spans)
        self.failed += result != self.good
        return result

    def shutdown(self) -> None:
        """End the inner exporter."""
        self.inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Flush the inner exporter."""
        return bool(self.inner.force_flush(timeout_millis))


def _send_spans(tracer: Any, told: Sequence[Stamped], story: Story, run: str) -> None:
    api = _import("opentelemetry.trace", "otel")
    if not told:
        return
    named = set(story.sites)
    root = None
    current = None

    for when, event in told:
        match event:
            case RunStarted():
                about = {
                    "medfed.run": run,
                    "medfed.study": event.study,
                    "medfed.rounds_asked": event.rounds,
                }
                root = tracer.start_span(
                    f"run {event.study}", start_time=_nanoseconds(when), attributes=about
                )
            case RoundStarted() if root:
                if current:  # it was never finished: the process was killed, and resumed
                    current[0].end(_nanoseconds(when))
                inside = api.set_span_in_context(root)
                about = {"medfed.rounds.round": event.round, "medfed.drawn": len(event.clients)}
                span = tracer.start_span(
                    "round", context=inside, start_time=_nanoseconds(when), attributes=about
                )
                current = span, when
            case RoundFinished() if current:
                span, began = current
                span.set_attributes(_attributes(event))
                for site, seconds in zip(event.clients, event.site_seconds, strict=True):
                    if site in named:
                        inside = api.set_span_in_context(span)
                        work = tracer.start_span(
                            "site",
                            context=inside,
                            start_time=_nanoseconds(began),
                            attributes={"medfed.site": site},
                        )
                        work.end(_nanoseconds(began + timedelta(seconds=seconds)))
                span.end(_nanoseconds(when))
                current = None
            case (
                SiteExcluded() | SecurityAudit() | RolledBack() | GivenUp() | Tested() | Resumed()
            ) if root:
                if text := sentence(event, bool(named)):
                    inside_of = current[0] if current else root
                    inside_of.add_event(text, timestamp=_nanoseconds(when))
            case RunFinished() if root:
                root.set_attributes({"medfed.status": event.status, "medfed.rounds": event.rounds})

    end = _nanoseconds(told[-1].time)
    if current:
        current[0].end(end)
    if root:
        root.end(end)


def _attributes(event: RoundFinished) -> dict[str, float | int]:
    about = {
        "medfed.clients": len(event.clients),
        "medfed.seconds": event.seconds,
        "medfed.bytes_up": event.bytes_up,
        "medfed.bytes_down": event.bytes_down,
        "medfed.loss": event.loss,
        "medfed.epsilon": event.privacy.get("epsilon"),
    }
    about |= {f"medfed.bytes.{phase}": count for phase, count in event.phases.items()}
    return {name: value for name, value in about.items() if isinstance(value, int | float)}


def _nanoseconds(when: datetime) -> int:
    return round(when.timestamp() * 1e6) * 1000


def otlp(address: str) -> Any:
    """Return an exporter to an OpenTelemetry collector at an address, as in
    http://localhost:4318/v1/traces.
    """
    return _import(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter", "otel"
    ).OTLPSpanExporter(address, timeout=10)


# MLflow and TensorBoard


def scalars(told: Iterable[Stamped], story: Story) -> Iterator[tuple[str, float, int, datetime]]:
    """Yield (name, value, round, when) of all that is measured by round; a site's figures where
    sites are named.
    """
    named = set(story.sites)
    for when, event in told:
        match event:
            case RoundFinished():
                values: dict[str, Any] = {
                    "loss": event.loss, "seconds": event.seconds, "bytes/up": event.bytes_up,
                    "bytes/down": event.bytes_down, "privacy/epsilon": event.privacy.get("epsilon"),
                }  # fmt: skip
                sites = zip(event.clients, event.losses, event.site_seconds, strict=True)
                for site, loss, seconds in sites:
                    if site in named:
                        values |= {f"site/{site}/loss": loss, f"site/{site}/seconds": seconds}
            case Tested():
                values = {
                    f"test/{event.model}/{name}": figure.value
                    for name, figure in event.all_sites.items()
                }
            case _:
                continue

        for name, value in values.items():
            if value is not None and math.isfinite(value):
                yield name, float(value), event.round, when


def to_tensorboard(folder: Path, out: Path) -> int:
    """Write a run's figures as TensorBoard events into `out`/<run>;
    return how many. Raises ExportError.
    """
    write = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter
    told = _read(folder)
    count = 0
    with (
        files.explained(out),
        _silence_threads(),
        write(str(out / folder.resolve().name)) as writer,
    ):
        for name, value, round, when in scalars(*told):
            writer.add_scalar(name, value, round, when.timestamp())
            count += 1
    return count


@contextmanager
def _silence_threads() -> Iterator[None]:
    """Keep what a thread fails of from being printed: who gave it the work raises it again."""
    before = threading.excepthook
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        threading.excepthook = before


_MLFLOW_BATCH = 1000  # metrics that MLflow takes at once


def to_mlflow(folder: Path, uri: str, experiment: str = "medfed") -> str:
    """Log a run to MLflow: parameters, figures by round, summary and claim as artifacts; return
    MLflow's run id.

    Raises ExportError where the library is missing, or where the tracking server refuses.
    """
    # nothing leaves but for where it was asked to go
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = _import("mlflow", "mlflow")
    entities = _import("mlflow.entities", "mlflow")
    told, story = _read(folder)
    s = story.summary

    try:
        client = mlflow.MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else client.create_experiment(experiment)
        tags = {
            "medfed.digest": str(s["digest"]),
            "medfed.status": s["status"],
            "medfed.purpose": str(s["purpose"]),
        }
        begun = _milliseconds(told[0].time) if told else round(time.time() * 1000)
        run = client.create_run(number, begun, {**tags, "mlflow.runName": folder.resolve().name})
        key = str(run.info.run_id)
        measured = [
            entities.Metric(_restrict_name(name), value, _milliseconds(when), number_of_round)
            for name, value, number_of_round, when in scalars(told, story)
        ]
        params = [entities.Param(name, str(value)) for name, value in _params(story).items()]
        client.log_batch(key, params=params)
        for start in range(0, len(measured), _MLFLOW_BATCH):
            client.log_batch(key, metrics=measured[start : start + _MLFLOW_BATCH])
        for name in ("summary.json", "privacy.json"):
            if (folder / name).is_file():
                client.log_artifact(key, str(folder / name))
        ended = "RUNNING"
        if s["status"] == "complete":
            ended = "FINISHED"
        elif story.finished:
            ended = "FAILED"
        client.set_terminated(key, ended, _milliseconds(told[-1].time) if told else None)
    except (mlflow.exceptions.MlflowException, OSError) as error:
        raise ExportError(f"MLflow at {uri!r} does not take the run: {plain(error)}") from error

    return key


def _milliseconds(when: datetime) -> int:
    return round(when.timestamp() * 1000)


def _params(story: Story) -> dict[str, Any]:
    s = story.summary
    privacy = s["privacy"] or {}
    return {
        "study": s["study"],
        "algorithm": s["algorithm"],
        "model": s["model"],
        "parameters": s["parameters"],
        "rounds_asked": s["rounds_asked"],
        "participants": len(s["sites"]),
        "noise": privacy.get("noise"),
        "target_epsilon": privacy.get("target_epsilon"),
        "delta": privacy.get("delta"),
    }


def _restrict_name(name: str) -> str:
    """Return a name of the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)


def _import(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ExportError(
            f"{module} is not installed ({error}); pip install 'medfed[{extra}]'"
        ) from error
