"""Makes, deletes and looks up the conntrack entries of exactly the kept connections.

Rule: nothing here ever flushes, and no entry is touched but by its full tuple. What an entry must
say is in plan/conntrack.py; how it is packed in ctnetlink.py; stale ones go in conntrack_purge.py.

ctnetlink is not atomic: of a batch some may be refused, so every refusal is looked at. It cannot
change an entry's NAT (EOPNOTSUPP): an entry is deleted and made anew, behind the gate.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial

from natkeep import faultpoints
from natkeep.errors import KernelError, RefusedError
from natkeep.kernel import sysctl
from natkeep.kernel.conntrack_dump import (
    LOOK_UP,
    ask_each,
    count_tracked,
    dump,
    is_dump_cheaper,
)
from natkeep.kernel.conntrack_purge import delete_inbound, purge, raise_unless
from natkeep.kernel.ctnetlink import (
    NEW,
    Pack,
    ask_for_tcp,
    for_each,
    pack_entry,
    pack_inbound,
    pack_outbound,
    read_said,
    read_status,
    read_tuples,
    turn,
)
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_CREATE, NLM_F_EXCL, Netlink, Refusal
from natkeep.plan.conntrack import (
    IPS_DST_NAT,
    IPS_SRC_NAT,
    NOT_TRACKED,
    PEER_DIALLED,
    PROCESS_DIALLED,
    directions_of,
)
from natkeep.plan.move import Mode
from natkeep.plan.observation import SeenEntry
from natkeep.plan.protocols import TCP
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import DeleteEntries, RestoreEntries
from natkeep.plan.steps import InsertEntries, Prior, PurgeEntries
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, FourTuple

_IPS_OFFLOAD = 0xC000
"""IPS_OFFLOAD and IPS_HW_OFFLOAD."""

_PICKED_UP_S = 300
"""Seconds until the first packet, as for a connection that the kernel picks up by itself."""

_INSERT_ATTEMPTS = 5
"""A packet may make a stale entry between purge and insertion; five times in a row it does not."""

_ACCOUNTING = "netfilter/nf_conntrack_acct"


class InsertDriver(Driver[InsertEntries]):
    """InsertEntries: the entry of each kept connection, with NAT."""

    def check(self, at: Place, step: InsertEntries) -> None:
        """A table that is nearly full would take neither our entries nor those of others."""
        from natkeep.plan.diagnostics import FULL

        limit = int(sysctl.read("netfilter/nf_conntrack_max") or 0)
        wanted = (count_tracked() or 0) + len(step.translation.kept)
        if limit and wanted > limit * FULL // 100:
            raise RefusedError(
                f"{step.site}: the conntrack table would hold {wanted} of {limit} entries, "
                f"over {FULL} %",
                hint="raise net.netfilter.nf_conntrack_max",
            )

    def apply(self, at: Place, step: InsertEntries, remember: Remember) -> Prior:
        """All or none of them, whatever packets come meanwhile."""
        # Entries count their packets only if accounting was on when they were made; it is on for
        # just this long, so that connections of others are none the wiser.
        before = sysctl.read(_ACCOUNTING)
        remember(Prior(facts={"acct": before}) if before == "0" else Prior())
        counting = before == "0" and sysctl.write(_ACCOUNTING, "1")
        try:
            faultpoints.reach("insert-counting")
            _insert_despite_races(step.translation)
        except BaseException:
            delete(step.translation)
            raise
        finally:
            if counting:
                sysctl.write(_ACCOUNTING, "0")
        return Prior()

    def revert(self, at: Place, undo: DeleteEntries, prior: Prior) -> None:
        """Delete them; and accounting goes off, if the process was killed in the middle."""
        if "acct" in prior.facts:
            sysctl.write(_ACCOUNTING, str(prior.facts["acct"]))
        delete_inbound(undo.outer)


def stop_counting() -> None:
    """Accounting goes off, as a repair that was killed in the middle has left it on."""
    sysctl.write(_ACCOUNTING, "0")


def _insert_despite_races(translation: Translation) -> None:
    for attempt in range(1, _INSERT_ATTEMPTS + 1):
        try:
            insert(translation)
        except FileExistsError:
            if attempt == _INSERT_ATTEMPTS:
                raise
        else:
            faultpoints.reach("insert-whole")
            wrong = count_wrong(translation)
            if not wrong:
                return
            if attempt == _INSERT_ATTEMPTS:
                raise KernelError(f"conntrack: {wrong} entries do not translate as planned")
        purge(translation)


class PurgeDriver(Driver[PurgeEntries]):
    """PurgeEntries: stale entries go; those that a gateway had of its own come back in the end.

    Which there are is in the journal before the first is deleted, so a kill forgets nothing.
    """

    def apply(self, at: Place, step: PurgeEntries, remember: Remember) -> Prior:
        """Delete every entry that has one of the stale tuples."""
        at_gateway = step.site.role == Role.GATEWAY
        prior = Prior(facts={"own": read_directions(step.translation)} if at_gateway else {})
        remember(prior)
        purge(step.translation)
        return prior

    def revert(self, at: Place, undo: RestoreEntries, prior: Prior) -> None:
        """Make those of the gateway again, where nothing is in their place."""
        restore(undo, directions_of(prior.facts))


def read_directions(translation: Translation) -> str:
    """For each kept connection the direction of the entry that the gateway has of its own.

    In the characters of plan/conntrack.py; empty where none has one. They are looked for as the
    process sees them: what another move translates has no such tuple.
    """
    tracked, kept = count_tracked(), translation.kept
    if tracked == 0:
        return ""
    if tracked is not None and is_dump_cheaper(LOOK_UP * len(kept), tracked):
        found = _dump_directions(translation.map.old.version)
        directions = "".join([found.get(record, NOT_TRACKED) for record in kept.each()])
    else:
        with Netlink(NETLINK_NETFILTER) as netlink:
            answers = ask_each(netlink, kept, pack_outbound)
            directions = "".join(map(_read_direction, kept.each(), answers))
    return directions if directions.strip(NOT_TRACKED) else ""


def _read_direction(record: bytes, answer: bytes | None) -> str:
    if answer is None:
        return NOT_TRACKED
    return PROCESS_DIALLED if read_tuples(answer)[0] == record else PEER_DIALLED


def _dump_directions(version: int) -> dict[bytes, str]:
    """By the tuple as the process sees it, local end first; of zone 0, as when asked for."""
    found: dict[bytes, str] = {}
    for answer in dump(ask_for_tcp(version)):
        original, reply, zone = read_tuples(answer)
        if not zone:
            found[original], found[reply] = PROCESS_DIALLED, PEER_DIALLED
    return found


def restore(undo: RestoreEntries, directions: str) -> None:
    """Make again what `read_directions` has found, where nothing is in its place.

    They must not wait for a packet: if the process's is the first, it would leave untranslated,
    or not at all. They last as long as the connection, or only briefly when it has ended.
    """
    version, outer, kept = 4 if undo.kept.v4 else 6, undo.outer, undo.kept
    dialled = [i for i, direction in enumerate(directions) if direction == PROCESS_DIALLED]
    called = [i for i, direction in enumerate(directions) if direction == PEER_DIALLED]
    if outer != kept:
        # With a translation of the gateway's own; either direction translates both alike.
        called, dialled = sorted(called + dialled), []
    _restore(outer.pick(called, version), kept.pick(called, version), ports=undo.renames)
    turned = b"".join(map(turn, kept.pick(dialled, version).each()))
    plain = Connections.packed(turned, version)
    _restore(plain, plain, ports=False)


def _restore(outer: Connections, inner: Connections, *, ports: bool) -> None:
    if len(outer):
        refusals = _insert(outer, inner, _PICKED_UP_S, "give-back", ports=ports)
        raise_unless(refusals, errno.EEXIST)


def insert(translation: Translation) -> None:
    """Create the entry of each kept connection; FileExistsError when one is in the way."""
    outer, inner = _sides(translation)
    raise_unless(_insert(outer, inner, _read_timeout(), "insert", ports=translation.renames))


def _insert(
    outer: Connections, inner: Connections, timeout: int, what: str, *, ports: bool
) -> list[Refusal]:
    pack: Pack = partial(pack_entry, timeout=timeout, ports=ports)
    batch = for_each(outer, inner, NEW, NLM_F_CREATE | NLM_F_EXCL, pack)
    with Netlink(NETLINK_NETFILTER) as netlink:
        faultpoints.reach("half", what, lambda: netlink.send_batch(batch.head(batch.count // 2)))
        return netlink.send_batch(batch)


def _read_timeout() -> int:
    """Seconds that an established connection may be silent, as this namespace is set."""
    name, default = TCP.timeout
    value = sysctl.read(f"netfilter/{name}")
    return int(value) if value is not None else default


def delete(translation: Translation) -> None:
    """Delete the entries of the kept connections as they arrive at the site; none is fine."""
    outer, _ = _sides(translation)
    delete_inbound(outer)


def _sides(translation: Translation) -> tuple[Connections, Connections]:
    """What conntrack sees on the peer's and on the process' side (see plan/conntrack.py)."""
    if translation.mode == Mode.STATELESS:
        return translation.inner, translation.inner
    return translation.outer, translation.inner


def look_up(netlink: Netlink, translation: Translation) -> Iterator[SeenEntry | None]:
    """For each kept connection what the table shows, or None when it has no such entry."""
    outer, inner = _sides(translation)
    answers = ask_each(netlink, outer, pack_inbound)
    translated = IPS_DST_NAT if translation.mode == Mode.STATEFUL else 0
    for answer, wanted in zip(answers, inner.each(), strict=True):
        yield None if answer is None else _see(answer, wanted, translated)


def _see(answer: bytes, wanted: bytes, translated: int) -> SeenEntry:
    status, state, inward, outward = read_said(answer)
    original, reply, _ = read_tuples(answer)
    same = reply == wanted
    if not same and original == wanted:
        # Picked up by the rules when the process spoke first: the same, the other way round.
        same, inward, outward = True, outward, inward
        translated = translated and IPS_SRC_NAT
    return SeenEntry(
        same and status & translated == translated, inward, outward, state in TCP.alive
    )


def count_wrong(translation: Translation) -> int:
    """How many of the entries that the kernel has just taken do not translate as planned.

    It refuses those that clash with another's tuple, in either direction (ctnetlink.pack_entry
    names both). What translates nothing it does take, and says so in the status (no DST_NAT): of
    many entries only those are dumped, since to look up each costs a third of filling the table.
    """
    if translation.renames or not is_dump_cheaper(LOOK_UP * len(translation.kept), 0):
        with Netlink(NETLINK_NETFILTER) as netlink:
            seen = look_up(netlink, translation)
            return sum(1 for entry in seen if not (entry and entry.translated))
    outer, _ = _sides(translation)
    wrong = 0 if translation.mode == Mode.STATEFUL else IPS_DST_NAT
    tracked = count_tracked()
    flushed = 0 if tracked is None else max(0, len(outer) - tracked)
    return flushed + _count_with_status(outer, wrong, IPS_DST_NAT)


def _count_with_status(outer: Connections, status: int, mask: int) -> int:
    version, half = (4, 6) if outer.v4 else (6, 18)
    local = next(outer.each())[: half - 2]
    request = ask_for_tcp(version, destination=local, status=status, mask=mask)
    asked_for = (answer for answer in dump(request) if read_status(answer) & mask == status)
    found = {turn(read_tuples(answer)[0]) for answer in asked_for}
    return len(found.intersection(outer.each())) if found else 0


def find_carried(connections: Connections) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Those that this namespace translates already: as the process sees them, and as their peers.

    The entry that the process' own packets belong to has another tuple on its other side.
    """
    if not len(connections) or not count_tracked():
        return
    with Netlink(NETLINK_NETFILTER) as netlink:
        answers = ask_each(netlink, connections, pack_outbound)
        for record, answer in zip(connections.each(), answers, strict=True):
            carrier = record if answer is None else _read_carrier(answer, record)
            if carrier != record:
                yield _unpack(record), _unpack(carrier)


def _read_carrier(answer: bytes, record: bytes) -> bytes:
    if read_status(answer) & _IPS_OFFLOAD:
        raise RefusedError(
            "a kept connection is offloaded to a flowtable, where no rule sees its packets",
            hint="take it out of the flowtable, and wait a second",
        )
    original, reply, _ = read_tuples(answer)
    # The peer dialled: its tuple is the original one. Or the process did, and the reply is.
    return turn(original if reply == record else reply)


def _unpack(record: bytes) -> FourTuple:
    [tuple_] = Connections.packed(record, 4 if len(record) == 12 else 6)
    return tuple_


def read_shortest_timeout() -> float:
    """Seconds for which the kernel keeps the entry of a connection that has ended, at least."""
    values = [sysctl.read(f"netfilter/{name}") for name in TCP.ends]
    return float(min((int(value) for value in values if value is not None), default=0))
