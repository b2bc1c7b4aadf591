"""Adds man pages and completion to the wheel, where man and the shells look below a prefix."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETION = {
    "bash": "bash-completion/completions/natkeep",
    "zsh": "zsh/site-functions/_natkeep",
    "fish": "fish/vendor_completions.d/natkeep.fish",
}


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling, as pyproject.toml says."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the files, in a directory that lasts until the wheel is made."""
        if version == "editable":
            return
        self.made = tempfile.TemporaryDirectory()
        pages = Path(self.made.name, "man")
        self.run("scripts/make_man.py", str(pages))
        places = {page: f"man/{page.relative_to(pages)}" for page in pages.glob("*/*")}
        for shell, place in COMPLETION.items():
            script = Path(self.made.name, shell)
            script.write_text(self.run("-m", "natkeep.cli", "setup", "--completion", shell))
            places[script] = place
        build_data["shared_data"] |= {str(path): f"share/{to}" for path, to in places.items()}

    def run(self, *arguments: str) -> str:
        """What this python prints, with natkeep from the source tree and shtab from pip's."""
        path = os.pathsep.join(filter(None, (self.root, os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.root, check=True, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path}, text=True,
        )  # fmt: skip
        return done.stdout
