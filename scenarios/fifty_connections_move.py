"""A server with fifty connections moves; all of them carry on, none confused with another.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  50 connections  └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         destination 10.3.0.20 (NEW)

Every connection has its own numbered octets, so a swap of two would be found.
"""

CONNECTIONS = 50
