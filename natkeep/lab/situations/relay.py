"""The source goes on as a relay (lab/relay.py): routed, and with all hosts on one switch.

The relay and the destination translate both ends: with entries, and without any.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.engine import Opening, end_silence
from natkeep.lab.lab import Lab
from natkeep.lab.relay import A_THIRD, FLAT, FLAT_ON, ByRelay, ByThird
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation
from natkeep.lab.situations.roles import begin_dialled
from natkeep.lab.situations.two_ends import (
    FIRST_WORDS,
    flushed_before_fins,
    in_order,
    narrow,
    not_loose,
    under_traffic,
)
from natkeep.lab.topology import BESIDE, THIRD, Seat
from natkeep.lab.translators import Natkeep

WHERE = ("source", "destination")

by_relay = partial(situation, may_refuse=("stateless",))


for _name, _setup in {"by a relay": {}, "by a relay on one link": FLAT}.items():
    by_relay(33, _name, setup=_setup)(under_traffic(ByRelay, WHERE))
by_relay(33, "by a relay, tcp_loose=0")(not_loose(ByRelay, WHERE))
for _name, _words in FIRST_WORDS.items():
    by_relay(33, f"by a relay, {_name}")(in_order(ByRelay, *_words))


by_relay(33, "by a relay, entries flushed before a FIN", probes=(True,))(
    flushed_before_fins(ByRelay, WHERE)
)
for _end, _network in {"the client": "near", "the relay": "old", "the destination": "far"}.items():
    by_relay(33, f"by a relay, path MTU drops at {_end}", setup={"routed": (_network,)})(
        narrow(ByRelay, _network)
    )


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


def _point_elsewhere(site: Seat, lab: Lab) -> None:
    """From A to B, to C, and home; no host has an entry any more before each of them."""
    by = ByRelay(lab)
    by.begin(connections=3)
    carry_on_after(lab, by.move)
    for move in (partial(by.move_on, site), by.move_back):
        for role in WHERE:
            lab.conditions.flush_conntrack(role)
        carry_on_after(lab, move)
    by.finish()


by_relay(33, "by a relay, moved on and back", setup=THREE_HOSTS)(partial(_point_elsewhere, THIRD))
by_relay(33, "by a relay, moved on and back on one link", setup=FLAT_ON)(
    partial(_point_elsewhere, BESIDE)
)


by_relay(33, "by a relay, moved on and back by CRIU", engine="criu", probes=(True,), setup=FLAT_ON)(
    partial(_point_elsewhere, BESIDE)
)


# The source's link goes down.
by_relay(33, "by a third host that takes OLD over", setup=A_THIRD)(
    under_traffic(ByThird, (ByThird.role, "destination"))
)


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
