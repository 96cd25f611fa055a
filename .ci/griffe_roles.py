"""An extension of Griffe, which reads docstrings for the API pages: the roles of the docstrings become links.

:class:`~ddpmx.formats.spec.ModelSpec` → a link to ModelSpec, if a page documents it, and its name otherwise.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, NameResolutionError, Object

_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`(~?)\.?([\w.]+)`")
_DOUBLE = re.compile(r"``([^`\n]+)``")


class Roles(Extension):
    """Rewrites every docstring once it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            shown = name.rsplit(".", 1)[-1] if short else name
            try:
                path = obj.resolve(name) if "." not in name else name
            except NameResolutionError:
                path = name
            return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

        text = _DOUBLE.sub(r"`\1`", obj.docstring.value)
        obj.docstring.value = _ROLE.sub(link, text)
