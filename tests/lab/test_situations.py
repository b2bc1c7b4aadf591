"""the situations of states, queues, roles, gateways, neighbours and further hops.

A representative part: each number, in a family and a mode that differ from one to the next;
`make matrix` tells all of them. Which are refused, and for what reason, is part of the table.
"""

from __future__ import annotations

import pytest

from natkeep.lab.matrix import Cell, Column, Outcome, find_situations, play
from natkeep.lab.situations import Situation

NUMBERS = range(12, 36)

KEPT = [
    ("CLOSE_WAIT", 4, "stateful"),
    ("FIN_WAIT2", 4, "stateful"),
    ("FIN_WAIT1", 6, "stateful"),
    ("LAST_ACK", 4, "stateless"),
    ("CLOSING", 6, "stateless"),
    ("unsent data at the freeze", 6, "stateful"),
    ("unsent data at the freeze, moved back", 4, "stateful"),
    ("full queues both ways", 4, "stateless"),
    ("bulk both ways at the freeze", 4, "stateful"),
    ("the process is the client", 4, "stateless"),
    ("IPv4-mapped sockets", 4, "stateful"),
    ("a published port", 6, "stateful"),
    ("a published port, moved on", 4, "stateful"),
    ("a published port, moved back", 4, "stateful"),
    ("a masqueraded client", 4, "stateful"),
    ("two processes, one NEW", 4, "stateful"),
    ("two processes, one tuple at NEW", 6, "stateful"),
    ("the peer is on the destination", 6, "stateful"),
    ("peers on source, loopback and a wire", 4, "stateful"),
    ("moved on", 6, "stateless"),
    ("moved on by CRIU", 4, "stateful"),
    ("moved back", 4, "stateful"),
    ("moved back by CRIU", 6, "stateful"),
    ("NEW serves the same port to others", 4, "stateful"),
    ("answers pass by the connection's mark", 6, "stateful"),
    ("answers pass by the connection's mark", 4, "stateless"),
    ("by its mark, moved on and back", 4, "stateful"),
    ("tracked in a zone, tcp_loose=0", 4, "stateful"),
    ("the original direction tracked in a zone", 4, "stateful"),
    ("each direction tracked in another zone", 6, "stateless"),
    ("rests, then the client ends it", 6, "stateful"),
    ("rests, then the process aborts", 4, "stateful"),
    ("entries deleted", 6, "stateless"),
    ("not tracked any more", 4, "stateful"),
    ("fragments", 4, "stateful"),
    ("fragments", 4, "stateless"),
    ("port dialled from again, the listener has moved", 4, "stateful"),
    ("port dialled from again, the old host serves", 6, "stateless"),
    ("the gateway answers SYNs (SYNPROXY)", 4, "stateful"),
    ("the gateway answers SYNs (SYNPROXY)", 6, "stateless"),
    ("by a relay", 6, "stateful"),
    ("by a relay on one link", 4, "stateful"),
    ("by a relay, tcp_loose=0", 6, "stateful"),
    ("by a relay, the client says first", 4, "stateful"),
    ("by a relay, the server says first", 6, "stateful"),
    ("by a relay, the client closes first", 4, "stateful"),
    ("by a relay, the server closes first", 6, "stateful"),
    ("by a relay, entries flushed before a FIN", 4, "stateful"),
    ("by a relay, path MTU drops at the client", 4, "stateful"),
    ("by a relay, path MTU drops at the relay", 6, "stateful"),
    ("by a relay, path MTU drops at the destination", 4, "stateful"),
    ("by a relay, rolled back", 6, "stateful"),
    ("by a relay, strict firewalls", 4, "stateful"),
    ("by a relay, strict firewalls, the process is the client", 6, "stateful"),
    ("by a relay, moved on and back", 6, "stateful"),
    ("by a relay, moved on and back on one link", 4, "stateful"),
    ("by a relay, moved on and back by CRIU", 6, "stateful"),
    ("default deny, by a relay", 4, "stateful"),
    ("default deny, the peers' own host", 6, "stateful"),
    ("both ends move by CRIU", 6, "stateful"),
    ("both ends move, one moves on by CRIU", 4, "stateful"),
    ("by a third host that takes OLD over", 4, "stateful"),
    ("by a third host that takes OLD over", 6, "stateful"),
    ("both ends move, tcp_loose=0", 4, "stateful"),
    ("both ends move, the client closes first", 6, "stateful"),
    ("both ends move, the server closes first", 4, "stateful"),
    ("both ends move, entries flushed before a FIN", 6, "stateful"),
    ("both ends move, path MTU drops", 4, "stateful"),
    ("both ends move, one moves on", 6, "stateful"),
    ("both ends move, a gateway for one", 4, "stateful"),
    ("the peers' own host, tcp_loose=0", 6, "stateful"),
    ("the peers' own host, the client closes first", 4, "stateful"),
    ("the peers' own host, the server closes first", 6, "stateful"),
    ("the peers' own host, flushed before a FIN", 4, "stateful"),
    ("the peers' own host knows a service address", 6, "stateful"),
    ("the peers' own host has no route to OLD", 4, "stateful"),
    ("the peers' own host, path MTU drops", 6, "stateful"),
    ("to another port, by a relay", 4, "stateful"),
    ("UDP, a server's socket", 6, "stateful"),
    ("UDP, a socket of all addresses", 6, "stateful"),
    ("UDP, a socket of both families", 4, "stateful"),
    ("UDP, moved on and back", 6, "stateful"),
    ("UDP, connected sockets", 4, "stateful"),
    ("UDP, the process is the client", 6, "stateful"),
    ("UDP, peers speak during the blackout", 4, "stateful"),
    ("UDP, by a relay", 6, "stateful"),
    ("UDP, by a relay on one link", 4, "stateful"),
    ("UDP, the peers' own host", 6, "stateful"),
    ("UDP, both ends move", 4, "stateful"),
]
REFUSED = [
    ("a published port", 4, "stateless", "conntrack's work"),
    ("a masqueraded client", 6, "stateless", "conntrack's work"),
    ("the peer is on the source", 4, "stateful", "is on the source host too"),
    ("the peer is loopback", 6, "stateless", "is not on any wire"),
    ("NEW has the very same tuple", 4, "stateful", "> 10.3.0.20:5000"),
    ("both ends move", 4, "stateless", "translates no peers"),
    ("by a relay", 4, "stateless", "is not for a move by a relay"),
    ("the peers' own host translates", 6, "stateless", "translates nothing at the peers"),
    ("UDP, connected sockets", 6, "stateless", "UDP"),
]
LOST = [  # by rules written by hand, and why
    ("FIN_WAIT2", "naive+purge", "octets from the client arrive"),
    ("a published port", "naive", "carry on"),
    ("moved on", "naive", "carry on"),  # purging as well is a race, which may be won
    ("UDP, a server's socket", "naive", "what the server says"),
    ("UDP, peers speak during the blackout", "naive+purge", "carry on"),
]


def named(name: str) -> Situation:
    (found,) = (each for each in find_situations() if each.name == name)
    return found


def tell(name: str, family: int, mode: str, translator: str = "natkeep") -> Outcome:
    return play(Cell(named(name), family, Column(translator, mode, True)))


def needs_criu(table):
    """The rows, marked where the situation is told with the real CRIU."""
    return [
        pytest.param(*row, marks=[pytest.mark.criu] * (named(row[0]).engine == "criu"))
        for row in table
    ]


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(("name", "family", "mode"), needs_criu(KEPT))
def test_natkeep_keeps_the_connections(name, family, mode):
    outcome = tell(name, family, mode)

    assert (outcome.verdict, outcome.reason) == ("pass", "")


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(("name", "family", "mode", "reason"), REFUSED)
def test_natkeep_refuses_beforehand_and_says_why(name, family, mode, reason):
    outcome = tell(name, family, mode)

    assert outcome.verdict == "refused"
    assert "prepare exited 4" in outcome.reason
    assert reason in outcome.reason


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(("name", "translator", "reason"), needs_criu(LOST))
def test_rules_written_by_hand_lose_them(name, translator, reason):
    """The cells can fail."""
    outcome = tell(name, 4, "stateful", translator)

    assert outcome.verdict == "fail"
    assert reason in outcome.reason


def test_every_number_is_in_the_tables():
    told = {name for name, *_ in (*KEPT, *REFUSED)}

    assert {each.number for each in find_situations() if each.name in told} == set(NUMBERS)


def test_no_two_situations_have_one_name():
    names = [each.name for each in find_situations()]

    assert sorted(set(names)) == sorted(names)
