"""what the kernel tests share: running a command in a namespace, and a picture of all of it.

Whatever a test observes is looked at in two ways, which must show the same: by a snapshot that is
used once, and by one that is used again, when most of what it needs has been read.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.time_scale import scaled
from natkeep.plan.move import Site
from natkeep.plan.observation import Observation
from natkeep.plan.steps import Plan
from natkeep.values import replace

Run = Callable[..., str]
Picture = Callable[[str], list[str]]


def _run(netns: str, *command: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["nsenter", f"--net=/run/netns/{netns}", *command],
        capture_output=True,
        text=True,
        input=stdin,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


@pytest.fixture
def run() -> Run:
    """`run(netns, "ip", "link", ...)`: its output; the test fails when the command does."""
    return _run


def _await_carrier(netns: str, *devices: str) -> None:
    """Until the kernel has noticed the cable, which it does a moment later: it is in pictures."""
    deadline = time.monotonic() + scaled(10)
    while any("state UP" not in _run(netns, "ip", "link", "show", name) for name in devices):
        assert time.monotonic() < deadline, "a cable was plugged in and has no carrier"


@pytest.fixture
def make_site(make_netns: Callable[[], str]) -> Callable[[], str]:
    """`make_site()`: a namespace that has NEW on a device, and routes to 10.1/16 and fd00:1::/64.

    Its devices eth0 and wire are the ends of one cable; nothing else is on it.
    """

    def make() -> str:
        netns = make_netns()
        for command in (
            "link add eth0 type veth peer name wire",
            "link set wire addrgenmode none up",
            "link set eth0 addrgenmode none up",
            "address add 10.3.0.20/24 dev eth0",
            "address add fd00:3::20/64 dev eth0 nodad",
            "route add 10.1.0.0/16 via 10.3.0.1",
            "route add fd00:1::/64 via fd00:3::1",
        ):
            _run(netns, "ip", *command.split())
        _await_carrier(netns, "eth0", "wire")
        await_addresses(netns)
        return netns

    return make


@pytest.fixture(autouse=True)
def _look_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = LinuxKernel.observe

    def observe(kernel: LinuxKernel, site: Site, plan: Plan) -> Observation:
        seen = fresh(kernel, site, plan)
        with closing(kernel.snapshot(site)) as snapshot:
            for _ in range(3):
                again = snapshot.observe(site, plan)
                # Seconds since a socket spoke: these go on from one look to the next.
                assert again.silences.keys() == seen.silences.keys()
                assert replace(again, silences=seen.silences) == seen
        return seen

    monkeypatch.setattr(LinuxKernel, "observe", observe)


PICTURE = r"""
nft -j list ruleset
ip -j addr
ip -j route show table all
ip -6 -j route show table all
ip -j -d rule
ip -6 -j -d rule
for family in ipv4 ipv6; do
    # An entry's time runs down by itself.
    conntrack -L -f $family -o id 2>&1 | sed -E 's/^(tcp +6) [0-9]+/\1/' | sort
done
# Its exit code is not 0 when some of them are write-only.
sysctl --all --pattern '^net[.]' 2>/dev/null || true
"""


@pytest.fixture
def take_picture() -> Picture:
    """All that natkeep could have changed in a namespace, line by line, to be compared as it is."""

    def take(netns: str) -> list[str]:
        return _run(netns, "sh", "-ec", PICTURE).splitlines()

    return take
