"""Reads and writes the sysctls below net/ of the calling thread's namespace."""

from __future__ import annotations

import os
from contextlib import suppress

_NET = "/proc/sys/net"


def names(folder: str) -> list[str]:
    """What there is in `ipv6/conf`, say; nothing when it cannot be read."""
    with suppress(OSError):
        return sorted(os.listdir(f"{_NET}/{folder}"))
    return []


def read(name: str) -> str | None:
    """The value of `netfilter/nf_conntrack_max`, say; None when it cannot be read."""
    try:
        with open(f"{_NET}/{name}", encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def write(name: str, value: str) -> bool:
    """Set it; whether that could be done."""
    try:
        with open(f"{_NET}/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        return False
    return True
