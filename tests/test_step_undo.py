"""the inverses of steps: each is data that the journal holds, and reads back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden_journals.cases import BOTH, CASES, KEPT, SOURCE, V4, Case, listed, move

from natkeep.errors import JournalError
from natkeep.plan import step_undo as undos
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.identity import Identity
from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import undo_of
from natkeep.plan.steps import AddAddress, InsertEntries, Prior, Step
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, parse_address
from natkeep.plan.via import parse_via
from natkeep.state.codec import pack_line
from natkeep.state.directory import StateDirectory
from natkeep.state.journal import Journal
from natkeep.state.undo_codec import KINDS, Files, undo_from_json, undo_to_json

LOCK = DumpLock(NetworkLock.NFTABLES, "0b7b3bd1-6c2a-4b66-a8cb-6f1e28a1f4a0", False, 3)
PLANS = {
    **CASES,
    "lock": Case(move(SOURCE, lock=LOCK)),
    "peer": Case(move(Site(Role.PEER), maps=(V4,))),
    "udp": Case(move(Site(Role.GATEWAY), udp=KEPT)),
    "relay": Case(move(Site(Role.RELAY), maps=(V4,), vias=(parse_via("10.2.0.11"),))),
}
CARRIED = listed("10.2.0.10:5001 10.1.0.2:50002")
CARRIERS = listed("10.9.0.9:80 10.1.0.2:50002")


FORWARDS = Surroundings(forwarding=("ipv4/conf/eth0/forwarding",))  # of relays alone
PEERS = Surroundings(at_peers=((Site(Role.PEER), frozenset({parse_address("10.1.0.2")})),))


def steps_of(case: Case, surroundings: Surroundings | None = None) -> tuple[Step, ...]:
    at_peers = any(site.row.own for site in case.move.sites)
    around = surroundings or (PEERS if at_peers else FORWARDS)
    return make_plan(case.move, case.connections, around).steps


def files_of(case: Case) -> Files:
    olds = tuple(map_.old for map_ in case.move.maps)
    return Files(olds, connections=case.connections, came=NO_CONNECTIONS, udp=case.move.udp)


@pytest.mark.parametrize("name", PLANS)
def test_every_undo_is_read_as_it_was_written(name: str) -> None:
    case = PLANS[name]
    for step in steps_of(case):
        undo = undo_of(step)
        line = json.loads(json.dumps(undo_to_json(undo, files_of(case))))
        assert undo_from_json(line, files_of(case)) == undo


def test_the_plans_have_every_kind_of_undo() -> None:
    found = {type(undo_of(step)) for case in PLANS.values() for step in steps_of(case)}
    assert found == set(KINDS.values())


def test_kept_connections_are_said_by_reference() -> None:
    """However many there are, the journal's line stays as short."""

    def write(number: int) -> list[bytes]:
        some = (f"10.2.0.10:5000 10.1.0.2:{port}" for port in range(1024, 1024 + number))
        case = Case(move(*BOTH, maps=(V4,)), listed(*some))
        return [pack_line(undo_to_json(undo_of(one), files_of(case))) for one in steps_of(case)]

    assert write(2000) == write(2)
    assert max(map(len, write(2000))) < 2200  # octets, of the longest: the gateway's translation


def test_what_a_gateway_carried_is_said_in_full() -> None:
    """Its peers see another address, and no file has that beside the connection."""
    case = Case(move(*BOTH))
    around = Surroundings(frozenset(), CARRIED, CARRIERS)
    wanted = [undo_of(step) for step in steps_of(case, around) if isinstance(step, InsertEntries)]
    written = [undo_to_json(undo, files_of(case)) for undo in wanted]
    assert any(CARRIERS.v4.hex() in json.dumps(line) for line in written)
    assert [undo_from_json(line, files_of(case)) for line in written] == wanted


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kind": "address"},
        {"kind": "address", "address": 7},
        {"kind": "address", "address": "10.2.0.10", "more": 1},
        {"kind": "nowhere"},
        {"kind": "opening", "chains": "gate-web"},
        {"kind": "objects", "objects": [["inet", "chain"]], "part": ""},
        {"kind": "objects", "objects": [["inet", "chain", 7, "", ""]], "part": ""},
        {"kind": "entries", "outer": {"of": "elsewhere", "old": "10.2.0.10", "at": "10.2.0.10"}},
        {"kind": "entries", "outer": {"v4": "xyz", "v6": ""}},
        {"kind": "let-in", "listeners": [["attic", "10.2.0.10", "10.3.0.20", "stateful", [80]]]},
        {"kind": "lock", "lock": ["nft"], "connections": {"v4": "", "v6": ""}},
    ],
    ids=json.dumps,
)
def test_an_undo_that_is_not_of_the_form_is_a_corrupt_journal(
    value: dict[str, Any], tmp_path: Path
) -> None:
    state = StateDirectory(str(tmp_path / "state"), create=True)
    begin(state).note(0, "doing", Prior(), AddAddress(BOTH[1], parse_address("10.2.0.10")))
    path = tmp_path / "state" / "web.journal"
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | {'undo': value})}\n")

    journal = state.load("web")  # what is not undone needs no undo
    with pytest.raises(JournalError, match="the journal of web is corrupt: ") as caught:
        journal.resolve()
    assert caught.value.exit_code == 7


def begin(state: StateDirectory) -> Journal:
    namespaces = (Identity(4, 1), Identity(4, 2))
    return state.begin(move(*BOTH), KEPT, FORWARDS, namespaces, ("AddAddress",))


def test_the_undo_of_a_gate_has_what_came_later_too() -> None:
    """More connections have come: their objects go as well."""
    first, later = (
        next(undo_of(s) for s in steps_of(Case(move(*BOTH, maps=maps))) if s.site == BOTH[1])
        for maps in ((V4,), CASES["stateful"].move.maps)
    )
    assert isinstance(first, undos.RemoveGate)
    assert isinstance(later, undos.RemoveGate)
    assert set(first.objects) < set(later.objects)
