"""How torch's threads wait for each other on a CPU. Nothing here may import torch: it has to be settled before."""

from __future__ import annotations

import os
import sys

SPINS = 10_000
"""Turns of the loop in which a thread waits before it sleeps: some microseconds."""


def wait_briefly() -> bool:
    """Let OpenMP's threads sleep soon while they wait for each other, unless the user has chosen how they wait.

    By default they spin for long, in turns that a neighbour's work then lacks: two threads beside two busy processes can
    be several times slower than one thread alone. Weights do not change.

    Returns:
        Whether it has an effect: torch is not loaded yet.
    """
    if "torch" in sys.modules:
        return False
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True
