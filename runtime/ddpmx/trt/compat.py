"""Whether a plan can run on this machine, and if not, the command that builds one that can."""

from __future__ import annotations

import os
import shlex

from ddpmx.device.discovery import Gpus
from ddpmx.errors import BackendError, PlanMismatchError
from ddpmx.formats.plan_file import PlanInfo, rebuild_command, release


def check_fits(path: str | os.PathLike[str], info: PlanInfo, *, version: str | None, platform: str, gpus: Gpus) -> None:
    """Check that a plan can run here, before it is deserialised.

    Args:
        path: the plan's path, for the message.
        info: the plan's description.
        version: of the installed library of the plan's flavour, or None.
        platform: operating system and machine, as in :attr:`PlanRecord.platform`.
        gpus: the GPUs of this machine. The first one is used.

    Raises:
        BackendError: it cannot run here; a :class:`~ddpmx.errors.PlanMismatchError` if it has to be rebuilt. The message
            says what the plan was built for, what is here, and which command rebuilds it.
    """
    engine = info.engine
    built = f"{info.flavour} {info.version} for SM {', '.join(engine.targets)} on {engine.platform}"
    again = rebuild_command(path, engine)
    if not gpus.devices:
        raise BackendError(
            f"{path}: a plan runs on an NVIDIA GPU, and there is none here",
            note=f"{gpus.trouble}; the plan was built with {built}",
            hint="it is bfloat16, which no CPU runs: export with --fp16 for a file that runs here"
            if info.spec.precision == "bf16"
            else f"the ONNX file runs on the CPU: {shlex.quote(engine.source)} in its place",
        )
    gpu = gpus.devices[0]
    if engine.platform != platform:
        raise PlanMismatchError(
            f"{path}: the plan was built on {engine.platform}, and this is {platform}",
            note="plans do not cross operating systems or processors",
            hint=again,
        )
    if version is None:
        raise BackendError(
            f"{path}: the plan needs {info.flavour}, which is not installed here",
            note=f"it was built with {built}; this GPU is {gpu.name}, SM {gpu.sm}",
            hint=f"{install_hint(info.flavour)}; or, for what is installed: {again}",
        )
    if release(version) != release(info.version):
        raise PlanMismatchError(
            f"{path}: the plan was built with {info.flavour} {info.version}, and here is {info.flavour} {version}",
            note="plans do not cross versions",
            hint=again,
        )
    if not any(_covers(target, gpu.sm) for target in engine.targets):
        raise PlanMismatchError(
            f"{path}: the plan was built for SM {', '.join(engine.targets)}, and this GPU is {gpu.name}, SM {gpu.sm}",
            note="plans do not cross GPU architectures",
            hint=again,
        )


def install_hint(flavour: str | None) -> str:
    """How to install a flavour of TensorRT; None stands for TensorRT."""
    if flavour == "TensorRT-RTX":
        return "pip install tensorrt-rtx-cu13"
    return (
        "pip install tensorrt-cu12 or tensorrt-cu13 after your driver's CUDA; on a Jetson TensorRT is part of the "
        "system: make the venv with --system-site-packages"
    )


def _covers(target: str, sm: str) -> bool:
    if not target.endswith("+"):
        return target == sm
    return [int(n) for n in target[:-1].split(".")] <= [int(n) for n in sm.split(".")]
