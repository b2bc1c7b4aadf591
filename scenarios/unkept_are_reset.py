"""Connections that cannot be kept are told so at once, at both ends; the kept one goes on.

    client 10.1.0.2           gateway             source 10.2.0.10 (OLD): two peers live here
    ┌──────┐  10.2.0.10:5000  ┌───────┐            ┌──────────┐ 127.0.0.1:P, 10.2.0.10:Q
    │ peer │══════════════════│OLD⇄NEW│════════╗   │ local ✗ ─┼─▶ 10.2.0.10:5000, moved away
    │ :6000│◀─ ─ SYN ─ ─ ─ ─ ─│       │        ║   └──────────┘
    └──────┘                  └───────┘  10.3.0.20:5000  ┌───────┐ 10.2.0.10:5000 ┌────────┐
                                              ╚══════════│NEW⇄OLD│════════════════│ server │
                                            anti-spoof   └───────┘                └─ dials ┘
                                                         destination 10.3.0.20 (NEW)

Two peers of the server live on the host that it leaves: by their OLD address and by loopback, one
speaks and one is silent. The server itself is dialling :6000, whose owner does not answer. None
of the three can be kept: by default they are reported, and hang. With `--unkept reset` every end
is reset when the move is opened, not earlier: until then the restore may fail, and all of it go
on at the source.
"""

from natkeep.lab.home import Machine, expect
from natkeep.lab.unkept import LostEnds

SETUP = {
    "engine": "criu",
    "points": {"source-lo": ("source", "lo"), "destination-lo": ("destination", "lo")},
}


def tell(lab, unkept="reset"):
    """unkept: what natkeep is told to do; with `report` all of them have to hang."""
    lab.serve()
    lab.dial()
    lost = LostEnds(lab)
    lab.talk()
    lab.freeze()

    source = Machine(lab, "source")
    source.environment = {"NATKEEP_STATE_DIR": str(lab.directory / "natkeep-state")}
    before = source.ruleset()
    lab.place_order()
    hosts = {role: lab.topology[role].name for role in ("gateway", "destination", "source")}
    sites = [word for role, name in hosts.items() for word in ("--site", f"{role}={name}")]
    options = ["--mode", lab.mode, *lab.frozen.options, "--unkept", unkept]
    source.natkeep("prepare", "lab", *source.map(), *sites, *options)
    lost.speak()
    lost.hang("while the move is closed nobody is told")
    lab.restore()
    if unkept == "reset":
        lost.are_told()
    else:
        lost.hang("they are reported, and hang")
    lab.talk_on()
    lab.finish()
    if unkept == "reset":
        lost.judge_resets()
        expect(lab, "natkeep leaves no lock and no table at the source", not source.ruleset())
    expect(lab, "the source had CRIU's lock", "CRIU-" in before)
