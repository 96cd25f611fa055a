"""One directory is one checkpoint; a run keeps the newest ones under ``checkpoints/``.

    runs/x/checkpoints/00000400/
        spec.json              {"model": ModelSpec, "network": UNetConfig}
        ema.safetensors        the averaged weights: what is exported
        weights.safetensors    the weights as trained
        training.json          step, settings, the data's fingerprint
        training.safetensors   Adam's moments

A checkpoint is written beside its final place and renamed once it is whole, so a reader of a run that is still training
sees only whole ones. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_export.networks.registry import Config, Network, check_spec, config_from_json, config_to_json, make_network
from ddpm_export.training.tensor_files import save_tensors
from ddpmx.errors import DdpmxError, FileFormatError, OutputError, SpecError
from ddpmx.formats import model_file
from ddpmx.formats.atomic import make_folder, staging, write_synced
from ddpmx.formats.envelope import parse_json
from ddpmx.formats.model_file import SPEC_FILE, checkpoints, model_spec, read_spec_json
from ddpmx.formats.spec import ModelSpec

Weights = Literal["ema", "raw"]
FILES: Mapping[Weights, str] = {"ema": "ema.safetensors", "raw": "weights.safetensors"}
TRAINING_JSON, TRAINING_TENSORS = "training.json", "training.safetensors"

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_T = TypeVar("_T")


@dataclass(frozen=True)
class TrainingState:
    """The state that exact resumption needs beside the weights.

    Attributes:
        step: optimiser steps made.
        settings: the settings of the run, plain JSON.
        moments: Adam's moments, ``exp_avg.NAME`` and ``exp_avg_sq.NAME``.
    """

    step: int
    settings: dict[str, Any]
    moments: dict[str, Tensor]


def save(
    run: Path,
    spec: ModelSpec,
    network: Config,
    weights: Mapping[str, Tensor],
    ema: Mapping[str, Tensor],
    state: TrainingState,
    *,
    keep: int = 2,
    keep_every: int = 0,
) -> Path:
    """Write a checkpoint of ``run`` and remove all but the newest ``keep`` and those at multiples of ``keep_every``.

    Raises:
        OutputError: it could not be written. Earlier checkpoints are then untouched.
    """
    folder = make_folder(run / "checkpoints")
    final = folder / f"{state.step:08d}"
    _remove_unfinished(folder)
    with staging(folder, final) as part:
        model = spec.replace(weights=weights_hash(ema))
        texts = {
            SPEC_FILE: {"model": model.to_json(whole=True), "network": config_to_json(network)},
            TRAINING_JSON: {"step": state.step, "settings": state.settings},
        }
        for name, values in texts.items():
            write_synced(part / name, (json.dumps(values, indent=2) + "\n").encode())
        save_tensors(part / FILES["raw"], weights)
        save_tensors(part / FILES["ema"], ema)
        save_tensors(part / TRAINING_TENSORS, state.moments)
        _replace(final, part)
    for old in checkpoints(run)[:-keep]:
        if keep_every and int(old.name) % keep_every == 0:
            continue
        if old == final:  # the folder has another run's checkpoints of later steps
            continue
        with contextlib.suppress(OSError, OutputError):
            _remove(old)
    return final


def newest_run(root: Path) -> Path:
    """The run below ``root`` whose newest checkpoint was written last.

    Raises:
        FileFormatError: there is no run.
    """
    runs = [(found[-1].stat().st_mtime, run) for run in root.glob("*") if (found := checkpoints(run))]
    if not runs:
        raise FileFormatError(
            f"there is no run under {root}{os.sep}", hint="name a checkpoint, or train one: ddpmx train --data FOLDER"
        )
    return max(runs)[1]


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at ``path``: itself, or the newest one if it is a run.

    Raises:
        FileFormatError: it is neither.
    """
    path = Path(path)
    if (path / SPEC_FILE).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    if (path / "checkpoints").is_dir():
        raise FileFormatError(
            f"{path}: this run has no checkpoint yet",
            note="training writes one every few minutes (--save-minutes), when it is stopped by Ctrl-C, and at its end",
        )
    if path.is_file():
        if _is_model_file(path):
            raise FileFormatError(
                f"{path}: a model file, not a checkpoint",
                hint="name the run or the checkpoint that it was exported from",
            )
        raise FileFormatError(
            f"{path}: a file, and a checkpoint of ddpmx is a folder",
            hint=f"ddpmx import {shlex.quote(str(path))} -o runs/NAME makes one of another project's checkpoint",
        )
    if model_file.holds_weights(path):
        raise FileFormatError(
            f"{path}: not a checkpoint of ddpmx",
            note=f"it has no {SPEC_FILE}, and weights that may be another project's",
            hint=f"ddpmx import {shlex.quote(str(path))} -o runs/NAME makes a run of them",
        )
    raise FileFormatError(
        f"{path}: no checkpoint there",
        note="the folder does not exist" if not path.exists() else f"it has no {SPEC_FILE}, and no run's checkpoints",
        hint="ddpmx train --data FOLDER --out runs/x writes one",
    )


def _is_model_file(path: Path) -> bool:
    try:
        return model_file.identify(path) != "checkpoint"
    except FileFormatError:
        return False


def load_network(path: str | os.PathLike[str], weights: Weights = "ema") -> tuple[Network, ModelSpec]:
    """The network of a checkpoint or of a run's newest one, in eval mode, on the CPU.

    Raises:
        FileFormatError, SpecError, InputError: something in it is missing, damaged or contradicts the rest.
    """
    return _reread(path, lambda checkpoint: _load_network(checkpoint, weights))


def load_training(path: str | os.PathLike[str]) -> TrainingState:
    """The ``state`` that :func:`save` wrote.

    Raises:
        FileFormatError, SpecError: it is missing or damaged.
    """
    return _reread(path, _load_training)


def read_training_json(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """The optimiser steps made, and the settings of the run, without the moments.

    Raises:
        FileFormatError: the file is missing or damaged.
    """
    file = checkpoint / TRAINING_JSON
    try:
        assert file.is_file()
        values = parse_json(file.read_bytes())
        assert isinstance(values, dict)
        step, settings = values["step"], values["settings"]
        assert type(step) is int
        assert 0 <= step < 1 << 40
        assert isinstance(settings, dict)
    except (OSError, SpecError, KeyError, AssertionError) as error:
        raise FileFormatError(
            f"{file}: the training state is missing or damaged",
            note=str(error)[:200] or None,
            hint="the weights can still be exported",
        ) from error
    return step, settings


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _reread(path: str | os.PathLike[str], read: Callable[[Path], _T]) -> _T:
    """Read a checkpoint; if it vanished meanwhile (a run that is training removes old ones), read the newer one."""
    for _ in range(20):  # each time there was a newer one
        checkpoint = resolve(path)
        try:
            return read(checkpoint)
        except DdpmxError:
            if checkpoint.exists():
                raise
    return read(resolve(path))


def _load_network(checkpoint: Path, weights: Weights) -> tuple[Network, ModelSpec]:
    values = read_spec_json(checkpoint / SPEC_FILE)
    spec = model_spec(checkpoint / SPEC_FILE, values)
    try:
        config = config_from_json(values.get("network"))
        check_spec(config, spec)
    except SpecError as error:
        raise SpecError(f"{checkpoint / SPEC_FILE}: {error.fact}", note=error.note, hint=error.hint) from error
    with torch.device("meta"):  # take no memory before it is known that the file holds the weights
        network = make_network(config)
    file = checkpoint / FILES[weights]
    tensors = read_tensors(file)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    seen = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != seen:
        wrong = sorted(name for name in expected.keys() | seen.keys() if expected.get(name) != seen.get(name))
        raise FileFormatError(
            f"{file}: the weights do not match the network in {SPEC_FILE}",
            note=f"{len(wrong)} tensors missing, surplus or of another shape, {wrong[0]!r} among them",
        )
    if odd := [name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]:
        raise FileFormatError(f"{file}: {odd[0]!r} is {tensors[odd[0]].dtype}; weights must be floats of 16 to 64 bits")
    if bad := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise FileFormatError(f"{file}: {bad[0]!r} holds NaN or infinities", note=f"{len(bad)} such tensors")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False), spec


def _load_training(checkpoint: Path) -> TrainingState:
    step, settings = read_training_json(checkpoint)
    return TrainingState(step, settings, read_tensors(checkpoint / TRAINING_TENSORS))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file.

    Raises:
        FileFormatError: it is missing, cut off or not such a file.
    """
    try:
        if file.exists() and not file.is_file():  # reading a pipe could block, and no signal would interrupt it
            raise ValueError("not a file")
        return load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"{file}: not a whole safetensors file",
            note=str(error)[:200],
            hint="use an earlier checkpoint of the run, or copy it again",
        ) from error


def _replace(final: Path, part: Path) -> None:
    """Rename ``part`` to ``final``; an older ``final`` (the same step, reached again) is removed only after that."""
    if not final.exists():
        part.rename(final)
        return
    hidden = final.parent / f".old-{secrets.token_hex(8)}"
    try:
        hidden.mkdir()
        final.rename(hidden / final.name)
        part.rename(final)
    except BaseException:
        if not final.exists() and (hidden / final.name).exists():
            (hidden / final.name).rename(final)
        raise
    finally:
        if final.exists():
            shutil.rmtree(hidden, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint: rename it first, so that no reader ever sees a part of it."""
    with staging(checkpoint.parent, checkpoint) as part:
        checkpoint.rename(part / checkpoint.name)


def _remove_unfinished(folder: Path) -> None:
    """Restore what a run that was killed was about to replace, and remove what earlier versions left when killed."""
    for old in folder.glob(".old-*/*"):
        if not (folder / old.name).exists():
            old.rename(folder / old.name)
    for part in (*folder.glob(".part-*"), *folder.glob(".old-*")):
        shutil.rmtree(part, ignore_errors=True)
