"""Which reading of a network's output the images decide for: the right one, or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: importers (no torch)")

import torch

from ddpm_export.importers import probe
from ddpm_export.importers.settings import Imported
from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

CONFIG = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.0, 4)
READINGS = list(itertools.product(("eps", "x0", "v"), ("linear", "cosine", "quad")))
PICTURE = np.where(np.indices((8, 8)).sum(0) % 3 == 0, 230, 40).astype(np.uint8)[None, :, :, None].repeat(16, 0)
X0 = torch.from_numpy(PICTURE.astype(np.float32)).permute(0, 3, 1, 2)[:1] / 127.5 - 1

Answer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def spec(prediction: str, schedule: str) -> ModelSpec:
    return ModelSpec((1, 8, 8), 1000, schedule, {}, prediction, "fixed_large", 1.0)


def judged(answer: Answer, images: np.ndarray, monkeypatch) -> list[probe.Candidate]:
    """The candidates, the best first, for a network that computes ``answer``."""
    monkeypatch.setattr(probe, "module_of", lambda _: answer)
    made = []
    for prediction, schedule in READINGS:
        imported = Imported("x", CONFIG, spec(prediction, schedule), {})
        values = {"prediction": prediction, "schedule": schedule}
        made.append(probe.Candidate(values, *probe.epsilon_errors(imported, images)))
    return sorted(made, key=lambda candidate: candidate.error)


def perfect(prediction: str, schedule: str) -> Answer:
    """What minimises the loss where the only picture is ``PICTURE``: x_0 is known, and ε = (x − √ᾱ·x_0)/√(1−ᾱ)."""
    alpha_bar = torch.from_numpy(spec(prediction, schedule).make_schedule().alpha_bar).float()

    def answer(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, sigma = (a[t][:, None, None, None] for a in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        eps = (x - signal * X0) / sigma
        return {"eps": eps, "x0": X0.expand_as(x), "v": signal * eps - sigma * X0}[prediction]

    return answer


@pytest.mark.parametrize(("prediction", "schedule"), [reading for reading in READINGS if reading[0] != "x0"])
def test_a_perfect_network_is_read_rightly(prediction, schedule, monkeypatch):
    winner = probe.decide(judged(perfect(prediction, schedule), PICTURE, monkeypatch))
    assert winner.values == {"prediction": prediction, "schedule": schedule}
    assert winner.error <= 1e-6


@pytest.mark.parametrize("share", [0.0, 0.02])
def test_a_network_that_outputs_nothing_decides_nothing(share, monkeypatch):
    candidates = judged(lambda x, t: share * x, PICTURE, monkeypatch)
    assert all(candidate.error >= 0.9 for candidate in candidates)
    if share == 0:
        assert all(np.allclose(candidate.errors, 1, rtol=1e-6) for candidate in candidates)
        v = next(candidate for candidate in candidates if candidate.values["prediction"] == "v")
        assert v.squares[2:].max() < 0.5, "though 0, read as v, is close to ε"
    with pytest.raises(InputError, match="no candidate finds the noise"):
        probe.decide(candidates)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_weak_network_is_read_rightly_or_not_at_all(prediction, monkeypatch):
    """(1 − 0.36)² = 0.41 is the error of a briefly trained network."""
    decided = []
    for weight in (0.2, 0.36, 0.6, 0.8, 0.9, 0.97):
        answer = perfect(prediction, "linear")
        candidates = judged(lambda x, t, w=weight, a=answer: w * a(x, t), PICTURE, monkeypatch)
        right = next(c for c in candidates if c.values == {"prediction": prediction, "schedule": "linear"})
        assert right.error == pytest.approx((1 - weight) ** 2, rel=1e-4)
        try:
            winner = probe.decide(candidates)
        except InputError:
            continue
        assert winner is right
        decided.append(weight)
    assert decided == ([0.8, 0.9, 0.97] if prediction == "eps" else [0.36, 0.6, 0.8, 0.9, 0.97]), "less is left open"


def test_an_easier_schedule_does_not_win_by_being_easier(monkeypatch):
    """A network that does not look at t answers equally well under every schedule: it decides the prediction at most."""
    candidates = judged(lambda x, t: x, PICTURE, monkeypatch)
    errors = [c.error for c in candidates if c.values["prediction"] == "eps"]
    assert max(errors) <= 1.02 * min(errors)
    with pytest.raises(InputError):
        probe.decide(candidates)


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "schedule"), [("eps", "cosine"), ("v", "cosine"), ("x0", "linear")])
def test_a_briefly_trained_network_is_not_read_wrongly(prediction, schedule, monkeypatch):
    torch.manual_seed(1)
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:8, :8]
    discs = [(x - a) ** 2 + (y - b) ** 2 < r**2 for a, b, r in draw.uniform((1, 1, 1), (6, 6, 3.5), (64, 3))]
    images = np.stack([np.where(disc, *draw.integers(0, 256, 2)) for disc in discs]).astype(np.uint8)[..., None]
    data = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
    network = UNet(CONFIG)
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    alpha_bar = torch.from_numpy(spec(prediction, schedule).make_schedule().alpha_bar).float()
    for _ in range(120):
        x0, t = data[torch.randint(64, (16,))], torch.randint(1000, (16,))
        signal, sigma = (a[t][:, None, None, None] for a in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
        eps = torch.randn_like(x0)
        target = {"eps": eps, "x0": x0, "v": signal * eps - sigma * x0}[prediction]
        loss = (network(signal * x0 + sigma * eps, t) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    candidates = judged(network.eval(), images, monkeypatch)
    try:
        winner = probe.decide(candidates)
    except InputError:
        return
    assert winner.values == {"prediction": prediction, "schedule": schedule}
