"""The command line: one file per command, no logic of its own."""

import sys

if sys.argv[:1] == ["-m"] and "ddpmx_cli.main" in sys.orig_argv:  # Python looks for that module: all imports come after
    from ddpmx_cli import entry  # noqa: F401  # handles signals
