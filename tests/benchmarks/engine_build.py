"""Build time, size and peak memory of engines of Ho's two networks.

    python tests/benchmarks/engine_build.py [--only cifar10] [--keep FOLDER]

Each engine is built in a process of its own, as `ddpmx build` does it: without torch. Weights are random; neither size
nor time depends on them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

_EXPORT = """
import sys
sys.path.insert(0, sys.argv[4])
from ddpm_export.graph.onnx_export import export_network
from ddpm_export.networks.unet import UNet, cifar10, lsun256
from ddpmx.formats.spec import ModelSpec
from oracles.random_weights import rerandomise
config = {"cifar10": cifar10, "lsun256": lsun256}[sys.argv[1]]()
network = UNet(config).eval()
rerandomise(network)
export_network(network, ModelSpec((config.in_channels, *config.size)), sys.argv[3], precision=sys.argv[2])
"""

_BUILD = """
import json, resource, sys
for name in ("torch", "onnx", "polygraphy"):
    sys.modules[name] = None
from ddpmx.trt import build as engine
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
built = engine.build(sys.argv[1], force=True)
print(json.dumps({
    "seconds": built.seconds, "bytes": built.info.size, "batch": built.info.engine.batch,
    "with": f"{built.info.flavour} {built.info.version}", "precision": built.precision,
    "peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
}))
"""


def python(code: str, *arguments: str) -> str:
    """The output of code in a Python process of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    """Export, build and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("cifar10", "lsun256"))
    parser.add_argument("--keep", type=Path, help="folder for the files, instead of a temporary one")
    options = parser.parse_args()
    print("| network | precision | ONNX | plan | batch | built in | peak memory of the build | |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        for network in [options.only] if options.only else ["cifar10", "lsun256"]:
            for precision in ("fp32", "fp16", "bf16"):
                onnx = folder / f"{network}-{precision}.onnx"
                python(_EXPORT, network, precision, str(onnx), str(Path(__file__).parents[1]))
                built = json.loads(python(_BUILD, str(onnx)))
                low, best, high = built["batch"]
                print(
                    f"| {network} | {precision} | {onnx.stat().st_size / 1e6:.1f} MB | {built['bytes'] / 1e6:.1f} MB | "
                    f"{low}…{high} (best {best}) | {built['seconds']:.1f} s | {built['peak'] / 1e6:.0f} MB | "
                    f"{built['with']} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
