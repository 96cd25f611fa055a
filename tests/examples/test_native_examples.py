"""The programs in examples/c and examples/cpp: their READMEs' commands, and that they draw Python's images."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpmx
from conftest import GAUSSIAN_ONNX
from ddpmx.sampling.pixels import to_nhwc
from native.conftest import ROOT, native_build, ort_library, tool  # noqa: F401

pytestmark = pytest.mark.slow

BUILT_ALREADY = ["cmake -S ../../runtime/native -B ../../build/native", "cmake --build ../../build/native"]
"""What the fixture ``native_build`` has done."""


def script(name: str) -> str:
    """All commands of a README, one behind the other, but for those of ``native_build``."""
    text = (ROOT / "examples" / name / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()
    assert lines[:2] == BUILT_ALREADY
    return "\n".join(lines[2:])


class Example:
    """A copy of an example where its README's commands have been run, in a folder like the repository."""

    def __init__(self, folder: Path, name: str, build: Path, ort: Path) -> None:
        self.home, self.at = folder / "home", folder / "repository" / "examples" / name
        shutil.copytree(ROOT / "examples" / name, self.at)
        shutil.copy(GAUSSIAN_ONNX, self.at / "model.onnx")
        (folder / "repository" / "build").mkdir()
        (folder / "repository" / "build" / "native").symlink_to(build)
        programs = [Path(tool("cmake")).parent, Path(sys.executable).parent]
        self.env = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": os.pathsep.join([*map(str, programs), os.environ["PATH"]]),
            "VIRTUAL_ENV": str(ort.parents[1]),
        }
        self.env.pop("DDPMX_ORT_LIBRARY", None)
        self.done = subprocess.run(
            ["sh", "-eu", "-c", script(name)], cwd=self.at, env=self.env, capture_output=True, text=True, timeout=300
        )
        assert self.done.returncode == 0, self.done.stdout[-3000:] + self.done.stderr[-3000:]
        self.env["DDPMX_ORT_LIBRARY"] = str(ort)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=self.at, env=self.env, capture_output=True, text=True, timeout=60)

    def on_a_terminal(self, *words: str) -> tuple[subprocess.Popen[bytes], int]:
        """A program whose standard error is a terminal, and the other end of that."""
        ours, its = pty.openpty()
        process = subprocess.Popen(
            words,
            cwd=self.at,
            env=self.env,
            stderr=its,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(its)
        return process, ours


@pytest.fixture(scope="module")
def c(tmp_path_factory, native_build, ort_library):  # noqa: F811
    if shutil.which("pkg-config") is None:
        pytest.skip("not verified here: examples/c (no pkg-config)")
    return Example(tmp_path_factory.mktemp("c"), "c", native_build, ort_library)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory, native_build, ort_library):  # noqa: F811
    return Example(tmp_path_factory.mktemp("cpp"), "cpp", native_build, ort_library)


def expected(n: int, **sampling: object) -> np.ndarray:
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        return pipeline.generate(n, **sampling)


# --- C ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "sampling"), [("images.ppm", 16, {"seed": 7, "steps": 50}), ("one.ppm", 1, {})], ids=["16", "1"]
)
def test_c_draws_python_s_images(c, name, n, sampling):
    head, levels = (c.at / name).read_bytes().split(b"\n", 1)
    assert head == b"P6 8 %d 255" % (8 * n)
    assert levels == expected(n, **sampling).tobytes()
    with Image.open(c.at / name) as picture:  # another reader sees the same
        assert np.asarray(picture).tobytes() == levels


@pytest.mark.parametrize("language", ["c", "cpp"])
def test_progress_is_written_over_on_a_terminal_only(language, request):
    """Into a file goes a line every half minute: none, for chains that are done before."""
    example: Example = request.getfixturevalue(language)
    assert "\r" not in example.done.stderr
    assert "steps" not in example.done.stderr
    words = {
        "c": ["build/draw", "model.onnx", "t.ppm", "1", "0", "50"],
        "cpp": ["build/texture", "model.onnx", "t", "--steps", "50"],
    }
    process, terminal = example.on_a_terminal(*words[language])
    seen = b""
    with contextlib.suppress(OSError):  # Linux's end of file, once the program has ended
        while part := os.read(terminal, 4096):
            seen += part
    os.close(terminal)
    assert process.wait(60) == 0
    lines = [line.strip() for line in seen.decode().split("\r")]
    assert [line for line in lines if line.endswith(" of 50 steps")] == [f"{k} of 50 steps" for k in range(1, 51)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.onnx", "x.ppm"], "missing.onnx"),
        (["README.md", "x.ppm"], "README.md"),
        (["model.onnx", "x.ppm", "0"], "n "),
        (["model.onnx", "x.ppm", "1", "0", "1001"], "1001"),
        (["model.onnx", "no/such/folder.ppm", "1", "0", "2"], "cannot write the file"),
        (["model.onnx"], "usage"),
    ],
)
def test_c_ends_with_2_and_says_why(c, words, says):
    done = c.run("build/draw", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert not (c.at / "x.ppm").exists()


def test_c_without_onnx_runtime_says_what_to_do(c):
    c_env = c.env
    try:
        c.env = {**c_env, "DDPMX_ORT_LIBRARY": "/nowhere/libonnxruntime.so"}
        done = c.run("build/draw", "model.onnx", "x.ppm")
    finally:
        c.env = c_env
    assert done.returncode == 2
    assert "/nowhere/libonnxruntime.so" in done.stderr


# --- C++ -------------------------------------------------------------------------------------------------------------


def sheet(tiles: np.ndarray) -> np.ndarray:
    """uint8 [K·K, H, W, C] as one image."""
    k = int(len(tiles) ** 0.5)
    return np.concatenate([np.concatenate(row, axis=1) for row in tiles.reshape(k, k, *tiles.shape[1:])], axis=0)


def test_cpp_tiles_are_python_s_images(cpp):
    np.testing.assert_array_equal(np.asarray(Image.open(cpp.at / "wall" / "texture.png")), sheet(expected(16)))
    bricks = np.asarray(Image.open(cpp.at / "bricks" / "texture.png"))
    np.testing.assert_array_equal(bricks, sheet(expected(9, seed=7, steps=50)))
    assert {path.name for path in (cpp.at / "wall").iterdir()} == {"texture.png"}


def test_cpp_previews_show_where_it_leads(cpp):
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        seen = [to_nhwc(step.x0) for step in pipeline.stream(9, seed=7, steps=50)]
    names = [f"preview-{done:05d}.png" for done in range(10, 51, 10)]
    assert {path.name for path in (cpp.at / "bricks").iterdir()} == {"texture.png", *names}
    for name, tiles in zip(names, seen[9::10], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(cpp.at / "bricks" / name)), sheet(tiles))
    first = np.asarray(Image.open(cpp.at / "bricks" / names[0]))
    assert np.unique(first).size > 50, "something is to be seen"


def test_cpp_tiles_in_several_batches(cpp):
    """16 of them, and the other 9: done tiles stay, and those that were not begun are grey."""
    done = cpp.run("build/texture", "model.onnx", "large", "--tiles", "5", "--steps", "4", "--every", "3")
    assert done.returncode == 0, done.stderr
    drawn = expected(25, steps=4)
    np.testing.assert_array_equal(np.asarray(Image.open(cpp.at / "large" / "texture.png")), sheet(drawn))
    with ddpmx.load(GAUSSIAN_ONNX) as pipeline:
        first = [to_nhwc(step.x0) for step in pipeline.stream(16, steps=4)]
        second = [to_nhwc(step.x0) for step in pipeline.stream(9, first=16, steps=4)]
    grey = np.full_like(drawn, 128)
    for name, tiles in (("00003", [first[2], grey[16:]]), ("00006", [first[3], second[1]])):
        seen = np.asarray(Image.open(cpp.at / "large" / f"preview-{name}.png"))
        np.testing.assert_array_equal(seen, sheet(np.concatenate(tiles)))


@pytest.fixture(scope="module")
def write_png(tmp_path_factory):
    """A program that writes WIDTH HEIGHT CHANNELS of noise to out.png."""
    folder = tmp_path_factory.mktemp("png")
    (folder / "write.cpp").write_text("""
#include "png.hpp"
#include <cstdlib>
int main(int, char **argv) {
  const auto number = [&](int i) { return static_cast<std::uint32_t>(std::atoi(argv[i])); };
  std::vector<std::uint8_t> pixels(std::size_t{number(1)} * number(2) * number(3));
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<std::uint8_t>(i * 2654435761u >> 16);
  write_png("out.png", number(1), number(2), number(3), pixels);
}""")
    here = ROOT / "examples" / "cpp"
    subprocess.run(["c++", "-std=c++17", "-O1", f"-I{here}", "write.cpp", "-o", "write"], cwd=folder, check=True)
    return folder / "write"


@pytest.mark.parametrize("size", [(1, 1), (300, 80), (7, 65535), (65534, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cpp_png_is_read_by_others(write_png, tmp_path, size, channels):
    """Of several stored blocks, of one, and of one that is full."""
    width, height = size
    subprocess.run([write_png, *map(str, (width, height, channels))], cwd=tmp_path, check=True)
    index = np.arange(width * height * channels, dtype=np.uint64)
    levels = (index * np.uint64(2654435761) >> np.uint64(16)).astype(np.uint8)
    picture = Image.open(tmp_path / "out.png")
    assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert picture.size == size
    assert np.asarray(picture).tobytes() == levels.tobytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["missing.onnx", "x"], "missing.onnx"),
        (["model.onnx", "x", "--tiles", "65"], "--tiles must be a whole number from 0 to 64, not 65"),
        (["model.onnx", "x", "--seed", "7x"], "--seed"),
        (["model.onnx", "x", "--size", "7"], "unknown flag --size"),
        (["model.onnx", "x", "--steps", "1001"], "1001"),
        (["model.onnx", "x", "--steps"], "texture MODEL FOLDER"),
        (["model.onnx", "README.md"], "README.md"),
        ([], "texture MODEL FOLDER"),
    ],
)
def test_cpp_ends_with_2_and_says_why(cpp, words, says):
    done = cpp.run("build/texture", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_cpp_an_exception_of_the_callback_ends_it(cpp):
    (cpp.at / "blocked" / "preview-00001.png").mkdir(parents=True)  # so that the first preview cannot be written
    done = cpp.run("build/texture", "model.onnx", "blocked", "--every", "1")
    assert done.returncode == 2
    assert "cannot write blocked/preview-00001.png" in done.stderr
    assert "2 of 1000 steps" not in done.stderr


def test_cpp_ctrl_c_ends_it_in_the_middle(cpp):
    process, terminal = cpp.on_a_terminal("build/texture", "model.onnx", "ended", "--tiles", "64")
    try:
        assert os.read(terminal, 4)  # it has begun
        process.send_signal(signal.SIGINT)
        said = b""
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 4096):
                said += part
        assert process.wait(60) == 130
    finally:
        process.kill()
        os.close(terminal)
    assert said.endswith(b"interrupted\r\n")
    assert not (cpp.at / "ended" / "texture.png").exists()
