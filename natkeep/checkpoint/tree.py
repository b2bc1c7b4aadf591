"""The reader of what a dumped tree needs besides its sockets: ids, files, directories.

    DIR/pstree.img        an entry for each process, the root task first
    DIR/core-ID.img       its name alone is read: one for each process and thread
    DIR/ids-PID.img       the namespaces of that process
    DIR/files.img         of type REG: by name, with size and mode; of type UNIXSK: its path
    DIR/remap-fpath.img   which of the files were deleted: CRIU brings these itself

Rule: as strict as images.py, and what that has refused already need not be looked at again. An
image that holds sockets alone, as for a gateway, has no pstree.img: it says nothing of a tree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from natkeep.checkpoint import messages
from natkeep.checkpoint.imagefile import (
    COMMON,
    FILES,
    IDS,
    INVENTORY,
    PSTREE,
    REMAP_FPATH,
    Directory,
    Place,
    opened,
    read_entries,
)
from natkeep.checkpoint.protobuf import Damage, Message, decode, number, octets
from natkeep.errors import ImageError
from natkeep.plan.process import File, Tree

_REG, _UNIXSK = 1, 16  # fields of a file_entry
_PID_NS, _MNT_NS = number(5), number(9)
_CORE = re.compile(r"core-([0-9]{1,9})\.img")

Fields = tuple[dict[int, int], dict[int, bytes]]


def read_tree(directory: Place) -> Tree | None:
    """What the tree in *directory* needs; None where it holds no tree. ImageError for damage."""
    with opened(directory) as images:
        names = images.names()
        if "pstree.img" not in names:
            return None
        pids = [numbers[number(1)] for numbers, _ in _read(images, "pstree.img", PSTREE)]
        if not pids:
            raise images.damaged("pstree.img", 8, "no entries")
        cores = {int(match[1]) for name in names if (match := _CORE.fullmatch(name))}
        lost = sorted(set(pids) - cores)
        if lost:
            raise _missing(images, f"core-{lost[0]}.img")
        ids = f"ids-{pids[0]}.img"
        found = [*_read(images, ids, IDS, messages.TASK_IDS)] if ids in names else []
        ours, theirs = _read_criu_ids(images), found[0][0] if found else {}
        files, directories = _read_files(images, _read_deleted(images, names))
        return Tree(
            frozenset(cores) if _same(ours, theirs, _PID_NS) else frozenset(),
            files,
            directories,
            own_mounts=not _same(ours, theirs, _MNT_NS),
        )


def _same(ours: dict[int, int], theirs: dict[int, int], namespace: int) -> bool:
    """Whether the tree has that namespace of CRIU's; where the image does not tell, it has."""
    mine = ours.get(namespace)
    return mine is None or theirs.get(namespace, mine) == mine


def _read_criu_ids(images: Directory) -> dict[int, int]:
    """The namespaces of CRIU itself, which the inventory calls root_ids."""
    found = [*_read(images, "inventory.img", INVENTORY, messages.INVENTORY_ENTRY)]
    if len(found) != 1:
        raise images.damaged("inventory.img", 4, f"{len(found)} entries where there is one")
    try:
        return decode(found[0][1].get(octets(3), b""), messages.ROOT_IDS)[0]
    except Damage as damage:
        raise images.damaged("inventory.img", 0, damage.what) from None


def _read_deleted(images: Directory, names: list[str]) -> frozenset[int]:
    if "remap-fpath.img" not in names:
        return frozenset()
    entries = _read(images, "remap-fpath.img", REMAP_FPATH, messages.REMAP)
    return frozenset(numbers[number(1)] for numbers, _ in entries)


def _read_files(
    images: Directory, deleted: frozenset[int]
) -> tuple[tuple[File, ...], tuple[str, ...]]:
    """Files and the directories of Unix sockets, each name once."""
    files: dict[str, File] = {}
    directories: set[str] = set()
    for numbers, strings in _read(images, "files.img", FILES, messages.FILE_ENTRY):
        if (entry := strings.get(octets(3))) is not None and numbers[number(1)] == _REG:
            file = _read_file(images, entry, deleted)
            # Of one that is opened for appending no size is told; another opening may tell it.
            if file is not None and (file.name not in files or file.size is not None):
                files[file.name] = file
        elif (entry := strings.get(octets(_UNIXSK))) is not None:
            directories |= {*_read_socket(images, entry)}
    return tuple(files.values()), tuple(sorted(directories))


def _read_file(images: Directory, entry: bytes, deleted: frozenset[int]) -> File | None:
    """The file; None for one that CRIU brings (deleted), is handed (external) or makes (a pty)."""
    numbers, strings = _decode(images, "files.img", entry, messages.REGULAR_FILE)
    name = os.fsdecode(strings[octets(6)])
    if numbers[number(1)] in deleted or numbers.get(number(9)):
        return None
    if not name.startswith("/") or "\0" in name:
        raise images.damaged("files.img", 0, "reg_file_entry: its name is not a path")
    if name.startswith(("/dev/pts/", "/proc/")):
        return None
    return File(name, numbers.get(number(8)), numbers.get(number(10)))


def _read_socket(images: Directory, entry: bytes) -> Iterator[str]:
    """The directory in which CRIU binds it, if it has a path."""
    numbers, strings = _decode(images, "files.img", entry, messages.UNIX_SOCKET)
    name = os.fsdecode(strings[octets(11)].rstrip(b"\0"))
    if not name or name.startswith("\0") or numbers.get(number(15)):
        return
    if "\0" in name:
        raise images.damaged("files.img", 0, "unix_sk_entry: its name is not a path")
    yield os.path.dirname(os.path.join("/", os.fsdecode(strings.get(octets(14), b"")), name))


def _read(
    images: Directory, image: str, magic: int, message: Message = messages.PSTREE_ENTRY
) -> Iterator[Fields]:
    magics = (magic,) if magic == INVENTORY else (COMMON, magic)
    try:
        data = images.read(image)
    except FileNotFoundError:
        raise _missing(images, image) from None
    for offset, body in read_entries(images, image, data, magics):
        yield _decode(images, image, body, message, offset)


def _decode(
    images: Directory, image: str, body: bytes, message: Message, offset: int = 0
) -> Fields:
    try:
        return decode(body, message)
    except Damage as damage:
        raise images.damaged(image, offset, damage.what) from None


def _missing(images: Directory, image: str) -> ImageError:
    return ImageError(
        f"no {image} in {images.name}",
        hint="the image is not complete, CRIU could not restore it: copy it again",
    )
