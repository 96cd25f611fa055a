"""The HTTP service around a batcher, as an ASGI application of FastAPI.

GET  /v1/images, POST /v1/images    pictures, or an .npz
GET  /v1/events                     x̂_0 of every step as server-sent events, and then the images
GET  /                              a page
GET  /healthz, /readyz, /metrics    for whoever watches it
GET  /docs, /openapi.json           what FastAPI makes of this file
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import io
import json
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware

import ddpmx
from ddpmx.errors import BackendError, Cancelled, DdpmxError, InputError, QueueFull
from ddpmx.images import conditions as conditions_of
from ddpmx.images import writers
from ddpmx.images.origin import Origin
from ddpmx.page.site import describe
from ddpmx.sampling.chain import Preview
from ddpmx.sampling.pixels import to_nhwc
from ddpmx.sampling.request import Sampling
from ddpmx.serve.ask import Ask, AskFiles, AskFilesWithPictures, AskWithPictures, Files, begin, sent_name
from ddpmx.serve.batcher import Batcher, Ticket
from ddpmx.serve.limits import Limited

PICTURES = {"png": "image/png", "webp": "image/webp"}
PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_RETRY_SECONDS = 5
_LOOK_SECONDS = 0.25
"""How often it is looked whether a client is still there."""


@dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
        images: how many, at most.
        seconds: until it is finished, waiting included.
        slow_seconds: that a client may take to send a request's body. Its head, and reading the answer, are the server's
            to time: :func:`ddpmx.serve.limits.paced`.
        body: bytes of a request.
    """

    images: int = 64
    seconds: float = 600.0
    slow_seconds: float = 30.0
    body: int = 1 << 20


class Service:
    """A model behind HTTP.

    Args:
        batcher: runs the requests; closed when the application ends.
        model: the sha256 by which images name their model.
        name: of the model, for the page.
        size: of its file, bytes.
        limits: of a request.
        key: what clients have to send as ``Authorization: Bearer KEY``, or None.
    """

    def __init__(
        self,
        batcher: Batcher,
        *,
        model: str,
        name: str = "ddpmx",
        size: int = 0,
        limits: Limits | None = None,
        key: str | None = None,
    ) -> None:
        self.batcher, self.model, self.name, self.key = batcher, model, name, key
        self.limits = Limits() if limits is None else limits
        self.page = describe(batcher.spec, name, model, size, tables=False)
        self.page["about"] = f"Images are drawn by {name} on this server."
        self.ready = True
        self.registry = CollectorRegistry()
        self.requests = Counter("ddpmx_requests", "Requests for images", ["outcome"], registry=self.registry)
        self.images = Counter("ddpmx_images", "Images drawn", registry=self.registry)
        self.seconds = Histogram(
            "ddpmx_request_seconds", "From a request to its images", registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
        )  # fmt: skip
        for metric, text, value in (
            ("ddpmx_rows_active", "Rows of the network's batch that are used", lambda: batcher.active),
            ("ddpmx_images_waiting", "Images that wait for a place", lambda: batcher.waiting),
            ("ddpmx_network_calls", "Calls of the network so far", lambda: batcher.calls),
        ):
            Gauge(metric, text, registry=self.registry).set_function(value)

    def submit(self, ask: Ask, watch: Any = None) -> tuple[Ticket, Origin]:
        """Hand a request to the batcher.

        Raises:
            DdpmxError: as :meth:`Batcher.submit`, and for more images than :class:`Limits` allows.
        """
        spec = self.batcher.spec
        if ask.n > self.limits.images:
            raise InputError(
                f"n must be at most {self.limits.images}, not {ask.n}", hint="several requests, with first"
            )
        labels = None
        if ask.labels:
            turns = [spec.class_number(str(label).strip()) for label in ask.labels]
            labels = [turns[index % len(turns)] for index in range(ask.first, ask.first + ask.n)]
        sampling = Sampling.chosen(
            spec.timesteps,
            sampler=ask.sampler,
            steps=ask.steps,
            spacing=ask.spacing,
            eta=ask.eta,
            variance=ask.variance,
        )
        begun = begin(self.batcher, ask, sampling)
        cond = ask.cond if isinstance(ask, AskWithPictures) else None
        if spec.condition is not None and cond is None:
            raise InputError("missing cond: the model takes a condition image", hint="POST with cond, in base64")
        conditions = None if cond is None else conditions_of.read_sent(cond, spec).repeat(ask.n, axis=0)
        ticket = self.batcher.submit(
            ask.n,
            seed=ask.seed,
            first=ask.first,
            labels=labels,
            guidance=ask.guidance,
            sampling=begun.sampling,
            x=begun.x,
            cond=conditions,
            watch=watch,
        )
        origin = Origin(
            self.model,
            spec.precision,
            ask.seed,
            begun.sampling,
            len(ticket.request.table),
            ask.first,
            labels=labels,
            conditions=None if cond is None else [sent_name(cond)] * ask.n,
            guidance=ask.guidance,
            begun_from=begun.of,
            towards=ask.towards,
            share=ask.towards_share,
        )
        return ticket, origin

    async def finished(self, request: Request, ticket: Ticket) -> NDArray[np.uint8]:
        """Wait for the images; a client that hangs up, or waits for too long, gets none.

        Raises:
            Cancelled: it did.
            DdpmxError: as :meth:`Ticket.result`.
        """
        begun, loop, event = time.monotonic(), asyncio.get_running_loop(), asyncio.Event()
        ticket.then(lambda: _set(loop, event))
        try:
            while not ticket.finished:
                if time.monotonic() - begun > self.limits.seconds:
                    raise HTTPException(504, f"not finished after {self.limits.seconds:g} s")
                if await request.is_disconnected():
                    break
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(event.wait(), _LOOK_SECONDS)
        finally:
            ticket.cancel()  # without effect on one that has ended
        if not ticket.finished:
            raise Cancelled("the client hung up")
        images = ticket.result()
        self.images.inc(len(images))
        self.seconds.observe(time.monotonic() - begun)
        return images

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request by how it ends."""
        outcome = "failed"
        try:
            yield
            outcome = "drawn"
        except (Cancelled, asyncio.CancelledError, GeneratorExit):  # the last two where a stream is hung up on
            outcome = "cancelled"
            raise
        except QueueFull:
            outcome = "refused"
            raise
        except HTTPException as error:
            outcome = "late" if error.status_code == 504 else "failed"
            raise
        except InputError:
            outcome = "invalid"
            raise
        finally:
            self.requests.labels(outcome).inc()


def make_app(service: Service, *, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        service: what it serves.
        hosts: the names by which it may be addressed; by default any. A server for one machine names that: otherwise a
            page in its browser could reach it under a name of its own.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.ready = False
        await asyncio.to_thread(service.batcher.close)  # what was asked for before is drawn

    app = FastAPI(
        title="ddpmx",
        version=ddpmx.__version__,
        description=f"Images by {service.name}.",
        lifespan=life,
        redoc_url=None,
    )

    async def known(request: Request) -> None:
        if service.key is not None:
            sent = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(sent.encode(), service.key.encode()):
                raise HTTPException(401, "a key is needed", {"WWW-Authenticate": "Bearer"})

    router = APIRouter(prefix="/v1", dependencies=[Depends(known)])

    async def images(request: Request, ask: AskFiles | AskFilesWithPictures) -> Response:
        with service.counted():
            ticket, origin = await asyncio.to_thread(service.submit, ask)  # it may have pictures to decode
            pixels = await service.finished(request, ticket)
            return await asyncio.to_thread(_answer, pixels, ask, origin)

    @router.get("/images", response_class=Response, summary="Images, by their address")
    async def get_images(request: Request, ask: Annotated[AskFiles, Query()]) -> Response:
        return await images(request, ask)

    @router.post("/images", response_class=Response, summary="Images")
    async def post_images(request: Request, ask: AskFilesWithPictures) -> Response:
        return await images(request, ask)

    @router.get("/events", response_class=StreamingResponse, summary="Images coming into being, as server-sent events")
    async def get_events(ask: Annotated[Ask, Query()]) -> Response:
        return await events(ask)

    @router.post("/events", response_class=StreamingResponse, summary="The same, of a request with pictures in it")
    async def post_events(ask: AskWithPictures) -> Response:
        return await events(ask)

    async def events(ask: Ask) -> Response:
        latest = _Latest(asyncio.get_running_loop())
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.counted())
            # refused before the stream begins
            ticket, _ = await asyncio.to_thread(service.submit, ask, watch=latest.put)
            counted = stack.pop_all()
        return StreamingResponse(
            _events(service, ticket, latest, counted),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    app.include_router(router)
    _add_pages(app, service)
    _add_errors(app, service)
    app.add_middleware(Limited, slow_seconds=service.limits.slow_seconds, body=service.limits.body)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def _add_pages(app: FastAPI, service: Service) -> None:
    web, own = resources.files("ddpmx.page").joinpath("web"), resources.files(__package__).joinpath("web")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    files = {name: (web.joinpath(name).read_bytes(), kind) for name, kind in PAGE.items()}
    files["worker.js"] = own.joinpath("worker.js").read_bytes(), PAGE["page.js"]

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        data, kind = files["index.html"]
        return Response(data, media_type=kind, headers=headers)

    @app.get("/healthz", summary="Whether the server lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether it takes requests")
    async def readyz() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics", response_class=Response, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/model.json", summary="What the model is")
    async def model() -> dict[str, Any]:
        return service.page

    @app.get("/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "there is nothing")
        data, kind = files[name]
        return Response(data, media_type=kind, headers=headers)


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # without what was sent: it may be what JSON cannot say, as NaN or half of a surrogate pair
        service.requests.labels("invalid").inc()
        details = [f"{'.'.join(map(str, each['loc'][1:])) or 'request'}: {each['msg']}" for each in error.errors()]
        return Response(json.dumps({"detail": "; ".join(details)}), 422, media_type="application/json")

    @app.exception_handler(DdpmxError)
    async def refused(_: Request, error: DdpmxError) -> Response:
        status, headers = 422, {}
        if isinstance(error, QueueFull):
            status, headers = 429, {"Retry-After": str(_RETRY_SECONDS)}
        elif isinstance(error, Cancelled):
            status = 503 if service.ready else 499
        elif not isinstance(error, InputError):
            broken = isinstance(error, BackendError)
            service.ready = service.ready and not broken
            status = 503 if broken else 500
        values = {"detail": error.fact, "note": error.note, "hint": error.hint}
        return JSONResponse({name: value for name, value in values.items() if value}, status, headers)


class _Latest:
    """The newest preview of each batch of a request: what a slow client does not read in time is dropped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lock = loop, threading.Lock()
        self._steps: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        self._seen: dict[int, int] = {}
        self.event = asyncio.Event()

    def put(self, at: int, step: Preview) -> None:
        """In the batcher's thread."""
        with self._lock:
            self._steps[at] = step.t, to_nhwc(step.x0)
            self._seen[at] = self._seen.get(at, 0) + 1
        _set(self._loop, self.event)

    def take(self) -> list[dict[str, Any]]:
        """What is new, as plain JSON."""
        self.event.clear()
        with self._lock:
            steps, self._steps = self._steps, {}
            return [
                {"first": at, "n": len(pixels), "t": t, "step": self._seen[at], "levels": _text(pixels)}
                for at, (t, pixels) in steps.items()
            ]


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set it, from another thread; after the loop's end nobody waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _events(
    service: Service, ticket: Ticket, latest: _Latest, counted: contextlib.ExitStack
) -> AsyncIterator[str]:
    begun, loop = time.monotonic(), asyncio.get_running_loop()
    ticket.then(lambda: _set(loop, latest.event))
    steps = len(ticket.request.table)
    try:
        with counted:
            while True:
                ended = ticket.finished
                for step in latest.take():
                    yield f"event: step\ndata: {json.dumps({**step, 'steps': steps})}\n\n"
                if ended:
                    break
                if time.monotonic() - begun > service.limits.seconds:
                    raise HTTPException(504, f"not finished after {service.limits.seconds:g} s")
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(latest.event.wait(), 15)
                    continue
                yield ": still there\n\n"
            images = ticket.result()
            service.images.inc(len(images))
            service.seconds.observe(time.monotonic() - begun)
            data = {
                "seconds": round(time.monotonic() - begun, 3),
                "levels": base64.b64encode(images.tobytes()).decode(),
            }
            yield f"event: drawn\ndata: {json.dumps(data)}\n\n"
    except (DdpmxError, HTTPException) as error:
        text = error.fact if isinstance(error, DdpmxError) else error.detail
        yield f"event: fault\ndata: {json.dumps({'detail': text})}\n\n"
    finally:  # also when the client has hung up
        ticket.cancel()


def _text(pixels: NDArray[np.uint8]) -> str:
    return base64.b64encode(pixels.tobytes()).decode()


def _answer(pixels: NDArray[np.uint8], ask: Files, origin: Origin) -> Response:
    """Images as what was asked for."""
    stream = io.BytesIO()
    if ask.format == "npz":
        np.savez(stream, images=pixels)
        return _file(stream, "application/zip", "images.npz")
    files = [writers.picture(image, ask.format, text=origin.text(i)) for i, image in enumerate(pixels)]
    if len(files) == 1:
        return Response(files[0], media_type=PICTURES[ask.format])
    with zipfile.ZipFile(stream, "w") as archive:
        for i, data in enumerate(files):
            archive.writestr(f"{origin.first + i:05d}.{ask.format}", data)
    return _file(stream, "application/zip", "images.zip")


def _file(stream: io.BytesIO, kind: str, name: str) -> Response:
    return Response(
        stream.getvalue(), media_type=kind, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )
