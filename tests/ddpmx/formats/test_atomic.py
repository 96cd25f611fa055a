"""Atomic writes: files are the old ones or the new ones, and no temporary files stay; and refusals to overwrite."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ddpmx.errors import OutputError
from ddpmx.formats import atomic
from ddpmx.formats.atomic import (
    atomic_folder,
    atomic_write,
    exchange,
    foreign_writer,
    locked,
    make_folder,
    staging,
)


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


@pytest.mark.parametrize("call", ["fsync", "replace"])
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
        with pytest.raises(OutputError, match=f"^{tmp_path / 'file'}: is a file, and a folder is needed"):
            make_folder(path)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="link: is a link to nothing"):
        make_folder(tmp_path / "link")
    assert not (tmp_path / "gone").exists()


# --- folders, and files that belong together -------------------------------------------------------------------------


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "file").write_bytes(b"x")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == {"a/b/sub/file": b"x"}


def test_an_empty_folder_that_is_filled_keeps_its_mode(tmp_path):
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "private").chmod(0o2750)
    with atomic_folder(tmp_path / "private") as inside:
        (inside / "file").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o2750
    assert tree(tmp_path) == {"private/file": b"x"}


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_folder_that_fails_leaves_nothing_and_none_of_its_parents(tmp_path, error):
    wanted = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), atomic_folder(tmp_path / "a" / "b") as inside:  # noqa: PT012
        (inside / "file").write_bytes(b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_what_is_written_and_not_the_temporary_folder(tmp_path):
    message = "I/O error: No space left on device (os error 28)\nand a stack"
    with pytest.raises(OutputError) as caught, atomic_folder(tmp_path / "run") as inside:  # noqa: SIM117
        with foreign_writer(inside / "weights", RuntimeError):
            raise RuntimeError(message)
    assert str(caught.value).splitlines()[:2] == [
        f"{tmp_path / 'run'}: cannot be written",
        "Note: No space left on device; nothing was left behind",
    ]


OLD = {"00000.png": b"old 0", "00001.png": b"old 1", "00002.png": b"old 2", "notes.txt": b"mine"}
NEW = {"00000.png": b"new 0", "00001.png": b"new 1", "notes.txt": b"mine"}
EXCHANGE = """
import os, signal, sys
from pathlib import Path
from ddpmx.formats.atomic import exchange, staging, write_synced
folder, deadly = Path(sys.argv[1]), int(sys.argv[2])
count, real = 0, {name: getattr(os, name) for name in ("replace", "unlink")}
def counted(name):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **kwargs)
    return call
with staging(folder, folder) as part:
    for name in ("00000.png", "00001.png"):
        write_synced(part / name, b"new " + name[4:5].encode())
    os.replace, os.unlink = counted("replace"), counted("unlink")
    exchange(folder, part, ["00000.png", "00001.png"], instead_of=["00002.png"])
"""


@pytest.fixture
def folder(tmp_path):
    for name, content in OLD.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_files_are_exchanged_at_once(folder):
    with staging(folder, folder) as part:
        (part / "00000.png").write_bytes(b"new 0")
        (part / "00001.png").write_bytes(b"new 1")
        exchange(folder, part, ["00000.png", "00001.png"], instead_of=["00002.png", "not there"])
    assert tree(folder) == NEW


@pytest.mark.parametrize("fails", range(5))
def test_an_exchange_that_fails_changes_nothing(folder, monkeypatch, fails):
    real, calls = os.replace, []

    def replace(*args):
        calls.append(args)
        if len(calls) == fails + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*args)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="Input/output error"), staging(folder, folder) as part:  # noqa: PT012
        (part / "00000.png").write_bytes(b"new 0")
        (part / "00001.png").write_bytes(b"new 1")
        exchange(folder, part, ["00000.png", "00001.png"], instead_of=["00002.png"])
    assert tree(folder) == OLD


def test_where_not_even_a_lock_can_be_made_nothing_is_left(folder, monkeypatch):
    real = os.open

    def full(path, *args, **kwargs):
        if str(path).endswith("-lock"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OutputError, match="No space left"), staging(folder, folder) as part:  # noqa: PT012
        (part / "00000.png").write_bytes(b"new 0")
        exchange(folder, part, ["00000.png"])
    assert tree(folder) == OLD


@pytest.mark.parametrize("deadly", range(1, 9))
def test_after_a_kill_the_next_run_finds_the_old_files_or_the_new_ones(folder, deadly):
    done = subprocess.run([sys.executable, "-c", EXCHANGE, str(folder), str(deadly)], check=False)
    assert done.returncode == -signal.SIGKILL
    shown = {name: content for name, content in tree(folder).items() if name in OLD}
    assert shown.items() <= OLD.items() or shown.items() <= NEW.items(), "a mixture is to be seen"
    atomic.tidy(folder)
    assert tree(folder) == (OLD if deadly < 7 else NEW)


@pytest.mark.skipif(sys.platform == "win32", reason="leftovers are known by their age there")
def test_two_runs_that_put_old_files_back_at_once_lose_none(folder, monkeypatch):
    subprocess.run([sys.executable, "-c", EXCHANGE, str(folder), "5"], check=False)
    real, seconds = os.replace, []

    def second():
        atomic._tidied.clear()
        atomic.tidy(folder)

    def replace(*args):
        real(*args)
        seconds.append(threading.Thread(target=second))
        seconds[-1].start()
        seconds[-1].join(0.3)  # by then it is done, or it waits

    monkeypatch.setattr(os, "replace", replace)
    atomic.tidy(folder)
    assert len(seconds) == 3, "the three old files"  # control: the others did begin in the middle
    for thread in seconds:
        thread.join(10)
        assert not thread.is_alive()
    assert tree(folder) == OLD


@pytest.mark.skipif(sys.platform == "win32", reason="leftovers are known by their age there")
def test_what_a_run_takes_away_itself_no_other_run_takes_for_left_behind(folder, monkeypatch):
    taken, discard = [], atomic._discard

    def watched(part):
        with atomic._taken(part) as is_left:
            taken.append(is_left)
        discard(part)

    monkeypatch.setattr(atomic, "_discard", watched)
    with staging(folder, folder) as part:
        (part / "a").touch()
    assert taken == [False]
    assert tree(folder) == OLD


# --- what a killed run leaves ----------------------------------------------------------------------------------------

WRITE = """
import sys, time
from pathlib import Path
from ddpmx.formats.atomic import atomic_folder, atomic_write, locked
target = Path(sys.argv[1])
with locked(target), atomic_folder(target.with_name("run")) as inside, atomic_write(target) as stream:
    (inside / "file").touch()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writing(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path / "a")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="leftovers are known by their age there")
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path, writing):
    others = [".a.part", ".a.ddpmx-0123.part", ".a.0123456789abcdef.part", "a.ddpmx-0123456789abcdef.part"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".a.ddpmx-0123456789abcdef.part").symlink_to("a link is none of ours")
    kept = {*others, ".a.ddpmx-0123456789abcdef.part"}
    assert len(set(names(tmp_path / "a")) - kept) == 3, "a file, a folder and a lock"
    atomic.tidy(tmp_path)
    assert len(set(names(tmp_path / "a")) - kept) == 3, "they belong to a process that lives"
    writing.kill()
    writing.wait()
    atomic._tidied.clear()
    with atomic_write(tmp_path / "b") as stream:
        stream.write(b"x")
    assert set(names(tmp_path / "a")) == kept | {"b"}


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_living_one_is_not(tmp_path, writing):
    got = threading.Event()

    def wait():
        with locked(tmp_path / "a"):
            got.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not got.wait(0.3)
    writing.kill()
    assert got.wait(10)
    thread.join()
    assert not list(tmp_path.glob("*lock"))


def test_only_one_at_a_time_holds_a_lock(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        for _ in range(10):
            with locked(tmp_path / "a"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)  # so that others would come in
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [(Path, "open"), (os, "fsync"), (os, "replace")])
def test_an_interruption_before_or_after_any_call_leaves_nothing(target, monkeypatch, call):
    """A signal's handler may run between a function that makes a file and the line that keeps its name."""
    before = names(target)
    real = getattr(*call)
    for late in (False, True):

        def interrupted(*args, late=late, **kwargs):
            if late:
                real(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(*call, interrupted)
            with pytest.raises(KeyboardInterrupt), atomic_write(target) as stream:
                stream.write(b"new")
        assert names(target) == before or target.read_bytes() == b"new"
        assert not list(target.parent.glob(".*"))
