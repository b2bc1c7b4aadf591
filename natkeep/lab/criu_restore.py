"""natkeep around a real CRIU: its hook, `natkeep run`, and natkeep at one machine of several.

    moved = CriuRestore(lab)                            when the server is frozen
    moved.restore({"NATKEEP_MAP": "10.2.0.10=auto"})    criu restore with natkeep-hook
    moved.must_abort("no move", {"NATKEEP_ID": "x"})    it fails and CRIU's log says why
    moved.start_run(order, …)                           natkeep run web … -- criu restore …

    source = Machine(lab, "source"); source.prepare("web", …); source.refuses(reason, "teardown", …)

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from natkeep.errors import RefusedError
from natkeep.lab.engine import EngineError, Opening
from natkeep.lab.engines.criu import Criu
from natkeep.lab.host import Host, write_script
from natkeep.lab.lab import Lab
from natkeep.lab.time_scale import scaled
from natkeep.lab.translators import Natkeep, Order, natkeep_command


class Machine:
    """natkeep at one host of the lab; without *state* with a state directory of its own."""

    def __init__(self, lab: Lab, role: str, *, state: str = "") -> None:
        self.lab, self.role, self.host = lab, role, lab.topology[role]
        self.site = f"{role}={self.host.name}"
        self.cli = Natkeep(lab.directory, state or f"state-{role}")

    def natkeep(self, verb: str, *arguments: str) -> None:
        """Assert that natkeep does it; without that the scenario is over."""
        with self.lab.report.must(f"natkeep {verb} at the {self.role}"):
            self.cli.call(verb, *arguments)

    def prepare(self, move_id: str, *options: str, sites: Sequence[str] = ()) -> None:
        """`natkeep prepare` of this site, or of the hosts of the roles *sites*."""
        names = {role: self.lab.topology[role].name for role in sites or (self.role,)}
        chosen = [word for role, name in names.items() for word in ("--site", f"{role}={name}")]
        self.natkeep("prepare", move_id, *self.map(), *chosen, *options)

    def refuses(self, reason: str, verb: str, *arguments: str) -> None:
        """Assert that natkeep refuses it with *reason*."""
        done = self.cli.run(verb, *arguments)
        self.lab.report.check(
            f"natkeep {verb} at the {self.role} is refused: {reason}",
            done.returncode == RefusedError.exit_code and reason in done.stderr,
            f"exit {done.returncode}: {done.stderr.strip()}",
        )

    def map(self) -> list[str]:
        """The move's `--map`."""
        return ["--map", f"{self.lab.old}={self.lab.new}"]

    def hook(self, move_id: str) -> Opening:
        """What opens *move_id* when CRIU has the sockets."""
        return self.cli.open_move(move_id)

    def ruleset(self) -> str:
        """The host's nft ruleset."""
        return self.host.run("nft", "--stateless", "list", "ruleset").stdout


class CriuRestore:
    """A lab's frozen server, and what natkeep does when CRIU restores it."""

    def __init__(self, lab: Lab) -> None:
        if not isinstance(lab.engine, Criu):
            raise EngineError("this scenario needs the engine criu")
        self.lab, self.criu = lab, lab.engine.binary
        self.images = lab.frozen.directory
        self.host = lab.topology[lab.site.role]
        self.cli = Natkeep(lab.directory)
        self._numbers = itertools.count(1)
        self._aborted: list[tuple[int, int]] = []  # from when until when, in ns

    def prepare(self, move_id: str, *roles: str) -> None:
        """`natkeep prepare` at the hosts of these roles."""
        lab, order = self.lab, self.lab.place_order(move_id=move_id)
        sites = [f"--site={role}={lab.topology[role].name}" for role in roles]
        with lab.report.must(f"natkeep prepares {' and '.join(roles)}"):
            self.cli.call(
                "prepare", move_id, f"--map={order.old}={order.new}", *sites,
                "--mode", lab.mode, "--image", str(self.images),
            )  # fmt: skip

    def moves(self) -> list[str]:
        """The ids that natkeep knows of."""
        return [move["id"] for move in json.loads(self.cli.call("status", "--json"))["moves"]]

    # criu restore with natkeep-hook

    def restore(self, orders: Mapping[str, str]) -> None:
        """CRIU restores the server, natkeep-hook gets *orders*."""
        with self._restoring():
            done, log = self._restore(orders)
            if done.returncode:
                raise EngineError(f"criu restore exited {done.returncode}: {_last(log)}")

    def must_abort(self, reason: str, orders: Mapping[str, str]) -> None:
        """CRIU's restore is aborted by natkeep-hook; its log tells *reason* in one line.

        Before that it may tell what it has prepared.
        """
        began = time.time_ns()
        done, log = self._restore(orders)
        said = [line for line in log.splitlines() if "natkeep-hook: " in line]
        said = [line for line in said if not line.endswith(" prepared")]
        ok = done.returncode != 0 and len(said) == 1 and reason in said[0]
        detail = " / ".join(said) or f"criu exited {done.returncode} without a message of natkeep's"
        self._check(f"the hook ends a restore: {reason}", ok, detail)
        self._aborted.append((began, time.time_ns()))

    def _restore(self, orders: Mapping[str, str]) -> tuple[subprocess.CompletedProcess[str], str]:
        work = self._work()
        done = self.host.run(
            *self._restore_line(work, self.images), "--action-script", str(self.cli.hook()),
            check=False, env=self._environment(orders),
        )  # fmt: skip
        log = work / "restore.log"
        return done, log.read_text(errors="replace") if log.exists() else done.stderr

    def _restore_line(self, work: Path, images: Path) -> list[str]:
        return [
            str(self.criu), "restore", "--images-dir", str(images),
            "--work-dir", str(work), "--log-file", "restore.log", "-v4",
            "--tcp-established", "--restore-detached",
        ]  # fmt: skip

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """What is done in the block brings the server back at the destination."""
        with self.lab.report.must("CRIU restores the server"):
            yield
            self.lab.at = self.host
        self.lab.note_restored()

    # natkeep run

    def start_run(
        self, order: Order, *options: str, host: Host | None = None, sites: Sequence[str] = (),
        criu: Sequence[str] = (),
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start `natkeep run` at the host; *criu*: more options for criu restore."""
        argv = [
            *natkeep_command(), "run", order.id, f"--map={order.old}={order.new}",
            *(f"--site={site}" for site in sites), "--mode", self.lab.mode, *options,
            "--", *self._restore_line(self._work(), self.images), *criu,
        ]  # fmt: skip
        return subprocess.Popen(
            (host or self.host).command(*argv),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self._environment({}),
        )  # fmt: skip

    def must_fail(self, code: int, reason: str, running: subprocess.Popen[str]) -> None:
        """`natkeep run` exits *code* and tells *reason*."""
        said, _ = running.communicate(timeout=scaled(60))
        ok = running.returncode == code and reason in said
        self._check(f"natkeep run exits {code}: {reason}", ok, _last(said))

    def must_succeed(self, running: subprocess.Popen[str]) -> None:
        """`natkeep run` exits 0; the server is back."""
        with self._restoring():
            said, _ = running.communicate(timeout=scaled(60))
            if running.returncode:
                raise EngineError(f"natkeep run exited {running.returncode}: {_last(said)}")

    # Circumstances

    def script(self, name: str, text: str) -> list[str]:
        """One more action script, as an option of criu's."""
        return ["--action-script", str(write_script(self.lab.directory / name, text))]

    def take_pid(self, pid: int) -> None:
        """At the destination another process has the server's pid."""
        line = f"echo {pid - 1} >/proc/sys/kernel/ns_last_pid; sleep 600 <&- >&- 2>&- & echo $!"
        taken = self.host.run("sh", "-c", line).stdout.strip()
        if taken != str(pid):
            raise EngineError(f"wanted pid {pid}, got {taken}")

    def mount_read_only(self, *hosts: Host) -> None:
        """The image directory is mounted read-only at these hosts."""
        path = str(self.images)
        for host in hosts:
            host.run("mount", "--bind", path, path)
            host.run("mount", "-o", "remount,bind,ro", path)

    def fingerprint(self) -> dict[str, tuple[str, int]]:
        """Of each file of the image its digest and when it was last changed."""
        return {
            path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in sorted(self.images.iterdir())
        }

    # Checks after `finish`

    def check_aborts_sent_nothing(self) -> None:
        """While restores were aborted, nothing of TCP's left the destination."""
        bad = [
            frame.summary
            for frame in self.lab.captures[self.host.role].frames()
            if frame.segment
            and frame.segment.tuple.source.address in (self.lab.old, self.lab.new)
            and any(began <= frame.at_ns <= ended for began, ended in self._aborted)
        ]
        count = len(self._aborted)
        detail = "; ".join(bad[:3]) or f"{count} restores were aborted without a segment"
        self._check("an aborted restore is silent", bool(count) and not bad, detail)

    def check_no_segment(self, role: str) -> None:
        """No TCP segment was ever seen at that host."""
        bad = [frame.summary for frame in self.lab.captures[role].frames() if frame.segment]
        self._check(f"nothing of TCP's is seen at {role}", not bad, "; ".join(bad[:3]))

    def _check(self, name: str, ok: bool, detail: str) -> None:
        self.lab.report.check(name, ok, detail[:400])

    def _work(self) -> Path:
        work = self.lab.directory / f"work-{next(self._numbers)}"
        work.mkdir()
        return work

    def _environment(self, orders: Mapping[str, str]) -> dict[str, str]:
        usual = {name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"}
        return {**usual, **self.cli.environment, **orders}


def _last(text: str) -> str:
    """The last lines that say anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if "natkeep" in line or "Error" in line]
    return " / ".join((ours or lines)[-4:])
