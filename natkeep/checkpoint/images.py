"""the reader of CRIU's images: which sockets a dumped process had, and how CRIU locked them.

    DIR/inventory.img      one entry: network lock, run id, the namespaces of CRIU itself
    DIR/pstree.img         an entry for each process, the root task first
    DIR/ids-PID.img        one entry: the namespaces of that process
    DIR/files.img          an entry for each open file; those of type INETSK are sockets
    DIR/fdinfo-N.img       an entry for each descriptor: which of the files it opens
    DIR/tcp-stream-X.img   the queues of the socket whose inode is X (hexadecimal): one entry,
                           then the octets of the receive queue and of the send queue

Rule: a short list is a silently lost connection, so nothing is tolerated: what cannot be
understood to the last octet is an ImageError. What is understood and cannot be kept is a socket
with a reason.
This file must never read what is in a queue, nor write anything.

The reader is our own: the protobuf library, and CRIU's pycriu with it, tolerates what must not be
tolerated, and takes longer to import than a hook may last. The tests hold this file against pycriu.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

from natkeep.checkpoint import (
    ELSEWHERE,
    LOOPBACK,
    SYNCHRONIZED,
    TCP_CLOSE,
    Checkpoint,
    Inventory,
    NetworkLock,
    Socket,
    messages,
    pair_up,
    servers_of,
)
from natkeep.checkpoint.imagefile import (
    COMMON,
    FDINFO,
    FILES,
    IDS,
    INVENTORY,
    PSTREE,
    TCP_STREAM,
    Directory,
    Place,
    check_magic,
    opened,
    read_entries,
    read_up_to,
)
from natkeep.checkpoint.judging import PROTOCOLS, STATES, find_address, judge
from natkeep.checkpoint.protobuf import Damage, Message, decode, number, octets
from natkeep.errors import ImageError
from natkeep.plan.tuples import Connections, Endpoint
from natkeep.values import replace

_ID, _INO, _FAMILY, _TYPE, _PROTO, _STATE, _SRC_PORT, _DST_PORT = (number(n) for n in range(1, 9))
_NS_ID = number(18)
_SRC_ADDR, _DST_ADDR, _OPTS, _IP_OPTS, _IFNAME = (octets(n) for n in (11, 12, 14, 16, 17))
_SO_BOUND_DEV = octets(15)
_FILE_TYPE, _FILE_ISK = number(1), octets(4)
_FD_ID, _FD_TYPE = number(1), number(3)
_MAX_STREAM_ENTRY = 4096  # 17 numbers of at most 12 octets, and room for what newer CRIUs add

_INETSK = 4  # enum fd_types
_RAW, _TYPES = 3, {"tcp": 1, "mptcp": 1, "udp": 2}  # SOCK_RAW; SOCK_STREAM, SOCK_DGRAM
_ADDRESS_SIZES = {2: 4, 10: 16}  # AF_INET, AF_INET6
_LOCKS = {0: NetworkLock.IPTABLES, 1: NetworkLock.NFTABLES, 2: NetworkLock.SKIP}
_PORT = struct.Struct("!H").pack


def read_checkpoint(directory: Place) -> Checkpoint:
    """The sockets of the images in *directory*: a path, or the open directory.

    The queues are not looked at (`unsent` is 0 throughout): that would open a file for each
    connection. ImageError for whatever is not as it should be.
    """
    with opened(directory) as images:
        return _read_sockets(images)[0]


def read_checkpoint_with_queues(directory: Place) -> Checkpoint:
    """As `read_checkpoint`, with `unsent` of each connection from its tcp-stream image.

    CRIU cannot restore a connection whose stream is missing, so that is an ImageError too.
    """
    with opened(directory) as images:
        checkpoint, inodes = _read_sockets(images)
        if checkpoint.inventory is not None and checkpoint.inventory.tcp_close:
            return checkpoint  # such a dump has no streams
        sockets = tuple(
            replace(socket, unsent=_read_unsent(images, socket, inode))
            if socket.state in SYNCHRONIZED
            else socket
            for socket, inode in zip(checkpoint.sockets, inodes, strict=True)
        )
    return replace(checkpoint, sockets=sockets)


def read_inventory(directory: Place) -> Inventory:
    """What CRIU noted about the dump in *directory* as a whole."""
    with opened(directory) as images:
        return _read_inventory(images)[0]


def has_own_netns(directory: Place) -> bool:
    """Whether the tree had another network namespace than CRIU, dumped or external.

    For each one of that kind there is an image (CRIU 4.2.1: netns-9.img, of an external one with
    its key in it), and for CRIU's own there is none.
    """
    with opened(directory) as images:
        return any(re.fullmatch(r"netns-[0-9]+\.img", name) for name in images.names())


def _read_sockets(images: Directory) -> tuple[Checkpoint, Sequence[int]]:
    """The checkpoint, and the inode of each of its sockets."""
    data = _read_needed(images, "files.img")
    inventory, criu_netns = _read_inventory(images)
    root_netns = _read_root_netns(images, criu_netns)
    sockets: list[Socket] = []
    records: list[bytes] = []
    inodes: list[int] = []
    ids: set[int] = set()
    offset = 0
    for offset, body in read_entries(images, "files.img", data, (COMMON, FILES)):
        try:
            entry = _find_socket(body)
            if entry is None:
                continue
            numbers, strings = decode(entry, messages.SOCKET_ENTRY)
            socket, record = _make_socket(numbers, strings, inventory, root_netns)
        except Damage as damage:
            raise images.damaged("files.img", offset, damage.what) from None
        sockets.append(socket)
        records.append(record)
        ids.add(numbers[_ID])
        inodes.append(numbers[_INO])
    if not offset:
        raise images.damaged("files.img", 8, "no entries, though each process has open files")
    all_ = tuple(sockets)
    kept = _select(all_, records, Socket.is_connection)
    if len(set(kept)) != len(kept):
        raise images.damaged("files.img", 0, "two sockets have the same connection")
    _check_descriptors(images, ids)
    paired = pair_up(all_, records)
    kept = kept if paired is all_ else _select(paired, records, Socket.is_connection)
    # Several of UDP may have the same ends (SO_REUSEPORT): a datagram's way is the same for all.
    udp = dict.fromkeys(_select(paired, records, Socket.is_connected_udp))
    checkpoint = Checkpoint(
        Connections.of_records(kept), paired, inventory,
        udp=Connections.of_records(udp), udp_servers=servers_of(paired),
    )  # fmt: skip
    return checkpoint, inodes


def _select(
    sockets: Sequence[Socket], records: Sequence[bytes], wanted: Callable[[Socket], bool]
) -> list[bytes]:
    return [record for socket, record in zip(sockets, records, strict=True) if wanted(socket)]


def _find_socket(body: bytes) -> bytes | None:
    """The inet_sk_entry in a file_entry, None in that of another kind of file."""
    numbers, strings = decode(body, messages.FILE_ENTRY)
    entry = strings.get(_FILE_ISK)
    if (numbers[_FILE_TYPE] == _INETSK) != (entry is not None):
        raise Damage(0, f"file_entry: type {numbers[_FILE_TYPE]} does not go with its contents")
    if len(strings) > 1:
        raise Damage(0, f"file_entry: {len(strings)} kinds of file in one")
    return entry


def _check_descriptors(images: Directory, ids: set[int]) -> None:
    """Each socket that a descriptor opens has to be among those of files.img, *ids*.

    Where files.img was cut exactly between two entries, nothing in the file itself shows it.
    """
    for image in images.names():
        if not re.fullmatch(r"fdinfo-[0-9]+\.img", image):
            continue
        data = _read_needed(images, image)
        for numbers in _read_numbers(images, image, data, FDINFO, messages.FDINFO_ENTRY):
            if numbers[_FD_TYPE] == _INETSK and numbers[_FD_ID] not in ids:
                raise ImageError(
                    f"{images.name}/{image} opens socket {numbers[_FD_ID]}, "
                    "which files.img does not have",
                    hint="files.img is cut short, or the directory holds images of two dumps",
                )


# ---- one socket --------------------------------------------------------------------------


def _make_socket(
    numbers: dict[int, int],
    strings: dict[int, bytes],
    inventory: Inventory,
    root_netns: int | None,
) -> tuple[Socket, bytes]:
    """The socket that an inet_sk_entry tells of, and its record, should it be a connection."""
    protocol = _find_protocol(numbers[_PROTO], numbers[_TYPE])
    local, peer, record, reason = _read_ends(numbers, strings)
    device = _bound_device(strings[_OPTS])
    if _IFNAME in strings:
        name = _demand_name(strings[_IFNAME])
        device = device or name
    _check_ip_options(strings.get(_IP_OPTS, b""))
    state = STATES.get(numbers[_STATE]) if protocol == "tcp" else None
    if protocol == "tcp" and state is None:
        raise Damage(0, f"inet_sk_entry: {numbers[_STATE]} is not a TCP state")
    if inventory.tcp_close and state in SYNCHRONIZED:
        reason = TCP_CLOSE
    # A socket that was never bound has no ns_id, and nor have the images of old CRIUs.
    elif (
        reason in (None, LOOPBACK)
        and root_netns is not None
        and numbers.get(_NS_ID, root_netns) != root_netns
    ):
        reason = ELSEWHERE
    try:
        return judge(protocol, state, local, peer, device, reason), record
    except ValueError:
        raise Damage(0, f"inet_sk_entry: {state} from {local} to {peer}") from None


def _read_ends(
    numbers: dict[int, int], strings: dict[int, bytes]
) -> tuple[Endpoint | None, Endpoint | None, bytes, str | None]:
    """Both ends, packed as a record too, and why no connection there can be kept, if so."""
    ours, theirs = strings.get(_SRC_ADDR, b""), strings.get(_DST_ADDR, b"")
    size = _ADDRESS_SIZES.get(numbers[_FAMILY])
    if len(ours) != size or len(theirs) != size:
        sizes = f"{len(ours)} and {len(theirs)} octets"
        raise Damage(0, f"inet_sk_entry: addresses of {sizes} in family {numbers[_FAMILY]}")
    port, peer_port = numbers[_SRC_PORT], numbers[_DST_PORT]
    if port > 65535 or peer_port > 65535:
        raise Damage(0, f"inet_sk_entry: {max(port, peer_port)} is not a port")
    address, wire, reason = find_address(ours)
    peer_address, peer_wire, peer_reason = find_address(theirs)
    local = Endpoint(address, port) if port else None
    peer = Endpoint(peer_address, peer_port) if peer_port else None
    record = wire + _PORT(port) + peer_wire + _PORT(peer_port)
    return local, peer, record, reason or (peer_reason if peer else None)


def _find_protocol(protocol: int, kind: int) -> str:
    name = PROTOCOLS.get(protocol) or f"protocol {protocol}"
    if kind == _RAW:
        return "raw"
    if kind != _TYPES.get(name, kind):
        raise Damage(0, f"inet_sk_entry: {name} in a socket of type {kind}")
    return name


@lru_cache(maxsize=256)
def _bound_device(options: bytes) -> str | None:
    """The device in a sk_opts_entry; most sockets of a process have the same options."""
    _, strings = decode(options, messages.SOCKET_OPTIONS)
    device = strings.get(_SO_BOUND_DEV)
    return None if device is None else _demand_name(device)


@lru_cache(maxsize=256)
def _check_ip_options(options: bytes) -> None:
    decode(options, messages.IP_OPTIONS)


def _demand_name(device: bytes) -> str:
    """An interface's name; it will be printed, so control characters are not taken."""
    try:
        name = device.decode()
    except UnicodeDecodeError:
        name = ""
    if not (name and len(device) < 16 and name.isprintable()) or set(name) & set(" /:"):
        raise Damage(0, "inet_sk_entry: the name of its device is not one")
    return name


# ---- what goes with the sockets ----------------------------------------------------------


def _read_inventory(images: Directory) -> tuple[Inventory, int | None]:
    """What the dump says about itself, and the number of CRIU's own network namespace."""
    image = "inventory.img"
    entries = list(read_entries(images, image, _read_needed(images, image), (INVENTORY,)))
    if len(entries) != 1:
        raise images.damaged(image, 4, f"{len(entries)} entries where there is one")
    offset, body = entries[0]
    try:
        numbers, strings = decode(body, messages.INVENTORY_ENTRY)
        if numbers[number(1)] != 2:
            raise Damage(0, f"images of version {numbers[number(1)]}; only 2 is known")
        # Images older than CRIU 3.16 do not say it; CRIU then takes iptables, too.
        method = _LOCKS.get(numbers.get(number(11), 0))
        if method is None:
            raise Damage(0, f"network lock method {numbers[number(11)]} is not known")
        run_id = strings.get(octets(13))
        if run_id is not None and not re.fullmatch(rb"[0-9A-Za-z-]{1,64}", run_id):
            raise Damage(0, "the run id is not of letters, digits and hyphens")
        root_ids, _ = decode(strings.get(octets(3), b""), messages.ROOT_IDS)
        decode(strings.get(octets(12), b""), messages.PLUGINS)
    except Damage as damage:
        raise images.damaged(image, offset, damage.what) from None
    tcp_close = bool(numbers.get(number(10), 0))
    name = None if run_id is None else run_id.decode("ascii")
    inventory = Inventory(method, name, tcp_close, has_own_netns(images))
    return inventory, root_ids.get(number(6))


def _read_root_netns(images: Directory, criu_netns: int | None) -> int | None:
    """The number of the root task's network namespace.

    inventory.img's `root_ids` are the namespaces of CRIU itself, whatever the name says: with
    runc it is in the machine's and the tree in the container's. They serve where the image of
    the root task's is missing.
    """
    try:
        root = _read_first(images, "pstree.img", PSTREE, messages.PSTREE_ENTRY)[number(1)]
        ids = _read_first(images, f"ids-{root}.img", IDS, messages.TASK_IDS)
        return ids.get(number(6), criu_netns)
    except FileNotFoundError:
        return criu_netns


def _read_first(images: Directory, image: str, magic: int, message: Message) -> dict[int, int]:
    """The numbers in the first entry of *image*; the others have to be right, too."""
    found = _read_numbers(images, image, images.read(image), magic, message)
    if not found:
        raise images.damaged(image, 8, "no entries")
    return found[0]


def _read_numbers(
    images: Directory, image: str, data: bytes, magic: int, message: Message
) -> list[dict[int, int]]:
    """The numbers in each entry of *image*, which holds *data*."""
    found = []
    for offset, body in read_entries(images, image, data, (COMMON, magic)):
        try:
            found.append(decode(body, message)[0])
        except Damage as damage:
            raise images.damaged(image, offset, damage.what) from None
    return found


def _read_needed(images: Directory, image: str) -> bytes:
    """The octets of *image*, without which there is no dump."""
    try:
        return images.read(image)
    except FileNotFoundError:
        raise _missing(images, image) from None


def _missing(images: Directory, image: str) -> ImageError:
    """The error for a directory without *image*, with a guess what the directory is instead."""
    names = images.names()
    hint = "give the directory that `criu dump --images-dir` wrote"
    if "inetsk.img" in names:
        hint = "inetsk.img is there: the dump is from before files.img, by a CRIU that is too old"
    elif "checkpoint" in names:
        hint = f"a container's checkpoint? Then CRIU's images are in {images.name}/checkpoint"
    elif "inventory.img" in names:
        hint = "a pre-dump has none; give the directory of the final dump"
    return ImageError(f"no {image} in {images.name}", hint=hint)


def _read_unsent(images: Directory, socket: Socket, inode: int) -> int:
    """The octets that the socket has never sent; the queues themselves are not read."""
    image = f"tcp-stream-{inode:x}.img"
    try:
        descriptor, size = images.open(image)
    except FileNotFoundError:
        raise ImageError(
            f"no {image} in {images.name}, for {socket.local} with {socket.peer}",
            hint="the image is not complete, CRIU could not restore it: copy it again",
        ) from None
    try:
        head = read_up_to(descriptor, 12)
        check_magic(images, image, head, (COMMON, TCP_STREAM))
        length = int.from_bytes(head[8:12], "little")
        if len(head) < 12 or length > min(_MAX_STREAM_ENTRY, size - 12):
            raise images.damaged(image, 8, f"an entry of {length} octets, {size - 12} are left")
        numbers, _ = decode(read_up_to(descriptor, length), messages.STREAM_ENTRY)
    except Damage as damage:
        raise images.damaged(image, 12 + damage.offset, damage.what) from None
    except OSError as error:
        raise ImageError(f"cannot read {images.name}/{image}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    queues, unsent = numbers[number(1)] + numbers[number(3)], numbers.get(number(12), 0)
    if size != 12 + length + queues or unsent > numbers[number(3)]:
        left = size - 12 - length
        raise images.damaged(image, 12 + length, f"queues of {queues} octets, {left} are left")
    return unsent
