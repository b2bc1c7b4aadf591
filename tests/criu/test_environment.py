"""criu/environment.py: who gave which orders, and what is believed of what CRIU says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from natkeep import policy
from natkeep.criu import environment
from natkeep.criu.environment import (
    Orders,
    is_abandoned,
    joined_netns,
    own_id,
    read_call,
    read_orders,
)
from natkeep.errors import UsageError
from natkeep.values import replace


@pytest.fixture(autouse=True)
def standing(monkeypatch: pytest.MonkeyPatch) -> policy.Standing:
    """The operator's file has what a test puts there."""
    hook = policy.Standing()
    monkeypatch.setattr(policy, "read_policy", lambda: policy.Policy(hook=hook))
    return hook


def stand(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    hook = policy.Standing(**values)  # type: ignore[arg-type]  # a test's own values
    monkeypatch.setattr(policy, "read_policy", lambda: policy.Policy(hook=hook))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"NATKEEP_ID": "", "NATKEEP_MAP": ""}, None),
        ({"NATKEEP_STATE_DIR": "/x", "NATKEEP_MODE": "stateless"}, None),
        ({"NATKEEP_ID": "web"}, Orders("web", (), "", None)),
        (
            {"NATKEEP_MAP": "10.2.0.10=auto,fd00::1=fd00::2", "NATKEEP_MODE": "stateless"},
            Orders("", ("10.2.0.10=auto", "fd00::1=fd00::2"), "stateless", None),
        ),
        ({"NATKEEP_ID": "web", "NATKEEP_STATE_DIR": "/x"}, Orders("web", (), "", "/x")),
        (
            {"NATKEEP_MAP": "a=b", "NATKEEP_PEER_MAP": "p=q,r=s", "NATKEEP_VIA": "f,g:1-2"},
            Orders("", ("a=b",), "", None, peer_maps=("p=q", "r=s"), vias=("f", "g:1-2")),
        ),
    ],
)
def test_the_environment_orders(environment: dict[str, str], expected: Orders | None) -> None:
    assert read_orders(environment) == expected


def test_the_environment_comes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch, map=("10.2.0.10=auto",), mode="stateless", state_dir="/y")
    assert read_orders({"NATKEEP_ID": "web"}) == Orders("web", (), "", None)
    assert read_orders({}) == Orders("", ("10.2.0.10=auto",), "stateless", "/y", standing=True)
    assert read_orders({"NATKEEP_STATE_DIR": "/x"}) == Orders(
        "", ("10.2.0.10=auto",), "stateless", "/x", standing=True
    )


def test_the_file_names_a_relay_and_peers_that_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch, map=("a=b",), peer_map=("p=q",), via=("f",))
    standing = Orders("", ("a=b",), "", "", standing=True, peer_maps=("p=q",), vias=("f",))
    assert read_orders({}) == standing
    assert read_orders({"NATKEEP_VIA": "g"}) == replace(standing, vias=("g",))
    assert read_orders({"NATKEEP_MAP": "c=d"}) == Orders("", ("c=d",), "", None)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NATKEEP_ID": "web", "NATKEEP_MAP": "10.2.0.10=auto"}, "NATKEEP_ID and NATKEEP_MAP"),
        ({"NATKEEP_ID": "web", "NATKEEP_VIA": "10.2.0.11"}, "NATKEEP_VIA is for NATKEEP_MAP"),
        ({"NATKEEP_ID": "web", "NATKEEP_PEER_MAP": "p=q"}, "NATKEEP_PEER_MAP is for NATKEEP_MAP"),
        ({"NATKEEP_ID": "web", "NATKEEP_MODE": "magic"}, "NATKEEP_MODE: 'magic' is none of"),
    ],
)
def test_contradictions_are_told(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_orders(environment)


def test_a_file_that_contradicts_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stand(monkeypatch, id="web", map=("10.2.0.10=auto",))
    with pytest.raises(UsageError, match=r"natkeep\.toml: hook\.id and hook\.map contradict"):
        read_orders({})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CRTOOLS_INIT_PID", "-1", "CRTOOLS_INIT_PID: '-1' is not a pid"),
        ("CRTOOLS_INIT_PID", "1/../1", "is not a pid"),
        ("CRTOOLS_INIT_PID", "٣", "is not a pid"),
        ("CRTOOLS_INIT_PID", "9" * 11, "is not a pid"),
        ("CRTOOLS_IMAGE_DIR", "/nowhere", "cannot open '/nowhere': No such file or directory"),
        ("CRTOOLS_IMAGE_DIR", "/etc/passwd", "Not a directory"),
        ("CRTOOLS_IMAGE_DIR", "/tmp/\0", "null byte"),
    ],
)
def test_what_criu_says_is_looked_at_before_it_is_believed(
    name: str, value: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        read_call({"CRTOOLS_SCRIPT_ACTION": "post-restore", name: value})


def test_a_call_holds_the_images_and_knows_the_criu_that_opened_them(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    path = f"/proc/{os.getpid()}/fd/{handle}"
    action = {"CRTOOLS_SCRIPT_ACTION": "post-restore", "CRTOOLS_INIT_PID": "17"}
    call = read_call({**action, "CRTOOLS_IMAGE_DIR": path})
    assert (call.tree, call.criu) == (17, os.getpid())
    assert os.path.samestat(os.fstat(call.demand_images()), tmp_path.stat())
    assert read_call({**action, "CRTOOLS_IMAGE_DIR": str(tmp_path)}).criu is None
    with pytest.raises(UsageError, match="CRTOOLS_IMAGE_DIR is not set"):
        read_call(action).demand_images()


def test_an_own_id_is_that_of_one_life_of_one_criu() -> None:
    move_id = own_id(os.getpid())
    assert move_id.startswith(f"criu-{os.getpid()}-")
    assert len(move_id) <= 32
    assert move_id == own_id(os.getpid())
    assert not is_abandoned(move_id)
    with pytest.raises(UsageError, match="does not name the CRIU that calls"):
        own_id(None)


def test_what_was_prepared_for_a_criu_that_is_gone_is_abandoned() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        move_id = own_id(child.pid)
        assert not is_abandoned(move_id)
    finally:
        child.kill()
        child.wait()
    assert is_abandoned(move_id)
    # the number of a process that began at another time
    name, pid, start = own_id(os.getpid()).split("-")[:3]
    rest = own_id(os.getpid()).split("-")[3:]
    assert is_abandoned("-".join([name, pid, f"{int(start, 16) - 1:x}", *rest]))


@pytest.mark.parametrize(
    "move_id", ["web", "criu-web", "criu-1-", "criu-1-xyz", "criu-a-1", "criu"]
)
def test_what_a_person_called_is_never_abandoned(move_id: str) -> None:
    assert not is_abandoned(move_id)


def test_pids_are_told_apart_in_their_own_pid_namespace_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A state directory may be shared by hosts that do not see each other's processes."""
    gone = "criu-4194304-1"
    monkeypatch.setattr(environment, "_suffix", lambda _: "-aaaa")
    assert is_abandoned(f"{gone}-aaaa")
    assert not is_abandoned(f"{gone}-bbbb")
    assert not is_abandoned(gone)
    monkeypatch.setattr(environment, "_suffix", lambda _: "")
    assert is_abandoned(gone)
    assert not is_abandoned(f"{gone}-aaaa")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ""),
        (["-J", "net:/run/netns/b"], "/run/netns/b"),
        (["--join-ns", "ipc:7", "--join-ns=net:42"], "pid:42"),
        (["-Jnet:/run/netns/b"], "/run/netns/b"),
        (["--join-ns", "ipc:/run/netns/b"], ""),
        (["-J"], ""),
    ],
)
def test_a_namespace_that_criu_was_told_to_join_is_found(words: list[str], expected: str) -> None:
    code = "print(flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert joined_netns(child.pid) == expected
    finally:
        child.communicate(b"\n")
