"""The quick way to open a move: what natkeep-hook starts at post-restore, where NATKEEP_ID is set.

Of the time that the long way takes (natkeep.criu.hook), nine tenths are imports. So prepare leaves
a file ID.ready beside the journal (natkeep/lifecycle/open.py writes it and says its form):
which namespaces, what is sent to the kernel in each, what the journal notes before and after.

Rule: this file imports nothing but what is built into the interpreter (posix: even os would cost
another millisecond), for `python3 -I -S`, and knows nothing of what is in the messages. Whatever
is not exactly as prepare left it is left to the long way, which says what is wrong; so is a
refusal of the kernel's: the journal says then what was begun, and the long way goes on from there.

It is installed as share/natkeep/natkeep_hook_open.py, so that it is in no path of programs, and
imported from there, since what is imported is compiled once and not at each start: 1.3 ms of 9.
"""

import _signal  # type: ignore[import-not-found]  # built in, unknown to mypy
import _socket
import fcntl
import posix
import sys
from time import monotonic_ns

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from typing import NoReturn

CALL = "import sys; sys.path.append(sys.argv[1]); import natkeep_hook_open as n; n.take_long_way()"
SLOW = [sys.executable, "-I", "-S", "-c", CALL, *sys.argv[1:]]
DEFAULT_DIRECTORY = "/run/natkeep"
SYSTEM_LOG = "/dev/log"
NOT_SET = "4294967295"  # the loginuid of who never logged in
ID_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")
SECONDS = 5  # then the long way, which has its own clock, says what it waits for
REST = 1000  # ms after which the blackout is over, if CRIU goes on
PATIENCE = 0.05  # seconds, as long as an opening waits for the holder, kernel/segment_holder.py
LIMIT = 1 << 20
SO_NETNS_COOKIE = 71  # Linux 5.14
SAFE = posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK


class NotAsPreparedError(Exception):
    """Something is not as prepare left it."""


def demand(truth: object) -> None:
    if not truth:
        raise NotAsPreparedError


def variable(name: str) -> str:
    return posix.environ.get(name.encode(), b"").decode("ascii")


def read(name: str, directory: int) -> bytes:
    file = posix.open(name, posix.O_RDONLY | SAFE, dir_fd=directory)
    try:
        status = posix.fstat(file)
        demand(status.st_mode & 0o170000 == 0o100000 and status.st_size <= LIMIT)
        content = posix.read(file, LIMIT)
        demand(len(content) == status.st_size)
        return content
    finally:
        posix.close(file)


def open_state() -> int:
    """The state directory, ours alone."""
    path = variable("NATKEEP_STATE_DIR") or DEFAULT_DIRECTORY
    directory = posix.open(path, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    status = posix.fstat(directory)
    demand(status.st_uid == posix.geteuid() and not status.st_mode & 0o022)
    return directory


def lock(name: str, directory: int) -> int:
    """The lock of a move, held until the descriptor that is returned is closed; waited for."""
    held = posix.open(name, posix.O_RDONLY | SAFE, dir_fd=directory)
    fcntl.flock(held, fcntl.LOCK_EX)
    demand(posix.fstat(held).st_nlink)
    return held


class Ready:
    """The file ID.ready: lines of a word and its values."""

    def __init__(self, content: bytes) -> None:
        lines = content.decode("ascii").split("\n")
        demand(lines[0] == "natkeep-ready 5" and lines[-2:] == ["end", ""])
        self.values: dict[str, list[str]] = {}
        for line in lines[1:-2]:
            word, _, rest = line.partition(" ")
            self.values.setdefault(word, []).append(rest)

    def one(self, word: str) -> str:
        [value] = self.values[word]
        return value

    def all(self, word: str) -> list[str]:
        return self.values.get(word, [])


def identity(namespace: int) -> str:
    status = posix.fstat(namespace)
    return f"{status.st_dev}:{status.st_ino}"


def open_namespace(path: str) -> int:
    return posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)


def demand_tree(homes: list[str]) -> None:
    """The restored tree is in a namespace that the move was prepared for."""
    pid = variable("CRTOOLS_INIT_PID")
    demand(pid.isdigit())
    demand(identity(open_namespace(f"/proc/{pid}/ns/net")) in homes)


def demand_image(run_id: str) -> None:
    """The image is of the dump that the move was prepared from; the long way reads it closely."""
    if run_id == "-":
        return
    images = posix.open(variable("CRTOOLS_IMAGE_DIR"), posix.O_RDONLY | posix.O_DIRECTORY)
    field = b"\x6a" + bytes((len(run_id),)) + run_id.encode()  # number 13, a text
    demand(field in read("inventory.img", images))


def append(name: str, directory: int, lines: list[str], size: int | None = None) -> None:
    """Append lines to the journal; *size*: what it must have so far, in octets."""
    file = posix.open(name, posix.O_WRONLY | posix.O_APPEND | SAFE, dir_fd=directory)
    demand(size is None or posix.fstat(file).st_size == size)
    text = "".join(f"{line}\n" for line in lines).encode()
    demand(posix.write(file, text) == len(text))
    posix.fsync(file)
    posix.close(file)


class Site:
    """A line of Ready: a site's namespace, and what is sent there."""

    def __init__(self, line: str, current: str) -> None:
        self.known, self.cookie, last, self.batch, self.unhooking, path = line.split(" ", 5)
        self.last = int(last)
        self.namespace = open_namespace(path)
        demand(identity(self.namespace) == self.known)
        self.netlink = self.connect(self.known != current) if self.batch != "-" else None

    def connect(self, elsewhere: bool) -> _socket.socket:
        """A socket of nf_tables in the namespace, wherever the process is later on."""
        if elsewhere:
            enter(self.namespace)
        kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
        netlink = _socket.socket(_socket.AF_NETLINK, kind, 12)
        if self.cookie != "0":  # else the kernel has none, and could have given the inode again
            found = netlink.getsockopt(_socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
            demand(int.from_bytes(found, sys.byteorder) == int(self.cookie))
        return netlink

    def open(self) -> None:
        """Let the connections through, unless prepare has."""
        demand(self.netlink is None or send(self.netlink, self.batch, self.last))

    def unhook(self) -> None:
        """Take the gates out of all packets' way; refused where the ruleset has changed since."""
        if self.unhooking != "-":
            send(self.netlink or self.connect(True), self.unhooking, 2)


def find_sites(ready: Ready) -> list[Site]:
    """In the order of opening."""
    current = identity(open_namespace("/proc/self/ns/net"))
    sites = []
    for line in ready.all("site"):
        sites.append(Site(line, current))
        current = sites[-1].known
    demand(sites)
    return sites


def enter(namespace: int) -> None:
    if hasattr(posix, "setns"):  # from Python 3.12 on
        posix.setns(namespace)
        return
    import ctypes

    demand(ctypes.CDLL(None).setns(namespace, 0x40000000) == 0)


def send(netlink: _socket.socket, batch: str, last: int) -> bool:
    """One nf_tables transaction, in hexadecimal; whether the kernel took it.

    The message numbered *last* asks for an acknowledgement.
    """
    netlink.send(bytes.fromhex(batch))
    while True:
        data = netlink.recv(1 << 16)
        while len(data) >= 20:
            length, type_, sequence, errno = (
                int.from_bytes(data[at : at + width], sys.byteorder)
                for at, width in ((0, 4), (4, 2), (8, 4), (16, 4))
            )
            if type_ == 2 and (errno or sequence == last):
                return not errno
            data = data[(length + 3) & ~3 or len(data) :]


def deliver(directory: int, name: str, request: str, *, waits: bool = False) -> None:
    """Have the holder deliver what peers said meanwhile; without it they say it again.

    Of segments no answer is waited for: CRIU has yet to take the sockets out of repair.
    """
    asking = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    asking.settimeout(PATIENCE)
    try:
        asking.connect(f"/proc/self/fd/{directory}/{name}")
        asking.sendall(request.encode())
        if waits:
            asking.recv(128)
    except OSError:
        pass


def late(*_: object) -> None:
    raise NotAsPreparedError


def serve(move_id: str, directory: int) -> list[Site]:
    ready = Ready(read(f"{move_id}.ready", directory))
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        demand(file.read().decode().strip() == ready.one("boot"))
    demand_tree(ready.all("home"))
    demand_image(ready.one("image"))
    sites = find_sites(ready)
    journal = f"{move_id}.journal"
    append(journal, directory, ready.all("doing"), int(ready.one("journal")))
    for name in ready.all("datagrams"):  # while the gate is closed, and none once it may be open
        until = monotonic_ns() + int(PATIENCE * 0.8e9)
        deliver(directory, name, f"datagrams {until}\n", waits=True)
    for site in sites:
        site.open()
    for name in ready.all("hold"):
        deliver(directory, name, "deliver\n")
    at = monotonic_ns()
    append(journal, directory, [f'{line[:-1]},"at":{at}}}' for line in ready.all("done")])
    return sites


def main() -> None:
    """Open the move that the environment names, and leave; the long way otherwise."""
    try:
        sites = serve_in_time()
    except Exception:
        posix.execv(SLOW[0], SLOW)
    try:
        posix.write(2, f"natkeep-hook: {variable('NATKEEP_ID')}: gate open\n".encode())
        parent = posix.getppid()  # 0 where CRIU is outside of the pid namespace that we are in
        criu = posix.pidfd_open(parent) if parent else None
        if not posix.fork():
            unhook(sites, criu)
    finally:  # also where stderr is closed, or no process can be left behind: the move is open
        posix._exit(0)


def unhook(sites: list[Site], criu: int | None) -> None:
    """Take the gates out of all packets' way, by a process that no restore waits for; exit.

    CRIU's own end waits for the kernel in the same queue, so that comes first, if it comes soon.
    Then it is over in some milliseconds: it may stand in the control group of a container. It has
    no lock, and no descriptor but those it needs: nothing waits for it.
    """
    import select

    try:
        _signal.setitimer(_signal.ITIMER_REAL, SECONDS)
        posix.setsid()
        nowhere = posix.open("/dev/null", posix.O_RDWR)
        for standard in (0, 1, 2):
            posix.dup2(nowhere, standard)
        needed = {0, 1, 2, criu, *(site.namespace for site in sites)}
        needed |= {site.netlink.fileno() for site in sites if site.netlink is not None}
        for name in posix.listdir("/proc/self/fd"):
            if int(name) not in needed:
                posix.closerange(int(name), int(name) + 1)  # whatever it is, also if it is none
        posix.chdir("/")
        poll = select.poll()
        if criu is not None:
            poll.register(criu, select.POLLIN)
        poll.poll(REST)
        for site in sites:
            site.unhook()
        note(f"{variable('NATKEEP_ID')}: gate open")
    finally:
        posix._exit(0)


def note(line: str) -> None:
    """A line in the system's log (facility daemon), as natkeep/system_log.py writes it."""
    log = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    log.settimeout(0)
    log.connect(SYSTEM_LOG)
    log.send(f"<29>natkeep-hook[{posix.getpid()}]: {line} (by {read_user()})".encode())


def read_user() -> str:
    """Who became root by sudo, else who logged in, as natkeep/system_log.py tells it."""
    if name := variable("SUDO_USER"):
        return name
    uid = NOT_SET
    try:
        with open("/proc/self/loginuid", "rb") as file:
            uid = file.read().decode().strip()
    except OSError:  # a kernel without audit
        pass
    return f"uid {posix.getuid() if uid == NOT_SET else uid}"


def take_long_way(module: str = "natkeep.criu.hook") -> "NoReturn":
    """The program that *module* is, of the installation that this file belongs to.

    `pip install --user` and `--prefix` put it where an isolated interpreter does not look; it goes
    before what else the system has by this name, and behind the standard library.
    """
    import site

    version = "lib/python{}.{}".format(*sys.version_info)
    for kind in ("site", "dist"):  # dist: Debian's word for it
        site.addsitedir(f"{sys.argv[1]}/../../{version}/{kind}-packages")
    site.main()
    try:
        program = __import__(module, fromlist=("program",)).program
    except ModuleNotFoundError as error:
        sys.exit(f"natkeep-hook: {sys.executable} has no {error.name}: install natkeep anew")
    sys.exit(program())


def serve_in_time() -> list[Site]:
    """Open the move that the environment names, or fail in time; the sites."""
    try:
        _signal.signal(_signal.SIGALRM, late)
        _signal.setitimer(_signal.ITIMER_REAL, SECONDS)
        move_id = variable("NATKEEP_ID")
        demand(move_id and len(move_id) <= 32 and ID_ALPHABET.issuperset(move_id))
        directory = open_state()
        held = lock(f"{move_id}.journal", directory)
        sites = serve(move_id, directory)
        posix.close(held)
        return sites
    finally:
        _signal.setitimer(_signal.ITIMER_REAL, 0)
