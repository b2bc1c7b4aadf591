"""Clients dial a server that is slow to accept; quiesced, it can be dumped, and nobody is lost.

    clients 10.1.0.2           gateway            source 10.2.0.10 (OLD): SYNs wait, queue drains
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  30 connections  └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination 10.3.0.20 (NEW)

CRIU does not dump a listener with connections in its queue, unless it may lose them
(--skip-in-flight). `natkeep quiesce` drops new SYNs, whose senders retry, until the queue is
empty. The move of the same id takes the hold over: who dials meanwhile gets in at the
destination (--listeners), and is never refused.
"""

from natkeep.lab.home import Machine, expect, fails

SETUP = {"engine": "criu"}


def tell(lab):
    lab.serve()
    lab.server.application.do({"accept_every": 40})
    source = Machine(lab, "source")
    source.environment = {"NATKEEP_STATE_DIR": str(lab.directory / "natkeep-state")}
    before = source.ruleset()
    lab.dial(connections=30)  # their side is open as soon as the kernel has answered

    fails(
        lab,
        "without quiesce the dump fails",
        lambda: lab.engine.freeze(lab.at, lab.server, lab.directory / "too-early"),
        "In-flight connection",
    )
    source.natkeep("quiesce", "lab", *source.map(), "--site", source.site)
    held = lab.call()
    lab.talk()
    lab.freeze()

    lab.listeners = True
    gateway, destination = lab.topology["gateway"], lab.topology["destination"]
    sites = [f"gateway={gateway.name}", f"destination={destination.name}", source.site]
    lab.place_order()
    options = [word for site in sites for word in ("--site", site)]
    source.natkeep("prepare", "lab", *source.map(), *options, "--listeners", *lab.frozen.options)
    expect(lab, "the move has taken the hold over", "hold-lab" in source.ruleset())
    late = lab.call()
    lab.restore()
    lab.server.application.do({"accept_every": 0})
    lab.lets_in(held, late)
    lab.talk_on()
    lab.finish()
    expect(lab, "natkeep leaves nothing at the source", source.ruleset() == before)
