"""The peers' own hosts translate, and nothing between them and the destination does.

    client 10.1.0.2 ── eth0 ─────── router ─────── source 10.2.0.10 (OLD)        before
    OLD⇄NEW         ── eth0 ─────── router ─────── destination 10.3.0.20 (NEW)   afterwards

    peer = PeerHost(lab); peer.begin(); peer.move(); lab.traffic.talk_on(); peer.finish()

What passes a client's own wire then says NEW; it is judged as its process sees it, which may have
dialled a service address that its host translates.
Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from natkeep.lab.capture import Frame
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.topology import prefix
from natkeep.lab.traffic_words import PORT
from natkeep.plan.tuples import Endpoint, FourTuple

SERVICE = {4: ip_address("10.96.0.10"), 6: ip_address("fd00:96::10")}
SERVICE_PORT = 80


class PeerHost:
    """The hosts of *lab*'s clients of these *roles*, which are sites of role peer."""

    def __init__(self, lab: Lab, roles: tuple[str, ...] = ("client",)) -> None:
        self.lab = lab
        lab.crosses, lab.peer_sites = False, roles
        lab.select_frames = self._as_the_client_sees_them

    def begin(self, *, connections: int = 1, pause: bool = False) -> None:
        """As Lab.begin."""
        self.lab.begin(connections=connections, pause=pause)

    def move(self) -> None:
        """As Lab.move."""
        self.lab.move()

    def finish(self) -> None:
        """As Lab.finish."""
        self.lab.finish()

    def begin_by_service(self, *, connections: int = 1, pause: bool = False) -> None:
        """As `lab.begin`, by the address of a service, which the client's host makes OLD."""
        lab = self.lab
        lab.settle()
        ip, address = "ip" if lab.family == 4 else "ip6", SERVICE[lab.family]
        old = f"{lab.old}" if lab.family == 4 else f"[{lab.old}]"
        lab.topology["client"].nft(
            "add table inet service\n"
            "add chain inet service out { type nat hook output priority -100; }\n"
            f"add rule inet service out {ip} daddr {address} tcp dport {SERVICE_PORT} "
            f"dnat {ip} to {old}:{PORT}\n"
        )
        lab.serve()
        to = Endpoint(address, SERVICE_PORT)
        lab.traffic.dial_one_by_one(lab.topology["client"], to, connections)
        lab.traffic.talk()
        if pause:
            lab.traffic.quiet()

    def lose_route(self) -> None:
        """From here on the client's host has a route to NEW, and none to OLD."""
        lab, client = self.lab, self.lab.topology["client"]
        version = f"-{lab.family}"
        [via] = [
            word
            for line in client.run("ip", version, "route", "show", "default").stdout.splitlines()
            for before, word in zip(line.split(), line.split()[1:], strict=False)
            if before == "via"
        ]
        client.run("ip", version, "route", "add", prefix("far", lab.family), "via", via)
        client.run("ip", version, "route", "del", "default")

    def _as_the_client_sees_them(self, frames: Frames) -> Frames:
        lab = self.lab
        ends = {tuple_.destination for tuple_ in lab.traffic.kept}
        news = {lab.new, *(order.new for order in lab.orders)}
        wires = [lab.server_endpoint, *(Endpoint(new, lab.wire_port) for new in news)]
        names = {wire: end for end in ends for wire in wires}

        def turn(frame: Frame) -> Frame:
            if (segment := frame.segment) is None:
                return frame
            source, destination = segment.tuple.source, segment.tuple.destination
            both = FourTuple(names.get(source, source), names.get(destination, destination))
            return replace(frame, segment=replace(segment, tuple=both))

        return {**frames, **{at: [*map(turn, frames[at])] for at in (*lab.peer_sites, "near")}}
