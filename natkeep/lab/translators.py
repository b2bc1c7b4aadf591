"""The translators: natkeep, by its command line, and the baselines that it is compared with.

    natkeep       natkeep prepare, open (by natkeep-hook under CRIU), teardown
    naive         the DNAT and SNAT rules that a blog would give, written by hand
    naive+purge   the same with explicit ports, and stale conntrack entries deleted
    none          no translation: whatever is asserted must then fail

Rule: all of them get the same order and know nothing of the engine that restores.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from natkeep.errors import NatkeepError
from natkeep.lab.engine import Opening
from natkeep.lab.engines.criu import CHECKOUT
from natkeep.lab.host import Host, write_script
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import Address
from natkeep.plan.tuples import Endpoint, FourTuple, Local, address_of


class TranslatorError(NatkeepError):
    """A translator could not do its work; `code` is natkeep's exit code."""

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Order:
    """One move, as the lab orders it: OLD becomes NEW at these hosts for these connections.

    options: natkeep's way to learn of the connections, as the engine gave it.
    replaces: the move of the same process that brought it where it leaves from now.
    listeners: new connections shall reach the listeners that move along.
    gateway: None where none translates. peer_sites: the peers' own hosts, where these do.
    peers: which have moved as well, and where they are.
    relay: the host that passes on what comes to OLD, if one does.
    protocol: of what is kept, `tcp` or `udp`. ports: OLD's and NEW's, where the map has some.
    """

    id: str
    old: Address
    new: Address
    gateway: Host | None
    destination: Host
    connections: tuple[FourTuple, ...]
    options: tuple[str, ...]
    mode: str = "stateful"
    replaces: Order | None = None
    listeners: bool = False
    peers: tuple[tuple[Local, Local], ...] = ()
    peer_sites: tuple[Host, ...] = ()
    relay: Host | None = None
    protocol: str = "tcp"
    ports: tuple[int, int] | None = None

    @property
    def old_end(self) -> Local:
        """OLD, and its port where the map has one."""
        return Endpoint(self.old, self.ports[0]) if self.ports else self.old

    @property
    def new_end(self) -> Local:
        """NEW, and its port where the map has one."""
        return Endpoint(self.new, self.ports[1]) if self.ports else self.new


class Translator:
    """What the lab asks of a translator.

    As it stands here it is `none`: OLD is made local, so that a socket can be restored at all,
    and nothing is translated.
    """

    name = "none"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prepare(self, order: Order) -> None:
        """Have everything in place before the sockets come back."""
        nodad = ["nodad"] if order.old.version == 6 else []
        order.destination.run("ip", "address", "add", _host_prefix(order.old), "dev", "lo", *nodad)

    def opening(self, order: Order) -> Opening:
        """How the network is opened when they have."""
        return Opening(open=lambda: None)

    def close(self, order: Order) -> None:
        """Before a dump where CRIU's lock knows the peers by other addresses than the wire has."""

    def retire(self, order: Order) -> None:
        """Undo what is left of *order*, now that another one has replaced it at the gateway."""
        self.teardown(order)

    def withdrawal(self, order: Order) -> Opening:
        """How the network is opened for sockets that are back where they came from."""
        return Opening(open=lambda: self.teardown(order))

    def teardown(self, order: Order) -> None:
        """Undo it all."""
        order.destination.run("ip", "address", "del", _host_prefix(order.old), "dev", "lo")


class Natkeep(Translator):
    """natkeep itself, by its command line, with its state below the lab's directory."""

    name = "natkeep"

    def __init__(self, directory: Path, state: str = "natkeep-state") -> None:
        super().__init__(directory)
        self.environment = {"NATKEEP_STATE_DIR": str(directory / state)}

    def prepare(self, order: Order) -> None:
        more = ["--replace", order.replaces.id] if order.replaces else []
        more += ["--listeners"] if order.listeners else []
        more += [f"--peer-map={peer}={now}" for peer, now in order.peers]
        more += [f"--site=gateway={order.gateway.name}"] if order.gateway else []
        more += [f"--site=peer={host.name}" for host in order.peer_sites]
        more += [f"--site=relay={order.relay.name}"] if order.relay else []
        self.call(
            "prepare", order.id, *more, "--map", f"{order.old_end}={order.new_end}",
            "--site", f"destination={order.destination.name}",
            "--mode", order.mode, *order.options,
        )  # fmt: skip

    def opening(self, order: Order) -> Opening:
        return self.open_move(order.id)

    def open_move(self, move_id: str) -> Opening:
        """What opens the move of that id when the sockets exist."""
        environment = {**self.environment, "NATKEEP_ID": move_id}
        return Opening(lambda: self.call("open", move_id), self.hook(), environment)

    def close(self, order: Order) -> None:
        self.call("quiesce", order.id)

    def withdrawal(self, order: Order) -> Opening:
        command = shlex.join([*natkeep_command(), "teardown", order.id, "--yes"])
        test = '[ "$CRTOOLS_SCRIPT_ACTION" = post-restore ] || exit 0'
        script = write_script(self.directory / "withdraw", f"{test}\nexec {command}")
        return Opening(lambda: self.teardown(order), script, self.environment)

    def teardown(self, order: Order) -> None:
        # Nothing is sent any more, so that a destination need not go on dropping it.
        self.call("teardown", order.id, "--yes", "--drop", "0")

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run natkeep outside of the hosts, to its end."""
        return subprocess.run(
            [*natkeep_command(), verb, *arguments],
            capture_output=True,
            text=True,
            timeout=scaled(60),
            env={**os.environ, **self.environment},
        )

    def call(self, verb: str, *arguments: str) -> str:
        """The same, and what it printed; TranslatorError with its message when it fails."""
        done = self.run(verb, *arguments)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = " ".join(lines[-2:])  # message and hint, or the end of a traceback
            raise TranslatorError(
                f"natkeep {verb} exited {done.returncode}: {said}", code=done.returncode
            )
        return done.stdout

    def hook(self) -> Path:
        """natkeep-hook beside natkeep; in a bare checkout a script that runs its module."""
        natkeep = Path(natkeep_command()[0])
        beside = natkeep.with_name("natkeep-hook")
        if natkeep.name == "natkeep" and beside.exists():
            return beside
        python, checkout = shlex.quote(sys.executable), shlex.quote(str(CHECKOUT))
        command = f'PYTHONPATH={checkout} exec {python} -m natkeep.criu.hook "$@"'
        return write_script(self.directory / "natkeep-hook", command)


class Naive(Translator):
    """Plain DNAT and SNAT for the whole address."""

    name = "naive"

    def prepare(self, order: Order) -> None:
        super().prepare(order)
        if order.replaces:
            host = order.gateway or order.destination
            host.run("nft", "delete", "table", "inet", _table(order.replaces))
        rules = self.rules(order, order.new_end, order.old_end)
        order.destination.nft(rules + self.peer_rules(order))
        if order.gateway:
            order.gateway.nft(self.rules(order, order.old_end, order.new_end))
        for host in order.peer_sites:
            host.nft(self.own_rules(order))

    def rules(self, order: Order, before: Local, after: Local) -> str:
        """Packets to *before* go to *after*, and those from *after* say *before*."""
        table = f"inet {_table(order)}"
        lines = [
            f"add table {table}",
            f"add chain {table} pre {{ type nat hook prerouting priority dstnat; }}",
            f"add chain {table} post {{ type nat hook postrouting priority srcnat; }}",
            f"add rule {table} pre {_dnat(order, before, after)}",
        ]
        sources = self.source_rules(order, before, after)
        lines += [f"add rule {table} post {rule}" for rule in sources]
        return "\n".join(lines) + "\n"

    def own_rules(self, order: Order) -> str:
        """At the peers' own host: what it says and hears itself."""
        table = f"inet {_table(order)}"
        lines = [
            f"add table {table}",
            f"add chain {table} out {{ type nat hook output priority -100; }}",
            f"add chain {table} in {{ type nat hook input priority 100; }}",
            f"add rule {table} out {_dnat(order, order.old_end, order.new_end)}",
            f"add rule {table} in {_snat(order, order.new_end, order.old_end)}",
        ]
        return "\n".join(lines) + "\n"

    def peer_rules(self, order: Order) -> str:
        """And the process sees its peers where they were."""
        ip, table = "ip" if order.old.version == 4 else "ip6", f"inet {_table(order)}"
        lines = [
            f"add chain {table} out {{ type nat hook output priority -100; }}",
            f"add chain {table} in {{ type nat hook input priority 100; }}",
        ]
        for peer, now in order.peers:
            lines += [
                f"add rule {table} out {ip} saddr {order.old} {_dnat(order, peer, now)}",
                f"add rule {table} in {ip} daddr {order.old} {_snat(order, now, peer)}",
            ]
        return "\n".join(lines) + "\n" if order.peers else ""

    def source_rules(self, order: Order, before: Local, after: Local) -> list[str]:
        """The SNAT half."""
        return [_snat(order, after, before)]

    def retire(self, order: Order) -> None:
        self._delete_table(order, order.destination)

    def teardown(self, order: Order) -> None:
        others = filter(None, (order.gateway, *order.peer_sites))
        self._delete_table(order, *others, order.destination)

    def _delete_table(self, order: Order, *hosts: Host) -> None:
        for host in hosts:
            host.run("nft", "delete", "table", "inet", _table(order))
        super().teardown(order)


class NaivePurge(Naive):
    """The same with the ports spelled out, and stale conntrack entries deleted."""

    name = "naive+purge"

    def prepare(self, order: Order) -> None:
        super().prepare(order)
        purge = "\n".join(
            f"conntrack -D -p {order.protocol} {end} {address}"
            for address in (order.old, order.new)
            for end in ("--orig-dst", "--orig-src")
        )
        for host in filter(None, (order.destination, order.gateway, *order.peer_sites)):
            # conntrack exits 1 where there was no such entry
            host.run("sh", "-c", f"{purge}\ntrue")

    def source_rules(self, order: Order, before: Local, after: Local) -> list[str]:
        if isinstance(before, Endpoint) or isinstance(after, Endpoint):
            return super().source_rules(order, before, after)
        ports = sorted({each.destination.port for each in order.connections})
        return [_snat(order, Endpoint(after, port), Endpoint(before, port)) for port in ports]


def _dnat(order: Order, to: Local, after: Local) -> str:
    ip = "ip" if order.old.version == 4 else "ip6"
    port = f" {order.protocol} dport {to.port}" if isinstance(to, Endpoint) else ""
    return f"{ip} daddr {address_of(to)}{port} dnat {ip} to {after}"


def _snat(order: Order, source: Local, after: Local) -> str:
    ip = "ip" if order.old.version == 4 else "ip6"
    port = f" {order.protocol} sport {source.port}" if isinstance(source, Endpoint) else ""
    return f"{ip} saddr {address_of(source)}{port} snat {ip} to {after}"


def _table(order: Order) -> str:
    return f"naive-{order.id}"


TRANSLATORS: dict[str, type[Translator]] = {
    each.name: each for each in (Natkeep, Naive, NaivePurge, Translator)
}


def _host_prefix(address: Address) -> str:
    return f"{address}/{address.max_prefixlen}"


def natkeep_command() -> list[str]:
    """How natkeep is called: NATKEEP_BIN, or beside this Python, or this very package."""
    beside = Path(sys.executable).with_name("natkeep")
    named = os.environ.get("NATKEEP_BIN") or (str(beside) if beside.exists() else "")
    if named:
        return [named]
    return [sys.executable, "-c", "import sys; from natkeep.cli import main; sys.exit(main())"]
