"""A control group as a pod's, for a test: cgroup v1 or v2, where there is one to write to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def pod_group(uid: str) -> Iterator[Path]:
    """The file that takes the numbers of its processes; they have to be gone when it ends."""
    tops = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*")]
    top = next((top for top in tops if os.access(top / "cgroup.procs", os.W_OK)), None)
    if top is None:
        pytest.skip("needs a control group that can be written to")
    group = top / f"natkeep-test-pod{uid}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs control groups that can be made: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def put(procs: Path, pid: int) -> None:
    """Have a process in it."""
    try:
        procs.write_text(str(pid))
    except OSError as error:
        pytest.skip(f"needs control groups that take a process: {error}")
