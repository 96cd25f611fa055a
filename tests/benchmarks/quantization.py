"""Where 8 bits are faster on this CPU, and where they are not: ONNX Runtime with files of several precisions, in turns.

    python tests/benchmarks/quantization.py model.onnx model-fp16.onnx model-int8.onnx [--batch 16] [--threads 1]

The first file is float32, and all others are compared with it. Of it the script makes one more, in ONNX Runtime's own way
for CPUs, with the outputs of convolutions in 8 bits as well: its integer convolutions take nothing else. Every round calls
each network a few times, so that what else the machine does is shared by all; the table has medians and the range of the
ratios.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.backends.base import Buffers, PartBackend
from ddpmx.backends.open import open_model
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.propagation import rms
from ddpmx.sampling import chain
from ddpmx.sampling.conditioning import example

CALLS = 4

TIMESTEPS = 8
"""Of the calibration of the file that is made here."""

INSTRUCTIONS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Of processors, that matter for 8 bits, by Linux' names. Those with "vnni", "dp" or "mm" multiply 8-bit integers."""


def inputs(spec: ModelSpec, batch: int, t: int) -> dict[str, Any]:
    """Noise at one t."""
    images = np.arange(batch)
    given = {"x": chain.initial(t, images, spec.shape), "t": np.full(batch, t, np.int32), **example(spec, images)}
    if spec.self_condition:
        given["x0_prev"] = np.zeros_like(given["x"])
    return given


def all_in_8_bits(path: Path, spec: ModelSpec, output: Path) -> None:
    """ONNX Runtime's static quantisation of convolutions, inputs and outputs, for its integer kernels."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, Any]] = iter(
                inputs(spec, 4, int(t)) for t in np.linspace(0, spec.timesteps - 1, TIMESTEPS)
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    logging.getLogger().setLevel(logging.ERROR)
    quantize_static(
        path,
        output,
        Reader(),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )


class Network:
    """An open file with its inputs bound."""

    def __init__(self, path: Path, batch: int, name: str, threads: int) -> None:
        self.spec, self._backend = open_model(path, threads=threads)
        self.name, self.bytes = name, path.stat().st_size
        shapes = self.spec.conditioning_shapes
        self.buffers = Buffers.of(batch, self.spec.shape, var=self.spec.learns_variance, conditioning_shapes=shapes)
        for key, array in self.buffers.inputs().items():
            array[...] = inputs(self.spec, batch, self.spec.timesteps // 2)[key]
        if isinstance(self._backend, PartBackend):
            chain.choose_part(self._backend, self.spec, batch)
        self._backend.bind(self.buffers)
        self._backend.enqueue()

    def call(self) -> float:
        """Seconds of a call, of :data:`CALLS`: as in a chain, its weights are in the cache from the call before."""
        self._backend.enqueue()
        begun = time.perf_counter()
        for _ in range(CALLS):
            self._backend.enqueue()
        return (time.perf_counter() - begun) / CALLS


def table(networks: list[Network], rounds: int) -> list[str]:
    """The table in Markdown."""
    took = np.array([[network.call() for network in networks] for _ in range(rounds)])
    ratios = took[:, :1] / took
    first = networks[0].buffers.out
    lines = [
        "| file | MB | ms a call | as fast as the first | its rounds | ε, from the first |",
        "|---|---|---|---|---|---|",
    ]
    for i, network in enumerate(networks):
        low, middle, high = np.quantile(ratios[:, i], (0.1, 0.5, 0.9))
        verdict = "" if middle >= 1 or i == 0 else " **slower**"
        lines.append(
            f"| {network.name} | {network.bytes / 1e6:.2f} | {1e3 * np.median(took[:, i]):.1f} | {middle:.2f} ×{verdict} | "
            f"{low:.2f} … {high:.2f} | {rms(network.buffers.out - first) / rms(first):.2%} |"
        )
    return lines


def instructions() -> str:
    """What this processor has of :data:`INSTRUCTIONS`."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "not known"
    words = set(text.split())
    return ", ".join(name for name in INSTRUCTIONS if name in words) or "none of " + ", ".join(INSTRUCTIONS)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        networks = [Network(path, options.batch, path.name, options.threads) for path in options.files]
        made = Path(folder) / "made.onnx"
        all_in_8_bits(options.files[0], networks[0].spec, made)
        networks.append(Network(made, options.batch, "inputs and outputs in 8 bits, for CPUs", options.threads))
        print(f"batch {options.batch}, threads: {options.threads}; this processor has {instructions()}\n")
        print("\n".join(table(networks, options.rounds)))


if __name__ == "__main__":
    main()
