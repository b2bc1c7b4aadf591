"""the ends: what the applications of both ends say of the kept connections, compared.

Rule: reports in, an `Assertion` out. Four-tuples run from the peer to the process; *views* says
for each, as the peer sees it, how the process sees it (they differ behind a gateway's own NAT).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natkeep.lab.application import Report, faults
from natkeep.lab.report import Assertion
from natkeep.plan.tuples import Endpoint, FourTuple

Views = Mapping[FourTuple, FourTuple]


def tuple_of(connection: dict[str, Any]) -> FourTuple:
    """A connection of a report, from its own end to the other."""
    return FourTuple(Endpoint.parse(connection["local"]), Endpoint.parse(connection["peer"]))


def octets_agree(client: Report, server: Report, views: Views) -> Assertion:
    """Every octet arrived once, in order, in both directions, and no connection broke."""
    theirs = {tuple_of(each).reply(): each for each in server["connections"]}
    kept = [theirs[each] for each in views.values() if each in theirs]
    bad = [*faults(client), *faults({"connections": kept})]
    for each in client["connections"]:
        name = tuple_of(each)
        other = theirs.get(views.get(name, name), {"rx": 0, "tx": 0})
        if (each["rx"], each["tx"]) != (other["tx"], other["rx"]):
            bad.append(f"{each['local']} sent {each['tx']} and got {each['rx']}, "
                       f"the process got {other['rx']} and sent {other['tx']}")  # fmt: skip
    total = sum_of(client, "rx") + sum_of(client, "tx")
    ok = not bad and total > 0
    detail = "; ".join(bad[:3]) if bad else f"{total} octets, each checked by its number"
    return Assertion("every octet arrived once and in order", ok, detail)


def sockets_agree(client: Report, server: Report, views: Views) -> Assertion:
    """getsockname and getpeername at both ends still tell the tuples of the beginning."""
    after = [tuple_of(each) for each in client["connections"]]
    theirs = {tuple_of(each).reply() for each in server["connections"]}
    missing = [str(each) for each in views.values() if each not in theirs]
    ok = after == list(views) and not missing
    detail = f"{len(after)} connections" if ok else f"peer {after}, process lacks {missing}"
    return Assertion("both ends' sockets tell the same four-tuples as before", ok, detail)


def sum_of(report: Report, key: str) -> int:
    """The sum of *key* over all connections."""
    return sum(each[key] for each in report["connections"])
