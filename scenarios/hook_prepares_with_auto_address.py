"""A server is restored where NEW is not known beforehand; natkeep-hook finds it and prepares.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                              by command                 by the hook: NATKEEP_MAP=10.2.0.10=auto

As where a destination gets its address only when it is there. The gateway's gate stays closed until
the hook has opened that of the destination; two restores that fail before leave nothing behind.
"""

from natkeep.lab.criu_restore import CriuRestore

SETUP = {"engine": "criu"}


def run(lab):
    lab.begin()
    lab.freeze()
    moved = CriuRestore(lab)
    moved.must_abort("NATKEEP_MODE: 'both' is none of", {
        "NATKEEP_MAP": f"{lab.old}=auto", "NATKEEP_MODE": "both",
    })  # fmt: skip
    moved.must_abort("none of the 1 connections has the local address 10.9.9.9",
                     {"NATKEEP_MAP": "10.9.9.9=auto"})  # fmt: skip
    moved.prepare("at-gateway", "gateway")
    moved.restore({"NATKEEP_MAP": f"{lab.old}=auto"})
    by_hook = next(each for each in moved.moves() if each.startswith("criu-"))
    lab.place_order(move_id=by_hook)
    moved.cli.call("open", "at-gateway")
    lab.traffic.talk_on()
    lab.finish()
    moved.check_aborts_sent_nothing()
