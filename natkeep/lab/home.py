"""the way home: what scenarios about the source do with natkeep's command line, and how they end.

    source = Machine(lab, "source"); source.prepare("web", …); source.refuses(reason, "teardown", …)
    come_home(lab, source.hook("web"))      the process is restored where it was frozen
    conclude_at_home(lab)                   its wires are judged: it never was anywhere else

Each machine has a state directory of its own, as real ones have.

Rule: as stage.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from natkeep.errors import RefusedError
from natkeep.lab import wire_checks
from natkeep.lab.capture import RST, Frame
from natkeep.lab.engine import EngineError, Opening
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lab.report import Assertion
from natkeep.lab.translators import Natkeep, TranslatorError, natkeep_command
from natkeep.plan.tuples import FourTuple


class Machine:
    """natkeep at one host of the lab."""

    def __init__(self, lab: Lab, role: str) -> None:
        self.lab, self.role, self.host = lab, role, lab.topology[role]
        self.site = f"{role}={self.host.name}"
        self.environment = {"NATKEEP_STATE_DIR": str(lab.directory / f"state-{role}")}

    def natkeep(self, verb: str, *arguments: str) -> None:
        """Assert that natkeep does it; without that the story is over."""
        with self.lab.must(f"natkeep {verb} at the {self.role}"):
            done = self.run(verb, *arguments)
            if done.returncode:
                raise TranslatorError(done.stderr.strip(), code=done.returncode)

    def prepare(self, move_id: str, *options: str) -> None:
        """`natkeep prepare` of this site alone."""
        self.natkeep("prepare", move_id, *self.map(), "--site", self.site, *options)

    def refuses(self, reason: str, verb: str, *arguments: str) -> None:
        """Assert that natkeep refuses it with *reason*."""
        done = self.run(verb, *arguments)
        refused = done.returncode == RefusedError.exit_code and reason in done.stderr
        told = f"exit {done.returncode}: {done.stderr.strip()}"
        expect(self.lab, f"natkeep {verb} at the {self.role} is refused: {reason}", refused, told)

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is."""
        return subprocess.run(
            [*natkeep_command(), verb, *arguments],
            capture_output=True, text=True, timeout=60, env={**os.environ, **self.environment},
        )  # fmt: skip

    def map(self) -> list[str]:
        """The move's `--map`."""
        return ["--map", f"{self.lab.old}={self.lab.new}"]

    def hook(self, move_id: str) -> Opening:
        """What opens *move_id* when CRIU has the sockets."""
        script = Natkeep(self.lab.directory)._hook()
        environment = {**self.environment, "NATKEEP_ID": move_id}
        return Opening(lambda: self.natkeep("open", move_id), script, environment)

    def ruleset(self) -> str:
        """What nft shows here."""
        return self.host.run("nft", "--stateless", "list", "ruleset").stdout


def expect(lab: Lab, name: str, ok: object, detail: str = "") -> None:
    """Assert *ok* and go on."""
    lab.report.assertions.append(Assertion(name, bool(ok), detail))


def fails(lab: Lab, name: str, what: Callable[[], object], reason: str) -> None:
    """Assert that the engine fails, saying *reason*."""
    try:
        what()
    except EngineError as error:
        expect(lab, name, reason in str(error), str(error)[:300])
    else:
        expect(lab, name, False, "it succeeded")


def come_home(lab: Lab, opening: Opening) -> None:
    """The process is restored where it was frozen."""
    with lab.must("the engine restores the server where it came from"):
        lab.at = lab.topology[lab.home.role]
        lab.engine.restore(lab.at, lab.server, lab.frozen, opening)
    lab.note_restored()


def conclude_at_home(lab: Lab) -> None:
    """End the story of a process that never moved: nothing of it is to be seen elsewhere."""
    lab._concluded = True
    frames = lab.tap.stop()
    kept = lab._whats_kept()
    peers = {at: frames[at] for at in lab.peer_points}
    at_peers = sorted((f for each in peers.values() for f in each), key=lambda f: f.at_ns)
    lab.report.assertions += [
        wire_checks.tuple_unchanged(at_peers, kept),
        wire_checks.no_reset({**peers, "near": frames["near"]}, kept),
        wire_checks.no_new_path(at_peers, kept),
        wire_checks.acks_advance(at_peers, kept),
        wire_checks.timestamps_advance(at_peers, kept),
        wire_checks.no_hole(at_peers, kept),
    ]
    lab.report.segments = wire_checks.count_segments(at_peers, kept)
    lab.report.resets = wire_checks.count_resets(at_peers, kept)
    lab.report.silence_ms = wire_checks.longest_silence_ms(at_peers, kept)


def stays_quiet(lab: Lab, point: str, since_ns: int, until_ns: int) -> None:
    """Assert that in that time peers asked again at *point*, and nothing answered there."""
    asked, answered = [], []
    for frame in lab.tap.captures[point].frames():
        if since_ns <= frame.at_ns <= until_ns:
            if _tuple(frame) in lab.kept:
                asked.append(frame)
            elif (tuple_ := _tuple(frame)) is not None and tuple_.reply() in lab.kept:
                answered.append(frame)
    resets = sum(1 for f in answered if f.segment and f.segment.flags & RST)
    told = f"{len(asked)} segments from peers, {len(answered)} answered, {resets} with RST"
    expect(lab, "the source stays quiet", asked and not answered, told)


def await_asking(lab: Lab, point: str, since_ns: int) -> None:
    """Have every peer say something more, and wait until *point* has seen it of each."""

    def asked() -> bool:
        frames = lab.tap.captures[point].frames()
        return {_tuple(f) for f in frames if f.at_ns >= since_ns} >= set(lab.kept)

    lab.client.do({"push": 64})  # whose request was acknowledged would only wait
    await_true(asked, "each peer to ask again", seconds=20)


def _tuple(frame: Frame) -> FourTuple | None:
    return None if frame.segment is None else frame.segment.tuple
