"""Multistep solvers of the probability-flow ODE: each step uses x̂_0 of earlier steps, at no further call of the network.

With α = √ᾱ, σ = √(1−ᾱ), λ = ln(α/σ), h_i = λ_{i+1} − λ_i > 0 from one visited timestep to the next, and m_i = x̂_0 of step
i, the ODE is solved exactly for a constant x̂_0 (Lu et al. 2022, "DPM-Solver++", proposition 4.1):

    x_{i+1} = (σ_{i+1}/σ_i)·x_i + g_i·m_i,   g_i = α_{i+1}·(1 − e^{−h_i})

which is DDIM. A solver of second order puts a straight line through m_{i−1} and m_i instead. The last step leads to ᾱ = 1,
where h is infinite: it is of first order, and gives x̂_0 itself. So is the first, which has nothing to remember. Every other
one is of second order, whatever the number of steps.

The results are float64 [S, 4], first step first: A, B, C and D of x_{i+1} = A·m_i + B·x_i + C·m_{i−1} + D·m_{i−2}.
"""

from __future__ import annotations

import numpy as np

from ddpmx.diffusion.grids import log_snr
from ddpmx.diffusion.schedule import Float64, Schedule


def dpmpp_2m(schedule: Schedule, steps: int | None = None) -> Float64:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: m_i gives way to m_i + (m_i − m_{i−1})·q/2, q = h_i/h_{i−1}.

    Args:
        schedule: the timesteps to visit.
        steps: S, if the chain has only so many of the last steps.
    """
    part = _Steps(schedule, steps)
    half = 0.5 * part.q
    columns = np.zeros((len(half), 4))
    columns[:, 0] = part.g * (1 + half)
    columns[:, 1] = part.b
    columns[:, 2] = -(part.g * half)
    return columns


def unipc(schedule: Schedule, steps: int | None = None) -> Float64:
    """UniPC of order 2 with B(h) = e^h − 1 ("bh2"), data prediction: Zhao et al. 2023, algorithms 5 and 6.

    Its predictor is that of :func:`dpmpp_2m`. Its corrector repeats the step from i−1 to i once m_i is known, with
    m_{i−1} + ρ_1·q·(m_{i−1} − m_{i−2}) + ρ_2·(m_i − m_{i−1}) for x̂_0, and step i goes on from the result x^c_i. Predicted
    and corrected state are the same (σ_i/σ_{i−1})·x^c_{i−1} and some of the m, so the corrected one need not be kept:

        x^c_i = x_i + g_{i−1}·(ρ_2·(m_i − m_{i−1}) + (ρ_1 − 1/2)·q_{i−1}·(m_{i−1} − m_{i−2}))

    and x_{i+1} = (σ_{i+1}/σ_i)·x^c_i + … is linear in x_i and the last three m. In the second step ρ_2 = 1/2 and ρ_1 is not
    there, since its predictor was of first order. ρ solves ρ_1 + ρ_2 = b_1 and ρ_2 − ρ_1/q = b_2.

    Args:
        schedule, steps: as for :func:`dpmpp_2m`.
    """
    part = _Steps(schedule, steps)
    columns = dpmpp_2m(schedule, steps)
    if len(columns) < 2:
        return columns
    b1, b2 = _right_hand_sides(part.h[:-1], part.phi[:-1])
    q = part.q[:-1]
    rho1 = (b1 - b2) * (q / (q + 1))
    rho2 = b1 - rho1
    rho1[0], rho2[0] = 0.0, 0.5
    reach = part.b[1:] * part.g[:-1]  # from x^c_i − x_i into x_{i+1}
    newest, oldest = reach * rho2, reach * ((rho1 - 0.5) * q)
    columns[1:, 0] += newest
    columns[1:, 2] += oldest - newest
    columns[1:, 3] -= oldest
    return columns


class _Steps:
    """What the steps have in common, float64 [S] each, first step first.

    Attributes:
        phi: 1 − e^{−h_i}. In the last step, where h is infinite, 1.
        g: α_{i+1}·(1 − e^{−h_i}).
        b: σ_{i+1}/σ_i.
        h: λ_{i+1} − λ_i. In the last step 0, which nothing uses.
        q: h_i/h_{i−1}, and 0 where the step is of first order.
    """

    def __init__(self, schedule: Schedule, steps: int | None) -> None:
        S = len(schedule) if steps is None else steps
        noise, after = schedule.one_minus_alpha_bar[:S], schedule.one_minus_alpha_bar_prev[:S]
        signal, before = schedule.alpha_bar[:S], schedule.alpha_bar_prev[:S]
        e = np.sqrt(signal / noise) * np.sqrt(after / before)  # e^{−h}
        # 1 − e^{−h} = (1 − e^{−2h})/(1 + e^{−h}), and 1 − e^{−2h} = β/(1−ᾱ): a difference loses digits where h is small
        self.phi = (schedule.betas[:S] / noise / (1 + e))[::-1]
        self.g = np.sqrt(before)[::-1] * self.phi
        self.b = np.sqrt(after / noise)[::-1]
        level = log_snr(schedule)[:S][::-1]
        self.h = np.append(level[1:] - level[:-1], 0.0)
        self.q = np.zeros(S)
        self.q[1:-1] = self.h[1:-1] / self.h[:-2]


def _right_hand_sides(h: Float64, phi: Float64) -> tuple[Float64, Float64]:
    """UniPC's b_1 = (1 − φ/h)/φ and b_2 = (1 − 2·(1 − φ/h)/h)/φ, φ = 1 − e^{−h}; both go to 1 with h.

    Below h = 1 the differences would lose digits. There b_2 = 2h·ψ/φ and b_1 = h·(1/2 − h·ψ)/φ, with Taylor's series
    ψ = 1/3!·(1 − h/4·(1 − h/5·(…))).
    """
    series = np.ones_like(h)
    for n in range(20, 3, -1):
        series = 1 - h / n * series
    psi = series / 6
    rest = 1 - phi / h
    small = h < 1
    b1 = np.where(small, h * (0.5 - h * psi), rest) / phi
    b2 = np.where(small, 2 * h * psi, 1 - 2 * rest / h) / phi
    return b1, b2
