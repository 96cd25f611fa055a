"""What may be written where: nothing but an older file of the same kind is replaced."""

from __future__ import annotations

import os

import pytest

from ddpmx.errors import OutputError
from ddpmx.formats.output_file import begins_with, check_output


def is_ours(path):
    return path.suffix.lower() in (".plan", ".engine") or begins_with(path, (b"ftrt", b"vtrt"))


def check(path, inputs=(), suffix=".plan"):
    check_output(path, inputs, what="a plan", suffix=suffix, is_ours=is_ours)


def refusal(path, **options):
    with pytest.raises(OutputError) as caught:
        check(path, **options)
    return str(caught.value)


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    assert refusal(path) == f"refusing to overwrite {path}: not a plan\nHint: -o NAME.plan"
    assert refusal(path, suffix="") == f"refusing to overwrite {path}: not a plan\nHint: another -o"
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content"),
    [("new", None), ("old.plan", b"anything"), ("old.ENGINE", b"x"), ("old", b"ftrt1234"), ("empty", b"")],
)
def test_a_file_of_the_same_kind_may_be_replaced(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    check(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.plan")
    (tmp_path / "gone.plan").symlink_to("nowhere")
    for name in ("pipe.plan", "gone.plan"):
        assert "exists and is not a regular file" in refusal(tmp_path / name)
    assert refusal(tmp_path) == f"{tmp_path}: is a folder\nHint: -o {tmp_path / 'model.plan'}"
    assert refusal(tmp_path, suffix="").endswith("Hint: another -o")
    assert "there is no folder" in refusal(tmp_path / "none" / "a.plan")
    assert "too long for a file name" in refusal(tmp_path / ("x" * 240))


def test_an_input_is_not_overwritten(tmp_path):
    (tmp_path / "a.plan").write_bytes(b"ftrt")
    (tmp_path / "b.plan").hardlink_to(tmp_path / "a.plan")
    assert "it is made from this file" in refusal(tmp_path / "b.plan", inputs=[tmp_path / "a.plan"])
