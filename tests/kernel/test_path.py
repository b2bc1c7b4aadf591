"""kernel/path.py and kernel/policy_rules.py in real namespaces, both families."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from natkeep.kernel import path, policy_rules, rtnetlink
from natkeep.kernel.fib_rules import MARK
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.kernel.old_address import find_at_home
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.time_scale import scaled
from natkeep.plan.findings import Severity
from natkeep.plan.move import Site
from natkeep.plan.path import Way, judge
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import RemoveAddress
from natkeep.plan.steps import AddAddress, Prior
from natkeep.plan.tuples import Address

pytestmark = pytest.mark.root
Run = Callable[..., str]
Picture = Callable[[str], list[str]]

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
GATEWAY, DESTINATION = Site(Role.GATEWAY), Site(Role.DESTINATION)


@contextmanager
def at(netns: str) -> Iterator[None]:
    with entered(netns):
        yield


def codes(site: Site, ways: tuple[Way, ...]) -> list[str]:
    return [finding.code for finding in judge(site, ways)]


def read_here(version: int, *peers: Address) -> tuple[Way, ...]:
    packed = [peer.packed for peer in peers or (PEER[version],)]
    return path.read_at_destination(OLD[version], NEW[version], packed, frozenset())


# ---- at the destination --------------------------------------------------------------------------


@EACH_VERSION
def test_a_peer_by_the_router_is_well_and_one_on_the_link_is_not(
    make_site: Callable[[], str], version: int
) -> None:
    neighbour = NEW[version] + 1
    with at(make_site()):
        assert codes(DESTINATION, read_here(version)) == [""]
        assert codes(DESTINATION, read_here(version, neighbour)) == ["peer-on-link"]


@EACH_VERSION
def test_a_route_to_one_host_by_a_router_takes_it_from_the_link(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    netns, neighbour = make_site(), NEW[version] + 1
    router = {4: "10.3.0.1", 6: "fd00:3::1"}[version]
    run(netns, "ip", "route", "add", str(neighbour), "via", router)
    with at(netns):
        assert codes(DESTINATION, read_here(version, neighbour)) == [""]


@EACH_VERSION
def test_the_network_of_new_is_its_link_whoever_added_the_route(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    """dhcpcd and others add an address without its route, and the route by themselves."""
    netns, new, ip = make_site(), NEW[version], ("ip", f"-{version}")
    network, router = {4: ("10.3.0.0/24", "10.3.0.1"), 6: ("fd00:3::/64", "fd00:3::1")}[version]
    run(netns, *ip, "address", "flush", "dev", "eth0")
    nodad = ("nodad",) if version == 6 else ()
    run(netns, *ip, "address", "add", str(new), "dev", "eth0", *nodad)
    run(netns, *ip, "route", "replace", network, "dev", "eth0", "proto", "dhcp")
    run(netns, *ip, "route", "replace", "default", "via", router)
    with at(netns):
        assert codes(DESTINATION, read_here(version, new + 1)) == ["peer-on-link"]
        assert codes(DESTINATION, read_here(version)) == [""]


@EACH_VERSION
def test_what_leaves_by_another_device_is_told_unless_a_gateway_is_there(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    netns, peer = make_site(), PEER[version]
    address, router = {4: ("10.9.0.20/24", "10.9.0.1"), 6: ("fd00:9::20/64", "fd00:9::1")}[version]
    nodad = ("nodad",) if version == 6 else ()
    run(netns, "ip", "address", "add", address, "dev", "wire", *nodad)
    run(netns, "ip", f"-{version}", "route", "add", str(peer), "via", router)
    with at(netns):
        assert codes(DESTINATION, read_here(version)) == ["other-device"]
        own = frozenset([ip_address(router)])
        ways = path.read_at_destination(OLD[version], NEW[version], [peer.packed], own)
        assert codes(DESTINATION, ways) == [""]
        assert path.read_entrances(NEW[version], [peer.packed]) == {peer: router}
    several = [f"nexthop via {one}" for one in (router, {4: "10.3.0.1", 6: "fd00:3::1"}[version])]
    run(netns, "ip", f"-{version}", "route", "replace", str(peer), *" ".join(several).split())
    with at(netns):
        assert codes(DESTINATION, read_here(version)) == [""]


@EACH_VERSION
def test_rules_that_ask_for_ports_are_asked_with_them(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    netns, peer = make_site(), PEER[version]
    with at(netns):
        assert not path.asks_for_ports(version)
    run(netns, "ip", f"-{version}", *["rule", "add", "ipproto", "tcp", "sport", "5000", "prohibit"])
    with at(netns):
        assert path.asks_for_ports(version)
        for port, expected in ((5000, "no-way-back"), (5001, "")):
            ways = path.read_at_destination(
                OLD[version], NEW[version], [peer.packed], frozenset(), {peer: (50001, port)}
            )
            assert codes(DESTINATION, ways) == [expected]


@EACH_VERSION
def test_a_peer_without_a_route_and_one_that_is_the_gateway_itself(
    make_site: Callable[[], str], version: int
) -> None:
    router = {4: ip_address("10.3.0.1"), 6: ip_address("fd00:3::1")}[version]
    stranger = {4: ip_address("10.9.0.1"), 6: ip_address("fd00:9::1")}[version]
    with at(make_site()):
        assert codes(DESTINATION, read_here(version, stranger)) == ["no-way-back"]
        ways = path.read_at_destination(
            OLD[version], NEW[version], [router.packed], frozenset([router])
        )
        assert ways == ()


def test_a_strict_filter_at_new_s_device_is_told_if_the_way_back_is_another(
    make_site: Callable[[], str], run: Run
) -> None:
    netns = make_site()
    run(netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
    with at(netns):
        assert codes(DESTINATION, read_here(4)) == [""]
    run(netns, "ip", "address", "add", "10.9.0.20/24", "dev", "wire")
    run(netns, "ip", "route", "replace", "10.1.0.0/16", "via", "10.9.0.1")
    with at(netns):
        assert codes(DESTINATION, read_here(4)) == ["reverse-path"]
    run(netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=2")
    with at(netns):
        assert codes(DESTINATION, read_here(4)) == ["other-device"]  # which stops nothing


def test_of_many_peers_those_on_the_link_are_looked_up_first(
    make_site: Callable[[], str],
) -> None:
    many = [PEER[4] + n for n in range(path.LIMIT + 50)]
    with at(make_site()):
        ways = read_here(4, *many, NEW[4] + 5)
    assert len(ways) == path.LIMIT
    assert ways[0].peer == NEW[4] + 5


# ---- at a gateway --------------------------------------------------------------------------------


@pytest.fixture
def gateway(make_netns: Callable[[], str], run: Run) -> str:
    """A router with the networks of peers, OLD and NEW, each on a device of its own."""
    netns, far = make_netns(), make_netns()
    for number, name in enumerate(("near", "home", "far"), 1):
        run(netns, "ip", *f"link add {name} type veth peer name {name} netns {far}".split())
        run(far, "ip", "link", "set", name, "up")
        run(netns, "ip", "link", "set", name, "up")
        run(netns, "ip", *f"address add 10.{number}.0.1/24 dev {name}".split())
        run(netns, "ip", *f"address add fd00:{number}::1/64 dev {name} nodad".split())
    run(netns, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    await_addresses(netns)
    return netns


def read_there(version: int, *peers: Address) -> tuple[Way, ...]:
    packed = [peer.packed for peer in peers or (PEER[version],)]
    return path.read_at_gateway(OLD[version], NEW[version], packed)


@EACH_VERSION
def test_a_router_with_all_three_networks_is_well(gateway: str, version: int) -> None:
    with at(gateway):
        assert codes(GATEWAY, read_there(version)) == [""]
        assert path.find_not_forwarding(OLD[version], NEW[version], [PEER[version].packed]) == ()


@EACH_VERSION
def test_forwarding_that_is_off_is_named(gateway: str, run: Run, version: int) -> None:
    off = {4: "net.ipv4.conf.far.forwarding", 6: "net.ipv6.conf.all.forwarding"}[version]
    run(gateway, "sysctl", "-qw", f"{off}=0")
    with at(gateway):
        found = path.find_not_forwarding(OLD[version], NEW[version], [PEER[version].packed])
    assert found == (off,)


@EACH_VERSION
def test_peers_beside_old_or_new_are_told(gateway: str, version: int) -> None:
    with at(gateway):
        assert codes(GATEWAY, read_there(version, OLD[version] + 1)) == ["peer-beside-old"]
        assert codes(GATEWAY, read_there(version, NEW[version] + 1)) == ["peer-on-link"]


@EACH_VERSION
def test_a_rule_that_sends_old_by_another_uplink_is_told(
    gateway: str, run: Run, version: int
) -> None:
    peer = {4: ip_address("10.7.0.2"), 6: ip_address("fd00:7::2")}[version]
    ip = ("ip", f"-{version}")
    first, second = {4: ("10.1.0.9", "10.2.0.9"), 6: ("fd00:1::9", "fd00:2::9")}[version]
    run(gateway, *ip, "route", "add", "default", "via", first)
    with at(gateway):
        assert codes(GATEWAY, read_there(version, peer)) == [""]
    run(gateway, *ip, "route", "add", "default", "via", second, "table", "200")
    run(gateway, *ip, "rule", "add", "from", str(OLD[version]), "lookup", "200")
    with at(gateway):
        assert codes(GATEWAY, read_there(version, peer)) == ["other-uplink"]
    run(gateway, *ip, "rule", "add", "from", str(NEW[version]), "lookup", "200")
    with at(gateway):
        assert codes(GATEWAY, read_there(version, peer)) == [""]


@EACH_VERSION
def test_what_is_dropped_on_its_way_to_new_is_told(gateway: str, run: Run, version: int) -> None:
    new, whole = NEW[version], NEW[version].max_prefixlen
    run(gateway, "ip", f"-{version}", *f"rule add to {new}/{whole} iif near prohibit".split())
    with at(gateway):
        assert codes(GATEWAY, read_there(version)) == ["no-way-there"]
    run(gateway, "ip", f"-{version}", "route", "add", "blackhole", f"{new}/{whole}")
    with at(gateway):
        assert codes(GATEWAY, read_there(version)) == ["no-route"]


@EACH_VERSION
def test_a_rule_about_peers_that_does_not_know_new_is_told(
    gateway: str, run: Run, version: int
) -> None:
    network, router = {4: ("10.1.0.0/24", "10.2.0.9"), 6: ("fd00:1::/64", "fd00:2::9")}[version]
    run(gateway, "ip", f"-{version}", "rule", "add", "from", network, "lookup", "100")
    run(gateway, "ip", f"-{version}", "route", "add", "default", "via", router, "table", "100")
    with at(gateway):
        assert codes(GATEWAY, read_there(version)) == ["no-way-there"]


@EACH_VERSION
def test_a_smaller_link_to_new_is_noted(gateway: str, run: Run, version: int) -> None:
    run(gateway, "ip", "link", "set", "far", "mtu", "1400")
    with at(gateway):
        found = [*judge(GATEWAY, read_there(version))]
    assert [one.code for one in found] == ["smaller-mtu", ""]
    assert found[0].severity == Severity.NOTE


@EACH_VERSION
def test_new_comes_in_where_its_router_is(gateway: str, run: Run, version: int) -> None:
    """By home, not by far, if that is the gateway's address that the destination sends to."""
    packed, hop = PEER[version].packed, {4: "10.2.0.1", 6: "fd00:2::1"}[version]
    run(gateway, "ip", f"-{version}", *["rule", "add", "iif", "home", "prohibit"])
    for entrances, expected in (({}, ""), ({PEER[version]: hop}, "no-way-back")):
        with at(gateway):
            ways = path.read_at_gateway(OLD[version], NEW[version], [packed], entrances)
        assert codes(GATEWAY, ways) == [expected]


# ---- policy rules --------------------------------------------------------------------------------


@EACH_VERSION
@pytest.mark.parametrize("length", ["host", "network"])
def test_old_is_routed_as_new_while_it_is_there_and_all_is_as_before_then(
    make_site: Callable[[], str], run: Run, take_picture: Picture, version: int, length: str
) -> None:
    netns, ip = make_site(), ("ip", f"-{version}")
    run(netns, "ip", "address", "add", {4: "10.9.0.20/24", 6: "fd00:9::20/64"}[version], "dev",
        "wire", *(("nodad",) if version == 6 else ()))  # fmt: skip
    source = str(NEW[version])
    if length == "network":
        source = {4: "10.3.0.0/24", 6: "fd00:3::/64"}[version]
    run(netns, *ip, *f"rule add pref 77 from {source} fwmark 0/0x8 lookup 100".split())
    router = {4: "10.3.0.1", 6: "fd00:3::1"}[version]
    run(netns, *ip, "route", "add", "default", "via", router, "dev", "eth0", "table", "100")
    run(netns, *ip, "route", "replace", {4: "10.1.0.0/16", 6: "fd00:1::/64"}[version], "via",
        {4: "10.9.0.1", 6: "fd00:9::1"}[version], "dev", "wire")  # fmt: skip
    before = take_picture(netns)
    site = Site(Role.DESTINATION, netns)
    kernel = LinuxKernel()
    kernel.open_sites([site])

    step = AddAddress(site, OLD[version], NEW[version])
    prior = kernel.apply(step, lambda _: None)

    got = run(netns, "ip", "route", "get", str(PEER[version]), "from", str(OLD[version]))
    assert "dev eth0" in got
    assert run(netns, *ip, "rule", "show", "pref", "77").count(str(OLD[version])) == 1
    kernel.apply(step, lambda _: None)  # by another move: nothing is there twice
    assert run(netns, *ip, "rule", "show", "pref", "77").count(str(OLD[version])) == 1
    kernel.revert(site, RemoveAddress(OLD[version]), prior)
    assert take_picture(netns) == before


def test_an_old_that_is_at_home_keeps_its_own_routing(
    make_site: Callable[[], str], run: Run
) -> None:
    netns = make_site()
    run(netns, "ip", "address", "add", f"{OLD[4]}/24", "dev", "wire")
    run(netns, *f"ip rule add from {NEW[4]} lookup 100".split())
    site = Site(Role.DESTINATION, netns)
    kernel = LinuxKernel()
    kernel.open_sites([site])

    prior = kernel.apply(AddAddress(site, OLD[4], NEW[4]), lambda _: None)

    assert prior == Prior(present=True)
    assert str(OLD[4]) not in run(netns, "ip", "rule")


@EACH_VERSION
def test_an_old_that_a_route_makes_local_is_at_home(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    """AnyIP: a host that serves a whole network, without an address for each."""
    netns, olds = make_site(), frozenset([OLD[version]])
    with at(netns):
        assert find_at_home(olds) == frozenset()
    network = {4: "10.2.0.0/24", 6: "fd00:2::/64"}[version]
    run(netns, "ip", f"-{version}", "route", "add", "local", network, "dev", "lo")
    with at(netns):
        assert find_at_home(olds) == olds


def test_a_rule_that_an_operator_has_added_for_old_stays(
    make_site: Callable[[], str], run: Run
) -> None:
    netns = make_site()
    for address in (NEW[4], OLD[4]):
        run(netns, *f"ip rule add pref 50 from {address} lookup 100".split())
    with at(netns):
        rtnetlink.add_host_address(OLD[4])
        policy_rules.copy_rules(NEW[4], OLD[4])
        rtnetlink.remove_host_address(OLD[4])
    assert str(OLD[4]) in run(netns, "ip", "rule")


# ---- addresses -----------------------------------------------------------------------------------


def test_a_tentative_address_and_a_duplicate_are_told(
    make_netns: Callable[[], str], run: Run
) -> None:
    netns, other = make_netns(), make_netns()
    run(netns, "ip", *f"link add eth0 type veth peer name eth0 netns {other}".split())
    for each in (netns, other):
        run(each, "ip", "link", "set", "eth0", "up")
    new = NEW[6]
    run(other, "ip", "address", "add", f"{new}/64", "dev", "eth0", "nodad")
    with at(other):
        assert path.read_address_state(new) == ""
    run(netns, "ip", "address", "add", f"{new}/64", "dev", "eth0")
    seen, deadline = set(), time.monotonic() + scaled(10)
    with at(netns):
        while "duplicate" not in seen and time.monotonic() < deadline:
            seen.add(path.read_address_state(new))
    assert seen <= {"tentative", "duplicate"}
    assert "duplicate" in seen


def test_a_bridge_is_seen(make_site: Callable[[], str], run: Run) -> None:
    netns = make_site()
    with at(netns):
        assert not path.has_bridge()
    run(netns, "ip", "link", "add", "br0", "type", "bridge")
    with at(netns):
        assert path.has_bridge()


def test_a_kernel_without_policy_routing_has_no_rules() -> None:
    class Without:
        def request(self, *_: object) -> list[bytes]:
            raise OSError(errno.EOPNOTSUPP, "")

    assert policy_rules.read_rules(Without(), 4) == ()  # type: ignore[arg-type]
    assert not policy_rules.asks_for(Without(), 6, MARK)  # type: ignore[arg-type]
