"""Files of weights that are no DDPM of images, named for what they are: adapters, an optimiser, latent models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ddpm_export.importers.reading.contents import CheckpointContents, read_json
from ddpmx.errors import FileFormatError

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_ADAPTER = re.compile(
    r"(^|[._])(lora_[ab]|lora_(up|down)|lora\.(up|down)|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12]|to_[qkv]_lora)"
    r"([._]|$)",
    re.IGNORECASE,
)
_OPTIMISER = re.compile(
    r"(^|\.)(state|optimizer_states?|optimizer|optim|opt)(\.\d+)*\.(state\.)?\d+\.\w+$"
    r"|(^|\.)(exp_avg|exp_avg_sq|exp_inf|max_exp_avg_sq|momentum_buffer|square_avg)$"
)
_INVERSION = re.compile(r"^(string_to_param\.|emb_params$|clip_[lg]$|<[^<>]+>$)")
_AUTOENCODER = re.compile(
    r"(^|_)(vae|vqvae|vqgan|vqmodel|movq|autoencoder|first_stage|cond_stage|text_encoder|text_model)(_|$)|quant_conv"
)
_LATENT = "x is the latent of an autoencoder and no image, and ddpmx has no decoder: it would write latents as PNG"


def refuse(contents: CheckpointContents) -> None:
    """Refuse what holds no DDPM of images, or only a part of what is needed to draw one.

    Raises:
        FileFormatError: it is an optimiser's state, an adapter, an embedding, a latent model, or without weights.
    """
    for check in (_without_weights, _adapter, _textual_inversion, _latent_keys, _latent_pipeline, _optimiser):
        if (error := check(contents)) is not None:
            raise error


# --- no network ------------------------------------------------------------------------------------------------------


def _without_weights(contents: CheckpointContents) -> FileFormatError | None:
    if len(contents.tensors):
        return None
    if any(re.search(r"(^|\.)param_groups\.\d+\.", name) for name in contents.objects):
        return _state_of_optimiser(contents)
    names = ", ".join(list(contents.objects)[:4])
    return FileFormatError(
        f"{contents.path}: there are no weights in it",
        note=f"it holds {names}" if names else None,
        hint=_others(contents),
    )


def _optimiser(contents: CheckpointContents) -> FileFormatError | None:
    """An optimiser's state, if nothing else is there: a checkpoint may hold it beside its network."""
    others = [name for name in contents.tensors if not _OPTIMISER.search(name)]
    kept = [name for name in others if name.endswith((".weight", ".bias", ".g"))]
    known = len(contents.tensors) - len(others)
    return _state_of_optimiser(contents) if known > len(others) and not kept else None


def _state_of_optimiser(contents: CheckpointContents) -> FileFormatError:
    some = ", ".join([*contents.tensors, *contents.objects][:3])
    return FileFormatError(
        f"{contents.path}: the state of an optimiser, not the weights of a network",
        note=f"it holds {some}, …",
        hint=_others(contents) or "the weights are in another file of the same training",
    )


def _adapter(contents: CheckpointContents) -> FileFormatError | None:
    """LoRA and its like: differences of weights, to be added to a network that is elsewhere."""
    names = [name for name in contents.tensors if _ADAPTER.search(name)]
    if not names:
        return None
    whole = any(name.endswith(("base_layer.weight", "conv_in.weight")) for name in contents.tensors)
    if whole:
        return FileFormatError(
            f"{contents.path}: a network with {len(names)} tensors of a LoRA that is not merged into it",
            note=f"called {', '.join(names[:2])}, …",
            hint="merge it where it was trained (merge_and_unload() in peft, fuse_lora() in diffusers), and save again",
        )
    return FileFormatError(
        f"{contents.path}: a LoRA or another adapter: changes to a network, without the network",
        note=f"{len(names)} tensors, called {', '.join(names[:2])}, …",
        hint="merge it into its network where it was trained (merge_and_unload() in peft, fuse_lora() in diffusers), and "
        "save that",
    )


def _textual_inversion(contents: CheckpointContents) -> FileFormatError | None:
    """A few rows for a text encoder's table."""
    names = list(contents.tensors)
    vectors = len(names) <= 4 and all(contents.tensors[name].ndim <= 2 for name in names)
    if not vectors or not any(_INVERSION.search(name) for name in names):
        return None
    return FileFormatError(
        f"{contents.path}: a textual inversion: an embedding for a text encoder, not a network",
        note=f"it holds {', '.join(names[:4])}",
    )


def _others(contents: CheckpointContents) -> str | None:
    """The hint that names the files of weights beside this one."""
    folder = contents.file.parent
    names = sorted(
        path.name
        for path in _inside(folder)
        if path.suffix in _WEIGHTS and path.is_file() and path.name != contents.file.name
    )
    names = [name for name in names if not re.match(r"opt|sched|scaler|random_states|rng", name)]
    return f"the weights may be in {' or '.join(names[:3])}, beside it" if names else None


# --- part of a latent model ------------------------------------------------------------------------------------------


def _latent_keys(contents: CheckpointContents) -> FileFormatError | None:
    """A file that holds an autoencoder or a text encoder beside its network, as CompVis' latent diffusion does."""
    parts = Counter(
        part
        for name in contents.tensors
        if not _OPTIMISER.search(name)
        for part in re.split(r"[./]", name)[:4]
        if _AUTOENCODER.search(part.lower())
    )
    if not parts:
        return None
    listed = ", ".join(f"{part} ({count} tensors)" for part, count in parts.most_common(3))
    return FileFormatError(
        f"{contents.path}: a latent diffusion model, which ddpmx does not run",
        note=f"beside a network, if there is one, it holds {listed}: {_LATENT}",
    )


def _latent_pipeline(contents: CheckpointContents) -> FileFormatError | None:
    """A folder of diffusers in which the network is one part of more."""
    for folder in _pipelines(contents):
        parts = dict(_parts(contents, folder))
        if not parts:
            continue
        listed = ", ".join(f"{name} ({kind})" if kind else name for name, kind in parts.items())
        latent = any(_AUTOENCODER.search(name.lower()) or _coder(kind) for name, kind in parts.items())
        kind = "a latent diffusion model" if latent else "a pipeline of more than a network"
        return FileFormatError(
            f"{contents.path}: {kind}, which ddpmx does not run",
            note=f"beside the network there is {listed}" + (f": {_LATENT}" if latent else ""),
            hint=None
            if latent
            else "if x is an image and the network needs nothing of these, copy unet/ and scheduler/ into a new folder",
        )
    return None


def _coder(kind: str) -> bool:
    return bool(re.search(r"Autoencoder|VQModel|TextModel|TextEncoder", kind))


def _pipelines(contents: CheckpointContents) -> Iterator[Path]:
    """The folders that may be the pipeline's: the given one, the network's, those around it."""
    if not contents.config and not (contents.file.parent / "config.json").is_file():
        return
    network = contents.file.parent.absolute()
    outer = network.parent
    yield network
    if network.name in ("unet", "unet_ema") or network.name in _json(outer / "model_index.json"):
        yield outer
        if outer.name.startswith("checkpoint-"):
            yield outer.parent


def _parts(contents: CheckpointContents, folder: Path) -> Iterator[tuple[str, str]]:
    """The parts of a pipeline beside its network and its scheduler: by model_index.json, and by the folders in it."""
    network = contents.file.parent.name
    index = _json(folder / "model_index.json")
    for name, value in index.items():
        missing = isinstance(value, list) and not any(value)
        if name.startswith("_") or name in ("unet", "scheduler", network) or not isinstance(value, list) or missing:
            continue
        yield name, str(value[-1])[:60]
    for inside in sorted(_inside(folder)):
        if inside.is_dir() and inside.name not in index and _AUTOENCODER.search(inside.name.lower()):
            kind = _json(inside / "config.json").get("_class_name", "")
            yield inside.name, str(kind)[:60]


def _inside(folder: Path) -> list[Path]:
    """What is in a folder; nothing, where it cannot be looked into."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _json(file: Path) -> Mapping[str, Any]:
    """The object in a small JSON file; empty if there is none."""
    return read_json(file) if file.is_file() else {}
