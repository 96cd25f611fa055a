"""The command line as a whole: hostile files, Ctrl-C, help and completion."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from ddpmx_cli.main import app
from oracles import gaussian, protobuf

PROGRAM = [sys.executable, "-c", "import sys; sys.argv[0] = 'ddpmx'; from ddpmx_cli.main import run; run()"]
"""`ddpmx` for a subprocess, wherever the script itself was installed."""

QUICK = ("--sampler", "ddim", "--steps", 3)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    path = tmp_path / "here"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def model(here, gaussian_onnx) -> Path:
    """A whole model file in that folder."""
    path = here / "model.onnx"
    path.write_bytes(gaussian_onnx.read_bytes())
    return path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# --- generate --------------------------------------------------------------------------------------------------------


def test_without_flags_16_images_of_the_whole_chain_are_written_to_samples(ddpmx, model, here):
    done = ddpmx("generate", "--engine", model)
    assert done.code == 0, done
    assert done.err == ""
    assert "16 images, 1000 steps of ancestral, seed 0" in done.out
    files = sorted((here / "samples").iterdir())
    assert [path.name for path in files] == [f"{index:05d}.png" for index in range(16)]
    pixels = np.stack([np.asarray(Image.open(path)) for path in files]).transpose(0, 3, 1, 2)
    # The distribution is known: each pixel is N(μ, 0.1²), and the mean of 16 has a standard error of 0.025.
    means = (pixels / 127.5 - 1).mean(0)
    assert np.abs(means - gaussian.MU).max() < 0.15


def test_images_do_not_depend_on_the_batch(ddpmx, model, here):
    for out, flags in {"once": (), "threes": ("--batch", 3), "parts": ("--first", 2)}.items():
        assert ddpmx("generate", "--engine", model, "-n", 7, "--out", out, *flags, *QUICK).code == 0
    once = {path.name: path.read_bytes() for path in (here / "once").iterdir()}
    assert len(set(once.values())) == 7, "seven different images"
    assert {path.name: path.read_bytes() for path in (here / "threes").iterdir()} == once
    for index in range(2, 7):
        assert (here / "parts" / f"{index:05d}.png").read_bytes() == once[f"{index:05d}.png"]


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize("flag", ["--animate", "--grid"])
def test_no_images_make_no_animation(refused, model, here, n, flag):
    assert "n must be" in refused("generate", "--engine", model, "-n", n, flag)
    assert names(here) == {"model.onnx"}


def hostile(kind: str) -> bytes:
    inputs = {"x": (protobuf.FLOAT, ("batch", 3, 8, 8)), "t": (protobuf.INT32, ("batch",))}
    outputs = {"eps": (protobuf.FLOAT, ("batch", 3, 8, 8))}
    metadata = {"ddpmx": gaussian.SPEC.to_text()}

    def pointing_to(location: str) -> bytes:
        weights = protobuf.field(5, protobuf.external_tensor(location))
        return protobuf.model(inputs, outputs, metadata=metadata, graph=weights)

    return {
        "weights above its folder": pointing_to("../secret"),
        "weights at an absolute path": pointing_to("/etc/passwd"),
        "weights that are missing": pointing_to("weights.bin"),
        "no nodes": protobuf.model(inputs, outputs, metadata=metadata),
        "random bytes": random.Random(0).randbytes(5000),
        "the head of a plan": b"vtrt",
        "a header and nothing else": b"\x08\x08",
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights above its folder", "outside its own folder"),
        ("weights at an absolute path", "outside its own folder"),
        ("weights that are missing", "missing"),
        ("no nodes", "refuses this file"),
        ("random bytes", "neither an ONNX file nor a TensorRT plan"),
        ("the head of a plan", "not a valid TensorRT plan"),
        ("a header and nothing else", "not a valid ONNX file"),
    ],
)
def test_hostile_files(refused, here, kind, message):
    (here.parent / "secret").write_bytes(bytes(4))
    (here / "model.onnx").write_bytes(hostile(kind))
    text = refused("generate", "--engine", "model.onnx", "--out", "new")
    assert text.startswith("Error: ")
    assert message in text
    assert names(here) == {"model.onnx"}


@pytest.mark.skipif(os.name != "posix", reason="not verified here: Ctrl-C (no POSIX signals)")
def test_ctrl_c_while_drawing_leaves_no_image(model, here):
    process = subprocess.Popen(
        [*PROGRAM, "generate", "--engine", str(model), "-n", "100000", "--out", "new"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a process in the background may ignore SIGINT, and so may its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not (here / "new").exists():  # made when the chain begins
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert names(here) <= {"model.onnx", "new"}


# --- train -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(here) -> str:
    pytest.importorskip("torch", reason="not verified here: the train command (no torch)")
    np.savez(here / "images.npz", np.zeros((4, 8, 8), np.uint8))
    return "images.npz"


TINY = ("--width", 8, "--groups", 4, "--mult", 1, "--blocks", 1, "--attention", "", "--steps", 1, "--batch", 2)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "images are missing"),
        (("--out", "new"), "images are missing"),
        (("--resume",), "images are missing"),
        (("--data", "nowhere"), "no such file"),
        (("--data", "images.npz", "--out", "file"), "is a file, and a run is a folder"),
        (("--data", "images.npz", "--out", "file/run"), "is a file, and a folder is needed"),
        (("--data", "images.npz", "--size", "8x8x8"), "--size"),
        (("--data", "images.npz", "--channels", 2), "channels"),
        (("--data", "images.npz", "--device", "meta"), "--device"),
        (("--data", "images.npz", "--device", "cuda:99"), "--device"),
        (("--data", "images.npz", "--seed", 2**63), "seed"),
        (("--data", "images.npz", "--steps", 10**15), "steps"),
        (("--data", "images.npz", "--save-minutes", "nan"), "--save-minutes"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_train_refuses(refused, images, here, arguments, message):
    (here / "file").write_text("mine")
    settings = () if "--resume" in arguments else TINY
    assert message in refused("train", *settings, *arguments)
    assert names(here) == {"images.npz", "file"}
    assert (here / "file").read_text() == "mine"


@pytest.mark.torch
def test_a_run_is_named_after_its_images(ddpmx, images, here):
    done = ddpmx("train", "--data", images, *TINY)
    assert done.code == 0, done
    assert done.err == ""
    assert (here / "runs/images/checkpoints/00000001/ema.safetensors").exists()
    assert "ddpmx export runs/images" in done.out, "what to do next"


# --- help and completion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "export",
        "build",
        "generate",
        "denoise",
        "inpaint",
        "interpolate",
        "compress",
        "decompress",
        "parity",
        "import",
        "convert",
        "adopt",
        "bench",
        "info",
        "doctor",
    ],
)
def test_every_flag_is_explained(command):
    parameters = get_command(app).commands[command].params
    assert parameters
    assert [parameter.name for parameter in parameters if not parameter.help] == []


@pytest.mark.parametrize(
    "arguments",
    [("paint",), ("generate",), ("generate", "--engine"), ("generate", "--engine", "m", "-n", "x"), ("--paint",)],
    ids=" ".join,
)
def test_arguments_that_cannot_be_parsed(ddpmx, here, arguments):
    done = ddpmx(*arguments)
    assert done.code == 2
    assert "Error" in done.err
    assert "Traceback" not in done.err
    assert not names(here)


COMMANDS = [
    "train",
    "plot",
    "export",
    "build",
    "generate",
    "denoise",
    "inpaint",
    "interpolate",
    "score",
    "compress",
    "decompress",
    "page",
    "serve",
    "triton",
    "parity",
    "eval",
    "import",
    "convert",
    "adopt",
    "bench",
    "info",
    "doctor",
]


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)], ids=str)
def test_help_names_the_commands(ddpmx, arguments):
    done = ddpmx(*arguments)
    for command in COMMANDS:
        assert command in done.out + done.err


def complete(words: str, instruction: str) -> str:
    environment = {
        **os.environ,
        "_DDPMX_COMPLETE": instruction,
        "COMP_WORDS": words,
        "COMP_CWORD": f"{words.count(' ')}",
    }
    done = subprocess.run(PROGRAM, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_the_shell_gets_its_completion_script():
    assert "complete -o default -F _ddpmx_completion ddpmx" in complete("", "source_bash")
    assert complete("ddpmx ", "complete_bash").split() == COMMANDS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_gives_no_traceback(number):
    code = (
        "import os, signal, sys, types\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'typer': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Slow())\n"
        "sys.argv = ['ddpmx', '--version']\n"
        "from ddpmx_cli.entry import run\n"
        "run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_the_script_is_the_program(monkeypatch, capsys):
    from ddpmx_cli import entry

    monkeypatch.setattr("sys.argv", ["ddpmx", "--version"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        entry.run()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    assert not end.value.code
    assert capsys.readouterr().out.startswith("ddpmx ")
