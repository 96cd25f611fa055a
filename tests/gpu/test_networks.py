"""Networks of other libraries on the GPU: torch in the chain's own stream, and ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from ddpmx.backends.base import CopyingBackend
from ddpmx.parity import on_device
from ddpmx.sampling import chain
from ddpmx.sampling.pixels import to_nhwc

STEPS, SEED = 12, 5


def test_a_torch_network_runs_in_the_chain_s_stream(torch_network, executor):
    """Compared with the same network's chain in NumPy. A network that cannot be captured is skipped."""
    device = torch_network()
    backend = CopyingBackend(device)
    checks = {check.name.split()[1]: check for check in on_device.checks(backend, device.spec)}
    backend.close()
    check = checks[executor]
    if check.skipped:
        pytest.skip(f"not verified here: torch's network by {executor} ({check.skipped})")
    assert check.passed, str(check)


def test_onnx_runtime_s_images_are_numpy_s(ort_pipeline):
    spec = ort_pipeline.spec
    got = ort_pipeline.generate(3, seed=SEED, steps=STEPS, batch=3)
    assert "executor plain" in ort_pipeline.backend
    indices = np.arange(3)
    backend = ort_pipeline._runner._backend
    start = chain.initial(SEED, indices, spec.shape)
    *_, last = chain.run(backend, ort_pipeline.table(steps=STEPS), start, seed=SEED, images=indices, clip=spec.clip)
    assert got.tobytes() == to_nhwc(last.x0).tobytes()


def test_onnx_runtime_draws_the_same_images_in_any_split(ort_pipeline):
    whole = ort_pipeline.generate(7, seed=SEED, steps=STEPS, batch=4)
    for n, first in ((1, 0), (3, 4), (1, 6)):
        got = ort_pipeline.generate(n, first=first, seed=SEED, steps=STEPS, batch=4)
        assert got.tobytes() == whole[first : first + n].tobytes(), (n, first)
