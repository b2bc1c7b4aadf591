"""plan/resets.py: who is told, where, when, and who is left alone whatever happens."""

from __future__ import annotations

import re

import pytest

from natkeep.errors import RefusedError
from natkeep.plan import resets
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.move import Fate, Map, Move, Site
from natkeep.plan.plan_text import describe_plan, render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    InstallResets,
    OpenGate,
    Plan,
    SendResets,
    TakeOverLock,
)
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
SIX = Map(parse_address("fd00:2::10"), parse_address("fd00:3::20"))
ROLES = (Role.GATEWAY, Role.DESTINATION, Role.SOURCE)
KEPT = "10.1.0.2:50001 10.2.0.10:80"


def tuples(*texts: str) -> list[FourTuple]:
    """From `PEER LOCAL`."""
    return [FourTuple(*(Endpoint.parse(end) for end in text.split())) for text in texts]


def plan(
    *lost: str,
    among: tuple[str, ...] = (),
    roles: tuple[Role, ...] = ROLES,
    unkept: Fate = Fate.RESET,
    kept: str = KEPT,
    surroundings: Surroundings = NOTHING_SPECIAL,
    lock: DumpLock | None = None,
) -> Plan:
    """A plan that keeps *kept*; *lost* only the image's sockets tell, *among* the connections."""
    sites = tuple(Site(role, role.value) for role in roles)
    packed = Connections.of(tuples(*lost)) if unkept == Fate.RESET else Connections()
    move = Move("web", (MAP, SIX), sites, lock=lock, unkept=unkept, lost=packed)
    connections = Connections.of(tuples(*([kept] if kept else []), *among))
    return make_plan(move, connections, surroundings)


def told(made: Plan) -> dict[str, list[str]]:
    """For each role the tuples that are reset there."""
    found: dict[str, list[str]] = {}
    for reset in made.resets:
        found.setdefault(reset.site.role.value, []).extend(str(each) for each in reset.connections)
    return found


def test_by_default_nothing_is_reset() -> None:
    made = plan(among=("10.2.0.10:7 10.2.0.10:80",), unkept=Fate.REPORT)

    assert made.resets == ()
    assert not [s for s in made.steps if isinstance(s, InstallResets | SendResets)]
    assert [str(each.inbound) for each in made.unkept] == ["10.2.0.10:7 > 10.2.0.10:80"]


def test_a_peer_on_a_wire_is_told_everywhere() -> None:
    lost = "10.1.0.9:9 > 10.2.0.10:80"

    assert told(plan("10.1.0.9:9 10.2.0.10:80")) == {role.value: [lost] for role in ROLES}


@pytest.mark.parametrize("peer", ["10.2.0.10:7", "127.0.0.1:7"])
def test_a_peer_on_the_source_host_is_not_looked_for_on_a_wire(peer: str) -> None:
    found = told(plan(among=(f"{peer} 10.2.0.10:80",)))

    assert found == {role: [f"{peer} > 10.2.0.10:80"] for role in ("destination", "source")}


def test_a_connection_whose_other_end_moves_along_lives_on() -> None:
    """A process that talks to itself by OLD: both ends are restored side by side."""
    both = ("10.2.0.10:7 10.2.0.10:80", "10.2.0.10:80 10.2.0.10:7")
    made = plan(among=both)

    assert made.unkept == ()
    assert {str(each) for each in made.inner} == {each.replace(" ", " > ") for each in both}
    assert told(made) == {}


def test_a_peer_on_a_gateway_is_not_looked_for_on_a_wire() -> None:
    around = Surroundings(beside=frozenset((parse_address("10.1.0.9"),)))
    lost = "10.1.0.9:9 > 10.2.0.10:80"

    made = plan(among=("10.1.0.9:9 10.2.0.10:80",), surroundings=around)

    assert told(made) == {"destination": [lost], "source": [lost]}


def test_a_peer_on_the_destination_is_left_to_its_own_kernel() -> None:
    local = Surroundings(local=frozenset({parse_address("10.3.0.20"), MAP.old}))
    lost = ("10.3.0.20:9 10.2.0.10:80", "10.2.0.10:7 10.2.0.10:80")

    assert told(plan(*lost, surroundings=local)) == {
        role: ["10.2.0.10:7 > 10.2.0.10:80"] for role in ("destination", "source")
    }


@pytest.mark.parametrize("peer", ["[fe80::1]:9", "[ff02::1]:9"])
def test_what_cannot_be_sent_anywhere_is_not_told(peer: str) -> None:
    assert told(plan(f"{peer} [fd00:2::10]:80")) == {}


def test_only_what_is_at_an_old_is_told() -> None:
    assert told(plan("10.1.0.9:9 10.2.0.99:80")) == {}


def test_a_kept_connection_is_never_told_even_if_it_is_named() -> None:
    made = plan(KEPT)

    assert made.resets == ()
    assert [str(each) for each in made.translations[0].kept] == ["10.1.0.2:50001 > 10.2.0.10:80"]


def test_nobody_is_told_before_all_gates_are_open() -> None:
    made = plan("10.1.0.9:9 10.2.0.10:80")
    kinds = [type(step) for step in made.open]

    assert kinds == [OpenGate, OpenGate, SendResets, SendResets, SendResets]
    assert not [step for step in made.prepare if isinstance(step, SendResets)]


def test_a_source_alone_tells_when_it_is_prepared_and_the_lock_is_gone() -> None:
    """Its `open` is the process that comes back: nobody may be told then."""
    lock = DumpLock(NetworkLock.NFTABLES, "aaf6b8e3")
    made = plan("10.1.0.9:9 10.2.0.10:80", roles=(Role.SOURCE,), lock=lock)

    assert [type(step) for step in made.prepare[-2:]] == [TakeOverLock, SendResets]
    assert [type(step) for step in made.open] == [OpenGate]
    taken = made.prepare[-2]
    assert isinstance(taken, TakeOverLock)
    assert len(taken.connections) == 2  # what is told is locked no more, either


def test_the_destination_is_silent_about_them_before_old_is_there() -> None:
    """What CRIU's restore sends for them must be neither answered nor seen on the wire."""
    made = plan("[fd00:1::9]:9 [fd00:2::10]:80", roles=(Role.DESTINATION,))
    steps = [*made.prepare]
    kinds = [type(step) for step in steps]
    [(_, lines)] = render_nft(made)

    assert AddAddress(Site(Role.DESTINATION, "destination"), SIX.old, SIX.new) in steps
    assert kinds.index(InstallResets) < kinds.index(AddAddress)
    assert "add element inet natkeep held6 { fd00:2::10 }" in lines


def test_each_map_has_its_set_and_its_size() -> None:
    made = plan(
        "10.1.0.9:9 10.2.0.10:80", "10.1.0.9:10 10.2.0.10:80", "[fd00:1::9]:9 [fd00:2::10]:80",
        roles=(Role.GATEWAY,),
    )  # fmt: skip
    [(_, lines)] = render_nft(made)
    filled = {s.name: len(s.connections) for s in made.prepare if isinstance(s, FillSet)}

    assert re.findall(r"(reset-web-\d) .*; size (\d+);", "\n".join(lines)) == [
        ("reset-web-0", "2"), ("reset-web-1", "1"),
    ]  # fmt: skip
    assert filled == {"kept-web-0": 1, "reset-web-0": 2, "reset-web-1": 1}


def test_a_move_that_keeps_nothing_may_still_reset() -> None:
    made = plan("10.1.0.9:9 10.2.0.10:80", kept="")

    assert made.translations == ()
    assert set(told(made)) == {role.value for role in ROLES}
    with pytest.raises(RefusedError, match="none of the 0 connections"):
        plan(kept="")


def test_what_none_can_keep_is_refused_by_default_and_reset_if_asked() -> None:
    lost = ("10.2.0.10:7 10.2.0.10:80",)
    with pytest.raises(RefusedError, match="on the source host too"):
        plan(among=lost, kept="", unkept=Fate.REPORT)

    assert set(told(plan(among=lost, kept=""))) == {"destination", "source"}


def test_the_number_of_rules_does_not_depend_on_how_many_are_lost() -> None:
    def count(lost: int) -> int:
        made = plan(*(f"10.1.0.9:{port} 10.2.0.10:80" for port in range(1, lost + 1)))
        return sum(line.count(" rule ") for _, lines in render_nft(made) for line in lines)

    assert count(1) == count(50)


def test_the_plan_says_whom_it_asks() -> None:
    said = list(describe_plan(plan("10.1.0.9:9 10.2.0.10:80")))

    asked = [line for line in said if "bare acknowledgement" in line]
    assert [line.rpartition(": ")[2] for line in asked] == [
        "10.2.0.10:80 > 10.1.0.9:9",  # the gateway asks the peer
        "10.1.0.9:9 > 10.2.0.10:80",  # the destination its process
        "10.2.0.10:80 > 10.1.0.9:9",
    ]
    opening = said.index("# when the sockets are there (natkeep open, or natkeep-hook at "
                         "post-restore):")  # fmt: skip
    assert all(said.index(line) > opening for line in asked)


def test_fates_are_told_in_words() -> None:
    everywhere = plan("10.1.0.9:9 10.2.0.10:80").resets
    by_gateway = plan("10.1.0.9:9 10.2.0.10:80", roles=(Role.GATEWAY,)).resets
    by_destination = plan("10.1.0.9:9 10.2.0.10:80", roles=(Role.DESTINATION,)).resets
    [lost] = tuples("10.1.0.9:9 10.2.0.10:80")

    assert [resets.describe_fates(r)[lost] for r in (everywhere, by_gateway, by_destination)] == [
        "reset, both ends",
        "reset, its peer; the process is met at no site of this move",
        "reset, the process; its peer is met at no site of this move",
    ]
