"""datagrams: the look at what happens to UDP sockets before their gate stands."""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding
from natkeep.plan.roles import Role


def look_at_lock(subject: Subject) -> Iterator[Finding]:
    """Whether the host that the process has left answers datagrams since the dump."""
    assert subject.plan is not None
    move = subject.plan.move
    count = len(move.udp) + len(move.udp_servers)
    locked = move.lock is not None and move.lock.whole
    for site in move.sites if count and not (subject.frozen or move.live or locked) else ():
        if site.role in (Role.SOURCE, Role.RELAY):
            what = f"datagrams to {count} UDP socket{'s' * (count != 1)} are answered"
            yield Finding("udp-unlocked", site, f"{what} from the end of the dump until prepare")
