"""the linters as tests: what `make check` says, the suite says too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL = [
    ".ci/run",
    "natkeep/criu/natkeep-hook",
    *(f"scripts/{f.name}" for f in ROOT.glob("scripts/*") if f.is_file() and f.suffix != ".py"),
    "natkeep/systemd/natkeep-loop",
    "debian/natkeep.prerm",
]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "--quiet", "--output-format=concise", "."], id="ruff-check"),
        pytest.param(
            ["ruff", "format", "--check", "--output-format=concise", "."], id="ruff-format"
        ),
        pytest.param(["mypy"], id="mypy-strict"),
        pytest.param(["shellcheck", *SHELL], id="shellcheck"),
    ],
)
def test_linter_has_nothing_to_say(command: list[str], require: Callable[[str], None]) -> None:
    """A linter that is not installed is a skip, or a failure where it is required."""
    require(command[0])
    beside = Path(sys.executable).with_name(command[0])

    done = subprocess.run(
        [str(beside) if beside.exists() else command[0], *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
