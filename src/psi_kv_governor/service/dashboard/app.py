"""The pages: who has the token sees how the subject stands, and may park, unpark and limit."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psi_kv_governor.commands import Answer, Command
from psi_kv_governor.errors import PsiKvError
from psi_kv_governor.service.dashboard.subject import Subject

UPDATE_S = 0.5
"""Two lines a second: enough to see a trim, and little for a phone to draw."""

_PAGE = Path(__file__).with_name("page")
_FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/board.js": ("board.js", "text/javascript"),
}
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "referrer-policy": "no-referrer",  # the token stands in the first address
    "x-content-type-options": "nosniff",
}
_MOST_BODY_BYTES = 1 << 10
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Command)


def make_app(
    subject: Subject, *, token: str, cookie: str, hosts: list[str], ended: Callable[[], bool]
) -> Starlette:
    """The application. `cookie` is the name under which the token is kept; once `ended`, streams end."""

    async def page(request: Request) -> Response:
        if "token" in request.query_params:  # out of the address, or it would stay in the history
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(cookie, token, httponly=True, samesite="strict")
            return answer
        name, kind = _FILES[request.url.path]
        return Response(await run_in_threadpool((_PAGE / name).read_bytes), media_type=kind)

    async def live(request: Request) -> Response:
        del request
        return StreamingResponse(_lines(subject, ended), media_type="text/event-stream")

    async def command(request: Request) -> Response:
        # SameSite counts every port of this machine as the same site.
        if request.headers.get("origin", "null").partition("//")[2] != request.headers.get("host"):
            return PlainTextResponse("only the dashboard's own page may ask for that", status_code=403)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BODY_BYTES:
                return PlainTextResponse("that is no command", status_code=400)
        try:
            asked = _decoder.decode(body)
        except msgspec.DecodeError as error:
            return PlainTextResponse(str(error), status_code=400)
        answer = await run_in_threadpool(subject.ask, asked)
        return PlainTextResponse(answer.error or _done(answer), status_code=409 if answer.error else 200)

    routes = [Route(path, page) for path in _FILES]
    routes += [Route("/live", live), Route("/command", command, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[
            # Another site's name that was made to point here (DNS rebinding) gets nothing.
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(_Guard, token=token, cookie=cookie),
        ],
    )


class _Guard:
    """Lets nobody in without the token, and puts the headers on every answer."""

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self._app, self._token, self._cookie = app, token.encode(), cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        if scope["type"] == "http" and not self._known(HTTPConnection(scope)):
            refusal = PlainTextResponse(
                "wrong token: open the address that psi-kv printed when it was started\n", status_code=403
            )
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _known(self, asked: HTTPConnection) -> bool:
        given = asked.query_params.get("token") or asked.cookies.get(self._cookie, "")
        return hmac.compare_digest(given.encode(), self._token)


def _done(answer: Answer) -> str:
    """What came of a command, in words."""
    result = answer.result
    if result is None:
        return "the limit holds from now on"
    amounts = ((result.bytes_returned, "returned"), (result.bytes_back, "back in memory"))
    moved = [f"{n_bytes / 2**20:,.0f} MiB {what}" for n_bytes, what in amounts if n_bytes]
    said = " and ".join(moved) or "nothing had to be moved"
    return f"{said} ({result.problem})" if result.problem else said


async def _lines(subject: Subject, ended: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Server-sent events (HTML standard, 9.2): a view at a time, and at the end why there are no more."""
    seen = 0
    yield b"event: start\ndata: \n\n"
    while not ended():
        try:
            view, seen = await run_in_threadpool(subject.view, seen)
        except PsiKvError as error:
            yield b"event: gone\ndata: " + _encoder.encode(str(error)) + b"\n\n"
            return
        yield b"data: " + _encoder.encode(view) + b"\n\n"
        await asyncio.sleep(UPDATE_S)
    yield b"event: gone\ndata: " + _encoder.encode("the program has ended") + b"\n\n"
