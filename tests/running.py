"""whether a process runs that may be nobody's child by now."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only what waits to be reaped of it."""
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end between open and read
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
