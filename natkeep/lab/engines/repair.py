"""The engine `repair`: TCP_REPAIR in the application itself, which moves the network state only.

traffic.py freezes its own sockets into a file and creates them again from it, by tcp_repair.py.
UDP needs none of it: datagrams.py closes its sockets, and at the destination it binds new ones to
OLD, and connects them.
"""

from __future__ import annotations

from pathlib import Path

from natkeep.lab.engine import (
    NO_DATAGRAMS,
    SILENCE_TABLE,
    EngineError,
    Frozen,
    InHost,
    Moving,
    Opening,
    end_silence,
)
from natkeep.lab.host import Host, await_true

_SILENCE = f"""\
add table inet {SILENCE_TABLE}
add chain inet {SILENCE_TABLE} into {{ type filter hook input priority -400; }}
add chain inet {SILENCE_TABLE} out {{ type filter hook output priority -400; }}
add rule inet {SILENCE_TABLE} into meta l4proto tcp drop
add rule inet {SILENCE_TABLE} out meta l4proto tcp drop
"""


class Repair(InHost):
    """Works where there is no CRIU; quicker than CRIU where there is one."""

    name = "repair"

    def __init__(self, *, probe: bool = True) -> None:
        self.how = "probe" if probe else "silent"

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        host.nft(NO_DATAGRAMS if moving.udp else _SILENCE)
        moving.application.do({"freeze": str(into / "state.json")})
        host.kill(moving.pid)  # killed in repair, a socket vanishes without FIN or RST
        await_true(lambda: not host.alive(moving.pid), "the frozen process to end")
        listing = into / "connections"
        listing.write_text("".join(f"{line}\n" for line in moving.connections))
        return Frozen(into, ("--connections", str(listing)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        application = moving.application
        line = application.resume_line(frozen.directory / "state.json", role=moving.role)
        program = host.start(f"{moving.role}-resumed", *line)
        application.wait(
            lambda report: report["phase"] == "recreated" or program.process.poll() is not None,
            "re-created",
        )
        if program.process.poll() is not None:
            said = program.log.read_text().strip().splitlines() or ["no message"]
            raise EngineError(f"repair: the application ended with: {said[-1]}")
        moving.pid = program.pid
        opening.open()
        end_silence(host)
        application.go(self.how)
        application.wait(lambda report: report["phase"] == "running", "running again")
