"""The steps of a migration, in the one order that resets no connection.

    check      sockets, addresses, who translates; natkeep's own check at every host
    prepare    while the process runs: the destination, its gate closed; CRIU's pre-dumps
    dump       the process is frozen from here on; CRIU's lock keeps the source quiet
    copy       the image to the destination, and beside it what translates for the peers
    restore    CRIU at the destination; natkeep-hook compares, and opens when the sockets are there
    source     natkeep's gate there, in the place of CRIU's lock
    verify     the peers are heard

CRIU locks no UDP: of a process that has such sockets the source's gate stands before its tasks end,
by natkeep-hook at post-dump. By a relay the destination is prepared after the dump, and the source
as the relay, whose gate takes the place of CRIU's lock: with UDP by that hook, too.

Rule: nothing is asked of two hosts at once that the order has one after the other.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from natkeep.errors import NatkeepError, RefusedError
from natkeep.migrate import way
from natkeep.migrate.criu_errors import first_error
from natkeep.migrate.host import LOCAL, Host, HostError, Ssh, ToldHost
from natkeep.migrate.image_copy import ImageCopy
from natkeep.migrate.record import GATEWAY, RELAY, STEPS, Record

Say = Callable[[str, str], None]
"""Told of each step: its name, and what there is to say."""

_DUMP = 600.0  # s that CRIU may take
_PATIENCE = 10.0  # s for the peers to answer, before it is said that they have not


class Migration:
    """One migration under way: its record, its hosts, its clock.

    fresh: it was begun by this run, and not by one that was interrupted.
    frozen, running: when the dump began and when the restore was through (s, monotonic).
    answered, count: peers that were heard since, of how many.
    """

    def __init__(self, record: Record, ssh: Ssh, say: Say, asked: str = "") -> None:
        self.record, self.say, self.asked = record, say, asked
        target = record.gateway or (asked if asked not in ("", RELAY) else LOCAL)
        roles = {target: "gateway", record.destination: "destination", record.source: "source"}
        self._hosts = {name: Host(name, role, ssh, record.id) for name, role in roles.items()}
        self.source, self.destination, self.gateway = (
            self._hosts[name] for name in (record.source, record.destination, target)
        )
        self.sockets, self.fresh = "", False
        self.copying: ImageCopy | None = None
        self.frozen = self.running = 0.0
        self.answered: int | None = None
        self.count = 0

    def connect(self) -> None:
        """Reach every host that has a part in it."""
        for host in self.hosts():
            host.connect()

    def hosts(self) -> tuple[Host, ...]:
        """Source, destination, and the gateway where one may translate; each host once."""
        own = self.record.role == GATEWAY and self.asked != RELAY
        some = (self.source, self.destination, *((self.gateway,) if own else ()))
        return tuple(dict.fromkeys(some))

    def close(self) -> None:
        """End what was started; what hosts do just now they do to its end."""
        if self.copying:
            self.copying.end()
        for host in self._hosts.values():
            host.close()

    def go(self, first: str = STEPS[0]) -> None:
        """All steps from *first* on."""
        self.fresh = first == STEPS[0]
        for step in STEPS[STEPS.index(first) : -1]:
            self.record.begin(step)
            getattr(self, f"_{step}")()
        self.record.begin(STEPS[-1])

    def tell(self) -> None:
        """Look as `check` does, and say each command that would follow; nothing is changed."""
        self._check()
        self.fresh = True
        hosts = {name: ToldHost(host, self.say, self.sockets) for name, host in self._hosts.items()}
        self.source, self.destination = hosts[self.record.source], hosts[self.record.destination]
        self.gateway = hosts[self.gateway.target]
        self.say = lambda step, text: None  # what the steps say is not so
        for step in STEPS[1 : STEPS.index("verify")]:
            getattr(self, f"_{step}")()

    @property
    def dumped(self) -> str:
        """The directory of the image, on source and destination."""
        return f"{self.record.images}/dump"

    # Before the freeze

    def _check(self) -> None:
        record = self.record
        for host in self.hosts():
            if knows(host, record.id):
                raise RefusedError(f"{host} has a move {record.id} already", hint="--id another")
        record.started = read_start(self.source, record.pid)
        document = way.read_sockets(self.source, record)
        self.sockets = json.dumps(document)
        if not record.maps:
            record.maps = way.find_maps(document, self.destination)
        self.say("check", f"{document['sum']['kept']} connections kept: {', '.join(record.maps)}")
        for line in way.find_lost(document):
            self.say("check", line)
        self._refuse_moved_before()
        chosen = way.choose(record, self.source, self.gateway, self.asked, self.sockets)
        self.say("check", chosen)
        for host in (self.source, self.destination):
            if not host.hook:
                raise HostError(f"{host} has no natkeep-hook beside its natkeep, nor in PATH")
        if found := way.check(self.destination, record, "destination", self.sockets):
            raise HostError(f"{self.destination} cannot take it: {found}")
        for host in (self.source, self.destination):
            there = host.run(record.criu, "--version", ok=None)
            if there.exit:
                raise HostError(f"{host} has no {record.criu}: {there.reason()}")
        self._refuse_pid_in_use()

    def _refuse_moved_before(self) -> None:
        """Where it came by a move, that one is to be replaced: there is not to be a second one."""
        olds = self.record.olds
        for move in self.source.natkeep("status", "--json").document()["moves"]:
            ends = [site for site in move["sites"] if site["role"] == "destination"]
            if ends and any(each["old"] in olds for each in move["maps"]):
                raise RefusedError(
                    f"{self.source}: the process came there by move {move['id']}",
                    hint="moving on, and back, goes by hand: prepare --replace (docs/by-hand.md)",
                )

    def _refuse_pid_in_use(self) -> None:
        if not self.destination.run("test", "-e", f"/proc/{self.record.pid}", ok=None).exit:
            raise RefusedError(f"{self.destination} has a process {self.record.pid} already")

    def _make_directory(self, host: Host) -> None:
        images = self.record.images
        host.run("mkdir", "-p", "-m", "700", images)
        found = host.run("find", images, "-mindepth", "1", "-maxdepth", "1", "-print", "-quit")
        if found.stdout:
            raise RefusedError(f"{host}: {images} is not empty", hint="--images DIR names another")

    def _is_shared(self) -> bool:
        """Whether source and destination have one and the same directory of images."""
        mark = f"{self.record.images}/{secrets.token_hex(8)}"
        self.source.run("touch", mark)
        seen = self.destination.run("test", "-e", mark, ok=None)
        self.source.run("rm", "-f", mark)
        return not seen.exit

    def _prepare(self) -> None:
        record = self.record
        for host in (self.source, self.destination):
            self._make_directory(host)
        record.made = True  # what will be in it is ours to remove
        record.shared = self._is_shared()
        record.save()
        if record.role == GATEWAY:
            self.destination.natkeep(
                "prepare", record.id, *record.options(), "--site", "destination",
                "--connections", "-", stdin=self.sockets,
            )  # fmt: skip
            self.say("prepare", f"{self.destination} is ready, its gate closed")
        for number in range(1, record.pre_dumps + 1):
            self._pre_dump(number)

    def _pre_dump(self, number: int) -> None:
        name = f"pre-{number}"
        directory = f"{self.record.images}/{name}"
        self.source.run("mkdir", "-m", "700", directory)
        before = ["--prev-images-dir", f"../pre-{number - 1}"] if number > 1 else []
        self.run_criu(
            self.source, directory, "pre-dump", "--tree", str(self.record.pid), "--track-mem",
            *before, *self.record.dump_options,
        )  # fmt: skip
        if not self.record.shared:
            self._start_copy(name).go()
        self.say("pre-dump", f"round {number} of {self.record.pre_dumps}")

    # The blackout

    def _dump(self) -> None:
        record = self.record
        self.source.run("mkdir", "-m", "700", self.dumped)
        if record.listeners and (ports := way.find_ports(json.loads(self.sockets))):
            # No other program's listeners: the sshd there has to be reached for `finish`.
            words = [*record.options(listeners=False), *ports]
            self.source.natkeep("quiesce", record.id, *words, "--site", "source")
        options = ["--tree", str(record.pid), "--network-lock", "nftables"]
        if record.pre_dumps:
            options += ["--prev-images-dir", f"../pre-{record.pre_dumps}", "--track-mem"]
        environment = {}
        if self._has_udp():
            options += ["--action-script", self.source.hook]
            environment = {"NATKEEP_ID": record.id, "NATKEEP_SOURCE": ",".join(record.maps)}
            environment["NATKEEP_VIA"] = ",".join(record.vias)
        if not record.shared:
            self.copying = self._start_copy("dump")  # started here, so that no start is waited for
        self.frozen = time.monotonic()
        self.run_criu(
            self.source, self.dumped, "dump", *options, *record.dump_options,
            environment=environment,
        )  # fmt: skip
        self.say("dump", f"frozen on {self.source}")

    def _start_copy(self, name: str) -> ImageCopy:
        return ImageCopy(self.source, self.destination, self.record.images, name)

    def _has_udp(self) -> bool:
        sockets = json.loads(self.sockets)["sockets"]
        return any(each["kept"] and each["protocol"] == "udp" for each in sockets)

    def _copy(self) -> None:
        copy = self.copying
        if not (copy or self.record.shared):
            copy = self._start_copy("dump")
        with ThreadPoolExecutor(1) as beside:
            done = beside.submit(copy.go) if copy else None
            try:
                self._translate()
                ours = self.source.digest(self.dumped) if copy else ""
            except BaseException:
                if copy:
                    copy.end()  # it may take long still
                raise
            if done:
                done.result()
        if copy:
            if self.destination.digest(self.dumped) != ours:
                raise HostError(f"the image on {self.destination} is not that of {self.source}")
            self.say("copy", f"{copy.octets / 1e6:.1f} MB of image on {self.destination}")

    def _translate(self) -> None:
        """Have those sites ready that wait for the freeze; then peers may be passed on."""
        record = self.record
        words = record.options(listeners=False)
        image = self.source.natkeep("inspect", self.dumped, *_maps(words), "--json").stdout
        if record.role == RELAY:
            self._prepare_from(image, self.destination, "destination")
            by_hook = self.fresh and self._has_udp() and knows(self.source, record.id)
            if self._lacks(self.source) and not by_hook:
                words += ["--image", self.dumped, "--site", "relay"]
                self.source.natkeep("prepare", record.id, *words)
            self.source.natkeep("open", record.id)
            self.say("prepare", f"{self.source} passes on, {self.destination} holds what peers say")
            return
        if not self.fresh:
            self._prepare_from(image, self.destination, "destination")
        with ThreadPoolExecutor(1) as beside:
            # The destination is closed, so the gateway need not wait for it.
            done = beside.submit(self._prepare_from, image, self.gateway, "gateway")
            # And the hook then has nothing to compare in the blackout.
            comparing = ["open", record.id, "--connections", "-", "--compare"]
            self.destination.natkeep(*comparing, stdin=image)
            done.result()
        self.say("prepare", f"{self.gateway} translates, {self.destination} holds what peers say")

    def _prepare_from(self, image: str, host: Host, role: str) -> None:
        """Prepare a site of *role* there from the document of the image, unless it is."""
        if self._lacks(host):
            words = ["prepare", self.record.id, *self.record.options(), "--site", role]
            gate = ["--gate", "open"] if role == GATEWAY else []
            host.natkeep(*words, *gate, "--connections", "-", stdin=image)

    def _lacks(self, host: Host) -> bool:
        """Whether *host* is to be prepared still; asked where another run may have done it."""
        return self.fresh or not knows(host, self.record.id)

    def _restore(self) -> None:
        record = self.record
        self.run_criu(
            self.destination, self.dumped, "restore", "--restore-detached",
            "--action-script", self.destination.hook, *record.restore_options,
            environment={"NATKEEP_ID": record.id},
            # Another script, or CRIU itself, may have failed after the hook has opened: a host
            # without the socket must not answer.
            otherwise=["teardown", record.id, "--yes"],
        )  # fmt: skip
        self.running = time.monotonic()
        self.say("restore", f"runs on {self.destination}{self._silent()}")

    def _silent(self) -> str:
        return f", was silent for {self.silent_ms} ms at most" if self.frozen else ""

    @property
    def silent_ms(self) -> int | None:
        """From the dump's beginning to the restore's end; None where another run began it."""
        return round((self.running - self.frozen) * 1000) if self.frozen else None

    def _source(self) -> None:
        if self.record.role == GATEWAY:
            quiet_source(self)
            self.say("source", f"{self.source} is quiet, CRIU's lock is gone")

    def _verify(self) -> None:
        """Wait for the peers, but not for those that have nothing to say."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            move = read_move(self.destination, self.record.id)
            if move is None:
                raise HostError(f"{self.destination} does not know {self.record.id} any more")
            rows = [(one.get("proto"), one["state"]) for one in move["connections"]]
            self.count = sum(state not in ("ended", "silent") for _, state in rows)
            self.answered = (move["answered"] or 0) + rows.count(("udp", "live"))
            if (self.answered or 0) >= self.count or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        self.say("verify", f"{self.answered or 0} of {self.count} peers were heard")

    def run_criu(
        self, host: Host, directory: str, verb: str, *options: str,
        environment: dict[str, str] | None = None, otherwise: Sequence[str] = (),
    ) -> None:  # fmt: skip
        log = f"{verb}.log"
        done = host.run(
            self.record.criu, verb, "--images-dir", directory, "-v3", "--log-file", log,
            "--tcp-established", *options, environment=environment, seconds=_DUMP, ok=None,
            otherwise=otherwise,
        )  # fmt: skip
        if done.exit:
            said = host.run("cat", f"{directory}/{log}", ok=None).stdout.splitlines()
            raise HostError(f"{host}: criu {verb}: {first_error(said or done.stderr.splitlines())}")


def _maps(words: list[str]) -> list[str]:
    """Of *words* those that name maps."""
    pairs = [pair for pair in pairwise(words) if pair[0] == "--map"]
    return [word for pair in pairs for word in pair]


def read_move(host: Host, move_id: str) -> dict[str, Any] | None:
    """What `status` tells of the move at *host*; None where it knows none of that id."""
    for move in host.natkeep("status", "--json").document()["moves"]:
        if move["id"] == move_id:
            found: dict[str, Any] = move
            return found
    return None


def quiet_source(migration: Migration) -> None:
    """natkeep's gate at the source, from the image, unless it stands; CRIU's lock goes then."""
    record, source = migration.record, migration.source
    move = read_move(source, record.id)
    if move is None or not move["connections"]:  # nothing yet, or listeners that are held alone
        words = [*record.options(listeners=False), "--image", migration.dumped]
        source.natkeep("prepare", record.id, *words, "--site", "source")


def knows(host: Host, move_id: str) -> bool:
    """Whether *host* has a move of that id."""
    return read_move(host, move_id) is not None


def read_start(host: Host, pid: int) -> int:
    """Clock ticks after boot at which *pid* began there (proc(5)); 0 where there is none."""
    answer = host.run("cat", f"/proc/{pid}/stat", ok=None)
    if answer.exit:
        return 0
    try:
        return int(answer.stdout.rpartition(")")[2].split()[19])
    except (LookupError, ValueError):
        raise NatkeepError(f"{host}: /proc/{pid}/stat is not as expected") from None
