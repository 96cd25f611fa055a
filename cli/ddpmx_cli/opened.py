"""Opens whatever a command takes as its model: a file, or a run where torch is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ddpmx.errors import BackendError, InputError
from ddpmx_cli.console import busy, cache_folder

if TYPE_CHECKING:
    from ddpmx.pipeline import Pipeline


def open_pipeline(
    path: Path,
    *,
    spec: Path | None = None,
    provider: str = "cpu",
    fallback: bool = False,
    threads: int = 0,
    executor: str = "auto",
    trust_host_code: bool = False,
) -> Pipeline:
    """A model as a pipeline, with the flags that say where it runs.

    Args:
        path: a model file, a run or a checkpoint.
        spec: ``--spec``, the description of an ONNX file that has none.
        provider, fallback, threads, executor, trust_host_code: the flags of these names.

    Raises:
        FileFormatError, SpecError, BackendError: as :func:`ddpmx.load`.
        InputError: a flag that has no effect on a checkpoint.
    """
    from ddpmx.formats import model_file
    from ddpmx.pipeline import load

    if model_file.identify(path) == "checkpoint":
        refused = {"--spec": spec is not None, "--fallback": fallback, "--trust-host-code": trust_host_code}
        return _load_checkpoint(path, provider, threads, executor, [flag for flag, used in refused.items() if used])
    return load(
        path,
        spec=model_file.read_spec(spec) if spec is not None else None,
        providers=[provider],
        fallback=fallback,
        threads=threads,
        executor=executor,
        trust_host_code=trust_host_code,
        cache=cache_folder(),
    )


def _load_checkpoint(path: Path, provider: str, threads: int, executor: str, refused: list[str]) -> Pipeline:
    """A run or a checkpoint, run by torch."""
    if provider not in ("cpu", "cuda"):
        refused = [f"--provider {provider}", *refused]
    if executor != "auto":
        refused = [*refused, "--executor"]
    if refused:
        raise InputError(
            f"{path}: a checkpoint is run by torch, and {' and '.join(refused)} would have no effect",
            hint=f"leave it out, or export the checkpoint first: ddpmx export {shlex.quote(str(path))} -o model.onnx",
        )
    try:
        with busy("loading torch"):
            from ddpm_export.training.pipeline import load as load_run
    except (ImportError, OSError) as error:  # OSError: a CUDA library that torch was built for is not there
        raise BackendError(
            f"{path}: a checkpoint, which needs torch to run",
            note=str(error),
            hint=f"pip install torch safetensors; or, where torch is: ddpmx export {shlex.quote(str(path))} -o model.onnx",
        ) from error
    return load_run(path, device=provider, threads=threads)
