"""CRIU's images in an archive that a container engine wrote, read from where they lie in it.

    checkpoint/NAME.img     podman, CRI-O, containerd's CRI: beside it config.dump and others
    NAME.img                the layer of a checkpoint by `ctr`

A tar archive is of blocks of 512 octets: a header, the octets of the member filled up to a whole
block, the next header; at the end two blocks of zeros.

Rule: an enemy may have made it, as a directory. The headers alone are read, and of the members
what images.py asks for: nothing is unpacked, and no page of memory is looked at. Python's tarfile
takes a damaged header for the end of the archive, and a short list is a silently lost connection:
so here each header has to be whole, each name plain and there once, and the end has to be there.
Of an archive in gzip, which can be read in one direction only, the images that natkeep knows are
kept in memory while it is read, MAX_KEPT octets at most.
This file must never write to a file, and follows no link.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from natkeep.checkpoint import shorten
from natkeep.checkpoint.imagefile import MAX_IMAGE, Directory, opened
from natkeep.errors import ImageError

BLOCK = 512
MAX_MEMBERS = 1 << 20
MAX_NAMES = 64 << 20  # octets, of all names together
MAX_KEPT = 128 << 20
_MAX_NAME = 4096
_MAX_RECORDS = 1 << 20  # of what Linux takes as extended attributes, and room
_MAX_FILLING = 1 << 20  # GNU tar fills the last record of up to 512 KiB
_STREAM_HEAD = 8192  # more than images.py reads of a stream

_KEPT = r"(inventory|pstree|files|remap-fpath|(ids|fdinfo)-[0-9]+|tcp-stream-[0-9a-f]+)\.img"
_KINDS = {
    b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO,
}  # fmt: skip
_REFUSED = {b"1": "a hard link", b"S": "a sparse file", b"g": "a header for all members"}
_LONG_NAME, _LONG_LINK, _RECORDS = b"L", b"K", b"x"
_LENGTH = re.compile(rb"([1-9][0-9]{0,7}) ")
_PACKED = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
}
_GZIP = b"\x1f\x8b"
_DAMAGED = "the archive is damaged, or was not copied completely: copy it again"
_HOSTILE = "no container engine writes this: do not trust this archive"


_File = io.RawIOBase | io.BufferedIOBase


class Member(NamedTuple):
    """A file in the archive: its kind (as of stat.S_IFMT), where its octets begin, how many."""

    kind: int
    at: int
    size: int


class _Header(NamedTuple):
    at: int
    name: bytes
    type: bytes
    size: int


class Archive(Directory):
    """The directory of CRIU's images in an archive, as `Directory`; handle: where octets lie."""

    beyond = 0  # there are other members

    def __init__(self, handle: int, name: str, members: dict[str, Member]) -> None:
        super().__init__(handle, name)
        self._members = members

    def open(self, image: str) -> tuple[int, int]:
        """A descriptor that stands at the first octet of *image*, and its size.

        What is read beyond the size is of other members.
        """
        member = self._members.get(image)
        if member is None:
            raise FileNotFoundError(image)
        self._demand_regular(image, member.kind)
        descriptor = os.dup(self.handle)
        os.lseek(descriptor, member.at, os.SEEK_SET)
        return descriptor, member.size

    def names(self) -> list[str]:
        """What the directory holds, sorted."""
        return sorted(self._members)


@contextmanager
def opened_image(path: str | os.PathLike[str]) -> Iterator[Directory]:
    """What *path* names: a directory of CRIU's images, or an archive with one in it.

    ImageError for all else. An archive that grows or is replaced meanwhile is not noticed, but
    nothing beyond the sizes that its headers said is read.
    """
    if not os.path.isfile(path):
        with opened(path) as images:
            yield images
        return
    name, kept = os.fsdecode(path), None
    handle = _open_file(name)
    try:
        try:
            with open(handle, "rb", buffering=0, closefd=False) as file:
                if _is_gzip(file, name):
                    import gzip  # only such an archive needs it

                    kept = os.memfd_create("natkeep-images")
                    file.seek(0)
                    with gzip.GzipFile(fileobj=file) as unpacked:
                        found = _Reader(unpacked, name, keep=kept).find_images()
                else:
                    found = _Reader(file, name, os.fstat(handle).st_size).find_images()
        except (OSError, EOFError, zlib.error) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ImageError(f"cannot read {name}: {shorten(str(reason))}", hint=_DAMAGED) from None
        yield Archive(handle if kept is None else kept, *found)
    finally:
        os.close(handle)
        if kept is not None:
            os.close(kept)


def _open_file(name: str) -> int:
    """A descriptor of the regular file *name*; it may have become a FIFO since it was looked at."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        handle = os.open(name, flags)
    except OSError as error:
        raise ImageError(f"cannot open {name}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ImageError(f"{name} is not a regular file any more")
    return handle


def _is_gzip(file: io.RawIOBase, name: str) -> bool:
    """Whether *file* is compressed by gzip; ImageError where it is so by another program."""
    head = file.read(8) or b""
    for magic, (form, command) in _PACKED.items():
        if head.startswith(magic):
            raise ImageError(
                f"{name} is compressed by {form}, which natkeep does not read",
                hint=f"{command} {name} > OTHER.tar, or have the engine write it uncompressed "
                "(podman: --compress none)",
            )
    return head.startswith(_GZIP)


class _Reader:
    """One way through the headers of an archive.

    limit: its size in octets, None where that is not known (gzip); keep: where the octets of
    images go that could not be read again, or None.
    """

    def __init__(
        self, file: _File, name: str, limit: int | None = None, keep: int | None = None
    ) -> None:
        self._file, self._name, self._limit, self._keep = file, name, limit, keep
        self._kept = 0

    def find_images(self) -> tuple[str, dict[str, Member]]:
        """The name of the directory of CRIU's images, for messages, and what is in it."""
        found: dict[str, dict[str, Member]] = {"": {}, "checkpoint": {}}
        seen: set[str] = set()
        octets = 0
        for header in self._headers():
            name, member = self._plain(header), self._member(header)
            if name is None:
                continue
            if name in seen:
                raise self._hostile(header.at, f"{shorten(ascii(name))} is there twice")
            seen.add(name)
            octets += len(name)
            if len(seen) > MAX_MEMBERS or octets > MAX_NAMES:
                raise self._damaged(header.at, f"more than {MAX_MEMBERS} members, or long names")
            if name == "checkpoint" and member.kind != stat.S_IFDIR:
                raise self._hostile(header.at, "checkpoint is not a directory")
            folder, _, image = name.rpartition("/")
            if folder in found:
                found[folder][image] = self._hold(image, member)
        there = [folder for folder, members in found.items() if "inventory.img" in members]
        if len(there) == 1:
            return "/".join(filter(None, (self._name, *there))), found[there[0]]
        raise self._not_one(there, seen)

    def _not_one(self, there: list[str], seen: set[str]) -> ImageError:
        """The error for an archive with the images of no dump, or of two, *there*."""
        if there:
            return ImageError(
                f"{self._name} has both inventory.img and checkpoint/inventory.img", hint=_HOSTILE
            )
        hint = "podman container checkpoint --export, the kubelet, CRI-O and containerd write one"
        if "oci-layout" in seen or "index.json" in seen:
            hint = (
                "an image for a registry: its layer is the archive (of ctr: the one whose media "
                "type ends in criu.tar); take it out with tar"
            )
        elif "pre-checkpoint/inventory.img" in seen:
            hint = "a pre-checkpoint has none; give the archive of the final checkpoint"
        return ImageError(f"no checkpoint/inventory.img in {self._name}", hint=hint)

    # ---- headers -------------------------------------------------------------------------

    def _headers(self) -> Iterator[_Header]:
        """Each member, with the name and the size that its extensions say; then the end."""
        at, long_name, size = 0, None, None
        extended = False
        while (header := self._read_header(at)) is not None:
            at += BLOCK
            if header.type in (_LONG_NAME, _LONG_LINK, _RECORDS):
                bound = _MAX_RECORDS if header.type == _RECORDS else _MAX_NAME + 1
                data = self._read_extension(header, at, bound)
                if header.type == _RECORDS:
                    said, size = self._parse_records(header.at, data, size)
                else:
                    said = data.rstrip(b"\0") if header.type == _LONG_NAME else None
                if said is not None and long_name is not None:
                    raise self._hostile(header.at, "one member has two long names")
                long_name = long_name if said is None else said
                at, extended = at + _filled(header.size), True
                continue
            name = header.name if long_name is None else long_name
            length = header.size if size is None else size
            if self._limit is not None and at + _filled(length) > self._limit:
                left = self._limit - at
                raise self._damaged(header.at, f"a member of {length} octets, {left} are left")
            yield _Header(header.at, name, header.type, length)
            at, long_name, size, extended = at + _filled(length), None, None, False
        if extended:
            raise self._damaged(at, "it ends after an extended header")
        self._demand_end(at)

    def _read_header(self, at: int) -> _Header | None:
        """The header at *at*; None for the block of zeros with which the archive ends."""
        data = self._read(at, BLOCK) if at else self._read_some(at, BLOCK)
        if len(data) == BLOCK and not any(data):
            return None
        magic = data[257:265]
        if magic not in (b"ustar\x0000", b"ustar  \0") or len(data) < BLOCK:
            if at == 0:
                raise ImageError(
                    f"{self._name} is neither a directory nor a tar archive",
                    hint="give CRIU's directory, or the archive that the container engine wrote",
                )
            raise self._damaged(at, "no header of a tar archive is there")
        said = self._number(at, data[148:156], "checksum")
        if said != sum(data) - sum(data[148:156]) + 8 * ord(" "):
            raise self._damaged(at, "the checksum of the header is wrong")
        name = data[:100].partition(b"\0")[0]
        prefix = data[345:500].partition(b"\0")[0]
        if prefix and magic == b"ustar\x0000":
            name = prefix + b"/" + name
        return _Header(at, name, data[156:157], self._number(at, data[124:136], "size"))

    def _number(self, at: int, field: bytes, what: str) -> int:
        """Octal digits; or, from 8 GiB on, GNU's binary number."""
        if field[0] == 0x80 and what == "size":
            number = int.from_bytes(field[1:], "big")
        elif digits := re.fullmatch(rb" *([0-7]+)[ \0]*", field):
            number = int(digits[1], 8)
        else:
            raise self._damaged(at, f"the {what} in the header is not a number")
        if number >= 1 << 60:
            raise self._damaged(at, f"a member of {number} octets")
        return number

    def _read_extension(self, header: _Header, at: int, bound: int) -> bytes:
        if header.size > bound:
            raise self._damaged(header.at, f"an extended header of {header.size} octets")
        return self._read(at, _filled(header.size))[: header.size]

    def _parse_records(
        self, at: int, data: bytes, size: int | None
    ) -> tuple[bytes | None, int | None]:
        """The name and the size that the records of a pax header say, None where they do not."""
        name, keys, start = None, set(), 0
        while start < len(data):
            length = _LENGTH.match(data, start)
            record = data[start : start + int(length[1])] if length else b""
            if length is None or len(record) != int(length[1]) or record[-1:] != b"\n":
                raise self._damaged(at, "the records of the extended header are not whole")
            key, equals, value = data[length.end() : start + len(record) - 1].partition(b"=")
            if key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
                raise self._hostile(at, "a sparse file")
            if not equals or key in keys:
                raise self._hostile(at, "a record of the extended header is there twice, or empty")
            keys.add(key)
            if key == b"path":
                name = value
            elif key == b"size":
                if size is not None or not re.fullmatch(rb"[0-9]{1,18}", value):
                    raise self._hostile(at, "the size in the extended header is not one number")
                size = int(value)
            start += len(record)
        return name, size

    def _demand_end(self, at: int) -> None:
        """A second block of zeros at *at* + 512, and nothing but zeros after it."""
        if any(self._read(at + BLOCK, BLOCK)):
            raise self._damaged(at, "a block of zeros before the end")
        rest = self._read_some(at + 2 * BLOCK, _MAX_FILLING + 1)
        if len(rest) > _MAX_FILLING or any(rest):
            raise self._damaged(at + 2 * BLOCK, "octets after the end of the archive")

    # ---- members -------------------------------------------------------------------------

    def _plain(self, header: _Header) -> str | None:
        """The member's name without `./` and the directory's last slash; None for `.` itself."""
        name, folder = header.name, header.type == b"5"
        if not name or b"\0" in name or len(name) > _MAX_NAME or name.startswith(b"/"):
            raise self._hostile(header.at, f"the name {shorten(ascii(os.fsdecode(name)))}")
        parts = name.removesuffix(b"/").split(b"/") if folder else name.split(b"/")
        while parts and parts[0] == b".":
            parts.pop(0)
        if {b"", b".", b".."} & {*parts} or not (parts or folder):
            raise self._hostile(header.at, f"the name {shorten(ascii(os.fsdecode(name)))}")
        return os.fsdecode(b"/".join(parts)) if parts else None

    def _member(self, header: _Header) -> Member:
        kind = _KINDS.get(header.type)
        if kind is None:
            number = header.type[0]
            said = _REFUSED.get(header.type, f"a member of type {number}")
            raise self._hostile(header.at, said)
        if kind != stat.S_IFREG and header.size:
            raise self._hostile(header.at, f"{header.size} octets in what is not a file")
        return Member(kind, header.at + BLOCK, header.size)

    def _hold(self, image: str, member: Member) -> Member:
        """The same member, where its octets can be read later."""
        if self._keep is None or member.kind != stat.S_IFREG or not re.fullmatch(_KEPT, image):
            return member
        stream = image.startswith("tcp-stream-")
        size = min(member.size, _STREAM_HEAD) if stream else member.size
        if size > MAX_IMAGE or self._kept + size > MAX_KEPT:
            raise ImageError(
                f"{self._name}: more than {MAX_KEPT} octets of images in a compressed archive",
                hint=f"gzip -dc {self._name} > OTHER.tar, which is read from where it lies",
            )
        at, self._kept = self._kept, self._kept + size
        data = self._read(member.at, size)
        while data:
            data = data[os.write(self._keep, data) :]
        return Member(member.kind, at, member.size)

    # ---- octets --------------------------------------------------------------------------

    def _read(self, at: int, size: int) -> bytes:
        data = self._read_some(at, size)
        if len(data) != size:
            raise self._damaged(at + len(data), "it ends there, without the end of an archive")
        return data

    def _read_some(self, at: int, size: int) -> bytes:
        """At most *size* octets at *at*; fewer where the archive ends."""
        if self._file.seek(at) != at:
            return b""
        parts = []
        while size and (part := self._file.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _damaged(self, at: int, what: str) -> ImageError:
        return ImageError(f"{self._name}, octet {at}: {what}", hint=_DAMAGED)

    def _hostile(self, at: int, what: str) -> ImageError:
        return ImageError(f"{self._name}, octet {at}: {what}", hint=_HOSTILE)


def _filled(size: int) -> int:
    """*size* filled up to a whole block."""
    return -(-size // BLOCK) * BLOCK
