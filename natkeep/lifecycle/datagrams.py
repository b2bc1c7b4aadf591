"""datagrams: the look at what happens to UDP sockets before their gate stands."""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding
from natkeep.plan.move import Site
from natkeep.plan.protocols import UDP
from natkeep.plan.roles import Role
from natkeep.plan.steps import Plan


def look_at_lock(subject: Subject) -> Iterator[Finding]:
    """Whether the host that the process has left answers datagrams since the dump."""
    assert subject.plan is not None
    move = subject.plan.move
    locked = move.lock is not None and move.lock.whole
    for site in move.sites if not (subject.frozen or move.live or locked) else ():
        if site.role in (Role.SOURCE, Role.RELAY) and (count := _count_kept(subject.plan, site)):
            what = f"datagrams to {count} UDP socket{'s' * (count != 1)} are answered"
            yield Finding("udp-unlocked", site, f"{what} from the end of the dump until prepare")


def _count_kept(plan: Plan, site: Site) -> int:
    """How many sockets of UDP the move keeps there."""
    here = (one for one in plan.translations if one.site == site and one.protocol == UDP)
    return sum(len(one.kept) for one in here) + len(plan.move.kept_servers)
