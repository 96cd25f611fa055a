"""Serves images of one DDPM on one GPU by HTTP, with ddpmx and the standard library alone.

    python serve.py model.plan      # built first, from model.onnx beside it, if it is missing or no longer fits
    python serve.py model.onnx      # on the CPU

    GET /image?seed=7&steps=50              a PNG: what `ddpmx generate --batch 1` draws for that seed
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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import web
from fitting import open_pipeline
from numpy.typing import NDArray

import ddpmx
from ddpmx.errors import BackendError, DdpmxError, InputError
from ddpmx.images.gallery import check_drawable
from ddpmx.sampling.pixels import to_nhwc

WAITING = 16  # clients in the queue; further ones are refused
BEHIND = 4  # frames that a slow client may be behind; more are dropped


class Job:
    """One client's request. Made by the client's thread, carried out by the thread that owns the pipeline."""

    def __init__(self, connection: socket.socket, seed: int, steps: int, every: int = 0) -> None:
        self.connection, self.seed, self.steps, self.every = connection, seed, steps, every
        self.results: queue.SimpleQueue[tuple[bool, NDArray[np.uint8] | str]] = queue.SimpleQueue()
        self.sent = threading.Event()
        self._seen = 0

    def client_left(self) -> bool:
        """Polled at every step. A socket that the other side has closed is readable, and gives no bytes."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # reset, or closed on this side
            return True

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
    """A thread for each client, none of which touches the pipeline."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], spec: ddpmx.ModelSpec) -> None:
        self.spec, self.jobs = spec, queue.Queue[Job](WAITING)
        super().__init__(address, Handler)


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
                self.image(self.queue_up(web.numbers(query, most)))
            elif path == "/stream":
                values = {"steps": steps, **web.numbers(query, {**most, "every": steps})}
                self.stream(self.queue_up({"every": max(1, values["steps"] // 25), **values}))
            else:
                self.reply(404, "there are /, /image and /stream")
        except InputError as error:
            self.reply(400, error.fact)
        except queue.Full:
            self.reply(503, f"{WAITING} others are waiting")

    def image(self, job: Job) -> None:
        _, result = job.results.get()
        if isinstance(result, str):
            self.reply(500, result)
        else:
            self.reply(200, web.png(result), "image/png")
        job.sent.set()

    def stream(self, job: Job) -> None:
        begun = last = False
        while not last:
            last, result = job.results.get()
            if isinstance(result, str):
                if not begun:  # later the only way to report an error is to end the stream
                    self.reply(500, result)
                break
            if not begun:
                self.head(200, web.STREAM)
            begun, part = True, web.part(result)
            self.wfile.write(part * 2 + web.LAST if last else part)  # twice, since Chromium shows the last part but one
        job.sent.set()

    def queue_up(self, values: dict[str, int]) -> Job:
        job = Job(self.connection, **{"seed": 0, "steps": self.server.spec.timesteps, **values})
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
