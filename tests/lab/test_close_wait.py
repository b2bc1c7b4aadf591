"""a connection that is half-closed for longer than conntrack keeps its entry (60 s in CLOSE_WAIT).

Slow, since the kernel's own time-out passes: all cells rest at once. With shorter ones the matrix
has the same in all its cells.
"""

from __future__ import annotations

import time

import pytest

from natkeep.lab import matrix
from natkeep.lab.lab import Lab
from natkeep.lab.matrix import Cell, Column
from natkeep.lab.situations import Situation

CLOSE_WAIT = 60  # s, nf_conntrack_tcp_timeout_close_wait


def end_after_a_rest(lab: Lab) -> None:
    """The client has closed its side; the process works, and then closes, without another word."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_closes()
    name = "net.netfilter.nf_conntrack_tcp_timeout_close_wait"
    assert lab.topology["gateway"].run("sysctl", "-n", name).stdout.strip() == f"{CLOSE_WAIT}"
    time.sleep(CLOSE_WAIT + 1)
    lab.traffic.server_closes()
    lab.finish()


@pytest.mark.root
@pytest.mark.lab
def test_the_end_arrives_after_conntrack_has_forgotten_the_connection():
    rest = Situation(1, "rest", end_after_a_rest)
    columns = [Column("natkeep", mode, True) for mode in matrix.MODES]
    cells = [Cell(rest, family, column) for family in (4, 6) for column in columns]

    outcomes = matrix.run(cells, jobs=len(cells), deadline=CLOSE_WAIT + 90)

    assert [f"{each.cell}: {each.reason}" for each in outcomes if each.verdict != "pass"] == []
    assert len(outcomes) == len(cells)
