"""The verb `serve --stdio`: what `natkeep migrate` asks of a host, as lines of JSON.

Each line on stdin is a request, and is answered by one line on stdout, in turn:

    {"natkeep": ["status", "web", "--json"], "stdin": "…"}             a verb
    {"run": ["criu", "dump", …], "environment": {…}, "seconds": 60,    a program, without a shell,
     "otherwise": ["teardown", "web", "--yes"]}   and a verb if that fails; its error is told, too;
                                                  seconds null: it is never killed
    {"digest": "DIR"}                                                  what is in a directory
    {"lock": "find", "run_id": "…", "netns": ""}   the table of a killed CRIU, or nothing; `release`
                                                   with a pid lets that process go on, too
    →  {"exit": 0, "stdout": "…", "stderr": "…"}

The first line on stdout, before any request, says which natkeep this is, where its hook is, and
whether sudo has started it. Verbs run in this process, one after the other: in a blackout nothing
starts, and what `prepare` has run before is quicker by far (a fork would copy what it touches).

A program whose standard streams are the controller's, as tar, is started by ssh alone; where ssh's
user has not the rights that sudo gives, by `serve ID --exec WORD …`, which goes on as that program.

Rule: a request that has begun goes on to its end, whatever becomes of the connection. The next
`serve` of the same id waits for that end, and from then on an earlier one does nothing more, even
if a request was still on its way to it: so what became of it can always be asked. This file must
never decide anything about a move.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from natkeep import __version__, afterwards
from natkeep.cli.parser import VERBS, Parser, make_parser
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.installed import find_program
from natkeep.kernel import nftables
from natkeep.lifecycle import killed_dump
from natkeep.migrate import PROTOCOL
from natkeep.plan.move import parse_id
from natkeep.state.directory import StateDirectory
from natkeep.terminal import say_exception, show_json

_LONGEST = 1 << 28  # octets of a request: a list of connections is in it
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NEEDED = (  # and what these import; tests/test_serve_imports.py holds that none is missing
    "cli.change", "cli.show", "checkpoint.described", "checkpoint.images", "kernel.snapshot",
    "lifecycle.compare", "lifecycle.live", "lifecycle.process", "lifecycle.quiesce",
    "lifecycle.replace", "lifecycle.rollback", "plan.icmp_errors", "report.status",
)  # fmt: skip


def serve(args: argparse.Namespace) -> int:
    """Answer requests until stdin ends."""
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:{_PATH}".lstrip(":")
    if args.exec:
        return _become(args.exec)
    if not args.stdio:
        raise UsageError("serve answers on stdin and stdout alone", hint="natkeep serve --stdio")
    parse_id(args.id)
    for name in _NEEDED:
        import_module(f"natkeep.{name}")
    nftables.is_available()  # imports its binding
    parser = make_parser([*VERBS])
    # What is asked for must not end because a terminal or a connection has.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    turn = _Turn(args)
    hook = find_program("natkeep-hook") or ""
    sudo = "SUDO_UID" in os.environ  # so that ssh alone has not the rights that we have
    _answer({"natkeep": __version__, "protocol": PROTOCOL, "hook": hook, "sudo": sudo})
    while line := sys.stdin.buffer.readline(_LONGEST):
        with turn.taken():
            if not turn.is_ours():
                raise RefusedError(f"another natkeep migrate has taken {args.id} over")
            answer = _do(json.loads(line), parser)
        _answer(answer)
        afterwards.begin()
    turn.end()
    return 0


def _become(words: list[str]) -> int:
    """Go on as another program; NatkeepError where there is none."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and so would that program
    try:
        os.execvpe(words[0], words, env=dict(os.environ))
    except OSError as error:
        raise NatkeepError(f"{words[0]}: {error.strerror}") from None


def _answer(value: dict[str, Any]) -> None:
    show_json(json.dumps(value))


class _Turn:
    """Which `serve` of an id may act: the newest; and one request at a time.

    A file in the state directory, which the newest removes when it has come to its end.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        directory = StateDirectory(args.state_dir, create=True).path
        self._path = os.path.join(directory, f"serve-{args.id}.lock")
        self._own = secrets.token_bytes(16)
        while not self._begin():
            os.close(self._file)

    def _begin(self) -> bool:
        """Wait for the request that is under way; whether the file was not removed meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        with self.taken():
            os.pwrite(self._file, self._own, 0)
            return os.fstat(self._file).st_nlink > 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def is_ours(self) -> bool:
        return os.pread(self._file, len(self._own), 0) == self._own

    def end(self) -> None:
        with self.taken():
            if self.is_ours():
                os.unlink(self._path)


def _do(request: dict[str, Any], parser: Parser) -> dict[str, Any]:
    if "natkeep" in request:
        words = [str(word) for word in request["natkeep"]]
        return _run_verb(words, str(request.get("stdin", "")), parser)
    if "digest" in request:
        return {"exit": 0, "stdout": digest(Path(str(request["digest"]))), "stderr": ""}
    if "lock" in request:
        return _do_lock(request)
    answer = _run_program(request)
    if answer["exit"] and request.get("otherwise"):
        undone = _run_verb([str(word) for word in request["otherwise"]], "", parser)
        if undone["exit"]:
            answer["stderr"] += f"\n{undone['stderr']}"
    return answer


def _do_lock(request: dict[str, Any]) -> dict[str, Any]:
    netns, run_id = str(request["netns"]), str(request["run_id"])
    try:
        if request["lock"] == "find":
            table = killed_dump.find_lock(netns, run_id)
        elif request["lock"] == "release":
            table = killed_dump.release(netns, run_id, int(request["pid"]))
        else:
            raise UsageError(f"lock: {request['lock']!r} is neither find nor release")
    except NatkeepError as error:
        return {"exit": error.exit_code, "stdout": "", "stderr": f"natkeep: {error}"}
    return {"exit": 0, "stdout": table, "stderr": ""}


def _run_program(request: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, **request.get("environment", {})}
    seconds = request.get("seconds", 60)
    try:
        done = subprocess.run(
            [str(word) for word in request["run"]], env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=seconds, start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"exit": 127, "stdout": "", "stderr": str(error)}
    words = (part.decode("utf-8", "backslashreplace") for part in (done.stdout, done.stderr))
    return {"exit": done.returncode, **dict(zip(("stdout", "stderr"), words, strict=True))}


def _run_verb(words: list[str], text: str, parser: Parser) -> dict[str, Any]:
    """The verb, with files for its standard streams; a fault of natkeep's is told as any error."""
    from natkeep.cli import main

    code = 1
    with _streams(text) as files:
        try:
            code = main(words, parser)
        except Exception as error:
            say_exception(None, error, None)
        said = []
        for file in files[1:]:
            file.seek(0)
            said.append(file.read().decode("utf-8", "backslashreplace"))
    return {"exit": code, "stdout": said[0], "stderr": said[1]}


@contextmanager
def _streams(text: str) -> Iterator[Sequence[IO[bytes]]]:
    """Files in the place of the standard streams; *text* is in the first."""
    before, own = sys.stdin, [os.dup(standard) for standard in range(3)]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in own]
        files[0].write(text.encode())
        files[0].seek(0)
        try:
            for standard, file in enumerate(files):
                os.dup2(file.fileno(), standard)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
            yield files
        finally:
            sys.stdin = before
            for standard, fd in enumerate(own):
                os.dup2(fd, standard)
                os.close(fd)


def digest(directory: Path) -> str:
    """SHA-256 over the names and octets of all files below *directory*, in hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            inside = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory)}\0{inside}\n".encode())
    return total.hexdigest()
