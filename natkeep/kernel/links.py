"""the devices of a namespace, as pyroute2 tells of them, for `natkeep check`.

Rule: read only. pyroute2 is imported only here, and only when a function is called: its import
takes 125 to 150 ms, so nothing that a restore waits for comes by here (that is address.py's).
"""

from __future__ import annotations


def find_xdp() -> tuple[str, ...]:
    """Names of the devices that have an XDP program attached, in order; OSError if refused."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            return tuple(
                link.get_attr("IFLA_IFNAME")
                for link in route.get_links()
                if link.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED")
            )
    except NetlinkError as error:
        raise OSError(error.code, str(error)) from error
