"""Which files count as ddpmx's own, so that they may be replaced: by what they say, not by their first bytes."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpmx.errors import OutputError
from ddpmx.formats import noise_file, output_file, same_model
from ddpmx.formats.noise_file import Noise


def png(**text: str) -> bytes:
    about, stream = PngInfo(), io.BytesIO()
    for keyword, value in text.items():
        about.add_text(keyword, value)
    Image.new("L", (4, 4)).save(stream, "PNG", pnginfo=about)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("is_ours", "ours", "others"),
    [
        (output_file.is_plot, png(task="plot"), [png(), png(task="denoise"), png()[:20], b""]),
        (output_file.is_report, b'{"ddpmx": "0.1.0"}', [b'{"a": 1}', b"[]", b'{"ddpmx', b""]),
    ],
    ids=["a plot", "a report"],
)
def test_a_file_says_that_it_is_ours(tmp_path, is_ours, ours, others):
    path = tmp_path / "file"
    path.write_bytes(ours)
    assert is_ours(path)
    for other in others:
        path.write_bytes(other)
        assert not is_ours(path)


def test_arrays_say_of_which_format_they_are(tmp_path):
    mine, record, other = tmp_path / "noise.npz", tmp_path / "record.npz", tmp_path / "other.npz"
    Noise(np.zeros((1, 1, 2, 2), np.float32), ("a.png",), "a" * 64, "ode").save(mine)
    np.savez(record, about=np.frombuffer(json.dumps({"format": "ddpmx-parity1"}).encode(), np.uint8))
    np.savez(other, images=np.zeros(3))
    found = {path: output_file.is_npz_of(path, noise_file.FORMAT) for path in (mine, record, other, tmp_path / "none")}
    assert [path for path, ours in found.items() if ours] == [mine]
    same_model.check_record(record)
    for path in (mine, other):
        with pytest.raises(OutputError, match="not a parity record"):
            same_model.check_record(path)
