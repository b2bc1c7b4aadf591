"""the doors: natkeep-hook and `natkeep run`, as a story uses them around a real CRIU.

    doors = Doors(lab)                                  when the server is frozen
    doors.restore({"NATKEEP_MAP": "10.2.0.10=auto"})    criu restore with natkeep-hook
    doors.must_abort("no move", {"NATKEEP_ID": "x"})    it fails, CRIU's log says why, all is silent
    doors.start_run("web", …).wait()                    natkeep run web … -- criu restore …

Rule: the words only start programs, at the host that the story names, and note what came of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from natkeep.lab.engine import EngineError
from natkeep.lab.engines.criu import Criu
from natkeep.lab.host import Host
from natkeep.lab.lab import Lab
from natkeep.lab.report import Assertion
from natkeep.lab.translators import Order, natkeep_command

HOOK = Path(sys.executable).with_name("natkeep-hook")


class Doors:
    """A lab's frozen server, and the ways in which natkeep goes along when it is restored."""

    def __init__(self, lab: Lab) -> None:
        if not isinstance(lab.engine, Criu):
            raise EngineError("this story needs the engine criu")
        self.lab, self.criu = lab, lab.engine.binary
        self.images = lab.frozen.directory
        self.host = lab.topology[lab.site.role]
        self.state = lab.directory / "natkeep-state"
        self._numbers = itertools.count(1)
        self._silences: list[tuple[int, int]] = []

    # ---- orders --------------------------------------------------------------------------------

    def order(self, move_id: str) -> Order:
        """What natkeep is to do under this id; undone in the end."""
        self.lab.place_order()
        order = dataclasses.replace(self.lab.order, id=move_id)
        self.lab.orders[-1] = self.lab.order = order
        return order

    def natkeep(self, verb: str, *arguments: str) -> str:
        """Run natkeep outside of the hosts; what it printed. EngineError with what it said."""
        argv = [*natkeep_command(), verb, *arguments]
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=60, env=self._environment({})
        )
        if done.returncode:
            raise EngineError(f"natkeep {verb} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def prepare(self, move_id: str, *roles: str, gate: str = "closed") -> None:
        """`natkeep prepare` at the hosts of these roles."""
        lab, order = self.lab, self.order(move_id)
        sites = [f"--site={self._role(role)}={lab.topology[role].name}" for role in roles]
        with lab.must(f"natkeep prepares {' and '.join(roles)}"):
            self.natkeep(
                "prepare", move_id, f"--map={order.old}={order.new}", *sites,
                "--gate", gate, "--mode", lab.mode, "--image", str(self.images),
            )  # fmt: skip

    def _role(self, role: str) -> str:
        return "gateway" if role == "gateway" else "destination"

    def moves(self) -> list[str]:
        """The ids that natkeep knows of."""
        shown = json.loads(self.natkeep("status", "--json"))
        return [move["id"] for move in shown["moves"]]

    # ---- criu restore with natkeep-hook --------------------------------------------------------

    def restore(self, orders: Mapping[str, str]) -> None:
        """CRIU restores the server, natkeep-hook gets *orders*."""
        with self.restoring():
            done, log = self._restore(orders)
            if done.returncode:
                raise EngineError(f"criu restore exited {done.returncode}: {_last(log)}")

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """What is done in the block brings the server back at the destination."""
        lab = self.lab
        with lab.must("CRIU restores the server"):
            yield
            lab.at = self.host
        lab.note_restored()

    def must_abort(self, reason: str, orders: Mapping[str, str]) -> None:
        """CRIU's restore is aborted by natkeep-hook; its log tells *reason* in one line."""
        began = time.time_ns()
        done, log = self._restore(orders)
        said = [line for line in log.splitlines() if "natkeep-hook: " in line]
        ok = done.returncode != 0 and len(said) == 1 and reason in said[0]
        detail = " / ".join(said) or f"criu exited {done.returncode} without a word of natkeep's"
        self._note(f"the hook ends a restore: {reason}", ok, detail)
        self._silences.append((began, time.time_ns()))

    def _restore(self, orders: Mapping[str, str]) -> tuple[subprocess.CompletedProcess[str], str]:
        work = self._work()
        done = self.host.run(
            *self.restore_line(work), "--action-script", str(HOOK),
            check=False, env=self._environment(orders),
        )  # fmt: skip
        log = work / "restore.log"
        return done, log.read_text(errors="replace") if log.exists() else done.stderr

    def restore_line(self, work: Path, images: Path | None = None) -> list[str]:
        """`criu restore …`, with what it writes in *work*."""
        return [
            str(self.criu), "restore", "--images-dir", str(images or self.images),
            "--work-dir", str(work), "--log-file", "restore.log", "-v4",
            "--tcp-established", "--restore-detached",
        ]  # fmt: skip

    # ---- natkeep run ---------------------------------------------------------------------------

    def start_run(
        self, order: Order, *options: str, host: Host | None = None,
        sites: Sequence[str] = (), images: Path | None = None, criu: Sequence[str] = (),
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start `natkeep run` at the host; *criu*: more options for criu restore."""
        argv = [
            *natkeep_command(), "run", order.id, f"--map={order.old}={order.new}",
            *(f"--site={site}" for site in sites), "--mode", self.lab.mode, *options,
            "--", *self.restore_line(self._work(), images), *criu,
        ]  # fmt: skip
        return subprocess.Popen(
            (host or self.host).command(*argv),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self._environment({}),
        )  # fmt: skip

    def must_fail(self, code: int, reason: str, running: subprocess.Popen[str]) -> None:
        """`natkeep run` exits *code* and tells *reason*."""
        said, _ = running.communicate(timeout=60)
        ok = running.returncode == code and reason in said
        self._note(f"natkeep run exits {code}: {reason}", ok, _last(said))

    def must_succeed(self, running: subprocess.Popen[str]) -> None:
        """`natkeep run` exits 0; the server is back."""
        with self.restoring():
            said, _ = running.communicate(timeout=60)
            if running.returncode:
                raise EngineError(f"natkeep run exited {running.returncode}: {_last(said)}")

    # ---- circumstances -------------------------------------------------------------------------

    def script(self, name: str, text: str) -> list[str]:
        """An action script of somebody else's, as an option of criu's."""
        path = self.lab.directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return ["--action-script", str(path)]

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

    # ---- what was seen -------------------------------------------------------------------------

    def judge_silences(self) -> None:
        """While restores were aborted, nothing of TCP's left the destination; after `finish`."""
        frames = self.lab.tap.captures[self.host.role].frames()
        bad = [
            frame.summary
            for frame in frames
            if frame.segment
            and frame.segment.tuple.source.address in (self.lab.old, self.lab.new)
            and any(began <= frame.at_ns <= ended for began, ended in self._silences)
        ]
        count = len(self._silences)
        detail = "; ".join(bad[:3]) or f"{count} restores were aborted without a segment"
        self._note("an aborted restore is silent", bool(count) and not bad, detail)

    def note_quiet(self, role: str) -> None:
        """No TCP segment was ever seen at that host; after `finish`."""
        frames = self.lab.tap.captures[role].frames()
        bad = [frame.summary for frame in frames if frame.segment]
        self._note(f"nothing of TCP's is seen at {role}", not bad, "; ".join(bad[:3]))

    def note_same(self, name: str, before: object, after: object) -> None:
        """Both are equal."""
        self._note(name, before == after, "" if before == after else f"{before} and {after}")

    def _note(self, name: str, ok: bool, detail: str) -> None:
        self.lab.report.assertions.append(Assertion(name, ok, detail[:400]))

    def _work(self) -> Path:
        work = self.lab.directory / f"work-{next(self._numbers)}"
        work.mkdir()
        return work

    def _environment(self, orders: Mapping[str, str]) -> dict[str, str]:
        usual = {name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"}
        return {**usual, "NATKEEP_STATE_DIR": str(self.state), **orders}


def _last(text: str) -> str:
    """The last lines that tell anything."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "natkeep" in line or "Error" in line]
    return " / ".join((told or lines)[-4:])
