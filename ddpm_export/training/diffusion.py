"""The forward process q(x_t | x_0) and the reverse process p(x_{t−1} | x_t), in torch.

Coefficients are made in float64 (``ddpmx.diffusion.schedule``) and used as float32, outside autocast: in half precision
1 − ᾱ_t rounds to 0 at the first timesteps, which would then get no noise at all. What is minimised is in
:mod:`ddpm_export.training.objective`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ddpmx.diffusion.samplers import Prediction, Variance, x0_coefficients
from ddpmx.diffusion.schedule import Float64, Schedule


class GaussianDiffusion(nn.Module):
    """The maths of one schedule and one prediction, on any device it is moved to. It has no weights.

    Args:
        schedule: β_t.
        prediction: what the network is trained to predict: ``eps``, ``x0``, ``v`` or ``mu``.
        variance: σ² of p(x_{t−1} | x_t): ``fixed_small``, ``fixed_large``, ``learned`` or ``learned_range``.
    """

    def __init__(self, schedule: Schedule, prediction: Prediction = "eps", variance: Variance = "fixed_large") -> None:
        super().__init__()
        self.timesteps = len(schedule)
        self.prediction = prediction
        self.variance = variance
        p, q = x0_coefficients(schedule, prediction)
        large = variance == "fixed_large"
        table = (
            ("signal", np.sqrt(schedule.alpha_bar)),
            ("noise", np.sqrt(schedule.one_minus_alpha_bar)),
            ("x0_from_xt", p),
            ("x0_from_out", q),
            ("mean_from_x0", schedule.posterior_mean_coef_x0),
            ("mean_from_xt", schedule.posterior_mean_coef_xt),
            ("log_posterior_variance", schedule.log_variance_small),
            ("log_fixed_variance", schedule.log_variance_large if large else schedule.log_variance_small),
            ("log_beta", np.log(schedule.betas)),
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
        return self.at("signal", t) * x0.float() + self.at("noise", t) * eps.float()

    def target(self, x0: Tensor, t: Tensor, eps: Tensor, x_t: Tensor) -> Tensor:
        """What the network should predict: ε, x_0, v = √ᾱ·ε − √(1−ᾱ)·x_0, or μ̃(x_t, x_0); float32 [B, C, H, W]."""
        if self.prediction == "eps":
            return eps.float()
        if self.prediction == "x0":
            return x0.float()
        if self.prediction == "v":
            return self.at("signal", t) * eps.float() - self.at("noise", t) * x0.float()
        return self.posterior_mean(x0, t, x_t)

    def posterior_mean(self, x0: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """μ̃_t(x_t, x_0), the mean of q(x_{t−1} | x_t, x_0) (equation 7)."""
        return self.at("mean_from_x0", t) * x0.float() + self.at("mean_from_xt", t) * x_t.float()

    def predict_x0(self, x: Tensor, t: Tensor, out: Tensor, *, clip: float | None = 1.0) -> Tensor:
        """x̂_0 from the network's output ``out`` at x_t (equation 15 for ε), clipped to ±``clip``."""
        x0 = self.at("x0_from_xt", t) * x.float() + self.at("x0_from_out", t) * out.float()
        return x0 if clip is None else x0.clamp(-clip, clip)

    def p_mean_log_variance(
        self, x: Tensor, t: Tensor, out: Tensor, var: Tensor | None = None, *, clip: float | None = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and log σ² of p(x_{t−1} | x_t) (equation 7, with x̂_0 in x_0's place).

        Args:
            x: x_t, [B, C, H, W].
            t: int64 [B].
            out: the network's output.
            var: its second output, where the variance is learned.
            clip: bound of x̂_0, or None.

        Returns:
            The mean and log σ², the latter [B, 1, 1, 1] where it is fixed and else [B, C, H, W].
        """
        if self.prediction == "mu" and clip is None:
            mean = out.float()
        else:
            mean = self.posterior_mean(self.predict_x0(x, t, out, clip=clip), t, x)
        return mean, self.log_variance(t, var)

    def log_variance(self, t: Tensor, var: Tensor | None = None) -> Tensor:
        """log σ²_t: the fixed one, ``var`` itself (``learned``), or between log β̃ and log β by ``var`` (``learned_range``).

        The last is equation 15 of Nichol & Dhariwal 2021: f·log β + (1−f)·log β̃ with f = (var + 1)/2.
        """
        if var is None:
            return self.at("log_fixed_variance", t)
        if self.variance == "learned":
            return var.float()
        f = (var.float() + 1) / 2
        return f * self.at("log_beta", t) + (1 - f) * self.at("log_posterior_variance", t)

    def at(self, name: str, t: Tensor) -> Tensor:
        """A coefficient at the t of each image, float32 [B, 1, 1, 1], by the name of its buffer."""
        table: Tensor = getattr(self, name)
        return table[t.long()].view(-1, 1, 1, 1)


def _float32(values: Float64) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
