"""Calibration states: what a network gets to see in its own chain, over all of t.

A layer's range differs by a factor of two and more between t = 0 and t = T − 1, and a value beyond its range is clipped in
every step of a chain, always in the same direction. So the states are those of a whole chain, and of real images where
there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ddpm_export.networks.torch_backend import TorchBackend
from ddpm_export.proof.record import check_images, exact_float32, short_chain, spread
from ddpmx.backends.base import Backend
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.evaluator import Evaluator
from ddpmx.parity.ladder import SILENT
from ddpmx.parity.propagation import rms
from ddpmx.parity.reference import chain_table, diffuse
from ddpmx.sampling import chain
from ddpmx.sampling.chain import Float32
from ddpmx.sampling.conditioning import example
from ddpmx.sampling.pixels import from_uint8

TIMESTEPS = 25
"""At how many of them: at every second."""

IMAGES = 8
"""Of the chain, and of real images at each of these timesteps; fewer of large images."""

SEED = 1 << 20
"""Another than a record's, so that a file is not judged on the noise that it was calibrated on."""


@dataclass(frozen=True, eq=False)
class States:
    """Inputs of a network at falling timesteps.

    Attributes:
        batches: by the names of the inputs, with the same number of rows in each: x float32 [n, C, H, W], t int32 [n], and
            the conditioning inputs.
        final: the chain's images, x̂_0 float32 [n, C, H, W].
        conditioning: of the chain, the same in all of its steps.
        seed: of the chain.
        steps: of the chain.
        real: how many of the last batches are of real images.
    """

    batches: tuple[dict[str, NDArray[Any]], ...]
    final: Float32
    conditioning: dict[str, NDArray[Any]]
    seed: int
    steps: int
    real: int = 0

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        """One batch after the other."""
        return iter(self.batches)

    def __len__(self) -> int:
        """How many batches."""
        return len(self.batches)

    @property
    def rows(self) -> int:
        """How many states."""
        return sum(len(batch["t"]) for batch in self.batches)

    @property
    def own(self) -> tuple[dict[str, NDArray[Any]], ...]:
        """The batches of the network's own chain."""
        return self.batches[: len(self) - self.real]

    def drift(self, backend: Backend, spec: ModelSpec) -> float:
        """How far another network's chain ends from this one: the RMS of the difference of the images, in levels.

        Args:
            backend: runs the other network.
            spec: of both.

        Raises:
            NumericError: an output is not finite.
            BackendError: the network could not be run.
        """
        images, end = np.arange(len(self.final)), self.final
        for step in chain.run(
            backend,
            chain_table(spec, self.steps),
            chain.initial(self.seed, images, spec.shape),
            seed=self.seed,
            images=images,
            clip=spec.clip,
            conditioning_shapes=spec.conditioning_shapes,
            conditioning=self.conditioning,
        ):
            end = step.x0
        return 127.5 * rms(np.clip(end, -1, 1) - np.clip(self.final, -1, 1))


def calibration_states(
    network: nn.Module,
    spec: ModelSpec,
    *,
    data: NDArray[np.uint8] | None = None,
    seed: int = SEED,
    progress: Callable[[int, int], None] | None = None,
) -> States:
    """States of the network's own chain at timesteps over all of 0…T−1 and, of real images, x_t ~ q(x_t | x_0) there.

    Args:
        network: float32, in eval mode.
        spec: of the network.
        data: uint8 [N, H, W, C], real images.
        seed: of all noise.
        progress: called with (steps done, steps in all).

    Raises:
        InputError: there are fewer images than a batch has, they have another size, or the network was never trained.
        NumericError: an output of the network is not finite.
    """
    if data is not None:
        check_images(data, spec)
        if len(data) < IMAGES:
            raise InputError(
                f"calibration takes {IMAGES} images or more, and there are {len(data)}",
                note="with fewer, the ranges of the layers are those of a few images",
                hint="more images, or none: then the network's own chain is all that is used",
            )
    table = chain_table(spec, min(short_chain(spec.shape), spec.timesteps))
    n = int(np.clip((1 << 18) // np.prod(spec.shape), 1, IMAGES))
    images = np.arange(n)
    wanted = set(np.linspace(0, len(table) - 1, min(TIMESTEPS, len(table))).round().astype(int).tolist())
    conditioning = example(spec, images, seed=seed)
    if spec.classes is not None:
        conditioning["y"] = spread(spec.label_count, n)
    fixed = {name: array for name, array in conditioning.items() if name != "x0_prev"}
    backend = TorchBackend(network)
    batches: list[dict[str, NDArray[Any]]] = []
    with exact_float32():
        _check_trained(backend, spec, seed, conditioning)
        before = np.zeros((n, *spec.shape), np.float32)
        for number, step in enumerate(
            chain.run(
                backend,
                table,
                chain.initial(seed, images, spec.shape),
                seed=seed,
                images=images,
                clip=spec.clip,
                conditioning_shapes=spec.conditioning_shapes,
                conditioning=fixed,
            )
        ):
            if number in wanted:
                t = np.full(n, step.t, np.int32)
                batches.append({"x": step.x.copy(), "t": t, **conditioning})
                if spec.self_condition:
                    batches[-1]["x0_prev"] = before
            before = step.x0.copy()
            if progress is not None:
                progress(number + 1, len(table))
    real = [] if data is None else _noised(spec, data, [int(one["t"][0]) for one in batches], conditioning, seed, n)
    return States((*batches, *real), before, fixed, seed, len(table), len(real))


def _check_trained(backend: Backend, spec: ModelSpec, seed: int, conditioning: dict[str, NDArray[Any]]) -> None:
    """Check that there is something to quantise: an output of nearly zero would be one of any scale."""
    n = len(next(iter(conditioning.values()))) if conditioning else IMAGES
    x = chain.initial(seed, np.arange(n), spec.shape)
    t = np.linspace(0, spec.timesteps - 1, n).round().astype(np.int32)
    given = {**conditioning, "x0_prev": np.zeros_like(x)} if spec.self_condition else conditioning
    size = rms(Evaluator(backend, spec, n, None, 1)(x, t, given).out)
    if size < SILENT:
        raise InputError(
            "the network's output is nearly zero, so there is nothing to calibrate 8 bits on",
            note=f"RMS of its output: {size:.1g}; its last layer is as it was initialised",
            hint="train it first",
        )


def _noised(
    spec: ModelSpec,
    data: NDArray[np.uint8],
    timesteps: list[int],
    conditioning: dict[str, NDArray[Any]],
    seed: int,
    n: int,
) -> list[dict[str, NDArray[Any]]]:
    """Other images for each timestep, n of them, spread over the data."""
    picked = np.linspace(0, len(data) - 1, n * len(timesteps)).round().astype(int)
    clean = from_uint8(np.ascontiguousarray(data[picked].transpose(0, 3, 1, 2)))
    schedule, batches = spec.make_schedule(), []
    for i, t in enumerate(timesteps):
        x = diffuse(schedule, clean[i * n : (i + 1) * n], t, seed)
        batches.append({"x": x, "t": np.full(n, t, np.int32), **conditioning})
        if spec.self_condition:
            batches[-1]["x0_prev"] = np.zeros_like(x)
    return batches
