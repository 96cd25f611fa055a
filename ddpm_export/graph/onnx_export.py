"""Checkpoint → model.onnx: one strongly typed, self-describing file.

The graph's contract: x float32 [batch, C, H, W] and t int32 [batch] → a float32 output named by what it predicts; with
classes, self-conditioning or a condition also y int32 [batch], x0_prev and cond float32 [batch, ·, H, W]; with a learned
variance a second output var.
Precision is part of the graph, since TensorRT 11 has no precision flags: fp16 means half-precision convolutions,
attention products and activations, with float32 kept around every norm and softmax, in the time path and in the first
and last convolution.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnxscript  # noqa: F401 - torch imports it only in the middle of an export
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpmx
from ddpm_export.graph import where
from ddpm_export.graph.any_batch import Watch, any_batch, fixed_batch
from ddpm_export.graph.names import name_everything
from ddpm_export.graph.tensorrt import Refusal, parser_refusals, refusals
from ddpm_export.networks.lucidrains_unet import LucidrainsUNet
from ddpm_export.networks.registry import check_spec
from ddpm_export.networks.unet import UNet
from ddpm_export.training import checkpoint as checkpoints
from ddpm_export.training.checkpoint import Weights
from ddpmx.device.versions import version_numbers
from ddpmx.errors import BackendError, InputError, OutputError
from ddpmx.formats.atomic import atomic_write
from ddpmx.formats.describe import training_summary
from ddpmx.formats.onnx_file import metadata
from ddpmx.formats.same_model import check_output
from ddpmx.formats.spec import EIGHT_BITS, PRECISIONS, ModelSpec, Precision, beside, input_type

OPSET = 20
"""The newest opset that TensorRT 10.3 parses. Newer ones also have group norm and attention as single operators, which
some TensorRT versions refuse or compute wrongly."""

BF16_OPSET = 22
"""The first opset in which convolutions and norms take bfloat16. TensorRT 10.3 does not have it, so cannot use the file."""

MAX_PROTOBUF_BYTES = 2**31 - 1

Network = TypeVar("Network", bound=nn.Module)


class TimeTable(nn.Module):
    """:class:`~ddpm_export.networks.unet.TimeShifts` evaluated once for every t: a table [T, Σ widths] that t indexes."""

    def __init__(self, time: nn.Module, timesteps: int) -> None:
        super().__init__()
        with torch.no_grad():
            shifts: tuple[Tensor, ...] = time(torch.arange(timesteps, dtype=torch.int32))
        self.widths = [shift.shape[1] for shift in shifts]
        self.register_buffer("table", torch.cat(shifts, dim=1))

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        """For t int [B]."""
        table: Tensor = self.get_buffer("table")
        # embedding, since table[t] becomes a GatherND, which takes no int32
        return torch.split(F.embedding(t, table), self.widths, dim=1)


def to_precision(network: Network, precision: Precision) -> Network:
    """A copy of the network that computes in ``precision`` inside; its inputs and outputs stay float32.

    The parts that a module's class names in ``HALVED`` are cast. All others stay as they are: norms, softmax, the time
    path, the first and the last layer.

    Raises:
        InputError: an unknown precision, one of 8 bits, or no class of the network names parts.
    """
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}", hint=f"one of: {', '.join(PRECISIONS)}")
    if precision in EIGHT_BITS:
        raise InputError(f"a module does not compute in {precision}", note="8 bits are put into the graph of one")
    network = copy.deepcopy(network).eval().requires_grad_(False)
    if precision != "fp32":
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        halved = [getattr(module, part) for module in network.modules() for part in getattr(module, "HALVED", ())]
        if not halved:
            raise InputError(f"this network does not define which of its parts may compute in {precision}")
        for part in halved:
            part.to(dtype)
    return network


def export(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] = "model.onnx",
    *,
    precision: Precision = "fp32",
    weights: Weights = "ema",
    time_table: bool = False,
) -> ModelSpec:
    """Export a checkpoint, or the newest one of a run.

    Args:
        path: the checkpoint's or the run's folder.
        output: the file to write. It appears only when it is whole.
        precision: ``fp32``, ``fp16`` or ``bf16``; 8 bits are :func:`ddpm_export.quantize.export.export`'s.
        weights: ``ema`` (averaged) or ``raw``.
        time_table: store what depends on t alone as one table instead of computing it.

    Returns:
        The spec in the file.

    Raises:
        DdpmxError: the checkpoint cannot be read, or the file cannot be written.
    """
    output = Path(output)
    check_output(output)
    path = checkpoints.resolve(path)  # once: a run that trains has a newer one soon
    network, spec = checkpoints.load_network(path, weights)
    if weights == "raw":
        spec = spec.replace(weights=checkpoints.weights_hash(network.state_dict()))
    training = training_summary(path)
    return export_network(network, spec, output, precision=precision, time_table=time_table, training=training)


def export_network(
    network: nn.Module,
    spec: ModelSpec,
    output: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    time_table: bool = False,
    root: str = "",
    refused: list[Refusal] | None = None,
    training: dict[str, Any] | None = None,
) -> ModelSpec:
    """Export a network in memory; see :func:`export`.

    Args:
        network: called with x, t and, by name, with the spec's conditioning inputs among y, x0_prev and cond.
        spec: of the network.
        output, precision, time_table: as for :func:`export`.
        root: a prefix of all paths in it that is left out of the names in the file.
        refused: is filled with what TensorRT does not take of the graph, which is written all the same.
        training: what the file is to say of its checkpoint, see :func:`ddpmx.formats.describe.training_summary`.

    Raises:
        SpecError: the spec describes another network.
        InputError: a precision or a time table that this network cannot have.
        BackendError: torch cannot export the network, or only for a fixed batch size.
        OutputError: the file is too large, or cannot be written.
    """
    if precision in EIGHT_BITS:
        raise InputError(
            "8 bits need calibration", hint="ddpmx export --int8, or ddpm_export.quantize.export in Python"
        )
    model, spec = make_graph(network, spec, precision=precision, time_table=time_table, root=root, refused=refused)
    write_graph(model, spec, output, training)
    return spec


def make_graph(
    network: nn.Module,
    spec: ModelSpec,
    *,
    precision: Precision = "fp32",
    time_table: bool = False,
    root: str = "",
    refused: list[Refusal] | None = None,
) -> tuple[onnx.ModelProto, ModelSpec]:
    """The graph of a network, without metadata, and its spec; see :func:`export_network`.

    In 8 bits the graph is that of half precision, which :mod:`ddpm_export.quantize` goes on from.
    """
    _check_torch()
    spec = spec.replace(precision=precision, ddpmx=ddpmx.__version__)
    if isinstance(network, (UNet, LucidrainsUNet)):
        check_spec(network.config, spec)
    network = to_precision(network, beside(precision))
    if time_table:
        if not isinstance(network, (UNet, LucidrainsUNet)):
            raise InputError("only ddpmx's own U-Nets can have a time table")
        if getattr(network.config, "classes", None) is not None:
            raise InputError(
                "a network with classes cannot have a time table",
                note="the vectors of its blocks depend on the class as well as on t",
                hint="export it without a time table",
            )
        network.time = TimeTable(network.time, spec.timesteps)
    model = _trace(network, spec)
    names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    name_everything(model, names, root=root)
    _check_size(model)  # before anything serialises it
    if refused is not None:
        refused += refusals(model) or parser_refusals(model)
    _clean(model)
    if precision == "bf16":
        # Traced as opset 20, where norms and attention are decomposed into plain operators. From there to 22 these
        # operators only gained types; the checker in write_graph fails if that should change.
        model.opset_import[0].version = BF16_OPSET
    return model, spec


def write_graph(
    model: onnx.ModelProto, spec: ModelSpec, output: str | os.PathLike[str], training: dict[str, Any] | None = None
) -> None:
    """Write a graph with its metadata.

    Args:
        model: from :func:`make_graph`; it gets the metadata.
        spec: of the model.
        output: the file. It appears only when it is whole.
        training: as for :func:`export_network`.

    Raises:
        OutputError: it is too large, or cannot be written.
    """
    onnx.helper.set_model_props(model, metadata(spec, training))
    _check_size(model, output)
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(output) as stream:
        stream.write(model.SerializeToString(deterministic=True))


def _check_torch() -> None:
    """Older ones lack what is called here, and 2.6 has ended in a segmentation fault.

    Raises:
        BackendError: torch is older than 2.9.
    """
    if version_numbers(torch.__version__) < (2, 9):
        raise BackendError(f"torch {torch.__version__} is too old to export with", hint="pip install 'torch>=2.11'")


def _check_size(model: onnx.ModelProto, output: str | os.PathLike[str] | None = None) -> None:
    if model.ByteSize() > MAX_PROTOBUF_BYTES:
        where = "" if output is None else f"{output}: "
        raise OutputError(f"{where}the model is larger than 2 GiB, which one ONNX file cannot hold")


def _trace(network: nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """The graph as torch writes it, for any batch size.

    torch.export's ordinary way keeps the line at which it fails, and comes first. Its other one reads the code of the
    module instead of running it, so that ``int(x.shape[0])`` stays a symbol.
    """
    inputs = _examples(spec, 2)  # two images, since torch.export treats a batch of one as a constant
    watch, first = Watch(lambda: where.running_place(network)), None
    with _quiet():
        try:
            with any_batch(network, watch):
                program = _converted(network, inputs, spec)
        except Exception as error:  # torch can raise anything, and its own imports fail after one was interrupted
            first = error
        if first is not None or _is_fixed(program):
            try:
                if first is not None and where.operators(first):
                    raise first  # it was traced; ONNX lacks an operator
                program = _converted(_strict(network, inputs), inputs, spec)
            except Exception as error:
                if first is None:
                    raise fixed_batch(watch) from error
                raise BackendError(
                    "torch could not export this network", note=str(first).strip()[:300], hint="try again"
                ) from first
            if _is_fixed(program):
                raise fixed_batch(watch)
        if not isinstance(network, (UNet, LucidrainsUNet)):
            _check_batches(network, program, spec, watch)
    return program.model_proto


def _examples(spec: ModelSpec, n: int) -> dict[str, Tensor]:
    """Inputs of n images, no two of them equal."""
    generator = torch.Generator().manual_seed(n)
    limits = {"t": spec.timesteps, "y": spec.label_count or 1}
    return {
        name: (torch.arange(n) * (limits[name] // 7 + 1) % limits[name]).to(torch.int32)
        if input_type(name) is np.int32
        else torch.randn(n, *dims, generator=generator)
        for name, dims in spec.inputs.items()
    }


def _batches(inputs: dict[str, Tensor]) -> dict[str, Any]:
    batch = torch.export.Dim("batch", min=1)
    return {name: {0: batch} for name in inputs}


def _called(inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Arguments and keywords of a call."""
    return (inputs["x"], inputs["t"]), {name: one for name, one in inputs.items() if name not in ("x", "t")}


def _strict(network: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    args, kwargs = _called(inputs)
    with torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True  # as torch.onnx.export does
    ):
        return torch.export.export(network, args, kwargs, dynamic_shapes=_batches(inputs), strict=True)


def _converted(
    network: nn.Module | torch.export.ExportedProgram, inputs: dict[str, Tensor], spec: ModelSpec
) -> torch.onnx.ONNXProgram:
    args, kwargs = _called(inputs)
    traced = isinstance(network, torch.export.ExportedProgram)
    program = torch.onnx.export(
        network,
        () if traced else args,
        kwargs=None if traced else kwargs,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=list(spec.outputs),
        dynamic_shapes=None if traced else _batches(inputs),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return program


def _is_fixed(program: torch.onnx.ONNXProgram) -> bool:
    inputs = program.model_proto.graph.input
    return any(not value.type.tensor_type.shape.dim[0].dim_param for value in inputs)


def _check_batches(network: nn.Module, program: torch.onnx.ONNXProgram, spec: ModelSpec, watch: Watch) -> None:
    """Check by numbers that what was traced with two images is the network with one, three and six."""
    assert program.exported_program is not None
    traced = program.exported_program.module(check_guards=False)
    for n in (1, 3, 6):
        args, kwargs = _called(_examples(spec, n))
        with torch.no_grad():
            expected = network(*args, **kwargs)
            try:
                out = traced(*args, **kwargs)
            except Exception as error:  # shapes that do not fit together
                raise fixed_batch(watch, f"what torch traced of this network fails for a batch of {n}") from error
        pairs = zip(*(one if isinstance(one, tuple) else (one,) for one in (out, expected)), strict=True)
        if not all(mine.shape == theirs.shape and _close(mine, theirs) for mine, theirs in pairs):
            raise fixed_batch(watch, f"what torch traced of this network is another one for a batch of {n}")


def _close(mine: Tensor, theirs: Tensor) -> bool:
    return float((mine - theirs).abs().max()) <= 1e-2 * float(theirs.square().mean().sqrt())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints and logs as it exports."""
    loggers = {
        logging.getLogger(name): at for name, at in (("torch.onnx", 40), ("torch._guards", 60), ("torch._dynamo", 60))
    }
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _clean(model: onnx.ModelProto) -> None:
    """Remove what torch writes about the machine it ran on: stack traces with paths, class names, its own metadata."""
    model.producer_name, model.producer_version, model.doc_string = "ddpmx", ddpmx.__version__, ""
    del model.metadata_props[:]
    graph = model.graph
    graph.name, graph.doc_string = "ddpmx", ""
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
