"""The source goes on as a relay (lab/relay.py): routed, and with all hosts on one switch.

The relay and the destination translate both ends: with entries, and without any.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from natkeep.lab.engine import Opening, end_silence
from natkeep.lab.lab import Lab
from natkeep.lab.relay import A_THIRD, FLAT, ByRelay, ByThird
from natkeep.lab.situations import Moves, situation
from natkeep.lab.situations.roles import begin_dialled
from natkeep.lab.translators import Natkeep

WHERE = ("source", "destination")
MUCH = 300_000

by_relay = partial(situation, may_refuse=("stateless",))


def _move_in_a_pause(lab: Lab) -> ByRelay:
    by = ByRelay(lab)
    by.begin(pause=True)
    by.move()
    return by


@by_relay(33, "by a relay")
def routed(lab: Lab) -> None:
    """Under traffic; then neither host has an entry any more, one after the other."""
    by = ByRelay(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    by.finish()


by_relay(33, "by a relay on one link", setup=FLAT)(routed)


@by_relay(33, "by a relay, tcp_loose=0")
def not_loose(lab: Lab) -> None:
    """Conntrack picks nothing up at any host; both sides speak, also without an entry."""
    lab.conditions.conntrack_loose(0)
    by = _move_in_a_pause(lab)
    for says in (lab.traffic.server_says, lab.traffic.client_says):
        says()
        for role in WHERE:
            lab.conditions.flush_conntrack(role)
    lab.traffic.server_says()
    lab.traffic.client_says()
    by.finish()


def _ends(*words: str) -> Moves:
    def moves(lab: Lab) -> None:
        by = _move_in_a_pause(lab)
        for word in words:
            getattr(lab.traffic, word)()
        by.finish()

    return moves


for _name, _words in {
    "the client says first": ("client_says", "server_says"),
    "the server says first": ("server_says", "client_says"),
    "the client closes first": ("client_closes", "server_says", "server_closes"),
    "the server closes first": ("server_closes", "client_closes"),
}.items():
    by_relay(33, f"by a relay, {_name}")(_ends(*_words))


@by_relay(33, "by a relay, entries flushed before a FIN", probes=(True,))
def flushed(lab: Lab) -> None:
    """At either host before either side closes."""
    by = _move_in_a_pause(lab)
    lab.traffic.client_says()
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
    lab.traffic.server_closes()
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
    lab.traffic.client_closes()
    by.finish()


def _narrow(network: str) -> Moves:
    def moves(lab: Lab) -> None:
        by = _move_in_a_pause(lab)
        lab.traffic.client_says()
        lab.conditions.path_mtu(network)
        lab.traffic.server_sends(MUCH)
        lab.traffic.client_sends(MUCH)
        lab.conditions.path_was_narrow(network)
        by.finish()

    return moves


for _end, _network in {"the client": "near", "the relay": "old", "the destination": "far"}.items():
    setup: dict[str, Any] = {"routed": (_network,)}
    by_relay(33, f"by a relay, path MTU drops at {_end}", setup=setup)(_narrow(_network))


@by_relay(33, "by a relay, rolled back", probes=(True,))
def rolled_back(lab: Lab) -> None:
    """The process is restored where it came from, while the relay's gate is closed."""
    by = ByRelay(lab)
    by.begin(connections=3)
    lab.freeze()
    lab.prepare()
    end_silence(lab.topology["source"])
    if isinstance(lab.translator, Natkeep):
        back = partial(lab.translator.call, "rollback", lab.order.id)
        with lab.report.must("the relay's gate closes"):
            back()
        lab.undone.append(lab.order)
        lab.restore_at_source(Opening(back))
    lab.traffic.talk_on()
    by.check_spoofs()
    lab.traffic.check_ends()
    lab.conclude(moved=False)


@by_relay(33, "by a third host that takes OLD over", setup=A_THIRD)
def taken_over(lab: Lab) -> None:
    """The source's link goes down; then neither host has an entry any more."""
    by = ByThird(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    for role in (by.role, "destination"):
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    by.finish()


def _behind_firewalls(lab: Lab, by: ByRelay) -> None:
    """Relay and destination accept the kept connections' ports and what conntrack knows."""
    for role in WHERE:
        ports = {each.destination.port for each in lab.traffic.views.values()}
        lab.conditions.known_ports(role, ports)
    by.move()
    lab.traffic.talk_on()
    by.finish()


@by_relay(33, "by a relay, strict firewalls")
def strict_firewalls(lab: Lab) -> None:
    """Policy drop at both hosts, for what they receive and what they pass on."""
    by = ByRelay(lab)
    by.begin(connections=3)
    _behind_firewalls(lab, by)


@by_relay(33, "by a relay, strict firewalls, the process is the client")
def dialled(lab: Lab) -> None:
    """The same where the process has dialled."""
    by = ByRelay(lab)
    begin_dialled(lab)
    by.stand()  # only now: the process would dial from FROM
    _behind_firewalls(lab, by)
