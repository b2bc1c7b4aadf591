"""A relay on the real kernel: what it switches on and finds in its way; and all as it was after."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from fake_kernel import revert_step

from natkeep.errors import RefusedError
from natkeep.kernel import relay_host
from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.host import await_true
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.plan.drift import find_drift
from natkeep.plan.liveness import Life
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.repair import find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan, Prior, Step, SwitchForwarding
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.plan.via import Via
from natkeep.values import replace

pytestmark = pytest.mark.root

NEW = {4: ip_address("10.3.0.30"), 6: ip_address("fd00:3::30")}
OLD = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
FROM = {4: ip_address("10.3.0.21"), 6: ip_address("fd00:3::21")}
PEER = {4: "10.1.0.2", 6: "[fd00:1::2]"}
SETTING = {4: "ipv4/conf/eth0/forwarding", 6: "ipv6/conf/eth0/force_forwarding"}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])


class Host:
    """A namespace that has OLD and FROM, and a route to peers; moves of its kernel."""

    def __init__(self, netns: str, run: Callable[..., str], state: str) -> None:
        self.kernel, self.run, self.netns = LinuxKernel(state), run, netns
        self.site = Site(Role.RELAY, netns)
        self.kernel.open_sites([self.site])

    def plan(self, version: int, move_id: str = "web", port: int = 5000) -> Plan:
        ends = Endpoint.parse(f"{PEER[version]}:{port}"), Endpoint(OLD[version], port)
        kept = Connections.of([FourTuple(*ends)])
        map_ = Map(OLD[version], NEW[version])
        move = Move(move_id, (map_,), (self.site,), vias=(Via(FROM[version]),))
        return make_plan(move, kept, self.kernel.look_around(move, kept))

    def apply(self, plan: Plan) -> list[tuple[Step, Prior]]:
        return [(step, self.kernel.apply(step, lambda prior: None)) for step in plan.prepare]

    def revert(self, done: list[tuple[Step, Prior]]) -> None:
        for step, prior in reversed(done):
            revert_step(self.kernel, step, prior)

    def read(self, version: int, name: str = "") -> str:
        setting = f"ipv{version}/conf/{name}" if name else SETTING[version]
        return self.run(self.netns, "cat", f"/proc/sys/net/{setting}").strip()


@pytest.fixture
def host(make_site: Callable[[], str], run: Callable[..., str], tmp_path: Path) -> Iterator[Host]:
    netns = make_site()
    run(netns, "ip", "address", "add", "10.3.0.21/24", "dev", "eth0")
    run(netns, "ip", "address", "add", "fd00:3::21/64", "dev", "eth0", "nodad")
    await_addresses(netns)
    run(netns, "sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
    made = Host(netns, run, str(tmp_path))
    yield made
    made.kernel.close_sites([made.site])


@EACH_VERSION
def test_all_is_byte_identical_when_it_is_undone(
    host: Host, version: int, take_picture: Callable[[str], list[str]]
) -> None:
    before = take_picture(host.netns)
    plan = host.plan(version)
    assert plan.surroundings.forwarding == (SETTING[version],)

    done = host.apply(plan)

    assert host.read(version) == "1"
    seen = host.kernel.observe(host.site, plan)
    assert (seen.gate, seen.off, seen.back) == (Gate.CLOSED, frozenset(), 0)
    assert find_drift(plan, host.site, seen) == ()
    host.revert(done)
    assert take_picture(host.netns) == before


@EACH_VERSION
def test_forwarding_stays_for_another_move_and_goes_with_the_last(host: Host, version: int) -> None:
    first = host.apply(host.plan(version))
    other = host.plan(version, "other", 6000)
    assert other.surroundings.forwarding == (SETTING[version],)
    second = host.apply(other)

    host.revert(first)
    assert host.read(version) == "1"
    assert find_drift(other, host.site, host.kernel.observe(host.site, other)) == ()
    host.revert(second)
    assert host.read(version) == "0"


def test_a_host_that_forwards_already_goes_on_doing_so(host: Host) -> None:
    host.run(host.netns, "sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=1")
    host.run(host.netns, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")

    plans = [host.plan(4), host.plan(6, "six")]
    assert [plan.surroundings.forwarding for plan in plans] == [(), ()]
    for plan in plans:
        host.revert(host.apply(plan))
    assert host.read(4) == "1"


def test_what_another_program_switches_off_is_seen_and_switched_on_again(host: Host) -> None:
    plan = host.plan(4)
    done = host.apply(plan)
    host.run(host.netns, "sysctl", "-qw", "net.ipv4.conf.eth0.forwarding=0")

    seen = host.kernel.observe(host.site, plan)
    assert find_drift(plan, host.site, seen) == (f"setting net/{SETTING[4]}: it is not 1",)
    [(_, patch)] = find_patches(plan, host.site, seen, Life(False), opened=False)
    assert isinstance(patch, SwitchForwarding)
    host.kernel.mend(patch, lambda prior: None)
    assert host.read(4) == "1"
    host.revert(done)
    assert host.read(4) == "0"


def test_what_a_lost_move_has_left_on_is_switched_off_with_its_rules(host: Host) -> None:
    host.apply(host.plan(4))
    known = host.plan(4, "known", 6000)
    kept = host.apply(known)

    host.kernel.clear_strays(host.site, frozenset({"known"}), frozenset(OLD.values()), sure=True)
    assert host.read(4) == "1"
    host.revert(kept)
    host.apply(host.plan(4))
    host.kernel.clear_strays(host.site, frozenset(), frozenset(), sure=True)
    assert host.read(4) == "0"
    assert "natkeep" not in host.run(host.netns, "nft", "list", "tables")


ADVERTISE = """
import socket, struct, sys
with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex("wire"))
    sock.bind(("fe80::1", 0, 0, socket.if_nametoindex("wire")))
    sock.sendto(struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0), ("ff02::1", 0))
"""


def timeless(picture: list[str]) -> list[str]:
    """Without the seconds for which a route is good still."""
    return [re.sub(r'"expires":\d+', "", line) for line in picture]


def has_advertised(host: Host) -> bool:
    shown = host.run(host.netns, "ip", "-6", "route", "show", "default", "proto", "ra")
    return "fe80::1" in shown


@pytest.fixture
def old_kernel(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """One that has no force_forwarding; eth0 has a default route by router advertisement."""
    monkeypatch.setattr(relay_host, "_knows_one_device", lambda: False)
    host.run(host.netns, "ip", "address", "add", "fe80::1/64", "dev", "wire", "nodad")
    host.run(host.netns, "ip", "address", "add", "fe80::2/64", "dev", "eth0", "nodad")
    host.run(host.netns, sys.executable, "-c", ADVERTISE)
    await_true(lambda: has_advertised(host), "the advertised route")
    return host


def test_where_all_devices_have_to_forward_no_advertised_route_is_lost(
    old_kernel: Host, take_picture: Callable[[str], list[str]]
) -> None:
    before = timeless(take_picture(old_kernel.netns))
    plan = old_kernel.plan(6)
    assert plan.surroundings.forwarding == (
        "ipv6/conf/eth0/accept_ra", "ipv6/conf/wire/accept_ra", "ipv6/conf/all/forwarding"
    )  # fmt: skip

    done = old_kernel.apply(plan)

    assert has_advertised(old_kernel)
    assert old_kernel.read(6, "all/forwarding") == "1"
    assert find_drift(plan, old_kernel.site, old_kernel.kernel.observe(old_kernel.site, plan)) == ()
    other = old_kernel.apply(old_kernel.plan(6, "other", 6000))
    old_kernel.revert(done)
    assert old_kernel.read(6, "all/forwarding") == "1"
    old_kernel.revert(other)
    assert has_advertised(old_kernel)
    assert timeless(take_picture(old_kernel.netns)) == before


def test_without_accept_ra_the_route_would_be_lost(old_kernel: Host) -> None:
    old_kernel.run(old_kernel.netns, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")

    assert not has_advertised(old_kernel)


def test_a_device_that_forwards_alone_would_not_do_so_afterwards(old_kernel: Host) -> None:
    old_kernel.run(old_kernel.netns, "sysctl", "-qw", "net.ipv6.conf.wire.forwarding=1")

    with pytest.raises(RefusedError, match=r"wire\.forwarding would not outlive"):
        old_kernel.plan(6)


def test_what_drops_for_a_lost_move_goes_though_another_is_known(old_kernel: Host) -> None:
    for plan in (old_kernel.plan(6), old_kernel.plan(6, "known", 6000)):
        old_kernel.apply(plan)
    olds = frozenset(OLD.values())

    old_kernel.kernel.clear_strays(old_kernel.site, frozenset({"known"}), olds, sure=True)

    shown = old_kernel.run(old_kernel.netns, "nft", "list", "chain", "inet", "natkeep", "passing")
    assert {each.partition(":")[0] for each in re.findall(r'comment "([^"]+)"', shown)} == {"known"}
    assert '"known:ra6-eth0"' in shown


def test_what_a_lost_move_has_left_on_of_all_devices_is_switched_off(old_kernel: Host) -> None:
    old_kernel.apply(old_kernel.plan(6))

    old_kernel.kernel.clear_strays(old_kernel.site, frozenset(), frozenset(OLD.values()), sure=True)

    assert old_kernel.read(6, "all/forwarding") == "0"
    assert old_kernel.read(6, "eth0/accept_ra") == "1"
    assert has_advertised(old_kernel)


@EACH_VERSION
def test_the_address_that_it_uses_is_any_but_old(host: Host, version: int) -> None:
    olds = frozenset({OLD[version]})

    assert host.kernel.ask(host.site, relay_host.find_source, NEW[version], olds) == FROM[version]
    neither = olds | {FROM[version]}
    assert host.kernel.ask(host.site, relay_host.find_source, NEW[version], neither) is None


@EACH_VERSION
def test_what_stands_in_its_way_is_found(host: Host, version: int) -> None:
    [relay] = host.plan(version).translations
    asked = (relay, (FROM[version],))

    facts = host.kernel.ask(host.site, relay_host.survey_relay, *asked)
    assert facts.routed
    assert facts.local == {FROM[version]}
    assert facts.ephemeral.stop > facts.ephemeral.start > 1
    assert (facts.taken, facts.living) == (None, 0)

    words = ("-s", str(FROM[version]), "-d", str(NEW[version]), "--sport", "10000")
    host.run(
        host.netns, "conntrack", "-I", "-p", "tcp", *words, "--dport", "5000",
        "--state", "ESTABLISHED", "--timeout", "99",
    )  # fmt: skip
    facts = host.kernel.ask(host.site, relay_host.survey_relay, *asked)
    assert str(facts.taken) == f"{Endpoint(NEW[version], 5000)} > {Endpoint(FROM[version], 10000)}"
    strange = ip_address("192.0.2.1") if version == 4 else ip_address("2001:db8::1")
    routes = json.loads(host.run(host.netns, "ip", "-j", f"-{version}", "route", "show", "default"))
    if not routes:
        there = replace(relay, map=Map(OLD[version], strange))
        facts = host.kernel.ask(host.site, relay_host.survey_relay, there, *asked[1:])
        assert not facts.routed


def test_a_peer_on_the_relay_itself_is_not_kept(host: Host) -> None:
    kept = Connections.of(
        FourTuple(Endpoint(peer, 5000), Endpoint(OLD[4], 80))
        for peer in (FROM[4], ip_address("10.1.0.2"))
    )
    move = Move("web", (Map(OLD[4], NEW[4]),), (host.site,), vias=(Via(FROM[4]),))

    plan = make_plan(move, kept, host.kernel.look_around(move, kept))

    assert [one.reason for one in plan.unkept] == [f"its peer {FROM[4]} is on the relay itself"]
