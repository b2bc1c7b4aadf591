"""kernel/netns.py: namespaces by name, path and process, refused where they are none."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from natkeep.errors import KernelError, UsageError
from natkeep.kernel.netns import (
    Namespace,
    NamespaceGoneError,
    find_namespace,
    held,
    inside,
    open_namespace,
)
from natkeep.plan.identity import Identity

MakeNetns = Callable[[], str]


def identity_of(path: str) -> Identity:
    """As without a cookie: on a kernel before 5.14, or of an old journal."""
    status = os.stat(path)
    return Identity(status.st_dev, status.st_ino)


def here() -> Identity:
    return identity_of("/proc/thread-self/ns/net")


@contextmanager
def opened(spec: str) -> Iterator[Namespace]:
    namespace = open_namespace(spec)
    try:
        yield namespace
    finally:
        os.close(namespace.fd)


@contextmanager
def process_in(netns: str) -> Iterator[int]:
    """The pid of a process that lives in the namespace; it says so before we go on."""
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{netns}", "sh", "-c", "echo ready; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.communicate()


@pytest.mark.root
def test_one_namespace_has_one_identity_however_it_is_named(netns: str) -> None:
    with (
        process_in(netns) as pid,
        opened(netns) as by_name,
        opened(f"/run/netns/{netns}") as by_path,
        opened(f"pid:{pid}") as by_pid,
    ):
        assert {identity_of(f"/run/netns/{netns}")} == {
            by_name.identity,
            by_path.identity,
            by_pid.identity,
        }
        assert by_name.identity != here()


def test_no_name_is_the_namespace_we_are_in() -> None:
    with opened("") as ours:
        assert here() == ours.identity


@pytest.mark.parametrize(
    "spec",
    [
        "natkeep-test-none",
        "/run/netns/natkeep-test-none",
        "/proc/self/ns",
        "/proc/self/ns/mnt",
        "/proc/self/status",
        "/dev/null",
        ".",
        "..",
        "pid:",
        "pid:x",
        "pid:-1",
        "pid:٣",
        "pid:0",
        "pid:4194305",
        "x" * 300,
        "nul\0nul",
    ],
)
def test_what_is_no_network_namespace_is_a_usage_error(spec: str) -> None:
    before = set(os.listdir("/proc/self/fd"))

    with pytest.raises(UsageError):
        open_namespace(spec)

    assert before == set(os.listdir("/proc/self/fd"))


def test_a_fifo_in_its_place_does_not_hold_us(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net")

    with pytest.raises(UsageError, match="is not a network namespace"):
        open_namespace(str(tmp_path / "net"))


@pytest.mark.root
def test_sockets_made_inside_stay_inside(netns: str, run: Callable[..., str]) -> None:
    run(netns, "ip", "link", "add", "only-here", "type", "veth")
    home = here()

    with opened(netns) as namespace, inside(namespace):
        assert namespace.identity == here()
        with socket.socket() as made:
            pass
        names = {name for _, name in socket.if_nameindex()}

    assert home == here()
    assert made.fileno() == -1
    assert "only-here" in names
    assert "only-here" not in {name for _, name in socket.if_nameindex()}


@pytest.mark.root
def test_we_come_home_from_an_error(netns: str) -> None:
    home = here()

    with opened(netns) as namespace, pytest.raises(KeyError), inside(namespace):
        raise KeyError

    assert home == here()


@pytest.mark.root
def test_insides_nest(make_netns: MakeNetns) -> None:
    with opened(make_netns()) as one, opened(make_netns()) as two, inside(one):
        with inside(two):
            assert two.identity == here()
            with inside(two):
                assert two.identity == here()
            assert two.identity == here()
        assert one.identity == here()


@pytest.mark.root
def test_only_the_calling_thread_moves(netns: str) -> None:
    home, elsewhere, moved = here(), [], threading.Event()

    def look() -> None:
        if moved.wait(10):
            elsewhere.append(here())

    thread = threading.Thread(target=look)
    thread.start()
    with opened(netns) as namespace, inside(namespace):
        moved.set()
        thread.join()

    assert [home] == elsewhere


@pytest.mark.root
def test_no_handle_is_left_open_by_going_inside(netns: str) -> None:
    with opened(netns) as namespace:
        before = set(os.listdir("/proc/self/fd"))
        with inside(namespace):
            pass

        assert before == set(os.listdir("/proc/self/fd"))


@pytest.mark.root
def test_a_namespace_is_found_again_under_its_name(netns: str) -> None:
    known = identity_of(f"/run/netns/{netns}")

    found = find_namespace(netns, known)

    os.close(found.fd)
    assert known == found.identity


@pytest.mark.root
def test_a_namespace_is_found_under_another_name_by_its_identity(netns: str) -> None:
    """It was opened as pid:N, and the process is another one by now."""
    known = identity_of(f"/run/netns/{netns}")

    found = find_namespace("pid:1", known)

    os.close(found.fd)
    assert known == found.identity


@pytest.mark.root
def test_a_namespace_without_a_name_is_found_by_the_processes_in_it(
    netns: str,
) -> None:
    known = identity_of(f"/run/netns/{netns}")

    with process_in(netns):
        subprocess.run(["ip", "netns", "delete", netns], check=True)

        found = find_namespace(netns, known)

        os.close(found.fd)
        assert known == found.identity


@pytest.mark.root
def test_a_name_that_was_given_to_another_namespace_is_not_taken_for_it(
    make_netns: MakeNetns,
) -> None:
    gone, other = make_netns(), make_netns()
    known = identity_of(f"/run/netns/{gone}")
    subprocess.run(["ip", "netns", "delete", gone], check=True)

    with pytest.raises(NamespaceGoneError, match="is gone"):
        find_namespace(other, known)


@pytest.mark.root
def test_a_handle_that_leads_elsewhere_by_now_is_refused_before_anything_is_done(
    make_netns: Callable[[], str],
) -> None:
    """As after a double close: the number is another file's, here another namespace's."""
    with opened(make_netns()) as meant, opened(make_netns()) as other:
        before = here()
        os.dup2(other.fd, meant.fd)
        with (
            pytest.raises(KernelError, match="its handle leads to another namespace"),
            inside(meant),
        ):
            pytest.fail("it went in")
        assert here() == before


# ---- a namespace whose inode is another's by now -------------------------------------------------


@pytest.fixture
def successor(
    make_netns: MakeNetns, give_inode_again: Callable[[str], bool]
) -> tuple[Identity, str]:
    """The identity of a namespace that has ended, and the name of another with its inode."""
    for _ in range(5):
        name = make_netns()
        with opened(name) as first:
            known = first.identity
        if give_inode_again(name):
            return known, name
    pytest.fail("the kernel gives no inode again: what is known by it is safe here")


@pytest.mark.root
def test_a_namespace_with_the_inode_of_one_that_has_ended_is_another(
    successor: tuple[Identity, str],
) -> None:
    """Also where it has the name of the one that has ended."""
    known, name = successor

    with opened(name) as other:
        assert known != other.identity
    for spec in (name, f"/run/netns/{name}", "", "natkeep-test-none"):
        with pytest.raises(NamespaceGoneError, match="is gone"):
            find_namespace(spec, known)


@pytest.mark.root
def test_a_process_that_has_a_pid_of_an_earlier_one_is_not_taken_for_it(
    successor: tuple[Identity, str],
) -> None:
    known, name = successor

    with process_in(name) as pid, pytest.raises(NamespaceGoneError, match="is gone"):
        find_namespace(f"pid:{pid}", known)


@pytest.mark.root
def test_where_no_cookie_is_known_device_and_inode_decide(
    successor: tuple[Identity, str],
) -> None:
    known, name = successor

    found = find_namespace(name, Identity(known.device, known.inode))

    os.close(found.fd)


@pytest.mark.root
def test_a_kernel_without_cookies_is_no_error(netns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natkeep.kernel.netns._SO_NETNS_COOKIE", 9999)

    with opened(netns) as namespace, inside(namespace):
        assert here() == namespace.identity

    assert namespace.identity.cookie == 0


@pytest.mark.root
def test_what_is_entered_by_a_handle_of_another_namespace_is_refused_whatever_its_inode(
    successor: tuple[Identity, str],
) -> None:
    known, name = successor

    with opened(name) as other:
        stale = Namespace(other.fd, known, name)
        with pytest.raises(KernelError, match="leads to another"), inside(stale):
            pytest.fail("it went in")


@pytest.mark.parametrize("waited", [True, False])
def test_a_process_that_ends_meanwhile_is_not_held(waited: bool) -> None:
    process = subprocess.Popen(["sleep", "600"])

    def end_it() -> None:
        with held(f"pid:{process.pid}"):
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if waited else os.WNOWAIT))

    with pytest.raises(ProcessLookupError):
        end_it()
    process.wait()
