"""Clients that take their time, against uvicorn itself: what is hung up on, and who is served all the same."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="not verified here: ddpmx serve (there is no uvicorn)")
pytest.importorskip("fastapi", reason="not verified here: ddpmx serve (there is no FastAPI)")
import uvicorn

from ddpmx.serve.limits import Limited, paced

SECONDS = 0.5
LARGE = bytes(range(256)) * (1 << 17)
"""More than the system keeps for a connection."""


async def answering(scope, receive, send) -> None:
    """The request's body, and a large answer to /large."""
    body = (await receive())["body"]
    body = LARGE if scope["path"] == "/large" else b"<%s>" % body
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def server():
    app = Limited(answering, slow_seconds=SECONDS, body=100)
    found = uvicorn.Server(uvicorn.Config(app, http=paced(SECONDS), lifespan="off", log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=found.run, kwargs={"sockets": [listener]})
        thread.start()
        found.address = listener.getsockname()
        yield found
        found.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def connected(server, data: bytes) -> socket.socket:
    client = socket.create_connection(server.address, 10)
    client.sendall(data)
    return client


def rest(client: socket.socket) -> bytes:
    """Until it is hung up on."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 20):
            found += part
    return found


def test_who_never_reads_is_hung_up_on(server):
    with connected(server, b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as client:
        assert client.recv(12) == b"HTTP/1.1 200"
        for _ in range(1000):
            if not server.server_state.connections:
                break
            time.sleep(0.01)
        else:
            raise AssertionError("it is still there")
        assert len(rest(client)) < len(LARGE)


def test_who_reads_slowly_gets_everything(server):
    with connected(server, b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n") as client:
        found = bytearray()
        begun = time.monotonic()
        while part := client.recv(1 << 20):
            found += part
            time.sleep(0.05 if time.monotonic() - begun < 3 * SECONDS else 0)
        assert time.monotonic() - begun > 2 * SECONDS
        assert found.split(b"\r\n\r\n", 1)[1] == LARGE


@pytest.mark.parametrize("start", [b"", b"GET / HT"], ids=["nothing", "half"])
def test_who_does_not_ask_is_hung_up_on(server, start):
    with connected(server, start) as client:
        assert rest(client) == b""


def test_a_second_request_that_does_not_come_to_an_end(server):
    with connected(server, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") as client:
        time.sleep(0.1)
        client.sendall(b"GET / HT")
        client.settimeout(4)  # without it uvicorn would wait for ever
        assert rest(client).endswith(b"<>")


def test_half_a_body_is_408_and_one_in_pieces_is_read(server):
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\n"
    with connected(server, head + b"1") as client:
        answer = rest(client)
    assert answer.startswith(b"HTTP/1.1 408")
    assert answer.endswith(b'{"detail":"a request is sent within 0.5 s"}')
    with connected(server, head) as client:
        for byte in b"123":
            time.sleep(0.05)
            client.sendall(bytes([byte]))
        assert rest(client).endswith(b"<123>")


def test_a_chunked_body(server):
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"20\r\n" + b"x" * 32 + b"\r\n"
    with connected(server, head + 4 * chunk) as client:  # too large
        assert rest(client).startswith(b"HTTP/1.1 413")
    with connected(server, head + chunk + b"0\r\n\r\n") as client:
        assert rest(client).endswith(b"<" + b"x" * 32 + b">")
