"""what `open` leaves to be done later never meets a prepare in the middle of its work.

A second after a move was opened a process takes the base chain of the gates away. A prepare at the
site that has just looked at this chain refers to it in its next transaction, and would fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natkeep.kernel import nftables, nftables_dump
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move, remove_gate_hooks
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.base_chains import DISPATCHES, GATE, SPOKEN
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.nft import TABLE, Object
from natkeep.plan.observation import Observation
from natkeep.plan.roles import Role
from natkeep.plan.steps import HoldListeners
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]


class Gateway:
    """One gateway, and moves of one connection each."""

    def __init__(self, netns: str, directory: str) -> None:
        self.netns, self.directory = netns, directory

    def executor(self) -> Executor:
        state = StateDirectory(self.directory, create=True)
        return Executor(LinuxKernel(state.path), state)

    def prepare(self, number: int) -> None:
        old, new = (parse_address(f"10.{net}.0.{number}") for net in (2, 3))
        peer = Endpoint(parse_address("10.1.0.2"), 2000)
        kept = Connections.of([FourTuple(peer, Endpoint(old, 80))])
        site = Site(Role.GATEWAY, self.netns)
        prepare(self.executor(), Move(f"m{number}", (Map(old, new),), (site,)), kept)

    def has_gate_hook(self) -> bool:
        return self.has(GATE)

    def has(self, chain: str) -> bool:
        with entered(self.netns):
            return nftables_dump.has_chain(TABLE, chain)

    def hear(self, number: int) -> None:
        """As if the destination of that move had spoken."""
        with entered(self.netns):
            element = f"inet {TABLE} spoken-m{number}-0 {{ 10.1.0.2 . 2000 . 80 }}"
            nftables.run_transaction([f"add element {element}"])


@pytest.fixture
def gateway(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[Gateway]:
    gateway = Gateway(make_netns(), str(tmp_path / "state"))
    yield gateway
    for move_id in gateway.executor().state.ids():
        teardown(gateway.executor(), move_id)


def test_a_prepare_that_has_looked_at_the_gate_hook_finds_it_in_its_transaction(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.prepare(1)
    open_move(gateway.executor(), "m1")
    look, removing = nftables.missing_gate_hook, []

    def look_and_be_overtaken() -> tuple[Object, ...]:
        seen = look()
        if not removing:  # in the moment between look and transaction
            other = threading.Thread(target=lambda: remove_gate_hooks(gateway.executor(), "m1"))
            removing.append(other)
            other.start()
            other.join(0.5)
        return seen

    monkeypatch.setattr(nftables, "missing_gate_hook", look_and_be_overtaken)
    gateway.prepare(2)
    [other] = removing
    other.join()

    assert gateway.has_gate_hook()  # the second gate is closed
    open_move(gateway.executor(), "m2")
    remove_gate_hooks(gateway.executor(), "m2")
    assert not gateway.has_gate_hook()


def test_what_open_leaves_waits_for_no_lock(gateway: Gateway) -> None:
    gateway.prepare(1)
    open_move(gateway.executor(), "m1")
    state = gateway.executor().state
    with state.changing("m1"):
        remove_gate_hooks(gateway.executor(), "m1")
    assert not gateway.has_gate_hook()
    remove_gate_hooks(gateway.executor(), "m2")  # of a move that is no more


def test_listeners_that_are_blocked_while_the_gate_hook_goes_are_blocked(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rule is in the base chain itself."""
    gateway.prepare(1)
    open_move(gateway.executor(), "m1")
    look, removed = nftables.missing_gate_hook, []

    def look_and_be_overtaken() -> tuple[Object, ...]:
        seen = look()
        if not removed:
            removed.append(True)
            remove_gate_hooks(gateway.executor(), "m1")
        return seen

    site = Site(Role.SOURCE, gateway.netns)
    ends = (Endpoint(parse_address("10.2.0.1"), 80),)
    step = HoldListeners(site, "m2", ends)
    monkeypatch.setattr(nftables, "missing_gate_hook", look_and_be_overtaken)
    with entered(gateway.netns):
        nftables.load_block(step)
        assert "m2:hold" in [rule.comment for rule in nftables_dump.rules(TABLE, GATE)]
    assert removed


def test_a_gateway_asks_for_early_resets_until_each_destination_has_spoken(
    gateway: Gateway,
) -> None:
    """Which costs every packet its way through one more base chain."""
    early = DISPATCHES[SPOKEN].chain
    gateway.prepare(1)
    open_move(gateway.executor(), "m1")
    assert not remove_gate_hooks(gateway.executor(), "m1")
    assert gateway.has(early)
    gateway.prepare(2)
    gateway.hear(1)
    assert not remove_gate_hooks(gateway.executor(), "m1")
    gateway.hear(2)
    assert remove_gate_hooks(gateway.executor(), "m1")
    assert not gateway.has(early)
    assert [one.gone for one in looks(gateway, "m1")] == [frozenset()]  # it is no drift

    gateway.prepare(3)
    assert gateway.has(early)


def looks(gateway: Gateway, move_id: str) -> list[Observation]:
    executor = gateway.executor()
    journal, plan = executor.load(move_id)
    executor.open_known(journal, plan.move.sites)
    return [executor.kernel.observe(site, plan) for site in plan.move.sites]
