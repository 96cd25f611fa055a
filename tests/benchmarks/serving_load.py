"""`ddpmx serve` under load: a thousand clients, among them some that hang up and some that hardly read.

    python tests/benchmarks/serving_load.py [--clients 1000] [--minutes 10] [--model FILE] [--batch 64]

Every image that a client gets is compared with `generate`'s, byte for byte. At the end stands who got what, what the server
counted, and its memory over time. It exits with 1 if an image was wrong or lost, a request failed, or the memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import io
import json
import random
import re
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import ddpmx
from ddpmx import Sampling
from ddpmx.models.shipped import find

ROOT = Path(__file__).parents[2]
SEEDS, IMAGES, STEPS = 16, 3, 20
KINDS = (*("draws", "watches", "draws", "hangs up", "draws") * 4, "hardly reads")
"""Of the clients, in turns."""

SLOW_SECONDS = 10
"""After which the server hangs up on who does not read."""

GROWTH = 1.1
"""Of the memory, from after the first fifth of the time to the end, at most."""


class Load:
    """The clients.

    Args:
        port: of the server.
        expected: of each seed, uint8 [n, H, W, C].
        end: when no client begins again, by :func:`time.monotonic`.
    """

    def __init__(self, port: int, expected: dict[int, NDArray[np.uint8]], end: float) -> None:
        self.port, self.expected, self.end = port, expected, end
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []

    async def client(self, number: int) -> None:
        """Ask again and again."""
        chance, kind = random.Random(number), KINDS[number % len(KINDS)]
        await asyncio.sleep(5 * chance.random())  # they do not all come at once
        while time.monotonic() < self.end:
            seed = chance.randrange(SEEDS)
            try:
                outcome = await getattr(self, f"_{kind.replace(' ', '_')}")(seed)
            except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                outcome = "fault"
                self.faults.append(f"a client that {kind}: {type(error).__name__}: {error}")
            self.outcomes[f"{kind}: {outcome}"] += 1
            await asyncio.sleep(chance.random() * (5 if outcome == "429, comes again" else 0.2))

    async def _draws(self, seed: int) -> str:
        async with self._asked(f"/v1/images?seed={seed}&n={IMAGES}&steps={STEPS}&format=npz") as (reader, status):
            if status == 429:
                return "429, comes again"
            body = await reader.read()
            found = np.load(io.BytesIO(body))["images"] if status == 200 else None
            return self._judged(seed, status, found)

    async def _watches(self, seed: int) -> str:
        async with self._asked(f"/v1/events?seed={seed}&n={IMAGES}&steps={STEPS}") as (reader, status):
            if status == 429:
                return "429, comes again"
            text = _joined(await reader.read())
            last = text.rstrip().rpartition("\n\n")[2]
            kind, _, data = last.partition("\ndata: ")
            wanted = self.expected[seed]
            levels = np.frombuffer(base64.b64decode(json.loads(data)["levels"]), np.uint8)
            found = levels.reshape(wanted.shape) if kind == "event: drawn" else None
            return self._judged(seed, status, found)

    async def _hangs_up(self, seed: int) -> str:
        async with self._asked(f"/v1/events?seed={seed}&n={IMAGES}&steps=250") as (reader, status):
            if status == 429:
                return "429, comes again"
            await reader.read(1000)
            return "hung up"

    async def _hardly_reads(self, seed: int) -> str:
        # enough to fill all buffers between the two
        async with self._asked(f"/v1/events?seed={seed}&n=32&steps=200", buffer=1 << 12) as (reader, status):
            if status == 429:
                return "429, comes again"
            for _ in range(12 * SLOW_SECONDS):
                try:
                    if not await reader.read(64):
                        return "came to an end"
                except ConnectionResetError:
                    return "was hung up on"
                await asyncio.sleep(1)
            return "left by itself"

    def _judged(self, seed: int, status: int, found: NDArray[np.uint8] | None) -> str:
        if found is None:
            self.faults.append(f"status {status}")
            return "fault"
        if not np.array_equal(found, self.expected[seed]):
            self.faults.append(f"seed {seed}: another image")
            return "WRONG"
        return "right"

    @contextlib.asynccontextmanager
    async def _asked(self, path: str, *, buffer: int | None = None) -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=buffer or 1 << 16)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 600)
            yield reader, int(head.split()[1])
        finally:
            writer.transport.abort()


def _joined(body: bytes) -> str:
    """A body without the lengths of its chunks."""
    parts = []
    while body:
        length, _, rest = body.partition(b"\r\n")
        size = int(length, 16)
        parts.append(rest[:size])
        body = rest[size + 2 :]
    return b"".join(parts).decode()


def resident(pid: int) -> float:
    """MB that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1e3 if found else 0.0


async def run(arguments: argparse.Namespace) -> int:
    """Load the server. Returns the exit code."""
    path = find(arguments.model)
    with ddpmx.load(path) as pipeline:
        sampling = Sampling.chosen(pipeline.spec.timesteps, steps=STEPS)
        expected = {
            seed: pipeline.generate(IMAGES, seed=seed, batch=arguments.batch, sampling=sampling)
            for seed in range(SEEDS)
        }
    command = [sys.executable, "-m", "ddpmx_cli.main", "serve", str(path), "--port", "0", "--slow", str(SLOW_SECONDS)]
    command += ["--batch", str(arguments.batch), "--most-waiting", str(arguments.waiting)]
    server = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        line = (await server.stdout.readline()).decode()
        address = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if address is None:
            sys.exit(f"the server does not begin: {line!r}")
        begun, seconds = time.monotonic(), 60 * arguments.minutes
        load = Load(int(address[1]), expected, begun + seconds)
        clients = [asyncio.create_task(load.client(number)) for number in range(arguments.clients)]
        memory = []
        while time.monotonic() < begun + seconds:
            await asyncio.sleep(min(seconds / 20, 30))
            memory.append(resident(server.pid))
            count = sum(load.outcomes.values())
            print(f"{time.monotonic() - begun:5.0f} s: {memory[-1]:.0f} MB, {count} requests", flush=True)
        await asyncio.wait_for(asyncio.gather(*clients), 600)
        async with load._asked("/metrics") as (reader, _):
            metrics = (await reader.read()).decode()
    finally:
        if server.returncode is None:
            server.terminate()
    ended = await asyncio.wait_for(server.wait(), 60)
    print("\n| clients | requests |\n|---|---|")
    for outcome, count in sorted(load.outcomes.items()):
        print(f"| {outcome} | {count} |")
    totals = re.findall(r'ddpmx_requests_total\{outcome="(\w+)"\} (\S+)', metrics)
    counted = {name: int(float(value)) for name, value in totals}
    early = memory[len(memory) // 5]
    growth = max(memory[-3:]) / early
    print(f"\nthe server counted {counted}, and ended with {ended}")
    print(f"its memory: {early:.0f} MB after a fifth of the time, {growth:.2f} × at the end")
    for fault in load.faults[:5]:
        print(fault)
    right = sum(count for outcome, count in load.outcomes.items() if outcome.endswith(": right"))
    good = right and not load.faults and not counted.get("failed") and growth <= GROWTH and ended in (0, 143)
    print("all that was drawn was right, nothing was lost" if good else "NOT AS IT SHOULD BE")
    return 0 if good else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tests" / "data" / "gaussian.onnx"))
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=1000, help="images that may wait; more are refused by 429")
    sys.exit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
