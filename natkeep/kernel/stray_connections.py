"""Counts the connections that live by what no journal knows, before that is cleared.

A stray may be the work of a natkeep with another state directory, so what the kernel shows decides:

- while a gate is closed its process is frozen, and every connection lives;
- afterwards those with a conntrack entry that has not ended, whatever address it says, since in
  mode stateless that is not OLD; those with a socket; and whatever has a socket at an OLD. Of UDP
  any entry counts, which goes when nothing is said.

Rule: read only, in the namespace that the calling thread is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from itertools import chain

from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.conntrack_dump import count_tracked
from natkeep.kernel.conntrack_dump import dump as dump_entries
from natkeep.kernel.ctnetlink import ask_for, read_tuples, turn
from natkeep.kernel.ctnetlink_answers import read_said
from natkeep.kernel.sock_diag import read_datagrams, read_living
from natkeep.plan.nft import TABLE
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.strays import SeenTable
from natkeep.plan.tuples import Address, Endpoint

_LISTENS = bytes(2)


def count_living(
    table: SeenTable, strays: frozenset[str], olds: frozenset[Address]
) -> dict[str, tuple[int, str]]:
    """Of each of *strays* that has such, how many connections live, and the peer of one.

    olds: the OLD addresses of moves that are known; what lives at another one has the name "".
    """
    kept: dict[str, set[bytes]] = {}
    for move_id, name in table.kept_sets(strays):
        kept.setdefault(move_id, set()).update(map(_shorten_key, dump.read_keys(TABLE, name)))
    wanted = {key for keys in kept.values() for key in keys}
    alive = find_alive(wanted)
    held = {old.packed for old in table.held if old not in olds}
    left: set[bytes] = set()
    for record, key in (*_read_sockets(), *_read_datagrams()) if held else ():
        at_held = record[: len(record) // 2 - 2] in held
        if at_held and key not in wanted and record[-2:] != _LISTENS:
            left.add(key)
    found = {
        move_id: keys if table.is_closed(move_id) else keys & alive
        for move_id, keys in kept.items()
    }
    return {
        move_id: (len(keys), _name_peer(min(keys)))
        for move_id, keys in {**found, "": left}.items()
        if keys
    }


def find_alive(wanted: set[bytes]) -> set[bytes]:
    """Those of *wanted* (peer, its port, local port) with a socket, or an entry not ended."""
    if not wanted:
        return set()
    sockets = {key for _, key in (*_read_sockets(), *_read_datagrams())}
    found = (_find_entries(wanted, protocol) for protocol in (TCP, UDP))
    return {key for key in chain(*found, sockets) if key in wanted}


def find_dumped(wanted: set[bytes]) -> set[bytes]:
    """Those of *wanted* with an entry that has not ended, and no socket: they live elsewhere.

    One that its process has closed, or left by its own end, is a socket until its end is through.
    """
    if not wanted:
        return set()
    sockets = {key for _, key in _read_sockets(orphans=True)}
    return {key for key in _find_entries(wanted) if key in wanted and key not in sockets}


def _read_sockets(*, orphans: bool = False) -> Iterator[tuple[bytes, bytes]]:
    """The record of each socket that a process owns, and it as peer, its port, local port."""
    for records in read_living(orphans=orphans).values():
        yield from ((record, shorten(record)) for record in records)


def _read_datagrams() -> Iterator[tuple[bytes, bytes]]:
    """The same of UDP."""
    for records in read_datagrams().values():
        yield from ((record, shorten(record)) for record in records)


def shorten(record: bytes) -> bytes:
    """A record of Connections as peer, its port, local port."""
    half = len(record) // 2
    return record[half:] + record[half - 2 : half]


def _shorten_key(key: bytes) -> bytes:
    """An element `peer . port . port`, whose ports are padded, as peer, its port, local port."""
    width = len(key) - 8
    return key[: width + 2] + key[width + 4 : width + 6]


def _find_entries(wanted: set[bytes], protocol: Protocol = TCP) -> Iterator[bytes]:
    """What each entry that has not ended could be, as peer, its port, local port."""
    if not wanted or not count_tracked():
        return
    for version in {4 if len(key) == 8 else 6 for key in wanted}:
        for answer in dump_entries(ask_for(protocol, version)):
            original, reply, _ = read_tuples(answer, protocol)
            if original and read_said(answer).state not in protocol.ended:
                half = len(original) // 2
                for tuple_ in (original, reply, turn(original), turn(reply)):
                    yield tuple_[:half] + tuple_[-2:]


def _name_peer(key: bytes) -> str:
    return str(Endpoint(ip_address(key[:-4]), int.from_bytes(key[-4:-2], "big")))
