"""The commands without what only POSIX has. That is not Windows, but whatever fails here fails there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import FASHION, GAUSSIAN_ONNX

WITHOUT_POSIX = """
import multiprocessing, os, types, shutil, signal, socket, subprocess, sys, tempfile, threading
import ctypes.util, platform, rich.console, sysconfig
import numpy, rich.progress, typer, typer.rich_utils, PIL.Image
platform.uname(), sysconfig.get_config_vars(), rich.console.Console()
for name in EARLIER:
    __import__(name)
for name in ("fcntl", "grp", "pwd", "pty", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for module, names in {
    os: "fork forkpty getuid geteuid getgid getegid getloadavg sched_getaffinity sched_setaffinity mkfifo mknod uname "
        "killpg setsid getpgid posix_fallocate posix_fadvise fchmod fchown chown lchown sysconf statvfs "
        "O_NONBLOCK O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_SYNC nice ttyname pread pwrite",
    signal: "SIGKILL SIGHUP SIGALRM SIGQUIT SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD setitimer alarm pthread_sigmask sigwait pause",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
msvcrt = types.SimpleNamespace(locking=lambda *_: None, LK_LOCK=1, LK_NBLCK=2, LK_UNLCK=0)
sys.platform, sys.modules["msvcrt"] = "win32", msvcrt
import shutil
shutil._use_fd_functions = False  # as where the names above are missing; decided when it is imported
from ddpmx_cli.main import run
sys.argv = ["ddpmx", *sys.argv[1:]]
run()
"""


def without_posix(*words: object, earlier: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = f"EARLIER = {earlier}\n{WITHOUT_POSIX}"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


def test_the_runtime_s_commands_run(tmp_path):
    pytest.importorskip("onnxruntime", reason="not verified here: commands without POSIX (no ONNX Runtime)")
    for words in (
        ["generate", GAUSSIAN_ONNX, "-n", 2, "--steps", 3, "--grid", "--animate", "--out", tmp_path / "out"],
        ["info", tmp_path / "out" / "00001.png"],
        ["bench", GAUSSIAN_ONNX, "--seconds", 0.01, "--batch", 1, "--steps", 3],
        ["parity", GAUSSIAN_ONNX, "--self-test", "-o", tmp_path / "report"],
        ["doctor"],
    ):
        done = without_posix(*words, earlier=("onnxruntime",))
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.torch
def test_training_runs(tmp_path):
    pytest.importorskip("torch", reason="not verified here: training without POSIX (no torch)")
    tiny = {
        "width": 4,
        "groups": 2,
        "mult": 1,
        "blocks": 1,
        "attention": "",
        "batch": 2,
        "threads": 1,
        "sample-every": 2,
    }
    flags = [word for name, value in tiny.items() for word in (f"--{name}", value)]
    done = without_posix(
        "train", "--data", FASHION, "--out", tmp_path / "run", "--steps", 2, *flags, earlier=("torch",)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = without_posix("train", "--out", tmp_path / "run", "--resume", "--steps", 3, earlier=("torch",))
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_only_posix_has_is_missed():  # control
    done = without_posix("--version", earlier=())
    assert done.returncode == 0
    code = WITHOUT_POSIX.replace("from ddpmx_cli", "import fcntl\nfrom ddpmx_cli")
    done = subprocess.run([sys.executable, "-c", "EARLIER = ()" + code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr
