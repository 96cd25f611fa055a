"""model.onnx → model.mnn: a file that says what it is, made without a network, and nothing lost where that fails."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddpmx.errors import BackendError, Cancelled, FileFormatError, InputError, OutputError, SpecError
from ddpmx.formats.mnn_file import read_mnn
from ddpmx.formats.model_file import sha256
from ddpmx.formats.spec import ModelSpec
from ddpmx.mnn import build as mnn_build
from ddpmx.mnn import library
from ddpmx.mnn.build import build, default_part
from oracles import conditioning, gaussian

try:
    library.load()
except BackendError as why:
    pytest.skip(f"not verified here: MNN's converter ({why.fact})", allow_module_level=True)


@pytest.fixture
def onnx(tmp_path, gaussian_onnx) -> Path:
    return Path(shutil.copy(gaussian_onnx, tmp_path / "model.onnx"))


def test_the_file_says_what_it_is(onnx):
    built = build(onnx)
    info = read_mnn(onnx.with_suffix(".mnn"))
    assert info == built.info
    assert info.spec == gaussian.SPEC
    assert info.record.onnx == sha256(onnx)
    assert (info.record.source, info.record.part) == ("model.onnx", 8)
    assert info.record.version == library.load().version()
    assert not built.reused


@pytest.mark.parametrize(("side", "part"), [(8, 8), (16, 8), (28, 8), (32, 4), (48, 4), (64, 1), (256, 1)])
def test_small_images_share_a_call(side, part):
    assert default_part((3, side, side)) == part


def test_a_file_that_is_there_is_not_made_again(onnx):
    first = build(onnx)
    before = first.info.record
    assert build(onnx).reused
    assert not build(onnx, force=True).reused
    assert build(onnx, part=2).info.record.part == 2
    assert not build(onnx).reused, "it had another part"
    assert build(onnx, low_memory=True).info.record.memory == "low"
    assert not build(onnx).reused, "it had little memory"
    onnx.with_suffix(".mnn").write_bytes(b"")
    again = build(onnx).info.record  # MNN's converter gives each file a random number
    assert dataclasses.replace(again, network=before.network) == before


def test_free_betas_travel_in_the_file(tmp_path):
    import numpy as np

    spec = ModelSpec((3, 8, 8), timesteps=20, schedule="betas", betas=np.linspace(1e-4, 0.4, 20), ddpmx="0.1.0")
    from ddpmx.formats.onnx_file import metadata

    (tmp_path / "m.onnx").write_bytes(conditioning.onnx(spec, metadata=metadata(spec)))
    assert np.array_equal(build(tmp_path / "m.onnx").info.spec.betas, spec.betas)


# --- nothing is installed, sent or printed ---------------------------------------------------------------------------

_WATCHED = """
import os, socket, subprocess, sys
log = open(os.environ["WATCHED"], "a", buffering=1)
log.write(f"python {os.path.basename(sys.argv[0])}\\n")
def refuse(*args, **kwargs):
    log.write("socket\\n")
    raise OSError("the network is cut off")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
start = subprocess.Popen.__init__
def started(self, args, *rest, **kwargs):
    log.write(f"process {args if isinstance(args, str) else ' '.join(map(str, args))[:200]!r}\\n")
    start(self, args, *rest, **kwargs)
subprocess.Popen.__init__ = started
real = os.system
def system(command):
    log.write(f"process {command!r}\\n")
    return 1
os.system = system
"""


def watched(tmp_path: Path, code: str) -> list[str]:
    """Run Python with the network cut off and pip shadowed; what it and its own processes tried."""
    folder = tmp_path / "watch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_WATCHED)
    (folder / "pip.py").write_text("import os; open(os.environ['WATCHED'], 'a').write('pip\\n')")
    (folder / "pip").write_text('#!/bin/sh\necho pip >> "$WATCHED"\n')
    (folder / "pip").chmod(0o755)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "WATCHED": str(tmp_path / "watched"),
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    return (tmp_path / "watched").read_text().splitlines()


def test_nothing_is_installed_or_sent(onnx, tmp_path):
    seen = watched(tmp_path, f"from ddpmx.mnn.build import build; build({str(onnx)!r})")
    assert len([line for line in seen if line.startswith("python")]) == 2, "this process, and the converter's"
    assert len([line for line in seen if line.startswith("process")]) == 1, seen
    assert not {"pip", "socket"} & set(seen), seen
    assert onnx.with_suffix(".mnn").is_file()


@pytest.mark.slow
def test_mnns_own_command_would_install_and_send(onnx, tmp_path):  # control
    """Of MNN 3.6.1, without the logging library."""
    words = ["mnnconvert", "-f", "ONNX", "--modelFile", str(onnx), "--MNNModel", str(tmp_path / "x.mnn")]
    code = f"import sys; sys.argv = {words!r}; from MNN.tools import mnnconvert; mnnconvert.main()"
    seen = watched(tmp_path, code)
    assert any("pip" in line for line in seen), seen


def test_the_converter_prints_nothing_here(onnx, capfd):
    build(onnx)
    assert capfd.readouterr() == ("", "")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_converted(onnx, tmp_path, monkeypatch):
    spec = gaussian.SPEC.replace(precision="bf16")
    (tmp_path / "b.onnx").write_bytes(conditioning.onnx(spec, metadata={"ddpmx": spec.to_text()}))
    with pytest.raises(InputError, match="bfloat16"):
        build(tmp_path / "b.onnx")
    (tmp_path / "n.onnx").write_bytes(conditioning.onnx(gaussian.SPEC, metadata={}))
    with pytest.raises(SpecError):
        build(tmp_path / "n.onnx")
    assert build(tmp_path / "n.onnx", spec=gaussian.SPEC).info.spec == gaussian.SPEC
    with pytest.raises(FileFormatError, match="not an ONNX file"):
        build(tmp_path / "n.mnn")
    for part in (0, 65, 1.5, True):
        with pytest.raises(InputError, match="part must be"):
            build(onnx, part=part)
    assert not onnx.with_suffix(".mnn").exists()


def test_nothing_else_is_overwritten(onnx, tmp_path):
    (tmp_path / "mine.mnn").write_text("my notes")
    for output in (tmp_path / "mine.mnn", onnx):
        before = output.read_bytes()
        with pytest.raises(OutputError, match="refusing to overwrite"):
            build(onnx, output)
        assert output.read_bytes() == before
    with pytest.raises(OutputError, match="is a folder"):
        build(onnx, tmp_path)
    with pytest.raises(OutputError, match="there is no folder"):
        build(onnx, tmp_path / "missing" / "x.mnn")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "exit code 3: it said nothing"),
        ("print('Error: op Foo is not supported')", "exit code 0: Error: op Foo is not supported"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
    ],
)
def test_a_converter_that_fails_leaves_the_old_file(onnx, monkeypatch, code, words):
    build(onnx)
    before = onnx.with_suffix(".mnn").read_bytes()
    monkeypatch.setattr(mnn_build, "_CONVERT", code)
    with pytest.raises(BackendError, match="cannot convert this file") as caught:
        build(onnx, force=True)
    assert words in str(caught.value.note)
    assert onnx.with_suffix(".mnn").read_bytes() == before
    assert sorted(path.name for path in onnx.parent.iterdir()) == ["model.mnn", "model.onnx"]


def test_a_file_that_the_converter_cut_short_leaves_the_old_one(onnx, monkeypatch):
    """MNN's converter ends with 0 on a full disk."""
    build(onnx)
    before = onnx.with_suffix(".mnn").read_bytes()
    cut = (
        "\nimport os; file = sys.argv[sys.argv.index('--MNNModel') + 1]; os.truncate(file, os.path.getsize(file) // 2)"
    )
    monkeypatch.setattr(mnn_build, "_CONVERT", mnn_build._CONVERT + cut)
    with pytest.raises(BackendError, match="wrote a file that MNN refuses"):
        build(onnx, force=True)
    assert onnx.with_suffix(".mnn").read_bytes() == before


def test_a_conversion_can_be_cancelled(onnx, monkeypatch):
    monkeypatch.setattr(mnn_build, "_CONVERT", "import time; time.sleep(60)")
    calls = iter([False, True])
    with pytest.raises(Cancelled):
        build(onnx, cancel=lambda: next(calls))
    assert not onnx.with_suffix(".mnn").exists()


def test_an_mnn_without_its_converter_is_named(onnx, monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "MNN" / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec if name == "MNN" else None)
    with pytest.raises(BackendError, match="comes without its converter"):
        build(onnx)


def test_an_old_mnn_is_named(onnx, monkeypatch):
    class Old:
        @staticmethod
        def version():
            return "2.9.1"

    monkeypatch.setitem(sys.modules, "MNN", Old)
    with pytest.raises(BackendError, match="too old"):
        build(onnx)


def test_a_full_disk_for_temporary_files_is_an_error_about_the_output(onnx, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(OutputError, match=r"model\.mnn: cannot be written") as caught:
        build(onnx)
    assert caught.value.note == "No space left on device; nothing was left behind"
