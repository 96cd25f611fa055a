"""The folder that is written: complete, of the right tables, and nothing of it where something is wrong."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from ddpmx.errors import FileFormatError, InputError, OutputError
from ddpmx.formats import onnx_file
from ddpmx.page.site import WASM_FILES, WEBGPU_FILES, write_site
from ddpmx.sampling.request import Sampling
from oracles import conditioning


@pytest.fixture
def model(tmp_path):
    def make(kind: str = "classes", **changes):
        spec = conditioning.spec_of(kind, **changes)
        path = tmp_path / "model.onnx"
        path.write_bytes(conditioning.onnx(spec, metadata=onnx_file.metadata(spec)))
        return path, spec

    return make


@pytest.fixture
def ort(tmp_path):
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in WASM_FILES:
        (folder / name).write_text(name)
    return folder


def read(site):
    return json.loads((site / "model.json").read_text())


def test_a_site_is_whole(model, ort, tmp_path):
    path, spec = model(weights="5a" * 32, class_names=("cats", "dogs", "owls", "<b>", "x"), null_class=True)
    site = tmp_path / "site"
    written = write_site(path, site, ort=ort, name="a & b", steps=(7, 20, 300))
    assert {file.relative_to(site).as_posix() for file in written} == {
        *("index.html", "page.css", "page.js", "worker.js", "chain.js", "sw.js", "model.json", "model.onnx"),
        *(f"ort/{name}" for name in WASM_FILES),
    }
    found = read(site)
    assert (site / "model.onnx").read_bytes() == path.read_bytes()
    assert found["sha256"] == "5a" * 32  # of the weights, as ddpmx info says it
    assert (found["name"], found["ort"], found["webgpu"]) == ("a & b", "ort/", False)
    assert found["spec"]["class_names"] == ["cats", "dogs", "owls", "<b>", "x"]
    assert list(found["chains"]) == ["7", "20"]  # T = 20 is the whole chain
    for steps, chain in found["chains"].items():
        sampling = Sampling.chosen(20, steps=None if steps == "20" else int(steps))
        table = sampling.table(spec)
        assert chain["sampler"] == sampling.sampler
        for name, wanted in (("timesteps", table.timesteps), ("rows", table.rows), ("memory", table.memory)):
            assert (name in chain) == (wanted is not None)
            if wanted is not None:
                kind = "<i4" if name == "timesteps" else "<f4"
                np.testing.assert_array_equal(
                    np.frombuffer(base64.b64decode(chain[name]), kind), wanted.astype(kind).ravel()
                )
    kept = json.loads(re.search(r"FILES = (\[.*\]);", (site / "sw.js").read_text())[1])
    assert all((site / name).is_file() for name in kept)
    assert {file.relative_to(site).as_posix() for file in written} - set(kept) == {"sw.js"}


def test_another_model_is_another_version_of_what_browsers_keep(model, tmp_path):
    versions = []
    for factor in (1, 2):
        write_site(model(timesteps=20 * factor)[0], tmp_path / f"site{factor}")
        versions.append(re.search(r'"ddpmx-" \+ "(\w{16})"', (tmp_path / f"site{factor}" / "sw.js").read_text())[1])
    assert versions[0] != versions[1]
    found = read(tmp_path / "site1")
    assert found["ort"].startswith("https://")
    assert found["ort"] + WASM_FILES[0] in (tmp_path / "site1" / "sw.js").read_text()


def test_webgpu_goes_along_where_it_is_there(model, ort, tmp_path):
    for name in WEBGPU_FILES:
        (ort / name).write_text(name)
    written = write_site(model()[0], tmp_path / "site", ort=ort)
    assert set(WEBGPU_FILES) < {file.name for file in written}
    assert read(tmp_path / "site")["webgpu"]
    assert WEBGPU_FILES[2] not in (tmp_path / "site" / "sw.js").read_text()  # large, and kept once it is used


def test_what_no_page_can_be_made_of(model, ort, tmp_path, monkeypatch):
    path, _ = model("condition")
    site = tmp_path / "site"
    with pytest.raises(InputError, match="no condition image"):
        write_site(path, site)
    path, _ = model()
    (ort / WASM_FILES[2]).unlink()
    with pytest.raises(InputError, match=r"not the files of onnxruntime-web: ort-wasm-simd-threaded\.wasm missing"):
        write_site(path, site, ort=ort)
    with pytest.raises(FileFormatError, match="no such folder"):
        write_site(path, site, ort=tmp_path / "nowhere")
    with pytest.raises(FileFormatError):
        write_site(tmp_path / "nowhere.onnx", site)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"browsers run ONNX files, and this is a run"):
        write_site(tmp_path / "run", site)
    monkeypatch.setattr("ddpmx.page.site._LARGEST_MODEL", 100)
    with pytest.raises(InputError, match="too much for a browser"):
        write_site(path, site)
    monkeypatch.undo()
    assert not site.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not an empty folder"):
        write_site(path, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
