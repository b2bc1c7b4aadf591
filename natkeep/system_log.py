"""A line in the system's log (facility daemon) for what was done: who moved what, and how it ended.

Without /dev/log it goes nowhere. Rule: what is noted has been done, and a restore may wait for us:
nothing here fails or waits, as syslog(3) does for a journald that hangs.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from natkeep.errors import in_one_line

PATH = "/dev/log"
# daemon.notice, since natkeep-watch.service has LogLevelMax=notice; daemon.err
_NOTICE, _ERROR = 3 << 3 | 5, 3 << 3 | 3
_LIMIT = 1000  # octets: more is no line that a person reads
_NOT_SET = "4294967295"


def note(program: str, line: str, *, failed: bool = False) -> None:
    """Write *line* as *program*'s, and by whom it was done."""
    text = in_one_line(line).encode("utf-8", "backslashreplace")[:_LIMIT].decode("utf-8", "ignore")
    head = f"<{_ERROR if failed else _NOTICE}>{program}[{os.getpid()}]: "
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.setblocking(False)
        log.connect(PATH)
        log.send(f"{head}{text} (by {_read_user()})".encode())


def _read_user() -> str:
    """Who became root by sudo, else who logged in: a number, since names may be far to look up."""
    if name := os.environ.get("SUDO_USER"):
        return in_one_line(name)[:64]
    uid = str(os.getuid())
    with suppress(OSError), open("/proc/self/loginuid", encoding="ascii") as file:
        uid = file.read().strip().replace(_NOT_SET, uid)
    return f"uid {uid}"
