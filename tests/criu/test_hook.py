"""tests of what CRIU starts: the shell front that leaves at once, and the hook behind it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

import natkeep.criu
from natkeep import policy
from natkeep.criu import hook
from natkeep.kernel import linux
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

FRONT = Path(natkeep.criu.__file__ or "").with_name("natkeep-hook")

# Every point at which CRIU 4.2 starts an action script.
ACTIONS = (
    *("pre-dump", "post-dump", "pre-restore", "post-restore", "network-lock", "network-unlock"),
    *("setup-namespaces", "post-setup-namespaces", "pre-resume", "post-resume"),
    *("orphan-pts-master", "status-ready", "query-ext-files"),
)
OURS = {"pre-restore", "post-setup-namespaces", "post-restore"}
CORPUS = Path(__file__).parents[1] / "checkpoint/corpus"
TREE = os.getpid()
TREE_SITE = f"pid:{TREE}"


# ---- the shell front -------------------------------------------------------------------------


@pytest.fixture
def front(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Run a copy of the front beside a python3 that notes that it was run, and exits with 9."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "share/natkeep").mkdir(parents=True)
    shutil.copy(FRONT, tmp_path / "bin/natkeep-hook")
    shutil.copy(FRONT.with_name("natkeep_hook_open.py"), tmp_path / "share/natkeep")
    python = tmp_path / "bin/python3"
    python.write_text(f'#!/bin/sh\necho "$0 $1 $2 ${{4##*n.}} $5" >> {tmp_path}/noted\nexit 9\n')
    python.chmod(0o755)

    def run(
        start: str = "bin/natkeep-hook", says: bytes = b"", **environment: str
    ) -> tuple[int, list[str]]:
        done = subprocess.run(
            [tmp_path / start],
            # python3 of the path is the same: whichever would be started, it is noted
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        assert (done.stdout, done.stderr) == (b"", says)
        noted = tmp_path / "noted"
        lines = noted.read_text().splitlines() if noted.exists() else []
        noted.unlink(missing_ok=True)
        return done.returncode, lines

    return run


def started(where: Path, way: str = "main()", python: Path | None = None) -> str:
    """What the front starts: of *where*, its bin/, the file in share/, by *python*."""
    return f"{python or where / 'python3'} -I -S {way} {where}/../share/natkeep"


@pytest.fixture
def no_configuration() -> None:
    if Path("/etc/natkeep/natkeep.toml").exists():
        pytest.skip("this machine has orders of its own")


@pytest.mark.parametrize("action", sorted({*ACTIONS, "", "post-restore-not"} - OURS))
def test_the_front_leaves_foreign_actions_at_once_and_starts_no_python(
    action: str, front: Callable[..., tuple[int, list[str]]]
) -> None:
    assert front(CRTOOLS_SCRIPT_ACTION=action, NATKEEP_ID="web") == (0, [])


def test_the_front_leaves_at_once_where_there_is_no_action(
    front: Callable[..., tuple[int, list[str]]],
) -> None:
    assert front(NATKEEP_ID="web") == (0, [])


def test_the_front_says_what_it_is_unless_criu_asks() -> None:
    """CRIU sets the action; what a person types has none."""
    for option in ("-h", "--help"):
        for environment, says in (({}, b"natkeep-hook: CRIU starts it"), (DUMP, b"")):
            done = subprocess.run([FRONT, option], env=environment, capture_output=True)
            assert (done.returncode, done.stdout[:28], done.stderr) == (0, says, b"")


DUMP = {"CRTOOLS_SCRIPT_ACTION": "pre-dump"}


@pytest.mark.usefixtures("no_configuration")
@pytest.mark.parametrize("action", sorted(OURS))
@pytest.mark.parametrize("orders", [{}, {"NATKEEP_ID": ""}, {"NATKEEP_ID": "", "NATKEEP_MAP": ""}])
def test_the_front_leaves_at_once_without_orders(
    action: str, orders: dict[str, str], front: Callable[..., tuple[int, list[str]]]
) -> None:
    assert front(CRTOOLS_SCRIPT_ACTION=action, **orders) == (0, [])


HANDED_ON = [
    ({"NATKEEP_ID": "web"}, "post-restore"),
    *(({"NATKEEP_MAP": "10.2.0.10=auto"}, action) for action in sorted(OURS)),
    # a contradiction is told at the first opportunity
    ({"NATKEEP_ID": "web", "NATKEEP_MAP": "10.2.0.10=auto"}, "pre-restore"),
]


@pytest.mark.parametrize(("orders", "action"), HANDED_ON)
def test_the_front_hands_what_is_ours_to_the_python_beside_it_and_its_exit_code_back(
    action: str,
    orders: dict[str, str],
    front: Callable[..., tuple[int, list[str]]],
    tmp_path: Path,
) -> None:
    code, noted = front(CRTOOLS_SCRIPT_ACTION=action, **orders)
    way = "take_long_way()" if "NATKEEP_MAP" in orders else "main()"
    assert (code, noted) == (9, [started(tmp_path / "bin", way)])


@pytest.mark.parametrize("action", ["pre-restore", "post-setup-namespaces"])
def test_the_front_leaves_at_once_where_a_prepared_move_is_not_opened_yet(
    action: str, front: Callable[..., tuple[int, list[str]]]
) -> None:
    assert front(CRTOOLS_SCRIPT_ACTION=action, NATKEEP_ID="web") == (0, [])


@pytest.mark.parametrize(
    ("text", "starts"),
    [
        ('[hook]\nid = "web"\n', True),
        ('max_connections = 9\nhook.map = ["10.2.0.10=auto"]', True),
        ("max_connections = 9\n# [hook]\n", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("action", sorted(OURS))
def test_the_front_looks_for_standing_orders_without_a_process(
    text: str,
    starts: bool,
    action: str,
    front: Callable[..., tuple[int, list[str]]],
    tmp_path: Path,
) -> None:
    copy = tmp_path / "bin/natkeep-hook"
    copy.write_text(copy.read_text().replace("/etc/natkeep/natkeep.toml", f"{tmp_path}/toml"))
    (tmp_path / "toml").write_text(text)
    code, noted = front(CRTOOLS_SCRIPT_ACTION=action)
    assert (code, len(noted)) == ((9, 1) if starts else (0, 0))


def test_the_front_notes_for_natkeep_run_that_the_tree_runs(
    front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    marker, other = tmp_path / "resumed", tmp_path / "other"
    other.write_text("somebody's")
    for path in (marker, other):
        front_of = {"CRTOOLS_SCRIPT_ACTION": "post-resume", "NATKEEP_RESUMED": str(path)}
        done = subprocess.run([FRONT], env=front_of, capture_output=True)
        assert done.returncode == 0
    assert marker.read_text() == ""
    assert other.read_text() == "somebody's"  # it is made, never overwritten
    assert front(CRTOOLS_SCRIPT_ACTION="post-resume", NATKEEP_ID="web") == (0, [])


def test_the_front_finds_its_python_through_a_link(
    front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """As where somebody links it into /usr/local/bin."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/hook").symlink_to("../bin/natkeep-hook")
    code, noted = front("elsewhere/hook", CRTOOLS_SCRIPT_ACTION="post-restore", NATKEEP_ID="web")
    assert (code, noted) == (9, [started(tmp_path / "bin")])


def test_the_front_takes_the_python_that_natkeep_was_installed_for(
    front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """As after `pip install --user`, whose bin/ has no python, or that of another program."""
    (tmp_path / "own").mkdir()
    (tmp_path / "bin/python3").rename(tmp_path / "own/python3.13")
    (tmp_path / "bin/natkeep").write_text(f"#!{tmp_path}/own/python3.13\nimport natkeep\n")
    code, noted = front(CRTOOLS_SCRIPT_ACTION="post-restore", NATKEEP_ID="web")
    assert (code, noted) == (9, [started(tmp_path / "bin", python=tmp_path / "own/python3.13")])


@pytest.mark.parametrize("beside", [True, False])
def test_a_copy_of_the_front_finds_what_belongs_to_natkeep(
    beside: bool, front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """natkeep is linked beside it, or is in the path."""
    (tmp_path / "bin/natkeep").write_text(f"#!{tmp_path}/bin/python3\n")
    (tmp_path / "bin/natkeep").chmod(0o755)
    (tmp_path / "alone").mkdir()
    shutil.copy(FRONT, tmp_path / "alone")
    if beside:
        (tmp_path / "alone/natkeep").symlink_to("../bin/natkeep")
    code, noted = front(
        "alone/natkeep-hook", CRTOOLS_SCRIPT_ACTION="post-restore", NATKEEP_ID="web"
    )
    assert (code, noted) == (9, [started(tmp_path / "bin")])


def test_a_copy_of_the_front_that_finds_no_natkeep_says_so(
    front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """And no python of the path is started."""
    (tmp_path / "alone/bin").mkdir(parents=True)
    copy = Path(shutil.copy(FRONT, tmp_path / "alone/bin"))
    said = f"natkeep-hook: there is no natkeep beside {copy}, nor in PATH (natkeep setup --link)\n"
    orders = {"CRTOOLS_SCRIPT_ACTION": "post-restore", "NATKEEP_ID": "web"}
    assert front("alone/bin/natkeep-hook", said.encode(), **orders) == (1, [])


def test_the_front_takes_the_systems_python_where_none_is_known(
    front: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    """And never the path's."""
    (tmp_path / "bin/python3").rename(tmp_path / "usual")
    copy = tmp_path / "bin/natkeep-hook"
    text = copy.read_text()
    assert "python=/usr/bin/python3\n" in text
    copy.write_text(text.replace("/usr/bin/python3", f"{tmp_path}/usual"))
    code, noted = front(CRTOOLS_SCRIPT_ACTION="post-restore", NATKEEP_ID="web", PATH="")
    assert (code, noted) == (9, [started(tmp_path / "bin", python=tmp_path / "usual")])


def test_the_front_is_executable() -> None:
    assert os.access(FRONT, os.X_OK)


# ---- the hook --------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKernel]:
    """Two prepared sites, and the environment of CRIU's call at post-restore."""
    fake = FakeKernel()
    monkeypatch.setattr(linux, "LinuxKernel", lambda *_: fake)
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("CRTOOLS_SCRIPT_ACTION", "post-restore")
    monkeypatch.setenv("NATKEEP_ID", "web")
    monkeypatch.setenv("CRTOOLS_INIT_PID", str(TREE))
    monkeypatch.setenv("CRTOOLS_IMAGE_DIR", str(CORPUS / "plain"))
    move = Move(
        "web",
        (Map(parse_address("10.2.0.10"), parse_address("10.3.0.20")),),
        (Site(Role.DESTINATION, TREE_SITE), Site(Role.GATEWAY, "gw")),
    )
    peer, local = Endpoint.parse("10.1.0.2:50594"), Endpoint.parse("10.2.0.10:5000")
    state = StateDirectory(create=True)
    prepare(Executor(fake, state), move, Connections.of([FourTuple(peer, local)]))
    return fake


def gates(kernel: FakeKernel) -> list[Gate]:
    return [kernel.sites[name].gates["web"] for name in ("gw", TREE_SITE)]


def test_at_post_restore_the_prepared_move_is_opened(
    kernel: FakeKernel, capsys: pytest.CaptureFixture[str], system_log: Callable[[], list[str]]
) -> None:
    assert gates(kernel) == [Gate.CLOSED, Gate.CLOSED]
    assert hook.main() == 0
    assert [line.partition(" (by ")[0] for line in system_log()] == [
        "<29>natkeep-hook[PID]: web: gate open"
    ]
    assert gates(kernel) == [Gate.OPEN, Gate.OPEN]
    assert capsys.readouterr() == ("", "natkeep-hook: web: gate open\n")
    assert hook.main() == 0  # a second restore of the same move finds it open


@pytest.mark.parametrize("action", [*(a for a in ACTIONS if a != "post-restore"), "", None])
def test_at_other_points_nothing_is_done(
    action: str | None,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CRTOOLS_SCRIPT_ACTION")
    if action is not None:
        monkeypatch.setenv("CRTOOLS_SCRIPT_ACTION", action)
    assert hook.main() == 0
    assert gates(kernel) == [Gate.CLOSED, Gate.CLOSED]
    assert capsys.readouterr() == ("", "")


def test_without_an_id_nothing_is_done(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATKEEP_ID", "")
    assert hook.main() == 0
    assert gates(kernel) == [Gate.CLOSED, Gate.CLOSED]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("standing", [False, True])
def test_any_move_that_was_prepared_for_the_namespace_is_opened(
    standing: bool, tmp_path: Path,
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One file of CRIU's is for all pods of a node; so is natkeep's own."""
    file = tmp_path / "natkeep.toml"
    file.write_text('[hook]\nid = "*"\n')
    monkeypatch.setattr(policy, "PATH", str(file))
    monkeypatch.setenv("NATKEEP_ID", "" if standing else "*")
    assert hook.main() == 0
    assert gates(kernel) == [Gate.OPEN, Gate.OPEN]
    assert capsys.readouterr() == ("", "natkeep-hook: web: gate open\n")


def test_where_none_was_prepared_for_the_namespace_the_restore_goes_on(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = StateDirectory(create=True)
    teardown(Executor(kernel, state), "web")
    peer, local = Endpoint.parse("10.1.0.2:50594"), Endpoint.parse("10.2.0.10:5000")
    move = Move(
        "web",
        (Map(parse_address("10.2.0.10"), parse_address("10.3.0.20")),),
        (Site(Role.DESTINATION, "another pod"),),
    )
    prepare(Executor(kernel, state), move, Connections.of([FourTuple(peer, local)]))
    monkeypatch.setenv("NATKEEP_ID", "*")
    assert hook.main() == 0
    assert kernel.sites["another pod"].gates["web"] == Gate.CLOSED
    told = "natkeep-hook: nothing is prepared for this restore's namespace\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("move_id", "code", "line"),
    [
        ("api", 7, "natkeep-hook: no move api in {state} (natkeep status lists them)"),
        ("../web", 2, "natkeep-hook: '../web' is not an id (a letter or digit, "),
    ],
)
def test_an_id_that_is_unknown_ends_the_restore_with_one_line(
    move_id: str,
    code: int,
    line: str,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("NATKEEP_ID", move_id)
    assert hook.main() == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(line.format(state=tmp_path / "state"))
    assert gates(kernel) == [Gate.CLOSED, Gate.CLOSED]


def test_a_gate_that_cannot_be_opened_ends_the_restore(
    kernel: FakeKernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the connections live on at the source, where the image can be restored again."""
    kernel.fail_at = kernel.applied + 1
    assert hook.main() == 5
    assert gates(kernel) == [Gate.CLOSED, Gate.CLOSED]
    assert capsys.readouterr().err == f"natkeep-hook: destination={TREE_SITE}: told to fail\n"


def test_closed_standard_streams_are_no_obstacle(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU closes stdin; python has None for a stream that is closed."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert hook.main() == 0
    assert gates(kernel) == [Gate.OPEN, Gate.OPEN]
    monkeypatch.setenv("NATKEEP_ID", "api")
    assert hook.main() == 7


@pytest.mark.parametrize("close", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_the_program_with_closed_streams_exits_with_the_code_of_its_error(
    close: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {close}', "sh", sys.executable, "-m", "natkeep.criu.hook"],
        env={
            **os.environ,
            "NATKEEP_STATE_DIR": str(tmp_path / "state"),
            "CRTOOLS_SCRIPT_ACTION": "post-restore",
            "NATKEEP_ID": "web",
        },
        capture_output=True,
        text=True,
    )
    said = f"natkeep-hook: no move web in {tmp_path}/state (natkeep status lists them)\n"
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr == ("" if "2>" in close else said)


def test_what_is_not_ours_imports_nothing_of_natkeep() -> None:
    """Not even where no shell front was in between."""
    script = (
        "import sys; from natkeep.criu import hook; code = hook.main(); "
        "print(code, *sorted(n for n in sys.modules if n.startswith('natkeep')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CRTOOLS_SCRIPT_ACTION": "pre-dump", "NATKEEP_ID": "web"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "natkeep", "natkeep.criu", "natkeep.criu.hook"]
