"""natkeep rollback: what it does at the sites of its own host, in which order, and what is next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.errors import RefusedError
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.rollback import RESTORE, RolledBack, rollback
from natkeep.plan.identity import Identity
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

GATEWAY, DESTINATION, SOURCE = (
    Site(role, role.value[:3]) for role in (Role.GATEWAY, Role.DESTINATION, Role.SOURCE)
)
KEPT = FourTuple(Endpoint.parse("10.1.0.2:50001"), Endpoint.parse("10.2.0.10:5000"))
AGAIN = "natkeep rollback web"


class Kernel(FakeKernel):
    """said: packets that a gateway's entries have counted from the process; spoken: that its table
    has noted some; gone: namespaces that are no more."""

    said, spoken = 0, False

    def __init__(self) -> None:
        super().__init__()
        self.gone: set[str] = set()

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        sites = tuple(sites)
        for site in sites:
            if site.netns in self.gone:
                raise NamespaceGoneError(f"the network namespace {site.netns!r} is gone")
        super().open_sites(sites, known)

    def observe(self, site: Site, plan: Plan) -> Observation:
        seen = super().observe(site, plan)
        entries = {
            number: tuple(entry and SeenEntry(True, 1, self.said, True) for entry in some)
            for number, some in seen.entries.items()
        }
        spoken = frozenset(Connections.of([KEPT]).each()) if self.spoken else frozenset()
        return replace(seen, entries=entries, spoken=spoken)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def again(kernel: Kernel, tmp_path: Path) -> Callable[..., RolledBack]:
    """A rollback by an executor of its own, as every command has one."""
    state = StateDirectory(str(tmp_path / "state"), create=True)

    def run(*, yes: bool = False) -> RolledBack:
        return rollback(Executor(kernel, state), "web", yes=yes)

    return run


@pytest.fixture
def make(kernel: Kernel, tmp_path: Path) -> Callable[..., None]:
    state = StateDirectory(str(tmp_path / "state"), create=True)

    def prepare_at(*sites: Site, opened: bool = False) -> None:
        map_ = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
        prepare(Executor(kernel, state), Move("web", (map_,), sites), Connections.of([KEPT]))
        if opened:
            open_move(Executor(kernel, state), "web")

    return prepare_at


def gates(kernel: Kernel) -> dict[str, Gate]:
    return {name: gate for name, site in kernel.sites.items() for gate in site.gates.values()}


def test_at_a_gateway_it_undoes_and_says_what_comes_next(
    kernel: Kernel, make: Callable[..., None], again: Callable[..., RolledBack]
) -> None:
    make(GATEWAY, opened=True)
    done = again()
    assert done.undone == (GATEWAY,)
    assert done.next == (
        (Role.SOURCE, RESTORE),
        (Role.DESTINATION, AGAIN),
        (Role.SOURCE, AGAIN),
    )
    assert gates(kernel) == {}
    assert again().undone == ()


def test_at_a_destination_the_gateway_comes_first_among_what_is_left(
    kernel: Kernel, make: Callable[..., None], again: Callable[..., RolledBack]
) -> None:
    make(DESTINATION)
    kernel.arriving["des"] = Connections.of([KEPT])
    assert [role for role, _ in again().next] == [Role.GATEWAY, Role.SOURCE, Role.SOURCE]
    assert kernel.sites["des"].undone == {KEPT}


def test_a_source_waits_for_its_process(
    kernel: Kernel, make: Callable[..., None], again: Callable[..., RolledBack]
) -> None:
    make(SOURCE)
    done = again()
    assert done.undone == ()
    assert [role for role, _ in done.next] == [
        Role.GATEWAY, Role.SOURCE, Role.DESTINATION, Role.SOURCE,
    ]  # fmt: skip
    assert "NATKEEP_ID=web criu restore" in done.next[1][1]
    assert gates(kernel) == {"sou": Gate.CLOSED}

    kernel.sites["sou"].sockets.add(KEPT)
    done = again()
    assert done == RolledBack((SOURCE,), ((Role.DESTINATION, AGAIN),))
    assert gates(kernel) == {}


def test_all_under_one_id_the_gateway_first_then_the_process_then_the_rest(
    kernel: Kernel, make: Callable[..., None], again: Callable[..., RolledBack]
) -> None:
    make(GATEWAY, DESTINATION, SOURCE)
    done = again()
    assert done == RolledBack((GATEWAY,), ((Role.SOURCE, RESTORE), (Role.SOURCE, AGAIN)))
    assert gates(kernel) == {"des": Gate.CLOSED, "sou": Gate.CLOSED}
    assert again() == done

    kernel.sites["sou"].sockets.add(KEPT)
    assert again().next == ()
    assert gates(kernel) == {}


@pytest.mark.parametrize("sites", [(DESTINATION,), (GATEWAY, DESTINATION)])
def test_what_was_opened_is_not_rolled_back_unasked(
    sites: tuple[Site, ...],
    kernel: Kernel,
    make: Callable[..., None],
    again: Callable[..., RolledBack],
) -> None:
    make(*sites, opened=True)
    before = gates(kernel)
    with pytest.raises(RefusedError, match="web was opened at destination=des"):
        again()
    assert gates(kernel) == before
    again(yes=True)
    assert gates(kernel) == {}


@pytest.mark.parametrize(("said", "spoken"), [(1, False), (0, True)])
def test_a_gateway_that_has_heard_the_process_at_new_refuses(
    said: int,
    spoken: bool,
    kernel: Kernel,
    make: Callable[..., None],
    again: Callable[..., RolledBack],
) -> None:
    """spoken: in mode stateless, where nothing is counted, or after another has deleted entries."""
    make(GATEWAY, opened=True)
    kernel.said, kernel.spoken = said, spoken
    with pytest.raises(RefusedError, match="has spoken at NEW"):
        again()
    assert gates(kernel) == {"gat": Gate.OPEN}


def test_an_opened_destination_refuses_though_its_namespace_is_gone(
    kernel: Kernel, make: Callable[..., None], again: Callable[..., RolledBack]
) -> None:
    make(GATEWAY, DESTINATION, opened=True)
    kernel.gone.add("des")
    with pytest.raises(RefusedError, match="web was opened at destination=des"):
        again()


def test_what_took_the_place_of_an_earlier_move_is_not_led_to_the_source(
    kernel: Kernel, make: Callable[..., None], tmp_path: Path
) -> None:
    make(GATEWAY, opened=True)
    executor = Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))
    further = Map(parse_address("10.2.0.10"), parse_address("10.4.0.30"))
    kept = Connections.of([KEPT])
    replace_move(executor, "web", Move("web2", (further,), (GATEWAY,)), kept, Gate.OPEN)
    with pytest.raises(RefusedError, match=r"took the place of web \(10.2.0.10=10.3.0.20\)") as no:
        rollback(executor, "web2")
    assert "prepare ID --replace web2 --map 10.2.0.10=10.3.0.20" in (no.value.hint or "")
    assert gates(kernel) == {"gat": Gate.OPEN}
    assert rollback(executor, "web2", yes=True).undone == (GATEWAY,)
