"""A peer and a destination on one cable, and a holder there of what comes at a closed gate.

    peer 10.1.0.2 ── veth ── destination 10.3.0.20 (NEW)

OLD, 10.2.0.10, is for each test to add.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from natkeep.kernel import segment_holder
from natkeep.kernel.netns import Namespace, open_namespace
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.time_scale import scaled

Run = Callable[..., str]

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
DEADLINE = scaled(10.0)  # s, for what happens at once unless it is broken


@dataclass
class Cable:
    """Both ends, and what is to be ended with the test."""

    peer: Namespace
    site: Namespace
    names: tuple[str, str]
    state: str
    run: Run
    stack: contextlib.ExitStack

    def end_with_test(self, holder: int, move_id: str = "web") -> None:
        """The *holder* is a child of the test's own process; a move's is init's."""
        self.stack.callback(_reap, holder)
        self.stack.callback(segment_holder.end, self.state, move_id)

    def await_held(self, count: int) -> segment_holder.Held:
        """Until the holder has so many segments and datagrams."""
        deadline = time.monotonic() + DEADLINE
        while True:
            held = segment_holder.look(self.state, "web")
            assert held is not None, "there is no holder"
            if held.segments + held.datagrams >= count:
                return held
            assert time.monotonic() < deadline, f"waited for {count}, it has {held}"


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


@pytest.fixture
def cable(
    make_netns: Callable[[], str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cable]:
    """Both, with their addresses; a busy machine's holder has time to answer."""
    monkeypatch.setattr(segment_holder, "PATIENCE", DEADLINE)
    peer, site = make_netns(), make_netns()
    run(site, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", peer)
    for netns, address in ((peer, PEER), (site, NEW)):
        run(netns, "ip", "link", "set", "eth0", "addrgenmode", "none", "up")
        run(netns, "ip", "address", "add", f"{address[4]}/8", "dev", "eth0")
        run(netns, "ip", "address", "add", f"{address[6]}/16", "dev", "eth0", "nodad")
    for netns in (peer, site):
        await_addresses(netns)
    with contextlib.ExitStack() as stack:
        found = []
        for netns in (peer, site):
            namespace = open_namespace(netns)
            stack.callback(os.close, namespace.fd)
            found.append(namespace)
        yield Cable(found[0], found[1], (peer, site), str(tmp_path), run, stack)
