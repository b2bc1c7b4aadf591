"""how Sphinx makes a site of README, of docs/ and of the files beside README: `make docs`.

The source directory is that of README, so all links are as they are read without Sphinx. What it
warns of is an error.
"""

from importlib.metadata import version as version_of
from typing import Any

project = "natkeep"
copyright = "the natkeep authors, GPL-2.0-or-later"
version = release = version_of("natkeep")
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Restore a process at another address and keep its connections",
    "fixed_sidebar": True,
    "page_width": "1100px",
}
myst_heading_anchors = 4  # the pages' own links: limits.md#udp
nitpicky = True

CHAPTERS = {
    "Move something": (
        "docs/install", "docs/migrate", "docs/programs", "docs/by-hand", "docs/topologies",
        "docs/fleet", "docs/containers", "docs/kubernetes", "docs/controller", "docs/when-it-fails",
    ),
    "Look things up": ("docs/reference", "docs/hook", "docs/repair", "docs/limits", "SECURITY"),
    "How it is made": (
        "docs/how-it-works", "docs/matrix", "docs/performance", "CONTRIBUTING", "CHANGELOG",
    ),
}  # fmt: skip
"""The pages by chapter; one that is in none is a warning of Sphinx's."""


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_chapters)


def _add_chapters(_app: Any, page: str, source: list[str]) -> None:
    if page == root_doc:
        for chapter, pages in CHAPTERS.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:caption: {chapter}\n:hidden:\n\n{listed}\n```\n"
