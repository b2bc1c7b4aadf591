"""Connections of a server that no move can keep, and what becomes of their ends.

    unkept = UnkeptEnds(lab)        two peers on the source, and a server that dials a deaf port
    unkept.speak(); unkept.hang("…")  one of the peers sends; for a while no end hears anything
    unkept.are_reset()              every end, also the silent one
    unkept.check_resets()           each reset is for an end's very tuple, and in sequence

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from natkeep.lab.application import Application, TrafficError, start_client, tuple_of
from natkeep.lab.application import Report as Traffic
from natkeep.lab.capture import RST, Frame, Segment
from natkeep.lab.lab import Lab
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import CLIENT
from natkeep.plan.tuples import Endpoint, FourTuple

DEAF_PORT = 6000
LOOPBACK = {4: "127.0.0.1:0", 6: "[::1]:0"}
_HANGS_S = 2.0  # a segment that is answered at all is answered within milliseconds
_TOLD_S = 1.0  # a silent end and a speaking one alike
_DIALS_AGAIN_S = 4.0  # a SYN that was dropped comes again after 1 s, or 2 s later
_DEAF = """\
add table inet lab_deaf
add chain inet lab_deaf input {{ type filter hook input priority 0; }}
add rule inet lab_deaf input tcp dport {port} drop
"""


def dial_locally(lab: Lab) -> list[Application]:
    """Two peers of the server on the source itself: by OLD, and by loopback."""
    source = lab.topology["source"]
    return [
        start_client(source, "old", lab.server_endpoint),
        start_client(source, "loopback", lab.server_endpoint, source=LOOPBACK[lab.family]),
    ]


class UnkeptEnds:
    """The peers on the source (one speaks, one is silent), and the server's own call."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.peers = dial_locally(lab)
        for peer in self.peers:
            peer.do({"push": 512})
        lab.topology["client"].nft(_DEAF.format(port=DEAF_PORT))
        target = str(Endpoint(CLIENT.address(lab.family), DEAF_PORT))
        lab.traffic.process.do({"open": target})
        self.tuples = [tuple_of(peer.fresh()["connections"][0]) for peer in self.peers]
        [self.call] = [
            tuple_of(each)
            for each in lab.traffic.process.fresh()["connections"]
            if each["peer"] == target
        ]
        # The usual judgement is about what is kept.
        ours = {way for t in (*self.tuples, self.call) for way in (t, t.reply())}
        lab.select_frames = lambda frames: {
            at: [f for f in some if not _is_of(f, ours)] for at, some in frames.items()
        }

    def speak(self) -> None:
        """The first peer says something; the other one is silent for good."""
        self.peers[0].do({"push": 64})

    def hang(self, name: str) -> None:
        """For a while no end hears anything: peers' connections are open, the call goes on."""
        deadline = time.monotonic() + scaled(_HANGS_S)
        states = [""]
        while time.monotonic() < deadline:
            states = [
                str(_find(peer.fresh(), t)["state"])
                for peer, t in zip(self.peers, self.tuples, strict=True)
            ]
            if self.lab.restored_ns is not None:
                states.append(str(_find(self.lab.traffic.process.fresh(), self.call)["state"]))
            if set(states) - {"open", "connecting"}:
                break
            time.sleep(0.05)
        ok = not set(states) - {"open", "connecting"}
        self.lab.report.check(name, ok, ", ".join(states))

    def are_reset(self) -> None:
        """Each end's application has its error: ECONNRESET, and the call ECONNREFUSED."""
        process = self.lab.traffic.process
        for peer, tuple_ in zip(self.peers, self.tuples, strict=True):
            for who, application, own in (
                ("peer", peer, tuple_), ("process", process, tuple_.reply()),
            ):  # fmt: skip
                with self.lab.report.should(f"{tuple_}: the {who} is told at once"):
                    self._await_error(application, own, "ECONNRESET", _TOLD_S)
        with self.lab.report.should(f"{self.call}: the process, which dials, is told"):
            self._await_error(process, self.call, "ECONNREFUSED", _DIALS_AGAIN_S)

    def _await_error(
        self, application: Application, own: FourTuple, wanted: str, within: float
    ) -> None:
        application.wait(lambda r: _find(r, own)["error"] is not None, "an error", within=within)
        error = _find(application.fresh(), own)["error"]
        if error != wanted:
            raise TrafficError(f"it ended with {error}")

    def check_resets(self) -> None:
        """What carries RST on both hosts' lo is for a lost end, and begins where that one waits.

        What the process says at the destination is answered before it comes to lo; where it waits
        is known from its last acknowledgement at the source.
        """
        frozen_ns = self.lab.frozen_ns or 0
        captures = {at: self._segments(at) for at in ("source-lo", "destination-lo")}
        ours = {way for t in (*self.tuples, self.call) for way in (t, t.reply())}
        # Later it is natkeep that says something in the process' name at the source.
        before = self._segments("source-lo", frozen_ns)
        said = {"source-lo": captures["source-lo"], "destination-lo": before}
        for point, segments in captures.items():
            resets = [s for s in segments if s.flags & RST and self._carries_old(s)]
            wanted = {t.reply() if point == "source-lo" else t for t in self.tuples}
            told = {s.tuple for s in resets}
            foreign = [str(s.tuple) for s in resets if s.tuple not in ours]
            judged = [s for s in resets if s.tuple in wanted]
            wrong = [f"{s.tuple} {s.seq}" for s in judged if s.seq != _awaited(s, said[point])]
            detail = f"{len(resets)} resets, for {len(told)} ends"
            check = self.lab.report.check
            check(f"{point}: every lost end gets a reset", wanted <= told, detail)
            check(f"{point}: and no other end does", not foreign, ", ".join(foreign))
            check(f"{point}: each is in sequence", not wrong, ", ".join(wrong))

    def _segments(self, point: str, until_ns: float = float("inf")) -> list[Segment]:
        frames = self.lab.captures[point].frames()
        return [frame.segment for frame in frames if frame.segment and frame.at_ns < until_ns]

    def _carries_old(self, segment: Segment) -> bool:
        """CRIU tries its own connections on lo; they are none of ours."""
        ends = (segment.tuple.source, segment.tuple.destination)
        return self.lab.old in {end.address for end in ends}


def _is_of(frame: Frame, tuples: set[FourTuple]) -> bool:
    return frame.segment is not None and frame.segment.tuple in tuples


def _find(report: Traffic, own: FourTuple) -> dict[str, object]:
    for each in report["connections"]:
        if tuple_of(each) == own:
            found: dict[str, object] = each
            return found
    raise TrafficError(f"no connection {own}")


def _awaited(reset: Segment, segments: Iterable[Segment]) -> int | None:
    """The sequence number that the end which is reset asked for last."""
    asked = [s.ack for s in segments if s.tuple == reset.tuple.reply() and not s.flags & RST]
    return asked[-1] if asked else None
