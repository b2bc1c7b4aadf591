"""Sizes, circles and names of natkeep/: what a reader can count on before opening a file."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "natkeep"
MODULES = sorted(PACKAGE.rglob("*.py"))

QUESTIONS = {
    "where is a conntrack entry packed?": ("kernel/ctnetlink.py", "pack_entry"),
    "which priority has the gate?": ("plan/base_chains.py", "DISPATCHES"),
    "who writes the journal, and when?": ("lifecycle/executor.py", "apply"),
    "where is a stale entry purged?": ("kernel/conntrack_purge.py", "purge"),
    "how does the hook find the netns?": ("criu/environment.py", "find_site"),
    "where is OLD put on lo?": ("kernel/rtnetlink.py", "add_host_address"),
    "where is ARP for OLD silenced?": ("plan/arp.py", "silence"),
    "how is an nft rule taken out again?": ("plan/nft.py", "undo"),
    "where are SYNs blocked in a quiesce?": ("plan/syn_block.py", "block"),
    "how does status read the rules?": ("kernel/nftables_dump.py", "find_standing"),
    "where is a lost route noticed?": ("kernel/lost_routes.py", "find_lost"),
    "where does gc delete leftovers?": ("kernel/nft_strays.py", "clear"),
    "in which order does prepare work?": ("plan/step_order.py", "make_plan"),
    "who decides that a connection lives?": ("plan/liveness.py", "find_life"),
    "where is the blackout's fast open?": ("criu/natkeep_hook_open.py", "serve"),
}
"""What netfilter people asked the tree, and where the answer is. Such a file keeps its name."""


def defined_in(path: Path) -> set[str]:
    """Functions, classes and values that a module defines, methods too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_file_that_answers_is_named_after_its_subject(question: str) -> None:
    file, symbol = QUESTIONS[question]
    assert symbol in defined_in(PACKAGE / file)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_are_short_and_a_long_module_says_why(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    sizes = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > 45} == {}
    assert text.count("\n") <= 400 or "Size: over 400 lines, because" in (
        ast.get_docstring(tree) or ""
    )


def test_no_import_goes_in_a_circle() -> None:
    names = {as_module(path): path for path in MODULES}
    graph = {name: set(read_imports(path, names)) - {name} for name, path in names.items()}
    assert sum(map(len, graph.values())) > len(graph)  # or nothing was read
    TopologicalSorter(graph).prepare()


def as_module(path: Path) -> str:
    """natkeep/plan/move.py: natkeep.plan.move."""
    name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


def read_imports(path: Path, known: dict[str, Path]) -> list[str]:
    """The modules of natkeep that a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name in known]
