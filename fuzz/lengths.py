"""the proof, not a sample, that each damaged length is refused: every length of every seed.

    an image      the size of each entry, of each field that natkeep reads, skips or looks into,
                  and of each queue
    a journal     the six lengths in ID.connections, with the digest of the journal made right

Each is replaced by every number from 0 to NEAR beyond itself (up to `far`), by those around it
and around what follows it, and by the numbers that have led astray before (-1, 2^31 - 1, ...),
once with the lengths around it as they were and once with them made right. What is no damage is
known by its octets: they are the seed's.

Rule: it is decided without natkeep's readers where the lengths are (structure.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fuzz.mutants import WRONG, sign
from fuzz.seeds import ID, Case
from fuzz.structure import Length, read_structure, splice
from fuzz.targets import Images, Journals, Target
from natkeep.errors import NatkeepError

NEAR = 3
FAR = 300


@dataclass(slots=True)
class Proof:
    """How many lengths, how many mutants of them, and those that were not refused."""

    lengths: int = 0
    mutants: int = 0
    tolerated: tuple[str, ...] = ()


def wrong_values(right: int, room: int, far: int) -> Iterator[int]:
    """What a length may turn into; *room*: how many octets follow it."""
    near = range(min(right + NEAR, far))
    around = (right + each for each in range(-NEAR, NEAR + 1))
    ends = (room - 1, room, room + 1, 2 * right, right ^ 0x80, right + (1 << 32))
    yield from sorted({v for v in (*near, *around, *ends, *WRONG) if v >= 0 and v != right})


def damage_image(data: bytes, length: Length, far: int) -> Iterator[tuple[int, bytes]]:
    """Each mutant of *data* in which *length* is wrong, with the value that it has there."""
    for value in wrong_values(length.value, len(data) - length.end, far):
        code = length.encode(value)
        made = {splice(data, length.at, length.end, code, e) for e in ((), length.enclosing)}
        yield from ((value, each) for each in made if each != data)


def damage_columns(case: Case, far: int) -> Iterator[tuple[str, Case]]:
    """Each state directory in which one length in ID.connections is wrong, and signed."""
    name = f"{ID}.connections"
    packed, at = case.get(name, b""), 0
    while at < len(packed):
        right = int.from_bytes(packed[at : at + 8], "big")
        for value in wrong_values(right, len(packed) - at - 8, far):
            code = (value & (1 << 64) - 1).to_bytes(8, "big")
            mutant = {**case, name: packed[:at] + code + packed[at + 8 :]}
            sign(mutant, case)
            yield f"{name}, octet {at}: {value} for {right}", mutant
        at += 8 + right


def prove(targets: tuple[Target, ...] | None = None, far: int = FAR) -> Proof:
    """Try all lengths; `tolerated` is empty if each mutant was refused with the right error."""
    proof = Proof()
    for target in targets or (Images(), Journals()):
        if isinstance(target, Images):
            _prove_images(target, proof, far)
        else:
            _prove_journals(target, proof, far)
    return proof


def _prove_images(target: Images, proof: Proof, far: int) -> None:
    seen: set[bytes] = set()
    for case in target.seeds:
        for name, data in case.items():
            mark = hashlib.sha256(name.encode() + data).digest()
            if mark in seen or name not in target.files_read(case):
                continue
            seen.add(mark)
            for length in read_structure(name, data).lengths:
                proof.lengths += 1
                for value, mutant in damage_image(data, length, far):
                    where = f"{name}, octet {length.at}, {length.what}: {value} for {length.value}"
                    _demand_refusal(target, {**case, name: mutant}, where, proof)


def _prove_journals(target: Target, proof: Proof, far: int) -> None:
    for case in target.seeds:
        proof.lengths += 6 if f"{ID}.connections" in case else 0
        for where, mutant in damage_columns(case, far):
            _demand_refusal(target, mutant, where, proof)


def _demand_refusal(target: Target, case: Case, where: str, proof: Proof) -> None:
    proof.mutants += 1
    try:
        target.read(case)
    except NatkeepError as error:
        if type(error) is target.refusal:
            return
    proof.tolerated += (where,)
