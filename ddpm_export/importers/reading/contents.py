"""The contents of a checkpoint file or folder: opened once, safely, as a flat mapping of names to tensors."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddpm_export.importers.reading import torch_file
from ddpm_export.importers.reading.foreign import name_foreign
from ddpm_export.importers.reading.tensor_bundle import TensorBundle, is_bundle
from ddpmx.errors import BackendError, FileFormatError, InputError, SpecError
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.model_file import SPEC_FILE, checkpoints

MAX_JSON = 1 << 24
MAX_ITEMS = 1_000_000
SMALL = 1 << 10
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th", ".tar", ".pkl")
_STEM = "diffusion_pytorch_model"
_DIFFUSERS = (f"{_STEM}.safetensors", f"{_STEM}.bin")
_BESIDE = re.compile(r"(optimizer|scheduler|sampler|scaler|dl_state_dict|random_states|training_args)(_\d+)?\.(bin|pt)")
"""What accelerate's ``save_state`` puts beside a network's weights."""

EMA_FOLDER = "unet_ema"
"""The folder of the averaged weights in a checkpoint of diffusers' training, beside ``unet``."""


@dataclass(frozen=True, eq=False)
class CheckpointContents:
    """The tensors, values and JSON files of a checkpoint.

    Attributes:
        path: the given path, or the folder it was downloaded to.
        kind: ``folder`` is one of diffusers' layout.
        tensors: by dotted names; a dict's keys and a list's indices are parts of them (``ema.shadow.conv_in.weight``).
        objects: the plain values beside them, by dotted names.
        config: config.json (diffusers), kwargs.json (TensorFlow), or the JSON under ``config`` in safetensors' metadata.
        configs: every JSON file that was read, by its name.
        file: the file of the tensors.
    """

    path: Path
    kind: Literal["folder", "torch", "safetensors", "tensor-bundle"]
    tensors: Mapping[str, Tensor]
    objects: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file: Path = Path()

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, without it."""
        return {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    @cached_property
    def md5(self) -> str:
        """MD5 of the file of the tensors, in hexadecimal: some projects publish it."""
        digest = hashlib.md5(usedforsecurity=False)
        with self.file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def open_checkpoint(path: str | os.PathLike[str]) -> CheckpointContents:
    """Open the checkpoint at ``path``; ``hf:ORGANISATION/NAME`` is downloaded first.

    Raises:
        FileFormatError: nothing is there, or the file is unknown, damaged or unsafe.
        InputError: the id after ``hf:`` is malformed.
        BackendError: it cannot be downloaded.
    """
    if str(path).startswith("hf:"):
        path = _download(str(path)[3:])
    path = Path(path)
    if not path.exists():
        if is_bundle(path):  # the name of a TensorFlow checkpoint is the common prefix of its files
            return _tensor_bundle(path)
        raise FileFormatError(f"{path}: nothing there", hint="a file, a folder, or hf:ORGANISATION/NAME")
    _refuse_run(path)
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read", note=error.strerror or str(error)) from error


def _refuse_run(path: Path) -> None:
    """Refuse a run of ddpmx, one of its checkpoints, or a file of one."""
    folder = path if path.is_dir() else path.parent
    saved = folder.parent.name == "checkpoints" and (folder / SPEC_FILE).is_file()
    if saved or (path.is_dir() and checkpoints(path)):
        raise FileFormatError(
            f"{path}: {'a checkpoint' if saved else 'a run'} of ddpmx, which needs no import",
            hint=f"the other commands take it as it is: ddpmx export {shlex.quote(str(folder))} -o model.onnx",
        )


def _file(path: Path) -> CheckpointContents:
    if not path.is_file():
        raise FileFormatError(f"{path}: neither a file nor a folder")
    if is_bundle(path):
        return _tensor_bundle(path)
    if path.name in ("config.json", "model_index.json"):
        return _folder(path.parent)
    if path.name.startswith(_STEM) and "-of-" in path.name:
        raise _split(path.parent)
    of_diffusers = path.name.startswith(f"{_STEM}.") and path.suffix in (".safetensors", ".bin")
    if of_diffusers and (path.parent / "config.json").is_file():
        return _diffusers(path.parent, path.parent, path)
    return _read_weights(path)


def _folder(path: Path) -> CheckpointContents:
    """A folder of diffusers, of TensorFlow, or with a single file of weights."""
    for inside in (path, path / EMA_FOLDER, path / "unet"):  # a checkpoint of diffusers' training has both
        if (inside / "config.json").is_file() and (file := _diffusers_weights(inside)) is not None:
            averaged = _diffusers(path, inside, file)
            raw = _diffusers_weights(path / "unet") if inside.name == EMA_FOLDER else None
            return averaged if raw is None else _both(averaged, raw)
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *_TORCH_SUFFIXES))
    files = [file for file in files if not _BESIDE.fullmatch(file.name)] or files
    if (path / "config.json").is_file() and len(files) == 1:
        return _file(files[0])
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        raise FileFormatError(
            f"{path}: a folder of diffusers without its weights",
            note=f"{' or '.join(_DIFFUSERS)} should be beside config.json, there or in unet/",
            hint="copy the whole folder",
        )
    if is_bundle(path):
        return _tensor_bundle(path)
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise _several(path, files)
    raise FileFormatError(
        f"{path}: no checkpoint in this folder",
        note="no weights, and no config.json",
        hint="name the file, or the folder that holds it",
    )


def _several(path: Path, files: list[Path]) -> FileFormatError:
    names = ", ".join(file.name for file in files[:6])
    return FileFormatError(f"{path}: several checkpoints in this folder", note=names, hint="name one of them")


def _diffusers_weights(folder: Path) -> Path | None:
    """The plain file; without one, the only variant (diffusion_pytorch_model.fp16.safetensors); None if there is none.

    Raises:
        FileFormatError: there are several variants, or only the one that is not averaged, so the user must choose; or
            the weights are split over several files.
    """
    for name in _DIFFUSERS:
        if (folder / name).is_file():
            return folder / name
    if any(folder.glob(f"{_STEM}*-of-*")):
        raise _split(folder)
    variants: dict[str, Path] = {}
    for suffix in (".safetensors", ".bin"):
        for file in sorted(folder.glob(f"{_STEM}.*{suffix}")):
            if file.is_file():
                variants.setdefault(file.stem.removeprefix(f"{_STEM}."), file)
    if len(variants) > 1 or "non_ema" in variants:
        raise FileFormatError(
            f"{folder}: only variants of the weights in this folder",
            note=", ".join(file.name for file in list(variants.values())[:6]),
            hint="name one of them",
        )
    return next(iter(variants.values()), None)


def _split(folder: Path) -> FileFormatError:
    return FileFormatError(
        f"{folder}: the weights are split over several files",
        hint="diffusers writes them as one: model.save_pretrained(folder, max_shard_size='100GB')",
    )


def _diffusers(path: Path, inside: Path, file: Path) -> CheckpointContents:
    configs, weights = _configs(inside), _read_weights(file)
    return replace(weights, path=path, kind="folder", config=configs["config.json"], configs=configs)


def _both(averaged: CheckpointContents, raw: Path) -> CheckpointContents:
    """The averaged and the raw weights of one checkpoint, under the names of their folders."""
    others = _read_weights(raw).tensors
    tensors = {f"{EMA_FOLDER}.{name}": tensor for name, tensor in averaged.tensors.items()}
    return replace(averaged, tensors=tensors | {f"{raw.parent.name}.{name}": other for name, other in others.items()})


def _configs(inside: Path) -> dict[str, dict[str, Any]]:
    """config.json beside the weights, and its scheduler's; in a checkpoint of a training that is two folders up."""
    configs = {"config.json": read_json(inside / "config.json")}
    outer = inside.absolute().parent
    above = (inside, outer, *([outer.parent] if outer.name.startswith("checkpoint-") else []))
    places = [
        folder / name for folder in above for name in ("scheduler_config.json", "scheduler/scheduler_config.json")
    ]
    if place := next(filter(Path.is_file, places), None):
        configs["scheduler_config.json"] = read_json(place)
    return configs


def with_configs(contents: CheckpointContents) -> CheckpointContents:
    """``contents`` with the config.json beside their file, if there is one and they have none."""
    if contents.config or not (contents.file.parent / "config.json").is_file():
        return contents
    configs = _configs(contents.file.parent)
    return replace(contents, config=configs["config.json"], configs=configs)


class _BundleTensors(Mapping[str, Tensor]):
    """The tensors of a TensorFlow checkpoint, each read on access: half of them are Adam's and are never needed."""

    def __init__(self, bundle: TensorBundle) -> None:
        self._bundle = bundle

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._bundle.entries:
            raise KeyError(name)
        return torch.from_numpy(np.array(self._bundle.read(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.entries)

    def __len__(self) -> int:
        return len(self._bundle.entries)


def _tensor_bundle(path: Path) -> CheckpointContents:
    stem = path.name.removesuffix(".index").partition(".data-")[0]
    for file in path.parent.glob(f"{glob.escape(stem)}.*"):
        small = file.is_file() and 0 < file.stat().st_size < SMALL  # a pointer of Git LFS, or a server's answer
        if small and (foreign := name_foreign(file)) is not None:
            raise foreign
    bundle = TensorBundle(path)
    kwargs = bundle.prefix.parent / "kwargs.json"
    configs = {"kwargs.json": read_json(kwargs)} if kwargs.is_file() else {}
    objects = {} if bundle.step is None else {"step": bundle.step}
    config = configs.get("kwargs.json", {})
    return CheckpointContents(path, "tensor-bundle", _BundleTensors(bundle), objects, config, configs, bundle.prefix)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileFormatError: it is too large, or no JSON object.
    """
    try:
        if not file.is_file() or file.stat().st_size > MAX_JSON:
            raise SpecError(f"not a file of at most {MAX_JSON:,} bytes")
        values = parse_json(file.read_bytes())
    except (OSError, SpecError) as error:
        raise FileFormatError(f"{file}: not a JSON file", note=str(error)[:200]) from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{file}: not a JSON object", note=f"it is {type(values).__name__}")
    return values


def _read_weights(file: Path) -> CheckpointContents:
    """A file of weights, by its content and not by its name.

    Raises:
        FileFormatError: it is something else, or cut off, damaged or unsafe.
    """
    if (foreign := name_foreign(file)) is not None:
        raise foreign
    with file.open("rb") as stream:
        head = stream.read(16)
    # safetensors: eight bytes with the length of a JSON object, then that
    begins = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.stat().st_size
    if begins or (file.suffix == ".safetensors" and not torch_file.is_torch_file(file)):
        tensors, config = _read_safetensors(file)
        return CheckpointContents(file, "safetensors", tensors, config=config, file=file)
    if not torch_file.is_torch_file(file):
        raise FileFormatError(
            f"{file}: neither a torch file, nor safetensors, nor a TensorFlow checkpoint",
            note=f"it begins with {head!r}",
        )
    tensors, objects = _read_torch(file)
    return CheckpointContents(file, "torch", tensors, objects, file=file)


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the JSON object under ``config`` in the metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{file}: cut off, damaged or not a safetensors file", note=str(error)[:200], hint="copy it again"
        ) from error
    config: dict[str, Any] = {}
    if "config" in metadata:
        try:
            values = parse_json(metadata["config"].encode())
            config = values if isinstance(values, dict) else {}
        except SpecError:
            config = {}
    return tensors, config


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    content = torch_file.load(path)
    try:
        return _flatten(path, content)
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:  # RecursionError is a RuntimeError
        # torch's reader makes plain objects only, but a file may set attributes on them that hide their methods
        raise FileFormatError(
            f"{path}: not plain weights",
            note=f"{type(error).__name__}: {error}"[:200],
            hint="save them again: torch.save(model.state_dict(), …)",
        ) from error


def _flatten(path: Path, content: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and plain values by dotted names.

    Raises:
        FileFormatError: tensors that claim to be larger than their storage, two of one name, or a key that is not a
            name.
    """
    tensors: dict[str, Tensor] = {}
    objects: dict[str, object] = {}
    waiting: list[tuple[str, object, int]] = [("", content, 0)]
    items = 0
    while waiting:
        name, value, depth = waiting.pop()
        items += 1
        if items > MAX_ITEMS or depth > 32:  # a list that contains itself, or lists of lists that are all the same
            raise FileFormatError(f"{path}: nested too deeply, or more than {MAX_ITEMS:,} items")
        if isinstance(value, Tensor):
            if name in tensors:
                raise FileFormatError(f"{path}: two tensors are called {name!r}")
            tensors[name] = _plain_tensor(path, name, value)
        elif isinstance(value, Mapping):
            if not isinstance(value, dict) or not all(isinstance(key, (str, int)) for key in dict.keys(value)):
                raise FileFormatError(
                    f"{path}: {name!r} is not a dict of names", note=f"it is a {type(value).__name__}"
                )
            inner = [(str(key), item) for key, item in dict.items(value)]
            waiting += [(f"{name}.{key}" if name else key, item, depth + 1) for key, item in reversed(inner)]
        elif isinstance(value, (list, tuple)):
            many = list(enumerate(value))
            waiting += [(f"{name}.{i}" if name else str(i), item, depth + 1) for i, item in reversed(many)]
        elif value is None or isinstance(value, (bool, int, float, str)):
            objects[name] = value
    if sum(map(_bytes, tensors.values())) > 4 * path.stat().st_size + (1 << 26):
        raise FileFormatError(f"{path}: its tensors are views that would take many times the file's size")
    return tensors, objects


def _plain_tensor(path: Path, name: str, value: Tensor) -> Tensor:
    """``value`` without a gradient, and without attributes that the file set on it.

    Raises:
        FileFormatError: it is not dense, or claims to be larger than its storage.
    """
    tensor = torch.Tensor.detach(value)  # the class's method: the file may have set another one on this object
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise FileFormatError(
            f"{path}: {name!r} is a sparse or quantized tensor, or one without data", hint="save it dense"
        )
    tensor = torch.Tensor.as_subclass(tensor, torch.Tensor)
    if _bytes(tensor) > tensor.untyped_storage().nbytes():
        raise FileFormatError(
            f"{path}: {name!r} has the absurd shape {list(tensor.shape)}",
            note=f"{tensor.untyped_storage().nbytes():,} bytes are stored for it",
        )
    return tensor


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _download(name: str) -> Path:
    """A snapshot of a repository on the Hugging Face hub."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise BackendError(
            f"hf:{name} is downloaded by huggingface_hub, which is not installed",
            hint="pip install huggingface_hub, or download the folder by hand and name it",
        ) from error
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        names = {file.name for file in folder.rglob("*.safetensors")}
        variants = any(name.startswith(_STEM) for name in names)
        if not names or (variants and _DIFFUSERS[0] not in names):  # the plain weights may be there as .bin
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # from the hub, the network or the disk: the hub's error classes change between versions
        # HFValidationError; before huggingface_hub 1.0 what was not found without a network is both
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise InputError(
                f"hf:{name}: not the name of a repository", note=str(error)[:200], hint="hf:ORGANISATION/NAME"
            ) from error
        raise BackendError(
            f"hf:{name} cannot be downloaded",
            note=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300],
            hint="without a network, name a folder that was downloaded before",
        ) from error
    return folder
