"""tests of the reader of CRIU's images: real dumps, an oracle, and everything that is damage."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natkeep.checkpoint import NO_UDP, Checkpoint, NetworkLock, Socket, TcpState, imagefile
from natkeep.checkpoint.imagefile import (
    COMMON,
    FDINFO,
    FILES,
    IDS,
    INVENTORY,
    PSTREE,
    TCP_STREAM,
)
from natkeep.checkpoint.images import read_checkpoint, read_checkpoint_with_queues
from natkeep.checkpoint.protobuf import Damage, Message, decode, number, octets
from natkeep.errors import ImageError
from natkeep.plan.tuples import Endpoint, FourTuple, parse_address

CORPUS = Path(__file__).parent / "corpus"
DUMPS = sorted(path.name for path in CORPUS.iterdir() if path.is_dir())


# ---- a tiny writer of images, for what no dump would show ---------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(which: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number(which)) + varint(value)
    return varint(octets(which)) + varint(len(value)) + value


def image(*magics: int, entries: list[bytes]) -> bytes:
    parts = [struct.pack("<I", len(entry)) + entry for entry in entries]
    return struct.pack(f"<{len(magics)}I", *magics) + b"".join(parts)


def words(which: int, address: bytes, *, packed: bool = False) -> bytes:
    values = struct.unpack(f"<{len(address) // 4}I", address)
    if packed:
        return field(which, b"".join(map(varint, values)))
    return b"".join(field(which, value) for value in values)


LOCAL4, PEER4 = bytes([10, 2, 0, 10]), bytes([10, 1, 0, 2])
USUAL = {
    "id": 7,
    "ino": 0xABC,
    "family": 2,
    "type": 1,
    "proto": 6,
    "state": 1,
    "src_port": 5000,
    "dst_port": 40000,
    "flags": 2,
    "backlog": 0,
}


def socket_entry(
    local: bytes = LOCAL4,
    peer: bytes = PEER4,
    *,
    packed: bool = False,
    extra: bytes = b"",
    opts: bytes = b"\x08\x01",
    **changes: int | None,
) -> bytes:
    """An inet_sk_entry, usual but for *changes*; None leaves a field out."""
    values = {**USUAL, **changes}
    out = b""
    for position, name in enumerate(USUAL, 1):
        if (value := values.pop(name)) is not None:
            out += field(position, value)
    out += words(11, local, packed=packed) + words(12, peer, packed=packed)
    out += field(13, b"") + field(14, opts)
    if "ns_id" in values:
        out += field(18, values.pop("ns_id"))
    out += extra
    assert not values, values
    return out


def file_entry(entry: bytes, *, kind: int = 4) -> bytes:
    return field(1, kind) + field(2, 7) + field(4, entry)


REGULAR = field(1, 1) + field(2, 1) + field(3, b"whatever a regfile entry is")
INVENTORY_ENTRY = field(1, 2) + field(3, field(1, 1) + field(6, 2))


def write_images(
    directory: Path,
    *sockets: bytes,
    inventory: bytes = INVENTORY_ENTRY,
    descriptors: list[bytes] | None = None,
) -> Path:
    """A directory with *sockets* (inet_sk_entry each)."""
    entries = [REGULAR, *map(file_entry, sockets)]
    (directory / "files.img").write_bytes(image(COMMON, FILES, entries=entries))
    (directory / "inventory.img").write_bytes(image(INVENTORY, entries=[inventory]))
    if descriptors is not None:
        (directory / "fdinfo-2.img").write_bytes(image(COMMON, FDINFO, entries=descriptors))
    return directory


def write_stream(
    directory: Path, *, ino: int = 0xABC, inq: bytes = b"", outq: bytes = b"", unsent: int = 0
) -> Path:
    entry = field(1, len(inq)) + field(3, len(outq)) + field(12, unsent)
    path = directory / f"tcp-stream-{ino:x}.img"
    path.write_bytes(image(COMMON, TCP_STREAM, entries=[entry]) + inq + outq)
    return path


# ---- real dumps ---------------------------------------------------------------------------


def summary(checkpoint: Checkpoint) -> list[tuple[str, str, str, str, str, str]]:
    return [
        (
            each.protocol,
            str(each.local),
            f"{each.peer and each.peer.address}",  # the peer's port differs from dump to dump
            str(each.state),
            str(each.bound_device),
            str(each.unkept),
        )
        for each in checkpoint.sockets
    ]


OLD, PEER, NONE = "10.2.0.10", "10.1.0.2", "None"
LOOPBACK = "loopback: both ends must be moved"
NO_PORT = "bound to no port: no datagram reaches it"
MULTICAST = "its peer 224.0.0.251 is no unicast address: it is whatever the link has there"
OTHER_NETNS = "in another network namespace than the root task"


def test_plain_dump() -> None:
    checkpoint = read_checkpoint(CORPUS / "plain")

    found = summary(checkpoint)
    ports = [each.local.port if each.local else 0 for each in checkpoint.sockets]
    assert found[9][1].startswith("127.0.0.1:")
    found[9] = (found[9][0], "127.0.0.1", *found[9][2:])  # an ephemeral port
    assert found == [
        ("tcp", f"{OLD}:5000", NONE, "LISTEN", NONE, NONE),
        ("tcp", f"{OLD}:5000", PEER, "ESTABLISHED", NONE, NONE),
        ("tcp", "[fd00:2::10]:5001", NONE, "LISTEN", NONE, NONE),
        ("tcp", "[fd00:2::10]:5001", "fd00:1::2", "ESTABLISHED", NONE, NONE),
        ("tcp", "[::]:5002", NONE, "LISTEN", NONE, NONE),
        ("tcp", f"{OLD}:5002", PEER, "ESTABLISHED", NONE, NONE),  # IPv4-mapped
        ("tcp", f"{OLD}:5000", PEER, "ESTABLISHED", NONE, NONE),
        ("tcp", f"{OLD}:5000", PEER, "ESTABLISHED", NONE, NONE),
        ("tcp", "127.0.0.1:5010", NONE, "LISTEN", NONE, LOOPBACK),
        ("tcp", "127.0.0.1", "127.0.0.1", "ESTABLISHED", NONE, NONE),  # with itself
        ("tcp", "127.0.0.1:5010", "127.0.0.1", "ESTABLISHED", NONE, NONE),
        ("udp", f"{OLD}:53", NONE, NONE, NONE, NONE),
        ("tcp", f"{OLD}:5011", NONE, "LISTEN", "dev0", NONE),
        ("tcp", NONE, NONE, "CLOSED", NONE, "closed"),
        ("udp", NONE, NONE, NONE, NONE, NO_PORT),
    ]
    assert len(ports) == 15
    assert len(checkpoint.connections) == 7
    assert [number for number, each in enumerate(checkpoint.sockets) if each.both_ends] == [9, 10]
    assert checkpoint.inventory is not None
    assert checkpoint.inventory.network_lock is NetworkLock.NFTABLES
    assert len(checkpoint.inventory.run_id or "") == 36
    assert checkpoint.inventory.tcp_close is False


def test_a_dump_of_udp() -> None:
    checkpoint = read_checkpoint_with_queues(CORPUS / "udp")

    assert summary(checkpoint) == [
        ("udp", f"{OLD}:5500", PEER, NONE, NONE, NONE),
        ("udp", "[fd00:2::10]:5501", "fd00:1::2", NONE, NONE, NONE),
        ("udp", f"{OLD}:5502", PEER, NONE, NONE, NONE),  # IPv4-mapped
        ("udp", "127.0.0.1:5503", "127.0.0.1", NONE, NONE, LOOPBACK),
        ("udp", "0.0.0.0:53", NONE, NONE, NONE, NONE),
        ("udp", "[::]:5600", NONE, NONE, NONE, NONE),
        ("udp", f"{OLD}:5601", NONE, NONE, NONE, NONE),
        ("udp", f"{OLD}:5601", NONE, NONE, NONE, NONE),  # SO_REUSEPORT
        ("udp", f"{OLD}:5602", "224.0.0.251", NONE, NONE, MULTICAST),
    ]
    assert len(checkpoint.connections) == 0
    assert [str(each.destination) for each in checkpoint.udp] == [
        f"{OLD}:5500", f"{OLD}:5502", "[fd00:2::10]:5501",
    ]  # fmt: skip
    assert [*map(str, checkpoint.udp_servers)] == ["0.0.0.0:53", "[::]:5600", f"{OLD}:5601"]
    olds = [parse_address(text) for text in (OLD, "fd00:2::10", "10.9.9.9")]
    assert [*map(str, checkpoint.udp_servers_at(olds[:2]))] == [
        f"{OLD}:53", f"{OLD}:5600", f"{OLD}:5601", "[fd00:2::10]:5600",
    ]  # fmt: skip
    assert [*map(str, checkpoint.udp_servers_at(olds[2:]))] == ["10.9.9.9:53", "10.9.9.9:5600"]
    assert Checkpoint.of(checkpoint.sockets).udp_servers == checkpoint.udp_servers
    assert Checkpoint.of(checkpoint.sockets).udp == checkpoint.udp


def test_udp_that_is_to_be_left_is_not_there_and_says_why() -> None:
    left = read_checkpoint(CORPUS / "udp").without_udp()

    assert (len(left.udp), left.udp_servers) == (0, ())
    reasons = [each.unkept for each in left.sockets]
    assert reasons == [NO_UDP, NO_UDP, NO_UDP, LOOPBACK, *[NO_UDP] * 4, MULTICAST]


def test_two_sockets_of_udp_may_have_the_same_ends(tmp_path: Path) -> None:
    """With SO_REUSEPORT, where two of TCP would be damage; and TCP may have them, too."""
    udp = {"proto": 17, "type": 2}
    entries = (socket_entry(**udp), socket_entry(id=8, **udp), socket_entry(id=9))

    checkpoint = read_checkpoint(write_images(tmp_path, *entries))

    assert checkpoint.udp == checkpoint.connections
    assert len(checkpoint.udp) == 1


def test_udp_of_the_process_with_itself_is_translated_nowhere(tmp_path: Path) -> None:
    """Of TCP the same ends are another connection, which has its other end elsewhere."""
    udp = {"proto": 17, "type": 2}
    turned = {"src_port": 40000, "dst_port": 5000}
    entries = (
        socket_entry(**udp),
        socket_entry(PEER4, LOCAL4, **udp, **turned),
        socket_entry(),
        socket_entry(dst_port=1, **udp),
    )

    checkpoint = read_checkpoint(write_images(tmp_path, *entries))

    assert [each.both_ends for each in checkpoint.sockets] == [True, True, False, False]
    olds = [parse_address(OLD), parse_address(PEER)]
    assert len(checkpoint.udp) == 3
    assert [str(each.source) for each in checkpoint.udp_at(olds[:1])] == [
        f"{PEER}:40000",
        f"{PEER}:1",
    ]
    assert [each.outcome(olds) for each in checkpoint.sockets] == ["restored"] * 2 + ["lost"] * 2


@pytest.mark.parametrize("server", [LOCAL4, bytes(4), PEER4])
def test_udp_to_a_server_of_the_same_process_stays_within(server: bytes, tmp_path: Path) -> None:
    udp = {"proto": 17, "type": 2}
    entries = (
        socket_entry(server, **udp, src_port=53, dst_port=0),
        socket_entry(LOCAL4, LOCAL4, **udp, dst_port=53),
        socket_entry(LOCAL4, LOCAL4, **udp, dst_port=54),  # to a process that is not dumped
    )

    checkpoint = read_checkpoint(write_images(tmp_path, *entries))

    olds = [parse_address(OLD)]
    within = server != PEER4
    assert [each.both_ends for each in checkpoint.sockets] == [False, within, False]
    assert [each.outcome(olds) for each in checkpoint.sockets][1:] == [
        "restored" if within else "lost", "lost",
    ]  # fmt: skip
    assert [each.both_ends for each in Checkpoint.of(checkpoint.sockets).sockets][1] == within


def test_half_closed_dump_and_its_queues() -> None:
    checkpoint = read_checkpoint_with_queues(CORPUS / "half-closed")

    found = {each.state: each.unsent for each in checkpoint.sockets if each.peer}
    assert found == {
        TcpState.CLOSE_WAIT: 0,
        TcpState.FIN_WAIT_2: 0,
        TcpState.FIN_WAIT_1: 1536,
        TcpState.LAST_ACK: 1536,
    }
    assert len(checkpoint.connections) == 4
    assert checkpoint.inventory is not None
    assert checkpoint.inventory.network_lock is NetworkLock.SKIP


def test_queues_are_looked_at_only_when_asked_for() -> None:
    quick, full = (f(CORPUS / "unsent") for f in (read_checkpoint, read_checkpoint_with_queues))

    assert [each.unsent for each in quick.sockets] == [0, 0]
    assert [each.unsent for each in full.sockets] == [0, 1536]
    assert quick.connections == full.connections


def test_what_cannot_be_kept() -> None:
    checkpoint = read_checkpoint_with_queues(CORPUS / "unkeepable")

    scope = "link-local address: CRIU drops its scope"
    dials = "not yet established: CRIU dials again on restore"
    assert summary(checkpoint) == [
        ("tcp", f"{OLD}:5300", "10.9.0.9", "SYN-SENT", NONE, dials),
        ("tcp", "[fe80::10]:5301", NONE, "LISTEN", "dev0", scope),
        ("tcp", "[fe80::10]:5301", "fe80::2", "ESTABLISHED", "dev0", scope),
    ]
    assert len(checkpoint.connections) == 0


def test_a_second_network_namespace_is_not_kept() -> None:
    checkpoint = read_checkpoint_with_queues(CORPUS / "namespaces")

    assert [each.unkept for each in checkpoint.sockets] == [None] * 2 + [OTHER_NETNS] * 3
    assert len(checkpoint.connections) == 1


def test_tcp_close_keeps_nothing_but_listeners() -> None:
    checkpoint = read_checkpoint_with_queues(CORPUS / "tcp-close")

    reason = "dumped with --tcp-close: CRIU restores it closed"
    states = {each.state for each in checkpoint.sockets if each.unkept == reason}
    assert states == {TcpState.ESTABLISHED}
    assert len(checkpoint.connections) == 0
    assert sum(each.is_listener() for each in checkpoint.sockets) == 4
    assert checkpoint.inventory is not None
    assert checkpoint.inventory.tcp_close is True


@pytest.mark.parametrize("name", DUMPS)
def test_connections_are_those_of_the_sockets(name: str) -> None:
    """The packed columns are made beside the sockets; they must say the same."""
    checkpoint = read_checkpoint(CORPUS / name)

    assert Checkpoint.of(checkpoint.sockets).connections == checkpoint.connections


ORACLE = """
import json, os, socket, struct, sys
from pycriu import images
known = {}
for name in os.listdir(sys.argv[1]):
    if name.startswith("tcp-stream-"):
        with open(os.path.join(sys.argv[1], name), "rb") as file:
            known[int(name[11:-4], 16)] = images.load(file, no_payload=True)["entries"][0]
def end(sk, words, port):
    family = {2: socket.AF_INET, 10: socket.AF_INET6}[sk["family"]]
    return [socket.inet_ntop(family, struct.pack("<%dI" % len(words), *words)), port]
out = []
with open(os.path.join(sys.argv[1], "files.img"), "rb") as file:
    for entry in images.load(file)["entries"]:
        if entry["type"] == "INETSK":
            sk = entry["isk"]
            out.append({
                "proto": sk["proto"], "state": sk["state"],
                "local": end(sk, sk["src_addr"], sk["src_port"]),
                "peer": end(sk, sk["dst_addr"], sk["dst_port"]),
                "device": sk["opts"].get("so_bound_dev") or sk.get("ifname"),
                "unsent": known.get(sk["ino"], {}).get("unsq_len", 0),
            })
print(json.dumps(out))
"""


@pytest.mark.needs("pycriu")
@pytest.mark.parametrize("name", DUMPS)
def test_pycriu_reads_the_same(name: str) -> None:
    command = ["/usr/bin/python3", "-I", "-W", "ignore", "-c", ORACLE, str(CORPUS / name)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    expected = json.loads(done.stdout)

    def end(endpoint: Endpoint | None, theirs: list[str | int]) -> list[str | int]:
        if endpoint is None:
            return [theirs[0], 0]
        mapped = "::ffff:" if str(theirs[0]).startswith("::ffff:") else ""
        return [mapped + str(endpoint.address), endpoint.port]

    states = [*TcpState]
    order = "ESTABLISHED SYN-SENT SYN-RECEIVED FIN-WAIT-1 FIN-WAIT-2 TIME-WAIT CLOSED CLOSE-WAIT"
    assert " ".join(states[:8]) == order  # TcpState stands in the kernel's order
    found = [
        {
            "proto": {"tcp": 6, "udp": 17}[each.protocol],
            "state": states.index(each.state) + 1 if each.state else theirs["state"],
            "local": end(each.local, theirs["local"]),
            "peer": end(each.peer, theirs["peer"]),
            "device": each.bound_device,
            "unsent": each.unsent,
        }
        for each, theirs in zip(
            read_checkpoint_with_queues(CORPUS / name).sockets, expected, strict=True
        )
    ]
    assert expected == found


# ---- damage -------------------------------------------------------------------------------


def copy_dump(name: str, directory: Path) -> Path:
    return shutil.copytree(CORPUS / name, directory / name)


@pytest.mark.parametrize("name", ["plain", "namespaces"])
@pytest.mark.parametrize("image", ["files.img", "inventory.img", "fdinfo-2.img"])
def test_no_truncation_loses_a_socket(name: str, image: str, tmp_path: Path) -> None:
    """Cut anywhere: an error, or (between two entries that are no sockets) nothing lost."""
    path = copy_dump(name, tmp_path) / image
    whole, data = read_checkpoint(path.parent), path.read_bytes()
    tolerated = 0
    for length in range(len(data)):
        path.write_bytes(data[:length])
        try:
            assert read_checkpoint(path.parent) == whole
            tolerated += 1
        except ImageError:
            continue
    entries = {"files.img": 3, "inventory.img": 0, "fdinfo-2.img": data.count(b"\x20")}
    assert tolerated <= entries[image], "cut in the middle of an entry, and tolerated"


@pytest.mark.parametrize("name", ["half-closed", "unsent"])
def test_no_truncated_stream_is_tolerated(name: str, tmp_path: Path) -> None:
    directory = copy_dump(name, tmp_path)
    for path in sorted(directory.glob("tcp-stream-*.img")):
        data = path.read_bytes()
        for length in [*range(min(len(data), 100)), *range(100, len(data), 61)]:
            path.write_bytes(data[:length])
            with pytest.raises(ImageError):
                read_checkpoint_with_queues(directory)
        path.write_bytes(data + b"\0")
        with pytest.raises(ImageError, match="queues of"):
            read_checkpoint_with_queues(directory)
        path.write_bytes(data)
    read_checkpoint_with_queues(directory)


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_no_flipped_octet_loses_a_socket(flip: int, tmp_path: Path) -> None:
    path = copy_dump("unsent", tmp_path) / "files.img"
    whole, data = read_checkpoint(path.parent), path.read_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= flip
        path.write_bytes(changed)
        try:
            assert len(read_checkpoint(path.parent).sockets) == len(whole.sockets)
        except ImageError:
            continue


HEAD = struct.pack("<II", COMMON, FILES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "octet 0: begins with nothing, not with 19435654 38313056"),
        (b"\x19\x43", "octet 0: begins with 1943, not with 19435654 38313056"),
        (b"PK\x03\x04" * 2, "octet 0: begins with 504b0304 504b0304, not with"),
        (HEAD, "octet 8: no entries"),
        (HEAD + b"\1", "octet 8: it ends in the middle of an entry's size"),
        (HEAD + b"\xff" * 4, "octet 8: an entry of 4294967295 octets, 0 are left"),
        (HEAD + b"\xff\xff\xff\x7f123", "octet 8: an entry of 2147483647 octets, 3 are left"),
        (HEAD + b"\0\0\0\0", "octet 12: file_entry: type (field 1): is missing"),
        (image(COMMON, FILES, entries=[REGULAR]) + b"\0", "ends in the middle of an entry's"),
        (image(COMMON, FDINFO, entries=[REGULAR]), "octet 0: begins with 19435654 32372156"),
        (image(COMMON, FILES, entries=[field(1, 4) + field(2, 1)]), "file_entry: type 4 does not"),
        (image(COMMON, FILES, entries=[file_entry(b"", kind=1)]), "file_entry: type 1 does not"),
        (image(COMMON, FILES, entries=[REGULAR + field(5, b"")]), "file_entry: 2 kinds of file"),
        (image(COMMON, FILES, entries=[REGULAR + field(64, b"")]), "file_entry: field 64: is not"),
    ],
)
def test_damaged_files_image(data: bytes, message: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "files.img").write_bytes(data)

    with pytest.raises(ImageError) as caught:
        read_checkpoint(tmp_path)

    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/files.img, octet ")
    assert caught.value.hint == "the image is damaged, or was not copied completely: copy it again"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"", "id (field 1): is missing"),
        (socket_entry(src_port=None), "src_port (field 7): is missing"),
        (socket_entry(proto=17), "udp in a socket of type 1"),
        (socket_entry(state=13), "13 is not a TCP state"),
        (socket_entry(state=0), "0 is not a TCP state"),
        (socket_entry(family=1), "addresses of 4 and 4 octets in family 1"),
        (socket_entry(family=10), "addresses of 4 and 4 octets in family 10"),
        (socket_entry(peer=b""), "addresses of 4 and 0 octets in family 2"),
        (socket_entry(local=LOCAL4 * 2), "addresses of 8 and 4 octets in family 2"),
        (socket_entry(src_port=65536), "65536 is not a port"),
        (socket_entry(dst_port=0), "ESTABLISHED from 10.2.0.10:5000 to None"),
        (socket_entry(state=10), "LISTEN from 10.2.0.10:5000 to 10.1.0.2:40000"),
        (socket_entry(state=10, src_port=0, dst_port=0), "LISTEN from None to None"),
        (
            socket_entry(bytes(10) + b"\xff\xff" + LOCAL4, bytes(15) + b"\2", family=10),
            "ESTABLISHED from 10.2.0.10:5000 to [::2]:40000",
        ),
        (socket_entry(type=2), "tcp in a socket of type 2"),
        (socket_entry(proto=6 + (1 << 32)), "proto (field 5): 4294967302 is more than 32 bits"),
        (field(1, 7) + socket_entry(), "id (field 1): is there twice"),
        (socket_entry(extra=field(13, b"")), "fown (field 13): is out of order"),
        (field(1, b"x") + socket_entry(), "id (field 1): of wire type 2"),
        (socket_entry(extra=field(17, 3)), "ifname (field 17): of wire type 0"),
        (b"\x00\x00" + socket_entry(), "field 0: of wire type 0"),
        (socket_entry(extra=field(100, 1) + field(99, 1)), "field 99: is out of order"),
        (socket_entry(LOCAL4 * 5), "src_addr (field 11): more than four words"),
        (socket_entry(LOCAL4 * 5, packed=True), "src_addr (field 11): more than four words"),
        (socket_entry(extra=field(16, field(7, 64) + field(18, 2))), "ip_opts_entry: field 18: is"),
        (
            socket_entry(opts=field(15, b"eth0"), extra=field(17, b"/")),
            "the name of its device is not one",
        ),
        (socket_entry(extra=b"\xa3\x06"), "field 100: of wire type 3"),
        (socket_entry() + b"\xa7\x06", "field 100: of wire type 7"),
        (socket_entry() + b"\xa5\x06\0\0\0", "field 100: 4 octets, 3 are left"),
        (socket_entry() + b"\xa1\x06\0", "field 100: 8 octets, 1 are left"),
        (socket_entry() + b"\xa2\x06\x02\0", "field 100: 2 octets, 1 are left"),
        (socket_entry() + b"\xa0\x06", "ends in the middle of a field"),
        (socket_entry() + b"\xa0\x06" + b"\x80" * 10 + b"\1", "a number of more than 10 octets"),
        (socket_entry() + b"\xa0\x06" + b"\xff" * 9 + b"\x02", "a number of more than 64 bits"),
        (socket_entry(opts=field(15, b"")), "the name of its device is not one"),
        (socket_entry(opts=field(15, b"\x1b[2J")), "the name of its device is not one"),
        (socket_entry(opts=field(15, b"a/b")), "the name of its device is not one"),
        (socket_entry(opts=field(15, b"\xff")), "the name of its device is not one"),
        (socket_entry(opts=field(15, b"x" * 16)), "the name of its device is not one"),
        (socket_entry(opts=b"\x7a\x05x"), "so_bound_dev (field 15): 5 octets, 1 are left"),
    ],
)
def test_damaged_socket(entry: bytes, message: str, tmp_path: Path) -> None:
    write_images(tmp_path, socket_entry(dst_port=39999, id=8), entry)

    with pytest.raises(ImageError) as caught:
        read_checkpoint(tmp_path)

    assert message in str(caught.value)
    assert "/files.img, octet " in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (b"", "img_version (field 1): is missing"),
        (field(1, 3), "images of version 3; only 2 is known"),
        (INVENTORY_ENTRY + field(11, 3), "network lock method 3 is not known"),
        (INVENTORY_ENTRY + field(13, b"x; drop"), "the run id is not of letters"),
        (INVENTORY_ENTRY + field(13, b""), "the run id is not of letters"),
        (field(1, 2) + field(3, b"\x30"), "root_ids ends in the middle of a field"),
    ],
)
def test_damaged_inventory(entry: bytes, message: str, tmp_path: Path) -> None:
    write_images(tmp_path, inventory=entry)

    with pytest.raises(ImageError) as caught:
        read_checkpoint(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path}/inventory.img, octet ")
    assert message in str(caught.value)


def test_inventory_with_two_entries(tmp_path: Path) -> None:
    write_images(tmp_path)
    two = image(INVENTORY, entries=[INVENTORY_ENTRY] * 2)
    (tmp_path / "inventory.img").write_bytes(two)

    with pytest.raises(ImageError, match="octet 4: 2 entries where there is one"):
        read_checkpoint(tmp_path)


def test_a_connection_twice(tmp_path: Path) -> None:
    write_images(tmp_path, socket_entry(), socket_entry(id=8, ino=9))

    with pytest.raises(ImageError, match="two sockets have the same connection"):
        read_checkpoint(tmp_path)


def test_a_descriptor_whose_socket_is_gone(tmp_path: Path) -> None:
    """The only trace of a files.img that was cut exactly between two entries."""
    descriptors = [field(1, n) + field(2, 0) + field(3, 4) + field(4, 3) for n in (7, 8)]
    write_images(tmp_path, socket_entry(), descriptors=descriptors)

    with pytest.raises(ImageError, match=r"fdinfo-2.img opens socket 8, which files.img does not"):
        read_checkpoint(tmp_path)


def test_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, socket_entry(), socket_entry(id=8, dst_port=1))
    monkeypatch.setattr(imagefile, "MAX_ENTRIES", 2)

    with pytest.raises(ImageError, match="more than 2 entries"):
        read_checkpoint(tmp_path)


def test_too_large_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, inventory=INVENTORY_ENTRY + field(200, bytes(60)))
    monkeypatch.setattr(imagefile, "MAX_ENTRY", 50)

    with pytest.raises(ImageError, match=r"octet 4: an entry of \d+ octets: more than 50"):
        read_checkpoint(tmp_path)


# ---- the directory ------------------------------------------------------------------------


@pytest.mark.parametrize("image_name", ["files.img", "inventory.img", "fdinfo-3.img"])
@pytest.mark.parametrize("kind", ["a symbolic link", "a FIFO", "a directory", "a socket"])
def test_only_regular_files_are_opened(image_name: str, kind: str, tmp_path: Path) -> None:
    path = write_images(tmp_path, socket_entry(), descriptors=[]) / image_name
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    match kind:
        case "a symbolic link":
            path.symlink_to("elsewhere")
        case "a FIFO":
            os.mkfifo(path)
        case "a directory":
            path.mkdir()
        case "a socket":
            here = os.open(tmp_path, os.O_RDONLY)
            with socket.socket(socket.AF_UNIX) as door:
                door.bind(f"/proc/self/fd/{here}/{image_name}")
            os.close(here)

    with pytest.raises(ImageError) as caught:
        read_checkpoint(tmp_path)

    assert str(caught.value) == f"{tmp_path}/{image_name} is {kind}, not a regular file"


@pytest.mark.root
@pytest.mark.needs("powers")
def test_a_device_is_not_opened(tmp_path: Path) -> None:
    path = write_images(tmp_path, socket_entry()) / "files.img"
    path.unlink()
    os.mknod(path, 0o020600, os.makedev(1, 3))

    with pytest.raises(ImageError, match=r"files.img is a device, not a regular file"):
        read_checkpoint(tmp_path)


def test_too_large_an_image(tmp_path: Path) -> None:
    path = write_images(tmp_path, socket_entry()) / "files.img"
    os.truncate(path, imagefile.MAX_IMAGE + 1)

    with pytest.raises(ImageError, match="67108865 octets are more than 67108864"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        ([], "give the directory that `criu dump --images-dir` wrote"),
        (["inetsk.img"], "inetsk.img is there: the dump is from before files.img"),
        (["inventory.img"], "a pre-dump has none; give the directory of the final dump"),
        (["checkpoint"], "a container's checkpoint? Then CRIU's images are in "),
    ],
)
def test_no_files_image(names: list[str], hint: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()

    with pytest.raises(ImageError) as caught:
        read_checkpoint(tmp_path)

    assert str(caught.value) == f"no files.img in {tmp_path}"
    assert (caught.value.hint or "").startswith(hint)


def test_no_inventory(tmp_path: Path) -> None:
    (write_images(tmp_path) / "inventory.img").unlink()

    with pytest.raises(ImageError, match=r"^no inventory.img in /"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "No such file"), ("file", "Not a directory"), ("fifo", "Not a directory")],
)
def test_a_directory_that_is_none(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(ImageError, match=f"^cannot open .*/{name}: {reason}"):
        read_checkpoint(tmp_path / name)


def test_the_directory_as_a_descriptor_and_as_a_magic_link() -> None:
    """CRTOOLS_IMAGE_DIR is /proc/PID/fd/N; and a descriptor is the caller's to close."""
    handle = os.open(CORPUS / "plain", os.O_RDONLY)
    try:
        by_path = read_checkpoint(str(CORPUS / "plain"))
        by_link = read_checkpoint(f"/proc/{os.getpid()}/fd/{handle}")
        by_handle = read_checkpoint(handle)
        os.fstat(handle)
    finally:
        os.close(handle)
    assert by_path == by_link == by_handle


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    read_checkpoint_with_queues(CORPUS / "half-closed")
    with pytest.raises(ImageError):
        read_checkpoint(tmp_path)

    assert os.listdir("/proc/self/fd") == before


# ---- streams ------------------------------------------------------------------------------


def test_a_stream_that_is_missing(tmp_path: Path) -> None:
    write_images(tmp_path, socket_entry())

    with pytest.raises(ImageError) as caught:
        read_checkpoint_with_queues(tmp_path)

    expected = f"no tcp-stream-abc.img in {tmp_path}, for 10.2.0.10:5000 with 10.1.0.2:40000"
    assert str(caught.value) == expected


def test_the_queues_of_a_stream_are_not_read(tmp_path: Path) -> None:
    """Their size is looked at, their octets are not: a file of 4 GiB is read at once."""
    write_images(tmp_path, socket_entry())
    path = tmp_path / "tcp-stream-abc.img"
    entry = field(1, 1) + field(3, 0xFFFFFFFF) + field(12, 0xFFFFFFFE)
    path.write_bytes(image(COMMON, TCP_STREAM, entries=[entry]))
    os.truncate(path, path.stat().st_size + 1 + 0xFFFFFFFF)

    assert read_checkpoint_with_queues(tmp_path).sockets[0].unsent == 0xFFFFFFFE


def test_more_unsent_than_there_is(tmp_path: Path) -> None:
    write_images(tmp_path, socket_entry())
    write_stream(tmp_path, outq=b"12", unsent=3)

    with pytest.raises(ImageError, match="queues of 2 octets, 2 are left"):
        read_checkpoint_with_queues(tmp_path)


# ---- one socket ---------------------------------------------------------------------------

IN6 = bytes.fromhex("fd000002000000000000000000000010")
MAPPED = bytes(10) + b"\xff\xff"


def write_root_task(directory: Path, *, pid: int = 1, net_ns_id: int = 2) -> None:
    """pstree.img with the root task *pid* and a child, and the namespaces of both."""
    tree = [field(1, pid) + field(2, 0), field(1, pid + 1) + field(2, pid)]
    (directory / "pstree.img").write_bytes(image(COMMON, PSTREE, entries=tree))
    for each, netns in ((pid, net_ns_id), (pid + 1, 99)):
        entry = field(1, 1) + field(6, netns)
        (directory / f"ids-{each}.img").write_bytes(image(COMMON, IDS, entries=[entry]))


def test_criu_in_another_namespace_than_the_root_task(tmp_path: Path) -> None:
    """As runc has it: inventory.img tells CRIU's own namespace, which no socket has to be in."""
    write_images(tmp_path, socket_entry(ns_id=10), socket_entry(ns_id=2, id=8, dst_port=39999))
    write_root_task(tmp_path, net_ns_id=10)

    sockets = read_checkpoint(tmp_path).sockets

    assert [each.unkept for each in sockets] == [None, OTHER_NETNS]


@pytest.mark.parametrize("name", ["pstree.img", "ids-1.img"])
def test_damaged_root_task(name: str, tmp_path: Path) -> None:
    write_images(tmp_path, socket_entry())
    write_root_task(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:8])

    with pytest.raises(ImageError, match=f"{name}, octet 8: no entries"):
        read_checkpoint(tmp_path)

    path.write_bytes(path.read_bytes() + b"\x01\0\0\0\x08")
    with pytest.raises(ImageError, match=f"{name}, octet 12: .* ends in the middle of a field"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "protocol", "unkept"),
    [
        ({}, "tcp", None),
        ({"state": 11}, "tcp", None),
        ({"ns_id": 2}, "tcp", None),
        ({"ns_id": 3}, "tcp", OTHER_NETNS),
        ({"state": 2}, "tcp", "not yet established: CRIU dials again on restore"),
        ({"state": 3}, "tcp", "not yet established: CRIU does not restore it"),
        ({"state": 12}, "tcp", "not yet established: CRIU does not restore it"),
        ({"state": 6}, "tcp", "closed"),
        ({"state": 7}, "tcp", "closed"),
        ({"local": bytes([127, 9, 9, 9])}, "tcp", LOOPBACK),
        ({"peer": bytes([127, 0, 0, 1])}, "tcp", LOOPBACK),
        ({"family": 10, "local": MAPPED + LOCAL4, "peer": MAPPED + PEER4}, "tcp", None),
        ({"family": 10, "local": IN6, "peer": bytes(15) + b"\1"}, "tcp", LOOPBACK),
        (
            {"family": 10, "local": IN6, "peer": b"\xfe\xbf" + bytes(14)},
            "tcp",
            "link-local address: CRIU drops its scope",
        ),
        ({"proto": 262}, "mptcp", "MPTCP: CRIU cannot restore it"),
        ({"proto": 132}, "sctp", "SCTP: CRIU cannot restore it"),
        ({"proto": 17, "type": 2, "src_port": 0, "dst_port": 0}, "udp", NO_PORT),
        ({"proto": 17, "type": 2, "ns_id": 3}, "udp", OTHER_NETNS),
        ({"proto": 17, "type": 2, "peer": bytes([224, 0, 0, 251])}, "udp", MULTICAST),
        (
            {"proto": 17, "type": 2, "peer": bytes([255] * 4)},
            "udp",
            MULTICAST.replace("224.0.0.251", "255.255.255.255"),
        ),
        (
            {"proto": 17, "type": 2, "local": bytes([224, 0, 0, 251]), "dst_port": 0},
            "udp",
            "bound to a multicast address: CRIU restores no membership",
        ),
        ({"proto": 17, "type": 3}, "raw", "raw: neither TCP nor UDP"),
        ({"proto": 136, "type": 2}, "udplite", "udplite: neither TCP nor UDP"),
        ({"proto": 1, "type": 2}, "icmp", "icmp: neither TCP nor UDP"),
        ({"proto": 6, "type": 3}, "raw", "raw: neither TCP nor UDP"),
        ({"proto": 99}, "protocol 99", "protocol 99: neither TCP nor UDP"),
    ],
)
def test_why_a_socket_is_not_kept(
    changes: dict[str, int], protocol: str, unkept: str | None, tmp_path: Path
) -> None:
    write_images(tmp_path, socket_entry(**changes))  # type: ignore[arg-type]

    checkpoint = read_checkpoint(tmp_path)

    assert [(each.protocol, each.unkept) for each in checkpoint.sockets] == [(protocol, unkept)]
    assert len(checkpoint.connections) == (unkept is None)
    assert Checkpoint.of(checkpoint.sockets).connections == checkpoint.connections


def test_the_device_that_a_socket_is_bound_to(tmp_path: Path) -> None:
    entries = (
        socket_entry(opts=field(1, 9) + field(15, b"eth0")),
        socket_entry(dst_port=2, extra=field(17, b"eth1")),
    )

    checkpoint = read_checkpoint(write_images(tmp_path, *entries))

    assert [each.bound_device for each in checkpoint.sockets] == ["eth0", "eth1"]


def test_no_lock_method_is_iptables(tmp_path: Path) -> None:
    """As CRIU itself takes images that are older than the field."""
    inventory = read_checkpoint(write_images(tmp_path)).inventory

    assert inventory is not None
    assert (inventory.network_lock, inventory.run_id) == (NetworkLock.IPTABLES, None)


# ---- properties ---------------------------------------------------------------------------

IN_PROCESS = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNKNOWN = st.one_of(
    st.integers(0, 2**64 - 1).map(lambda value: field(200, value)),
    st.binary(max_size=200).map(lambda value: field(201, value)),
    st.binary(min_size=4, max_size=4).map(lambda value: varint(202 << 3 | 5) + value),
    st.binary(min_size=8, max_size=8).map(lambda value: varint(203 << 3 | 1) + value),
)
PORTS = st.integers(1, 65535)
ENDS = st.one_of(
    st.tuples(st.just(2), st.ip_addresses(v=4), st.ip_addresses(v=4)),
    st.tuples(st.just(10), st.ip_addresses(v=6), st.ip_addresses(v=6)),
).filter(lambda ends: not (ends[0] == 10 and any(ip.ipv4_mapped for ip in ends[1:])))


@IN_PROCESS
@given(
    sockets=st.lists(
        st.tuples(ENDS, PORTS, PORTS, st.booleans(), UNKNOWN),
        max_size=8,
        unique_by=lambda each: each[:3],
    )
)
def test_what_was_written_is_read(sockets: list[tuple], tmp_path: Path) -> None:
    write_images(
        tmp_path,
        *(
            socket_entry(
                local.packed,
                peer.packed,
                packed=packed,
                extra=extra,
                family=family,
                src_port=local_port,
                dst_port=peer_port,
                id=count,
            )
            for count, ((family, local, peer), local_port, peer_port, packed, extra) in enumerate(
                sockets
            )
        ),
    )

    checkpoint = read_checkpoint(tmp_path)

    assert [FourTuple(each.local, each.peer) for each in checkpoint.sockets] == [
        FourTuple(Endpoint(local, local_port), Endpoint(peer, peer_port))
        for (_, local, peer), local_port, peer_port, _, _ in sockets
    ]
    assert Checkpoint.of(checkpoint.sockets).connections == checkpoint.connections


SMALL = Message(
    "small", numbers={1: "one", 16: "far"}, octets={2: "two"}, words={3: "many"}, optional="far two"
)


@given(st.binary(max_size=40))
def test_any_octets_are_read_or_are_damage(data: bytes) -> None:
    """Never another exception."""
    try:
        numbers, strings = decode(data, SMALL)
    except Damage:
        return
    assert number(1) in numbers
    assert len(strings.get(octets(3), b"")) % 4 == 0


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_numbers_of_all_lengths(one: int, far: int, two: bytes) -> None:
    numbers, strings = decode(field(1, one) + field(2, two) + field(16, far), SMALL)

    assert numbers == {number(1): one, number(16): far}
    assert strings == {octets(2): two}


# ---- time ---------------------------------------------------------------------------------


def test_ten_thousand_sockets_are_read_in_time(tmp_path: Path) -> None:
    """Some 14 µs each, when measured; the bound is for a busy machine."""
    tail = field(13, b"x" * 10) + field(14, b"\x08\x01" * 17) + field(16, b"") + field(18, 2)
    entries = [
        socket_entry(ino=20000 + n, id=n, src_port=5000, dst_port=1024 + n)[:-6] + tail
        for n in range(10_000)
    ]
    write_images(tmp_path, *entries)

    start = time.process_time()
    checkpoint = read_checkpoint(tmp_path)

    assert time.process_time() - start < 1.0
    assert len(checkpoint.connections) == 10_000
    assert isinstance(checkpoint.sockets[0], Socket)
