"""The check of a file that was just exported against the network that it was exported from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_export.proof import in_precision
from ddpm_export.proof.record import check_images, record, short_chain
from ddpm_export.training import checkpoint
from ddpm_export.training.checkpoint import Weights
from ddpm_export.training.data import Source, are_files, load_source
from ddpm_export.training.images.pixels import InMemory
from ddpmx.backends.open import open_model
from ddpmx.errors import FileFormatError, NumericError
from ddpmx.formats.spec import ModelSpec
from ddpmx.parity.ladder import ParityReport, not_finite, run_ladder
from ddpmx.parity.reference import Reference

MOST_IMAGES = 4096


def record_checkpoint(
    source: str | os.PathLike[str],
    *,
    weights: Weights = "ema",
    data: NDArray[np.uint8] | None = None,
    full: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Record the outputs of a checkpoint's network; see :func:`ddpm_export.proof.record.record`.

    Args:
        source: a run or a checkpoint.
        weights: ``ema`` or ``raw``.
        data: uint8 [N, H, W, C], real images.
        full: record the chain of all T steps instead of a short one.
        progress: called with (network calls done, network calls in all).

    Raises:
        DdpmxError: the checkpoint cannot be read, the images do not fit, or the network's output is nearly zero.
    """
    network, spec = checkpoint.load_network(source, weights)
    if weights == "raw":
        spec = spec.replace(weights=checkpoint.weights_hash(network.state_dict()))
    return record(network, spec, data=data, steps=None if full else short_chain(spec.shape), progress=progress)


def images_for(data: str | os.PathLike[str], source: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Real images of a checkpoint's size, uint8 [N, H, W, C]; a part of them where they do not fit into memory.

    Raises:
        DdpmxError: they cannot be read, or are an .npz of another size.
    """
    spec = checkpoint.load_network(source)[1]
    channels, height, width = spec.shape
    dataset = load_source(_as_trained(Path(data), source, (height, width), channels))
    if isinstance(dataset.pixels, InMemory):
        images = dataset.images
    else:  # a record takes a few hundred at most
        images = dataset.take(np.unique(np.linspace(0, len(dataset) - 1, MOST_IMAGES).astype(np.int64)))
    check_images(images, spec)
    return images


def _as_trained(data: Path, checkpoint_path: str | os.PathLike[str], size: tuple[int, int], channels: int) -> Source:
    """``data`` read as the images that a run was trained on, with the same background and white, where it recorded them."""
    try:
        _, settings = checkpoint.read_training_json(checkpoint.resolve(checkpoint_path))
        recorded = Source.from_json(settings.get("data"), str(checkpoint_path))
    except FileFormatError:  # an imported network, or the training state is not there
        recorded = Source(data)
    if not are_files(data):
        return Source(data, white=recorded.white if data.resolve() == recorded.path else None)
    white = None if recorded.path.suffix.lower() == ".npz" else recorded.white  # an .npz's says nothing of files
    return replace(recorded.images_alone(), path=data, size=size, channels=channels, white=white)


def judge_reduced(
    spec: ModelSpec,
    source: str | os.PathLike[str],
    reference: Reference,
    *,
    weights: Weights = "ema",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Reference, ParityReport | None]:
    """A record that also knows the checkpoint's network in half precision or bfloat16, and the report of that.

    Args:
        spec: of the exported file. For fp32 the record is returned as it is.
        source: the run or the checkpoint.
        reference: the record.
        weights: ``ema`` or ``raw``.
        progress: called with (network calls done, network calls in all).

    Raises:
        DdpmxError: the checkpoint cannot be read, or the record is another model's.
    """
    if spec.precision == "fp32":
        return reference, None
    network, _ = checkpoint.load_network(source, weights)
    report, reduced = in_precision.judge(network, spec, reference, progress=progress)
    return replace(reference, reduced=reduced), report


def check_file(
    file: str | os.PathLike[str],
    spec: ModelSpec,
    reference: Reference,
    module_report: ParityReport | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Run the ladder with an exported file, in ONNX Runtime on the CPU.

    An fp16 file is judged in two ways: the file as ONNX Runtime computes it, mostly in float32, and the module with every
    operation rounded to half, by ``reference.reduced``. ONNX Runtime has no bfloat16 on a CPU, so of a bf16 file the
    module alone is checked, as ``module_report`` has it. Outputs that are not finite are a report that fails.

    Args:
        file: the exported file.
        spec: of the file.
        reference: the record, of :func:`judge_reduced` where the file is not in float32.
        module_report: what that gave with it.
        progress: called with (network calls done, network calls in all).

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the file.
    """
    if spec.precision == "bf16" and module_report is not None:
        return module_report
    _, backend = open_model(Path(file))
    try:
        return run_ladder(backend, spec, reference, progress=progress)
    except NumericError as error:
        return not_finite(backend, spec, reference, error)
    finally:
        backend.close()
