"""A signal decides the exit code, whatever foreign code makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ddpmx.errors import BackendError, OutputError
from ddpmx_cli import signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="not verified here: signals (not POSIX)")

NUMBERS = (signal.SIGINT, signal.SIGTERM)
FOREIGN = {
    "an import that fails": ImportError("cannot import name 'x' from partially initialized module"),
    "an error of ours": BackendError("torch could not export this network", hint="try again"),
    "any error": RuntimeError("unknown"),
    "out of memory": MemoryError(),
    "another exit code": SystemExit(1),
    "the same": None,
    "swallowed": None,
}


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.received, signals.raised = None, False


@pytest.fixture
def work(monkeypatch):
    """``work(function)``: what `ddpmx info` does."""

    def put(function):
        monkeypatch.setattr("ddpmx.formats.describe.describe", function)

    return put


def stopped(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("made_of_it", FOREIGN)
def test_what_foreign_code_makes_of_a_signal_has_no_words(ddpmx, work, tmp_path, number, made_of_it):
    error = FOREIGN[made_of_it]

    def foreign(path):
        try:
            stopped(number)
        except BaseException:
            if error is not None:
                raise error from None
            if made_of_it == "the same":
                raise
        return {"kind": "plan", "bytes": 0, "note": None, "spec": None, "flavour": "", "version": ""}

    work(foreign)
    done = ddpmx("info", tmp_path)
    assert (done.code, done.out, done.err) == (128 + number, "", "")


@pytest.mark.parametrize("made_of_it", [name for name, error in FOREIGN.items() if isinstance(error, BackendError)])
def test_without_a_signal_the_same_error_is_told(refused, work, tmp_path, made_of_it):  # control
    def foreign(path):
        raise FOREIGN[made_of_it]

    work(foreign)
    assert "torch could not export" in refused("info", tmp_path)


@pytest.mark.parametrize("number", NUMBERS)
def test_work_that_stops_by_itself_may_still_fail_and_says_so(ddpmx, work, tmp_path, number):
    def saving(path):
        with signals.held() as asked:
            os.kill(os.getpid(), number)
            assert asked()
            raise OutputError("the checkpoint cannot be written")

    work(saving)
    done = ddpmx("info", tmp_path)
    assert (done.code, done.err) == (2, "Error: the checkpoint cannot be written\n")


@pytest.mark.parametrize("number", NUMBERS)
def test_work_that_stops_by_itself_has_the_signal_s_exit_code(ddpmx, work, tmp_path, number):
    def saving(path):
        with signals.held():
            os.kill(os.getpid(), number)
        return {"kind": "plan", "bytes": 0, "note": None, "spec": None, "flavour": "", "version": ""}

    work(saving)
    done = ddpmx("info", tmp_path)
    assert (done.code, done.err) == (128 + number, "")
    assert "a TensorRT plan" in done.out, "what it has to say is said"


def test_a_second_ctrl_c_stops_such_work_at_once(ddpmx, work, tmp_path):
    def saving(path):
        with signals.held():
            os.kill(os.getpid(), signal.SIGINT)
            stopped(signal.SIGINT)
            raise AssertionError

    work(saving)
    assert ddpmx("info", tmp_path).code == 130


EARLY = """
import os, signal, sys, time
class Stop:
    def find_spec(name, path=None, target=None):
        if name == 'ddpmx_cli.signals':
            os.kill(os.getpid(), signal.{number})
            time.sleep(1)
sys.meta_path.insert(0, Stop)
{begin}
"""


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize(
    "begin",
    [
        "from ddpmx_cli.entry import run",
        "import runpy; runpy.run_module('ddpmx', run_name='__main__')",
        "sys.argv[0] = '-m'; sys.orig_argv[1:] = ['-m', 'ddpmx_cli.main']; import ddpmx_cli.main",
    ],
    ids=["ddpmx", "python -m ddpmx", "python -m ddpmx_cli.main"],
)
def test_a_signal_in_our_first_import_is_quiet(begin, number, code):
    program = [sys.executable, "-c", EARLY.format(number=number, begin=begin)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (code, "", "")
