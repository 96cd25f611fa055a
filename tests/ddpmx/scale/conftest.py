"""Runs of a toy model with classes."""

from __future__ import annotations

import pytest

from ddpmx.pipeline import Pipeline
from ddpmx.sampling.request import Sampling
from ddpmx.scale.work import Work
from oracles import conditioning
from oracles.toy_backend import ToyBackend


@pytest.fixture
def make_work():
    """``make_work(form="tar", …)``: a run of three steps, in batches of 4 and files of 8."""

    def make(**changes):
        spec = changes.pop("spec", conditioning.spec_of("classes"))
        values = {"model": "a" * 64, "spec": spec, "seed": 3, "sampling": Sampling(steps=3), "steps": 3, "batch": 4}
        values |= {"form": "tar", "per_file": 8, "turns": (4, 0, 2)}
        return Work(**(values | changes))

    return make


@pytest.fixture
def toy():
    with Pipeline(conditioning.spec_of("classes"), ToyBackend()) as pipeline:
        yield pipeline
