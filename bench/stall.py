"""the stall that a peer sees in a move: with hold and replay, without, and CRIU alone on one host.

    python bench/stall.py [--reps N] [--blackouts S,S,…] [--lanes N] [--only WORD] [--json FILE]

Every run moves living connections in a practice network. The blackout lasts from the moment in
which the gateway takes its peers' segments away from the process (or CRIU begins to dump, where
it is alone) to the moment in which the process lives again; the stall lasts from the same moment
until the peer's application hears the process again (bulk: until it can send again; what is
delivered is acknowledged while the sockets are in repair yet, so that it can a little sooner). So
a stall beyond its blackout is what the peer waits for its own next retransmission.

    stream    a peer that sends 64 octets every 20 ms, whether answered or not
    once      a peer that sends 64 octets once, just after the freeze
    bulk      a peer that sends as fast as it can

Engine `repair` is TCP_REPAIR within this process, so that the blackout is what was asked for;
engine `criu` dumps and restores a real process, with natkeep-hook. Every octet is numbered, and
each run counts only if both ends have every octet once, the destination's kernel found none of
them beyond the window, and the connections go on.
With many connections both ends, in Python, need some time for so many answers at once, also where
nothing is moved: that is measured first in each run (`usual`), and allowed for.
Medians of --reps runs each, both families in turn; exit 0 only if all that is asked for holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

from natkeep.journal import StateDirectory
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lab import repair
from natkeep.lab.application import Application
from natkeep.lab.engines import Criu, Moving, Opening, find_criu
from natkeep.lab.topology import DESTINATION, SOURCE, Topology
from natkeep.lab.traffic import find_mismatch, make_octets
from natkeep.lifecycle.verbs import Lifecycle
from natkeep.plan.move import Map, Move, Role, Site
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

HOOK = Path(sys.executable).with_name("natkeep-hook")
PREFIX = "natkeep-bench-stall-"
WORD = 64  # octets
EVERY = 0.02  # s
ALLOWED_MS = 5.0
BLACKOUTS = (0.1, 0.5, 1.0, 3.0, 6.0)
MANY = 1000
PORT = 7000
PATIENCE = 20.0  # s


@dataclass
class Case:
    """What is run, several times: who restores where, what the peer does, and for how long."""

    engine: str  # repair | criu | in place
    pattern: str
    blackout: float
    hold: bool
    connections: int = 1

    @property
    def name(self) -> str:
        many = f", {self.connections} connections" if self.connections > 1 else ""
        return f"{self.engine}, {self.pattern}{many}"

    @property
    def seconds(self) -> float:
        """About how long a run of it takes."""
        return self.blackout * (1.2 if self.hold else 2) + 1 + self.connections / 200


@dataclass
class Result:
    """One run; times in ms.

    usual: what an answer takes without a move. fault: what is wrong with its octets, or nothing.
    """

    blackout: float
    stall: float
    held: int = 0
    usual: float = 0.0
    fault: str = ""

    @property
    def beyond(self) -> float:
        """What the peer waits for after the blackout."""
        return self.stall - self.blackout


# ---- the peer ------------------------------------------------------------------------------------


class Ends:
    """The sockets of one side, their octets, and when they could be sent and had come."""

    def __init__(self, role: str, sockets: list[socket.socket]) -> None:
        self.role, self.sockets = role, sockets
        self.other = "serve" if role == "dial" else "dial"
        self.tx, self.rx = [0] * len(sockets), [0] * len(sockets)
        self.moved: list[list[float]] = [[] for _ in sockets]  # when something went on
        self.fault = ""
        for sock in sockets:
            sock.setblocking(False)

    def send(self, index: int, octets: int) -> int:
        """As many as the kernel takes."""
        try:
            sent = self.sockets[index].send(make_octets(self.role, self.tx[index], octets))
        except BlockingIOError:
            return 0
        self.tx[index] += sent
        return sent

    def receive(self, index: int) -> int:
        """What is there, checked."""
        try:
            data = self.sockets[index].recv(1 << 18)
        except BlockingIOError:
            return 0
        except OSError as error:
            data, self.fault = b"", self.fault or f"{self.role}: {error}"
        if not data:
            self.fault = self.fault or f"{self.role} {index}: the connection ended"
            return -1
        wrong = find_mismatch(self.other, self.rx[index], data)
        if wrong:
            self.fault = self.fault or f"{self.role} {index}: {wrong}"
        self.rx[index] += len(data)
        return len(data)


class Peer:
    """A process at the client, ordered about through a socket, a line of JSON each way."""

    def __init__(self, where: Namespace, to: Endpoint, count: int, pattern: str) -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                _serve_as_peer(where, to, count, pattern, theirs)
            finally:
                os._exit(0)
        theirs.close()
        ours.settimeout(PATIENCE)
        self.lines = ours.makefile("rw")
        self.ports: list[int] = self.read()

    def tell(self, order: str) -> None:
        self.lines.write(f"{order}\n")
        self.lines.flush()

    def read(self) -> Any:
        return json.loads(self.lines.readline())

    def ask(self) -> Any:
        """Octets sent and received, when things moved, and what is wrong."""
        self.tell("report")
        return self.read()

    def end(self) -> None:
        with suppress(OSError, ValueError):
            self.tell("end")
        os.waitpid(self.pid, 0)


def _serve_as_peer(
    where: Namespace, to: Endpoint, count: int, pattern: str, orders: socket.socket
) -> None:
    family = socket.AF_INET if to.address.version == 4 else socket.AF_INET6
    sockets = []
    with inside(where):
        for _ in range(count):
            sock = socket.create_connection((str(to.address), to.port), timeout=PATIENCE)
            assert sock.family == family
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sockets.append(sock)
    lines = orders.makefile("rw")

    def write(value: object) -> None:
        lines.write(json.dumps(value) + "\n")
        lines.flush()

    write([sock.getsockname()[1] for sock in sockets])
    _Talker(Ends("dial", sockets), pattern, orders, write).run()


class _Talker:
    """The peer's loop."""

    def __init__(
        self, ends: Ends, pattern: str, orders: socket.socket, write: Callable[[object], None]
    ) -> None:
        self.ends, self.pattern, self.orders, self.write = ends, pattern, orders, write
        self.select = selectors.DefaultSelector()
        self.select.register(orders, selectors.EVENT_READ)
        both = selectors.EVENT_READ | (selectors.EVENT_WRITE if pattern == "bulk" else 0)
        for index, sock in enumerate(ends.sockets):
            self.select.register(sock, both, index)
        self.talks = pattern == "stream"
        begin = time.monotonic()
        count = len(ends.sockets)
        self.due = [begin + EVERY * index / count for index in range(count)]
        self.next = 0  # whose turn is next: they talk in the order of their numbers

    def run(self) -> None:
        while True:
            timeout = None
            if self.talks:
                self.talk()
                timeout = max(self.due[self.next] - time.monotonic(), 0)
            for key, events in self.select.select(timeout):
                if key.data is None:
                    for order in self.orders.recv(4096).decode().split() or ["end"]:
                        if not self.obey(order):
                            return
                else:
                    self.serve(key.data, events)

    def talk(self) -> None:
        now = time.monotonic()
        while self.due[self.next] <= now:
            self.ends.send(self.next, WORD)
            self.due[self.next] += EVERY
            self.next = (self.next + 1) % len(self.due)

    def serve(self, index: int, events: int) -> None:
        ends = self.ends
        if events & selectors.EVENT_READ:
            got = ends.receive(index)
            if got < 0:
                self.select.unregister(ends.sockets[index])
            elif got and self.pattern != "bulk":
                ends.moved[index].append(time.monotonic())
        if events & selectors.EVENT_WRITE and ends.send(index, 1 << 16):
            ends.moved[index].append(time.monotonic())

    def obey(self, order: str) -> bool:
        """Do it; whether that was not the end."""
        ends = self.ends
        if order == "say":
            for index in range(len(ends.sockets)):
                ends.send(index, WORD)
        elif order == "quiet":
            self.talks = False
            if self.pattern == "bulk":
                for index, sock in enumerate(ends.sockets):
                    self.select.modify(sock, selectors.EVENT_READ, index)
        elif order == "report":
            moved = [_around_the_longest_gap(each) for each in ends.moved]
            self.write({"tx": ends.tx, "rx": ends.rx, "moved": moved, "fault": ends.fault})
        elif order == "end":
            for sock in ends.sockets:  # a reset, so that nothing stays in TIME-WAIT
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            return False
        return True


def _around_the_longest_gap(times: list[float]) -> list[float]:
    """When the longest silence began and ended; of one time, twice that."""
    if len(times) < 2:
        return times * 2
    _, end = max((b - a, n) for n, (a, b) in enumerate(pairwise(times), 1))
    return [times[end - 1], times[end]]


# ---- the process, by TCP_REPAIR within this one --------------------------------------------------


class Server:
    """Answers each octet with one (bulk: with none), frozen and re-created where it is told."""

    def __init__(self, where: Namespace, at: Endpoint, *, answers: bool) -> None:
        self.answers = answers
        with inside(where):
            family = socket.AF_INET if at.address.version == 4 else socket.AF_INET6
            self.listener = socket.socket(family)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listener.bind((str(at.address), at.port))
            self.listener.listen(4096)
        self.ends = Ends("serve", [])
        self.owed: list[int] = []

    def accept(self, count: int) -> None:
        """All peers, in the order in which they came."""
        sockets = []
        self.listener.settimeout(PATIENCE)
        with low_numbers_kept_free():
            for _ in range(count):
                sock, _ = self.listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets.append(sock)
        self.listener.close()
        self.ends, self.owed = Ends("serve", sockets), [0] * count

    def start(self) -> None:
        self.waker, self.woken = socket.socketpair()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.waker.close()
        self.thread.join()
        self.woken.close()

    def _run(self) -> None:
        ends = self.ends
        with selectors.DefaultSelector() as select:
            select.register(self.woken, selectors.EVENT_READ)
            for index, sock in enumerate(ends.sockets):
                select.register(sock, selectors.EVENT_READ, index)
            while True:
                for key, _ in select.select(0.05 if any(self.owed) else None):
                    if key.data is None:
                        return
                    got = ends.receive(key.data)
                    if got < 0:
                        select.unregister(key.fileobj)
                    elif self.answers:
                        self.owed[key.data] += got
                        self._answer(key.data)
                for index in [i for i, owed in enumerate(self.owed) if owed]:
                    self._answer(index)

    def _answer(self, index: int) -> None:
        self.owed[index] -= self.ends.send(index, self.owed[index])

    def freeze(self) -> None:
        self.stop()
        self.states = [repair.freeze(sock) for sock in self.ends.sockets]
        for sock in self.ends.sockets:
            sock.close()

    def recreate(self, where: Namespace) -> None:
        with inside(where), low_numbers_kept_free():
            self.ends.sockets = [repair.recreate(state) for state in self.states]
        for sock in self.ends.sockets:
            sock.setblocking(False)

    def live(self) -> None:
        for sock in self.ends.sockets:
            repair.leave_repair(sock)
        self.start()

    def close(self) -> None:
        self.stop()
        for sock in self.ends.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()


class TimedCriu(Criu):
    """Notes when the last `criu` returned, before the lab tidies up behind it."""

    returned = 0.0

    def _run(self, *arguments: Any, **options: Any) -> None:
        super()._run(*arguments, **options)
        self.returned = time.monotonic()


@contextmanager
def low_numbers_kept_free() -> Iterator[None]:
    """What is opened in the block has descriptors behind the first few.

    libnftables, in this same process, waits with select(), which knows none above 1023.
    """
    reserved = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
    try:
        yield
    finally:
        for fd in reserved:
            os.close(fd)


# ---- a run ---------------------------------------------------------------------------------------


@dataclass
class Lane:
    """One practice network, in which runs follow each other."""

    topology: Topology
    state: Path
    number: int = 0
    spaces: dict[str, Namespace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ("client", "gateway", "source", "destination"):
            self.spaces[role] = open_namespace(self.topology.name(role))

    def run(self, case: Case, family: int) -> Result:
        self.number += 1
        old, new = SOURCE.address(family), DESTINATION.address(family)
        at = Endpoint(old, PORT + self.number)
        one = _Run(self, case, Map(old, new), at)
        if case.engine == "repair":
            return one.by_repair()
        return one.by_criu(in_place=case.engine == "in place")


class _Run:
    def __init__(self, lane: Lane, case: Case, map_: Map, at: Endpoint) -> None:
        self.lane, self.case, self.map, self.at = lane, case, map_, at
        self.id = f"run-{lane.number}"
        state = StateDirectory(str(lane.state), create=True)
        self.lifecycle = Lifecycle(LinuxKernel(state.path), state, self.hear)
        self.began = self.usual = 0.0
        self.client = ip_address(str(lane.topology.seats[0].address(map_.old.version)))

    def hear(self, line: str) -> None:
        """The silence begins when the gateway's gate closes: when it knows for which tuples."""
        fills = "add element inet natkeep kept-" in line and line.startswith("[+]")
        if fills and self.lane.topology.name("gateway") in line:
            self.began = time.monotonic()

    def kept(self, ports: list[int]) -> Connections:
        return Connections.of(FourTuple(Endpoint(self.client, p), self.at) for p in ports)

    def prepare(self, ports: list[int]) -> None:
        names = self.lane.topology.name
        sites = tuple(Site(role, names(role.value)) for role in (Role.GATEWAY, Role.DESTINATION))
        move = Move(self.id, (self.map,), sites, hold=self.case.hold)
        self.lifecycle.prepare(move, self.kept(ports))

    @contextmanager
    def peer(self) -> Iterator[Peer]:
        peer = Peer(self.lane.spaces["client"], self.at, self.case.connections, self.case.pattern)
        try:
            yield peer
        finally:
            peer.end()

    def await_traffic(self, peer: Peer) -> None:
        """Until all connections have been used once, and the talk is under way."""
        said = time.monotonic()
        if self.case.pattern == "once":
            peer.tell("say")
        _await(lambda: min(peer.ask()["tx"]) >= WORD, "the peer to send")
        if self.case.pattern != "bulk":
            _await(lambda: min(peer.ask()["rx"]) >= WORD, "answers")
        if self.case.connections > 1:
            self.usual = statistics.median(first[0] - said for first in peer.ask()["moved"])

    def by_repair(self) -> Result:
        lane, case = self.lane, self.case
        server = Server(lane.spaces["source"], self.at, answers=case.pattern != "bulk")
        with self.peer() as peer:
            server.accept(case.connections)
            server.start()
            self.await_traffic(peer)
            counters = read_counters(lane.topology.name("destination"))
            try:
                self.prepare(peer.ports)
                server.freeze()
                if case.pattern == "once":
                    peer.tell("say")
                # What a restore does last: sockets in repair must not wait long (repair.py).
                _sleep_until(self.began + case.blackout - 0.01 - case.connections / 5000)
                server.recreate(lane.spaces["destination"])
                _sleep_until(self.began + case.blackout - 0.002)
                self.lifecycle.open(self.id)
                server.live()
                lives = time.monotonic()
                result = self.conclude(peer, lives, server.ends)
                if not result.fault:
                    result.fault = changed(counters, lane.topology.name("destination"))
                server.close()
            finally:
                self.lifecycle.teardown(self.id)
        return result

    def by_criu(self, *, in_place: bool) -> Result:
        lane, case = self.lane, self.case
        criu = find_criu()
        assert criu is not None
        source, destination = lane.topology["source"], lane.topology["destination"]
        engine = TimedCriu(criu)
        serving = Application(lane.topology.directory / f"serve-{self.id}")
        pid = engine.start(source, serving, serving.serve_line(str(self.at)))
        serving.wait(lambda report: report["listening"], "listening")
        if case.pattern == "bulk":
            serving.do("swallow")
        moving, at = Moving(serving, "serve", pid), source
        with self.peer() as peer:
            self.await_traffic(peer)
            try:
                if not in_place:
                    self.prepare(peer.ports)
                self.began = self.began or time.monotonic()
                frozen = engine.freeze(source, moving, lane.topology.directory / f"img-{self.id}")
                if case.pattern == "once":
                    peer.tell("say")
                # A restore takes some time, too; the blackout is what it is, and is printed.
                _sleep_until(self.began + case.blackout - 0.12)
                at = source if in_place else destination
                hook = Opening(lambda: None) if in_place else self.opening()
                engine.restore(at, moving, frozen, hook)
                lives = engine.returned
                ends = Ends("serve", [])
                result = self.conclude(peer, lives, ends, serving)
            finally:
                at.kill(moving.pid)
                self.lifecycle.teardown(self.id)
        return result

    def opening(self) -> Opening:
        state = {"NATKEEP_STATE_DIR": self.lifecycle.state.path, "NATKEEP_ID": self.id}
        return Opening(lambda: None, HOOK, state)

    def conclude(
        self, peer: Peer, lives: float, server: Ends, serving: Application | None = None
    ) -> Result:
        """What the peer saw, when both ends have all octets."""
        blackout = lives - self.began

        def heard() -> bool:
            return all(len(gap) == 2 and gap[1] > self.began for gap in peer.ask()["moved"])

        def settled() -> bool:
            seen = peer.ask()
            if serving is None:
                tx, rx = server.tx, server.rx
            else:
                told = serving.fresh()["connections"]
                tx, rx = [each["tx"] for each in told], [each["rx"] for each in told]
                server.fault = server.fault or "".join(str(e["mismatch"] or "") for e in told)
            same = sorted(tx) == sorted(seen["rx"]) and sorted(rx) == sorted(seen["tx"])
            return bool(same or seen["fault"] or server.fault)

        fault = ""
        try:
            _await(heard, "the peer to hear")
            time.sleep(10 * EVERY)  # the connection goes on
            peer.tell("quiet")
            _await(settled, "all octets to arrive")
        except TimeoutError as error:
            fault = str(error)
        seen = peer.ask()
        ends = [gap[1] for gap in seen["moved"] if gap and gap[1] > self.began]
        stall = statistics.median(end - self.began for end in ends) if ends else float("inf")
        return Result(
            blackout * 1000,
            stall * 1000,
            self.count_held(),
            self.usual * 1000,
            fault or seen["fault"] or server.fault,
        )

    def count_held(self) -> int:
        """Segments that the holder has delivered, by the journal."""
        if self.id not in self.lifecycle.state.ids():
            return 0
        records = self.lifecycle.state.load(self.id).records.values()
        return sum(int(record.prior.facts.get("segments", 0)) for record in records)


def read_counters(netns: str) -> dict[str, int]:
    """What the kernel there says of segments that it would not have."""
    namespace = open_namespace(netns)
    try:
        with inside(namespace):
            rows = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    finally:
        os.close(namespace.fd)
    names, values = (row.split()[1:] for row in rows if row.startswith("TcpExt:"))
    wanted = ("BeyondWindow", "TCPRcvQDrop")
    return {n: int(v) for n, v in zip(names, values, strict=True) if n in wanted}


def changed(before: dict[str, int], netns: str) -> str:
    """Which of the counters have moved."""
    after = read_counters(netns)
    return ", ".join(f"{n} {after[n] - before[n]}" for n in before if after[n] != before[n])


def _await(ready: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.005)


def _sleep_until(moment: float) -> None:
    time.sleep(max(moment - time.monotonic(), 0))


# ---- all of them ---------------------------------------------------------------------------------


def make_cases(blackouts: list[float], only: str) -> list[Case]:
    """What is run, each --reps times; those that are alike beside each other."""
    found = []
    for pattern in ("stream", "once"):
        for blackout in blackouts:
            found += [Case("repair", pattern, blackout, hold) for hold in (True, False)]
    middle = [blackout for blackout in blackouts if 0.5 <= blackout <= 3]
    for blackout in middle:
        found += [Case("repair", "bulk", blackout, hold) for hold in (True, False)]
    if find_criu() is not None:
        for blackout in [blackout for blackout in blackouts if blackout >= 0.5]:
            found += [
                Case("criu", "once", blackout, True),
                Case("criu", "once", blackout, False),
                Case("in place", "once", blackout, False),
            ]
    for blackout in middle[:1] or blackouts[:1]:
        found += [Case("repair", "once", blackout, hold, MANY) for hold in (True, False)]
    return [case for case in found if only in case.name]


def is_dear(case: Case) -> bool:
    """What is run less often by default: it takes long, or shows only that it works as well."""
    return case.engine != "repair" or case.connections > 1


def work(jobs: Any, results: Any) -> None:
    """One lane: a practice network, and what is run in it, one after the other."""
    # In memory, as /run usually is: a move's journal is fsynced before and after each step.
    memory = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm")
    with Topology() as topology, memory as state:
        lane = Lane(topology, Path(state))
        for number, case, family in iter(jobs.get, None):
            try:
                result = lane.run(case, family)
            except Exception as error:  # told with the others, and the bench goes on
                result = Result(0, float("inf"), fault=f"{type(error).__name__}: {error}")
            results.put((number, family, result))


def run_all(cases: list[Case], reps: int, dear_reps: int, lanes: int) -> list[list[Result]]:
    """The results of each case; jobs that take long begin first."""
    context = multiprocessing.get_context("fork")
    jobs, results = context.Queue(), context.Queue()
    wanted = [
        (number, case, (4, 6)[rep % 2])
        for number, case in enumerate(cases)
        for rep in range(dear_reps if is_dear(case) else reps)
    ]
    for job in sorted(wanted, key=lambda job: -job[1].seconds):
        jobs.put(job)
    for _ in range(lanes):
        jobs.put(None)
    workers = [context.Process(target=work, args=(jobs, results)) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    found: list[list[Result]] = [[] for _ in cases]
    try:
        for done in range(len(wanted)):
            number, _, result = results.get(timeout=180)
            found[number].append(result)
            if sys.stderr.isatty():
                print(f"\r{done + 1} of {len(wanted)} runs", end="", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.join(30)
            if worker.is_alive():
                worker.terminate()
    return found


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def show(cases: list[Case], found: list[list[Result]]) -> None:
    """A line a case: what the peer waited for beyond the blackout."""
    print(f"{'':44}{'asked':>7}{'blackout':>10}{'stall':>9}{'beyond':>9}{'worst':>9}  runs")
    for case, results in zip(cases, found, strict=True):
        how = "hold" if case.hold else "no hold" if case.engine != "in place" else "CRIU alone"
        good = [r for r in results if not r.fault] or results
        beyond = [r.beyond for r in good]
        print(
            f"{case.name + ', ' + how:44}{case.blackout * 1000:7.0f}"
            f"{median([r.blackout for r in good]):10.1f}{median([r.stall for r in good]):9.1f}"
            f"{median(beyond):9.1f}{max(beyond, default=float('nan')):9.1f}  {len(results)}"
        )


def _usual(results: list[Result]) -> str:
    usual = median([result.usual for result in results])
    return f" and the usual {usual:.0f} ms" if usual else ""


def judge(cases: list[Case], found: list[list[Result]]) -> bool:
    """Print what was asked for beside what was reached; whether all of it holds."""
    print()
    fine = True
    for case, results in zip(cases, found, strict=True):
        if not case.hold:
            continue
        beyond = median([r.beyond for r in results])
        ok = beyond <= ALLOWED_MS + median([r.usual for r in results])
        fine = fine and ok
        print(
            f"{'ok  ' if ok else 'MISS'} {case.name}, {case.blackout * 1000:.0f} ms: stall at most "
            f"{ALLOWED_MS:.0f} ms beyond the blackout{_usual(results)}; "
            f"median of {len(results)}: {beyond:.1f}"
        )
    faults = [(c, r) for c, rs in zip(cases, found, strict=True) for r in rs if r.fault]
    count = sum(len(results) for results in found)
    said = "every octet once, none beyond the window, the connections go on"
    print(f"{'MISS' if faults else 'ok  '} {said}: {count - len(faults)} of {count} runs")
    for case, result in faults[:10]:
        print(f"     {case.name}, {case.blackout * 1000:.0f} ms, hold {case.hold}: {result.fault}")
    return fine and not faults


def write(path: Path, cases: list[Case], found: list[list[Result]]) -> None:
    """For the plots: of each case what it was, and its runs."""
    rows = [
        {
            "engine": case.engine, "pattern": case.pattern, "asked_ms": case.blackout * 1000,
            "hold": case.hold, "connections": case.connections,
            "runs": [{"blackout_ms": r.blackout, "stall_ms": r.stall, "held": r.held,
                      "usual_ms": r.usual, "fault": r.fault} for r in results],
        }
        for case, results in zip(cases, found, strict=True)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "bench": "stall", "cases": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=4, help="runs of each case (default: 4)")
    parser.add_argument("--blackouts", default=",".join(map(str, BLACKOUTS)), help="seconds")
    parser.add_argument("--lanes", type=int, default=3, help="networks at the same time")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cases = make_cases([float(text) for text in args.blackouts.split(",")], args.only)
    dear = args.reps if args.reps >= 20 else max(args.reps // 2, 1)
    began = time.monotonic()
    found = run_all(cases, args.reps, dear, args.lanes)
    print(f"\r{sum(map(len, found))} runs in {time.monotonic() - began:.0f} s; medians, ms\n")
    show(cases, found)
    fine = judge(cases, found)
    if args.json:
        write(args.json, cases, found)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
