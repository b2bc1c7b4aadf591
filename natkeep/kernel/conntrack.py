"""Makes, deletes and looks up the conntrack entries of exactly the kept connections.

Rule: nothing here ever flushes, and no entry is touched but by its full tuple. What an entry must
say is in plan/conntrack.py; how it is packed in ctnetlink.py; stale ones go in conntrack_purge.py.

ctnetlink is not atomic: of a batch some may be refused, so every refusal is looked at. It cannot
change an entry's NAT (EOPNOTSUPP): an entry is deleted and made anew, behind the gate.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from natkeep import faultpoints
from natkeep.errors import KernelError, RefusedError
from natkeep.kernel import sysctl
from natkeep.kernel.conntrack_dump import LOOK_UP, ask_each, count_tracked, dump, is_dump_cheaper
from natkeep.kernel.conntrack_own import note_absent, read_directions, read_timeout
from natkeep.kernel.conntrack_purge import delete_inbound, purge, purge_many, raise_unless
from natkeep.kernel.conntrack_zones import find_zones
from natkeep.kernel.ctnetlink import (
    NEW,
    Pack,
    ask_for_tcp,
    for_each,
    pack_entry,
    pack_inbound,
    pack_zone,
    read_status,
    read_tuples,
    turn,
)
from natkeep.kernel.ctnetlink_answers import read_said
from natkeep.kernel.interface import Driver, Place, Remember, RememberMany
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_CREATE, NLM_F_EXCL, Netlink, Refusal
from natkeep.plan.conntrack import (
    IPS_DST_NAT,
    IPS_SRC_NAT,
    PEER_DIALLED,
    PROCESS_DIALLED,
    directions_of,
    group_entries,
    noted_from_text,
    noted_to_text,
)
from natkeep.plan.entry_attributes import PLAIN, Attributes
from natkeep.plan.move import Mode
from natkeep.plan.observation import SeenEntry
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.step_undo import DeleteDatagrams, DeleteEntries, RestoreEntries
from natkeep.plan.steps import InsertEntries, Prior, PurgeEntries
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections

_NOTHING_NOTED: Mapping[Attributes, list[int]] = MappingProxyType({})

_PICKED_UP_S = 300
"""Seconds until the first packet, as for a connection that the kernel picks up by itself."""

_INSERT_ATTEMPTS = 5
"""A packet may make a stale entry between purge and insertion; five times in a row it does not."""

_ACCOUNTING = "netfilter/nf_conntrack_acct"


class InsertDriver(Driver[InsertEntries]):
    """InsertEntries: the entry of each kept connection, with NAT."""

    def check(self, at: Place, step: InsertEntries) -> None:
        """A table that is nearly full would take neither our entries nor those of others."""
        from natkeep.plan.findings import FULL

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
        return self.apply_many(at, [step], lambda priors: remember(priors[0]))[0]

    def apply_many(
        self, at: Place, steps: Sequence[InsertEntries], remember: RememberMany
    ) -> list[Prior]:
        """The same of many moves."""
        # Entries count their packets only if accounting was on when they were made; it is on for
        # just this long, so that connections of others are none the wiser.
        before = sysctl.read(_ACCOUNTING)
        prior = Prior(facts={"acct": before}) if before == "0" else Prior()
        remember({place: prior for place, _ in enumerate(steps)})
        counting = before == "0" and sysctl.write(_ACCOUNTING, "1")
        try:
            faultpoints.reach("insert-counting")
            translations = [step.translation for step in steps]
            if not (len(steps) > 1 and _insert_at_once(translations)):
                for one in translations:
                    _insert_despite_races(one)
        except BaseException:
            for step in steps:
                delete(step.translation)
            raise
        finally:
            if counting:
                sysctl.write(_ACCOUNTING, "0")
        return [Prior() for _ in steps]

    def revert(self, at: Place, undo: DeleteEntries, prior: Prior) -> None:
        """Delete them; and accounting goes off, if the process was killed in the middle."""
        self.revert_many(at, [(undo, prior)])

    def revert_many(self, at: Place, undos: Sequence[tuple[DeleteEntries, Prior]]) -> None:
        """The same of many moves."""
        for before in {str(prior.facts["acct"]) for _, prior in undos if "acct" in prior.facts}:
            sysctl.write(_ACCOUNTING, before)
        every = Connections.joined(undo.outer for undo, _ in undos)
        for version in (4, 6):
            if len(some := Connections.packed(every.records(version), version)):
                delete_inbound(some)


def stop_counting() -> None:
    """Accounting goes off, as a repair that was killed in the middle has left it on."""
    sysctl.write(_ACCOUNTING, "0")


def _insert_at_once(translations: Sequence[Translation]) -> bool:
    """Insert those of many moves; False, and none is there, where one cannot be, or is another."""
    alike: dict[tuple[int, Mode, bool], list[Translation]] = {}
    for one in translations:
        alike.setdefault((one.map.old.version, one.mode, one.renames), []).append(one)
    fine = not any(one.noted or one.site.row.relays for one in translations)
    for (_, mode, ports), some in alike.items() if fine else ():
        outers, inners = zip(*map(_sides, some), strict=True)
        outer = Connections.joined(outers)
        inner = outer if mode == Mode.STATELESS else Connections.joined(inners)
        if _insert(outer, inner, read_timeout(), "insert", PLAIN, ports=ports):
            fine = False
            break
        with Netlink(NETLINK_NETFILTER) as netlink:
            translated = IPS_DST_NAT if mode == Mode.STATEFUL else 0
            fine = all(e and e.translated for e in _look_up(netlink, outer, inner, translated, 0))
    for one in translations if not fine else ():
        delete(one)
    return fine


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
        return self.apply_many(at, [step], lambda priors: remember(priors[0]))[0]

    def apply_many(
        self, at: Place, steps: Sequence[PurgeEntries], remember: RememberMany
    ) -> list[Prior]:
        """The same of many moves."""
        note_absent(step.translation.kept for step in steps if step.translation.protocol is TCP)
        priors = [self._find_prior(step) for step in steps]
        remember(dict(enumerate(priors)))
        purge_many(step.translation for step in steps)
        return priors

    def _find_prior(self, step: PurgeEntries) -> Prior:
        facts: dict[str, str | int | bool] = {}
        if step.site.row.passes_on and step.translation.protocol.has_states:
            facts["own"] = read_directions(step.translation)
            if noted := noted_to_text(group_entries(step.translation)):
                facts["noted"] = noted
        return Prior(facts=facts)

    def revert(self, at: Place, undo: RestoreEntries | DeleteDatagrams, prior: Prior) -> None:
        """Make those of the gateway again, where nothing is in their place; of UDP delete ours."""
        if isinstance(undo, DeleteDatagrams):
            delete_inbound(undo.outer, UDP)
            return
        noted = noted_from_text(str(prior.facts.get("noted", "")), len(undo.kept))
        restore(undo, directions_of(prior.facts), noted)


def restore(
    undo: RestoreEntries,
    directions: str,
    noted: Mapping[Attributes, list[int]] = MappingProxyType({}),
) -> None:
    """Make again what `read_directions` has found, where nothing is in its place.

    They must not wait for a packet: if the process's is the first, it would leave untranslated,
    or not at all. They last as long as the connection, or only briefly when it has ended.
    noted: what they said beside their tuples, for those where it is not the usual.
    """
    others = set(range(len(directions))).difference(*noted.values())
    for attributes, places in ((PLAIN, sorted(others)), *noted.items()):
        _restore_alike(undo, directions, attributes, places)


def _restore_alike(
    undo: RestoreEntries, directions: str, attributes: Attributes, places: list[int]
) -> None:
    version, outer, kept = 4 if undo.kept.v4 else 6, undo.outer, undo.kept
    dialled = [i for i in places if directions[i : i + 1] == PROCESS_DIALLED]
    called = [i for i in places if directions[i : i + 1] == PEER_DIALLED]
    if outer != kept:
        # With a translation of the gateway's own; either direction translates both alike.
        called, dialled = sorted(called + dialled), []
    facing = attributes.facing(process_dialled=False)
    pairs = outer.pick(called, version), kept.pick(called, version)
    _restore(*pairs, facing, ports=undo.renames)
    turned = b"".join(map(turn, kept.pick(dialled, version).each()))
    plain = Connections.packed(turned, version)
    _restore(plain, plain, attributes.facing(process_dialled=True), ports=False)


def _restore(
    outer: Connections, inner: Connections, attributes: Attributes, *, ports: bool
) -> None:
    if len(outer):
        refusals = _insert(outer, inner, _PICKED_UP_S, "give-back", attributes, ports=ports)
        raise_unless(refusals, errno.EEXIST)


def insert(translation: Translation) -> None:
    """Create the entry of each kept connection; FileExistsError when one is in the way."""
    outer, inner = _sides(translation)
    version, timeout = translation.map.old.version, read_timeout()
    groups = group_entries(translation)
    for attributes, places in groups.items():
        sides = (outer, inner)
        if len(groups) > 1:
            sides = (outer.pick(places, version), inner.pick(places, version))
        refusals = _insert(*sides, timeout, "insert", attributes, ports=translation.renames)
        raise_unless(refusals)


def _insert(
    outer: Connections,
    inner: Connections,
    timeout: int,
    what: str,
    attributes: Attributes,
    *,
    ports: bool,
) -> list[Refusal]:
    pack: Pack = partial(pack_entry, timeout=timeout, ports=ports, attributes=attributes)
    batch = for_each(outer, inner, NEW, NLM_F_CREATE | NLM_F_EXCL, pack)
    with Netlink(NETLINK_NETFILTER) as netlink:
        faultpoints.reach("half", what, lambda: netlink.send_batch(batch.head(batch.count // 2)))
        return netlink.send_batch(batch)


def delete(translation: Translation) -> None:
    """Delete the entries of the kept connections as they arrive at the site; none is fine."""
    outer, _ = _sides(translation)
    delete_inbound(outer)


def _sides(translation: Translation) -> tuple[Connections, Connections]:
    """What conntrack sees on the peer's and on the process' side (see plan/conntrack.py)."""
    if translation.mode == Mode.STATELESS:
        return translation.inner, translation.inner
    return translation.outer, translation.inner


def look_up(
    netlink: Netlink, translation: Translation, zones: Callable[[Netlink], list[int]] | None = None
) -> list[SeenEntry | None]:
    """For each kept connection what the table shows, or None when it has no such entry.

    zones: finds those in which one may be that is not in zone 0.
    """
    outer, inner = _sides(translation)
    translated = IPS_DST_NAT if translation.mode == Mode.STATEFUL else 0
    seen = _look_up(netlink, outer, inner, translated, 0)
    for zone in (zones or read_zones)(netlink) if None in seen else ():
        missing = [place for place, entry in enumerate(seen) if entry is None] if zone else []
        if missing:
            version = translation.map.old.version
            some, wanted = outer.pick(missing, version), inner.pick(missing, version)
            there = _look_up(netlink, some, wanted, translated, zone)
            for place, entry in zip(missing, there, strict=True):
                seen[place] = entry
    return seen


def read_zones(netlink: Netlink) -> list[int]:
    """The zones in which this namespace may have entries."""
    return find_zones(netlink, count_tracked())


def _look_up(
    netlink: Netlink, outer: Connections, inner: Connections, translated: int, zone: int
) -> list[SeenEntry | None]:
    suffix = pack_zone(zone)
    answers = ask_each(netlink, outer, lambda end: pack_inbound(end) + suffix)
    return [
        None if answer is None else _see(answer, wanted, translated)
        for answer, wanted in zip(answers, inner.each(), strict=True)
    ]


def _see(answer: bytes, wanted: bytes, translated: int) -> SeenEntry:
    status, state, inward, outward = read_said(answer)
    original, reply, _ = read_tuples(answer)
    same = reply == wanted
    if not same and original == wanted:
        # Picked up by the rules when the process spoke first: the same, the other way round.
        same, inward, outward = True, outward, inward
        translated = translated and IPS_SRC_NAT
    return SeenEntry(
        same and status & translated == translated, inward, outward, state not in TCP.ended
    )


def count_wrong(translation: Translation) -> int:
    """How many of the entries that the kernel has just taken do not translate as planned.

    It refuses those that clash with another's tuple, in either direction (ctnetlink.pack_entry
    names both). What translates nothing it does take, and says so in the status (no DST_NAT): of
    many entries only those are dumped, since to look up each costs a third of filling the table.
    A relay's translate the peer as well (SRC_NAT); where a gateway renames, it is looked up which.
    """
    relays = translation.site.row.relays
    if (translation.renames and not relays) or not is_dump_cheaper(
        LOOK_UP * len(translation.kept), 0
    ):
        with Netlink(NETLINK_NETFILTER) as netlink:
            seen = look_up(netlink, translation)
            return sum(1 for entry in seen if not (entry and entry.translated))
    outer, _ = _sides(translation)
    wrong = 0 if translation.mode == Mode.STATEFUL else IPS_DST_NAT
    tracked = count_tracked()
    flushed = 0 if tracked is None else max(0, len(outer) - tracked)
    bits = (IPS_DST_NAT, IPS_SRC_NAT) if relays else (IPS_DST_NAT,)
    return flushed + len(set().union(*(_find_with_status(outer, wrong, bit) for bit in bits)))


def _find_with_status(outer: Connections, status: int, mask: int) -> set[bytes]:
    version, half = (4, 6) if outer.v4 else (6, 18)
    local = next(outer.each())[: half - 2]
    request = ask_for_tcp(version, destination=local, status=status, mask=mask)
    asked_for = (answer for answer in dump(request) if read_status(answer) & mask == status)
    found = {turn(read_tuples(answer)[0]) for answer in asked_for}
    return found.intersection(outer.each()) if found else found


def read_shortest_timeout() -> float:
    """Seconds for which the kernel keeps the entry of a connection that has ended, at least."""
    values = [sysctl.read(f"netfilter/{name}") for name in TCP.ends]
    return float(min((int(value) for value in values if value is not None), default=0))
