"""the table of bad input: tests/bad_input/*.txt, row by row.

A row is how it comes about, what is called, and all that is said about it:

    # a journal that is no JSON           the name of the row
    + put state/web.journal garbage\n     what is arranged beforehand (see ARRANGEMENTS)
    $ natkeep open web                    what is called; natkeep-hook as CRIU does at post-restore
    7 the journal of web is corrupt: …    the exit code, and all of the message
      (…)                                 and of the hint, if there is one

Each row runs in a directory of its own, with a list, an image and the journal of `web`; natkeep's
code runs in this process, and this process in a namespace, one for all rows, where `web` stands
prepared with its gate closed, so that "nothing changed" says something:

    destination 10.3.0.20 (NEW), fd00:3::20; OLD is 10.2.0.10, the peers are 10.1.0.0/16

Code and stderr have to be exactly as they stand there, and stdout empty, unless `|` lines say what
is on it. Ruleset, addresses, routes and every file have to be as they were.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from natkeep import cli, policy
from natkeep.criu import hook
from natkeep.kernel.netns import Namespace, inside, open_namespace

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

HERE = Path(__file__).parent
CORPUS = HERE / "checkpoint/corpus"
MAP = "10.2.0.10=10.3.0.20"
STREAM = min(path.name for path in (CORPUS / "plain").glob("tcp-stream-*"))
SUBJECTS = ("flags", "connections", "image", "journal", "configuration", "environment")


class Row(NamedTuple):
    name: str
    arrangements: list[list[str]]
    words: list[str]
    out: list[str]
    said: list[str]


def read_table(path: Path) -> Iterator[Row]:
    """The rows of one file; a line that is none of a row is a mistake."""
    for block in path.read_text().strip().split("\n\n"):
        head, *lines = block.splitlines()
        assert head[:2] == "# ", f"{path.name}: {head!r} is not the name of a row"
        signs: dict[str, list[str]] = {"+": [], "$": [], "|": [], "": []}
        for line in lines:
            sign = line[0] if line[0] in "+$|" else ""
            signs[sign].append(line[2:] if sign else line)
        (call,) = signs["$"]
        yield Row(
            head[2:],
            [each.split(" ") for each in signs["+"]],
            shlex.split(call),
            signs["|"],
            signs[""],
        )


TABLE = [
    (subject, row) for subject in SUBJECTS for row in read_table(HERE / f"bad_input/{subject}.txt")
]

# ---- how bad things are arranged -----------------------------------------------------------------


def _text(words: tuple[str, ...]) -> bytes:
    r"""The words again, with \n, \xff and the like for what they stand for."""
    return " ".join(words).encode().decode("unicode_escape").encode("latin-1")


def _clear(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return path


def put(path: Path, *words: str) -> None:
    _clear(path).write_bytes(_text(words))


def add(path: Path, *words: str) -> None:
    path.write_bytes(path.read_bytes() + _text(words))


def sub(path: Path, old: str, new: str) -> None:
    data, wanted = path.read_bytes(), _text((old,))
    assert wanted in data
    path.write_bytes(data.replace(wanted, _text((new,))))


def cut(path: Path, octets: str) -> None:
    path.write_bytes(path.read_bytes()[: -int(octets)])


def link(path: Path) -> None:
    """What was there is elsewhere, and a link leads there."""
    other = path.parent / "elsewhere"
    if path.exists():
        path.rename(other)
    else:
        other.write_text("mine")
    path.symlink_to(other)


def dangle(path: Path) -> None:
    _clear(path).symlink_to("nowhere")


def fifo(path: Path) -> None:
    os.mkfifo(_clear(path))


def folder(path: Path) -> None:
    _clear(path).mkdir()


def device(path: Path) -> None:
    """The one that reads as zeros without end."""
    os.mknod(_clear(path), stat.S_IFCHR | 0o666, os.stat("/dev/zero").st_rdev)


def listening(path: Path) -> None:
    """A socket in the file system."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(_clear(path)))


def mode(path: Path, bits: str) -> None:
    path.chmod(int(bits, 8))


def owner(path: Path, uid: str) -> None:
    os.chown(path, int(uid), -1)


def size(path: Path, octets: str) -> None:
    """So many zeros, which take no room."""
    with _clear(path).open("wb") as file:
        file.truncate(int(octets))


def corpus(path: Path, dump: str) -> None:
    """The same file of another dump."""
    shutil.copy(CORPUS / dump / path.name, path)


def copy(path: Path, name: str) -> None:
    shutil.copytree(path, path.parent / name)


def pack(path: Path, folder: str, prefix: str) -> None:
    """The files of a directory in an archive, as a container engine writes it."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for file in sorted((path.parent / folder).iterdir()):
            archive.add(file, f"{prefix}{file.name}")


ARRANGEMENTS: dict[str, Callable[..., None]] = {
    each.__name__: each
    for each in (
        put, add, sub, cut, link, dangle, fifo, folder, device, listening, mode, owner, size,
        corpus, copy, pack,
    )
} | {"remove": lambda path: _clear(path) and None}  # fmt: skip


def fill(text: str, place: Path) -> str:
    """*text* with what cannot stand in a table: too long, or another each time."""
    values = {
        "place": place,
        "pid": os.getpid(),
        "digits": "9" * 5000,
        "long": "x" * 5000,
        "newline": "\n",
        "escape": "\x1b",
        "nested": "[" * 100_000,
        "stream": STREAM,
    }
    return re.sub(r"\{([a-z]+)\}", lambda found: str(values[found[1]]), text)


def arrange(place: Path, words: list[str], patch: pytest.MonkeyPatch) -> None:
    verb, *rest = [fill(word, place) for word in words]
    if verb == "env":
        name, _, value = " ".join(rest).partition("=")
        patch.setenv(name, value.replace(r"\n", "\n"))
    elif verb == "stdin":
        content = io.BytesIO(_text(tuple(rest)))
        patch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    elif verb == "boot":
        patch.setattr("natkeep.lifecycle.progress.read_boot_id", lambda: "another boot")
    else:
        ARRANGEMENTS[verb](place / rest[0], *rest[1:])


# ---- where they are arranged ---------------------------------------------------------------------


def await_carrier(netns: str, device: str) -> None:
    """Its routes change when the kernel notices the cable, which it does a moment later."""
    deadline = time.monotonic() + 20
    words = ["ip", "-n", netns, "link", "show", device]
    while b"state UP" not in subprocess.run(words, capture_output=True, check=True).stdout:
        assert time.monotonic() < deadline, "a cable was plugged in and has no carrier"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Namespace, Path]]:
    """The namespace, and the state directory of the move that is prepared in it."""
    name = f"natkeep-test-{os.environ['NATKEEP_RUN']}{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    namespace = open_namespace(name)
    try:
        for line in (
            "link set lo up",
            "link add dest0 type veth peer name wire",
            "link set wire addrgenmode none up",
            "link set dest0 addrgenmode none up",
            "address add 10.3.0.20/24 dev dest0",
            "address add fd00:3::20/64 dev dest0 nodad",
            "route add 10.1.0.0/16 via 10.3.0.1",
        ):
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        await_carrier(name, "dest0")
        place = tmp_path_factory.mktemp("prepared")
        (place / "list").write_text("10.2.0.10:5000 10.1.0.2:50594\n")
        state = ["--state-dir", str(place / "state"), "-q"]
        words = ["prepare", "web", "--map", MAP, "--connections", str(place / "list")]
        with inside(namespace):
            assert cli.main([*words, *state]) == 0
        yield namespace, place / "state"
        with inside(namespace):
            assert cli.main(["teardown", "web", *state]) == 0
    finally:
        os.close(namespace.fd)
        subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def place(site: tuple[Namespace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: list, image, state; there is no natkeep.toml yet."""
    (tmp_path / "state").mkdir(mode=0o700)
    for name in ("web.journal", "web.connections"):
        shutil.copy(site[1] / name, tmp_path / "state")
    (tmp_path / "state/lock").touch(0o600)
    (tmp_path / "list").write_text("10.2.0.10:5000 10.1.0.2:50999\n")
    shutil.copytree(CORPUS / "plain", tmp_path / "image")
    for name in [name for name in os.environ if name.startswith(("NATKEEP_", "CRTOOLS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NATKEEP_STATE_DIR", "state")
    monkeypatch.setattr(policy, "PATH", "natkeep.toml")
    monkeypatch.setattr(sys, "argv", ["natkeep"])
    monkeypatch.chdir(tmp_path)
    handle = os.open("image", os.O_RDONLY)
    monkeypatch.setenv("CRTOOLS_SCRIPT_ACTION", "post-restore")
    monkeypatch.setenv("CRTOOLS_INIT_PID", str(os.getpid()))
    monkeypatch.setenv("CRTOOLS_IMAGE_DIR", f"/proc/{os.getpid()}/fd/{handle}")
    return tmp_path


@pytest.fixture(autouse=True)
def _closed(place: Path) -> Iterator[None]:
    """The image directory that CRIU has open is closed again, and so is what the hook opened."""
    before = {int(name) for name in os.listdir("/proc/self/fd")}
    path = os.environ["CRTOOLS_IMAGE_DIR"]
    yield
    for name in {int(name) for name in os.listdir("/proc/self/fd")} - before:
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(place / "image"):
                os.close(name)
        except OSError:
            continue
    os.close(int(path.rpartition("/")[2]))


def read_files(place: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Mode, owner and content of all that is below *place*."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(place.rglob("*")):
        status, content = path.lstat(), b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20:
            content = path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_uid, content)
    return found


def read_network() -> list[str]:
    """Ruleset, addresses and routes of the namespace that we are in."""
    import nftables

    code, ruleset, error = nftables.Nftables().cmd("list ruleset")
    assert code == 0, error
    net = Path("/proc/thread-self/net")
    return [ruleset, *((net / name).read_text() for name in ("fib_trie", "if_inet6"))]


@pytest.mark.parametrize(
    "row", [row for _, row in TABLE], ids=[f"{subject}: {row.name}" for subject, row in TABLE]
)
def test_bad_input(
    row: Row,
    site: tuple[Namespace, Path],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    require: Callable[[str], None],
) -> None:
    if any(words[0] in ("owner", "device") for words in row.arrangements):
        require("powers")
    for words in row.arrangements:
        arrange(place, words, monkeypatch)
    program, *arguments = [fill(word, place) for word in row.words]
    with inside(site[0]):
        before = read_files(place), read_network()
        capsys.readouterr()
        code = hook.main() if program == "natkeep-hook" else cli.main(arguments)
        out, err = capsys.readouterr()
        after = read_files(place), read_network()

    assert "Traceback" not in err
    assert "".join(f"{line}\n" for line in row.out) == out
    first, *rest = [fill(line, place) for line in row.said]
    number, _, message = first.partition(" ")
    assert [f"{program}: {message}", *rest] == err.splitlines()
    assert int(number) == code
    assert before == after


def test_the_table_has_150_rows_and_none_twice() -> None:
    assert len(TABLE) >= 150
    assert len({(subject, row.name) for subject, row in TABLE}) == len(TABLE)
    assert len({re.sub(r"\s+", " ", str(row[1:4])) for _, row in TABLE}) == len(TABLE)
