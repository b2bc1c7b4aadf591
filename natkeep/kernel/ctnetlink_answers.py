"""Reads what conntrack entries say: status, state, counters, and their other attributes.

Rule: as ctnetlink.py, which packs: it knows what stands where in a message, and sends nothing.
Of a hundred thousand entries most have the same attributes, so where a value stands is found out
once for all that have the same headers (`make bench`: status of a thousand moves).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from natkeep.kernel.ctnetlink import (
    COUNTERS_ORIG,
    COUNTERS_REPLY,
    HELP,
    LABELS,
    MARK,
    NFGENMSG,
    PROTOINFO,
    SECCTX,
    SEQ_ORIG,
    SEQ_REPLY,
    STATUS_BITS,
    SYNPROXY,
    TIMEOUT,
    TUPLE_ORIG,
    TUPLE_REPLY,
    TUPLE_ZONE,
    ZONE,
)
from natkeep.kernel.netlink import attributes
from natkeep.plan.entry_attributes import ORIGINAL, REPLY, USUAL, Attributes


class Said(NamedTuple):
    """What an entry says.

    status: its bits; state: TCP's; packets in the original and in the reply direction, None where
    they are not counted.
    """

    status: int
    state: int
    original: int | None
    reply: int | None


def read_said(answer: bytes) -> Said:
    """What an entry says, of an answer's nfgenmsg and attributes."""
    status, state, original, reply = _find_shape(answer).places
    return Said(
        int.from_bytes(answer[status], "big"),
        int.from_bytes(answer[state], "big"),
        int.from_bytes(answer[original], "big") if original.stop else None,
        int.from_bytes(answer[reply], "big") if reply.stop else None,
    )


def read_attributes(
    answer: bytes, usual_timeout: int = 0, *, process_dialled: bool = False
) -> Attributes:
    """What an entry says beside its tuples, in the direction that it has.

    usual_timeout: what an entry gets anew, or 0 where its time-out does not matter.
    """
    shape = _find_shape(answer)
    left = int.from_bytes(answer[shape.timeout], "big")
    left = left if usual_timeout and left > usual_timeout else 0
    if not shape.attributes and not left:
        return USUAL[process_dialled]
    values = tuple([answer[place] for _, place in shape.attributes])
    names = tuple([name for name, _ in shape.attributes])
    return _make_attributes(names, values, left, process_dialled)


@lru_cache(maxsize=1 << 10)  # of many connections most say the same
def _make_attributes(
    names: tuple[str, ...], values: tuple[bytes, ...], left: int, process_dialled: bool
) -> Attributes:
    found: dict[str, Any] = {}
    for name, value in zip(names, values, strict=True):
        if name in ("mark", "zone"):
            found[name] = int.from_bytes(value, "big")
        elif name in (ORIGINAL, REPLY):
            found |= {"zone": int.from_bytes(value, "big"), "zone_of": name}
        elif name in ("helper", "secmark"):
            found[name] = value.rstrip(b"\0").decode("ascii", "replace")
        elif name != "synproxy" or any(map(any, attributes(value).values())):
            found[name] = value.hex()  # of zeros a kernel gives one to each entry that is inserted
    made = Attributes(timeout=left, process_dialled=process_dialled, **found)
    usual = USUAL[process_dialled]
    return usual if made == usual else made  # the same object, which is compared at once


class _Shape(NamedTuple):
    """The headers of an entry's attributes, and where the values stand.

    places: those of `Said`; attributes: of what else it says, by the names of `Attributes`.
    """

    heads: struct.Struct
    usual: tuple[bytes, ...]
    places: tuple[slice, ...]
    timeout: slice
    attributes: tuple[tuple[str, slice], ...]


def _find_shape(answer: bytes) -> _Shape:
    shape = _shapes.get(len(answer))
    if shape is None or shape.heads.unpack_from(answer) != shape.usual:
        shape = _shapes[len(answer)] = _make_shape(answer)
    return shape


_shapes: dict[int, _Shape] = {}
_NESTS = (
    *((PROTOINFO,), (PROTOINFO, 1), (COUNTERS_ORIG,), (COUNTERS_REPLY,)),
    *((TUPLE_ORIG,), (TUPLE_REPLY,), (HELP,), (SECCTX,)),
)
_NAMED = {
    (ZONE,): "zone",
    (TUPLE_ORIG, TUPLE_ZONE): ORIGINAL,
    (TUPLE_REPLY, TUPLE_ZONE): REPLY,
    (MARK,): "mark",
    (LABELS,): "labels",
    (HELP, 1): "helper",
    (SEQ_ORIG,): "seq_original",
    (SEQ_REPLY,): "seq_reply",
    (SYNPROXY,): "synproxy",
    (SECCTX, 1): "secmark",
}
_SAID = ((STATUS_BITS,), (PROTOINFO, 1, 1), (COUNTERS_ORIG, 1), (COUNTERS_REPLY, 1))


def _make_shape(answer: bytes) -> _Shape:
    found = [*_find_heads(answer, NFGENMSG, len(answer), ())]
    form, at = "", 0
    for start, _, _ in found:
        form, at = f"{form}{start - at}x4s", start + 4
    heads = struct.Struct(form)
    places = {path: slice(start + 4, end) for start, end, path in found}
    nowhere = slice(0, 0)
    return _Shape(
        heads,
        heads.unpack_from(answer),
        tuple(places.get(path, nowhere) for path in _SAID),
        places.get((TIMEOUT,), nowhere),
        tuple((name, places[path]) for path, name in _NAMED.items() if path in places),
    )


def _find_heads(
    data: bytes, at: int, end: int, path: tuple[int, ...]
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Where each attribute starts and ends, also in those that are looked into, and its path."""
    while at + 4 <= end:
        length, type_ = struct.unpack_from("=HH", data, at)
        here = (*path, type_ & 0x3FFF)  # NLA_TYPE_MASK
        yield at, at + length, here
        if here in _NESTS:
            yield from _find_heads(data, at + 4, at + length, here)
        at += max(4, (length + 3) & ~3)
