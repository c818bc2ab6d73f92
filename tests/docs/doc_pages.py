"""The pages that people read: their fenced blocks, and commands as a shell would see them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = "not run here: "
MISTAKE = "a mistake"

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INFO = re.compile(r"^(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Its page, from the repository's root.
        line: Of the opening fence.
        language: Word after the opening fence.
        title: A file's name, why the block does not run, or that its commands are mistakes.
        text: Between the fences.
    """

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def is_run(self) -> bool:
        """True if the block can be run in the test."""
        return not self.title.startswith(NOT_RUN)

    @property
    def file(self) -> str | None:
        """Name of the file in which a reader saves the block."""
        return self.title if self.is_run and self.title not in ("", MISTAKE) else None

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    """README, the site's pages, the shelf's and the benchmarks' page, and CONTRIBUTING."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    pages += [ROOT / "callbacks" / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        info = _INFO.match(match["info"])
        assert info, f'{page}:{line}: ```{match["info"]}: expected a language and title="..."'
        title = info["title"] or ""
        found.append(Block(page, line, info["language"], title, match["text"]))
    return found


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [block for page in page_names() for block in blocks_of(page)]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a bash block, in words; comments and continued lines as in a shell."""
    joined = block.text.replace("\\\n", " ").replace("$'", "'")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if words]


def own_arguments(words: list[str]) -> list[str] | None:
    """Return a command's arguments of ``okd-lightning``, also after a launcher; None for others."""
    if "okd-lightning" in words:
        return words[words.index("okd-lightning") + 1 :]
    if "okd_lightning" in words and words[words.index("okd_lightning") - 1] == "-m":
        return words[words.index("okd_lightning") + 1 :]
    return None
