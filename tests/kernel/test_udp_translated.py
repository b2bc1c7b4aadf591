"""UDP through a gateway to a destination: real sockets, before the move and after it.

    peer ── gateway ┬─ source (OLD)
                    └─ destination (NEW; OLD on lo)

The gateway tracks connections before anything is moved, as one with a firewall does, so it has an
entry for each; UDP has no state, and a stale entry lives for as long as the peer speaks.
"""

from __future__ import annotations

import socket
import time
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

from natkeep.errors import RefusedError
from natkeep.kernel import segment_holder
from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.time_scale import scaled
from natkeep.lifecycle.drain import count_alive, drain
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.drift import find_drift
from natkeep.plan.liveness import Life
from natkeep.plan.move import Site
from natkeep.plan.observation import Held
from natkeep.plan.repair import find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    FillSet,
    ForgetCalls,
    InstallReception,
    InstallTranslation,
    Plan,
    PurgeEntries,
)
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
__all__ = ["make_net"]


def carry(
    net: Net, *, server: bool = False, purges: bool = True
) -> tuple[Plan, socket.socket, socket.socket]:
    """A peer that has spoken with a socket at the source, and that socket at the destination."""
    peer = net.socket("peer", net.peer_end, net.old_end)
    before = net.process("source", server=server)
    assert answered(peer, before, 2) == 2
    plan = make_plan(net.move(server=server), NO_CONNECTIONS)
    purge = ForgetCalls if server else PurgeEntries
    net.apply(tuple(one for one in plan.prepare if purges or not isinstance(one, purge)))
    before.close()
    after = net.process("destination", server=server)
    assert answered(peer, after, 1) == 0, "the gate is closed"
    net.apply(plan.open)
    return plan, peer, after


@EACH_VERSION
def test_a_stale_entry_kills_it_and_the_purge_makes_it_live(
    make_net: Callable[[int], Net], version: int
) -> None:
    _, peer, process = carry(make_net(version), purges=False)
    assert answered(peer, process, 4) == 0

    _, peer, process = carry(make_net(version))
    assert answered(peer, process, 4) == 4
    assert answered(peer, process, 2, size=6000) == 2  # fragments, both ways


@EACH_VERSION
def test_the_process_may_speak_first_and_entries_may_be_lost(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    plan, peer, process = carry(net)

    process.send(b"first")
    assert peer.recv(99) == b"first"
    for at in ("gateway", "destination"):
        net.run(net.names[at], "conntrack", "-F")
        process.send(b"again")
        assert peer.recv(99) == b"again"
        net.run(net.names[at], "conntrack", "-F")
        assert answered(peer, process, 1) == 1

    looks = {site: net.kernel.observe(site, plan) for site in plan.move.sites}
    assert {s.role: find_drift(plan, s, seen, opened=True) for s, seen in looks.items()} == {
        Role.GATEWAY: (),
        Role.DESTINATION: (),
    }
    [_, destination] = looks.values()
    assert destination.alive == 1
    assert destination.datagrams == plan.move.udp


@EACH_VERSION
def test_a_peer_on_the_gateway_itself_does_not_fail_to_send(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    own = ("10.1.0.1" if version == 4 else "fd00:1::1", PEER_PORT)
    inbound = FourTuple(Endpoint(ip_address(own[0]), own[1]), Endpoint(OLD[version], PORT))
    plan = make_plan(net.move(udp=Connections.of([inbound])), NO_CONNECTIONS)
    peer = net.socket("gateway", own, net.old_end)
    net.apply(plan.prepare)

    peer.send(b"held back")
    with pytest.raises(TimeoutError):
        peer.recv(99)
    net.apply(plan.open)
    process = net.socket("destination", net.old_end, own)
    assert answered(peer, process, 3) == 3


def test_what_the_old_host_still_says_does_not_reach_the_peer(
    make_net: Callable[[int], Net],
) -> None:
    net = make_net(4)
    _, peer, process = carry(net)

    stray = net.socket("source", net.old_end, net.peer_end)
    stray.send(b"stray")
    assert answered(peer, process, 3) == 3


@EACH_VERSION
def test_what_is_not_tracked_is_translated_too(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    _, peer, process = carry(net)
    chain = "add chain inet fw raw { type filter hook prerouting priority -300; }"
    net.run(net.names["gateway"], "nft", f"{chain}; add rule inet fw raw meta l4proto udp notrack")

    assert answered(peer, process, 3) == 3


def test_it_goes_without_a_trace(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    names = {role: net.names[role] for role in ("gateway", "destination")}
    before = look(names)

    plan = make_plan(net.move(), NO_CONNECTIONS)
    net.undo(net.apply(plan.steps))

    assert look(names) == before


def test_after_the_undo_the_old_host_has_it_again(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    peer = net.socket("peer", net.peer_end, net.old_end)
    plan = make_plan(net.move(), NO_CONNECTIONS)
    done = net.apply(plan.steps)
    with net.socket("destination", net.old_end, net.peer_end) as process:
        assert answered(peer, process, 2) == 2
    net.undo(done)

    back = net.socket("source", net.old_end, net.peer_end)
    assert answered(peer, back, 3) == 3


def test_a_repair_puts_its_set_back(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    plan, peer, process = carry(net)
    site = plan.move.sites[0]
    net.run(net.names["gateway"], "nft", "flush set inet natkeep kept-udp-0")
    seen = net.kernel.observe(site, plan)
    assert find_drift(plan, site, seen, opened=True) == (
        "set kept-udp-0: 1 of 1 connections are missing",
    )

    patches = [patch for _, patch in find_patches(plan, site, seen, Life(False), opened=True)]
    assert [type(patch) for patch in patches] == [FillSet, PurgeEntries]
    for patch in patches:
        net.kernel.mend(patch, lambda prior: None)
    assert answered(peer, process, 2) == 2


@EACH_VERSION
@EACH_KIND
def test_a_repair_deletes_the_entries_that_came_while_the_rules_were_gone(
    make_net: Callable[[int], Net], version: int, server: bool
) -> None:
    """Each datagram of a peer keeps them, and so the rules from being asked."""
    net = make_net(version)
    plan, peer, process = carry(net, server=server)
    net.run(net.names["gateway"], "nft", "delete table inet natkeep")
    net.run(net.names["gateway"], "conntrack", "-F")
    assert answered(peer, process, 2) == 0

    site = plan.move.sites[0]
    seen = net.kernel.observe(site, plan)
    for _, patch in find_patches(plan, site, seen, Life(False), opened=True):
        net.kernel.mend(patch, lambda prior: None)
    assert answered(peer, process, 3) == 3


def test_a_socket_of_the_destination_with_the_same_ends_is_refused(
    make_net: Callable[[int], Net],
) -> None:
    net = make_net(4)
    net.socket("destination", (str(NEW[4]), PORT), net.peer_end)
    plan = make_plan(net.move(), NO_CONNECTIONS)

    [step] = [
        one
        for one in plan.prepare
        if isinstance(one, InstallTranslation) and one.site.role == Role.DESTINATION
    ]
    with pytest.raises(RefusedError, match=r"is a connection of that host's own already"):
        net.kernel.check(step)


@EACH_VERSION
def test_the_connection_table_tells_for_how_long_a_socket_is_silent(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    plan, peer, process = carry(net)
    [key] = plan.move.udp.each()
    sysctl = "net.netfilter.nf_conntrack_udp_timeout"

    def silences(site: Site) -> list[float]:
        found = net.kernel.observe(site, plan).silences
        assert not found.keys() - {key}
        return [*found.values()]

    for site in plan.move.sites:
        net.run(site.netns, "sysctl", "-qw", f"{sysctl}=60", f"{sysctl}_stream=90")
        net.run(site.netns, "conntrack", "-F")
        assert silences(site) == []
        assert net.kernel.observe(site, plan).forgets == 90.0
    assert answered(peer, process, 1) == 1
    for site in plan.move.sites:
        [new] = silences(site)
        assert 0 <= new < 20
    for site in plan.move.sites:  # as if the time had passed
        net.run(site.netns, "sysctl", "-qw", f"{sysctl}=100")
        [later] = silences(site)
        assert 38 <= later < 60


@EACH_VERSION
@EACH_KIND
def test_what_peers_say_at_the_closed_gate_is_held(
    make_net: Callable[[int], Net],
    version: int,
    server: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segment_holder, "PATIENCE", scaled(10.0))
    net = make_net(version)
    net.kernel = LinuxKernel(str(tmp_path))
    plan = make_plan(net.move(server=server, hold=True), NO_CONNECTIONS)
    net.kernel.open_sites(plan.move.sites)
    net.stack.callback(segment_holder.end, str(tmp_path), "udp")
    peer = net.socket("peer", net.peer_end, net.old_end)
    net.apply(plan.prepare)
    said = [b"one", b"two", b"two", bytes(6000)]

    for data in said:
        peer.send(data)
    deadline = time.monotonic() + scaled(10.0)
    while segment_holder.look(str(tmp_path), "udp") != Held(0, sum(map(len, said)), 0, len(said)):
        assert time.monotonic() < deadline, segment_holder.look(str(tmp_path), "udp")
    process = net.process("destination", server=server)
    [(_, prior)] = net.apply(plan.open)
    peer.send(b"after")

    heard = [process.recvfrom(65535) for _ in range(5)]
    assert [data for data, _ in heard] == [*said, b"after"]
    assert {sender[:2] for _, sender in heard} == {net.peer_end}
    assert prior.facts == {"segments": 0, "refused": 0, "datagrams": 4}
    assert answered(peer, process, 2) == 2


# ---- sockets that any peer may speak to ----------------------------------------------------------


@EACH_VERSION
def test_a_server_hears_peers_that_it_knew_and_new_ones(
    make_net: Callable[[int], Net], version: int
) -> None:
    _, peer, server = carry(make_net(version), server=True, purges=False)
    assert answered(peer, server, 4) == 0

    net = make_net(version)
    _, peer, server = carry(net, server=True)
    other = net.socket("peer", (str(PEER[version]), PEER_PORT + 1), net.old_end)
    assert answered(peer, server, 4) == answered(other, server, 4) == 4
    assert answered(peer, server, 2, size=6000) == 2


@EACH_VERSION
def test_a_server_may_speak_first_whatever_is_tracked(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    plan, peer, server = carry(net, server=True)

    for at in ("gateway", "destination"):
        net.run(net.names[at], "conntrack", "-F")
        server.sendto(b"first", net.peer_end)
        assert peer.recv(99) == b"first"
    chain = "add chain inet fw raw { type filter hook prerouting priority -300; }"
    net.run(net.names["gateway"], "nft", f"{chain}; add rule inet fw raw meta l4proto udp notrack")
    server.sendto(b"untracked", net.peer_end)
    assert peer.recv(99) == b"untracked"
    assert answered(peer, server, 2) == 2

    drift = {
        site.role: find_drift(plan, site, net.kernel.observe(site, plan), opened=True)
        for site in plan.move.sites
    }
    assert drift == {Role.GATEWAY: (), Role.DESTINATION: ()}


def test_an_answer_comes_from_the_address_that_was_spoken_to_and_old_is_on_no_wire(
    make_net: Callable[[int], Net],
) -> None:
    net = make_net(4)
    strict = "add chain inet fw wire { type filter hook prerouting priority -400; }; "
    strict += "add rule inet fw wire iifname new ip saddr 10.2.0.0/24 counter drop"
    net.run(net.names["gateway"], "nft", f"add table inet fw; {strict}")
    _, peer, server = carry(net, server=True)
    direct = net.socket("gateway", ("10.3.0.1", 777), (str(NEW[4]), PORT))

    assert answered(direct, server, 2) == answered(peer, server, 2) == 2
    assert "counter packets 0 " in net.run(net.names["gateway"], "nft", "list", "ruleset")


def test_what_a_server_needs_is_put_back(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    plan, peer, server = carry(net, server=True)
    site = plan.move.sites[0]
    for what in ("flush chain inet natkeep in-at-10.2.0.10", "flush set inet natkeep listen-udp-1"):
        net.run(net.names["gateway"], "nft", what)
    assert len(find_drift(plan, site, net.kernel.observe(site, plan), opened=True)) == 2

    seen = net.kernel.observe(site, plan)
    for _, patch in find_patches(plan, site, seen, Life(False), opened=True):
        net.kernel.mend(patch, lambda prior: None)
    assert find_drift(plan, site, net.kernel.observe(site, plan), opened=True) == ()
    net.run(net.names["gateway"], "conntrack", "-F")
    assert answered(peer, server, 2) == 2


def test_a_local_peer_of_the_destination_is_heard(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    _, peer, server = carry(net, server=True)
    local = net.socket("destination", ("10.3.0.20", 888), net.old_end)

    assert answered(local, server, 2) == answered(peer, server, 1) + 1 == 2


def test_a_port_of_a_server_may_have_connected_sockets_besides(
    make_net: Callable[[int], Net],
) -> None:
    net = make_net(4)
    end = Endpoint(OLD[4], PORT)
    plan = make_plan(net.move(udp_servers=(end,)), NO_CONNECTIONS)
    net.apply(plan.steps)
    with net.socket("destination", net.old_end, None, shared=True) as server:
        connected = net.socket("destination", net.old_end, net.peer_end, shared=True)
        peer = net.socket("peer", net.peer_end, net.old_end)
        other = net.socket("peer", (str(PEER[4]), PEER_PORT + 1), net.old_end)
        assert answered(peer, connected, 2) == answered(other, server, 2) == 2


def test_a_server_goes_without_a_trace(make_net: Callable[[int], Net]) -> None:
    net = make_net(6)
    names = {role: net.names[role] for role in ("gateway", "destination")}
    before = look(names)
    end = Endpoint(OLD[6], PORT)
    plan = make_plan(net.move(udp_servers=(end,)), NO_CONNECTIONS)

    done = net.apply(plan.steps)
    peer = net.socket("peer", net.peer_end, net.old_end)
    with net.socket("destination", net.old_end, None) as server:
        assert answered(peer, server, 2) == 2
    net.undo(done)

    assert look(names) == before
    assert answered(peer, net.socket("source", net.old_end, None), 2) == 2


@EACH_VERSION
@EACH_KIND
def test_the_source_keeps_quiet_and_does_not_say_that_the_port_is_unreachable(
    make_net: Callable[[int], Net], version: int, server: bool
) -> None:
    net = make_net(version)
    sites = (Site(Role.SOURCE, net.names["source"]),)
    plan = make_plan(net.move(server=server, sites=sites), NO_CONNECTIONS)
    peer = net.socket("peer", net.peer_end, net.old_end)
    peer.send(b"?")
    with pytest.raises(ConnectionRefusedError):
        peer.recv(99)

    net.kernel.open_sites(sites)
    done = net.apply(plan.prepare)
    peer.send(b"?")
    with pytest.raises(TimeoutError):
        peer.recv(99)
    with net.socket("source", net.old_end, net.peer_end) as process, pytest.raises(PermissionError):
        process.send(b"!")

    done += net.apply(plan.open)
    back = net.socket("source", net.old_end, None)
    assert answered(peer, back, 2) == 2
    net.undo(done)
    assert "natkeep" not in net.run(net.names["source"], "nft", "list", "ruleset")
    net.kernel.close_sites(sites)


def test_a_port_that_the_destination_uses_is_refused(make_net: Callable[[int], Net]) -> None:
    net = make_net(4)
    plan = make_plan(net.move(server=True), NO_CONNECTIONS)
    [step] = [
        one
        for one in plan.prepare
        if isinstance(one, InstallReception) and one.site.role == Role.DESTINATION
    ]
    net.kernel.check(step)
    for local in ("10.3.0.20", "0.0.0.0"):
        with (
            net.socket("destination", (local, PORT), None),
            pytest.raises(RefusedError, match=r"a socket has 10.3.0.20 port 5000 of UDP"),
        ):
            net.kernel.check(step)


@EACH_VERSION
def test_a_socket_that_any_peer_may_speak_to_is_silent_when_none_does(
    make_net: Callable[[int], Net], version: int
) -> None:
    net = make_net(version)
    plan = make_plan(net.move(server=True), NO_CONNECTIONS)
    net.apply(plan.steps)
    key = OLD[version].packed + PORT.to_bytes(2, "big")
    gateway, destination = plan.move.sites

    assert net.kernel.observe(destination, plan).bound == frozenset()
    process = net.socket("destination", net.old_end, None)
    assert net.kernel.observe(destination, plan).bound == {key}
    peer = net.socket("peer", net.peer_end, net.old_end)
    assert answered(peer, process, 2) == 2
    for site in (gateway, destination):
        assert net.kernel.observe(site, plan).silences.keys() == {key}
        net.run(site.netns, "conntrack", "-F")
        assert net.kernel.observe(site, plan).silences == {}


@EACH_VERSION
def test_the_end_is_silence_for_drain_and_no_socket_for_gc(
    make_net: Callable[[int], Net], version: int, tmp_path: Path
) -> None:
    net = make_net(version)
    executor = make_executor(tmp_path)
    prepare(executor, net.move(), NO_CONNECTIONS)
    open_move(executor, "udp")
    peer = net.socket("peer", net.peer_end, net.old_end)
    with net.socket("destination", net.old_end, net.peer_end) as process:
        assert answered(peer, process, 1) == 1

        assert drain(executor, "udp", 0) == count_alive(executor, "udp") == 1
        assert drain(executor, "udp", 0, idle=0.0) == 0
        net.run(net.names["destination"], "conntrack", "-F")  # as when its time is over
        assert drain(executor, "udp", 0) == 0
        assert count_alive(executor, "udp") == 1  # it may go on
        assert gc(executor, ()).cleared == ()

    [cleared] = gc(executor, ()).cleared
    assert (cleared.name, cleared.reason) == ("udp", "its connections have all ended")
