"""`ddpmx serve`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated

from typer import Option

from ddpmx.errors import BackendError, InputError
from ddpmx_cli import flags, signals
from ddpmx_cli.console import busy, say
from ddpmx_cli.opened import Where, opens_model

EXAMPLES = """
Examples:\n
  ddpmx serve garments                            # http://127.0.0.1:8000: a page, and /docs\n
  ddpmx serve model.plan --batch 64 --port 9000\n
  curl 'http://127.0.0.1:8000/v1/images?seed=7&steps=20' -o one.png\n
  curl http://127.0.0.1:8000/v1/images --json '{"n": 8, "steps": 20, "format": "npz"}' -o eight.npz\n
"""

_LIMITS = "Limits"


@opens_model
def serve(
    file: flags.Model,
    host: Annotated[str, Option(help="The address to listen at. 0.0.0.0 is everybody's.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0 for any that is free.", min=0, max=65535)] = 8000,
    batch: Annotated[
        int | None, Option(help="Rows of the network's batch.  \\[default: 16, fewer for large images]")
    ] = None,
    name: Annotated[
        str | None, Option(help="The title of the page.  \\[default: the file's name]", metavar="TEXT")
    ] = None,
    key_file: Annotated[
        Path | None,
        Option(help="Clients have to send the first line of this file: Authorization: Bearer KEY.", metavar="FILE"),
    ] = None,
    most_images: Annotated[
        int, Option(help="Images of one request, at most.", min=1, metavar="N", rich_help_panel=_LIMITS)
    ] = 64,
    most_waiting: Annotated[
        int, Option(help="Images that may wait; more are refused (429).", min=1, metavar="N", rich_help_panel=_LIMITS)
    ] = 4096,
    most_clients: Annotated[
        int, Option(help="Connections at once; more are refused (503).", min=1, metavar="N", rich_help_panel=_LIMITS)
    ] = 2048,
    deadline: Annotated[
        float, Option(help="Seconds until a request is given up (504).", min=1, rich_help_panel=_LIMITS)
    ] = 600.0,
    slow: Annotated[
        float,
        Option(
            help="Seconds that a client may take to ask, or not read; then it is hung up on.",
            min=1,
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
    *,
    where: Where,
) -> None:
    """Serve images by HTTP. Requests share the network's batch, each at its own timestep, and join at any time.

    SIGTERM and Ctrl-C end it when everything is drawn that was asked for; the second time at once.
    """
    try:
        with busy("loading the server"):
            import uvicorn

            from ddpmx.serve.app import Limits, Service, make_app
            from ddpmx.serve.limits import paced
    except ImportError as error:
        raise BackendError(
            "serve needs FastAPI, uvicorn and prometheus-client", note=str(error), hint="pip install 'ddpmx[serve]'"
        ) from error
    from ddpmx.backends.open import open_model
    from ddpmx.formats import model_file
    from ddpmx.images.gallery import check_drawable
    from ddpmx.images.origin import model_hash
    from ddpmx.models import shipped
    from ddpmx.serve.batcher import Batcher

    path = shipped.find(file)
    if model_file.identify(path) == "checkpoint":
        raise InputError(f"{path}: a run is not served", hint="ddpmx export makes a model file of it")
    key = None if key_file is None else _key(key_file)
    listener = _listening(host, port)
    found, backend = open_model(path, **where.settings())
    try:
        check_drawable(found)
        batcher = Batcher(found, backend, batch=batch, waiting=most_waiting)
    except BaseException:
        backend.close()
        raise
    service = Service(
        batcher,
        model=model_hash(found, path),
        name=name or path.stem,
        size=path.stat().st_size,
        limits=Limits(images=most_images, seconds=deadline, slow_seconds=slow),
        key=key,
    )
    loopback = host in ("127.0.0.1", "localhost", "::1")
    app = make_app(service, hosts=["127.0.0.1", "localhost", "[::1]"] if loopback else None)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    say(f"{path.name} on {batcher.description}, a batch of {batcher.batch}: {address}")
    if not loopback and key is None:
        say("Note: anybody who reaches this address may use it; --key-file asks for a key")
    config = uvicorn.Config(
        app, http=paced(slow), log_level="warning", access_log=False, limit_concurrency=most_clients
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            signals.end_at_once()  # the second time; uvicorn would wait on after another SIGTERM

    try:
        Server(config).run(sockets=[listener])
    finally:
        batcher.close(drain=False)
        listener.close()


def _key(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read", note=str(error)) from error
    key = lines[0].strip() if lines else ""
    if len(key) < 8 or not key.isascii():
        raise InputError(f"{path}: a key has at least 8 ASCII characters", hint="openssl rand -hex 16 makes one")
    return key


def _listening(host: str, port: int) -> socket.socket:
    """The socket, before the model is opened, which may take long."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(family[4][:2], family=family[0], backlog=1024)
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot listen there",
            note=error.strerror or str(error),
            hint="another --port or --host",
        ) from error
    os.set_inheritable(listener.fileno(), False)
    return listener
