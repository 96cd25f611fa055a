"""What a request for images may say, and where its chains begin."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, StrictInt

from ddpmx.diffusion.grids import Spacing
from ddpmx.diffusion.samplers import Sampler, Variance
from ddpmx.errors import InputError
from ddpmx.images import pictures
from ddpmx.sampling.chain import between
from ddpmx.sampling.request import Sampling
from ddpmx.tasks import variations
from ddpmx.tasks.steps import Model


class Ask(BaseModel):
    """A request for images."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(1, ge=1, description="How many images.")
    seed: int = Field(0, ge=0, lt=2**64, description="Image i of a seed is always the same.")
    first: int = Field(0, ge=0, lt=2**32, description="Index of the first image.")
    steps: int | None = Field(None, ge=1, description="How many of the T timesteps are visited; by default all.")
    sampler: Sampler | None = Field(None, description="By default ancestral, and UniPC for few steps.")
    spacing: Spacing | None = Field(None, description="Of the timesteps.")
    eta: float | None = Field(None, ge=0, le=1, description="Noise of the ddim sampler.")
    variance: Variance | None = Field(None, description="Of the ancestral chain; by default the model's.")
    labels: list[StrictInt | str] | None = Field(
        None, max_length=1024, description="Classes, by number or name, taken in turns."
    )
    guidance: float = Field(1.0, description="w of classifier-free guidance; 1 for none.")
    towards: int | None = Field(None, ge=0, lt=2**64, description="Another seed: x_T lies between those of both.")
    share: float | None = Field(
        None, ge=0, le=1, description="With towards: from 0, seed's images, to 1, the other one's; by default half."
    )

    @property
    def towards_share(self) -> float:
        """λ, how much of the other seed's x_T there is."""
        return 0.5 if self.share is None else self.share


class AskWithPictures(Ask):
    """A request for images that can have pictures in it."""

    init: Base64Bytes | None = Field(
        None, description="A PNG, JPEG or WebP of the model's size, in base64: the images are variations of it."
    )
    strength: float | None = Field(
        None, gt=0, le=1, description=f"With init: how much of the chain is run; {variations.STRENGTH} by default."
    )
    cond: Base64Bytes | None = Field(
        None, description="The condition of all images, in base64: a PNG, JPEG or WebP of any size."
    )


class Files(BaseModel):
    """Images as files."""

    format: Literal["png", "webp", "npz"] = Field(
        "png", description="One image is a picture, several are a zip of pictures; npz has `images` uint8 [n, H, W, C]."
    )


class AskFiles(Files, Ask):
    """A request for images as files."""


class AskFilesWithPictures(Files, AskWithPictures):
    """A request for images as files that can have pictures in it."""


class Begun(NamedTuple):
    """Where chains begin.

    Attributes:
        x: float32 [n, C, H, W], x_t; or None for the seed's x_T.
        sampling: with that t as ``start``.
        of: the name of the picture that each image is a variation of, or None.
    """

    x: NDArray[np.float32] | None
    sampling: Sampling
    of: list[str] | None = None


def begin(model: Model, ask: Ask, sampling: Sampling) -> Begun:
    """Where the chains of a request begin.

    Args:
        model: that draws them.
        ask: the request.
        sampling: how they are run.

    Raises:
        InputError: the request contradicts itself, or its picture does not fit the model.
    """
    init, strength = (ask.init, ask.strength) if isinstance(ask, AskWithPictures) else (None, None)
    if ask.share is not None and ask.towards is None:
        raise InputError("share is between seed and towards, which is missing")
    if init is None and strength is not None:
        raise InputError("strength is of init, which is missing")
    if init is not None and ask.towards is not None:
        raise InputError("init and towards exclude each other: both say where the chain begins")
    if init is not None:
        channels, height, width = model.spec.shape
        pixels = pictures.read_sent(init, "init", channels, (height, width))[None].repeat(ask.n, axis=0)
        begun = variations.begin(
            model,
            pixels,
            variations.STRENGTH if strength is None else strength,
            sampling=sampling,
            seed=ask.seed,
            first=ask.first,
        )
        return Begun(begun.x, begun.sampling, [sent_name(init)] * ask.n)
    if ask.towards is not None:
        images = np.arange(ask.first, ask.first + ask.n)
        return Begun(between(ask.seed, ask.towards, ask.towards_share, images, model.spec.shape), sampling)
    return Begun(None, sampling)


def sent_name(data: bytes) -> str:
    """The name of a picture that was sent, for the images that come of it."""
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"
