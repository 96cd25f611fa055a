"""A second opinion on ε: NVIDIA's Polygraphy runs the file and compares, with its own runners and comparators.

``polygraphy inspect data`` opens the results that it saves. The runtime and ``ddpmx build`` never import it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpmx.errors import BackendError
from ddpmx.formats import model_file, plan_file
from ddpmx.formats.onnx_file import onnx_spec, read_onnx
from ddpmx.parity.check import BOUNDS
from ddpmx.parity.ladder import check_record_of
from ddpmx.parity.reference import Reference, elements

_REFERENCE = "PyTorch float32"


def compare(
    file: str | os.PathLike[str], reference: Reference, *, results: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Run ``file`` with Polygraphy at every recorded t and compare with PyTorch's recorded outputs.

    Args:
        file: an ONNX file (run by ONNX Runtime) or a plan (run by its flavour of TensorRT, on a GPU).
        reference: PyTorch's outputs.
        results: where to save the runs, as JSON that Polygraphy's tools open.

    Returns:
        ``passed``, ``verdict`` (one line), ``version``, ``runner``, and the ``bound`` on the largest error.

    Raises:
        BackendError: the file cannot be run here.
        SpecError: the record is another model's.
    """
    path = Path(file)
    kind = model_file.identify(path)
    if kind == "mnn":
        raise BackendError(f"{path}: Polygraphy runs no MNN models", hint="leave out --polygraphy")
    if kind == "plan":
        info = plan_file.read_plan(path)
        spec = info.spec
        rtx = info.flavour == "TensorRT-RTX"
    else:
        spec, rtx = onnx_spec(path, read_onnx(path)), False
    check_record_of(spec, reference)

    try:
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendError("Polygraphy is not installed", note=str(error), hint="pip install polygraphy") from error
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it also logs while it is imported

    import polygraphy
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = rtx  # which of the two libraries it uses as TensorRT
    from polygraphy import comparator as comparators
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, RunResults

    if kind == "plan":
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        runner = TrtRunner(EngineFromBytes(BytesFromPath(os.fspath(path))), name="TensorRT")
    else:
        runner = OnnxrtRunner(SessionFromOnnx(os.fspath(path), providers=["cpu"]), name="ONNX Runtime")
    feeds = [
        {"x": reference.inputs(k), "t": np.full(len(reference.x0), t, np.int32), **reference.conditioning_at(k)}
        for k, t in enumerate(reference.t)
    ]
    kept, name = elements(spec.shape), spec.prediction

    def recorded(outputs: dict[str, Any]) -> dict[str, Any]:
        """The recorded elements of an output, so that both sides have one shape."""
        return {name: np.asarray(outputs[name]).reshape(len(reference.x0), -1)[:, kept]}

    # the class of newer versions, the function of older ones
    simple = getattr(comparators, "SimpleCompareFunc", None) or comparators.CompareFunc.simple
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        try:
            ran = Comparator.run([runner], data_loader=feeds)
        except Exception as error:  # Polygraphy raises one type for everything, but libraries below it their own
            raise BackendError(
                f"{path}: Polygraphy cannot run this file here", note=str(error).strip()[:300]
            ) from error
        both = RunResults()
        both.add([{name: out} for out in reference.out], runner_name=_REFERENCE)
        both.add([recorded(one) for one in ran[runner.name]], runner_name=runner.name)
        bound = BOUNDS[spec.precision].eps_pixel * reference.scale
        comparison = Comparator.compare_accuracy(
            both, compare_func=simple(atol=bound, rtol=0.0, check_error_stat="max")
        )
        if results is not None:
            both.save(os.fspath(results))
    matches = list(_matches(comparison))
    if len(matches) != len(reference.t):  # an empty comparison would pass
        raise BackendError(f"Polygraphy compared {len(matches)} timesteps of {len(reference.t)}")
    return {
        "passed": bool(comparison),
        "verdict": f"{sum(matches)} of {len(matches)} timesteps within {bound:.3g} of PyTorch, by {runner.name} "
        f"(polygraphy {polygraphy.__version__})",
        "version": polygraphy.__version__,
        "runner": runner.name,
        "bound": bound,
    }


def _matches(comparison: Any) -> Iterator[bool]:
    """Per timestep, whether it agrees. Polygraphy returns one table of results, newer versions a list of tables."""
    for result in comparison if hasattr(comparison, "lst") else [comparison]:
        for iterations in result.values():
            for outputs in iterations:
                yield all(bool(match) for match in outputs.values())
