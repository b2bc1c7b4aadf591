"""What a checkpoint says of one port of an OLD, which has a map of its own."""

from __future__ import annotations

import pytest

from natkeep.checkpoint import Checkpoint, Outcome, Socket, TcpState
from natkeep.plan.tuples import Endpoint, parse_local

OLD = "10.2.0.10"


def of(protocol: str, local: str, peer: str | None, unkept: str | None = None) -> Socket:
    state = TcpState.LISTEN if peer is None else TcpState.ESTABLISHED
    ends = (Endpoint.parse(local), peer and Endpoint.parse(peer))
    return Socket(protocol, *ends, state if protocol == "tcp" else None, unkept=unkept)


SOCKETS = (
    of("tcp", f"{OLD}:80", "10.1.0.2:1"),
    of("tcp", f"{OLD}:443", "10.1.0.2:1"),
    of("tcp", f"{OLD}:80", "10.1.0.2:2", "it is lost"),
    of("tcp", f"{OLD}:443", "10.1.0.2:2", "it is lost"),
    of("tcp", "0.0.0.0:80", None),
    of("tcp", "[::]:443", None),
    of("udp", f"{OLD}:80", "10.1.0.2:1"),
    of("udp", f"{OLD}:443", "10.1.0.2:1"),
    of("udp", "0.0.0.0:80", None),
    of("udp", f"{OLD}:443", None),
)


@pytest.mark.parametrize(
    ("olds", "ports"),
    [(f"{OLD}:80", {80}), (f"{OLD}:80 {OLD}:443", {80, 443}), (f"{OLD}:80 {OLD}", {80, 443})],
)
def test_what_is_at_other_ports_stays(olds: str, ports: set[int]) -> None:
    found, locals_ = Checkpoint.of(SOCKETS), [*map(parse_local, olds.split())]
    wanted = sorted(ports)

    assert [end.port for end in found.listeners_at(locals_)] == wanted
    assert [end.port for end in found.udp_servers_at(locals_)] == wanted
    assert sorted(one.destination.port for one in found.lost_at(locals_)) == wanted
    assert sorted(one.destination.port for one in found.udp_at(locals_)) == wanted
    kept = {
        each.local.port
        for each in SOCKETS
        if each.local and each.peer and each.outcome(locals_) == Outcome.KEPT
    }
    assert kept == ports
