"""Opens network namespaces, enters them and leaves them again.

Rule: this is the only file that calls setns(). A namespace is opened once; after that it is
known by its handle and its identity (plan/identity.py), never looked up by name again. One that
is named by a pid is opened below the process's own directory in /proc, which is held, so that it is
never that of another process with the same number.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from natkeep.errors import JournalError, KernelError, NatkeepError, UsageError
from natkeep.plan.identity import Identity
from natkeep.values import dataclass, replace

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_SO_NETNS_COOKIE = 71
_NAMED = "/run/netns"
_OF_PROCESS = "ns/net"


_HERE: ContextVar[Identity | None] = ContextVar("here", default=None)
"""The namespace of the block that this thread is in."""


class NamespaceGoneError(JournalError):
    """A namespace that a journal names does not exist any more, or is out of reach."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """An open network namespace; its identity stays the same however it was named."""

    fd: int
    identity: Identity
    label: str


def open_namespace(spec: str) -> Namespace:
    """Open the namespace named *spec*: a name below /run/netns, a path, `pid:N`, or empty (ours).

    UsageError when there is none of that name, or what is there is no network namespace.
    """
    label = spec or "this namespace"
    path = path_of(spec)
    try:
        with held(spec) as process:
            # O_NONBLOCK, so that a FIFO in its place cannot hold us.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(path if process is None else _OF_PROCESS, flags, dir_fd=process)
    except OSError as error:
        raise UsageError(
            f"no network namespace {label!r}: {error.strerror}",
            hint="a name as `ip netns` lists it, a path, or pid:N",
        ) from error
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        os.close(fd)
        raise UsageError(f"{label!r} is not a network namespace")
    return _identify(fd, label)


def _identify(fd: int, label: str) -> Namespace:
    """The open namespace, with the cookie where we may enter it: what may not, changes nothing."""
    status = os.fstat(fd)
    found = Namespace(fd, Identity(status.st_dev, status.st_ino), label)
    with suppress(KernelError, OSError), inside(found):
        return replace(found, identity=_identity_here())
    return found


def _identity_here() -> Identity:
    """That of the namespace which the calling thread is in."""
    status = os.stat("/proc/thread-self/ns/net")
    cookie = b""
    # Any socket tells; before 5.14 none does.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_, suppress(OSError):
        cookie = any_.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return Identity(status.st_dev, status.st_ino, int.from_bytes(cookie, sys.byteorder))


@contextmanager
def held(spec: str) -> Iterator[int | None]:
    """The process that *spec* names, if it names one, is still the same when the block ends.

    Yielded is a handle of its directory in /proc: what is opened below that is this process's, or
    nothing. A pidfd would be asked for in our own pid namespace, which is another than that of
    /proc where CRIU restores into a pid namespace that is there (its script is in that one).
    ProcessLookupError where there is none, or not any more.
    """
    if not spec.startswith("pid:"):
        yield None
        return
    gone = ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    try:
        process = os.open(f"/proc/{spec[4:]}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise gone from None
    try:
        yield process
        try:
            os.stat(_OF_PROCESS, dir_fd=process)
        except FileNotFoundError:
            raise gone from None
    finally:
        os.close(process)


def find_namespace(spec: str, identity: Identity) -> Namespace:
    """The namespace that was once opened as *spec* and has *identity*.

    A name may have been given to another namespace since, and a pid to another process, so the
    identity decides; it is then looked for in ours, the named ones, and those of all processes
    that we see. NamespaceGoneError when it is nowhere: it no longer exists, or is out of reach.
    """
    for candidate in _candidates(spec):
        try:
            status = os.stat(candidate)
        except OSError:
            continue
        if Identity(status.st_dev, status.st_ino) == identity:
            with suppress(UsageError):  # it has ended meanwhile
                found = open_namespace(candidate)
                if found.identity == identity:
                    return found
                os.close(found.fd)
    name = repr(spec) if spec else "of the move"
    raise NamespaceGoneError(f"the network namespace {name} is gone")


def _candidates(spec: str) -> Iterator[str]:
    if spec:
        yield path_of(spec)
    yield "/proc/self/ns/net"
    for directory, suffix in ((_NAMED, ""), ("/proc", "/ns/net")):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            if directory == _NAMED or name.isdigit():
                yield f"{directory}/{name}{suffix}"


def path_of(spec: str) -> str:
    """Where the namespace named *spec* is found; UsageError when it cannot be a name."""
    if not spec:
        return "/proc/self/ns/net"
    if "\0" in spec:
        raise UsageError(f"{spec!r} is not the name of a network namespace")
    if spec.startswith("pid:"):
        pid = spec[4:]
        if not (pid.isascii() and pid.isdigit()):
            raise UsageError(f"{spec!r} is not of the form pid:N")
        return f"/proc/{pid}/ns/net"
    if "/" in spec:
        return spec
    if spec in (".", ".."):
        raise UsageError(f"{spec!r} is not the name of a network namespace")
    return f"{_NAMED}/{spec}"


@contextmanager
def inside(namespace: Namespace) -> Iterator[None]:
    """The calling thread is in *namespace* while the block runs.

    Sockets made inside stay in it; that is how one process talks to several namespaces.
    """
    if _HERE.get() == namespace.identity:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _identity_here() == namespace.identity:
            with _noting(namespace.identity):
                yield
            return
        _setns(namespace.fd, namespace.label)
        try:
            # Before anything is changed: a handle that was closed may be another's by now.
            if _identity_here() != namespace.identity:
                raise KernelError(f"{namespace.label}: its handle leads to another namespace")
            with _noting(namespace.identity):
                yield
        finally:
            # Not a KernelError: to go on elsewhere is worse than an entry refused.
            _setns(home, "the namespace we came from", NatkeepError)
    finally:
        os.close(home)


@contextmanager
def _noting(identity: Identity) -> Iterator[None]:
    """A block in the block need not find out where it is: of many moves each asks a dozen times."""
    token = _HERE.set(identity)
    try:
        yield
    finally:
        _HERE.reset(token)


@contextmanager
def errors_at(place: object) -> Iterator[None]:
    """An OSError or KernelError in the block becomes a KernelError that names *place*."""
    try:
        yield
    except KernelError as error:
        raise KernelError(f"{place}: {error}", hint=error.hint) from error
    except OSError as error:
        hint = "natkeep needs CAP_NET_ADMIN there" if error.errno in (1, 13) else None
        raise KernelError(f"{place}: {error.strerror or error}", hint=hint) from error


def _setns(fd: int, label: str, kind: type[NatkeepError] = KernelError) -> None:
    import ctypes  # late: most processes never enter another namespace

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        raise kind(
            f"cannot enter {label}: {os.strerror(ctypes.get_errno())}",
            hint="natkeep needs CAP_SYS_ADMIN to enter another network namespace",
        )


@contextmanager
def entered(spec: str) -> Iterator[None]:
    """The same by a namespace's name; errors of open_namespace.

    Its handle is closed again: select() takes few, and libnftables calls that.
    """
    namespace = open_namespace(spec)
    try:
        with inside(namespace):
            yield
    finally:
        os.close(namespace.fd)
