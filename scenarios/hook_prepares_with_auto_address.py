"""A server is restored where nobody knows NEW beforehand; natkeep-hook finds it and prepares.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                              by command                 by the hook: NATKEEP_MAP=10.2.0.10=auto

As where a destination gets its address only when it is there. The gateway's gate stays closed until
the hook has opened that of the destination; two restores that fail before leave nothing behind.
"""

from natkeep.lab.criu_restore import Doors

SETUP = {"engine": "criu"}


def tell(lab):
    lab.serve()
    lab.dial()
    lab.talk()
    lab.freeze()
    doors = Doors(lab)
    doors.must_abort("NATKEEP_MODE: 'both' is none of", {
        "NATKEEP_MAP": f"{lab.old}=auto", "NATKEEP_MODE": "both",
    })  # fmt: skip
    doors.must_abort("none of the 1 connections has the local address 10.9.9.9",
                     {"NATKEEP_MAP": "10.9.9.9=auto"})  # fmt: skip
    doors.prepare("at-gateway", "gateway")
    doors.restore({"NATKEEP_MAP": f"{lab.old}=auto"})
    by_hook = next(each for each in doors.moves() if each.startswith("criu-"))
    doors.order(by_hook)
    doors.natkeep("open", "at-gateway")
    lab.talk_on()
    lab.finish()
    doors.judge_silences()
