"""Ho, Jain, Abbeel's own TensorFlow checkpoints: ``model.ckpt-N.index``, its data file, and ``kwargs.json`` if it is there.

Beside the weights such a checkpoint holds their averages (``…/W/ExponentialMovingAverage``), with which the paper's images
were sampled, and Adam's moments, twice as much again. It stores neither the image size nor the chain: both are taken from
``kwargs.json``, or from what Ho's scripts do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddpm_export.importers.keys import HWIO, NIN, SAME, TRANSPOSE, Op, Row, to_ours, to_theirs, unet_shapes, walk
from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options, SettingsResolver
from ddpm_export.networks.unet_config import UNetConfig, cifar10, lsun256
from ddpmx.diffusion.samplers import Prediction, Variance
from ddpmx.diffusion.schedule import SCHEDULES, schedule_params
from ddpmx.errors import FileFormatError, InputError
from ddpmx.formats.spec import ModelSpec

NAME = "ho-tf"

AVERAGE = "/ExponentialMovingAverage"
"""The suffix of the name of a variable's average."""

_T = TypeVar("_T")
_MARK = "temb/dense0/W"
_SLOTS = ("/Adam", "/Adam_1", "/RMSProp", "/RMSProp_1", "/Momentum")
_PREDICTIONS: Mapping[str, Prediction] = {"eps": "eps", "xstart": "x0", "xprev": "mu"}
_VARIANCES: Mapping[str, Variance] = {
    "fixedlarge": "fixed_large",
    "fixedsmall": "fixed_small",
    "learned": "learned",
}
_SCHEDULES: Mapping[str, str] = {name: name for name in ("linear", "quad", "const", "warmup10", "warmup50", "jsd")}
_SIDES = {"cifar10": 32, "celebahq256": 256, "lsun": 256}

PUBLISHED: Mapping[tuple[int, int], str] = {
    (32, 790_000): "CIFAR-10",
    (256, 2_388_000): "LSUN bedroom",
    (256, 1_761_000): "LSUN cat",
    (256, 4_432_000): "LSUN church",
}
"""The files that Ho et al. published, by the side of an image and the number of steps."""


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the kind of file, and the names in it."""
    scope = _scope(contents.tensors) if contents.kind == "tensor-bundle" else None
    return None if scope is None else f"a TensorFlow checkpoint with {scope}{_MARK}"


def read(contents: CheckpointContents, options: Options) -> Imported:
    """The network of a checkpoint: the averages, or the last step's weights where ``options.weights`` is ``raw``.

    Raises:
        FileFormatError, InputError, SpecError: it is not a network of Ho's code, the averages are missing, its chain is one
            that ddpmx does not run, or the weights are not those of such a network.
    """
    scope = _scope(contents.tensors)
    if contents.kind != "tensor-bundle" or scope is None:
        raise FileFormatError(
            f"{contents.path}: not a TensorFlow checkpoint of Ho et al.'s code", note=f"no variable is called {_MARK}"
        )
    if options.weights not in ("ema", "raw"):
        raise InputError(f"--weights {options.weights!r}: not one of ema and raw, which such a checkpoint has")
    averages = {name for name in contents.tensors if name.startswith(scope) and name.endswith(AVERAGE)}
    plain = {
        name
        for name in contents.tensors
        if name.startswith(scope) and name not in averages and not name.endswith(_SLOTS)
    }
    wanted = averages if options.weights == "ema" else plain
    if not wanted:
        raise FileFormatError(
            f"{contents.path}: it holds {'no averages' if options.weights == 'ema' else 'averages only'}",
            note=f"{len(contents.tensors)} tensors, {len(averages)} of them named …{AVERAGE}",
            hint=f"--weights {'raw' if options.weights == 'ema' else 'ema'} takes the others",
        )
    settings = SettingsResolver(options)
    config = _network(settings, contents, scope, AVERAGE if options.weights == "ema" else "")
    spec = _chain(settings, contents, config)
    shapes = unet_shapes(config)
    chosen, others = (
        f"{len(wanted)} of {len(contents.tensors)} tensors",
        len(contents.tensors) - len(averages) - len(plain),
    )
    settings.add_fact("weights", options.weights, f"{chosen}; the optimiser's {others} are left out")
    _add_published(settings, contents, config)

    def ours(average: bool) -> dict[str, Tensor]:
        names = averages if average else plain
        table = rows(config, scope=scope, average=average)
        return to_ours(table, {name: contents.tensors[name] for name in sorted(names)}, shapes=shapes)

    if options.weights == "raw":
        return settings.finish(NAME, config, spec, ours(average=False))
    return settings.finish(NAME, config, spec, ours(average=True), raw=ours(average=False) if plain else None)


def variables(config: UNetConfig, tensors: Mapping[str, Tensor], *, average: bool = True) -> dict[str, Tensor]:
    """Our tensors under Ho's names and in TensorFlow's layouts: :func:`read` backwards.

    Raises:
        FileFormatError: they do not match such a network.
    """
    return to_theirs(rows(config, average=average), tensors)


# --- names -----------------------------------------------------------------------------------------------------------

_OUTSIDE = {"time0": "temb/dense0", "time1": "temb/dense1"}
_DENSE = {"time0": TRANSPOSE, "time1": TRANSPOSE}


def rows(config: UNetConfig, *, scope: str = "model/", average: bool = False) -> list[Row]:
    """The table of names; ``average`` for the names of the averages."""
    end = AVERAGE if average else ""
    return list(_rows(config, scope, end))


def _rows(config: UNetConfig, scope: str, end: str) -> Iterator[Row]:
    def layer(theirs: str, ours: str, weight: Op) -> Iterator[Row]:
        yield Row((f"{scope}{theirs}/W{end}",), (f"{ours}.weight",), weight)
        yield Row((f"{scope}{theirs}/b{end}",), (f"{ours}.bias",))

    def norm(theirs: str, ours: str) -> Iterator[Row]:
        yield Row((f"{scope}{theirs}/gamma{end}",), (f"{ours}.weight",), SAME)
        yield Row((f"{scope}{theirs}/beta{end}",), (f"{ours}.bias",), SAME)

    for slot in walk(config):
        # the middle's are called block_1, attn_1, block_2
        level, number = ("mid", slot.block + 1) if slot.part == "middle" else (f"{slot.part}_{slot.level}", slot.block)
        if slot.kind in ("downsample", "upsample"):
            if not config.average_pool:
                yield from layer(f"{level}/{slot.kind}/conv", f"{slot.ours}.conv", HWIO)
        elif slot.kind == "norm_out":
            yield from norm("norm_out", slot.ours)
        elif slot.kind != "stage":
            yield from layer(_OUTSIDE.get(slot.kind, slot.kind), slot.ours, _DENSE.get(slot.kind, HWIO))
        else:
            block = f"{level}/block_{number}"
            yield from norm(f"{block}/norm1", f"{slot.residual}.norm1")
            yield from layer(f"{block}/conv1", f"{slot.residual}.conv1", HWIO)
            yield from layer(f"{block}/temb_proj", slot.projection, TRANSPOSE)
            yield from norm(f"{block}/norm2", f"{slot.residual}.norm2")
            yield from layer(f"{block}/conv2", f"{slot.residual}.conv2", HWIO)
            if slot.skip:
                yield from layer(f"{block}/nin_shortcut", f"{slot.residual}.skip", NIN)
            if slot.attention:
                attention = f"{level}/attn_{number}"
                yield from norm(f"{attention}/norm", f"{slot.attention}.norm")
                for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
                    yield from layer(f"{attention}/{theirs}", f"{slot.attention}.{ours}", NIN)


def _scope(names: Mapping[str, object]) -> str | None:
    """The prefix of Ho's names, ``model/`` in his scripts."""
    ends = (f"/{_MARK}", f"/{_MARK}{AVERAGE}")
    scopes = [name[: -len(end) + 1] for name in names for end in ends if name.endswith(end)]
    return min(scopes, key=len) if scopes else None


# --- the network -----------------------------------------------------------------------------------------------------


def _network(settings: SettingsResolver, contents: CheckpointContents, scope: str, end: str) -> UNetConfig:
    """Widths, levels and places of attention from names and shapes; the image's size from elsewhere."""

    def has(name: str) -> bool:
        return f"{scope}{name}{end}" in contents.tensors

    def side(name: str, axis: int) -> int:
        shape = contents.tensors[f"{scope}{name}{end}"].shape if has(name) else ()
        if len(shape) != 4:
            raise FileFormatError(
                f"{contents.path}: {scope}{name} is {'not a convolution' if has(name) else 'missing'}",
                hint="only networks of Ho et al.'s diffusion_tf/models/unet.py can be read",
            )
        return int(shape[axis])

    channels, c_in, c_out = side("conv_in/W", 3), side("conv_in/W", 2), side("conv_out/W", 3)
    levels = _count(lambda level: has(f"down_{level}/block_0/conv1/W"))
    widths = [side(f"down_{level}/block_0/conv1/W", 3) for level in range(levels)]
    if not widths or not channels or any(width < 1 or width % channels for width in widths):
        raise FileFormatError(f"{contents.path}: the widths of its levels are {widths}, not multiples of {channels}")
    if contents.config.get("block_size", 1) != 1:
        raise FileFormatError(
            f"{contents.path}: kwargs.json says block_size {contents.config['block_size']!r}",
            note="its code folds the images into a quarter of the pixels or less before the network; ddpmx does not",
            hint="ddpm_export.export takes any torch module, from Python",
        )
    attends = [level for level in range(levels) if has(f"down_{level}/attn_0/q/W")]
    shown = f"widths {', '.join(map(str, widths))}; attention at level {', '.join(map(str, attends)) or '-'}"
    settings.add_fact("network", shown, "names and shapes")
    size = _size(settings, contents, attends)
    return UNetConfig(
        c_in,
        c_out,
        size,
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=_count(lambda block: has(f"down_0/block_{block}/conv1/W")),
        attention=tuple(size[0] >> level for level in attends),
        dropout=_known(contents, "dropout", lambda p: type(p) in (int, float) and 0 <= p < 1) or 0.0,
        average_pool=levels > 1 and not has("down_0/downsample/conv/W"),
    )


def _size(settings: SettingsResolver, contents: CheckpointContents, attends: list[int]) -> tuple[int, int]:
    dataset = contents.config.get("dataset")
    side = _SIDES.get(dataset) if isinstance(dataset, str) else None
    # in each of Ho's scripts the level with attention is the one of 16 pixels
    guess = 16 << attends[0] if len(attends) == 1 else 32
    size = settings.resolve(
        "size",
        ((guess, guess),),
        known=None if side is None else (side, side),
        source=f"kwargs.json: dataset {dataset}",
        assume="Ho's scripts attend at 16×16" if len(attends) == 1 else "",
        why="a checkpoint does not store it, and not exactly one level has attention",
        closed=False,
        probed=False,
    )
    if len(size) != 2 or any(type(n) is not int or n < 1 for n in size):
        raise InputError(f"size cannot be {size!r}", hint="height and width, for example [32, 32]")
    return size


def _count(there: Callable[[int], bool]) -> int:
    number = 0
    while there(number):
        number += 1
    return number


# --- the chain -------------------------------------------------------------------------------------------------------


def _chain(settings: SettingsResolver, contents: CheckpointContents, config: UNetConfig) -> ModelSpec:
    file = "kwargs.json"
    default = "the default of all of Ho's scripts"
    timesteps = settings.resolve(
        "timesteps",
        (1000,),
        known=_known(contents, "num_diffusion_timesteps", lambda n: type(n) is int),
        source=file,
        assume=default,
        closed=False,
        probed=False,
    )
    named = _choice(contents, "beta_schedule", _SCHEDULES)
    schedule = settings.resolve("schedule", tuple(SCHEDULES), known=named, source=file, assume=default)
    params: dict[str, float] = {}
    if schedule == named or named is None:
        for name, usual in schedule_params(schedule).items():
            known = _known(contents, name, lambda value: type(value) in (int, float))
            params[name] = settings.resolve(
                name, (usual,), known=known, source=file, assume=default, closed=False, probed=False
            )
    mean = _choice(contents, "model_mean_type", _PREDICTIONS)
    predictions: tuple[Prediction, ...] = ("eps", "x0", "v", "mu")
    prediction = settings.resolve("prediction", predictions, known=mean, source=file, assume=default)
    clips: tuple[float | None, ...] = (1.0, None)
    clipped = "Ho's sampler always clips x̂_0"
    if prediction == "mu":
        clips, clipped = (None, 1.0), "Ho's sampler takes μ as it is"
    clip = settings.resolve("clip", clips, assume=clipped, closed=False, probed=False)
    shape = (config.in_channels, *config.size)
    return ModelSpec(shape, timesteps, schedule, params, prediction, _variance(settings, contents, config), clip)


def _variance(settings: SettingsResolver, contents: CheckpointContents, config: UNetConfig) -> Variance:
    """σ² of the chain: run_cifar.py has a flag for it; the other scripts have the small one only.

    A network that predicts log σ² as well has twice the channels in its last convolution.
    """
    known, source = _choice(contents, "model_var_type", _VARIANCES), "kwargs.json"
    learns = config.out_channels == 2 * config.in_channels
    if known is not None and learns != (known == "learned"):
        raise FileFormatError(
            f"{contents.path}: kwargs.json says model_var_type {contents.config['model_var_type']!r}, and the network's "
            f"output has {config.out_channels} channels",
            note="it has twice those of the images where log σ² is learned, and else as many",
        )
    if learns:
        only: tuple[Variance, ...] = ("learned",)
        return settings.resolve("variance", only, known="learned", source="the channels of the output", probed=False)
    if known is None and "beta_schedule" in contents.config:
        known, source = "fixed_small", "kwargs.json has no model_var_type, like those of run_lsun and run_celebahq"
    small: tuple[Variance, ...] = ("fixed_small", "fixed_large")
    large: tuple[Variance, ...] = ("fixed_large", "fixed_small")
    assume = ""
    if _same(config, cifar10()):
        assume = "the network of run_cifar.py, and its default"
    elif _same(config, lsun256()):
        assume = "the network of run_lsun.py and run_celebahq.py, which have no other"
    candidates = small if _same(config, lsun256()) else large
    why = "neither of Ho's two networks, and not in a kwargs.json"
    return settings.resolve("variance", candidates, known=known, source=source, assume=assume, why=why, probed=False)


def _add_published(settings: SettingsResolver, contents: CheckpointContents, config: UNetConfig) -> None:
    """Record the number of steps, and the published model if the file is one."""
    step = contents.objects.get("step")
    if "global_step" in contents.tensors:
        stored = contents.tensors["global_step"]
        if stored.numel() == 1 and stored.dtype in (torch.int32, torch.int64):
            step = int(stored.item())
    if step is None:
        return
    settings.add_fact("step", step, "global_step, or the file's name")
    ho = _same(config, cifar10()) or _same(config, lsun256())
    if ho and isinstance(step, int) and (name := PUBLISHED.get((config.size[0], step))):
        settings.add_fact("published as", f"{name} of Ho et al.", "its network and its number of steps")


def _same(config: UNetConfig, other: UNetConfig) -> bool:
    left, right = config.to_json(), other.to_json()
    return {**left, "dropout": 0} == {**right, "dropout": 0}


def _known(contents: CheckpointContents, name: str, right: Callable[[Any], bool]) -> Any:
    """A value of kwargs.json, or None if it has none.

    Raises:
        FileFormatError: ``right`` does not hold for it: Ho's scripts would not have written it.
    """
    value = contents.config.get(name)
    if value is not None and not right(value):
        raise FileFormatError(f"{contents.path}: kwargs.json says {name} {value!r}"[:400])
    return value


def _choice(contents: CheckpointContents, name: str, choices: Mapping[str, _T]) -> _T | None:
    """The value in ``choices`` for a text of kwargs.json, or None if kwargs.json does not have it.

    Raises:
        FileFormatError: the text is not in ``choices``: ddpmx cannot run it.
    """
    value = contents.config.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        raise FileFormatError(
            f"{contents.path}: kwargs.json says {name} {str(value)[:100]!r}, which ddpmx cannot run",
            note=f"it can run {', '.join(choices)}",
        )
    return choices[value]
