"""More than one hop: the process moves on, or back to where it came from.

The gateway's translation is replaced, never stacked: afterwards its ruleset says nothing of the
host that was left, and no packet in between met neither translation, nor both (point T26). The
client talks all the while.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.lab import Lab
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation
from natkeep.lab.topology import THIRD, Address


@situation(21, "moved on", setup=THREE_HOSTS)
def moved_on(lab: Lab) -> None:
    """From A to B, and from there to C."""
    lab.begin(connections=3)
    left = lab.new
    carry_on_after(lab, lab.move, partial(lab.move_on, THIRD))
    _check_forgotten(lab, left)
    lab.finish()


@situation(21, "moved on by CRIU", engine="criu", probes=(True,), setup=THREE_HOSTS)
def moved_on_by_criu(lab: Lab) -> None:
    """The same, dumped twice."""
    moved_on(lab)


@situation(21, "moved back")
def moved_back(lab: Lab) -> None:
    """From A to B, and home again: nothing is translated any more, and the client talks on."""
    lab.begin(connections=3)
    gateway = lab.topology["gateway"]
    before = read_surfaces(gateway)
    carry_on_after(lab, lab.move, lab.move_back)
    left = difference(before, read_surfaces(gateway))
    name = "the gateway is as it was before the move, while the client talks"
    lab.report.check(name, not left, left)
    lab.finish()


@situation(21, "moved back by CRIU", engine="criu", probes=(True,))
def moved_back_by_criu(lab: Lab) -> None:
    """The same, dumped twice."""
    moved_back(lab)


@situation(21, "moved on and back", setup=THREE_HOSTS)
def moved_on_and_back(lab: Lab) -> None:
    """From A to B, to C, and home."""
    lab.begin(connections=3)
    carry_on_after(lab, lab.move, partial(lab.move_on, THIRD), lab.move_back)
    _check_forgotten(lab, lab.new)
    lab.finish()


def _check_forgotten(lab: Lab, left: Address) -> None:
    """The gateway's ruleset and its connection table say nothing of the host that was left."""
    gateway = lab.topology["gateway"]
    said = gateway.run("nft", "list", "ruleset").stdout
    known = gateway.run("conntrack", "-L", "-f", f"ipv{lab.family}", check=False).stdout
    lines = [line.strip() for line in (said + known).splitlines() if str(left) in line]
    name = "the gateway has forgotten the host that was left"
    lab.report.check(name, not lines, "; ".join(lines[:3]))
