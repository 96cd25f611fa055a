"""`ddpmx page`."""

from __future__ import annotations

import json


def test_a_page_is_written_into_a_new_folder_only(ddpmx, refused, gaussian_onnx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = ddpmx("page", gaussian_onnx, "-o", "the site", "--name", "Gauß")
    assert done.code == 0, done
    assert "the site: 8 files, " in done.out
    assert "python -m http.server --directory 'the site' 8000" in done.out
    assert json.loads((tmp_path / "the site" / "model.json").read_text())["name"] == "Gauß"
    before = (tmp_path / "the site" / "index.html").stat()
    assert "not an empty folder" in refused("page", gaussian_onnx, "-o", "the site")
    assert (tmp_path / "the site" / "index.html").stat() == before
    assert "npm install onnxruntime-web" in refused("page", gaussian_onnx, "-o", "other", "--ort", ".")
    assert not (tmp_path / "other").exists()
