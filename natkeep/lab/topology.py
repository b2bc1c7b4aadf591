"""The lab network: hosts that are namespaces, and the wires between them.

Each host's network namespace has a name under /run/netns, `natkeep-lab-HEX-ROLE`, so that
`natkeep --site gateway=NAME` works. Every network is a bridge in one more namespace, the
switch, which also holds the anti-spoof filter:

    client 10.1.0.2 ─┐ near            ┌─ old ── source      10.2.0.10  (OLD)
    client2 10.1.0.3 ┴──── gateway ────┼─ far ── destination 10.3.0.20  (NEW)
                           10.x.0.1    └─ third ─ third      10.4.0.30
    (IPv6 likewise: fd00:1::2, fd00:2::10, fd00:3::20, fd00:4::30, gateway fd00:x::1)

In front of a network that is `routed` stands one more router, NET-router, which is then its
10.x.0.1; its other side, 10.10x.0.2, is linked to the gateway.

Rule: what is made is registered for removal on the line where it is made, and removed in
reverse order. A lab whose owner died is recognised by its lock, which is no longer held.
This file must never touch a namespace that does not bear the lab's own prefix.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from natkeep.lab.host import NAMES, Host, LabError
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.time_scale import scaled

PREFIX = "natkeep-lab-"
LOCKS = Path("/run/natkeep-lab")
NETWORKS = {"near": 1, "old": 2, "far": 3, "third": 4}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a host sits: its role, its network, its number there, and its first pid."""

    role: str
    network: str
    number: int
    first_pid: int = 0  # pids of a process that moves must be free at the other end

    def address(self, family: int) -> Address:
        """The host's address of IP version *family*, 4 or 6."""
        return address(self.network, self.number, family)


CLIENT = Seat("client", "near", 2)
SECOND_CLIENT = Seat("client2", "near", 3)
SOURCE = Seat("source", "old", 10, first_pid=1000)
DESTINATION = Seat("destination", "far", 20)
THIRD = Seat("third", "third", 30)
BESIDE = Seat("beside", "near", 30)
"""Where a process moves on to on the peers' own link."""
USUAL = (CLIENT, SOURCE, DESTINATION)


def address(network: str, number: int, family: int) -> Address:
    """Host *number* of *network*: 10.3.0.20 or fd00:3::20."""
    net = NETWORKS[network]
    return ipaddress.ip_address(f"10.{net}.0.{number}" if family == 4 else f"fd00:{net}::{number}")


def prefix(network: str, family: int) -> str:
    """The network itself: 10.3.0.0/24 or fd00:3::/64."""
    return f"{address(network, 0, family)}/{24 if family == 4 else 64}"


def transfer(network: str, number: int, family: int) -> Address:
    """Between the gateway (1) and the router (2) of a routed *network*."""
    net = 100 + NETWORKS[network]
    return ipaddress.ip_address(f"10.{net}.0.{number}" if family == 4 else f"fd00:{net}::{number}")


def router(network: str) -> str:
    """The role of the router of a routed *network*."""
    return f"{network}-router"


class Topology:
    """All hosts of one lab; a context manager that leaves nothing behind."""

    def __init__(self, seats: Iterable[Seat] = USUAL, *, routed: Iterable[str] = ()) -> None:
        self.seats, self.routed = tuple(seats), tuple(routed)
        self.hex = secrets.token_hex(4)
        self.hosts: dict[str, Host] = {}
        self._stack = contextlib.ExitStack()
        self.directory = Path()

    def __enter__(self) -> Topology:
        sweep()
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __getitem__(self, role: str) -> Host:
        return self.hosts[role]

    @property
    def sites(self) -> tuple[str, ...]:
        """The roles at which a translator works: the gateway and what is beyond it."""
        beyond = (seat.role for seat in self.seats if seat.network not in ("near", "old"))
        ends = DESTINATION.role, BESIDE.role
        here = (s.role for s in self.seats if s.network == "near" and s.role in ends)
        return ("gateway", *beyond, *here)

    @property
    def peers(self) -> tuple[str, ...]:
        """The roles of the hosts on the peers' side."""
        beside = (SOURCE.role, THIRD.role, *self.sites)
        near = (seat.role for seat in self.seats if seat.network == "near")
        return tuple(role for role in near if role not in beside)

    def defer(self, undo: Callable[..., object], *args: object) -> None:
        """Have *undo* called when the lab ends, before what was deferred earlier."""
        self._stack.callback(undo, *args)

    def name(self, role: str) -> str:
        """The network namespace name of *role*."""
        return f"{PREFIX}{self.hex}-{role}"

    def _build(self) -> None:
        self._lock()
        self._take_one_processor()
        self.directory = _directory(self.hex)
        self.directory.mkdir(mode=0o700)
        self._stack.callback(shutil.rmtree, self.directory, True)
        routers = [router(net) for net in self.routed]
        roles = ["switch", "gateway", *routers, *(seat.role for seat in self.seats)]
        self._stack.callback(remove_names, [self.name(role) for role in roles])
        _ip([f"netns add {self.name(role)}" for role in roles] + self._links())
        scripts = {"switch": self._switch_script(), "gateway": self._gateway_script()}
        scripts |= {seat.role: _host_script(seat) for seat in self.seats}
        scripts |= {router(net): _router_script(net) for net in self.routed}
        first_pids = {seat.role: seat.first_pid for seat in self.seats}
        for role in roles:
            host = Host(role, self.name(role), self.directory)
            self.hosts[role] = host
            self._stack.callback(host.shut)
            host.boot(scripts[role], first_pid=first_pids.get(role, 0))
        for host in self.hosts.values():
            host.await_boot()
        for role in roles:
            if role != "switch":  # it has no IPv6
                await_addresses(self.name(role), link_local=True)

    def _lock(self) -> None:
        path = LOCKS / self.hex
        with _registry():  # a sweep must not find the file before it is locked
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._stack.callback(os.close, lock)
            self._stack.callback(path.unlink, True)
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _take_one_processor(self) -> None:
        """Have all of the lab run on one processor.

        A veth hands a frame over on the sender's processor, so that an acknowledgement sent by
        one overtakes data sent by another; on one they keep their order, and whatever steps
        back on a wire is a fault.
        """
        usual = os.sched_getaffinity(0)
        self._stack.callback(os.sched_setaffinity, 0, usual)
        os.sched_setaffinity(0, {sorted(usual)[int(self.hex, 16) % len(usual)]})

    def _used(self) -> list[str]:
        return [net for net in NETWORKS if any(seat.network == net for seat in self.seats)]

    def _links(self) -> list[str]:
        """A veth from each host, and one a network from the gateway, to the switch.

        The ports have indexes that no host has: to the kernel a veth whose peer has its own
        index is not worth a hurry, and its carrier comes up to a second late (linkwatch.c).
        """
        switch = self.name("switch")
        ends = [(self.name(seat.role), "eth0", seat.role) for seat in self.seats]
        ends += [
            (self.name(router(net)), "downlink", f"gw-{net}")
            if net in self.routed
            else (self.name("gateway"), net, f"gw-{net}")
            for net in self._used()
        ]
        return [
            f"link add {port} index {index} netns {switch} type veth"
            f" peer name {inside} netns {name}"
            for index, (name, inside, port) in enumerate(ends, 100)
        ] + [
            f"link add uplink index {index} netns {self.name(router(net))} type veth"
            f" peer name {net} netns {self.name('gateway')}"
            for index, net in enumerate(self.routed, 200)
        ]

    def _switch_script(self) -> str:
        links = []
        for net in self._used():
            links.append(f"link add br-{net} type bridge mcast_snooping 0")
            ports = [seat.role for seat in self.seats if seat.network == net]
            links += [f"link set {port} master br-{net} up" for port in [*ports, f"gw-{net}"]]
            links.append(f"link set br-{net} up")
        # br_netfilter would show bridged frames to the ip hooks of this namespace (H32)
        quiet = (
            "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6\n"
            "for f in /proc/sys/net/bridge/bridge-nf-call-*; do"
            " if [ -e $f ]; then echo 0 >$f; fi; done\n"
        )
        guarded = [s for s in self.seats if s.role in self.sites]
        # What moves away from there has an address that no host beyond may claim.
        spoofs = [s for s in self.seats if s.network == "old" or (s.first_pid and s not in guarded)]
        return quiet + _batch(links) + _heredoc("nft -f -", anti_spoof(guarded, spoofs))

    def _gateway_script(self) -> str:
        lines = ["link set lo up"]
        for net in self._used():
            at = transfer if net in self.routed else address
            lines += _addresses(net, partial(at, net, 1))
        for net in self.routed:
            lines += [f"route add {prefix(net, v)} via {transfer(net, 2, v)}" for v in (4, 6)]
        return _FORWARD + _SETTLED + _batch(lines)


def anti_spoof(guarded: Iterable[Seat], spoofs: Sequence[Seat]) -> str:
    """The nft script that drops, at the ports of *guarded*, each frame that claims *spoofs*.

    Clouds have this filter in front of every host: IP, IPv6, ARP and neighbour discovery (whose
    target is at octet 8 of the ICMPv6 message). Without it untranslated packets would get through
    here, because the destination's own ARP teaches the gateway where OLD is now.
    """
    lines = ["add table netdev antispoof", "add counter netdev antispoof spoofed"]
    for port in (seat.role for seat in guarded):
        chain = f"netdev antispoof {port}"
        lines.append(f"add chain {chain} {{ type filter hook ingress device {port} priority 0; }}")
        for old4, old6 in ((spoof.address(4), spoof.address(6)) for spoof in spoofs):
            target = f"@th,64,128 {int(old6):#x}"
            lines += [
                f"add rule {chain} {match} counter name spoofed drop"
                for match in (
                    f"ip saddr {old4}",
                    f"arp saddr ip {old4}",
                    f"ip6 saddr {old6}",
                    f"icmpv6 type nd-neighbor-advert {target}",
                    f"icmpv6 type nd-neighbor-solicit {target}",
                )
            ]
    return "\n".join(lines) + "\n"


_FORWARD = (
    "echo 1 >/proc/sys/net/ipv4/ip_forward\n"
    "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding\n"
)  # fmt: skip

# Duplicate address detection would hold every address back for a second, and a machine's own
# choice of rp_filter should not decide what a lab shows.
_SETTLED = (
    "for f in /proc/sys/net/ipv6/conf/*/accept_dad /proc/sys/net/ipv6/conf/*/accept_ra"
    " /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done\n"
    # Nor should its congestion control: one that paces (BBR) stamps segments with the time at
    # which they are to leave, up to some 40 ms ahead of its clock. CRIU saves the clock, so the
    # restored process would seem to step back by just that, whatever the network does.
    "echo reno >/proc/sys/net/ipv4/tcp_congestion_control\n"
)


def _addresses(device: str, at: Callable[[int], Address]) -> list[str]:
    return [
        f"address add {at(4)}/24 dev {device}",
        f"address add {at(6)}/64 dev {device} nodad",
        f"link set {device} up",
    ]


def _router_script(network: str) -> str:
    return _FORWARD + _SETTLED + _batch([
        "link set lo up",
        *_addresses("uplink", partial(transfer, network, 2)),
        *_addresses("downlink", partial(address, network, 1)),
        *(f"route add default via {transfer(network, 1, v)}" for v in (4, 6)),
    ])  # fmt: skip


def _host_script(seat: Seat) -> str:
    return _SETTLED + _batch([
        "link set lo up",
        *_addresses("eth0", seat.address),
        *(f"route add default via {address(seat.network, 1, v)}" for v in (4, 6)),
    ])  # fmt: skip


def remove_names(names: Iterable[str]) -> None:
    """Delete the network namespace names that exist."""
    doomed = [name for name in names if (NAMES / name).exists()]
    if doomed:
        _ip([f"netns delete {name}" for name in doomed], force=True)


def hex_of(name: str) -> str:
    """Which lab a name with its PREFIX is of: a namespace's, a directory's, a cgroup's."""
    return name[len(PREFIX) :].partition("-")[0]


def sweep() -> list[str]:
    """Remove the names and files of labs whose owner is dead; returns the names removed.

    An owner holds the lock of its lab as long as it lives, so a lock that can be had, or is
    missing, says that the name has no owner.
    """
    removed: list[str] = []
    with _registry():
        names = [p.name for p in NAMES.glob(f"{PREFIX}*")] if NAMES.is_dir() else []
        locks = [p.name for p in LOCKS.iterdir()]
        for hex_ in {hex_of(name) for name in names} | set(locks):
            if _owned(LOCKS / hex_):
                continue
            own = [name for name in names if name.startswith(f"{PREFIX}{hex_}-")]
            remove_names(own)
            removed += own
            shutil.rmtree(_directory(hex_), ignore_errors=True)
            (LOCKS / hex_).unlink(missing_ok=True)
    return removed


def _directory(hex_: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{PREFIX}{hex_}"


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    """No other process makes or sweeps labs meanwhile."""
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    registry = os.open(LOCKS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(registry, fcntl.LOCK_EX)
        yield
    finally:
        os.close(registry)


def _owned(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _batch(lines: Iterable[str]) -> str:
    return _heredoc("ip -batch -", "\n".join(lines) + "\n")


def _heredoc(command: str, text: str) -> str:
    return f"{command} <<'END'\n{text}END\n"


def _ip(lines: Iterable[str], *, force: bool = False) -> None:
    done = subprocess.run(
        ["ip", *(["-force"] if force else []), "-batch", "-"],
        input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=scaled(20),
    )  # fmt: skip
    if done.returncode and not force:
        raise LabError(f"ip: {done.stderr.strip()}")
