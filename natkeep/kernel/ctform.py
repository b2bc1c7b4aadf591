"""the form of connection-tracking entries: what many that are alike say, read by where it stands.

Rule: a value is taken from where it stands only after each attribute header up to there was found
to be as in an entry that was taken apart; whatever looks different is taken apart itself. Nothing
is asked of the kernel here.

What is read is the *rest* of an entry: what the kernel writes behind its two tuples.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from natkeep.kernel.ctnetlink import (
    COUNTERS_ORIG,
    COUNTERS_REPLY,
    PROTOINFO,
    STATUS_BITS,
    Said,
    read_said,
)
from natkeep.kernel.netlink import attributes, column

_TYPE = 0x3FFF
_PARENTS = {(PROTOINFO,), (PROTOINFO, 1), (COUNTERS_ORIG,), (COUNTERS_REPLY,)}
_WIDTHS = {
    (STATUS_BITS,): 4, (PROTOINFO, 1, 1): 1, (PROTOINFO, 1, 4): 2,
    (COUNTERS_ORIG, 1): 8, (COUNTERS_REPLY, 1): 8,
}  # fmt: skip
"""The attributes that are read, by their path and in the order of Said, and their octets."""


class Columns(NamedTuple):
    """What several entries say, each field of all of them (see ctnetlink.Said)."""

    bits: Sequence[int]
    states: Sequence[int]
    flags: Sequence[int]
    inward: Sequence[int | None]
    outward: Sequence[int | None]


class Forms:
    """What entries of each length look like, as far as they have been seen."""

    def __init__(self) -> None:
        self._forms: dict[int, _Form] = {}

    def read(self, rests: Sequence[bytes]) -> Columns:
        """What each of these entries, one at least, says."""
        sizes = {*map(len, rests)}
        if len(sizes) == 1:
            return self._read_alike(rests)
        found: dict[int, Said] = {}
        for size in sizes:  # those of one length are alike, as a rule
            places = [place for place, rest in enumerate(rests) if len(rest) == size]
            columns = self._read_alike([rests[place] for place in places])
            found.update(zip(places, zip(*columns, strict=True), strict=True))
        return Columns(*zip(*map(found.__getitem__, range(len(rests))), strict=True))

    def _read_alike(self, rests: Sequence[bytes]) -> Columns:
        size, joined = len(rests[0]), b"".join(rests)
        form = self._forms.get(size)
        if form is None:
            form = self._forms[size] = _Form(rests[0])
        if form.fits(joined):
            return form.read(joined)
        return Columns(*zip(*(read_said(attributes(rest)) for rest in rests), strict=True))


class _Form:
    """Where in the rest of an entry each value stands, and the headers that say so."""

    def __init__(self, rest: bytes) -> None:
        self._size = len(rest)
        self._places: dict[tuple[int, ...], int] = {}
        heads: list[tuple[int, bytes]] = []
        self._usual = self._learn(rest, 0, len(rest), (), heads)
        end = self._size
        if len(self._places) == len(_WIDTHS):  # what comes after the last one may be anything
            end = max(self._places.values())
        octets = ((at + i, head[i : i + 1]) for at, head in heads if at < end for i in range(4))
        self._heads = tuple(octets)

    def _learn(
        self, rest: bytes, at: int, end: int, path: tuple[int, ...], heads: list[tuple[int, bytes]]
    ) -> bool:
        """Note the headers from *at* to *end* and the places of values; whether all is as usual."""
        while at + 4 <= end:
            length, type_ = struct.unpack_from("=HH", rest, at)
            here = (*path, type_ & _TYPE)
            if not 4 <= length <= end - at:
                return False
            heads.append((at, rest[at : at + 4]))
            if here in _PARENTS:
                if not self._learn(rest, at + 4, at + length, here, heads):
                    return False
            elif here in _WIDTHS:
                if length != 4 + _WIDTHS[here] or here in self._places:
                    return False
                self._places[here] = at + 4
            at += (length + 3) & ~3
        return at >= end

    def fits(self, joined: bytes) -> bool:
        """Whether all of *joined*, one behind the other, have the headers of this form."""
        size, count = self._size, len(joined) // self._size
        return self._usual and all([joined[at::size] == one * count for at, one in self._heads])

    def read(self, joined: bytes) -> Columns:
        """What each of *joined* says, which must fit."""
        count = len(joined) // self._size
        bits, state, flags, inward, outward = map(self._places.get, _WIDTHS)
        return Columns(
            self._read_numbers(joined, bits, "I") or [0] * count,
            bytes(count) if state is None else joined[state :: self._size],
            bytes(count) if flags is None else joined[flags :: self._size],
            self._read_numbers(joined, inward, "Q") or [None] * count,
            self._read_numbers(joined, outward, "Q") or [None] * count,
        )

    def _read_numbers(self, joined: bytes, at: int | None, kind: str) -> tuple[int, ...]:
        """The number that each has at this place; none where there is no such place."""
        if at is None:
            return ()
        numbers = struct.Struct(f"!{len(joined) // self._size}{kind}")
        width = 4 if kind == "I" else 8
        return numbers.unpack(column(joined, self._size, at, width))
