"""`ddpmx generate` by many processes, and into files of many images."""

from __future__ import annotations

import io
import sys
import tarfile
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from ddpmx import load
from ddpmx.images.conditions import read_conditions
from ddpmx.scale import on_ray
from oracles.fake_ray import FakeRay

QUICK = ("--steps", 3, "--batch", 4)
SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    """These tests may themselves be run by one."""
    for name in (*SLURM, "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", [(), ("--format", "tar", "--per-file", 8)], ids=["png", "tar"])
def test_the_union_of_the_shards_is_the_single_run(ddpmx, monkeypatch, gaussian_onnx, tmp_path, form):
    common = ("generate", gaussian_onnx, "-n", 30, "--seed", 5, *QUICK, *form, "--out")
    assert ddpmx(*common, tmp_path / "single", *(() if form else ("--format", "png"))).code == 0
    for index in range(3):
        for name, value in (SLURM | {"SLURM_PROCID": str(index)}).items():
            monkeypatch.setenv(name, value)
        done = ddpmx(*common, tmp_path / "shards", "--shard", "auto")
        assert done.code == 0, done
        assert f"shard {index} of 3 (by SLURM_PROCID and SLURM_NTASKS): images " in done.out
    assert content(tmp_path / "shards") == content(tmp_path / "single")
    if not form:
        assert ddpmx(*common, tmp_path / "plain").code == 0
        del (images := content(tmp_path / "single"))["run.json"]
        assert images == content(tmp_path / "plain")


def test_the_same_command_again_draws_what_is_left(ddpmx, gaussian_onnx, tmp_path):
    command = ("generate", gaussian_onnx, "-n", 20, *QUICK, "--format", "npz", "--per-file", 8, "--out", tmp_path)
    assert "20 images, 3 steps" in ddpmx(*command).out
    whole = content(tmp_path)
    assert sorted(whole) == [*(f"images-00000{number}.npz" for number in range(3)), "run.json"]
    (tmp_path / "images-000001.npz").unlink()
    (tmp_path / "images-000000.npz").write_bytes(b"cut")
    done = ddpmx(*command)
    assert (
        "Note: 1 file not whole, drawn again: images-000000.npz\n4 images there already, 16 images to draw" in done.out
    )
    (tmp_path / "images-000001.npz").unlink()
    done = ddpmx(*command)
    assert "not whole" not in done.out
    assert "12 images there already, 8 images to draw" in done.out
    assert "8 images, 3 steps" in done.out
    assert content(tmp_path) == whole
    done = ddpmx(*command)
    assert (done.code, done.out) == (0, "20 images there already, 0 images to draw\n")


def test_classes_and_conditions_go_by_the_index(ddpmx, conditioned_onnx, tmp_path):
    path = conditioned_onnx("all")
    np.savez(tmp_path / "cond.npz", cond=np.random.default_rng(0).uniform(-1, 1, (3, 2, 8, 8)).astype(np.float32))
    command = (
        "generate",
        path,
        "-n",
        12,
        *QUICK,
        "--labels",
        "4,1",
        "--cond",
        tmp_path / "cond.npz",
        "--format",
        "tar",
    )
    for shard in ("0/2", "1/2"):
        done = ddpmx(*command, "--shard", shard, "--per-file", 4, "--out", tmp_path / "out")
        assert done.code == 0, done
    with load(path) as pipeline:
        cond = read_conditions(tmp_path / "cond.npz", pipeline.spec)[0]
        how = {"steps": 3, "sampler": "unipc", "spacing": "trailing", "batch": 4}
        wanted = pipeline.generate(12, labels=[4, 1] * 6, cond=np.concatenate([cond] * 4), **how)
    found = {}
    for file in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(file) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    for index in range(12):
        image = np.asarray(Image.open(io.BytesIO(found[f"{index:08d}.png"])))
        np.testing.assert_array_equal(image, wanted[index])
        assert int(found[f"{index:08d}.cls"]) == (4, 1)[index % 2]


def test_addresses_are_written_to_by_fsspec(ddpmx, gaussian_onnx, tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="not verified here: addresses (there is no fsspec)")
    address = f"memory://{uuid4().hex}/images"
    command = ("generate", gaussian_onnx, "-n", 8, *QUICK, "--out")
    done = ddpmx(*command, address, "--format", "tar", "--per-file", 4)
    assert done.code == 0, done
    assert ddpmx(*command, tmp_path / "here", "--format", "tar", "--per-file", 4).code == 0
    assert "8 images there already" in ddpmx(*command, address, "--format", "tar", "--per-file", 4).out
    files = fsspec.filesystem("memory")
    there = {name.rsplit("/", 1)[1]: files.cat(name) for name in files.find(address)}
    assert there == content(tmp_path / "here")
    assert ddpmx(*command, f"{address}/png").code == 0
    assert len(files.find(f"{address}/png")) == 9
    assert "8 images there already" in ddpmx(*command, f"{address}/png").out
    assert ddpmx(*command, f"file://{tmp_path}/there").code == 0
    assert len(content(tmp_path / "there")) == 9


def test_models_are_not_mixed(ddpmx, refused, gaussian_onnx, conditioned_onnx, tmp_path):
    command = ("-n", 8, *QUICK, "--format", "png", "--out", tmp_path / "out")
    assert ddpmx("generate", gaussian_onnx, *command).code == 0
    before = content(tmp_path / "out")
    assert "run.json: model" in refused("generate", conditioned_onnx("itself"), *command)
    assert "seed 0, and now 1" in refused("generate", gaussian_onnx, "--seed", 1, *command)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "4/4"], "there is no shard 4/4"),
        (["--shard", "x"], "neither i/n nor auto"),
        (["--shard", "auto"], "nothing says which shard"),
        (["--format", "jpeg"], "there is no --format 'jpeg'"),
        (["--per-file", 8], "--per-file is for files of many images"),
        (["--format", "tar", "--per-file", 0], "--per-file must be at least 1"),
        (["--format", "tar", "--per-file", 6], "no multiple of the batch of 4"),
        (["--format", "tar", "--per-file", 8, "--first", 4], "--first 4 is within a file"),
        (["--format", "tar", "-n", 0], "n must be a whole number"),
        (["--format", "tar", "-n", 1 << 32, "--first", 1024], "is beyond that"),
        (["--shard", "0/2", "--grid"], "--grid is for images that are drawn in one go"),
        (["--shard", "0/2", "--animate"], "--animate is for images"),
        (["--shard", "0/2", "--strip"], "--strip is for images"),
        (["--shard", "0/2", "--overwrite"], "--overwrite is for images"),
        (["--shard", "0/2", "--init", "x.png"], "--init is for images"),
        (["--shard", "0/2", "--share-from", 5], "--share-from is for images"),
        (["--shard", "0/2", "--strength", 0.5], "--strength is for --init only"),
        (["--shard", "0/2", "--out", "x.png"], "--out x.png is one file"),
        (["--out", ""], "--out is empty"),
        (["--workers", 2], "--workers is for --ray only"),
        (["--ray", "local", "--workers", 0], "--workers must be from 1"),
        (["--ray", "somewhere"], "--ray 'somewhere' is no address"),
        (["--ray", "local", "--grid"], "--grid is for images"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_flags_are_refused_and_nothing_is_written(refused, gaussian_onnx, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("generate", gaussian_onnx, *QUICK, *flags)
    assert content(tmp_path) == {}


def test_images_of_another_run_are_refused_with_a_hint_that_shards_can_follow(ddpmx, refused, gaussian_onnx, tmp_path):
    """They have no --overwrite, which a plain generate hints at."""
    out = tmp_path / "many"
    assert ddpmx("generate", gaussian_onnx, *QUICK, "--seed", 5, "--out", out).code == 0
    said = refused("generate", gaussian_onnx, *QUICK, "--shard", "0/1", "--out", out)
    assert "refusing to mix the images of two runs" in said
    assert "Hint: another --out\n" in said


def test_parquet_without_pyarrow_is_refused_before_the_model_is_opened(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = refused("generate", "garments", "--format", "parquet", "--out", tmp_path / "out")
    assert "Parquet files are written by pyarrow" in error
    assert "pip install 'ddpmx[data]'" in error
    assert not (tmp_path / "out").exists()


def test_ray_s_workers_draw_the_same_files(ddpmx, monkeypatch, gaussian_onnx, tmp_path):
    ray = FakeRay(cpus=(2,), deaths=[(1, 1)])
    monkeypatch.setattr(on_ray, "_import_ray", lambda: ray)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(gaussian_onnx.read_bytes())
    command = ("generate", "model.onnx", "-n", 22, *QUICK, "--threads", 1, "--format")
    for form in ("png", "tar"):
        done = ddpmx(*command, form, "--out", form, "--ray", "local", "--workers", 2)
        assert done.code == 0, done
        assert "22 images, 3 steps" in done.out
        assert "workers by Ray, onnxruntime" in done.out or "1 worker by Ray" in done.out
        assert ddpmx(*command, form, "--out", f"{form} here").code == 0
        assert content(tmp_path / form) == content(tmp_path / f"{form} here")
        assert "22 images there already" in ddpmx(*command, form, "--out", form, "--ray", "local").out
    assert ray.started[0]["num_cpus"] >= 2
    assert ray.started[0]["include_dashboard"] is False


def test_without_ray_nothing_is_drawn(refused, monkeypatch, gaussian_onnx, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused("generate", gaussian_onnx, *QUICK, "--out", tmp_path, "--ray", "local")
    assert "pip install 'ddpmx[ray]'" in error


def test_more_shards_than_batches_is_no_error(ddpmx, gaussian_onnx, tmp_path):
    done = ddpmx("generate", gaussian_onnx, "-n", 4, *QUICK, "--shard", "0/2", "--out", tmp_path)
    assert done.code == 0
    assert "shard 0 of 2: no images of 0…3" in done.out
    assert "nothing to do" in done.out


def test_triton_writes_a_repository(ddpmx, refused, gaussian_onnx, tmp_path):
    out = tmp_path / "repository"
    done = ddpmx("triton", gaussian_onnx, "-o", out, "--name", "toy", "--batch", 4)
    assert done.code == 0, done
    assert f"{out}: toy, toy_eps; " in done.out
    assert f"tritonserver --model-repository={out}" in done.out
    assert "exists already" in refused("triton", gaussian_onnx, "-o", out, "--name", "toy")
    assert "cannot be called" in refused("triton", gaussian_onnx, "-o", out, "--name", "a b")
    assert "--threads must be" in refused("triton", gaussian_onnx, "-o", out, "--threads", -1)
    assert sorted(path.name for path in out.iterdir()) == ["toy", "toy_eps"]
