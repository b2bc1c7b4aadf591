"""Clients dial a server that is slow to accept; quiesced, it can be dumped, and none is lost.

    clients 10.1.0.2           gateway            source 10.2.0.10 (OLD): SYNs wait, queue drains
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  30 connections  └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination 10.3.0.20 (NEW)

CRIU does not dump a listener with connections in its queue, unless it may lose them
(--skip-in-flight). `natkeep quiesce` drops new SYNs, whose senders retry, until the queue is
empty. The move of the same id takes over that rule: connections that begin meanwhile are
accepted at the destination (--listeners), and never refused.
"""

from natkeep.lab.criu_restore import Machine

SETUP = {"engine": "criu"}


def run(lab):
    lab.serve()
    lab.traffic.process.do({"accept_every": 40})
    source = Machine(lab, "source", state="natkeep-state")
    before = source.ruleset()
    lab.dial(connections=30)  # their side is open as soon as the kernel has answered

    with lab.report.must_fail("without quiesce the dump fails", "In-flight connection"):
        lab.engine.freeze(lab.at, lab.traffic.server, lab.directory / "too-early")
    source.natkeep("quiesce", "lab", *source.map(), "--site", source.site)
    early = lab.new_connections.dial(lab.old)
    lab.traffic.talk()
    lab.freeze()

    lab.listeners = True
    lab.place_order()
    roles = ("gateway", "destination", "source")
    source.prepare("lab", "--listeners", *lab.frozen.options, sites=roles)
    lab.report.check("the move has taken the hold over", "hold-lab" in source.ruleset())
    late = lab.new_connections.dial(lab.old)
    lab.restore()
    lab.traffic.process.do({"accept_every": 0})
    lab.new_connections.are_accepted(early, late)
    lab.traffic.talk_on()
    lab.finish()
    lab.report.check("natkeep leaves nothing at the source", source.ruleset() == before)
