"""kernel/neighbours.py: whether another host of the link has an address."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from natkeep.kernel.neighbours import find_owner
from natkeep.kernel.netns import entered
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.plan.tuples import parse_address

pytestmark = pytest.mark.root

MAC = "02:00:00:00:00:07"
NEW = {"4": "10.3.0.20", "6": "2001:db8:3::20"}
OLD = {"4": "10.2.0.10", "6": "2001:db8:2::10"}
ON_LINK = {"4": "10.3.0.77", "6": "2001:db8:3::77"}
LENGTH = {"4": 24, "6": 64}
ROUTER = {"4": "10.3.0.1", "6": "2001:db8:3::1"}


class Link:
    """A host with NEW, its router, and a third host, all on one bridge."""

    def __init__(self, make_netns: Callable[[], str]) -> None:
        self.here, self.router, self.third, switch = (make_netns() for _ in range(4))
        self.ip(switch, "link add br0 type bridge", "link set br0 up")
        for number, netns in enumerate((self.here, self.router, self.third)):
            address = f"address {MAC}" if netns == self.third else ""
            subprocess.run(["ip", "netns", "exec", netns, "sysctl", "-qw",
                            "net.ipv6.conf.default.accept_dad=0"], check=True)  # fmt: skip
            self.ip(switch, f"link add p{number} type veth peer name eth0 {address} netns {netns}",
                    f"link set p{number} master br0 up")  # fmt: skip
            self.ip(netns, "link set lo up", "link set eth0 up")
        for netns, ends in ((self.here, NEW), (self.router, ROUTER)):
            self.ip(netns, *(f"address add {ends[v]}/{LENGTH[v]} dev eth0" for v in "46"))
        self.ip(self.here, *(f"route add default via {router}" for router in ROUTER.values()))

    def ip(self, netns: str, *lines: str) -> None:
        command = ["ip", "-n", netns, "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True)

    def owner(self, address: str, version: str) -> str:
        with entered(self.here):
            return find_owner(parse_address(address), parse_address(NEW[version]))

    def neighbours(self) -> str:
        command = ["ip", "-n", self.here, "neighbour", "show", "nud", "all", "dev", "eth0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def link(make_netns: Callable[[], str]) -> Link:
    return Link(make_netns)


@pytest.mark.parametrize("version", ["4", "6"])
@pytest.mark.parametrize("ends", [OLD, ON_LINK], ids=["routed", "on-link"])
def test_another_host_of_the_link_that_has_it_is_found(
    ends: dict[str, str], version: str, link: Link
) -> None:
    """Also where the route to it leads through a router."""
    end = ends[version]
    assert link.owner(end, version) == ""
    link.ip(link.third, f"address add {end}/{LENGTH[version]} dev eth0")
    await_addresses(link.third)
    assert link.owner(end, version) == f"{MAC} on eth0"
    link.ip(link.third, f"address del {end}/{LENGTH[version]} dev eth0")
    assert link.owner(end, version) == ""
    assert end not in link.neighbours()


def test_a_router_that_answers_for_all_has_it_not(link: Link) -> None:
    for key in ("all.proxy_arp=1", "all.forwarding=1"):
        set_it = ["sysctl", "-qw", f"net.ipv4.conf.{key}"]
        subprocess.run(["ip", "netns", "exec", link.router, *set_it], check=True)
    link.ip(link.router, "route add 10.2.0.0/24 dev lo")
    assert link.owner(OLD["4"], "4") == ""


def test_an_entry_of_an_operator_stays(link: Link) -> None:
    link.ip(link.here, f"neighbour add {ON_LINK['4']} lladdr {MAC} dev eth0 nud permanent")
    assert link.owner(ON_LINK["4"], "4") == ""
    assert f"{ON_LINK['4']} lladdr {MAC} PERMANENT" in link.neighbours()
