#!/bin/sh
# NumPy 2.4. Philox is a function of a counter and a key, published with known answers (Random123, kat_vectors: philox4x64, 10 rounds,
# counter and key 0: 16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b). One would guess that Philox(counter=c)
# begins with the block of counter c. It begins with the block of c + 1: the counter is incremented first. Numbers that were drawn by
# counter elsewhere (a GPU, another language) are found in NumPy at counter - 1, and those of counter 0 at 2^256 - 1.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import numpy as np

known = ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]
for name, counter in (("0", 0), ("2^256 - 1", 2**256 - 1)):
    block = [f"{int(word):016x}" for word in np.random.Philox(key=0, counter=counter).random_raw(4)]
    print(f"{np.__version__} Philox(counter={name}):", *block, "known answer of counter 0:", block == known)
PY
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/seen"
grep -q "counter=0): 02f4ba6408e4d89b .*: False$" "$folder/seen"
grep -q "counter=2^256 - 1): 16554d9eca36314c .*: True$" "$folder/seen"
