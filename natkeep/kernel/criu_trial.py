"""Whether a CRIU dumps and restores TCP on this kernel, tried on a process made for it.

    unshare --net python3 -I natkeep/kernel/criu_trial.py CRIU DIRECTORY

    1  lo is up; a child in a session of its own has a connection with itself over it
    2  CRIU dumps the child with --tcp-established, which ends it, and restores it
    3  both ends are there again, as /proc/net/tcp shows; the child is ended

`criu check` asks the kernel for features one by one, and a CRIU that is older than the kernel may
have all of them and fail at the first dump. So the thing itself is done, with the lock that CRIU
takes by itself, then with nftables. The namespace goes with this process, and what CRIU left in it.

Exit 0: it does; stdout has the options that it needed. Exit 1: it does not; the last line of stdout
says why. As a program this file is run by a bare interpreter, and imports nothing of natkeep's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

_LOCKS = ((), ("--network-lock", "nftables"))
_SECONDS = 10.0
_ESTABLISHED = "01"
_CLEAN = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
"""The environment of what is started here."""


def find_criu() -> str | None:
    """The path of the CRIU that is meant: NATKEEP_CRIU, or the first `criu` in PATH."""
    return shutil.which(os.environ.get("NATKEEP_CRIU") or "criu")


def read_version(criu: str) -> str:
    """What it says of itself, as `4.2.1`; empty where it says nothing."""
    try:
        done = subprocess.run(
            [criu, "--version"], capture_output=True, timeout=_SECONDS, check=False, env=_CLEAN
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(rb"Version: ([0-9][0-9A-Za-z.-]{0,30})", done.stdout)
    return found[1].decode() if found else ""


def try_out(criu: str) -> tuple[bool, str]:
    """Whether it works, and with which options; or why it does not."""
    with tempfile.TemporaryDirectory(prefix="natkeep-trial-") as directory:
        command = ["unshare", "--net", sys.executable, "-I", __file__, criu, directory]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False,
                timeout=5 * _SECONDS, env=_CLEAN,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return False, str(error)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode == 0, said[-1] if said else ""


# ---- the trial itself ----------------------------------------------------------------------------


def main(criu: str, directory: str) -> int:
    _raise_loopback()
    why = ""
    for number, lock in enumerate(_LOCKS):
        images = os.path.join(directory, str(number))
        os.mkdir(images)
        why = _try(criu, images, lock)
        if not why:
            _tell(" ".join(lock))
            return 0
    _tell(why)
    return 1


def _tell(line: str) -> None:
    """To natkeep, at the other end of the pipe."""
    os.write(1, f"{line}\n".encode("utf-8", "replace"))


def _try(criu: str, images: str, lock: tuple[str, ...]) -> str:
    """Why it does not work; empty where it does."""
    pid = _start()
    try:
        why = _run(criu, "dump", images, "-t", str(pid), *lock)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    why = why or _run(criu, "restore", images, "-d")
    if why:  # what CRIU had made by then it has ended itself
        return why
    try:
        return "" if _count_ends() == 2 else "restore: the connection is not there afterwards"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run(criu: str, verb: str, images: str, *words: str) -> str:
    """Why *verb* failed; empty where it did not."""
    command = (criu, verb, "-D", images, "-o", f"{verb}.log", "--tcp-established", *words)
    try:
        done = subprocess.run(
            command, timeout=_SECONDS, check=False, env=_CLEAN,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"{verb}: no end within {_SECONDS:.0f} s"
    if not done.returncode:
        return ""
    return f"{verb}: {_first_error(f'{images}/{verb}.log') or f'exit {done.returncode}'}"


def _start() -> int:
    """The pid of a process that has both ends of a connection, and nothing else of interest."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return pid
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ends = socket.create_connection(listener.getsockname()), listener.accept()[0]
    os.write(told, b"x")
    kept = {stream.fileno() for stream in ends}
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(number)
    while True:
        time.sleep(_SECONDS)


def _count_ends() -> int:
    with open("/proc/self/net/tcp", encoding="ascii") as table:
        return sum(line.split()[3] == _ESTABLISHED for line in table.readlines()[1:])


def _first_error(log: str) -> str:
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if "Error (" in line]
    except OSError:
        return ""
    return lines[0].partition("Error ")[2].strip() if lines else ""


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x1))  # SIOCSIFFLAGS, IFF_UP


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
