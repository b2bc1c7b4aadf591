"""The gateway is ready only after the process is back; what its peers reset meanwhile is ignored.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐                  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │◀── 10.3.0.20 ────│       │◀─────────────────│NEW⇄OLD│──────────────────│ server │
    │      │─── RST ─────────▶│       │─── RST ─────────▶│ drop  │                  └────────┘
    └──────┘                  └───────┘                  └───────┘ destination 10.3.0.20 (NEW)
        ║═════ 10.2.0.10 ═════ OLD⇄NEW ═══════ as in every move, once the gateway is ready

What CRIU and the server say reaches the peers as from NEW, a host that they have never talked to.
They answer with resets, which the destination drops as long as it has heard nothing else of them.
Then the same is sent again, and translated; the peers acknowledge it, and from then on a reset of
theirs counts.
"""

import time
from functools import partial

from natkeep.lab.capture import RST

CONNECTIONS = 4
LATE_S = 0.5


def run(lab, late_s=LATE_S):
    """late_s: how long the gateway passes on what it does not translate, in seconds."""
    lab.begin(connections=CONNECTIONS)
    lab.freeze()
    prepare_at(lab, "destination", "at-destination")
    lab.restore()
    time.sleep(late_s)  # that much later it comes: no state to wait for
    prepare_at(lab, "gateway", "at-gateway", "--gate", "open")
    lab.note_restored()  # for its peers
    lab.select_frames = partial(without_early, lab, time.time_ns())
    lab.traffic.talk_on()
    lab.traffic.check_ends()
    # Moves of one site each: the destination's cannot know that no gateway sends there any more.
    lab.translator.call("teardown", "at-gateway", "--yes")
    lab.translator.call("teardown", "at-destination", "--yes", "--drop", "0")
    lab.undone += lab.orders
    lab.conclude()


def prepare_at(lab, role, move_id, *options):
    """natkeep prepares this site alone."""
    order, site = lab.place_order(move_id=move_id), f"{role}={lab.topology[role].name}"
    with lab.report.must(f"natkeep prepares the {role}"):
        lab.translator.call(
            "prepare", order.id, "--map", f"{order.old}={order.new}", "--site", site,
            "--mode", order.mode, *order.options, *options,
        )  # fmt: skip


def without_early(lab, since_ns, frames):
    """The captures without what peers heard from NEW before *since_ns*, and answered with a reset;
    there has to be some, or nothing is shown."""
    early = {at: [f for f in some if is_early(lab, since_ns, f)] for at, some in frames.items()}
    resets = [f for f in early["destination"] if f.segment.flags & RST]
    tuples = {f.segment.tuple for f in resets}
    lab.report.check("each peer has reset NEW", len(tuples) == CONNECTIONS, f"{len(resets)} resets")
    left = {}
    for at, some in frames.items():
        bad = [f for f in early[at] if at in (*lab.peer_points, "near") or f.segment.flags & RST]
        left[at] = [f for f in some if f not in bad]
    return left


def is_early(lab, since_ns, frame):
    """Whether it goes between a peer and NEW, untranslated."""
    return bool(frame.segment) and frame.at_ns < since_ns and lab.new in frame.addresses
