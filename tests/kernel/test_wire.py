"""what a site does to packets: crafted mid-stream segments in, and what comes out, octet by octet.

    gateway:      peer ── outside │ gateway │ inside ── far        (the gateway forwards)
    destination:  peer ──────────── eth0 │ destination │ process   (raw sockets stand for it)

`peer` and `far` are bare ends of a cable: they have no address, so their kernels say nothing of
themselves and every frame that is seen was let through or made by the site. Nobody sleeps:
behind each packet goes a marker that nothing translates and no gate stops, and what has not come
when the marker comes does not come.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Protocol

import pytest
from fake_kernel import revert_step

from natkeep.errors import RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import entered
from natkeep.kernel.nftables_dump import count_heard, find_unheard
from natkeep.lab.time_scale import scaled
from natkeep.plan.base_chains import heard_set
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan, Prior, Step
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

pytestmark = [pytest.mark.root, pytest.mark.needs("scapy")]

Run = Callable[..., str]
DEADLINE = scaled(5.0)  # s; a packet takes some 50 µs

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
KEPT_PORT, PORT, MARKER_PORT = 50594, 80, 9
ETHERTYPE = {4: 0x0800, 6: 0x86DD}
MAC = {"peer": "02:00:00:00:00:01", "site": "02:00:00:00:00:02", "far": "02:00:00:00:00:03"}
CRIU_MARK = 0xC114
TCP_REPAIR = 19
OWN_MARK = 1
"""Of what the test sends in the place of a process: the kernel's own resets have none."""

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
EACH_ROLE = pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


MUTE = (
    "add table inet mute; add chain inet mute out { type filter hook output priority -500; }; "
    "add rule inet mute out tcp flags & rst == rst meta mark 0 drop; "
    "add rule inet mute out meta l4proto { icmp, icmpv6 } drop"
)
"""There is no TCP socket, so the kernel would answer each segment with a reset."""


class End(Protocol):
    """Where packets are put in and taken out, as octets that begin with the IP header."""

    def send(self, packet: bytes) -> None: ...
    def receive(self, deadline: float) -> bytes: ...
    def drain(self) -> list[bytes]: ...


class CableEnd:
    """The end of a veth cable."""

    def __init__(self, device: str, own: str, next_: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.socket.bind((device, 3))
        self._header = _mac(next_) + _mac(own)

    def send(self, packet: bytes) -> None:
        self.socket.send(self._header + struct.pack("!H", ETHERTYPE[packet[0] >> 4]) + packet)

    def receive(self, deadline: float) -> bytes:
        while True:
            frame = self.receive_frame(deadline)
            if frame[12:14] in (b"\x08\x00", b"\x86\xdd") and not _is_icmp6(frame[14:]):
                return frame[14:]

    def drain(self) -> list[bytes]:
        """Nothing: frames come one behind the other, and the marker was the last."""
        return []

    def receive_frame(self, deadline: float) -> bytes:
        """The next frame that came over the cable."""
        while True:
            _await(self.socket, deadline)
            frame, (_, _, kind, *_) = self.socket.recvfrom(65536)
            if kind != socket.PACKET_OUTGOING:
                return frame


class ProcessEnd:
    """In place of the restored process: sees what its kernel would deliver to a TCP socket."""

    def __init__(self) -> None:
        self._in = {
            (4, 6): socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP),
            (4, 17): socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP),
            (6, 6): socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_TCP),
            (6, 17): socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_UDP),
        }
        for (version, _), made in self._in.items():
            if version == 6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        self._out = {
            4: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
            6: socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
        }

    def send(self, packet: bytes, *, mark: int = OWN_MARK) -> None:
        version = packet[0] >> 4
        to = ip_address(packet[16:20] if version == 4 else packet[24:40])
        self._out[version].setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        with suppress(PermissionError):  # what a local sender is told of a packet that is dropped
            self._out[version].sendto(packet, (str(to), 0))

    def drain(self) -> list[bytes]:
        """What is there already, of any protocol: each has a queue of its own."""
        found = []
        while select.select([*self._in.values()], [], [], 0)[0]:
            found.append(self.receive(time.monotonic() + DEADLINE))
        return found

    def receive(self, deadline: float) -> bytes:
        ready = _await(self._in.values(), deadline)
        version, protocol = next(key for key, made in self._in.items() if made in ready)
        made = self._in[version, protocol]
        if version == 4:
            return made.recv(65536)
        payload, extra, _, source = made.recvmsg(65536, 1024)
        told = {type_: data for _, type_, data in extra}
        [hops] = struct.unpack("=i", told[socket.IPV6_HOPLIMIT])
        header = struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops)
        ends = ip_address(source[0]).packed + told[socket.IPV6_PKTINFO][:16]
        return header + ends + payload


def _await(what: Any, deadline: float) -> list[socket.socket]:
    sockets = list(what) if isinstance(what, Iterable) else [what]
    ready, _, _ = select.select(sockets, [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        pytest.fail("the marker did not come: the test's own network does not work")
    return ready


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _is_icmp6(packet: bytes) -> bool:
    """Neighbour and listener discovery, which a kernel with an address speaks by itself."""
    return packet[0] >> 4 == 6 and packet[6] in (0, 58)


@dataclass
class Stage:
    """A site between two ends, and natkeep's kernel there."""

    role: Role
    netns: str
    peer: CableEnd
    process: Any  # an End; at the destination a ProcessEnd
    run: Run
    kernel: LinuxKernel = field(default_factory=LinuxKernel)
    done: list[tuple[Step, Prior]] = field(default_factory=list)
    markers: int = 0

    def prepare(
        self,
        *,
        opened: bool = True,
        mode: Mode = Mode.STATEFUL,
        move_id: str = "web",
        port: int = KEPT_PORT,
        peer_maps: tuple[Map, ...] = (),
        listeners: bool = False,
    ) -> Plan:
        """All steps of a move that keeps one connection of either family."""
        maps = tuple(Map(OLD[version], NEW[version]) for version in (4, 6))
        kept = Connections.of(
            FourTuple(Endpoint(PEER[version], port), Endpoint(OLD[version], PORT))
            for version in (4, 6)
        )
        sites = (Site(self.role, self.netns),)
        ends = tuple(Endpoint(map_.old, PORT) for map_ in maps if listeners)
        move = Move(move_id, maps, sites, mode, ends, peer_maps=peer_maps)
        plan = make_plan(move, kept)
        self.kernel.open_sites(plan.move.sites)
        for step in plan.steps:
            self.kernel.check(step)
        self.apply(plan.steps if opened else plan.prepare)
        return plan

    def apply(self, steps: Iterable[Step]) -> None:
        for step in steps:
            self.done.append((step, self.kernel.apply(step, lambda prior: None)))

    def teardown(self) -> None:
        for step, prior in reversed(self.done):
            revert_step(self.kernel, step, prior)

    def unhook(self) -> None:
        """As it is once the blackout is over: packets do not come by the gates any more."""
        self.kernel.unhook_gates()
        assert "chain gate {" not in self.run(self.netns, "nft", "list", "table", "inet", "natkeep")

    def heard(self) -> int:
        """How many of the peers were heard, of either family."""
        with entered(self.netns), Netlink(NETLINK_NETFILTER) as netlink:
            return count_heard(netlink, [heard_set("web", number) for number in (0, 1)])

    def unheard(self, plan: Plan) -> list[bytes]:
        """The records of those that were not."""
        with entered(self.netns), Netlink(NETLINK_NETFILTER) as netlink:
            return [
                record
                for t in plan.translations
                for record in find_unheard(netlink, heard_set("web", t.number), t.kept)
            ]

    def outside(self, version: int) -> Address:
        """The address that peers send to, as it arrives at the site."""
        return (OLD if self.role == Role.GATEWAY else NEW)[version]

    def inside(self, version: int) -> Address:
        return (NEW if self.role == Role.GATEWAY else OLD)[version]

    def inbound(self, packet: Any) -> list[bytes]:
        """What comes to the process when a peer sends *packet*."""
        return self._cross(self.peer, packet, self.process, self._marker(inward=True))

    def outbound(self, packet: Any) -> list[bytes]:
        """What comes to the peer when the process sends *packet*."""
        return self._cross(self.process, packet, self.peer, self._marker(inward=False))

    def _marker(self, *, inward: bool) -> Any:
        self.markers += 1
        peer, local = PEER[4], NEW[4]
        source, destination = (peer, local) if inward else (local, peer)
        return segment(source, MARKER_PORT, destination, MARKER_PORT, data=b"%d" % self.markers)

    def _cross(self, sender: End, packet: Any, receiver: End, marker: Any) -> list[bytes]:
        sender.send(bytes(packet))
        sender.send(bytes(marker))
        expected, found = bytes(marker)[20:], []  # behind the IP header: TTL changes there
        deadline = time.monotonic() + DEADLINE
        while (packet := receiver.receive(deadline))[20:] != expected:
            found.append(packet)
        return found + receiver.drain()

    def expect(self, packet: Any, **changes: Any) -> bytes:
        """*packet* on the other side of the site, with *changes* to its IP header.

        And if it is a reset of the kept connection, with a gateway's mark.
        """
        forwarded = packet.copy()
        del forwarded.payload.chksum
        is_reset = "R" in str(getattr(forwarded.payload, "flags", ""))
        if "dst" in changes and is_reset and self.role == Role.GATEWAY:
            forwarded.payload.urgptr = CRIU_MARK
        for name, value in changes.items():
            setattr(forwarded, name, str(value) if isinstance(value, Address) else value)
        hops = "ttl" if packet.version == 4 else "hlim"
        if self.role == Role.GATEWAY:
            setattr(forwarded, hops, getattr(packet, hops) - 1)
        if packet.version == 4:
            del forwarded.chksum
        return bytes(forwarded)


def segment(
    source: Address,
    sport: int,
    destination: Address,
    dport: int,
    *,
    flags: str = "PA",
    seq: int = 0x89ABCDEF,
    data: bytes = b"0123456789",
) -> Any:
    """A segment from the midst of a stream, with as many odd values as TCP allows."""
    from scapy.layers.inet import TCP

    options = [("NOP", None), ("NOP", None), ("Timestamp", (0x11223344, 0x55667788))]
    tcp = TCP(
        sport=sport,
        dport=dport,
        flags=flags,
        seq=seq,
        ack=0xFEDCBA98,
        window=0x1F3,
        options=options,
    )
    return header(source, destination) / tcp / data


def datagram(source: Address, sport: int, destination: Address, dport: int) -> Any:
    from scapy.layers.inet import UDP

    return header(source, destination) / UDP(sport=sport, dport=dport) / b"0123456789"


def header(source: Address, destination: Address) -> Any:
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    ends = {"src": str(source), "dst": str(destination)}
    if source.version == 6:
        return IPv6(**ends, hlim=61)
    return IP(**ends, id=0x4242, ttl=61, tos=0x10, flags="DF")


@pytest.fixture
def make_stage(make_netns: Callable[[], str], run: Run) -> Iterator[Callable[[Role], Stage]]:
    """`make_stage(role)`: a site with its two ends; the test stays on one CPU, so that packets
    that were sent one after the other arrive one after the other."""
    with ExitStack() as stack:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cpus)})
        stack.callback(os.sched_setaffinity, 0, cpus)

        def make(role: Role) -> Stage:
            site, peer = make_netns(), make_netns()
            if role == Role.GATEWAY:
                far = make_netns()
                _connect(run, site, "outside", peer, "peer")
                _connect(run, site, "inside", far, "far")
                _address(run, site, "outside", "10.1.0.1/24", "fd00:1::1/64")
                _address(run, site, "inside", "10.3.0.1/24", "fd00:3::1/64")
                for version, network in ((4, "10.2.0.0/24"), (6, "fd00:2::/64")):
                    run(site, "ip", "route", "add", network, "via", str(NEW[version]))
                    _neighbour(run, site, PEER[version], "outside", MAC["peer"])
                    _neighbour(run, site, NEW[version], "inside", MAC["far"])
                run(site, "sysctl", "-qw", "net.ipv4.ip_forward=1")
                run(site, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
                process: End = _inside(far, lambda: CableEnd("eth0", MAC["far"], MAC["site"]))
            else:
                _connect(run, site, "eth0", peer, "peer")
                _address(run, site, "eth0", "10.3.0.20/24", "fd00:3::20/64")
                for via in ("10.3.0.1", "fd00:3::1"):
                    run(site, "ip", "route", "add", "default", "via", via)
                    _neighbour(run, site, ip_address(via), "eth0", MAC["peer"])
                run(site, "nft", MUTE)
                process = _inside(site, ProcessEnd)
            cable = _inside(peer, lambda: CableEnd("eth0", MAC["peer"], MAC["site"]))
            return Stage(role, site, cable, process, run)

        yield make


def _inside(netns: str, make: Callable[[], Any]) -> Any:
    with entered(netns):
        return make()


def _connect(run: Run, site: str, device: str, other: str, end: str) -> None:
    peer = ("peer", "name", "eth0", "netns", other, "address", MAC[end])
    run(site, "ip", "link", "add", device, "address", MAC["site"], "type", "veth", *peer)
    for netns, name in ((site, device), (other, "eth0")):
        run(netns, "ip", "link", "set", name, "addrgenmode", "none", "up")


def _address(run: Run, netns: str, device: str, *addresses: str) -> None:
    for address in addresses:
        nodad = ["nodad"] if ":" in address else []
        run(netns, "ip", "address", "add", address, "dev", device, *nodad)


def _neighbour(run: Run, netns: str, address: Address, device: str, mac: str) -> None:
    to = ("lladdr", mac, "dev", device, "nud", "permanent")
    run(netns, "ip", "neighbour", "replace", str(address), *to)


def to_process(stage: Stage, version: int, *, sent_to_new: bool = False, **more: Any) -> Any:
    """A segment of the kept connection, from the peer; a reset as the gateway marks it if sent to
    OLD."""
    packet = segment(PEER[version], KEPT_PORT, stage.outside(version), PORT, **more)
    if stage.role == Role.DESTINATION and "R" in str(packet.payload.flags) and not sent_to_new:
        packet.payload.urgptr = CRIU_MARK
    return packet


def to_peer(stage: Stage, version: int, **more: Any) -> Any:
    """A segment of the kept connection, from the process."""
    return segment(stage.inside(version), PORT, PEER[version], KEPT_PORT, **more)


@EACH_VERSION
@EACH_ROLE
def test_without_natkeep_segments_pass_as_they_are(
    make_stage: Callable[[Role], Stage], role: Role, version: int
) -> None:
    """The control: what the other tests see changed is not changed by the test's own network."""
    stage = make_stage(role)
    packet = to_process(stage, version)

    assert [stage.expect(packet)] == stage.inbound(packet)
    answer = segment(NEW[version], PORT, PEER[version], KEPT_PORT)
    assert [stage.expect(answer)] == stage.outbound(answer)


@pytest.mark.parametrize("hooked", [True, False])
@EACH_MODE
@EACH_VERSION
@EACH_ROLE
def test_a_segment_of_a_kept_connection_has_its_address_changed_and_nothing_else(
    make_stage: Callable[[Role], Stage], role: Role, version: int, mode: Mode, hooked: bool
) -> None:
    """Compared whole: addresses, TTL, checksums, numbers, flags, options, window and data.

    Both just after open, and when packets do not come by the gates any more.
    """
    stage = make_stage(role)
    stage.prepare(mode=mode)
    if not hooked:
        stage.unhook()
    packet, answer = to_process(stage, version), to_peer(stage, version)
    assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)
    assert [stage.expect(answer, src=stage.outside(version))] == stage.outbound(answer)


@EACH_MODE
@EACH_ROLE
def test_the_process_may_send_first(
    make_stage: Callable[[Role], Stage], role: Role, mode: Mode
) -> None:
    stage = make_stage(role)
    stage.prepare(mode=mode)
    answer = to_peer(stage, 6)

    assert [stage.expect(answer, src=stage.outside(6))] == stage.outbound(answer)


@EACH_MODE
@EACH_VERSION
def test_a_reset_reaches_the_process_once_its_peer_has_said_anything_else(
    make_stage: Callable[[Role], Stage], version: int, mode: Mode
) -> None:
    """What a closed gate has dropped does not count, nor does a SYN; to conntrack it never came."""
    stage = make_stage(Role.DESTINATION)
    plan = stage.prepare(opened=False, mode=mode)
    packet = to_process(stage, version)
    assert stage.inbound(packet) == []
    stage.apply(plan.open)
    if mode == Mode.STATEFUL:  # in the other one a SYN ends a tuple that no socket has
        stage.inbound(to_process(stage, version, flags="S", data=b""))
    for flags in ("R", "RA"):
        early = to_process(stage, version, sent_to_new=True, flags=flags, data=b"")
        assert stage.inbound(early) == []
    assert "CLOSE" not in stage.run(stage.netns, "conntrack", "-L", "-p", "tcp")
    assert stage.heard() == 0

    assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)
    assert stage.heard() == 1
    silent = [t.kept for t in plan.translations if t.map.old.version != version]
    assert stage.unheard(plan) == [*silent[0].each()]
    reset = to_process(stage, version, sent_to_new=True, flags="R", data=b"")
    assert [stage.expect(reset, dst=stage.inside(version))] == stage.inbound(reset)


@EACH_MODE
@EACH_VERSION
def test_a_reset_that_a_gateway_has_translated_reaches_the_process_at_once(
    make_stage: Callable[[Role], Stage], version: int, mode: Mode
) -> None:
    """Its peer was spoken to by OLD: what it says is no answer to NEW."""
    stage = make_stage(Role.DESTINATION)
    stage.prepare(mode=mode)
    reset = to_process(stage, version, flags="R", data=b"")

    assert [stage.expect(reset, dst=stage.inside(version))] == stage.inbound(reset)
    assert stage.heard() == 0


@EACH_MODE
@EACH_VERSION
def test_a_gateway_marks_a_reset_also_where_new_connections_follow(
    make_stage: Callable[[Role], Stage], version: int, mode: Mode
) -> None:
    stage = make_stage(Role.GATEWAY)
    stage.prepare(mode=mode, listeners=True)
    reset = to_process(stage, version, flags="R", data=b"")

    assert [stage.expect(reset, dst=stage.inside(version))] == stage.inbound(reset)


@EACH_VERSION
def test_a_gateway_passes_no_reset_of_a_kept_connection_to_new(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """It answers what came by another gateway, or by this one before it was ready; one that another
    gateway has translated is marked. Of the other connections between the two it knows nothing."""
    stage = make_stage(Role.GATEWAY)
    stage.prepare()

    def reset(port: int = KEPT_PORT, **more: Any) -> Any:
        return segment(PEER[version], port, NEW[version], PORT, flags="R", data=b"", **more)

    assert stage.inbound(reset()) == []
    marked = reset()
    marked.payload.urgptr = CRIU_MARK
    for other in (reset(KEPT_PORT + 1), marked):
        assert [stage.expect(other)] == stage.inbound(other)


def test_once_every_peer_was_heard_no_packet_is_asked_for_it(
    make_stage: Callable[[Role], Stage],
) -> None:
    """The base chain goes, is not missed, and stands again for as long as the next move does."""
    stage = make_stage(Role.DESTINATION)
    plan = stage.prepare()

    def has_chain(*, tidy: bool = True) -> bool:
        with closing_kernel(plan) as kernel:
            if tidy:
                kernel.unhook_gates()
                seen = kernel.observe(plan.move.sites[0], plan)
                assert find_drift(plan, plan.move.sites[0], seen, opened=True) == ()
        listed = stage.run(stage.netns, "nft", "list", "table", "inet", "natkeep")
        return "chain early-resets {" in listed

    assert has_chain()
    stage.inbound(to_process(stage, 4))
    assert has_chain()
    stage.inbound(to_process(stage, 6))
    assert has_chain(tidy=False)
    assert not has_chain()
    for version in (4, 6):
        reset = to_process(stage, version, sent_to_new=True, flags="R", data=b"")
        assert [stage.expect(reset, dst=stage.inside(version))] == stage.inbound(reset)

    second = Stage(stage.role, stage.netns, stage.peer, stage.process, stage.run)
    second.prepare(opened=False, move_id="two", port=KEPT_PORT + 1)
    assert has_chain()
    second.teardown()
    assert not has_chain(tidy=False)


@contextmanager
def closing_kernel(plan: Plan) -> Iterator[LinuxKernel]:
    """As another command has it."""
    kernel = LinuxKernel()
    kernel.open_sites(plan.move.sites)
    yield kernel
    kernel.close_sites(plan.move.sites)


@EACH_VERSION
def test_a_reset_of_another_connection_is_not_asked_whether_its_peer_was_heard(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = make_stage(Role.DESTINATION)
    stage.prepare()

    for source, sport in ((PEER[version], KEPT_PORT + 1), (NEW[version] + 7, KEPT_PORT)):
        reset = segment(source, sport, stage.outside(version), PORT, flags="R", data=b"")
        assert [stage.expect(reset)] == stage.inbound(reset)
    assert stage.heard() == 0


@EACH_VERSION
@EACH_ROLE
def test_neighbours_are_not_translated(
    make_stage: Callable[[Role], Stage], role: Role, version: int
) -> None:
    stage = make_stage(role)
    stage.prepare()
    peer, outside = PEER[version], stage.outside(version)

    for packet in (
        segment(peer, KEPT_PORT + 1, outside, PORT),
        segment(peer, KEPT_PORT, outside, PORT + 1),
        segment(ip_address(int(peer) + 1), KEPT_PORT, outside, PORT),
        datagram(peer, KEPT_PORT, outside, PORT),
    ):
        assert [stage.expect(packet)] == stage.inbound(packet)


@EACH_VERSION
@EACH_ROLE
def test_neighbours_from_the_process_do_not_leave_as_old(
    make_stage: Callable[[Role], Stage], role: Role, version: int
) -> None:
    """The gateway passes them on as they are; the destination lets nothing out as OLD."""
    stage = make_stage(role)
    stage.prepare()
    local, peer = stage.inside(version), PEER[version]

    for packet in (
        segment(local, PORT + 1, peer, KEPT_PORT),
        segment(local, PORT, peer, KEPT_PORT + 1),
        datagram(local, PORT, peer, KEPT_PORT),
    ):
        passed = [stage.expect(packet)] if role == Role.GATEWAY else []
        assert passed == stage.outbound(packet)


@EACH_VERSION
def test_what_the_old_host_still_sends_does_not_leave_from_another_port(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """It would clash with our entry, get another source port, and be answered with a reset."""
    stage = make_stage(Role.GATEWAY)
    stage.prepare()

    for flags in ("PA", "R"):
        stray = segment(OLD[version], PORT, PEER[version], KEPT_PORT, flags=flags)
        assert stage.outbound(stray) == []


@EACH_VERSION
def test_a_bare_syn_that_no_entry_translates_reaches_no_listener(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = make_stage(Role.DESTINATION)
    stage.prepare()
    stage.run(stage.netns, "conntrack", "-F")
    syn = to_process(stage, version, flags="S", data=b"")

    assert stage.inbound(syn) == []
    stage.unhook()
    assert stage.inbound(syn) == []


@EACH_MODE
@EACH_VERSION
def test_no_listener_s_answer_to_a_syn_on_a_kept_tuple_leaves(
    make_stage: Callable[[Role], Stage], version: int, mode: Mode
) -> None:
    """Without the gates, and while the entry lives, the SYN itself may get to one."""
    stage = make_stage(Role.DESTINATION)
    stage.prepare(mode=mode)
    stage.unhook()
    stage.inbound(to_process(stage, version, flags="S", data=b""))
    answer = to_peer(stage, version, flags="SA", data=b"")
    other = segment(NEW[version], PORT, PEER[version], KEPT_PORT, flags="SA", data=b"")

    assert stage.outbound(answer) == []
    assert [stage.expect(other)] == stage.outbound(other)  # NEW is somebody else


@EACH_VERSION
def test_a_bare_syn_on_a_kept_tuple_opens_no_path_through_the_gateway(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """Once the connection has ended, that is: while its entry is there, conntrack translates all
    its packets, whatever the rules say, and it is the destination that refuses a SYN."""
    stage = make_stage(Role.GATEWAY)
    stage.prepare()
    syn = to_process(stage, version, flags="S", data=b"")
    stage.run(stage.netns, "conntrack", "-F")

    assert [stage.expect(syn)] == stage.inbound(syn)


@EACH_VERSION
@EACH_ROLE
def test_a_closed_gate_holds_the_kept_connection_back_and_nobody_else(
    make_stage: Callable[[Role], Stage], role: Role, version: int
) -> None:
    stage = make_stage(role)
    plan = stage.prepare(opened=False)
    packet = to_process(stage, version)
    neighbour = segment(PEER[version], KEPT_PORT + 1, stage.outside(version), PORT)

    assert stage.inbound(packet) == []
    assert [stage.expect(neighbour)] == stage.inbound(neighbour)

    stage.apply(plan.open)
    assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)


@EACH_VERSION
def test_criu_s_own_segments_pass_a_closed_gate(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """It restores half-closed sockets with segments through lo, which bear its mark."""
    stage = make_stage(Role.DESTINATION)
    stage.prepare(opened=False)
    packet = segment(PEER[version], KEPT_PORT, OLD[version], PORT, flags="FA")
    before = stage.run(stage.netns, "conntrack", "-L", "-f", f"ipv{version}", "-o", "id")

    def arrived(mark: int) -> list[bytes]:
        stage.process.send(bytes(packet), mark=mark)
        plain = segment(PEER[version], KEPT_PORT + 1, NEW[version], PORT)
        return [seen for seen in stage.inbound(plain) if seen != bytes(plain)]

    assert arrived(0) == []
    assert arrived(CRIU_MARK) == [bytes(packet)]
    # conntrack has not seen it, or it would have gone on to another state.
    after = stage.run(stage.netns, "conntrack", "-L", "-f", f"ipv{version}", "-o", "id")
    assert "ESTABLISHED" in before
    assert before.count("FIN_WAIT") == after.count("FIN_WAIT") == 0


@pytest.mark.parametrize(("flags", "loose"), [("PA", 0), ("FA", 1), ("FA", 0), ("R", 0), ("RA", 1)])
@EACH_ROLE
def test_the_first_packet_may_be_one_that_conntrack_would_not_begin_with(
    make_stage: Callable[[Role], Stage], role: Role, flags: str, loose: int
) -> None:
    """A FIN, a reset, or any at all where nf_conntrack_tcp_loose is 0: the entries are there."""
    stage = make_stage(role)
    stage.run(stage.netns, "sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_loose={loose}")
    stage.prepare()

    for version in (4, 6):
        packet = to_process(stage, version, flags=flags, data=b"")
        assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)


WITHOUT_ENTRY = {
    "flushed": "conntrack -F",
    "not picked up": "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0; conntrack -F",
    "not tracked": "nft add table inet theirs; nft 'add chain inet theirs raw { type filter hook "
    "prerouting priority -300; }'; nft add rule inet theirs raw notrack; nft 'add chain inet "
    "theirs out { type filter hook output priority -300; }'; nft add rule inet theirs out notrack",
}
"""What another program does; conntrack then calls a segment new, invalid or untracked."""
FLAGS = ["FA", "R", "RA", "PA", "SA", "SF", "SR", ""]


@pytest.mark.parametrize("done", WITHOUT_ENTRY)
@EACH_VERSION
@EACH_ROLE
def test_a_segment_without_an_entry_is_translated_all_the_same(
    make_stage: Callable[[Role], Stage], role: Role, version: int, done: str
) -> None:
    """Whatever its flags, in both directions; only a SYN begins no connection on a kept tuple."""
    stage = make_stage(role)
    stage.prepare()

    for flags in FLAGS:
        stage.run(stage.netns, "sh", "-ec", WITHOUT_ENTRY[done])
        packet = to_process(stage, version, flags=flags)
        assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet), flags
        stage.run(stage.netns, "conntrack", "-F")
        packet = to_peer(stage, version, flags=flags)
        # At the destination a SYN-ACK would be a listener's.
        passed = [] if flags == "SA" and role == Role.DESTINATION else [packet]
        wanted = [stage.expect(one, src=stage.outside(version)) for one in passed]
        assert wanted == stage.outbound(packet), flags


@pytest.mark.parametrize("flags", ["R", "RA", "SA", ""])
@EACH_VERSION
@EACH_ROLE
def test_a_segment_that_does_not_fit_its_entry_is_translated_all_the_same(
    make_stage: Callable[[Role], Stage], role: Role, version: int, flags: str
) -> None:
    """The entry is there; a SYN-ACK, no flags at all, or a third reset are invalid to conntrack."""
    stage = make_stage(role)
    stage.prepare()

    for seq in (7, 1 << 30, 5):
        packet = to_process(stage, version, flags=flags, seq=seq, data=b"")
        assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)


@EACH_VERSION
def test_what_no_rule_has_translated_does_not_leave_the_gateway(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """The old host, to which it is addressed, would answer with a reset."""
    stage = make_stage(Role.GATEWAY)
    stage.prepare()
    old = str(OLD[version]).replace(":", "_")
    for chain in (f"in-at-{old}", f"invalid-in-at-{old}"):
        stage.run(stage.netns, "nft", "flush", "chain", "inet", "natkeep", chain)

    for flags in ("PA", "FA"):
        stage.run(stage.netns, "conntrack", "-F")
        assert stage.inbound(to_process(stage, version, flags=flags)) == []


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.PEER])
@pytest.mark.parametrize("done", ["", *WITHOUT_ENTRY])
@EACH_VERSION
def test_the_gateway_itself_may_be_the_peer(
    make_stage: Callable[[Role], Stage], version: int, done: str, role: Role
) -> None:
    """What it says and hears itself passes other hooks than what it forwards."""
    stage = make_stage(Role.GATEWAY)
    own, old, new = own_ends(version)
    stage.apply(plan_for_own(stage, role, version).steps)
    peer = _inside(stage.netns, ProcessEnd)
    for flags in FLAGS:
        stage.run(stage.netns, "sh", "-ec", WITHOUT_ENTRY.get(done, ":"))
        packet = segment(own.address, own.port, old.address, old.port, flags=flags)
        wanted = segment(own.address, own.port, new.address, new.port, flags=flags)
        if "R" in flags and role == Role.PEER:  # for the destination to believe it
            wanted.payload.urgptr = CRIU_MARK
        peer.send(bytes(packet))
        assert bytes(wanted) == stage.process.receive(time.monotonic() + DEADLINE), flags
        stage.run(stage.netns, "conntrack", "-F")
        packet = segment(new.address, new.port, own.address, own.port, flags=flags)
        wanted = segment(old.address, old.port, own.address, own.port, flags=flags)
        stage.process.send(bytes(packet))
        assert bytes(wanted) == peer.receive(time.monotonic() + DEADLINE), flags


def own_ends(version: int) -> tuple[Endpoint, Endpoint, Endpoint]:
    """A peer on the gateway's stage itself, OLD and NEW."""
    own = Endpoint(ip_address({4: "10.1.0.1", 6: "fd00:1::1"}[version]), KEPT_PORT)
    return own, Endpoint(OLD[version], PORT), Endpoint(NEW[version], PORT)


def plan_for_own(stage: Stage, role: Role, version: int) -> Plan:
    stage.run(stage.netns, "nft", MUTE)
    own, old, new = own_ends(version)
    move = Move("web", (Map(old.address, new.address),), (Site(role, stage.netns),))
    kept = Connections.of([FourTuple(own, old)])
    stage.kernel.open_sites(move.sites)
    plan = make_plan(move, kept, stage.kernel.look_around(move, kept))
    for step in plan.steps:
        stage.kernel.check(step)
    return plan


@EACH_VERSION
def test_at_the_peers_own_host_nothing_leaves_a_closed_gate_nor_comes_half_translated(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = make_stage(Role.GATEWAY)
    own, old, new = own_ends(version)
    plan = plan_for_own(stage, Role.PEER, version)
    stage.apply(plan.prepare)
    packet = segment(own.address, own.port, old.address, old.port)
    answer = segment(new.address, new.port, own.address, own.port)
    away, home = (
        segment(one.address, MARKER_PORT, two.address, MARKER_PORT)
        for one, two in ((own, new), (new, own))
    )
    peer = _inside(stage.netns, ProcessEnd)
    assert stage._cross(peer, packet, stage.process, away) == []

    stage.apply(plan.open)
    wanted = segment(own.address, own.port, new.address, new.port)
    assert stage._cross(peer, packet, stage.process, away) == [bytes(wanted)]
    # What its kernel would answer to something untranslated.
    reset = segment(own.address, own.port, new.address, new.port, flags="R", data=b"")
    assert stage._cross(peer, reset, stage.process, away) == []

    name = str(new.address).replace(":", "_")
    for chain in (f"out-at-{name}", f"invalid-out-at-{name}"):
        stage.run(stage.netns, "nft", "flush", "chain", "inet", "natkeep", chain)
    for _ in range(2):
        stage.run(stage.netns, "conntrack", "-F")
        assert stage._cross(stage.process, answer, peer, home) == []


MASKED = {4: "10.3.0.1:20001", 6: "[fd00:3::1]:20001"}
CARRIED = {
    "a published port": (False, 8080),
    "a masqueraded client": (True, PORT),
    "both": (True, 8080),
}
MASQUERADE = """add table inet theirs
add chain inet theirs post { type nat hook postrouting priority srcnat; }
add rule inet theirs post oifname "inside" tcp dport != 9 masquerade to :30000-30999
add chain inet theirs pre { type nat hook prerouting priority dstnat; }
add rule inet theirs pre iifname "inside" tcp dport != 9 redirect to :9999"""


@pytest.mark.parametrize("done", [name for name in WITHOUT_ENTRY if name != "not tracked"])
@pytest.mark.parametrize("carried", [*CARRIED, ""])
@EACH_VERSION
def test_what_a_gateway_carries_is_not_translated_anew(
    make_stage: Callable[[Role], Stage], version: int, carried: str, done: str
) -> None:
    """By its own rules a segment without an entry would get another port, or another end."""
    stage = make_stage(Role.GATEWAY)
    stage.run(stage.netns, "nft", "-f", "-", stdin=MASQUERADE)
    masks, port = CARRIED.get(carried, (False, PORT))
    client = Endpoint(PEER[version], KEPT_PORT)
    known = Endpoint.parse(MASKED[version]) if masks else client
    old = Endpoint(OLD[version], PORT)
    kept = Connections.of([FourTuple(known, old)])
    outer = Connections.of([FourTuple(client, Endpoint(OLD[version], port))])
    around = Surroundings(carried=kept, carriers=outer) if carried else Surroundings()
    move = Move("web", (Map(OLD[version], NEW[version]),), (Site(Role.GATEWAY, stage.netns),))
    stage.kernel.open_sites(move.sites)
    stage.apply(make_plan(move, kept, around).steps)
    ends = (client.address, client.port, OLD[version], port)
    inner = (known.address, known.port, NEW[version], PORT)

    for flags in ("PA", "FA", "R"):
        stage.run(stage.netns, "sh", "-ec", WITHOUT_ENTRY[done])
        packet = segment(*ends, flags=flags)
        wanted = stage.expect(segment(*inner, flags=flags), dst=NEW[version])
        assert [wanted] == stage.inbound(packet), flags
        stage.run(stage.netns, "conntrack", "-F")
        packet = segment(*inner[2:], *inner[:2], flags=flags)
        wanted = stage.expect(segment(*ends[2:], *ends[:2], flags=flags))
        assert [wanted] == stage.outbound(packet), flags


@EACH_ROLE
def test_no_segment_is_out_of_any_window(make_stage: Callable[[Role], Stage], role: Role) -> None:
    """Nobody told conntrack the windows, so it must not judge by them."""
    stage = make_stage(role)
    stage.prepare()

    for seq in (0, 1 << 30, 1 << 31, 3 << 30, 1):
        packet, answer = to_process(stage, 4, seq=seq), to_peer(stage, 4, seq=seq ^ 0x55555555)
        assert [stage.expect(packet, dst=stage.inside(4))] == stage.inbound(packet)
        assert [stage.expect(answer, src=stage.outside(4))] == stage.outbound(answer)


@EACH_MODE
@EACH_VERSION
@EACH_ROLE
def test_a_stale_entry_does_not_keep_a_connection_from_being_translated(
    make_stage: Callable[[Role], Stage], role: Role, version: int, mode: Mode
) -> None:
    """The site has seen the connection before, un-translated, in both directions (H1)."""
    stage = make_stage(role)
    theirs = "add table inet theirs; "
    theirs += "add chain inet theirs seen { type filter hook prerouting priority -100; }; "
    theirs += "add rule inet theirs seen ct state new counter"
    stage.run(stage.netns, "nft", theirs)
    stage.inbound(to_process(stage, version))
    stage.outbound(segment(stage.outside(version), PORT, PEER[version], KEPT_PORT))
    listed = stage.run(stage.netns, "conntrack", "-L", "-f", f"ipv{version}")
    assert f"dport={KEPT_PORT}" in listed
    stage.prepare(mode=mode)
    packet = to_process(stage, version)

    assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)


@EACH_MODE
@EACH_ROLE
def test_after_teardown_nothing_is_translated(
    make_stage: Callable[[Role], Stage], role: Role, mode: Mode
) -> None:
    stage = make_stage(role)
    stage.prepare(mode=mode)
    packet = to_process(stage, 4)
    assert stage.inbound(packet) != [stage.expect(packet)]

    stage.teardown()

    assert [stage.expect(packet)] == stage.inbound(packet)


def test_packets_are_counted_by_the_entries(make_stage: Callable[[Role], Stage]) -> None:
    stage = make_stage(Role.GATEWAY)
    plan = stage.prepare()
    for _ in range(3):
        stage.inbound(to_process(stage, 4))
    stage.outbound(to_peer(stage, 4))

    [entry] = stage.kernel.observe(plan.move.sites[0], plan).entries[0]

    assert entry is not None
    assert (entry.packets_in, entry.packets_out) == (3, 1)


def ask_arp(stage: Stage, address: Address) -> list[str]:
    """Who answers when the peer asks for *address*, up to the answer for NEW."""
    from scapy.layers.l2 import ARP, Ether

    for wanted in (address, NEW[4]):
        request = Ether(dst="ff:ff:ff:ff:ff:ff", src=MAC["peer"]) / ARP(
            op="who-has", hwsrc=MAC["peer"], psrc="10.3.0.1", pdst=str(wanted)
        )
        stage.peer.socket.send(bytes(request))
    answered, deadline = [], time.monotonic() + DEADLINE
    while str(NEW[4]) not in answered:
        frame = Ether(stage.peer.receive_frame(deadline))
        if ARP in frame and frame[ARP].op == 2:
            answered.append(frame[ARP].psrc)
    return answered


def test_arp_for_old_is_not_answered_at_the_destination(
    make_stage: Callable[[Role], Stage],
) -> None:
    stage = make_stage(Role.DESTINATION)
    stage.prepare()

    assert ask_arp(stage, OLD[4]) == [str(NEW[4])]

    # The control: it is natkeep's silence, an address on lo would be answered for.
    stage.run(stage.netns, "nft", "delete", "table", "arp", "natkeep")
    assert ask_arp(stage, OLD[4]) == [str(OLD[4]), str(NEW[4])]


@EACH_MODE
def test_arp_never_speaks_of_old_when_the_process_sends(
    make_stage: Callable[[Role], Stage], mode: Mode
) -> None:
    """The kernel would ask for its next hop in the name of the packet's source."""
    from scapy.layers.l2 import ARP, Ether

    stage = make_stage(Role.DESTINATION)
    stage.prepare(mode=mode)
    stage.run(stage.netns, "ip", "neighbour", "del", "10.3.0.1", "dev", "eth0")

    stage.process.send(bytes(to_peer(stage, 4)))

    deadline = time.monotonic() + DEADLINE
    frame = Ether(stage.peer.receive_frame(deadline))
    while ARP not in frame:
        frame = Ether(stage.peer.receive_frame(deadline))
    assert (str(NEW[4]), "10.3.0.1") == (frame[ARP].psrc, frame[ARP].pdst)
    reply = Ether(dst=MAC["site"], src=MAC["peer"]) / ARP(
        op="is-at", hwsrc=MAC["peer"], psrc="10.3.0.1", hwdst=MAC["site"], pdst=str(NEW[4])
    )
    stage.peer.socket.send(bytes(reply))
    assert stage.expect(to_peer(stage, 4), src=NEW[4]) == stage.peer.receive(deadline)


@EACH_VERSION
def test_a_peer_on_the_gateway_itself_is_seen_beforehand(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """No chain of mode stateless meets what the gateway itself sends."""
    stage = make_stage(Role.GATEWAY)
    peer = ip_address("10.1.0.1" if version == 4 else "fd00:3::1")
    kept = Connections.of([FourTuple(Endpoint(peer, 5000), Endpoint(OLD[version], PORT))])
    site = Site(Role.GATEWAY, stage.netns)
    moves = {m: Move("web", (Map(OLD[version], NEW[version]),), (site,), m) for m in Mode}
    stage.kernel.open_sites((site,))

    seen = {mode: stage.kernel.look_around(move, kept).beside for mode, move in moves.items()}

    assert seen == {Mode.STATEFUL: frozenset(), Mode.STATELESS: frozenset((peer,))}


# ---- mode stateless: who has the tuple, and fragments --------------------------------------------


def is_translated(stage: Stage, version: int) -> bool:
    """Whether the kept connection's next segment is; if not, it must pass as it is."""
    packet = to_process(stage, version)
    [seen] = stage.inbound(packet)
    assert seen in (stage.expect(packet), stage.expect(packet, dst=stage.inside(version)))
    return seen != stage.expect(packet)


def marked(syn: Any) -> Any:
    """As the gateway passes it on."""
    from scapy.layers.inet import TCP

    found = syn.copy()
    found[TCP].urgptr = CRIU_MARK
    return found


def stateless(stage: Stage) -> Stage:
    """Prepared so, and the process has spoken: a gateway takes no reset from NEW before that."""
    stage.prepare(mode=Mode.STATELESS)
    for version in (4, 6) if stage.role == Role.GATEWAY else ():
        assert stage.outbound(to_peer(stage, version))
    return stage


@EACH_VERSION
@pytest.mark.parametrize("unhooked", [False, True])
def test_a_syn_goes_to_the_socket_that_has_the_tuple(
    make_stage: Callable[[Role], Stage], version: int, unhooked: bool
) -> None:
    stage = stateless(make_stage(Role.DESTINATION))
    if unhooked:
        stage.unhook()
    with entered(stage.netns):
        own = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        own.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        own.bind((str(OLD[version]), PORT))
        own.connect((str(PEER[version]), KEPT_PORT))
    syn = to_process(stage, version, flags="S", data=b"")

    with own:
        assert [stage.expect(syn, dst=OLD[version])] == stage.inbound(syn)
        assert [stage.expect(syn, dst=OLD[version])] == stage.inbound(marked(syn))
        assert is_translated(stage, version)


@EACH_VERSION
def test_without_a_socket_the_tuple_is_new_s_own_again(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = stateless(make_stage(Role.DESTINATION))
    with entered(stage.netns):
        # It has every address, and so is no sign of the connection.
        every = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    syn = to_process(stage, version, flags="S", data=b"")

    with every:
        assert [stage.expect(syn)] == stage.inbound(syn)
    assert not is_translated(stage, version)
    assert is_translated(stage, 10 - version)


@EACH_VERSION
def test_who_dialled_old_does_not_get_to_new_s_own_service(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = stateless(make_stage(Role.DESTINATION))

    assert stage.inbound(marked(to_process(stage, version, flags="S", data=b""))) == []
    assert is_translated(stage, version)


@EACH_VERSION
def test_a_listener_s_answer_gives_the_tuple_back(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = stateless(make_stage(Role.DESTINATION))

    assert stage.outbound(to_peer(stage, version, flags="SA", data=b"")) == []
    assert not is_translated(stage, version)
    assert is_translated(stage, 10 - version)


@EACH_VERSION
def test_the_gateway_passes_a_syn_on_and_lets_the_tuple_go_when_no_socket_has_it(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = stateless(make_stage(Role.GATEWAY))
    syn = to_process(stage, version, flags="S", data=b"")
    refused = to_peer(stage, version, flags="RA", seq=0, data=b"")

    assert [stage.expect(marked(syn), dst=NEW[version])] == stage.inbound(syn)
    assert is_translated(stage, version)
    assert stage.outbound(refused) == []
    assert [stage.expect(syn)] == stage.inbound(syn)
    assert not is_translated(stage, version)
    assert [stage.expect(refused)] == stage.outbound(refused)
    assert is_translated(stage, 10 - version)


@EACH_VERSION
def test_the_gateway_lets_the_tuple_go_that_a_service_of_new_has(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = stateless(make_stage(Role.GATEWAY))
    answer = to_peer(stage, version, flags="SA", data=b"")
    data = to_peer(stage, version)

    assert [stage.expect(answer)] == stage.outbound(answer)
    assert [stage.expect(data)] == stage.outbound(data)
    assert not is_translated(stage, version)


@EACH_VERSION
@EACH_ROLE
@pytest.mark.parametrize("flags", ["R", "RA", "F", "FA", "FPA", "SF", "SA", "", "FSRPAU"])
def test_nothing_that_a_peer_says_lets_a_tuple_go(
    make_stage: Callable[[Role], Stage], version: int, role: Role, flags: str
) -> None:
    stage = stateless(make_stage(role))
    for seq in (0, 1):
        packet = to_process(stage, version, flags=flags, seq=seq, data=b"")
        assert [stage.expect(packet, dst=stage.inside(version))] == stage.inbound(packet)

    assert is_translated(stage, version)


@EACH_VERSION
@pytest.mark.parametrize(("flags", "seq"), [("R", 0), ("R", 5), ("RA", 5), ("FA", 0), ("A", 0)])
def test_what_the_process_says_at_its_end_lets_no_tuple_go(
    make_stage: Callable[[Role], Stage], version: int, flags: str, seq: int
) -> None:
    stage = stateless(make_stage(Role.GATEWAY))
    packet = to_peer(stage, version, flags=flags, seq=seq, data=b"")

    assert [stage.expect(packet, src=OLD[version])] == stage.outbound(packet)
    assert is_translated(stage, version)


def fragments(packet: Any) -> list[Any]:
    """*packet* in three parts, the last of them without any port."""
    from scapy.layers.inet import IP, fragment
    from scapy.layers.inet6 import IPv6ExtHdrFragment

    if packet.version == 4:
        whole = IP(bytes(packet))
        whole.flags = 0
        return list(fragment(whole, fragsize=400))
    data = bytes(packet.payload)
    parts = []
    for at in range(0, len(data), 400):
        more = int(at + 400 < len(data))
        about = IPv6ExtHdrFragment(nh=6, id=77, offset=at // 8, m=more)
        parts.append(header(ip_address(packet.src), ip_address(packet.dst)) / about)
        parts[-1] /= data[at : at + 400]
    return parts


@EACH_VERSION
@EACH_ROLE
def test_all_fragments_of_a_packet_are_translated(
    make_stage: Callable[[Role], Stage], version: int, role: Role
) -> None:
    stage = stateless(make_stage(role))
    inward = to_process(stage, version, data=bytes(1000))
    outward = to_peer(stage, version, data=bytes(1000))

    came = [seen for part in fragments(inward) for seen in stage.inbound(part)]
    ways = [(came, stage.inside(version), stage.outside(version))]
    if role == Role.GATEWAY:
        left = [seen for part in fragments(outward) for seen in stage.outbound(part)]
        ways.append((left, stage.outside(version), stage.inside(version)))

    for found, translated, other in ways:
        assert sum(len(packet) for packet in found) > 1000
        assert all(translated.packed in packet[:40] for packet in found)
        assert not any(other.packed in packet[:40] for packet in found)


# ---- peers that have moved as well ---------------------------------------------------------------

MOVED = {4: ip_address("10.4.0.30"), 6: ip_address("fd00:4::30")}
PEER_MAPS = tuple(Map(PEER[version], MOVED[version]) for version in (4, 6))


def from_moved(version: int, **more: Any) -> Any:
    """A segment of the kept connection, from where its peer is now."""
    return segment(MOVED[version], KEPT_PORT, NEW[version], PORT, **more)


def known(stage: Stage, version: int, packet: Any) -> bytes:
    """The same as the process gets it."""
    return stage.expect(packet, src=PEER[version], dst=OLD[version])


@pytest.mark.parametrize("hooked", [True, False])
@EACH_VERSION
def test_a_peer_that_has_moved_is_to_the_process_where_it_was(
    make_stage: Callable[[Role], Stage], version: int, hooked: bool
) -> None:
    """Both addresses change and nothing else; what comes from where it was is another's."""
    stage = make_stage(Role.DESTINATION)
    plan = stage.prepare(opened=False, peer_maps=PEER_MAPS)
    packet, answer = from_moved(version), to_peer(stage, version)
    assert stage.inbound(packet) == []

    stage.apply(plan.open)
    if not hooked:
        stage.unhook()

    assert [known(stage, version, packet)] == stage.inbound(packet)
    sent = stage.expect(answer, src=NEW[version], dst=MOVED[version])
    assert [sent] == stage.outbound(answer)
    other = segment(PEER[version], KEPT_PORT, NEW[version], PORT)
    assert [stage.expect(other)] == stage.inbound(other)
    [site] = plan.move.sites
    assert find_drift(plan, site, stage.kernel.observe(site, plan)) == ()


@pytest.mark.parametrize("done", WITHOUT_ENTRY)
@EACH_VERSION
def test_so_it_is_without_an_entry(
    make_stage: Callable[[Role], Stage], version: int, done: str
) -> None:
    stage = make_stage(Role.DESTINATION)
    stage.prepare(peer_maps=PEER_MAPS)

    for flags in FLAGS:
        stage.run(stage.netns, "sh", "-ec", WITHOUT_ENTRY[done])
        packet = from_moved(version, flags=flags)
        assert [known(stage, version, packet)] == stage.inbound(packet), flags
        stage.run(stage.netns, "conntrack", "-F")
        packet = to_peer(stage, version, flags=flags)
        passed = [] if flags == "SA" else [packet]
        wanted = [stage.expect(one, src=NEW[version], dst=MOVED[version]) for one in passed]
        assert wanted == stage.outbound(packet), flags


@pytest.mark.parametrize("direction", ["in", "to"])
@EACH_VERSION
def test_what_is_half_translated_reaches_no_socket(
    make_stage: Callable[[Role], Stage], version: int, direction: str
) -> None:
    """It would be answered with a reset, from NEW or with OLD's tuple translated."""
    stage = make_stage(Role.DESTINATION)
    stage.prepare(peer_maps=PEER_MAPS)
    local = str((NEW if direction == "in" else OLD)[version]).replace(":", "_")
    for chain in (f"{direction}-at-{local}", f"invalid-{direction}-at-{local}"):
        stage.run(stage.netns, "nft", "flush", "chain", "inet", "natkeep", chain)

    for flags in ("PA", "FA", "R"):
        stage.run(stage.netns, "conntrack", "-F")
        assert stage.inbound(from_moved(version, flags=flags)) == []


@EACH_VERSION
def test_a_reset_from_where_the_peer_is_now_waits_until_it_was_heard(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    stage = make_stage(Role.DESTINATION)
    plan = stage.prepare(peer_maps=PEER_MAPS)
    reset, packet = from_moved(version, flags="R", data=b""), from_moved(version)
    assert stage.inbound(reset) == []
    assert stage.heard() == 0

    assert [known(stage, version, packet)] == stage.inbound(packet)

    assert [known(stage, version, reset)] == stage.inbound(reset)
    assert stage.heard() == 1
    stage.run(stage.netns, "conntrack", "-F")  # so that no entry counts what came from it
    stage.outbound(to_peer(stage, version))
    [site] = plan.move.sites
    heard = stage.kernel.observe(site, plan).heard
    assert [one in heard for t in plan.translations for one in t.kept.each()] == [
        version == 4, version == 6
    ]  # fmt: skip


@EACH_VERSION
def test_a_peer_that_has_moved_to_the_destination_itself_is_seen_beforehand(
    make_stage: Callable[[Role], Stage], version: int
) -> None:
    """What lo carries is not translated, whatever a map says."""
    stage = make_stage(Role.DESTINATION)
    _address(stage.run, stage.netns, "eth0", f"{MOVED[version]}/{MOVED[version].max_prefixlen}")
    maps, peers = (Map(OLD[version], NEW[version]),), (PEER_MAPS[(4, 6).index(version)],)
    move = Move("web", maps, (Site(Role.DESTINATION, stage.netns),), peer_maps=peers)
    kept = Connections.of(
        [FourTuple(Endpoint(PEER[version], KEPT_PORT), Endpoint(OLD[version], PORT))]
    )
    stage.kernel.open_sites(move.sites)

    with pytest.raises(RefusedError, match="is an address of the destination"):
        make_plan(move, kept, stage.kernel.look_around(move, kept))
