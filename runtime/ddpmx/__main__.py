"""``python -m ddpmx``: the command line, for where the script ``ddpmx`` is not on the path."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    try:
        entry = importlib.import_module("ddpmx_cli.entry")  # by its name: the runtime does not depend on it
    except ModuleNotFoundError:
        sys.exit("Error: the command line (ddpmx_cli) is not installed\nHint: pip install ddpmx")
    entry.run()
