"""the seed corpus: the real dumps of tests/checkpoint/corpus, and what natkeep makes of them.

    images      each dump, as it is; pstree.img and ids-1.img, which the corpus has not, beside it
    journal     a move for each dump that has connections, begun and noted by natkeep itself
    listing     the connections of each dump as `natkeep` writes them, and a list by hand

Rule: a seed is good: the reader that it is for accepts it. A case is a directory in memory: the
octets of each file by its name.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzz.structure import varint
from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.imagefile import COMMON, IDS, PSTREE
from natkeep.checkpoint.images import read_checkpoint
from natkeep.checkpoint.listing import write_listing
from natkeep.plan.identity import Identity
from natkeep.plan.listeners import make_receptions
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import (
    AddAddress,
    ForgetCalls,
    HoldListeners,
    InsertEntries,
    Prior,
    Step,
    TakeOverLock,
)
from natkeep.plan.translation import Surroundings, Translation
from natkeep.plan.tuples import Connections, Endpoint, parse_address
from natkeep.state.directory import StateDirectory, read_boot_id

Case = dict[str, bytes]

DUMPS = Path(__file__).resolve().parent.parent / "tests" / "checkpoint" / "corpus"
ID = "web"
LISTING = "listing"

BOOT = "00000000-0000-4000-8000-000000000000"  # any: mutant N is the same after a reboot

_BY_HAND = b"""# what runs on web1
10.2.0.10:5000 10.1.0.2:50594
\t[fd00:2::10]:5000 [FD00:1::2]:50594     # IPv6 in brackets

[::ffff:10.2.0.10]:80 10.1.0.3:1\r
"""


def read_dumps() -> tuple[Case, ...]:
    """Each dump of the corpus."""
    root = {"pstree.img": _image(PSTREE, {1: 1, 2: 0, 3: 1, 4: 1})}
    root |= {"ids-1.img": _image(IDS, {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2, 7: 1, 8: 1, 9: 1})}
    return tuple(
        {path.name: path.read_bytes() for path in sorted(directory.iterdir())} | root
        for directory in _directories()
    )


def _directories() -> list[Path]:
    return sorted(path for path in DUMPS.iterdir() if path.is_dir())


def _image(magic: int, numbers: dict[int, int]) -> bytes:
    """An image of one entry, of fields that are numbers."""
    entry = b"".join(varint(which << 3) + varint(value) for which, value in numbers.items())
    return struct.pack("<III", COMMON, magic, len(entry)) + entry


def make_listings() -> tuple[Case, ...]:
    """Connections files: one by hand, and what natkeep writes for each dump."""
    found = [read_checkpoint(directory).connections for directory in _directories()]
    written = [write_listing(connections).encode() for connections in found if len(connections)]
    return tuple({LISTING: text} for text in (_BY_HAND, *written))


def make_journals() -> tuple[Case, ...]:
    """State directories with one move each: prepared, opened in part, undone, and a quiesce."""
    found = []
    for number, directory in enumerate(_directories()):
        checkpoint = read_checkpoint(directory)
        if len(checkpoint.connections):
            found.append(_make_journal(checkpoint, quiesces=False, records=3 * number))
    return (*found, _make_journal(read_checkpoint(_directories()[2]), quiesces=True, records=1))


def _make_steps(
    move: Move, connections: Connections, listeners: tuple[Endpoint, ...]
) -> Iterator[Step]:
    """A step of each form of undo: names, an address, connections, listeners, a lock."""
    (destination, gateway, source), map_ = move.sites, move.maps[0]
    kept = connections.at(map_.old)
    outer = kept.toward(map_.new)
    yield HoldListeners(source, move.id, listeners)
    yield AddAddress(destination, map_.old)
    yield InsertEntries(
        destination, Translation(destination, 0, map_, move.mode, kept, outer, kept)
    )
    yield ForgetCalls(gateway, make_receptions(move, gateway))
    if move.lock is not None:
        yield TakeOverLock(source, move.lock, kept)


def _make_journal(checkpoint: Checkpoint, *, quiesces: bool, records: int) -> Case:
    maps = [("10.2.0.10", "10.3.0.20"), ("fd00:2::10", "fd00:3::20")]
    pairs = tuple(Map(parse_address(old), parse_address(new)) for old, new in maps)
    listeners = checkpoint.listeners_at([pair.old for pair in pairs])
    move = Move(
        ID,
        pairs,
        (Site(Role.DESTINATION, "dst"), Site(Role.GATEWAY, "pid:7"), Site(Role.SOURCE)),
        mode=Mode.STATEFUL if records % 2 else Mode.STATELESS,
        listeners=() if quiesces else listeners,
        lock=checkpoint.lock,
        held=listeners,
        quiesces=quiesces,
    )
    # A gateway that carried one of them already, at an address of its own.
    carried = Connections(v4=checkpoint.connections.v4[:12])
    carriers = carried.toward(parse_address("192.0.2.1"))
    surroundings = Surroundings(frozenset({parse_address("10.1.0.2")}), carried, carriers)
    kinds = ("InstallGate", "AddAddress", "HoldListeners", "FillSet", "OpenGate")
    with tempfile.TemporaryDirectory() as place:
        written = StateDirectory(place, create=True).begin(
            move,
            checkpoint.connections,
            surroundings,
            tuple(Identity(4, 4026531840 + number, 1 + number) for number in range(3)),
            kinds,
            image=checkpoint.run_id,
            before=(0, 1, 2, 3),
        )
        steps = [*_make_steps(move, checkpoint.connections, listeners)]
        for number in range(records):
            which, state = number // 3 % len(kinds), ("doing", "done", "undone")[number % 3]
            prior = Prior(number % 2 == 0, {"acct": "0", "addresses": number})
            written.note(which, state, prior, steps[which % len(steps)])
        files = {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
    boot = read_boot_id().encode()
    seen = {"boot": BOOT, "at": 81_234_567, "alive": [[3, "f"]], "ended": [[4, "10"]]}
    files[f"{ID}.seen"] = json.dumps(seen).encode() + b"\n"
    return {name: data.replace(boot, BOOT.encode()) for name, data in files.items()}
