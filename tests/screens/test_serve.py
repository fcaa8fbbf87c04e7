"""Who has no token sees nothing; who has one sees what the log says and no file more; a site sees
its own part.
"""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.testclient import TestClient

import medfed
from medfed.core.checks import ServeError
from medfed.monitor import events
from medfed.monitor.events import (
    Event,
    Inspected,
    RunFinished,
    SecurityAudit,
    SiteExcluded,
    Warned,
    line,
)
from medfed.screens import serve
from medfed.screens.feeds import Feed, Runs
from medfed.screens.view import OTHERS, Narrowing
from tests.screens.serving import BEARER, TOKEN, serving
from tests.screens.test_dashboards import EVIL, invented, written
from tests.tables import STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    medfed.run(
        medfed.load_study(write_study(tmp_path_factory.mktemp("study"), STUDY)), folder / "first"
    )
    written(folder / "second", invented(3, ["west", "far"]))
    (folder / "secret.txt").write_text("not for anybody")
    (folder / "no-run").mkdir()
    return folder


def client(folder: Path, site: str = "", token: bool = True) -> TestClient:
    app = serve.application(Runs(folder, site), TOKEN)
    return TestClient(app, headers=BEARER if token else {}, raise_server_exceptions=True)


# who may look


@pytest.mark.parametrize("path", ["/", "/runs/first", "/runs/first/live", "/runs/first/view", "/metrics", "/nothing",
                                  "/runs/first/pages/report.html", "/runs/first/files/summary.json",
                                  "/static/live.js"])  # fmt: skip
def test_nothing_is_shown_without_the_token(runs: Path, path: str) -> None:
    stranger = client(runs, token=False)
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Cookie": "medfed=x"},
    ):
        answer = stranger.get(path, headers=headers)
        assert answer.status_code == 401 and "first" not in answer.text
    assert stranger.get(path, headers={"Accept": "text/html"}).status_code == 401


def test_the_token_becomes_a_cookie_that_scripts_cannot_read(runs: Path) -> None:
    for enter in (
        lambda c: c.get(f"/?token={TOKEN}", follow_redirects=False),
        lambda c: c.post("/login", data={"token": TOKEN}, follow_redirects=False),
    ):
        browser = client(runs, token=False)
        answer = enter(browser)
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie and "max-age" in cookie
        assert "first" in browser.get("/").text

    wrong = client(runs, token=False).post("/login", data={"token": "wrong"})
    assert (
        wrong.status_code == 401
        and "set-cookie" not in wrong.headers
        and "not the token" in wrong.text
    )
    assert (
        client(runs, token=False).post("/login", content=b"token=" + b"x" * 10_000_000).status_code
        == 401
    )


def test_nothing_can_be_changed(runs: Path) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client(runs).request(method, "/runs/first").status_code == 405


def test_every_answer_carries_its_policy(runs: Path) -> None:
    for path in ("/", "/runs/first", "/nothing", "/metrics", "/static/live.js"):
        headers = client(runs).get(path).headers
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert (
            "unsafe" not in headers["content-security-policy"]
            and headers["x-content-type-options"] == "nosniff"
        )
    page = (
        client(runs).get("/runs/first/pages/privacy_audit.html").headers["content-security-policy"]
    )
    assert (
        page.startswith("sandbox allow-scripts;")
        and "connect-src" not in page
        and "default-src 'none'" in page
    )


# what is shown


def test_the_view_says_what_the_summary_says(runs: Path) -> None:
    summary = json.loads((runs / "first" / "summary.json").read_text())
    view = client(runs).get("/runs/first/view").json()
    for name in (
        "study",
        "status",
        "rounds",
        "rounds_asked",
        "test",
        "privacy",
        "bytes",
        "warnings",
    ):
        assert view[name] == summary[name], name

    assert view["score"] == {"name": "auroc", "value": summary["test"]["auroc"]}
    assert view["seconds_per_round"] == summary["seconds"]["per_round"]
    assert {one["site"]: one["rounds"] for one in view["sites"]} == summary["participation"]
    home = client(runs).get("/").text
    assert (
        f"auroc {summary['test']['auroc']:.4f}" in home
        and "second" in home
        and "no-run" not in home
    )


def test_only_listed_files_leave(runs: Path) -> None:
    house = client(runs)
    for name in ("summary.json", "events.jsonl"):
        assert (
            house.get(f"/runs/first/files/{name}").content == (runs / "first" / name).read_bytes()
        )

    kept = [
        str(path.relative_to(runs / "first"))
        for path in (runs / "first").rglob("*")
        if path.is_file()
    ]
    assert "model.safetensors" in kept and any(name.startswith("checkpoints") for name in kept)
    tried = [
        *set(kept) - {"summary.json", "events.jsonl"},
        "..%2f..%2fsecret.txt",
        "%2e%2e/secret.txt",
        ".",
        "%00",
    ]
    for name in tried:
        assert house.get(f"/runs/first/files/{name}").status_code == 404, name

    for path in (
        "/runs/%2e%2e%2ffirst/view",
        "/runs/no-run",
        "/runs/first%2f/view",
        "/static/..%2fserve.py",
    ):
        assert house.get(path).status_code == 404, path


def test_one_run_may_be_served_alone(runs: Path) -> None:
    house = client(runs / "first")
    assert (
        house.get("/runs/first/view").status_code == 200
        and house.get("/runs/second").status_code == 404
    )


def test_pages_are_those_of_the_report(runs: Path) -> None:
    medfed.create_interactive_dashboards(runs / "first", runs.parent / "pages")
    for path in (runs.parent / "pages").iterdir():
        assert client(runs).get(f"/runs/first/pages/{path.name}").text == path.read_text()
    assert client(runs).get("/runs/first/pages/other.html").status_code == 404


def test_what_looks_like_a_script_stays_text(tmp_path: Path) -> None:
    written(tmp_path / f"run {EVIL[8:13]}", invented(3, [f'"a" {EVIL}', "b"], EVIL))
    house = client(tmp_path)
    name = f"run {EVIL[8:13]}"
    for path in ("/", f"/runs/{name}", f"/runs/{name}/pages/report.html"):
        answer = house.get(path)
        assert answer.status_code == 200 and EVIL not in answer.text
    assert "application/json" in house.get(f"/runs/{name}/view").headers["content-type"]


def test_a_damaged_log_is_shown_up_to_the_damage(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", invented(3, ["a", "b"])[:-1])
    with open(folder / "events.jsonl", "a") as log:
        log.write('{"schema": 1}\n' + line(RunFinished("complete", 3, 1.0, "")) + "\n")
    view = client(tmp_path).get("/runs/run/view").json()
    assert (
        view["rounds"] == 3
        and view["status"] == "no end yet"
        and "line 6 is damaged" in view["trouble"]
    )


def test_a_log_that_tells_nothing_yet(tmp_path: Path) -> None:
    written(tmp_path / "run", [])
    assert client(tmp_path).get("/runs/run").status_code == 200
    assert client(tmp_path).get("/runs/run/view").json()["rounds"] == 0
    assert client(tmp_path).get("/runs/run/pages/report.html").status_code == 409
    assert (
        "No run yet" in client(tmp_path / "run" / "..").get("/").text
        or "run" in client(tmp_path).get("/").text
    )


def test_a_resumed_run_is_told_anew(tmp_path: Path) -> None:
    told = invented(5, ["a", "b"])
    feed = Feed(written(tmp_path / "run", told[:6]))
    feed.refresh()
    assert feed.ask(lambda story: max(story.rounds)) == 4
    written(tmp_path / "run", [*told[:4], events.Resumed(2, 5, "")])
    feed._next = 0.0
    feed.refresh()
    assert feed.ask(lambda story: list(story.rounds)) == [1, 2] and feed.version == 2


# what a site sees


def test_a_site_sees_its_own_part() -> None:
    narrow = Narrowing("north")
    told: list[Event] = invented(1, ["north", "south"])
    findings = [
        {"client": name, "score": 1.0, "kind": "far", "evidence": f"near {other}"}
        for name, other in (("north", "south"), ("south", "north"))
    ]

    told += [
        SiteExcluded(2, "south", "late"),
        SiteExcluded(2, "north", "late"),
        Warned("south is odd"),
        Warned("all is odd"),
        Inspected(2, {"north": 0.5, "south": 0.5}, findings, 1),
        SecurityAudit(2, "south", 2, 9.0, "warn", ["far"]),
        RunFinished("incomplete", 2, 1.0, "without south"),
    ]
    seen = [event for event in map(narrow, told) if event]
    assert narrow.concerned and "south" not in json.dumps([line(event) for event in seen])
    assert (
        OTHERS in line(seen[-1])
        and Warned("all is odd") in seen
        and SiteExcluded(2, "north", "late") in seen
    )
    finished = next(event for event in seen if isinstance(event, events.RoundFinished))
    assert list(finished.clients) == ["north"] and finished.seconds > 0
    assert not Narrowing("west").concerned


def test_no_answer_to_a_site_names_another(runs: Path) -> None:
    sites = json.loads((runs / "first" / "summary.json").read_text())["sites"]
    mine = sites[0]
    others = sites[1:]
    house = client(runs, site=mine)
    pages = [f"/runs/first/pages/{name}" for name in serve.dashboards.PAGES]

    for path in (
        "/",
        "/runs/first",
        "/runs/first/view",
        "/runs/first/files/summary.json",
        "/metrics",
        *pages,
    ):
        answer = house.get(path)
        assert answer.status_code == 200
        said = answer.text.split("</head><body>")[-1] if path in pages else answer.text
        assert not [name for name in others if name in said], path

    assert house.get("/runs/first/view").json()["sites"][0]["site"] == mine
    assert house.get("/runs/first/files/events.jsonl").status_code == 404
    assert house.get("/runs/second").status_code == 404 and "second" not in house.get("/").text


# the server itself


def test_what_cannot_be_served_is_refused_before_anything_listens(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="is no folder"):
        serve.serve(tmp_path / "nothing")
    with pytest.raises(ServeError, match="20 or more"):
        serve.serve(tmp_path, token="short")
    for host in ("0.0.0.0", "::", "10.0.0.1", "hospital.example"):
        with pytest.raises(ServeError, match="nothing would be encrypted"):
            serve.serve(tmp_path, host)

    with pytest.raises(ServeError, match="needs both"):
        serve.serve(tmp_path, certificate=tmp_path / "cert.pem")
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(ServeError, match="belong together"):
        serve.serve(tmp_path, certificate=tmp_path / "cert.pem", key=tmp_path / "cert.pem")
    with pytest.raises(ServeError, match="expected 0"):
        serve.serve(tmp_path, port=70000)

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServeError, match="give another port"),
    ):
        serve.serve(tmp_path, port=taken.getsockname()[1])


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return tmp_path / "cert.pem", tmp_path / "key.pem"


@pytest.mark.slow
def test_tls_is_real(runs: Path, certificate: tuple[Path, Path]) -> None:
    import ssl

    cert, key = certificate
    with serving(runs, "--certificate", str(cert), "--key", str(key)) as address:
        assert address.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        entered = httpx.get(f"{address}/?token={TOKEN}", verify=trusted)
        assert entered.status_code == 303 and "Secure" in entered.headers["set-cookie"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)  # nobody vouches for this certificate


@pytest.mark.slow
def test_viewers_see_events_as_they_are_written_and_may_leave(tmp_path: Path) -> None:
    """Ten watch a growing log in a real server; five leave in the middle; then the server ends on
    request.
    """
    told = invented(3, ["a", "b"])
    log = written(tmp_path / "run", told[:2]) / "events.jsonl"

    async def watch(address: str) -> None:
        async with httpx.AsyncClient(base_url=address, headers=BEARER, timeout=60) as browser:
            streams = [browser.stream("GET", "/runs/run/live") for _ in range(10)]
            opened = [await one.__aenter__() for one in streams]
            lines = [one.aiter_lines() for one in opened]
            assert [(await next_view(one))["rounds"] for one in lines] == [0] * 10
            for one in streams[:5]:
                await one.__aexit__(None, None, None)
            for number in (1, 2, 3):
                with open(log, "a") as file:
                    file.write(line(told[1 + number]) + "\n")
                assert [(await next_view(one))["rounds"] for one in lines[5:]] == [number] * 5
            assert (await browser.get("/runs/run/view")).json()["rounds"] == 3
            for one in streams[5:]:
                await one.__aexit__(None, None, None)

    async def next_view(lines: object) -> dict[str, int]:
        async for text in lines:  # type: ignore[attr-defined]
            if text.startswith("data: "):
                return json.loads(text.removeprefix("data: "))  # type: ignore[no-any-return]
        raise AssertionError("the stream ended")

    with serving(tmp_path) as address:
        asyncio.run(watch(address))


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[tuple[Feed, list[bool]]]:
    feed = Feed(written(tmp_path / "run", invented(1, ["a"])))
    yield feed, [False]


def test_a_stream_ends_when_the_server_does(stream: tuple[Feed, list[bool]]) -> None:
    feed, ending = stream

    async def watched() -> list[str]:
        found = []
        async for text in serve._stream(feed, lambda: ending[0]):
            found.append(text)
            ending[0] = True
        return found

    began = time.monotonic()
    assert len(asyncio.run(watched())) == 1 and time.monotonic() - began < 60
