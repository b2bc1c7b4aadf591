"""a place: two or three namespaces full of other people's things, and natkeep run beside them.

Nobody talks in them, so whatever differs between two looks was natkeep. Each has, as a host in use
has: tables of nft and of both kinds of iptables, addresses, routes in several tables, policy rules,
neighbours, settings, and a connection table with rows of its own.

Rule: names begin with PREFIX and are gone when the place is left; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import many
from surfaces import read_all_surfaces, read_directory

import natkeep
from natkeep import cli, faultpoints
from natkeep.checkpoint.images import read_checkpoint
from natkeep.kernel import nftables
from natkeep.kernel.netns import inside, open_namespace
from natkeep.plan.criu_lock import render_restoration, render_table
from natkeep.state.files import MARK

ROOT = Path(__file__).resolve().parent.parent.parent
CORPUS = ROOT / "tests/checkpoint/corpus/plain"
"""A real dump: four connections over IPv4, one over IPv6, listeners, and CRIU's lock."""

PREFIX = "natkeep-fault-"
OLD = {4: "10.2.0.10", 6: "fd00:2::10"}
NEW = {4: "10.3.0.20", 6: "fd00:3::20"}
PEER = {4: "10.1.0.2", 6: "fd00:1::2"}
PATIENCE = 60.0  # s; no verb takes longer

SITES = ("gateway", "destination", "source", "peer")

Surfaces = dict[str, str]
"""By site and name."""


@dataclass(frozen=True)
class Said:
    """How a verb ended: its exit code, or minus the signal; its words; how long it took, in s."""

    code: int
    words: str
    seconds: float


def listing(version: int, count: int) -> list[tuple[str, str]]:
    """Local end and peer of *count* connections."""
    local, peer = (f"[{a[6]}]" if version == 6 else a[4] for a in (OLD, PEER))
    return [(f"{local}:5000", f"{peer}:{20000 + n}") for n in range(count)]


class Place:
    """A context manager; sites: of SITES."""

    def __init__(
        self, sites: tuple[str, ...], *, rows: list[tuple[str, str]], lock: str = ""
    ) -> None:
        self.sites, self._rows, self._lock = sites, rows, lock
        self._hex = secrets.token_hex(4)
        self._stack = contextlib.ExitStack()

    def name(self, site: str) -> str:
        """The network namespace of *site*."""
        return f"{PREFIX}{self._hex}-{site}"

    def __enter__(self) -> Place:
        with self._stack as undo:
            self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
            undo.callback(shutil.rmtree, self.directory)
            self.state = self.directory / "state"
            self.state.mkdir(mode=0o700)
            (self.state / "lock").write_bytes(MARK)  # the first verb makes it, and it stays
            for site in self.sites:
                _call("ip", "netns", "add", self.name(site))
                undo.callback(_call, "ip", "netns", "delete", self.name(site))
                self._furnish(site)
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _furnish(self, site: str) -> None:
        script = _FURNITURE.format(
            loopback="down" if site == "destination" else "up",
            addresses=_addresses(site),
            rows="\n".join(_describe_rows(site, self._rows)),
        )
        self._enter(site, "sh", "-ec", script)
        if site == "gateway":
            forwards = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
            self._enter(site, "sysctl", "-qw", *forwards)
        if site == "peer":  # which has no route to OLD any more
            routes = "ip route add 10.3.0.0/24 dev eth0; ip route delete default dev eth0"
            self._enter(site, "sh", "-ec", routes)
        if site == "source":
            self._listen()
            self._leave_lock()

    def _listen(self) -> None:
        """The source has a server, whose callers a quiesce holds back."""
        namespace = open_namespace(self.name("source"))
        with inside(namespace):
            listener = socket.create_server((OLD[4], 5000))
        os.close(namespace.fd)
        self._stack.callback(listener.close)

    def _leave_lock(self) -> None:
        """As a dump leaves it: CRIU's table, or its rules; and the image that says which."""
        checkpoint = read_checkpoint(str(CORPUS))
        if self._lock == "nftables":
            lines = render_table(checkpoint.lock, checkpoint.connections)
            self._enter("source", "nft", "-f", "-", text="\n".join(lines))
        elif self._lock == "iptables":
            for tool, version in (("iptables", 4), ("ip6tables", 6)):
                here = [t for t in checkpoint.connections if t.source.address.version == version]
                # What a process says to itself is not taken; what is put back goes in front of it.
                here.sort(key=lambda inbound: not inbound.source.address.is_loopback)
                text = "\n".join((*render_restoration(checkpoint.lock, here), ""))
                self._enter("source", f"{tool}-nft-restore", "--noflush", text=text)
        shutil.copytree(CORPUS, self.directory / "image")
        inventory = self.directory / "image/inventory.img"
        content, method = inventory.read_bytes(), b"\x58"  # field 11, a number: 1 is nftables
        assert content.count(method + b"\1") == 1
        if self._lock == "iptables":
            inventory.write_bytes(content.replace(method + b"\1", method + b"\0"))

    def harm(self, site: str, command: str) -> Said:
        """Do what another program would, at a site or (`state`) in the state directory."""
        enter = [] if site == "state" else ["nsenter", f"--net=/run/netns/{self.name(site)}"]
        done = subprocess.run(
            [*enter, "sh", "-ec", command], cwd=self.state, capture_output=True, text=True
        )
        return Said(done.returncode, done.stderr, 0)

    def _enter(self, site: str, *command: str, text: str = "") -> None:
        _call("nsenter", f"--net=/run/netns/{self.name(site)}", *command, text=text)

    def look(self) -> Surfaces:
        """All surfaces of all sites, and the state directory."""
        found = {
            f"{site}: {name}": text
            for site in self.sites
            for name, text in read_all_surfaces(self.name(site)).items()
        }
        for site in self.sites:  # who calls a listener just now is forgotten on purpose
            rows = found[f"{site}: conntrack"].splitlines()
            found[f"{site}: conntrack"] = "\n".join(r for r in rows if "SYN_SENT" not in r)
            if self._lock:  # put back, CRIU's lock has other handles
                ruleset = found[f"{site}: ruleset"]
                found[f"{site}: ruleset"] = re.sub(',? "handle": [0-9]+', "", ruleset)
        found["state directory"] = read_directory(self.state)
        found["started processes"] = "\n".join(self._find_children())
        return found

    def _find_children(self) -> list[str]:
        """Whoever was started by a natkeep of this place, wherever it is now."""
        mine, found = f"NATKEEP_STATE_DIR={self.state}".encode(), []
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                with contextlib.suppress(OSError):
                    if mine in (process / "environ").read_bytes().split(b"\0"):
                        found.append((process / "cmdline").read_text().replace("\0", " "))
        return sorted(found)

    def natkeep(
        self,
        *arguments: str,
        strikes: str = "",
        kill_after: float | None = None,
        traced: Path | None = None,
    ) -> Said:
        """Run a verb to its end.

        kill_after: SIGKILL it after so many seconds; traced: where the points go that it reaches.
        """
        began = time.monotonic()
        words = self.directory / "words"
        words.write_text("")  # it may be killed before it has opened that
        pid = os.fork()
        if not pid:
            _become(self, arguments, strikes, traced, words)
        process = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        seconds = PATIENCE if kill_after is None else kill_after
        if not poll.poll(seconds * 1000):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return Said(code, words.read_text(), time.monotonic() - began)


def _become(
    place: Place, arguments: tuple[str, ...], strikes: str, traced: Path | None, words: Path
) -> NoReturn:
    """Be natkeep: a fork of a process that has imported it starts in a tenth of the time."""
    code = 70
    try:
        for number, path in ((0, os.devnull), (1, os.devnull), (2, str(words))):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ["NATKEEP_STATE_DIR"] = str(place.state)
        os.environ.pop(faultpoints.VARIABLE, None)
        faultpoints._ARMED = faultpoints._parse(strikes) if strikes else None
        if traced:
            _trace(os.open(traced, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        verb = partial(many.main, old=OLD[4], new=NEW[4]) if arguments[0] == "many" else cli.main
        code = verb(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def _trace(seen: int) -> None:
    strike = faultpoints.reach

    def reach(place: str, of: str = "", last: Callable[[], object] | None = None) -> None:
        os.write(seen, f"{place}-{of} ".encode() if of else f"{place} ".encode())
        strike(place, of, last)

    faultpoints.reach = reach


def import_everything() -> None:
    """What natkeep imports when it needs it, so that no fork has to."""
    for module in pkgutil.walk_packages(natkeep.__path__, "natkeep."):
        if not module.name.startswith("natkeep.lab") and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    nftables.is_available()


def _call(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise SystemExit(f"{command[:3]}: {done.stderr.strip()}")


def _addresses(site: str) -> str:
    usual = {"gateway": ("10.3.0.1", "fd00:3::1"), "destination": (NEW[4], NEW[6])}
    usual["peer"] = PEER[4], PEER[6]
    v4, v6 = usual.get(site, (OLD[4], OLD[6]))
    return f"address add {v4}/24 dev eth0\naddress add {v6}/64 dev eth0 nodad"


def _describe_rows(site: str, rows: list[tuple[str, str]]) -> list[str]:
    """The gateway has tracked a half of the connections, one of them dialled by the process."""
    lines = [
        _row("192.0.2.7", "198.51.100.9", 1000, 22),
        _row(PEER[4], OLD[4], 20000, 4999),  # as a kept one, but for its port
        _row(PEER[6], OLD[6], 20000, 4999),
    ]
    if site == "gateway":
        for number, (local, peer) in enumerate(rows[: (len(rows) + 1) // 2]):
            ends = [end.rpartition(":") for end in (peer, local)]
            (source, _, sport), (destination, _, dport) = ends[::-1] if number == 1 else ends
            lines.append(_row(source.strip("[]"), destination.strip("[]"), sport, dport))
        # Somebody who calls a listener just now: not kept, and forgotten on purpose.
        lines.append(_row("10.1.0.77", OLD[4], 9, 5000).replace("ESTABLISHED", "SYN_SENT"))
        lines[-1] = lines[-1].replace("--status SEEN_REPLY,ASSURED ", "")
    return lines


def _row(source: str, destination: str, sport: object, dport: object) -> str:
    return (
        f"-I -p tcp -s {source} -d {destination} --sport {sport} --dport {dport} "
        "--state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 86400"
    )


_FURNITURE = """
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/netfilter/nf_conntrack_acct
echo 0 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose
ip -batch - <<END
link set lo up
link set lo {loopback}
link add eth0 type veth peer name eth1
link set eth0 addrgenmode none
link set eth1 addrgenmode none
{addresses}
link set eth0 up
link set eth1 up
address add 192.0.2.7/32 dev eth1
route add default dev eth0
route add default dev eth0 table 100
route add blackhole 203.0.113.0/24
rule add from 192.0.2.7 lookup 100
neigh add 10.3.0.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent
neigh add proxy 10.3.0.98 dev eth0
END
ip -6 route add default dev eth0
# One that was never up has another qdisc, which nobody can give back to it.
[ {loopback} = up ] || ip address delete 127.0.0.1/8 dev lo
nft -f - <<END
table inet others {{
	set allowed {{ type ipv4_addr; elements = {{ 192.0.2.1, 192.0.2.2 }} }}
	chain input {{
		type filter hook input priority 5; policy accept;
		ip saddr @allowed counter accept comment "theirs"
		ct state invalid drop
	}}
	chain postrouting {{
		type nat hook postrouting priority 100;
		ip saddr 192.0.2.0/24 masquerade
	}}
}}
END
for tool in iptables ip6tables; do
	for kind in nft legacy; do
		$tool-$kind-restore <<END
*filter
-A FORWARD -p tcp --dport 9999 -j DROP
COMMIT
*nat
-A PREROUTING -p tcp --dport 9998 -j REDIRECT --to-ports 9997
COMMIT
END
	done
done
conntrack -R - <<END
{rows}
END
"""
