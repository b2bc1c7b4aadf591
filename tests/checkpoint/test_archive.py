"""tests of the reader of containers' checkpoint archives: what engines write, and what none does.

The layouts of CRI-O, containerd and ctr are built here as their sources and documents say; that of
podman is podman's own in tests/lab (its engine and the recipe of docs/containers.md).
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natkeep.checkpoint import archive
from natkeep.checkpoint.archive import opened_image
from natkeep.checkpoint.images import read_checkpoint, read_checkpoint_with_queues
from natkeep.checkpoint.tree import read_tree
from natkeep.cli import main
from natkeep.errors import ImageError

CORPUS = Path(__file__).parent / "corpus"
DUMPS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())
BLOCK = 512
END = bytes(2 * BLOCK)
PAGES = os.urandom(3 << 20)


def member(name: str, data: bytes = b"", type_: bytes = tarfile.REGTYPE, **more: object) -> bytes:
    """One member as engines write it: a ustar header, and a pax one where that is not enough."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    form = tarfile.PAX_FORMAT
    return info.tobuf(form, "utf-8", "surrogateescape") + fill(data)


def fill(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def images(dump: str, folder: str = "checkpoint/") -> list[bytes]:
    paths = sorted((CORPUS / dump).iterdir())
    return [member(folder + path.name, path.read_bytes()) for path in paths]


def podman_like(dump: str) -> bytes:
    """As podman, CRI-O and containerd's CRI write it: files of their own, and pages of memory."""
    return b"".join(
        [
            member("config.dump", b"{}"),
            member("checkpoint", type_=tarfile.DIRTYPE, mode=0o700),
            member("checkpoint/core-1.img", b"core"),
            member("checkpoint/pages-1.img", PAGES),
            *images(dump),
            member("checkpoint/parent", type_=tarfile.SYMTYPE, linkname="../pre-checkpoint"),
            member("rootfs-diff.tar", bytes(1024), pax_headers={"SCHILY.xattr.user.a": "1"}),
            member("spec.dump", b"{}"),
            END,
        ]
    )


def ctr_like(dump: str) -> bytes:
    """The layer of a checkpoint by ctr: the images alone."""
    return b"".join([*images(dump, ""), member("core-1.img", b"core"), END])


def packed_by_hand(dump: str) -> bytes:
    """As GNU tar writes `./checkpoint`: long names by members of their own, filled to 10 KiB."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as made:
        folder = tarfile.TarInfo("./" + "long/" * 60)
        folder.type = tarfile.DIRTYPE
        made.addfile(folder)
        for path in [*(CORPUS / dump).iterdir()]:
            made.add(path, f"./checkpoint/{path.name}")
        made.addfile(tarfile.TarInfo("./checkpoint/core-1.img"))
    return out.getvalue()


def as_gzip(make: Callable[[str], bytes]) -> Callable[[str], bytes]:
    return lambda dump: gzip.compress(make(dump))


LAYOUTS = {
    "podman": podman_like,
    "ctr": ctr_like,
    "by-hand": packed_by_hand,
    "gzip": as_gzip(podman_like),
}


def read_all(path: Path) -> object:
    with opened_image(path) as found:
        return read_checkpoint(found), read_checkpoint_with_queues(found), read_tree(found)


def outcome(path: Path) -> object:
    """What is read, or what the refusal says without the name of the place."""
    try:
        return read_all(path)
    except ImageError as error:
        return str(error).rpartition("/")[2]


def refusal(path: Path, parts: bytes | Iterable[bytes]) -> str:
    path.write_bytes(parts if isinstance(parts, bytes) else b"".join(parts))
    with pytest.raises(ImageError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return tmp_path / "web.tar"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dump", DUMPS)
def test_an_archive_says_what_the_directory_says(layout: str, dump: str, tmp_path: Path) -> None:
    path = tmp_path / "web.tar"
    path.write_bytes(LAYOUTS[layout](dump))
    directory = tmp_path / "images"
    directory.mkdir()
    for file in (CORPUS / dump).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "core-1.img").touch()

    found = outcome(path)

    assert found == outcome(directory)
    if dump == "plain":
        assert found[0].connections


@pytest.mark.parametrize("dump", ["plain"])
def test_no_page_of_memory_is_read_and_nothing_is_written(
    dump: str, tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar.write_bytes(podman_like(dump))
    octets = 0
    real = archive._Reader._read_some

    def count(self: object, at: int, size: int) -> bytes:
        nonlocal octets
        octets += size
        return real(self, at, size)

    monkeypatch.setattr(archive._Reader, "_read_some", count)
    before = os.listdir("/proc/self/fd")

    read_all(tar)

    assert octets - archive._MAX_FILLING < 64 << 10  # so far goes the look at what follows the end
    assert os.listdir("/proc/self/fd") == before
    assert [*tar.parent.iterdir()] == [tar]


HEAD = images("plain")
HOSTILE = {
    "an absolute name": [member("/etc/passwd", b"x")],
    "a name that climbs": [member("checkpoint/../../x", b"x")],
    "a name that climbs by pax": [member("x", b"x", pax_headers={"path": "../x"})],
    "an empty part": [member("checkpoint//x", b"x")],
    "an image twice": [HEAD[0]],
    "an image twice, by another spelling": [member("./checkpoint/files.img", b"x")],
    "a hard link": [member("checkpoint/x.img", type_=tarfile.LNKTYPE, linkname="/etc/shadow")],
    "a sparse member": [member("checkpoint/x.img", type_=tarfile.GNUTYPE_SPARSE)],
    "a sparse member of pax": [member("x", b"x", pax_headers={"GNU.sparse.major": "1"})],
    "a header for all": [member("g", b"19 path=../../abcde\n", type_=tarfile.XGLTYPE)],
    "a type that is none": [member("x", type_=b"Z")],
    "a link with octets": [member("x", b"abc", type_=tarfile.SYMTYPE)],
    "both layouts": images("plain", ""),
    "a checkpoint that is a link": [member("checkpoint", type_=tarfile.SYMTYPE, linkname="/etc")],
    "a name of two kinds": [
        member("L", b"x\0", type_=tarfile.GNUTYPE_LONGNAME),
        member("x", b"y", pax_headers={"path": "y"}),
    ],
    "a record twice": [member("x", b"12 path=abc\n12 path=abd\n", type_=tarfile.XHDTYPE)],
    "a size that is none": [member("x", b"11 size=-1\n", type_=tarfile.XHDTYPE)],
}
DAMAGED = {
    "a record that is not whole": [member("x", b"99 path=abc\n", type_=tarfile.XHDTYPE), HEAD[0]],
    "an extended header at the end": [member("x", b"12 path=abc\n", type_=tarfile.XHDTYPE)],
    "an extended header of 1 GiB": [member("x", type_=tarfile.XHDTYPE)[:0] + b""],
    "a block of zeros": [bytes(BLOCK), member("x", b"x")],
    "garbage": [b"x" * BLOCK],
    "something after the end": [END, member("x", b"x")],
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_engine_writes_is_refused(case: str, packed: bool, tar: Path) -> None:
    data = b"".join([*HEAD, *HOSTILE[case], END])

    message = refusal(tar, gzip.compress(data) if packed else data)

    where = "both" if case == "both layouts" else ", octet "
    assert where in message


@pytest.mark.parametrize("image", ["files.img", "inventory.img"])
@pytest.mark.parametrize("type_", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_image_that_is_no_file(image: str, type_: bytes, tar: Path) -> None:
    rest = [member(f"checkpoint/{p.name}", p.read_bytes())
            for p in (CORPUS / "plain").iterdir() if p.name != image]  # fmt: skip

    message = refusal(tar, [*rest, member(f"checkpoint/{image}", type_=type_, linkname="x"), END])

    assert f"web.tar/checkpoint/{image} is " in message
    assert "not a regular file" in message


def with_header(at: int, octets: bytes) -> bytes:
    """The first header with *octets* at *at*, its checksum made right again."""
    data = bytearray(b"".join([*HEAD, END]))
    data[at : at + len(octets)] = octets
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:BLOCK])
    return bytes(data)


@pytest.mark.parametrize(
    "size",
    [b"77777777777\0", b"00000001000\0", b"00000000000\0", b"0000000008x\0", b"-0000000001\0",
     b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" + bytes(7), b" " * 12],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_size_that_lies(size: bytes, packed: bool, tar: Path) -> None:
    data = with_header(124, size)

    refusal(tar, gzip.compress(data) if packed else data)


def test_a_header_whose_checksum_is_wrong(tar: Path) -> None:
    data = bytearray(podman_like("plain"))
    data[3] ^= 1

    assert "octet 0: the checksum of the header is wrong" in refusal(tar, bytes(data))


def test_an_archive_that_is_cut_anywhere(tar: Path) -> None:
    data = b"".join([*HEAD, END])
    for length in range(1, len(data), 171):
        refusal(tar, data[:length])
    whole = gzip.compress(data)
    for length in range(1, len(whole), 97):
        refusal(tar, whole[:length])
    refusal(tar, whole + b"more")
    refusal(tar, whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_archive(case: str, tar: Path) -> None:
    if case == "an extended header of 1 GiB":
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 1 << 30
        parts = [*HEAD, info.tobuf(tarfile.USTAR_FORMAT), END]
    else:
        parts = [*HEAD, *DAMAGED[case], END]

    assert ", octet " in refusal(tar, parts)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
        (b"\xfd7zXZ\0", "compressed by xz"),
        (b"BZh91AY", "compressed by bzip2"),
        (b"10.2.0.10:5000 10.1.0.2:50594\n", "neither a directory nor a tar archive"),
        (b"", "neither a directory nor a tar archive"),
        (b"\x1f\x8b", "cannot read"),
    ],
)
def test_a_file_that_is_something_else(head: bytes, said: str, tar: Path) -> None:
    assert said in refusal(tar, head + (bytes(600) if head else b""))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("checkpoint/pages-1.img", "podman container checkpoint --export"),
        ("index.json", "media type ends in criu.tar"),
        ("pre-checkpoint/inventory.img", "the final checkpoint"),
    ],
)
def test_an_archive_without_images(name: str, hint: str, tar: Path) -> None:
    tar.write_bytes(member(name, b"x") + END)

    with pytest.raises(ImageError, match=r"no checkpoint/inventory\.img in ") as caught:
        read_all(tar)

    assert hint in caught.value.hint


def test_the_memory_is_bounded(tar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join([*HEAD, END])
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_MEMBERS", len(HEAD) - 1)
        assert "more than" in refusal(tar, data)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_NAMES", 100)
        assert "long names" in refusal(tar, data)
    monkeypatch.setattr(archive, "MAX_KEPT", 1000)
    assert "in a compressed archive" in refusal(tar, gzip.compress(data))
    tar.write_bytes(data)
    assert read_all(tar)  # what is not compressed is not kept


def test_a_member_of_8_gib(tar: Path) -> None:
    """The pages of a large process; they are a hole here, and are not read."""
    size = (8 << 30) + 512
    info = tarfile.TarInfo("checkpoint/pages-1.img")
    info.size = size
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tar.open("wb") as file:
            file.write(info.tobuf(form))
            file.seek(size, os.SEEK_CUR)
            file.write(b"".join([*HEAD, member("checkpoint/core-1.img"), END]))

        assert read_all(tar)[0].connections


@pytest.mark.parametrize("verb", ["inspect", "plan"])
def test_the_command_line_takes_it(
    verb: str, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar.write_bytes(podman_like("plain"))
    words = ["web", "--site", "gateway", "--image"] if verb == "plan" else []
    said = []
    for place in (CORPUS / "plain", tar):
        assert main([verb, *words, str(place), "--map", "10.2.0.10=10.3.0.20", "--json"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "10.1.0.2" in said[0]


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="Not a directory"):
        read_all(tmp_path / "fifo")


WHOLE = b"".join([*HEAD, END])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE) - 1), octets=st.binary(min_size=1, max_size=4))
def test_a_mutant_is_refused_or_says_the_same(at: int, octets: bytes, tmp_path: Path) -> None:
    """As of the images themselves: no connection goes missing by a damaged header."""
    path = tmp_path / "web.tar"
    path.write_bytes(WHOLE[:at] + octets + WHOLE[at + len(octets) :])
    refused, names = "", []
    try:
        with opened_image(path) as found:
            names = found.names()
    except ImageError as error:
        refused = str(error)
    assert refused.isprintable()
    if not refused and names != sorted(file.name for file in (CORPUS / "plain").iterdir()):
        demand_all_or_a_refusal(path)  # another name with the same checksum, which is a sum


@pytest.mark.parametrize("number", range(len(HEAD)))
def test_octets_of_a_name_that_changed_places_lose_no_connection(
    number: int, tmp_path: Path
) -> None:
    """The checksum is right, so it is by the images that one is missed."""
    path, at = tmp_path / "web.tar", sum(map(len, HEAD[:number]))
    for swapped in range(at, at + len("checkpoint/i")):
        two = WHOLE[swapped : swapped + 2]
        path.write_bytes(WHOLE[:swapped] + two[::-1] + WHOLE[swapped + 2 :])
        demand_all_or_a_refusal(path)


def demand_all_or_a_refusal(path: Path) -> None:
    whole = path.with_name("whole.tar")
    whole.write_bytes(WHOLE)
    read = outcome(path)
    assert read == outcome(whole) or (isinstance(read, str) and read.isprintable())
