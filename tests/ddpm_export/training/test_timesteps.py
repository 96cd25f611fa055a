"""Which t is trained on: uniform, or by the sizes of the bound's terms, with weights that leave the mean as it is."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="not verified here: the training objective (no torch)")

import torch

from ddpm_export.training.timesteps import HISTORY, ImportanceTimesteps, make_timesteps

pytestmark = pytest.mark.torch


def filled(losses: np.ndarray) -> ImportanceTimesteps:
    """One that has seen these losses, [T, rounds], of every t."""
    sampling = ImportanceTimesteps(len(losses))
    for column in losses.T:
        sampling.update(torch.arange(len(losses)), torch.from_numpy(column))
    return sampling


def test_uniform_t_goes_from_the_first_to_the_last():
    torch.manual_seed(0)
    t, weights = make_timesteps("uniform", 50).sample(100_000)
    counts = np.bincount(t.numpy(), minlength=50)
    assert len(counts) == 50
    # of 49 degrees of freedom: mean 49, and one draw in ten thousand exceeds 94
    assert ((counts - 2000) ** 2 / 2000).sum() < 94, counts
    assert torch.equal(weights, torch.ones(100_000))


def test_importance_is_uniform_until_every_t_has_its_losses():
    losses = np.outer(np.arange(1, 6), np.ones(HISTORY - 1))
    assert torch.equal(filled(losses).probabilities(), torch.full((5,), 0.2, dtype=torch.float64))


def test_probabilities_follow_the_root_of_the_mean_square_of_the_last_losses():
    generator = np.random.default_rng(0)
    losses = generator.uniform(0.5, 2, (20, HISTORY + 7))
    root = np.sqrt(np.square(losses[:, -HISTORY:]).mean(1))
    wanted = 0.999 * root / root.sum() + 0.001 / 20
    assert np.allclose(filled(losses).probabilities().numpy(), wanted)


def test_the_weights_leave_the_expected_loss_as_it_is():
    losses = np.geomspace(1, 1000, 30)[:, None].repeat(HISTORY, 1)
    torch.manual_seed(0)
    t, weights = filled(losses).sample(200_000)
    mean = (weights.double().numpy() * losses[t.numpy(), 0]).mean()
    assert mean == pytest.approx(losses[:, 0].mean(), rel=1e-3)
    plain = losses[np.random.default_rng(0).integers(0, 30, 200_000), 0]
    assert (weights.double().numpy() * losses[t.numpy(), 0]).std() < 0.1 * plain.std(), "and take its variance away"


def test_the_state_goes_on_where_it_was():
    sampling = filled(np.random.default_rng(1).uniform(1, 2, (8, HISTORY + 3)))
    again = ImportanceTimesteps(8)
    assert again.load(sampling.state())
    assert torch.equal(again.probabilities(), sampling.probabilities())
    assert not ImportanceTimesteps(9).load(sampling.state())
    assert not ImportanceTimesteps(8).load({})
    broken = {**sampling.state(), "timesteps.losses": torch.full((8, HISTORY), float("nan"))}
    assert not ImportanceTimesteps(8).load(broken)
