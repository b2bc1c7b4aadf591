"""kernel/rtnetlink.py: addresses on lo, lo itself and routes, compared with what ip(8) shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from natkeep.kernel import rtnetlink
from natkeep.kernel.netlink import NETLINK_ROUTE, Netlink
from natkeep.kernel.netns import entered

pytestmark = pytest.mark.root
Run = Callable[..., str]

OLD4, OLD6 = ip_address("10.2.0.10"), ip_address("fd00:2::10")
BOTH = pytest.mark.parametrize("old", [OLD4, OLD6], ids=["v4", "v6"])


@pytest.fixture
def site(make_site: Callable[[], str]) -> Iterator[str]:
    """The test is inside a namespace that has NEW."""
    netns = make_site()
    with entered(netns):
        yield netns


def shown(run: Run, netns: str, device: str) -> dict[str, dict[str, object]]:
    """What `ip addr` shows of a device, by address."""
    [link] = json.loads(run(netns, "ip", "-j", "address", "show", "dev", device))
    return {info["local"]: info for info in link["addr_info"]}


@BOTH
def test_old_is_added_with_a_host_length_prefix_and_removed(
    site: str, run: Run, old: rtnetlink.Address
) -> None:
    before = shown(run, site, "lo")

    rtnetlink.add_host_address(old)

    assert shown(run, site, "lo")[str(old)]["prefixlen"] == old.max_prefixlen
    assert rtnetlink.device_of(old) == "lo"
    rtnetlink.remove_host_address(old)
    assert before == shown(run, site, "lo")
    assert rtnetlink.device_of(old) is None


def test_an_ipv6_address_can_be_bound_at_once_and_is_never_chosen(site: str, run: Run) -> None:
    rtnetlink.add_host_address(OLD6)

    info = shown(run, site, "lo")[str(OLD6)]
    assert info["nodad"] is True
    assert info["deprecated"] is True
    assert "tentative" not in info
    assert info["preferred_life_time"] == 0


@BOTH
def test_adding_what_is_there_is_an_error_that_says_so(
    site: str, run: Run, old: rtnetlink.Address
) -> None:
    rtnetlink.add_host_address(old)

    with pytest.raises(FileExistsError):
        rtnetlink.add_host_address(old)


def test_removing_touches_lo_only(site: str, run: Run) -> None:
    """OLD may be the address of a real device too; that one is not ours."""
    run(site, "ip", "address", "add", f"{OLD4}/32", "dev", "eth0")

    rtnetlink.remove_host_address(OLD4)

    assert rtnetlink.device_of(OLD4) == "eth0"


def test_global_addresses_are_those_that_others_can_reach(site: str, run: Run) -> None:
    rtnetlink.add_host_address(OLD4)
    rtnetlink.add_host_address(OLD6)

    assert rtnetlink.global_addresses(4) == (ip_address("10.3.0.20"),)
    assert rtnetlink.global_addresses(6) == (ip_address("fd00:3::20"),)


def is_reached(peer: str) -> bool:
    with Netlink(NETLINK_ROUTE) as netlink:
        return rtnetlink.is_reached(netlink, ip_address(peer))


@pytest.mark.parametrize(
    ("route", "peer", "there"),
    [
        (None, "10.3.0.1", True),
        (None, "10.1.0.2", True),
        (None, "10.9.0.2", False),
        ("10.9.0.0/24 via 10.3.0.1", "10.9.0.2", True),
        ("unreachable 10.1.0.0/24", "10.1.0.2", False),
        ("blackhole 10.1.0.0/24", "10.1.0.2", False),
        ("prohibit 10.1.0.0/24", "10.1.0.2", False),
        ("throw 10.1.0.0/24", "10.1.0.2", False),
        (None, "fd00:9::2", False),
        (None, "fd00:1::2", True),
        ("unreachable fd00:1::/80", "fd00:1::2", False),
        ("blackhole fd00:1::/80", "fd00:1::2", False),
        ("prohibit fd00:1::/80", "fd00:1::2", False),
        (None, "10.3.0.20", True),
    ],
)
def test_a_peer_has_a_route_or_not(
    site: str, run: Run, route: str | None, peer: str, there: bool
) -> None:
    if route is not None:
        run(site, "ip", "route", "add", *route.split())

    assert there is is_reached(peer)


def test_a_new_ipv6_address_leaves_no_route_but_its_own(site: str, run: Run) -> None:
    """One in table main makes sockets look anew, for a moment."""
    before = run(site, "ip", "-6", "route", "show", "table", "main")

    rtnetlink.add_host_address(OLD6)

    assert before == run(site, "ip", "-6", "route", "show", "table", "main")
    assert str(OLD6) in run(site, "ip", "-6", "route", "show", "table", "local")
