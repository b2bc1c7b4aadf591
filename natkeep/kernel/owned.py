"""the entries that a gateway had of its own for the kept connections, before any move.

They are purged, because an entry that knows no translation is never asked about rules, and given
back when the move goes. So which there are is read before, and is in the journal before the first
is deleted: whoever is killed in the middle has forgotten nothing.

Rule: nothing is changed here but by conntrack.py, and only what was there is made again.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.kernel import conntrack
from natkeep.kernel.ctnetlink import (
    GET,
    TUPLE_ORIG,
    ask_for_tcp,
    for_each,
    pack_outbound,
    read_tcp_tuples,
    read_tuple,
    turn,
)
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink, attributes
from natkeep.plan.steps import Prior
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections

NOT_TRACKED, PEER_DIALLED, PROCESS_DIALLED = "-", "<", ">"
"""Of a connection: there is no entry; its original direction is to, or from, the process."""


def read(translation: Translation) -> str:
    """One of the three characters for each kept connection, in order; empty where all are "-".

    Looked for as the process sees them: what another move translates has no such tuple.
    """
    tracked = conntrack.read_setting("nf_conntrack_count")
    if tracked == "0":
        return ""
    if tracked is None or 3 * len(translation.kept) < int(tracked) + 2000:
        ways = "".join(_ask(translation))
    else:
        ways = "".join(_walk(translation))
    return ways if ways.strip(NOT_TRACKED) else ""


def _ask(translation: Translation) -> Iterable[str]:
    kept = translation.kept
    queries = for_each(kept, kept, GET, 0, lambda end, _: pack_outbound(end))
    with Netlink(NETLINK_NETFILTER) as netlink:
        answers = netlink.send_queries(queries)
        for record, answer in zip(kept.each(), answers, strict=True):
            if answer is None:
                yield NOT_TRACKED
            else:
                original = read_tuple(attributes(answer[4:])[TUPLE_ORIG])
                yield PROCESS_DIALLED if original == record else PEER_DIALLED


def _walk(translation: Translation) -> Iterable[str]:
    version = translation.map.old.version
    found: dict[bytes, str] = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        answers = netlink.request(GET, NLM_F_DUMP, ask_for_tcp(version))
        for original, reply, zone in read_tcp_tuples(answers, version):
            if not zone:
                found[original], found[reply] = PROCESS_DIALLED, PEER_DIALLED
    return (found.get(record, NOT_TRACKED) for record in translation.kept.each())


def ways_of(prior: Prior) -> str:
    """What `read` found, and what a move that was replaced had found before (its translation hid
    it from `read`); empty where there is nothing.
    """
    own, inherited = (str(prior.facts.get(name, "")) for name in ("own", "inherited"))
    if not own or not inherited:
        return own or inherited
    pairs = zip(own, inherited, strict=True)
    return "".join(way if way != NOT_TRACKED else earlier for way, earlier in pairs)


def give_back(outer: Connections, kept: Connections, ways: str, *, renames: bool) -> None:
    """Make again what `read` has found, where nothing is in its place.

    outer, kept: of the translation, whose entries are gone; renames: it changed peers or ports.
    """
    version = 4 if kept.v4 else 6
    dialled = [i for i, way in enumerate(ways) if way == PROCESS_DIALLED]
    called = [i for i, way in enumerate(ways) if way == PEER_DIALLED]
    if outer != kept:
        # With a translation of the gateway's own; either direction translates both alike.
        called, dialled = sorted(called + dialled), []
    if called:
        one, other = outer.pick(called, version), kept.pick(called, version)
        conntrack.give_back(one, other, ports=renames)
    if dialled:
        some = kept.pick(dialled, version)
        conntrack.give_back_plain(type(some).packed(b"".join(map(turn, some.each())), version))
