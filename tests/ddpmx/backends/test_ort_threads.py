"""How the threads of a session on the CPU wait, which changes no bit."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from ddpmx.backends import ort_waiting
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


@pytest.mark.parametrize("sleeping", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_bits_are_those_of_onnx_runtime_s_own_settings(ort, monkeypatch, batch, sleeping):
    monkeypatch.setattr(ort_waiting, "_crowded", lambda threads, root: sleeping)
    backend, buffers, spec = bound(2, batch)
    session, answers = plain(ort, 2), []
    for t in np.linspace(0, spec.timesteps - 1, 5).astype(int):
        buffers.t[...] = t
        backend.enqueue()
        (own,) = session.run([spec.prediction], buffers.inputs())
        assert buffers.out.tobytes() == own.tobytes()
        answers.append(own.tobytes())
    backend.close()
    assert len(set(answers)) == 5  # control: another t has other bits


@pytest.mark.parametrize("sleeping", [False, True])
def test_waiting_threads_use_no_cpu_time(ort, monkeypatch, sleeping):
    monkeypatch.setattr(ort_waiting, "_crowded", lambda threads, root: sleeping)
    if not sleeping and tuple(map(int, ort.__version__.split(".")[:2])) < (1, 26):
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
    own = used_after(partial(plain(ort, 2).run, [spec.prediction], buffers.inputs()))
    used = used_after(backend.enqueue)
    backend.close()
    assert own > 0.005  # control: by itself it spins for tens of milliseconds
    assert used < 0.003


def system(root, running):
    """A folder like the system's: so many threads run."""
    (root / "proc").mkdir()
    (root / "proc/stat").write_text(f"cpu  1 2 3\nctxt 5\nprocs_running {running}\nprocs_blocked 9\n")
    return root


@pytest.mark.parametrize(
    ("threads", "running", "sleeping"),
    [
        (0, 1, False),  # nobody else
        (0, 2, True),
        (4, 1, False),
        (2, 3, False),  # two others on four cores
        (2, 4, True),
        (1, 9, False),  # it waits for nobody
    ],
)
def test_threads_sleep_where_others_leave_too_few_cores(tmp_path, monkeypatch, threads, running, sleeping):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    entries = {}
    options = SimpleNamespace(add_session_config_entry=entries.__setitem__)
    assert ort_waiting.set_waiting(options, threads, root=system(tmp_path, running)) == sleeping
    spins = {"session.intra_op.spin_duration_us": str(ort_waiting.SPIN_MICROSECONDS)}
    sleeps = {"session.intra_op.allow_spinning": "0"}
    assert entries == ({} if threads == 1 else sleeps if sleeping else spins)


@pytest.mark.parametrize("text", [None, "", "procs_running", "procs_running many", "procs_running 9"])
def test_where_the_system_does_not_say_who_runs_they_spin(tmp_path, monkeypatch, text):
    """The last: it says so of eight cores, of which this process may use two."""
    known = text is not None and text.endswith("9")
    monkeypatch.setattr("os.cpu_count", lambda: 8 if known else 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    root = system(tmp_path, 9)
    options = SimpleNamespace(add_session_config_entry=lambda key, value: None)
    if text is None:
        (root / "proc/stat").unlink()
    else:
        (root / "proc/stat").write_text(text)
    assert not ort_waiting.set_waiting(options, 2, root=root)
    (root / "proc/stat").write_text("procs_running 9")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert ort_waiting.set_waiting(options, 2, root=root)  # control
