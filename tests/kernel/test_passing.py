"""kernel/passing.py: where no gate is closed packets pass them by, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from natkeep.kernel import nftables, passing
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import inside, open_namespace
from natkeep.plan import ruleset
from natkeep.plan.drift import find_drift
from natkeep.plan.mending import LoadLines
from natkeep.plan.move import Map, Move, Role, Site
from natkeep.plan.plan import make_plan
from natkeep.plan.steps import HoldListeners, InstallGate, OpenGate, Plan, Prior
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

Run = Callable[..., str]

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

OTHERS = "table inet others {\nchain c {\n}\n}\n"


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

    def close(self, move_id: str) -> None:
        self.kernel.revert(self.opening(move_id), Prior())

    def remove(self, move_id: str) -> None:
        for step in reversed(self.plans[move_id].prepare):
            self.kernel.revert(step, self.priors.get((move_id, step), Prior()))

    def hold_listeners(self) -> None:
        """A quiesce at the same host, of the move `two`."""
        source = Site(Role.SOURCE, self.site.netns)
        self.kernel.open_sites([source])
        listener = Endpoint(parse_address("10.2.0.9"), 80)
        self.kernel.apply(HoldListeners(source, "two", (listener,)), lambda prior: None)

    @property
    def comments(self) -> list[str]:
        with inside(open_namespace(self.site.netns)):
            return [rule.comment for rule in nftables.rules("natkeep", "gate")]

    @property
    def have_pass(self) -> bool:
        assert self.comments.count(ruleset.PASS) <= 1
        return ruleset.PASS in self.comments

    @property
    def hooked(self) -> bool:
        with inside(open_namespace(self.site.netns)):
            return nftables.has_chain("natkeep", "gate")

    def listed(self, chain: str) -> str:
        return self.run(self.site.netns, "nft", "list", "chain", "inet", "natkeep", chain)

    def others_do_something(self) -> None:
        self.run(self.site.netns, "nft", "-f", "-", stdin=OTHERS)


@pytest.fixture
def gates(make_site: Callable[[], str], run: Run) -> Iterator[Gates]:
    return Gates(make_site(), run)


def test_the_pass_comes_with_the_last_gate_that_opens(gates: Gates) -> None:
    gates.prepare("one")
    gates.prepare("two")
    assert not gates.have_pass

    gates.open("one")
    assert not gates.have_pass

    gates.open("two")
    assert gates.comments[0] == ruleset.PASS


def test_the_pass_goes_with_a_gate_that_closes_and_comes_back_without_it(gates: Gates) -> None:
    gates.prepare("one")
    gates.open("one")

    gates.prepare("two")
    assert not gates.have_pass
    gates.open("two")
    assert gates.have_pass

    gates.close("one")
    assert not gates.have_pass
    gates.open("one")
    assert gates.have_pass


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
        assert gates.have_pass


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
    assert gates.have_pass

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
    look = passing.elements.rules

    def disturbed(table: str, chain: str) -> list[nftables.Rule]:
        gates.run(gates.site.netns, "nft", "add table ip others; delete table ip others")
        return look(table, chain)

    monkeypatch.setattr(passing.elements, "rules", disturbed)
    gates.kernel.unhook_gates()

    assert gates.hooked


@pytest.mark.parametrize("guarded", [False, True])
def test_it_is_what_its_text_says(
    gates: Gates, make_site: Callable[[], str], guarded: bool
) -> None:
    """Where there has been a destination, bare SYNs and CRIU's own segments still ask the gates."""
    static = [*ruleset.render_static(), *(ruleset.render_leaving() if guarded else ())]
    typed = make_site()
    text = "\n".join([*static, ruleset.render_pass(guarded=guarded)])
    gates.run(typed, "nft", "-f", "-", stdin=text)
    gates.run(gates.site.netns, "nft", "-f", "-", stdin="\n".join(static))
    gates.prepare("one")
    gates.open("one")

    shown = [
        gates.run(netns, "nft", "list", "chain", "inet", "natkeep", "gate")
        for netns in (typed, gates.site.netns)
    ]

    assert ("tcp flags != syn" in shown[0]) is guarded
    assert shown[0] == shown[1]


def test_where_listeners_are_held_bare_syns_do_not_pass(gates: Gates) -> None:
    """A quiesce at a host that is some other move's gateway."""
    gates.prepare("one")
    gates.open("one")

    gates.hold_listeners()

    assert gates.have_pass
    listed = gates.run(gates.site.netns, "nft", "list", "chain", "inet", "natkeep", "gate")
    assert 'fin,syn,rst,ack accept comment "gate:pass"' in listed


def test_a_transaction_with_the_pass_is_refused_when_others_were_there_meanwhile(
    gates: Gates,
) -> None:
    gates.prepare("one")
    packed = gates.kernel.pack_open(gates.opening("one"))
    assert packed is not None
    gates.others_do_something()

    with inside(open_namespace(gates.site.netns)):
        with pytest.raises(OSError, match="restarted"):
            nftables.send_packed(packed.with_pass, packed.last + 1)
        assert not gates.have_pass
        nftables.send_packed(packed.messages, packed.last)

    assert not gates.have_pass
    gates.close("one")
    gates.open("one")  # which looks again
    assert gates.have_pass


def test_who_changes_things_all_the_time_has_gates_opened_without_it(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates.prepare("one")
    look = passing.elements.rules_of_chains

    def disturbed(table: str, *names: str) -> Iterator[nftables.Rule]:
        gates.run(gates.site.netns, "nft", "add table ip others; delete table ip others")
        return look(table, *names)

    monkeypatch.setattr(passing.elements, "rules_of_chains", disturbed)
    gates.open("one")

    assert not gates.have_pass
    with inside(open_namespace(gates.site.netns)):
        assert nftables.rules("natkeep", "gate-one")[0].comment == ruleset.OPEN


def test_where_the_base_chain_was_not_seen_nothing_is_taken_for_open(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a kernel wrote its rules in another form than the one that is looked for."""
    gates.prepare("closed")
    gates.prepare("open")
    monkeypatch.setattr(passing.elements, "rules_of_chains", lambda *_: iter(()))

    gates.open("open")

    assert not gates.have_pass


def test_a_look_that_fails_keeps_no_gate_closed(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError(105, "No buffer space available")

    gates.prepare("one")
    monkeypatch.setattr(passing.elements, "read_generation", fail)

    packed = gates.kernel.pack_open(gates.opening("one"))
    gates.open("one")

    assert packed is not None
    assert packed.with_pass == b""
    assert not gates.have_pass
    with inside(open_namespace(gates.site.netns)):
        assert nftables.rules("natkeep", "gate-one")[0].comment == ruleset.OPEN


def test_nothing_is_packed_with_it_while_another_gate_is_closed(gates: Gates) -> None:
    gates.prepare("one")
    gates.prepare("two")

    packed = gates.kernel.pack_open(gates.opening("two"))

    assert packed is not None
    assert packed.with_pass == b""


def test_a_closed_gate_that_is_mended_takes_the_pass_out(gates: Gates) -> None:
    """Somebody deleted a closed gate, another one was opened, and the first is put back."""
    gates.prepare("closed")
    gates.prepare("open")
    gates.run(gates.site.netns, "nft", "flush chain inet natkeep gate-closed")
    gates.open("open")
    assert gates.have_pass
    [install] = [s for s in gates.plans["closed"].prepare if isinstance(s, InstallGate)]
    lines = tuple(line for line in install.lines() if line.endswith(" drop"))

    gates.kernel.mend(LoadLines(gates.site, lines), lambda prior: None)

    assert not gates.have_pass
