"""tests of bench/path.py: no figure is lost, and what is measured was really translated."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.path import asked, executor, groups
from bench.wire import Wire
from natkeep.plan.move import Mode
from natkeep.plan.roles import Role


def test_each_figure_is_of_two_that_are_measured_beside_one_another() -> None:
    """One of two groups would not be printed at all."""
    together = [{one.name for one in group} for group in groups()]

    for one in asked():
        assert any({one.name, one.base} <= names for names in together), one


@pytest.mark.root
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.RELAY, Role.PEER])
def test_the_live_connection_goes_on_where_it_is_translated(role: Role) -> None:
    with ExitStack() as stack:
        wire = Wire("t", stack)
        stack.enter_context(contextmanager(executor(Mode.STATEFUL, 100, 1, role))(wire))
        for end in (wire.near, wire.far):
            end.settimeout(10)

        wire.near.sendall(b"there")
        assert wire.far.recv(64) == b"there"
        wire.far.sendall(b"back")
        assert wire.near.recv(64) == b"back"
