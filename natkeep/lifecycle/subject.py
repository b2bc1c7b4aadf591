"""The subject of a look: sites, and of a move what is to be asked about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from natkeep.checkpoint import Checkpoint
from natkeep.kernel.interface import Kernel
from natkeep.plan.findings import Finding
from natkeep.plan.move import Site
from natkeep.plan.steps import Plan
from natkeep.state.directory import StateDirectory
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at; the sites are opened.

    plan: of the move that is asked about; without one the machine alone is.
    checkpoint: where its connections were read; image: the directory, or empty; pid: of a process
    that still runs, or None. state: where the journals of other moves are. run_id: of the dump,
    where there is one. frozen: the process is still there, and does not run.
    """

    kernel: Kernel
    sites: tuple[Site, ...]
    plan: Plan | None = None
    checkpoint: Checkpoint | None = None
    image: str = ""
    pid: int | None = None
    state: StateDirectory | None = None
    run_id: str | None = None
    frozen: bool = False


Look = Callable[[Subject], Iterator[Finding]]
"""Looks at one thing and says what it found, `ok` included; changes nothing."""
