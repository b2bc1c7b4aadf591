"""The reader of what a dumped tree needs: made images, damage, and the tree of a real process."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.test_images import field, image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natkeep import report
from natkeep.checkpoint import Checkpoint, Socket, TcpState
from natkeep.checkpoint.described import parse_described
from natkeep.checkpoint.imagefile import COMMON, FILES, IDS, INVENTORY, PSTREE, REMAP_FPATH
from natkeep.checkpoint.live import find_tree
from natkeep.checkpoint.tree import read_tree
from natkeep.errors import ImageError
from natkeep.kernel import process
from natkeep.plan.process import File, Tree
from natkeep.plan.tuples import Endpoint
from natkeep.values import replace


def regular(number: int, name: bytes, *, size: int | None = None, mode: int = 0o100644,
            external: bool = False) -> bytes:  # fmt: skip
    entry = field(1, number) + field(2, 0) + field(3, 1 << 40) + field(5, b"") + field(6, name)
    entry += b"" if size is None else field(8, size)
    entry += field(9, 1) if external else b""
    return field(1, 1) + field(2, number) + field(3, entry + field(10, mode))


def unix(number: int, name: bytes, *, directory: bytes = b"", deleted: bool = False) -> bytes:
    entry = b"".join(field(each, 1) for each in range(1, 9)) + field(9, b"") + field(10, b"")
    entry += field(11, name) + (field(14, directory) if directory else b"")
    return field(1, 5) + field(2, number) + field(16, entry + (field(15, 1) if deleted else b""))


FOUND = [
    regular(1, b"/usr/bin/serve", size=5_000_000_000, mode=0o100755),
    regular(2, b"/var/log/serve.log"),
    regular(12, b"/var/log/both", size=7),
    regular(13, b"/var/log/both"),
    regular(3, b"/dev/pts/4", mode=0o20620),
    regular(4, b"/tmp/gone"),
    regular(5, b"/handed/on", external=True),
    regular(6, b"/", mode=0o40755),
    unix(7, b"/run/serve/socket\0"),
    unix(8, b"\0abstract"),
    unix(9, b"socket\0", directory=b"/run/relative"),
    unix(10, b"/run/other/socket\0", deleted=True),
    unix(11, b""),
]
IDS_OF_CRIU = field(5, 1) + field(6, 2) + field(9, 3)


def write(directory: Path, *, ids: bytes = IDS_OF_CRIU, files: list[bytes] = FOUND) -> Path:
    own = field(1, 2) + field(3, IDS_OF_CRIU)
    processes = [
        b"".join(field(which, pid) for which in range(1, 5)) + field(5, pid) + field(5, pid + 1)
        for pid in (300, 310)
    ]
    deleted = [field(1, 4) + field(2, 1) + field(3, 1)]
    for name, data in {
        "inventory.img": image(INVENTORY, entries=[own]),
        "pstree.img": image(COMMON, PSTREE, entries=processes),
        "ids-300.img": image(COMMON, IDS, entries=[ids]),
        "files.img": image(COMMON, FILES, entries=files),
        "remap-fpath.img": image(COMMON, REMAP_FPATH, entries=deleted),
        **{f"core-{number}.img": b"" for number in (300, 301, 310, 311)},
    }.items():
        (directory / name).write_bytes(data)
    return directory


def test_what_a_tree_needs(tmp_path: Path) -> None:
    assert read_tree(write(tmp_path)) == Tree(
        frozenset({300, 301, 310, 311}),
        (
            File("/usr/bin/serve", 5_000_000_000, 0o100755),
            File("/var/log/serve.log", None, 0o100644),
            File("/var/log/both", 7, 0o100644),
            File("/", None, 0o40755),
        ),
        ("/run/relative", "/run/serve"),
    )


def test_namespaces_of_its_own(tmp_path: Path) -> None:
    tree = read_tree(write(tmp_path, ids=field(5, 11) + field(6, 2) + field(9, 13)))

    assert tree is not None
    assert (tree.ids, tree.own_mounts) == (frozenset(), True)


def test_an_image_of_sockets_alone_says_nothing_of_a_tree(tmp_path: Path) -> None:
    (write(tmp_path) / "pstree.img").unlink()

    assert read_tree(tmp_path) is None


def test_a_process_without_its_core_is_damage(tmp_path: Path) -> None:
    (write(tmp_path) / "core-310.img").unlink()

    with pytest.raises(ImageError, match=r"^no core-310\.img in "):
        read_tree(tmp_path)


@pytest.mark.parametrize("name", ["inventory.img", "files.img"])
def test_an_image_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    (write(tmp_path) / name).unlink()

    with pytest.raises(ImageError, match=f"^no {name} in "):
        read_tree(tmp_path)


def test_two_inventories_are_damage(tmp_path: Path) -> None:
    entry = field(1, 2) + field(3, IDS_OF_CRIU)
    (write(tmp_path) / "inventory.img").write_bytes(image(INVENTORY, entries=[entry, entry]))

    with pytest.raises(ImageError, match="2 entries where there is one"):
        read_tree(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (regular(1, b"relative"), "its name is not a path"),
        (regular(1, b"/a\0b"), "its name is not a path"),
        (unix(1, b"/a\0b"), "its name is not a path"),
        (field(1, 1) + field(2, 1) + field(3, field(1, 1)), "is missing"),
        (field(1, 1) + field(2, 1) + field(3, field(1, 1) + field(1, 1)), "is there twice"),
    ],
)
def test_what_is_not_understood_is_damage(entry: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message):
        read_tree(write(tmp_path, files=[entry]))


@pytest.mark.parametrize(
    "name", ["inventory.img", "pstree.img", "ids-300.img", "files.img", "remap-fpath.img"]
)
@pytest.mark.parametrize("cut", [0, 1, 9, -1])
def test_a_cut_image_is_damage(name: str, cut: int, tmp_path: Path) -> None:
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(ImageError):
        read_tree(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_it_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    names = ["inventory.img", "pstree.img", "ids-300.img", "files.img", "remap-fpath.img"]
    path = write(tmp_path) / data.draw(st.sampled_from(names))
    octets = bytearray(path.read_bytes())
    octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(octets)
    try:
        assert isinstance(read_tree(tmp_path), Tree)
    except ImageError:
        pass
    finally:
        write(tmp_path)


def test_a_length_that_takes_in_what_follows_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path) / "files.img"
    octets = path.read_bytes()
    size = struct.unpack_from("<I", octets, 8)[0]
    path.write_bytes(octets[:8] + struct.pack("<I", size + 1) + octets[12:])

    with pytest.raises(ImageError):
        read_tree(tmp_path)


# ---- a living tree -------------------------------------------------------------------------------

SERVER = """
import mmap, os, socket, sys, threading
at = sys.argv[1]
log, gone = open(f"{at}/log", "w"), open(f"{at}/gone", "w")
os.unlink(f"{at}/gone")
os.mkdir(f"{at}/run")
door = socket.socket(socket.AF_UNIX)
door.bind(f"{at}/run/door")
door.listen()
os.chdir(f"{at}/run")
threading.Thread(target=sys.stdin.read, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def test_what_a_living_tree_needs_and_what_of_it_is_there(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    try:
        tree = process.read_living(find_tree(server.pid), server.pid)
        names = {file.name for file in tree.files}
        assert {f"{tmp_path}/log", f"{tmp_path}/run", os.path.realpath(sys.executable)} <= names
        assert not {name for name in names if "gone" in name or name.startswith("/proc/")}
        assert tree.directories == (f"{tmp_path}/run",)
        python = os.stat(os.path.realpath(sys.executable))
        assert File(os.path.realpath(sys.executable), python.st_size, python.st_mode) in tree.files
        assert File(f"{tmp_path}/log") in tree.files  # its size changes
        assert server.pid in tree.ids
        assert len(tree.ids) == 2
        assert not tree.own_mounts
        assert not tree.shared_memory

        assert not process.look_at("", tree).in_use  # they are its own
        there = process.look_at("", replace(tree, home=""))
        assert there.in_use == tree.ids
        assert there.found.keys() == names | {f"{tmp_path}/run"}
    finally:
        server.stdin.close()
        server.wait()

    assert not process.look_at("", replace(tree, home="")).in_use


SHARES = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
number = libc.shmget(0, 4096, 0o600)
assert libc.shmat(number, None, 0) not in (None, ctypes.c_void_p(-1).value)
assert libc.shmctl(number, 0, None) == 0  # IPC_RMID: it goes with the process
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.root
@pytest.mark.parametrize(("front", "found"), [([], True), (["unshare", "--ipc"], False)])
def test_shared_memory_is_found_where_the_ipc_namespace_is_not_its_own(
    front: list[str], found: bool
) -> None:
    server = subprocess.Popen(
        [*front, sys.executable, "-c", SHARES], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == b"ready\n"
        tree = process.read_living(find_tree(server.pid), server.pid)
    finally:
        server.stdin.close()
        server.wait()

    assert tree.shared_memory == ((server.pid,) if found else ())


# ---- told to another machine ---------------------------------------------------------------------

TOLD = Tree(
    frozenset({7, 8}),
    (File("/bin/x", 5_000_000_000, 0o100755), File("/log\udcff")),
    ("/run/x",),
    True,
    (7,),
    "boot 4026531836",
)
LISTENER = Socket("tcp", Endpoint.parse("10.2.0.10:80"), None, TcpState.LISTEN)


def describe(**changes: object) -> str:
    checkpoint = replace(Checkpoint.of((LISTENER,), live=True), tree=TOLD)
    document = json.loads(json.dumps(report.checkpoint_to_json(checkpoint, ())))
    document["tree"].update(changes)
    return json.dumps(document)


def test_what_inspect_told_of_a_tree_is_read_as_it_was() -> None:
    assert parse_described(describe(), "list").tree == TOLD


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": 7},
        {"ids": [True]},
        {"ids": [-1]},
        {"ids": ["7"]},
        {"files": [{"name": "/x"}]},
        {"files": [{"name": "x", "size": None, "mode": None}]},
        {"files": [{"name": "/x", "size": "1", "mode": None}]},
        {"directories": ["/a\0b"]},
        {"own_mounts": 1},
        {"shared_memory": None},
        {"home": None},
        {"more": 1},
    ],
)
def test_a_tree_that_is_told_otherwise_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ImageError, match=r"^list: tree: "):
        parse_described(describe(**changes), "list")
