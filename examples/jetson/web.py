"""The HTTP side: checks numbers in queries; makes a page, PNGs and parts of a stream. No pipeline here."""

from __future__ import annotations

import io
import re
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpmx.errors import InputError

PAGE = """<!doctype html><meta charset="utf-8"><title>ddpmx</title><link rel="icon" href="data:,">
<style>img {{ width: min(512px, 90vw); image-rendering: pixelated; border: 1px solid #ccc }}</style>
<form>seed <input name="seed" type="number" min="0" value="{seed}">
steps <input name="steps" type="number" min="1" max="{most}" value="{steps}"> <button>Draw</button></form>
<p><img src="/stream?seed={seed}&amp;steps={steps}" alt="x̂₀ during the chain"></p>
<p><a href="/image?seed={seed}&amp;steps={steps}">PNG</a>, <a href="/?seed={after}&amp;steps={steps}">next seed</a></p>
"""

STREAM = "multipart/x-mixed-replace; boundary=frame"
LAST = b"--frame--\r\n"
MOST_SEED = 2**64 - 1


def numbers(query: str, most: dict[str, int]) -> dict[str, int]:
    """ "seed=7&steps=50" → {"seed": 7, "steps": 50}.

    Args:
        query: the part of the URL after the question mark.
        most: the allowed names, each with its largest value.

    Raises:
        InputError: another name, a name twice, or not a whole number in its range.
    """
    found: dict[str, int] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in most or name in found:
            raise InputError(f"{ascii(name)[:40]}: only {', '.join(most)} are allowed, each once")
        least = 0 if name == "seed" else 1
        if not re.fullmatch(r"[0-9]{1,20}", text) or not least <= int(text) <= most[name]:
            raise InputError(f"{name} must be a whole number from {least} to {most[name]}, not {ascii(text)[:40]}")
        found[name] = int(text)
    return found


def page(seed: int, steps: int, most: int) -> str:
    """HTML that shows the stream of a seed, with a form for another seed."""
    return PAGE.format(seed=seed, steps=steps, most=most, after=min(seed + 1, MOST_SEED))


def png(image: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, C] as a PNG."""
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image).save(stream, format="PNG")
    return stream.getvalue()


def part(image: NDArray[np.uint8]) -> bytes:
    """One image as a part of :data:`STREAM`."""
    data = png(image)
    return b"--frame\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(data), data)
