"""yang-song/score_sde_pytorch: recognised, and refused with the reason.

Its ``ddpm`` is not Ho's graph: on the way up it has one attention behind the three blocks of a level, where Ho has one
behind every block. It is trained in continuous time (t = 999·u, not a whole number), its checkpoints name no architecture,
and the average in them is a list without names.
"""

from __future__ import annotations

from ddpm_export.importers.reading.contents import CheckpointContents
from ddpm_export.importers.settings import Imported, Options
from ddpmx.errors import FileFormatError

NAME = "score-sde"


def recognise(contents: CheckpointContents) -> str | None:
    """Recognise the numbered modules of its networks."""
    named = next((name for name in contents.tensors if "all_modules.0." in name), None)
    return None if named is None else f"the weights are called {named}"


def read(contents: CheckpointContents, options: Options) -> Imported:
    """Refuse the file.

    Raises:
        FileFormatError: always.
    """
    raise FileFormatError(
        f"{contents.path}: a checkpoint of score_sde, which ddpmx does not import",
        note="its networks place attention elsewhere than Ho's and take a continuous t, and the file says neither which "
        "network nor which SDE it is",
        hint="build the network with its own code, load the weights, and pass it to ddpm_export.export, from Python: "
        "that takes any torch module",
    )
