"""examples/autoregressive: its likelihood is one, its draws follow it, and its README's command runs."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import TESTS

pytest.importorskip("torch", reason="not verified here: the autoregressive example (no torch)")

import torch

EXAMPLE = TESTS.parent / "examples" / "autoregressive"
CROSSES = np.array([[[0, 1], [1, 0]], [[1, 0], [0, 1]]])
EVERY = np.array(list(itertools.product((0, 1), repeat=4))).reshape(16, 2, 2)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import autoregressive
    finally:
        sys.path.remove(str(EXAMPLE))
    return autoregressive


@pytest.fixture(scope="module")
def network(example):
    """Knows something of crosses, and is not sure."""
    return example.train(np.tile(CROSSES, (32, 1, 1)), 2, 40, width=8, batch=32)


def test_coordinates_are_masked_row_by_row(example):
    x0 = example.as_input(EVERY[5:6], 2)  # 0101
    assert x0.tolist() == [[[[1, -1], [1, -1]], [[-1, 1], [-1, 1]]]]
    kept = [example.masked(x0, torch.tensor([t]))[0].abs().amax(0).flatten().tolist() for t in range(4)]
    assert kept == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_the_probabilities_of_all_images_make_one(example, network):
    """So the sum of the terms is −log p, and not a bound on it."""
    p = 2.0 ** -example.bits_by_t(network, example.as_input(EVERY, 2)).double().sum(1)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p[[6, 9]].sum() > 0.3, "it has learned of crosses"
    assert p.max() < 0.9, "and not only of them: what adds up is no single image"


def test_a_term_is_the_network_s_own_log_softmax(example, network):
    x0, t = example.as_input(EVERY[3:5], 2), torch.tensor([1, 2])  # 0011, 0100
    with torch.no_grad():
        out = network(example.masked(x0, t), t)
        found = example.terms(out, x0, t)
    for image, (place, level) in enumerate((((0, 1), 0), ((1, 0), 0))):
        logits = out[image, :, place[0], place[1]].double()
        wanted = (torch.logsumexp(logits, 0) - logits[level]) / math.log(2)
        assert found[image].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_draws_follow_the_probabilities(example, network):
    n = 4000
    p = (2.0 ** -example.bits_by_t(network, example.as_input(EVERY, 2)).double().sum(1)).numpy()
    drawn = example.draw(network, (2, 2, 2), n, seed=3).reshape(n, 4) @ [8, 4, 2, 1]
    counts = np.bincount(drawn, minlength=16)
    statistic = ((counts - n * p) ** 2 / (n * p)).sum()
    assert statistic < 45, "χ² with 15 degrees of freedom is above that once in 10,000"
    few = example.draw(network, (2, 2, 2), 5, seed=3).reshape(5, 4) @ [8, 4, 2, 1]
    assert few.tolist() == drawn[:5].tolist(), "an image does not depend on the others"


def test_counting_is_the_entropy_of_the_shares(example):
    train = np.concatenate([np.repeat(CROSSES[:1], 3000, 0), np.repeat(CROSSES[1:], 1000, 0)])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert example.by_counting(train, train, 2, context=False) == pytest.approx(entropy, rel=1e-3)
    # from the last pixel all others follow
    assert example.by_counting(train, train, 2, context=True) == pytest.approx(entropy / 4, rel=0.02)


def test_the_readme_s_command_runs(example, tmp_path, monkeypatch, capsys):
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```sh\n(.*)\n```", readme)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "autoregressive.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "HELD_OUT", 32)
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--steps", "2", "--width", "8"])
    example.main()
    said = capsys.readouterr().out
    figures = dict(re.findall(r"^  (\w[\w ]+?)  +([\d.]+)", said, re.MULTILINE))
    assert figures["all levels alike"] == "2.000"
    assert float(figures["given right and below"]) < float(figures["each pixel by itself"]) < 2
    with Image.open("drawn.png") as picture:
        assert picture.size == (4 * (16 * 9 + 1), 4 * (6 * 9 + 1))
