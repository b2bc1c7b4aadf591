"""A gateway and a destination, one link between them, and all that can be seen of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from bench.faults.surfaces import read_all_surfaces

_NETWORK = """
-n {gateway} link set lo up
-n {destination} link set lo up
link add gate0 netns {gateway} type veth peer name dest0 netns {destination}
-n {gateway} link set gate0 addrgenmode none up
-n {destination} link set dest0 addrgenmode none up
-n {gateway} address add 10.3.0.1/24 dev gate0
-n {destination} address add 10.3.0.20/24 dev dest0
-n {destination} route add 10.1.0.0/24 via 10.3.0.1
"""


def make_two_hosts(make_netns: Callable[[], str]) -> dict[str, str]:
    """The names of two new namespaces, by their roles."""
    names = {role: make_netns() for role in ("gateway", "destination")}
    run_ip(_NETWORK, names)
    return names


def run_ip(lines: str, names: dict[str, str]) -> None:
    """Each line as arguments of ip(8), with the namespaces' names in it."""
    for line in lines.strip().splitlines():
        subprocess.run(["ip", *line.format(**names).split()], check=True)


def look(names: dict[str, str]) -> dict[str, str]:
    """All surfaces of these namespaces: ruleset, addresses, routes, entries, settings and so on."""
    return {
        f"{role}: {surface}": text
        for role, name in names.items()
        for surface, text in read_all_surfaces(name).items()
    }


def demand_as_before(names: dict[str, str], before: dict[str, str]) -> None:
    """They look so; what an agent has sent to look at them may be there for a moment yet."""
    deadline = time.monotonic() + 30
    while (now := look(names)) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now == before
