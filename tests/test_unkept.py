"""`--unkept reset` from the doors to the plan: what is asked, counted, stored, refused and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep import policy, report
from natkeep.checkpoint import ELSEWHERE, NO_UDP, Checkpoint, Socket, TcpState
from natkeep.cli.arguments import authorise, make_move
from natkeep.cli.parser import make_parser
from natkeep.criu.environment import read_orders
from natkeep.errors import RefusedError, UsageError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Fate, Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import AddAddress
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.report import status as status_report
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
SITES = (Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst"))
OLDS = [MAP.old]


def end(text: str | None) -> Endpoint | None:
    return text and Endpoint.parse(text)


def tcp(local, peer, state=TcpState.ESTABLISHED, unkept=None, protocol="tcp") -> Socket:
    return Socket(protocol, end(local), end(peer), state, unkept=unkept)


KEPT = tcp("10.2.0.10:80", "10.1.0.2:50001")
DIALS = tcp("10.2.0.10:40000", "10.1.0.7:5432", TcpState.SYN_SENT, "not yet established")
BOTH_ENDS = "loopback: both ends must be moved"
LOOPBACK = tcp("10.2.0.10:80", "127.0.0.1:7", unkept=BOTH_ENDS)
MULTIPATH = tcp("10.2.0.10:81", "10.1.0.8:9", None, "MPTCP: CRIU cannot restore it", "mptcp")
LEFT_ALONE = [
    KEPT,
    tcp("10.2.0.10:80", None, TcpState.LISTEN),
    tcp("10.2.0.10:80", "10.1.0.9:9", TcpState.CLOSED, "closed"),
    tcp("10.2.0.10:80", "10.1.0.9:9", TcpState.TIME_WAIT, "closed"),
    tcp("10.2.0.10:80", "10.1.0.9:9", unkept=ELSEWHERE),
    tcp("10.9.0.1:80", "10.1.0.9:9", unkept="loopback"),
    tcp(None, None, TcpState.CLOSED, "closed"),
    Socket("udp", end("10.2.0.10:53"), end("10.1.0.9:53"), unkept=NO_UDP),
]


def names(connections: Connections) -> list[str]:
    return [str(each) for each in connections]


def inbound(*texts: str) -> Connections:
    """From `PEER LOCAL`."""
    return Connections.of(
        FourTuple(*(Endpoint.parse(each) for each in text.split())) for text in texts
    )


LOST = inbound("10.1.0.7:5432 10.2.0.10:40000")


# ---- which of an image's sockets ---------------------------------------------------------------


def test_peers_that_would_wait_in_vain_are_lost() -> None:
    found = Checkpoint.of((DIALS, LOOPBACK, MULTIPATH)).lost_at(OLDS)

    assert names(found) == [
        "10.1.0.7:5432 > 10.2.0.10:40000", "127.0.0.1:7 > 10.2.0.10:80", "10.1.0.8:9 > 10.2.0.10:81"
    ]  # fmt: skip


@pytest.mark.parametrize("socket", LEFT_ALONE, ids=str)
def test_all_others_are_left_alone(socket: Socket) -> None:
    assert names(Checkpoint.of((socket,)).lost_at(OLDS)) == []


def test_a_connection_whose_other_end_is_in_the_image_lives_on() -> None:
    other = tcp("127.0.0.1:7", "10.2.0.10:80", unkept="loopback: both ends must be moved")

    assert names(Checkpoint.of((LOOPBACK, other)).lost_at(OLDS)) == []


# ---- the command line, the policy, the hook ----------------------------------------------------


def ask(*options: str) -> tuple[Move, Checkpoint]:
    checkpoint = Checkpoint.of((KEPT, DIALS))
    words = ["plan", "web", "--map", str(MAP), *options]
    return make_move(make_parser(words).parse_args(words), checkpoint), checkpoint


def test_the_command_line_reports_unless_it_is_told_to_reset() -> None:
    moves = [ask(*options)[0] for options in ((), ("--unkept", "report"), ("--unkept", "reset"))]

    assert [(move.unkept, names(move.lost)) for move in moves] == [
        (Fate.REPORT, []), (Fate.REPORT, []), (Fate.RESET, names(LOST)),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="invalid choice: 'drop'"):
        ask("--unkept", "drop")


def test_what_is_reset_counts_as_much_as_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "read_policy", lambda: policy.Policy(max_connections=1))

    assert authorise(*ask()) == 1
    with pytest.raises(RefusedError, match="2 connections are more than this machine allows, 1"):
        authorise(*ask("--unkept", "reset"))


def test_the_hook_takes_it_from_its_environment_or_from_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "natkeep.toml"
    monkeypatch.setattr(policy, "PATH", str(file))
    file.write_text('[hook]\nmap = ["10.2.0.10=auto"]\nunkept = "reset"\n')
    file.chmod(0o600)
    named = {"NATKEEP_MAP": "10.2.0.10=auto", "NATKEEP_UNKEPT": "reset"}

    found = [read_orders(each) for each in ({}, named, {"NATKEEP_UNKEPT": "report"})]

    assert [orders and orders.unkept for orders in found] == ["reset", "reset", "report"]
    with pytest.raises(UsageError, match="NATKEEP_UNKEPT: 'drop' is none of report, reset"):
        read_orders({"NATKEEP_UNKEPT": "drop"})
    file.write_text('[hook]\nunkept = "drop"\n')
    with pytest.raises(UsageError, match=r"hook\.unkept: 'drop' is none of report, reset"):
        read_orders({})


# ---- the journal and the lifecycle -------------------------------------------------------------


def make(move_id: str = "web", lost: Connections = LOST, **options) -> Move:
    return Move(move_id, (MAP,), SITES, unkept=Fate.RESET, lost=lost, **options)


@pytest.fixture
def executor(tmp_path: Path) -> Executor:
    return Executor(FakeKernel(), StateDirectory(str(tmp_path / "state"), create=True))


def test_the_journal_holds_what_is_reset(executor: Executor) -> None:
    six = Map(parse_address("fd00:2::10"), parse_address("fd00:3::20"))
    lost = inbound("10.1.0.7:5432 10.2.0.10:40000", "[fd00:1::7]:5432 [fd00:2::10]:40000")
    move = Move("web", (MAP, six), SITES, unkept=Fate.RESET, lost=lost)
    plan = prepare(executor, move, Connections.of([*inbound("10.1.0.2:50001 10.2.0.10:80")]))

    journal = executor.state.load("web")

    assert journal.move == move
    assert journal.kinds == tuple(type(step).__name__ for step in plan.steps)
    assert journal.is_prepared()
    assert not journal.is_opened()


@pytest.mark.parametrize("lost", [["0a", ""], ["xx", ""], [""], "0a", [1, 2]])
def test_a_journal_with_something_else_there_is_corrupt(executor: Executor, lost: object) -> None:
    prepare(executor, make(), inbound("10.1.0.2:50001 10.2.0.10:80"))
    path = Path(executor.state.path, "web.journal")
    header, *rest = path.read_text().splitlines(keepends=True)
    document = json.loads(header)
    document["move"]["lost"] = lost
    path.write_text(json.dumps(document) + "\n" + "".join(rest))

    with pytest.raises(Exception, match="the journal of web is corrupt"):
        executor.state.load("web")


def test_nobody_is_told_before_open_and_everybody_by_it(executor: Executor) -> None:
    kernel = executor.kernel
    assert isinstance(kernel, FakeKernel)
    prepare(executor, make(), inbound("10.1.0.2:50001 10.2.0.10:80"))
    assert kernel.told == set()

    open_move(executor, "web")

    assert {str(each) for each in kernel.told} == {
        "10.2.0.10:40000 > 10.1.0.7:5432", "10.1.0.7:5432 > 10.2.0.10:40000",
    }  # fmt: skip
    assert {here.resets["web"] for here in kernel.sites.values()} == {Gate.OPEN}
    assert teardown(executor, "web") is True
    assert all(not here.resets and not here.sets for here in kernel.sites.values())


def test_a_source_in_the_move_does_not_keep_its_gate_from_being_open(executor: Executor) -> None:
    """The source is told at open too, but its gate stays closed while the process is elsewhere."""
    sites = (*SITES, Site(Role.SOURCE, "src"))
    move = Move("web", (MAP,), sites, unkept=Fate.RESET, lost=LOST)
    prepare(executor, move, inbound("10.1.0.2:50001 10.2.0.10:80"), Gate.OPEN)

    [status] = read_status(executor, ("web",))

    assert status.gate == Gate.OPEN
    assert [site.drift for site in status.sites] == [(), (), ()]


def test_what_another_move_keeps_is_not_reset(executor: Executor) -> None:
    prepare(executor, Move("other", (MAP,), SITES), LOST)

    with pytest.raises(RefusedError, match=r"5432 > .*40000 cannot be kept by this .* by other"):
        prepare(executor, make(), inbound("10.1.0.2:50001 10.2.0.10:80"))
    assert executor.state.ids() == ("other",)


# ---- what is told to a person and to a script --------------------------------------------------


def test_what_is_not_kept_is_told_with_its_fate() -> None:
    checkpoint = Checkpoint.of((KEPT, DIALS, tcp("10.2.0.10:80", "10.2.0.10:7"), *LEFT_ALONE[-1:]))
    move = Move("web", (MAP,), SITES, unkept=Fate.RESET, lost=checkpoint.lost_at(OLDS))
    plan = make_plan(move, checkpoint.connections)

    assert list(report.unkept_lines(checkpoint, plan)) == [
        "tcp 10.2.0.10:80 10.2.0.10:7: its peer 10.2.0.10 is on the source host too; "
        "reset, the process; its peer is met at no site of this move",
        "tcp 10.2.0.10:40000 10.1.0.7:5432: not yet established; reset, both ends",
        "udp 10.2.0.10:53 10.1.0.9:53: left by --no-udp",
    ]


def test_what_cannot_be_told_is_said_too() -> None:
    checkpoint = Checkpoint.of((KEPT, LOOPBACK))
    move = Move("web", (MAP,), SITES[:1], unkept=Fate.RESET, lost=checkpoint.lost_at(OLDS))

    (line,) = report.unkept_lines(checkpoint, make_plan(move, checkpoint.connections))

    assert "cannot be reset: " in line
    assert "lives on" in line


def test_of_connections_of_a_process_with_itself_nothing_is_said_and_no_end_is_told() -> None:
    """CRIU restores both ends; also where there is nothing else, with or without a reset."""
    over_old = (tcp("10.2.0.10:80", "10.2.0.10:7"), tcp("10.2.0.10:7", "10.2.0.10:80"))
    on_lo = tuple(
        tcp(local, peer, unkept=BOTH_ENDS)
        for local, peer in (("127.0.0.1:1", "127.0.0.1:2"), ("127.0.0.1:2", "127.0.0.1:1"))
    )
    mixed = (tcp("10.2.0.10:9", "127.0.0.1:3"), tcp("127.0.0.1:3", "10.2.0.10:9"))
    mixed = tuple(replace(each, unkept=BOTH_ENDS) for each in mixed)
    for sockets in ((KEPT, *over_old, *on_lo, *mixed), over_old, on_lo, mixed):
        for fate in Fate:
            checkpoint = Checkpoint.of(sockets)
            lost = checkpoint.lost_at(OLDS) if fate == Fate.RESET else Connections()
            move = Move("web", (MAP,), SITES, unkept=fate, lost=lost)

            plan = make_plan(move, checkpoint.connections)

            assert [*report.unkept_lines(checkpoint, plan)] == []
            assert (plan.unkept, plan.resets) == ((), ())
            assert len(plan.inner) == len(sockets) - (KEPT in sockets)
            assert [step.address for step in plan.steps if isinstance(step, AddAddress)] == OLDS
            kept = [inbound for one in plan.translations for inbound in one.kept]
            assert kept == [KEPT.inbound()] * (2 if KEPT in sockets else 0)
            lines = [*report.checkpoint_lines(checkpoint, OLDS)]
            assert [line for line in lines if "not kept" in line] == []


def test_two_olds_of_one_move_are_both_ends_and_one_of_another_host_is_not() -> None:
    other = parse_address("10.2.0.11")
    both = (tcp("10.2.0.10:80", "10.2.0.11:7"), tcp("10.2.0.11:7", "10.2.0.10:80"))
    checkpoint = Checkpoint.of(both)
    two = Move("web", (MAP, Map(other, parse_address("10.3.0.21"))), SITES)

    plan = make_plan(two, checkpoint.connections)

    assert (plan.translations, plan.unkept, len(plan.inner)) == ((), (), 2)
    added = [step.address for step in plan.steps if isinstance(step, AddAddress)]
    assert added == [*OLDS, other]
    assert checkpoint.sockets[0].why_left(OLDS) == "its other end 10.2.0.11 is not an OLD of --map"
    assert checkpoint.sockets[1].why_left(OLDS) == "its local address is not an OLD of --map"


def test_it_is_the_same_in_ipv6() -> None:
    pairs = (("[fd00:2::10]:80", "[fd00:2::10]:7"), ("[::1]:1", "[::1]:2"))
    sockets = tuple(tcp(*ends) for pair in pairs for ends in (pair, pair[::-1]))
    sockets = (*sockets[:2], *(replace(each, unkept=BOTH_ENDS) for each in sockets[2:]))
    checkpoint = Checkpoint.of(sockets)
    six = Map(parse_address("fd00:2::10"), parse_address("fd00:3::20"))

    plan = make_plan(Move("web", (six,), SITES), checkpoint.connections)

    assert (plan.translations, plan.unkept, len(plan.inner)) == ((), (), 4)
    assert [*report.unkept_lines(checkpoint, plan)] == []


def test_one_end_alone_is_not_kept_as_before() -> None:
    """Its other end is another process' at the source."""
    checkpoint = Checkpoint.of((tcp("10.2.0.10:80", "10.2.0.10:7"), LOOPBACK))
    move = Move("web", (MAP,), SITES)

    assert [each.both_ends for each in checkpoint.sockets] == [False, False]
    assert checkpoint.sockets[0].why_left(OLDS) == "its peer 10.2.0.10 is on the source host too"
    with pytest.raises(RefusedError, match="on the source host too"):
        make_plan(move, checkpoint.connections)


def test_status_and_plan_show_who_is_told(executor: Executor) -> None:
    plan = prepare(executor, make(), inbound("10.1.0.2:50001 10.2.0.10:80"), Gate.OPEN)
    moves = read_status(executor, ("web",))
    expected = [{"local": "10.2.0.10:40000", "peer": "10.1.0.7:5432", "fate": "reset, both ends"}]

    assert report.plan_to_json(plan)["unkept"] == expected
    assert json.loads(status_report.move_as_json(moves[0], "b"))["unkept"] == expected
    assert [*status_report.status_lines(moves[0], "b", verbose=False)][-1] == (
        "  10.2.0.10:40000  10.1.0.7:5432  not kept: reset, both ends"
    )
    without = make_plan(Move("web", (MAP,), SITES), inbound("10.1.0.2:50001 10.2.0.10:80"))
    assert "unkept" not in report.plan_to_json(without)
