"""A peer that is a process on the gateway itself says something while the gateway's gate is closed.

What others say the gate stops in prerouting, where a host's own packets never come.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from natkeep.kernel.interface import Remember
from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.engine import Opening
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import Prior, Step
from natkeep.plan.tuples import Connections
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.lab]

OCTETS = 2000


class Pausing(LinuxKernel):
    """Does something once the gateway is prepared, and the destination is not yet."""

    def __init__(self, directory: str, between: Callable[[], None]) -> None:
        super().__init__(directory)
        self.between: Callable[[], None] | None = between

    def apply(self, step: Step, remember: Remember) -> Prior:
        if step.site.role == Role.DESTINATION and self.between is not None:
            between, self.between = self.between, None
            between()
        return super().apply(step, remember)


@pytest.mark.parametrize("family", [4, 6])
def test_what_it_says_meanwhile_waits_and_is_not_answered_with_a_reset(
    family: int, tmp_path: Path
) -> None:
    with Lab("lab", engine="repair", family=family) as lab:
        lab.serve()
        lab.dial(role="gateway", connections=3)
        lab.traffic.talk()
        lab.freeze()
        kept = Connections.of(lab.traffic.views.values())
        sites = tuple(
            Site(role, lab.topology.name(str(role))) for role in (Role.GATEWAY, Role.DESTINATION)
        )
        state = StateDirectory(str(tmp_path / "state"), create=True)

        def say() -> None:
            lab.traffic.client.do({"push": OCTETS})
            await_true(has_said_it_again, "a retransmission")

        def has_said_it_again() -> bool:
            """Or there is nothing left that could."""
            shown = (
                lab.topology["gateway"].run("ss", "-Htno", "dst", str(lab.server_endpoint)).stdout
            )
            return not re.search(r"timer:\(on,\w+,0\)", shown)

        executor = Executor(Pausing(state.path, say), state)
        prepare(executor, Move("web", (Map(lab.old, lab.new),), sites, hold=False), kept)
        opening = Opening(lambda: open_move(executor, "web"))
        lab.at = lab.topology["destination"]
        lab.engine.restore(lab.at, lab.traffic.server, lab.frozen, opening)
        lab.note_restored()
        lab.traffic.talk_on()
        lab.traffic.check_ends()

        assert [str(each) for each in lab.report.assertions if not each.ok] == []
        teardown(executor, "web")
