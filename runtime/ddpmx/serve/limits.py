"""What every request is held to, whatever it asks for: the size of its body, the time in which it is sent, and the pace at
which its answer is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse
from uvicorn.protocols.http.auto import AutoHTTPProtocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_PIECE = 1 << 16
"""Bytes of an answer that a client has to read in time; more would hang up on one that is slow, and reads all the same."""


class Limited:
    """An ASGI application within limits.

    Args:
        app: the application.
        slow_seconds: that a client may take to send a request's body.
        body: bytes of that, at most.
    """

    def __init__(self, app: App, *, slow_seconds: float, body: int) -> None:
        self._app, self._seconds, self._body = app, slow_seconds, body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, once all of it is there."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            whole: Message | None = await asyncio.wait_for(self._read(receive), self._seconds)
        except (TimeoutError, asyncio.TimeoutError):
            await _refuse(scope, receive, send, 408, f"a request is sent within {self._seconds:g} s")
            return
        if whole is None:
            await _refuse(scope, receive, send, 413, f"a request has at most {self._body} bytes")
            return
        first = [whole]

        async def rest() -> Message:
            return first.pop() if first else await receive()

        async def in_pieces(message: Message) -> None:
            data = memoryview(message.get("body", b""))
            while len(data) > _PIECE:
                await send({"type": "http.response.body", "body": bytes(data[:_PIECE]), "more_body": True})
                data = data[_PIECE:]
            await send({**message, "body": bytes(data)} if "body" in message else message)

        await self._app(scope, rest, in_pieces)

    async def _read(self, receive: Receive) -> Message | None:
        """All of a request, or that its client is gone; None if it is too large."""
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body += message.get("body", b"")
            if len(body) > self._body:
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": body, "more_body": False}


async def _refuse(scope: Message, receive: Receive, send: Send, status: int, detail: str) -> None:
    """Answer without the application, and hang up: what the client has yet to send is not read."""
    await JSONResponse({"detail": detail}, status, {"Connection": "close"})(scope, receive, send)


def paced(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which hangs up on a client that takes its time. Closing alone would wait for the client.

    Args:
        seconds: in which the head of a request has to be sent, and each piece of an answer be read.
    """

    class Paced(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _head: asyncio.TimerHandle | None = None
        _answer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            transport.set_write_buffer_limits(0)  # so that the last bytes count too
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._answer = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._answer is not None:
                self._answer.cancel()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            for timer in (self._head, self._answer):
                if timer is not None:
                    timer.cancel()

        def _await_head(self) -> None:
            """Start the time for a request's head, or end it when there is one."""
            if self.cycle is None or self.cycle.response_complete:
                if self._head is None:
                    self._head = self.loop.call_later(seconds, self.transport.abort)
            elif self._head is not None:
                self._head.cancel()
                self._head = None

    return Paced
