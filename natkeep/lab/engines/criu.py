"""The engine `criu`: `criu dump` and `criu restore` in the host's own namespaces.

A dump that ends the process keeps CRIU's network lock at the host, which so stays silent; of UDP
the lab closes it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from natkeep.lab.engine import (
    NO_DATAGRAMS,
    EngineError,
    Frozen,
    InHost,
    Moving,
    Opening,
    end_silence,
    errors_in,
)
from natkeep.lab.host import Host
from natkeep.lab.time_scale import scaled

CHECKOUT = Path(__file__).parents[3]


class Criu(InHost):
    """CRIU, called as an operator calls it."""

    name = "criu"

    def __init__(self, binary: Path) -> None:
        self.binary = binary
        self.verbosity = "-v4"

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        if moving.udp:  # CRIU locks TCP alone
            host.nft(NO_DATAGRAMS)
        self.run(host, into, "dump", "--tree", str(moving.pid), "--network-lock", "nftables")
        return Frozen(into, ("--image", str(into)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        script = ["--action-script", str(opening.hook)] if opening.hook else []
        environment = {**os.environ, **opening.environment}
        self.run(host, frozen.directory, "restore", "--restore-detached", *script, env=environment)
        if not opening.hook:
            opening.open()
        end_silence(host)

    def run(
        self, host: Host, images: Path, verb: str, *options: str,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """`criu VERB` with *images* in *host*; EngineError with CRIU's own errors."""
        log = images / f"{verb}.log"
        done = host.run(
            str(self.binary), verb, "--images-dir", str(images), "--tcp-established",
            self.verbosity, "--log-file", log.name, *options,
            check=False, env=dict(env) if env else None,
        )  # fmt: skip
        if done.returncode:
            said = errors_in(log) or done.stderr.strip()
            raise EngineError(f"criu {verb} exited {done.returncode}: {said}")


def find_criu() -> Path | None:
    """A CRIU that works on this kernel, if there is one.

    NATKEEP_CRIU, or the one that scripts/get-criu fetched into the checkout, or the system's.
    """
    named, fetched = os.environ.get("NATKEEP_CRIU"), str(CHECKOUT / ".lab/criu/criu")
    for candidate in [named] if named else [fetched, shutil.which("criu")]:
        if candidate and os.access(candidate, os.X_OK) and _works(candidate):
            return Path(candidate)
    return None


def find_containerd() -> Path | None:
    """The folder of what scripts/get-containerd fetched into the checkout, if it is there."""
    fetched = CHECKOUT / ".lab/containerd"
    return fetched if os.access(fetched / "bin/containerd", os.X_OK) else None


def _works(criu: str) -> bool:
    return subprocess.run([criu, "check"], capture_output=True, timeout=scaled(20)).returncode == 0
