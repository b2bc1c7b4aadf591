"""The UDP sockets of one server, which are kept: what peers say to them, and that it arrives.

    Lab(…, udp=True)             lab.traffic is of this kind, with the words of traffic_words.py
    lab.traffic.connect(0)       the server gives this peer a connected socket
    lab.traffic.connect()        it gives each one, and closes its own socket

What is said while the process is away may be lost; whatever is said before and afterwards arrives,
each datagram at most once and in order. CRIU locks no UDP and saves no queue of a socket, so the
host that the process leaves is closed first (engine.py), and what is in the socket then is lost.

Rule: datagrams.py counts; the captures say when each datagram was said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from natkeep.lab.application import (
    DATAGRAMS,
    faults,
    handed_over,
    sum_of,
    tuple_of,
)
from natkeep.lab.application import Report as Status
from natkeep.lab.capture import Frame
from natkeep.lab.engine import Engine
from natkeep.lab.host import Host
from natkeep.lab.report import Assertion, Report
from natkeep.lab.traffic_words import Traffic
from natkeep.lab.wire_checks import (
    Kept,
    Points,
    in_order,
    no_old_address,
    only_kept_ports,
    tuple_unchanged,
)
from natkeep.plan.tuples import FourTuple

_UNREAD_NS = 100_000_000
"""What is said so shortly before the freeze may still be in the socket."""


class Datagrams(Traffic):
    """As Traffic, of UDP; heard: of each kept four-tuple the numbers that the process has heard.

    numbered: whether the application is datagrams.py.
    """

    script = DATAGRAMS
    numbered = True

    def __init__(self, name: str, directory: Path, report: Report) -> None:
        super().__init__(name, directory, report)
        self.heard: dict[FourTuple, Any] = {}

    def serve(self, engine: Engine, host: Host, listen: str) -> None:
        super().serve(engine, host, listen)
        self.server.udp = True

    def list_kept(self) -> Iterable[str]:
        """Connected sockets by their peers, a server's own socket by `*`."""
        report = self.process.fresh()
        connected = {tuple_of(each).reply() for each in report["connections"] if each["connected"]}
        kept = (each for each in self.views.values() if each in connected)
        return [
            *(f"udp {each.destination} {each.source}" for each in kept),
            *(f"udp {local} *" for local in report["listening"]),
        ]

    def connect(self, *indexes: int) -> None:
        """The server has a connected socket for these peers; without *indexes* for all.

        Then it has no other socket any more.
        """
        order: dict[str, Any] = {"connect": None}
        with self.report.must("the server connects a socket to each peer"):
            if indexes:
                self.process.do({**order, "only": indexes})
            else:
                self.process.do(order, "unlisten")
        self.server.connections = tuple(self.list_kept())

    def _is_settled(self) -> bool:
        return handed_over(self.client.fresh()) and handed_over(self.process.fresh())

    def all_arrived(self, client: Status, server: Status) -> Assertion:
        """All that the process said, which says nothing while it is away."""
        flows = {tuple_of(each).reply(): each for each in server["connections"]}
        kept = {peers: flows.get(own) for peers, own in self.views.items()}
        self.heard = {at: flow["heard"] for at, flow in kept.items() if flow}
        bad = [*faults(client), *faults({"connections": [each for each in kept.values() if each]})]
        for each in client["connections"]:
            flow = kept.get(tuple_of(each))
            wanted = [[0, flow["said"] - 1]] if flow else "answers"
            if each["heard"] != wanted:
                bad.append(f"{each['local']} heard {each['heard']}, the process said {wanted}")
        total = sum_of(client, "rx") + sum_of(server, "rx")
        return Assertion(
            "each datagram arrived at most once and in order, and all of the process's",
            not bad and total > 0, "; ".join(bad[:3]) or f"{total} octets",
        )  # fmt: skip


def judge_datagrams(
    kept: Kept, peers: Points, near: Points, far: Points, heard: dict[FourTuple, Any] | None
) -> list[Assertion]:
    """What the captures say; *heard*: of the process, by four-tuple as the peers see them.

    None: the datagrams have no numbers.
    """
    at_peers = in_order(peers)
    return [
        no_old_address(far, kept),
        tuple_unchanged(at_peers, kept),
        only_kept_ports({**peers, **near}, far, kept),
        no_unreachable(at_peers),
        *([] if heard is None else [all_heard(at_peers, kept, heard)]),
    ]


def no_unreachable(at_peers: Sequence[Frame]) -> Assertion:
    """No ICMP error comes to a peer: its connected socket would get ECONNREFUSED."""
    bad = [each.summary for each in at_peers if "unreach" in each.summary.lower()]
    return Assertion("no peer is told that a port is unreachable", not bad, "; ".join(bad[:3]))


def all_heard(at_peers: Sequence[Frame], kept: Kept, heard: dict[FourTuple, Any]) -> Assertion:
    """The process has heard what peers said before the freeze, and since the restore."""
    said, bad = 0, []
    for frame in at_peers:
        segment = frame.segment
        if segment is None or segment.tuple not in kept.tuples:
            continue
        before = frame.at_ns < kept.frozen_ns - _UNREAD_NS
        if before or (kept.restored_ns is not None and frame.at_ns > kept.restored_ns):
            said += 1
            spans = heard.get(segment.tuple, ())
            if not any(first <= segment.seq <= last for first, last in spans):
                bad.append(f"{frame.summary}, {'before' if before else 'after'} the move")
    detail = "; ".join(bad[:3]) or f"{said} datagrams"
    return Assertion("the process has heard all that is said outside of the blackout",
                     not bad and said > 0, detail)  # fmt: skip
