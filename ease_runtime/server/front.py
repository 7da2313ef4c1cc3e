"""What stands before the routes: the names that a server answers to, and a name for each request.

A page of another site can call a server on this machine by a name of its own that resolves to it (DNS
rebinding), so a server that only listens here answers to this machine's names alone.
"""

import re
import uuid
from typing import TYPE_CHECKING

from ease_runtime.server.api_error import error_object

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def answers_to(host: str, more: tuple[str, ...]) -> frozenset[str] | None:
    """The names of a server that listens on `host`, and `more`; None: whatever it is called."""
    listens = f"[{host}]" if ":" in host else host.lower()
    if listens not in LOOPBACK and not listens.startswith("127."):
        return frozenset(map(str.lower, more)) or None
    return LOOPBACK | {listens, *map(str.lower, more)}


def host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


class Front:
    """Refuses requests that call the server by another name (421), and gives every answer an x-request-id:
    the request's own, where it is a short word, or a new one.
    """

    def __init__(self, app: "ASGIApp", hosts: frozenset[str] | None) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_named(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name.encode())]}
            await send(message)

        called = host_name(headers.get(b"host", ""))
        if self.hosts is None or called in self.hosts:
            await self.app(scope, receive, send_named)
            return
        from starlette.responses import JSONResponse

        wrong = f"this server is not called {called[:80]!r}; serve with --allowed-host NAME where it is"
        await JSONResponse(error_object(421, wrong), 421)(scope, receive, send_named)
