"""Both ends move, and natkeep-hook prepares the server's, by what it is told of its peers.

    client 10.1.0.2 (P) ═════ router ═════ source 10.2.0.10 (OLD)           before

    third 10.4.0.30 (Q)                    destination 10.3.0.20 (NEW)      afterwards
    ┌────────────────┐                     ┌─────────────────┐
    │ P⇄Q, OLD⇄NEW   │═════ router ════════│ NEW⇄OLD, Q⇄P    │
    └────────────────┘                     └─────────────────┘
    by command, closed                     by the hook: NATKEEP_MAP=OLD=NEW NATKEEP_PEER_MAP=P=Q

The client's destination is prepared first: what the server says before the client is back is held
there.
"""

from natkeep.lab.both_ends import SETUP as ENDS
from natkeep.lab.both_ends import BothEnds
from natkeep.lab.criu_restore import CriuRestore

SETUP = {**ENDS, "engine": "criu"}


def run(lab):
    both = BothEnds(lab)
    both.begin(connections=3)
    both.freeze()
    both.prepare()
    moved, [(peer, now)] = CriuRestore(lab), lab.peers
    moved.restore({"NATKEEP_MAP": f"{lab.old}={lab.new}", "NATKEEP_PEER_MAP": f"{peer}={now}"})
    lab.place_order(move_id=next(each for each in moved.moves() if each.startswith("criu-")))
    both.restore()
    lab.traffic.talk_on()
    both.finish()
