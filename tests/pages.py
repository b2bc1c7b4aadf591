"""The code blocks of the pages, and what is done with each.

A block that is no `text` has a comment in front of it, which neither GitHub nor Sphinx shows:

    <!-- run by test_x -->      test_x gets it by `blocks_of("test_x")` and runs it; a text may have
                                this, too
    <!-- parsed -->             natkeep's own parser takes each command, or make has the target
    <!-- not run: WHY -->       it needs what no lab has

tests/test_docs.py holds this.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
ALL = (*PAGES, *(ROOT / f"{name}.md" for name in ("SECURITY", "CONTRIBUTING", "CHANGELOG")))
_PART = re.compile(
    r"^##+ (?P<heading>.*)$"
    r"|(?:^ *<!-- (?P<mark>.*) -->\n)?"
    r"^(?P<indent> *)```(?P<language>.*)\n(?P<text>(?:.*\n)*?) *```$",
    re.MULTILINE,
)
_ENDS = re.compile(r"[();<>|&]+")
_BEFORE = re.compile(r"\w+=.*|\$|exec|sudo|-n")


class Block(NamedTuple):
    """A code block of a page, below a heading."""

    page: str
    heading: str
    mark: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.heading}: {self.text.partition(chr(10))[0]}"


def _read(page: Path) -> Iterator[Block]:
    name, heading = str(page.relative_to(ROOT)), ""
    for part in _PART.finditer(page.read_text()):
        if part["heading"]:
            heading = part["heading"]
            continue
        text = re.sub(f"^{part['indent']}", "", part["text"], flags=re.MULTILINE)
        yield Block(name, heading, part["mark"] or "", part["language"], text)


BLOCKS = [block for page in ALL for block in _read(page)]


def blocks_of(test: str) -> list[Block]:
    """The blocks that *test* runs, in the order of the pages."""
    found = [block for block in BLOCKS if test in block.mark.removeprefix("run by ").split(", ")]
    assert found, f"no page has a block that is run by {test}"
    return found


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command, without variables, ssh and sudo in front of it."""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not _ENDS.fullmatch(word):
                words.append(word)
                continue
            words = words[2:] if words[:1] == ["ssh"] else words
            while words and _BEFORE.fullmatch(words[0]):
                words = words[1:]
            if words:
                yield words
            words = []
