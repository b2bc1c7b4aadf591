"""When the kernel has taken up the IPv6 addresses that a namespace was given."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from natkeep.lab.time_scale import scaled


def wait_for_addresses(netns: str) -> None:
    """Until each may be used, and each device that is up has the kernel's own routes.

    A work queue does that later, also without duplicate detection.
    """
    deadline = time.monotonic() + scaled(10)
    while missing := [*_find_missing(netns)]:
        assert time.monotonic() < deadline, f"{netns}: waited in vain for {missing}"
        time.sleep(0.01)


def _find_missing(netns: str) -> Iterator[str]:
    routes = {
        (route["dst"], route["dev"]) for route in _ip(netns, "route", "show", "table", "local")
    }
    for link in _ip(netns, "address", "show", "up"):
        device = link["ifname"]
        for address in link["addr_info"]:
            if address.get("tentative") or (address["local"], device) not in routes:
                yield f"{address['local']} on {device}"
        if device != "lo" and ("ff00::/8", device) not in routes:
            yield f"ff00::/8 on {device}"


def _ip(netns: str, *words: str) -> list[dict[str, Any]]:
    command = ["ip", "-n", netns, "-json", "-6", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [each for each in json.loads(done.stdout or "[]") if each]
