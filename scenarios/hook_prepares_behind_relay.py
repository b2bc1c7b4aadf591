"""A server is restored behind a relay, and natkeep-hook prepares the destination by itself.

    client 10.1.0.2           relay 10.1.0.10 (OLD), 10.1.0.11 (FROM)   destination 10.1.0.20 (NEW)
    ┌──────┐  10.1.0.10:5000  ┌──────────────────────┐  10.1.0.20:5000  ┌───────────────────────┐
    │ peer │══════════════════│ OLD⇄NEW, peer⇄FROM:q │══════════════════│ NEW⇄OLD, FROM:q⇄peer  │
    └──────┘                  └──────────────────────┘                  └───────────────────────┘
                              by command, closed            by the hook, before CRIU has a socket:
                              until the restore is through  NATKEEP_MAP=OLD=auto NATKEEP_VIA=FROM

Either counts the relay's ports for itself, of the same image.
"""

from natkeep.lab.criu_restore import CriuRestore, Machine
from natkeep.lab.relay import FLAT, ByRelay

SETUP = {**FLAT, "engine": "criu"}


def run(lab):
    by = ByRelay(lab)
    by.begin(connections=3)
    lab.freeze()
    moved, relay = CriuRestore(lab), Machine(lab, "source")
    orders = {"NATKEEP_MAP": f"{lab.old}=auto", "NATKEEP_VIA": str(by.source)}
    moved.must_abort("is no range of ports", {**orders, "NATKEEP_VIA": f"{by.source}:9-1"})
    site = f"relay={relay.host.name}"
    more = ["--site", site, "--via", str(by.source), *lab.frozen.options]
    relay.natkeep("prepare", "web", *relay.map(), *more)
    by.note_wires(relay.cli.call("status", "web", "--json"))
    by.take_over()
    moved.restore(orders)
    lab.place_order(move_id=next(each for each in moved.moves() if each.startswith("criu-")))
    relay.natkeep("open", "web")
    lab.traffic.talk_on()
    lab.traffic.check_ends()
    by.check_spoofs()
    relay.natkeep("teardown", "web", "--yes")
    lab.conclude()
    moved.check_aborts_sent_nothing()
