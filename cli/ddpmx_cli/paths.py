"""A path is never empty: Python reads "" as the current folder, and a shell makes "" of a variable that is not set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from ddpmx.errors import InputError

_TEXTS = {"engine", "like", "out"}
"""Options that name a file and are kept as text. Arguments are files, all of them."""


class PathCommand(TyperCommand):
    """A command that refuses an empty text where a path belongs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for parameter in self.params:
            setattr(parameter, "process_value", _checked(parameter))  # noqa: B010 - a method, for this object alone


def _checked(parameter: Any) -> Callable[[Any, Any], Any]:
    process: Callable[[Any, Any], Any] = parameter.process_value
    is_argument = parameter.param_type_name == "argument"
    named = is_argument or parameter.name in _TEXTS or type(getattr(parameter, "type", None)).__name__.endswith("Path")

    def checked(context: Any, value: Any) -> Any:
        processed = process(context, value)
        # typer before 0.29 has the paths' type in the parameter, and makes them later
        path = named or isinstance(processed, Path)
        if path and isinstance(value, str) and not value and not context.resilient_parsing:
            name = parameter.metavar or parameter.name.upper() if is_argument else max(parameter.opts, key=len)
            raise InputError(f"{name} is empty", hint="name a file or a folder; the current folder is .")
        return processed

    return checked
