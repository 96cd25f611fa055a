"""diffusers' JSON files, read and written: UNet2DModel's config, and the DDPM or DDIM scheduler's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import SettingsResolver
from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.diffusion.samplers import Prediction
from ddpmx.diffusion.schedule import SCHEDULES, Float64, is_number, schedule_params
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

UNET_DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
"""diffusers' (0.42) default for each field that config.json does not have. Not one of them is Ho's value."""

_SCHEDULER_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}

_SCHEDULER_OTHERS = frozenset(
    (
        *("_class_name", "_diffusers_version", "_name_or_path", "predict_epsilon"),
        # which timesteps their loop visits, and from where: ddpmx has flags of its own for that
        *("timestep_spacing", "steps_offset", "set_alpha_to_one", "timesteps", "num_inference_steps"),
        # of thresholding, which is refused
        *("dynamic_thresholding_ratio", "sample_max_value"),
        # of older releases, without effect on what is computed
        *("tensor_format", "skip_prk_steps", "trained_timesteps"),
    )
)

_ONLY: Mapping[str, tuple[object, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
"""Fields of which this graph can express these values only."""

_NULLABLE: Mapping[str, tuple[type, ...]] = {
    "sample_size": (int, list),
    "time_embedding_dim": (int,),
    "mid_block_type": (str,),
    "attention_head_dim": (int,),
    "attn_norm_num_groups": (int,),
    "class_embed_type": (str,),
    "num_class_embeds": (int,),
    "num_train_timesteps": (int,),
    "trained_betas": (list,),
}
"""The types of fields that may also be null; every other field has the type of its default."""

_AVERAGE = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
"""Fields that EMAModel.save_pretrained adds to the network's: how the average was made."""

_COUNTS = ("in_channels", "out_channels", "freq_shift", "layers_per_block", "downsample_padding", "norm_num_groups")

_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid_beta"}
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")


# --- reading ---------------------------------------------------------------------------------------------------------


def read_network(settings: SettingsResolver, config: Mapping[str, Any]) -> UNetConfig:
    """The network that config.json describes.

    Raises:
        FileFormatError, InputError: this graph cannot express it.
    """
    named = config.get("_class_name", "UNet2DModel")
    if named != "UNet2DModel":
        raise FileFormatError(
            f"config.json describes a {named}, and only UNet2DModel is a DDPM's network",
            note="text-conditional and latent models are not supported",
        )
    fields = {key: value for key, value in config.items() if not key.startswith("_") and key not in _AVERAGE}
    values = _checked("config.json", fields, UNET_DEFAULTS)
    if unknown := sorted(set(values) - set(UNET_DEFAULTS)):
        raise FileFormatError(
            f"config.json has fields that ddpmx does not know: {', '.join(unknown)}",
            note=f"it was written by diffusers {config.get('_diffusers_version', 'of no stated version')}",
        )
    for name, possible in _ONLY.items():
        if values[name] not in possible:
            raise _inexpressible(name, values[name], possible)
    widths, down, up = (
        _sequence(values, name, kind)
        for name, kind in (("block_out_channels", int), ("down_block_types", str), ("up_block_types", str))
    )
    down, up = ([kind.removeprefix("UNetRes") for kind in kinds] for kinds in (down, up))
    attends = [_one_of("down_block_types", kind, ("DownBlock2D", "AttnDownBlock2D")) for kind in down]
    attends_up = [_one_of("up_block_types", kind, ("UpBlock2D", "AttnUpBlock2D")) for kind in up]
    if attends != attends_up[::-1]:
        raise FileFormatError(
            "config.json has attention at a resolution on one side only",
            note=f"down {', '.join(down)}; up {', '.join(up)}",
            hint="in this graph attention follows every block of a resolution, both on the way down and on the way up",
        )
    if len(widths) != len(down) or any(width < 1 or width % widths[0] for width in widths):
        raise FileFormatError(f"config.json: block_out_channels are {widths}, not multiples of the first")
    if values["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise _inexpressible("time_embedding_dim", values["time_embedding_dim"], (None, 4 * widths[0]))
    groups = values["norm_num_groups"]
    scale_shift = values["resnet_time_scale_shift"] == "scale_shift"
    # with scale_shift diffusers leaves out the norm of the middle's attention unless attn_norm_num_groups is set
    if values["attn_norm_num_groups"] != groups and (scale_shift or values["attn_norm_num_groups"] is not None):
        raise _inexpressible("attn_norm_num_groups", values["attn_norm_num_groups"], (groups,))
    side = values["sample_size"]
    size = None if side is None else (side, side) if type(side) is int else tuple(side)
    if size is not None and [type(length) for length in size] != [int, int]:
        raise FileFormatError(f"config.json: sample_size cannot be {str(side)[:100]!r}")
    size = settings.resolve("size", ((32, 32), (64, 64)), known=size, source="config.json", closed=False, probed=False)
    head_channels = settings.resolve(
        "head_channels",
        (8, None),
        known=config.get("attention_head_dim"),
        none_is_known="attention_head_dim" in config,
        source="config.json: attention_head_dim",
        assume="diffusers' default: config.json has no attention_head_dim (null would be one head)",
        closed=False,
    )
    settings.add_fact("network", f"{widths}, {values['layers_per_block']} blocks per level", "config.json")
    if "decay" in config:
        steps = str(config.get("optimization_step", "unknown"))[:40]
        settings.add_fact("average", f"decay {str(config['decay'])[:40]}, {steps} steps", "config.json, by EMAModel")
    return UNetConfig(
        in_channels=values["in_channels"],
        out_channels=values["out_channels"],
        size=size,
        channels=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=values["layers_per_block"],
        attention=tuple(size[0] >> level for level, attention in enumerate(attends) if attention),
        dropout=float(values["dropout"]),
        groups=groups,
        norm_eps=values["norm_eps"],
        cos_first=values["flip_sin_to_cos"],
        frequency_shift=values["freq_shift"],
        symmetric_padding=values["downsample_padding"] == 1,
        head_channels=head_channels,
        scale_shift=scale_shift,
        classes=values["num_class_embeds"],
    )


def read_chain(settings: SettingsResolver, contents: CheckpointContents, config: UNetConfig) -> ModelSpec:
    """The chain that scheduler_config.json describes; without that file, every setting of it is a question.

    Raises:
        FileFormatError, InputError: ddpmx cannot run it.
    """
    shape = (config.in_channels, *config.size)
    scheduler = contents.configs.get("scheduler_config.json")
    if scheduler is None:
        why = "there is no scheduler_config.json"
        names = tuple(name for name in ("linear", "cosine", "quad", "sigmoid_beta") if name in SCHEDULES)
        return ModelSpec(
            shape,
            settings.resolve("timesteps", (1000,), why=why, closed=False, probed=False),
            settings.resolve("schedule", names, why=why),
            {},
            settings.resolve("prediction", ("eps", "v", "x0"), why=why),
            _variance(settings, config, None, why),
            settings.resolve("clip", (1.0, None), assume="diffusers' default", closed=False),
            classes=config.classes,
        )
    source = "scheduler_config.json"
    named = scheduler.get("_class_name", "DDPMScheduler")
    if named not in _SCHEDULERS:
        raise FileFormatError(
            f"{source} describes a {named}, and only {' and '.join(_SCHEDULERS)} are read",
            hint="write the folder again with a DDPMScheduler made from its config",
        )
    values = _checked(source, scheduler, _SCHEDULER_DEFAULTS)
    if unknown := sorted(scheduler.keys() - _SCHEDULER_DEFAULTS.keys() - _SCHEDULER_OTHERS):
        raise FileFormatError(
            f"{source} has fields that ddpmx does not know: {', '.join(map(str, unknown))[:200]}",
            note="they may change what the chain computes",
            hint="if they do not, remove them in a copy of the folder",
        )
    if "predict_epsilon" in scheduler:  # the first releases had this instead of prediction_type
        by_flag = "epsilon" if scheduler["predict_epsilon"] is True else "sample"
        if scheduler.get("prediction_type", by_flag) != by_flag or type(scheduler["predict_epsilon"]) is not bool:
            raise FileFormatError(f"{source}: predict_epsilon and prediction_type contradict each other")
        values["prediction_type"] = by_flag
    for name in ("thresholding", "rescale_betas_zero_snr"):
        if values[name]:
            raise _inexpressible(name, values[name], (False,), source)
    params: dict[str, float] = {}
    betas = values["trained_betas"]
    if betas is not None:
        if not all(is_number(beta) for beta in betas):
            raise FileFormatError(f"{source}: trained_betas must be numbers")
        schedule, betas = "betas", np.asarray(betas, np.float64)
        timesteps: Any = len(betas)
        settings.add_fact("schedule", f"betas, {timesteps} of them", f"{source}: trained_betas")
        settings.add_fact(
            "timesteps",
            timesteps,
            f"the number of trained_betas; num_train_timesteps is {values['num_train_timesteps']}",
        )
    else:
        theirs = values["beta_schedule"]
        if theirs not in _SCHEDULES:
            raise _inexpressible("beta_schedule", theirs, tuple(_SCHEDULES), source)
        schedule = settings.resolve(
            "schedule", tuple(SCHEDULES), known=_SCHEDULES[theirs], source=f"{source}: {theirs}"
        )
        own = schedule_params(schedule)
        params = {name: values[name] for name in ("beta_start", "beta_end") if name in own}
        timesteps = settings.resolve(
            "timesteps", (1000,), known=values["num_train_timesteps"], source=source, closed=False, probed=False
        )
    prediction = values["prediction_type"]
    if prediction not in _PREDICTIONS:
        raise _inexpressible("prediction_type", prediction, tuple(_PREDICTIONS), source)
    clip = settings.resolve(
        "clip",
        (1.0, None),
        known=float(values["clip_sample_range"]) if values["clip_sample"] else None,
        none_is_known=True,
        source=f"{source}: clip_sample",
        closed=False,
        probed=False,
    )
    return ModelSpec(
        shape,
        timesteps,
        schedule,
        params,
        settings.resolve(
            "prediction", ("eps", "x0", "v"), known=_PREDICTIONS[prediction], source=f"{source}: {prediction}"
        ),
        _variance(settings, config, None if named == "DDIMScheduler" else values["variance_type"], source),
        clip,
        classes=config.classes,
        betas=betas,
    )


def latent_sign(scheduler: Mapping[str, Any]) -> str:
    """What in a scheduler's config hints at a latent model, or "".

    Rombach et al.'s latent models all have the quadratic schedule, from 0.0015 or 0.00085 where Ho's begins at 0.0001, and
    x̂_0 is not clipped, as latents have no bounds.
    """
    start = scheduler.get("beta_start")
    latent = scheduler.get("beta_schedule") == "scaled_linear" and scheduler.get("clip_sample") is False
    if not latent or not isinstance(start, float) or start < 0.0005:
        return ""
    return f"schedule and clip are those of latent diffusion models (scaled_linear from {start}, no clip)"


def _variance(settings: SettingsResolver, config: UNetConfig, theirs: str | None, source: str) -> Any:
    """σ² of the chain. DDIM's scheduler has no field for it, and DDIM with η = 1 has the small one."""
    if theirs is not None and theirs not in _VARIANCES:
        raise _inexpressible("variance_type", theirs, tuple(_VARIANCES), source)
    learned = config.learned_variance
    if theirs is not None and (theirs == "learned_range") != learned:
        raise FileFormatError(
            f"variance_type is {theirs}, but the network's output has {config.out_channels} channels",
            hint="with a learned variance the output has twice the image's channels, and only then",
        )
    if learned:
        return settings.resolve(
            "variance", ("learned_range",), known="learned_range", source="the output has twice the image's channels"
        )
    return settings.resolve(
        "variance",
        ("fixed_small", "fixed_large"),
        known=None if theirs is None else _VARIANCES[theirs],
        source=f"{source}: {theirs}",
        assume="diffusers' default",
        probed=False,
    )


def _checked(file: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, with diffusers' defaults for missing fields.

    Raises:
        FileFormatError: a field has another type than it may have.
    """
    filled = {**defaults, **values}
    for name, default in defaults.items():
        kinds: tuple[type, ...] = (*_NULLABLE[name], type(None)) if name in _NULLABLE else (type(default),)
        if type(default) in (int, float) and name not in _NULLABLE:
            kinds = (int,) if name in _COUNTS else (int, float)
        if type(filled[name]) not in kinds:
            raise FileFormatError(f"{file}: {name} cannot be {str(filled[name])[:100]!r}")
    return filled


def _inexpressible(
    name: str, value: object, possible: tuple[object, ...], file: str = "config.json"
) -> FileFormatError:
    return FileFormatError(
        f"{file}: {name} is {value!r}, which this graph cannot express",
        note=f"it can express {', '.join(map(str, possible))}",
        hint="ddpm_export.export takes any torch module, from Python" if file == "config.json" else None,
    )


def _sequence(values: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    value = values[name]
    if not isinstance(value, (list, tuple)) or not value or any(type(item) is not kind for item in value):
        raise FileFormatError(f"config.json: {name} cannot be {value!r}")
    return list(value)


def _one_of(name: str, kind: str, kinds: tuple[str, str]) -> bool:
    """Whether ``kind`` is the second of ``kinds``, the one with attention."""
    if kind not in kinds:
        raise _inexpressible(name, kind, kinds)
    return kind == kinds[1]


# --- writing ---------------------------------------------------------------------------------------------------------


def unet_json(config: object) -> dict[str, Any]:
    """config.json of a network.

    Raises:
        InputError: UNet2DModel cannot compute it.
    """
    if not isinstance(config, UNetConfig):
        raise InputError("UNet2DModel cannot compute this network", note="it is not a U-Net of Ho's kind")
    for name, usual in (("time_scale", 1), ("resample_blocks", False), ("average_pool", False)):
        if getattr(config, name) != usual:
            raise InputError(f"UNet2DModel cannot compute {name} = {getattr(config, name)}", note=f"only {usual}")
    head_widths = {width // config.heads_of(width) for width in config.attention_widths}
    if config.heads > 1 and len(head_widths) > 1:
        raise InputError(
            f"UNet2DModel cannot have {config.heads} heads in attentions of different widths",
            note="all its heads have one width",
        )
    one_head = config.heads == 1 and config.head_channels is None
    attends = [(config.size[0] >> level) in config.attention for level in range(len(config.multipliers))]
    height, width = config.size
    return {
        "_class_name": "UNet2DModel",
        **UNET_DEFAULTS,
        "sample_size": height if height == width else [height, width],
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "freq_shift": config.frequency_shift,
        "flip_sin_to_cos": config.cos_first,
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "downsample_padding": int(config.symmetric_padding),
        "dropout": config.dropout,
        "attention_head_dim": None if one_head else head_widths.pop(),
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups if config.scale_shift else None,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "num_class_embeds": config.label_count or None,  # "no class" is one more of them there
    }


def scheduler_json(spec: ModelSpec) -> dict[str, Any]:
    """scheduler_config.json of a chain.

    Raises:
        InputError: DDPMScheduler cannot run it.
    """
    if spec.prediction not in _PREDICTIONS.values():
        raise InputError(f"DDPMScheduler takes ε, x_0 or v, and this network predicts {spec.prediction}")
    if spec.variance == "learned":  # it has that name too, for an output that is σ² and not its logarithm
        raise InputError("DDPMScheduler cannot take a second output that is log σ²")
    theirs = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    params = dict(spec.schedule_params)
    ranges: dict[str, Any] = {name: params.pop(name) for name in ("beta_start", "beta_end") if name in params}
    usual = schedule_params(spec.schedule) if spec.schedule in SCHEDULES else {}
    named = spec.schedule in theirs and all(usual[name] == value for name, value in params.items())
    betas: Float64 = spec.make_schedule().betas
    return {
        "_class_name": "DDPMScheduler",
        **_SCHEDULER_DEFAULTS,
        "num_train_timesteps": spec.timesteps,
        "beta_schedule": theirs[spec.schedule] if named else "linear",
        **(ranges if named else {}),
        "trained_betas": None if named else betas.tolist(),
        "variance_type": spec.variance,
        "clip_sample": spec.clip is not None,
        "clip_sample_range": 1.0 if spec.clip is None else spec.clip,
        "prediction_type": next(name for name, ours in _PREDICTIONS.items() if ours == spec.prediction),
    }
