"""The chaos: moves of a fleet on etcd while its members, its agents and who orders them die.

    python -m bench.chaos [--seconds 30] [--engine criu] [--only WORDS]

A server moves by `natkeep fleet`, over three members of etcd, while its client talks, and in each
case something is struck in one phase:

    leader      etcd's leader dies, and is there again in the end
    quorum      two of three members hang for --seconds: more than an agent's lease, if 30
    agents      both are killed, and are started again when the next phase begins
    cut off     one node's only member hangs from before the restore until after it
    fault       an agent dies at a point of natkeep/faultpoints.py, and is started again
    orderer     nobody goes on after a first order: the deadline undoes it, and the process stays
    host        the destination's agent never comes back before the restore: the way back

Asserted in each, by the lab: no reset, no octet lost, no frame with OLD behind the gateway, and in
the end both sites as they were. Rule: whatever fails is a line that says so, and exit 1.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench.etcd_cluster import NUMBERS, Cluster
from natkeep.errors import NatkeepError
from natkeep.faultpoints import POINTS, VARIABLE
from natkeep.lab.engine import Frozen
from natkeep.lab.fleet import NODES, Fleet
from natkeep.lab.host import LabError, await_true
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.lab import Lab
from natkeep.lab.report import Report
from natkeep.lab.scenario import perform

PHASES = ("before the order", "ordered", "ready", "open")
PREPARE_FAULTS = tuple(
    point for point in POINTS
    if point.startswith(("apply-", "begun-", "applied-", "done-", "journal-"))
    or point in ("locked", "between-chunks")
)  # fmt: skip
_DEADLINE = 3


@dataclass
class Chaos:
    """One case at work. leader, quorum, agents: strikes; heal: what was struck is back."""

    lab: Lab
    cluster: Cluster
    seconds: float
    fleet: Fleet = field(init=False)
    _dead: list[int] = field(default_factory=list)
    _hung: list[int] = field(default_factory=list)

    def leader(self) -> None:
        self._dead.append(self.cluster.leader())
        self.cluster.kill(self._dead[-1])

    def quorum(self) -> None:
        leader = self.cluster.leader()
        self._hung += [leader, next(number for number in NUMBERS if number != leader)]
        self.cluster.stop(*self._hung)

    def pass_time(self) -> None:
        """The client talks on, if it can."""
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(0.2)

    def agents(self) -> None:
        for role in NODES:
            self.fleet.kill(role)

    def heal(self) -> None:
        if self._hung:
            self.pass_time()
            self.cluster.go_on(*self._hung)
        for number in self._dead:
            self.cluster.start(number)
        struck = [*self._hung, *self._dead]
        self._hung, self._dead = [], []
        if struck:
            self.cluster.wait()
        self.fleet.revive()
        self.fleet.wait_alive()


@dataclass(frozen=True)
class Case:
    """What is told in the lab, and how it is called."""

    name: str
    tell: Callable[[Chaos], None]


def strike(chaos: Chaos, how: str, phase: str) -> None:
    """A move, with something struck in one phase and back before the next, or at the end."""
    lab, fleet = chaos.lab, Fleet(chaos.lab, chaos.cluster.store)
    chaos.fleet = fleet

    def come_to(now: str) -> None:
        if now == phase:
            getattr(chaos, how)()

    lab.begin(connections=2)
    lab.freeze()
    come_to("before the order")
    if how != "leader":
        chaos.heal()
    fleet.between = lambda: (come_to("ordered"), None if how == "leader" else chaos.heal())
    lab.prepare()
    come_to("ready")  # the restore does without the store, and without agents
    lab.restore()
    come_to("open")
    lab.traffic.talk_on()
    _come_to_the_end(chaos)


def cut_off(chaos: Chaos, role: str) -> None:
    """A node that reaches one member alone, which hangs while the destination opens."""
    lab, cluster = chaos.lab, chaos.cluster
    own = next(number for number in NUMBERS if number != cluster.leader())
    alone = {"NATKEEP_STORE": f"etcd:{cluster.clients[own]}"}
    chaos.fleet = Fleet(lab, cluster.store, **{role: alone})
    lab.begin(connections=2)
    lab.freeze()
    lab.prepare()
    cluster.stop(own)
    lab.restore()
    lab.traffic.talk_on()
    chaos.pass_time()
    cluster.go_on(own)
    _come_to_the_end(chaos)


def fault(chaos: Chaos, role: str, point: str) -> None:
    """An agent that dies while it prepares; where it does not come by there the move goes on."""
    lab, fleet = chaos.lab, Fleet(chaos.lab, chaos.cluster.store, **{role: {VARIABLE: point}})
    chaos.fleet = fleet
    lab.begin(connections=2)
    lab.freeze()

    def revive() -> None:
        if not fleet.has_died(role, 3):
            fleet.kill(role)  # nor is it to strike in the end, when nothing has it run again
        fleet.revive()

    fleet.between = revive
    lab.prepare()
    lab.restore()
    lab.traffic.talk_on()
    _come_to_the_end(chaos)


def orderer(chaos: Chaos) -> None:
    """Only the destination was ordered when who orders died; the process was never frozen."""
    lab, fleet = chaos.lab, Fleet(chaos.lab, chaos.cluster.store)
    chaos.fleet = fleet
    lab.begin(connections=2)
    lab.begin_freeze()  # of what is compared in the end
    listing = lab.directory / "list"
    views = lab.traffic.views.values()
    listing.write_text("".join(f"{one.destination} {one.source}\n" for one in views))
    lab.frozen = Frozen(listing, ("--connections", str(listing)))
    order = lab.place_order()
    with lab.report.must("the destination is prepared, and undone by its deadline"):
        fleet.apply(order, phase="staged", deadline_s=_DEADLINE)
        _await(
            fleet, order.id, lambda sites: bool(sites["destination"]["error"]["code"] == "deadline")
        )
    lab.note_restored()  # it was never away
    _go_on_at_home(chaos)


def host(chaos: Chaos) -> None:
    """The destination's host is lost before the restore; the process goes back."""
    lab, fleet = chaos.lab, Fleet(chaos.lab, chaos.cluster.store)
    chaos.fleet = fleet
    lab.begin(connections=2)
    lab.freeze()
    lab.prepare()
    fleet.kill("destination")
    move_id = lab.order.id
    with lab.report.must("the gateway is undone"):
        fleet.call("fleet", "end", move_id, "--yes")
        _await(fleet, move_id, lambda sites: bool(sites["gateway"]["phase"] == "gone"))
    lab.restore_at_source()
    lab.traffic.talk_on()
    fleet.start("destination")
    with lab.report.must("the destination is undone when it is back"):
        fleet.call("fleet", "wait", move_id, "--for", "settled")
    _go_on_at_home(chaos)


def _await(fleet: Fleet, move_id: str, until: Callable[[dict[str, Any]], bool]) -> None:
    """Until that is so of what the nodes say."""

    def ready() -> bool:
        with suppress(TypeError):  # there is no error yet
            return until(fleet.sites(move_id))
        return False

    try:
        await_true(ready, "the nodes", seconds=30)
    except LabError as error:
        raise LabError(f"{error}: {fleet.call('fleet', 'status', move_id)}") from None


def _go_on_at_home(chaos: Chaos) -> None:
    """The process is where it was, and both sites are, too."""
    lab = chaos.lab
    lab.undone.append(lab.order)
    lab.traffic.talk_on()
    lab.finish(moved=False)
    for role, before in lab._surfaces.items():
        left = difference(before, read_surfaces(lab.topology[role]))
        lab.report.check(f"the {role} is as it was", not left, left)


def _come_to_the_end(chaos: Chaos) -> None:
    lab = chaos.lab
    chaos.heal()
    with lab.report.must("the agents are there, and the move is open"):
        chaos.fleet.call("fleet", "wait", lab.order.id, "--for", "open")
    lab.traffic.talk_on()
    lab.finish()


def make_cases(points: tuple[str, ...] = PREPARE_FAULTS) -> Iterator[Case]:
    """All of them."""
    for how, phase in itertools.product(("leader", "quorum", "agents"), PHASES):
        yield Case(f"{how} {phase}", partial(strike, how=how, phase=phase))
    for role in NODES:
        yield Case(f"cut off {role}", partial(cut_off, role=role))
    yield Case("orderer", orderer)
    yield Case("host", host)
    for role, point in itertools.product(NODES, points):
        yield Case(f"fault {role} {point}", partial(fault, role=role, point=point))


def run(case: Case, *, engine: str, seconds: float) -> Report:
    """Tell a case in a fresh lab, over a fresh cluster."""
    with Lab("chaos", engine=engine) as lab:
        cluster = Cluster(lab.directory)
        lab.topology.defer(cluster.close)
        cluster.wait()
        perform(lab, lambda lab: case.tell(Chaos(lab, cluster, seconds)))
    return lab.report


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.chaos")
    parser.add_argument("--seconds", type=float, default=30, help="that a quorum hangs (30)")
    parser.add_argument("--engine", default="repair", help="criu or repair (repair)")
    parser.add_argument("--only", default="", help="cases that begin so")
    args = parser.parse_args()
    failed = 0
    cases = [case for case in make_cases() if case.name.startswith(args.only)]
    for case in cases:
        try:
            report = run(case, engine=args.engine, seconds=args.seconds)
        except (NatkeepError, subprocess.TimeoutExpired) as error:
            bad, resets = [str(error)], 0
        else:
            bad, resets = [str(one) for one in report.assertions if not one.ok], report.resets
        failed += bool(bad)
        verdict = "FAILED" if bad else "ok"
        print(f"{verdict:6} {case.name}: {resets} resets", *bad, sep="\n         ", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} cases went well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
