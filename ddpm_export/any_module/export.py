"""Any torch module → model.onnx, checked by the same ladder as a checkpoint's.

from ddpm_export import Adapter, export
from ddpmx.formats.spec import ModelSpec

exported = export(Adapter(net.eval(), time="fraction"), ModelSpec((3, 32, 32), schedule="cosine"), "model.onnx")
print(exported.verdict)
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddpm_export.any_module import half, probes
from ddpm_export.any_module.adapter import Adapter, Canonical
from ddpm_export.any_module.fit_time import fit_time
from ddpm_export.graph import where
from ddpm_export.graph.any_batch import FixedBatchError, any_batch
from ddpm_export.graph.onnx_export import export_network, to_precision
from ddpm_export.graph.tensorrt import Refusal
from ddpm_export.proof.in_precision import judge
from ddpm_export.proof.proof import check_file
from ddpm_export.proof.record import record, short_chain
from ddpm_export.training.checkpoint import weights_hash
from ddpmx.diffusion.schedule import Schedule
from ddpmx.errors import BackendError, InputError, NumericError, SpecError
from ddpmx.formats.atomic import staging
from ddpmx.formats.same_model import check_output, check_record
from ddpmx.formats.spec import BETAS, EIGHT_BITS, PRECISIONS, ModelSpec, Precision
from ddpmx.parity.ladder import ParityReport


@dataclass(frozen=True, eq=False)
class Exported:
    """The result of :func:`export`.

    Attributes:
        spec: of the file, in units of [−1, 1].
        file: the ONNX file.
        record: the file with the module's outputs, beside it, or None if nothing was recorded.
        report: the checks of the ladder, or None without parity.
        halved: paths of the layers that compute in half precision; all others are float32.
        notes: what else to know of the file, a sentence each: what TensorRT does not take of it; with images, another
            convention for the time that fits them better than the adapter's.
    """

    spec: ModelSpec
    file: Path
    record: Path | None
    report: ParityReport | None = field(repr=False)
    halved: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check of the ladder passed. False without parity."""
        return self.report is not None and self.report.passed

    @property
    def verdict(self) -> str:
        """The verdict of the ladder, and the notes, in one line."""
        verdict = "NOT VERIFIED: nothing was recorded" if self.report is None else self.report.verdict
        return ". Note: ".join((verdict, *self.notes))


def export(
    module: nn.Module | Adapter,
    spec: ModelSpec,
    output: str | os.PathLike[str] = "model.onnx",
    *,
    precision: Precision = "fp32",
    parity: bool = True,
    data: NDArray[np.uint8] | None = None,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Export a module, and check the file against it.

    Args:
        module: called as module(x, t) with x float32 [B, C, H, W] in [−1, 1] and t int64 [B]; for any other convention
            an :class:`~ddpm_export.any_module.adapter.Adapter`. In eval mode, float32. A copy on the CPU is used.
        spec: shape, T, schedule (in the module's own range), prediction, variance. Its precision and weights are filled
            in. :func:`spec_from_arrays` makes one from an array of β or ᾱ.
        output: the file to write. It appears only when it is whole. The record goes beside it, as model.parity.npz.
        precision: ``fp32``; or ``fp16`` or ``bf16`` in the layers that :mod:`ddpm_export.any_module.half` chooses.
        parity: record the module's outputs and check the file against them, in ONNX Runtime on the CPU.
        data: uint8 [N, H, W, C], real images for the checks. They also show whether the time is off by one.
        full: check the chain of all T steps instead of a short one.
        progress: called with (network calls done, network calls in all) of the recording, then of the ladder.

    Returns:
        The spec and the verdict. A file that failed is kept, so that it can be examined: see ``passed``.

    Raises:
        InputError: the module does not fit the spec, see :func:`ddpm_export.any_module.probes.probe`; or it has no
            layer that may compute in half.
        BackendError: it fails, or torch cannot trace it; the error says where, and what to do about it.
        NumericError: weights or outputs are not finite.
        SpecError: the spec does not fit together.
        OutputError: the file cannot be written.
    """
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}", hint=f"one of: {', '.join(PRECISIONS)}")
    if precision in EIGHT_BITS:
        raise InputError("8 bits are for checkpoints of ddpmx, not for any module", hint='precision="fp16"')
    output = Path(output)
    check_output(output)
    beside = output.with_suffix(".parity.npz")
    if parity:
        check_record(beside)
    adapter = module if isinstance(module, Adapter) else Adapter(module)
    network, ours = _on_cpu(adapter.network(spec)), adapter.spec_of(spec)
    with _without_fast_path():
        probes.probe(network, ours)
        ours = ours.replace(weights=weights_hash(network.state_dict()), precision=precision)
        ready, halved = (network, []) if precision == "fp32" else _halved(network, ours, precision)
        ours, notes = _write(ready, ours, output, precision)
        if not parity:
            return Exported(ours, output, None, None, tuple(halved), tuple(notes))
        steps = None if full else short_chain(ours.shape)
        reference = record(
            network,
            ours,
            data=data,
            steps=steps,
            magnitude=network.magnitude if network.converts else None,
            ignores_time=not adapter.uses_time,
            progress=progress,
        )
        if data is not None and adapter.uses_time and (fit := fit_time(adapter, spec, data)).better is not None:
            notes.insert(0, str(fit))
        module_report = None
        if precision != "fp32":
            module_report, reduced = judge(ready, ours, reference, progress=progress)
            reference = replace(reference, reduced=reduced)
        reference.save(beside)
        report = check_file(output, ours, reference, module_report, progress=progress)
    return Exported(ours, output, beside, report, tuple(halved), tuple(notes))


def spec_from_arrays(
    shape: Sequence[int],
    *,
    betas: Sequence[float] | NDArray[Any] | torch.Tensor | None = None,
    alpha_bar: Sequence[float] | NDArray[Any] | torch.Tensor | None = None,
    **fields: Any,
) -> ModelSpec:
    """A spec whose schedule is an array of β_t, or of ᾱ_t = Π(1 − β), t = 0…T−1, instead of a formula.

    Args:
        shape: (C, H, W).
        betas, alpha_bar: one of the two, T numbers, best in float64.
        fields: any other field of :class:`~ddpmx.formats.spec.ModelSpec`.

    Raises:
        InputError: none or both are set, or the numbers are not a schedule.
        SpecError: the fields do not fit together.
    """
    if (betas is None) == (alpha_bar is None):
        raise InputError("a schedule is either betas or alpha_bar")
    try:
        array = np.asarray(betas if alpha_bar is None else alpha_bar, np.float64)
    except (ValueError, TypeError) as error:
        raise InputError("a schedule is an array of numbers", note=str(error)[:200]) from error
    schedule = Schedule.from_betas(array) if alpha_bar is None else Schedule.from_alpha_bar(array)
    if clash := sorted({"timesteps", "schedule", "schedule_params"} & fields.keys()):
        raise SpecError(f"{', '.join(clash)}: already determined by the array")
    c, height, width = shape
    return ModelSpec((c, height, width), timesteps=len(schedule), schedule=BETAS, betas=schedule.betas, **fields)


def _on_cpu(network: Canonical) -> Canonical:
    """A copy on the CPU for the export alone."""
    probes.check_mode(network)
    try:
        # eval() again: einops' layers lose their mode when they are copied
        return copy.deepcopy(network).to("cpu").requires_grad_(False).eval()
    except Exception as error:  # copying a foreign module may raise anything
        raise InputError(
            "the module cannot be copied",
            note=where.last_words(error),
            hint="remove what keeps computed tensors in it, as with torch.nn.utils.remove_weight_norm",
        ) from error


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Turn off the fast path of torch's attention: it is taken depending on dispatch modes, and never in a trace."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _halved(network: Canonical, spec: ModelSpec, precision: Precision) -> tuple[Canonical, list[str]]:
    """A copy whose layers are marked for half precision, and their paths; checked to run in that precision."""
    ready, inputs = copy.deepcopy(network), probes.example_inputs(spec)
    halved = half.mark(ready, lambda: probes.run(ready, inputs))
    if not halved:
        raise InputError(
            f"no layer of this module may compute in {precision}",
            note="only plain convolutions and linear layers with weights of their own, between the first and the "
            "last, applied to more than one position of an image, within half's range",
            hint="export it in fp32",
        )
    try:
        out = probes.run(to_precision(ready, precision), inputs)
    except BackendError as error:
        raise InputError(
            f"the module does not work with layers in {precision}: {error.fact}",
            note=error.note,
            hint="it uses a layer's weights outside that layer; export it in fp32",
        ) from error
    if not bool(out.isfinite().all()):
        raise NumericError(f"in {precision} the module's output is not finite", hint="export it in fp32")
    return ready, [name.removeprefix("module.") for name in halved]


def _write(ready: Canonical, spec: ModelSpec, output: Path, precision: Precision) -> tuple[ModelSpec, list[str]]:
    """Write the file; it is moved to its place only if it takes batches of any size. (its spec, notes)"""
    refused: list[Refusal] = []
    with staging(output.parent, output) as part:
        file = part / output.name
        try:
            spec = export_network(ready, spec, file, precision=precision, root="module.", refused=refused)
        except FixedBatchError:
            raise
        except BackendError as error:
            raise _explained(ready, spec, error) from error
        os.replace(file, output)
    return spec, [str(_with_line(ready, spec, one)) for one in refused]


def _with_line(ready: Canonical, spec: ModelSpec, refusal: Refusal) -> Refusal:
    """With the line that calls the operation, where that is a function of the user's and torch names its caller."""
    line = probes.first_call(ready, probes.example_inputs(spec), {refusal.operator})
    if line is None or (refusal.place is not None and line in refusal.place):
        return refusal
    return dataclasses.replace(
        refusal, place=line if refusal.place is None else f"{refusal.place}, and there at {line}"
    )


def _explained(network: Canonical, spec: ModelSpec, error: BackendError) -> BackendError:
    """The error with the place where the exporter stopped, found by tracing once more without conversion to ONNX."""
    inputs = probes.example_inputs(spec, rows=2)
    batch = torch.export.Dim("batch", min=1)
    cause: BaseException = error.__cause__ or error
    at = None
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), any_batch(network):
            warnings.simplefilter("ignore")
            program = torch.export.export(
                network.eval(),
                (inputs.pop("x"), inputs.pop("t")),
                kwargs=inputs,
                dynamic_shapes={name: {0: batch} for name in spec.inputs},
                strict=False,
            ).run_decompositions()
    except Exception as again:  # torch can raise anything
        cause, at = again, where.place(again, network)
        stage = "torch cannot trace this module"
    else:
        names = where.operators(cause)
        at = where.operator_place(names, program.graph)
        line = probes.first_call(network, probes.example_inputs(spec), names)
        if at is not None and line is not None and line not in at:
            at = f"{at}, and there at {line}"
        stage = "this module cannot be expressed in ONNX"
    at = at or where.place_in_messages(cause)
    return BackendError(
        f"{stage}: it stops at {at}" if at else stage,
        note=where.last_words(cause),
        hint=where.hint(cause) or "try again, or write that line with simpler operators",
    )
