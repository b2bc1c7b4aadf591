"""Connections that cannot be kept are reset at once, at both ends; the kept one goes on.

    client 10.1.0.2           gateway             source 10.2.0.10 (OLD): two peers live here
    ┌──────┐  10.2.0.10:5000  ┌───────┐            ┌──────────┐ 127.0.0.1:P, 10.2.0.10:Q
    │ peer │══════════════════│OLD⇄NEW│════════╗   │ local ✗ ─┼─▶ 10.2.0.10:5000, moved away
    │ :6000│◀─ ─ SYN ─ ─ ─ ─ ─│       │        ║   └──────────┘
    └──────┘                  └───────┘  10.3.0.20:5000  ┌───────┐ 10.2.0.10:5000 ┌────────┐
                                              ╚══════════│NEW⇄OLD│════════════════│ server │
                                            anti-spoof   └───────┘                └─ dials ┘
                                                         destination 10.3.0.20 (NEW)

Two peers of the server live on the host that it leaves: by their OLD address and by loopback, one
speaks and one is silent. The server itself is dialling :6000, which does not answer. None
of the three can be kept: by default they are reported, and hang. With `--unkept reset` every end
is reset when the move is opened, not earlier: until then the restore may fail, and all of it go
on at the source.
"""

from natkeep.lab.criu_restore import Machine
from natkeep.lab.unkept import UnkeptEnds

SETUP = {
    "engine": "criu",
    "points": {"source-lo": ("source", "lo"), "destination-lo": ("destination", "lo")},
}


def run(lab, unkept="reset"):
    """unkept: what natkeep is told to do; with `report` all of them have to hang."""
    lab.serve()
    lab.dial()
    ends = UnkeptEnds(lab)
    lab.traffic.talk()
    lab.freeze()

    source = Machine(lab, "source", state="natkeep-state")
    before = source.ruleset()
    lab.place_order()
    options = ["--mode", lab.mode, *lab.frozen.options, "--unkept", unkept]
    source.prepare("lab", *options, sites=("gateway", "destination", "source"))
    ends.speak()
    ends.hang("while the move is closed nobody is told")
    lab.restore()
    if unkept == "reset":
        ends.are_reset()
    else:
        ends.hang("they are reported, and hang")
    lab.traffic.talk_on()
    lab.finish()
    if unkept == "reset":
        ends.check_resets()
        lab.report.check("natkeep leaves no lock and no table at the source", not source.ruleset())
    lab.report.check("the source had CRIU's lock", "CRIU-" in before)
