"""plan/ruleset.py: goldens, compared literally, and a grammar that no input can change.

After a change that is meant: `NATKEEP_GOLDEN=write pytest tests/plan/test_ruleset.py` writes
tests/plan/golden/*.nft anew; read the difference before you commit it. The same files go through
nft's own dry run in tests/kernel/test_golden.py, because a golden text that looks right may
still be no ruleset.
"""

from __future__ import annotations

import os
import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from golden_rules import CASES, KEPT, MAP4, MAP6
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.errors import UsageError
from natkeep.plan import arp, base_chains
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.nft import Chain, Object, Set
from natkeep.plan.plan_text import render_nft
from natkeep.plan.roles import ROLES, Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import FillSet, InstallGate, InstallTranslation, OpenGate, Plan
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

GOLDEN = Path(__file__).parent / "golden"


def render(plan: Plan, *, opened: bool) -> str:
    """The script of the plan's only site."""
    [(_, lines)] = render_nft(plan)
    opening = [line for step in plan.open for line in step.lines()] if opened else []
    return "\n".join((*lines, *opening)) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_ruleset_is_the_golden_one(name: str) -> None:
    case = CASES[name]
    rendered = render(case.plan(), opened=case.opened)
    file = GOLDEN / f"{name}.nft"

    if os.environ.get("NATKEEP_GOLDEN") == "write":
        file.write_text(rendered, encoding="ascii")

    assert file.read_text(encoding="ascii") == rendered


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {f"{name}.nft" for name in CASES} == {file.name for file in GOLDEN.iterdir()}


@pytest.mark.parametrize("objects", [base_chains.base_table(), arp.arp_table()])
def test_a_table_that_is_there_already_is_an_error(objects: tuple[Object, ...]) -> None:
    """`create` once, at the top: two that start at the same time must not both succeed."""
    lines = [str(one) for one in objects]

    assert lines[0].startswith("create table ")
    assert not any(line.startswith("create") for line in lines[1:])


def test_only_icmp_is_sent_to_the_rules_of_errors() -> None:
    """There is a pair of them for each move: other people's datagrams would ask them all."""
    lines = [str(one) for one in base_chains.mode_table(Mode.STATELESS)]
    (sent,) = [line for line in lines if line.endswith(f"jump {base_chains.ERRORS}")]

    assert "meta l4proto { icmp, ipv6-icmp } jump" in sent


def test_a_set_is_given_its_size() -> None:
    plan = make_plan(Move("web", (MAP4, MAP6), (Site(Role.GATEWAY),)), KEPT)

    sizes = re.findall(r"kept-web-(\d) .*; size (\d+);", render(plan, opened=False))

    assert sizes == [("0", "2"), ("1", "1")]


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_the_number_of_rules_does_not_depend_on_the_number_of_connections(role: Role) -> None:
    def count(connections: int) -> int:
        kept = Connections.of(
            FourTuple(Endpoint(IPv4Address("10.1.0.2"), port), Endpoint(MAP4.old, 80))
            for port in range(1, connections + 1)
        )
        return len(render(make_plan(Move("web", (MAP4,), (Site(role),)), kept), opened=True))

    rules = [count(n) - n * len("10.1.0.2 . 1 . 80, ") for n in (1, 9)]
    assert rules[0] == rules[1]


def words_of(move_id: str, map_: Map, kept: Connections, mode: Mode) -> str:
    """All that natkeep would ever hand to nft for such a move, less what is always the same."""
    lines: list[str] = []
    for role in (Role.GATEWAY, Role.DESTINATION):
        plan = make_plan(Move(move_id, (map_,), (Site(role),), mode), kept)
        for step in plan.steps:
            if isinstance(step, InstallGate | InstallTranslation | OpenGate):
                lines += step.lines()
                lines += [undo.command(7) for one in step.objects() for undo in one.undo()]
            elif isinstance(step, FillSet):
                lines += step.lines()
    return "\n".join(lines)


_WORD = re.compile(r"[A-Za-z0-9_.:-]*[A-Za-z0-9_.-]|:")


def kept_of(peer: Address, old: Address, peer_port: int, port: int) -> Connections:
    return Connections.of([FourTuple(Endpoint(peer, peer_port), Endpoint(old, port))])


SKELETONS = {
    (map_.old.version, mode): _WORD.sub(
        "W", words_of("web", map_, kept_of(peer, map_.old, 9, 80), mode)
    )
    for map_, peer in ((MAP4, IPv4Address("10.1.0.2")), (MAP6, IPv6Address("fd00:1::2")))
    for mode in Mode
}
IDS = st.text(max_size=8) | st.text("abcz019-_AZt", min_size=1, max_size=34)
_WISH = 52  # octets


def make_wish(words: bytes) -> tuple[Map, Connections]:
    """Anything that fits the addresses and ports of a process, out of any octets."""
    six = words[0] & 1
    make = IPv6Address if six else IPv4Address
    # The first octet makes it unicast; whatever follows is free.
    old, new = (
        make(b"\xfd" + words[i : i + 15]) if six else make(b"\x0a" + words[i : i + 3])
        for i in (1, 16)
    )
    peer = make(b"\xfc" + words[33:48]) if six else make(b"\x0b" + words[33:36])
    ports = (max(1, int.from_bytes(words[i : i + 2], "big")) for i in (48, 50))
    return Map(old, new + 1 if new == old else new), kept_of(peer, old, *ports)


def test_only_characters_of_a_closed_alphabet_are_rendered() -> None:
    for skeleton in SKELETONS.values():
        assert re.fullmatch(r'[W {}@"&|()!=;,\n-]+', skeleton)


@pytest.mark.whole
@settings(max_examples=125)
@given(IDS, st.binary(min_size=16 * _WISH, max_size=16 * _WISH))
def test_whatever_is_given_only_words_change_and_never_the_grammar(
    move_id: str, words: bytes
) -> None:
    """2,000 moves have the same punctuation as a harmless one: nothing can be smuggled in."""
    try:
        Move(move_id, (MAP4,), (Site(Role.GATEWAY),))
    except UsageError:
        assert not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", move_id) or "_" in move_id
        move_id = "x"  # it is refused, so nothing is ever rendered with it
    for start in range(0, len(words), _WISH):
        map_, kept = make_wish(words[start : start + _WISH])
        mode = [*Mode][words[start] >> 1 & 1]

        text = words_of(move_id, map_, kept, mode)

        assert SKELETONS[map_.old.version, mode] == _WORD.sub("W", text)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("role", Role)
def test_what_all_moves_share_is_known_by_name(mode: Mode, role: Role) -> None:
    """Or the last move would take its own away and leave the table, as another's."""
    peers = role == Role.DESTINATION
    parts = base_chains.translation_tables(ROLES[role], mode, peers=peers)
    names = {one.name for part in parts for one in part if isinstance(one, Chain | Set)}

    assert names <= base_chains.shared_names()
