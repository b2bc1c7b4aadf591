"""Finds the network namespace of a Kubernetes pod by its uid.

    pod:6b2f9c1e-...      the pod of that uid, on this machine; else as kernel/netns.py has it

All runtimes put a pod's processes below a control group with the uid in its name, `podUID` or, by
systemd, `podUID.slice` with `_` for `-`. The oldest of them is the pod's sandbox: what a container
starts may have a namespace of its own. Rule: a pod that has no process is an error, never ours.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from natkeep.errors import UsageError

PREFIX = "pod:"
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_STARTED = 19  # field 22 of /proc/PID/stat, counted behind the name


def find_netns(spec: str, proc: str = "/proc") -> str:
    """*spec*, or `pid:N` in the place of `pod:UID`; UsageError where no such pod runs here."""
    if not spec.startswith(PREFIX):
        return spec
    uid = spec.removeprefix(PREFIX)
    if not _UID.fullmatch(uid):
        raise UsageError(f"{spec!r} is not of the form pod:UID")
    oldest = min(_find_processes(uid, proc), default=None)
    if oldest is None:
        raise UsageError(f"no process of the pod {uid} runs here", hint="is it on another node?")
    pid = oldest[1]
    with suppress(OSError):  # who opens it says why it cannot
        if os.path.samefile(f"{proc}/{pid}/ns/net", f"{proc}/self/ns/net"):
            raise UsageError(f"the pod {uid} has no network namespace of its own")
    return f"pid:{pid}"


def _find_processes(uid: str, proc: str) -> list[tuple[int, int]]:
    """When each process of the pod was started, in ticks since boot, and its number."""
    found = []
    for name in filter(str.isdigit, os.listdir(proc)):
        with suppress(OSError, ValueError, IndexError):  # it has ended meanwhile
            if f"pod{uid}" in _read(f"{proc}/{name}/cgroup").replace("_", "-"):
                stat = _read(f"{proc}/{name}/stat").rpartition(")")[2].split()
                found.append((int(stat[_STARTED]), int(name)))
    return found


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
