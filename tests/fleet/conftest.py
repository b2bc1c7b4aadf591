"""Fixtures of the tests of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_processes import Processes
from two_hosts import make_two_hosts


@pytest.fixture
def fleet(tmp_path: Path, make_netns: Callable[[], str]) -> Iterator[Processes]:
    """Two hosts, whose agents are processes; modules with agents in this process have their own."""
    fleet = Processes(tmp_path, make_two_hosts(make_netns), f"dir:{tmp_path}/store")
    yield fleet
    fleet.close()
