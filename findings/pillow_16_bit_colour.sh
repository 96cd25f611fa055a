#!/bin/sh
# Pillow opens a PNG with 16 bits per colour as 8-bit RGB, and keeps the upper byte of each sample without a word. A sensor's
# 12-bit colours (0…4095) become 0…15: a nearly black picture. A 16-bit grey keeps its numbers, so one would guess that
# colours do too, or that it warns.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.2.6
cat > "$folder/check.py" <<'PY'
import struct, sys, warnings, zlib

import numpy as np
import PIL
from PIL import Image

warnings.simplefilter("error")
path = sys.argv[1]


def png(samples, colour):  # PNG, W3C 3rd edition: IHDR with bit depth 16; filter 0 before each row; big-endian samples
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


samples = np.linspace(0, 4095, 48).round().astype(np.uint16).reshape(4, 4, 3)
seen = {}
for name, data in (("colour", png(samples, 2)), ("grey", png(samples[..., 0], 0))):
    with open(f"{path}/{name}.png", "wb") as stream:
        stream.write(data)
    with Image.open(f"{path}/{name}.png") as image:
        seen[name] = image.mode, int(np.asarray(image).max())
print("Pillow", PIL.__version__, "of samples 0...4095:", seen)
sys.exit(seen != {"colour": ("RGB", 15), "grey": ("I;16", int(samples[..., 0].max()))})
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
# seen: Pillow 13.0.0 of samples 0...4095: {'colour': ('RGB', 15), 'grey': ('I;16', 3921)}
