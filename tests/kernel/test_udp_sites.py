"""UDP at a relay, at the peers' own host, with both ends moved, and behind a flushed ruleset."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest
from four_hosts import (
    EACH_KIND,
    EACH_VERSION,
    NEW,
    OLD,
    PEER,
    PEER_PORT,
    PORT,
    Net,
    answered,
    make_executor,
    make_net,
)
from two_hosts import look

from natkeep.checkpoint import Checkpoint
from natkeep.errors import LeftoverError, RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.other_rules import look_at_other_rules
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.relay import refuse_relays
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.subject import Subject
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.drift import find_drift
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan, PurgeEntries
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Endpoint
from natkeep.plan.via import Via
from natkeep.values import replace

pytestmark = pytest.mark.root
__all__ = ["make_net"]

FROM = {4: ip_address("10.2.0.11"), 6: ip_address("fd00:2::11")}
ELSEWHERE = {4: ip_address("10.2.0.12"), 6: ip_address("fd00:2::12")}
FAR = {4: ip_address("10.4.0.2"), 6: ip_address("fd00:4::2")}
_INSERT = "insert rule inet fw pass"
EACH_PURGE = pytest.mark.parametrize("purges", [False, True], ids=["stale", "purged"])


def give(net: Net, at: str, *addresses: object, device: str = "eth0") -> None:
    """More addresses for a host."""
    for address in addresses:
        length, more = (64, ("nodad",)) if ":" in str(address) else (24, ())
        words = ("address", "add", f"{address}/{length}", "dev", device, *more)
        net.run(net.names[at], "ip", *words)


def move_it(
    net: Net, move: Move, around: Surroundings = NOTHING_SPECIAL, *, purges: bool = True
) -> tuple[Plan, socket.socket, socket.socket]:
    """A peer that has spoken with a socket at the source, and that socket at the destination."""
    peer = net.socket("peer", net.peer_end, net.old_end)
    before = net.socket("source", net.old_end, net.peer_end)
    assert answered(peer, before, 2) == 2
    plan = make_plan(move, NO_CONNECTIONS, around)
    net.kernel.open_sites(move.sites)
    net.stack.callback(net.kernel.close_sites, move.sites)
    before.close()
    net.apply(tuple(one for one in plan.prepare if purges or not isinstance(one, PurgeEntries)))
    after = net.socket("destination", net.old_end, net.peer_end)
    assert answered(peer, after, 1) == 0, "the gate is closed"
    net.apply(plan.open)
    return plan, peer, after


def see_drift(net: Net, plan: Plan) -> dict[Role, tuple[str, ...]]:
    seen = {site: net.kernel.observe(site, plan) for site in plan.move.sites}
    return {site.role: find_drift(plan, site, seen[site], opened=True) for site in seen}


@EACH_VERSION
@EACH_PURGE
def test_a_relay_passes_on_what_a_connected_peer_says(
    make_net: Callable[[int], Net], version: int, purges: bool
) -> None:
    net = make_net(version)
    give(net, "source", FROM[version])
    track = "add table inet fw; add chain inet fw in { type filter hook input priority 0; }; "
    net.run(net.names["source"], "nft", track + "add rule inet fw in ct state new counter")
    sites = tuple(Site(role, net.names[at]) for role, at in _RELAYED)
    move = net.move(sites=sites, vias=(Via(FROM[version]),))

    plan, peer, process = move_it(net, move, purges=purges)

    assert answered(peer, process, 3) == (3 if purges else 0)
    if purges:
        assert answered(peer, process, 2, size=6000) == 2
        for at in ("source", "destination"):
            net.run(net.names[at], "conntrack", "-F")
            process.send(b"first")
            assert peer.recv(99) == b"first"
        assert see_drift(net, plan) == {Role.RELAY: (), Role.DESTINATION: ()}


_RELAYED = ((Role.RELAY, "source"), (Role.DESTINATION, "destination"))


@EACH_VERSION
@EACH_PURGE
def test_the_peers_own_host_translates(
    make_net: Callable[[int], Net], version: int, purges: bool
) -> None:
    net = make_net(version)
    sites = (Site(Role.PEER, net.names["peer"]), Site(Role.DESTINATION, net.names["destination"]))
    track = "add table inet fw; add chain inet fw in { type filter hook input priority 0; }; "
    net.run(net.names["peer"], "nft", track + "add rule inet fw in ct state new counter")
    around = Surroundings(at_peers=((sites[0], frozenset({PEER[version]})),))

    plan, peer, process = move_it(net, net.move(sites=sites), around, purges=purges)

    assert answered(peer, process, 3) == (3 if purges else 0)
    if purges:
        net.run(net.names["peer"], "conntrack", "-F")
        process.send(b"first")
        assert peer.recv(99) == b"first"
        assert see_drift(net, plan) == {Role.PEER: (), Role.DESTINATION: ()}


@EACH_VERSION
def test_a_server_is_heard_by_new_sockets_at_the_peers_own_host(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    names = {role: net.names[role] for role in ("peer", "destination")}
    before = look(names)
    sites = tuple(Site(Role(role), name) for role, name in names.items())
    plan = make_plan(net.move(sites=sites, server=True), NO_CONNECTIONS)
    net.kernel.open_sites(sites)
    net.stack.callback(net.kernel.close_sites, sites)
    done = net.apply(plan.steps)

    with net.socket("destination", net.old_end, None) as server:
        for port in (PEER_PORT, PEER_PORT + 1):
            with net.socket("peer", (str(PEER[version]), port), net.old_end) as peer:
                assert answered(peer, server, 2) == 2
    net.undo(done)
    assert look(names) == before


@EACH_VERSION
def test_both_ends_may_have_moved(make_net: Callable[[int], Net], version: int) -> None:
    net = make_net(version)
    old, peer, new, now = OLD[version], PEER[version], NEW[version], ELSEWHERE[version]
    length = 24 if version == 4 else 64
    net.run(net.names["source"], "sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=1")
    give(net, "source", now)
    net.run(net.names["source"], "ip", "address", "del", f"{old}/{length}", "dev", "eth0")
    at = {end: Site(Role.DESTINATION, net.names[end]) for end in ("destination", "source")}
    ours = net.move(sites=(at["destination"],), peer_maps=(Map(peer, now),))
    theirs = Move(
        "theirs", (Map(peer, now),), (at["source"],), udp=ours.udp.turned(),
        peer_maps=(Map(old, new),),
    )  # fmt: skip
    for move in (ours, theirs):
        net.kernel.open_sites(move.sites)
        net.stack.callback(net.kernel.close_sites, move.sites)
        net.apply(make_plan(move, NO_CONNECTIONS).steps)

    process = net.socket("destination", net.old_end, net.peer_end)
    other = net.socket("source", net.peer_end, net.old_end)
    assert answered(other, process, 3) == answered(process, other, 3) == 3
    assert answered(other, process, 2, size=6000) == 2


def test_a_relays_port_that_is_in_use_is_found(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    give(net, "source", FROM[4])
    sites = tuple(Site(role, net.names[at]) for role, at in _RELAYED)
    plan = make_plan(net.move(sites=sites, vias=(Via(FROM[4]),)), NO_CONNECTIONS)
    net.kernel.open_sites(sites)
    net.stack.callback(net.kernel.close_sites, sites)
    executor = Executor(net.kernel, None)  # type: ignore[arg-type]  # which is not asked
    refuse_relays(executor, plan)

    net.socket("source", (str(FROM[4]), 10000), (str(NEW[4]), PORT))
    with pytest.raises(RefusedError, match=r"10.2.0.11:10000 to 10.3.0.20:5000 is a connection"):
        refuse_relays(executor, plan)


@EACH_KIND
def test_behind_a_flush_of_the_ruleset_a_guard_keeps_the_host_quiet(
    make_net: Callable[[int], Net], tmp_path: Path, server: bool
) -> None:
    net = make_net(4)
    net.kernel = LinuxKernel(str(tmp_path))
    move = net.move(server=server, guard=True)
    plan = make_plan(move, NO_CONNECTIONS)
    net.kernel.open_sites(plan.move.sites)
    net.stack.callback(net.kernel.close_sites, plan.move.sites)
    done = net.apply(plan.steps)
    try:
        peer = net.socket("peer", net.peer_end, net.old_end)
        process = net.process("destination", server=server)
        assert answered(peer, process, 2) == 2
        net.run(net.names["destination"], "nft", "flush ruleset")
        net.run(net.names["destination"], "conntrack", "-F")
        for _ in range(2):
            peer.send(b"?")
            with pytest.raises(TimeoutError):
                peer.recv(99)
    finally:
        net.undo(done)
    assert "natkeep" not in net.run(net.names["destination"], "nft", "list", "tables")


def back_at_the_source(net: Net, move: Move) -> Move:
    """The move that takes the process on to where it came from, which has not OLD any more."""
    source, old, other = net.names["source"], OLD[net.version], ELSEWHERE[net.version]
    net.run(source, "sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=1")
    give(net, "source", other)
    length = 24 if net.version == 4 else 64
    net.run(source, "ip", "address", "del", f"{old}/{length}", "dev", "eth0")
    sites = move.sites[0], Site(Role.DESTINATION, source)
    return replace(move, id="further", maps=(Map(old, other),), sites=sites, guard=False)


@EACH_VERSION
@EACH_KIND
def test_a_move_is_replaced_when_the_process_moves_on_and_all_of_it_is_undone(
    make_net: Callable[[int], Net], version: int, server: bool, tmp_path: Path
) -> None:
    net = make_net(version)
    names = {role: net.names[role] for role in ("gateway", "destination", "source")}
    move = net.move(server=server, guard=True)
    further = back_at_the_source(net, move)
    before = look(names)
    executor = make_executor(tmp_path)
    peer = net.socket("peer", net.peer_end, net.old_end)

    prepare(executor, move, NO_CONNECTIONS, Gate.OPEN)
    with net.process("destination", server=server) as process:
        assert answered(peer, process, 2) == 2
    replace_move(executor, "udp", further, NO_CONNECTIONS)
    with net.process("source", server=server) as process:
        assert answered(peer, process, 1) == 0
        open_move(executor, "further")
        assert answered(peer, process, 3) == 3
        [status] = read_status(executor, ["further"])
        assert [site.drift for site in status.sites] == [(), ()]
    for move_id in ("further", "udp"):
        teardown(executor, move_id)
    assert look(names) == before


@EACH_VERSION
def test_what_a_gateway_publishes_is_kept_when_the_move_is_replaced(
    make_net: Callable[[int], Net], version: int, tmp_path: Path
) -> None:
    """The earlier move's entries hide from a look what the gateway did before it."""
    net = make_net(version)
    ip, router = ("ip", "10.1.0.1") if version == 4 else ("ip6", "fd00:1::1")
    nat = "add table inet own; add chain inet own nat { type nat hook prerouting priority -100; }; "
    dnat = f"udp dport 8053 dnat {ip} to {Endpoint(OLD[version], PORT)}"
    net.run(net.names["gateway"], "nft", f"{nat}add rule inet own nat {dnat}")
    peer = net.socket("peer", net.peer_end, (router, 8053))
    with net.socket("source", net.old_end, net.peer_end) as process:
        assert answered(peer, process, 2) == 2
    move = net.move()
    further = back_at_the_source(net, move)

    executor = make_executor(tmp_path)
    prepare(executor, move, NO_CONNECTIONS, Gate.OPEN)
    with net.socket("destination", net.old_end, net.peer_end) as process:
        assert answered(peer, process, 2) == 2
    replace_move(executor, "udp", further, NO_CONNECTIONS, Gate.OPEN)
    with net.socket("source", net.old_end, net.peer_end) as process:
        assert answered(peer, process, 3) == 3


@EACH_VERSION
@EACH_KIND
@pytest.mark.parametrize("silent", [False, True], ids=["speaking", "silent"])
def test_the_peer_moves_later_through_the_same_gateway(
    make_net: Callable[[int], Net], version: int, server: bool, silent: bool, tmp_path: Path
) -> None:
    net = make_net(version)
    peer_address, now = PEER[version], FAR[version]
    net.run(net.names["source"], "ip", "address", "flush", "dev", "eth0", "scope", "global")
    give(net, "source", now)
    router = ip_address("10.4.0.1") if version == 4 else ip_address("fd00:4::1")
    give(net, "gateway", router, device="old")
    net.run(net.names["source"], "ip", "route", "replace", "default", "via", str(router))
    first, second = net.move(server=server), net.move()
    sites = (first.sites[0], Site(Role.DESTINATION, net.names["source"]))
    second = Move("second", (Map(peer_address, now),), sites, udp=second.udp.turned())
    executor = make_executor(tmp_path)
    peer = net.socket("peer", net.peer_end, net.old_end)
    prepare(executor, first, NO_CONNECTIONS, Gate.OPEN)
    process = net.process("destination", server=server)
    assert answered(peer, process, 2) == 2
    if silent:
        net.run(net.names["gateway"], "conntrack", "-F")

    prepare(executor, second, NO_CONNECTIONS, Gate.OPEN)
    peer.close()
    peer = net.socket("source", net.peer_end, net.old_end)
    assert answered(peer, process, 3) == 3
    for at in ("gateway", "source", "destination"):
        net.run(net.names[at], "conntrack", "-F")
        process.sendto(b"first", net.peer_end)
        assert peer.recv(99) == b"first"


@EACH_VERSION
@EACH_KIND
def test_the_peer_moves_later_onto_the_same_host(
    make_net: Callable[[int], Net], version: int, server: bool, tmp_path: Path
) -> None:
    net = make_net(version)
    also = ip_address("10.3.0.21" if version == 4 else "fd00:3::21")
    give(net, "destination", also)
    first, second = net.move(server=server), net.move()
    second = Move("second", (Map(PEER[version], also),), first.sites, udp=second.udp.turned())
    executor = make_executor(tmp_path)
    names = {role: net.names[role] for role in ("gateway", "destination")}
    before = look(names)
    peer = net.socket("peer", net.peer_end, net.old_end)
    prepare(executor, first, NO_CONNECTIONS, Gate.OPEN)
    process = net.process("destination", server=server)
    assert answered(peer, process, 2) == 2

    prepare(executor, second, NO_CONNECTIONS, Gate.OPEN)
    with net.socket("destination", net.peer_end, net.old_end) as moved:
        assert answered(moved, process, 3) == 3
        process.sendto(b"first", net.peer_end)
        assert moved.recv(99) == b"first"
    process.close()
    for move_id in ("second", "udp"):
        teardown(executor, move_id)
    assert look(names) == before


@EACH_VERSION
@EACH_KIND
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_the_wire_may_show_another_port(
    make_net: Callable[[int], Net], version: int, server: bool, tracked: bool, tmp_path: Path
) -> None:
    net = make_net(version)
    names = {role: net.names[role] for role in ("gateway", "destination")}
    if not tracked:
        chain = "add chain inet own raw { type filter hook prerouting priority -300; }"
        rule = "add rule inet own raw meta l4proto udp notrack"
        for name in names.values():
            net.run(name, "nft", f"add table inet own; {chain}; {rule}")
    before = look(names)
    ported = Map(OLD[version], NEW[version], PORT, 6000)
    move = net.move(server=server, maps=(ported,), guard=True)
    executor = make_executor(tmp_path)
    with (
        net.socket("destination", (str(NEW[version]), 6000), None),
        pytest.raises(RefusedError, match="6000"),
    ):
        prepare(executor, move, NO_CONNECTIONS, Gate.OPEN)
    prepare(executor, move, NO_CONNECTIONS, Gate.OPEN)
    peer = net.socket("peer", net.peer_end, net.old_end)
    with net.process("destination", server=server) as process:
        assert answered(peer, process, 3) == 3
        process.sendto(b"first", net.peer_end)
        assert peer.recv(99) == b"first"
    [status] = read_status(executor, ["udp"])
    assert [site.drift for site in status.sites] == [(), ()]
    teardown(executor, "udp")
    assert look(names) == before


@EACH_VERSION
@EACH_KIND
def test_while_the_process_lives_its_peers_reach_it_where_it_is(
    make_net: Callable[[int], Net], version: int, server: bool, tmp_path: Path
) -> None:
    """Prepared with --live: the gateway is made ready by `open`, which has an image to look at."""
    net = make_net(version)
    names = {role: net.names[role] for role in ("gateway", "destination")}
    move = net.move(server=server, live=True)
    executor = make_executor(tmp_path)
    before = look(names)
    peer = net.socket("peer", net.peer_end, net.old_end)
    with net.process("source", server=server) as process:
        assert answered(peer, process, 2) == 2
        prepare(executor, move, NO_CONNECTIONS)
        assert answered(peer, process, 2) == 2
    with net.process("destination", server=server) as process:
        image = Checkpoint(NO_CONNECTIONS, udp=move.udp, udp_servers=move.udp_servers)
        open_move(executor, "udp", lambda journal: image)
        assert answered(peer, process, 3) == 3
        [status] = read_status(executor, ["udp"])
        assert [site.drift for site in status.sites] == [(), ()]
    teardown(executor, "udp")
    net.run(names["gateway"], "conntrack", "-F")
    assert look(names) == before


@EACH_VERSION
def test_what_a_gateway_masquerades_it_goes_on_masquerading(
    make_net: Callable[[int], Net], version: int, tmp_path: Path
) -> None:
    """What a server says first comes from the gateway before the move, after it and a next one."""
    net = make_net(version)
    nat = "add table inet own; add chain inet own nat { type nat hook postrouting priority 100; }; "
    net.run(net.names["gateway"], "nft", nat + "add rule inet own nat oifname out masquerade")
    router = "10.1.0.1" if version == 4 else "fd00:1::1"
    move = net.move(server=True)
    peer = net.socket("peer", net.peer_end, None)
    known = net.socket("peer", (str(PEER[version]), 99), net.old_end)
    with net.socket("source", net.old_end, None) as process:
        process.sendto(b"first", net.peer_end)
        assert peer.recvfrom(99)[1][0] == router

    executor = make_executor(tmp_path)
    prepare(executor, move, NO_CONNECTIONS, Gate.OPEN)
    for move_id, at in (("udp", "destination"), ("further", "source")):
        if move_id == "further":
            further = back_at_the_source(net, move)
            replace_move(executor, "udp", further, NO_CONNECTIONS, Gate.OPEN)
        with net.socket(at, net.old_end, None) as process:
            process.sendto(b"first", net.peer_end)
            said, sender = peer.recvfrom(99)
            peer.sendto(said, sender)
            assert sender[0] == router
            assert process.recvfrom(99) == (said, (*net.peer_end, 0, 0)[: 2 if version == 4 else 4])
            assert answered(known, process, 2) == 2
        [status] = read_status(executor, [move_id])
        assert [site.drift for site in status.sites] == [(), ()]


@EACH_VERSION
def test_an_undone_destination_does_not_answer_what_a_gateway_may_still_send(
    make_net: Callable[[int], Net], version: int, tmp_path: Path
) -> None:
    net = make_net(version)
    executor = make_executor(tmp_path)
    peer = net.socket("peer", net.peer_end, (str(NEW[version]), PORT))
    peer.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        peer.recv(99)

    prepare(executor, net.move(sites=net.move().sites[1:]), NO_CONNECTIONS)
    teardown(executor, "udp")
    peer.send(b"?")
    with pytest.raises(TimeoutError):
        peer.recv(99)


def test_gc_does_not_clear_what_no_journal_knows_while_it_speaks(
    make_net: Callable[[int], Net], tmp_path: Path
) -> None:
    net = make_net(4)
    executor = make_executor(tmp_path)
    prepare(executor, net.move(), NO_CONNECTIONS, Gate.OPEN)
    peer = net.socket("peer", net.peer_end, net.old_end)
    process = net.socket("destination", net.old_end, net.peer_end)
    assert answered(peer, process, 2) == 2
    executor.state.remove("udp")

    sites = net.move().sites
    collected = gc(executor, sites)
    assert [type(error) for error in collected.left] == [LeftoverError, LeftoverError]
    assert answered(peer, process, 2) == 2
    process.close()
    gc(executor, sites, yes=True)
    assert "natkeep" not in net.run(net.names["gateway"], "nft", "list", "tables")
    assert "udp" not in net.run(net.names["gateway"], "conntrack", "-L", "-p", "udp")


def test_a_firewall_that_lets_no_new_flow_through_is_found(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    plan = make_plan(net.move(), NO_CONNECTIONS)
    chain = "add chain inet fw pass { type filter hook forward priority 0; policy drop; }"
    net.run(net.names["gateway"], "nft", f"{chain}; {_INSERT} ct state established accept")

    def codes() -> set[str]:
        subject = Subject(net.kernel, plan.move.sites, plan)
        return {finding.code for finding in look_at_other_rules(subject)} - {""}

    net.run(net.names["gateway"], "nft", f"{_INSERT} tcp dport {PORT} accept")
    assert codes() == {"dropped"}
    net.run(net.names["gateway"], "nft", f"{_INSERT} udp sport {PORT} accept")
    assert codes() == set()
