"""the children natkeep starts, and how it is started itself: clean environment, absolute paths.

The lab is no part of this: it drives natkeep as a person would.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from natkeep.criu import run
from natkeep.errors import UsageError
from natkeep.kernel import criu_lock
from natkeep.kernel.netns import entered

PACKAGE = Path(__file__).parent.parent / "natkeep"
STARTERS = {"run", "Popen", "call", "check_call", "check_output", "posix_spawn", "posix_spawnp"}
FORBIDDEN = {"system", "popen", "execvp", "execlp", "spawnvp", "posix_spawnp", "getoutput"}
OF_A_SHELL = {"PWD", "OLDPWD", "SHLVL", "_"}
"""What sh itself adds to any environment."""


def find_starts(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call in *path* that starts another program, and the function's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        ours = isinstance(owner, ast.Name) and owner.id in ("os", "subprocess")
        if ours and name in STARTERS | FORBIDDEN:
            yield name, node


def test_whoever_starts_a_program_gives_it_an_environment_and_no_shell() -> None:
    found = [
        (path.relative_to(PACKAGE).as_posix(), name, call)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] != "lab"
        for name, call in find_starts(path)
    ]
    assert found, "natkeep starts iptables-save and CRIU: the search is wrong"
    for name, starter, call in found:
        keywords = {keyword.arg for keyword in call.keywords}
        given = len(call.args) > 2 if starter == "posix_spawn" else "env" in keywords
        assert given, f"{name}:{call.lineno}: a child would inherit our environment"
        assert "shell" not in keywords, f"{name}:{call.lineno}: a shell"
        assert starter not in FORBIDDEN, f"{name}:{call.lineno}: {starter}"


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A directory in which everything that could be started by mistake says that it was."""
    told = tmp_path / "told"
    for name in ("iptables-nft-save", "criu", "python3", "sh"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho {name} >>{told}\n")
        path.chmod(0o755)
    package = tmp_path / "natkeep"
    package.mkdir()
    code = f"open({str(told)!r}, 'a').write('imported\\n')\n"
    for path in (package / "__init__.py", tmp_path / "sitecustomize.py", tmp_path / "os.py"):
        path.write_text(code)
    return tmp_path


HOOK = Path(sys.executable).with_name("natkeep-hook")


@pytest.mark.skipif(not HOOK.exists(), reason="natkeep is not installed beside this python")
@pytest.mark.parametrize("orders", [{"NATKEEP_ID": "nobody"}, {"NATKEEP_MAP": "web"}])
def test_the_hook_is_isolated_from_the_environment_of_the_tree(
    orders: dict[str, str], decoy: Path
) -> None:
    hostile = {
        "PYTHONPATH": str(decoy),
        "PYTHONHOME": str(decoy),
        "PYTHONSTARTUP": str(decoy / "sitecustomize.py"),
        "PYTHONUSERBASE": str(decoy),
        "PATH": f"{decoy}/bin",
    }
    environment = {
        **hostile,
        **orders,
        "CRTOOLS_SCRIPT_ACTION": "post-restore",
        "NATKEEP_STATE_DIR": str(decoy / "state"),
    }
    done = subprocess.run([HOOK], env=environment, cwd=decoy, capture_output=True, text=True)
    # It came as far as its orders, by natkeep's own code.
    assert done.stderr.startswith("natkeep-hook: ")
    assert done.returncode == (7 if "NATKEEP_ID" in orders else 2)
    assert not (decoy / "told").exists()
    # A python that is not isolated would have fallen for it.
    subprocess.run([sys.executable, "-c", "import natkeep"], env={"PYTHONPATH": str(decoy)})
    assert "imported" in (decoy / "told").read_text()


def test_criu_is_looked_up_once_and_asked_in_a_clean_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "criu"
    program.write_text(f"#!/bin/sh\nenv >{tmp_path}/environment\necho Version: 4.2.1\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "not for others")
    for words, path in ((["./criu"], os.environ["PATH"]), (["criu"], f".:{os.environ['PATH']}")):
        monkeypatch.setenv("PATH", path)
        assert run.demand_criu(words[0]) == str(program)
    lines = (tmp_path / "environment").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines} - OF_A_SHELL == {"PATH", "LC_ALL"}
    command = run.Command(("criu", "restore", "-D", "/images"), "/images").at(str(program))
    assert command.with_hook(Path("/bin/hook"))[:2] == [str(program), "restore"]
    with pytest.raises(UsageError, match="there is no program"):
        run.demand_criu("./other")


@pytest.mark.root
def test_the_tools_of_the_system_are_the_systems(
    decoy: Path, netns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """iptables-save, asked for what CRIU locked, is not the one that PATH leads to."""
    monkeypatch.setenv("PATH", f"{decoy}/bin")
    with entered(netns):
        criu_lock._run(("nft", 4), "save", ["-t", "filter"])
    assert not (decoy / "told").exists()
