"""The steps of a migration, in the one order that resets no connection.

    check      sockets, addresses, who translates; natkeep's own check at every host
    prepare    while the process runs: the destination, its gate closed, and what translates for the
               peers, which redirects nothing yet; CRIU's pre-dumps
    dump       the process is frozen from here on; CRIU's lock keeps the source quiet
    copy       the image to the destination; beside it what translates for the peers is opened
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from natkeep.errors import RefusedError
from natkeep.migrate import way
from natkeep.migrate.containers import make_engine
from natkeep.migrate.engines import run
from natkeep.migrate.host import LOCAL, DryRun, Host, HostError, Ssh, knows, read_move, read_start
from natkeep.migrate.image_copy import ImageCopy, Watch
from natkeep.migrate.record import IMAGES, RELAY, STEPS, Record

Say = Callable[[str, str], None]
"""Told of each step: its name, and what there is to say."""

_PATIENCE = 10.0  # s for the peers to answer, before it is said that they have not


class Migration:
    """One migration under way: its record, its hosts, its clock.

    fresh: it was begun by this run, and not by one that was interrupted.
    frozen, running: when the dump began and when the restore was through (s, monotonic).
    answered, count: peers that were heard since, of how many.
    lost: the sockets that the move ends, as `inspect` tells of them; None where another run looked.
    noted: told of each step before it begins.
    """

    def __init__(self, record: Record, ssh: Ssh, say: Say, watch: Watch | None = None) -> None:
        self.record, self.say, self._ssh, self._watch = record, say, ssh, watch
        roles = {**dict.fromkeys(record.translators, record.role),
                 record.destination: "destination", record.source: "source"}  # fmt: skip
        self._hosts = {name: Host(name, role, ssh, record.id) for name, role in roles.items()}
        self.engine = make_engine(record)
        self.sockets, self.fresh = "", False
        self.copying: ImageCopy | None = None
        self.frozen = self.running = 0.0
        self.answered: int | None = None
        self.count = 0
        self.lost: list[dict[str, Any]] | None = None
        self.noted: Callable[[str], None] = lambda step: None

    @property
    def source(self) -> Host:
        """The host that has the process at first."""
        return self._hosts[self.record.source]

    @property
    def destination(self) -> Host:
        """The host that is to have it."""
        return self._hosts[self.record.destination]

    @property
    def translators(self) -> tuple[Host, ...]:
        """The hosts that translate for the peers and are beside these two: none by a relay."""
        names = self.record.translators if self.record.role != RELAY else ()
        return tuple(self._hosts[name] for name in names)

    def connect(self) -> None:
        """Reach every host that has a part in it, as far as they are known."""
        for host in self.hosts():
            host.connect()

    def hosts(self) -> tuple[Host, ...]:
        """Source, destination, and those that translate; each host once."""
        return tuple(dict.fromkeys((self.source, self.destination, *self.translators)))

    def _reach(self, target: str, role: str) -> Host:
        """One more host, connected; RefusedError where it has a move of this id."""
        if target not in self._hosts:
            host = self._hosts[target] = Host(target, role, self._ssh, self.record.id)
            host.connect()
            self._refuse_known(host)
        return self._hosts[target]

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
            self.noted(step)
            self.record.begin(step)
            getattr(self, f"_{step}")()
        self.noted(STEPS[-1])
        self.record.begin(STEPS[-1])

    def tell(self) -> None:
        """Look as `check` does, and say each command that would follow; nothing is changed."""
        self._check()
        self.fresh = True
        for name, host in self._hosts.items():
            host.close()
            self._hosts[name] = DryRun(host, self.say, self.sockets)
        self.say = lambda step, text: None  # what the steps say is not so
        try:
            for step in STEPS[1 : STEPS.index("verify")]:
                getattr(self, f"_{step}")()
        finally:
            self.record.forget()  # nothing was begun

    # Before the freeze

    def _check(self) -> None:
        record = self.record
        for host in self.hosts():
            self._refuse_known(host)
        self.engine.look(self.source, self.destination)
        record.started = read_start(self.source, record.pid)
        document = way.read_sockets(self.source, record)
        self.sockets = json.dumps(document)
        self._refuse_moved_before(document)
        record.maps = way.find_maps(document, self.destination, record.netns, record.maps)
        self.say("check", f"{document['sum']['kept']} connections kept: {', '.join(record.maps)}")
        self.lost = way.find_lost(document)
        for line in way.describe_lost(self.lost):
            self.say("check", f"LOST {line}")
        self.say("check", way.choose(record, self._reach, self.sockets))
        for host in self.translators:
            if (own := record.translator_id(host.target)) != record.id:
                self._refuse_known(host, own)
        way.refuse_cut_off(record, self.hosts())
        if record.source == LOCAL:
            self.say("check", f"it leaves this host, where `natkeep finish {record.id}` is given")
        for host in (self.source, self.destination):
            if not host.hook:
                raise HostError(f"{host} has no natkeep-hook beside its natkeep, nor in PATH")
        if found := way.check(self.destination, record, "destination", self.sockets):
            raise HostError(f"{self.destination} cannot take it: {found}")

    def _refuse_known(self, host: Host, move_id: str = "") -> None:
        move_id = move_id or self.record.id
        if knows(host, move_id):
            raise RefusedError(f"{host} has a move {move_id} already", hint="--id another")

    def _refuse_moved_before(self, document: dict[str, Any]) -> None:
        """Where it came by a move, that one is to be replaced: there is not to be a second one."""
        olds = {*way.find_olds(document), *self.record.olds}
        for move in self.source.natkeep("status", "--json").document()["moves"]:
            ends = [site for site in move["sites"] if site["role"] == "destination"]
            if ends and any(each["old"] in olds for each in move["maps"]):
                raise RefusedError(
                    f"{self.source}: the process came there by move {move['id']}",
                    hint="moving on, and back, goes by hand: prepare --replace (docs/by-hand.md)",
                )

    def _make_directory(self, host: Host) -> None:
        images = self.record.images
        host.run("mkdir", "-p", "-m", "700", images)
        if images.startswith(f"{IMAGES}/"):  # all may write above it, and image and hook are root's
            others = ["(", "!", "-type", "d", "-o", "!", "-uid", "0", "-o", "-perm", "/002", ")"]
            if host.run("find", IMAGES, "-maxdepth", "0", *others).stdout:
                raise RefusedError(
                    f"{host}: {IMAGES} is not root's alone", hint="remove it, or --images DIR"
                )
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
        record.shared, record.boot = self._is_shared(), way.read_boot(self.destination)
        record.save()
        self.engine.arrange(self.source, "dump", self._hook_at_dump())
        for host in (self.source, self.destination):
            self.engine.arrange(host, "restore", record.hook)
        if record.role != RELAY:
            self.prepare_from(self.sockets, "destination", self.destination)
            for host in self.translators:
                self.prepare_from(self.sockets, record.role, host)
            names = ", ".join(map(str, (self.destination, *self.translators)))
            self.say("prepare", f"{names}: ready, nothing is redirected yet")
        for number in range(1, record.pre_dumps + 1):
            self._pre_dump(number)

    def _pre_dump(self, number: int) -> None:
        name = f"pre-{number}"
        directory = f"{self.record.images}/{name}"
        self.source.run("mkdir", "-m", "700", directory)
        run(self.engine.pre_dump(number), self.source, self.say)
        if not self.record.shared:
            self._start_copy(name).go(self._watch)
        self.say("pre-dump", f"round {number} of {self.record.pre_dumps}")

    # The blackout

    def _dump(self) -> None:
        record = self.record
        self.source.run("mkdir", "-m", "700", self.engine.dumped)
        if record.listeners and (ports := way.find_ports(json.loads(self.sockets))):
            # No other program's listeners: the sshd there has to be reached for `finish`.
            words = [*record.map_options(), *ports]
            self.source.natkeep("quiesce", record.id, *words, "--site", record.site("source"))
        command = self.engine.dump(self.source, self._hook_at_dump())
        if not record.shared:
            self.copying = self._start_copy("dump")  # started here, so that no start is waited for
        self.frozen = time.monotonic()
        run(command, self.source, self.say)
        self.say("dump", f"frozen on {self.source}")

    def _start_copy(self, name: str) -> ImageCopy:
        return ImageCopy(self.source, self.destination, self.record.images, name)

    def _hook_at_dump(self) -> dict[str, str]:
        record = self.record
        if not self._has_udp():
            return {}
        leaving = {"NATKEEP_SOURCE": ",".join(record.maps), "NATKEEP_VIA": ",".join(record.vias)}
        return {**record.hook, **leaving}

    def _has_udp(self) -> bool:
        sockets = json.loads(self.sockets)["sockets"]
        return any(each["kept"] and each["protocol"] == "udp" for each in sockets)

    def _copy(self) -> None:
        copy = self.copying
        if not (copy or self.record.shared):
            copy = self._start_copy("dump")
        with ThreadPoolExecutor(1) as beside:
            done = beside.submit(copy.go, self._watch) if copy else None
            try:
                self._translate()
                ours = self.source.digest(self.engine.dumped) if copy else ""
                if done:
                    done.result()
            except BaseException:
                if copy:
                    copy.end()  # it may take long still
                raise
        if copy:
            if self.destination.digest(self.engine.dumped) != ours:
                raise HostError(f"the image on {self.destination} is not that of {self.source}")
            self.say("copy", f"{copy.octets / 1e6:.1f} MB of image on {self.destination}")

    def _translate(self) -> None:
        """Have those sites ready that wait for the freeze; then peers may be passed on."""
        record = self.record
        if record.role == RELAY:
            self._relay(self.read_image())
            return
        # Who is prepared needs no more than a list, which is read in a tenth of the time.
        image = self.read_image("--list" if self.fresh else "--json")
        if not self.fresh:
            self.prepare_from(image, "destination", self.destination)
        with ThreadPoolExecutor(len(self.translators)) as beside:
            # The destination is closed, so these need not wait for it.
            done = beside.map(partial(self._redirect, image), self.translators)
            # And the hook then has nothing to compare in the blackout.
            comparing = ["open", record.id, "--connections", "-", "--compare"]
            self.destination.natkeep(*comparing, stdin=image)
            tuple(done)  # raises what one of them did
        who = way.name_translators(self.translators)
        self.say("prepare", f"{who}, {self.destination} holds what peers say")

    def _relay(self, image: str) -> None:
        """Have the source pass on what peers send, once the destination is there, closed."""
        record, source = self.record, self.source
        with ThreadPoolExecutor(1) as beside:
            # Closed both: neither waits for the other.
            done = beside.submit(self.prepare_from, image, "destination", self.destination)
            # natkeep-hook has prepared it where there is UDP; or a run that was interrupted has.
            if (self.fresh and not self._has_udp()) or not knows(source, record.id):
                words = [*record.options(listeners=False), "--image", self.engine.image]
                source.natkeep("prepare", record.id, *words, "--site", record.site(RELAY))
            done.result()
        source.natkeep("open", record.id)
        self.say("prepare", f"{source} passes on, {self.destination} holds what peers say")

    def read_image(self, form: str = "--json") -> str:
        """What the image has, as a document or a list."""
        words = ["inspect", self.engine.image, *self.record.inspect_options(), form]
        return self.source.natkeep(*words).stdout

    def prepare_from(self, sockets: str, role: str, host: Host) -> None:
        """Prepare a site of *role* there from a document of the sockets, unless it is."""
        record = self.record
        move_id = record.id if role == "destination" else record.translator_id(host.target)
        if self.fresh or not knows(host, move_id):
            words = ["prepare", move_id, *record.options(), "--site", record.site(role)]
            host.natkeep(*words, "--connections", "-", stdin=sockets)

    def _redirect(self, image: str, host: Host) -> None:
        """Have a host that translates do so, for what the document of the image has."""
        if not self.fresh:
            self.prepare_from(image, self.record.role, host)
        move_id = self.record.translator_id(host.target)
        host.natkeep("open", move_id, "--connections", "-", stdin=image)

    def _restore(self) -> None:
        record = self.record
        run(
            self.engine.restore(self.destination, record.hook), self.destination, self.say,
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
        if self.record.role != RELAY:
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


def sum_up(migration: Migration) -> str:
    """What came of it, in one line: the silence, who answered, what was not kept and why."""
    silent, lost = migration.silent_ms, migration.lost
    parts = [] if silent is None else [f"silent for {silent} ms at most"]
    parts.append(f"{migration.answered or 0} of {migration.count} peers answered")
    if lost:
        parts.append(f"{len(lost)} not kept: {', '.join(way.describe_lost(lost))}")
    return "; ".join(parts)


def quiet_source(migration: Migration) -> None:
    """natkeep's gate at the source, from the image, unless it stands; CRIU's lock goes then."""
    record, source = migration.record, migration.source
    move = read_move(source, record.id)
    if move is None or not (move["connections"] or move.get("udp_servers")):
        # Nothing yet, or listeners that are held alone.
        words = [*record.options(listeners=False), "--image", migration.engine.image]
        source.natkeep("prepare", record.id, *words, "--site", record.site("source"))
