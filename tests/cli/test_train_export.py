"""`ddpmx train` and `ddpmx export`: what they write, and what they refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import FASHION, GAUSSIAN_ONNX

pytest.importorskip("torch", reason="not verified here: the train and export commands (no torch)")

from ddpm_export.training import distributed
from ddpm_export.training.distributed import ALONE, Processes
from ddpmx_cli import signals

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TINY = (
    "--width",
    8,
    "--groups",
    4,
    "--mult",
    "1,2",
    "--blocks",
    1,
    "--attention",
    8,
    "--batch",
    4,
    "--sample-every",
    0,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, made once by the command. The steps are large, so that the outputs are not almost zero."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = ["train", "--data", FASHION, "--out", out, "--steps", 2, *TINY, "--lr", 0.1, "--warmup", 1, "--ema", 0.5]
    subprocess.run([sys.executable, "-m", "ddpmx_cli.main", *map(str, command)], check=True, capture_output=True)
    return out


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(run, tmp_path / "copy")


def test_train_export_generate(ddpmx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = ddpmx("train", "--data", FASHION, "--steps", 3, *TINY[:-2], "--sample-every", 3)
    assert trained.code == 0, trained
    checkpoint = tmp_path / "runs" / FASHION.stem / "checkpoints" / "00000003"
    assert {"spec.json", "ema.safetensors", "weights.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    assert (tmp_path / "runs" / FASHION.stem / "samples" / "grid-00000003.png").exists()
    assert "step 3" in trained.out

    exported = ddpmx("export")  # the newest run, model.onnx here
    assert exported.code == 0, exported
    assert (tmp_path / "model.onnx").exists()
    assert ddpmx("export", "--fp16", "-o", "half.onnx").code == 0
    assert (tmp_path / "half.onnx").stat().st_size < 0.7 * (tmp_path / "model.onnx").stat().st_size
    assert ddpmx("generate", "--engine", "half.onnx", "-n", 2, "--steps", 3).code == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000.png", "00001.png"]


def test_export_does_not_overwrite_another_model(refused, run, tmp_path):
    for name, content in (
        ("model.onnx", GAUSSIAN_ONNX.read_bytes()),
        ("net.onnx", nameless(GAUSSIAN_ONNX)),
        ("note.onnx", b"hello"),
    ):
        (tmp_path / name).write_bytes(content)
        err = refused("export", run, "-o", tmp_path / name)
        assert "refusing to overwrite" in err
        assert "--overwrite" in err
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "mine.parity.npz").write_bytes(b"hello")
    assert "not a parity record" in refused("export", run, "-o", tmp_path / "mine.onnx")
    assert len(list(tmp_path.iterdir())) == 4


def nameless(path):
    return path.read_bytes().replace(b"\x05ddpmx\x12", b"\x05other\x12")


def test_export_takes_the_newest_run(ddpmx, run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    for age, name in ((100, "older"), (0, "newer"), (50, "middle")):
        shutil.copytree(run, tmp_path / "runs" / name)
        stamp = time.time() - age
        os.utime(tmp_path / "runs" / name / "checkpoints" / "00000002", (stamp, stamp))
    monkeypatch.chdir(tmp_path)
    assert "runs/newer/" in ddpmx("export", "--no-parity", "--no-plan").out


@pytest.fixture
def no_tensorrt(monkeypatch):
    """A machine without TensorRT."""
    from ddpmx.errors import BackendError
    from ddpmx.trt import library as trt_library

    def load(flavour=None):
        raise BackendError("TensorRT is not installed here")

    monkeypatch.setattr(trt_library, "load", load)


def test_export_records_checks_and_names_the_command_for_a_plan(ddpmx, run, tmp_path, no_tensorrt):
    done = ddpmx("export", run, "-o", tmp_path / "model.onnx")
    assert done.code == 0, done
    assert "PASSED" in done.out
    assert "not trained" in done.out, "after two steps a chain of the network proves nothing"
    assert f"ddpmx build {tmp_path / 'model.onnx'}" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.parity.npz"]
    assert ddpmx("parity", tmp_path / "model.onnx").code == 0
    info = ddpmx("info", tmp_path / "model.onnx").out
    for line in ("unet: channels 8", "trained:     2 steps", f"10,000 images of {FASHION.name}"):
        assert line in info
    assert str(FASHION.parent).encode() not in (tmp_path / "model.onnx").read_bytes(), (
        "a file travels, its folders do not"
    )


def test_export_without_proof_and_plan_writes_one_file(ddpmx, run, tmp_path):
    assert ddpmx("export", run, "-o", tmp_path / "model.onnx", "--no-parity", "--no-plan").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.long
def test_export_builds_a_plan_if_possible(ddpmx, run, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="not verified here: export builds a plan (no TensorRT-RTX)")
    for precision in (("--fp16",), ("--bf16",)):
        done = ddpmx("export", run, "-o", tmp_path / "model.onnx", "--no-parity", *precision)
        assert done.code == 0, done
        info = json.loads(ddpmx("info", tmp_path / "model.plan", "--json").out)
        assert info["spec"]["precision"] == (precision[0][2:] if precision else "fp32")
        assert info["engine"]["source"] == "model.onnx"


def test_a_requested_plan_that_cannot_be_built_is_an_error(refused, run, tmp_path, no_tensorrt):
    assert "not installed" in refused("export", run, "-o", tmp_path / "model.onnx", "--no-parity", "--plan")
    assert (tmp_path / "model.onnx").exists()


def test_an_export_that_is_not_the_model_exits_with_1(ddpmx, run, tmp_path, monkeypatch):
    import dataclasses

    from ddpmx.parity import ladder

    strict = dataclasses.replace(ladder.BOUNDS["fp16"], eps=1e-9)
    monkeypatch.setitem(ladder.BOUNDS, "fp16", strict)
    done = ddpmx("export", run, "-o", tmp_path / "model.onnx", "--fp16", "--no-plan")
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert "FAILED" in line
    assert (tmp_path / "model.onnx").exists(), "it is kept, to find out why"


@pytest.mark.long
def test_for_bf16_a_note_says_that_the_file_was_not_run(ddpmx, refused, run, tmp_path):
    done = ddpmx("export", run, "-o", tmp_path / "model.onnx", "--bf16", "--no-plan")
    assert done.code == 0, done
    assert "NOT the file" in done.out
    assert "ddpmx build" in refused("generate", "--engine", tmp_path / "model.onnx", "--out", tmp_path / "samples")


def test_a_network_with_outputs_of_zero_is_exported_and_not_verified(ddpmx, tmp_path):
    out = tmp_path / "run"
    assert ddpmx("train", "--data", FASHION, "--out", out, "--steps", 1, *TINY, "--lr", 1e-12).code == 0
    done = ddpmx("export", out, "-o", tmp_path / "model.onnx", "--no-plan")
    assert done.code == 0, done
    assert "NOT VERIFIED" in done.out
    assert not (tmp_path / "model.parity.npz").exists()


def test_export_refuses_flags_that_contradict_each_other(refused, run, tmp_path):
    for flags in (("--fp16", "--bf16"), ("--no-parity", "--full"), ("--no-parity", "--data", FASHION)):
        refused("export", run, "-o", tmp_path / "model.onnx", *flags)
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, images=np.zeros((3, 8, 8), np.uint8))
    assert "8, 8, 1" in refused("export", run, "-o", tmp_path / "model.onnx", "--data", wrong)
    assert "no such file" in refused("export", run, "-o", tmp_path / "model.onnx", "--data", tmp_path / "none")
    assert not (tmp_path / "model.onnx").exists(), "nothing was written"


def test_an_export_does_not_overwrite_its_own_images(refused, run, tmp_path):
    data = tmp_path / "model.parity.npz"
    shutil.copy(FASHION, data)
    assert "it holds the images of --data" in refused("export", run, "--data", data, "-o", tmp_path / "model.onnx")
    assert data.read_bytes() == FASHION.read_bytes()


def test_a_pipe_in_a_checkpoint_does_not_block(refused, copy, tmp_path):
    file = copy / "checkpoints" / "00000002" / "ema.safetensors"
    file.unlink()
    os.mkfifo(file)
    for command in (("info", copy), ("export", copy, "-o", tmp_path / "model.onnx")):
        assert "ema.safetensors" in refused(*command)


def test_a_network_that_cannot_be_run_is_not_verified(ddpmx, run, tmp_path, monkeypatch):
    from ddpm_export.networks.torch_backend import TorchBackend
    from ddpmx.errors import BackendError

    def full(self):
        raise BackendError("torch could not run the network", note="can't allocate memory")

    monkeypatch.setattr(TorchBackend, "enqueue", full)
    done = ddpmx("export", run, "-o", tmp_path / "model.onnx", "--no-plan")
    assert done.code == 0, done
    assert "NOT VERIFIED" in done.out


def test_export_replaces_no_file_of_another_kind(refused, run, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]")
    assert "refusing to overwrite" in refused("export", run, "-o", tmp_path / "pyproject.toml")
    assert (tmp_path / "pyproject.toml").read_text() == "[project]"
    assert "not a name" in refused("export", run, "-o", tmp_path / "model.plan")


@pytest.mark.long
def test_turing_needs_half_precision_with_a_time_table(ddpmx, refused, run, tmp_path):
    """On SM 7.5 TensorRT-RTX cannot multiply float32 matrices, which the time path consists of."""
    pytest.importorskip("tensorrt_rtx", reason="not verified here: engines for SM 7.5 (no TensorRT-RTX)")
    file = tmp_path / "model.onnx"
    assert ddpmx("export", run, "-o", file, "--fp16", "--no-parity", "--no-plan").code == 0
    assert "--time-table" in refused("build", file, "--target", "7.5")
    assert ddpmx("export", run, "-o", file, "--fp16", "--time-table", "--no-parity", "--no-plan").code == 0
    done = ddpmx("build", file, "--target", "7.5")
    assert done.code == 0, done
    assert "SM 7.5" in done.out


def test_parity_compares_with_a_checkpoint(ddpmx, refused, run, tmp_path):
    file = tmp_path / "model.onnx"
    assert ddpmx("export", run, "-o", file, "--no-parity", "--no-plan").code == 0
    done = ddpmx("parity", file, "--checkpoint", run, "--data", FASHION)
    assert done.code == 0, done
    report = json.loads((tmp_path / "model.report" / "report.json").read_text())
    assert report["reference"]["images"] == "the user's"
    assert "weights" in refused("parity", file, "--checkpoint", run, "--weights", "raw"), "another model's weights"


def test_info_counts_a_checkpoint_s_parameters(ddpmx, run):
    from ddpm_export.training.checkpoint import load_network

    network, _ = load_network(run)
    count = sum(tensor.numel() for tensor in network.state_dict().values())
    assert f"{count:,} parameters" in ddpmx("info", run).out


def test_resume_continues(ddpmx, copy):
    done = ddpmx("train", "--out", copy, "--resume", "--steps", 4)
    assert done.code == 0, done
    assert "2 → 4" in done.out
    assert (copy / "checkpoints" / "00000004").exists()


def test_ctrl_c_saves_and_resume_continues(tmp_path, ddpmx):
    out = tmp_path / "run"
    command = ["train", "--data", FASHION, "--out", out, "--steps", 100000, *TINY[:-1], 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpmx_cli.main", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("samples/*.png")):  # the grid after the first step shows that it has started
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "--resume" in stdout
    (checkpoint,) = (out / "checkpoints").iterdir()
    steps = int(checkpoint.name) + 1
    assert ddpmx("train", "--out", out, "--resume", "--steps", steps, "--sample-every", 0).code == 0
    assert (out / "checkpoints" / f"{steps:08d}").exists()


def test_a_process_tries_its_own_gpu_and_no_other(ddpmx, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def joined(device):
        assert device == "cuda"
        yield Processes(7, 8, 77), "cuda:77"

    monkeypatch.setattr(distributed, "joined", joined)
    refused = ddpmx("train", FASHION, "--out", tmp_path / "run", "--steps", 1, *TINY, "--device", "cuda")
    assert refused.code == 2, refused
    assert "--device 'cuda:77' cannot be used" in refused.err


def test_processes_that_are_stopped_part_in_order(ddpmx, tmp_path, monkeypatch):
    parted = []

    @contextlib.contextmanager
    def joined(device):
        yield ALONE, "cpu"
        parted.append(device)  # not reached where an exception ends the block

    @contextlib.contextmanager
    def held():
        yield lambda: True

    monkeypatch.setattr(distributed, "joined", joined)
    monkeypatch.setattr(signals, "held", held)
    stopped = ddpmx("train", FASHION, "--out", tmp_path / "run", "--steps", 3, *TINY)
    assert stopped.code == 130, stopped
    assert "stopped; continue with" in stopped.out
    assert parted == [None]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 0], "steps"),
        (["--steps", -5], "steps"),
        (["--width", 7], "groups"),
        (["--width", 0], "--width"),
        (["--width", 10**9], "--width"),
        (["--mult", "0"], "--mult"),
        (["--mult", "a"], "--mult"),
        (["--mult", ""], "levels"),
        (["--mult", "1,2,2,2,2,2"], "divisible"),
        (["--blocks", 0], "blocks"),
        (["--attention", "x"], "--attention"),
        (["--dropout", 1], "dropout"),
        (["--groups", 0], "groups"),
        (["--lr", "nan"], "lr"),
        (["--lr", -1], "lr"),
        (["--warmup", -1], "warmup"),
        (["--ema", 2], "ema"),
        (["--grad-clip", 0], "--grad-clip"),
        (["--batch", 0], "batch"),
        (["--seed", -1], "seed"),
        (["-T", 0], "T must be"),
        (["-T", 10**9], "T must be"),
        (["--schedule", "sigmoid"], "sigmoid_beta"),
        (["--schedule", "jsd"], "x_0"),
        (["--prediction", "score"], "eps"),
        (["--variance", "learn"], "fixed_small"),
        (["--variance", "learned"], "does not train the variance"),
        (["--loss", "l2"], "simple, vlb, hybrid"),
        (["--min-snr", 0], "--min-snr"),
        (["--label-dropout", 0.1], "without classes"),
        (["--crop", "17"], "larger than the images"),
        (["--preset", "huge"], "tiny, small, cifar10, 256"),
        (["--holdout", 10_000], "holdout must leave"),
        (["--keep", 0], "--keep"),
        (["--device", "nonsense"], "--device"),
        (["--threads", 0], "--threads"),
        (["--size", "32"], "folder"),
        (["--size", "x"], "--size"),
        (["--sample-every", -1], "--sample-every"),
        (["--save-minutes", 0], "--save-minutes"),
    ],
)
def test_absurd_settings_are_refused(refused, tmp_path, flags, message):
    out = tmp_path / "run"
    settings = [*map(str, TINY)]
    assert message in refused("train", "--data", FASHION, "--out", out, "--steps", 1, *settings, *flags)
    assert not out.exists()


def png(mode="RGB", size=(8, 8)):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


BAD_DATA = {
    "an empty folder": ({}, "no images"),
    "a corrupt image": ({"a.png": png(), "b.png": png()[:40]}, "b.png"),
    "text for an image": ({"a.png": b"hello"}, "a.png"),
    "mixed modes": ({"a.png": png(), "b.png": png("L")}, "--channels"),
    "an empty npz": (b"", "npz"),
    "a cut npz": (npz(images=np.zeros((9, 8, 8), np.uint8))[:200], "npz"),
    "floats": (npz(images=np.zeros((9, 8, 8))), "uint8"),
    "pickled objects": (npz(images=np.array([{}], object)), "npz"),
    "two arrays": (npz(a=np.zeros((9, 8, 8), np.uint8), b=np.zeros((9, 8, 8), np.uint8)), "more than one"),
    "no images": (npz(images=np.zeros((0, 8, 8), np.uint8)), "shape"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_refused(refused, tmp_path, what):
    content, message = BAD_DATA[what]
    data = tmp_path / ("data" if isinstance(content, dict) else "data.npz")
    if isinstance(content, dict):
        data.mkdir()
        for name, image in content.items():
            (data / name).write_bytes(image)
    else:
        data.write_bytes(content)
    assert message in refused("train", "--data", data, "--out", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()


def test_mixed_images_are_converted_on_request(ddpmx, tmp_path):
    (tmp_path / "data").mkdir()
    for number, (mode, size) in enumerate([("RGB", (20, 9)), ("L", (8, 8)), ("RGBA", (8, 31)), ("P", (16, 16))]):
        (tmp_path / "data" / f"{number}.png").write_bytes(png(mode, size))
    how = ("--size", "8x16", "--channels", 3, *TINY, "--steps", 1)
    done = ddpmx("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *how)
    assert done.code == 0, done
    assert "8×16×3" in done.out
    # resuming needs no --data, --size or --channels: the run remembers them
    assert ddpmx("train", "--out", tmp_path / "run", "--resume", "--steps", 2).code == 0


def test_a_run_is_not_overwritten(refused, copy):
    assert "--resume" in refused("train", "--data", FASHION, "--out", copy, *TINY, "--steps", 1)


def test_a_resumed_run_keeps_its_settings_and_its_data(refused, copy, tmp_path):
    assert "--batch" in refused("train", "--out", copy, "--resume", "--steps", 3, "--lr", 1e-4, "--batch", 8)
    assert "2 steps" in refused("train", "--out", copy, "--resume", "--steps", 1)
    np.savez(tmp_path / "other.npz", images=np.zeros((9, 16, 16), np.uint8))
    assert "other images" in refused("train", "--out", copy, "--resume", "--data", tmp_path / "other.npz")
    assert "no checkpoint" in refused("train", "--out", tmp_path / "none", "--resume")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit(path, **changes):
    values = json.loads(path.read_text())
    values["model"].update(changes)
    path.write_text(json.dumps(values))


DAMAGE = {
    "cut weights": (lambda c: cut(c / "ema.safetensors"), "safetensors"),
    "foreign weights": (lambda c: (c / "ema.safetensors").write_bytes(b"PK\x03\x04" * 50), "safetensors"),
    "no weights": (lambda c: (c / "ema.safetensors").unlink(), "safetensors"),
    "cut spec": (lambda c: cut(c / "spec.json"), "JSON"),
    "no spec": (lambda c: (c / "spec.json").unlink(), "no checkpoint"),
    "another shape": (lambda c: edit(c / "spec.json", shape=[3, 16, 16]), "disagree"),
    "an unknown field": (lambda c: edit(c / "spec.json", guidance=7), "guidance"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_old_file_stays(refused, copy, tmp_path, what):
    damage, message = DAMAGE[what]
    damage(copy / "checkpoints" / "00000002")
    old = tmp_path / "model.onnx"
    old.write_text("mine")
    assert message in refused("export", copy, "-o", old, "--overwrite")
    assert old.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "model.onnx"}


def test_export_to_nowhere_is_refused(refused, run, tmp_path, monkeypatch):
    assert "folder" in refused("export", run, "-o", tmp_path)
    assert "folder" in refused("export", run, "-o", tmp_path / "none" / "model.onnx")
    assert "ema" in refused("export", run, "-o", tmp_path / "x.onnx", "--weights", "best")
    monkeypatch.chdir(tmp_path)
    for folder in (".", "./", "/"):
        assert f"-o {Path(folder) / 'model.onnx'}" in refused("export", run, "-o", folder)
    assert "no run" in refused("export")
    assert list(tmp_path.iterdir()) == []


# --- hostile surroundings --------------------------------------------------------------------------------------------


def test_a_checkpoint_cannot_be_resumed_as_a_run(refused, copy):
    assert str(copy) in refused("train", "--out", copy / "checkpoints" / "00000002", "--resume", "--steps", 3)


def test_resuming_a_finished_run_changes_nothing(ddpmx, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert ddpmx("train", "--out", copy, "--resume", "--steps", 2).code == 0
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file() and path.name != ".lock"
    }


def test_two_trainings_cannot_write_to_one_run(refused, copy):
    import fcntl

    with (copy / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another training" in refused("train", "--out", copy, "--resume", "--steps", 3)


def test_export_replaces_regular_files_only(refused, ddpmx, run, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refused("export", run, "-o", tmp_path / "pipe.onnx")
    (tmp_path / "real.onnx").touch()
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    assert ddpmx("export", run, "-o", tmp_path / "link.onnx", "--no-parity", "--no-plan").code == 0
    assert (tmp_path / "link.onnx").is_symlink()
    assert (tmp_path / "real.onnx").stat().st_size > 1000


@pytest.mark.long
def test_a_failing_standard_output_does_not_stop_the_work(run, tmp_path):
    command = [sys.executable, "-m", "ddpmx_cli.main", "export", str(run), "--no-parity", "--no-plan", "-o"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, str(tmp_path / "a.onnx")], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert (tmp_path / "a.onnx").exists()
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # no arrows, no ×
    command = [sys.executable, "-m", "ddpmx_cli.main", "info", str(tmp_path / "a.onnx")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done


def test_too_little_memory_is_reported(refused, tmp_path, monkeypatch):
    from ddpm_export.training.train import Trainer

    def full(self):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert "--batch" in refused("train", "--data", FASHION, "--out", tmp_path / "run", *TINY, "--steps", 1)


@pytest.mark.parametrize("dtype", ["bool", "complex64", "int32"])
def test_weights_that_are_not_floats_are_refused(refused, copy, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file, save_file

    file = copy / "checkpoints" / "00000002" / "ema.safetensors"
    save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}, file)
    assert "floats" in refused("export", copy, "-o", tmp_path / "model.onnx")


def test_names_that_are_too_long_are_refused(refused, run):
    long = "a" * 300
    for command in (
        ("train", "--data", long),
        ("export", long),
        ("export", run, "-o", long),
        ("generate", "--engine", long),
    ):
        refused(*command)


def test_an_npz_may_hold_other_things_than_images(ddpmx, tmp_path):
    import zipfile

    data = tmp_path / "data.npz"
    data.write_bytes(npz(images=np.zeros((9, 8, 8), np.uint8), labels=np.zeros(9)))
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("LICENSE", "MIT")
    assert ddpmx("train", "--data", data, "--out", tmp_path / "run", *TINY, "--steps", 1).code == 0


def test_pipes_do_not_block(refused, tmp_path):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "a.png")
    os.mkfifo(tmp_path / "data.npz")
    for arguments in (("train", "--data", tmp_path / "images"), ("train", "--data", tmp_path / "data.npz")):
        refused(*arguments, "--out", tmp_path / "run", *TINY)
    refused("generate", "--engine", tmp_path / "data.npz", "--out", tmp_path / "samples")


def test_a_photograph_is_rotated_by_its_exif_orientation(ddpmx, tmp_path):
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "data" / "a.jpg", exif=exif)
    Image.new("RGB", (8, 16)).save(tmp_path / "data" / "b.jpg")
    done = ddpmx("train", "--data", tmp_path / "data", "--out", tmp_path / "run", *TINY, "--steps", 1)
    assert "16×8×3" in done.out, done


def test_a_folder_with_an_image_s_name_is_found_before_anything_is_written(refused, tmp_path):
    from conftest import GAUSSIAN_ONNX

    (tmp_path / "00001.png").mkdir()
    (tmp_path / "00000.png").write_text("mine")
    refused("generate", "--engine", GAUSSIAN_ONNX, "-n", 2, "--steps", 2, "--out", tmp_path)
    assert (tmp_path / "00000.png").read_text() == "mine"


def test_export_takes_one_precision(refused, run, tmp_path):
    err = refused("export", run, "--fp16", "--int8", "-o", tmp_path / "model.onnx")
    assert "--fp16 and --int8 exclude each other" in err
    assert "exclude each other" in refused("export", run, "--int8", "--fp8", "-o", tmp_path / "model.onnx")
    assert not list(tmp_path.glob("model*"))


def test_8_bits_are_not_calibrated_on_a_few_images(refused, run, tmp_path):
    np.savez(tmp_path / "few.npz", images=np.zeros((7, 16, 16, 1), np.uint8))
    err = refused("export", run, "--int8", "--no-parity", "--data", tmp_path / "few.npz", "-o", tmp_path / "model.onnx")
    assert "calibration takes 8 images or more, and there are 7" in err
    assert not list(tmp_path.glob("model*"))


def test_there_is_nothing_to_calibrate_in_an_untrained_network(refused, copy, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in copy.glob("checkpoints/*/ema.safetensors"):
        weights = load_file(file)
        last = {name: array * np.float32(1e-6) for name, array in weights.items() if name.startswith("conv_out")}
        save_file(weights | last, file)
    err = refused("export", copy, "--int8", "-o", tmp_path / "model.onnx")
    assert "nothing to calibrate 8 bits on" in err
    assert "train it first" in err
    assert not list(tmp_path.glob("model*"))


@pytest.mark.long
def test_export_in_8_bits(ddpmx, run, tmp_path):
    """test_export.py of ddpm_export/quantize has its parts."""
    done = ddpmx("export", run, "--int8", "--no-plan", "-o", tmp_path / "model.onnx")
    assert done.code == 0, done
    for part in ("int8, 16×16×1", "% of the multiplications; calibrated on", "8 bits are judged by their chain"):
        assert part in done.out
    assert (
        ddpmx("generate", "--engine", tmp_path / "model.onnx", "-n", 2, "--steps", 3, "--out", tmp_path / "s").code == 0
    )
