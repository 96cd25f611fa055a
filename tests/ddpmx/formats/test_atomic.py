"""Atomic writes: a file has the old content or the new one, and no temporary files stay; and refusals to overwrite."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from ddpmx.errors import OutputError
from ddpmx.formats.atomic import atomic_write, check_replaceable, make_folder


@pytest.fixture(params=["new", "replacing"])
def target(request, tmp_path):
    path = tmp_path / "result.bin"
    if request.param == "replacing":
        path.write_bytes(b"old")
    return path


def unchanged(path, before):
    return [p.name for p in path.parent.iterdir()] == before and (not before or path.read_bytes() == b"old")


def names(path):
    return [p.name for p in path.parent.iterdir()]


def test_the_file_appears_whole(target):
    before = target.exists()
    with atomic_write(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert target.exists() == before  # not yet, whatever has been written
    assert target.read_bytes() == b"new"
    assert names(target) == ["result.bin"]


def test_others_may_read_it(tmp_path):
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a") as stream:
            stream.write(b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), GeneratorExit()])
def test_an_exception_leaves_everything_as_it_was(target, error):
    before = names(target)
    with pytest.raises(type(error)), atomic_write(target) as stream:  # noqa: PT012
        stream.write(b"half")
        raise error
    assert unchanged(target, before)


def test_a_full_disk_on_writing_leaves_everything_as_it_was(target):
    before = names(target)
    with pytest.raises(OutputError, match="No space left") as caught, atomic_write(target) as stream:  # noqa: PT012
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(target) in caught.value.fact
    assert unchanged(target, before)


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_full_disk_at_the_end_leaves_everything_as_it_was(target, monkeypatch, call):
    before = names(target)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match="No space left"), atomic_write(target) as stream:
        stream.write(b"whole")
    monkeypatch.undo()
    assert unchanged(target, before)


def test_the_data_are_on_disk_before_the_name_is(target, monkeypatch):
    order = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args, call=call, real=real: (order.append(call), real(*args))[1])
    with atomic_write(target) as stream:
        stream.write(b"x")
    assert order == ["fsync", "replace"]


def test_a_folder_that_is_not_there_or_is_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "a", tmp_path / "file" / "a", tmp_path / ("a" * 300)):
        with pytest.raises(OutputError) as caught, atomic_write(path):
            pass
        assert str(path) in str(caught.value)
    assert names(tmp_path / "file") == ["file"]


def test_a_name_that_is_a_folder_is_an_output_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError), atomic_write(tmp_path / "folder") as stream:
        stream.write(b"x")
    assert names(tmp_path / "folder") == ["folder"]


def test_folders_are_made_with_their_parents(tmp_path):
    made = make_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert list(made.iterdir()) == []
    assert make_folder(made) == made


def test_a_folder_below_a_file_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="folder"):
            make_folder(path)


def refusal(path):
    with pytest.raises(OutputError) as caught:
        check_replaceable(path, what="a plan", suffixes=(".plan", ".engine"), begins=(b"ftrt", b"vtrt"))
    return str(caught.value)


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    assert refusal(path) == f"refusing to overwrite {path}: not a plan\nHint: -o NAME.plan"
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content"),
    [("new", None), ("old.plan", b"anything"), ("old.ENGINE", b"x"), ("old", b"ftrt1234"), ("empty", b"")],
)
def test_a_file_of_the_same_kind_may_be_replaced(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    check_replaceable(path, what="a plan", suffixes=(".plan", ".engine"), begins=(b"ftrt", b"vtrt"))
