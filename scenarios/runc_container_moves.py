"""A container of runc moves to another network namespace; its client notices nothing.

    client 10.1.0.2         gateway          runc checkpoint at 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┬───────────────────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│ container 10.2.0.10   │
    └──────┘   4 connections  └───────┘    anti-spoof    └───────┴───────────────────────┘
                              runc restore in the network namespace of 10.3.0.20 (NEW)

runc's own annotation hands CRIU a configuration file, and that names natkeep-hook, which runs
where runc does: outside of the container's network namespace. (docs/containers.md)
"""

SETUP = {"engine": "runc"}
CONNECTIONS = 4
