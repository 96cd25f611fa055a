"""What every request is held to, whatever it asks for: the size of its body, and the pace at which its answer is read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class SlowClient(Exception):  # noqa: N818 - ends a connection, and nobody else catches it
    """A client did not read."""


class Limited:
    """An ASGI application within limits.

    Args:
        app: the application.
        slow_seconds: that a client may take for a part of the answer.
        body: bytes of a request's body.
    """

    def __init__(self, app: App, *, slow_seconds: float, body: int) -> None:
        self._app, self._seconds, self._body = app, slow_seconds, body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = 0

        async def measured() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._body:
                raise HTTPException(413, f"a request has at most {self._body} bytes")
            return message

        async def paced(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self._seconds)
            except (TimeoutError, asyncio.TimeoutError) as error:
                raise SlowClient(f"a client did not read for {self._seconds:g} s") from error

        await self._app(scope, measured, paced)
