"""the floors of DESIGN section 3, held by reading every import of natkeep/.

Rule: an import runs down, or stays in its own folder. Where it stands does not matter (at the top,
in a function, under TYPE_CHECKING), with three exceptions, all from inside a function: the door
`cli` may reach `lab.cli`, the practice networks' own verbs, so that no move ever loads the lab, and
`criu.run`, which is the verb `run`, and `criu.environment`, which knows the hook's moves (`gc`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "natkeep"
FLOORS = {
    **dict.fromkeys(("cli", "criu", "cni", "controller", "__main__"), 6),
    "fleet": 5,
    **dict.fromkeys(("lifecycle", "report", "migrate"), 4),
    **dict.fromkeys(("kernel", "checkpoint", "state", "policy", "page"), 3),
    **dict.fromkeys(("plan", "faultpoints", "terminal", "system_log", "colour", "agent_socket"), 2),
    **dict.fromkeys(("errors", "values", "afterwards", "installed", "__init__"), 1),
}
BETWEEN_DOORS = [("cli/change.py", ["criu", "run"]), ("cli/change.py", ["criu", "environment"])]
LAB = ("lab", "plan", "errors", "terminal", "colour", "page", "__init__")  # what it may import
LIBRARIES = {"pyroute2", "nftables"}  # and scapy, in the lab
LAZILY = (  # a file that may import an outside library from inside a function
    ("cli/setup.py", "shtab"),  # of `setup` alone, where there is one
    ("page.py", "matplotlib"),  # when something is drawn
    ("cli/progress.py", "tqdm"),  # at a terminal, before the freeze
)
OWN = ("controller/operator.py", "kopf")  # of an extra; nothing imports it but its own __main__


def read_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that *path* imports, and whether inside a function."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module in ("natkeep", *(f"natkeep.{f}" for f in (*FLOORS, "lab"))):
                # `from natkeep.kernel import netns`: which module is meant, the name tells
                prefix = "." * node.level + module + ("." if module else "")
                yield from ((prefix + alias.name, id(node) in lazy) for alias in node.names)
            else:
                yield module, id(node) in lazy


def find_faults(package: Path) -> list[str]:
    """Every import below *package* that does not run down."""
    faults: list[str] = []
    where: dict[str, set[str]] = {}  # outside library: the files that import it
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        mine = name.removesuffix(".py").split("/")[0]
        if mine not in FLOORS and mine != "lab":
            faults.append(f"{name} stands on no floor")
            continue
        for module, lazy in read_imports(path):
            top, *parts = module.split(".")
            theirs = parts[0] if parts and parts[0] in (*FLOORS, "lab") else "__init__"
            if top in sys.stdlib_module_names:
                continue
            if top == "":
                faults.append(f"{name} imports {module}: relative, so not checked")
            elif top != "natkeep":
                if mine != "lab":
                    where.setdefault(top, set()).add(name)
                    theirs_here = (lazy and (name, top) in LAZILY) or (name, top) == OWN
                    if not theirs_here and (top not in LIBRARIES or mine != "kernel"):
                        faults.append(f"{name} imports {module}: an outside library")
            elif mine in ("errors", "__init__"):
                faults.append(f"{name} imports {module}: it is to import nothing")
            elif mine == "lab":
                netns = parts[:2] == ["kernel", "netns"]
                if theirs not in LAB and not netns:
                    faults.append(f"{name} imports {module}: not for the lab")
            elif theirs == "lab":
                if not (name == "cli/parser.py" and lazy and parts[:2] == ["lab", "cli"]):
                    faults.append(f"{name} imports {module}: the lab is imported by nothing above")
            elif (name, parts[:2]) in BETWEEN_DOORS and lazy:
                pass
            elif theirs != mine and FLOORS[theirs] >= FLOORS[mine]:
                faults.append(f"{name} imports {module}: not downwards")
    for library, names in sorted(where.items()):
        if len(names) > 1:
            faults.append(
                f"{library} is imported in {len(names)} files: {', '.join(sorted(names))}"
            )
    return faults


def test_every_import_runs_down() -> None:
    assert find_faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("plan/move.py", "from natkeep.kernel import netns", "natkeep.kernel.netns: not downwards"),
        ("plan/move.py", "import natkeep.state.journal", "natkeep.state.journal: not downwards"),
        ("plan/move.py", "from natkeep import policy", "natkeep.policy: not downwards"),
        ("plan/move.py", "import pyroute2", "pyroute2: an outside library"),
        ("plan/move.py", "from ..kernel import nft", "..kernel.nft: relative"),
        ("state/journal.py", "from natkeep import lifecycle", "natkeep.lifecycle: not downwards"),
        ("checkpoint/live.py", "import natkeep.kernel.netns", "natkeep.kernel.netns: not down"),
        ("cli/setup.py", "import shtab", "shtab: an outside library"),
        ("cli/show.py", "def f():\n    import shtab", "shtab: an outside library"),
        ("cli/progress.py", "import tqdm", "tqdm: an outside library"),
        ("migrate/host.py", "def f():\n    import tqdm", "tqdm: an outside library"),
        ("page.py", "import matplotlib", "matplotlib: an outside library"),
        ("page.py", "import natkeep.report", "natkeep.report: not downwards"),
        ("kernel/nft.py", "import requests", "requests: an outside library"),
        ("kernel/nft.py", "def f():\n    import natkeep.cli", "natkeep.cli: not downwards"),
        (
            "errors.py",
            "from natkeep.plan import move",
            "natkeep.plan.move: it is to import nothing",
        ),
        ("lab/wire.py", "from natkeep.kernel import nft", "natkeep.kernel.nft: not for the lab"),
        ("lab/wire.py", "import natkeep.lifecycle", "natkeep.lifecycle: not for the lab"),
        (
            "lifecycle/executor.py",
            "import natkeep.lab.capture",
            "natkeep.lab.capture: the lab is imported",
        ),
        ("cli/parser.py", "from natkeep.lab import cli", "natkeep.lab.cli: the lab is imported"),
        (
            "cli/parser.py",
            "def f():\n    import natkeep.lab.capture",
            "natkeep.lab.capture: the lab is imported",
        ),
        ("controller/status.py", "import kopf", "kopf: an outside library"),
        ("fleet/apply.py", "import natkeep.controller.status", "status: not downwards"),
        ("cli/fleet.py", "import natkeep.controller.status", "status: not downwards"),
        ("helpers.py", "", "helpers.py stands on no floor"),
    ],
)
def test_an_import_that_does_not_run_down_is_found(
    tmp_path: Path, name: str, line: str, fault: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(line)

    faults = find_faults(tmp_path)

    assert len(faults) == 1
    assert fault in faults[0]


def test_an_outside_library_in_two_files_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    for name in ("rtnetlink.py", "conntrack.py"):
        (tmp_path / "kernel" / name).write_text("from pyroute2 import IPRoute")

    faults = find_faults(tmp_path)

    assert faults == ["pyroute2 is imported in 2 files: kernel/conntrack.py, kernel/rtnetlink.py"]


def test_imports_that_run_down_are_no_fault(tmp_path: Path) -> None:
    tree = {
        "cli/parser.py": "import natkeep.lifecycle\ndef f():\n    from natkeep.lab import cli",
        "lifecycle/executor.py": "from natkeep import errors, journal, __version__",
        "kernel/linux.py": "import os\nimport pyroute2\nfrom natkeep.kernel import nft",
        "plan/move.py": "from natkeep.plan.tuples import FourTuple\nfrom natkeep.errors import E",
        "lab/wire.py": "import scapy.all\nfrom natkeep.kernel.netns import enter",
        "lab/engines.py": "import scapy\nfrom natkeep.kernel import netns",
    }
    for name, lines in tree.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines)

    assert find_faults(tmp_path) == []
