"""One read-only image is restored at two destinations at once; one goes on, one is given up.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│───┬──────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘   │              └───────┘ destination      └────────┘
                                          │              ┌───────┐                  ┌────────┐
                                          └──────────────│NEW⇄OLD│──────────────────│ (spare)│
                                            10.4.0.30    └───────┘ third            └────────┘

As a spare is raised beside the host that shall take over. A connection has one peer, so one of them
may go on: the spare's restore is given up at post-restore, when its sockets exist, by a second
script. The image is mounted read-only at both, and is the same to the octet and to the nanosecond
of its files' times afterwards.
"""

import os
from dataclasses import replace

from natkeep.lab.criu_restore import CriuRestore
from natkeep.lab.topology import THIRD, USUAL
from natkeep.lab.translators import natkeep_command

SETUP = {"engine": "criu", "seats": (*USUAL, THIRD)}
VETO = '[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]'


def run(lab):
    lab.begin()
    lab.freeze()
    moved = CriuRestore(lab)
    third = lab.topology["third"]
    before = moved.fingerprint()
    moved.mount_read_only(moved.host, third)
    order = lab.place_order(move_id="lab")
    spare = replace(order, id="spare", new=THIRD.address(lab.family))
    goes_on = moved.start_run(order, sites=[f"gateway={order.gateway.name}", "destination"])
    given_up = moved.start_run(spare, host=third, criu=moved.script("veto", VETO))
    # The gateway is another move's, for all that this one knows: its gate stays until it is undone.
    moved.must_fail(1, "spare stays prepared, its gate closed", given_up)
    environment = {**os.environ, **moved.cli.environment}
    third.run(*natkeep_command(), "teardown", "spare", "--drop", "0", env=environment)
    moved.must_succeed(goes_on)
    lab.report.check("the image is what it was", before == moved.fingerprint())
    lab.traffic.talk_on()
    lab.finish()
    moved.check_no_segment("third")
