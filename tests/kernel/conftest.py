"""what the kernel tests share: running a command in a namespace, and a picture of all of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., str]
Picture = Callable[[str], dict[str, str]]


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
        return netns

    return make


PICTURES = {
    "ruleset": ("nft", "-j", "list", "ruleset"),
    "addresses": ("ip", "-j", "addr"),
    "routes": ("ip", "-j", "route", "show", "table", "all"),
    "routes6": ("ip", "-6", "-j", "route", "show", "table", "all"),
    "entries": ("conntrack", "-L", "-f", "ipv4", "-o", "id"),
    "entries6": ("conntrack", "-L", "-f", "ipv6", "-o", "id"),
}


@pytest.fixture
def take_picture() -> Picture:
    """All that natkeep could have changed in a namespace, as text, to be compared as it is."""

    def take(netns: str, *, sysctls: bool = True) -> dict[str, str]:
        picture = {name: _run(netns, *command) for name, command in PICTURES.items()}
        for name in ("entries", "entries6"):  # of which the time runs down by itself
            picture[name] = re.sub(r"(?m)^(\w+ +\d+) \d+", r"\1", picture[name])
        if sysctls:
            done = subprocess.run(
                ["nsenter", f"--net=/run/netns/{netns}", "sysctl", "--all", "--pattern", "^net[.]"],
                capture_output=True,
                text=True,
            )  # its exit code is not 0 when some settings are write-only
            picture["sysctls"] = done.stdout
        return picture

    return take
