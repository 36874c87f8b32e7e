"""Routes of ours in vLLM's own HTTP server (entry point `vllm.endpoint_plugins`): status and limit as JSON.

vLLM loads them only where `VLLM_PLUGINS` names `psi_kv_http`. They stand below `/v1`, so that its --api-key
guards them, and reach the engine as `psi-kv status` and `limit` do, through its status socket: nothing waits
for a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec

from psi_kv_governor import limits, socket_place
from psi_kv_governor.commands import Limit
from psi_kv_governor.errors import BadInputError, PsiKvError
from psi_kv_governor.socket_place import Found
from psi_kv_governor.status_client import ask, told

PREFIX = "/v1/psi-kv"
_NONE = "no governed engine of this server was found: its log says why"
_Answer = tuple[HTTPStatus, bytes]


class HttpRoutes:
    """What vLLM calls an endpoint plugin."""

    name = "psi_kv_http"
    required_tasks: Collection[str] | None = None

    def __init__(self) -> None:
        self._several_servers = False

    def attach_router(self, app: Any) -> None:
        """See vLLM's EndpointPlugin."""
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response

        async def status(_: Any) -> Response:
            return answer(await run_in_threadpool(status_of, self.engines()))

        async def limit(request: Any) -> Response:
            return answer(await run_in_threadpool(limited, self.engines(), await request.body()))

        def answer(given: _Answer) -> Response:
            return Response(given[1], given[0], media_type="application/json")

        app.add_route(f"{PREFIX}/status", status, methods=["GET"])
        app.add_route(f"{PREFIX}/limit", limit, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """See vLLM's EndpointPlugin."""
        self._several_servers = (getattr(args, "api_server_count", None) or 1) > 1

    def engines(self) -> list[Found]:
        """The engine cores of this server. Of several servers they are children of the process above."""
        below = descendants(os.getppid() if self._several_servers else os.getpid())
        return [one for one in socket_place.find() if one.pid in below]


def status_of(engines: list[Found]) -> _Answer:
    """How each stands."""
    return _answer(
        lambda: {"engines": [{"pid": one.pid, "status": told(one).status} for one in engines]}, engines
    )


def limited(engines: list[Found], body: bytes) -> _Answer:
    """Limit all of them, as `{"n_bytes": 2147483648}`, `{"share": 0.5}`, or `{}` for no limit."""
    try:
        limit = msgspec.json.decode(body, type=Limit)
        limits.Limit().set(limit.share, limit.n_bytes)
    except (msgspec.DecodeError, ValueError, BadInputError) as error:
        why = f'no limit: {error}; give {{"n_bytes": 2147483648}}, {{"share": 0.5}} or {{}}'
        return HTTPStatus.BAD_REQUEST, msgspec.json.encode({"error": why})

    def carried_out() -> dict[str, Any]:
        for one in engines:
            ask(one, limit)
        return {"engines": [one.pid for one in engines], "share": limit.share, "n_bytes": limit.n_bytes}

    return _answer(carried_out, engines)


def _answer(what: Callable[[], dict[str, Any]], engines: list[Found]) -> _Answer:
    try:
        if engines:
            return HTTPStatus.OK, msgspec.json.encode(what())
        why = _NONE
    except PsiKvError as error:
        why = str(error)
    return HTTPStatus.SERVICE_UNAVAILABLE, msgspec.json.encode({"error": why})


def descendants(pid: int, root: Path = Path("/")) -> set[int]:
    """A process, and all that it started."""
    parents: dict[int, int] = {}
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
