"""Scenarios: files, each of which describes one move and the network that it is made in.

    \"\"\"A server moves to another address; its client notices nothing.   (then the network)\"\"\"
    SETUP = {"family": 6}          # arguments of Lab, optional; an engine: it is for this one only
    CONNECTIONS = 50               # optional; where there is no `run`: see move_once
    def run(lab): lab.begin(); lab.move(); lab.traffic.talk_on(); lab.finish()

Rule: a scenario always ends in a verdict, whatever fails in it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import natkeep
from natkeep.errors import NatkeepError, UsageError
from natkeep.lab.lab import Lab
from natkeep.lab.page import read_trace, render_page
from natkeep.lab.report import Report, ScenarioOver


@dataclass(frozen=True, slots=True)
class Scenario:
    """A file of scenarios/, by name; loaded only when it is run."""

    name: str
    path: Path

    @property
    def title(self) -> str:
        """The first line of its docstring."""
        doc = ast.get_docstring(ast.parse(self.path.read_text(encoding="utf-8"))) or self.name
        return doc.splitlines()[0]

    def load(self) -> tuple[Callable[[Lab], None], dict[str, Any]]:
        """Its `run`, or `move_once`, and its SETUP."""
        spec = importlib.util.spec_from_file_location(f"natkeep_scenario_{self.name}", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        usual = partial(move_once, connections=getattr(module, "CONNECTIONS", 1))
        return getattr(module, "run", usual), getattr(module, "SETUP", {})

    def choose_engine(self, asked: str) -> str:
        """The engine to run it with; UsageError if it is for another one than was *asked* for."""
        own: str = self.load()[1].get("engine", "auto")
        if own == "auto" or asked in ("auto", own):
            return asked if own == "auto" else own
        raise UsageError(f"{self.name} is for --engine {own} only, not {asked}")


def move_once(lab: Lab, *, connections: int) -> None:
    """The scenario of a file that has no `run`."""
    lab.begin(connections=connections)
    lab.move()
    lab.traffic.talk_on()
    lab.finish()


def scenarios() -> list[Scenario]:
    """All scenarios: the packaged ones, or those of the checkout."""
    package = Path(natkeep.__file__).parent
    packaged = package / "lab" / "scenarios"
    directory = packaged if packaged.is_dir() else package.parent / "scenarios"
    return [Scenario(path.stem, path) for path in sorted(directory.glob("[a-z]*.py"))]


def find_scenario(name: str) -> Scenario:
    """The scenario called *name*."""
    for scenario in scenarios():
        if scenario.name == name:
            return scenario
    raise UsageError(f"there is no scenario {name!r}", hint="natkeep lab list names them")


def run(
    scenario: Scenario, *, pcap: Path | None = None, page: Path | None = None, **options: Any
) -> Report:
    """Tell *scenario* in a fresh lab; options are Lab's.

    pcap, page: directories where the captures are kept, and the report is written as a page.
    """
    moves, setup = scenario.load()
    engine = scenario.choose_engine(options.get("engine", "auto"))
    with Lab(scenario.name, **{**setup, **options, "engine": engine}) as lab:
        lab.report.title = scenario.title
        perform(lab, moves)
        if pcap is not None:
            keep_captures(lab, pcap)
        if page is not None:
            write_page(lab, page)
    return lab.report


def perform(lab: Lab, moves: Callable[[Lab], None]) -> None:
    """Do what *moves* says to its end, whatever fails in it."""
    try:
        moves(lab)
    except ScenarioOver:
        lab.conclude()
    except NatkeepError as error:
        lab.report.fail("the scenario comes to its end", error)
        lab.conclude()


def write_page(lab: Lab, directory: Path) -> None:
    """Write the report as NAME.html into *directory*, with a plot of the first connection."""
    directory.mkdir(parents=True, exist_ok=True)
    trace = None
    if lab.traffic.views and lab.frozen_ns is not None:
        first = next(iter(lab.traffic.views))
        trace = read_trace(lab.seen_by_peers, first, lab.frozen_ns, lab.restored_ns)
    file = directory / f"{lab.report.scenario}.html"
    file.write_text(render_page(lab.report, trace), encoding="utf-8")


def keep_captures(lab: Lab, directory: Path) -> None:
    """Copy what was captured into *directory*."""
    directory.mkdir(parents=True, exist_ok=True)
    for capture in lab.captures:
        (directory / capture.path.name).write_bytes(capture.path.read_bytes())
