"""What the captured frames say about the kept connections, as assertions that can fail.

Rule: pure; frames and four-tuples in, assertions out. Four-tuples run from the peer to the
process, as the peer sees them.

What must never step back at the peer, in the order of capture, for each direction of each kept
connection: the acknowledgement number and the timestamp value; and at the end the sequence
numbers must have no hole. A retransmission is legitimate TCP: its sequence number is old, but it
acknowledges and is stamped anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from natkeep.lab.capture import ACK, FIN, RST, SYN, Frame, Segment
from natkeep.lab.report import Assertion
from natkeep.lab.topology import Address
from natkeep.plan.tuples import Endpoint, FourTuple

_SHOWN = 3  # examples in a detail


@dataclass(frozen=True, slots=True)
class Kept:
    """What is judged: the kept connections, where OLD went, and when.

    frozen_ns, restored_ns: when the freeze began and when the restore was done; None: never.
    ignored: peers' endpoints whose other connections are not judged here.
    inside: the same tuples as the process sees them, where a gateway makes them differ.
    clean_from_ns: since when OLD must not be seen, where a peer beyond the gateway said it before.
    moved: peers' addresses that other ones stand for on the far side; ports: the process' ports
    that others do.
    """

    tuples: tuple[FourTuple, ...]
    news: Mapping[Address, tuple[Address, ...]]
    frozen_ns: int
    restored_ns: int | None
    ignored: frozenset[Endpoint] = frozenset()
    inside: tuple[FourTuple, ...] = ()
    clean_from_ns: int = 0
    moved: Mapping[Address, Address] = field(default_factory=dict)
    ports: Mapping[int, int] = field(default_factory=dict)

    def on_far_side(self) -> set[FourTuple]:
        """The tuples that may be seen between gateway and destination."""
        return {
            FourTuple(
                Endpoint(
                    self.moved.get(each.source.address, each.source.address), each.source.port
                ),
                new,
            )
            for each in self.inside or self.tuples
            for new in self.on_wire(each.destination)
        }

    def on_wire(self, end: Endpoint) -> list[Endpoint]:
        """What may stand for an *end* of the process there."""
        port = self.ports.get(end.port, end.port)
        return [Endpoint(new, port) for new in self.news.get(end.address, ())]


Points = Mapping[str, Sequence[Frame]]


def in_order(points: Points) -> list[Frame]:
    """All frames of several captures by their time."""
    return sorted((f for frames in points.values() for f in frames), key=lambda f: f.at_ns)


def judge_move(kept: Kept, peers: Points, near: Points, far: Points) -> list[Assertion]:
    """Everything about a process that moved; *peers* are captures at the peers' own interfaces."""
    here = judge_peers(kept, peers, {**peers, **near, **far})
    return [
        no_old_address(far, kept),
        *here[:3],
        only_kept_ports({**peers, **near}, far, kept),
        *here[3:],
    ]


def judge_peers(kept: Kept, peers: Points, everywhere: Points) -> list[Assertion]:
    """What has to be so whether the process moved or not."""
    at_peers = in_order(peers)
    return [
        tuple_unchanged(at_peers, kept),
        no_reset(everywhere, kept),
        no_new_path(at_peers, kept),
        *numbers_advance(at_peers, kept),
    ]


def numbers_advance(at_peers: Sequence[Frame], kept: Kept) -> list[Assertion]:
    """In each direction: acknowledgements, timestamps, and sequence numbers without a hole."""
    return [
        _monotonic(
            "acknowledgements never step back", at_peers, kept,
            lambda segment: segment.ack if segment.flags & ACK else None,
        ),
        _monotonic(
            "TCP timestamps never step back", at_peers, kept, lambda segment: segment.timestamp
        ),
        no_hole(at_peers, kept),
    ]  # fmt: skip


def judge_others(peers: Points, kept: Kept, tuples: Sequence[FourTuple]) -> list[Assertion]:
    """Others' connections to the destination go on as before; *tuples* from their peers."""
    at_peers = in_order(peers)
    others = Kept(tuple(tuples), {}, kept.frozen_ns, kept.restored_ns)
    resets = count_resets(at_peers, others)
    found = [
        tuple_unchanged(at_peers, others),
        Assertion("no reset", not resets, f"{resets} segments"),
        *numbers_advance(at_peers, others),
    ]
    return [replace(each, name=f"others' connections: {each.name}") for each in found]


def no_old_address(far: Points, kept: Kept) -> Assertion:
    """No frame between gateway and destination carries OLD, in any header."""
    olds = set(kept.news)
    since = kept.clean_from_ns
    bad = [f"{at}: {f.summary}" for at, frames in far.items() for f in frames
           if f.addresses & olds and f.at_ns >= since]  # fmt: skip
    seen = sum(1 for frames in far.values() for f in frames if f.segment)
    return _verdict(
        "no frame between gateway and destination carries OLD",
        bad, seen, f"{seen} segments there, all with NEW",
    )  # fmt: skip


def tuple_unchanged(at_peers: Sequence[Frame], kept: Kept) -> Assertion:
    """Each kept four-tuple came from the process before the freeze and again after the restore."""
    before, after = set[FourTuple](), set[FourTuple]()
    for frame in at_peers:
        if frame.segment and not frame.segment.flags & RST:
            if frame.at_ns < kept.frozen_ns:
                before.add(frame.segment.tuple.reply())
            elif kept.restored_ns is not None and frame.at_ns >= kept.restored_ns:
                after.add(frame.segment.tuple.reply())
    bad = [f"{each}: silent {when}"
           for when, seen in (("before", before), ("after", after))
           for each in kept.tuples if each not in seen]  # fmt: skip
    return _verdict(
        "the peer sees each four-tuple before and after the move",
        bad, len(kept.tuples), f"{len(kept.tuples)} unchanged",
    )  # fmt: skip


def no_reset(everywhere: Points, kept: Kept) -> Assertion:
    """No segment of a peer of ours, on any wire, has RST."""
    bad, seen = [], 0
    for at, frame, segment in _segments(everywhere, kept):
        seen += 1
        if segment.flags & RST:
            bad.append(f"{at}: {frame.summary}")
    return _verdict("no reset on any wire", bad, seen, f"0 in {seen} segments")


def no_new_path(at_peers: Sequence[Frame], kept: Kept) -> Assertion:
    """No SYN on a kept connection after the freeze began."""
    both = _both_directions(kept)
    late = [f for f in at_peers if f.at_ns >= kept.frozen_ns and f.segment]
    late = [f for f in late if f.segment and f.segment.tuple in both]
    bad = [f.summary for f in late if f.segment and f.segment.flags & SYN]
    return _verdict("no SYN after the freeze", bad, len(late), f"0 in {len(late)} segments")


def only_kept_ports(near: Points, far: Points, kept: Kept) -> Assertion:
    """After the freeze every segment belongs to a kept connection, ports unchanged."""
    bad, seen = [], 0
    clean_ns = max(kept.frozen_ns, kept.clean_from_ns)
    for points, wanted, since in (
        (near, set(kept.tuples), kept.frozen_ns),
        (far, kept.on_far_side(), clean_ns),
    ):
        for at, frame, segment in _segments(points, kept):
            if frame.at_ns < since:
                continue
            seen += 1
            if segment.tuple not in wanted and segment.tuple.reply() not in wanted:
                bad.append(f"{at}: {frame.summary}")
    return _verdict("no port differs from the kept ones", bad, seen, f"{seen} segments")


def no_hole(at_peers: Sequence[Frame], kept: Kept) -> Assertion:
    """Each direction's sequence numbers are seen from the first to the last without a hole."""
    bad, seen = [], 0
    for tuple_, segments in _by_direction(at_peers, kept).items():
        seen += len(segments)
        bad += [f"{tuple_}: {hole}" for hole in _holes(segments)]
    return _verdict("sequence numbers have no hole", bad, seen, f"{seen} segments")


def count_segments(at_peers: Iterable[Frame], kept: Kept) -> int:
    """Segments of kept connections at the peers' interfaces, both directions."""
    return sum(len(segments) for segments in _by_direction(at_peers, kept).values())


def count_resets(at_peers: Iterable[Frame], kept: Kept) -> int:
    """Those of them with RST."""
    found = _by_direction(at_peers, kept).values()
    return sum(1 for segments in found for segment in segments if segment.flags & RST)


def longest_silence_ms(at_peers: Sequence[Frame], kept: Kept) -> float:
    """The longest time that a peer's interface saw nothing from OLD on a kept connection.

    Counted from the last segment before the freeze onwards, to the end of the capture.
    """
    silences = [0]
    last = {each.reply(): kept.frozen_ns for each in kept.tuples}
    for frame in at_peers:
        if frame.segment is not None and frame.segment.tuple in last:
            if frame.at_ns >= kept.frozen_ns:
                silences.append(frame.at_ns - last[frame.segment.tuple])
            last[frame.segment.tuple] = frame.at_ns
    end = max((frame.at_ns for frame in at_peers), default=0)
    return max(silences + [end - seen for seen in last.values()]) / 1e6


def _verdict(name: str, bad: Sequence[str], seen: int, good: str) -> Assertion:
    """Nothing bad, and something seen: no traffic proves nothing."""
    if not bad and not seen:
        return Assertion(name, False, "nothing was seen there, which proves nothing")
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return Assertion(name, not bad, "; ".join(bad[:_SHOWN]) + more if bad else good)


def _both_directions(kept: Kept) -> set[FourTuple]:
    return set(kept.tuples) | {each.reply() for each in kept.tuples}


def _segments(points: Points, kept: Kept) -> Iterable[tuple[str, Frame, Segment]]:
    """All segments but those of ignored endpoints."""
    for at, frames in points.items():
        for frame in frames:
            segment = frame.segment
            if segment and not kept.ignored & {segment.tuple.source, segment.tuple.destination}:
                yield at, frame, segment


def _by_direction(at_peers: Iterable[Frame], kept: Kept) -> dict[FourTuple, list[Segment]]:
    found: dict[FourTuple, list[Segment]] = {each: [] for each in _both_directions(kept)}
    for segment in (frame.segment for frame in at_peers):
        if segment and segment.tuple in found:
            found[segment.tuple].append(segment)
    return found


def _monotonic(
    name: str, at_peers: Sequence[Frame], kept: Kept, number: Callable[[Segment], int | None]
) -> Assertion:
    bad, seen = [], 0
    for tuple_, segments in _by_direction(at_peers, kept).items():
        highest: int | None = None
        for segment in segments:
            value = number(segment)
            if value is None or segment.flags & RST:
                continue
            seen += 1
            if highest is not None and _distance(highest, value) < 0:
                bad.append(f"{tuple_}: {highest} then {value}")
            else:
                highest = value
    return _verdict(name, bad, seen, f"{seen} segments")


def _holes(segments: Sequence[Segment]) -> list[str]:
    """Gaps in what the segments cover, each as a text."""
    if not segments:
        return []
    first = segments[0].seq
    spans = sorted(
        (start, start + s.length + bool(s.flags & SYN) + bool(s.flags & FIN))
        for s in segments
        if not s.flags & RST
        for start in (_distance(first, s.seq),)
    )
    holes, reached = [], spans[0][0] if spans else 0
    for start, end in spans:
        if start > reached:
            holes.append(f"{start - reached} octets missing at {reached} of the capture")
        reached = max(reached, end)
    return holes


def _distance(a: int, b: int) -> int:
    """How far *b* is ahead of *a*, in TCP's arithmetic modulo 2^32."""
    return (b - a + (1 << 31)) % (1 << 32) - (1 << 31)
