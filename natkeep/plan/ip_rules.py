"""the ip rules: which packets to an OLD that is on lo are this host's own, and stay here.

    0:  from all fwmark 0xc114 lookup local                  what CRIU and a holder send
    0:  from PEER to OLD ipproto tcp sport .. dport .. lookup local      a kept peer on this host,
                                                                     or ipproto udp
    0:  from OLD to OLD lookup local, from 127.0.0.0/8 to OLD lookup local    never on a wire
    0:  from all to OLD iif lo goto 1                        what else this host says to OLD
    0:  from all lookup local                                as ever, but behind these
    1:  from all nop                                         where goto leads: other rules are asked

OLD has to be an address of the host that has the sockets; but an address on lo is for all, and an
ssh to the source would end at home. So what this host sends to OLD is routed as before, unless it
belongs to a connection that was moved here. `iif lo` is what this host sends, and with it the
kernel asks, too, whether a packet from OLD comes from where OLD is (fib_validate_source). Kept
packets of others come in by another device. A host that forwards passes on what others say to OLD,
so there it is what is translated here that gets a mark, and all else to OLD goes on:

    0:  from all fwmark 0x8000000/0x8000000 lookup local
    0:  from all to OLD goto 1                               instead of the one with iif

An IPv6 socket that names no source of its own would choose OLD itself to talk to OLD (RFC 6724,
5., rule 1). Of these lookups alone, told by FIB_RULE_FIND_SADDR, the route comes from a table of
ours, in which it has the source that was chosen before.

    0:  from OLD to OLD iif lo lookup 49428                  in front of the one with goto

Rule: values only; where they stand among the rules of a host is for kernel/ip_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.tuples import Address, Endpoint, FourTuple
from natkeep.values import dataclass, replace

MOST = 64
"""So many tuples have a rule each; of more peers on the host their end's port alone tells."""


STRANGE, HERE = 0x04000000, 0x08000000
"""The bits of the mark, in prerouting, of packets that a host which forwards has got: for OLD
itself, and for NEW, so that they are for a socket here by now."""
LOOPBACK: dict[int, Address] = {4: ip_address("127.0.0.0"), 6: ip_address("::1")}
"""In IPv4 a network, of 8 bits."""
SOURCES = CRIU_MARK
"""The number of our own table of IPv6 routes."""


@dataclass(frozen=True, slots=True)
class IpRule:
    """A rule of a routing policy that an OLD needs; what is None or 0 is not asked.

    mark: looks table local up; without ports and mark it leads past it (`to` is OLD), with a source
    that is OLD itself to the route whose source is another, unless bound: that is said from there,
    and table local is looked up. everywhere: not what this host says alone, but also what it has
    got. protocol: whose ports.
    """

    version: int
    to: Address | None = None
    source: Address | None = None
    sport: int = 0
    dport: int = 0
    mark: int = 0
    everywhere: bool = False
    bound: bool = False
    protocol: Protocol = TCP

    @property
    def passes(self) -> bool:
        """Whether it leads past table local, to whatever rules follow."""
        return not (self.sport or self.dport or self.source or self.mark)

    @property
    def sources(self) -> bool:
        """Whether it leads to the route that has a source."""
        return self.source is not None and not (self.sport or self.dport or self.bound)

    def __str__(self) -> str:
        words = [f"from {self.source or 'all'}{'/8' if self.source == LOOPBACK[4] else ''}"]
        words += [f"to {self.to}"] if self.to is not None else []
        mask = f"/{HERE:#x}" if self.mark == HERE else ""
        words += [f"fwmark {self.mark:#x}{mask}"] if self.mark else []
        words += [f"ipproto {self.protocol.name}"] if self.sport or self.dport else []
        words += [f"sport {self.sport}"] if self.sport else []
        words += [f"dport {self.dport}"] if self.dport else []
        goes = f"iif lo lookup {SOURCES}" if self.sources else "lookup local"
        past = "goto" if self.everywhere else "iif lo goto"
        words.append(past if self.passes else goes)
        return " ".join(words)


def rules_of(old: Address, *, forwards: bool = False) -> tuple[IpRule, ...]:
    """What *old* needs as long as it is on lo: what is marked stays, all else goes as before.

    forwards: the host passes on what others say to *old*.
    """
    marks = (CRIU_MARK, HERE) if forwards else (CRIU_MARK,)
    # A socket that has OLD for its source looks up with it; the others come to the next rule.
    bound = (IpRule(old.version, old, one, bound=True) for one in (old, LOOPBACK[old.version]))
    sources = (IpRule(6, old, old),) if old.version == 6 else ()
    local = (IpRule(old.version, mark=mark) for mark in marks)
    return (*local, *bound, *sources, IpRule(old.version, old, everywhere=forwards))


def stay(
    inner: Iterable[FourTuple],
    calls: Iterable[Endpoint],
    home: frozenset[Address],
    protocol: Protocol = TCP,
) -> tuple[IpRule, ...]:
    """What of this host's stays here: connections with both ends on it, and calls to listeners.

    inner: of each the tuple to the OLD, and also the other way round where the peer is at an OLD.
    calls: where listeners are called. home: addresses that need no rule.
    """
    ordered = sorted({*inner}, key=lambda one: (one.source.address.version, one))
    found = dict.fromkeys(_of_tuples(ordered))
    found |= dict.fromkeys(
        IpRule(end.address.version, end.address, dport=end.port) for end in calls
    )
    own = (rule for rule in found if rule.to not in home)
    return tuple(own if protocol is TCP else (replace(rule, protocol=protocol) for rule in own))


def _of_tuples(tuples: list[FourTuple]) -> Iterator[IpRule]:
    """A rule each, or if they are many one for each port of one end, that with the fewer ports."""
    ends: dict[tuple[Address, Address], list[FourTuple]] = {}
    for one in tuples:
        ends.setdefault((one.source.address, one.destination.address), []).append(one)
    for (source, to), some in ends.items():
        pairs = {(one.source.port, one.destination.port) for one in some}
        if len(pairs) > MOST:
            sports, dports = {sport for sport, _ in pairs}, {dport for _, dport in pairs}
            fewer = len(dports) <= len(sports)
            pairs = {(0, port) for port in dports} if fewer else {(port, 0) for port in sports}
        for sport, dport in sorted(pairs):
            yield IpRule(to.version, to, source, sport, dport)
