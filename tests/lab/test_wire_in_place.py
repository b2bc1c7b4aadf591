"""the wire: a kept connection answers every segment as one does that was restored in place.

The peer is a script that sends what no kernel would (tests/scripted_peer.py). What is right is not
written down here: it is what the same rows come to, on the same kernel, for sockets that are frozen
and restored where they were, without natkeep.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import cache

import pytest
from scripted_peer import IN_PLACE, LISTENING, Connection, Row, Seen, Step, observe

pytestmark = [pytest.mark.root, pytest.mark.lab]

FAR = 10**9  # beyond every window
NONE: tuple[()] = ()


def send(flags: str, data: bytes = b"", **fields: object) -> Step:
    return lambda it: it.send(flags, data, **fields)


def send_error(octets: int, mtu: int = 0) -> Step:
    return lambda it: it.send_error(octets, mtu=mtu)


def dial(it: Connection) -> None:
    """The peer's next connection from the same port, as its kernel would number it."""
    it.dial(ahead=200_000)


def app(action: Callable[[socket.socket], object]) -> Step:
    """Let the application do something with its socket, and note the error."""

    def step(it: Connection) -> None:
        try:
            assert it.app is not None
            action(it.app)
        except (AssertionError, OSError) as error:
            it.read.append(str(error) or "no socket")

    return step


def write(octets: int) -> Step:
    return app(lambda own: own.sendall(b"w" * octets))


SHUT = app(lambda own: own.shutdown(socket.SHUT_WR))
CLOSE = app(lambda own: own.close())


def pause(it: Connection) -> None:
    it.reads = False


def resume(it: Connection) -> None:
    it.reads = True


def keep_alive(seconds: int) -> Step:
    """The application asks for probes of a connection that rests so long; 0: for none."""

    def action(own: socket.socket) -> None:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds or 60)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, seconds)

    return app(action)


def await_segment(it: Connection) -> Callable[[], bool]:
    """Wait for one more segment: it takes a timer of the kernel's."""
    before = len(it.heard)
    return lambda: len(it.heard) > before


def together(*steps: Step) -> Step:
    """In one round: what a step is answered with comes after all of them."""

    def step(it: Connection) -> Callable[[], bool]:
        waits = [wait for each in steps if (wait := each(it))]
        return lambda: all(wait() for wait in waits)

    return step


def fill(octets: int) -> Step:
    """More than the receive buffer has room for, in segments of that size."""

    def step(it: Connection) -> None:
        for number in range(100):
            it.send("A", b"f" * octets, seq=octets * number)

    return step


def count_anew(it: Connection) -> None:
    """How many octets there was room for, in how many acknowledgements, is a question of time."""
    it.count_anew()


ALIVE = send("PA", b"alive")
PROBE = send("A", b"?", seq=-1)
ENDED_BY_PEER = (send("FA"), CLOSE, send("A"))
COMES_AGAIN = (dial, send("A"), ALIVE, write(10), send("A"))

ROWS = {
    # RFC 9293: what is in order, and what is not
    "data": Row((send("PA", b"d" * 100), write(100), send("A"))),
    "data again": Row((ALIVE, send("PA", b"alive", seq=-5), ALIVE)),
    "data again, with other octets": Row((ALIVE, send("PA", b"OTHER and more", seq=-5), ALIVE)),
    "other octets beyond a hole": Row(
        (send("PA", b"BBBB", seq=4), send("PA", b"aaaaaaaaaaaa"), send("PA", b"c", seq=0))
    ),
    "data beyond the window": Row((send("PA", b"x", seq=5_000_000), ALIVE)),
    "data of long ago": Row((send("PA", b"x" * 100, seq=-3_000_000), ALIVE)),
    "an acknowledgement of what was never sent": Row((send("A", ack=50_000), ALIVE)),
    "an acknowledgement of long ago": Row((send("PA", b"x", ack=-1_000_000), ALIVE)),
    "urgent": Row((send("PAU", b"u" * 10, urgptr=10), ALIVE)),
    "many segments, as large as may be": Row((write(4200), send("A"), ALIVE)),
    "the peer's window is shut": Row((
        send("A", window=0), together(await_segment, write(700)), send("A"), send("A"), ALIVE
    )),
    "the process's window is shut": Row((
        pause, *map(fill, (1400, 200, 20, 1)), PROBE, count_anew, PROBE, resume, ALIVE
    )),
    "a probe of the peer's": Row((send("A", seq=-1), PROBE, ALIVE)),
    "a probe of the process's": Row((
        together(await_segment, keep_alive(1)), together(keep_alive(0), send("A")), ALIVE
    )),
    "a SYN-ACK": Row((send("SA"), ALIVE)),
    "SYN and FIN": Row((send("SF"), ALIVE)),
    "no flags": Row((send(""), ALIVE)),
    "all flags": Row((send("FSRPAU"), ALIVE)),
    "reserved bits": Row((send("PA", b"r", reserved=7), ALIVE)),
    "an unknown option": Row((send("PA", b"o", options=[(253, b"\xf9\x89\1\2")]), ALIVE)),
    "a wrong checksum": Row((send("PA", b"x", chksum=0x1234), ALIVE)),
    "fragments": Row((send("PA", b"F" * 1200, fragment=400), ALIVE)),
    "DSCP": Row((send("PA", b"d", tos=0x28), ALIVE)),
    # ends
    "the peer closes first": Row((send("FA"), write(100), send("A"), CLOSE, send("A"))),
    "FIN with data": Row((send("FPA", b"last"), CLOSE, send("A"))),
    "the process closes first": Row((SHUT, send("A"), ALIVE, send("FA"), CLOSE)),
    "both close at once": Row((together(SHUT, send("FA")), send("A"), CLOSE)),
    "a reset after FIN": Row((send("FA"), send("R", options=NONE), write(10), write(10))),
    "closed with data unread": Row((pause, ALIVE, CLOSE)),
    "data after it was closed": Row((CLOSE, send("PA", b"late"))),
    "FIN again in TIME-WAIT": Row((CLOSE, send("FA"), send("FA", seq=-1))),
    # RFC 5961: what an attacker would send
    "a reset of the right number": Row((send("R", options=NONE), write(10))),
    "a reset in the window": Row((send("R", seq=100, options=NONE), ALIVE)),
    "a reset of long ago": Row((send("R", seq=-100_000, options=NONE), ALIVE)),
    "a reset far ahead": Row((send("RA", seq=FAR, options=NONE), ALIVE)),
    "SYN in the window": Row((send("S", seq=10, options=NONE), ALIVE)),
    "SYN far ahead": Row((send("S", seq=FAR, options=NONE), ALIVE)),
    "SYN of a peer that booted, then a reset": Row((dial, send("R", options=NONE), write(10))),
    # RFC 7323
    "an old timestamp": Row((ALIVE, send("PA", b"old", late=1_000_000), ALIVE)),
    "a timestamp of the future": Row(
        (send("PA", b"new", late=-100_000), send("PA", b"more", late=-100_000))
    ),
    "no timestamp": Row((send("PA", b"none", options=NONE), ALIVE)),
    # RFC 2018, 2883
    "two holes": Row((
        send("PA", b"2" * 100, seq=100), send("PA", b"4" * 100, seq=300),
        send("PA", b"1" * 100), send("PA", b"3" * 100), ALIVE,
    )),
    "the same twice beyond a hole": Row((
        send("PA", b"2" * 100, seq=100), send("PA", b"2" * 100, seq=100), send("PA", b"1" * 100),
    )),
    # RFC 3168
    "congestion experienced": Row((
        send("PA", b"1", tos=3), send("PAC", b"2", tos=2), send("PAE", b"3"), write(100), send("A")
    )),
    # RFC 792, 1191, 4443, 8201
    "the path becomes narrow": Row((write(1300), send_error(1300, mtu=1280), send("A"), ALIVE)),
    "the port is unreachable": Row((write(100), send_error(100), send("A"), ALIVE)),
    # the same port again, where the listener has moved along
    "the peer closed, and comes again": Row((*ENDED_BY_PEER, *COMES_AGAIN), LISTENING),
    "the process closed, and the peer comes again": Row(
        (CLOSE, send("FA"), *COMES_AGAIN), LISTENING
    ),
    "the peer reset it, and comes again": Row(
        (send("R", options=NONE), *COMES_AGAIN), LISTENING
    ),
    "SYN while it lives": Row((dial, send("PA", b"alive")), LISTENING),
}  # fmt: skip


BEGINS = {each for each in ROWS if "SYN " in each or "again" in each} - {
    "data again", "data again, with other octets", "FIN again in TIME-WAIT", "SYN and FIN"
}  # fmt: skip
# In mode stateful an entry alone tells of a bare SYN that its connection lives, and an ICMP error
# is translated by the entry of what it quotes, which also tells the MSS of later connections.
NEEDS_ENTRY = {"stateful": BEGINS | {"the path becomes narrow"}, "stateless": set()}


@cache
def seen_in_place(family: int) -> dict[str, Seen]:
    return observe(family, IN_PLACE, ROWS)


def find_differences(family: int, how: str, *, flush: bool = False) -> dict[str, tuple[Seen, Seen]]:
    """The rows that do not come to the same: what they come to in place, and as *how* says."""
    right, seen = seen_in_place(family), observe(family, how, ROWS, flush=flush)
    return {name: (right[name], seen[name]) for name in ROWS if seen[name] != right[name]}


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_kept_connection_answers_as_one_restored_in_place(family, mode):
    assert find_differences(family, f"natkeep {mode}") == {}


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
@pytest.mark.parametrize("family", [4, 6])
def test_so_it_does_without_any_conntrack_entry(family, mode):
    found = find_differences(family, f"natkeep {mode}", flush=True)

    assert {name: both for name, both in found.items() if name not in NEEDS_ENTRY[mode]} == {}
    # What needs one does no harm without.
    assert [name for name, (right, seen) in found.items() if seen.read != right.read] == []


def test_rules_written_by_hand_answer_otherwise():
    """The rows can fail: what conntrack calls invalid goes to the old host."""
    assert {"SYN and FIN", "no flags"} <= find_differences(4, "naive+purge stateful").keys()
