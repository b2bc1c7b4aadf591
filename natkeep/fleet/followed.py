"""Which order of each move this node has followed last: a file beside the journals.

    DIR/agent.followed: JSON lines, appended and fsynced
        {"id": "web", "generation": 3, "state": "begun", "digest": "..."}

state: `begun` before anything is done, `prepared` when it is, `opened` once it was open (of what a
restore prepares), `expired` where a deadline undid it, `gone` where an order did. digest: of what
was ordered.

A restored backup of the store shows orders of yesterday; without this they would be followed again.
Rule: the line is on disk before what it says is done. A last line without its newline is as if it
were not there.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import NamedTuple

from natkeep.errors import JournalError, RefusedError
from natkeep.fleet.done import Done, Error
from natkeep.fleet.want import Want
from natkeep.state.files import replace_file

NAME = "agent.followed"


class DeadlineError(RefusedError):
    """A gate was not opened in time, and what had been prepared for it is undone."""


EXPIRED = Error.of(DeadlineError("")).code
"""How the store has it."""


class Followed(NamedTuple):
    """The last order of a move that was followed."""

    generation: int
    state: str
    digest: str


class FollowedFile:
    """The file, which one agent at a time has."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, NAME)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._fd).st_nlink:
                raise BlockingIOError  # it was written anew just then
        except BlockingIOError:
            os.close(self._fd)
            raise JournalError(f"another natkeep agent has {self.path}") from None
        self.known: dict[str, Followed] = {}
        self._read()

    def note(self, move_id: str, generation: int, state: str, digest: str) -> None:
        """Have it on disk, unless it is there."""
        followed = Followed(generation, state, digest)
        if self.known.get(move_id) != followed:
            os.write(self._fd, _line(move_id, followed))
            os.fsync(self._fd)
            self.known[move_id] = followed

    def close(self) -> None:
        """Another may have it now."""
        os.close(self._fd)

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            *lines, torn = file.read().split(b"\n")
        try:
            for line in lines:
                found = json.loads(line)
                self.known[str(found["id"])] = Followed(
                    int(found["generation"]), str(found["state"]), str(found["digest"])
                )
        except (KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"{self.path} cannot be read: {error}", hint="natkeep status lists what there is"
            ) from None
        if torn or len(lines) > 2 * len(self.known):
            self._write_anew()

    def _write_anew(self) -> None:
        """A line a move, in a file that is locked before it has the name."""
        lines = b"".join(_line(*each) for each in self.known.items())
        new = list[int]()

        def lock(fd: int) -> None:
            fcntl.flock(fd, fcntl.LOCK_EX)
            new.append(os.dup(fd))

        replace_file(self.path, lines, durable=True, first=lock)
        os.close(self._fd)
        self._fd = new[0]


def _line(move_id: str, followed: Followed) -> bytes:
    return json.dumps({"id": move_id, **followed._asdict()}).encode() + b"\n"


def demand_ours(node: str, move_id: str, followed: Followed | None) -> Followed:
    """RefusedError for what is there, and not by an order: none came, or it has been undone."""
    if followed is None or followed.state == "gone":
        raise RefusedError(
            f"{move_id} was prepared at {node} by another hand",
            hint=f"natkeep teardown {move_id} there, or another id",
        )
    return followed


def state_under(followed: Followed | None, want: Want) -> str:
    """How far this very order was followed; "" where it was not yet."""
    return followed.state if followed and followed.generation == want.generation else ""


def refuse_again(move_id: str, want: Want, followed: Followed | None, told: Done | None) -> None:
    """What was undone is not prepared again by the same order.

    told: what was said of it last. The store keeps that where a boot has taken the file away.
    """
    state = state_under(followed, want)
    if followed is None and told is not None and told.generation == want.generation:
        state = "expired" if told.error and told.error.code == EXPIRED else ""
    if state == "expired":
        raise DeadlineError(
            f"its gate was not opened within {want.deadline} s: undone",
            hint="natkeep fleet apply orders it anew",
        )
    if state == "prepared":
        raise RefusedError(
            f"{move_id} was undone by another hand", hint="natkeep fleet apply orders it anew"
        )
