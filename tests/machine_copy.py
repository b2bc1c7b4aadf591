"""A copy of this machine's root, made by an overlay in memory, for apt and dpkg to change.

All that they change is gone with the mount namespace that it is in, and so are network namespaces
that were made there: their names are not known outside.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

MOUNTS = """
mount -t tmpfs none "$1"
mkdir "$1"/upper "$1"/work "$1"/root
mount -t overlay none -o lowerdir=/,upperdir="$1"/upper,workdir="$1"/work "$1"/root
cd "$1"/root
mount -t proc none proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs none run
mkdir -p run/lock
printf '#!/bin/sh\\nexit 101\\n' >usr/sbin/policy-rc.d # no service is started
chmod 755 usr/sbin/policy-rc.d
mkdir -p mnt/old
pivot_root . mnt/old # and not chroot: a namespace that is entered has its own root
umount -l mnt/old
rmdir mnt/old
echo ready
exec sleep 3600
"""


class Machine:
    """A copy of this machine, for apt and dpkg to change."""

    def __init__(self, directory: Path) -> None:
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=slave", "sh", "-euc", MOUNTS, "-", directory],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        self.enter = ("nsenter", "--mount", f"--target={self.holder.pid}")
        assert self.holder.stdout
        assert self.holder.stdout.readline() == b"ready\n"

    def end(self) -> None:
        self.holder.kill()
        self.holder.communicate()

    def try_(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        fixed = {"PATH": path, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            [*self.enter, *command],
            env=fixed | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, *command: str | Path, **environment: str) -> str:
        done = self.try_(*command, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def has(self, path: str) -> bool:
        return self.try_("test", "-e", path).returncode == 0
