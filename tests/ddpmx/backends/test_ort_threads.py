"""The threads of a session on the CPU: they soon sleep, and that changes no bit."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ddpmx.backends import ort_common
from ddpmx.backends.base import Buffers
from ddpmx.backends.ort import OrtBackend
from ddpmx.formats import onnx_file
from ddpmx.models import shipped
from ddpmx.sampling import chain


@pytest.fixture(scope="module")
def ort():
    return pytest.importorskip("onnxruntime", reason="not verified here: onnxruntime is not installed")


def plain(ort, threads):
    """The shipped model in a session of ONNX Runtime's own settings: what ddpmx's is compared with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(shipped.find("garments")), options, providers=["CPUExecutionProvider"])


def bound(threads, batch):
    path = shipped.find("garments")
    spec = onnx_file.onnx_spec(path, onnx_file.read_onnx(path), None)
    backend, buffers = OrtBackend(path, spec.prediction, threads=threads), Buffers.of(batch, spec.shape)
    buffers.x[...] = chain.initial(0, np.arange(batch), spec.shape)
    backend.bind(buffers)
    return backend, buffers, spec


@pytest.mark.parametrize("batch", [1, 4])
def test_the_bits_are_those_of_onnx_runtime_s_own_settings(ort, batch):
    backend, buffers, spec = bound(2, batch)
    session, answers = plain(ort, 2), []
    for t in np.linspace(0, spec.timesteps - 1, 5).astype(int):
        buffers.t[...] = t
        backend.enqueue()
        (own,) = session.run([spec.prediction], buffers.inputs())
        np.testing.assert_array_equal(buffers.out, own)
        answers.append(own.tobytes())
    backend.close()
    assert len(set(answers)) == 5  # control: another t has other bits


def test_waiting_threads_use_no_cpu_time(ort):
    if tuple(map(int, ort.__version__.split(".")[:2])) < (1, 26):
        pytest.skip(f"not verified here: onnxruntime {ort.__version__} cannot limit how long its threads spin")

    def used_after(call):
        """The CPU seconds that this process uses while it sleeps after a call. The least: other tests' threads may spin."""
        found = []
        for _ in range(3):
            call()
            begun = time.process_time()
            time.sleep(0.1)
            found.append(time.process_time() - begun)
        return min(found)

    backend, buffers, spec = bound(2, 1)
    session = plain(ort, 2)
    own = used_after(lambda: session.run([spec.prediction], buffers.inputs()))
    del session
    used = used_after(backend.enqueue)
    backend.close()
    assert own > 0.005  # control: by itself it spins for tens of milliseconds
    assert used < 0.002


def test_every_session_has_the_limit(monkeypatch, ort):
    options = ort_common.session_options(ort)
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == str(ort_common.SPIN_MICROSECONDS)
