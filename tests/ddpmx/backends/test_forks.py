"""A process that was forked uses and drops its parent's networks, and ends."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import numpy as np
import pytest

import ddpmx
from ddpmx.backends.parts import Workers

if not hasattr(os, "fork"):
    pytest.skip("not verified here: forked processes (this system has none)", allow_module_level=True)


def ends(what) -> bool:
    """Whether a forked process that does this is done within ten seconds, without an error."""
    with warnings.catch_warnings():  # Python 3.12 and later warn of forks where there are threads, which is the point
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            what()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_a_session_with_threads_is_dropped(gaussian_onnx):
    pytest.importorskip("onnxruntime", reason="not verified here: ONNX Runtime in a fork (it is not installed)")
    pipe = ddpmx.load(gaussian_onnx, threads=2)
    images = pipe.generate(4, seed=0, steps=2)

    def use_and_close():
        assert np.array_equal(pipe.generate(4, seed=0, steps=2), images)
        pipe.close()

    assert ends(use_and_close)
    assert np.array_equal(pipe.generate(4, seed=0, steps=2), images), "the parent's own still works"
    pipe.close()


def test_a_closed_pipeline_is_freed_where_it_was_made(gaussian_onnx):
    """The control: only forks keep sessions."""
    pytest.importorskip("onnxruntime", reason="not verified here: ONNX Runtime in a fork (it is not installed)")
    from ddpmx.backends import forks

    before = len(forks._with_threads)
    with ddpmx.load(gaussian_onnx, threads=2):
        assert len(forks._with_threads) == before + 1
    assert len(forks._with_threads) == before
    assert not forks._inherited


@pytest.mark.parametrize("used", [False, True])
def test_work_for_several_threads_is_done(used):
    workers = Workers(3)

    def work():
        done, all_three = [], threading.Barrier(3)

        def take(left):
            all_three.wait()
            done.extend(left)

        workers.run(range(20), [take] * 3)
        assert sorted(done) == list(range(20))

    if used:
        work()
    assert ends(work)
    assert ends(workers.close)
    workers.close()
