"""What continuous batching brings: `ddpmx serve` beside examples/jetson/serve.py, and the batcher beside `generate`.

    python tests/benchmarks/serving.py [--model garments] [--clients 16] [--each 8] [--steps 50]

Both servers run the ancestral chain on the same model and take turns, each with clients that ask for one image after
another. Figures of the two are comparable within one run only; on a busy machine not even there.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ddpmx
from ddpmx import Sampling
from ddpmx.backends.open import open_model
from ddpmx.models.shipped import find
from ddpmx.serve.batcher import Batcher

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def server(command: list[str], **options: str | Path) -> Iterator[int]:
    """The port of a server, which says its address in its first line."""
    process = subprocess.Popen(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            sys.exit(f"{' '.join(command)}: {line!r}")
        yield int(found[1])
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def load(port: int, path: str, clients: int, each: int) -> tuple[float, float]:
    """Images a second, and the median time of one, seconds."""
    times: list[float] = []
    faults: list[str] = []

    def client(number: int) -> None:
        for turn in range(each):
            begun = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            connection.request("GET", path.format(seed=1000 * number + turn))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if answer.status != 200 or not data.startswith(b"\x89PNG"):
                faults.append(f"{answer.status}: {data[:80]!r}")
            times.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        sys.exit(f"{len(faults)} of {len(times)} requests failed: {faults[0]}")
    return len(times) / (time.perf_counter() - begun), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="garments")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=8, help="images that a client asks for, one after the other")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    path, n, batch = find(arguments.model), 4 * arguments.batch, arguments.batch
    sampling = Sampling(steps=arguments.steps)

    spec, backend = open_model(path)
    ratios: dict[str, list[float]] = {"one request": [], "a request for each image": []}
    with ddpmx.load(path) as pipeline, Batcher(spec, backend, batch=batch) as batcher:
        pipeline.generate(n, batch=batch, sampling=sampling)
        batcher.submit(n, sampling=sampling).result()
        for _ in range(arguments.rounds):
            begun = time.perf_counter()
            pipeline.generate(n, batch=batch, sampling=sampling)
            alone = time.perf_counter() - begun
            for name, sizes in (("one request", [n]), ("a request for each image", [1] * n)):
                begun = time.perf_counter()
                tickets = [batcher.submit(size, first=i, sampling=sampling) for i, size in enumerate(sizes)]
                for ticket in tickets:
                    ticket.result()
                ratios[name].append(alone / (time.perf_counter() - begun))
    print(f"{n} images of {path.name}, {arguments.steps} steps, batch {batch}: throughput of the batcher by generate's")
    for name, found in ratios.items():
        print(f"  {name:26} {statistics.median(found):.2f}")

    commands = {
        "ddpmx serve": (
            [sys.executable, "-m", "ddpmx_cli.main", "serve", str(path), "--port", "0", "--batch", str(batch)],
            f"/v1/images?seed={{seed}}&steps={arguments.steps}&sampler=ancestral",
        ),
        "examples/jetson/serve.py": (
            [sys.executable, "serve.py", str(path), "--port", "0"],
            f"/image?seed={{seed}}&steps={arguments.steps}",
        ),
    }
    found = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, (command, request) in commands.items():
            folder = ROOT / "examples" / "jetson" if command[1] == "serve.py" else ROOT
            with server(command, cwd=folder) as port:
                load(port, request, 2, 1)
                found[name].append(load(port, request, arguments.clients, arguments.each))
    print(f"\n{arguments.clients} clients, {arguments.each} images each, median of {arguments.rounds} rounds")
    print("| server | images/s | p50, s |\n|---|---|---|")
    medians = {name: [statistics.median(each) for each in zip(*rounds, strict=True)] for name, rounds in found.items()}
    for name, (rate, middle) in medians.items():
        print(f"| {name} | {rate:.2f} | {middle:.2f} |")
    (rate, middle), (old_rate, old_middle) = medians.values()
    print(f"\nthroughput {rate / old_rate:.2f} ×, p50 {middle / old_middle:.2f} ×")


if __name__ == "__main__":
    main()
