"""A UDP server moves to another address; its peers see the same four-tuples, and no ICMP error.

 client 10.1.0.2                gateway                            destination 10.3.0.20 (NEW)
 ┌──────┐  10.2.0.10:5000  ┌─────────┐  10.3.0.20:5000  ┌─────────┐  10.2.0.10:5000  ┌────────┐
 │ peer │══════════════════│ OLD⇄NEW │══════════════════│ NEW⇄OLD │══════════════════│ server │
 └──────┘                  └─────────┘                  └─────────┘                  └────────┘

It has a socket for any peer, and beside it one that is connected to a peer. The gateway knows all
of them from before, and its entries would lead to OLD for as long as peers go on to speak. A peer
that comes after the move is served as well.
"""

SETUP = {"udp": True}


def run(lab):
    lab.conditions.gateway_tracks()
    lab.begin(connections=3)
    lab.traffic.connect(0)
    lab.move()
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.server_says()
    lab.traffic.client_says(6000)  # in fragments
    newcomer = lab.new_connections.dial(lab.old)
    lab.new_connections.are_accepted(newcomer)
    lab.finish()
