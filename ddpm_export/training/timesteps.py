"""Which t is trained on: uniformly, or where the bound L has its largest terms."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_export.training.objective_names import TimestepSampling

HISTORY = 10
"""How many losses of each t the importance sampling remembers (Nichol & Dhariwal 2021, §3.3)."""

UNIFORM_SHARE = 0.001
"""The share of all draws that stays uniform, so that no t is ever forgotten."""


class UniformTimesteps:
    """t uniform over 0…T−1, every loss with weight 1.

    Attributes:
        learns: whether :meth:`update` does anything.
    """

    learns = False

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """t int64 [batch] and the weights of their losses, float32 [batch], from torch's generator on the CPU."""
        return torch.randint(self.timesteps, (batch,)), torch.ones(batch)

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take notice of the losses of a batch."""

    def state(self) -> dict[str, Tensor]:
        """What exact resumption needs."""
        return {}

    def load(self, state: dict[str, Tensor]) -> bool:
        """Take up the state again. Whether it was one of this T."""
        return True


class ImportanceTimesteps(UniformTimesteps):
    """p_t ∝ √E[L_t²], every loss with weight 1/(T·p_t), so that the expected gradient is that of uniform t.

    Nichol & Dhariwal 2021, §3.3. Uniform until every t has :data:`HISTORY` losses. The mean is over the last of them.
    """

    learns = True

    def __init__(self, timesteps: int) -> None:
        super().__init__(timesteps)
        self._losses = torch.zeros(timesteps, HISTORY, dtype=torch.float64)
        self._seen = torch.zeros(timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        if (self._seen < HISTORY).any():
            return torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64)
        root = self._losses.square().mean(1).sqrt()
        total = root.sum()
        if not (torch.isfinite(total) and total > 0):
            return torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64)
        return (1 - UNIFORM_SHARE) * root / total + UNIFORM_SHARE / self.timesteps

    def sample(self, batch: int) -> tuple[Tensor, Tensor]:
        """t int64 [batch] and the weights of their losses, float32 [batch], from torch's generator on the CPU."""
        p = self.probabilities()
        t = torch.multinomial(p, batch, replacement=True)
        return t, (1 / (self.timesteps * p[t])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take notice of the losses of a batch."""
        for ti, value in zip(t.tolist(), loss.double().tolist(), strict=True):
            self._losses[ti, self._seen[ti] % HISTORY] = value
            self._seen[ti] += 1

    def state(self) -> dict[str, Tensor]:
        """What exact resumption needs."""
        return {"timesteps.losses": self._losses.clone(), "timesteps.seen": self._seen.clone()}

    def load(self, state: dict[str, Tensor]) -> bool:
        """Take up the state again. Whether it was one of this T."""
        losses, seen = state.get("timesteps.losses"), state.get("timesteps.seen")
        if losses is None or seen is None or losses.shape != self._losses.shape or seen.shape != self._seen.shape:
            return False
        if not torch.isfinite(losses).all() or (seen < 0).any():
            return False
        self._losses, self._seen = losses.double(), seen.long()
        return True


def make_timesteps(name: TimestepSampling, timesteps: int) -> UniformTimesteps:
    """The sampling of that name over 0…T−1."""
    return ImportanceTimesteps(timesteps) if name == "importance" else UniformTimesteps(timesteps)
