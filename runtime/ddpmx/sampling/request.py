"""A request: how many images, of which seed, with which sampling and conditioning. Checked here and nowhere else.

Whatever draws images (the pipeline, the command line, the benchmark) makes a :class:`Request` by :func:`check_request`, or
calls :func:`check_batch`, and so all refuse the same things in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ddpmx.arrays.protocols import AnyArray, Labels
from ddpmx.diffusion.grids import Spacing
from ddpmx.diffusion.noise import MAX_IMAGE, check_seed
from ddpmx.diffusion.samplers import LEARNED_VARIANCES, Sampler, Table, Variance, make_table
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.conditioning import class_labels
from ddpmx.sampling.guidance import check_guidance, guided, guided_batches
from ddpmx.sampling.runner import fitting_batch

DEFAULT_BATCH, DEFAULT_BATCH_ELEMENTS = 16, 1 << 22
"""16 images at once, fewer of more than 500×500 pixels."""

MAX_RESULT_BYTES = 1 << 36
"""More than 64 GiB of images in one request is a mistake; draw them in parts with ``first``."""

MAX_BATCH_ELEMENTS = 1 << 25
"""n·C·H·W of one batch: 128 MiB of float32, and several times that inside the network and while noise is drawn."""


FEW_STEPS = 100
"""Below so many steps UniPC's images are better than the ancestral chain's: docs/sampling.md has the figures."""


@dataclass(frozen=True)
class Sampling:
    """How a chain is run. The names are checked against a model where they are used, see :meth:`table`.

    Attributes:
        sampler: ``ancestral`` (Algorithm 2 of Ho et al. 2020), ``ddim`` (Song et al. 2020), ``dpmpp_2m`` (DPM-Solver++(2M),
            Lu et al. 2022) or ``unipc`` (UniPC of order 2, Zhao et al. 2023).
        steps: how many of the T timesteps are visited, 1…T; None for all.
        spacing: which ones: see :func:`ddpmx.diffusion.grids.timestep_grid`.
        eta: η of the ddim sampler, 0 (no noise) … 1 (as much as the ancestral chain).
        start: the timestep at which the chain begins, or else the nearest that it visits, with a UserWarning; None for the
            last of them. The states at that t have to be passed as ``x``.
        variance: σ² of the ancestral chain, instead of the model's own.
    """

    sampler: Sampler = "ancestral"
    steps: int | None = None
    spacing: Spacing = "linspace"
    eta: float = 0.0
    start: int | None = None
    variance: Variance | None = None

    @classmethod
    def chosen(
        cls,
        T: int,
        *,
        sampler: Sampler | None = None,
        steps: int | None = None,
        spacing: Spacing | None = None,
        eta: float | None = None,
        variance: Variance | None = None,
    ) -> Sampling:
        """A sampling with what was left open chosen well, as ``ddpmx generate`` does.

        With few steps the ancestral chain leaves grain, so without ``sampler`` fewer than :data:`FEW_STEPS` of the T
        timesteps are run by UniPC with trailing spacing; η names DDIM, and ``variance`` the ancestral chain. Everything
        else has the defaults of this class, which do not depend on ``steps``: what a program has drawn stays what it draws.

        Args:
            T: the model's timesteps.
            sampler, steps, spacing, eta, variance: as the fields of this class; None for what is to be chosen.
        """
        few = sampler is None and variance is None and steps is not None and steps < min(FEW_STEPS, T)
        return cls(
            sampler=sampler or (("ddim" if eta else "unipc") if few else "ancestral"),
            steps=steps,
            spacing=spacing or ("trailing" if few else "linspace"),
            eta=eta or 0.0,
            variance=variance,
        )

    def table(self, spec: ModelSpec, schedule: Schedule | None = None) -> Table:
        """The coefficients of this chain for one model, see :func:`ddpmx.diffusion.samplers.make_table`.

        Args:
            spec: the model.
            schedule: its schedule, if it was made before.

        Raises:
            InputError: as there, and for a learned variance that the network does not give.
            SpecError: as there.
        """
        if self.variance in LEARNED_VARIANCES and self.variance != spec.variance:
            raise InputError(
                "the network's variance output means something else"
                if spec.learns_variance
                else "the network has no variance output",
                note=f"the file says {spec.variance!r}",
            )
        return make_table(
            spec.make_schedule() if schedule is None else schedule,
            spec.prediction,
            self.variance or spec.variance,
            sampler=self.sampler,
            steps=self.steps,
            spacing=self.spacing,
            eta=self.eta,
            start=self.start,
        )


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`Sampling` as keywords: ``generate(16, steps=50, sampler="ddim")``."""

    sampler: Sampler
    steps: int | None
    spacing: Spacing
    eta: float
    start: int | None
    variance: Variance | None


@dataclass(frozen=True, eq=False)  # arrays have no truth value to be compared by
class Conditioning:
    """The conditioning of the images, for models that have classes or take a condition.

    Attributes:
        labels: the class of each image, whole numbers [n], or one for all; on the host.
        cond: float32 [n, K, H, W], the condition of each image.
        guidance: w of classifier-free guidance: 1 for none, 0 for the network without classes, more than 1 beyond the
            class, below 0 away from it.
    """

    labels: Labels | None = None
    cond: AnyArray | None = None
    guidance: float = 1.0


@dataclass(frozen=True, eq=False)
class Request:
    """A request that was checked against its model.

    Attributes:
        n: how many images, at least 1.
        seed: of the noise, 0…2⁶⁴−1.
        first: the index of the first image.
        batch: how many run at once, at most.
        sampling: how the chain is run.
        table: its coefficients.
        labels: int32 [n], the class of each image, or None where none were passed.
        guidance: w of classifier-free guidance, 1 for none.
    """

    n: int
    seed: int
    first: int
    batch: int
    sampling: Sampling
    table: Table
    labels: NDArray[np.int32] | None
    guidance: float = 1.0

    def batches(self, batch: int | None = None) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(position in the result, image indices) of each batch, of ``batch`` images instead of the request's."""
        size = self.batch if batch is None else batch
        for at in range(0, self.n, size):
            yield at, np.arange(self.first + at, self.first + min(at + size, self.n))


def merge_sampling(sampling: Sampling | None, options: SamplingOptions) -> Sampling:
    """One :class:`Sampling`, from an object or from keywords.

    Raises:
        InputError: both were passed, or ``sampling`` is something else.
        TypeError: an option that does not exist.
    """
    names = [field.name for field in fields(Sampling)]
    if unknown := sorted(options.keys() - set(names)):
        raise TypeError(f"there is no option {unknown[0]!r}; there are {', '.join(names)}")
    if sampling is None:
        return Sampling(**options)
    if not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a ddpmx.Sampling, not {type(sampling).__name__}", hint="Sampling(steps=50)")
    if options:
        raise InputError(
            f"sampling was passed, and {', '.join(options)} as well",
            hint="pass one of the two; dataclasses.replace(sampling, steps=50) changes a field",
        )
    return sampling


def merge_conditioning(
    conditioning: Conditioning | None,
    labels: Labels | None,
    cond: AnyArray | None = None,
    guidance: float = 1.0,
) -> Conditioning:
    """One :class:`Conditioning`, from an object or from keywords.

    Raises:
        InputError: both were passed, or ``conditioning`` is something else.
    """
    if conditioning is None:
        return Conditioning(labels, cond, guidance)
    if not isinstance(conditioning, Conditioning):
        raise InputError(
            f"conditioning must be a ddpmx.Conditioning, not {type(conditioning).__name__}",
            hint="Conditioning(labels=3), or labels=3 alone",
        )
    twice = [name for name, value in (("labels", labels), ("cond", cond)) if value is not None]
    twice += ["guidance"] if guidance != 1 else []
    if twice:
        raise InputError(f"conditioning was passed, and {' and '.join(twice)} as well", hint="pass one of the two")
    return conditioning


class Images(NamedTuple):
    """Which images, and what they are of: what a request has in common with every other work on images.

    Attributes:
        n, first, batch, labels, guidance: as in :class:`Request`.
    """

    n: int
    first: int
    batch: int
    labels: NDArray[np.int32] | None
    guidance: float


def check_request(
    spec: ModelSpec,
    n: int,
    *,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    sampling: Sampling | None = None,
    labels: Labels | None = None,
    guidance: float = 1.0,
    ranges: tuple[tuple[int, int], ...] = ((1, 1 << 32),),
    schedule: Schedule | None = None,
) -> Request:
    """Check a request against a model, before anything is prepared for it.

    Args:
        spec: the model.
        n, seed, first, batch, sampling, labels, guidance: see :class:`Request`; ``batch`` may be None for
            :func:`default_batch`.
        ranges: smallest and largest batch of each range that the network takes.
        schedule: the model's, if it was made before.

    Returns:
        The request in Python's own numbers, whose products do not wrap around. Its batch is one that the network takes.

    Raises:
        InputError: a number out of its range, labels that are none, guidance of a model that cannot be guided, or images
            that would not fit into memory.
        SpecError: the schedule does not go with this sampler.
    """
    sampling = Sampling() if sampling is None else sampling
    table = sampling.table(spec, schedule)
    seed = check_seed(seed)
    n, first, batch, classes, guidance = check_images(
        spec, n, first=first, batch=batch, labels=labels, guidance=guidance, ranges=ranges
    )
    return Request(n, seed, first, batch, sampling, table, classes, guidance)


def check_images(
    spec: ModelSpec,
    n: int,
    *,
    first: int = 0,
    batch: int | None = None,
    labels: Labels | None = None,
    guidance: float = 1.0,
    ranges: tuple[tuple[int, int], ...] = ((1, 1 << 32),),
) -> Images:
    """Check what a request says of its images, see :func:`check_request`.

    Raises:
        InputError: as there.
    """
    guidance = check_guidance(spec, guidance, labelled=labels is not None)
    twice = guided(spec, guidance) is not None
    ranges = guided_batches(ranges) if twice else ranges
    batch = fitting_batch(ranges, default_batch(spec)) if batch is None else batch
    for name, value, least in (("n", n, 1), ("first", first, 0), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= MAX_IMAGE + 1:
            raise InputError(f"{name} must be a whole number from {least} to 2**32, not {value!r}")
    n, first, batch = int(n), int(first), int(batch)
    if first + n > MAX_IMAGE + 1:
        raise InputError(f"images are numbered 0…2**32 - 1, and {first} + {n} is beyond that")
    channels, height, width = spec.shape
    if n * channels * height * width > MAX_RESULT_BYTES:
        raise InputError(f"{n} images of {height}×{width} do not fit into memory", hint="draw them in parts")
    check_batch(spec, batch, guided=twice)
    classes = None if labels is None else class_labels(spec, n, labels)
    return Images(n, first, fitting_batch(ranges, batch), classes, guidance)


def check_batch(spec: ModelSpec, batch: int, *, guided: bool = False) -> None:
    """Check that a batch fits into memory; guided, an image takes two rows of it.

    Raises:
        InputError: it does not.
    """
    if batch * (1 + guided) * _elements(spec) > MAX_BATCH_ELEMENTS:
        _, height, width = spec.shape
        raise InputError(f"{batch} images of {height}×{width} at once do not fit into memory", hint="a smaller batch")


def largest_batch(spec: ModelSpec) -> int:
    """How many images may run at once."""
    return max(1, MAX_BATCH_ELEMENTS // _elements(spec))


def default_batch(spec: ModelSpec) -> int:
    """How many images run at once by default: 1…16, fewer if they are large."""
    return int(np.clip(DEFAULT_BATCH_ELEMENTS // _elements(spec), 1, DEFAULT_BATCH))


def _elements(spec: ModelSpec) -> int:
    """The elements of an image, or of its condition if that is larger."""
    channels, height, width = spec.shape
    return max(channels, spec.condition or 0) * height * width
