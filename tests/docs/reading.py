"""The project's Markdown pages: their code blocks, commands and links."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    ROOT / "runtime" / "native" / "README.md",
    ROOT / "tests" / "gpu" / "README.md",
]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run: (.+) -->")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page's path, from the repository's root.
        line: where its first line stands.
        kind: the language beside the fence.
        text: without the fence's indentation.
        not_run: the reason in ``<!-- not run: REASON -->`` above it, or None.
    """

    page: str
    line: int
    kind: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, markdown: str) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    for fence in _FENCE.finditer(markdown):
        before = markdown[: fence.start()]
        above = before.rstrip("\n").rpartition("\n")[2]
        reason = _REASON.fullmatch(above.strip())
        indent = len(fence["indent"])
        text = "".join(line[indent:] if line.strip() else line for line in fence["text"].splitlines(keepends=True))
        found.append(Block(page, before.count("\n") + 2, fence["kind"], text, reason[1] if reason else None))
    return found


def all_blocks(kind: str | None = None) -> list[Block]:
    """The fenced blocks of all pages, of one language."""
    found = [block for path in PAGES for block in blocks(name(path), path.read_text(encoding="utf-8"))]
    return [block for block in found if kind is None or block.kind == kind]


def name(path: Path) -> str:
    """A page's path, from the repository's root."""
    return path.relative_to(ROOT).as_posix()


def commands(block: Block) -> list[str]:
    """The commands of a ``sh`` block: continued lines joined, comments left out, ``a && b`` taken apart."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [
        part for line in lines if not line.lstrip().startswith("#") for part in line.partition(" #")[0].split(" && ")
    ]
    return [" ".join(part.split()) for part in parts if part.strip()]


def links(markdown: str) -> Iterator[str]:
    """Where a page's relative links and images lead, without anchors. Code is skipped."""
    prose = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", markdown))
    for target in _LINK.findall(prose):
        path = target.partition("#")[0]
        if path and "://" not in target and not target.startswith("mailto:"):
            yield path


def dead_links(page: Path, markdown: str) -> list[str]:
    """The links of a page that lead to no file."""
    return [link for link in links(markdown) if not (page.parent / link).exists()]
