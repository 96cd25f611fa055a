"""The benchmark of training: its turns, its arithmetic, what it refuses to compare. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="not verified here: the benchmark of training (no torch)")

from benchmarks import training
from benchmarks.peers_measure import Different
from benchmarks.training import Training, check_losses, measure, rows, table, turns

pytestmark = pytest.mark.torch


class Stub(Training):
    """A run without a process, whose rounds take the given seconds."""

    def __post_init__(self) -> None:
        self.seconds, self.losses, self.memory = [], [], 0
        self.about = {"parameters": self.job.get("parameters", 5)}

    def ask(self, do, **request):
        assert do == "train"
        self.job["asked"].append(self.label)
        return {
            "seconds": self.job["times"].pop(0),
            "loss": self.job["loss"],
            "rss": self.job["rss"],
            "gpu": self.job.get("gpu"),
        }


def stub(kind, precision, *times, loss=1.0, rss=100_000_000, asked=None, **job):
    whole = {"times": list(times), "loss": loss, "rss": rss, "asked": [] if asked is None else asked, **job}
    return Stub(kind, precision, training.RUNS[kind], whole, Path())


def test_the_order_turns_round_in_every_round():
    assert turns(3, 4) == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [2, 1, 0]]
    asked: list[str] = []
    measure([stub("ddpmx", "fp32", 1.0, 1.0, asked=asked), stub("diffusers", "fp32", 1.0, 1.0, asked=asked)], 5, 2)
    ours, theirs = training.RUNS["ddpmx"], training.RUNS["diffusers"]
    assert asked == [ours, theirs, theirs, ours], "ABBA"


def test_a_ratio_is_that_of_the_medians_in_the_same_precision():
    workers = [
        stub("ddpmx", "fp32", 1.0, 2.0, 9.0),
        stub("lucidrains", "fp32", 3.0, 8.0, 1.0, rss=250_000_000),
        stub("ddpmx", "bf16", 0.5, 0.5, 0.5, gpu=40_000_000),
        stub("compiled", "bf16", 0.2, 0.25, 0.3, gpu=20_000_000),
    ]
    measure(workers, 10, 3)
    ours, theirs, half, compiled = rows(workers, 4, 10)
    assert (ours["ratio"], half["ratio"]) == (None, None)
    assert (theirs["ratio"], theirs["ratio_range"]) == (1.5, [1 / 9, 4.0]), "the median of the ratios is 3"
    assert (compiled["ratio"], compiled["ratio_range"]) == (0.5, [0.4, 0.6])
    assert (theirs["ms_per_step"], theirs["images_per_s"]) == (300.0, 40 / 3.0)
    assert (ours["ms_per_step"], ours["images_per_s"]) == (200.0, 20.0)
    assert (theirs["memory_ratio"], compiled["memory_ratio"]) == (2.5, 0.5), "the GPU's memory where there is one"
    lines = table([ours, theirs, half, compiled]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| ddpmx | fp32 | 200 | 20 | 1 | 100 MB | 1 | 1.000 |"
    assert lines[3] == (
        "| denoising-diffusion-pytorch | fp32 | 300 | 13.3 | **1.50** (0.11 … 4.00) | 250 MB | 2.50 | 1.000 |"
    )


@pytest.mark.parametrize("other", [{"loss": 1.3}, {"loss": 0.7}, {"parameters": 6}], ids=["above", "below", "network"])
def test_another_training_gets_no_table(other):
    workers = [stub("ddpmx", "fp32", 1.0), stub("diffusers", "fp32", 1.0, **other)]
    measure(workers, 1, 1)
    with pytest.raises(Different):
        check_losses(workers)


def test_losses_may_differ_by_their_noise_and_between_precisions():
    workers = [
        stub("ddpmx", "fp32", 1.0, loss=1.0),
        stub("diffusers", "fp32", 1.0, loss=1.2),
        stub("ddpmx", "bf16", 1.0, loss=2.0),
    ]
    measure(workers, 1, 1)
    check_losses(workers)
