"""What CRIU's log says first, and what to do about it.

CRIU tells an error once where it happens and again at every caller, so the first line that is an
error is the true one; what it says about rlimits and the like before that stops nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HARMLESS = re.compile(r"rlimit|Unable to get \d+ pid|can't get eventfd|Pagemap cache|SO_PEEK")
_ERROR = re.compile(r"\bError \(([^)]*)\): *(.*)")
_RUNC = re.compile(r'level=error msg="(.*)"')

CURES = {
    r"Can't fork for \d+: File exists": "a process there has that pid: end it",
    r"Can't open file \S+ on restore": "copy that file there, with the same path",
    r"File \S+ has bad (size|mode)": "the file there is another one: copy it again",
    r"[Cc]an't open (cwd|root)|[Cc]an't chdir": "make that directory there",
    r"SysVIPC shmem map|doesn't live in IPC ns": "start it in an IPC namespace: unshare -i",
    r"external socket is used": "its other end is outside: --criu-option=--ext-unix-sk",
    r"half of stream unix connection": "its other end is outside: --criu-option=--ext-unix-sk",
    r"[Ff]ile locks are hold|--file-locks": "--criu-option=--file-locks",
    r"dangling tty|session leader|shell-job": "--criu-option=--shell-job, or start it by setsid",
    r"ghost file": "a large deleted file is open: --criu-option=--ghost-limit=BYTES",
    r"in-flight": "a connection waits to be accepted: --listeners holds new ones before the dump",
    r"consider using --tcp-established": "CRIU was not told of TCP",
    r"vdso|vDSO|vvar": "CRIU is too old for that kernel: --criu PATH of 4.1 or later",
    r"userfaultfd|soft-dirty|Tracking memory": "that kernel cannot tell changed memory: "
    "without --pre-dump",
    r"missing features": "that CRIU or kernel cannot tell changed memory: without --pre-dump",
    r"seccomp": "CRIU was built without seccomp: criu check",
    r"Operation not permitted": "CRIU needs the rights of root there",
    r"[Nn]o space left on device": "--images DIR where there is room",
    r"Cannot assign requested address": "OLD is not on that host: natkeep status there",
    r"repair": "does that kernel have TCP repair? criu check",
    r"iptables|nftables|nft": "does that host have nft? criu check --feature network_lock_nftables",
}
"""Of what the log says, as a regular expression, and what cures it; the first that matches."""


def first_error(log: Iterable[str]) -> str:
    """The first true error in CRIU's *log*, with its cure if there is one; else its last line."""
    lines = [line.strip() for line in log if line.strip()]
    ours = [line for line in lines if "natkeep-hook: " in line]
    refused = [line for line in ours if not line.endswith((" prepared", "gate open"))]
    if refused:
        return refused[0].partition("natkeep-hook: ")[2]
    found = [_ERROR.search(line) for line in lines if not _HARMLESS.search(line)]
    errors = [each[2] for each in found if each]
    if not lines:
        return "its log is empty"
    if not errors:
        words = _RUNC.search(lines[-1])
        errors = [words[1] if words else lines[-1]]
    cures = (cure for pattern, cure in CURES.items() if re.search(pattern, errors[0]))
    return f"{errors[0]} ({cure})" if (cure := next(cures, "")) else errors[0]
