"""What it costs to draw by many processes: shards, files of ranges, Ray's tasks, Triton's calls.

    python tests/benchmarks/scale.py                       # shards and files
    python tests/benchmarks/scale.py --ray                 # where Ray is installed
    python tests/benchmarks/scale.py --triton HOST:PORT    # a server of what `ddpmx triton MODEL` wrote, at its gRPC port

Two things that are compared take turns, so that a busy machine slows down both; figures are medians of the rounds, with
their quartiles. A network of one matrix (tests/data/gaussian.onnx) and chains of one step leave the overhead and little
else; ``--model garments`` puts it beside a real chain. What Ray and Triton draw is compared with ``generate`` first.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ddpmx
from ddpmx import Pipeline, Sampling, load
from ddpmx.images.gallery import save_gallery
from ddpmx.images.origin import model_hash
from ddpmx.models.shipped import find
from ddpmx.scale.ranges import Range
from ddpmx.scale.stores import open_store
from ddpmx.scale.work import Work, claim, draw, pending

TOY = Path(__file__).parents[1] / "data" / "gaussian.onnx"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def show(what: str, values: list[float], unit: str) -> None:
    low, middle, high = quartiles(values)
    print(f"{what:<58} {middle:9.3g} {unit:<4} ({low:.3g} … {high:.3g})", flush=True)


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def a_run(path: Path, spec: Any, steps: int, form: str, per_file: int, batch: int) -> Work:
    return Work(model_hash(spec, path), spec, 0, Sampling(steps=steps), steps, batch, form, per_file)


class Folders:
    """A new folder for each drawing."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, 0

    def __call__(self) -> Path:
        self._made += 1
        return self._root / f"{self._made}"


def files(pipeline: Pipeline, path: Path, steps: int, n: int, rounds: int, folder: Folders) -> None:
    """A plain ``generate`` with its PNGs, beside the same images in files of ranges."""
    batch = pipeline.default_batch

    def plain() -> None:
        images = pipeline.generate(n, batch=batch, steps=steps)
        save_gallery(folder(), images)

    def ranges(form: str) -> None:
        work, store = a_run(path, pipeline.spec, steps, form, 16 * batch, batch), open_store(str(folder()))
        draw(pipeline, work, store, pending(work, store, Range(0, n), claim(work, store)))

    forms = ("png", "tar", "npz")
    ratios: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        alone = timed(plain)
        for form in forms:
            ratios[form].append(timed(functools.partial(ranges, form)) / alone)
    for form in forms:
        show(f"--format {form}, {n} images of {steps} steps ÷ plain generate", ratios[form], "×")


def shards(path: str, rounds: int, folder: Folders) -> None:
    """A process of one image of one step from its start to its end: what each shard costs beside its images."""
    out = folder()
    command = [sys.executable, "-m", "ddpmx_cli.main", "generate", path, "-n", "1", "--steps", "1", "--shard", "0/1"]
    times = [
        timed(
            lambda number=number: subprocess.run(
                [*command, "--out", str(out / str(number))], check=True, stdout=subprocess.DEVNULL
            )
        )
        for number in range(rounds)
    ]
    show("a shard of one image of one step, the whole process", times, "s")


def on_ray(path: Path, n: int, rounds: int, folder: Folders) -> None:
    """What Ray takes: its start, a worker's, a task's; and that the files are those of this process."""
    from ddpmx.scale.on_ray import Worker, draw_on_ray

    opener = functools.partial(load, path, threads=1)
    with opener() as pipeline:
        work = a_run(path, pipeline.spec, 1, "tar", 1, 1)

        def here(out: Path) -> None:
            store = open_store(str(out))
            for unit in pending(work, store, Range(0, n), claim(work, store)):
                draw(pipeline, work, open_store(str(out)), [unit])

        import ray

        start = timed(lambda: ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"))
        print(f"{'Ray starts, in':<58} {start:9.3g} s")

        def there(out: Path, count: int) -> None:
            store = open_store(str(out))
            units = pending(work, store, Range(0, count), claim(work, store))
            draw_on_ray(opener, work, str(out), units, threads=1, workers=1)

        check, same = folder(), folder()
        here(check)
        there(same, n)
        assert {p.name: p.read_bytes() for p in check.iterdir()} == {p.name: p.read_bytes() for p in same.iterdir()}
        show("Ray: a worker to its first image", [timed(lambda: there(folder(), 1)) for _ in range(rounds)], "s")
        worker = ray.remote(num_cpus=1)(Worker).remote(opener, work, str(same), ddpmx.__version__)
        ray.get(worker.open.remote())
        tasks = [timed(lambda: ray.get(worker.draw.remote(0, 0))) * 1e3 for _ in range(100 * rounds)]
        show("Ray: a task of no images, there and back", tasks, "ms")
        ray.shutdown()


def on_triton(address: str, path: Path, name: str, rounds: int) -> None:
    """Calls of one image of one step, beside ``generate`` here; and as many clients at once as the batch has rows."""
    import tritonclient.grpc as triton

    kinds = {"seed": ("UINT64", np.uint64), "n": ("INT32", np.int32), "steps": ("INT32", np.int32)}

    def ask(client: Any, **values: int) -> Any:
        inputs = []
        for key, value in values.items():
            kind, dtype = kinds[key]
            inputs.append(triton.InferInput(key, [1, 1], kind))
            inputs[-1].set_data_from_numpy(np.array([[value]], dtype))
        return client.infer(name, inputs).as_numpy("images")[0]

    client = triton.InferenceServerClient(address)
    batch = client.get_model_config(name, as_json=True)["config"]["max_batch_size"]
    how = {steps: Sampling.chosen(1000, steps=steps) for steps in (1, 20)}
    with load(path, threads=1) as pipeline:
        wanted = [pipeline.generate(1, seed=seed, batch=batch, sampling=how[20]) for seed in range(2 * batch)]
        answers: list[Any] = [None] * len(wanted)

        def one(seed: int) -> None:
            own = triton.InferenceServerClient(address)
            answers[seed] = ask(own, seed=seed, n=1, steps=20)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(len(wanted))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(np.array_equal(answer, image) for answer, image in zip(answers, wanted, strict=True))
        print(f"{len(wanted)} clients at once: the images of generate, byte for byte")
        calls = []
        for _ in range(rounds):
            alone = timed(lambda: pipeline.generate(1, seed=7, batch=batch, sampling=how[1]))
            calls.append((timed(lambda: ask(client, seed=7, n=1, steps=1)) - alone) * 1e3)
        show("Triton: a call by gRPC beside its image", calls, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-n", type=int, default=256)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--triton", metavar="HOST:PORT")
    parser.add_argument("--name", help="of the model in Triton", default=None)
    args = parser.parse_args()
    path = find(args.model)
    with tempfile.TemporaryDirectory() as root:
        folder = Folders(Path(root))
        if args.ray:
            on_ray(path, args.tasks, args.rounds, folder)
        elif args.triton:
            on_triton(args.triton, path, args.name or path.stem, 10 * args.rounds)
        else:
            with load(path, threads=1) as pipeline:
                files(pipeline, path, args.steps, args.n, args.rounds, folder)
            shards(str(path), args.rounds, folder)


if __name__ == "__main__":
    main()
