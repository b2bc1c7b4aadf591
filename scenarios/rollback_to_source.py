"""The restore at the destination fails for good; the process goes on at the source, unnoticed.

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

from natkeep.lab.criu_restore import Machine
from natkeep.lab.engine import Opening
from natkeep.lab.host import write_script

SETUP = {"engine": "criu"}


def run(lab):
    lab.begin(connections=2)
    machines = [Machine(lab, role) for role in ("gateway", "destination", "source")]
    gateway, destination, source = machines
    before = [machine.ruleset() for machine in machines]
    lab.freeze()
    for machine in machines:
        machine.prepare("web", *lab.frozen.options)
    gateway.natkeep("open", "web")
    lab.report.check("CRIU's lock is gone from the source", "CRIU" not in source.ruleset())

    failing = '[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]'
    opening = Opening(lambda: None, write_script(lab.directory / "failing-hook", failing))
    for attempt in ("first", "second"):
        name = f"the {attempt} restore at the destination fails"
        with lab.report.must_fail(name, "post-restore"):
            lab.engine.restore(destination.host, lab.traffic.server, lab.frozen, opening)

    source.refuses("it would answer 2 peers with a reset", "teardown", "web")
    gateway.refuses("nothing has come from NEW: a rollback?", "teardown", "web")
    gateway.natkeep("rollback", "web")
    source.natkeep("rollback", "web")  # too early: it says what comes first, and does nothing
    source.refuses("it would answer 2 peers with a reset", "teardown", "web")
    lab.restore_at_source(source.hook("web"))
    lab.traffic.talk_on()
    destination.natkeep("rollback", "web", "--drop", "0")
    source.natkeep("rollback", "web")
    after = [machine.ruleset() for machine in machines]
    lab.report.check("every machine's tables are as before", before == after)
    lab.finish(moved=False)
