"""The soak: one server moves on and on, while several peers talk to it and everything is counted.

    python -m bench.soak --minutes 20          (or --migrations 12; --family 4|6)

A round is A to B, on to C and back to B by `prepare --replace`, and home to A, where nothing may be
left of it. Rounds are in turn stateful and stateless. Most moves are the engine `repair`'s; every
third is a real CRIU's, opened by natkeep-hook or done by `natkeep run`. All the while each of three
peers has four connections on which numbered octets go both ways; a move begins as soon as all of
them carry octets again after the last one.

Asserted: no wrong octet and no broken connection at any time, none missing in the end, and, in the
reading at the end of each round, that nothing grows (gauges.py). With --minutes also that there
were PACE moves a minute.

Rule: natkeep is driven by its command line, as everywhere in the lab. There are no captures: they
would fill the disk; what the wires show of a move is for the matrix to judge.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from bench import gauges
from natkeep.errors import NatkeepError
from natkeep.lab.application import (
    Application,
    TrafficError,
    Views,
    faults,
    handed_over,
    octets_agree,
    start_client,
    sum_of,
    tuple_of,
)
from natkeep.lab.engine import Engine, Frozen, Moving, end_silence
from natkeep.lab.engines.criu import Criu, find_criu
from natkeep.lab.engines.repair import Repair
from natkeep.lab.host import Host, LabError, await_true
from natkeep.lab.report import Assertion
from natkeep.lab.topology import CLIENT, DESTINATION, SECOND_CLIENT, SOURCE, THIRD, Seat, Topology
from natkeep.lab.translators import Natkeep, Order, TranslatorError, natkeep_command
from natkeep.plan.tuples import Endpoint

PORT = 5000
PACE = 15.0
"""Moves a minute that are asked for: 300 in 20 minutes."""

ROUND = ("destination", "third", "destination", "source")
CRIU_EVERY = 3
"""Has nothing in common with the length of a round, so CRIU comes to make each of its moves."""

PEERS = (CLIENT, SECOND_CLIENT, Seat("client3", "near", 4))
# The pids of a process that CRIU moves must be free wherever it goes, for the whole of the soak.
HOSTS = (
    replace(SOURCE, first_pid=1_000),
    replace(DESTINATION, first_pid=11_000),
    replace(THIRD, first_pid=21_000),
)
TALKS = (
    {"interval_ms": 10, "size": 64, "answer": 64},
    {"interval_ms": 20, "size": 1_000, "answer": 1_000},
    {"interval_ms": 40, "size": 16_000, "answer": 16_000},
    {"interval_ms": 100, "size": 100_000, "answer": 100_000},
)
"""Of each peer's connections, in bytes: chats, and bulk whose queues are not empty at a freeze."""

_HEARD_WITHIN_S = 20.0  # a peer's pauses double, and the machine may be busy


class Metered(Natkeep):
    """natkeep as a user would call it, and how much memory each call took at most."""

    def __init__(self, directory: Path, note: Callable[[dict[str, int]], None]) -> None:
        super().__init__(directory)
        self._note = note

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [*natkeep_command(), verb, *arguments]
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                env={**os.environ, **self.environment},
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            text = said.read().decode(errors="replace")
        self._note({f"natkeep {verb}: memory{gauges.WEIGHT}": usage.ru_maxrss})
        return subprocess.CompletedProcess(argv, process.returncode, "", text)


class Soak:
    """The network, the peers and the server; `move` until it is enough, then `end`."""

    def __init__(self, topology: Topology, *, family: int = 4) -> None:
        self.topology, self.family = topology, family
        self.directory = topology.directory
        self.book, self.calls = gauges.Book(), gauges.Book()
        self.natkeep = Metered(self.directory, self.calls.note)
        self.repair: Engine = Repair()
        binary = find_criu()
        self.criu = Criu(binary) if binary else None
        self.ways: Counter[str] = Counter()
        self.blackouts: list[float] = []
        self.old = SOURCE.address(family)
        self.at = topology["source"]
        self.order: Order | None = None
        self.numbers = count(1)
        self._begin()

    def _begin(self) -> None:
        """All peers are connected and talk."""
        application = Application(self.directory / "serve")
        line = application.serve_line(str(Endpoint(self.old, PORT)))
        pid = self.repair.start(self.at, application, line)
        application.wait(lambda report: report["listening"], "listening")
        to = Endpoint(self.old, PORT)
        self.peers = {
            seat.role: start_client(self.topology[seat.role], seat.role, to, count=len(TALKS))
            for seat in PEERS
        }
        kept = [tuple_of(each) for peer in self.peers.values() for each in _connections(peer)]
        lines = tuple(f"{each.destination} {each.source}" for each in kept)
        self.server = Moving(application, "serve", pid, lines)
        self.kept: Views = {each: each for each in kept}
        for peer in self.peers.values():
            peer.do(*({"talk": talk, "only": [i]} for i, talk in enumerate(TALKS)))
        self._await_talk()

    # ---- moving --------------------------------------------------------------------------------

    def move(self) -> None:
        """One more move; NatkeepError or TrafficError as soon as anything is wrong."""
        number = next(self.numbers)
        leg, turn = (number - 1) % len(ROUND), (number - 1) // len(ROUND)
        mode = ("stateful", "stateless")[turn % 2]
        to = self.topology[ROUND[leg]]
        by_criu = self.criu is not None and number % CRIU_EVERY == 0
        engine: Engine = self.criu if by_criu and self.criu else self.repair
        if by_criu:
            _let_criu_probe(to)
        began = time.monotonic()
        frozen = engine.freeze(self.at, self.server, self.directory / "frozen")
        if to.role == "source":
            self._go_home(engine, frozen, to)
        elif by_criu and self.order is None and isinstance(engine, Criu):
            self._go_by_run(engine, frozen, to, f"soak-{number}", mode)
        else:
            self._go_on(engine, frozen, to, f"soak-{number}", mode)
        self.at = to
        self.blackouts.append((time.monotonic() - began) * 1000)
        shutil.rmtree(frozen.directory)
        self._await_talk()
        if to.role == "source":
            self._read_gauges()

    def _go_on(self, engine: Engine, frozen: Frozen, to: Host, move_id: str, mode: str) -> None:
        """Prepare, restore, open; an earlier move is replaced and what it left is undone."""
        earlier = self.order
        order = self._order(frozen, to, move_id, mode, earlier)
        end_silence(to)  # where it was before, as CRIU's lock would be by now
        self.natkeep.prepare(order)
        engine.restore(to, self.server, frozen, self.natkeep.opening(order))
        if earlier is not None:
            self.natkeep.retire(earlier)
        self.order = order
        self._count(engine, "--replace" if earlier else "prepare", mode)

    def _go_by_run(self, engine: Criu, frozen: Frozen, to: Host, move_id: str, mode: str) -> None:
        """The whole of it by `natkeep run`, at the destination."""
        order = self._order(frozen, to, move_id, mode)
        argv = [
            *natkeep_command(), "run", order.id, f"--map={order.old}={order.new}",
            f"--site=gateway={order.gateway.name}", "--site=destination", "--mode", mode,
            "--", str(engine.binary), "restore", "--images-dir", str(frozen.directory),
            "--tcp-established", "--restore-detached", "-v4", "--log-file", "restore.log",
        ]  # fmt: skip
        end_silence(to)
        # In a file: the server that it restores would keep a pipe open.
        said = frozen.directory / "run.log"
        with said.open("wb") as log:
            done = subprocess.run(
                to.command(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60,
                env={**os.environ, **self.natkeep.environment},
            )  # fmt: skip
        if done.returncode:
            text = said.read_text(errors="replace").strip()
            raise TranslatorError(f"natkeep run exited {done.returncode}: {text[-600:]}")
        self.order = order
        self._count(engine, "run", mode)

    def _go_home(self, engine: Engine, frozen: Frozen, to: Host) -> None:
        """Restored where OLD is at home; the translation ends when the sockets are there."""
        assert self.order is not None
        engine.restore(to, self.server, frozen, self.natkeep.withdrawal(self.order))
        self._count(engine, "home", self.order.mode)
        self.order = None

    def _order(
        self, frozen: Frozen, to: Host, move_id: str, mode: str, earlier: Order | None = None
    ) -> Order:
        new = {seat.role: seat.address(self.family) for seat in HOSTS}[to.role]
        return Order(
            move_id, self.old, new, self.topology["gateway"], to, tuple(self.kept),
            frozen.options, mode, earlier,
        )  # fmt: skip

    def _count(self, engine: Engine, way: str, mode: str) -> None:
        self.ways.update((f"by {engine.name}", way, mode))

    # ---- looking -------------------------------------------------------------------------------

    def _await_talk(self) -> None:
        """Until every connection has had one more answer in full, and none has a fault."""
        for peer in self.peers.values():
            before = [each["answered"] for each in _connections(peer)]

            def decided(report: dict[str, object], before: list[int] = before) -> bool:
                return bool(faults(report)) or _answered_more(report, before)

            report = peer.wait(decided, "for an answer on each", within=_HEARD_WITHIN_S)
            if bad := faults(report):
                raise TrafficError(f"{peer.directory.name}: {'; '.join(bad[:3])}")

    def _read_gauges(self) -> None:
        """At home: all is as it was before the round."""
        for role in ("destination", "third"):
            end_silence(self.topology[role])  # the engine's; natkeep needs it no more
        for role in ("gateway", *(seat.role for seat in HOSTS)):
            self.book.note(gauges.read_host(self.topology[role]))
        processes = {role: (self.topology[role], peer.fresh()["pid"])
                     for role, peer in self.peers.items()}  # fmt: skip
        processes["server"] = self.at, self.server.pid
        for name, (host, pid) in processes.items():
            self.book.note_settled(partial(gauges.read_process, name, host.proc(pid)))
        self.book.note_settled(partial(gauges.read_files, "lab's directory", self.directory))
        self.book.note(gauges.read_names(self.topology.hex))
        self.book.note(gauges.read_self())

    def end(self, *, patience: float = _HEARD_WITHIN_S) -> list[Assertion]:
        """The peers ask nothing more; what arrived within so many seconds, and what grew."""
        for peer in self.peers.values():
            peer.do("quiet")
        # What did not arrive is told by octets_agree; a server that is frozen tells nothing new.
        with suppress(LabError, TrafficError):
            await_true(self._settled, "everything to arrive", seconds=patience)
        server = self.server.application.report() or {"connections": []}
        found = []
        for role, peer in self.peers.items():
            told = octets_agree(peer.fresh(), server, self._views_of(peer))
            found.append(replace(told, name=f"{role}: {told.name}"))
        return [*found, *self.book.assertions(), *self.calls.assertions()]

    def _settled(self) -> bool:
        server = self.server.application.fresh()
        reports = [(peer, peer.fresh()) for peer in self.peers.values()]
        agree = all(octets_agree(told, server, self._views_of(peer)).ok for peer, told in reports)
        return agree and all(handed_over(told) for _, told in reports)

    def _views_of(self, peer: Application) -> Views:
        own = [tuple_of(each) for each in _connections(peer)]
        return {each: each for each in own}

    @property
    def octets(self) -> int:
        """All that was carried and checked, both ways."""
        reports = [peer.fresh() for peer in self.peers.values()]
        return sum(sum_of(report, way) for report in reports for way in ("rx", "tx"))


def _let_criu_probe(host: Host) -> None:
    """CRIU tries out what the kernel can on connections over lo, which `repair` silenced too."""
    if "lab_silence" in host.run("nft", "list", "tables").stdout:
        host.nft(
            'insert rule inet lab_silence into iifname "lo" accept\n'
            'insert rule inet lab_silence out oifname "lo" accept\n'
        )


def _connections(peer: Application) -> list[dict[str, int]]:
    found: list[dict[str, int]] = peer.fresh()["connections"]
    return found


def _answered_more(report: dict[str, object], before: list[int]) -> bool:
    connections = report["connections"]
    assert isinstance(connections, list)
    answers = [each["answered"] for each in connections]
    return all(now > then for now, then in zip(answers, before, strict=True))


def soak(
    *, minutes: float = 0, migrations: int = 0, family: int = 4,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Assertion]:  # fmt: skip
    """Move for so many minutes, or so many times (of whole rounds); what is asserted came to."""
    began = time.monotonic()
    with Topology((*PEERS, *HOSTS)) as topology:
        run = Soak(topology, family=family)
        found, moved = [], 0
        try:
            while moved % len(ROUND) or not _enough(moved, migrations, began, minutes):
                run.move()
                moved += 1
                tell(f"{moved} moves, {run.blackouts[-1]:.0f} ms the last one")
        except NatkeepError as error:
            said = str(error).partition("; last report:")[0][:900]
            found.append(Assertion(f"move {moved + 1} succeeds", False, said))
        broken = bool(found)
        took = (time.monotonic() - began) / 60
        if minutes:  # otherwise nothing depends on how busy the machine is
            asked = int(PACE * minutes)
            said = f"{moved} in {took:.1f} minutes, {asked} asked for"
            found.append(Assertion("migrations", moved >= asked, said))
        else:
            found.append(Assertion("migrations", moved >= migrations, f"{moved}"))
        found += run.end(patience=0) if broken else run.end()
        tell(_summary(run, moved, took))
    return found


def _enough(moved: int, migrations: int, began: float, minutes: float) -> bool:
    return moved >= migrations and time.monotonic() >= began + minutes * 60


def _summary(run: Soak, moved: int, took: float) -> str:
    ways = ", ".join(f"{number} {way}" for way, number in sorted(run.ways.items()))
    middle = statistics.median(run.blackouts) if run.blackouts else 0
    return (
        f"{moved} moves in {took:.1f} min ({ways}); from freeze to restore {middle:.0f} ms in the "
        f"middle, {max(run.blackouts, default=0):.0f} at most; {run.octets:,} octets checked"
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends it as an interrupt does, so that no host is left."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def main() -> int:
    """Parse, run, print; 0 if all held."""
    parser = argparse.ArgumentParser(prog="soak", description="moves on and on, under load")
    enough = parser.add_mutually_exclusive_group(required=True)
    enough.add_argument("--minutes", type=float, default=0, help="how long; whole rounds")
    enough.add_argument("--migrations", type=int, default=0, help="how many; whole rounds")
    parser.add_argument("--family", type=int, choices=(4, 6), default=4)
    args = parser.parse_args()
    with _terminable():
        try:
            found = soak(
                minutes=args.minutes, migrations=args.migrations, family=args.family,
                tell=lambda line: print(line, file=sys.stderr, flush=True),
            )  # fmt: skip
        except NatkeepError as error:
            print(f"soak: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    failed = [each for each in found if not each.ok]
    print("\n".join(str(each) for each in found))
    print(
        f"{len(found) - len(failed)} of {len(found)} hold; verdict: {'fail' if failed else 'pass'}"
    )
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
