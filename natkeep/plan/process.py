"""The process: what CRIU needs where it restores a tree, and what of it is not there.

    Tree      what an image, or a living tree, says that it has open, and which ids it has
    Shown     what the place of the restore shows of the same
    judge()   the findings

CRIU opens each file by its name and takes none of another size or mode; it makes each process and
thread by its id, and binds a Unix socket in its directory. What it cannot it finds out late: the
process at the source has ended by then.

Rule: values in, findings out. This file must never look at a machine.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence

from natkeep.plan.findings import Finding, ok
from natkeep.plan.move import Site
from natkeep.values import dataclass

_SHOWN = 4


@dataclass(frozen=True, slots=True)
class File:
    """A file that is opened by its name; size in octets, and mode as in st_mode, where known."""

    name: str
    size: int | None = None
    mode: int | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """What is to be there.

    ids: of processes and threads; empty with a pid namespace of its own. files: those open,
    mapped, run and stood in; without what CRIU brings itself. directories: those of Unix sockets.
    own_mounts: the tree has a mount namespace of its own, so that names mean nothing outside.
    shared_memory: processes with System V shared memory of an IPC namespace that is CRIU's too.
    home: boot and pid namespace of a tree that lives, where its ids are in use by itself; else "".
    """

    ids: frozenset[int] = frozenset()
    files: tuple[File, ...] = ()
    directories: tuple[str, ...] = ()
    own_mounts: bool = False
    shared_memory: tuple[int, ...] = ()
    home: str = ""


@dataclass(frozen=True, slots=True)
class Shown:
    """What is there: which of the ids are in use, and of each name that is there size and mode."""

    in_use: frozenset[int]
    found: dict[str, tuple[int, int]]


def judge(site: Site, tree: Tree, shown: Shown) -> Iterator[Finding]:
    """What CRIU would stumble on at *site*."""
    in_use = sorted(tree.ids & shown.in_use)
    if in_use:
        yield Finding("pid-in-use", site, f"in use: {_list(in_use)} (of {len(tree.ids)} ids)")
    else:
        what = f"{len(tree.ids)} ids are free" if tree.ids else "the tree has ids of its own"
        yield ok(site, f"pids: {what}")
    if tree.own_mounts:
        yield Finding("files-not-seen", site, "the tree has a mount namespace of its own")
        return
    missing = [each.name for each in tree.files if each.name not in shown.found]
    if missing:
        yield Finding("file-missing", site, f"not there: {_list(missing)}")
    different = [*_find_different(tree.files, shown)]
    if different:
        yield Finding("file-differs", site, _list(different))
    if not missing and not different:
        yield ok(site, f"{len(tree.files)} files and directories are there, and as they were")
    nowhere = [
        name for name in tree.directories if not stat.S_ISDIR(shown.found.get(name, (0, 0))[1])
    ]
    if nowhere:
        yield Finding("socket-directory", site, f"not there: {_list(nowhere)}")
    elif tree.directories:
        yield ok(site, f"{len(tree.directories)} directories of Unix sockets are there")


def judge_dump(tree: Tree) -> Iterator[Finding]:
    """What keeps CRIU from a dump of a tree that lives."""
    if tree.shared_memory:
        yield Finding("sysv-ipc", None, f"processes {_list(tree.shared_memory)}")
    else:
        yield ok(None, "no System V shared memory that other processes may have, too")


def _find_different(files: Iterable[File], shown: Shown) -> Iterator[str]:
    for each in files:
        if each.name not in shown.found:
            continue
        size, mode = shown.found[each.name]
        if each.mode is not None and each.mode != mode:
            yield f"{each.name} has mode {mode:o}, not {each.mode:o}"
        elif each.size is not None and each.size != size:
            yield f"{each.name} has {size} octets, not {each.size}"


def _list(things: Sequence[object]) -> str:
    more = f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
    return ", ".join(str(each) for each in things[:_SHOWN]) + more
