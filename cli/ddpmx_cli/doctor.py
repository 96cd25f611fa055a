"""`ddpmx doctor`."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from ddpmx_cli.console import busy, say

EXAMPLES = """
Examples:\n
  ddpmx doctor\n
  ddpmx doctor --json > machine.json
"""


def doctor(as_json: Annotated[bool, Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Show what is installed, and what is missing for which command: torch, CUDA, the driver, ONNX Runtime, MNN,
    TensorRT."""
    from ddpmx.system.doctor import examine

    with busy("examining this machine"):
        report = examine()
    if as_json:
        say(json.dumps(report.to_json(), indent=2))
        return
    machine = report.machine
    say(f"ddpmx {machine['ddpmx']}, Python {machine['python']}")
    say(f"{machine['platform']}" + (f"; {machine['jetson']}" if machine["jetson"] else ""))
    for gpu in machine["gpus"]:
        say(
            f"GPU: {gpu['name']}, SM {gpu['sm']}, {gpu['memory'] / 2**30:.1f} GiB; driver for CUDA {machine['driver_cuda']}"
        )
    if machine["gpu_trouble"]:
        say(f"GPU: none, {machine['gpu_trouble']}")
    say("")
    for name, found in report.libraries.items():
        if "missing" in found:
            say(f"  ✗ {name}: {found['missing']}")
            continue
        details = [f"CUDA {found['cuda'] or 'none'}"] if "cuda" in found else []
        details += [", ".join(found["providers"])] if "providers" in found else []
        details += found.get("libraries", [])
        say(f"  ✓ {name} {found['version']}" + (f" ({'; '.join(details)})" if details else ""))
    say("")
    for finding in report.findings:
        say(f"  {'✓' if finding.works else '✗'} {finding.what}: {finding.why}")
        if finding.fix:
            say(f"      {finding.fix}")
