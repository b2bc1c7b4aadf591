"""the tests of where a guard stands in a plan, and that a journal remembers it."""

from __future__ import annotations

from natkeep.plan.identity import Identity
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import AddAddress, FillSet, GuardSite, InstallTranslation
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

OLD, NEW, PEER = (parse_address(text) for text in ("10.2.0.10", "10.3.0.20", "10.1.0.2"))
SITES = tuple(Site(role, str(role)) for role in (Role.GATEWAY, Role.DESTINATION, Role.SOURCE))
KEPT = Connections.of([FourTuple(Endpoint(PEER, 40_000), Endpoint(OLD, 5000))])


def move(*, guard: bool, old: Address = OLD) -> Move:
    return Move("web", (Map(old, NEW),), SITES, guard=guard)


def test_it_stands_behind_the_closed_gate_and_in_front_of_all_that_it_guards():
    for role in (Role.GATEWAY, Role.DESTINATION):
        steps = [
            step for step in make_plan(move(guard=True), KEPT).prepare if step.site.role == role
        ]
        kinds = [type(step) for step in steps]

        assert kinds.count(GuardSite) == 1
        at = kinds.index(GuardSite)
        assert kinds[at - 1] == FillSet
        assert InstallTranslation in kinds[at:]
        assert AddAddress not in kinds[:at]


def test_the_source_has_none_since_the_process_may_come_back_there():
    prepared = make_plan(move(guard=True), KEPT).prepare

    assert Role.SOURCE not in [step.site.role for step in prepared if isinstance(step, GuardSite)]


def test_without_being_asked_for_there_is_none():
    assert not any(isinstance(s, GuardSite) for s in make_plan(move(guard=False), KEPT).steps)


def test_plan_says_what_it_is_since_no_command_makes_it():
    (first, *_) = (s for s in make_plan(move(guard=True), KEPT).steps if isinstance(s, GuardSite))

    assert first.describe() == (
        "# ip netns exec gateway natkeep's guard: 1 connections outlive a flush of the ruleset",
    )


def test_journal_remembers_it(tmp_path):
    state = StateDirectory(str(tmp_path / "state"), create=True)
    with state.locked():
        for guard in (True, False):
            plan = make_plan(move(guard=guard), KEPT)
            kinds = tuple(type(step).__name__ for step in plan.steps)
            state.begin(plan.move, KEPT, plan.surroundings, (Identity(1, 2),) * 3, kinds, None)
            assert state.load("web").move.guard is guard
            state.remove("web")


def test_removing_a_move_removes_its_guards_files(tmp_path):
    state = StateDirectory(str(tmp_path / "state"), create=True)
    with state.locked():
        for name in ("web.guard-1", "web.guard-2", "web2.guard-3"):
            (tmp_path / "state" / name).touch()
        state.remove("web")

        left = [path.name for path in (tmp_path / "state").iterdir() if "guard" in path.name]
    assert left == ["web2.guard-3"]
