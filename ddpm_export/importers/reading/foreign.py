"""Files that are no checkpoint, named by their first bytes for what they are: what stands where weights should."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from ddpmx.errors import FileFormatError

HEAD = 1 << 10
_LFS = b"version https://git-lfs.github.com/spec/"
_TAR = 257
"""Where a tar archive says ``ustar``."""

_MAGIC: tuple[tuple[bytes, str, str | None], ...] = (
    (b"\x1f\x8b", "compressed by gzip", "unpack it (gunzip, or tar -xzf), and name the checkpoint inside"),
    (b"BZh", "compressed by bzip2", "unpack it (bunzip2, or tar -xjf), and name the checkpoint inside"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it (unxz, or tar -xJf), and name the checkpoint inside"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it (zstd -d), and name the checkpoint inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and name the checkpoint inside"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it, and name the checkpoint inside"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes weights", None),
    (b"GGUF", "a GGUF file, as llama.cpp and its like use", None),
    (b"\x93NUMPY", "one array of NumPy's", None),
    (b"ftrt", "a TensorRT plan", "ddpmx generate runs plans; import takes the checkpoint from which it was made"),
    (b"vtrt", "a TensorRT-RTX plan", "ddpmx generate runs plans; import takes the checkpoint from which it was made"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", None),
    (b"\xff\xd8\xff", "a JPEG image", None),
    (b"%PDF-", "a PDF document", None),
)


def name_foreign(path: Path) -> FileFormatError | None:
    """The error that says what ``path`` is, if it is known to be something else than weights; otherwise None."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if not head:
        return FileFormatError(f"{path}: it is empty", hint="copy or download it again")
    if head.startswith(_LFS):
        size = re.search(rb"\nsize (\d+)", head)
        return FileFormatError(
            f"{path}: a pointer of Git LFS, not the file itself",
            note=f"the file has {int(size[1]):,} bytes, this one {path.stat().st_size}" if size else None,
            hint="git lfs pull, in the folder of the clone, fetches it",
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")) or (text.startswith(b"<") and b"<html" in text):
        title = re.search(rb"<title[^>]*>([^<]{1,200})", head, re.IGNORECASE)
        return FileFormatError(
            f"{path}: an HTML page, saved in place of the file",
            note=f"its title is {title[1].decode('utf-8', 'replace').strip()!r}" if title else None,
            hint="download the file itself: log in, accept the terms, or use the link that the page's button has",
        )
    if text.startswith((b"<?xml", b"<error")):
        return FileFormatError(f"{path}: an XML page, saved in place of the file", note=_begin(head), hint=_LINK)
    if text.startswith(b"{") and b'"' in text[:200] and b"\x00" not in head[:8]:
        return FileFormatError(f"{path}: a JSON text, not weights", note=_begin(head), hint=_LINK)
    if path.suffix == ".onnx" and head[0] == 0x08:  # a ModelProto begins with ir_version, field 1
        return FileFormatError(
            f"{path}: an ONNX file, which holds a graph and no checkpoint",
            hint="ddpmx generate and ddpmx build take it as it is, with --spec where it does not describe itself",
        )
    for magic, name, hint in _MAGIC:
        if head.startswith(magic):
            return FileFormatError(f"{path}: {name}, which holds no checkpoint that ddpmx reads", hint=hint)
    if head[_TAR : _TAR + 5] == b"ustar":
        return FileFormatError(
            f"{path}: a tar archive", note=_members(path), hint="tar -xf unpacks it; name the checkpoint inside"
        )
    return None


_LINK = "look at it: if it is a server's answer, download the file again"


def name_zip(path: Path, members: list[str]) -> FileFormatError:
    """The error that says what a zip archive is that torch.save did not write."""
    arrays = [name for name in members if name.endswith(".npy")]
    note = f"it holds {', '.join(members[:4])}{', …' if len(members) > 4 else ''}" if members else "nothing is in it"
    if arrays and len(arrays) == len(members):
        return FileFormatError(
            f"{path}: arrays of NumPy (.npz), not a checkpoint",
            note=note,
            hint="images go to ddpmx train --data, or to --probe",
        )
    inside = next((name for name in members if Path(name).suffix in (".pt", ".pth", ".ckpt", ".safetensors")), None)
    return FileFormatError(
        f"{path}: a zip archive, but not one that torch.save wrote",
        note=note,
        hint=f"unpack it, and name {inside}" if inside else None,
    )


def _members(path: Path) -> str | None:
    """The first names in a tar archive."""
    names: list[str] = []
    try:
        with tarfile.open(path, "r:") as archive:
            while len(names) < 4 and (member := archive.next()) is not None:
                names.append(member.name)
    except (tarfile.TarError, OSError, ValueError):
        return None
    return f"it holds {', '.join(names)}" if names else None


def _begin(head: bytes) -> str:
    return f"it begins with {head[:60].decode('utf-8', 'replace')!r}"
