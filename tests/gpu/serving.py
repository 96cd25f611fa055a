"""Compares the images of continuous batching with those of `generate`, and measures what a step of each image's own costs.

python tests/gpu/serving.py model.plan OUT.json [BATCH [STEPS]]

The images have to be equal in every byte, or it fails. The figures are, for a batch that is at one step: a step of the
chain and of the batcher, network and host included, and the two kernels alone, in a graph of many launches.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ddpmx
from ddpmx import Sampling
from ddpmx.backends.base import CopyingBackend, DeviceBackend
from ddpmx.backends.open import open_model
from ddpmx.cuda.device_batch import DeviceBatch
from ddpmx.cuda.device_chain import DeviceChain
from ddpmx.cuda.group import Group
from ddpmx.cuda.kernels import Kernels
from ddpmx.device.driver import Driver
from ddpmx.errors import DdpmxError
from ddpmx.formats.spec import ModelSpec
from ddpmx.pipeline import Pipeline
from ddpmx.serve.batcher import Batcher

LAUNCHES, ROUNDS = 200, 5


def asked(batch: int) -> list[dict[str, Any]]:
    """Requests at different steps, of different samplers and seeds."""
    return [
        {"n": batch, "seed": 1, "sampling": Sampling(steps=6)},
        {"n": 1, "seed": 2, "first": 5, "sampling": Sampling(steps=9, sampler="unipc")},
        {"n": 3, "seed": 2**40, "sampling": Sampling(steps=7, sampler="ddim", eta=0.5)},
        {"n": 2 * batch + 1, "seed": 3, "sampling": Sampling(steps=5, sampler="dpmpp_2m")},
        {"n": 2, "seed": 4, "sampling": Sampling(steps=20, variance="fixed_large")},
    ]


def differing(pipeline: Pipeline, batcher: Batcher) -> dict[str, int]:
    """How many images differ, and of how many."""
    requests = asked(batcher.batch)
    wanted = [
        pipeline.generate(
            each["n"], seed=each["seed"], first=each.get("first", 0), batch=batcher.batch, sampling=each["sampling"]
        )
        for each in requests
    ]
    drawn = [ticket.result() for ticket in [batcher.submit(**each) for each in requests]]
    wrong = sum(int((mine != theirs).any((1, 2, 3)).sum()) for mine, theirs in zip(drawn, wanted, strict=True))
    return {"differing": wrong, "images": sum(map(len, wanted))}


def seconds(draw: Callable[[int], object]) -> float:
    """The best of some rounds, after one that prepares."""
    draw(0)
    found = []
    for seed in range(1, ROUNDS + 1):
        begun = time.perf_counter()
        draw(seed)
        found.append(time.perf_counter() - begun)
    return min(found)


class Silent:
    """A network that does nothing, for the kernels alone."""

    def __init__(self, driver: Driver, batch: int) -> None:
        self.driver, self.stream, self.batches, self.executors = driver, 0, ((1, batch),), ("plain",)
        self.description = "no network"

    def check_batch(self, batch: int) -> int:
        return 0

    def network(self, batch: int, **_: object) -> Silent:
        return self

    def enqueue(self, stream: int) -> None:
        pass

    def close(self) -> None:
        pass


def kernels(device: DeviceBackend, spec: ModelSpec, batch: int) -> dict[str, float]:
    """Microseconds of ``ddpmx_step`` and of ``ddpmx_step_each``, for a batch at one step with noise."""
    driver, spec = device.driver, ModelSpec(spec.shape, clip=spec.clip)
    table, found = Sampling(sampler="ancestral").table(spec, spec.make_schedule()), {}
    zeros = np.zeros((batch, *spec.shape), np.float32)
    with driver.current():
        with DeviceChain(driver, Kernels.of(driver), spec.shape, batch, table, clip=spec.clip) as one:
            one.prepare(lambda stream: None, "plain")
            driver.copy_in(one.out, zeros, one.stream)
            one._set_images(0, range(batch))

            def begin() -> None:
                one._begin(0, batch, None)

            found["uniform_us"] = _microseconds(driver, one.stream, begin, one._launch_step, len(table))
        with DeviceBatch(Silent(driver, batch), spec, batch) as each:
            rows = np.arange(batch)
            each.call(batch, [Group(table, 0, rows, rows)])
            list(each.landed())
            found["each_us"] = _microseconds(
                driver, each._stream, lambda: None, lambda: each._launch_step(batch), len(table)
            )
    return found


def _microseconds(
    driver: Driver, stream: int, begin: Callable[[], None], launch: Callable[[], None], most: int
) -> float:
    """Of one launch, the best of some rounds of many in one graph."""
    count = min(LAUNCHES, most - 1)
    with driver.capture(stream) as graphs:
        for _ in range(count):
            launch()
    executable = driver.instantiate(graphs[0], "many steps")
    first, last = driver.event(timing=True), driver.event(timing=True)
    best = math.inf
    for _ in range(ROUNDS + 1):
        begin()
        driver.wait_for_stream(stream)
        driver.record(first, stream)
        driver.launch_graph(executable, stream, "many steps")
        driver.record(last, stream)
        driver.wait_for_stream(stream)
        best = min(best, 1000 * driver.milliseconds(first, last) / count)
    for handle in (executable, graphs[0], first, last):
        handle.close()
    return best


def measure(path: str | Path, batch: int, steps: int) -> dict[str, Any]:
    """All of it."""
    spec, backend = open_model(path)
    with Batcher(spec, backend, batch=batch) as batcher, ddpmx.load(path) as pipeline:
        batch, how = batcher.batch, Sampling(steps=steps)
        found: dict[str, Any] = {
            "plan": Path(path).name,
            "batch": batch,
            "steps": steps,
            "chain_runs_on": "",
            "batcher_runs_on": batcher.description,
            **differing(pipeline, batcher),
        }
        chain = seconds(lambda seed: pipeline.generate(batch, seed=seed, batch=batch, sampling=how))
        found["chain_runs_on"], found["chain_ms"] = pipeline.backend, 1000 * chain / steps
        each = seconds(lambda seed: batcher.submit(batch, seed=seed, sampling=how).result())
        found["batcher_ms"] = 1000 * each / steps
        found["ratio"] = each / chain
        if isinstance(backend, CopyingBackend):
            found |= kernels(backend.device, spec, batch)
            found["kernels_ratio"] = 1 + (found["each_us"] - found["uniform_us"]) / (1000 * found["chain_ms"])
    return found


def main(plan: str, output: str, batch: str = "16", steps: str = "200") -> None:
    found = measure(plan, int(batch), int(steps))
    Path(output).write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    if found["differing"]:
        sys.exit(f"Error: {found['differing']} of {found['images']} images differ from those of generate")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DdpmxError as error:
        sys.exit(f"Error: {error}")
