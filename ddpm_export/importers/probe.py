"""Lets real images answer what a file does not tell: under the wrong convention a network sees no noise where there is.

Every combination of candidates is a network with a chain. Each is asked for the ε in noised images, and the right one
should know it best by far (equation 14 at a few t). Nothing is decided by a small difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_export.importers.settings import Imported, Options, Question
from ddpm_export.networks.registry import make_network
from ddpmx.errors import DdpmxError, InputError

MARGIN = 1.25
"""The runner-up's error must be this many times the winner's."""

SEES = 0.9
"""Mean square of ε − ε̂. Who always answers 0 has 1; a winner above this has not understood the images either."""

MAX_CANDIDATES = 64
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of T, where ε is asked for: at the ends every network is bad, or every one is good."""

_IMAGES = 16
_BATCH = 8


@dataclass(frozen=True)
class Candidate:
    """One way to understand a file.

    Attributes:
        said: its answers to the questions.
        errors: mean square of ε − ε̂ at each of the fractions, float64.
    """

    said: dict[str, object]
    errors: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The mean of them."""
        return float(self.errors.mean())


def module_of(imported: Imported) -> nn.Module:
    """The network, with its weights, in eval mode."""
    with torch.device("meta"):
        network = make_network(imported.config)
    network.load_state_dict(imported.tensors, assign=True)
    return network.eval().requires_grad_(False)


def probe(
    read: Callable[[Options], Imported],
    options: Options,
    questions: Sequence[Question],
    images: Callable[[Imported], NDArray[np.uint8]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Every combination of the questions' candidates, the best first. Those that make no network are left out.

    Args:
        read: understands the file under some options.
        options: what the user said.
        questions: what is open and can be seen by ε.
        images: uint8 [N, H, W, C] of the size that a candidate has.
        progress: called with (candidates judged, candidates in all).

    Raises:
        InputError: too many combinations.
    """
    choices = list(itertools.product(*(question.candidates for question in questions)))
    if len(choices) > MAX_CANDIDATES:
        raise InputError(
            f"{len(choices)} combinations are too many to try",
            note=", ".join(f"{question.name}: {len(question.candidates)}" for question in questions),
            hint="say some of them with flags",
        )
    judged = []
    refusal: DdpmxError | None = None
    for done, choice in enumerate(choices):
        said = {question.name: value for question, value in zip(questions, choice, strict=True)}
        try:
            imported = read(options.also(said))
        except DdpmxError as error:  # say, 3 heads for a width of 64
            refusal = error
            continue
        finally:
            if progress is not None:
                progress(done + 1, len(choices))
        judged.append(Candidate(said, epsilon_errors(imported, images(imported))))
    if not judged:
        assert refusal is not None
        raise refusal
    return sorted(judged, key=lambda candidate: candidate.error)


def decide(candidates: Sequence[Candidate]) -> Candidate:
    """The winner.

    Raises:
        InputError: it sees nothing, or is not clearly better than the next.
    """
    winner, *others = candidates
    if not winner.error < SEES:
        raise InputError(
            "no candidate finds the noise in these images",
            note=f"the best has a mean square error of {winner.error:.3g}, and answering 0 has 1",
            hint="images like those that the network was trained on; or the candidates are all wrong",
        )
    if others and not others[0].error > MARGIN * winner.error:
        raise InputError(
            "the images do not decide between the candidates",
            note=f"errors {winner.error:.4g} and {others[0].error:.4g}; {MARGIN:g} times as much would be clear",
            hint="say them with flags",
        )
    return winner


@torch.no_grad()
def epsilon_errors(imported: Imported, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean square of ε − ε̂ at each of :data:`FRACTIONS`; the same images and the same noise for everybody."""
    network, spec = module_of(imported), imported.spec
    alpha_bar = spec.make_schedule().alpha_bar
    pixels = torch.from_numpy(images[:_IMAGES].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for fraction in FRACTIONS:
        t = round(fraction * (spec.timesteps - 1))
        signal, sigma = float(np.sqrt(alpha_bar[t])), float(np.sqrt(1 - alpha_bar[t]))
        squares = []
        for x0, eps in zip(torch.split(pixels, _BATCH), torch.split(noise, _BATCH), strict=True):
            x = signal * x0 + sigma * eps
            out = _ask(network, imported, x, torch.full((len(x),), t))
            if spec.prediction == "x0":
                out = (x - signal * out) / sigma
            elif spec.prediction == "v":  # v = √ᾱ·ε − √(1−ᾱ)·x_0 and x_t = √ᾱ·x_0 + √(1−ᾱ)·ε
                out = signal * out + sigma * x
            squares.append((out - eps).double().square().flatten())
        errors.append(torch.cat(squares).mean().item())
    # who overflows is wrong
    return np.nan_to_num(np.array(errors, np.float64), nan=np.inf).astype(np.float64)


def _ask(network: nn.Module, imported: Imported, x: Tensor, t: Tensor) -> Tensor:
    spec = imported.spec
    conditioning: dict[str, Tensor] = {}
    if spec.classes is not None:
        conditioning["y"] = torch.arange(len(x)) % spec.classes
    if spec.self_condition:
        conditioning["x0_prev"] = torch.zeros_like(x)
    answer = network(x, t, **conditioning)
    out: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return out
