"""What training minimises: Table 2 of Ho et al. (2020), and what Nichol & Dhariwal (2021) and Hang et al. (2023) added.

- ``simple``: L_simple (equation 14), the mean square of target − output. With min-SNR-γ each t is weighted so that the
  square of the error of x̂_0 counts min(SNR_t, γ) times (Hang et al. 2023).
- ``vlb``: L (equation 5), one term of the variational bound at a time, in bits per dimension: the KL divergence of
  p(x_{t−1} | x_t) from q(x_{t−1} | x_t, x_0), or at t = 0 the negative log-likelihood of the image's 256 levels.
- ``hybrid``: L_simple + λ·L with λ = 0.001, for a learned variance. The mean gets no gradient of L (Nichol & Dhariwal 2021,
  §3.1).

Every function gives a value per image, float32 [B], so that losses can be weighted, and watched by t. The terms of L are
those of :mod:`ddpmx.diffusion.bound`, in torch, where they have gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_export.training.diffusion import GaussianDiffusion
from ddpm_export.training.objective_names import LOSSES, Loss
from ddpmx.diffusion.bound import HALF_LEVEL
from ddpmx.diffusion.samplers import FIXED_VARIANCES, Prediction, Variance, x0_coefficients
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import InputError

HYBRID_WEIGHT = 0.001
"""λ of L_hybrid, with the whole L = Σ_t L_t in bits per dimension (Nichol & Dhariwal 2021, §3.1)."""


@dataclass(frozen=True)
class Losses:
    """The losses of a batch.

    Attributes:
        loss: what is minimised, by image, float32 [B].
        simple: the mean square of target − output, detached [B].
        out: the network's output, detached.
    """

    loss: Tensor
    simple: Tensor
    out: Tensor


class Objective(nn.Module):
    """The loss of one model, on any device it is moved to. It has no weights.

    Args:
        schedule: β_t.
        prediction: what the network predicts.
        variance: σ² of p(x_{t−1} | x_t).
        loss: ``simple``, ``vlb`` or ``hybrid``.
        min_snr: γ of min-SNR weighting, or None for equal weights.

    Raises:
        InputError: the combination trains nothing, or leaves the variance untrained.
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction = "eps",
        variance: Variance = "fixed_large",
        loss: Loss = "simple",
        min_snr: float | None = None,
    ) -> None:
        super().__init__()
        check_objective(variance, loss, min_snr)
        self.diffusion = GaussianDiffusion(schedule, prediction, variance)
        self.kind = loss
        self.hybrid_weight = HYBRID_WEIGHT * len(schedule)
        weights = np.ones(len(schedule))
        if min_snr is not None:
            # the square of an output's error is q² times as large in x̂_0: 1/SNR for ε, 1/(SNR + 1) for v, 1 for x_0
            _, q = x0_coefficients(schedule, prediction)
            weights = np.minimum(schedule.snr, min_snr) * q**2
        self.register_buffer("weights", torch.from_numpy(weights.astype(np.float32)), persistent=False)

    def forward(
        self, network: nn.Module, x0: Tensor, t: Tensor, eps: Tensor, conditioning: Mapping[str, Tensor] | None = None
    ) -> Losses:
        """The losses of ``network`` for images x0 [B, C, H, W] in [−1, 1], at t int64 [B], with noise ε [B, C, H, W].

        Args:
            network: called with x_t, t and, by name, the conditioning.
            x0, t, eps: as above.
            conditioning: the network's other inputs among ``y``, ``x0_prev`` and ``cond``.
        """
        x_t = self.diffusion.q_sample(x0, t, eps)
        outputs = network(x_t, t, **(conditioning or {}))
        out, var = outputs if isinstance(outputs, tuple) else (outputs, None)
        with torch.autocast(x0.device.type, enabled=False):
            return self._losses(x0, t, eps, x_t, out, var)

    def _losses(self, x0: Tensor, t: Tensor, eps: Tensor, x_t: Tensor, out: Tensor, var: Tensor | None) -> Losses:
        simple = _per_image((self.diffusion.target(x0, t, eps, x_t) - out.float()).square())
        if self.kind == "vlb":
            return Losses(self.vlb_term(x0, t, x_t, out, var), simple.detach(), out.detach())
        weights: Tensor = self.weights[t]  # type: ignore[index]
        loss = weights * simple
        if self.kind == "hybrid":
            loss = loss + self.hybrid_weight * self.vlb_term(x0, t, x_t, out.detach(), var)
        return Losses(loss, simple.detach(), out.detach())

    def vlb_term(
        self,
        x0: Tensor,
        t: Tensor,
        x_t: Tensor,
        out: Tensor,
        var: Tensor | None = None,
        *,
        clip: float | None = None,
    ) -> Tensor:
        """L_{t−1} of each image, or L_0 at t = 0, in bits per dimension: float32 [B] (equations 5, 7 and 13).

        Their mean over uniform t, times T, is L without the constant L_T.
        """
        diffusion = self.diffusion
        mean, log_variance = diffusion.p_mean_log_variance(x_t, t, out, var, clip=clip)
        true_mean = diffusion.posterior_mean(x0, t, x_t)
        true_log_variance = diffusion.at("log_posterior_variance", t)
        kl = _per_image(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
        likelihood = _per_image(level_log_likelihood(x0.float(), mean, 0.5 * log_variance.expand_as(mean)))
        return torch.where(t == 0, -likelihood, kl) / math.log(2)

    def prior_term(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of each image in bits per dimension: float32 [B]. Nothing trains it."""
        last = torch.full((len(x0),), self.diffusion.timesteps - 1, device=x0.device)
        mean = self.diffusion.at("signal", last) * x0.float()
        log_variance = 2 * torch.log(self.diffusion.at("noise", last))
        zero = torch.zeros((), device=x0.device)
        return _per_image(gaussian_kl(mean, log_variance, zero, zero)) / math.log(2)


def check_objective(variance: Variance, loss: Loss, min_snr: float | None) -> None:
    """Check that a loss goes with a variance, and min-SNR-γ with both.

    Raises:
        InputError: it does not.
    """
    if loss not in LOSSES:
        raise InputError(f"there is no loss {loss!r}", hint=f"one of: {', '.join(LOSSES)}")
    learned = variance not in FIXED_VARIANCES
    if learned and loss == "simple":
        raise InputError(
            f"the loss 'simple' does not train the variance {variance!r}",
            note="L_simple compares means alone",
            hint="hybrid (Nichol & Dhariwal 2021), or vlb; or a fixed variance",
        )
    if not learned and loss == "hybrid":
        raise InputError(
            "the loss 'hybrid' is for a learned variance",
            note=f"{variance} is fixed, and only the variance gets a gradient of hybrid's second part",
            hint="simple, or the variance learned_range",
        )
    if min_snr is not None:
        if type(min_snr) not in (int, float) or not 0 < min_snr < math.inf:
            raise InputError(f"min_snr must be a number above 0, not {min_snr!r}")
        if loss == "vlb":
            raise InputError(
                "min_snr has no effect on the loss 'vlb'", note="the bound has weights of its own", hint="omit it"
            )


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) ‖ N(mean_p, e^log_variance_p)) of every number, in nats."""
    ratio = log_variance - log_variance_p
    return 0.5 * (ratio.exp() - 1 - ratio + (mean - mean_p).square() * (-log_variance_p).exp())


def level_log_likelihood(x0: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log p(x_0) of each of the 256 levels under N(mean, σ²), in nats (equation 13).

    The density is integrated over a level's ±1/255, and from the outermost levels to infinity.

    Args:
        x0: levels in [−1, 1], any shape.
        mean: of the same shape.
        log_sigma: log σ, of the same shape.
    """
    scale = (-log_sigma).exp()
    above, below = (x0 + HALF_LEVEL - mean) * scale, (x0 - HALF_LEVEL - mean) * scale
    # Φ(above) − Φ(below) on the side where both are small: near 1 the difference would have no digits
    swapped = below > 0
    upper, lower = torch.where(swapped, -below, above), torch.where(swapped, -above, below)
    upper, lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    inside = upper + torch.log1p(-torch.exp((lower - upper).clamp(max=-1e-6)))
    first, last = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(x0 < -1 + HALF_LEVEL, first, torch.where(x0 > 1 - HALF_LEVEL, last, inside))


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
