"""Restores are aborted by natkeep-hook; then the same image is restored, and the client talks on.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                              third 10.4.0.30: `elsewhere` was prepared for its namespace

Each time CRIU's log tells in one line what was wrong, the exit ends the restore while all sockets
are in repair, and not a segment leaves.
"""

from natkeep.lab.criu_restore import CriuRestore
from natkeep.lab.topology import THIRD, USUAL

SETUP = {"engine": "criu", "seats": (*USUAL, THIRD)}


def run(lab):
    lab.begin()
    lab.freeze()
    moved = CriuRestore(lab)
    moved.prepare("lab", "gateway", "destination")
    other = lab.topology["third"]
    moved.cli.call("prepare", "elsewhere", f"--map={lab.old}={THIRD.address(4)}",
                  f"--site=destination={other.name}", "--image", str(moved.images))  # fmt: skip
    moved.must_abort("contradict each other",
                     {"NATKEEP_ID": "lab", "NATKEEP_MAP": f"{lab.old}=auto"})  # fmt: skip
    moved.must_abort("no move nobody in", {"NATKEEP_ID": "nobody"})
    moved.must_abort("was prepared for another namespace", {"NATKEEP_ID": "elsewhere"})
    moved.cli.call("teardown", "elsewhere", "--drop", "0")
    moved.restore({"NATKEEP_ID": "lab"})
    lab.traffic.talk_on()
    lab.finish()
    moved.check_aborts_sent_nothing()
