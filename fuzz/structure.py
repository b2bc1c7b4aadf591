"""the map of an image: where its entries, fields and lengths are.

Rule: nothing of natkeep is used here, for this is what its readers are held against. It reads
good images only (the seeds) and fails on others.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

Nested = dict[int, "Nested"]

# By the beginning of the image's name: how many magics, and which fields are messages that
# natkeep looks into. What it does not look into is octets to it, whatever they mean to CRIU.
SHAPES: dict[str, tuple[int, Nested]] = {
    "files": (2, {4: {14: {}}}),
    "inventory": (1, {3: {}}),
    "fdinfo": (2, {}),
    "tcp-stream": (2, {}),
    "pstree": (2, {}),
    "ids": (2, {}),
}
QUEUES = (1, 3)  # inq_len and outq_len: the lengths of what follows the entry


@dataclass(frozen=True, slots=True)
class Length:
    """A number at data[at:end] that says how long something is.

    kind: `entry` (u32), `field` (a varint) or `queue` (a varint; what it counts stands elsewhere).
    enclosing: the lengths of what it stands in, outermost first.
    """

    kind: str
    what: str
    at: int
    end: int
    value: int
    enclosing: tuple[Length, ...] = ()

    def encode(self, value: int) -> bytes:
        """*value* as it would stand there, cut to what can be written."""
        if self.kind == "entry":
            return struct.pack("<I", value & 0xFFFFFFFF)
        return varint(value & 0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Field:
    """A field at data[at:end], its value from `value` on; number: None for one without a value."""

    at: int
    value: int
    end: int
    number: int | None
    enclosing: tuple[Length, ...]


@dataclass(slots=True)
class Structure:
    """An image in parts; entries are (at, end) with their size."""

    entries: list[tuple[int, int]] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)


def varint(value: int) -> bytes:
    """As protobuf writes a number."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def shape_of(image: str) -> tuple[int, Nested]:
    """How many magics *image* has, and which fields nest."""
    return next(shape for name, shape in SHAPES.items() if image.startswith(name))


def read_structure(image: str, data: bytes) -> Structure:
    """The parts of *data*, a good image of that name."""
    magics, nested = shape_of(image)
    found = Structure()
    at = 4 * magics
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        end = at + 4 + size
        length = Length("entry", "size of an entry", at, at + 4, size)
        found.entries.append((at, end))
        found.lengths.append(length)
        _read_message(found, data, at + 4, end, nested, (length,), image)
        at = len(data) if image.startswith("tcp-stream") else end
    return found


def _read_message(
    found: Structure,
    data: bytes,
    at: int,
    end: int,
    nested: Nested,
    enclosing: tuple[Length, ...],
    image: str,
) -> None:
    while at < end:
        start = at
        key, at = _read_varint(data, at)
        which, kind = key >> 3, key & 7
        begin, number = at, None
        if kind == 0:
            number, at = _read_varint(data, at)
            if image.startswith("tcp-stream") and which in QUEUES:
                what = f"length of queue {which}"
                found.lengths.append(Length("queue", what, begin, at, number, enclosing))
        elif kind == 2:
            size, at = _read_varint(data, at)
            what = f"length of field {which} at depth {len(enclosing)}"
            length = Length("field", what, begin, at, size, enclosing)
            found.lengths.append(length)
            if which in nested:
                inner = (*enclosing, length)
                _read_message(found, data, at, at + size, nested[which], inner, image)
            at += size
        else:
            at += {1: 8, 5: 4}[kind]
        found.fields.append(Field(start, begin, at, number, enclosing))
    if at != end:
        raise ValueError(f"{image}: a field ends at {at}, its message at {end}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
        shift += 7


def splice(data: bytes, at: int, end: int, new: bytes, enclosing: tuple[Length, ...] = ()) -> bytes:
    """*data* with *new* instead of data[at:end], and the *enclosing* lengths made right."""
    out = data[:at] + new + data[end:]
    grown = len(new) - (end - at)
    for length in reversed(enclosing):
        code = length.encode(max(length.value + grown, 0))
        out = out[: length.at] + code + out[length.end :]
        grown += len(code) - (length.end - length.at)
    return out
