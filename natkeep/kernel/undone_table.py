"""the table natkeep-undone: what is dropped where a move was undone, found, left and taken away.

Rule: what the table is stands in plan/undone.py. Nothing stays of it once its sets are empty and
natkeep acts there again. All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

from natkeep import faultpoints
from natkeep.kernel import nftables
from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.rtnetlink import all_addresses
from natkeep.plan.base_chains import GATE, HEARD, OPEN, gate_chain
from natkeep.plan.nft import FAMILIES, TABLE
from natkeep.plan.step_undo import RemoveUndone
from natkeep.plan.steps import DropUndone, Prior
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections
from natkeep.plan.undone import UNDONE_TABLE, element_lines, read_key, table_lines, undone_set

_ATTEMPTS = 3  # of a removal, while elements expire


class DropUndoneDriver(Driver[DropUndone]):
    """The drop that stays; undone, it goes before its time."""

    def apply(self, at: Place, step: DropUndone, remember: Remember) -> Prior:
        """From now on these are dropped, and for so long, whatever was dropped before."""
        remember(Prior())
        faultpoints.reach("drop")
        lines = [] if has_undone() else [*table_lines()]
        lines += element_lines("delete", step.arriving.only({*read_undone().each()}))
        nftables.run_transaction([*lines, *element_lines("add", step.arriving, step.seconds)])
        return Prior()

    def revert(self, at: Place, undo: RemoveUndone, prior: Prior) -> None:
        """What has expired is fine."""
        remove(undo.connections)


def has_undone() -> bool:
    """Whether the table is there, though all that was in it may have expired."""
    return dump.has_table("inet", UNDONE_TABLE)


def read_undone() -> Connections:
    """What is dropped here, as it arrives."""
    keys = (key for v in FAMILIES for key in dump.read_keys(UNDONE_TABLE, undone_set(v)))
    return Connections.of_records(map(read_key, keys))


def remove(connections: Connections = NO_CONNECTIONS) -> None:
    """Drop these no more; the table goes with the last, also if all have expired."""
    for attempt in range(_ATTEMPTS):
        if not has_undone():
            return
        there = read_undone()
        going = there.only({*connections.each()})
        lines = [f"delete table inet {UNDONE_TABLE}"]
        if len(going) < len(there):
            lines = [*element_lines("delete", going)]
        try:
            if lines:
                nftables.run_transaction(lines)
            return
        except nftables.NftError:
            if attempt == _ATTEMPTS - 1:
                raise


def find_arriving(move_id: str, olds: frozenset[Address], heard_alone: bool = False) -> Connections:
    """What a gateway may still send here of the move, and is not to be answered, as it arrives.

    While the gate is closed, all; afterwards what has an entry that has not ended, and no socket:
    the process may have been dumped, to move on. What has one is broken by the undo, and reset.
    Not what is addressed to one of *olds*, what another move here keeps as well, nor what a peer on
    this host says. heard_alone: nor that of a peer that has never been heard at an open gate.
    """
    from natkeep.kernel.nft_strays import read_set  # an undo alone needs them
    from natkeep.kernel.stray_connections import find_dumped, shorten
    from natkeep.plan.strays import read_chain

    gate = gate_chain(move_id)
    if not dump.has_chain(TABLE, gate):
        return NO_CONNECTIONS
    closed = OPEN not in {rule.comment for rule in dump.rules(TABLE, gate)}
    own: dict[bytes, bytes] = {}
    others: set[bytes] = set()
    with Netlink(NETLINK_NETFILTER) as netlink:
        standing, _ = dump.find_standing(netlink, "inet")
    for rule in (key for key in standing if key.kind == "rule"):
        at, (comment, _, marks) = read_chain(rule.name), rule.what.partition(": ")
        if at is None or at[0] != GATE or at[1] in olds:
            continue
        sets = [mark[1:] for mark in marks.split() if mark.startswith(("@kept-", "@outer-"))]
        if comment == move_id and heard_alone and not closed:
            sets = [f"{HEARD}-{name.partition('-')[2]}" for name in sets]
        records = (record for name in sets for record in read_set(name, at[1]).each())
        if comment == move_id:
            own |= {record: shorten(record) for record in records}
        else:
            others |= {*records}
    if here := all_addresses() & {key[:-4] for key in own.values()}:
        own = {record: key for record, key in own.items() if key[:-4] not in here}
    alive = set(own.values()) if closed else find_dumped({*own.values()})
    return Connections.of_records(r for r, key in own.items() if key in alive and r not in others)
