"""The listener moves along: new clients reach it where it is now, by its old address.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), no listener any more
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    │ new  │─── SYN ─────────▶│ :5000 │─── SYN ─────────▶│ :5000 │─── SYN ─────────▶│ listens│
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                 :5001 ─▶ to the source, as before       destination 10.3.0.20 (NEW)

The kept connection carries on. A connection that begins while the process is frozen is not
refused: the SYN is dropped, comes again by itself, and is answered when the gate is open. Another
port of OLD does not belong to the move, and goes to the old host.
"""

SETUP = {"engine": "criu"}  # a list of connections, which is what `repair` has, names no listeners


def run(lab, listen=None):
    """listen: where the server listens, if not at OLD."""
    lab.listeners = True
    lab.begin(listen=listen)
    lab.freeze()
    lab.prepare()
    early = lab.new_connections.dial(lab.old)
    lab.new_connections.wait(early)
    lab.restore()
    lab.traffic.talk_on()
    lab.new_connections.are_accepted(early, lab.new_connections.dial(lab.old))
    lab.new_connections.are_refused(lab.new_connections.dial(lab.old, 5001))
    lab.finish()
