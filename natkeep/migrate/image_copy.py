"""CRIU's image from the source to the destination: tar over both hosts' ssh, through us.

What is started is started before the freeze, so that no start is waited for in the blackout.
"""

from __future__ import annotations

import time
from contextlib import suppress
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Protocol

from natkeep.migrate.host import Host, HostError

_PIECE = 1 << 20  # octets that are passed on at once
_LONG = 0.5  # s after which the size of what is copied is asked for


class Watch(Protocol):
    """What is told of a copy."""

    def show(self, octets: int, total: int | None) -> None:
        """*octets* were passed on, of about *total* if that is known."""

    def end(self) -> None:
        """It is over, well or not."""


class ImageCopy:
    """A directory of images on its way from the source to the destination, once `go` is asked."""

    def __init__(self, source: Host, destination: Host, images: str, name: str) -> None:
        """name: of the directory below *images*, which is the same path on both hosts."""
        streams = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
        self.octets = 0
        self._source, self._directory = source, f"{images}/{name}"
        self._size: Popen[bytes] | None = None
        self._total: int | None = None
        reading = 'printf . && read -r _ && exec tar -C "$1" -cf - "$2"'
        writing = 'printf . >&2 && exec tar -C "$1" -xpf -'
        self._out = source.start("sh", "-c", reading, "sh", images, name, **streams)
        self._in = destination.start("sh", "-c", writing, "sh", images, **streams)
        # Both are there now; where one is not, `go` tells why.
        for told in (self._out.stdout, self._in.stderr):
            assert told is not None
            told.read(1)

    def go(self, watch: Watch | None = None) -> None:
        """Pass all of it on; HostError with tar's own words where that fails."""
        began = time.monotonic()
        assert self._out.stdin is not None
        assert self._out.stdout is not None
        assert self._in.stdin is not None
        try:
            with suppress(BrokenPipeError):
                self._out.stdin.write(b"\n")
                self._out.stdin.flush()
                while piece := self._out.stdout.read1(_PIECE):  # type: ignore[attr-defined]
                    self._in.stdin.write(piece)
                    self.octets += len(piece)
                    if watch is not None:
                        watch.show(self.octets, self._read_total(began))
                self._in.stdin.close()
            for program, what in ((self._in, "writing"), (self._out, "reading")):
                if _end(program):
                    assert program.stderr is not None
                    said = program.stderr.read().decode(errors="backslashreplace").strip()
                    raise HostError(f"copy: {what} the image: {said or 'it ended early'}")
        finally:
            if watch is not None:
                watch.end()
            self.end()

    def _read_total(self, began: float) -> int | None:
        """Octets of the whole, once they are known; nothing waits for that."""
        if self._size is None and time.monotonic() > began + _LONG:
            words = ("du", "-sb", self._directory)
            self._size = self._source.start(*words, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
        if self._size and self._total is None and self._size.poll() is not None:
            assert self._size.stdout is not None
            told = self._size.stdout.read().split()
            self._total = int(told[0]) if told and told[0].isdigit() else 0
        return self._total

    def end(self) -> None:
        """End its programs."""
        for program in (self._out, self._in, self._size):
            if program and program.poll() is None:
                program.terminate()


def _end(program: Popen[bytes]) -> int:
    try:
        return program.wait(30)
    except TimeoutExpired:
        return 1
