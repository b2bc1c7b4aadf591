"""The source goes on as a relay: what peers send to OLD it passes on from an address of its own.

    client 10.1.0.2 ── router ── source 10.2.0.10 (OLD), 10.2.0.11 (FROM) ── router ── destination
                                                                                    10.3.0.20 (NEW)
or, with FLAT, all three on one switch, 10.1.0.x, and nothing between them:

    by = ByRelay(lab); by.begin(); by.move(); lab.traffic.talk_on(); by.finish()

With A_THIRD there is one more host on that switch, 10.1.0.30 (FROM), which takes OLD over:
`ByThird` instead of `ByRelay`.

In front of each host is an anti-spoof filter: it may send from its own addresses only. What passes
the destination's wire says FROM:q and NEW; it is judged as the peers see it.

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

from natkeep.errors import RefusedError
from natkeep.lab.capture import Frame, beyond_gateway
from natkeep.lab.engine import end_silence
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.topology import BESIDE, THIRD, Address, Seat, address
from natkeep.lab.translators import Natkeep, TranslatorError
from natkeep.plan.tuples import Endpoint, FourTuple

SOURCE = Seat("source", "near", 10, first_pid=1000)
DESTINATION = Seat("destination", "near", 20)
FLAT = {"seats": (Seat("client", "near", 2), SOURCE, DESTINATION)}
FLAT_ON = {"seats": (*FLAT["seats"], BESIDE)}
A_THIRD = {"seats": (*FLAT["seats"], replace(THIRD, network="near"))}
_DIALS = 20
_ANNOUNCE = """
import socket, sys
device, address = sys.argv[1], socket.inet_aton(sys.argv[2])
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind((device, 0))
    own = sock.getsockname()[4]
    asks = bytes.fromhex("0001080006040001") + own + address + bytes(6) + address
    sock.send(b"\\xff" * 6 + own + b"\\x08\\x06" + asks)
"""
_DIAL = f"""
import socket, sys
here, new, port = sys.argv[1:]
for _ in range({_DIALS}):
    dialled = socket.socket(socket.AF_INET6 if ":" in new else socket.AF_INET)
    dialled.settimeout(2)
    dialled.bind((here, 0))
    own = dialled.getsockname()[1]
    try:
        dialled.connect((new, int(port)))
    except ConnectionRefusedError:
        print(own)
    except OSError:
        pass
    dialled.close()
"""
_BEHIND_OLD = 1
"""The relay's address of its own is the next one behind OLD."""


class ByRelay:
    """The source of *lab* as the relay of its server, once that has moved."""

    role = SOURCE.role

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.crosses, lab.relay = False, self.role
        seats = {seat.role: seat for seat in lab.topology.seats}
        lab.home, lab.site = seats["source"], seats["destination"]
        self.source = address(lab.home.network, lab.home.number + _BEHIND_OLD, lab.family)
        self.peers: dict[FourTuple, Endpoint] = {}
        self.own = set[Endpoint]()  # of connections of the relay's own
        lab.select_frames = self._as_the_peers_see_them

    def begin(self, *, connections: int = 1, pause: bool = False) -> None:
        """The relay gets its other address; then as Lab.begin."""
        self.stand()
        self.lab.begin(connections=connections, pause=pause)

    def stand(self) -> None:
        """The relay's addresses, and the filters in front of all hosts."""
        self.add_source()
        extra = self.source, self.lab.home.address(self.lab.family)
        filters = own_addresses(self.lab.topology.seats, self.role, extra)
        self.lab.topology["switch"].nft(filters)

    def add_source(self) -> None:
        """The relay has an address beside OLD."""
        self._add_address(self.source)

    def _add_address(self, new: Address) -> None:
        nodad = ["nodad"] if new.version == 6 else []
        prefix = f"{new}/{24 if new.version == 4 else 64}"
        self.lab.topology[self.role].run("ip", "address", "add", prefix, "dev", "eth0", *nodad)

    def move(self) -> None:
        """Freeze, prepare, restore; natkeep's gate takes the place of the engine's silence."""
        self.lab.freeze()
        self.lab.prepare()
        self.read_wires()
        self.take_over()
        self.lab.restore()

    def take_over(self) -> None:
        """What peers send to OLD reaches the prepared relay from here on."""
        end_silence(self.lab.topology["source"])

    def move_on(self, site: Seat) -> None:
        """The process moves on to *site*, where the relay is pointed; forwarding is as it was."""
        settings = self.read_settings()
        self.close()
        self.lab.move_on(site)
        self.read_wires()
        name = "the relay has the same forwarding switched on"
        self.lab.report.check(name, self.read_settings() == settings, f"{settings}")

    def move_back(self) -> None:
        """The process comes home."""
        self.close()
        self.lab.move_back()

    def close(self) -> None:
        """Before a dump at the destination."""
        with self.lab.report.must("the gate closes before the freeze"):
            self.lab.translator.close(self.lab.order)

    def check_stacked(self, site: Seat) -> None:
        """A further relay, at the destination towards *site*, is refused, and names the cure."""
        lab, here = self.lab, self.lab.topology[self.lab.site.role]
        via = address(lab.site.network, lab.site.number + _BEHIND_OLD, lab.family)
        stacked = (
            "stacked", f"--map={lab.old}={site.address(lab.family)}", f"--via={via}",
            f"--site=relay={here.name}", *lab.frozen.options,
        )  # fmt: skip
        for more in ((), ("--replace", lab.order.id)):
            try:
                self._call("prepare", *stacked, *more)
                said, ok = "it is not refused", False
            except TranslatorError as error:
                said = str(error)
                ok = error.code == RefusedError.exit_code and f"--replace {lab.order.id}" in said
            lab.report.check(f"a relay behind the relay is refused {' '.join(more)}", ok, said)

    def read_wires(self) -> None:
        """Which FROM:q stands for which peer, as natkeep's status says."""
        if not isinstance(self.lab.translator, Natkeep):
            return
        self.note_wires(self._call("status", self.lab.order.id, "--json"))

    def note_wires(self, status: str) -> None:
        """The same of what `status --json` has printed."""
        with self.lab.report.must("status names the relay's address and port of each connection"):
            document = json.loads(status)
            for each in document["moves"][0]["connections"]:
                peer, local = (Endpoint.parse(each["wire"][end]) for end in ("peer", "local"))
                self.peers[FourTuple(peer, local)] = Endpoint.parse(each["peer"])
            if {each.source.address for each in self.peers} != {self.source}:
                raise TranslatorError(f"{document} names other addresses than {self.source}")

    def check_strangers(self) -> None:
        """The relay is no router: what others send by it to the destination goes no further."""
        lab, client = self.lab, self.lab.topology["client"]
        ip, new = f"-{lab.family}", str(lab.new)
        prefix = f"{new}/{lab.new.max_prefixlen}"
        client.run("ip", ip, "route", "add", prefix, "via", str(self.source))
        done = client.run("ping", ip, "-c", "2", "-i", "0.2", "-W", "1", new, check=False)
        client.run("ip", ip, "route", "del", prefix)
        lab.report.check(
            "the relay passes no stranger's packets on", done.returncode != 0, done.stdout.strip()
        )

    def check_own_dials(self) -> None:
        """Its own connections from FROM to NEW and the server's port are answered: by a reset."""
        lab, new = self.lab, (str(self.lab.new), str(self.lab.server_endpoint.port))
        script = (sys.executable, "-c", _DIAL, str(self.source), *new)
        ports = lab.topology["source"].run(*script, timeout=60).stdout.split()
        self.own = {Endpoint(self.source, int(port)) for port in ports}
        name = "the relay's own connections to NEW are answered"
        lab.report.check(name, len(ports) == _DIALS, f"{len(ports)} of {_DIALS}")

    def break_and_repair(self) -> None:
        """Another program flushes the relay's rules and ends its forwarding, in a pause."""
        lab, source = self.lab, self.lab.topology["source"]
        lab.traffic.quiet()
        time.sleep(1)  # until nothing is said again: what comes while there are no rules is reset
        source.run("nft", "flush", "ruleset")
        for step in self.read_settings():
            source.run("sysctl", "-qw", f"net/{step}=0")
        with lab.report.must("repair at the relay"):
            self._call("repair", lab.order.id)

    def boot(self, status: str, ruleset: str) -> int:
        """The relay has booted: it has its addresses, and of all rules *ruleset* alone.

        status: what `status --json` said of the move there. So the relay is left in the end.
        Returns since when it is on the link again, in nanoseconds of time.time_ns.
        """
        host, seat = self.lab.topology[self.role], self.lab.home
        self._stop_flooding()
        host.run("ip", "link", "set", "eth0", "down")
        host.run("ip", "address", "flush", "dev", "eth0")
        host.nft(f"flush ruleset\n{ruleset}")
        host.run("conntrack", "-F")
        for setting in self.settings_of(status):
            host.run("sysctl", "-qw", f"net/{setting}=0")
        host.run("ip", "link", "set", "eth0", "up")
        up_ns = time.time_ns()
        self._add_address(seat.address(self.lab.family))
        self.add_source()
        self.lab.read_sites(anew=(self.role,))
        return up_ns

    def _stop_flooding(self) -> None:
        """No other port of the switch has frames for a host that is not there.

        A card would discard them, but the capture at that port would have them.
        """
        for seat in self.lab.topology.seats:
            if seat.role != self.role:
                line = f"link set dev {seat.role} flood off"
                self.lab.topology["switch"].run("bridge", *line.split())

    def _call(self, verb: str, *arguments: str) -> str:
        if not isinstance(self.lab.translator, Natkeep):
            raise TranslatorError(f"{self.lab.translator.name} has no {verb}")
        return self.lab.translator.call(verb, *arguments)

    def read_settings(self) -> list[str]:
        """What natkeep has switched on at the relay."""
        return self.settings_of(self._call("status", self.lab.order.id, "--json"))

    @staticmethod
    def settings_of(status: str) -> list[str]:
        """The same of what `status --json` has printed."""
        document = json.loads(status)
        [relay] = [each for each in document["moves"][0]["sites"] if each["role"] == "relay"]
        return [each["setting"] for each in relay["forwarding"]]

    def finish(self) -> None:
        """Check octets and four-tuples, and that no host has sent what is not its own."""
        self.check_spoofs()
        self.lab.finish()

    def check_spoofs(self) -> None:
        shown = self.lab.topology["switch"].run("nft", "-j", "list", "counters").stdout
        found = [each.get("counter") for each in json.loads(shown)["nftables"]]
        packets = sum(one["packets"] for one in found if one and one["name"] == "strange")
        self.lab.report.check(
            "no host sends what is not its own", not packets, f"{packets} packets"
        )

    def _as_the_peers_see_them(self, frames: Frames) -> Frames:
        points = [point for point in beyond_gateway(self.lab.topology) if point in frames]
        turned = {
            point: [self._turn(frame) for frame in frames[point] if self._is_judged(frame)]
            for point in points
        }
        return {**frames, **turned}

    def _is_judged(self, frame: Frame) -> bool:
        """On one link peers and relay speak of OLD in broadcasts, which the destination hears."""
        if frame.segment is None:
            return self.lab.home.network != "near"
        there = frame.segment.tuple
        return self.own.isdisjoint({there.source, there.destination})

    def _turn(self, frame: Frame) -> Frame:
        if (segment := frame.segment) is None:
            return frame
        there = segment.tuple
        if there in self.peers:
            there = FourTuple(self.peers[there], there.destination)
        elif there.reply() in self.peers:
            there = FourTuple(there.source, self.peers[there.reply()])
        return replace(frame, segment=replace(segment, tuple=there))


class ByThird(ByRelay):
    """A host beside the source of *lab* as the relay: OLD comes to it, and the source is gone."""

    role = THIRD.role

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.source = next(s for s in lab.topology.seats if s.role == self.role).address(lab.family)

    def add_source(self) -> None:
        """It has one already; and announces IPv6 addresses that it gets, with the override bit."""
        self._run("sysctl", "-qw", "net.ipv6.conf.eth0.ndisc_notify=1")

    def take_over(self) -> None:
        """The source's link is down from here on; OLD on the relay's device, told to the link."""
        self._stop_flooding()  # until the peers are told
        self.lab.topology["source"].run("ip", "link", "set", "eth0", "down")
        old = self.lab.old
        self._run("ip", "address", "add", f"{old}/{old.max_prefixlen}", "dev", "eth0")
        if old.version == 4:
            self._run(sys.executable, "-c", _ANNOUNCE, "eth0", str(old))

    def finish(self) -> None:
        """As ByRelay.finish; OLD goes before the translation does."""
        self.check_spoofs()
        self.lab.traffic.check_ends()
        old = self.lab.old
        self._run("ip", "address", "del", f"{old}/{old.max_prefixlen}", "dev", "eth0")
        self.lab.conclude()

    def _run(self, *argv: str) -> None:
        self.lab.topology[self.role].run(*argv)


def own_addresses(seats: Iterable[Seat], relay: str, more: Iterable[Address]) -> str:
    """The nft script that drops at each host's port what has another source than its own.

    more: addresses that the host with the role *relay* has, too, or will have.
    """
    lines = ["add table netdev own", "add counter netdev own strange"]
    for seat in seats:
        chain = f"netdev own {seat.role}"
        lines.append(
            f"add chain {chain} {{ type filter hook ingress device {seat.role} priority 5; }}"
        )
        extra = [str(each) for each in more] if seat.role == relay else []
        for version, ip, others in ((4, "ip", ()), (6, "ip6", ("fe80::/10", "::"))):
            own = [str(seat.address(version)), *others]
            own += [each for each in extra if (":" in each) == (version == 6)]
            listed = ", ".join(dict.fromkeys(own))
            lines.append(f"add rule {chain} {ip} saddr != {{ {listed} }} counter name strange drop")
    return "\n".join(lines) + "\n"
