"""NEW is known at the restore only; the hook asks for the gateway and waits until it is ready.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                  2. prepared and opened                 1. by the hook: NATKEEP_MAP=10.2.0.10=auto
                     from what the hook tells,           3. CRIU goes on, and has the sockets
                     then it says so

A gateway that does not answer in time ends the restore before there is a socket; nothing is sent.
The first is to answer by a FIFO and does not; the second restores the same image, and it is a file.
"""

import os
import threading
import time

from natkeep.lab.criu_restore import CriuRestore, Machine
from natkeep.lab.time_scale import scaled

SETUP = {"engine": "criu"}
LATE = 2.0
"""Seconds that the gateway's side takes."""


def run(lab):
    lab.begin(connections=2)
    lab.freeze()
    moved, gateway = CriuRestore(lab), Machine(lab, "gateway", state="natkeep-state")
    place = lab.directory / "move"
    place.mkdir(mode=0o700)
    told, ready, fifo = place / "told", place / "ready", place / "fifo"
    os.mkfifo(fifo, 0o600)
    orders = {"NATKEEP_MAP": f"{lab.old}=auto", "NATKEEP_TELL": str(told)}
    waits = str(scaled(20))

    def prepare_gateway():
        """What an operator's script does that reaches the gateway."""
        end = time.monotonic() + scaled(20)
        while not told.exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(LATE)
        _, _, move_id, maps = told.read_text().splitlines()[0].split()
        lab.report.check("the hook has told NEW", maps == f"{lab.old}={lab.new}", maps)
        gateway.prepare("web", "--gate", "open", "--connections", str(told))
        ready.write_text(f"ready {move_id}\n")

    moved.must_abort("NATKEEP_WAIT: 'soon' is no number", {
        **orders, "NATKEEP_READY": str(ready), "NATKEEP_WAIT": "soon",
    })  # fmt: skip
    moved.must_abort("the gateways are not ready", {
        **orders, "NATKEEP_READY": str(fifo), "NATKEEP_WAIT": "1",
    })  # fmt: skip
    lab.report.check("what was asked for is asked no more", not told.exists())
    script = threading.Thread(target=prepare_gateway)
    script.start()
    began = time.monotonic()
    moved.restore({**orders, "NATKEEP_READY": str(ready), "NATKEEP_WAIT": waits})
    lab.report.check("CRIU has waited", time.monotonic() - began > LATE)
    script.join()
    by_hook = next(each for each in moved.moves() if each.startswith("criu-"))
    for move_id in (by_hook, "web"):
        lab.place_order(move_id=move_id)
    lab.traffic.talk_on()
    lab.finish()
    moved.check_aborts_sent_nothing()
