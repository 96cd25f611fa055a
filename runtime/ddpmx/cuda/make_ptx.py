"""Compile the kernels to PTX, with the oldest suitable compiler: ``python -m ddpmx.cuda.make_ptx [--check]``.

PTX runs on every later GPU and driver, and is refused by every driver older than its compiler. NVRTC 11.8 writes PTX 7.8,
which every driver since 2022 takes, JetPack 6's among them. It is a library in one pip wheel and needs neither a GPU nor
a driver, so a test recompiles what is committed. Only Linux on x86-64 has the wheel; running ddpmx does not need it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(__file__).resolve().parents[3] / ".cache" / "nvrtc"
REQUIREMENT = "nvidia-cuda-nvrtc-cu11==11.8.89"
HEADERS = {
    "step": ("chain.h", "fours.h", "step.h"),
    "each": ("chain.h", "each.h", "fours.h", "step.h"),
    "while": ("chain.h", "step.h"),
}
NAMES = tuple(HEADERS)
OPTIONS = ("--gpu-architecture=compute_75", "--std=c++17", "--fmad=false")


class Unavailable(RuntimeError):  # noqa: N818 - no fault of the sources
    """The compiler is not available here: no wheel for this platform, no pip, or no network."""


def fetch(requirement: str, folder: Path) -> Path:
    """The files of a wheel, downloaded by pip and unpacked if ``folder`` lacks them. Nothing is installed.

    Raises:
        Unavailable: pip has no such wheel for this platform, or there is no pip or no network.
    """
    unpacked = folder / requirement.replace("==", "-")
    if unpacked.is_dir():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        pip += ["--no-deps", "--only-binary=:all:", "--retries=1", "--timeout=20", "--dest", scratch, requirement]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.splitlines() or ["unknown reason"])[-1].removeprefix("ERROR: ")
            raise Unavailable(f"pip cannot get {requirement}: {reason}")
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(Path(scratch) / "unpacked")
        try:
            (Path(scratch) / "unpacked").rename(unpacked)  # at once: an interrupted download leaves nothing
        except OSError:
            if not unpacked.is_dir():  # else another process was faster
                raise
    return unpacked


def sources(name: str) -> dict[str, bytes]:
    """The sources of ``name``.ptx, by file name."""
    return {file: (HERE / file).read_bytes().replace(b"\r\n", b"\n") for file in (f"{name}.cu", *HEADERS[name])}


def digest(name: str) -> str:
    """The SHA-256 of the sources' own SHA-256, in hexadecimal, which the first line of ``name``.ptx holds."""
    whole = hashlib.sha256()
    for content in sources(name).values():
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()


def compile_ptx(name: str, cache: Path = CACHE) -> bytes:
    """The content of ``name``.ptx: one line with its origin, then the compiler's output.

    Raises:
        Unavailable: the compiler is not available here.
        RuntimeError: it failed; the text is its log.
    """
    code = sources(name)
    nvrtc = _load(fetch(REQUIREMENT, cache))
    program = ctypes.c_void_p()
    headers = HEADERS[name]
    contents = (ctypes.c_char_p * len(headers))(*(code[header] for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    main = f"{name}.cu"
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), code[main], main.encode(), len(headers), contents, names)
    if created:
        raise RuntimeError(f"nvrtcCreateProgram: error {created}")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options):
            raise RuntimeError(_text(nvrtc, program, "nvrtcGetProgramLog").decode())
        ptx = _text(nvrtc, program, "nvrtcGetPTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    made_from = ", ".join(code)
    return f"// ddpmx: {made_from}; sha256 {digest(name)}; {REQUIREMENT}\n".encode() + ptx.rstrip(b"\n") + b"\n"


def _load(wheel: Path) -> ctypes.CDLL:
    folder = wheel / "nvidia" / "cuda_nvrtc" / "lib"
    try:
        # NVRTC loads this library by its bare name, which finds the one loaded here
        ctypes.CDLL(str(folder / "libnvrtc-builtins.so.11.8"), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(folder / "libnvrtc.so.11.2"))
    except OSError as error:
        raise Unavailable(f"{REQUIREMENT} cannot be loaded: {error}") from error


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if error := nvrtc[f"{what}Size"](program, ctypes.byref(size)):
        raise RuntimeError(f"{what}Size: error {error}")
    text = ctypes.create_string_buffer(size.value)
    if error := nvrtc[what](program, text):
        raise RuntimeError(f"{what}: error {error}")
    return text.value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if ``--check`` finds a stale file, or 3 if the compiler is not available here."""
    parser = argparse.ArgumentParser(prog="python -m ddpmx.cuda.make_ptx", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; check whether the files are up to date")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the compiler's wheel is kept (%(default)s)")
    chosen = parser.parse_args(arguments)
    stale = False
    for name in NAMES:
        path = HERE / f"{name}.ptx"
        try:
            ptx = compile_ptx(name, chosen.cache)
        except Unavailable as why:
            print(why, file=sys.stderr)
            return 3
        if not chosen.check:
            path.write_bytes(ptx)
            print(f"{path}: {len(ptx)} bytes")
        elif not path.is_file() or path.read_bytes().replace(b"\r\n", b"\n") != ptx:
            print(f"{path}: stale: its sources have changed; run python -m ddpmx.cuda.make_ptx", file=sys.stderr)
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
