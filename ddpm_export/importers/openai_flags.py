"""The command-line flags of OpenAI's scripts, and those with which their published checkpoints were made.

Their files are bare state dicts. All that the shapes of the weights do not show is in the two projects' READMEs, as
flags; :data:`PUBLISHED` has them as the READMEs do.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.errors import InputError
from ddpmx.formats.spec import ModelSpec

Flags = Mapping[str, str]

SIZES: Mapping[tuple[int, ...], int] = {
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
    (1, 2, 2, 2): 32,
}
"""Multipliers of the widths, and the only image size for which the scripts have them."""

CLASSES = 1000
"""The number of classes with ``class_cond``."""

IMPROVED: Flags = {
    "image_size": "64",
    "num_channels": "128",
    "num_res_blocks": "2",
    "num_heads": "4",
    "attention_resolutions": "16,8",
    "dropout": "0.0",
    "learn_sigma": "False",
    "class_cond": "False",
    "diffusion_steps": "1000",
    "noise_schedule": "linear",
    "predict_xstart": "False",
    "rescale_timesteps": "True",
    "use_scale_shift_norm": "True",
}
"""improved-diffusion's defaults."""

GUIDED: Flags = {
    **IMPROVED,
    "num_head_channels": "-1",
    "resblock_updown": "False",
    "rescale_timesteps": "False",
    "use_new_attention_order": "False",
}
"""guided-diffusion's defaults."""


@dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        files: the names of its checkpoints; several where the training differed and the network did not.
        defaults: its project's default flags.
        line: its flags, as the README has them. Those that only training uses are left out.
    """

    files: tuple[str, ...]
    defaults: Flags
    line: str

    @property
    def flags(self) -> Flags:
        """All flags, with the defaults."""
        return {**self.defaults, **parse(self.line)}


_GUIDED = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --num_channels 256 "
    "--num_head_channels 64 --num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True "
    "--noise_schedule linear --image_size 256 --class_cond "
)

PUBLISHED: Mapping[str, Published] = {
    "cifar10": Published(
        ("cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"),
        IMPROVED,
        "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
        "--diffusion_steps 4000 --noise_schedule cosine",
    ),
    "imagenet64": Published(
        ("imagenet64_uncond_100M_1500K.pt", "imagenet64_uncond_vlb_100M_1500K.pt"),
        IMPROVED,
        "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
        "--diffusion_steps 4000 --noise_schedule cosine",
    ),
    "imagenet64_cond": Published(
        ("imagenet64_cond_270M_250K.pt",),
        IMPROVED,
        "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True "
        "--diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps False",
    ),
    "lsun_bedroom": Published(
        ("lsun_uncond_100M_1200K_bs128.pt", "lsun_uncond_100M_2400K_bs64.pt"),
        IMPROVED,
        "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
        "--use_scale_shift_norm False --attention_resolutions 16 "
        "--diffusion_steps 1000 --noise_schedule linear --rescale_timesteps False",
    ),
    "guided_imagenet64": Published(
        ("64x64_diffusion.pt",),
        GUIDED,
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 --image_size 64 "
        "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
        "--resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    ),
    "guided_imagenet128": Published(
        ("128x128_diffusion.pt",),
        GUIDED,
        "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 --learn_sigma True "
        "--noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 --resblock_updown True "
        "--use_scale_shift_norm True",
    ),
    "guided_imagenet256": Published(("256x256_diffusion.pt",), GUIDED, _GUIDED + "True"),
    "guided_imagenet256_uncond": Published(("256x256_diffusion_uncond.pt",), GUIDED, _GUIDED + "False"),
    "guided_lsun": Published(
        ("lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt"), GUIDED, _GUIDED + "False --dropout 0.1"
    ),
    "guided_lsun_nodropout": Published(("lsun_horse_nodropout.pt",), GUIDED, _GUIDED + "False --dropout 0.0"),
}
"""Every published network except those that enlarge a smaller image, and guided-diffusion's for 512×512."""


def parse(line: str) -> dict[str, str]:
    """``--name value --name value`` as a dict; from ``#`` to the end of a line is a comment.

    Raises:
        InputError: the text is not of this form.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise InputError("not a line of flags", note=str(error)) from error
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise InputError(
            "not a line of flags",
            note=line.strip()[:80],
            hint="flags of its scripts, each with its value: --image_size 64 --num_heads 4",
        )
    return {name[2:]: value for name, value in zip(names, values, strict=True)}


def settings(flags: Flags) -> dict[str, Any]:
    """The settings that the flags set, under our names: ``heads``, ``timesteps``, ``schedule`` …

    Raises:
        InputError: a value that its flag cannot have.
    """
    values: dict[str, Any] = {}
    if "image_size" in flags:
        values["size"] = (_int(flags, "image_size"),) * 2
    if flags.get("num_head_channels", "-1") != "-1":
        values |= {"heads": None, "head_channels": _int(flags, "num_head_channels")}
    elif "num_heads" in flags:
        values["heads"] = _int(flags, "num_heads")
    if flags.get("num_heads_upsample", "-1") not in ("-1", flags.get("num_heads", "")):
        raise InputError("num_heads_upsample: ddpmx's U-Net has as many heads on the way up as on the way down")
    if "use_new_attention_order" in flags:
        values["attention_order"] = "new" if _bool(flags, "use_new_attention_order") else "legacy"
    if "dropout" in flags:
        try:
            values["dropout"] = float(flags["dropout"])
        except ValueError as error:
            raise InputError(f"dropout is {flags['dropout']!r}, not a number") from error
    if "diffusion_steps" in flags:
        values["timesteps"] = _int(flags, "diffusion_steps")
    if "noise_schedule" in flags:
        values["schedule"] = flags["noise_schedule"]
        if values["schedule"] not in ("linear", "cosine"):
            raise InputError(f"noise_schedule is {values['schedule']!r}, and OpenAI's code has linear and cosine")
    if "rescale_timesteps" in flags:
        values["rescale_timesteps"] = _bool(flags, "rescale_timesteps")
    if "predict_xstart" in flags:
        values["prediction"] = "x0" if _bool(flags, "predict_xstart") else "eps"
    if "clip_denoised" in flags:
        values["clip"] = 1.0 if _bool(flags, "clip_denoised") else None
    if "sigma_small" in flags:
        values["variance"] = "fixed_small" if _bool(flags, "sigma_small") else "fixed_large"
    return values


def structure(config: UNetConfig) -> dict[str, Any]:
    """The numbers of a network that the shapes of its weights show."""
    names = ("in_channels", "out_channels", "channels", "multipliers", "blocks", "scale_shift", "resample_blocks")
    heights = [config.size[0] >> level for level in range(len(config.multipliers))]
    return {
        **{name: getattr(config, name) for name in (*names, "average_pool", "classes")},
        "attends": tuple(height in config.attention for height in heights),
    }


def network(flags: Flags) -> UNetConfig:
    """The network that the scripts build from a full set of flags.

    Raises:
        InputError: a value that its flag cannot have.
    """
    values = settings(flags)
    (multipliers,) = (multipliers for multipliers, size in SIZES.items() if (size, size) == values["size"])
    rescale = values["rescale_timesteps"]
    return openai_unet(
        in_channels=3,
        out_channels=6 if _bool(flags, "learn_sigma") else 3,
        size=values["size"],
        channels=_int(flags, "num_channels"),
        multipliers=multipliers,
        blocks=_int(flags, "num_res_blocks"),
        attention=tuple(int(height) for height in flags["attention_resolutions"].split(",")),
        dropout=values["dropout"],
        time_scale=1000 / values["timesteps"] if rescale else 1.0,
        heads=values["heads"] or 1,
        head_channels=values.get("head_channels"),
        scale_shift=_bool(flags, "use_scale_shift_norm"),
        resample_blocks=_bool(flags, "resblock_updown") if "resblock_updown" in flags else False,
        classes=CLASSES if _bool(flags, "class_cond") else None,
    )


ALWAYS: Mapping[str, Any] = {
    "groups": 32,
    "norm_eps": 1e-5,
    "cos_first": True,
    "frequency_shift": 0,
    "symmetric_padding": True,
}
"""The numbers that no flag changes."""


def openai_unet(**numbers: Any) -> UNetConfig:
    """A network of OpenAI's code, with the numbers that no flag changes."""
    return UNetConfig(**numbers, **ALWAYS)


def flag_lines(config: UNetConfig, spec: ModelSpec) -> str:
    """The flags for such a network, as :func:`parse` and their scripts read them."""
    flags = {
        "image_size": config.size[0],
        "num_channels": config.channels,
        "channel_mult": ",".join(map(str, config.multipliers)),
        "num_res_blocks": config.blocks,
        **({"attention_resolutions": ",".join(map(str, config.attention))} if config.attention else {}),
        "num_heads": config.heads,
        "num_head_channels": config.head_channels or -1,
        "use_scale_shift_norm": config.scale_shift,
        "resblock_updown": config.resample_blocks,
        "use_new_attention_order": False,
        "dropout": config.dropout,
        "learn_sigma": config.learned_variance,
        "class_cond": config.classes is not None,
        "diffusion_steps": spec.timesteps,
        "noise_schedule": spec.schedule,
        "rescale_timesteps": spec.timesteps != 1000 and config.time_scale != 1,
        "predict_xstart": spec.prediction == "x0",
        "clip_denoised": spec.clip is not None,
    }
    lines = [f"--{name} {value}" for name, value in flags.items()]
    if not config.learned_variance:
        lines.append(f"--sigma_small {spec.variance == 'fixed_small'}  # the class has it, guided's scripts do not")
    for name, usual, value in (
        ("attention_resolutions", config.attention or None, config.attention),
        ("in_channels", 3, config.in_channels),
        ("num_classes", CLASSES, config.label_count or CLASSES),
        ("conv_resample", True, not config.average_pool),
    ):
        if value != usual:
            lines.append(f"# no flag of the scripts: UNetModel({name}={value})")
    return "\n".join(lines) + "\n"


def _int(flags: Flags, name: str) -> int:
    if not flags[name].isascii() or not flags[name].isdigit() or len(flags[name]) > 9:
        raise InputError(f"{name} is {flags[name]!r}, not a whole number")
    return int(flags[name])


def _bool(flags: Flags, name: str) -> bool:
    word = flags[name].lower()
    if word not in ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"):
        raise InputError(f"{name} is {flags[name]!r}, neither true nor false")
    return word in ("true", "yes", "t", "y", "1")
