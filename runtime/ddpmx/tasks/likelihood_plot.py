"""A likelihood as a picture: its terms by t, and rate and distortion. Importing this module needs matplotlib."""

from __future__ import annotations

import numpy as np

from ddpmx.images import figures
from ddpmx.images.figures import LINE, SOFT
from ddpmx.tasks.likelihood import Likelihood

_LEAST = 1e-9
"""Bits: smaller terms are drawn here, since a logarithmic axis has no 0."""


def draw(result: Likelihood, title: str) -> bytes:
    """The terms L_t of the bound, and Figure 5 of Ho et al. (2020): distortion and rate by step, and against each other.

    Args:
        result: what is drawn.
        title: a line above.

    Returns:
        A PNG.
    """
    sizes = result.last - result.first + 1
    t, rates, rmse = (result.first + result.last) / 2, result.rates, result.rmse
    steps, dots = result.T - t, "." if len(t) <= 60 else ""
    with figures.own_style():
        figure, (terms, distortion, rate, both) = figures.new(2, 2, size=(9.0, 6.4))
        each, error = result.bits / sizes, result.bits_error / sizes
        terms.fill_between(
            t + 1, np.maximum(each - 2 * error, _LEAST), np.maximum(each + 2 * error, _LEAST), color=SOFT, linewidth=0
        )
        terms.plot(t + 1, np.maximum(each, _LEAST), color=LINE, marker=dots)
        terms.set(xscale="log", yscale="log", xlabel="t + 1   (1: the 256 levels, L_0)", ylabel="bits/dim of L_t")
        distortion.plot(steps, rmse, color=LINE, marker=dots)
        distortion.set(xlabel="steps of the chain, T − t", ylabel="RMSE of x̂_0, in levels 0…255", ylim=(0, None))
        rate.plot(steps, rates, color=LINE, marker=dots)
        rate.set(xlabel="steps of the chain, T − t", ylabel="rate, bits/dim", ylim=(0, None))
        both.plot(rates, rmse, color=LINE, marker=dots)
        both.set(xlabel="rate, bits/dim", ylabel="RMSE of x̂_0, in levels 0…255", xlim=(0, None), ylim=(0, None))
        terms.set_title("terms of the bound", fontsize=10)
        distortion.set_title("distortion", fontsize=10)
        rate.set_title("rate", fontsize=10)
        both.set_title("distortion against rate", fontsize=10)
        figure.suptitle(title, fontsize=11)
        return figures.png(figure)
