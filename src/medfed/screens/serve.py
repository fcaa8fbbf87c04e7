"""`medfed serve`: runs in a browser as they happen, their pages and downloads; read-only.

Every request but the login needs the token, as a cookie or as `Authorization: Bearer`. What the run
says reaches the page as data, and the page's own script sets it as text; its policy lets no other
script run. The pages of `medfed report` carry their script inside: they are sent into a sandbox,
without an origin, which may load nothing.
"""

import asyncio
import hmac
import ipaddress
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medfed.core.checks import ServeError, plain
from medfed.screens import dashboards, exporters, live_page
from medfed.screens.feeds import EVERY, KEPT, Feed, Runs

STATIC = Path(__file__).parent / "static"
BEAT = 15.0  # seconds without news after which a viewer gets a sign of life

_Answer = Callable[[Request], Response] | Callable[[Request], Awaitable[Response]]

_OWN = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_REPORT = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


# Who may look


class Guard:
    """Lets only those in who know the token, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, token: str, cookie: str, secure: bool) -> None:
        self.app = app
        self.cookie = cookie
        self.secure = secure
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", _OWN)
            await send(message)

        request = Request(scope, receive)
        path = request.url.path
        if path == "/login" and request.method == "POST":
            given = parse_qs((await _read_body(request)).decode("utf-8", "replace")).get(
                "token", [""]
            )[0]
            await self._enter(given)(scope, receive, send_with_headers)
        elif "token" in request.query_params:
            await self._enter(request.query_params["token"])(scope, receive, send_with_headers)
        elif path == "/static/style.css" or self._holds(
            _read_token(request.headers, request.cookies.get(self.cookie, ""))
        ):
            await self.app(scope, receive, send_with_headers)
        elif "text/html" in request.headers.get("accept", ""):
            await _answer_refusal("")(scope, receive, send_with_headers)
        else:
            refused = Response(
                "the token is missing or wrong\n", 401, {"WWW-Authenticate": "Bearer"}
            )
            await refused(scope, receive, send_with_headers)

    def _holds(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token)

    def _enter(self, given: str) -> Response:
        if not self._holds(given):
            return _answer_refusal("That is not the token that the server printed when it started.")
        answer = RedirectResponse("/", 303)
        # lax and not strict: the sandboxed pages have no origin, and their links must lead back
        # here. Nothing can be changed here, and other origins get the cookie for a click on a link
        # alone, whose answer they cannot read.
        answer.set_cookie(
            self.cookie,
            given,
            max_age=12 * 3600,
            httponly=True,
            samesite="lax",
            secure=self.secure,
            path="/",
        )
        return answer


def _read_token(headers: Headers, cookie: str) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else cookie


async def _read_body(request: Request, most: int = 4096) -> bytes:
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > most:
            return b""
    return found


# What is answered


@dataclass(frozen=True)
class _Pages:
    """What is answered at each address of the folder's runs."""

    runs: Runs
    ending: Callable[[], bool]

    def _find(self, request: Request) -> Feed | None:
        return self.runs.feed(request.path_params["run"])

    def home(self, request: Request) -> Response:
        return HTMLResponse(live_page.home(self.runs))

    def run(self, request: Request) -> Response:
        feed = self._find(request)
        if feed is None:
            return _answer_missing()
        return HTMLResponse(live_page.run(request.path_params["run"], feed))

    def view(self, request: Request) -> Response:
        feed = self._find(request)
        if feed is None:
            return _answer_missing()
        return Response(feed.data, media_type="application/json")

    async def live(self, request: Request) -> Response:
        feed = await run_in_threadpool(self._find, request)
        if feed is None:
            return _answer_missing()
        return StreamingResponse(_stream(feed, self.ending), media_type="text/event-stream")

    def report(self, request: Request) -> Response:
        feed = self._find(request)
        name = request.path_params["page"]
        if feed is None or name not in dashboards.PAGES:
            return _answer_missing()
        if not feed.ask(lambda story: story.started):
            return Response("the run tells nothing yet; try again when it has begun\n", 409)
        return HTMLResponse(feed.page(name), headers={"Content-Security-Policy": _REPORT})

    def file(self, request: Request) -> Response:
        feed = self._find(request)
        name = request.path_params["file"]
        if feed is None or name not in live_page.files(feed):
            return _answer_missing()
        if feed.site and name == "summary.json":
            attached = {"Content-Disposition": f'attachment; filename="{name}"'}
            return JSONResponse(feed.ask(lambda story: story.summary), headers=attached)
        return FileResponse(feed.folder / name, filename=name)

    def static(self, request: Request) -> Response:
        name = request.path_params["file"]
        if name not in ("live.js", "style.css"):
            return _answer_missing()
        return FileResponse(STATIC / name)

    def metrics(self, request: Request) -> Response:
        feeds = {name: feed for name in self.runs.names()[:KEPT] if (feed := self.runs.feed(name))}
        text = exporters.prometheus(
            {name: feed.ask(exporters.samples) for name, feed in feeds.items()}
        )
        return Response(text, media_type=exporters.PROMETHEUS_TYPE)


def application(
    runs: Runs,
    token: str,
    cookie: str = "medfed",
    secure: bool = False,
    ending: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """Return the application; viewers' streams end when `ending` says so."""
    pages = _Pages(runs, ending)
    routes: list[tuple[str, _Answer]] = [
        ("/", pages.home),
        ("/runs/{run}", pages.run),
        ("/runs/{run}/view", pages.view),
        ("/runs/{run}/live", pages.live),
        ("/runs/{run}/pages/{page}", pages.report),
        ("/runs/{run}/files/{file}", pages.file),
        ("/static/{file}", pages.static),
        ("/metrics", pages.metrics),
    ]
    app = Starlette(routes=[Route(path, answer, methods=["GET"]) for path, answer in routes])
    return Guard(app, token, cookie, secure)


async def _stream(feed: Feed, ending: Callable[[], bool]) -> AsyncIterator[str]:
    """Send the view at once and at each change;
    a disconnected viewer's stream is cancelled by the server.
    """
    seen = 0
    said = time.monotonic()
    while not ending():
        await run_in_threadpool(feed.refresh)
        if feed.version != seen:
            seen = feed.version
            said = time.monotonic()
            yield f"id: {seen}\ndata: {feed.data}\n\n"
        elif time.monotonic() - said > BEAT:
            said = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(EVERY)


def _answer_missing() -> Response:
    return HTMLResponse(live_page.missing(), 404)


def _answer_refusal(why: str) -> Response:
    return HTMLResponse(live_page.login(why), 401)


# The server


def serve(
    folder: Path,
    host: str = "127.0.0.1",
    port: int = 8642,
    token: str = "",
    certificate: Path | None = None,
    key: Path | None = None,
    site: str = "",
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Show the runs of a folder until the process is told to end; `ready` gets the address, with
    the token, at once.

    `site` shows what that site may see. Raises ServeError, before anything listens, where the
    folder is missing, the token is short, the port is in use, or where a host other than this
    machine is asked for without TLS.
    """
    token = _check_request(folder, host, token, certificate, key)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    server: uvicorn.Server | None = None
    app = application(
        Runs(folder, site),
        token,
        f"medfed-{port}",
        certificate is not None,
        lambda: bool(server and server.should_exit),
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    server = uvicorn.Server(config)
    shown = f"[{host}]" if ":" in host else host

    with listener:
        scheme = "https" if certificate else "http"
        ready(f"{scheme}://{shown}:{port}/?token={quote(token)}")
        server.run(sockets=[listener])


def _check_request(
    folder: Path, host: str, token: str, certificate: Path | None, key: Path | None
) -> str:
    if not folder.is_dir():
        raise ServeError(
            f"{str(folder)!r} is no folder; expected one that holds runs, or a run's folder"
        )
    if token and len(token) < 20:
        raise ServeError(
            f"MEDFED_TOKEN has {len(token)} characters; expected 20 or more, or unset it to have "
            "one made"
        )
    if (certificate is None) != (key is None):
        raise ServeError("only one of --certificate and --key is given; TLS needs both")

    if certificate and key:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ServeError(
                f"--certificate {certificate} --key {key} cannot be used ({plain(error)}); "
                "expected PEM files that belong together"
            ) from error
    elif not _is_loopback(host):
        raise ServeError(
            f"--host {host} is not this machine alone, and nothing would be encrypted; give "
            "--certificate and --key, or leave --host out and let a proxy do TLS"
        )

    return token or secrets.token_urlsafe(32)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ServeError(f"--port {port}; expected 0 (any free one) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ServeError(
            f"--host {host} --port {port} cannot be used: {error.strerror}. Another server may "
            "run there; give another port, or --port 0 for any free one"
        ) from error
