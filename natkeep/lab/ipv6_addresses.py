"""When the kernel has taken up the IPv6 addresses that a namespace was given.

A work queue does that, after a device has its carrier, also without duplicate detection.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from natkeep.lab.host import await_true


def await_addresses(netns: str, *, link_local: bool = False) -> None:
    """Wait until each address of *netns* may be used, and each device has the kernel's own routes.

    link_local: and until each device that is up has its carrier and a link-local address.
    LabError after 10 seconds.
    """
    await_true(lambda: not any(_find_missing(netns, link_local)), f"addresses: {netns}", seconds=10)


def _find_missing(netns: str, link_local: bool) -> Iterator[str]:
    routes = {
        (route["dst"], route["dev"]) for route in _ip(netns, "route", "show", "table", "local")
    }
    for link in _ip(netns, "address", "show", "up"):
        device, addresses = link["ifname"], link["addr_info"]
        for address in addresses:
            if address.get("tentative") or (address["local"], device) not in routes:
                yield f"{address['local']} on {device}"
        if device == "lo":
            continue
        if ("ff00::/8", device) not in routes:
            yield f"ff00::/8 on {device}"
        if link_local and not any(ip_address(each["local"]).is_link_local for each in addresses):
            yield f"link-local address on {device}"


def _ip(netns: str, *words: str) -> list[dict[str, Any]]:
    command = ["ip", "-n", netns, "-json", "-6", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [each for each in json.loads(done.stdout or "[]") if each]
