"""What a gateway's entry says of a connection, beside its tuples, decides whether packets pass.

A mark that was given to the SYN chooses the uplink of the answers; packets are tracked in a zone;
the gateway has answered the SYN itself, and shifts sequence numbers and time stamps ever since.
An entry that is made anew says the same, and the gateway's own comes back as it was.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.lab import Lab
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation, usual_end
from natkeep.lab.topology import THIRD

_BARE_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


@situation(27, "answers pass by the connection's mark")
def marked(lab: Lab) -> None:
    """As with two uplinks: who has not the mark that its SYN was given is not let out."""
    _mark(lab)
    lab.begin()
    usual_end(lab)


@situation(27, "by its mark, moved on and back", probes=(True,), setup=THREE_HOSTS)
def marked_moved_on_and_back(lab: Lab) -> None:
    """The second move finds the first one's entry, and the last gives the gateway its own back."""
    _mark(lab)
    lab.begin()
    carry_on_after(lab, lab.move, partial(lab.move_on, THIRD), lab.move_back)
    lab.finish()


@situation(28, "tracked in a zone, tcp_loose=0")
def in_a_zone(lab: Lab) -> None:
    """All packets are; without an entry in that zone nothing is picked up."""
    _filter(lab, "prerouting", "raw", "ct zone set 7")
    lab.conditions.gateway_tracks()
    lab.conditions.conntrack_loose(0)
    lab.begin()
    usual_end(lab)


@situation(28, "the original direction tracked in a zone", probes=(True,))
def original_direction_in_a_zone(lab: Lab) -> None:
    """As tenants with the same addresses are told apart; the reply direction is in zone 0."""
    _filter(lab, "prerouting", "raw", 'iifname "near" ct original zone set 7')
    lab.conditions.gateway_tracks()
    lab.conditions.conntrack_loose(0)
    lab.begin()
    usual_end(lab)


@situation(28, "each direction tracked in another zone")
def each_direction_in_its_zone(lab: Lab) -> None:
    """By the device: either direction has an entry of its own."""
    _filter(lab, "prerouting", "raw", 'iifname "near" ct zone set 7')
    lab.conditions.gateway_tracks()
    lab.begin()
    usual_end(lab)


def _mark(lab: Lab) -> None:
    _filter(lab, "prerouting", "mangle", f'iifname "near" {_BARE_SYN} ct mark set 2')
    _filter(lab, "forward", "filter", 'oifname "near" ct mark != 2 drop')


def _filter(lab: Lab, hook: str, priority: str, rule: str) -> None:
    """A chain of the gateway's own, with one rule."""
    chain = f"inet others {hook}"
    lab.topology["gateway"].nft(
        "add table inet others\n"
        f"add chain {chain} {{ type filter hook {hook} priority {priority}; }}\n"
        f"add rule {chain} {rule}\n"
    )


@situation(30, "the gateway answers SYNs (SYNPROXY)")
def behind_synproxy(lab: Lab) -> None:
    """It shifts sequence numbers and time stamps of each connection, as long as that lasts."""
    lab.topology["gateway"].nft(
        "add table inet answering\n"
        "add chain inet answering raw { type filter hook prerouting priority raw; }\n"
        f'add rule inet answering raw iifname "near" {_BARE_SYN} notrack\n'
        "add chain inet answering pass { type filter hook forward priority 0; }\n"
        'add rule inet answering pass iifname "near" ct state invalid,untracked'
        " synproxy mss 1460 wscale 7 timestamp sack-perm\n"
        "add rule inet answering pass ct state invalid drop\n"
    )
    lab.conditions.conntrack_loose(0)
    lab.begin()
    usual_end(lab)
