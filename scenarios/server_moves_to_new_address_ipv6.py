"""A server moves to another IPv6 address; its client notices nothing.

    client fd00:1::2           gateway            source fd00:2::10 (OLD), left silent
    ┌──────┐    fd00:2::10    ┌───────┐    fd00:3::20    ┌───────┐    fd00:2::10    ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination fd00:3::20 (NEW)

As server_moves_to_new_address; neighbour discovery must not say OLD either.
"""

SETUP = {"family": 6}
