"""the base chain `gate`: it goes where no gate is closed, and comes back with one that closes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_kernel import revert_step

from natkeep.kernel import nftables, nftables_dump
from natkeep.kernel.interface import Packed
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import entered
from natkeep.plan.base_chains import gate_chain
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.repair import LoadObjects
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import HoldListeners, InstallGate, OpenGate, Plan, Prior
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

Run = Callable[..., str]

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]


class Gates:
    """Moves at one gateway, and what stands in the base chain `gate`."""

    def __init__(self, netns: str, run: Run) -> None:
        self.site, self.run, self.kernel = Site(Role.GATEWAY, netns), run, LinuxKernel()
        self.kernel.open_sites([self.site])
        self.plans: dict[str, Plan] = {}
        self.priors: dict[tuple[str, object], Prior] = {}

    def prepare(self, move_id: str) -> None:
        number = len(self.plans) + 1
        old, new = (parse_address(f"10.{net}.0.{number}") for net in (2, 3))
        end = Endpoint(parse_address("10.1.0.2"), 5000)
        kept = Connections.of([FourTuple(end, Endpoint(old, 80))])
        self.plans[move_id] = make_plan(Move(move_id, (Map(old, new),), (self.site,)), kept)
        for step in self.plans[move_id].prepare:
            self.priors[move_id, step] = self.kernel.apply(step, lambda prior: None)

    def opening(self, move_id: str) -> OpenGate:
        [step] = self.plans[move_id].open
        assert isinstance(step, OpenGate)
        return step

    def open(self, move_id: str) -> None:
        self.kernel.apply(self.opening(move_id), lambda prior: None)

    def packed(self, move_id: str) -> Packed:
        return self.kernel.ask(self.site, nftables.pack_open, self.opening(move_id))

    def close(self, move_id: str) -> None:
        revert_step(self.kernel, self.opening(move_id), Prior())

    def remove(self, move_id: str) -> None:
        for step in reversed(self.plans[move_id].prepare):
            revert_step(self.kernel, step, self.priors.get((move_id, step), Prior()))

    def hold_listeners(self) -> None:
        """A quiesce at the same host, of the move `two`."""
        source = Site(Role.SOURCE, self.site.netns)
        self.kernel.open_sites([source])
        listener = Endpoint(parse_address("10.2.0.9"), 80)
        self.kernel.apply(HoldListeners(source, "two", (listener,)), lambda prior: None)

    @property
    def hooked(self) -> bool:
        with entered(self.site.netns):
            return nftables_dump.has_chain("natkeep", "gate")

    def listed(self, chain: str) -> str:
        return self.run(self.site.netns, "nft", "list", "chain", "inet", "natkeep", chain)


@pytest.fixture
def gates(make_site: Callable[[], str], run: Run) -> Iterator[Gates]:
    return Gates(make_site(), run)


def test_once_all_are_open_the_base_chain_goes(gates: Gates) -> None:
    gates.prepare("one")
    gates.prepare("two")
    gates.open("one")
    gates.kernel.unhook_gates()
    assert gates.hooked

    gates.open("two")
    gates.kernel.unhook_gates()
    assert not gates.hooked
    gates.kernel.unhook_gates()  # again is fine


def test_the_base_chain_comes_back_as_it_was_with_a_gate_that_closes(gates: Gates) -> None:
    gates.prepare("one")
    before = gates.listed("gate")
    gates.open("one")

    for close, reopen in (
        (lambda: gates.close("one"), lambda: gates.open("one")),
        (lambda: gates.prepare("two"), lambda: gates.open("two")),
    ):
        gates.kernel.unhook_gates()
        assert not gates.hooked
        close()
        assert before == gates.listed("gate")
        reopen()


def test_without_the_base_chain_an_open_move_misses_nothing_and_a_closed_one_does(
    gates: Gates,
) -> None:
    gates.prepare("one")
    gates.open("one")
    gates.kernel.unhook_gates()
    plan = gates.plans["one"]
    seen = gates.kernel.observe(gates.site, plan)
    assert find_drift(plan, gates.site, seen, opened=True) == ()

    gates.run(gates.site.netns, "nft", "flush chain inet natkeep gate-one")
    gates.run(gates.site.netns, "nft", "add rule inet natkeep gate-one drop")

    drift = find_drift(plan, gates.site, gates.kernel.observe(gates.site, plan), opened=True)
    assert "chain gate: gone" in drift


def test_a_move_that_goes_leaves_no_base_chain_for_those_that_are_open(gates: Gates) -> None:
    gates.prepare("one")
    gates.open("one")
    gates.kernel.unhook_gates()
    gates.prepare("two")

    gates.remove("two")

    assert not gates.hooked


def test_where_listeners_are_held_the_base_chain_stays(gates: Gates) -> None:
    gates.prepare("one")
    gates.open("one")
    gates.hold_listeners()

    gates.kernel.unhook_gates()

    assert gates.hooked


def test_the_base_chain_comes_back_for_listeners_that_are_to_wait(gates: Gates) -> None:
    gates.prepare("one")
    gates.open("one")
    gates.kernel.unhook_gates()

    gates.hold_listeners()

    assert "jump hold-two" in gates.listed("gate")


def test_the_base_chain_stays_when_others_changed_something_meanwhile(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them could have closed a gate."""
    gates.prepare("one")
    gates.open("one")
    look = nftables_dump.rules_of_chains

    def disturbed(table: str, *names: str) -> Iterator[nftables_dump.SeenRule]:
        gates.run(gates.site.netns, "nft", "add table ip others; delete table ip others")
        return look(table, *names)

    monkeypatch.setattr(nftables_dump, "rules_of_chains", disturbed)
    gates.kernel.unhook_gates()

    assert gates.hooked


def test_what_was_packed_at_prepare_removes_it_after_the_opening_and_nothing_else(
    gates: Gates,
) -> None:
    """As the hook's file sends it: refused where anything has changed since."""
    for disturbed in (False, True):
        name = "two" if disturbed else "one"
        gates.prepare(name)
        packed = gates.packed(name)
        with entered(gates.site.netns):
            send(packed.messages, packed.last)
            if disturbed:
                gates.run(gates.site.netns, "nft", "add table ip others")
                with pytest.raises(OSError, match="restarted"):
                    send(packed.unhooking, 2)
            else:
                send(packed.unhooking, 2)
            assert nftables.chain_state(gate_chain(name)) == Gate.OPEN
        assert gates.hooked is disturbed


def send(batch: bytes, last: int) -> None:
    with Netlink(NETLINK_NETFILTER) as netlink:
        netlink.send_transaction(batch, last)


def test_nothing_is_packed_to_remove_it_while_another_gate_is_closed(gates: Gates) -> None:
    gates.prepare("one")
    gates.prepare("two")

    packed = gates.packed("two")

    assert packed.unhooking == b""


def test_where_its_rules_were_not_seen_no_gate_is_taken_for_open(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a kernel wrote its rules in another form than the one that is looked for."""
    gates.prepare("closed")
    gates.prepare("open")
    gates.open("open")
    monkeypatch.setattr(nftables_dump, "rules_of_chains", lambda *_: iter(()))

    gates.kernel.unhook_gates()

    assert gates.hooked


def test_a_look_that_fails_keeps_no_gate_closed(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError(105, "No buffer space available")

    gates.prepare("one")
    monkeypatch.setattr(nftables_dump, "read_generation", fail)

    packed = gates.packed("one")
    gates.open("one")

    assert packed.unhooking == b""
    with entered(gates.site.netns):
        assert nftables.chain_state(gate_chain("one")) == Gate.OPEN


def test_a_closed_gate_that_is_repaired_brings_it_back(gates: Gates) -> None:
    """A closed gate was deleted, another one was opened, and the first is put back."""
    gates.prepare("closed")
    gates.prepare("open")
    gates.run(gates.site.netns, "nft", "flush chain inet natkeep gate-closed")
    gates.open("open")
    gates.kernel.unhook_gates()
    assert not gates.hooked
    [install] = [s for s in gates.plans["closed"].prepare if isinstance(s, InstallGate)]
    drop = tuple(one for one in install.objects() if str(one).endswith(" drop"))

    gates.kernel.mend(LoadObjects(gates.site, drop), lambda prior: None)

    assert gates.hooked


def test_what_a_lost_journal_left_goes_and_other_moves_stay_as_they_were(gates: Gates) -> None:
    gates.prepare("one")
    before = gates.run(gates.site.netns, "nft", "list", "ruleset")
    gates.prepare("two")
    gates.open("two")

    gates.kernel.clear_strays(gates.site, frozenset({"one"}), frozenset(), sure=True)
    assert gates.run(gates.site.netns, "nft", "list", "ruleset") == before

    gates.kernel.clear_strays(gates.site, frozenset(), frozenset(), sure=True)
    assert gates.run(gates.site.netns, "nft", "list", "ruleset") == ""
