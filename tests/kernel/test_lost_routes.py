"""kernel/lost_routes.py in a real namespace: routes and NEW noted, missed, and put back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from natkeep.errors import KernelError
from natkeep.kernel import lost_routes
from natkeep.kernel.netns import entered

pytestmark = pytest.mark.root

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
FLUSH = ["ip -4 route flush table main", "ip -6 route flush table main"]


@contextmanager
def at(netns: str) -> Iterator[None]:
    with entered(netns):
        yield


def list_routes(run: Callable[..., str], netns: str, version: int) -> list[str]:
    listed = run(netns, "ip", f"-{version}", "-d", "route").splitlines()
    return sorted(line.strip() for line in listed if "fe80" not in line)


@EACH_VERSION
@pytest.mark.parametrize("damage", ["flush", "down and up"])
def test_what_was_wiped_comes_back_as_it_was(
    make_site: Callable[[], str], run: Callable[..., str], version: int, damage: str
) -> None:
    """The device's own route first, or the next hop would be unreachable."""
    netns = make_site()
    with at(netns):
        noted = lost_routes.note([NEW[version]], [PEER[version]])
        assert lost_routes.find_lost(noted) == ()
    before = list_routes(run, netns, version)
    script = "; ".join(FLUSH)
    if damage == "down and up":
        script = "ip link set eth0 down; ip link set eth0 up"
    run(netns, "sh", "-ec", script)
    assert before != list_routes(run, netns, version)

    with at(netns):
        lost = lost_routes.find_lost(noted)
        lost_routes.put_back(lost)
        left = lost_routes.find_lost(noted)

    assert f"route,{PEER[version]},eth0" in {note.rpartition(",")[0] for note in lost}
    assert left == ()
    assert before == list_routes(run, netns, version)
    assert str(NEW[version]) in run(netns, "ip", "address", "show", "eth0")


def test_another_route_by_now_is_right(
    make_site: Callable[[], str], run: Callable[..., str]
) -> None:
    netns = make_site()
    with at(netns):
        noted = lost_routes.note([], [PEER[4]])
    run(netns, "ip", "route", "replace", "10.1.0.0/16", "via", "10.3.0.99")

    with at(netns):
        assert lost_routes.find_lost(noted) == ()


def test_a_device_that_is_down_or_another_one_is_said_and_nothing_done(
    make_site: Callable[[], str], run: Callable[..., str]
) -> None:
    netns = make_site()
    with at(netns):
        noted = lost_routes.note([], [PEER[4]])
    run(netns, "ip", "link", "set", "eth0", "down")
    with at(netns), pytest.raises(KernelError, match="on eth0: "):
        lost_routes.put_back(lost_routes.find_lost(noted))

    run(netns, "ip", "link", "set", "eth0", "name", "eth9")
    with at(netns), pytest.raises(KernelError, match="the device eth0 is not what it was"):
        lost_routes.put_back(lost_routes.find_lost(noted))


@pytest.mark.parametrize("text", ["", "x", "route,10.1.0.2,eth0,zz", "route,10.1.0.2,a/b,00"])
def test_what_is_no_note_is_nothing(netns: str, text: str) -> None:
    with at(netns):
        assert lost_routes.find_lost(text) == ()
        lost_routes.put_back([text])


def test_what_takes_no_plain_route_is_not_noted(
    make_site: Callable[[], str], run: Callable[..., str]
) -> None:
    """Several next hops, the host itself, or none at all."""
    netns = make_site()
    hops = "nexthop via 10.3.0.1 nexthop via 10.3.0.2"
    run(netns, "sh", "-ec", f"ip route add 10.9.0.0/16 {hops}; ip route add blackhole 10.8.0.0/16")

    with at(netns):
        for text in ("10.9.0.1", "10.8.0.1", "10.7.0.1", "127.0.0.1"):
            assert lost_routes.note([], [ip_address(text)]) == ""
