"""noise.npz: what is written is read, and damaged files are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ddpmx.errors import FileFormatError
from ddpmx.formats.noise_file import FORMAT, Noise

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
GOOD = {"format": FORMAT, "model": "ab" * 32, "by": "ddim", "steps": 5, "spacing": "quad", "names": ["a.png", "b.png"]}
GOOD |= {"label": "cats"}


def write(path, x=X, about=None, **changes):
    text = json.dumps({**GOOD, **changes} if about is None else about).encode()
    arrays = {"about": np.frombuffer(text, np.uint8), "x": x}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_what_is_written_is_read(tmp_path):
    noise = Noise(X, ("a.png", "ü b.png"), "ab" * 32, "ddim", 5, "quad", "cats")
    noise.save(tmp_path / "noise.npz")
    read = Noise.load(tmp_path / "noise.npz")
    np.testing.assert_array_equal(read.x, X)
    for name in ("names", "model", "by", "steps", "spacing", "label"):
        assert getattr(read, name) == getattr(noise, name)
    write(tmp_path / "same.npz")
    assert Noise.load(tmp_path / "same.npz").names == ("a.png", "b.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "x must be"),
        ({"x": X.astype(np.float64)}, "x must be"),
        ({"x": X[0]}, "x must be"),
        ({"x": X[:0]}, "x must be"),
        ({"x": np.where(X > 1, np.nan, X).astype(np.float32)}, "x must be"),
        ({"about": ["no object"]}, "another version"),
        ({"format": "ddpmx-noise2"}, "another version"),
        ({"model": 5}, "another version"),
        ({"steps": True}, "another version"),
        ({"more": 1}, "another version"),
        ({"by": "magic"}, "damaged"),
        ({"names": ["a.png"]}, "damaged"),
        ({"names": ["a.png", "a.png"]}, "damaged"),
        *(
            ({"names": ["a.png", name]}, "damaged")
            for name in ("", "../b.png", "/b", ".b", "b\\c", "b\n", "b" * 256, 5)
        ),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, changes, message):
    write(tmp_path / "noise.npz", **changes)
    with pytest.raises(FileFormatError, match=message):
        Noise.load(tmp_path / "noise.npz")


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=X)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("other.npz", "text.npz", "missing.npz"):
        with pytest.raises(FileFormatError):
            Noise.load(tmp_path / name)
