"""a real kernel and a living process: what is read, what is prepared, what is added at open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CORPUS = Path(__file__).parent / "checkpoint/corpus/plain"
OLD, NEW = "10.2.0.10", "10.3.0.20"

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

SERVER = """
import os, socket, sys
server = socket.create_server(("10.2.0.10", 5000))
both = socket.create_server(("::", 7000), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("10.2.0.10", 53))
udp.sendto(b"is not read", ("10.2.0.10", 53))
clients = [socket.create_connection(("10.2.0.10", 5000), source_address=("10.1.0.2", 0)),
           socket.create_connection(("10.2.0.10", 7000), source_address=("10.1.0.2", 0))]
ports = [client.getsockname()[1] for client in clients]
child = os.fork()
if child == 0:                                  # the child has accepted; the clients are another's
    for client in clients:
        client.close()
    kept = [server.accept(), both.accept()]
    print(os.getpid(), *ports, flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@pytest.fixture
def server(netns: str) -> Iterator[tuple[int, list[str]]]:
    """The pid of a server and the peers of its connections, in a namespace of its own."""
    for line in (
        "link set lo up",
        f"address add {OLD}/32 dev lo",
        "address add 10.1.0.2/32 dev lo",
    ):
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)
    process = subprocess.Popen(
        ["ip", "netns", "exec", netns, sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    pid, *ports = process.stdout.readline().split()
    yield int(pid), [f"10.1.0.2:{port}" for port in ports]
    process.stdin.close()
    process.wait()


def natkeep(state: Path, *words: str, code: int = 0, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "natkeep.cli", *words],
        env={**os.environ, "NATKEEP_STATE_DIR": str(state)},
        capture_output=True, text=True, input=stdin,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 and done.stdout else done.stderr


def test_each_socket_of_a_living_process_is_shown(
    server: tuple[int, list[str]], tmp_path: Path
) -> None:
    pid, peers = server
    shown = json.loads(natkeep(tmp_path, "inspect", "--live", str(pid), "--json"))

    kept = {(each["local"], each["peer"]) for each in shown["sockets"] if each["kept"]}
    udp = (f"{OLD}:53", None)
    assert kept == {(f"{OLD}:5000", peers[0]), (f"{OLD}:7000", peers[1]), udp}
    rest = {(s["protocol"], s["state"], s["local"]) for s in shown["sockets"] if not s["kept"]}
    assert rest == {
        ("tcp", "LISTEN", f"{OLD}:5000"),
        ("tcp", "LISTEN", "[::]:7000"),
    }
    [unread] = (each["unread"] for each in shown["sockets"] if each["protocol"] == "udp")
    assert unread > 0
    assert shown["live"] is True


def connect(netns: str, address: str) -> None:
    """A cable with *address*, behind which the peers are."""
    for line in (
        "link set lo up",
        "link add d0 type veth peer name d1",
        "link set d0 up",
        "link set d1 up",
        f"address add {address}/24 dev d0",
        "route add 10.1.0.0/16 via 10.3.0.254",
    ):
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)


def rules(netns: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", netns, "nft", "list", "ruleset"], capture_output=True, check=True
    )
    return done.stdout.decode()


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
@pytest.mark.parametrize("told", [False, True])
def test_what_came_is_added_and_teardown_leaves_nothing(
    mode: str,
    told: bool,
    server: tuple[int, list[str]],
    make_netns: Callable[[], str],
    tmp_path: Path,
) -> None:
    """The image is another server's: all of its connections came, and all that were read went."""
    gateway, destination = make_netns(), make_netns()
    connect(gateway, "10.3.0.1")
    connect(destination, NEW)
    pid, peers = server
    state = tmp_path / "state"
    words = ["prepare", "web", f"--map={OLD}={NEW}", f"--site=gateway={gateway}",
             f"--site=destination={destination}", f"--mode={mode}"]  # fmt: skip
    if told:
        document = natkeep(state, "inspect", "--live", str(pid), "--json")
        said = natkeep(state, *words, "--connections", "-", stdin=document)
    else:
        said = natkeep(state, *words, "--live", str(pid))

    assert f"gateway={gateway}: changes nothing until open" in said
    port = peers[0].rpartition(":")[2]
    assert "@kept-web-0" in rules(gateway)
    assert f"{port} . 5000" not in rules(gateway)  # so nothing is redirected, and no gate closed
    assert f"10.1.0.2 . {port} . 5000" in rules(destination)
    assert natkeep(state, "status", "--strict", "web").count("waits for open") == 1

    if told:
        natkeep(state, "open", "web", "--connections", "-", stdin=document, code=2)
        image = natkeep(state, "inspect", str(CORPUS), "--json")
        said = natkeep(state, "open", "web", "--connections", "-", stdin=image)
    else:
        said = natkeep(state, "open", "web", "--image", str(CORPUS))

    assert "4 connections came after prepare, and were added" in said
    assert "2 connections went after prepare" in said
    for site in (gateway, destination):
        assert "10.1.0.2 . 43285 . 5000" in rules(site)
        assert (f"10.1.0.2 . {port} . 5000" in rules(site)) is (site == destination)
    [move] = json.loads(natkeep(state, "status", "--json"))["moves"]
    assert move["gate"] == "open"
    natkeep(state, "teardown", "web", "--yes")
    assert rules(gateway) == rules(destination) == ""
    assert {path.name for path in state.iterdir()} == {"lock"}
    tracked = subprocess.run(
        ["ip", "netns", "exec", destination, "cat", "/proc/net/nf_conntrack"], capture_output=True
    )
    assert b"43285" not in tracked.stdout


def test_a_gateway_whose_rules_were_removed_meanwhile_redirects_nothing(
    server: tuple[int, list[str]], make_netns: Callable[[], str], tmp_path: Path
) -> None:
    gateway, destination, state = make_netns(), make_netns(), tmp_path / "state"
    connect(gateway, "10.3.0.1")
    connect(destination, NEW)
    sites = f"--site=gateway={gateway}", f"--site=destination={destination}"
    natkeep(state, "prepare", "web", f"--map={OLD}={NEW}", *sites, "--live", str(server[0]))
    subprocess.run(["ip", "netns", "exec", gateway, "nft", "flush", "ruleset"], check=True)

    natkeep(state, "open", "web", code=5)

    assert rules(gateway) == ""
    [move] = json.loads(natkeep(state, "status", "--json"))["moves"]
    assert move["gate"] == "closed"
    natkeep(state, "teardown", "web", "--yes")
    assert rules(gateway) == rules(destination) == ""


def test_without_an_image_it_says_so(
    server: tuple[int, list[str]], make_netns: Callable[[], str], tmp_path: Path
) -> None:
    destination, state = make_netns(), tmp_path / "state"
    connect(destination, NEW)
    site = f"--site=destination={destination}"
    natkeep(state, "prepare", "web", f"--map={OLD}={NEW}", site, "--live", str(server[0]))

    assert "opened as prepared, with no image to compare" in natkeep(state, "open", "web")
    assert "opened before its image was known" in natkeep(
        state, "open", "web", "--image", str(CORPUS), code=4
    )
    natkeep(state, "teardown", "web", "--yes")


def test_what_the_restore_will_miss_is_told_before_the_freeze(
    server: tuple[int, list[str]], make_netns: Callable[[], str], tmp_path: Path
) -> None:
    netns = make_netns()
    connect(netns, NEW)
    told = json.loads(natkeep(tmp_path / "state", "inspect", "--live", str(server[0]), "--json"))
    told["tree"]["files"].append({"name": "/nowhere/x", "size": None, "mode": None})
    told["tree"]["own_mounts"] = False  # `ip netns exec` gives it some
    words = ["prepare", "web", f"--map={OLD}={NEW}", f"--site=destination={netns}"]
    said = natkeep(tmp_path / "state", *words, "--connections=-", stdin=json.dumps(told))
    natkeep(tmp_path / "state", "teardown", "web", "--yes")
    quiet = natkeep(tmp_path / "state", *words, "--live", str(server[0]))
    natkeep(tmp_path / "state", "teardown", "web", "--yes")

    assert "natkeep: stop file-missing: destination=" in said
    assert "not there: /nowhere/x\n" in said
    assert "stop " not in quiet


def test_where_it_lives_nothing_is_prepared(
    server: tuple[int, list[str]], netns: str, tmp_path: Path
) -> None:
    site = f"--site=destination={netns}"
    words = ["prepare", "web", f"--map={OLD}={NEW}", site, "--live", str(server[0])]

    assert "lives there, and would be cut off" in natkeep(tmp_path, *words, code=4)
