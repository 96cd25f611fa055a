"""yang-song/score_sde_pytorch: recognised, and refused with the reason.

Its ``ddpm`` is not Ho's graph: on the way up it has one attention behind the three blocks of a level, where Ho has one
behind every block. It is trained in continuous time (t = 999·u, no whole number), its checkpoints name no architecture,
and the average in them is a list without names.
"""

from __future__ import annotations

from ddpm_export.importers.reading.found import Found
from ddpm_export.importers.settings import Imported, Options
from ddpmx.errors import FileFormatError

NAME = "score-sde"


def recognise(found: Found) -> str | None:
    """By the numbered modules of its networks."""
    named = next((name for name in found.tensors if "all_modules.0." in name), None)
    return None if named is None else f"the weights are called {named}"


def read(found: Found, options: Options) -> Imported:
    """Nothing.

    Raises:
        FileFormatError: always.
    """
    raise FileFormatError(
        f"{found.path}: a checkpoint of score_sde, which ddpmx does not import",
        note="its networks place attention otherwise than Ho's and see a continuous t, and the file says neither which "
        "network nor which SDE it is",
        hint="build the network with its own code, load the weights, and give it to ddpm_export.export, from Python: "
        "that takes any torch module",
    )
