"""Opens what ``torch.save`` wrote, without running anything in it and without believing what it says about its size.

A torch file is a pickle beside raw storages. torch's own ``weights_only`` reader builds nothing but tensors and plain
values; it came whole only with torch 2.6. Before it sees a file, the pickle is walked here with every class replaced by
a stub, so that storages which claim more bytes than the file holds are refused before memory is taken for them.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ddpmx.errors import BackendError, FileFormatError

MAX_PICKLE = 1 << 28
"""Bytes of the pickle itself: names and shapes. A file of a million tensors stays below."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ITEMSIZE = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_AGAIN = "copy it again, or save the weights again: torch.save(model.state_dict(), …)"
_STATE_ONLY = (
    "open it with the program that wrote it, and save its weights alone: torch.save(model.state_dict(), …), or as "
    "safetensors"
)


def is_torch_file(path: Path) -> bool:
    """Whether the file begins as a zip or a pickle does."""
    with path.open("rb") as stream:
        head = stream.read(4)
    return head.startswith(b"PK\x03\x04") or head[:1] == b"\x80"


def load(path: Path) -> Any:
    """The tensors and plain values in ``path``, memory-mapped where it can be.

    Raises:
        FileFormatError: it is cut off, damaged, claims more than it holds, or holds more than weights.
        BackendError: this torch's ``weights_only`` can be got around.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):
        raise BackendError(
            f"torch {torch.__version__} cannot open other people's files safely",
            note="before torch 2.6 a file could get around weights_only and run code",
            hint="pip install 'torch>=2.6'",
        )
    zipped = _is_zip(path)
    try:
        _check_zip(path) if zipped else _check_legacy(path)
    except FileFormatError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise FileFormatError(f"{path}: cut off or damaged", note=str(error)[:200], hint=_AGAIN) from error
    except Exception as error:  # a pickle that is no pickle fails in any way there is
        raise FileFormatError(
            f"{path}: no torch file, or a damaged one", note=f"{type(error).__name__}: {error}"[:200], hint=_AGAIN
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise _more_than_weights(path, str(error)) from error
    except Exception as error:
        raise FileFormatError(
            f"{path}: torch cannot read it", note=f"{type(error).__name__}: {error}"[:300], hint=_AGAIN
        ) from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _check_zip(path: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(name.endswith("/constants.pkl") for name in members):
            raise FileFormatError(
                f"{path}: a TorchScript program, which carries code",
                hint="save the weights of the module alone: torch.save(module.state_dict(), …)",
            )
        inflated = sum(info.file_size for info in members.values())
        if inflated > size or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise FileFormatError(
                f"{path}: its members are compressed or overlap, and torch's never are",
                note=f"{size:,} bytes would inflate to {inflated:,}",
                hint="a zip bomb looks like this; if the file was packed again, save it with torch.save",
            )
        pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise FileFormatError(f"{path}: a zip archive, and not one that torch.save wrote")
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise FileFormatError(f"{path}: its pickle alone has {members[pickles[0]].file_size:,} bytes")
        if damaged := archive.testzip():
            raise FileFormatError(f"{path}: damaged: the checksum of {damaged} is wrong", hint=_AGAIN)
        scan = _Scan(io.BytesIO(archive.read(pickles[0])))
        scan.load()
        root = pickles[0].removesuffix("data.pkl")
        for key, claimed in scan.storages.items():
            info = members.get(f"{root}data/{key}")
            if info is None or info.file_size != claimed:
                raise FileFormatError(
                    f"{path}: a tensor claims {claimed:,} bytes, and the file holds {info.file_size if info else 0:,}",
                    hint=_AGAIN,
                )


def _check_legacy(path: Path) -> None:
    """The format before torch 1.6: pickles one after the other, then the storages."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        scan = _Scan(stream)
        magic = scan.load()
        if magic != _LEGACY_MAGIC:
            needed = sorted(scan.classes)
            raise FileFormatError(
                f"{path}: a pickle, and not one that torch.save wrote",
                note=f"opening it would run {', '.join(needed[:4])}, which may do anything" if needed else None,
                hint=_STATE_ONLY,
            )
        for _ in range(2):  # the version of the protocol, and the machine's sizes
            _Scan(stream).load()
        scan = _Scan(stream)
        scan.load()
    if (claimed := sum(scan.storages.values())) > size:
        raise FileFormatError(f"{path}: its tensors claim {claimed:,} bytes, and the file has {size:,}", hint=_AGAIN)


def _more_than_weights(path: Path, message: str) -> FileFormatError:
    named = re.search(r"(?:GLOBAL|global:?|class:?) ([\w.]+\.[\w.]+)", message)
    what = f"{named.group(1)}, whose code would run" if named else message.splitlines()[0][:200]
    return FileFormatError(
        f"{path}: holds more than weights, and opening that could run anything",
        note=f"it needs {what}",
        hint=_STATE_ONLY,
    )


class _Scan(pickle.Unpickler):
    """Walks a pickle in which every class is a stub: nothing is run, and nothing larger than the pickle is made."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, int] = {}
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.classes.add(f"{module}.{name}")
        return type(name, (_Stub,), {})

    def persistent_load(self, identity: Any) -> Any:
        """A reference to a storage: ("storage", type, key, device, how many numbers, …)."""
        kind, storage, key, _, count, *_ = identity
        itemsize = _ITEMSIZE.get(getattr(storage, "__name__", ""))
        if kind != "storage" or itemsize is None or type(count) is not int or count < 0:
            raise ValueError(f"a reference to {kind} {getattr(storage, '__name__', storage)}")
        self.storages[str(key)] = itemsize * count
        return _Stub()


class _Stub:
    """Stands for whatever a pickle makes."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...

    def update(self, *_: Any) -> None: ...
