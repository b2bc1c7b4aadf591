"""natkeep-hook under a real CRIU, where the tree is in another namespace than CRIU.

    CRIU's namespace ── the test's own pid and mount namespace, one network namespace each for
    A (where the process is dumped; OLD and the peer's address are both local there) and
    B (where it is restored; it has NEW, and a route to the peer)

Wires are judged in the scenarios; here it is when and where the hook acts, as CRIU's log and
natkeep's own status tell.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CRIU = ROOT / ".lab/criu/criu"
BIN = Path(sys.executable).parent
OLD, NEW, PEER = "10.2.0.10", "10.3.0.20", "10.1.0.2"
LONG_WAY = 'SLOW = [sys.executable, "-I", "-S", "-c", CALL, *sys.argv[1:]]'

pytestmark = [pytest.mark.root, pytest.mark.criu, pytest.mark.needs("nftables")]

SERVER = f"""
import os, socket, time
os.closerange(3, 1024)
listener = socket.create_server(("{OLD}", 5000))
child = os.fork()
if child == 0:  # the peer is no part of the tree
    listener.close()
    os.setsid()
    peer = socket.create_connection(("{OLD}", 5000), source_address=("{PEER}", 0))
    time.sleep(60)
accepted, _ = listener.accept()
if os.fork():
    os._exit(0)
os.setsid()
with open("pid", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid", "ready")
time.sleep(60)
"""

# A process that talks to itself, over OLD and over lo, once there is a file `go`.
ALONE = f"""
import os, socket, time
os.closerange(3, 1024)
def connect(address):
    with socket.create_server((address, 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        return dialled, listener.accept()[0]
pairs = [connect("{OLD}"), connect("127.0.0.1"), connect("{OLD}")]
pairs[2][0].shutdown(socket.SHUT_WR)
if os.fork():
    os._exit(0)
os.setsid()
with open("pid", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid", "ready")
while not os.path.exists("go"):
    time.sleep(0.02)
def talk(one, other):
    one.sendall(b"ping")
    other.settimeout(5)
    return other.recv(4)
said = [talk(*pairs[0]), talk(*pairs[0][::-1]), talk(*pairs[1]), talk(*pairs[1][::-1])]
said += [pairs[2][1].recv(4), talk(*pairs[2][::-1])]
with open("told", "w") as file:
    print(*said, sep="", end="", file=file)
os.rename("told", "said")
time.sleep(60)
"""
AFTER = r"""
touch go
for _ in $(seq 500); do [ ! -s said ] || break; sleep 0.01; done
"$NATKEEP" gc --json >gc.json
"$NATKEEP" repair --all --json >repair.json
"$NATKEEP" teardown web 2>teardown.txt </dev/null || echo $? >>teardown.txt
"$NATKEEP" status web --strict >strict.txt || echo $? >>strict.txt
"""

# Runs as pid 1 of a pid and mount namespace of its own: all ends with it.
STORY = r"""
set -eu
ip link set lo up  # CRIU tries TCP_REPAIR there
cd "$1"; shift
a=$1 b=$2 how=$3
enter() { ns=$1; shift; nsenter --net="/run/netns/$ns" "$@"; }
pod() { # a pid namespace, as of a pod's sandbox, and its first process outside of it
	unshare --pid --fork sleep 600 </dev/null >/dev/null 2>&1 &
	for _ in $(seq 500); do ! pgrep -P $! sleep || return 0; sleep 0.01; done
}
case $how in shared*) one=$(pod) other=$(pod) in="--pid=/proc/$one/ns/pid" ;; *) in= ;; esac
nsenter --net="/run/netns/$a" $in \
	setsid /usr/bin/python3 -I -S server.py </dev/null >server.log 2>&1
for _ in $(seq 500); do [ ! -s ready ] || break; sleep 0.01; done
pid=$(cat ready)
mkdir images
set -- --tcp-established -D images
case $how in
shared*) # the tree is in a pid namespace that is there before and afterwards
	pid=$(grep -lE "^NSpid:.*[^0-9]$pid\$" /proc/[0-9]*/status | xargs grep -l python3)
	pid=${pid#/proc/} pid=${pid%/status}
	pod="pid[$(stat -Lc %i "/proc/$one/ns/pid")]:pod"
	exec 8<"/proc/$other/ns/pid"
	;;
esac
case $how in
*external)
	"$CRIU" dump "$@" -t "$pid" --network-lock nftables -o dump.log \
		--external "net[$(stat -Lc %i "/run/netns/$a")]:key" ${pod+--external "$pod"}
	exec 7<"/run/netns/$b"
	set -- "$@" --inherit-fd 'fd[7]:key'
	;;
*joined)
	enter "$a" "$CRIU" dump "$@" -t "$pid" --network-lock nftables -o dump.log \
		${pod+--external "$pod"}
	set -- "$@" -J "net:/run/netns/$b"
	;;
esac
if [ -n "${NATKEEP_ID-}" ]; then
	"$NATKEEP" prepare "$NATKEEP_ID" --map "$MAP" --image images --site "destination=$b"
fi
status=0
"$CRIU" restore "$@" -d -o restore.log -v4 --action-script "$HOOK" \
	${pod+--inherit-fd 'fd[8]:pod'} || status=$?
"$NATKEEP" status --json >status.json
[ ! -e after ] || . ./after
ls "$NATKEEP_STATE_DIR" >left
[ $status != 0 ] || [ -n "$in" ] || kill -9 "$pid"
for id in $("$NATKEEP" status --json | sed -n 's/.*"id": "\([^"]*\)".*/\1/p'); do
	"$NATKEEP" teardown "$id" --yes
done
exit $status
"""


@pytest.fixture
def restored(
    make_netns: Callable[[], str], tmp_path: Path
) -> Callable[..., tuple[int, str, dict[str, object], str]]:
    """Dump in A, restore in B; CRIU's exit code, its log, natkeep's status, and B's name."""
    a, b = make_netns(), make_netns()
    _ip(a, f"address add {OLD}/32 dev lo", f"address add {PEER}/32 dev lo")
    _ip(b, "link add eth0 type veth peer name eth1", f"address add {NEW}/24 dev eth0",
        "link set eth0 up", "link set eth1 up", "route add default via 10.3.0.1")  # fmt: skip
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "story").write_text(STORY)

    def restore(how: str, **orders: str) -> tuple[int, str, dict[str, object], str]:
        tools = {
            "CRIU": str(CRIU),
            "HOOK": str(BIN / "natkeep-hook"),
            "NATKEEP": str(BIN / "natkeep"),
            "MAP": f"{OLD}={NEW}",
        }
        usual = {name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"}
        done = subprocess.run(
            ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
             "sh", str(tmp_path / "story"), str(tmp_path), a, b, how],
            env={**usual, **tools, "NATKEEP_STATE_DIR": str(tmp_path / "state"), **orders},
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        log = tmp_path / "images/restore.log"
        assert log.exists(), done.stderr
        status = json.loads((tmp_path / "status.json").read_text())
        return done.returncode, log.read_text(errors="replace"), status, b

    return restore


def _ip(netns: str, *lines: str) -> None:
    command = ["ip", "-n", netns, "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


PLACES = ["external", "joined", "shared-external", "shared-joined"]
"""How CRIU is told of the tree's network namespace; shared: its pid namespace is there already.

Then CRIU's script is in that pid namespace, and the /proc of its mount is not.
"""


def _ours(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("natkeep-hook: ")]


@pytest.mark.parametrize("how", PLACES)
def test_the_hook_prepares_in_the_trees_namespace_from_outside_of_it(
    how: str, restored: Callable[..., tuple[int, str, dict[str, object], str]]
) -> None:
    code, log, status, _ = restored(how, NATKEEP_MAP=f"{OLD}=auto")
    prepared, opened = _ours(log)
    assert f"{OLD}={NEW}, 1 prepared" in prepared
    assert opened.endswith("gate open")
    lines = log.splitlines()
    point = "pre-restore" if "joined" in how else "post-setup-namespaces"
    before = [line for line in lines[: lines.index(prepared)] if "Running" in line]
    assert f"Running {point} scripts" in before[-1]
    assert code == 0
    (move,) = status["moves"]
    assert (move["gate"], move["maps"]) == ("open", [{"old": OLD, "new": NEW}])
    assert [site["drift"] for site in move["sites"]] == [[]]


def test_a_hook_that_fails_before_the_sockets_exist_ends_the_restore_and_leaves_nothing(
    restored: Callable[..., tuple[int, str, dict[str, object], str]],
) -> None:
    code, log, status, _ = restored("external", NATKEEP_MAP="10.9.9.9=auto")
    assert code != 0
    assert len(_ours(log)) == 1
    assert "has the local address 10.9.9.9" in _ours(log)[0]
    assert "Running post-restore scripts" not in log
    assert status["moves"] == []


@pytest.fixture
def noting_hook(tmp_path: Path) -> Path:
    """A copy of the hook, whose python3 notes in `noted` what it is started for.

    It has no long way.
    """
    for name in ("bin", "share/natkeep"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "natkeep/criu/natkeep-hook", tmp_path / "bin")
    text = (ROOT / "natkeep/criu/natkeep_hook_open.py").read_text()
    assert text.count(LONG_WAY) == 1
    program = tmp_path / "share/natkeep/natkeep_hook_open.py"
    program.write_text(text.replace(LONG_WAY, 'SLOW = ["/bin/false"]'))
    python = tmp_path / "bin/python3"
    python.write_text(
        f'#!/bin/sh\necho "${{4##*n.}}" >>{tmp_path}/noted\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path / "bin/natkeep-hook"


@pytest.mark.parametrize("how", PLACES)
def test_a_prepared_move_is_opened_by_the_quick_file(
    how: str,
    noting_hook: Path,
    restored: Callable[..., tuple[int, str, dict[str, object], str]],
) -> None:
    code, log, status, _ = restored(how, NATKEEP_ID="web", HOOK=str(noting_hook))
    assert code == 0
    assert _ours(log) == ["natkeep-hook: web: gate open"]
    (move,) = status["moves"]
    assert (move["gate"], [site["drift"] for site in move["sites"]]) == ("open", [[]])
    assert (noting_hook.parents[1] / "noted").read_text().split() == ["main()"]


@pytest.mark.parametrize("how", PLACES[2:])
def test_it_is_opened_the_long_way_in_a_pid_namespace_that_is_there(
    how: str, restored: Callable[..., tuple[int, str, dict[str, object], str]]
) -> None:
    code, log, status, _ = restored(how, NATKEEP_ID="web", NATKEEP_MODE="stateful")
    assert code == 0
    assert _ours(log) == ["natkeep-hook: web: gate open"]
    (move,) = status["moves"]
    assert (move["gate"], [site["drift"] for site in move["sites"]]) == ("open", [[]])


@pytest.mark.parametrize("orders", [{"NATKEEP_ID": "web"}, {"NATKEEP_MAP": f"{OLD}=auto"}])
def test_a_process_that_talks_to_itself_alone_lives_on(
    orders: dict[str, str],
    restored: Callable[..., tuple[int, str, dict[str, object], str]],
    tmp_path: Path,
) -> None:
    """Over OLD and over lo, one half closed: nothing is translated, and gc does not take OLD."""
    (tmp_path / "server.py").write_text(ALONE)
    prepared = "NATKEEP_ID" in orders
    (tmp_path / "after").write_text(AFTER if prepared else AFTER.partition('"$NATKEEP"')[0])

    code, log, status, _ = restored("external", **orders)

    assert code == 0, log
    assert _ours(log)[-1].endswith("gate open")
    (move,) = status["moves"]
    assert (move["gate"], [site["drift"] for site in move["sites"]]) == ("open", [[]])
    assert move["connections"] == []
    assert (tmp_path / "said").read_text() == str(b"ping") * 4 + str(b"") + str(b"ping")
    if prepared:
        assert json.loads((tmp_path / "gc.json").read_text())["cleared"] == []
        (repaired,) = json.loads((tmp_path / "repair.json").read_text())["moves"]
        assert repaired["repaired"] == []
        assert "4 connections of web live and will break" in (tmp_path / "teardown.txt").read_text()
        assert (tmp_path / "strict.txt").read_text().endswith("as prepared\n")
