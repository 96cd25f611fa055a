"""A run as a pipeline with derivatives."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="not verified here: the training side (no torch)")

from ddpm_export.networks.unet import UNet, UNetConfig  # noqa: E402
from ddpm_export.training.pipeline import RunPipeline  # noqa: E402
from ddpmx.errors import InputError  # noqa: E402
from ddpmx.formats.spec import ModelSpec  # noqa: E402
from oracles.random_weights import rerandomise  # noqa: E402

pytestmark = pytest.mark.torch
SHAPE = (2, 8, 8)


def run(**changes):
    spec = ModelSpec(SHAPE, timesteps=10, **changes)
    config = UNetConfig(2, 2, (8, 8), 8, (1,), 1, (), 0.0, 4, classes=spec.classes, null_class=spec.null_class)
    network = UNet(config).eval()
    rerandomise(network)
    return RunPipeline(spec, network)


def test_the_divergence_is_that_of_the_whole_jacobian():
    rng = np.random.default_rng(0)
    x, v = (rng.standard_normal((2, *SHAPE)).astype(np.float32) for _ in range(2))
    with run(classes=3, null_class=True) as pipeline:
        network = pipeline._network
        for labels in (None, 1, [2, 0]):
            found = pipeline.divergence(x, 4, v, labels=labels)
            for i in range(2):
                y = 3 if labels is None else np.broadcast_to(labels, 2)[i]

                def answer(flat, y=y):
                    return network(flat.view(1, *SHAPE), torch.tensor([4]), y=torch.tensor([int(y)])).flatten()

                jacobian = torch.autograd.functional.jacobian(answer, torch.from_numpy(x[i]).flatten())
                probe = torch.from_numpy(v[i]).flatten()
                assert found[i] == pytest.approx(float(probe @ jacobian @ probe), rel=1e-4, abs=1e-4)
        assert pipeline.divergence(x[1:], 4, v[1:], 1, labels=[2, 0]) == pytest.approx(found[1:])
        with pytest.raises(InputError, match="no class 3"):
            pipeline.divergence(x, 4, v, labels=3)
