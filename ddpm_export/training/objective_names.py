"""The names of losses and of ways to choose t, for settings and the command line, which must not load torch for them."""

from __future__ import annotations

from typing import Literal, get_args

Loss = Literal["simple", "vlb", "hybrid"]
TimestepSampling = Literal["uniform", "importance"]

LOSSES: tuple[Loss, ...] = get_args(Loss)
TIMESTEP_SAMPLINGS: tuple[TimestepSampling, ...] = get_args(TimestepSampling)
