"""A peer that a move has brought to a host is translated by that move, and not once more there."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.errors import RefusedError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

OLD, NEW, P, Q = map(ip_address, ("10.2.0.10", "10.3.0.20", "10.1.0.2", "10.4.0.30"))
OURS = FourTuple(Endpoint(P, 5000), Endpoint(OLD, 80))


def test_it_is_refused_until_that_move_has_ended(tmp_path: Path) -> None:
    kernel = FakeKernel()
    executor = Executor(kernel, StateDirectory(str(tmp_path), create=True))
    there = Site(Role.DESTINATION, "host")
    prepare(executor, Move("cli", (Map(P, Q),), (there,)), Connections.of([OURS.reply()]))
    before = kernel.sites["host"]
    site = Site(Role.PEER, "host")
    web, kept = Move("web", (Map(OLD, NEW),), (site,)), Connections.of([OURS])
    kernel.surroundings = Surroundings(at_peers=((site, frozenset({P})),))

    with pytest.raises(RefusedError, match="a peer was moved there by cli") as refused:
        prepare(executor, web, kept)

    assert "--peer-map OLD=NEW" in str(refused.value.hint)
    assert kernel.sites["host"] == before
    assert executor.state.ids() == ("cli",)
    kernel.surroundings = NOTHING_SPECIAL
    teardown(executor, "cli")
    kernel.surroundings = Surroundings(at_peers=((site, frozenset({P})),))
    prepare(executor, web, kept)
