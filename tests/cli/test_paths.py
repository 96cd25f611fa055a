"""An empty text where a path belongs is one error: it is not the current folder."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("FILE", ["info", ""]),
        ("FILE", ["generate", ""]),
        ("--engine", ["generate", "--engine", ""]),
        ("--out", ["generate", "garments", "--out", ""]),
        ("--cond", ["generate", "garments", "--cond="]),
        ("ONNX", ["build", ""]),
        ("RUN", ["export", ""]),
        ("--output", ["export", "run", "-o", ""]),
        ("PATH", ["import", ""]),
        ("--data", ["train", "--data", ""]),
        ("--out", ["train", "--data", "x", "--out", ""]),
        ("ONNX", ["adopt", "", "--like", "x"]),
        ("--like", ["adopt", "x", "--like", ""]),
    ],
)
def test_an_empty_path_is_refused_by_its_name(refused, tmp_path, monkeypatch, named, words):
    monkeypatch.chdir(tmp_path)
    assert refused(*words).startswith(f"Error: {named} is empty\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
def test_other_texts_may_be_empty(refused, tmp_path):  # control
    assert "there is no such file" in refused("train", "--data", tmp_path / "x", "--attention", "")
