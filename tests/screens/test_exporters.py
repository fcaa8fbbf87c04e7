"""What other tools get is the event log: no number more, no device's name; they take it
for real.
"""

import io
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

import medfed
from medfed.core.checks import ExportError
from medfed.monitor import events
from medfed.monitor.events import Event, RoundFinished, RunFinished, SiteExcluded, Warned
from medfed.monitor.events import Tested as ModelTested
from medfed.screens import exporters
from medfed.screens.sentences import Structured
from medfed.screens.story import Story
from tests.screens.serving import TOKEN, serving
from tests.screens.test_dashboards import EVIL, invented, written
from tests.tables import PRIVATE, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    medfed.run(
        medfed.load_study(write_study(folder, PRIVATE)).set("training.rounds", 3), folder / "run"
    )
    return folder / "run"


def devices(count: int) -> list[Event]:
    """The log of a fleet, each device one patient's."""
    told = invented(2, [f"device-{i}" for i in range(count)])
    planned = told[1]
    assert isinstance(planned, events.Planned)
    sizes = {name: {"train": 1, "test": 0} for name in planned.sizes}
    told[1] = events.Planned(**{**vars(planned), "sizes": sizes})
    return [*told[:-1], SiteExcluded(2, "device-1", "late"), told[-1]]


def read_metrics(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# Prometheus


def test_metrics_are_the_summary(run: Path) -> None:
    story = Story.of(run)
    found = read_metrics(exporters.prometheus({"r": exporters.samples(story)}))
    summary = json.loads((run / "summary.json").read_text())

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset({"run": "r", "study": summary["study"], **labels}.items())]

    assert (
        value("medfed_round") == value("medfed_rounds_asked") == 3 and value("medfed_complete") == 1
    )
    assert value("medfed_epsilon_spent") == summary["privacy"]["epsilon"]
    for name, figure in summary["test"].items():
        if name != "n" and figure is not None:
            assert value("medfed_test", figure=name) == figure
    assert value("medfed_bytes_total", direction="up") == summary["bytes"]["up"]
    for site, count in summary["participation"].items():
        assert value("medfed_site_rounds_total", site=site) == count


def test_no_device_is_named_anywhere(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", devices(30))
    spans = InMemorySpanExporter()
    exporters.trace(folder, spans)
    told = [exporters.prometheus({"r": exporters.samples(Story.of(folder))})]
    told += [span.to_json() for span in spans.get_finished_spans()]
    told += [name for name, *_ in exporters.scalars(*exporters._read(folder))]
    stream = io.StringIO()
    for event in events.read(folder / "events.jsonl"):
        Structured(stream, "json")(event) if not isinstance(event, events.Planned) else None
    assert len(told) > 5 and not [text for text in told if "device-" in text]


def test_a_strange_name_cannot_forge_a_line(tmp_path: Path) -> None:
    evil = f'a"}} 1\nmedfed_epsilon_spent{{run="x"}} 0 {EVIL}\\'
    story = Story.from_events(invented(2, [evil, "b"], evil))
    found = read_metrics(exporters.prometheus({evil: exporters.samples(story)}))
    assert {dict(labels)["run"] for _, labels in found} == {evil}


def test_every_panel_asks_for_what_there_is(run: Path) -> None:
    board = json.loads(GRAFANA.read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"medfed_\w+", target["expr"])
    }
    known = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(exporters.prometheus({}))
    }
    assert asked == known


@pytest.mark.slow
@pytest.mark.needs("prometheus")
def test_a_real_prometheus_scrapes_and_answers(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    with serving(run) as address:
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: medfed\n"
            f"  authorization: {{credentials: {TOKEN}}}\n"
            f"  static_configs: [{{targets: ['{address.removeprefix('http://')}']}}]\n"
        )
        server = subprocess.Popen(
            ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
             f"--web.listen-address={place}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            answer: list[Any] = []
            for _ in range(300):
                time.sleep(0.2)
                try:
                    got = httpx.get(
                        f"http://{place}/api/v1/query", params={"query": "medfed_epsilon_spent"}
                    )
                except httpx.TransportError:
                    continue
                if got.status_code == 200 and (answer := got.json()["data"]["result"]):
                    break
            assert float(answer[0]["value"][1]) == summary["privacy"]["epsilon"]
            assert answer[0]["metric"]["study"] == summary["study"]
        finally:
            server.terminate()
            server.wait(60)


# OpenTelemetry


def test_spans_are_the_rounds(run: Path) -> None:
    spans = InMemorySpanExporter()
    assert exporters.trace(run, spans) == 3
    log = list(events.read_stamped(run / "events.jsonl"))
    finished = {told.event.round: told for told in log if isinstance(told.event, RoundFinished)}
    found = spans.get_finished_spans()
    root = next(span for span in found if span.parent is None)
    rounds = [span for span in found if span.name == "round"]
    assert root.context and root.attributes and root.attributes["medfed.status"] == "complete"
    for span in rounds:
        assert span.parent and span.parent.span_id == root.context.span_id and span.attributes
        told = finished[span.attributes["medfed.rounds.round"]]  # type: ignore[index]
        assert span.attributes["medfed.bytes_up"] == told.event.bytes_up  # type: ignore[attr-defined]
        assert span.end_time == exporters._nanoseconds(told.time)
    sites = [span for span in found if span.name == "site"]
    assert len(sites) == sum(len(told.event.clients) for told in finished.values())  # type: ignore[attr-defined]
    for span in sites:
        assert span.end_time and span.start_time and span.end_time >= span.start_time


def test_a_log_that_was_cut_is_traced_to_its_end(tmp_path: Path) -> None:
    told = [
        *invented(2, ["a", "b"])[:2],
        events.RoundStarted(1, ["a"]),
        Warned("x"),
        events.RoundStarted(1, ["a"]),
    ]
    spans = InMemorySpanExporter()
    exporters.trace(written(tmp_path / "run", told), spans)
    assert [span.name for span in spans.get_finished_spans()].count("round") == 2
    assert exporters.trace(written(tmp_path / "empty", []), InMemorySpanExporter()) == 0


class Collector(BaseHTTPRequestHandler):
    """Takes spans as an OpenTelemetry collector does."""

    got: list[bytes]

    def do_POST(self) -> None:
        self.got.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    got: list[bytes] = []
    server = HTTPServer(("127.0.0.1", 0), type("Mine", (Collector,), {"got": got}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_go_over_the_wire(run: Path, collector: tuple[str, list[bytes]], capsys: Any) -> None:
    address, got = collector
    assert command("export", run, "--otlp", address) == 0
    assert "3 rounds sent" in capsys.readouterr().out
    sent = ExportTraceServiceRequest.FromString(got[0])
    names = [span.name for span in sent.resource_spans[0].scope_spans[0].spans]
    assert names.count("round") == 3


class Refusing(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_a_collector_that_takes_nothing_is_told(run: Path) -> None:
    with pytest.raises(ExportError, match="were not taken"):
        exporters.trace(run, Refusing())


# MLflow, TensorBoard, logs


@pytest.mark.slow
def test_tensorboard_holds_what_the_log_holds(run: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert command("export", run, "--tensorboard", tmp_path) == 0
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    log = list(events.read(run / "events.jsonl"))
    tested = [e for e in log if isinstance(e, ModelTested) and e.model == "federated"]
    assert [one.value for one in found.Scalars("test/federated/auroc")] == pytest.approx(
        [e.all_sites["auroc"].value for e in tested]
    )
    assert [one.step for one in found.Scalars("seconds")] == [1, 2, 3]


@pytest.mark.slow
def test_mlflow_holds_what_the_log_holds(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    key = exporters.to_mlflow(run, (tmp_path / "mlruns").as_uri())
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    kept = client.get_run(key)
    summary = json.loads((run / "summary.json").read_text())
    assert kept.info.status == "FINISHED" and kept.data.params["algorithm"] == summary["algorithm"]
    assert kept.data.metrics["privacy/epsilon"] == summary["privacy"]["epsilon"]
    log = [e.seconds for e in events.read(run / "events.jsonl") if isinstance(e, RoundFinished)]
    assert [one.value for one in client.get_metric_history(key, "seconds")] == log
    assert {one.path for one in client.list_artifacts(key)} == {"summary.json", "privacy.json"}


def test_what_cannot_be_exported_says_why(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert command("export", run) == 2 and "--tensorboard FOLDER" in capsys.readouterr().err
    assert (
        command("export", tmp_path, "--tensorboard", tmp_path) == 2
        and "cannot be read" in capsys.readouterr().err
    )
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    assert command("export", run, "--tensorboard", tmp_path / "out") == 2
    assert "pip install 'medfed[tensorboard]'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["json", "text"])
def test_lines_for_a_collector_of_logs(form: Any, run: Path) -> None:
    stream = io.StringIO()
    listener = Structured(stream, form)
    for event in [*events.read(run / "events.jsonl"), RunFinished("complete", 3, 1.0, "")]:
        listener(event)
    lines = stream.getvalue().splitlines()
    assert len(lines) > 5
    if form == "json":
        told = [json.loads(text) for text in lines]
        assert [one["round"] for one in told if one["kind"] == "round_finished"] == [1, 2, 3]
        assert {"timestamp", "level", "event"} <= told[0].keys()
    else:
        assert "kind='round_finished'" in stream.getvalue()


def test_the_command_writes_such_lines(tmp_path: Path, capsys: Any) -> None:
    study = write_study(tmp_path, PRIVATE)
    assert (
        command(
            "run", study, "--out", tmp_path / "run", "--set", "training.rounds=1", "--log", "json"
        )
        == 0
    )
    told = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    assert told[-1]["kind"] == "run_finished" and told[-1]["event"].startswith("complete")
