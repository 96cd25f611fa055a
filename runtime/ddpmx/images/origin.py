"""Where an image comes from: the text that goes into its file, enough to draw it again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ddpmx
from ddpmx.errors import FileFormatError, OutputError
from ddpmx.formats import model_file, png_text
from ddpmx.formats.spec import ModelSpec
from ddpmx.sampling.request import Sampling

SOFTWARE = "Software"
"""PNG's own keyword for the program; the others are ours."""

TASK = "task"
"""The keyword under which a picture that a task has written names it."""


@dataclass(frozen=True)
class Origin:
    """The model and the request that images were drawn with.

    Attributes:
        model: sha256 of the weights, or of the model file where it does not state them.
        precision: of the numbers inside the network.
        seed: of the noise.
        sampling: how the chain was run.
        steps: its length.
        first: the index of the first image.
        labels: the class of each image, or None.
        conditions: the name of each image's condition, or None.
        guidance: w of classifier-free guidance, 1 for none.
        begun_from: the name of the picture that each image is a variation of, or None.
        shared: the timestep down to which all images are one, or None.
        towards: the seed of the other x_T where each image begins between two, or None.
        share: λ, how much of that other one it has.
    """

    model: str
    precision: str
    seed: int
    sampling: Sampling
    steps: int
    first: int = 0
    labels: Sequence[int] | None = None
    conditions: Sequence[str] | None = None
    guidance: float = 1.0
    begun_from: Sequence[str] | None = None
    shared: int | None = None
    towards: int | None = None
    share: float = 0.0

    def text(self, position: int, count: int = 1) -> dict[str, str]:
        """The text for the image at ``position`` of the request, or for a sheet of ``count`` images from there on."""
        index, sampling = self.first + position, self.sampling
        values: dict[str, object] = {
            SOFTWARE: f"ddpmx {ddpmx.__version__}",
            "model": self.model,
            "precision": self.precision,
            "seed": self.seed,
            "index": index if count == 1 else f"{index}-{index + count - 1}",
            "steps": self.steps,
            "sampler": sampling.sampler,
            "spacing": sampling.spacing,
        }
        if sampling.sampler == "ddim":
            values["eta"] = f"{sampling.eta:g}"
        if sampling.variance is not None:
            values["variance"] = sampling.variance
        if self.guidance != 1:
            values["guidance"] = f"{self.guidance:g}"
        if sampling.start is not None:
            values["start"] = sampling.start
        if self.shared is not None:
            values["shared"] = self.shared
        if self.towards is not None:
            values |= {"towards": self.towards, "share": f"{self.share:g}"}
        for keyword, each in (("label", self.labels), ("condition", self.conditions), ("init", self.begun_from)):
            if each is not None:
                shown = each[position : position + count]
                values[keyword] = shown[0] if len(set(shown)) == 1 else ",".join(map(str, shown))
        return {keyword: one_line(str(value)) for keyword, value in values.items()}


def model_hash(spec: ModelSpec, path: str | os.PathLike[str]) -> str:
    """What tells a model from others: the sha256 of its weights, or of its file where that does not state them."""
    return spec.weights or model_file.sha256(path)


def check_not_another_s(path: Path, model: str) -> None:
    """Refuse to overwrite a picture that another model has drawn, or anybody else has made.

    A damaged picture, such as one that was cut off, may be replaced.

    Args:
        path: a PNG or a GIF, or nothing yet.
        model: what :func:`model_hash` says of the model that is about to draw.

    Raises:
        OutputError: there is such a picture.
    """
    texts = _text(path)
    if texts is None or texts.get("model") == model:
        return
    by_ddpmx = texts.get(SOFTWARE, "").startswith("ddpmx ")
    whose = f"it is of another model, {texts.get('model', '')[:12]}" if by_ddpmx else "ddpmx has not drawn it"
    raise OutputError(f"refusing to overwrite {path}: {whose}", hint="another --out, or --overwrite")


def is_of_a_task(path: Path) -> bool:
    """Whether a task of ddpmx has written the picture, and not ``ddpmx generate``."""
    return TASK in (_text(path) or {})


def difference(path: Path, origin: Origin, n: int) -> str | None:
    """What tells a picture from those of the run ``origin``, in words; None if it is of this run, or damaged.

    Args:
        path: a PNG or a GIF.
        origin: the run.
        n: how many images are drawn now, from ``origin.first`` on; of others class and condition are not known.
    """
    texts = _text(path)
    if texts is None:
        return None
    index = texts.get("index", "")
    position = int(index) - origin.first if index.isascii() and index.isdecimal() else -1
    mine = origin.text(position if 0 <= position < n else 0)
    unknown = {SOFTWARE, "index"} | (set() if 0 <= position < n else {"label", "condition", "init"})
    optional = ("eta", "variance", "guidance", "start", "shared", "towards", "share", "label", "condition", "init")
    for keyword in dict.fromkeys((*mine, *optional)):
        theirs, here = texts.get(keyword), mine.get(keyword)
        if keyword not in unknown and theirs != here:
            return f"{keyword} {(theirs or 'not stated')[:64]}, and now {(here or 'not stated')[:64]}"
    return None


def one_line(text: str) -> str:
    """One line that any file can hold. The name of a condition's file may be no Unicode, or hold a line break."""
    return "".join(character if character.isprintable() else "?" for character in text)


def comment(texts: dict[str, str]) -> bytes:
    """The text as the comment of a GIF, a line for each keyword."""
    return "\n".join(f"{keyword}: {text}" for keyword, text in texts.items()).encode()


def _text(path: Path) -> dict[str, str] | None:
    """The text in a picture; None if it is damaged, as one that was cut off, and none if it is something else."""
    begin = b"GIF8" if path.suffix.lower() == ".gif" else b"\x89PNG"
    try:
        return _gif_text(path) if begin == b"GIF8" else png_text.read_png_text(path)[1]
    except FileFormatError:
        try:
            with path.open("rb") as stream:
                return None if begin.startswith(stream.read(len(begin))) else {}
        except OSError:
            return None


def _gif_text(path: Path) -> dict[str, str]:
    from PIL import Image

    try:
        with Image.open(path, formats=["GIF"]) as picture:
            lines = bytes(picture.info.get("comment", b"")).decode("utf-8", "replace").splitlines()
    except Exception as error:  # Pillow raises anything for a damaged file
        raise FileFormatError(f"{path}: not a valid GIF", note=str(error)[:200]) from error
    return {keyword: text for keyword, _, text in (line.partition(": ") for line in lines)}
