"""Decides open settings on real images: under a wrong convention a network does not find the noise in a noised image.

Every combination of candidates is a network with a chain. Each predicts the ε in noised images (equation 14), and the
right one should have the smallest error by far. Two things would make a wrong one look good:

- A network that outputs 0 has an error of 1 if that is taken for ε, and of 0.1 if it is taken for v. So each error is
  divided by that of an output of 0, read in the same way: what remains is the share of the wanted output that is missed.
- Where one schedule has removed more of the image at the same t, ε is easier to see. So all are compared at the same ᾱ,
  and a wrong schedule is seen by the wrong t that it tells the network.

A small difference decides nothing.
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
from ddpmx.diffusion.samplers import Prediction
from ddpmx.errors import DdpmxError, InputError

MARGIN = 1.25
"""The runner-up's error must be this many times the winner's."""

MAX_ERROR = 0.9
"""The winner's error must be below this. A network that always outputs 0 has 1, however its output is read."""

MAX_CANDIDATES = 64
LEVELS = (0.98, 0.8, 0.5, 0.2, 0.05)
"""The ᾱ_t at which ε is predicted, each at the nearest t of the schedule: at the ends all are bad, or all are good."""

_IMAGES = 16
_BATCH = 8


@dataclass(frozen=True)
class Candidate:
    """One combination of values for the open settings.

    Attributes:
        values: by the setting's name.
        squares: mean square of ε − ε̂ at each of :data:`LEVELS`, float64.
        zeros: the same of an output of 0 that is read in the same way.
    """

    values: dict[str, object]
    squares: NDArray[np.float64]
    zeros: NDArray[np.float64]

    @property
    def errors(self) -> NDArray[np.float64]:
        """The share that is missed of what the network should output, at each of :data:`LEVELS`."""
        return self.squares / self.zeros

    @property
    def error(self) -> float:
        """The mean of :attr:`errors`: 1 for an output of 0."""
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
    """Every combination of the questions' candidates, the best first. Those of which no network can be built are left out.

    Args:
        read: reads the file under some options.
        options: the user's.
        questions: the open settings that the error of ε can decide.
        images: gives uint8 [N, H, W, C] of a candidate's size.
        progress: called with (candidates judged, candidates in all).

    Raises:
        InputError: too many combinations.
    """
    choices = list(itertools.product(*(question.candidates for question in questions)))
    if len(choices) > MAX_CANDIDATES:
        raise InputError(
            f"{len(choices)} combinations are too many to try",
            note=", ".join(f"{question.name}: {len(question.candidates)}" for question in questions),
            hint="set some of them with flags",
        )
    judged = []
    refusal: DdpmxError | None = None
    for done, choice in enumerate(choices):
        values = {question.name: value for question, value in zip(questions, choice, strict=True)}
        try:
            imported = read(options.with_values(values))
        except DdpmxError as error:  # for example 3 heads for a width of 64
            refusal = error
            continue
        finally:
            if progress is not None:
                progress(done + 1, len(choices))
        judged.append(Candidate(values, *epsilon_errors(imported, images(imported))))
    if not judged:
        assert refusal is not None
        raise refusal
    return sorted(judged, key=lambda candidate: candidate.error)


def decide(candidates: Sequence[Candidate]) -> Candidate:
    """The best candidate.

    Raises:
        InputError: it does not find the noise, or is not clearly better than the next.
    """
    winner, *others = candidates
    if not winner.error < MAX_ERROR:
        raise InputError(
            "no candidate finds the noise in these images",
            note=f"the best misses {winner.error:.3g} of what it should output; an output of 0 misses 1",
            hint="use images like those that the network was trained on; or all candidates are wrong",
        )
    if others and not others[0].error > MARGIN * winner.error:
        raise InputError(
            "the images do not decide between the candidates",
            note=f"errors {winner.error:.4g} and {others[0].error:.4g}; a factor of {MARGIN:g} would be clear",
            hint="set them with flags",
        )
    # An undertrained network for v looks like one for ε, as v is mostly ε where there is little noise
    for other in others:
        if other.error < MAX_ERROR and other.squares.mean() < winner.squares.mean():
            raise InputError(
                "the images do not decide between the candidates",
                note=f"{_values(winner)} misses least of what it should output, and {_values(other)} least of ε: the "
                "network is trained too little, or all candidates are wrong",
                hint="set them with flags",
            )
    return winner


def _values(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.values.items())


@torch.no_grad()
def epsilon_errors(imported: Imported, images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean square of ε − ε̂ at each of :data:`LEVELS`, and the same of an output of 0 that is read in the same way.

    The images and the noise are the same for every candidate.
    """
    network, spec = module_of(imported), imported.spec
    alpha_bar = spec.make_schedule().alpha_bar
    pixels = torch.from_numpy(images[:_IMAGES].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    found, nothing = [], []
    for level in LEVELS:
        t = int(np.argmin(np.abs(alpha_bar - level)))
        signal, sigma = float(np.sqrt(alpha_bar[t])), float(np.sqrt(1 - alpha_bar[t]))
        squares, zeros = [], []
        for x0, eps in zip(torch.split(pixels, _BATCH), torch.split(noise, _BATCH), strict=True):
            x = signal * x0 + sigma * eps
            out = _output(network, imported, x, torch.full((len(x),), t))
            squares.append((_epsilon(out, x, signal, sigma, spec.prediction) - eps).double().square().flatten())
            zero = _epsilon(torch.zeros_like(x), x, signal, sigma, spec.prediction)
            zeros.append((zero - eps).double().square().flatten())
        found.append(torch.cat(squares).mean().item())
        nothing.append(torch.cat(zeros).mean().item())
    # a candidate that overflows is wrong
    return np.nan_to_num(np.array(found, np.float64), nan=np.inf), np.array(nothing, np.float64)


def _epsilon(out: Tensor, x: Tensor, signal: float, sigma: float, prediction: Prediction) -> Tensor:
    """ε̂ from a network's output: x_t = √ᾱ·x_0 + √(1−ᾱ)·ε, and v = √ᾱ·ε − √(1−ᾱ)·x_0."""
    if prediction == "x0":
        return (x - signal * out) / sigma
    return signal * out + sigma * x if prediction == "v" else out


def _output(network: nn.Module, imported: Imported, x: Tensor, t: Tensor) -> Tensor:
    """The network's first output, under any classes and x0_prev = 0."""
    spec = imported.spec
    conditioning: dict[str, Tensor] = {}
    if spec.classes is not None:
        conditioning["y"] = torch.arange(len(x)) % spec.classes
    if spec.self_condition:
        conditioning["x0_prev"] = torch.zeros_like(x)
    outputs = network(x, t, **conditioning)
    out: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return out
