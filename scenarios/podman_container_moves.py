"""A container of podman moves in an archive to another machine; its client notices nothing.

    client 10.1.0.2         gateway          podman container checkpoint at 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┬───────────────────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│ container 10.2.0.10   │
    └──────┘   4 connections  └───────┘    anti-spoof    └───────┴───────────────────────┘
                              podman container restore --import at 10.3.0.20 (NEW)

Two stores, two networks by the same path, one archive between them. The annotation travels in the
archive; the action script sets NATKEEP_ID, since podman passes no environment on.
(docs/containers.md)
"""

SETUP = {"engine": "podman"}
CONNECTIONS = 4
