"""Reads what a tree needs: of a living tree what that is, of a place what of it is there.

A place is where CRIU will run: this process' own mounts and pids, or for a site `pid:N` those of
that process. A namespace that is named by a network namespace alone has this process' mounts.

Rule: read only, from /proc and by stat(); names that an image gives are never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from natkeep.errors import ImageError
from natkeep.plan.process import File, Shown, Tree

_MAPPED = re.compile(r"\S+ (\S+) (?:\S+ +){3}(/.*)")
_GONE = " (deleted)"
_SHARED_MEMORY = "/SYSV"
_BOUND = re.compile(r"(?:\S+ +){6}([0-9]+) +(/.*)")


def look_at(netns: str, tree: Tree) -> Shown:
    """What is there of *tree* at the place of a site in *netns*."""
    pid = netns[4:] if netns.startswith("pid:") else ""
    root, found = f"/proc/{pid}/root" if pid else "", {}
    for name in {*(file.name for file in tree.files), *tree.directories}:
        with suppress(OSError, ValueError):
            seen = os.stat(root + name)
            found[name] = (seen.st_size, seen.st_mode)
    at_home = tree.home == _name_home(pid or "self")
    return Shown(frozenset() if at_home else frozenset(_find_in_use(pid, tree.ids)), found)


def _find_in_use(pid: str, ids: frozenset[int]) -> Iterator[int]:
    """Those of *ids* that a process or thread has in the pid namespace of *pid*, or in ours."""
    if not ids:
        return
    if not pid or _is_same(pid, "self", "pid"):
        yield from (each for each in ids if os.path.exists(f"/proc/{each}"))
        return
    for task in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if not _is_same(task, pid, "pid"):
                continue
            for thread in os.listdir(f"/proc/{task}/task"):
                with open(
                    f"/proc/{task}/task/{thread}/status", encoding="ascii", errors="replace"
                ) as f:
                    inner = re.search(r"^NSpid:.*?(\d+)$", f.read(), re.MULTILINE)
                if inner and int(inner[1]) in ids:
                    yield int(inner[1])


def read_living(pids: Iterable[int], root: int) -> Tree:
    """What the living tree of *pids*, below *root*, needs.

    Size and mode are those of programs and libraries; of the others they may change until the dump.
    """
    names: dict[str, File] = {}
    shared, sockets, ids = [], dict(_read_bound(root)), set()
    inodes: set[int] = set()
    for pid in sorted(pids):
        try:
            for name in _read_names(pid):
                if name.startswith(_SHARED_MEMORY):
                    shared.append(pid)
                elif name.startswith("socket:["):
                    inodes.add(int(name[8:-1]))
                elif _is_opened(name):
                    names.setdefault(name, File(name))
            for name in filter(_is_opened, _read_mapped(pid, executable=True)):
                with suppress(OSError):
                    seen = os.stat(f"/proc/{root}/root{name}")
                    names[name] = File(name, seen.st_size, seen.st_mode)
            ids |= {int(thread) for thread in os.listdir(f"/proc/{pid}/task")}
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except OSError as error:
            raise ImageError(f"cannot look at process {pid}: {error.strerror}") from None
    ours = str(os.getpid())
    return Tree(
        frozenset(ids) if _is_same(str(root), ours, "pid") else frozenset(),
        tuple(names.values()),
        tuple(sorted({os.path.dirname(path) for at, path in sockets.items() if at in inodes})),
        own_mounts=not _is_same(str(root), ours, "mnt"),
        shared_memory=tuple(dict.fromkeys(shared)) if _is_same(str(root), ours, "ipc") else (),
        home=_name_home(str(root)),
    )


def _name_home(pid: str) -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.stat(f'/proc/{pid}/ns/pid').st_ino}"


def _read_names(pid: int) -> Iterator[str]:
    """What the process has open, runs, stands in and has mapped, as the kernel names it."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(f"/proc/{pid}/fd/{name}")
    for name in ("cwd", "root", "exe"):
        with suppress(FileNotFoundError):  # a zombie has none
            yield os.readlink(f"/proc/{pid}/{name}")
    yield from _read_mapped(pid)


def _read_mapped(pid: int, *, executable: bool = False) -> Iterator[str]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            match = _MAPPED.match(line.rstrip("\n"))
            if match and (not executable or "x" in match[1]):
                yield match[2]


def _is_opened(name: str) -> bool:
    """Whether CRIU opens it by its name."""
    return (
        name.startswith("/")
        and not name.endswith(_GONE)
        and not name.startswith(("/dev/pts/", "/proc/", "/memfd:"))
    )


def _read_bound(pid: int) -> Iterator[tuple[int, str]]:
    """Inode and path of each Unix socket of the network namespace of *pid* that has a path."""
    with (
        suppress(OSError),
        open(f"/proc/{pid}/net/unix", encoding="utf-8", errors="surrogateescape") as f,
    ):
        for line in f:
            if match := _BOUND.match(line.rstrip("\n")):
                yield int(match[1]), match[2]


def _is_same(one: str, other: str, namespace: str) -> bool:
    return os.path.samestat(
        os.stat(f"/proc/{one}/ns/{namespace}"), os.stat(f"/proc/{other}/ns/{namespace}")
    )
