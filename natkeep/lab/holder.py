"""What peers say while the process is frozen: that the holder has it, and that it delivers it.

    await_held(lab, look, octets)      says whether so many octets are held
    check_replay(lab, tuples, octets)  after the end: of each connection they came through lo, once
    check_datagrams(lab, number)       the same of UDP; and that the process has heard all

The lab has a capture `lo` at the destination: `HOLDS` is its setup. look: natkeep's own
`kernel.segment_holder.look`, which the lab does not import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from natkeep.lab.host import LabError, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.udp import Datagrams
from natkeep.plan.tuples import FourTuple

Look = Callable[[str, str], Any]
"""Of a state directory and a move: what is held, or None where there is no holder."""
HOLDS = {"points": {"lo": ("destination", "lo")}}


def await_held(lab: Lab, look: Look, octets: int) -> None:
    """Wait until *octets* are held, of all connections together, and check that it is so many."""
    state, held = str(lab.directory / "natkeep-state"), None

    def all_held() -> bool:
        nonlocal held
        held = look(state, lab.order.id)
        return held is None or held.octets >= octets

    with suppress(LabError):  # told by the assertion
        await_true(all_held, "what the client says to be held")
    found = held.octets if held else 0
    lab.report.check("what the client says meanwhile is held", found == octets, f"{found} octets")


def check_ended(lab: Lab, look: Look) -> None:
    """The holder has ended, now that the gate is open."""
    left = look(str(lab.directory / "natkeep-state"), lab.order.id)
    lab.report.check("the holder has ended", left is None, str(left or ""))


def check_replay(lab: Lab, tuples: Iterable[FourTuple], octets: int) -> None:
    """What came through lo: of each of *tuples* the octets that were held, once."""
    inbound = {each: set[int]() for each in tuples}
    for frame in lab.captures["lo"].frames():
        segment = frame.segment
        if segment and segment.tuple in inbound:
            places = range(segment.seq, segment.seq + segment.length)
            inbound[segment.tuple] |= {place % 2**32 for place in places}
    counts = [len(places) for places in inbound.values()]
    ok = counts == [octets] * len(inbound) and bool(inbound)
    lab.report.check("what was held came to the process through lo", ok, f"{counts} octets")


def check_datagrams(lab: Lab, number: int) -> None:
    """What came through lo: of each kept peer *number* datagrams, in order, that were heard."""
    inbound: dict[FourTuple, list[int]] = {each: [] for each in lab.traffic.views}
    for frame in lab.captures["lo"].frames():
        segment = frame.segment
        if segment and segment.tuple in inbound:
            inbound[segment.tuple].append(segment.seq)
    found = [*inbound.values()]
    ok = all(seen and seen == [*range(seen[0], seen[0] + number)] for seen in found) and bool(found)
    detail = f"{[len(seen) for seen in found]} datagrams"
    lab.report.check("what was held came through lo, once and in order", ok, detail)
    assert isinstance(lab.traffic, Datagrams)
    heard = lab.traffic.heard.values()
    ok = all(len(spans) == 1 and spans[0][0] == 0 for spans in heard) and bool(heard)
    lab.report.check("the process has heard all that was ever said", ok, str([*heard]))
