"""What is installed, and what is missing for which command. Each library is tried in its own process: a broken one may
crash it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import ddpmx
from ddpmx.device.discovery import gpus
from ddpmx.trt.compat import install_hint

# With -c Python searches the current folder first, and would import modules that happen to lie there.
_ALONE = "import sys; sys.path[:] = [p for p in sys.path if p]; import json"
_TIMEOUT = 120  # seconds; importing torch on a cold Jetson takes one

_PROBES = {
    "torch": """
import torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpu": torch.cuda.is_available()}))
""",
    "onnxruntime": """
import onnxruntime
print(json.dumps({"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}))
""",
    "MNN": """
from ddpmx import errors
from ddpmx.mnn import library
try:
    values = {"version": library.load().version(), "no_converter": None}
    try:
        library.converter()
    except errors.BackendError as error:
        values["no_converter"] = error.fact
except errors.BackendError as error:
    values = {"missing": error.fact}
print(json.dumps(values))
""",
    "chains on the GPU": """
from ddpmx import errors
from ddpmx.device.driver import Driver
from ddpmx.cuda.executors import why_no_while
from ddpmx.cuda.kernels import Kernels
try:
    with Driver() as driver:
        values = {"version": f"by CUDA {driver.cuda}", "why_no_while": why_no_while(driver, Kernels.of(driver))}
except errors.BackendError as error:
    values = {"missing": ": ".join(filter(None, (error.fact, error.note)))}
print(json.dumps(values))
""",
    "torch-fidelity": """
import torch_fidelity
print(json.dumps({"version": torch_fidelity.__version__}))
""",
    **{
        flavour: f"""
from ddpmx import errors
from ddpmx.trt import library as tensorrt_library
try:
    library = tensorrt_library.load({flavour!r})
    values = {{"version": library.version, "libraries": tensorrt_library.loaded_from()}}
except errors.BackendError as error:
    values = {{"missing": error.note}}
print(json.dumps(values))
"""
        for flavour in ("TensorRT", "TensorRT-RTX")
    },
}


@dataclass(frozen=True)
class Finding:
    """Whether some commands work here.

    Attributes:
        what: the commands.
        works: whether everything they need is here.
        why: what they would use, or what is missing.
        fix: what to install, or None.
    """

    what: str
    works: bool
    why: str
    fix: str | None = None


@dataclass(frozen=True)
class Report:
    """The result of :func:`examine`.

    Attributes:
        machine: facts about Python, the system and the GPUs.
        libraries: the result of each probe; ``{"missing": why}`` where it failed.
        findings: what works, and what does not.
    """

    machine: dict[str, Any]
    libraries: dict[str, dict[str, Any]]
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


_SERVER = ("fastapi", "uvicorn", "prometheus_client")
_SCALE = {
    "pyarrow": ("generate --format parquet", "data"),
    "fsspec": ("generate --out with an address, such as s3://…", "remote"),
    "ray": ("generate --ray", "ray"),
}
"""Packages for many images, what each is for, and its extra."""


def examine() -> Report:
    """Try every library and list what works. Takes some seconds; a missing or broken library is a finding, not an error."""
    found = gpus()
    machine = {
        "ddpmx": ddpmx.__version__,
        "python": f"{platform.python_version()} {sys.executable}",
        "platform": platform.platform(),
        "venv": sys.prefix != sys.base_prefix,
        "jetson": _jetson(),
        "gpus": [asdict(device) for device in found.devices],
        "driver_cuda": found.cuda,
        "gpu_trouble": found.trouble,
    }
    libraries = {name: _probe(code) for name, code in _PROBES.items()}
    for package in ("onnx", "onnxscript", "safetensors", "polygraphy", "matplotlib", "scipy", *_SERVER, *_SCALE):
        libraries[package] = _package(package)
    return Report(machine, libraries, _findings(machine, libraries))


def _findings(machine: dict[str, Any], libraries: dict[str, dict[str, Any]]) -> list[Finding]:
    def missing(*names: str) -> list[str]:
        return [name for name in names if "missing" in libraries[name]]

    gpu, no_gpu = bool(machine["gpus"]), machine["gpu_trouble"]
    torch, ort = libraries["torch"], libraries["onnxruntime"]
    findings = []
    for what, needs, here in (
        ("train", ("torch", "safetensors"), f"on the {'GPU' if torch.get('gpu') else 'CPU'}"),
        ("export", ("torch", "safetensors", "onnx", "onnxscript"), ""),
    ):
        if lacks := missing(*needs):
            findings.append(Finding(what, False, f"without {', '.join(lacks)}", f"pip install {' '.join(needs)}"))
        else:
            findings.append(Finding(what, True, f"torch {torch['version']} {here}".strip()))
    findings.append(
        Finding("score with an ODE", False, "without scipy", "pip install 'ddpmx[flow]'")
        if missing("scipy")
        else Finding("score with an ODE", True, f"scipy {libraries['scipy']['version']}")
    )
    findings.append(
        Finding("serve", False, f"without {', '.join(lacks)}", "pip install 'ddpmx[serve]'")
        if (lacks := missing(*_SERVER))
        else Finding("serve", True, f"FastAPI {libraries['fastapi']['version']}")
    )
    findings += [
        Finding(what, False, f"without {package}", f"pip install 'ddpmx[{extra}]'")
        if missing(package)
        else Finding(what, True, f"{package} {libraries[package]['version']}")
        for package, (what, extra) in _SCALE.items()
    ]
    fidelity = libraries["torch-fidelity"]
    findings.append(
        Finding("eval fid", False, f"without torch-fidelity ({fidelity['missing']})", "pip install 'ddpmx[eval]'")
        if "missing" in fidelity
        else Finding("eval fid", True, f"torch-fidelity {fidelity['version']}; it needs a file of weights as well")
    )
    findings.append(
        Finding("generate, parity with an .onnx on the CPU", False, "without onnxruntime", "pip install onnxruntime")
        if "missing" in ort
        else Finding("generate, parity with an .onnx on the CPU", True, f"onnxruntime {ort['version']}")
    )
    mnn, what = libraries["MNN"], "build --for mnn, generate, parity with an .mnn"
    if "missing" in mnn:
        findings.append(Finding(what, False, mnn["missing"], "pip install 'ddpmx[mnn]'"))
    else:
        why = mnn["no_converter"]
        findings.append(Finding(what, why is None, f"MNN {mnn['version']}" + (f", but {why}" if why else "")))
    cuda = "CUDAExecutionProvider" in ort.get("providers", ())
    if cuda and gpu:
        findings.append(
            Finding("generate --provider cuda", True, "its provider is listed; only a run shows whether it works")
        )
    else:
        findings.append(
            Finding(
                "generate --provider cuda",
                False,
                no_gpu or "this onnxruntime has no CUDA provider",
                None if no_gpu else "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )
        )
    findings.append(_chains(libraries))
    for flavour in ("TensorRT", "TensorRT-RTX"):
        library = libraries[flavour]
        if "missing" in library:
            findings.append(Finding(f"build with {flavour}", False, library["missing"], install_hint(flavour)))
            continue
        here = f"{flavour} {library['version']} from {', '.join(library['libraries']) or 'an unknown place'}"
        works = gpu or flavour == "TensorRT-RTX"
        findings.append(Finding(f"build with {flavour}", works, here if works else f"{here}, but {no_gpu}"))
        if len(library["libraries"]) > 1:
            findings.append(
                Finding(f"{flavour} alone", False, "two of its libraries are loaded at once", "remove one of them")
            )
    return findings


def _chains(libraries: dict[str, dict[str, Any]]) -> Finding:
    """Whether plans run here, and with which executor."""
    what, chains = "generate, parity, bench with a .plan", libraries["chains on the GPU"]
    if "missing" in chains:
        return Finding(what, False, chains["missing"])
    here = [flavour for flavour in ("TensorRT", "TensorRT-RTX") if "missing" not in libraries[flavour]]
    if not here:
        return Finding(what, False, "without TensorRT", install_hint(None))
    why = chains["why_no_while"]
    executor = "a whole chain in one launch (executor while)" if why is None else f"executor graph; not while: {why}"
    return Finding(what, True, f"{' and '.join(here)}, {executor}")


def _probe(code: str) -> dict[str, Any]:
    """Run ``code`` in its own Python process, and return the JSON object that it prints on its last line."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ALONE + code],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"missing": f"the probe did not finish: {error}"[:300]}
    if done.returncode == 0:
        try:
            values = json.loads(done.stdout.strip().splitlines()[-1])
            assert isinstance(values, dict)
        except (ValueError, IndexError, AssertionError):
            return {"missing": f"the probe printed {done.stdout.strip()[-200:]!r}"}
        return values
    if done.returncode < 0:
        return {"missing": f"importing it crashes Python (signal {-done.returncode})"}
    return {"missing": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def _package(name: str) -> dict[str, Any]:
    try:
        return {"version": metadata.version(name)}
    except metadata.PackageNotFoundError:
        return {"missing": "not installed"}


def _jetson() -> str | None:
    """The Jetson's model and L4T release, or None on other machines."""
    facts = []
    for file in ("/proc/device-tree/model", "/etc/nv_tegra_release"):
        try:
            facts.append(Path(file).read_text(errors="replace").strip("\0\n ").splitlines()[0])
        except (OSError, IndexError):
            continue
    return "; ".join(facts) if len(facts) == 2 or any("Jetson" in fact for fact in facts) else None
