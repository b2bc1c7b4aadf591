"""the safe way into a directory of CRIU's images: handles, regular files, magics, entries.

    image = [common magic, u32] magic, u32; entries       entry = size, u32; a protobuf message

All of it is little-endian. Only inventory.img, which says which images there are, goes without
the common magic.

Rule: the directory may have been made by an enemy. The operator's path is resolved once; below it
no link is followed, nothing but a regular file is opened, nothing is waited for, and nothing is
read without a bound. Each length has to fit to the octet.
This file must never write, and knows no image's meaning.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from natkeep.errors import ImageError

# 560,000 sockets; a process may open 1,048,576 files unless fs.nr_open was raised.
MAX_IMAGE = 64 << 20
MAX_ENTRIES = 1 << 20
MAX_ENTRY = 8 << 20  # it is copied twice; the largest known is an epoll of 300,000 files

COMMON, INVENTORY, FILES = 0x54564319, 0x58313116, 0x56303138
FDINFO, TCP_STREAM = 0x56213732, 0x51465506
PSTREE, IDS, REMAP_FPATH = 0x50273030, 0x54432030, 0x59133954


class Directory:
    """An open directory; files in it are reached from its handle only."""

    beyond = 1  # octets asked for after the last, which show that a file grows

    def __init__(self, handle: int, name: str) -> None:
        self.handle = handle
        self.name = name

    def open(self, image: str) -> tuple[int, int]:
        """Descriptor and size of the regular file *image*; FileNotFoundError if there is none.

        The names are ours and without a slash, so O_NOFOLLOW below an open directory confines
        as openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) would, without ctypes and on each
        kernel. To open a device can start something, and to open a FIFO can wait for ever:
        hence the look before, and O_NONBLOCK; the second look is for what was swapped between.
        """
        try:
            status = os.stat(image, dir_fd=self.handle, follow_symlinks=False)
            self._demand_regular(image, status.st_mode)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            descriptor = os.open(image, flags, dir_fd=self.handle)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ImageError(f"cannot open {self.name}/{image}: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            self._demand_regular(image, status.st_mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, status.st_size

    def _demand_regular(self, image: str, mode: int) -> None:
        if stat.S_ISREG(mode):
            return
        kind = {
            stat.S_IFLNK: "a symbolic link",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFDIR: "a directory",
            stat.S_IFSOCK: "a socket",
        }.get(stat.S_IFMT(mode), "a device")
        raise ImageError(
            f"{self.name}/{image} is {kind}, not a regular file",
            hint="CRIU writes none of these: do not trust this image",
        )

    def read(self, image: str) -> bytes:
        """The whole of *image*, read once into memory."""
        descriptor, size = self.open(image)
        try:
            if size > MAX_IMAGE:
                raise self.damaged(image, 0, f"{size} octets are more than {MAX_IMAGE}")
            data = read_up_to(descriptor, size + self.beyond)
        except OSError as error:
            raise ImageError(f"cannot read {self.name}/{image}: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise self.damaged(image, len(data), "its size changed while it was read")
        return data

    def names(self) -> list[str]:
        """What the directory holds, sorted."""
        try:
            return sorted(os.listdir(self.handle))
        except OSError as error:
            raise ImageError(f"cannot list {self.name}: {error.strerror}") from None

    def damaged(self, image: str, offset: int, what: str) -> ImageError:
        """The error for *image*, of which *what* is wrong at *offset*."""
        return ImageError(
            f"{self.name}/{image}, octet {offset}: {what}",
            hint="the image is damaged, or was not copied completely: copy it again",
        )


Place = str | os.PathLike[str] | int | Directory


@contextmanager
def opened(directory: Place) -> Iterator[Directory]:
    """The open directory; one that was given open, as a descriptor too, stays so afterwards.

    The directory's own path is the operator's, and CRIU's CRTOOLS_IMAGE_DIR is a magic link
    (/proc/PID/fd/N), so here links are followed.
    """
    if isinstance(directory, Directory):
        yield directory
        return
    if isinstance(directory, int):
        yield Directory(directory, os.readlink(f"/proc/self/fd/{directory}"))
        return
    name = os.fsdecode(directory).rstrip("/") or ("/" if directory else "''")
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"cannot open {name}: {reason}") from None
    try:
        yield Directory(handle, name)
    finally:
        os.close(handle)


def read_up_to(descriptor: int, size: int) -> bytes:
    """At most *size* octets; a single read() may return fewer than there are."""
    parts = []
    while size and (part := os.read(descriptor, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_entries(
    images: Directory, image: str, data: bytes, magics: tuple[int, ...]
) -> Iterator[tuple[int, bytes]]:
    """Offset and octets of each message in *data*, which was read from *image*."""
    check_magic(images, image, data, magics)
    at, end, entries = 4 * len(magics), len(data), 0
    while at < end:
        entries += 1
        if entries > MAX_ENTRIES:
            raise images.damaged(image, at, f"more than {MAX_ENTRIES} entries")
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if at > end:
            raise images.damaged(image, at - 4, "it ends in the middle of an entry's size")
        if size > end - at:
            raise images.damaged(image, at - 4, f"an entry of {size} octets, {end - at} are left")
        if size > MAX_ENTRY:
            raise images.damaged(image, at - 4, f"an entry of {size} octets: more than {MAX_ENTRY}")
        yield at, data[at : at + size]
        at += size


def check_magic(images: Directory, image: str, data: bytes, magics: tuple[int, ...]) -> None:
    expected = struct.pack(f"<{len(magics)}I", *magics)
    if data[: len(expected)] != expected:
        found = data[: len(expected)].hex(" ", 4) or "nothing"
        raise images.damaged(image, 0, f"begins with {found}, not with {expected.hex(' ', 4)}")
