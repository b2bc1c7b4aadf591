"""the lane: one practice network, in which bench/stall.py's moves follow each other."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bench.ends import EVERY, PATIENCE, WORD, Ends, Peer, Server
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lab.application import Application
from natkeep.lab.engine import Moving, Opening
from natkeep.lab.engines.criu import Criu, find_criu
from natkeep.lab.topology import DESTINATION, SOURCE, Topology
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

HOOK = Path(sys.executable).with_name("natkeep-hook")
PORT = 7000


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


class TimedCriu(Criu):
    """Notes when the last `criu` returned, before the lab tidies up behind it."""

    returned = 0.0

    def run(self, *arguments: Any, **options: Any) -> None:
        super().run(*arguments, **options)
        self.returned = time.monotonic()


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
        self.executor = Executor(LinuxKernel(state.path), state, self.hear)
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
        prepare(self.executor, move, self.kept(ports))

    @contextmanager
    def peer(self) -> Iterator[Peer]:
        peer = Peer(self.lane.spaces["client"], self.at, self.case.connections, self.case.pattern)
        try:
            yield peer
        except BaseException:
            peer.kill()
            raise
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
                open_move(self.executor, self.id)
                server.live()
                lives = time.monotonic()
                result = self.conclude(peer, lives, server.ends)
                if not result.fault:
                    result.fault = changed(counters, lane.topology.name("destination"))
                server.close()
            finally:
                teardown(self.executor, self.id)
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
                teardown(self.executor, self.id)
        return result

    def opening(self) -> Opening:
        state = {"NATKEEP_STATE_DIR": self.executor.state.path, "NATKEEP_ID": self.id}
        return Opening(lambda: None, HOOK, state)

    def conclude(
        self, peer: Peer, lives: float, server: Ends, serving: Application | None = None
    ) -> Result:
        """What the peer saw, when both ends have all octets."""
        blackout = lives - self.began
        assert blackout > 0  # or the moment was never noted
        # No silence that ends earlier is the move's: a process heard then was not frozen yet, and
        # a peer that could still send (bulk) was filling its own buffers.
        middle = self.began + blackout / 2

        def heard() -> bool:
            return all(len(gap) == 2 and gap[1] > middle for gap in peer.ask(middle)["moved"])

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
        seen = peer.ask(middle)
        ends = [gap[1] for gap in seen["moved"] if gap and gap[1] > middle]
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
        if self.id not in self.executor.state.ids():
            return 0
        records = self.executor.state.load(self.id).records.values()
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
