"""A door to an ASGI application (https://asgi.readthedocs.io, version 3): Litestar's, for whatever is not hot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from gateway.edge.request import Handler, Request

App = Callable[[Any, Any, Any], Awaitable[None]]


class Asgi:
    """Requests and answers go through whole: these are small, and bounded on the way in."""

    def __init__(self, app: App) -> None:
        self.app = app

    def enter(self, request: Request) -> Handler:
        return self.serve

    async def serve(self, request: Request) -> None:
        unread = [{"type": "http.request", "body": request.body, "more_body": False}]
        status, lines, parts = 500, b"", []

        async def receive() -> Any:
            # After the body nothing more comes; a client's leaving cancels this task.
            return unread.pop() if unread else await asyncio.get_running_loop().create_future()

        async def send(message: Any) -> None:
            nonlocal status, lines
            if message["type"] == "http.response.start":
                status = message["status"]
                lines = b"".join(
                    b"%b: %b\r\n" % field for field in message["headers"] if field[0].lower() != b"content-length"
                )
            else:
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    request.respond(status, lines, b"".join(parts))

        await self.app(scope(request), receive, send)


def scope(request: Request) -> dict[str, Any]:
    path = request.path.decode("latin-1")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method.decode("ascii"),
        "scheme": "http",
        "path": unquote(path) if "%" in path else path,
        "raw_path": request.path,
        "query_string": request.query,
        "root_path": "",
        "headers": request.headers,
        "server": None,
        "client": None,
        "state": {},
    }
