"""A checkpoint comes back bit for bit, is whole or not there, and says plainly what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="not verified here: checkpoints (no torch)")

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm_export.networks.unet import UNet, UNetConfig
from ddpm_export.training import checkpoint, tensor_files
from ddpm_export.training.checkpoint import TrainingState, checkpoints, load_network, load_training, newest_run, resolve
from ddpmx.errors import DdpmxError, FileFormatError, OutputError
from ddpmx.formats.spec import ModelSpec

pytestmark = pytest.mark.torch

NETWORK = UNetConfig(1, 1, (8, 8), 8, (1, 2), 1, (4,), 0.1, 4)
SPEC = ModelSpec((1, 8, 8), timesteps=20, prediction="v")


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(tensor) for name, tensor in UNet(NETWORK).state_dict().items()}


def save(run: Path, step: int, *, seed: int | None = None, keep: int = 2) -> Path:
    """A checkpoint whose weights follow from ``seed``, by default the step."""
    seed = step if seed is None else seed
    moments = {f"exp_avg.{name}": tensor for name, tensor in weights(seed + 2).items()}
    state = TrainingState(step, {"train": {"lr": 0.1}}, moments)
    return checkpoint.save(run, SPEC, NETWORK, weights(seed), weights(seed + 1), state, keep=keep)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


# --- there and back --------------------------------------------------------------------------------------------------


def test_weights_come_back_bit_for_bit(run):
    path = save(run, 7)
    for which, wanted in (("raw", weights(7)), ("ema", weights(8))):
        network, spec = load_network(path, which)
        assert same(network.state_dict(), wanted)
        assert network.config == NETWORK
        assert spec.replace(weights=None) == SPEC
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
    state = load_training(path)
    assert state.step == 7
    assert state.settings == {"train": {"lr": 0.1}}
    assert same(state.moments, {f"exp_avg.{name}": tensor for name, tensor in weights(9).items()})


def test_the_averaged_weights_are_what_is_loaded_and_hashed(run):
    save(run, 7)
    network, spec = load_network(run)
    assert same(network.state_dict(), weights(8))
    assert spec.weights == checkpoint.weights_hash(weights(8))


def test_the_hash_of_weights_is_of_names_shapes_and_values():
    once = checkpoint.weights_hash({"a": torch.arange(6.0), "b": torch.zeros(2)})
    assert checkpoint.weights_hash({"b": torch.zeros(2), "a": torch.arange(6.0)}) == once
    for other in (
        {"a": torch.arange(6.0), "c": torch.zeros(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([0, 1e-45])},
    ):
        assert checkpoint.weights_hash(other) != once


def test_nothing_is_pickled(run):
    """What is on disk is JSON, and safetensors: eight bytes of length, a JSON header, numbers."""
    path = save(run, 1)
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {file.parent for file in files} == {path}
    assert len(files) == 5
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".json":
            json.loads(data)
        else:
            assert file.suffix == ".safetensors"
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            sizes = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            assert max(sizes) == len(data) - 8 - length


# --- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(run, keep):
    for step in (5, 10, 15, 20):
        save(run, step, keep=keep)
    assert [load_training(path).step for path in checkpoints(run)] == [5, 10, 15, 20][-keep:]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {path.name for path in checkpoints(run)}


def test_newest_is_the_one_with_most_steps(run):
    for step in (99, 1000, 100):  # neither the last written nor the last in the order of text
        save(run, step, keep=9)
    assert [load_training(path).step for path in checkpoints(run)] == [99, 100, 1000]
    assert resolve(run) == checkpoints(run)[-1]
    assert load_training(run).step == 1000


def test_a_hundred_million_steps_are_more_than_ninety_nine(run):
    """From here on the folder's name has nine digits."""
    save(run, 99_999_999)
    save(run, 100_000_000)
    assert load_training(run).step == 100_000_000


def test_the_same_step_again_replaces_its_checkpoint(run):
    save(run, 5, seed=0)
    save(run, 5, seed=100)
    assert len(checkpoints(run)) == 1
    assert same(load_network(run, "raw")[0].state_dict(), weights(100))


def test_a_run_or_one_of_its_checkpoints(run):
    early, late = save(run, 1), save(run, 2)
    assert resolve(run) == late
    assert resolve(early) == early
    assert same(load_network(early, "raw")[0].state_dict(), weights(1))
    assert same(load_network(run, "raw")[0].state_dict(), weights(2))


def test_paths_without_a_checkpoint_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "missing"):
        with pytest.raises(FileFormatError, match=name):
            resolve(tmp_path / name)


def test_the_newest_run_is_the_one_that_saved_last(tmp_path):
    with pytest.raises(FileFormatError, match="no run"):
        newest_run(tmp_path)
    first, second = save(tmp_path / "b", 10), save(tmp_path / "a", 3)
    (tmp_path / "c").mkdir()
    times = {first: 1000, second: 2000}
    for path, seconds in times.items():
        os.utime(path, (seconds, seconds))
    assert newest_run(tmp_path) == tmp_path / "a"


# --- damage ----------------------------------------------------------------------------------------------------------


def edit_tensors(name: str, change):
    def damage(path: Path) -> None:
        tensors = load_file(path / name)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path / name)

    return damage


def edit_json(name: str, change):
    def damage(path: Path) -> None:
        values = json.loads((path / name).read_text())
        change(values)
        (path / name).write_text(json.dumps(values))

    return damage


def overwrite(name: str, change):
    def damage(path: Path) -> None:
        (path / name).write_bytes(change((path / name).read_bytes()))

    return damage


def remove(name: str):
    return lambda path: (path / name).unlink()


EMA = "ema.safetensors"
TENSOR_DAMAGE = {
    "missing file": remove(EMA),
    "empty file": overwrite(EMA, lambda data: b""),
    "cut off": overwrite(EMA, lambda data: data[: len(data) // 2]),
    "cut off in the header": overwrite(EMA, lambda data: data[:100]),
    "one byte short": overwrite(EMA, lambda data: data[:-1]),
    "one byte long": overwrite(EMA, lambda data: data + b"\0"),
    "foreign": overwrite(EMA, lambda data: b"<html>" * 1000),
    "a pickle": overwrite(EMA, lambda data: b"\x80\x04K\x01."),
    "absurd header": overwrite(EMA, lambda data: b"\xff" * 8 + data[8:]),
    "missing tensor": edit_tensors(EMA, lambda tensors: tensors.pop("conv_in.bias")),
    "surplus tensor": edit_tensors(EMA, lambda tensors: tensors.update(more=torch.zeros(1))),
    "renamed tensor": edit_tensors(EMA, lambda tensors: tensors.update(more=tensors.pop("conv_in.bias"))),
    "wrong shape": edit_tensors(EMA, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(9)})),
    "NaN": edit_tensors(EMA, lambda tensors: tensors["conv_out.weight"][0, 0, 0].fill_(torch.nan)),
    "infinity": edit_tensors(EMA, lambda tensors: tensors["conv_out.bias"].fill_(-torch.inf)),
}
SPEC_DAMAGE = {
    "empty": overwrite("spec.json", lambda data: b""),
    "cut off": overwrite("spec.json", lambda data: data[:-9]),
    "no text": overwrite("spec.json", lambda data: b"\xff\xfe\x00"),
    "a list": overwrite("spec.json", lambda data: b"[]"),
    "NaN": overwrite("spec.json", lambda data: data.replace(b"1.0", b"NaN", 1)),
    "too deep": overwrite("spec.json", lambda data: b"[" * 100_000),
    "too large": overwrite("spec.json", lambda data: data + b" " * (1 << 20)),
    "no model": edit_json("spec.json", lambda values: values.pop("model")),
    "no network": edit_json("spec.json", lambda values: values.pop("network")),
    "another network": edit_json("spec.json", lambda values: values["network"].update(type="transformer")),
    "unknown field": edit_json("spec.json", lambda values: values["network"].update(tails=4)),
    "impossible network": edit_json("spec.json", lambda values: values["network"].update(groups=3)),
    "huge network": edit_json("spec.json", lambda values: values["network"].update(channels=65536)),
    "another image": edit_json("spec.json", lambda values: values["model"].update(shape=[1, 16, 16])),
    "another schedule": edit_json("spec.json", lambda values: values["model"].update(schedule="cosine")),
    "text for a number": edit_json("spec.json", lambda values: values["model"].update(timesteps="20")),
}
TRAINING_DAMAGE = {
    "missing": remove("training.json"),
    "cut off": overwrite("training.json", lambda data: data[:-5]),
    "a list": overwrite("training.json", lambda data: b"[]"),
    "no step": edit_json("training.json", lambda values: values.pop("step")),
    "step of text": edit_json("training.json", lambda values: values.update(step="5")),
    "step below 0": edit_json("training.json", lambda values: values.update(step=-5)),
    "settings of text": edit_json("training.json", lambda values: values.update(settings="x")),
    "no moments": remove("training.safetensors"),
    "moments cut off": overwrite("training.safetensors", lambda data: data[: len(data) // 2]),
}


def one_error(function, path: Path) -> DdpmxError:
    with pytest.raises(DdpmxError) as caught:
        function(path)
    assert len(caught.value.fact.splitlines()) == 1
    return caught.value


@pytest.mark.slow
@pytest.mark.parametrize("damage", TENSOR_DAMAGE.values(), ids=TENSOR_DAMAGE)
def test_damaged_weights(run, damage):
    path = save(run, 5)
    load_network(path)
    damage(path)
    error = one_error(load_network, path)
    assert str(path / EMA) in error.fact
    load_network(path, "raw")  # the other file is still good


@pytest.mark.parametrize("damage", SPEC_DAMAGE.values(), ids=SPEC_DAMAGE)
def test_damaged_spec(run, damage):
    path = save(run, 5)
    damage(path)
    assert one_error(load_network, path).fact


@pytest.mark.parametrize("damage", TRAINING_DAMAGE.values(), ids=TRAINING_DAMAGE)
def test_damaged_training_state(run, damage):
    path = save(run, 5)
    damage(path)
    assert "training" in one_error(load_training, path).fact
    load_network(path)  # can still be exported


def test_a_spec_of_a_huge_network_takes_no_memory(run):
    """The network is built without memory until the file has shown that it holds the weights."""
    path = save(run, 5)
    edit_json("spec.json", lambda values: values["network"].update(channels=65536, multipliers=[64, 64]))(path)
    assert "the weights do not match the network" in one_error(load_network, path).fact


def test_half_precision_weights_are_taken_as_float32(run):
    path = save(run, 5)
    save_file({name: tensor.half() for name, tensor in load_file(path / EMA).items()}, path / EMA)
    network, _ = load_network(path)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


# --- while writing ---------------------------------------------------------------------------------------------------


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["ENOSPC", "SafetensorError", "Ctrl-C"],
)
def test_a_failure_while_writing_leaves_all_as_it_was(run, monkeypatch, error, kind, at):
    save(run, 5)
    save(run, 10)
    before = names(run)
    calls = []

    def failing(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > at:
            raise error
        save_file(tensors, path, metadata)

    monkeypatch.setattr(tensor_files, "save_file", failing)
    with pytest.raises(kind) as caught:
        save(run, 15)
    if kind is OutputError:
        assert "00000015" in caught.value.fact
        assert "No space left" in str(caught.value)
    assert names(run) == before
    monkeypatch.undo()
    assert same(load_network(run, "raw")[0].state_dict(), weights(10))


def test_what_a_killed_run_left_behind_is_removed(run):
    save(run, 5)
    part = run / "checkpoints" / ".part-abc"
    part.mkdir()
    (part / "spec.json").write_text("{}")
    assert load_training(run).step == 5
    save(run, 10)
    assert not part.exists()


def test_what_a_killed_run_was_about_to_replace_comes_back(run):
    """Killed between the two renames: the checkpoint is aside, whole, and nothing has its name."""
    save(run, 5)
    aside = run / "checkpoints" / ".old-abc"
    aside.mkdir()
    (run / "checkpoints" / "00000005").rename(aside / "00000005")
    assert checkpoints(run) == []
    save(run, 10)
    assert [path.name for path in checkpoints(run)] == ["00000005", "00000010"]
    assert not aside.exists()
    load_network(run / "checkpoints" / "00000005")


@pytest.mark.parametrize("again", [False, True], ids=["an old one", "the same step"])
def test_killed_while_it_removes_a_checkpoint(run, monkeypatch, again):
    """Removing a folder takes a while, file after file: meanwhile it must not look like a checkpoint."""
    save(run, 5)
    save(run, 10)

    def killed_after_one_file(path, **_):
        (Path(path) / EMA).unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed_after_one_file)
    with pytest.raises(KeyboardInterrupt):
        save(run, 10 if again else 15)
    monkeypatch.undo()
    assert checkpoints(run)
    for path in checkpoints(run):
        load_network(path)


def test_a_reader_whose_checkpoint_was_removed_reads_the_newer_one(run, monkeypatch):
    save(run, 5)
    read_tensors = checkpoint.read_tensors

    def slowly(file: Path):
        monkeypatch.setattr(checkpoint, "read_tensors", read_tensors)
        save(run, 10, keep=1)
        return read_tensors(file)

    monkeypatch.setattr(checkpoint, "read_tensors", slowly)
    assert same(load_network(run, "raw")[0].state_dict(), weights(10))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(OutputError):
        save(tmp_path / "run", 1)


@pytest.mark.slow
def test_a_reader_sees_only_whole_checkpoints_during_writing(run):
    """One thread saves as fast as it can and removes old checkpoints; every read in between succeeds, with spec and
    weights of one checkpoint."""
    tensors = [weights(seed) for seed in range(3)]
    steps = 40

    def write(first: int, last: int) -> None:
        for step in range(first, last):
            values = tensors[step % 3]
            checkpoint.save(run, SPEC, NETWORK, values, values, TrainingState(step, {}, values))

    write(0, 1)
    writer = threading.Thread(target=write, args=(1, steps))
    writer.start()
    reads = 0
    try:
        while writer.is_alive():
            network, spec = load_network(run)
            assert spec.weights == checkpoint.weights_hash(network.state_dict()), "spec and weights of one checkpoint"
            reads += 1
    finally:
        writer.join()
    assert reads > 5
    assert load_training(run).step == steps - 1, "the writer did not fail"
