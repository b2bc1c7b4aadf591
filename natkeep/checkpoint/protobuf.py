"""the strict reader of protobuf messages, as far as CRIU's images need it.

Rule: decode() looks at each octet of a message exactly once and either understands it, or skips
it by a known wire type, or raises Damage. Truncated messages, overlong numbers, a field of the
wrong wire type, a field twice and a missing field are damage; only unknown fields are skipped.
So are fields out of order: all that writes CRIU's images writes them by number, and behind a
length that is too short its own contents go on as if they were fields of what is around them.
This file must never guess: protobuf's own "last one wins" hides what a damaged image lost.

    message = fields        field = key, value        key = number << 3 | wire type, a varint
    wire type 0: varint     1: eight octets     2: size (a varint), octets     5: four octets
"""

from __future__ import annotations

_UINT32 = 0xFFFFFFFF
_MAX_WORDS = 16  # octets: an address has four words, and to join more would take their square

# What a key stands for in a message; any other key is an unknown field, to be skipped.
_NUMBER, _OCTETS, _WORD, _PACKED = range(4)


class Damage(ValueError):
    """*what* is wrong with a message at *offset* of its octets."""

    def __init__(self, offset: int, what: str) -> None:
        super().__init__(what)
        self.offset = offset
        self.what = what


def number(field: int) -> int:
    """The key under which decode() files the number of *field*: wire type 0."""
    return field << 3


def octets(field: int) -> int:
    """The key under which decode() files the octets of *field*: wire type 2."""
    return field << 3 | 2


class Message:
    """What has to be known of a message: its fields by number.

    numbers: uint32, enum and bool fields. octets: strings and messages. words: repeated uint32,
    packed or not, at most four, filed as octets (four a word, little-endian). optional: names
    that may be missing; words always may. wide: those of numbers that are uint64. unknown_below:
    an unknown field of this number or a higher one is damage; what follows a message whose length
    is too long would pass for that.
    """

    def __init__(
        self,
        name: str,
        *,
        numbers: dict[int, str],
        octets: dict[int, str] | None = None,
        words: dict[int, str] | None = None,
        optional: str = "",
        wide: frozenset[int] = frozenset(),
        unknown_below: int = 1 << 29,
    ) -> None:
        octets, words = octets or {}, words or {}
        self.name = name
        self.unknown_below = unknown_below
        self.wide = wide
        self.fields = {**numbers, **octets, **words}
        self.roles = {field << 3: _NUMBER for field in numbers}
        self.roles |= {field << 3 | 2: _OCTETS for field in octets}
        self.roles |= {field << 3: _WORD for field in words}
        self.roles |= {field << 3 | 2: _PACKED for field in words}
        missing = optional.split()
        self.numbers = frozenset(n << 3 for n in numbers if numbers[n] not in missing)
        self.octets = frozenset(n << 3 | 2 for n in octets if octets[n] not in missing)


def decode(data: bytes, message: Message) -> tuple[dict[int, int], dict[int, bytes]]:
    """The numbers and the octets in *data*, by key (see `number` and `octets`).

    The short cases of a varint are written out: the loop runs 25 times a socket, of 100,000.
    """
    numbers: dict[int, int] = {}
    strings: dict[int, bytes] = {}
    at, end, roles, last = 0, len(data), message.roles, 0
    try:
        while at < end:
            start = at
            key = data[at]
            at += 1
            if key > 127:
                key, at = _varint(data, start)
            if key < last:
                raise _damage(message, start, key, "is out of order")
            last = key
            role = roles.get(key)
            if role is None:
                at = _skip(data, message, start, key, at)
                continue
            value = data[at]
            at += 1
            if value > 127:
                if data[at] < 128:
                    value += (data[at] - 1) << 7
                    at += 1
                else:
                    value, at = _uint32(data, message, start, key, at - 1)
            if role == _NUMBER:
                if key in numbers:
                    raise _damage(message, start, key, "is there twice")
                numbers[key] = value
            elif role == _WORD:
                _add_words(strings, message, start, key | 2, value.to_bytes(4, "little"))
            else:
                _add_octets(strings, message, start, key, data[at : at + value], value)
                at += value
    except IndexError:
        raise Damage(end, f"{message.name} ends in the middle of a field") from None
    if numbers.keys() >= message.numbers and strings.keys() >= message.octets:
        return numbers, strings
    key = min((message.numbers - numbers.keys()) | (message.octets - strings.keys()))
    raise _damage(message, end, key, "is missing")


def _add_octets(
    strings: dict[int, bytes], message: Message, start: int, key: int, octets: bytes, size: int
) -> None:
    if len(octets) != size:
        raise _damage(message, start, key, f"{size} octets, {len(octets)} are left")
    if message.roles[key] == _PACKED:
        _add_words(strings, message, start, key, _unpack(message, start, key, octets))
    elif key in strings:
        raise _damage(message, start, key, "is there twice")
    else:
        strings[key] = octets


def _add_words(
    strings: dict[int, bytes], message: Message, start: int, key: int, words: bytes
) -> None:
    strings[key] = words = strings.get(key, b"") + words
    if len(words) > _MAX_WORDS:
        raise _damage(message, start, key, "more than four words")


def _uint32(data: bytes, message: Message, start: int, key: int, at: int) -> tuple[int, int]:
    """The number of a field at *at*, and where it ends."""
    value, at = _varint(data, at)
    if value > _UINT32 and key >> 3 not in message.wide:
        raise _damage(message, start, key, f"{value} is more than 32 bits")
    return value, at


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """The varint at *start*, and where it ends; IndexError if it does not."""
    value = shift = 0
    at = start
    while True:
        octet = data[at]
        at += 1
        value |= (octet & 127) << shift
        if octet < 128:
            break
        shift += 7
        if shift > 63:
            raise Damage(start, "a number of more than 10 octets")
    if value >> 64:
        raise Damage(start, "a number of more than 64 bits")
    return value, at


def _skip(data: bytes, message: Message, start: int, key: int, at: int) -> int:
    """Where the unknown field ends whose value begins at *at*."""
    kind = key & 7
    if key >> 3 in message.fields or not key >> 3:  # a known one, in another wire type
        raise _damage(message, start, key, f"of wire type {kind}")
    if key >> 3 >= message.unknown_below:
        raise _damage(message, start, key, "is not known")
    if kind == 0:
        return _varint(data, at)[1]
    if kind == 2:
        size, at = _varint(data, at)
    elif kind in (1, 5):
        size = 8 if kind == 1 else 4
    else:  # 3 and 4 are groups, which CRIU has never used
        raise _damage(message, start, key, f"of wire type {kind}")
    if size > len(data) - at:
        raise _damage(message, start, key, f"{size} octets, {len(data) - at} are left")
    return at + size


def _unpack(message: Message, start: int, key: int, data: bytes) -> bytes:
    """The words of a packed field, or one more than there may be."""
    words, at = b"", 0
    try:
        while at < len(data) and len(words) <= _MAX_WORDS:
            value, at = _uint32(data, message, start, key, at)
            words += value.to_bytes(4, "little")
    except IndexError:
        raise _damage(message, start, key, "ends in the middle of a number") from None
    return words


def _damage(message: Message, start: int, key: int, what: str) -> Damage:
    name = message.fields.get(key >> 3)
    field = f"{name} (field {key >> 3})" if name else f"field {key >> 3}"
    return Damage(start, f"{message.name}: {field}: {what}")
