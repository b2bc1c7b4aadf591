"""the namespaces that a bench stands in; they go with it, and so does what still runs in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NEW, ROUTER = "10.3.0.20", "10.3.0.1"


PREFIX = "natkeep-bench-"  # of all names; then the bench's pid


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace of this name, which is the bench's own."""
    try:
        subprocess.run(["ip", "netns", "add", name], check=True)  # ended by a signal, it is there
        yield name
    finally:
        if Path("/run/netns", name).exists():
            _end_all(name)
            subprocess.run(["ip", "netns", "delete", name], check=True)


def _end_all(name: str) -> None:
    """What an interrupted bench has not ended; it is in nobody else's namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True)
    for pid in map(int, listed.stdout.split()):
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove_left_by(pid: int) -> None:
    """Remove the namespaces of a bench that could not do so itself."""
    for path in Path("/run/netns").glob(f"{PREFIX}{pid}-*"):
        _end_all(path.name)
        subprocess.run(["ip", "netns", "delete", path.name], check=False)


def end_children() -> None:
    """Kill what we have started; a signal may have come before we knew of it."""
    pid = os.getpid()
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def destination(name: str) -> Iterator[str]:
    """A namespace that has NEW, and a route to the peers."""
    with namespace(name):
        lines = [
            "link set lo up", "link add eth0 type veth peer name eth1",
            f"address add {NEW}/24 dev eth0", "link set eth0 up", "link set eth1 up",
            f"route add default via {ROUTER}",
        ]  # fmt: skip
        command = ["ip", "-n", name, "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), check=True, text=True)
        yield name


def end_on_sigterm() -> None:
    """Have SIGTERM end the bench as Ctrl-C does: what was made goes then, too."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)  # a second one must not disturb that
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
