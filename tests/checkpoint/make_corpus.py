"""the maker of corpus/: dumps small processes with a real CRIU, keeps the images natkeep reads.

Usage, as root:  unshare --net --pid --mount --fork --mount-proc \\
                     python3 -I tests/checkpoint/make_corpus.py OUT CRIU [ARGUMENT]...

Run it with the system's python3, from a directory that says nothing about you: the images hold
the paths of the files that the process has open. Every dump is made in fresh namespaces, where
both 10.2.0.10 and its peers are local addresses; only the serving process is dumped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

OLD4, PEER4, OLD6, PEER6 = "10.2.0.10", "10.1.0.2", "fd00:2::10", "fd00:1::2"
LOCK = {"skip": ["--network-lock", "skip"], "nft": ["--network-lock", "nftables"]}


def pair(local: str, peer: str, port: int, *, listen: str | None = None) -> tuple:
    """A listener of the process, its accepted socket and the peer's socket."""
    family = socket.AF_INET6 if ":" in (listen or local) else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((listen or local, port))
    listener.listen(7)
    source = (peer, 0)
    client = socket.create_connection((local, port), source_address=source)
    return listener, listener.accept()[0], client


def plain(keep: list, theirs: list) -> None:
    """IPv4, IPv6, IPv4-mapped; listeners; UDP; loopback; unbound; bound to a device."""
    for number, (local, peer, listen) in enumerate(
        [(OLD4, PEER4, None), (OLD6, PEER6, None), (OLD4, PEER4, "::")]
    ):
        listener, accepted, client = pair(local, peer, 5000 + number, listen=listen)
        keep += [listener, accepted]
        theirs.append(client)
    for _ in range(2):  # more connections of one listener
        theirs.append(socket.create_connection((OLD4, 5000), source_address=(PEER4, 0)))
        keep.append(keep[0].accept()[0])
    theirs[0].sendall(b"waits in the receive queue")
    keep += pair("127.0.0.1", "127.0.0.1", 5010)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((OLD4, 53))
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"dev0\0")
    bound.bind((OLD4, 5011))
    bound.listen(1)
    keep += [udp, bound, socket.socket(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)]


def half_closed(keep: list, theirs: list) -> None:
    """CLOSE-WAIT, FIN-WAIT-2 and, the peer's window being full, FIN-WAIT-1 and LAST-ACK."""
    for number, stuffed in enumerate((False, False, True, True)):
        listener, accepted, client = pair(OLD4, PEER4, 5100 + number)
        keep += [listener, accepted]
        theirs.append(client)
        if stuffed:
            stuff(accepted)
        if number in (0, 3):  # the peer closes first
            client.shutdown(socket.SHUT_WR)
            time.sleep(0.1)
        if number != 0:
            accepted.shutdown(socket.SHUT_WR)


def stuff(sender: socket.socket) -> None:
    """Fill the peer's window, so that octets stay behind that were never sent."""
    sender.setblocking(False)
    sent = 0
    try:
        while True:
            sent += sender.send(bytes(512))
    except BlockingIOError:
        pass


def unsent(keep: list, theirs: list) -> None:
    """One connection with a send queue that the peer does not take."""
    listener, accepted, client = pair(OLD4, PEER4, 5200)
    stuff(accepted)
    keep += [listener, accepted]
    theirs.append(client)


def unkeepable(keep: list, theirs: list) -> None:
    """SYN-SENT, and a link-local connection that is bound to its device."""
    syn = socket.socket()
    syn.setblocking(False)
    syn.bind((OLD4, 5300))
    syn.connect_ex(("10.9.0.9", 80))  # nobody answers behind dev0
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"dev0\0")
    index = socket.if_nametoindex("dev0")
    listener.bind(("fe80::10", 5301, 0, index))
    listener.listen(1)
    client = socket.socket(socket.AF_INET6)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"dev0\0")
    client.bind(("fe80::2", 0, 0, index))
    client.connect(("fe80::10", 5301, 0, index))
    keep += [syn, listener, listener.accept()[0]]
    theirs.append(client)


def datagrams(keep: list, theirs: list) -> None:
    """UDP: connected (IPv4, IPv6, IPv4-mapped, multicast, loopback) and not; one has a queue."""
    for bound, local, peer in (
        (OLD4, OLD4, PEER4),
        (OLD6, OLD6, PEER6),
        (f"::ffff:{OLD4}", OLD4, PEER4),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ):
        mine, its = (
            socket.socket(socket.AF_INET6 if ":" in end else socket.AF_INET, socket.SOCK_DGRAM)
            for end in (bound, peer)
        )
        its.bind((peer, 0))
        mine.bind((bound, 5500 + len(keep)))
        mapped = "::ffff:" if bound.startswith("::ffff:") else ""
        mine.connect((mapped + peer, its.getsockname()[1]))
        its.sendto(b"waits in the receive queue", (local, 5500 + len(keep)))
        keep.append(mine)
        theirs.append(its)
    for address, port in (("0.0.0.0", 53), ("::", 5600), (OLD4, 5601), (OLD4, 5601)):
        server = socket.socket(
            socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
        )
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((address, port))
        keep.append(server)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind((OLD4, 5602))
    sender.connect(("224.0.0.251", 5353))
    keep.append(sender)


def two_namespaces(keep: list, theirs: list) -> None:
    """A child in a network namespace of its own, with the same addresses."""
    listener, accepted, client = pair(OLD4, PEER4, 5400)
    keep += [listener, accepted]
    theirs.append(client)
    ready, told = os.pipe()
    if os.fork() == 0:
        for each in (*keep, *theirs):
            each.close()
        os.close(ready)
        unshare_net()
        addresses()
        inner = pair(OLD4, PEER4, 5400)
        os.write(told, b"x")
        os.close(told)
        while inner:
            time.sleep(1000)
    os.close(told)
    os.read(ready, 1)
    os.close(ready)


def unshare_net() -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")


def addresses() -> None:
    """The network of a dump: all addresses are local, link-local ones on one end of a veth pair."""
    batch = f"""link set lo up
link add dev0 type veth peer name dev1
link set dev0 up
link set dev1 up
address add {OLD4}/32 dev lo
address add {PEER4}/32 dev lo
address add {OLD6}/128 dev lo nodad
address add {PEER6}/128 dev lo nodad
address add fe80::10/64 dev dev0 nodad
address add fe80::2/64 dev dev0 nodad
address add 10.9.0.1/24 dev dev0
route add 224.0.0.0/4 dev dev0
"""
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)


def serve(make, ready: int) -> None:
    """In the child: hold the sockets; in the grandchild: hold the peers' ends."""
    os.setsid()
    log = os.open("/mnt/log", os.O_RDWR | os.O_CREAT)
    for number in range(3):
        os.dup2(log, number)
    os.close(log)
    keep: list = []
    theirs: list = []
    make(keep, theirs)
    time.sleep(0.2)
    os.write(ready, b"x")
    os.close(ready)
    # The peers' ends are given away, so that only this process's sockets are dumped.
    handed = socket.socket(socket.AF_UNIX)
    handed.connect("/mnt/peers")
    socket.send_fds(handed, [b"x"], [each.fileno() for each in theirs] or [0])
    for each in (*theirs, handed):
        each.close()
    while keep:
        time.sleep(1000)


def dump(name: str, out: str, criu: list[str], make, options: list[str]) -> None:
    """Start, dump and kill one process; keep the images that natkeep reads."""
    images = f"/mnt/{name}"
    os.makedirs(images)
    door = socket.socket(socket.AF_UNIX)
    if os.path.exists("/mnt/peers"):
        os.unlink("/mnt/peers")
    door.bind("/mnt/peers")
    door.listen(1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        for each in (read, door.fileno()):
            os.close(each)
        serve(make, write)
    os.close(write)
    peer, _ = door.accept()
    held = socket.recv_fds(peer, 1, 64)[1]
    peer.close()
    time.sleep(0.3)
    command = [*criu, "dump", "-t", str(pid), "-D", images, "-v4", "-o", "log", *options]
    done = subprocess.run(command, check=False)
    if done.returncode:
        subprocess.run(["grep", "-E", "Error|Warn", f"{images}/log"], check=False)
        raise SystemExit(f"{name}: criu failed")
    os.waitpid(pid, 0)
    for each in held:
        os.close(each)
    kept = f"{out}/{name}"
    shutil.rmtree(kept, ignore_errors=True)
    os.makedirs(kept)
    for image in os.listdir(images):
        if image in ("files.img", "inventory.img") or image.startswith(("fdinfo-", "tcp-str")):
            shutil.copyfile(f"{images}/{image}", f"{kept}/{image}")


def main() -> None:
    out, *criu = sys.argv[1:]
    out = os.path.abspath(out)
    criu = [os.path.abspath(criu[0]), *criu[1:]]
    os.closerange(3, 1024)  # what was inherited lies outside our mounts; CRIU would refuse
    subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
    os.chdir("/")
    addresses()
    for name in ("tcp_rmem", "tcp_wmem"):  # small queues make small images
        with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
            file.write("4096 4608 4608")
    established = ["--tcp-established"]
    dump("plain", out, criu, plain, established + LOCK["nft"])
    dump("half-closed", out, criu, half_closed, established + LOCK["skip"])
    dump("unsent", out, criu, unsent, established + LOCK["skip"])
    dump("unkeepable", out, criu, unkeepable, established + LOCK["skip"])
    dump("namespaces", out, criu, two_namespaces, [*established, *LOCK["skip"]])
    dump("udp", out, criu, datagrams, LOCK["skip"])
    dump("tcp-close", out, criu, plain, ["--tcp-close", *LOCK["skip"]])


if __name__ == "__main__":
    main()
