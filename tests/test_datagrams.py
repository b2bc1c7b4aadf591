"""tests of moves with UDP: what is asked for, told and refused; real and fake kernel."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_kernel import FakeKernel
from hook_caller import Criu

from natkeep import cli, policy, report
from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.ended import parse_ended
from natkeep.checkpoint.images import read_checkpoint
from natkeep.checkpoint.listing import parse_listing, write_listing
from natkeep.checkpoint.live import Found, make_checkpoint
from natkeep.cli.arguments import authorise, make_move
from natkeep.cli.parser import make_parser
from natkeep.criu.environment import read_orders
from natkeep.errors import RefusedError, UsageError
from natkeep.kernel import linux, sock_diag
from natkeep.kernel.netns import entered
from natkeep.lifecycle.check import require_sockets
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.migrate.back import count_live
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.plan_text import describe_count
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.tuples import NO_CONNECTIONS, Endpoint, parse_address
from natkeep.report import status as status_report
from natkeep.state.directory import StateDirectory

CORPUS = Path(__file__).parent / "checkpoint/corpus"
OLD, NEW = "10.2.0.10", "10.3.0.20"
MAP = Map(parse_address(OLD), parse_address(NEW))
TREE = f"pid:{os.getpid()}"
TCP = f"{OLD}:5000 10.1.0.2:50594\n"
CONNECTED, SERVER = f"udp {OLD}:4433 10.1.0.2:50594\n", "udp 0.0.0.0:53 *\n"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(policy, "PATH", str(tmp_path / "natkeep.toml"))


Natkeep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def natkeep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Natkeep:
    """`natkeep(words, a list for stdin)`: exit code, stdout and stderr."""

    def run(words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(words.split())
        return (code, *capsys.readouterr())

    return run


def ask(text: str, *options: str) -> Move:
    words = ["plan", "web", "--map", str(MAP), *options]
    return make_move(make_parser(words).parse_args(words), parse_listing(text, "list"))


# ---- what is asked for -------------------------------------------------------------------------


def test_a_move_takes_the_sockets_of_its_olds_and_servers_of_the_wildcard() -> None:
    others = "udp 10.2.0.11:1 10.1.0.2:2\nudp 10.2.0.11:67 *\nudp [fd00:2::10]:9 *\nudp [::]:99 *\n"

    move = ask(CONNECTED + SERVER + others)

    assert [*map(str, move.udp)] == [f"10.1.0.2:50594 > {OLD}:4433"]
    assert [*map(str, move.udp_servers)] == [f"{OLD}:53", f"{OLD}:99"]


def test_what_is_not_wanted_is_in_no_plan(natkeep: Natkeep) -> None:
    plan = f"plan web --map {MAP} --connections - --json"

    code, out, _ = natkeep(plan, TCP + CONNECTED + SERVER)
    rows = json.loads(out)["connections"]
    assert code == 0
    assert [(row["proto"], row["local"]) for row in rows] == [
        ("tcp", f"{OLD}:5000"), ("udp", f"{OLD}:4433"),
    ]  # fmt: skip
    assert json.loads(out)["udp_servers"] == [f"{OLD}:53"]

    code, out, _ = natkeep(f"{plan} --no-udp", TCP + CONNECTED + SERVER)
    assert code == 0
    assert [row["proto"] for row in json.loads(out)["connections"]] == ["tcp"]
    assert "udp" not in out

    _, alone, _ = natkeep(plan, TCP)
    assert alone == out


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (CONNECTED, "--no-udp", "none of the 0 connections has the local address 10.2.0.10"),
        ("udp 10.2.9.9:1 10.1.0.2:2", "", "none of the 0 connections has the local address"),
        ("udp 10.2.9.9:1 *", "", "none of the 0 connections has the local address 10.2.0.10"),
        (CONNECTED, "--mode stateless", "mode stateless keeps no UDP"),
        (SERVER, "--mode stateless", "10.2.0.10:53: mode stateless keeps no UDP"),
        (SERVER, "--site relay --via 10.2.0.11", "behind a relay its new peers would have"),
    ],
)
def test_where_nothing_is_kept_it_is_refused(
    text: str, options: str, said: str, natkeep: Natkeep
) -> None:
    code, out, err = natkeep(f"plan web --map {MAP} --connections - {options}", text)

    assert (code, out) == (4, "")
    assert said in err


def test_udp_counts_where_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "read_policy", lambda: policy.Policy(max_connections=2))

    for text, options in ((TCP + CONNECTED, ()), (TCP + CONNECTED + SERVER, ("--no-udp",))):
        checkpoint = parse_listing(text, "list")
        checkpoint = checkpoint.without_udp() if options else checkpoint
        words = ["plan", "web", "--map", str(MAP), *options]
        move = make_move(make_parser(words).parse_args(words), checkpoint)
        assert authorise(move, checkpoint) == 1  # of TCP
    checkpoint = parse_listing(TCP + CONNECTED + SERVER, "list")
    with pytest.raises(RefusedError, match="3 connections are more than this machine allows, 2"):
        authorise(ask(TCP + CONNECTED + SERVER), checkpoint)


# ---- what is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TCP, "1 connection"),
        (TCP + CONNECTED, "2 connections (1 udp)"),
        (TCP + CONNECTED + SERVER, "2 connections (1 udp), 1 udp server"),
        (SERVER + f"udp {OLD}:99 *", "0 connections, 2 udp servers"),
    ],
)
def test_how_much_is_kept(text: str, said: str) -> None:
    plan = make_plan(ask(text), parse_listing(text, "list").connections)

    here = [one for one in plan.translations if one.site == plan.move.sites[0]]
    assert describe_count(plan.move, here) == said
    assert f", {said}, at destination" in report.summary(plan)


def test_what_of_udp_is_not_kept_is_named_beside_what_is() -> None:
    text = TCP + CONNECTED + SERVER + f"udp {OLD}:4434 10.2.0.10:9\nudp 10.9.9.9:1 10.1.0.2:9\n"
    checkpoint = parse_listing(text, "list")

    kept = make_plan(ask(text), checkpoint.connections)
    assert [*report.unkept_lines(checkpoint, kept)] == [
        f"udp {OLD}:4434 {OLD}:9: its peer {OLD} is on the source host too",
        "1 connections whose local address is not an OLD of --map",
    ]

    stateless = make_plan(ask(text, "--mode", "stateless"), checkpoint.connections)
    why = "mode stateless keeps no UDP"
    assert [*report.unkept_lines(checkpoint, stateless)][:3] == [
        f"udp {OLD}:4433 10.1.0.2:50594: {why}",
        f"udp {OLD}:4434 {OLD}:9: {why}",
        f"udp {OLD}:53 *: {why}",
    ]
    assert "udp_servers" not in report.move_to_json(stateless)


@pytest.mark.parametrize("gate", [Gate.CLOSED, Gate.OPEN])
def test_status_tells_the_protocol_and_the_servers(gate: Gate, tmp_path: Path) -> None:
    executor = Executor(FakeKernel(), StateDirectory(str(tmp_path / "state"), create=True))
    text = TCP + CONNECTED + SERVER
    prepare(executor, ask(text), parse_listing(text, "list").connections, gate)

    [status] = read_status(executor, ("web",))

    document = json.loads(status_report.move_as_json(status, "b"))
    assert [(row["proto"], row["local"]) for row in document["connections"]] == [
        ("tcp", f"{OLD}:5000"), ("udp", f"{OLD}:4433"),
    ]  # fmt: skip
    assert document["udp_servers"] == [f"{OLD}:53"]
    lines = [line.split() for line in status_report.status_lines(status, "b", verbose=False)]
    assert ["udp", f"{OLD}:4433", "10.1.0.2:50594"] in [line[:3] for line in lines]
    state = "ended" if gate == Gate.OPEN else None  # no socket is there
    assert document["udp_states"] == {f"{OLD}:53": state}
    said = state or "closed"
    assert ["udp", f"{OLD}:53", "*", said, "-", "-"] in lines
    [row] = [*status_report.summary_lines([status])][1:]
    assert row.split()[3] == "3"  # kept
    assert not any("have ended" in " ".join(line) for line in lines)
    ended = {"schema": 1, "moves": [document]}
    assert len(parse_ended(json.dumps(ended).encode(), "status")) == 0


def test_of_an_image_what_is_left_is_named(natkeep: Natkeep) -> None:
    image = CORPUS / "udp"
    code, out, _ = natkeep(f"inspect {image} --map {MAP} --no-udp")
    assert code == 0
    assert out.startswith("0 kept, 8 lost, 1 needs nothing\n")
    assert out.count("LOST: left by --no-udp\n") == 7

    checkpoint = read_checkpoint(image)
    assert [*write_listing(checkpoint.connections, checkpoint.udp, checkpoint.udp_servers)]
    again = parse_listing(
        write_listing(NO_CONNECTIONS, checkpoint.udp, checkpoint.udp_servers), "list"
    )
    assert (again.udp, again.udp_servers) == (checkpoint.udp, checkpoint.udp_servers)


def test_a_migration_is_finished_once_udp_is_silent() -> None:
    rows = [{"state": state} for state in ("ended", "silent", "live", None)]
    servers = {"10.2.0.10:53": "silent", "10.2.0.10:54": "live"}

    assert count_live({"connections": rows}) == 2
    assert count_live({"connections": rows[:2], "udp_states": servers}) == 1
    assert count_live({"connections": rows[:2]}) == 0


# ---- a socket that CRIU could not bind ----------------------------------------------------------


def test_a_port_that_another_socket_has_is_refused_by_name(tmp_path: Path) -> None:
    executor = Executor(FakeKernel(), StateDirectory(str(tmp_path / "state"), create=True))
    checkpoint = read_checkpoint(CORPUS / "udp")
    move = Move("web", (MAP,), (Site(Role.DESTINATION, "dst"),), udp=checkpoint.udp_at([MAP.old]))
    executor.open_sites(move)
    here = executor.kernel.sites["dst"]  # type: ignore[attr-defined]
    here.addresses |= {parse_address("10.2.0.10"), parse_address("fd00:2::10")}
    require_sockets(executor, move, checkpoint)

    for end in (f"{OLD}:5500", "127.0.0.1:5503", "[::]:5600"):  # whether it is kept or not
        here.taken = frozenset({Endpoint.parse(end)})
        with pytest.raises(RefusedError, match=re.escape(f"udp {end}: another socket")):
            require_sockets(executor, move, checkpoint)
        with pytest.raises(RefusedError, match="another socket"):
            require_sockets(executor, move, checkpoint.without_udp())


@pytest.fixture
def alone(netns: str) -> str:
    subprocess.run(["ip", "-n", netns, "link", "set", "lo", "up"], check=True)
    return netns


@pytest.mark.root
@pytest.mark.parametrize(
    ("bound", "asked", "taken"),
    [
        (("0.0.0.0", 53), "10.2.0.10:53", True),
        (("0.0.0.0", 53), "0.0.0.0:53", True),
        (("0.0.0.0", 53), "10.2.0.10:54", False),
        (("127.0.0.1", 53), "10.2.0.10:53", False),
        (("127.0.0.1", 53), "0.0.0.0:53", True),
        (("::", 53), "10.2.0.10:53", True),
        (("::", 53), "[fd00:2::10]:53", True),
        (("0.0.0.0", 53), "[::]:53", False),
        (("0.0.0.0", 53), "[fe80::1]:54", False),
    ],
)
def test_the_kernel_says_what_criu_could_not_bind(
    alone: str, bound: tuple[str, int], asked: str, taken: bool
) -> None:
    """OLD is not there yet; with SO_REUSEADDR on both sides the two go together."""
    family = socket.AF_INET6 if ":" in bound[0] else socket.AF_INET
    for shared in (0, 1):
        with entered(alone), socket.socket(family, socket.SOCK_DGRAM) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
            other.bind(bound)
            assert sock_diag.is_taken_of_udp(Endpoint.parse(asked)) == (taken and not shared)


@pytest.mark.root
@pytest.mark.parametrize(
    ("bound", "end", "there"),
    [
        ("127.0.0.1", "127.0.0.1:53", True),
        ("127.0.0.1", "127.0.0.1:54", False),
        ("127.0.0.2", "127.0.0.1:53", False),
        ("0.0.0.0", "127.0.0.1:53", True),
        ("0.0.0.0", "[::1]:53", False),
        ("::", "127.0.0.1:53", True),
        ("::", "[::1]:53", True),
        ("::ffff:127.0.0.1", "127.0.0.1:53", True),
        ("::1", "[::1]:53", True),
    ],
)
def test_a_socket_without_a_peer_is_told_by_its_end(
    alone: str, bound: str, end: str, there: bool
) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    packed = Endpoint.parse(end).packed
    with entered(alone), socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((bound, 53))
        found = sock_diag.find_bound([packed], sock_diag.read_datagrams())
        assert found == (frozenset({packed}) if there else frozenset())

        server.connect((bound, 54))  # to a wildcard address is to the host itself
        assert sock_diag.find_bound([packed], sock_diag.read_datagrams()) == frozenset()


@pytest.mark.root
def test_what_a_socket_is_bound_to_and_has_not_read_is_shown(alone: str) -> None:
    with entered(alone), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        server.bind(("127.0.0.1", 53))
        server.sendto(b"is not read", ("127.0.0.1", 53))
        inode = os.fstat(server.fileno()).st_ino
        [shown] = [Found(*each) for each in sock_diag.list_sockets() if each[0] == inode]

    assert (shown.protocol, shown.local, shown.peer) == (17, (parse_address("127.0.0.1"), 53), None)
    assert shown.device in ("lo", None)  # without the kernel's udp_diag it is not told
    assert shown.unread > len(b"is not read")


# ---- sockets that came since prepare ------------------------------------------------------------


def live(*lines: str) -> Checkpoint:
    some = parse_listing("\n".join(lines), "list")
    ends = [(17, each.destination, each.source) for each in some.udp]
    ends += [(17, end, None) for end in some.udp_servers]
    ends += [(6, each.destination, each.source) for each in some.connections]
    found = [
        Found(n, number, 1, (local.address, local.port), peer and (peer.address, peer.port))
        for n, (number, local, peer) in enumerate(ends)
    ]
    return make_checkpoint(found, frozenset(range(len(found))), 7)


def test_what_a_process_has_made_since_is_named_and_what_it_has_closed_is_not(
    tmp_path: Path,
) -> None:
    executor = Executor(FakeKernel(), StateDirectory(str(tmp_path / "state"), create=True))
    before = live(TCP, CONNECTED, SERVER)
    sites = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
    move = Move(
        "web", (MAP,), sites, live=True,
        udp=before.udp_at([MAP.old]), udp_servers=before.udp_servers_at([MAP.old]),
    )  # fmt: skip
    prepare(executor, move, before.connections)
    came = (
        f"udp {OLD}:4434 10.1.0.2:5",
        f"udp {OLD}:53 10.1.0.2:6",  # of the server, whose port is carried
        f"udp {OLD}:99 *",
        "udp 10.9.9.9:1 *",
    )

    compared = open_move(executor, "web", lambda journal: live(TCP, SERVER, *came))

    assert compared is not None
    assert (compared.came, compared.went) == (0, 0)
    assert compared.unkept == (f"udp {OLD}:4434 10.1.0.2:5", f"udp {OLD}:99 *")
    first, _ = report.compared_lines(compared)
    assert first == f"came after prepare, not kept: udp {OLD}:4434 10.1.0.2:5"


# ---- the hook ------------------------------------------------------------------------------------


def order(text: str) -> None:
    Path(policy.PATH).write_text(text)
    Path(policy.PATH).chmod(0o600)


def test_the_hook_takes_it_from_its_environment_or_from_the_file() -> None:
    order('[hook]\nmap = ["10.2.0.10=auto"]\nudp = "leave"\n')
    named = {"NATKEEP_MAP": "10.2.0.10=auto", "NATKEEP_UDP": "leave"}

    found = [read_orders(each) for each in ({}, named, {"NATKEEP_UDP": "keep"})]

    assert [orders and orders.udp for orders in found] == ["leave", "leave", "keep"]
    with pytest.raises(UsageError, match="NATKEEP_UDP: 'no' is none of keep, leave"):
        read_orders({"NATKEEP_UDP": "no"})
    order('[hook]\nudp = "no"\n')
    with pytest.raises(UsageError, match=r"hook\.udp: 'no' is none of keep, leave"):
        read_orders({})


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(linux, "LinuxKernel", lambda *_: kernel)
    return kernel


@pytest.fixture
def call(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`call(action, NAME=VALUE...)`: what the hook exits with, of an image of UDP alone."""
    criu = Criu(kernel, CORPUS / "udp", monkeypatch)
    yield criu.call
    os.close(criu.handle)


def test_the_hook_prepares_and_opens_for_udp_alone(
    kernel: FakeKernel, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("post-setup-namespaces", NATKEEP_MAP=str(MAP)) == 0
    assert f"{MAP}, 5 prepared" in capsys.readouterr().err  # 2 connected, and ports 53, 5600, 5601
    assert call("post-restore", NATKEEP_MAP=str(MAP)) == 0
    assert len(kernel.sites[TREE].gates) == 1


def test_the_hook_leaves_udp_where_it_is_told_to(
    kernel: FakeKernel, call: Callable[..., int]
) -> None:
    assert call("post-restore", NATKEEP_MAP=str(MAP), NATKEEP_UDP="leave") == 4
    assert not any(site.gates for site in kernel.sites.values())


def test_a_standing_order_is_not_about_what_is_at_the_wildcard_address(
    kernel: FakeKernel, call: Callable[..., int]
) -> None:
    """Which any process may be."""
    order('[hook]\nmap = ["10.9.9.9=10.3.0.20"]\n')
    assert call("post-restore") == 0
    assert not any(site.gates for site in kernel.sites.values())

    order(f'[hook]\nmap = ["{MAP}"]\n')
    assert call("post-restore") == 0
    assert len(kernel.sites[TREE].gates) == 1


def test_the_source_keeps_quiet_about_udp(
    kernel: FakeKernel, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("post-dump", NATKEEP_SOURCE=OLD, NATKEEP_UDP="leave") == 0
    assert "no connection of this dump leaves" in capsys.readouterr().err
    assert call("post-dump", NATKEEP_SOURCE=OLD, NATKEEP_UDP="keep", NATKEEP_ID="web") == 0
    assert "web: 5 connections kept quiet here" in capsys.readouterr().err
