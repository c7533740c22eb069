"""Serves a dashboard: GET alone, pages that need no script, and a stream of the sections that have changed."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from silotune.dashboard.pages import Pages
from silotune.errors import ConfigError
from silotune.report.rendering import TEMPLATES

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TICK_SECONDS = 0.05
"""How often an open page's folders are looked at."""
HEARTBEAT_SECONDS = 15.0
MOST_LISTENERS = 64
COOKIE, LEAST_TOKEN = "silotune-dashboard", 16
_STATIC = Path(__file__).parent / "static"
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_app(pages: Pages, *, token: str = "", tick_seconds: float = TICK_SECONDS) -> Starlette:
    """The application.

    Args:
        pages: What it shows.
        token: What a visitor must know; empty where none is asked for, and then only names of this machine are served.
        tick_seconds: How often an open page's folders are looked at.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Route

    listeners: set[object] = set()

    async def show(request: Request) -> Response:
        return await _page(pages, request.scope["path"])

    async def live(request: Request) -> Response:
        return await _live(pages, request, listeners, tick_seconds)

    routes = [
        Route("/live", live),
        Route("/page.css", _file(TEMPLATES / "page.css", "text/css")),
        Route("/page.js", _file(_STATIC / "page.js", "text/javascript")),
        Route("/icon.svg", _file(_STATIC / "icon.svg", "image/svg+xml")),
        Route("/{rest:path}", show),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, token=token)])


def _file(path: Path, kind: str) -> Any:
    async def serve(request: Request) -> Response:
        from starlette.responses import Response

        return Response(path.read_bytes(), media_type=kind)

    return serve


async def _page(pages: Pages, path: str) -> Response:
    from starlette.responses import HTMLResponse, PlainTextResponse

    page = await asyncio.to_thread(pages.at, path)
    if page is None:
        return PlainTextResponse("There is no such page: begin at /\n", status_code=404)
    return HTMLResponse(await asyncio.to_thread(pages.whole, path, page))


async def _live(pages: Pages, request: Request, listeners: set[object], tick_seconds: float) -> Response:
    from starlette.responses import PlainTextResponse, StreamingResponse

    path = request.query_params.get("page", "/")
    if len(listeners) >= MOST_LISTENERS:
        return PlainTextResponse("Too many pages are open: close some\n", status_code=503)
    if await asyncio.to_thread(pages.at, path) is None:
        return PlainTextResponse("There is no such page\n", status_code=404)

    async def stream() -> AsyncIterator[str]:
        mark = object()
        listeners.add(mark)
        try:
            async for text in _changes(pages, path, tick_seconds):
                yield text
        finally:
            listeners.discard(mark)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _changes(pages: Pages, path: str, tick_seconds: float) -> AsyncIterator[str]:
    """The sections of a page, all at first, then each that has changed; a comment where none has for a while."""
    sent: dict[str, str] = {}
    quiet = 0.0
    yield "retry: 1000\n\n"
    while True:
        page = await asyncio.to_thread(pages.at, path)
        if page is None:
            yield 'event: gone\ndata: ""\n\n'
            return
        changed = {name: str(html) for name, html in page.sections.items() if sent.get(name) != str(html)}
        if changed:
            sent.update(changed)
            yield f"event: sections\ndata: {json.dumps(changed)}\n\n"
            quiet = 0.0
        elif quiet >= HEARTBEAT_SECONDS:
            yield ": nothing new\n\n"
            quiet = 0.0
        await asyncio.sleep(tick_seconds)
        quiet += tick_seconds


class _Guard:
    """Lets in who may come in, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        answer = self._refusal(scope)
        await (answer or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered in place of the page; None where the visitor may see it."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse

        request = Request(scope)
        if not self._token:
            if is_loopback(_host_of(request.headers.get("host", ""))):
                return None
            return PlainTextResponse("This page is served to its own machine only\n", status_code=403)
        given = request.query_params.get("token", "")
        if given and self._is_token(given):
            # one slash alone, for two would lead to another host
            answer = RedirectResponse("/" + quote(scope["path"].lstrip("/")), status_code=303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", path="/")
            return answer
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if self._is_token(request.cookies.get(COOKIE, "")) or (scheme.lower() == "bearer" and self._is_token(bearer)):
            return None
        return PlainTextResponse(
            "Open the address with its token, which 'silotune dashboard' printed\n", status_code=401
        )

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())


def _host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if ":" in header else header


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: The port is in use, or the address is not one of this machine.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(
            f"--host {host!r}: {error.strerror or error}: give a name or address of this machine"
        ) from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(where)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use: give another one with --port, or 0 for any") from None
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    made.listen(64)
    return made


def serve(pages: Pages, listening: socket.socket, *, token: str = "") -> None:
    """Serves until the process is told to stop; needs the extra ``dashboard``."""
    import uvicorn

    settings = uvicorn.Config(
        make_app(pages, token=token), log_level="error", access_log=False, server_header=False, proxy_headers=False,
        lifespan="off", timeout_graceful_shutdown=1,
    )  # fmt: skip
    uvicorn.Server(settings).run(sockets=[listening])
