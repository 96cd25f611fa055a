"""Hooks of mkdocs: the pages link to files of the repository that are no pages, which a site cannot reach.

On a code host such a link leads to the file. In the site its text stays, with the file's path; a picture is copied into the
site. A link to a file that does not exist stays a link, and mkdocs refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PICTURES = {".png", ".gif", ".svg"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page's text, with links that lead out of docs/ replaced."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        picture, text, target, _ = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if "://" in target or path.startswith("docs/") or not (ROOT / path).exists():
            return match[0]
        if not picture:
            return f"{text} (`{path}`)" if path not in text else text if "`" in text else f"`{text}`"
        if Path(path).suffix not in PICTURES:
            return match[0]
        name = f"repository/{path}"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
        return f"![{text}]({'../' * folder.count('/') + ('../' if folder else '')}{name})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts)
