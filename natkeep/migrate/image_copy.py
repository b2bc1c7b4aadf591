"""CRIU's image from the source to the destination: tar over both hosts' ssh, through us.

What is started is started before the freeze, so that no start is waited for in the blackout.
"""

from __future__ import annotations

from contextlib import suppress
from subprocess import PIPE, Popen, TimeoutExpired

from natkeep.migrate.host import Host, HostError

_PIECE = 1 << 20  # octets that are passed on at once


class ImageCopy:
    """A directory of images on its way from the source to the destination, once `go` is asked."""

    def __init__(self, source: Host, destination: Host, images: str, name: str) -> None:
        """name: of the directory below *images*, which is the same path on both hosts."""
        streams = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
        self.octets = 0
        reading = 'printf . && read -r _ && exec tar -C "$1" -cf - "$2"'
        writing = 'printf . >&2 && exec tar -C "$1" -xpf -'
        self._out = source.start("sh", "-c", reading, "sh", images, name, **streams)
        self._in = destination.start("sh", "-c", writing, "sh", images, **streams)
        # Both are there now; where one is not, `go` tells why.
        for told in (self._out.stdout, self._in.stderr):
            assert told is not None
            told.read(1)

    def go(self) -> None:
        """Pass all of it on; HostError with tar's own words where that fails."""
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
                self._in.stdin.close()
            for program, what in ((self._in, "writing"), (self._out, "reading")):
                if _end(program):
                    assert program.stderr is not None
                    said = program.stderr.read().decode(errors="backslashreplace").strip()
                    raise HostError(f"copy: {what} the image: {said or 'it ended early'}")
        finally:
            self.end()

    def end(self) -> None:
        """End both programs."""
        for program in (self._out, self._in):
            if program.poll() is None:
                program.terminate()


def _end(program: Popen[bytes]) -> int:
    try:
        return program.wait(30)
    except TimeoutExpired:
        return 1
