"""The forward process q(x_t | x_0), the training objective, and p(x_{t−1} | x_t) in torch.

Coefficients are made in float64 (``ddpmx.diffusion.schedule``) and used as float32, outside autocast: in half precision
1 − ᾱ_t rounds to 0 at the first timesteps, which would then get no noise at all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ddpmx.diffusion.samplers import FIXED_VARIANCES, Prediction, Variance, x0_coefficients
from ddpmx.diffusion.schedule import Float64, Schedule
from ddpmx.errors import SpecError


class GaussianDiffusion(nn.Module):
    """The maths of one schedule and one prediction, on any device it is moved to. It has no weights.

    Args:
        schedule: β_t.
        prediction: what the network is trained to predict: ``eps``, ``x0`` or ``v``.
        variance: of p(x_{t−1} | x_t), ``fixed_small`` or ``fixed_large``.

    Raises:
        SpecError: a learned variance, which L_simple does not train.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction = "eps", variance: Variance = "fixed_large") -> None:
        super().__init__()
        if variance not in FIXED_VARIANCES:
            raise SpecError(
                f"variance {variance!r} cannot be trained here", hint=f"one of: {', '.join(FIXED_VARIANCES)}"
            )
        self.timesteps = len(schedule)
        self.prediction = prediction
        p, q = x0_coefficients(schedule, prediction)
        log_variance = schedule.log_variance_large if variance == "fixed_large" else schedule.log_variance_small
        table = (
            ("signal", np.sqrt(schedule.alpha_bar)),
            ("noise", np.sqrt(1 - schedule.alpha_bar)),
            ("x0_from_xt", p),
            ("x0_from_out", q),
            ("mean_from_x0", schedule.posterior_mean_coef_x0),
            ("mean_from_xt", schedule.posterior_mean_coef_xt),
            ("log_variance", log_variance),
        )
        for name, values in table:
            self.register_buffer(name, _float32(values), persistent=False)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (equation 4), float32 whatever the inputs and the autocast around it.

        Args:
            x0: [B, C, H, W] in [−1, 1].
            t: int64 [B], 0…T−1.
            eps: [B, C, H, W], N(0, I).
        """
        return self._at("signal", t) * x0.float() + self._at("noise", t) * eps.float()

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict: ε, x_0, or v = √ᾱ·ε − √(1−ᾱ)·x_0."""
        if self.prediction == "eps":
            return eps.float()
        if self.prediction == "x0":
            return x0.float()
        return self._at("signal", t) * eps.float() - self._at("noise", t) * x0.float()

    def loss(self, network: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """L_simple (equation 14): the mean square of target − output, a float32 scalar."""
        out = network(self.q_sample(x0, t, eps), t)
        loss: Tensor = (self.target(x0, t, eps) - out.float()).square().mean()
        return loss

    def sample_t(self, batch: int) -> Tensor:
        """t uniform over 0…T−1, int64 [batch], from torch's global generator on the CPU."""
        return torch.randint(self.timesteps, (batch,))

    def predict_x0(self, x: Tensor, t: Tensor, out: Tensor, *, clip: float | None = 1.0) -> Tensor:
        """x̂_0 from the network's output ``out`` at x_t (equation 15 for ε), clipped to ±``clip``."""
        x0 = self._at("x0_from_xt", t) * x.float() + self._at("x0_from_out", t) * out.float()
        return x0 if clip is None else x0.clamp(-clip, clip)

    def p_mean_log_variance(
        self, x: Tensor, t: Tensor, out: Tensor, *, clip: float | None = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and log σ² [B, 1, 1, 1] of p(x_{t−1} | x_t) (equation 7, with x̂_0 in x_0's place)."""
        x0 = self.predict_x0(x, t, out, clip=clip)
        mean = self._at("mean_from_x0", t) * x0 + self._at("mean_from_xt", t) * x.float()
        return mean, self._at("log_variance", t)

    def _at(self, name: str, t: Tensor) -> Tensor:
        table: Tensor = getattr(self, name)
        return table[t.long()].view(-1, 1, 1, 1)


def _float32(values: Float64) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
