"""Checkpoints of denoising-diffusion-pytorch: a Trainer's ``model-{milestone}.pt``, or the weights of its parts alone.

A Trainer's file does not state architecture, schedule or objective, but all of it except the image size follows from the
tensors: widths from shapes, the schedule from the buffer ``betas``, the objective from ``loss_weight``, which is a
function of the signal-to-noise ratio that differs between objectives. The graph changed between releases; where names and
shapes do not show it, the release that a Trainer writes into its file decides.

The averaged weights may come with averaged buffers, so buffers are always taken from the network that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddpm_export.importers import wrappers
from ddpm_export.importers.keys import to_ours
from ddpm_export.importers.lucidrains_keys import network_shapes, rows
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver
from ddpm_export.networks.lucidrains_config import LucidrainsConfig
from ddpmx.diffusion.samplers import Prediction
from ddpmx.diffusion.schedule import Float64, Schedule, make_schedule
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

NAME = "lucidrains"
PROJECT = "denoising-diffusion-pytorch"

MARKS = ("init_conv.weight", "downs.0.0.block1.proj.weight")
"""Names of every U-Net of the project. A GaussianDiffusion holds it as ``model.``, or a compiled or wrapped one."""

RELEASES: Mapping[str, dict[str, Any]] = {
    "1.7.7": {},
    "1.7.3": {"divided": True},
    "1.7.1": {"divided": True, "standardised": "least"},
    "1.6.4": {"divided": True, "standardised": "plus", "attention_norm": "layer"},
}
"""The last release of each of the graphs that have the same names, with attention wrapped in ``fn.fn``."""

BETA_TOLERANCE = 1e-4
"""Largest relative difference between an array of β and a named schedule that is taken for it. Theirs is computed partly
in float32: their sigmoid differs from ours by 1.3e-5 at T = 1000 and 5e-5 at T = 4000, at the second to last step."""

_LOSS_TOLERANCE = 1e-3
_OBJECTIVES: Mapping[str, Prediction] = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


# --- reading ---------------------------------------------------------------------------------------------------------


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names, in any container or bare."""
    found = wrappers.prefixes(contents, MARKS)
    if not found:
        return None
    whole = any(name == "betas" or name.endswith(".betas") for name in contents.tensors)
    kind = "a GaussianDiffusion" if whole else "a U-Net"
    return f"the weights are called {found[0]}init_conv.*, downs.0.0.block1.*: {kind} of {PROJECT}"


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network in the file.

    Raises:
        FileFormatError: tensors are missing, surplus, of other shapes, or not finite; or it is another of the project's
            networks.
        InputError: the options do not fit.
    """
    settings = SettingsResolver(options)
    weights = wrappers.take(contents, MARKS, options, settings)
    theirs = weights.chosen.tensors
    buffers = _buffers(contents, weights)
    wrapped = "mid_attn.fn.fn.to_qkv.weight" in theirs
    config = _config(
        theirs, settings, wrapped, _version(wrappers.beside(contents.objects, weights.chosen.stored, "version"))
    )
    spec = _spec(config, buffers, settings)
    table, shapes = rows(config, wrapped=wrapped), network_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes) for network in weights.each())
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None, betas=spec.betas)


def _buffers(contents: CheckpointContents, weights: wrappers.Weights) -> dict[str, Float64]:
    """The buffers of the GaussianDiffusion around the U-Net that was trained, or else around its average; float64 [T].

    Raises:
        FileFormatError: they are not floats, not finite, or not all of one length.
    """
    names = wrappers.plain_names(contents)
    roots = [network.prefix[:-1].rpartition(".") for network in (weights.trained, weights.chosen) if network.prefix]
    root = next((outer + dot for outer, dot, _ in roots if f"{outer}{dot}betas" in names), None)
    buffers: dict[str, Float64] = {}
    for name in ("betas", "loss_weight", "p2_loss_weight") if root is not None else ():
        if f"{root}{name}" not in names:
            continue
        tensor = contents.tensors[names[f"{root}{name}"]]
        if tensor.ndim != 1 or not tensor.dtype.is_floating_point or not torch.isfinite(tensor).all():
            raise FileFormatError(
                f"{root}{name} must be one finite number for each t", note=f"{list(tensor.shape)} of {tensor.dtype}"
            )
        buffers[name] = tensor.double().numpy()
    if len({len(values) for values in buffers.values()}) > 1:
        raise FileFormatError(
            "the buffers of the diffusion have different lengths",
            note=", ".join(f"{name}: {len(values)}" for name, values in buffers.items()),
        )
    return buffers


def _version(version: object) -> tuple[int, ...] | None:
    """The release that wrote a Trainer's file, None if it is not recorded."""
    if not isinstance(version, str) or not (match := re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", version)):
        return None
    return tuple(map(int, match.groups()))


class _Shapes:
    """Shapes of tensors by name; a missing tensor is a clear error."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        if name not in self._tensors:
            raise FileFormatError(f"missing tensor {name} of a U-Net of {PROJECT}")
        shape = tuple(self._tensors[name].shape)
        if len(shape) != ndim:
            hint = "its networks for sequences and videos are not supported" if name == "init_conv.weight" else None
            raise FileFormatError(f"{name} has {len(shape)} dimensions, expected {ndim}", hint=hint)
        return shape


def _config(
    weights: Mapping[str, Tensor], settings: SettingsResolver, wrapped: bool, version: tuple[int, ...] | None
) -> LucidrainsConfig:
    """The config of the network, from the shapes of its weights, the release and the settings."""
    shapes = _Shapes(weights)
    if any(name.startswith(("classes_mlp.", "classes_emb.", "null_classes_emb")) for name in weights):
        raise FileFormatError(
            f"this is {PROJECT}'s network for classifier-free guidance", hint="only its plain U-Net is supported"
        )
    stem, c_in = shapes.of("init_conv.weight", 4)[:2]
    c_out = shapes.of("final_conv.weight", 4)[0]
    channels = shapes.of("time_mlp.1.weight", 2)[0] // 4
    levels = 0
    while levels < 12 and f"downs.{levels}.0.block1.proj.weight" in shapes:
        levels += 1
    widths = []
    for level in range(levels):
        last = level == levels - 1
        if not last and f"downs.{level}.3.1.weight" not in shapes:
            raise FileFormatError(
                f"this network downsamples in a way that {PROJECT} gave up before release 1.0",
                note=f"there is no downs.{level}.3.1.weight",
            )
        widths.append(shapes.of(f"downs.{level}.3.weight" if last else f"downs.{level}.3.1.weight", 4)[0])
    if not widths or not channels or any(width % channels for width in widths):
        raise FileFormatError(
            f"the widths are not those of a U-Net of {PROJECT}", note=f"{channels}, {', '.join(map(str, widths))}"
        )
    # out = C or 2·C (learned variance), in = C or 2·C (self-conditioning), and never both: their code has no such class
    self_condition = c_in == 2 * c_out
    image_channels = c_out if self_condition else c_in
    multipliers = tuple(width // channels for width in widths)
    inner = "fn.fn." if wrapped else ""
    full = tuple(f"downs.{level}.2.{inner}to_out.weight" in shapes for level in range(levels))
    places = [f"downs.{level}.2.{inner}" for level in range(levels)]
    hidden = [shapes.of(f"{place}to_qkv.weight", 4)[0] // 3 for place in places]
    changes: dict[str, Any] = {}
    if f"{places[0]}mem_kv" in shapes:
        # [2, heads, channels, count] where attention is linear, else [2, heads, count, channels]
        kinds = [shapes.of(f"{place}mem_kv", 4) for place in places]
        heads = tuple(kind[1] for kind in kinds)
        head_channels = tuple(kind[3] if whole else kind[2] for kind, whole in zip(kinds, full, strict=True))
        changes["memory"] = kinds[0][2] if full[0] else kinds[0][3]
    else:
        fit = [n for n in (4, 8, 1, 2, 16) if all(width % n == 0 for width in hidden)] or [1]
        assume = "their default" if fit[0] == 4 and set(hidden) == {128} else ""
        n = settings.resolve("heads", fit, assume=assume, why="the weights are the same for any number of heads")
        heads, head_channels = (n,) * levels, tuple(width // n for width in hidden)
        changes["memory"] = 0
    if "time_mlp.0.weights" in shapes:
        changes["fourier"] = 2 * shapes.of("time_mlp.0.weights", 1)[0]
    else:
        changes["theta"] = settings.resolve("theta", (10000.0,), assume="their default", closed=False)
    if "mid_block1.block1.norm.weight" in shapes:
        changes["block_norm"] = "group"
        changes["groups"] = settings.resolve("groups", (8,), assume="their default", closed=False)
    if wrapped:
        changes |= _release(settings, version)
    sizes: tuple[int | tuple[int, ...], ...] = (128, 64, 32, 256, (128, 128))
    size = settings.resolve(
        "size",
        sizes,
        why=f"height and width in pixels; the weights fit every size divisible by {2 ** (levels - 1)}",
        closed=False,
        probed=False,
    )
    config = LucidrainsConfig(
        in_channels=image_channels,
        out_channels=c_out,
        size=cast("tuple[int, int]", (size, size) if isinstance(size, int) else size),
        channels=channels,
        stem=None if stem == channels else stem,
        multipliers=multipliers,
        self_condition=self_condition,
        full_attention=full,
        heads=heads,
        head_channels=head_channels,
        **changes,
    )
    settings.add_fact("network", f"{channels} × {multipliers}", "shapes of the weights")
    if self_condition:
        settings.add_fact("self_condition", True, f"init_conv takes {c_in} channels, final_conv gives {c_out}")
    return config


def _release(settings: SettingsResolver, version: tuple[int, ...] | None) -> dict[str, Any]:
    """The fields of the config in which releases before 1.8 differ, by the release that wrote the file."""
    known = None
    if version is not None:
        if version < (1, 0, 0):
            raise FileFormatError(
                f"this file was written by {PROJECT} {'.'.join(map(str, version))}",
                hint="releases from 1.0 on are supported",
            )
        newest_first = [(name, tuple(map(int, name.split(".")))) for name in RELEASES]
        known = next((name for name, last in reversed(newest_first) if version <= last), next(iter(RELEASES)))
    name = settings.resolve(
        "release",
        tuple(RELEASES),
        known=known,
        source="version in the file",
        why="the network changed with 1.7.0, 1.7.2 and 1.7.4, which the weights do not show; each candidate is the last "
        "release of a graph",
    )
    return RELEASES[name]


# --- schedule and objective ------------------------------------------------------------------------------------------


def _spec(config: LucidrainsConfig, buffers: Mapping[str, Float64], settings: SettingsResolver) -> ModelSpec:
    """The spec, as far as the diffusion's buffers determine it."""
    learned = config.out_channels != config.in_channels
    fields: dict[str, Any] = {}
    betas = buffers.get("betas")
    if betas is None:
        T = settings.resolve("timesteps", (1000,), why="the file has the U-Net alone", closed=False, probed=False)
        name = settings.resolve(
            "schedule", ("sigmoid_alpha_bar", "cosine", "linear"), why="the file has the U-Net alone"
        )
        params = dict(_named(T))[name]
    else:
        T = len(betas)
        try:
            schedule = Schedule.from_betas(betas)
        except InputError as error:
            raise FileFormatError(f"betas are not a schedule: {error.fact}", note=error.note) from error
        settings.add_fact("timesteps", T, "the length of betas")
        known, params, error_of = _recognised(betas)
        candidates = ("betas",) if known == "betas" else (known, "betas")
        fit = f", to within {error_of:.1g}" if known != "betas" else ", which no named schedule fits"
        source = "the values of betas" + fit
        name = settings.resolve("schedule", candidates, known=known, source=source)
        if name == "betas":
            fields["betas"], params = betas, {}
    prediction: Prediction
    if learned:
        prediction = settings.resolve(
            "prediction", ("eps",), known="eps", source="their code predicts ε with a learned variance, always"
        )
    else:
        known_objective = None
        if betas is not None and "loss_weight" in buffers:
            fitting = list(objectives(schedule, buffers["loss_weight"]))
            known_objective = _OBJECTIVES[fitting[0]] if len(fitting) == 1 else None
        prediction = settings.resolve(
            "prediction",
            ("v", "eps", "x0"),
            known=known_objective,
            source="loss_weight, as a function of the signal-to-noise ratio",
            why="loss_weight fits none of their objectives"
            if "loss_weight" in buffers
            else "no loss_weight in the file",
        )
    data_range = settings.resolve(
        "data_range", ("[-1, 1]", "[0, 1]"), assume="auto_normalize, their default", probed=False
    )
    if data_range != "[-1, 1]":
        raise InputError(
            "a chain of ddpmx runs on images in [−1, 1]",
            note="with auto_normalize off their code does not map images to that range",
        )
    settings.add_fact("variance", "learned_range" if learned else "fixed_small", "their code")
    settings.add_fact("clip", 1.0, "their code")
    return ModelSpec(
        (config.in_channels, *config.size),
        timesteps=T,
        schedule=name,
        schedule_params=params,
        prediction=prediction,
        variance="learned_range" if learned else "fixed_small",
        clip=1.0,
        self_condition=config.self_condition,
        **fields,
    )


def _named(T: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Their schedules under our names, with our parameters. Their linear one is scaled by 1000/T."""
    yield "sigmoid_alpha_bar", {}
    yield "cosine", {}
    yield "linear", {"beta_start": 0.1 / T, "beta_end": 20 / T}


def _recognised(betas: Float64) -> tuple[str, dict[str, float], float]:
    """The name of the schedule of these β, its parameters, and the largest relative difference; or ``betas``."""
    for name, params in _named(len(betas)):
        try:
            ours = make_schedule(name, len(betas), params).betas
        except InputError:
            continue  # with T of 20 or less, β of their linear schedule leaves (0, 1]
        error = float(np.max(np.abs(betas - ours) / ours))
        if error <= BETA_TOLERANCE:
            return name, params, error
    return "betas", {}, math.nan


def objectives(schedule: Schedule, loss_weight: Float64) -> Iterator[str]:
    """Those of their objectives whose weights can be ``loss_weight``, float64 [T].

    With s = ᾱ/(1−ᾱ) they are s'/s for pred_noise, s' for pred_x0 and s'/(s+1) for pred_v, where s' is s, or min(s, γ)
    (Hang et al. 2023), or max(s, γ) as releases 1.5.0 to 1.5.4 had it.
    """
    snr = schedule.snr
    for name, factor in (("pred_noise", snr), ("pred_x0", np.ones_like(snr)), ("pred_v", snr + 1)):
        clipped = loss_weight * factor
        variants = (snr, np.minimum(snr, clipped.max()), np.maximum(snr, clipped.min()))
        if any(np.all(np.abs(clipped - variant) <= _LOSS_TOLERANCE * variant) for variant in variants):
            yield name
