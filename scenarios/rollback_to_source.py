"""The restore at the destination fails for good; the process goes on at home, and nobody noticed.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│       │══════════════════│ server │   restored from the same image
    └──────┘  2 connections   └───┬───┘                  └────────┘
                                  │ 10.3.0.20:5000       ┌────────┐
                                  └──────────────────────│   ✗    │   destination 10.3.0.20 (NEW)
                                                         └────────┘

Every machine is prepared by itself. The way back: the gateway first, so that peers reach the source
again, whose gate is still closed; the hook opens it when the sockets are there. The destination's
gate goes only then, since without it the destination would answer peers with resets. At last
natkeep's gate at the source may go.
"""

from natkeep.lab.engines import Opening
from natkeep.lab.home import Machine, come_home, conclude_at_home, expect, fails

SETUP = {"engine": "criu"}


def tell(lab):
    lab.serve()
    lab.dial(connections=2)
    lab.talk()
    gateway, destination, source = (Machine(lab, r) for r in ("gateway", "destination", "source"))
    machines = (gateway, destination, source)
    before = [machine.ruleset() for machine in machines]
    lab.freeze()
    for machine in machines:
        machine.prepare("web", *lab.frozen.options)
    gateway.natkeep("open", "web")
    expect(lab, "CRIU's lock is gone from the source", "CRIU" not in source.ruleset())

    broken = lab.directory / "broken-hook"
    broken.write_text('#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]\n')
    broken.chmod(0o755)
    for attempt in ("first", "second"):
        fails(
            lab,
            f"the {attempt} restore at the destination fails",
            lambda: lab.engine.restore(
                destination.host, lab.server, lab.frozen, Opening(lambda: None, broken)
            ),
            "post-restore",
        )

    source.refuses("it would answer 2 peers with a reset", "teardown", "web")
    gateway.refuses("2 connections of web live and will break", "teardown", "web")
    gateway.natkeep("teardown", "web", "--yes")
    come_home(lab, source.hook("web"))
    lab.talk_on()
    destination.natkeep("teardown", "web")
    source.natkeep("teardown", "web")
    after = [machine.ruleset() for machine in machines]
    expect(lab, "every machine's tables are as before", before == after)
    lab.quiet()
    lab.check_ends()
    conclude_at_home(lab)
