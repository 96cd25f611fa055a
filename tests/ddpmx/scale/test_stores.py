"""Folders and addresses: a name is a whole file, and errors of any library are ours."""

from __future__ import annotations

import builtins
from uuid import uuid4

import pytest

from ddpmx.errors import BackendError, OutputError
from ddpmx.scale import stores
from ddpmx.scale.stores import LocalStore, RemoteStore, is_address, open_store


@pytest.fixture(params=["folder", "file://", "memory", "renamed"])
def store(request, tmp_path):
    if request.param == "folder":
        return open_store(str(tmp_path / "a" / "b"))
    if request.param == "file://":
        return open_store(f"file://{tmp_path}/a%20b")
    fsspec = pytest.importorskip("fsspec", reason="not verified here: addresses (there is no fsspec)")
    if request.param == "memory":
        return open_store(f"memory://{uuid4().hex}/x")
    return RemoteStore(
        fsspec.filesystem("file"), str(tmp_path / "c" / "d"), "sftp://host/d"
    )  # no object store: renames


def read(store, name):
    with store.open(name) as stream:
        return stream.read()


def test_what_is_written_is_there(store):
    assert store.names() == set()
    store.write({"a": b"1", "b": b"22"})
    store.write({"b": b"333"})
    assert store.names() == {"a", "b"}
    assert (read(store, "a"), read(store, "b")) == (b"1", b"333")
    with pytest.raises(OutputError, match="c: cannot be read"):
        store.open("c")


def test_file_addresses_are_folders(tmp_path):
    assert open_store(f"file://{tmp_path}/a%20b").folder == tmp_path / "a b"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(store, monkeypatch):
    store.write({"a": b"old"})

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    if isinstance(store, LocalStore):
        monkeypatch.setattr("os.fsync", broken)
    elif "memory" in str(store):
        monkeypatch.setattr(type(store._files), "pipe_file", broken)
    else:
        monkeypatch.setattr(type(store._files), "mv", broken)
    with pytest.raises(OutputError, match="cannot be written"):
        store.write({"a": b"new"})
    assert (store.names(), read(store, "a")) == ({"a"}, b"old")


@pytest.mark.parametrize(
    ("target", "is_one"),
    [("s3://b/x", True), ("memory://x", True), ("file:///x", True), ("C://x", False), ("a/b", False), ("/a:/b", False)],
)
def test_addresses(target, is_one):
    assert is_address(target) == is_one


def test_without_fsspec_the_extra_is_named_and_folders_work(monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *arguments, **named):
        if name.split(".")[0] == "fsspec":
            raise ImportError("No module named 'fsspec'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendError, match="written to by fsspec") as error:
        open_store("s3://key:secret@bucket/x")
    assert error.value.hint == "pip install 'ddpmx[remote]'"
    assert "secret" not in str(error.value)
    assert isinstance(open_store(str(tmp_path)), LocalStore)


def test_s3_by_s3fs_and_a_stand_in(monkeypatch):
    pytest.importorskip("s3fs", reason="not verified here: s3:// (there is no s3fs)")
    server = pytest.importorskip("moto.server", reason="not verified here: s3:// (there is no moto[server])")
    boto3 = pytest.importorskip("boto3", reason="not verified here: s3:// (there is no boto3)")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        for name, value in (
            ("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port())),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        store = open_store(f"s3://{bucket}/a/b")
        assert store.names() == set()
        store.write({str(number): bytes([number]) for number in range(9)})
        boto3.client("s3").put_object(Bucket=bucket, Key="a/b/other", Body=b"of another process")
        assert store.names() == {*map(str, range(9)), "other"}, "a listing is not remembered"
        assert read(store, "3") == b"\3"
        with pytest.raises(OutputError, match=r"s3://bucket-[0-9a-f]+/x: cannot be written"):
            open_store(f"s3://bucket-{uuid4().hex}/x").write({"a": b""})
    finally:
        running.stop()


def test_an_unknown_scheme_is_an_error_of_ours():
    pytest.importorskip("fsspec", reason="not verified here: addresses (there is no fsspec)")
    with pytest.raises(OutputError, match="nonsense://x: cannot be opened"):
        open_store("nonsense://x")


def test_a_package_that_fsspec_lacks_is_named(monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="not verified here: addresses (there is no fsspec)")

    def lacks(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacks)
    with pytest.raises(BackendError, match="another package") as error:
        stores.open_store("s3://bucket/x")
    assert "Install s3fs" in str(error.value)
