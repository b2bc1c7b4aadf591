"""A gateway that translates already: a published port, a masqueraded client.

Its own rules stay as they are; of the kept connections' entries natkeep changes nothing but OLD
into NEW. The peer goes on to see what was published, the process what it saw of the peer.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.lab import Lab
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation, usual_end
from natkeep.lab.topology import THIRD, address
from natkeep.plan.tuples import Endpoint

PUBLISHED, WIRE_PORT, CONNECTIONS = 8080, 9090, 3
translating = partial(situation, may_refuse=("stateless",))


@translating(16, "a published port")
def published(lab: Lab) -> None:
    """The peer talks to VIP:8080, which the gateway turns into OLD:5000."""
    _connect(lab, _publish(lab))
    usual_end(lab)


@translating(16, "a published port, moved on", probes=(True,), setup=THREE_HOSTS)
def published_moved_on(lab: Lab) -> None:
    """What the first move took over, the second takes over from it."""
    _connect(lab, _publish(lab))
    carry_on_after(lab, lab.move, partial(lab.move_on, THIRD))
    lab.finish()


@translating(16, "a published port, moved back", probes=(True,))
def published_moved_back(lab: Lab) -> None:
    """The gateway's own translation is as it was."""
    _connect(lab, _publish(lab))
    carry_on_after(lab, lab.move, lab.move_back)
    lab.finish()


@translating(16, "a published port, entries deleted")
def published_deleted(lab: Lab) -> None:
    """What the gateway published is in the rules, too."""
    _connect(lab, _publish(lab))
    _go_on_without_entries(lab)


@translating(16, "a published port, to another port", probes=(True,))
def published_to_port(lab: Lab) -> None:
    """The client, the wire to NEW and the process have a port of their own each."""
    lab.wire_port = WIRE_PORT
    _connect(lab, _publish(lab))
    _go_on_without_entries(lab)


@translating(17, "a masqueraded client")
def masqueraded(lab: Lab) -> None:
    """The process sees the gateway as its peer, and a port that the gateway chose."""
    _masquerade(lab)
    _connect(lab, lab.server_endpoint)
    usual_end(lab)


@translating(17, "a masqueraded client, to another port", probes=(True,))
def masqueraded_to_port(lab: Lab) -> None:
    """Both ends are translated, with their ports."""
    lab.wire_port = WIRE_PORT
    _masquerade(lab)
    _connect(lab, lab.server_endpoint)
    _go_on_without_entries(lab)


@translating(17, "a masqueraded client, entries deleted")
def masqueraded_deleted(lab: Lab) -> None:
    """It is not masqueraded anew, by another port."""
    _masquerade(lab)
    _connect(lab, lab.server_endpoint)
    _go_on_without_entries(lab)


def _go_on_without_entries(lab: Lab) -> None:
    """Either side speaks first, then closes; the last words where conntrack picks nothing up."""
    carry_on_after(lab, lab.move)
    lab.conditions.delete_entries("gateway")
    lab.traffic.talk_on()
    lab.traffic.quiet()
    for loose in (1, 0):
        lab.conditions.conntrack_loose(loose)
        for says in (lab.traffic.server_says, lab.traffic.client_says):
            lab.conditions.delete_entries("gateway")
            says()
    lab.traffic.client_closes()
    lab.traffic.server_closes()
    lab.conditions.conntrack_loose(1)
    lab.finish()


def _masquerade(lab: Lab) -> None:
    lab.topology["gateway"].nft(
        "add table inet masquerading\n"
        "add chain inet masquerading post { type nat hook postrouting priority srcnat; }\n"
        'add rule inet masquerading post iifname "near" meta l4proto tcp'
        " masquerade to :20000-20999\n"
    )
    lab.settle()


def _publish(lab: Lab) -> Endpoint:
    """A port of the gateway's, which its own rule turns into OLD's."""
    lab.settle()
    vip = Endpoint(address("near", 100, lab.family), PUBLISHED)
    ip, length = ("ip", 24) if lab.family == 4 else ("ip6", 64)
    nodad = ["nodad"] if lab.family == 6 else []
    gateway = lab.topology["gateway"]
    gateway.run("ip", "address", "add", f"{vip.address}/{length}", "dev", "near", *nodad)
    gateway.nft(
        "add table inet published\n"
        "add chain inet published pre { type nat hook prerouting priority dstnat; }\n"
        f"add rule inet published pre {ip} daddr {vip.address} tcp dport {vip.port}"
        f" dnat {ip} to {lab.server_endpoint}\n"
    )
    return vip


def _connect(lab: Lab, target: Endpoint) -> None:
    lab.serve()
    lab.traffic.dial_one_by_one(lab.topology["client"], target, CONNECTIONS)
    lab.traffic.talk()
