"""the assertions on captured frames: each holds for a good move and fails for one bad frame."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from natkeep.lab import wire_checks
from natkeep.lab.capture import ACK, FIN, PSH, RST, SYN, Frame, Segment
from natkeep.lab.wire_checks import Kept
from natkeep.plan.tuples import Endpoint, FourTuple

OLD, NEW = ipaddress.ip_address("10.2.0.10"), ipaddress.ip_address("10.3.0.20")
PEER = Endpoint.parse("10.1.0.2:50000")
IN = FourTuple(PEER, Endpoint(OLD, 5000))
FAR_IN = FourTuple(PEER, Endpoint(NEW, 5000))
KEPT = Kept((IN,), {OLD: (NEW,)}, frozen_ns=100, restored_ns=200)


def frame(
    at_ns: int, tuple_: FourTuple, seq: int, *, ack: int = 0, length: int = 0, flags: int = ACK,
    stamp: int | None = None,
) -> Frame:  # fmt: skip
    addresses = frozenset((tuple_.source.address, tuple_.destination.address))
    segment = Segment(tuple_, flags, seq % 2**32, ack % 2**32, length, stamp)
    return Frame(at_ns, addresses, f"{tuple_} seq {seq}", segment)


TOP = 2**32 - 15  # sequence numbers wrap in the middle of the story
# The peer asks (10 octets), is answered (10); the freeze; it asks again, twice; is answered.
AT_PEER = (
    frame(10, IN, TOP, ack=500, length=10, flags=ACK | PSH, stamp=1),
    frame(20, IN.reply(), 500, ack=TOP + 10, length=10, stamp=7),
    frame(110, IN, TOP + 10, ack=510, length=10, stamp=2),
    frame(150, IN, TOP + 10, ack=510, length=10, stamp=3),
    frame(210, IN.reply(), 509, ack=TOP + 10, stamp=8),
    frame(220, IN.reply(), 510, ack=TOP + 20, length=10, stamp=9),
    frame(230, IN, TOP + 20, ack=520, stamp=4),
)
FAR = tuple(
    frame(f.at_ns, FAR_IN if f.segment.tuple == IN else FAR_IN.reply(), f.segment.seq)
    for f in AT_PEER
    if f.segment and f.at_ns > 200
)


def failing(at_peer=AT_PEER, far=FAR, kept=KEPT) -> list[str]:
    found = wire_checks.judge_move(kept, {"client": at_peer}, {"near": at_peer}, {"far": far})
    return [each.name for each in found if not each.ok]


def test_a_good_move_passes_every_assertion():
    assert failing() == []


def test_without_traffic_nothing_is_proved():
    found = wire_checks.judge_move(KEPT, {"client": ()}, {"near": ()}, {"far": ()})

    assert [each.name for each in found if each.ok] == []


ARP = Frame(215, frozenset((OLD,)), "who has 10.3.0.1 says 10.2.0.10")
BAD = [
    ("no frame between gateway and destination carries OLD", (), (ARP,)),
    ("no frame between gateway and destination carries OLD", (), (frame(215, IN, 9),)),
    ("no reset on any wire", (frame(240, IN.reply(), 520, flags=RST),), ()),
    ("no reset on any wire", (), (frame(240, FAR_IN, 9, flags=RST | ACK),)),
    ("no SYN after the freeze", (frame(105, IN, 9, flags=SYN),), ()),
    (
        "no port differs from the kept ones",
        (frame(240, FourTuple(Endpoint(OLD, 162), PEER), 520, ack=0),),
        (),
    ),
    (
        "no port differs from the kept ones",
        (),
        (frame(240, FourTuple(PEER, Endpoint(NEW, 162)), 520),),
    ),
    ("acknowledgements never step back", (frame(240, IN.reply(), 520, ack=TOP + 19),), ()),
    ("TCP timestamps never step back", (frame(240, IN, TOP + 20, ack=520, stamp=3),), ()),
    ("sequence numbers have no hole", (frame(240, IN.reply(), 521, ack=TOP + 20, length=5),), ()),
]


@pytest.mark.parametrize(("name", "at_peer", "far"), BAD)
def test_one_bad_frame_fails_its_assertion(name, at_peer, far):
    assert name in failing((*AT_PEER, *at_peer), (*FAR, *far))


def test_a_connection_that_is_silent_afterwards_fails():
    name = "the peer sees each four-tuple before and after the move"
    silent = tuple(f for f in AT_PEER if f.at_ns < 200 or f.segment.tuple == IN)

    assert name in failing(silent)
    assert name in failing(kept=replace(KEPT, restored_ns=None))


def test_an_answer_from_another_address_is_not_the_same_connection():
    name = "the peer sees each four-tuple before and after the move"
    moved = tuple(
        frame(f.at_ns, FAR_IN.reply(), f.segment.seq) if f.at_ns > 200 else f for f in AT_PEER
    )

    assert name in failing(moved)


def test_traffic_of_ignored_endpoints_is_not_judged():
    other = Endpoint.parse("10.1.0.3:4000")
    reset = frame(240, FourTuple(Endpoint(NEW, 81), other), 1, flags=RST)

    assert failing(far=(*FAR, reset)) != []
    assert failing(far=(*FAR, reset), kept=replace(KEPT, ignored=frozenset({other}))) == []


def test_a_fin_takes_one_number():
    end = frame(240, IN.reply(), 520, ack=TOP + 20, flags=FIN | ACK, stamp=10)
    last = frame(250, IN.reply(), 521, ack=TOP + 21, stamp=11)

    assert failing((*AT_PEER, end, last)) == []


def test_numbers_count_kept_connections_only():
    other = frame(240, FourTuple(Endpoint.parse("10.1.0.2:9"), Endpoint(OLD, 5000)), 1, flags=RST)

    assert wire_checks.count_segments((*AT_PEER, other), KEPT) == len(AT_PEER)
    assert wire_checks.count_resets((*AT_PEER, other), KEPT) == 0


def test_silence_runs_from_the_last_answer_before_the_freeze():
    assert wire_checks.longest_silence_ms(AT_PEER, KEPT) == pytest.approx((210 - 20) / 1e6)


def test_silence_of_a_lost_connection_lasts_to_the_end():
    lost = [f for f in AT_PEER if f.at_ns < 200] + [frame(9000, IN, TOP + 10)]

    assert wire_checks.longest_silence_ms(lost, KEPT) == pytest.approx((9000 - 20) / 1e6)


def test_a_gateway_of_its_own_may_show_other_tuples_inside():
    """The peer dialled a published port, and the process sees a masqueraded peer."""
    inside = FourTuple(Endpoint.parse("10.2.0.1:20000"), Endpoint(OLD, 80))
    far_in = FourTuple(inside.source, Endpoint(NEW, 80))
    far = tuple(
        frame(f.at_ns, far_in if f.segment.tuple == FAR_IN else far_in.reply(), f.segment.seq)
        for f in FAR
        if f.segment
    )

    assert failing(far=far, kept=replace(KEPT, inside=(inside,))) == []
    assert failing(far=far) == ["no port differs from the kept ones"]


def test_a_peer_beyond_the_gateway_may_say_old_until_it_is_there():
    early = (frame(120, IN, 9), *FAR)

    assert failing(far=early, kept=replace(KEPT, clean_from_ns=130)) == []
    assert len(failing(far=early)) == 2


def test_connections_of_others_are_judged_by_themselves():
    lost = (*AT_PEER[:5], frame(220, IN.reply(), 510, flags=RST))
    found = [wire_checks.judge_others({"client": seen}, KEPT, [IN]) for seen in (AT_PEER, lost)]
    others = [[each.name for each in some if not each.ok] for some in found]

    assert others == [[], ["others' connections: no reset"]]
