"""scripts/get-criu where Debian's archive is no source of a newer CRIU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from machine_copy import Machine

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
rm -rf {root}/.lab/criu /usr/sbin/criu /usr/bin/criu /usr/local/sbin/criu
rm -f /usr/share/keyrings/debian-archive-keyring.*
rm -f /etc/os-release
printf '%s\\n' 'ID={id}' 'ID_LIKE=debian' >/etc/os-release
exec {root}/scripts/get-criu
"""

pytestmark = pytest.mark.root


def test_it_says_what_to_do_instead(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    try:
        for name, ppa in (("other", False), ("ubuntu", True)):
            done = machine.try_("sh", "-euc", SCRIPT.format(root=ROOT, id=name))
            assert (done.returncode, done.stdout) == (0, "")
            assert done.stderr.startswith("get-criu: no CRIU here: ")
            assert "put CRIU 4.2 or later into PATH (criu.org/Installation)" in done.stderr
            assert ("add-apt-repository ppa:criu/ppa" in done.stderr) == ppa

        # What is put there is tried at once, and not an hour later.
        machine.run("sh", "-c", "printf '#!/bin/sh\nexit 1\n' >/usr/sbin/criu")
        machine.run("chmod", "755", "/usr/sbin/criu")
        again = machine.try_(ROOT / "scripts/get-criu")
        assert "the system's own does not work on this kernel" in again.stderr
    finally:
        machine.end()
    assert subprocess.run(["mountpoint", "-q", tmp_path]).returncode != 0
