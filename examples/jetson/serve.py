"""Serves images of one DDPM on one GPU by HTTP, with ddpmx and the standard library alone.

    python serve.py model.plan      # built first, from model.onnx beside it, if it is missing or no longer fits
    python serve.py model.onnx      # on the CPU

    GET /image?seed=7&steps=50              a PNG: as `ddpmx generate --batch 1 --sampler ancestral`
    GET /stream?seed=7&steps=50&every=5     x̂_0 during the chain, and then the image: multipart/x-mixed-replace
    GET /                                   a page that shows the stream

Exit codes: 130 after Ctrl-C, 0 after SIGTERM, 2 if the model cannot be run.
"""

from __future__ import annotations

import argparse
import contextlib
import queue
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import web
from fitting import open_pipeline
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import BackendError, DdpmxError, InputError
from ddpmx.images.gallery import check_drawable
from ddpmx.sampling.pixels import to_nhwc

WAITING = 16  # clients in the queue; further ones are refused
CONNECTIONS = 64  # each takes a thread, also one that never sends its request; further ones are refused
BEHIND = 4  # frames that a slow client may be behind; more are dropped


class Job:
    """One client's request. Made by the client's thread, carried out by the thread that owns the pipeline."""

    def __init__(self, connection: socket.socket, seed: int, steps: int, every: int = 0) -> None:
        self.connection, self.seed, self.steps, self.every = connection, seed, steps, every
        self.results: queue.SimpleQueue[tuple[bool, NDArray[np.uint8] | str]] = queue.SimpleQueue()
        self.sent = threading.Event()
        self.send_head: Callable[[], None] = lambda: None
        self._lock, self._begun, self._seen = threading.Lock(), False, 0

    def begin(self) -> None:
        """Send the head of the answer, once."""
        with self._lock:
            if not self._begun:
                self._begun = True
                self.send_head()

    @property
    def begun(self) -> bool:
        """Whether the head was sent: it is then too late for an error."""
        return self._begun

    def client_left(self) -> bool:
        """Polled at every step.

        A client that sends no more may have left, or have closed its sending side only, as `nc -N` does, and wait for its
        image. Only an answer tells: who has left resets the connection.
        """
        try:
            if self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                self.begin()
        except (OSError, ValueError):  # reset, or closed on this side
            return True
        return False

    def show(self, _: int, step: ddpmx.Preview) -> None:
        """Called after every step. The arrays belong to the chain, so the queue gets a copy."""
        self._seen += 1
        if self._seen % self.every == 0 and self._seen < self.steps and self.results.qsize() < BEHIND:
            self.results.put((False, to_nhwc(step.x0)[0]))


def work(pipeline: ddpmx.Pipeline, jobs: queue.Queue[Job]) -> None:
    """Serve one client after the other, for ever.

    The main thread owns the pipeline. A pipeline is for one thread; a GPU gains little from a second chain, which needs as
    much memory again; and signals arrive in the main thread, so Ctrl-C ends the running chain.
    """
    while True:
        job = jobs.get()
        show = job.show if job.every else None
        try:
            drawn = pipeline.generate(1, seed=job.seed, steps=job.steps, batch=1, cancel=job.client_left, preview=show)
            job.results.put((True, drawn[0]))
        except DdpmxError as error:
            job.results.put((True, error.fact))  # the text alone, since the error itself keeps the chain alive
            if isinstance(error, BackendError):  # CUDA seldom recovers within a process; systemd starts another one,
                job.sent.wait(5)  # but the client gets the error first
                raise


class Server(ThreadingHTTPServer):
    """A thread for each client, up to :data:`CONNECTIONS`. None of them touches the pipeline."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[str, int], spec: ddpmx.ModelSpec) -> None:
        self.spec, self.jobs = spec, queue.Queue[Job](WAITING)
        self._free = threading.Semaphore(CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0.2)
            request.recv(1 << 16)  # what is left unread turns the end into a reset, which may overtake the answer
            text = f"{CONNECTIONS} others are connected\n"
            request.sendall(f"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\n\r\n{text}".encode())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30  # seconds for a client that neither reads nor disconnects

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client disconnected
            super().handle()

    def do_GET(self) -> None:
        (path, _, query), steps = self.path.partition("?"), self.server.spec.timesteps
        most = {"seed": web.MOST_SEED, "steps": steps}
        try:
            if path == "/":
                values = {"seed": 0, "steps": min(50, steps), **web.numbers(query, most)}
                self.reply(200, web.page(**values, most=steps), "text/html")
            elif path == "/image":
                self.image(self.queue_up(web.numbers(query, most), "image/png"))
            elif path == "/stream":
                values = {"steps": steps, **web.numbers(query, {**most, "every": steps})}
                self.stream(self.queue_up({"every": max(1, values["steps"] // 25), **values}, web.STREAM))
            else:
                self.reply(404, "there are /, /image and /stream")
        except InputError as error:
            self.reply(400, error.fact)
        except queue.Full:
            self.reply(503, f"{WAITING} others are waiting")

    def image(self, job: Job) -> None:
        _, result = job.results.get()
        self.answer(job, result if isinstance(result, str) else web.png(result))
        job.sent.set()

    def stream(self, job: Job) -> None:
        last = False
        while not last:
            last, result = job.results.get()
            if isinstance(result, str):
                self.answer(job, result)
                break
            part = web.part(result)
            self.answer(job, part * 2 + web.LAST if last else part)  # twice, since Chromium shows the last part but one
        job.sent.set()

    def answer(self, job: Job, content: str | bytes) -> None:
        """Bytes are sent, and a text is an error. After the head, the only way to report one is to end the answer."""
        if isinstance(content, bytes):
            job.begin()
            self.wfile.write(content)
        elif not job.begun:
            self.reply(500, content)

    def queue_up(self, values: dict[str, int], kind: str) -> Job:
        job = Job(self.connection, **{"seed": 0, "steps": self.server.spec.timesteps, **values})
        job.send_head = lambda: self.head(200, kind)
        self.server.jobs.put_nowait(job)
        return job

    def reply(self, status: int, content: str | bytes, kind: str = "text/plain") -> None:
        data = content if isinstance(content, bytes) else f"{content.rstrip()}\n".encode()
        self.head(status, kind if isinstance(content, bytes) else f"{kind}; charset=utf-8")
        self.wfile.write(data)

    def head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve images of a DDPM by HTTP.")
    parser.add_argument("model", type=Path, help="model.plan, or model.onnx for the CPU")
    parser.add_argument("--onnx", type=Path, help="the source of the plan (default: the .onnx beside it)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 accepts other machines (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8080, help="0 takes any free port (default: 8080)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as an exception, so that the GPU is released
    try:
        with open_pipeline(arguments.model, arguments.onnx or arguments.model.with_suffix(".onnx")) as pipeline:
            check_drawable(pipeline.spec)
            pipeline.generate(1, steps=1, batch=1)  # errors show now, and not to the first client
            try:
                server = Server((arguments.host, arguments.port), pipeline.spec)
            except (OSError, OverflowError) as error:
                raise InputError(f"cannot listen on {arguments.host}:{arguments.port}", note=str(error)) from error
            with server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                print(f"http://{arguments.host}:{server.server_port}/ by {pipeline.backend}", flush=True)
                work(pipeline, server.jobs)
    except DdpmxError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 130


if __name__ == "__main__":
    sys.exit(main())
