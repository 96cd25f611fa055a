"""OpenAI's improved-diffusion and guided-diffusion: bare state dicts, which name neither network nor chain.

The shapes of the weights show the structure. The rest (heads, the order in qkv, schedule, T, whether t is rescaled) is
taken from what the user says, from ``openai_flags.txt`` beside the weights, or from the published flags of a file that
is known by its name or by a structure that no other network has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_export.importers import openai_flags
from ddpm_export.importers.keys import config_error, side, to_ours, to_theirs, unet_shapes
from ddpm_export.importers.openai_flags import ALWAYS, PUBLISHED, SIZES, openai_unet
from ddpm_export.importers.openai_keys import rows
from ddpm_export.importers.reading.found import Found
from ddpm_export.importers.settings import Imported, Inquiry, Options
from ddpm_export.networks.unet_config import UNetConfig, check_spec
from ddpmx.diffusion.samplers import Prediction, Variance
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

NAME = "openai"
_T = TypeVar("_T")

FLAGS_FILE = "openai_flags.txt"

_FIRST = "input_blocks.0.0.weight"
_LEVEL = "input_blocks.{}.0"


def recognise(found: Found) -> str | None:
    """By the names."""
    prefix = _prefix(found)
    return None if prefix is None else f"the weights are called {prefix}input_blocks.*, time_embed.*"


def _prefix(found: Found) -> str | None:
    """DataParallel's, or none."""
    for prefix in ("", "module."):
        if prefix + _FIRST in found.tensors and prefix + "time_embed.0.weight" in found.tensors:
            return prefix
    return None


def read(found: Found, options: Options) -> Imported:
    """The network of a file.

    Raises:
        FileFormatError, InputError: the tensors are not those of such a network, or not what was said.
    """
    name = found.file.name
    if options.weights == "raw" and name.startswith("ema_"):
        raise InputError(f"{name}: averaged weights, by its name", hint="the others are in a file model*.pt beside it")
    ask = Inquiry(options)
    theirs = found.below(_prefix(found) or "")
    config, spec, new_order = understand(ask, found, theirs)
    ask.fact("weights", len(theirs), name)
    return ask.done(NAME, config, spec, to_ours(rows(config, new_order), theirs, shapes=unet_shapes(config)))


def understand(ask: Inquiry, found: Found, theirs: Mapping[str, Tensor]) -> tuple[UNetConfig, ModelSpec, bool]:
    """Network, chain, and whether qkv is in the new order; from the shapes of the weights and what is told.

    Raises:
        FileFormatError, InputError: no such network, or another than was said.
    """
    seen = _structure(theirs)
    told = _told(ask, found, seen)
    widths = [seen["channels"] * multiplier for multiplier in seen["multipliers"]]
    ask.fact("network", f"{widths}, {seen['blocks']} blocks per level", "shapes of the weights")
    size = _size(told, seen)
    schedule, timesteps, rescale = _times(told, seen)
    attended = {width for width, attends in zip(widths, seen["attends"], strict=True) if attends} | {widths[-1]}
    heads, head_channels = _heads(told, sorted(attended))
    config = openai_unet(
        **{name: value for name, value in seen.items() if name != "attends"},
        size=size,
        attention=tuple(size[0] >> level for level, attends in enumerate(seen["attends"]) if attends),
        dropout=told.settle("dropout", (0.0,), assume="not in the file; it acts in training only", closed=False),
        time_scale=1000 / timesteps if rescale else 1.0,
        heads=heads,
        head_channels=head_channels,
    )
    new_order = _new_order(told, config)
    prediction: Prediction = told.settle("prediction", ("eps", "x0"), assume="its scripts' default")
    spec = ModelSpec(
        (config.in_channels, *config.size),
        timesteps,
        schedule,
        schedule_params(schedule, timesteps),
        prediction,
        _variance(told, config),
        told.settle("clip", (1.0, None), assume="its scripts clip", closed=False),
        classes=config.classes,
    )
    return config, spec, new_order


def schedule_params(schedule: str, timesteps: int) -> dict[str, float]:
    """Theirs: the linear schedule is stretched, so that β·T is as with T = 1000."""
    if schedule != "linear":
        return {}
    scale = 1000 / timesteps
    return {"beta_start": scale * 0.0001, "beta_end": scale * 0.02}


# --- what the shapes show --------------------------------------------------------------------------------------------


def _structure(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers of :func:`.openai_flags.structure`.

    Raises:
        FileFormatError: no network of this code, or one that draws upon more than noise, t and a class.
    """
    if not any(name.startswith("output_blocks.") for name in theirs):
        raise FileFormatError(
            "a network without a way up, as OpenAI's classifiers are",
            note="it answers no ε, and ddpmx has no use for it",
        )
    if any(".transformer_blocks." in name for name in theirs):
        raise FileFormatError("a network with cross-attention", note="it is told by a text, which ddpmx cannot give it")
    c_in, c_out = side(theirs, _FIRST, 1), side(theirs, "out.2.weight", 0)
    if c_in == 6 and c_out in (3, 6):
        raise FileFormatError(
            "a network that enlarges images", note="it takes 6 channels: x_t, and a smaller image made large"
        )
    if c_out not in (c_in, 2 * c_in):
        raise config_error("channels in and out", f"{c_in} and {c_out}")
    channels, embedded = side(theirs, _FIRST, 0), side(theirs, "time_embed.0.weight", 1)
    if channels != embedded:
        raise FileFormatError(
            f"the first level is {channels} wide, and the time embedding {embedded}",
            note="ddpmx's U-Net has one number for both; guided-diffusion's for 512×512 has not",
        )
    levels, blocks, resample = _levels(theirs)
    first = [_LEVEL.format(1 + level * (blocks + 1)) for level in range(levels)]
    widths = [side(theirs, f"{block}.out_layers.3.weight", 0) for block in first]
    if channels < 1 or any(width % channels or width < channels for width in widths):
        raise config_error("widths", widths)
    return {
        "in_channels": c_in,
        "out_channels": c_out,
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": blocks,
        "attends": tuple(f"{block[:-1]}1.qkv.weight" in theirs for block in first),
        "scale_shift": side(theirs, f"{first[0]}.emb_layers.1.weight", 0) == 2 * widths[0],
        "resample_blocks": resample == "blocks",
        "average_pool": resample == "pool",
        "classes": side(theirs, "label_emb.weight", 0) if "label_emb.weight" in theirs else None,
    }


def _levels(theirs: Mapping[str, Tensor]) -> tuple[int, int, str]:
    """How many levels, how many blocks in each, and how the size changes between them: conv, blocks, pool or "".

    There are levels·(blocks + 1) input blocks, those that resample among them, and as many output blocks.
    """
    total = 0
    while f"output_blocks.{total}.0.in_layers.2.weight" in theirs:
        total += 1
    inner = range(1, total)
    ups = (n for n in range(total) for place in (1, 2) if f"output_blocks.{n}.{place}.in_layers.2.weight" in theirs)
    convs = (i - 1 for i in inner if f"{_LEVEL.format(i)}.op.weight" in theirs)
    nothing = (i - 1 for i in inner if f"{_LEVEL.format(i)}.in_layers.2.weight" not in theirs)
    kinds: tuple[tuple[str, Iterator[int]], ...] = (("blocks", ups), ("conv", convs), ("pool", nothing))
    resample, blocks = next(((kind, n) for kind, found in kinds for n in found), ("", total - 1))
    if blocks < 1 or total % (blocks + 1):
        raise config_error("blocks on the way up, and per level", f"{total}, {blocks}")
    return total // (blocks + 1), blocks, resample


# --- what they do not ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """Settings that somebody but the user tells.

    Attributes:
        ask: whom to ask for the others.
        settings: by name.
        source: who tells them.
        alike: a published network of this structure, where it is not known to be that.
    """

    ask: Inquiry
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    alike: str = ""

    def settle(self, name: str, candidates: Sequence[_T], **how: Any) -> _T:
        """:meth:`.Inquiry.settle`, which knows them."""
        known = self.settings.get(name)
        unset = name in self.settings and known is None
        settled: _T = self.ask.settle(name, candidates, known=known, none_is_known=unset, source=self.source, **how)
        return settled


def _told(ask: Inquiry, found: Found, seen: Mapping[str, Any]) -> _Told:
    """What a published network, or a file of flags, tells.

    Raises:
        FileFormatError: the file of flags is none.
        InputError: the network that was said is another.
    """
    file = found.file.parent / FLAGS_FILE
    if "model" not in ask.options.said and file.is_file() and file.stat().st_size <= 1 << 16:
        try:
            flags = openai_flags.parse(file.read_text(encoding="utf-8", errors="replace"))
            return _Told(ask, openai_flags.settings(flags), FLAGS_FILE)
        except InputError as error:
            raise FileFormatError(f"{file}: {error.fact}", note=error.note, hint=error.hint) from error
    structures = {name: openai_flags.structure(openai_flags.network(p.flags)) for name, p in PUBLISHED.items()}
    alike = [name for name, structure in structures.items() if structure == seen]
    known, why = next((name for name in alike if found.file.name in PUBLISHED[name].files), None), "the file's name"
    # Structure is no proof: people train the same networks with other heads, schedules and T, which it does not show
    if known is None and "model" not in ask.options.said:
        return _Told(ask, alike=alike[0] if alike else "")
    model = ask.settle("model", tuple(PUBLISHED), known=known, source=why)
    if model not in alike:
        differs = [
            f"{name} {value}, and {structures[model][name]} there"
            for name, value in seen.items()
            if value != structures[model][name]
        ]
        raise InputError(f"the file is not {model}", note="; ".join(differs))
    # improved-diffusion has one order of qkv, and no flag for it
    settings = {"attention_order": "legacy", **openai_flags.settings(PUBLISHED[model].flags)}
    return _Told(ask, settings, f"the published flags of {model}")


def _size(told: _Told, seen: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width: the network is as happy with any, but the scripts are not."""
    usual, attends = SIZES.get(seen["multipliers"]), seen["attends"]
    guess = usual or (16 << attends.index(True) if True in attends else 64)
    size = told.settle(
        "size",
        ((guess, guess),),
        assume=f"the scripts have these widths for {usual} pixels only" if usual else "",
        why="the network is as happy with any",
        closed=False,
        probed=False,
    )
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise InputError(f"size cannot be {size!r}", hint="for example 64x64")
    return size


def _times(told: _Told, seen: Mapping[str, Any]) -> tuple[str, int, bool]:
    """The schedule, T, and whether the network sees t·1000/T."""
    why = f"if it is the published one of its structure, --model {told.alike} tells all" if told.alike else ""
    schedule = told.settle("schedule", ("linear", "cosine"), why=why)
    timesteps = told.settle(
        "timesteps",
        (1000, 4000) if seen["resample_blocks"] else (4000, 1000),
        why="any other is possible",
        closed=False,
        probed=False,
    )
    if timesteps < 1:
        raise InputError(f"timesteps cannot be {timesteps!r}", hint="a whole number above 0")
    if timesteps == 1000:
        told.ask.settle("rescale_timesteps", (False, True), assume="with T = 1000 it changes nothing")
        return schedule, timesteps, False
    rescale = told.settle(
        "rescale_timesteps", (True, False), why="improved-diffusion's default is true, guided-diffusion's false"
    )
    return schedule, timesteps, rescale


def _heads(told: _Told, widths: list[int]) -> tuple[int, int | None]:
    """The number of heads, and the width of one where that is what was said; for attentions of these widths."""
    said = told.ask.options.said
    if "head_channels" in said and "heads" not in said:
        return 1, told.settle("head_channels", (64,), closed=False)
    candidates: list[int | None] = [n for n in (4, 1, 2, 8) if all(width % n == 0 for width in widths)]
    if all(width % 64 == 0 for width in widths):
        # where all are of one width, so many heads are the same, and real images could not tell the two apart
        by_width = None if len(widths) > 1 else widths[0] // 64
        candidates += [by_width] if by_width not in candidates else []
    why = "none: heads of one width, --head-channels 64" if None in candidates else ""
    heads = told.settle("heads", candidates, why=why, closed=False)
    if heads is not None:
        return heads, None
    return 1, told.settle("head_channels", (64,), assume="as in all published networks", closed=False)


def _new_order(told: _Told, config: UNetConfig) -> bool:
    """Whether qkv's rows are [Q | K | V], and not [q | k | v] of one head after the other."""
    if all(config.heads_of(width) == 1 for width in config.attention_widths):
        told.ask.settle("attention_order", ("legacy",), assume="with one head both are the same")
        return False
    why = "new: guided-diffusion with use_new_attention_order"
    return told.settle("attention_order", ("legacy", "new"), why=why) == "new"


def _variance(told: _Told, config: UNetConfig) -> Variance:
    if config.learned_variance:
        learned: tuple[Variance, ...] = ("learned_range",)
        return told.ask.settle("variance", learned, known=learned[0], source="it answers twice the image's channels")
    fixed: tuple[Variance, ...] = ("fixed_large", "fixed_small")
    return told.settle("variance", fixed, why="it acts in the chain only", probed=False)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(imported: Imported, folder: Path) -> None:
    """``model.pt``, a bare state dict, and ``openai_flags.txt``, what guided-diffusion's scripts have to be told about it.

    Raises:
        InputError: that code cannot compute this network or this chain.
    """
    config, spec = imported.config, imported.spec
    if not isinstance(config, UNetConfig):
        raise InputError("OpenAI's U-Net is a relative of Ho's, and this network is of another kind")
    check_spec(config, spec)
    fixed = {**ALWAYS, "time_scale": 1.0 if config.time_scale == 1 else 1000 / spec.timesteps}
    if len(config.multipliers) == 1 or config.resample_blocks or config.average_pool:
        del fixed["symmetric_padding"]  # nothing there that is padded
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise InputError(f"OpenAI's U-Net cannot compute {name} = {getattr(config, name)}", note=f"only {value}")
    if config.size[0] != config.size[1]:
        raise InputError("OpenAI's images are square", note=f"{config.size[0]}×{config.size[1]}")
    wanted = ModelSpec(spec.shape, spec.timesteps, spec.schedule, schedule_params(spec.schedule, spec.timesteps))
    if spec.schedule not in ("linear", "cosine") or spec.schedule_params != wanted.schedule_params:
        raise InputError(
            f"OpenAI's code has no such schedule: {spec.schedule}",
            note=str(dict(spec.schedule_params)),
            hint="linear (with β·1000/T) or cosine",
        )
    if spec.prediction not in ("eps", "x0"):
        raise InputError(f"OpenAI's chain takes ε or x_0, and this network answers {spec.prediction}")
    if spec.clip not in (1.0, None):
        raise InputError(f"OpenAI's chain keeps x̂_0 within ±1 or not at all, and this one within ±{spec.clip:g}")
    torch.save(to_theirs(rows(config), imported.tensors), folder / "model.pt")
    (folder / FLAGS_FILE).write_text(openai_flags.flag_lines(config, spec), encoding="utf-8")
