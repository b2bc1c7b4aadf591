"""tests of what is shown: the JSON documents' keys and addresses, and the lines for a person."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from natkeep import report
from natkeep.checkpoint import LOOPBACK, Checkpoint, Socket, TcpState
from natkeep.checkpoint.images import read_checkpoint
from natkeep.checkpoint.judging import judge
from natkeep.cli.output import end_document, print_json
from natkeep.plan.connection_state import SiteStatus
from natkeep.plan.drift import MoveStatus
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.report import status as status_report

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION)
MOVE = Move(
    "web",
    (
        Map(parse_address("10.2.0.10"), parse_address("10.3.0.20")),
        Map(parse_address("fd00:2:0:0::10"), parse_address("FD00:3::0020")),
    ),
    (DESTINATION, GATEWAY),
)


def listed(*rows: str) -> Connections:
    ends = [map(Endpoint.parse, row.split()) for row in rows]
    return Connections.of(FourTuple(source=peer, destination=local) for local, peer in ends)


ROWS = (
    "10.2.0.10:5000 10.1.0.2:50594",
    "10.2.0.10:5000 10.1.0.2:50595",
    "[fd00:2::10]:5000 [fd00:1::2]:50596",
)
PLAN = make_plan(MOVE, listed(*ROWS, "10.9.0.9:1 10.1.0.2:50594"))
CONNECTIONS = [
    {"proto": "tcp", **dict(zip(("local", "peer"), row.split(), strict=True))} for row in ROWS
]
MAPS = [
    {"old": "10.2.0.10", "new": "10.3.0.20"},
    {"old": "fd00:2::10", "new": "fd00:3::20"},
]


def observe(
    plan: Plan, site: Site, start: int, *, gate: Gate = Gate.OPEN, counted: bool = True
) -> Observation:
    """A site where the packets of the connections are counted from *start* on."""
    entries: dict[int, tuple[SeenEntry | None, ...]] = {}
    for translation in plan.translations:
        if translation.site == site:
            counts = range(start, start + len(translation.kept))
            entries[translation.number] = tuple(
                SeenEntry(True, n if counted else None, 2 * n if counted else None, True)
                for n in counts
            )
            start += len(translation.kept)
    return Observation(gate, {}, frozenset(), entries, 3)


def make_status(**changes: Any) -> MoveStatus:
    sites = (
        SiteStatus(DESTINATION, observe(PLAN, DESTINATION, 1), ()),
        SiteStatus(GATEWAY, observe(PLAN, GATEWAY, 100), ("set kept-web-0: gone",)),
    )
    return replace(MoveStatus(PLAN, Gate.OPEN, sites), **changes)


def through_json(value: dict[str, Any]) -> dict[str, Any]:
    """What a script gets, which tells whether each value is one that JSON has."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    assert json.dumps(found) == json.dumps(value)
    return found


def status_to_json(moves: list[MoveStatus]) -> dict[str, Any]:
    """What a script gets; the whole is one document."""
    found: dict[str, Any] = json.loads(
        "".join(
            status_report.status_as_json([status_report.move_as_json(one, "b") for one in moves])
        )
    )
    return found


# ---- status ----------------------------------------------------------------------------------


def test_the_document_of_status_is_that_of_the_contract() -> None:
    assert status_to_json([make_status()]) == {
        "schema": 1,
        "moves": [
            {
                "id": "web",
                "mode": "stateful",
                "gate": "open",
                "maps": MAPS,
                "opened_at": None,
                "silent_ms": None,
                "answered": None,
                "listeners": [],
                "sites": [
                    {"role": "destination", "netns": "", "host": "b", "drift": []},
                    {
                        "role": "gateway",
                        "netns": "gw",
                        "host": "b",
                        "drift": ["set kept-web-0: gone"],
                    },
                ],
                "connections": [
                    {**row, "state": None, "packets": {"in": n, "out": 2 * n}}
                    for n, row in enumerate(CONNECTIONS, 1)
                ],
            }
        ],
    }
    assert status_to_json([]) == {"schema": 1, "moves": []}


def test_the_gate_of_status_is_closed_or_open() -> None:
    for gate in (Gate.CLOSED, Gate.OPEN):
        (move,) = status_to_json([make_status(gate=gate)])["moves"]
        assert move["gate"] == gate.value


def packets(status: MoveStatus) -> list[tuple[int | None, int | None]]:
    (move,) = status_to_json([status])["moves"]
    rows = move["connections"]
    assert [{key: row[key] for key in ("proto", "local", "peer")} for row in rows] == CONNECTIONS
    return [(row["packets"]["in"], row["packets"]["out"]) for row in rows]


def test_packets_are_those_of_the_destination_or_else_of_the_gateway() -> None:
    destination, gateway = make_status().sites
    assert packets(make_status(sites=(gateway, destination))) == [(1, 2), (2, 4), (3, 6)]
    gone = replace(destination, seen=None)
    assert packets(make_status(sites=(gone, gateway))) == [(100, 200), (101, 202), (102, 204)]


def test_packets_that_nobody_counts_are_null() -> None:
    destination, gateway = make_status().sites
    uncounted = replace(destination, seen=observe(PLAN, DESTINATION, 1, counted=False))
    assert packets(make_status(sites=(uncounted, gateway))) == [(None, None)] * 3
    both_gone = (replace(destination, seen=None), replace(gateway, seen=None))
    assert packets(make_status(sites=both_gone)) == [(None, None)] * 3

    assert destination.seen is not None
    entries = {n: (None,) * len(some) for n, some in destination.seen.entries.items()}
    no_entries = replace(destination, seen=replace(destination.seen, entries=entries))
    assert packets(make_status(sites=(no_entries, gateway))) == [(None, None)] * 3


def test_a_connection_that_has_no_entry_by_plan_is_shown_without_one() -> None:
    """Its peer is at the destination itself: it goes through lo, un-translated."""
    local = Surroundings(local=frozenset([parse_address("10.1.0.2")]))
    kept = listed("10.2.0.10:80 10.1.0.2:1", "10.2.0.10:80 10.1.0.3:2", "10.2.0.10:80 10.1.0.2:3")
    plan = make_plan(MOVE, kept, local)
    seen = Observation(Gate.OPEN, {}, frozenset(), {0: (SeenEntry(True, 7, 8, True),)}, 1)
    status = MoveStatus(plan, Gate.OPEN, (SiteStatus(DESTINATION, seen, ()),))
    (move,) = status_to_json([status])["moves"]
    assert [(row["peer"], row["packets"]["in"]) for row in move["connections"]] == [
        ("10.1.0.2:1", None), ("10.1.0.3:2", 7), ("10.1.0.2:3", None),
    ]  # fmt: skip


def test_the_lines_of_status() -> None:
    destination, gateway = make_status().sites
    assert destination.seen is not None
    entries = {**destination.seen.entries, 1: (None,)}
    seen = replace(destination.seen, entries=entries)
    status = make_status(sites=(replace(destination, seen=seen), gateway))
    assert list(status_report.status_lines(status, "b", verbose=False)) == [
        "web: 10.2.0.10=10.3.0.20, fd00:2::10=fd00:3::20, 3 connections, at gateway=gw, "
        "destination, gate open",
        "  on b",
        "  destination: as prepared",
        "  gateway=gw: DRIFTED",
        "    set kept-web-0: gone",
        "  LOCAL              PEER               STATE      PACKETS IN  OUT",
        "  10.2.0.10:5000     10.1.0.2:50594     no socket  1           2",
        "  10.2.0.10:5000     10.1.0.2:50595     no socket  2           4",
        "  [fd00:2::10]:5000  [fd00:1::2]:50596  no entry   -           -",
    ]
    uncounted = replace(destination, seen=observe(PLAN, DESTINATION, 1, counted=False))
    lines = status_report.status_lines(make_status(sites=(uncounted, gateway)), "b", verbose=False)
    assert list(lines)[-1] == "  [fd00:2::10]:5000  [fd00:1::2]:50596  no socket  ?           ?"
    lines = status_report.status_lines(make_status(sites=(gateway,)), "b", verbose=False)
    assert list(lines)[-1].split()[2:] == ["not", "tracked", "102", "204"]


@pytest.mark.parametrize(("count", "shown"), [(20, 20), (21, 20), (500, 20)])
def test_of_many_connections_some_are_listed_and_with_v_all(count: int, shown: int) -> None:
    plan = make_plan(MOVE, listed(*(f"10.2.0.10:80 10.1.0.2:{n + 1}" for n in range(count))))
    sites = (SiteStatus(DESTINATION, observe(plan, DESTINATION, 0), ()),)
    status = MoveStatus(plan, Gate.OPEN, sites)
    lines = list(status_report.status_lines(status, "b", verbose=False))
    assert sum("10.1.0.2:" in line for line in lines) == shown
    assert (lines[-1] == "  ... (all with -v)") == (count > shown)
    verbose = list(status_report.status_lines(status, "b", verbose=True))
    assert sum("10.1.0.2:" in line for line in verbose) == count
    assert len(status_to_json([status])["moves"][0]["connections"]) == count


# ---- plan ------------------------------------------------------------------------------------


def test_the_document_of_a_plan() -> None:
    document = through_json(report.plan_to_json(PLAN))
    keys = ("schema", "id", "mode", "maps", "sites", "connections", "steps")
    assert tuple(document) == keys
    assert [document[key] for key in keys[:4]] == [1, "web", "stateful", MAPS]
    assert document["connections"] == CONNECTIONS  # once each, though two sites translate them
    sites = [(site["role"], site["netns"], tuple(site)) for site in document["sites"]]
    own = ("role", "netns", "nft")
    assert sites == [("gateway", "gw", own), ("destination", "", own)]
    assert document["sites"][0]["nft"][0] == "create table inet natkeep"
    assert len(document["steps"]) == len(PLAN.steps)
    assert document["steps"][0]["step"] == "InstallGate"
    assert document["steps"][-1] == {
        "step": "OpenGate",
        "site": "destination",
        "commands": list(PLAN.steps[-1].describe()),
    }


def test_every_address_is_written_as_ipaddress_prints_it() -> None:
    """Whatever way it was written in."""

    def addresses(value: Any) -> list[str]:
        if isinstance(value, dict):
            mine = [value[key] for key in ("old", "new") if key in value]
            ends = [value[key] for key in ("local", "peer") if key in value]
            mine += [end.rpartition(":")[0].strip("[]") for end in ends]
            return mine + [found for each in value.values() for found in addresses(each)]
        if isinstance(value, list):
            return [found for each in value for found in addresses(each)]
        return []

    for document in (report.plan_to_json(PLAN), status_to_json([make_status()])):
        found = addresses(document)
        assert len(found) == 2 * len(MAPS) + 2 * len(CONNECTIONS)
        assert [str(ipaddress.ip_address(text)) for text in found] == found


def test_a_move_in_one_line_counts_in_english() -> None:
    one = make_plan(replace(MOVE, maps=MOVE.maps[:1], sites=(DESTINATION,)), listed(ROWS[0]))
    assert report.summary(one) == "web: 10.2.0.10=10.3.0.20, 1 connection, at destination"


def test_a_document_is_printed_to_stdout_and_ends_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_json({"schema": 1, "ö": ["[::1]:80"]})
    end_document()
    out, err = capsys.readouterr()
    assert (json.loads(out), out[-2:], err) == ({"schema": 1, "ö": ["[::1]:80"]}, "}\n", "")
    assert out.isascii()  # whatever the locale is


# ---- checkpoint ------------------------------------------------------------------------------

SOCKETS = (
    Socket(
        "tcp",
        Endpoint.parse("10.2.0.10:5000"),
        Endpoint.parse("10.1.0.2:50594"),
        TcpState.ESTABLISHED,
        bound_device="eth0",
        unsent=7,
    ),
    Socket(
        "tcp",
        Endpoint.parse("[fd00:2::10]:5000"),
        Endpoint.parse("[fd00:1::2]:9"),
        TcpState.CLOSE_WAIT,
    ),
    Socket("tcp", Endpoint.parse("[::]:5000"), None, TcpState.LISTEN),
    judge("udp", None, None, None, None, None),
)
KEYS = ("protocol", "state", "local", "peer", "device", "unsent", "unread", "kept", "reason")
KEYS += ("outcome",)
UDP = "bound to no port: no datagram reaches it"
LISTENER = "a listener: new connections reach it with --listeners only"


def test_the_document_of_inspect() -> None:
    document = through_json(report.checkpoint_to_json(Checkpoint.of(SOCKETS), []))
    assert tuple(document) == ("schema", "sum", "sockets")
    assert document["sum"] == {"kept": 2, "lost": 0, "restored": 1, "listener": 1}
    assert [tuple(row) for row in document["sockets"]] == [KEYS] * 4
    assert [tuple(row.values()) for row in document["sockets"]] == [
        (
            "tcp",
            "ESTABLISHED",
            "10.2.0.10:5000",
            "10.1.0.2:50594",
            "eth0",
            7,
            0,
            True,
            None,
            "kept",
        ),
        ("tcp", "CLOSE-WAIT", "[fd00:2::10]:5000", "[fd00:1::2]:9", None, 0, 0, True, None, "kept"),
        ("tcp", "LISTEN", "[::]:5000", None, None, 0, 0, False, LISTENER, "listener"),
        ("udp", None, None, None, None, 0, 0, False, UDP, "restored"),
    ]


def test_with_a_map_what_has_another_address_is_not_kept() -> None:
    olds = [parse_address("fd00:2::10")]
    rows = report.checkpoint_to_json(Checkpoint.of(SOCKETS), olds)["sockets"]
    other = "its local address is not an OLD of --map"
    assert [row["reason"] for row in rows] == [other, None, LISTENER, UDP]


def test_the_lines_of_inspect() -> None:
    first, *lines = report.checkpoint_lines(Checkpoint.of(SOCKETS), [])
    assert first == "2 kept, 0 lost, 1 needs nothing, 1 listener"
    assert [line.split(maxsplit=4) for line in lines] == [
        ["tcp", "ESTABLISHED", "10.2.0.10:5000", "10.1.0.2:50594", "kept (7 octets unsent)"],
        ["tcp", "CLOSE-WAIT", "[fd00:2::10]:5000", "[fd00:1::2]:9", "kept"],
        ["tcp", "LISTEN", "[::]:5000", "*", LISTENER],
        ["udp", "*", "*", "needs", f"nothing: {UDP}"],
    ]
    assert list(report.checkpoint_lines(Checkpoint(Connections()), [])) == ["no inet sockets"]


end = Endpoint.parse


def loopback(local: str, peer: str) -> Socket:
    return judge("tcp", TcpState.ESTABLISHED, end(local), end(peer), None, LOOPBACK)


def other(protocol: str, local: str | None, peer: str | None = None, state: Any = None) -> Socket:
    return judge(protocol, state, local and end(local), peer and end(peer), None, None)


HERE = judge("tcp", TcpState.LISTEN, end("127.0.0.1:8000"), None, None, LOOPBACK)
DIALS = judge("tcp", TcpState.SYN_SENT, end("10.2.0.10:4"), end("10.1.0.9:5"), None, None)


@pytest.mark.parametrize(
    ("socket", "outcome", "words"),
    [
        (loopback("127.0.0.1:1", "127.0.0.1:9"), "lost", f"LOST: {LOOPBACK}"),
        (loopback("[::1]:1", "[::1]:9"), "lost", f"LOST: {LOOPBACK}"),
        (
            loopback("127.0.0.1:8000", "127.0.0.1:3"), "restored",
            "comes back: its other end, 127.0.0.1:3, moves too",
        ),
        (HERE, "restored", "comes back: a listener that this host alone reaches"),
        (DIALS, "lost", "LOST: not yet established: CRIU dials again on restore"),
        (other("tcp", None, None, TcpState.CLOSED), "restored", "needs nothing: closed"),
        (
            judge("udp", None, end("127.0.0.1:5"), end("127.0.0.1:514"), None, LOOPBACK),
            "restored", None,
        ),
        (
            judge("udp", None, end("127.0.0.1:5"), None, None, LOOPBACK),
            "restored", "comes back: a listener that this host alone reaches",
        ),
        (other("udp", "10.2.0.10:53"), "kept", "kept"),
        (other("udp", "0.0.0.0:53"), "kept", "kept"),
        (other("udp", "10.2.0.10:4433", "10.1.0.2:9"), "kept", "kept"),
        (
            other("udp", "10.2.0.10:4433", "224.0.0.1:9"), "lost",
            "LOST: its peer 224.0.0.1 is no unicast address: it is whatever the link has there",
        ),
        (other("mptcp", "10.2.0.10:5"), "lost", "LOST: MPTCP: CRIU cannot restore it"),
    ],
    ids=str,
)  # fmt: skip
def test_only_what_has_an_end_elsewhere_is_lost(
    socket: Socket, outcome: str, words: str | None
) -> None:
    """nginx and its upstream on lo, both in the image: CRIU brings both back, and so it is said."""
    others = (loopback("127.0.0.1:3", "127.0.0.1:8000"),)
    checkpoint = Checkpoint.of((socket, *others))
    document = report.checkpoint_to_json(checkpoint, [])
    assert document["sockets"][0]["outcome"] == outcome
    _, line, *_ = report.checkpoint_lines(checkpoint, [])
    assert words is None or line.endswith(f"  {words}")
    plan = make_plan(replace(MOVE, maps=MOVE.maps[:1]), listed(*ROWS))
    told = [line for line in report.unkept_lines(Checkpoint.of((socket,)), plan)]
    alone = report.checkpoint_to_json(Checkpoint.of((socket,)), [])["sockets"][0]["outcome"]
    assert len(told) == (alone == "lost")


def test_what_a_move_leaves_behind_is_told_without_the_listeners() -> None:
    plan = make_plan(replace(MOVE, maps=MOVE.maps[:1]), listed(*ROWS))
    assert list(report.unkept_lines(Checkpoint.of(SOCKETS), plan)) == [
        "tcp [fd00:2::10]:5000 [fd00:1::2]:9: its local address is not an OLD of --map",
    ]
    listing = Checkpoint(listed(*ROWS, "10.9.0.9:1 10.1.0.2:2"))
    assert list(report.unkept_lines(listing, plan)) == [
        "2 connections whose local address is not an OLD of --map"
    ]
    assert list(report.unkept_lines(Checkpoint(listed(*ROWS[:2])), plan)) == []


def test_a_real_image_is_told_whole() -> None:
    """As many sockets as there are, each with an answer, and those that are kept are the plan's."""
    checkpoint = read_checkpoint(Path(__file__).parent / "checkpoint/corpus/plain")
    rows = report.checkpoint_to_json(checkpoint, [])["sockets"]
    assert len(rows) == len(checkpoint.sockets) > 0
    kept = {(row["local"], row["peer"]) for row in rows if row["kept"]}
    expected = {(str(t.destination), str(t.source)) for t in checkpoint.connections}
    servers = {(str(end), None) for end in checkpoint.udp_servers}
    assert kept == expected | servers
    assert servers == {("10.2.0.10:53", None)}
    assert all(row["kept"] == (row["reason"] is None) for row in rows)
