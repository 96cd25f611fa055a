"""Another processor, aarch64, in an emulator: programs that ``.ci/native-tools`` made ready, and wheels for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".cache" / "native-tools"
PYTHON = TOOLS / "python-aarch64"
PYTHON_VERSION = "3.13"


class Unavailable(RuntimeError):  # noqa: N818 (not a fault of what is tested)
    """There is no emulator here, no Python for it, or no wheel."""


def find_emulator() -> str:
    """The emulator.

    Raises:
        Unavailable: there is none, or it is too old: it would crash when it loads ONNX Runtime.
    """
    for place in (TOOLS / "qemu-aarch64", "qemu-aarch64", "qemu-aarch64-static"):
        if found := shutil.which(place):
            output = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            version = re.search(r"version (\d+)", output)
            if version and int(version[1]) >= 8:
                return found
    raise Unavailable("no qemu-aarch64 of version 8 or later; .ci/native-tools gets one")


def unpacked_wheels(
    folder: Path, *requirements: str, python: str = "", wanted: Callable[[str], bool] = lambda name: True
) -> Path:
    """The files of wheels for aarch64, downloaded and unpacked if ``folder`` is not there yet.

    Args:
        folder: for the files.
        requirements: as ``name==version``.
        python: the version of Python that they are for; by default this one.
        wanted: which names in the wheels are unpacked.

    Raises:
        Unavailable: pip cannot download one.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
        command += ["--platform=manylinux2014_aarch64", *([f"--python-version={python}"] if python else [])]
        command += ["--timeout=20", "--retries=1", f"--dest={work}", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise Unavailable(f"no wheel of {' and '.join(requirements)} for it: {done.stderr.strip()[-200:]}")
        unpacked = Path(work) / "unpacked"
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked, [name for name in archive.namelist() if wanted(name)])
        with contextlib.suppress(OSError):  # another process was faster
            unpacked.rename(folder)
    return folder


class Python:
    """Python on aarch64 with NumPy, MNN and ddpmx, of the same versions as here.

    Raises:
        Unavailable: the emulator, the Python or a wheel is missing.
    """

    def __init__(self, *requirements: str) -> None:
        self._emulator = find_emulator()
        self._program = PYTHON / "usr" / "bin" / f"python{PYTHON_VERSION}"
        if not self._program.is_file():
            raise Unavailable("no Python for it; .ci/native-tools gets one")
        name = "-".join(requirements).replace("==", "-")
        self._wheels = unpacked_wheels(TOOLS / f"{name}-aarch64", *requirements, python=PYTHON_VERSION)

    def __call__(self, program: Path, *words: str, cpu: str) -> str:
        """What a program prints on a processor of this name."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self._wheels), str(ROOT / "runtime")]),
            "PYTHONPYCACHEPREFIX": str(TOOLS / "pycache-aarch64"),  # compiling what is imported takes seconds there
            "PYTHONDONTWRITEBYTECODE": "",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [self._emulator, "-cpu", cpu, "-L", str(PYTHON), str(self._program), str(program), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout
