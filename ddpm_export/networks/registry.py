"""The networks that a checkpoint may hold, by the type in its ``spec.json``."""

from __future__ import annotations

from typing import Any

from ddpm_export.networks import lucidrains_config, unet_config
from ddpm_export.networks.lucidrains_config import LucidrainsConfig
from ddpm_export.networks.lucidrains_unet import LucidrainsUNet
from ddpm_export.networks.unet import UNet
from ddpm_export.networks.unet_config import UNetConfig
from ddpmx.errors import SpecError
from ddpmx.formats.spec import ModelSpec

Config = UNetConfig | LucidrainsConfig
Network = UNet | LucidrainsUNet


def config_to_json(config: Config) -> dict[str, Any]:
    """Plain JSON values, the type among them."""
    return {"type": "lucidrains" if isinstance(config, LucidrainsConfig) else "unet", **config.to_json()}


def config_from_json(values: object) -> Config:
    """The config from the values of :func:`config_to_json`.

    Raises:
        SpecError: not such an object, or of a type that this ddpmx does not know.
        InputError: numbers of which no network can be built.
    """
    if isinstance(values, dict):
        rest = {key: value for key, value in values.items() if key != "type"}
        if values.get("type") == "unet":
            return UNetConfig.from_json(rest)
        if values.get("type") == "lucidrains":
            return LucidrainsConfig.from_json(rest)
    raise SpecError("the spec's network is of a type that this ddpmx does not know")


def make_network(config: Config) -> Network:
    """The network that a config describes, with new weights."""
    return LucidrainsUNet(config) if isinstance(config, LucidrainsConfig) else UNet(config)


def check_spec(config: Config, spec: ModelSpec) -> None:
    """Check that ``spec`` describes a network of ``config``.

    Raises:
        SpecError: they disagree.
    """
    if isinstance(config, LucidrainsConfig):
        lucidrains_config.check_spec(config, spec)
    else:
        unet_config.check_spec(config, spec)
