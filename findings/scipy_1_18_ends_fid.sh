#!/bin/sh
# SciPy 1.18.1 beside pytorch-fid 0.3.0 and clean-fid 0.1.35, the newest of each. Both allow any SciPy, so one would guess that they
# compute the FID with today's. SciPy 1.18 has taken sqrtm's argument `disp` away, which both pass, so that the last step, after all images
# went through the network, is a TypeError; with 1.17.1 it is a DeprecationWarning. Only that function of each package is taken from its
# wheel here, since the rest needs torch. SciPy 1.18 needs Python 3.12.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for python in python3 python3.14 python3.13 python3.12 "$(pyenv root 2>/dev/null || true)"/versions/3.1[2-9]*/bin/python3 none; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
test "$python" != none || { echo "Python 3.12 or later is needed"; exit 2; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/fid" pytorch-fid==0.3.0 clean-fid==0.1.35
cat > "$folder/show.py" <<'PY'
import ast, importlib.util, warnings
from pathlib import Path

import numpy as np, scipy
from scipy import linalg

warnings.simplefilter("ignore")
rng = np.random.default_rng(0)
features = [rng.standard_normal((200, 16)) + shift for shift in (0.0, 0.5)]
moments = [array for x in features for array in (x.mean(axis=0), np.cov(x, rowvar=False))]
for package, module, name in (("pytorch_fid", "fid_score", "calculate_frechet_distance"), ("cleanfid", "fid", "frechet_distance")):
    folder = Path(importlib.util.find_spec(package).origin).parent
    tree = ast.parse((folder / f"{module}.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names = {"np": np, "linalg": linalg}
    exec(compile(ast.Module(functions, []), package, "exec"), names)
    try:
        found = f"FID {float(names[name](*moments)):.2f}"
    except TypeError as error:
        found = f"TypeError: {error}"
    print(f"SciPy {scipy.__version__}, {package}: {found}")
PY
for version in 1.17.1 1.18.1; do
  "$folder/venv/bin/pip" install --quiet "scipy==$version"
  PYTHONPATH="$folder/fid" "$folder/venv/bin/python" "$folder/show.py" | tee -a "$folder/seen"
done
for package in pytorch_fid cleanfid; do
  grep -q "^SciPy 1.17.1, $package: FID [0-9]" "$folder/seen"
  grep -q "^SciPy 1.18.1, $package: TypeError: sqrtm() got an unexpected keyword argument 'disp'$" "$folder/seen"
done
