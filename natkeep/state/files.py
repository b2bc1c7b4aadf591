"""The files of the state directory: opened by its handle, read and written whole.

Rule: nothing is opened through a link, and nothing read that others may write. A new file is on
disk before it takes its name, an appended line before its writer goes on. What a file says is
state/directory.py's; every error names the file.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from natkeep import faultpoints
from natkeep.errors import JournalError

DEFAULT_DIRECTORY = "/run/natkeep"
MARK = b"natkeep\n"
"""What the file `lock` says in a directory that natkeep has made, or found empty."""

_SIZE_LIMIT = 64 << 20


class StateFiles:
    """The directory, held by one handle; where there is none it has no files.

    turns: how often a name was added or removed by this handle.
    """

    def __init__(self, path: str | None, *, create: bool) -> None:
        self.path = path or os.environ.get("NATKEEP_STATE_DIR") or DEFAULT_DIRECTORY
        self._fd: int | None = None
        self.turns = 0
        self._later: list[tuple[str, str]] | None = None
        if create:
            try:
                os.makedirs(self.path, mode=0o700, exist_ok=True)
            except OSError as error:
                raise JournalError(
                    f"cannot make the state directory {self.path}: {error.strerror}"
                ) from error
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise JournalError(
                f"cannot open the state directory {self.path}: {error.strerror}"
            ) from error
        weakref.finalize(self, os.close, self._fd)
        if create and self._is_empty():
            self._mark()
        _refuse_foreign(f"the state directory {self.path}", os.fstat(self._fd), "700 " + self.path)

    @contextmanager
    def opened(self, name: str, flags: int) -> Iterator[int | None]:
        """A file to be locked; None where there is no directory, FileNotFoundError without it."""
        if self._fd is None:
            yield None
            return
        try:
            fd = self._open(name, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JournalError(f"{self.path}/{name}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise JournalError(f"{self.path}/{name} is not a file")
            yield fd
        finally:
            os.close(fd)

    def _is_empty(self) -> bool:
        with os.scandir(self._fd) as entries:
            return next(entries, None) is None

    def _mark(self) -> None:
        """Say that the directory, which is empty, is natkeep's from now on."""
        with suppress(OSError):  # another natkeep did, or what cannot be written is said later
            fd = self._open("lock", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                os.write(fd, MARK)
            finally:
                os.close(fd)

    def is_there(self) -> bool:
        """Whether there is a directory."""
        return self._fd is not None

    def names(self) -> list[str]:
        """What is in the directory."""
        return [] if self._fd is None else os.listdir(self._fd)

    def has(self, name: str) -> bool:
        """Whether it is there, whatever it is; as quick beside a thousand as beside none."""
        if self._fd is None:
            return False
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            return True
        return False

    def changed(self) -> int:
        """When a name was last added to the directory or removed, in nanoseconds of the epoch."""
        return 0 if self._fd is None else os.fstat(self._fd).st_mtime_ns

    def inodes(self, suffix: str) -> dict[str, int]:
        """The files whose names end so, and the number of each: another file has another."""
        if self._fd is None:
            return {}
        with os.scandir(self._fd) as entries:
            return {one.name: one.inode() for one in entries if one.name.endswith(suffix)}

    def unlink(self, name: str) -> None:
        """Remove the file, if there is one."""
        if self._fd is not None:  # without it the name would be one of the working directory
            self.turns += 1
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def _open(self, name: str, flags: int) -> int:
        if self._fd is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return os.open(
            name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self._fd
        )

    @contextmanager
    def errors_of(self, name: str) -> Iterator[None]:
        """What fails is a JournalError that names the file."""
        try:
            yield
        except OSError as error:
            raise JournalError(f"{self.path}/{name}: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        """All of a file; FileNotFoundError, or JournalError for anything else."""
        try:
            fd = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JournalError(f"cannot open {self.path}/{name}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise JournalError(f"{self.path}/{name} is not a file")
            _refuse_foreign(f"{self.path}/{name}", status)
            if status.st_size > _SIZE_LIMIT:
                raise JournalError(f"{self.path}/{name} is too large")
            return _read_all(fd, status.st_size)
        finally:
            os.close(fd)

    def follow(self, name: str, *, grows: bool) -> Callable[[], bool]:
        """Answers whether the file is still what it is now, which may be that there is none.

        It is not when it was removed or replaced; nor when it has grown, unless it *grows*.
        """
        try:
            fd = self._open(name, os.O_RDONLY)  # held, or its inode's number may be given again
        except FileNotFoundError:
            return lambda: not self.has(name)
        except OSError:  # what is wrong with it is said where it is read
            return lambda: True
        size = os.fstat(fd).st_size

        def is_same() -> bool:
            status = os.fstat(fd)
            return status.st_nlink > 0 and (grows or status.st_size == size)

        weakref.finalize(is_same, os.close, fd)
        return is_same

    def size(self, name: str) -> int:
        """Octets of a file that is there."""
        with self.errors_of(name):
            fd = self._open(name, os.O_RDONLY)
            try:
                return os.fstat(fd).st_size
            finally:
                os.close(fd)

    def read_start(self, name: str) -> bytes:
        """The first line, and what of the others is read with it."""
        fd = self._open(name, os.O_RDONLY)
        try:
            start = part = os.read(fd, 4096)
            while part and b"\n" not in part and len(start) < _SIZE_LIMIT:
                part = os.read(fd, 1 << 16)
                start += part
            return start
        finally:
            os.close(fd)

    def write_new(
        self, name: str, content: bytes, first: Callable[[int], None] = lambda fd: None
    ) -> None:
        """Have the file on disk, whole, in the place of an earlier one.

        first: called with its descriptor, before it has its name.
        """
        temporary = f".{name}.new"
        of = name.rpartition(".")[2]
        with self.errors_of(name):
            if self._fd is None:  # without it the name would be one of the working directory
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            self.turns += 1
            faultpoints.reach("journal-create", of)
            with _written(temporary, content, dir_fd=self._fd) as fd:
                faultpoints.reach("journal-written", of)
                self._sync_file(fd)
                first(fd)
                if self._later is not None:
                    self._later.append((temporary, name))
                    return
                self._rename(temporary, name)
            faultpoints.reach("journal-renamed", of)
            self.sync()

    def _rename(self, temporary: str, name: str) -> None:
        faultpoints.reach("journal-rename", name.rpartition(".")[2])
        self.turns += 1
        os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What is written in the block is on disk when it ends, in one go.

        New files take their names then, in order; all but those of a block that fails.
        """
        later = self._later = list[tuple[str, str]]()
        try:
            yield
            self._later = None
            if self._fd is not None:
                with self.errors_of(""):
                    _sync_all(self._fd)
            renamed = bool(later)
            while later:
                with self.errors_of(later[0][1]):
                    self._rename(*later[0])
                faultpoints.reach("journal-renamed", later.pop(0)[1].rpartition(".")[2])
            if renamed:
                self.sync()
        finally:
            self._later = None
            for temporary, _ in later:
                self.unlink(temporary)

    def _sync_file(self, fd: int) -> None:
        if self._later is None:
            os.fsync(fd)

    def sync(self) -> None:
        """Have on disk what was removed and renamed."""
        if self._fd is not None:
            os.fsync(self._fd)

    def append(self, name: str, line: bytes, state: str) -> None:
        """Append a line and have it on disk; state: what it says, to the faults."""
        with self.errors_of(name):
            fd = self._open(name, os.O_RDWR | os.O_APPEND)
            try:
                _drop_unfinished_line(fd)
                faultpoints.reach("journal-append", state)
                faultpoints.reach("journal-torn", state, lambda: os.write(fd, line[:20]))
                _write_all(fd, line)
                faultpoints.reach("journal-appended", state)
                self._sync_file(fd)
            finally:
                os.close(fd)


def replace_file(
    path: str | os.PathLike[str],
    content: bytes,
    *,
    mode: int = 0o600,
    durable: bool,
    first: Callable[[int], None] = lambda fd: None,
) -> None:
    """Have the file there, whole, in the place of an earlier one; OSError where it cannot be.

    mode: but for the umask. durable: it is on disk before this returns. first: called with its
    descriptor, which appends, before it has its name. Until then it is named `.NAME.PID`.
    """
    directory, name = os.path.split(os.path.abspath(path))
    # By the pid, since two processes may write the same one at once.
    temporary = os.path.join(directory, f".{name}.{os.getpid()}")
    with _written(temporary, content, mode) as fd:
        if durable:
            os.fsync(fd)
        first(fd)
        os.rename(temporary, path)
    if durable:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


@contextmanager
def _written(
    name: str, content: bytes, mode: int = 0o600, dir_fd: int | None = None
) -> Iterator[int]:
    """The descriptor of a new file, which is removed again if the block fails."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=dir_fd)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(name, flags, mode, dir_fd=dir_fd)
    try:
        _write_all(fd, content)
        yield fd
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=dir_fd)
        raise
    finally:
        os.close(fd)


def _sync_all(fd: int) -> None:
    """All of the file system that *fd* is on; Python has no name for it."""
    import ctypes  # late: most verbs write one file at a time

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _read_all(fd: int, size: int) -> bytes:
    """To the end, which by now may be behind *size*."""
    content = more = os.read(fd, size + 1)
    while more and len(content) > size:  # of a file less is read only where it ends
        more = os.read(fd, 1 << 16)
        content += more
    return content


def _refuse_foreign(name: str, status: os.stat_result, right: str = "") -> None:
    """A program that can write there decides what natkeep undoes, as root."""
    if status.st_uid != os.geteuid() and os.geteuid() == 0:
        raise JournalError(f"{name} belongs to uid {status.st_uid}")
    if status.st_mode & 0o022:
        hint = f"chmod {right}" if right else None
        raise JournalError(f"{name} can be written by others", hint=hint)


def _drop_unfinished_line(fd: int) -> None:
    """Cut off what a killed writer left without its newline, or the next line would join it."""
    size = os.fstat(fd).st_size
    while size and os.pread(fd, 1, size - 1) != b"\n":
        size -= 1
    os.ftruncate(fd, size)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
