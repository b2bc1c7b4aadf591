"""What a destination says to OLD that is not kept is routed as before, and comes back."""

from __future__ import annotations

import errno
import itertools
import json
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from kernel.conftest import Picture

from natkeep.errors import RefusedError
from natkeep.kernel import ip_rules
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lifecycle.check import check
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.ip_rules import MOST, IpRule, rules_of, stay
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
ROUTER = {4: ip_address("10.3.0.1"), 6: ip_address("fd00:3::1")}
BOTH = pytest.mark.parametrize("version", [4, 6])


class Hosts:
    """B, which has NEW, and A with OLD, on a link of their own.

    routed: OLD is behind A's address on that link; else it is an address of the link.
    """

    def __init__(
        self, make_netns: Callable[..., str], run: Callable[..., str], path: Path, *, routed: bool
    ) -> None:
        self.run = run
        self.b, self.a = make_netns(), make_netns()
        self("b", "ip link add eth0 type veth peer name eth0 netns " + self.a)
        for host, addresses in (("b", NEW), ("a", ROUTER)):
            self(host, "ip link set lo up")
            self(host, "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0")
            for address, length in zip(addresses.values(), (24, 64), strict=True):
                self(host, f"ip addr add {address}/{length} dev eth0 nodad")
            self(host, "ip link set eth0 addrgenmode none up")
        for version, old in OLD.items():
            at = "lo" if routed else "eth0"
            self("a", f"ip addr add {old}/{old.max_prefixlen} dev {at} nodad")
            way = f"via {ROUTER[version]}" if routed else "dev eth0"
            self("b", f"ip -{version} route add {old} {way}")
            self("b", f"ip -{version} route add {PEER[version]} via {ROUTER[version]}")
        for netns in (self.a, self.b):
            await_addresses(netns)
        self.state = StateDirectory(str(path), create=True)
        self.executor = Executor(LinuxKernel(self.state.path), self.state)
        self.site = Site(Role.DESTINATION, self.b)

    def __call__(self, host: str, words: str) -> str:
        return self.run({"a": self.a, "b": self.b}[host], *words.split())

    def move(
        self, version: int, mode: Mode = Mode.STATEFUL, move_id: str = "web", *ports: int
    ) -> Move:
        listeners = tuple(Endpoint(OLD[version], port) for port in ports)
        map_ = Map(OLD[version], NEW[version])
        return Move(move_id, (map_,), (self.site,), mode, listeners=listeners)

    def inside(self, host: str) -> object:
        return entered({"a": self.a, "b": self.b}[host])

    def listen(self, host: str, address: Address, port: int) -> socket.socket:
        with self.inside(host):  # type: ignore[attr-defined]
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            return socket.create_server((str(address), port), family=family)

    def dial(self, host: str, address: Address, port: int) -> socket.socket:
        with self.inside(host):  # type: ignore[attr-defined]
            return socket.create_connection((str(address), port), timeout=5)

    def echo(self, host: str, source: Address, to: Address) -> None:
        """An ICMP echo and its reply."""
        six = to.version == 6
        family, protocol = (socket.AF_INET6, 58) if six else (socket.AF_INET, 1)
        kinds = (128, 129) if six else (8, 0)
        with self.inside(host):  # type: ignore[attr-defined]
            raw = socket.socket(family, socket.SOCK_RAW, protocol)
        with raw:
            raw.settimeout(10)
            raw.bind((str(source), 0))
            checksum = 0 if six else 0xFFFF - (kinds[0] << 8) - 7
            raw.sendto(struct.pack("!BBHHH", kinds[0], 0, checksum, 7, 0), (str(to), 0))
            while True:
                said, (by, *_) = raw.recvfrom(99)
                if said[0 if six else 20] == kinds[1] and by == str(to):
                    return

    def rules(self) -> list[str]:
        return [self("b", f"ip -{v} rule") for v in (4, 6)]


@pytest.fixture(params=[True, False], ids=["routed", "neighbour"])
def hosts(
    request: pytest.FixtureRequest,
    make_netns: Callable[..., str],
    run: Callable[..., str],
    tmp_path: Path,
) -> Hosts:
    return Hosts(make_netns, run, tmp_path / "state", routed=request.param)


def kept(version: int, peer: Address | None = None, port: int = 50001) -> Connections:
    peer = peer or PEER[version]
    return Connections.of([FourTuple(Endpoint(peer, port), Endpoint(OLD[version], 5000))])


def say(one: socket.socket, other: socket.socket) -> None:
    """Both ways."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"ping")
        receiver.settimeout(10)
        assert receiver.recv(9) == b"ping"


def talk(hosts: Hosts, version: int, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """What stands goes on; TCP from either side, UDP and ICMP begin anew."""
    for pair in pairs:
        say(*pair)
    for port, (dialling, listening), address in (
        (22, ("b", "a"), OLD[version]),
        (23, ("a", "b"), NEW[version]),
    ):
        with hosts.listen(listening, address, port) as listener:
            source = (str(OLD[version]), 0)
            if dialling == "a":
                with hosts.inside("a"):  # type: ignore[attr-defined]
                    caller = socket.create_connection((str(address), port), 5, source)
            else:
                caller = hosts.dial("b", address, port)
            with caller, listener.accept()[0] as accepted:
                say(caller, accepted)
    hosts.echo("b", NEW[version], OLD[version])
    hosts.echo("a", OLD[version], NEW[version])
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with hosts.inside("a"):  # type: ignore[attr-defined]
        there = socket.socket(family, socket.SOCK_DGRAM)
    with hosts.inside("b"):  # type: ignore[attr-defined]
        here = socket.socket(family, socket.SOCK_DGRAM)
    with there, here:
        there.bind((str(OLD[version]), 53))
        here.connect((str(OLD[version]), 53))
        here.send(b"query")
        there.settimeout(10)
        there.sendto(b"answer", there.recvfrom(9)[1])
        here.settimeout(10)
        assert here.recv(9) == b"answer"


@BOTH
@pytest.mark.parametrize("mode", list(Mode))
def test_a_destination_talks_with_the_host_that_has_old(
    hosts: Hosts, version: int, mode: Mode, take_picture: Picture
) -> None:
    """An ssh in mid-line goes on, a new one begins, from before prepare to after teardown."""
    hosts("b", "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1")
    listener = hosts.listen("a", OLD[version], 2222)
    mine = hosts.dial("b", OLD[version], 2222)
    pairs = [(mine, listener.accept()[0])]
    talk(hosts, version, pairs)
    before = hosts.rules(), *(hosts("b", f"ip -{v} route show table all") for v in (4, 6))
    picture = take_picture(hosts.b)
    ports = (5001,) if mode == Mode.STATEFUL else ()

    prepare(hosts.executor, hosts.move(version, mode, "web", *ports), kept(version))
    talk(hosts, version, pairs)
    open_move(hosts.executor, "web")
    talk(hosts, version, pairs)
    assert [one.drift for one in read_status(hosts.executor, ("web",))[0].sites] == [()]
    teardown(hosts.executor, "web")

    assert before == (
        hosts.rules(),
        *(hosts("b", f"ip -{v} route show table all") for v in (4, 6)),
    )
    assert picture[1:6] == take_picture(hosts.b)[1:6]
    talk(hosts, version, pairs)
    for one in (listener, *itertools.chain(*pairs)):
        one.close()


@BOTH
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_a_destination_that_forwards_passes_on_what_others_say_to_old(
    hosts: Hosts, version: int, mode: Mode, make_netns: Callable[..., str], take_picture: Picture
) -> None:
    """A container behind the destination dials the source, and the source dials it."""
    for family in (4, 6):
        hosts("b", f"sysctl -qw net.ipv{family}.conf.all.forwarding=1")
    behind = Behind(hosts, make_netns())
    listener = hosts.listen("a", OLD[version], 2222)
    caller = behind.dial(OLD[version], 2222)
    pair = (caller, listener.accept()[0])
    picture = take_picture(hosts.b)

    prepare(hosts.executor, hosts.move(version, mode), kept(version))
    for change in (lambda: None, lambda: open_move(hosts.executor, "web")):
        change()
        say(*pair)
        with behind.dial(OLD[version], 2222) as another, listener.accept()[0] as accepted:
            say(another, accepted)
        with behind.listen(23) as there, hosts.inside("a"):  # type: ignore[attr-defined]
            source = (str(OLD[version]), 0)
            called = socket.create_connection((str(behind.at[version]), 23), 5, source)
            with called, there.accept()[0] as accepted:
                say(called, accepted)
    assert [one.drift for one in read_status(hosts.executor, ("web",))[0].sites] == [()]
    teardown(hosts.executor, "web")

    assert picture[1:6] == take_picture(hosts.b)[1:6]
    for one in (listener, *pair):
        one.close()


class Behind:
    """A host whose router B is."""

    def __init__(self, hosts: Hosts, name: str) -> None:
        self.hosts, self.name = hosts, name
        self.at = {4: ip_address("10.8.0.2"), 6: ip_address("fd00:8::2")}
        hosts("b", f"ip link add eth1 type veth peer name eth0 netns {name}")
        hosts.run(name, "ip", "link", "set", "lo", "up")
        for netns, device, host in ((hosts.b, "eth1", 1), (name, "eth0", 2)):
            for address in (f"10.8.0.{host}/24", f"fd00:8::{host}/64"):
                hosts.run(netns, *f"ip addr add {address} dev {device} nodad".split())
            hosts.run(netns, *f"ip link set {device} addrgenmode none up".split())
        # What a router asks its neighbours has its link-local address.
        links = ((hosts.a, "eth0"), (hosts.b, "eth0"), (hosts.b, "eth1"), (name, "eth0"))
        for number, (netns, device) in enumerate(links, 1):
            hosts.run(netns, *f"ip addr add fe80::{number}/64 dev {device} nodad".split())
        for version, router, via in ((4, "10.8.0.1", NEW[4]), (6, "fd00:8::1", NEW[6])):
            hosts.run(name, *f"ip -{version} route add default via {router}".split())
            hosts("a", f"ip -{version} route add {self.at[version]} via {via}")
        for netns in (hosts.a, hosts.b, name):
            await_addresses(netns)

    def listen(self, port: int) -> socket.socket:
        with entered(self.name):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    def dial(self, address: Address, port: int) -> socket.socket:
        with entered(self.name):
            return socket.create_connection((str(address), port), timeout=5)


@BOTH
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_old_is_on_no_wire_as_the_source_of_what_this_host_says(hosts: Hosts, version: int) -> None:
    prepare(hosts.executor, hosts.move(version), kept(version))
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with hosts.inside("a"):  # type: ignore[attr-defined]
        heard = socket.socket(family, socket.SOCK_DGRAM)
    with hosts.inside("b"):  # type: ignore[attr-defined]
        told = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(2)]
    heard.bind((str(ROUTER[version]), 53))
    heard.settimeout(10)

    for one, source in zip(told, (OLD[version], NEW[version]), strict=True):
        one.bind((str(source), 0))
        with suppress(PermissionError):  # as the kernel says where a rule has dropped it
            one.sendto(str(source).encode(), (str(ROUTER[version]), 53))

    assert heard.recv(99) == str(NEW[version]).encode()
    for one in (heard, *told):
        one.close()
    teardown(hosts.executor, "web")


@BOTH
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_without_policy_routing_what_talks_with_old_is_named_and_nothing_changed(
    hosts: Hosts, version: int, monkeypatch: pytest.MonkeyPatch, take_picture: Picture
) -> None:
    """No kernel here is without it: what it says of the rules' families is."""
    listener = hosts.listen("a", OLD[version], 2222)
    mine = hosts.dial("b", OLD[version], 2222)
    picture = take_picture(hosts.b)

    def refuse(netlink: object, version: int, *_: object) -> Iterator[bytes]:
        raise OSError(errno.EAFNOSUPPORT, "no rules")

    real = ip_rules.Netlink.request
    monkeypatch.setattr(
        ip_rules.Netlink,
        "request",
        lambda self, type_, *rest: (refuse if 32 <= type_ <= 34 else real)(self, type_, *rest),
    )
    with pytest.raises(RefusedError, match="this host talks with OLD: ") as caught:
        check(hosts.executor, hosts.move(version), kept(version))
    assert f"python, {Endpoint(OLD[version], 2222)}" in re.sub(r"python[0-9.]*|pytest", "python",
                                                              str(caught.value))  # fmt: skip
    assert picture[1:6] == take_picture(hosts.b)[1:6]

    mine.close()
    listener.close()
    prepare(hosts.executor, hosts.move(version), kept(version))
    assert [one.drift for one in read_status(hosts.executor, ("web",))[0].sites] == [()]
    teardown(hosts.executor, "web")


@BOTH
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_what_belongs_to_the_move_stays_on_this_host(hosts: Hosts, version: int) -> None:
    """A kept peer that is here, what CRIU and a holder mark, calls to a listener that moved."""
    prepare(
        hosts.executor,
        hosts.move(version, Mode.STATEFUL, "web", 5001),
        kept(version, NEW[version], 40000),
    )

    def way(words: str) -> str:
        answer = hosts("b", f"ip -{version} -j route get {OLD[version]} {words}")
        return str(json.loads(answer)[0]["dev"])

    assert way("") == "eth0"
    assert way("mark 0xc114") == "lo"
    assert way(f"from {NEW[version]} ipproto tcp sport 40000 dport 5000") == "lo"
    assert way(f"from {NEW[version]} ipproto tcp sport 40001 dport 5000") == "eth0"
    assert way("ipproto tcp dport 5001") == "lo"
    assert way("ipproto udp dport 5001") == "eth0"
    teardown(hosts.executor, "web")


@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_other_rules_are_asked_as_before(hosts: Hosts) -> None:
    """Local behind others, one of another's in between, VRF's order; all as it was afterwards."""
    hosts("b", "ip rule add pref 32765 lookup local")
    hosts("b", "ip rule del pref 0")
    hosts("b", "ip rule add pref 1000 to 10.9.0.0/16 lookup 100")
    hosts("b", f"ip rule add pref 32766 to {OLD[4]} ipproto tcp dport 7 lookup 101")
    hosts("b", "ip route add unreachable default table 101")
    before = hosts.rules()

    prepare(hosts.executor, hosts.move(4), kept(4))
    said = hosts.rules()[0].splitlines()
    of_all = [line for line in said if line.endswith("from all lookup local")]
    assert of_all == ["32765:\tfrom all lookup local"]
    assert next(i for i, line in enumerate(said) if "goto" in line) < next(
        i for i, line in enumerate(said) if line.endswith("from all lookup local")
    )
    talk(hosts, 4, [])
    teardown(hosts.executor, "web")

    assert hosts.rules() == before


@BOTH
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_two_moves_share_the_rules_of_an_old_and_the_last_takes_them_away(
    hosts: Hosts, version: int, tmp_path: Path
) -> None:
    before = hosts.rules()
    state = StateDirectory(str(tmp_path / "another"), create=True)
    other = Executor(LinuxKernel(state.path), state)
    prepare(hosts.executor, hosts.move(version), kept(version))
    one = hosts.rules()
    prepare(hosts.executor, hosts.move(version, move_id="two"), kept(version, port=50002))
    prepare(other, hosts.move(version, move_id="three"), kept(version, port=50003))
    assert hosts.rules() == one

    teardown(hosts.executor, "web")
    teardown(hosts.executor, "two")
    assert hosts.rules() == one
    teardown(other, "three")
    assert hosts.rules() == before


@BOTH
@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_what_another_program_removed_is_drift_and_put_back(hosts: Hosts, version: int) -> None:
    before = hosts.rules()
    prepare(hosts.executor, hosts.move(version), kept(version, NEW[version], 40000))
    whole = hosts.rules()
    hosts("b", f"ip -{version} rule del from {NEW[version]} to {OLD[version]} table local")
    hosts("b", f"ip -{version} rule del to {OLD[version]} iif lo goto 1")

    [status] = read_status(hosts.executor, ("web",))
    assert {*status.sites[0].drift} == {
        f"ip rule from {NEW[version]} to {OLD[version]} ipproto tcp sport 40000 dport 5000 lookup "
        "local: gone from in front of local",
        f"ip rule from all to {OLD[version]} iif lo goto: gone from in front of local",
    }
    [repaired] = repair(hosts.executor, "web")
    assert len(repaired.drift) == 2
    assert [sorted(some.split("\n")) for some in hosts.rules()] == [
        sorted(some.split("\n")) for some in whole
    ]
    assert repair(hosts.executor, "web") == ()
    teardown(hosts.executor, "web")
    assert hosts.rules() == before


@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_gc_takes_rules_away_that_no_journal_knows(hosts: Hosts) -> None:
    before = hosts.rules()
    with hosts.inside("b"):  # type: ignore[attr-defined]
        ip_rules.add([rule for old in OLD.values() for rule in rules_of(old)])
    assert hosts.rules() != before

    cleared = gc(hosts.executor, (hosts.site,)).cleared

    assert {one.name.partition(" ")[0] for one in cleared} == {str(old) for old in OLD.values()}
    assert hosts.rules() == before


@pytest.mark.parametrize("hosts", [True], indirect=True)
def test_an_addition_that_was_killed_in_the_middle_is_done_and_undone(hosts: Hosts) -> None:
    before = hosts.rules()
    rules = [*rules_of(OLD[4]), IpRule(4, OLD[4], dport=5001)]
    request = ip_rules._Rules._request

    class KilledError(BaseException):
        pass

    for last in range(9):
        counted = iter(range(last))
        with hosts.inside("b"), pytest.MonkeyPatch.context() as patch:  # type: ignore[attr-defined]

            def strike(
                self: ip_rules._Rules, type_: int, body: bytes, counted: Iterator[int] = counted
            ) -> None:
                if next(counted, None) is None:
                    raise KilledError
                request(self, type_, body)

            patch.setattr(ip_rules._Rules, "_request", strike)
            try:
                ip_rules.add(rules)
                done = True
            except KilledError:
                done = False
        local = [
            line for line in hosts.rules()[0].splitlines() if line.endswith("all lookup local")
        ]
        assert local
        with hosts.inside("b"):  # type: ignore[attr-defined]
            if last % 2:
                ip_rules.add(rules)
                assert set(rules) <= (ip_rules.find_standing(4) or set())
            ip_rules.remove(rules[2:], [OLD[4]])
        assert hosts.rules() == before
    assert done


@BOTH
@pytest.mark.parametrize("hosts", [False], indirect=True)
def test_an_address_that_the_host_serves_already_is_left_alone(
    hosts: Hosts, version: int, take_picture: Picture
) -> None:
    """Anycast: another program's peer of OLD here, and OLD's neighbours, notice nothing."""
    old = OLD[version]
    hosts("a", f"ip addr del {old}/{old.max_prefixlen} dev eth0")
    hosts("a", f"ip -{version} route add {old} dev eth0")
    hosts("b", f"ip -{version} route del {old}")
    hosts("b", f"ip addr add {old}/{old.max_prefixlen} dev eth0 nodad")
    picture, rules = take_picture(hosts.b), hosts.rules()
    with hosts.listen("b", old, 6000) as listener, hosts.dial("a", old, 6000) as caller:
        pair = (caller, listener.accept()[0])
        say(*pair)
        prepare(hosts.executor, hosts.move(version), kept(version))
        assert hosts.rules() == rules
        hosts("a", f"ip -{version} neigh flush dev eth0")
        say(*pair)
        hosts.echo("a", ROUTER[version], old)
        hosts.echo("b", old, ROUTER[version])
        with hosts.dial("a", old, 6000) as second, listener.accept()[0] as accepted:
            say(second, accepted)
        open_move(hosts.executor, "web")
        say(*pair)
        assert [one.drift for one in read_status(hosts.executor, ("web",))[0].sites] == [()]
        assert repair(hosts.executor, "web") == ()
        teardown(hosts.executor, "web")
        say(*pair)
        pair[1].close()
    assert hosts.rules() == rules
    assert f"{old}/" in hosts("b", "ip addr show dev eth0")
    assert picture[1:6] == take_picture(hosts.b)[1:6]


def test_many_peers_on_the_host_have_a_rule_for_each_port_of_the_end_with_fewer() -> None:
    local = Endpoint(OLD[4], 5000)
    tuples = [FourTuple(Endpoint(NEW[4], 40000 + i), local) for i in range(MOST + 1)]

    assert len(stay(tuples[:MOST], (), frozenset())) == MOST
    assert stay(tuples, (), frozenset()) == (IpRule(4, OLD[4], NEW[4], 0, 5000),)
    assert stay(tuples, (), frozenset({OLD[4]})) == ()


def test_the_command_of_a_rule_is_what_ip_shows() -> None:
    said = [str(rule) for rule in (*rules_of(OLD[4]), IpRule(4, OLD[4], NEW[4], 1, 2))]

    assert said == [
        "from all fwmark 0xc114 lookup local",
        f"from {OLD[4]} to {OLD[4]} lookup local",
        f"from 127.0.0.0/8 to {OLD[4]} lookup local",
        f"from all to {OLD[4]} iif lo goto",
        f"from {NEW[4]} to {OLD[4]} ipproto tcp sport 1 dport 2 lookup local",
    ]
    assert subprocess.run(["ip", "rule", "help"], capture_output=True, check=False).stderr


@pytest.mark.parametrize("version", [4, 6])
def test_what_was_never_on_a_wire_stays_on_the_host(version: int, hosts: Hosts) -> None:
    """A lost connection whose other end was on the source's loopback, or at OLD: it is reset."""
    prepare(hosts.executor, hosts.move(version), kept(version))
    bound = {4: ("127.0.0.1", OLD[4]), 6: ("::1", OLD[6])}[version]
    for source in bound:
        told = hosts("b", f"ip route get {OLD[version]} from {source}")
        assert "dev lo" in told, source
    assert "dev eth0" in hosts("b", f"ip route get {OLD[version]}")
    teardown(hosts.executor, "web")
