"""Opens whatever a command takes as its model: a file, or a run where torch is."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ddpmx.errors import BackendError, InputError
from ddpmx_cli import flags
from ddpmx_cli.console import busy, cache_folder, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddpmx.formats.spec import ModelSpec
    from ddpmx.pipeline import Pipeline


class Settings(TypedDict):
    """Arguments of :func:`ddpmx.load` and of all that opens a model file as it does."""

    spec: ModelSpec | None
    providers: list[str]
    fallback: bool
    threads: int
    trust_host_code: bool
    cache: Path | None


@dataclass(frozen=True)
class Where:
    """Where a model runs: the flags of every command that opens one, in the order of its help.

    Attributes:
        spec: the description of an ONNX file that has none.
        provider, fallback, threads, trust_host_code: as for :func:`ddpmx.load`.
    """

    spec: flags.Spec = None
    provider: flags.Provider = "cpu"
    fallback: flags.Fallback = False
    threads: flags.Threads = 0
    trust_host_code: flags.TrustHostCode = False

    def open(self, path: Path, *, executor: str = "auto", widen: bool = False) -> Pipeline:
        """A model as a pipeline.

        Args:
            path: a model file, a run or a checkpoint.
            executor: how a chain runs on a GPU, as for :func:`ddpmx.load`.
            widen: compute it in float32, unless it is a plan, which cannot.

        Raises:
            FileFormatError, SpecError, BackendError: as :func:`ddpmx.load`.
            InputError: a flag that has no effect on a checkpoint.
        """
        from ddpmx.formats import model_file
        from ddpmx.pipeline import load

        if (kind := model_file.identify(path)) == "checkpoint":
            refused = {
                "--spec": self.spec is not None,
                "--fallback": self.fallback,
                "--trust-host-code": self.trust_host_code,
            }
            return _load_checkpoint(
                path, self.provider, self.threads, executor, [flag for flag, used in refused.items() if used]
            )
        return load(path, executor=executor, widen=widen and kind != "plan", **self.settings())

    def settings(self) -> Settings:
        """What the flags say, by the names of :func:`ddpmx.load`.

        Raises:
            FileFormatError, SpecError: ``--spec`` is no description of a model.
        """
        from ddpmx.formats import model_file

        return {
            "spec": None if self.spec is None else model_file.read_spec(self.spec),
            "providers": [self.provider],
            "fallback": self.fallback,
            "threads": self.threads,
            "trust_host_code": self.trust_host_code,
            "cache": cache_folder(),
        }


def opens_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of :class:`Where` in place of its parameter ``where``.

    Typer makes flags of what a function's signature says, and knows of no flags that belong together.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "where"]
    shared = list(inspect.signature(Where, eval_str=True).parameters.values())
    names = [field.name for field in fields(Where)]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        where = Where(**{name: values.pop(name) for name in names})
        command(where=where, **values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [each.replace(kind=keyword) for each in (*own, *shared)]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(run)["__signature__"] = signature.replace(parameters=parameters)
    return run


def conditions_of(
    spec: ModelSpec, cond: Path | None, n: int | None = None, first: int = 0
) -> tuple[NDArray[np.float32] | None, list[str] | None]:
    """The condition of each image, and its name, by ``--cond``. It depends only on the image's index.

    Args:
        spec: the model.
        cond: the flag.
        n, first: which images; by default one for each condition.

    Returns:
        float32 [n, K, H, W] and n names, or None and None for a model that takes none.

    Raises:
        InputError, FileFormatError: as :func:`ddpmx.images.conditions.read_conditions`; or the flag is missing.
    """
    from ddpmx.images.conditions import read_conditions

    if cond is not None:
        found, names, note = read_conditions(cond, spec)
        if note is not None:
            say(f"Note: {note}")
        order = [index % len(names) for index in range(first, first + (len(names) if n is None else n))]
        return found[order], [names[index] for index in order]
    if spec.condition is not None:
        wanted = ", ".join(map(str, spec.conditioning_shapes["cond"]))
        raise InputError(
            "missing condition: the model takes a condition image",
            hint=f"--cond FOLDER of pictures, or --cond FILE.npz with cond: float32 [N, {wanted}]",
        )
    return None, None


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
