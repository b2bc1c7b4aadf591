"""What an image says and a site does not have, or does otherwise: told before the blackout.

Sockets at addresses that no map moves, and connections that the source's own rules translate: their
packets have another tuple on the wire than the process sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.checkpoint import (
    ELSEWHERE,
    TRANSLATED,
    Checkpoint,
    Inventory,
    NetworkLock,
    Socket,
    TcpState,
)
from natkeep.errors import RefusedError
from natkeep.kernel import conntrack_own, sock_diag
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.check import require_sockets
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.process import look_at_sockets
from natkeep.lifecycle.sockets import refuse_translated
from natkeep.lifecycle.subject import Subject
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

OLD, OTHER, NEW = "10.2.0.10", "10.2.0.11", "10.3.0.20"
MAP = Map(parse_address(OLD), parse_address(NEW))
DESTINATION, SOURCE = Site(Role.DESTINATION, "dst"), Site(Role.SOURCE, "src")
LISTEN, ESTABLISHED = TcpState.LISTEN, TcpState.ESTABLISHED


def socket(local: str, peer: str = "", state: TcpState | None = LISTEN, **more: object) -> Socket:
    ends = Endpoint.parse(local), Endpoint.parse(peer) if peer else None
    protocol = "udp" if state is None else "tcp"
    return Socket(protocol, *ends, state, **more)  # type: ignore[arg-type]


def make_executor(directory: Path) -> Executor:
    return Executor(FakeKernel(), StateDirectory(str(directory), create=True))


def move(*sites: Site, name: str = "web", map_: Map = MAP) -> Move:
    return Move(name, (map_,), sites)


# ---- sockets at addresses that no map moves --------------------------------------------------


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (socket(f"{OTHER}:53"), True),
        (socket(f"{OTHER}:53", state=None), True),
        (socket(f"{OTHER}:80", "10.1.0.2:9", ESTABLISHED), True),
        (socket(f"{OTHER}:80", "10.1.0.2:9", TcpState.SYN_SENT), True),
        (socket("[fd00::b]:80", "[fd00::2]:9", ESTABLISHED), True),
        (socket("[fd00::b]:80"), False),  # CRIU binds it with IP_FREEBIND
        (socket(f"{OLD}:80"), False),
        (socket("0.0.0.0:80"), False),
        (socket("[::]:80"), False),
        (socket("127.0.0.1:80"), False),
        (socket(f"{OTHER}:80", unkept=ELSEWHERE), False),
        (socket(f"{OTHER}:80", "10.1.0.2:9", TcpState.TIME_WAIT), False),
        (Socket("tcp", None, None, TcpState.CLOSED), False),
    ],
)
def test_what_criu_binds_to_an_address_that_no_map_moves(found: Socket, bound: bool) -> None:
    checkpoint = Checkpoint.of((found,))

    assert checkpoint.unmapped([MAP.old]) == ((found,) if bound else ())


def test_of_a_dump_with_tcp_close_connections_are_not_bound() -> None:
    both = socket(f"{OTHER}:80"), socket(f"{OTHER}:80", "10.1.0.2:9", ESTABLISHED)
    closed = Inventory(NetworkLock.SKIP, tcp_close=True)
    checkpoint = replace(Checkpoint.of(both), inventory=closed)

    assert checkpoint.unmapped([MAP.old]) == both[:1]


def test_it_is_refused_by_name_where_the_destination_lacks_the_address(tmp_path: Path) -> None:
    executor = make_executor(tmp_path)
    kept = socket(f"{OLD}:80", "10.1.0.2:9", ESTABLISHED)
    others = socket(f"{OTHER}:5353", state=None), socket(f"{OTHER}:80")
    checkpoint = Checkpoint.of((kept, *others))

    with pytest.raises(RefusedError, match=f"^destination=dst: .* udp {OTHER}:5353 ") as refused:
        require_sockets(executor, move(DESTINATION), checkpoint)
    assert f"--map {OTHER}=NEW" in str(refused.value.hint)

    executor.kernel.sites["dst"].addresses.add(parse_address(OTHER))  # type: ignore[attr-defined]
    require_sockets(executor, move(DESTINATION), checkpoint)


@pytest.mark.root
def test_the_kernel_says_which_addresses_a_socket_can_have(netns: str) -> None:
    for line in (
        "address add 10.9.0.1/32 dev lo",
        "route add local 10.9.1.0/24 dev lo",
        "address add fd09::1/128 dev lo nodad",
    ):
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)
    kernel, site = LinuxKernel(), Site(Role.DESTINATION, netns)
    kernel.open_sites([site])

    def can(address: str, device: str | None = None) -> bool:
        return kernel.ask(site, sock_diag.can_bind, parse_address(address), device)

    assert can("10.9.0.1")
    assert can("10.9.1.77")
    assert can("fd09::1")
    assert can("10.9.0.1", "lo")
    assert not can("10.9.0.2")
    assert not can("fd09::2")
    assert not can("10.9.0.1", "none0")


# ---- connections that the source itself translates -------------------------------------------

SEEN = FourTuple(Endpoint.parse("10.1.0.2:4000"), Endpoint.parse(f"{OLD}:8080"))
WIRE = FourTuple(Endpoint.parse("10.1.0.2:4000"), Endpoint.parse(f"{OLD}:80"))
BY_MOVE = FourTuple(Endpoint.parse("10.1.0.2:4000"), Endpoint.parse("10.2.7.7:8080"))
MASQUERADED = FourTuple(SEEN.source, Endpoint.parse("10.2.0.99:8080"))


@pytest.mark.parametrize("wire", [WIRE, MASQUERADED, BY_MOVE])
def test_a_source_that_translates_by_itself_is_refused(wire: FourTuple, tmp_path: Path) -> None:
    executor = make_executor(tmp_path)
    executor.kernel.wire = {SEEN: wire}  # type: ignore[attr-defined]

    with pytest.raises(
        RefusedError, match=f"^source=src translates by itself: .*{wire.destination}"
    ):
        prepare(executor, move(DESTINATION, SOURCE), Connections.of([SEEN]))
    assert not executor.state.ids()
    prepare(executor, move(DESTINATION), Connections.of([SEEN]))  # of which nothing is known


def test_what_an_earlier_move_translates_at_the_source_moves_on(tmp_path: Path) -> None:
    executor = make_executor(tmp_path)
    earlier = Map(MAP.old, BY_MOVE.destination.address)
    prepare(
        executor,
        move(Site(Role.DESTINATION, "src"), name="first", map_=earlier),
        Connections.of([SEEN]),
    )
    executor.kernel.wire = {SEEN: BY_MOVE}  # type: ignore[attr-defined]
    executor.kernel.open_sites([SOURCE])
    kept = [Connections.of([SEEN])]

    refuse_translated(executor.kernel, executor.state, SOURCE, kept)

    executor.kernel.wire = {SEEN: MASQUERADED}  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="translates by itself"):
        refuse_translated(executor.kernel, executor.state, SOURCE, kept)


SERVER = f"""
import socket, sys
server = socket.create_server(("{OLD}", 8080))
client = socket.create_connection(("{OLD}", int(sys.argv[1])), source_address=("10.1.0.2", 4000))
kept = server.accept()
udp, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
for end, mine, its in ((udp, ("{OLD}", 8080), 4000), (other, ("10.1.0.2", 4000), 0)):
    end.bind(mine)
    end.connect(("10.1.0.2", its) if its else ("{OLD}", int(sys.argv[1])))
other.send(b"dialled")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def redirected(netns: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A namespace and the pid of its server, whose client dialled the port of the parameter."""
    for line in ("address add 10.1.0.2/32 dev lo", f"address add {OLD}/32 dev lo"):
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)
    inside = ["ip", "netns", "exec", netns]
    # Here a redirect would be one to 127.0.0.1.
    rules = "; ".join(f"{each} dport 80 dnat to {OLD}:8080" for each in ("tcp", "udp"))
    chain = f"chain out {{ type nat hook output priority -100; {rules}; }}"
    subprocess.run([*inside, "nft", f"table ip own {{ {chain}; }}"], check=True)
    server = subprocess.Popen(
        [*inside, sys.executable, "-c", SERVER, str(request.param)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    yield netns, server.pid
    server.stdin.close()
    server.wait()


def natkeep(state: Path, *words: str, code: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "natkeep.cli", *words, "--json"],
        env={**os.environ, "NATKEEP_STATE_DIR": str(state)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("redirected", [80], indirect=True)
def test_a_redirected_port_is_found_in_the_sources_own_entries(
    redirected: tuple[str, int], tmp_path: Path
) -> None:
    netns, pid = redirected
    kernel, site = LinuxKernel(), Site(Role.SOURCE, netns)
    kernel.open_sites([site])

    assert kernel.ask(site, conntrack_own.find_translated, Connections.of([SEEN])) == (
        (SEEN, WIRE),
    )

    told = natkeep(tmp_path, "inspect", "--live", str(pid), code=0)
    shown = json.loads(told)["sockets"]
    server_side = [each for each in shown if each["local"] == f"{OLD}:8080" and each["peer"]]
    assert [(each["protocol"], each["kept"]) for each in server_side] == [
        ("tcp", False), ("udp", False),
    ]  # fmt: skip
    for each in server_side:
        assert each["reason"].endswith(f"10.1.0.2:4000 > {OLD}:80 on the wire")

    (tmp_path / "list").write_text(told)
    words = ["prepare", "web", f"--map={OLD}={NEW}", f"--connections={tmp_path}/list"]
    said = json.loads(natkeep(tmp_path, *words, code=4))["error"]["message"]
    assert said.startswith(f"tcp {OLD}:8080 10.1.0.2:4000: the host itself translates it: ")


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("redirected", [80], indirect=True)
def test_check_of_a_process_alone_is_about_it_and_criu(
    redirected: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATKEEP_CRIU", "/nowhere/criu")
    looks = json.loads(natkeep(tmp_path, "check", "--live", str(redirected[1]), code=6))["looks"]

    assert {"source-translates", "no-criu"} == {
        one["code"] for one in looks if one["result"] == "stop"
    }
    said = [one["what"] for one in looks if one["code"] == "source-translates"]
    assert [what for what in said if what.endswith(f"10.1.0.2:4000 > {OLD}:80 on the wire")]
    assert natkeep(tmp_path, "check", "--live", "0", code=2)
    assert natkeep(tmp_path, "check", "--image", str(tmp_path), code=3)


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("redirected", [8080], indirect=True)
def test_a_port_that_was_dialled_itself_is_kept_beside_the_redirect(
    redirected: tuple[str, int], tmp_path: Path
) -> None:
    _, pid = redirected
    shown = json.loads(natkeep(tmp_path, "inspect", "--live", str(pid), code=0))["sockets"]

    here = [each["kept"] for each in shown if each["local"] == f"{OLD}:8080" and each["peer"]]
    assert here == [True, True]
    assert not [each for each in shown if "translates" in (each["reason"] or "")]


# ---- the same as `check` lists it ----------------------------------------------------------------


def look(sockets: tuple[Socket, ...], wire: dict[FourTuple, FourTuple], *sites: Site) -> list[str]:
    """The codes of what is found of *sockets*; `ok` where all is well."""
    kernel = FakeKernel()
    kernel.open_sites(sites)
    kernel.wire = wire
    checkpoint = Checkpoint.of(sockets)
    kept = [each for each in sockets if each.is_connection() and each.local.address == MAP.old]
    plan = make_plan(move(*sites), Connections.of(each.inbound() for each in kept))
    state = StateDirectory(None, create=False)
    subject = Subject(kernel, sites, plan, checkpoint, state=state)
    return [each.code or "ok" for each in look_at_sockets(subject)]


KEPT = socket(f"{OLD}:8080", "10.1.0.2:4000", ESTABLISHED)
MARKED = socket(f"{OLD}:8080", "10.1.0.2:4001", ESTABLISHED, unkept=f"{TRANSLATED}X on the wire")
TUNNELLED = socket(f"{OLD}:81", bound_device="tun9")


@pytest.mark.parametrize(
    ("sockets", "wire", "sites", "found"),
    [
        ((KEPT,), {}, (DESTINATION, SOURCE), ["ok", "ok"]),
        ((KEPT, socket(f"{OTHER}:9")), {}, (DESTINATION,), ["address-missing"]),
        ((KEPT, TUNNELLED), {}, (DESTINATION,), ["ok", "device-missing"]),
        ((KEPT, MARKED), {}, (DESTINATION,), ["ok", "source-translates"]),
        ((KEPT,), {SEEN: WIRE}, (DESTINATION, SOURCE), ["ok", "source-translates"]),
    ],
)
def test_what_check_finds_of_the_sockets(
    sockets: tuple[Socket, ...],
    wire: dict[FourTuple, FourTuple],
    sites: tuple[Site, ...],
    found: list[str],
) -> None:
    assert look(sockets, wire, *sites) == found
