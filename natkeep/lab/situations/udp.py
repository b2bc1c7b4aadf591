"""UDP: a server's socket for any peer, and connected sockets; in both directions (lab/udp.py).

The gateway knows all of these from before: without a purge its entries send everything to OLD, for
as long as a peer goes on to speak. Where no gateway translates the sockets are connected ones: a
peer that a relay has not heard of would be known by the relay's address.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from natkeep.lab import both_ends
from natkeep.lab.both_ends import BothEnds
from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.relay import FLAT, ByRelay
from natkeep.lab.situations import THREE_HOSTS, Moves, carry_on_after, situation
from natkeep.lab.situations.roles import begin_dialled
from natkeep.lab.situations.two_ends import Mover, at_port, by_gateway
from natkeep.lab.topology import THIRD
from natkeep.lab.traffic_words import PORT
from natkeep.lab.udp import Datagrams

BIG = 6000
"""Octets of a datagram that needs fragments."""
COUNT = 20


def udp(
    name: str, setup: Mapping[str, object] = {}, *, families: tuple[int, ...] = (4, 6)
) -> Callable[[Moves], Moves]:
    """A row of UDP; Lab gets *setup* as well."""
    return situation(
        35, f"UDP, {name}", families=families, probes=(True,), may_refuse=("stateless",),
        setup={**setup, "udp": True},
    )  # fmt: skip


@udp("a server's socket")
def server(lab: Lab) -> None:
    """Both sides speak, and a peer that comes afterwards is answered."""
    lab.conditions.gateway_tracks()
    lab.begin(connections=COUNT, pause=True)
    lab.move()
    _both_speak(lab)
    newcomer = lab.new_connections.dial(lab.old)
    lab.new_connections.are_accepted(newcomer)
    lab.finish()


@udp("a socket of all addresses")
def wildcard(lab: Lab) -> None:
    """What it says comes from the address that the kernel chooses: from NEW at the destination."""
    lab.conditions.gateway_tracks()
    every = "0.0.0.0" if lab.family == 4 else "[::]"
    lab.begin(connections=COUNT, listen=f"{every}:{PORT}", pause=True)
    lab.move()
    lab.traffic.client_says()  # or conntrack's entry would be one from NEW
    _both_speak(lab)
    lab.finish()


@udp("a socket of both families", families=(4,))
def both_families(lab: Lab) -> None:
    """To IPv6's sockets, one of them connected, IPv4 peers have IPv4-mapped addresses."""
    lab.conditions.gateway_tracks()
    lab.begin(connections=COUNT, listen=f"[::]:{PORT}", pause=True)
    connect(lab, 0)
    lab.move()
    lab.traffic.client_says()
    _both_speak(lab)
    lab.finish()


@udp("the process is the client")
def dialled(lab: Lab) -> None:
    """Its sockets are connected to a server, from ports that the kernel chose."""
    lab.conditions.gateway_tracks()
    begin_dialled(lab)
    lab.traffic.quiet()
    lab.move()
    _both_speak(lab)
    lab.finish()


@udp("peers speak during the blackout")
def spoken_to(lab: Lab) -> None:
    """What comes where the socket is not yet would be answered with an error of ICMP's."""
    lab.conditions.gateway_tracks()
    lab.begin(connections=COUNT)
    connect(lab)
    lab.move()
    lab.traffic.talk_on()
    lab.finish()


@udp("moved on and back", THREE_HOSTS)
def moved_on_and_back(lab: Lab) -> None:
    """Peers go on to speak all the time, by the server's socket and by a connected one."""
    lab.conditions.gateway_tracks()
    lab.begin(connections=COUNT)
    connect(lab, 0)
    carry_on_after(lab, lab.move, lambda: lab.move_on(THIRD), lab.move_back)
    lab.finish()


def _connected(make: Callable[[Lab], Mover], lab: Lab) -> None:
    """Both sides speak after a pause, by connected sockets."""
    lab.conditions.gateway_tracks()
    mover = make(lab)
    mover.begin(connections=COUNT, pause=True)
    connect(lab)
    mover.move()
    _both_speak(lab)
    mover.finish()


udp("connected sockets")(partial(_connected, by_gateway))
udp("by a relay")(partial(_connected, ByRelay))
udp("by a relay on one link", FLAT)(partial(_connected, ByRelay))
udp("the peers' own host")(partial(_connected, PeerHost))
udp("both ends move", both_ends.SETUP)(partial(_connected, BothEnds))


udp("to another port, a server's socket")(partial(at_port, server))
udp("to another port, connected sockets")(partial(at_port, partial(_connected, by_gateway)))
udp("to another port, by a relay")(partial(at_port, partial(_connected, ByRelay)))


def connect(lab: Lab, *peers: int) -> None:
    """The server gives each peer a socket of its own, and has no other; or only these get one."""
    assert isinstance(lab.traffic, Datagrams)
    lab.traffic.connect(*peers)


def _both_speak(lab: Lab) -> None:
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.traffic.server_says(BIG)
    lab.traffic.client_says(BIG)
