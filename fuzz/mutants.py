"""the way from a seed to a mutant: by octets, or by what the octets mean.

    make_mutant(target, rng) takes a seed and changes one of its files, seldom two

What is changed by its meaning: an image's entries (twice, swapped, gone), its fields (twice, gone,
another number) and its lengths, with the lengths around them made right or not; a journal's lines
and each JSON value in them, its packed connections with the digest made right or not; the words
and lines of a text. Now and then a part is blown up, since a reader that takes the square of the
time is quick with all small inputs.

Rule: a mutant depends on the seeds and the generator only; see Mutator.make.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence

from fuzz.seeds import ID, LISTING, Case
from fuzz.structure import Structure, read_structure, shape_of, splice, varint

MAX_MUTANT = 256 << 10
"""Octets of a file; seeds have up to 3,300. Enough for whatever is not linear to take seconds."""

WRONG = (0, 1, 127, 128, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
"""Lengths and numbers that have led astray before: -1 of 32 and of 64 bits are among them."""

_OCTETS = bytes((0, 1, 2, 10, 0x1A, 0x22, 32, 34, 58, 91, 127, 128, 255))
_VALUES: tuple[str, ...] = (
    *("null", "true", "false", "0", "-1", "1e999", "-Infinity", "NaN", "0.5", "1" * 5000),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"10.2.0.10"', '"[::]:0"', '"auto"'),
    *('"10.2.0.10:5000"', '"fe80::1%eth0"', '"../../etc"', '"undone"', '"source"', "167903242"),
    *("[]", "{}", "[[]]", "[null]", '{"id":"web"}', str(1 << 31), str(1 << 64)),
    *('"' + "9" * 5000 + '"', "[1,2]", "[[1,2]]", '"ab"'),
)  # fmt: skip
_WORDS: tuple[bytes, ...] = (
    *(b"10.2.0.10:5000", b"[fd00:2::10]:1", b"[::ffff:10.2.0.10]:5000", b"10.1.0.2:65535"),
    *(b"10.1.0.2:65536", b"10.1.0.2:0", b":1", b"1:", b"[::1%lo]:1", b"[]:1", b"[[::1]]:1"),
    *(b"0x0a.2.0.10:1", b"010.2.0.10:1", b"::1:80", b"10.2.0.10:" + b"9" * 5000, b"#", b"\0"),
    *(
        "\u0661\u0660:\u0663".encode(),
        "\u2028".encode(),
        b"\xff",
        b"\x85",
        b"\x1c",
        b"\r",
        b"\x0b",
        b"-1:-1",
    ),
)

Change = Callable[[random.Random, bytes], bytes]


class Mutator:
    """Makes mutants of *seeds*; what has to be known of each is found out once."""

    def __init__(self, seeds: Sequence[Case]) -> None:
        self.seeds = seeds
        self.structures: dict[tuple[str, bytes], Structure] = {
            (name, data): read_structure(name, data)
            for seed in seeds
            for name, data in seed.items()
            if name.endswith(".img")
        }
        self.donors = [data for seed in seeds for data in seed.values()]

    def make(self, rng: random.Random) -> Case:
        """A mutant; the same for a generator in the same state."""
        seed = rng.choice(self.seeds)
        case = dict(seed)
        for _ in range(2 if rng.random() < 0.05 else 1):
            name = self._pick_file(rng, seed)
            if rng.random() < 0.005:
                del case[name]
                return case if name != LISTING else {LISTING: b""}
            case[name] = self.change(rng, name, case[name])
        if f"{ID}.journal" in case and rng.random() < 0.5:
            sign(case, seed)
        return case

    def change(self, rng: random.Random, name: str, data: bytes) -> bytes:
        """*data* of a file of that name, changed one to four times."""
        known = self.structures.get((name, data))
        if known is not None and rng.random() < 0.6:
            data = change_image(rng, name, data, known)
            if rng.random() < 0.8:
                return data
        elif name.endswith((".journal", ".seen")) and rng.random() < 0.6:
            data = change_journal(rng, data)
            if rng.random() < 0.8:
                return data
        elif name == LISTING and rng.random() < 0.6:
            data = change_words(rng, data)
        elif name.endswith(".connections") and rng.random() < 0.6:
            data = change_columns(rng, data)
        else:
            data = self.change_octets(rng, data)
        while rng.random() < 0.3:
            data = self.change_octets(rng, data)
        return data

    def change_octets(self, rng: random.Random, data: bytes) -> bytes:
        """*data* changed in one place, without regard to what it means."""
        at = int(rng.random() * (len(data) + 1))
        end = min(len(data), at + 1 + int(rng.random() ** 3 * 40))  # mostly a few
        match int(rng.random() * 9):
            case 0:  # flip a bit
                if at < len(data):
                    octet = data[at] ^ 1 << int(rng.random() * 8)
                    return data[:at] + bytes((octet,)) + data[at + 1 :]
            case 1:  # another octet
                return data[:at] + bytes((rng.choice(_OCTETS),)) + data[at + 1 :]
            case 2:  # insert
                return data[:at] + rng.randbytes(end - at) + data[at:]
            case 3:  # delete
                return data[:at] + data[end:]
            case 4:  # truncate
                return data[:at]
            case 5:  # twice
                return data[:end] + data[at:]
            case 6:  # a number of 32 bits
                code = (rng.choice(WRONG) & 0xFFFFFFFF).to_bytes(4, "little")
                return data[:at] + code + data[at + 4 :]
            case 7:  # a piece of another file
                donor = rng.choice(self.donors)
                begin = int(rng.random() * (len(donor) + 1))
                return data[:at] + donor[begin : begin + end - at + 8] + data[end:]
            case 8 if rng.random() < 0.01:  # many times
                return blow_up(rng, data, at, end)
        return data + b"\n" if rng.random() < 0.1 else data[:at] + b"\0" + data[at:]

    def _pick_file(self, rng: random.Random, seed: Case) -> str:
        for name in ("files.img", f"{ID}.journal", LISTING):
            if name in seed and rng.random() < 0.6:
                return name
        return rng.choice(list(seed))


def sign(case: Case, seed: Case) -> None:
    """Make the digest in the journal right, so that the reader goes on to what was signed."""
    name = f"{ID}.connections"
    if name in case and case[name] is not seed.get(name):
        before, after = (hashlib.sha256(each[name]).hexdigest().encode() for each in (seed, case))
        journal = f"{ID}.journal"
        if journal in case:
            case[journal] = case[journal].replace(before, after)


def blow_up(rng: random.Random, data: bytes, at: int, end: int) -> bytes:
    """data[at:end] as often as makes up to MAX_MUTANT octets."""
    room = max(MAX_MUTANT - len(data), 0) >> int(rng.random() * 12)
    part = data[at:end] or b"\0"
    return data[:at] + part * (room // len(part)) + data[at:]


# ---- images ------------------------------------------------------------------------------


def change_image(rng: random.Random, name: str, data: bytes, known: Structure) -> bytes:
    """A good image with one thing wrong in it, or one thing different."""
    match int(rng.random() * 7):
        case 0 | 1:
            return _change_length(rng, data, known)
        case 2:
            return _change_entries(rng, data, shape_of(name)[0], known)
    field = rng.choice(known.fields)
    enclosing = field.enclosing
    match int(rng.random() * 5):
        case 0:  # twice, or many times
            times = 1
            if rng.random() < 0.02:
                times = (MAX_MUTANT // (field.end - field.at)) >> int(rng.random() * 12)
            copies = data[field.at : field.end] * times
            return splice(data, field.end, field.end, copies, enclosing)
        case 1:  # gone
            return splice(data, field.at, field.end, b"", enclosing)
        case 2:  # of another key
            key = varint(int(rng.random() * 24) << 3 | int(rng.random() * 8))
            return splice(data, field.at, field.value, key, enclosing)
        case 3 if field.number is None:  # other octets
            octets = rng.randbytes(int(rng.random() * 40))
            code = varint(len(octets)) + octets
            return splice(data, field.value, field.end, code, enclosing)
    number = field.number or 0
    value = rng.choice((*WRONG, number + 1, number ^ 1, int(rng.random() * 70000)))
    code = varint(value) if rng.random() < 0.9 else b"\x80" * int(rng.random() * 12) + b"\0"
    return splice(data, field.value, field.end, code, enclosing)


def _change_length(rng: random.Random, data: bytes, known: Structure) -> bytes:
    length = rng.choice(known.lengths)
    near = length.value + rng.choice((-2, -1, 1, 2, length.value))
    value = rng.choice((*WRONG, near, near, near, int(rng.random() * 2 * (length.value + 1))))
    enclosing = length.enclosing if rng.random() < 0.5 else ()
    return splice(data, length.at, length.end, length.encode(value), enclosing)


def _change_entries(rng: random.Random, data: bytes, magics: int, known: Structure) -> bytes:
    entries = [data[at:end] for at, end in known.entries]
    tail = data[known.entries[-1][1] :]
    one, other = (int(rng.random() * len(entries)) for _ in range(2))
    match int(rng.random() * 5):
        case 0:
            entries.insert(other, entries[one])
        case 1:
            entries[one], entries[other] = entries[other], entries[one]
        case 2:
            del entries[one]
        case 3:
            rng.shuffle(entries)
        case 4:
            entries = entries[: one + 1]
    return data[: 4 * magics] + b"".join(entries) + tail


# ---- the journal -------------------------------------------------------------------------


def change_journal(rng: random.Random, data: bytes) -> bytes:
    """A journal with a line or a JSON value changed."""
    lines = data.split(b"\n")[:-1] or [b"{}"]
    at = 0 if rng.random() < 0.6 else int(rng.random() * len(lines))
    match int(rng.random() * 10):
        case 0:
            lines.insert(int(rng.random() * len(lines)), lines[at])
        case 1:
            del lines[at]
        case 2:
            rng.shuffle(lines)
        case 3:
            lines[at] = _nest(rng, lines[at])
        case _:
            lines[at] = _change_value(rng, lines[at])
    return b"\n".join((*lines, b""))


def _nest(rng: random.Random, line: bytes) -> bytes:
    depth = 1 << int(rng.random() * 13)
    opening, closing = rng.choice(((b"[", b"]"), (b'{"":', b"}")))
    at = line.find(b":", int(rng.random() * len(line))) + 1
    return line[:at] + opening * depth + b"0" + closing * depth + b"," + line[at:]


def _change_value(rng: random.Random, line: bytes) -> bytes:
    """One value of the JSON in *line* replaced, dropped, doubled or renamed."""
    try:
        root = json.loads(line)
    except (ValueError, RecursionError):
        return rng.choice(_VALUES).encode()
    place, key = _pick_place(rng, {"": root})
    mark = "\x00here"
    match int(rng.random() * 6):
        case 0 if key != "":
            del place[key]
        case 1 if isinstance(place, list):
            place.append(place[key])
        case 1 if key != "":
            place[str(key) + "s"] = place.pop(key)
        case _:
            place[key] = mark
            if key == "" and place[key] is mark:
                root = mark
    text = json.dumps(root)
    return text.replace(json.dumps(mark), rng.choice(_VALUES)).encode("utf-8", "surrogatepass")


def _pick_place(rng: random.Random, top: dict) -> tuple:
    """Any value in *top*, as what it stands in and its key there."""
    place, key = top, ""
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else int(rng.random() * len(place))
    return place, key


def change_columns(rng: random.Random, data: bytes) -> bytes:
    """Packed connections with one of the six lengths wrong."""
    starts, at = [], 0
    while at + 8 <= len(data):
        starts.append(at)
        at += 8 + int.from_bytes(data[at : at + 8], "big")
    at = rng.choice(starts or [0])
    value = int.from_bytes(data[at : at + 8], "big")
    near = value + rng.choice((-36, -12, -1, 1, 12, 36))
    wrong = rng.choice((*WRONG, near, near)) & 0xFFFFFFFFFFFFFFFF
    return data[:at] + wrong.to_bytes(8, "big") + data[at + 8 :]


# ---- text --------------------------------------------------------------------------------


def change_words(rng: random.Random, data: bytes) -> bytes:
    """A list with words or lines changed."""
    lines = data.split(b"\n")
    at = int(rng.random() * len(lines))
    words = lines[at].split(b" ")
    word = int(rng.random() * len(words))
    match int(rng.random() * 8):
        case 0:
            lines.insert(int(rng.random() * len(lines)), lines[at])
        case 1:
            del lines[at]
        case 2:
            words.reverse()
            lines[at] = b" ".join(words)
        case 3:
            words.insert(word, rng.choice(_WORDS))
            lines[at] = b" ".join(words)
        case 4:
            host, _, port = words[word].rpartition(b":")
            port = str(rng.choice((*WRONG, 65535, 65536, int(rng.random() * 70000)))).encode()
            words[word] = host + b":" + port
            lines[at] = b" ".join(words)
        case 5:
            lines[at] = rng.choice((b"\t", b"\r\n", b" # ", b"#")).join(words)
        case _:
            words[word] = rng.choice(_WORDS)
            lines[at] = b" ".join(words)
    return b"\n".join(lines)
