"""Opens files that ``torch.save`` wrote, without running anything in them and without trusting the sizes they declare.

A torch file is a pickle beside raw storages. torch's own ``weights_only`` reader builds nothing but tensors and plain
values; it is safe only since torch 2.6. Before it reads a file, the pickle is walked here with every class replaced by
a stub, so that storages which claim more bytes than the file holds are refused before memory is taken for them. The walk
uses Python's unpickler, not C's: an interrupt stops it, and a number in the pickle allocates nothing.
"""

from __future__ import annotations

import io
import mmap
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch

from ddpm_export.importers.reading.foreign import name_zip
from ddpmx.device.versions import version_numbers
from ddpmx.errors import BackendError, FileFormatError

MAX_PICKLE = 1 << 28
"""Bytes of the pickle itself: names and shapes. A file of a million tensors stays below."""

MAX_NESTED = 10_000
"""Items in a tuple of tuples, counted once for each occurrence: hash() walks them all, and no interrupt stops it."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ITEMSIZE = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
_LEFT_OUT = (
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""NumPy's numbers and arrays, which training loops save beside the weights (a loss, a seed). Nothing of NumPy's is called:
an empty object stands in the place of each, and is left out."""
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
        BackendError: this torch's ``weights_only`` can be bypassed.
    """
    if version_numbers(torch.__version__) < (2, 6):
        raise BackendError(
            f"torch {torch.__version__} cannot open other people's files safely",
            note="before torch 2.6 a file could bypass weights_only and run code",
            hint="pip install 'torch>=2.6'",
        )
    zipped = _is_zip(path)
    try:
        _check_zip(path) if zipped else _check_legacy(path)
    except FileFormatError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise FileFormatError(f"{path}: cut off or damaged", note=str(error)[:200], hint=_AGAIN) from error
    except Exception as error:  # bytes that are not a pickle can raise anything
        raise FileFormatError(
            f"{path}: not a torch file, or a damaged one", note=f"{type(error).__name__}: {error}"[:200], hint=_AGAIN
        ) from error
    try:
        with torch.serialization.safe_globals([(_Stub, name) for name in _LEFT_OUT]):
            if path.suffix == ".safetensors":  # torch.load would go by the name of the file, which is wrong
                with path.open("rb") as stream:
                    return torch.load(stream, map_location="cpu", weights_only=True)
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
        if len({name.lower() for name in members}) < len(archive.infolist()):
            # torch ignores case when it looks up members: it might open another one than is checked here
            raise FileFormatError(f"{path}: two members of the archive have one name", hint=_AGAIN)
        if any(name.endswith("/constants.pkl") for name in members):
            raise FileFormatError(
                f"{path}: a TorchScript program, which carries code",
                hint="save the weights of the module alone: torch.save(module.state_dict(), …)",
            )
        pickles = [name for name in members if name.lower().endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise name_zip(path, list(members))
        inflated = sum(info.file_size for info in members.values())
        if inflated > size or any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise FileFormatError(
                f"{path}: its members are compressed or overlap, which torch's never do",
                note=f"{size:,} bytes would inflate to {inflated:,}",
                hint="this may be a zip bomb; if the file was only packed again, save it with torch.save",
            )
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise FileFormatError(f"{path}: its pickle alone has {members[pickles[0]].file_size:,} bytes")
        if damaged := archive.testzip():
            raise FileFormatError(f"{path}: damaged: the checksum of {damaged} is wrong", hint=_AGAIN)
        scan = _Scan(path, _first_pickle(path, archive.read(pickles[0]), 0))
        scan.load()
        root = pickles[0][: -len("data.pkl")]
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
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = _first_pickle(path, content, 0)
        scan = _Scan(path, first)
        try:
            magic = scan.load()
        except FileFormatError:
            magic = None
        if magic != _LEGACY_MAGIC:
            needed = sorted(scan.classes)
            raise FileFormatError(
                f"{path}: a pickle, but not one that torch.save wrote",
                note=f"opening it would run {', '.join(needed[:4])}, which may do anything" if needed else None,
                hint=_STATE_ONLY,
            )
        start, scans = len(first), []
        for _ in range(4):  # the protocol version, the machine's type sizes, the content, the storages' keys
            part = _first_pickle(path, content, start)
            start += len(part)
            scans.append(_Scan(path, part))
            scans[-1].load()
        scan = scans[2]
    if (claimed := sum(scan.storages.values())) > size:
        raise FileFormatError(f"{path}: its tensors claim {claimed:,} bytes, and the file has {size:,}", hint=_AGAIN)


def _more_than_weights(path: Path, message: str) -> FileFormatError:
    named = re.search(r"(?:GLOBAL|global:?|class:?) ([\w.]+\.[\w.]+)", message)
    what = f"{named.group(1)}, whose code would run" if named else message.splitlines()[0][:200]
    return FileFormatError(
        f"{path}: holds more than weights, and opening it could run any code",
        note=f"it needs {what}",
        hint=_STATE_ONLY,
    )


def _first_pickle(path: Path, content: bytes | mmap.mmap, start: int) -> bytes:
    """The pickle that begins at ``start``, after checking that it is whole and that its memo indices are below its length.

    C's unpickler allocates 16 bytes for every index up to the largest one that an object is stored under.

    Raises:
        FileFormatError: it is too long, or stores an object under an absurd memo index.
        ValueError: it is not a pickle, or it has no end.
    """
    stream = cast("IO[bytes]", content) if isinstance(content, mmap.mmap) else io.BytesIO(content)
    stream.seek(start)
    largest, end = 0, start
    for operation, argument, position in pickletools.genops(stream):
        end = start if position is None else position
        if end - start >= MAX_PICKLE:
            raise FileFormatError(f"{path}: its pickle alone has more than {MAX_PICKLE:,} bytes")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            largest = max(largest, cast(int, argument))
    length = end + 1 - start  # STOP is one byte
    if largest > length:
        raise FileFormatError(
            f"{path}: its pickle stores an object under the memo index {largest:,}, but has {length:,} bytes",
            hint="no program writes that; get the file from a source you trust",
        )
    return bytes(content[start : end + 1])


class _Tuple(tuple[Any, ...]):
    """A tuple with the number of items in it and in the tuples inside it."""

    nested: int


class _Scan(pickle._Unpickler):
    """Walks a pickle with every class replaced by a stub: nothing is run, and nothing larger than the pickle is made."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.path = path
        self.storages: dict[str, int] = {}
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.classes.add(f"{module}.{name}")
        return type(name, (_Bytes if name == "bytearray" else _Stub,), {})

    def persistent_load(self, identity: Any) -> Any:
        """A reference to a storage: ("storage", type, key, device, how many numbers, …)."""
        kind, storage, key, _, count, *_ = identity
        name = getattr(storage, "__name__", "")
        if re.fullmatch(r"QU?Int\w+Storage", name):
            raise FileFormatError(
                f"{self.path}: it holds quantized tensors ({name.removesuffix('Storage')}), which are not supported",
                hint="save the weights as they were before quantization, or tensor.dequantize() of each",
            )
        itemsize = _ITEMSIZE.get(name)
        if kind != "storage" or itemsize is None or type(count) is not int or count < 0:
            raise ValueError(f"a reference to {kind} {getattr(storage, '__name__', storage)}")
        self.storages[str(self.key(key))] = itemsize * count
        return _Stub()

    def key(self, key: Any) -> Any:
        """``key``, if it can name weights. A stub passes too: torch's reader then says what is wrong."""
        if not isinstance(key, (str, int, type, _Stub)):
            raise FileFormatError(
                f"{self.path}: a dict whose key is neither a name nor a number",
                note=f"it is a {type(key).__name__.lstrip('_').lower()}",
                hint=_STATE_ONLY,
            )
        return key

    def tuple_of(self, items: list[Any]) -> _Tuple:
        """A tuple of which hash() ends in reasonable time."""
        made = _Tuple(items)
        inner = [item.nested for item in items if isinstance(item, _Tuple)]
        made.nested = len(items) + sum(inner)
        if inner and made.nested > MAX_NESTED:
            raise FileFormatError(f"{self.path}: tuples of tuples with more than {MAX_NESTED:,} items in them")
        return made


def _operation(opcode: bytes) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as ``_Scan``'s handler of ``opcode``."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        _Scan.dispatch[opcode[0]] = function
        return function

    return register


@_operation(pickle.SETITEM)
def _setitem(scan: Any) -> None:
    value = scan.stack.pop()
    key = scan.key(scan.stack.pop())
    scan.stack[-1][key] = value


@_operation(pickle.SETITEMS)
def _setitems(scan: Any) -> None:
    items = scan.pop_mark()
    for key, value in zip(items[::2], items[1::2], strict=True):
        scan.stack[-1][scan.key(key)] = value


@_operation(pickle.DICT)
def _dict(scan: Any) -> None:
    items = scan.pop_mark()
    scan.append({scan.key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})


@_operation(pickle.EMPTY_SET)
def _empty_set(scan: Any) -> None:
    scan.append(_Stub())


@_operation(pickle.FROZENSET)
def _frozenset(scan: Any) -> None:
    scan.pop_mark()
    scan.append(_Stub())


@_operation(pickle.TUPLE)
def _tuple(scan: Any) -> None:
    items = scan.pop_mark()
    scan.append(scan.tuple_of(items))


def _short_tuple(count: int) -> Callable[[Any], None]:
    def load(scan: Any) -> None:
        if len(scan.stack) < count:
            raise ValueError("a tuple of more items than the stack has")
        scan.stack[-count:] = [scan.tuple_of(scan.stack[-count:])]

    return load


_operation(pickle.TUPLE1)(_short_tuple(1))
_operation(pickle.TUPLE2)(_short_tuple(2))
_operation(pickle.TUPLE3)(_short_tuple(3))


class _Stub:
    """Stands for any object that a pickle makes."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...

    def update(self, *_: Any) -> None: ...


class _Bytes(_Stub):
    """Stands for a bytearray: one made from a number has that length, which may be any."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        if any(isinstance(argument, int) for argument in arguments):
            raise ValueError("a bytearray made from a length instead of bytes")
