"""the four readers that are fuzzed, each from memory (fast) and from files (as natkeep runs).

Rule: from memory only the system calls are left out: the same functions of natkeep read the
octets. What is read from memory and from files has to be the same value, or the same refusal.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from fuzz import seeds
from fuzz.seeds import Case
from natkeep.checkpoint.imagefile import Directory
from natkeep.checkpoint.images import read_checkpoint_with_queues
from natkeep.checkpoint.listing import parse_octets, read_listing
from natkeep.checkpoint.tree import read_tree
from natkeep.errors import ImageError, JournalError, NatkeepError
from natkeep.state.directory import Header, StateDirectory
from natkeep.state.files import StateFiles
from natkeep.state.journal import Journal


class Target(ABC):
    """A reader; `refusal` is the only error that it may raise."""

    name: str
    refusal: type[NatkeepError]
    seeds: tuple[Case, ...]

    @abstractmethod
    def read(self, case: Case) -> object:
        """What natkeep makes of *case*, from memory."""

    @abstractmethod
    def read_files(self, directory: Path) -> object:
        """What natkeep makes of the same case as files in *directory*."""


class Images(Target):
    """A directory of CRIU's images, with the queues."""

    name = "images"
    refusal = ImageError

    def __init__(self) -> None:
        self.seeds = seeds.read_dumps()

    def read(self, case: Case) -> object:
        return read_checkpoint_with_queues(_Memory(case))

    def read_files(self, directory: Path) -> object:
        return read_checkpoint_with_queues(directory)

    def files_read(self, case: Case) -> frozenset[str]:
        """Those of the files that natkeep opens: not the stream of a socket in SYN-SENT."""
        memory = _Memory(case)
        read_checkpoint_with_queues(memory)
        return frozenset(memory.opened)


class Trees(Target):
    """The same directory, of which what the restore needs is read; with the core image's name."""

    name = "tree"
    refusal = ImageError
    core = "core-1.img"

    def __init__(self) -> None:
        self.seeds = seeds.read_dumps()

    def read(self, case: Case) -> object:
        return read_tree(_Memory({**case, self.core: b""}))

    def read_files(self, directory: Path) -> object:
        (directory / self.core).touch()
        return read_tree(directory)


class Journals(Target):
    """A state directory with one move: journal, packed connections, what a repair saw."""

    name = "journal"
    refusal = JournalError

    def __init__(self) -> None:
        self.seeds = seeds.make_journals()

    def read(self, case: Case) -> object:
        return self._read(_MemoryState(case))

    def read_files(self, directory: Path) -> object:
        return self._read(StateDirectory(str(directory), create=False))

    def _read(self, state: StateDirectory) -> object:
        glance = state.read_header(seeds.ID)  # never an error: its callers look for conflicts
        sighting = state.read_sighting(seeds.ID, seeds.BOOT)  # nor is this one
        journal = state.load(seeds.ID)
        journal.resolve()
        if glance != Header(journal.move, journal.namespaces, journal.boot):
            raise AssertionError("read_header and load do not see the same move")
        return describe(journal), sighting


class Listings(Target):
    """A connections file."""

    name = "listing"
    refusal = ImageError

    def __init__(self) -> None:
        self.seeds = seeds.make_listings()

    def read(self, case: Case) -> object:
        return parse_octets(case[seeds.LISTING], seeds.LISTING)

    def read_files(self, directory: Path) -> object:
        return read_listing(directory / seeds.LISTING)


TARGETS: dict[str, type[Target]] = {each.name: each for each in (Images, Trees, Journals, Listings)}


def describe(journal: Journal) -> object:
    """All that a journal says, to be compared."""
    names = ("move", "connections", "surroundings", "namespaces", "kinds", "boot", "records")
    return *(getattr(journal, name) for name in names), journal.image


class _Memory(Directory):
    """A directory of images whose files are octets."""

    def __init__(self, files: Case) -> None:
        super().__init__(-1, "memory")
        self.files = files
        self.opened: set[str] = set()

    def open(self, image: str) -> tuple[int, int]:
        data = self.read(image)
        descriptor = os.memfd_create(image)
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor, len(data)

    def read(self, image: str) -> bytes:
        self.opened.add(image)
        try:
            return self.files[image]
        except KeyError:
            raise FileNotFoundError(image) from None

    def names(self) -> list[str]:
        return sorted(self.files)


class _MemoryState(StateDirectory):
    """A state directory whose files are octets."""

    def __init__(self, files: Case) -> None:
        self._files, self.path = _MemoryFiles(files), "memory"


class _MemoryFiles(StateFiles):
    def __init__(self, files: Case) -> None:
        self.path, self._fd = "memory", None
        self.files = files

    def read(self, name: str) -> bytes:
        try:
            return self.files[name]
        except KeyError:
            raise FileNotFoundError(name) from None
