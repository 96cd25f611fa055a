"""How other projects' tensors become ours and back: two-way tables of names, and the few ways to lay a tensor out.

An importer's table is a list of :class:`Row`, made by one loop over :func:`walk`. Read from left to right it imports,
from right to left it exports; both directions come from the same rows, so that one cannot drift from the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, Protocol

import torch
from torch import Tensor

from ddpm_export.networks.unet import UNet, UNetConfig
from ddpmx.errors import FileFormatError, InputError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SHOWN = 4

# --- layouts ---------------------------------------------------------------------------------------------------------


class Op(Protocol):
    """A layout: two functions that undo each other exactly."""

    def ours(self, *theirs: Tensor) -> tuple[Tensor, ...]:
        """Our tensors, from theirs."""
        ...

    def theirs(self, *ours: Tensor) -> tuple[Tensor, ...]:
        """Their tensors, from ours."""
        ...


@dataclass(frozen=True)
class OneToOne:
    """One tensor for one tensor."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]

    def ours(self, *theirs: Tensor) -> tuple[Tensor, ...]:
        """Our tensor, from theirs."""
        (tensor,) = theirs
        return (self.to_ours(tensor),)

    def theirs(self, *ours: Tensor) -> tuple[Tensor, ...]:
        """Their tensor, from ours."""
        (tensor,) = ours
        return (self.to_theirs(tensor),)


SAME = OneToOne(lambda w: w, lambda w: w)
TRANSPOSE = OneToOne(lambda w: w.t(), lambda w: w.t())
"""A dense layer stored as [in, out] (TensorFlow) ↔ [out, in]."""
HWIO = OneToOne(lambda w: w.permute(3, 2, 0, 1), lambda w: w.permute(2, 3, 1, 0))
"""A convolution stored as [kH, kW, in, out] (TensorFlow) ↔ [out, in, kH, kW]."""
NIN = OneToOne(lambda w: w.t()[:, :, None, None], lambda w: w.squeeze(3).squeeze(2).t())
"""A dense layer over channels stored as [in, out] ↔ a 1×1 convolution [out, in, 1, 1]."""
SQUEEZE = OneToOne(lambda w: _rank(w, 2)[:, :, None, None], lambda w: w.squeeze(3).squeeze(2))
"""A dense layer over channels [out, in] ↔ a 1×1 convolution [out, in, 1, 1]."""


@dataclass(frozen=True)
class Columns:
    """A dense layer whose inputs come in another order: our column i is their column ``permutation[i]``."""

    permutation: tuple[int, ...]

    def ours(self, *theirs: Tensor) -> tuple[Tensor, ...]:
        """Our [out, in], from theirs."""
        (weight,) = theirs
        if weight.ndim != 2 or weight.shape[1] != len(self.permutation):
            raise ValueError(f"shape {list(weight.shape)}, expected [*, {len(self.permutation)}]")
        return (weight[:, list(self.permutation)],)

    def theirs(self, *ours: Tensor) -> tuple[Tensor, ...]:
        """Their [out, in], from ours."""
        (weight,) = ours
        back = sorted(range(len(self.permutation)), key=self.permutation.__getitem__)
        return (weight[:, back],)


@dataclass(frozen=True)
class SplitQkv:
    """One projection for q, k and v ↔ three 1×1 convolutions; for weights [3C, C, 1] or [3C, C, 1, 1], and biases [3C].

    Attributes:
        heads: of the attention. Ours have head h in the channels h·C/heads …
        new_order: their rows are [Q | K | V] (``use_new_attention_order``); otherwise every head has its own [q | k | v].
        sides: dimensions of their kernel: 1 for a Conv1d (OpenAI), 2 for a Conv2d, 0 for a dense layer.
    """

    heads: int
    new_order: bool = False
    sides: int = 1

    def ours(self, *theirs: Tensor) -> tuple[Tensor, ...]:
        """q, k, v: [C, C, 1, 1] or [C] each."""
        (joined,) = theirs
        if joined.ndim not in (1, 2 + self.sides) or joined.shape[0] % (3 * self.heads):
            raise ValueError(f"cannot be split into q, k, v of {self.heads} heads")
        if self.new_order:
            parts = joined.chunk(3)
        else:
            rows = joined.reshape(self.heads, 3, -1, *joined.shape[1:])
            parts = tuple(rows[:, i].reshape(-1, *joined.shape[1:]) for i in range(3))
        return tuple(part if part.ndim == 1 else part.reshape(*joined.shape[1:2] * 2, 1, 1) for part in parts)

    def theirs(self, *ours: Tensor) -> tuple[Tensor, ...]:
        """[3C, C, …] or [3C]."""
        parts = [part if part.ndim == 1 else part.reshape(*part.shape[:2], *(1,) * self.sides) for part in ours]
        if self.new_order:
            return (torch.cat(parts),)
        by_head = [part.reshape(self.heads, -1, *part.shape[1:]) for part in parts]
        return (torch.cat(by_head, dim=1).reshape(-1, *parts[0].shape[1:]),)


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a two-way table.

    Attributes:
        theirs: the names of their tensors.
        ours: names in ``UNet(config).state_dict()``.
        op: the layout.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = SAME


def layer(theirs: str, ours: str, weight: Op = SAME) -> list[Row]:
    """The rows of a layer's ``weight``, in the layout ``weight``, and of its ``bias``, whose layout is always the same."""
    return [Row((f"{theirs}.weight",), (f"{ours}.weight",), weight), Row((f"{theirs}.bias",), (f"{ours}.bias",))]


def to_ours(
    rows: Sequence[Row],
    tensors: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Our tensors, float32, from theirs.

    Args:
        rows: the table.
        tensors: theirs, by name.
        shapes: the shape of each of ours, see :func:`unet_shapes`; or None where the caller checks that.
        ignore: patterns (``*.num_batches``) of names that may be there and are not used.

    Raises:
        FileFormatError: missing or surplus tensors, wrong shapes, other types than floats, NaN or infinities. All are
            listed.
        InputError: ours has parts that the table does not name.
    """
    wanted = [name for row in rows for name in row.theirs]
    faults = _Faults()
    faults.missing = sorted(set(wanted) - set(tensors))
    faults.surplus = sorted(
        name for name in set(tensors) - set(wanted) if not any(fnmatchcase(name, pattern) for pattern in ignore)
    )
    converted: dict[str, Tensor] = {}
    for row in rows:
        theirs = [tensors[name] for name in row.theirs if name in tensors]
        if len(theirs) != len(row.theirs):
            continue
        if odd := [name for name in row.theirs if tensors[name].dtype not in FLOATS]:
            faults.dtypes += [f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}" for name in odd]
            continue
        try:
            laid = row.op.ours(*theirs)
        except (RuntimeError, ValueError, IndexError) as error:
            faults.shapes.append(f"{row.theirs[0]} {list(theirs[0].shape)} ({str(error).splitlines()[0][:80]})")
            continue
        for name, tensor in zip(row.ours, laid, strict=True):
            if shapes is not None and name in shapes and tuple(tensor.shape) != shapes[name]:
                faults.shapes.append(
                    f"{row.theirs[0]} {list(theirs[0].shape)}, where {name} takes {list(shapes[name])}"
                )
            else:
                converted[name] = tensor
        # only after the shapes: a view of absurd size would be walked through number by number
        if all(name in converted for name in row.ours):
            faults.infinite += [name for name in row.theirs if not torch.isfinite(tensors[name]).all()]
    if shapes is not None and (unmapped := sorted(set(shapes) - {name for row in rows for name in row.ours})):
        raise InputError(
            "this network has parts for which that project has no names", note=", ".join(unmapped[:_SHOWN])
        )
    faults.check()
    return {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in converted.items()}


def to_theirs(rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: :func:`to_ours` backwards.

    Raises:
        FileFormatError: missing or surplus tensors: the table describes another network.
    """
    wanted = [name for row in rows for name in row.ours]
    faults = _Faults()
    faults.missing = sorted(set(wanted) - set(tensors))
    faults.surplus = sorted(set(tensors) - set(wanted))
    faults.check()
    converted: dict[str, Tensor] = {}
    for row in rows:
        laid = row.op.theirs(*(tensors[name] for name in row.ours))
        converted.update({name: tensor.contiguous() for name, tensor in zip(row.theirs, laid, strict=True)})
    return converted


def unet_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of such a network. No memory is taken for the tensors."""
    with torch.device("meta"):
        network = UNet(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def side(tensors: Mapping[str, Tensor], name: str, axis: int) -> int:
    """The length of one axis of a tensor, from which a network's numbers are derived.

    Raises:
        FileFormatError: there is no such tensor, or it has fewer axes.
    """
    if name not in tensors or tensors[name].ndim <= axis:
        shape = f"its shape is {list(tensors[name].shape)}" if name in tensors else "there is no tensor of that name"
        raise FileFormatError(f"the tensors do not match the network: {name!r} is needed", note=shape)
    return tensors[name].shape[axis]


def config_error(what: str, seen: object) -> FileFormatError:
    """The error for shapes of which no network can be built."""
    return FileFormatError("the tensors do not match the network", note=f"{what}: {seen}")


@dataclass
class _Faults:
    """All that is wrong with a set of tensors, collected for one error."""

    missing: list[str] = dataclasses.field(default_factory=list)
    surplus: list[str] = dataclasses.field(default_factory=list)
    shapes: list[str] = dataclasses.field(default_factory=list)
    dtypes: list[str] = dataclasses.field(default_factory=list)
    infinite: list[str] = dataclasses.field(default_factory=list)

    def check(self) -> None:
        kinds = [
            ("missing", self.missing),
            ("surplus", self.surplus),
            ("of another shape", self.shapes),
            ("not floats", self.dtypes),
            ("with NaN or infinities", self.infinite),
        ]
        seen = [(what, names) for what, names in kinds if names]
        if not seen:
            return
        raise FileFormatError(
            "the tensors do not match the network: " + ", ".join(f"{len(names)} {what}" for what, names in seen),
            note="; ".join(
                f"{what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}" for what, names in seen
            ),
        )


def _rank(tensor: Tensor, ndim: int) -> Tensor:
    if tensor.ndim != ndim:
        raise ValueError(f"{tensor.ndim} dimensions, expected {ndim}")
    return tensor


# --- the network's parts ---------------------------------------------------------------------------------------------

Kind = Literal["time0", "time1", "classes", "conv_in", "stage", "downsample", "upsample", "norm_out", "conv_out"]


@dataclass(frozen=True)
class Slot:
    """One part of the network.

    Attributes:
        kind: what it is. A ``stage`` is a residual block and the attention behind it; ``downsample`` and ``upsample``
            are convolutions, or residual blocks (``resample_blocks``), or nothing with weights (``average_pool``).
        part: ``down``, ``middle`` or ``up`` for stages and resampling, otherwise "".
        level: 0 is the full resolution, on the way up as well.
        block: counts the stages of a level, or of the middle.
        ours: the prefix of the stage, the resampling, or the layer itself.
        c_in: channels going in; for an upper stage with those of the skip.
        c_out: channels coming out.
        projection: the dense layer of the residual block that takes the time embedding, or "" without such a block.
        attention: the prefix of the attention, or "".
        skip: whether the residual block has a 1×1 convolution around it.
    """

    kind: Kind
    ours: str
    part: Literal["", "down", "middle", "up"] = ""
    level: int = 0
    block: int = 0
    c_in: int = 0
    c_out: int = 0
    projection: str = ""
    attention: str = ""
    skip: bool = False

    @property
    def residual(self) -> str:
        """The prefix of the residual block, or "" where there is none."""
        return "" if not self.projection else f"{self.ours}.block" if self.kind == "stage" else self.ours


def walk(config: UNetConfig) -> Iterator[Slot]:
    """Every part of the network, in the order in which they run: time, conv_in, down, middle, up, norm_out, conv_out."""
    counted = iter(range(1 << 30))
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    top = len(widths) - 1

    def stage(part: Literal["down", "middle", "up"], ours: str, level: int, block: int, c_in: int, c_out: int) -> Slot:
        attends = block == 0 if part == "middle" else (config.size[0] >> level) in config.attention
        return Slot(
            "stage",
            ours,
            part,
            level,
            block,
            c_in,
            c_out,
            projection=f"time.projections.{next(counted)}",
            attention=f"{ours}.attention" if attends else "",
            skip=c_in != c_out,
        )

    def resample(kind: Kind, part: Literal["down", "up"], ours: str, level: int, c: int) -> Slot:
        projection = f"time.projections.{next(counted)}" if config.resample_blocks else ""
        return Slot(kind, ours, part, level, 0, c, c, projection)

    yield Slot("time0", "time.dense0", c_in=config.channels, c_out=4 * config.channels)
    yield Slot("time1", "time.dense1", c_in=4 * config.channels, c_out=4 * config.channels)
    if config.classes is not None:
        yield Slot("classes", "time.classes", c_in=config.label_count, c_out=4 * config.channels)
    c = config.channels
    yield Slot("conv_in", "conv_in", c_in=config.image_inputs, c_out=c)
    skips = [c]
    for level, width in enumerate(widths):
        for block in range(config.blocks):
            yield stage("down", f"down.{level}.stages.{block}", level, block, c, width)
            skips.append(c := width)
        if level < top:
            yield resample("downsample", "down", f"down.{level}.resample", level, c)
            skips.append(c)
    for block in range(2):
        yield stage("middle", f"middle.{block}", top, block, c, c)
    for level, width in reversed(list(enumerate(widths))):
        for block in range(config.blocks + 1):
            yield stage("up", f"up.{top - level}.stages.{block}", level, block, c + skips.pop(), width)
            c = width
        if level > 0:
            yield resample("upsample", "up", f"up.{top - level}.resample", level, c)
    yield Slot("norm_out", "norm_out", c_in=c, c_out=c)
    yield Slot("conv_out", "conv_out", c_in=c, c_out=config.out_channels)
