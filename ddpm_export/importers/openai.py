"""OpenAI's improved-diffusion and guided-diffusion: bare state dicts, which name neither network nor chain.

The shapes of the weights show the structure. The rest (heads, the order in qkv, schedule, T, whether t is rescaled) is
taken from the user's options, from ``openai_flags.txt`` beside the weights, or from the published flags of a file that is
known by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ddpm_export.importers import openai_flags, wrappers
from ddpm_export.importers.keys import config_error, side, to_ours, to_theirs, unet_shapes
from ddpm_export.importers.openai_flags import ALWAYS, PUBLISHED, SIZES, openai_unet
from ddpm_export.importers.openai_keys import rows
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver
from ddpm_export.networks.unet_config import UNetConfig
from ddpm_export.training.tensor_files import save_state_dict
from ddpmx.diffusion.samplers import Prediction, Variance
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

NAME = "openai"
_T = TypeVar("_T")

FLAGS_FILE = "openai_flags.txt"

_FIRST = "input_blocks.0.0.weight"
MARKS = (_FIRST, "time_embed.0.weight")
_LEVEL = "input_blocks.{}.0"


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the names of the tensors."""
    found = wrappers.prefixes(contents, MARKS)
    return f"the weights are called {found[0]}input_blocks.*, time_embed.*" if found else None


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a file.

    Raises:
        FileFormatError, InputError: the tensors do not match such a network, or do not fit the options.
    """
    name = contents.file.name
    if options.weights == "raw" and name.startswith("ema_"):
        raise InputError(
            f"{name}: holds averaged weights, by its name", hint="the raw ones are in a file model*.pt beside it"
        )
    settings = SettingsResolver(options)
    averages = ("",) if name.startswith("ema_") else ()
    weights = wrappers.take(contents, MARKS, options, settings, averages=averages)
    config, spec, new_order = understand(settings, contents, weights.chosen.tensors)
    table, shapes = rows(config, new_order), unet_shapes(config)
    ours, *raw = (to_ours(table, network.tensors, shapes=shapes) for network in weights.each())
    return settings.finish(NAME, config, spec, ours, raw=raw[0] if raw else None)


def understand(
    settings: SettingsResolver, contents: CheckpointContents, theirs: Mapping[str, Tensor]
) -> tuple[UNetConfig, ModelSpec, bool]:
    """Network, chain, and whether qkv is in the new order; from the shapes of the weights and the known settings.

    Raises:
        FileFormatError, InputError: no such network, or another one than the options name.
    """
    seen = _structure(theirs)
    known = _known_settings(settings, contents, seen)
    widths = [seen["channels"] * multiplier for multiplier in seen["multipliers"]]
    settings.add_fact("network", f"{widths}, {seen['blocks']} blocks per level", "shapes of the weights")
    size = _size(known, seen)
    schedule, timesteps, rescale = _times(known, seen)
    attended = {width for width, attends in zip(widths, seen["attends"], strict=True) if attends} | {widths[-1]}
    heads, head_channels = _heads(known, sorted(attended))
    config = openai_unet(
        **{name: value for name, value in seen.items() if name != "attends"},
        size=size,
        attention=tuple(size[0] >> level for level, attends in enumerate(seen["attends"]) if attends),
        dropout=known.resolve("dropout", (0.0,), assume="not in the file; only training uses it", closed=False),
        time_scale=1000 / timesteps if rescale else 1.0,
        heads=heads,
        head_channels=head_channels,
    )
    new_order = _new_order(known, config)
    prediction: Prediction = known.resolve("prediction", ("eps", "x0"), assume="its scripts' default")
    spec = ModelSpec(
        (config.in_channels, *config.size),
        timesteps,
        schedule,
        schedule_params(schedule, timesteps),
        prediction,
        _variance(known, config),
        known.resolve("clip", (1.0, None), assume="its scripts clip", closed=False),
        classes=config.classes,
    )
    return config, spec, new_order


def schedule_params(schedule: str, timesteps: int) -> dict[str, float]:
    """The parameters of their schedule: the linear one is stretched, so that β·T is as with T = 1000."""
    if schedule != "linear":
        return {}
    scale = 1000 / timesteps
    return {"beta_start": scale * 0.0001, "beta_end": scale * 0.02}


# --- what the shapes show --------------------------------------------------------------------------------------------


def _structure(theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The numbers of :func:`.openai_flags.structure`.

    Raises:
        FileFormatError: no network of this code, or one that takes more than x_t, t and a class.
    """
    if not any(name.startswith("output_blocks.") for name in theirs):
        raise FileFormatError(
            "a network without the upward half, as OpenAI's classifiers are",
            note="it does not predict ε, so ddpmx cannot use it",
        )
    if any(".transformer_blocks." in name for name in theirs):
        raise FileFormatError(
            "a network with cross-attention", note="it is conditioned on text, which ddpmx does not support"
        )
    c_in, c_out = side(theirs, _FIRST, 1), side(theirs, "out.2.weight", 0)
    if c_in == 6 and c_out in (3, 6):
        raise FileFormatError(
            "a network that enlarges images", note="it takes 6 channels: x_t, and a smaller image scaled up"
        )
    if c_out not in (c_in, 2 * c_in):
        raise config_error("channels in and out", f"{c_in} and {c_out}")
    channels, embedded = side(theirs, _FIRST, 0), side(theirs, "time_embed.0.weight", 1)
    if channels != embedded:
        raise FileFormatError(
            f"the first level is {channels} channels wide, and the time embedding {embedded}",
            note="ddpmx's U-Net has one number for both; guided-diffusion's for 512×512 has two",
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
    resample, blocks = next(((kind, n) for kind, places in kinds for n in places), ("", total - 1))
    if blocks < 1 or total % (blocks + 1):
        raise config_error("blocks on the way up, and per level", f"{total}, {blocks}")
    return total // (blocks + 1), blocks, resample


# --- what the shapes do not show -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _KnownSettings:
    """Settings known from elsewhere than the user, and the resolver for the others.

    Attributes:
        resolver: of all settings.
        values: of the known settings, by name.
        source: where they are from.
        alike: a published network of this structure, where the file is not known to be that one.
    """

    resolver: SettingsResolver
    values: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    alike: str = ""

    def resolve(self, name: str, candidates: Sequence[_T], **how: Any) -> _T:
        """:meth:`.SettingsResolver.resolve` with the known value, if there is one."""
        known = self.values.get(name)
        unset = name in self.values and known is None
        value: _T = self.resolver.resolve(name, candidates, known=known, none_is_known=unset, source=self.source, **how)
        return value


def _known_settings(
    settings: SettingsResolver, contents: CheckpointContents, seen: Mapping[str, Any]
) -> _KnownSettings:
    """The settings of a published network, or of a file of flags.

    Raises:
        FileFormatError: the file of flags cannot be parsed.
        InputError: the model that the user named is another network.
    """
    file = contents.file.parent / FLAGS_FILE
    if "model" not in settings.options.values and file.is_file() and file.stat().st_size <= 1 << 16:
        try:
            flags = openai_flags.parse(file.read_text(encoding="utf-8", errors="replace"))
            return _KnownSettings(settings, openai_flags.settings(flags), FLAGS_FILE)
        except InputError as error:
            raise FileFormatError(f"{file}: {error.fact}", note=error.note, hint=error.hint) from error
    structures = {name: openai_flags.structure(openai_flags.network(p.flags)) for name, p in PUBLISHED.items()}
    alike = [name for name, structure in structures.items() if structure == seen]
    known, why = next((name for name in alike if contents.file.name in PUBLISHED[name].files), None), "the file's name"
    # Structure is no proof: people train the same networks with other heads, schedules and T, which it does not show
    if known is None and "model" not in settings.options.values:
        return _KnownSettings(settings, alike=alike[0] if alike else "")
    model = settings.resolve("model", tuple(PUBLISHED), known=known, source=why)
    if model not in alike:
        differs = [
            f"{name} is {value}, and {structures[model][name]} in {model}"
            for name, value in seen.items()
            if value != structures[model][name]
        ]
        raise InputError(f"the file is not {model}", note="; ".join(differs))
    # improved-diffusion has one order of qkv, and no flag for it
    values = {"attention_order": "legacy", **openai_flags.settings(PUBLISHED[model].flags)}
    return _KnownSettings(settings, values, f"the published flags of {model}")


def _size(known: _KnownSettings, seen: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width: the weights fit any, but the scripts have one size for most lists of widths."""
    usual, attends = SIZES.get(seen["multipliers"]), seen["attends"]
    guess = usual or (16 << attends.index(True) if True in attends else 64)
    size = known.resolve(
        "size",
        ((guess, guess),),
        assume=f"the scripts have these widths for {usual} pixels only" if usual else "",
        why="the weights fit any size",
        closed=False,
        probed=False,
    )
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise InputError(f"size cannot be {size!r}", hint="for example 64x64")
    return size


def _times(known: _KnownSettings, seen: Mapping[str, Any]) -> tuple[str, int, bool]:
    """The schedule, T, and whether the network takes t·1000/T."""
    why = f"--model {known.alike} sets all, if it is the published network of this structure" if known.alike else ""
    schedule = known.resolve("schedule", ("linear", "cosine"), why=why)
    timesteps = known.resolve(
        "timesteps",
        (1000, 4000) if seen["resample_blocks"] else (4000, 1000),
        why="any other is possible",
        closed=False,
        probed=False,
    )
    if timesteps < 1:
        raise InputError(f"timesteps cannot be {timesteps!r}", hint="a whole number above 0")
    if timesteps == 1000:
        known.resolver.resolve("rescale_timesteps", (False, True), assume="with T = 1000 it changes nothing")
        return schedule, timesteps, False
    rescale = known.resolve(
        "rescale_timesteps", (True, False), why="improved-diffusion's default is true, guided-diffusion's false"
    )
    return schedule, timesteps, rescale


def _heads(known: _KnownSettings, widths: list[int]) -> tuple[int, int | None]:
    """The number of heads, or 1 and the width of one head; for attentions of these widths."""
    chosen = known.resolver.options.values
    if "head_channels" in chosen and "heads" not in chosen:
        return 1, known.resolve("head_channels", (64,), closed=False)
    candidates: list[int | None] = [n for n in (4, 1, 2, 8) if all(width % n == 0 for width in widths)]
    if all(width % 64 == 0 for width in widths):
        # where all are of one width, that number of heads is the same network, and real images could not decide
        by_width = None if len(widths) > 1 else widths[0] // 64
        candidates += [by_width] if by_width not in candidates else []
    why = "none: heads of one width, --head-channels 64" if None in candidates else ""
    heads = known.resolve("heads", candidates, why=why, closed=False)
    if heads is not None:
        return heads, None
    return 1, known.resolve("head_channels", (64,), assume="as in all published networks", closed=False)


def _new_order(known: _KnownSettings, config: UNetConfig) -> bool:
    """Whether qkv's rows are [Q | K | V], and not [q | k | v] of one head after the other."""
    if all(config.heads_of(width) == 1 for width in config.attention_widths):
        known.resolver.resolve("attention_order", ("legacy",), assume="with one head both are the same")
        return False
    why = "new: guided-diffusion with use_new_attention_order"
    return known.resolve("attention_order", ("legacy", "new"), why=why) == "new"


def _variance(known: _KnownSettings, config: UNetConfig) -> Variance:
    if config.learned_variance:
        learned: tuple[Variance, ...] = ("learned_range",)
        return known.resolver.resolve(
            "variance", learned, known=learned[0], source="the output has twice the image's channels"
        )
    fixed: tuple[Variance, ...] = ("fixed_large", "fixed_small")
    return known.resolve("variance", fixed, why="only the chain uses it", probed=False)


# --- writing ---------------------------------------------------------------------------------------------------------


def write(imported: Imported, folder: Path) -> None:
    """Write ``model.pt``, a bare state dict, and ``openai_flags.txt``, the flags for guided-diffusion's scripts.

    Raises:
        InputError: that code cannot compute this network or this chain.
    """
    config, spec = imported.config, imported.spec
    if not isinstance(config, UNetConfig):
        raise InputError("OpenAI's code cannot compute this network", note="it is not a U-Net of Ho's kind")
    fixed = {**ALWAYS, "time_scale": 1.0 if config.time_scale == 1 else 1000 / spec.timesteps}
    if len(config.multipliers) == 1 or config.resample_blocks or config.average_pool:
        del fixed["symmetric_padding"]  # the network has no padded convolution
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise InputError(f"OpenAI's U-Net cannot compute {name} = {getattr(config, name)}", note=f"only {value}")
    if config.size[0] != config.size[1]:
        raise InputError("OpenAI's code takes square images only", note=f"{config.size[0]}×{config.size[1]}")
    wanted = ModelSpec(spec.shape, spec.timesteps, spec.schedule, schedule_params(spec.schedule, spec.timesteps))
    if spec.schedule not in ("linear", "cosine") or spec.schedule_params != wanted.schedule_params:
        raise InputError(
            f"OpenAI's code has no such schedule: {spec.schedule}",
            note=str(dict(spec.schedule_params)),
            hint="linear (with β·1000/T) or cosine",
        )
    if spec.prediction not in ("eps", "x0"):
        raise InputError(f"OpenAI's chain takes ε or x_0, and this network predicts {spec.prediction}")
    if spec.variance == "learned":
        raise InputError("the scripts' learned variance lies between two bounds, and this network's is log σ² itself")
    if spec.clip not in (1.0, None):
        raise InputError(f"OpenAI's chain clips x̂_0 to ±1 or not at all, and this one to ±{spec.clip:g}")
    save_state_dict(folder / "model.pt", to_theirs(rows(config), imported.tensors))
    (folder / FLAGS_FILE).write_text(openai_flags.flag_lines(config, spec), encoding="utf-8")
