#!/bin/sh
# Pillow exchanges width and height of a TIFF whose Exif orientation is 5 to 8 when it opens the file, while getexif() says 6
# until the pixels are loaded, which it turns as well. A JPEG, PNG or WebP keeps the stored size and the orientation. One would
# guess that .size means the same for all of them: who reads it from headers alone, and exchanges the sides where orientation
# says so, has a TIFF's wrong.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cat > "$folder/check.py" <<'PY'
import io, sys

import PIL
from PIL import ExifTags, Image, ImageOps

exif = Image.Exif()
exif[ExifTags.Base.Orientation] = 6
seen = {}
for kind in ("TIFF", "JPEG", "PNG", "WEBP"):
    stream = io.BytesIO()
    Image.new("RGB", (40, 20)).save(stream, kind, exif=exif)
    with Image.open(stream) as image:
        opened = image.size, image.getexif().get(ExifTags.Base.Orientation)
        image.load()
        loaded = image.size, image.getexif().get(ExifTags.Base.Orientation)
        seen[kind] = opened, loaded, ImageOps.exif_transpose(image).size
print("Pillow", PIL.__version__, "of 40x20 stored: at open, loaded, transposed", seen)
others = ((40, 20), 6), ((40, 20), 6), (20, 40)
sys.exit(seen != {"TIFF": (((20, 40), 6), ((20, 40), None), (20, 40)), "JPEG": others, "PNG": others, "WEBP": others})
PY
"$folder/venv/bin/python" "$folder/check.py"
