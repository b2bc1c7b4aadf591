"""tests of the command line: bad input in a table, and a whole move in real namespaces.

The network of the moves is two namespaces; no packet runs, only what natkeep changes is looked at:

    gateway 10.3.0.1 ──── 10.3.0.20 (NEW) destination; OLD is 10.2.0.10, the peers are 10.1.0.0/24
            fd00:3::1     fd00:3::20                           fd00:2::10               fd00:1::/64
"""

from __future__ import annotations

import faulthandler
import fcntl
import functools
import importlib
import inspect
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from natkeep import cli
from natkeep.checkpoint.images import read_checkpoint
from natkeep.checkpoint.listing import parse_listing
from natkeep.kernel.netns import entered
from natkeep.plan import arp, base_chains
from natkeep.plan.move import Mode
from natkeep.plan.roles import ROLES, Role
from natkeep.state.directory import StateDirectory

CORPUS = Path(__file__).parent / "checkpoint/corpus/plain"
LIST = "10.2.0.10:5000 10.1.0.2:50594\n10.2.0.10:5000 10.1.0.2:50595\n"
LIST6 = "[fd00:2::10]:5000 [fd00:1::2]:50594\n"
MAP, MAP6 = "10.2.0.10=10.3.0.20", "fd00:2::10=fd00:3::20"
PATIENCE = 20.0  # s, for what takes some tenths

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a working directory and a state directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    # Output is held back until the end, as it is for everybody; then it is that a full disk shows.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """The working directory, with lists and image directories, good and bad."""
    texts = {
        "list": LIST,
        "list6": LIST6,
        "empty": "",
        "comments": "# nothing\n\n",
        "broken": f"{LIST}10.2.0.10:5000 10.1.0.2\n",
        "port": "10.2.0.10:5000 10.1.0.2:70000\n",
        "mixed": "10.2.0.10:5000 [fd00:1::2]:5\n",
        "twice": LIST + LIST,
        "far": "10.2.0.10:5000 10.99.0.2:50594\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin").write_bytes(b"# caf\xe9\n" + LIST.encode())
    for name in ("image", "none", "cut", "foreign", "fifo", "link", "nothing"):
        shutil.copytree(CORPUS, tmp_path / name)
    (tmp_path / "none/files.img").unlink()
    whole = (tmp_path / "cut/files.img").read_bytes()
    (tmp_path / "cut/files.img").write_bytes(whole[:-1])
    (tmp_path / "foreign/files.img").write_bytes(b"\x7fELF" + whole[4:])
    (tmp_path / "fifo/files.img").unlink()
    os.mkfifo(tmp_path / "fifo/files.img")
    (tmp_path / "link/files.img").unlink()
    (tmp_path / "link/files.img").symlink_to(tmp_path / "image/files.img")
    (tmp_path / "nothing/files.img").write_bytes(b"")
    return tmp_path


def files(folder: Path) -> dict[str, bytes | str]:
    """All that is below *folder*; the state directory's lock, which stays, does not count."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink():
            found[name] = path.read_bytes()
        else:
            found[name] = os.readlink(path) if path.is_symlink() else "directory or FIFO"
    return {name: content for name, content in found.items() if name not in ("state", "state/lock")}


class Said(NamedTuple):
    code: int
    out: str
    err: list[str]


@pytest.fixture
def natkeep_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run natkeep in this process; an exception would fail the test, as a traceback should."""

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return Said(code, out, err.splitlines())

    return run


# ---- bad input, which is refused without privileges and before anything is touched ------------


class Bad(NamedTuple):
    name: str
    arguments: str
    code: int
    message: str


PLAN = f"plan web --map {MAP} --connections list"
BAD = [
    Bad("no verb", "--quiet", 2, "the following arguments are required: VERB"),
    Bad("unknown verb", "freeze web", 2, "no verb 'freeze'"),
    Bad("unknown option", f"{PLAN} --fast", 2, "unrecognized arguments: --fast"),
    Bad("format", f"{PLAN} --format yaml", 2, "argument --format: invalid choice: 'yaml'"),
    Bad("gate", f"prepare web --map {MAP} --gate ajar", 2, "argument --gate: invalid choice"),
    Bad("mode", f"{PLAN} --mode bpf", 2, "argument --mode: invalid choice: 'bpf'"),
    Bad("id", f"plan web.1 --map {MAP} --connections list", 2, "'web.1' is not an id"),
    Bad("id as a path", f"plan ../x --map {MAP} --connections list", 2, "'../x' is not an id"),
    Bad("long id", f"plan {'a' * 33} --map {MAP} --connections list", 2, f"'{'a' * 33}' is not an"),
    Bad(
        "zone", "plan web --map fe80::1%eth0=fd00::1 --connections list6", 2,
        "--map fe80::1%eth0=fd00::1: 'fe80::1%eth0' has a zone",
    ),
    Bad(
        "OLD is NEW", "plan web --map 10.2.0.10=10.2.0.10 --connections list", 2,
        "OLD and NEW are both 10.2.0.10: there is nothing to translate",
    ),
    Bad(
        "a chain", f"{PLAN} --map 10.3.0.20=10.4.0.20", 4,
        "an address is both an OLD and a NEW of this move",
    ),
    *(
        Bad(
            f"{end} {old if end == 'OLD' else new}",
            f"plan web --map {old}={new} --connections list", 4,
            f"{end} {old if end == 'OLD' else new} is {kind}",
        )
        for kind, old, new, end in (
            ("loopback", "::1", "fd00:3::20", "OLD"),
            ("unspecified", "0.0.0.0", "10.3.0.20", "OLD"),
            ("unspecified", "::", "fd00:3::20", "OLD"),
            ("multicast", "224.0.0.1", "10.3.0.20", "OLD"),
            ("multicast", "ff02::1", "fd00:3::20", "OLD"),
            ("link-local", "169.254.0.1", "10.3.0.20", "OLD"),
            ("link-local", "fe80::1", "fd00:3::20", "OLD"),
            ("broadcast", "255.255.255.255", "10.3.0.20", "OLD"),
            ("loopback", "10.2.0.10", "127.0.0.1", "NEW"),
            ("multicast", "fd00:2::10", "ff05::2", "NEW"),
        )
    ),
    Bad(
        "two destinations", f"{PLAN} --site destination=a --site destination=b", 2,
        "a move has one destination",
    ),
    Bad(
        "two sources", f"plan web --map {MAP} --connections list --image image", 2,
        "argument --image: not allowed with argument --connections",
    ),
    Bad(
        "no source", f"plan web --map {MAP}", 2,
        "which connections? --image DIR or --connections FILE",
    ),
    Bad("no map", "prepare web", 2, "no --map OLD=NEW: which address becomes which?"),
    Bad("a name", "plan web --map web.example.org=10.3.0.20 --connections list", 2, "--map web."),
    Bad("no list", f"plan web --map {MAP} --connections gone", 3, "cannot read gone: No such file"),
    Bad("list is a directory", f"plan web --map {MAP} --connections image", 3, "image is neither"),
    Bad("empty list", f"plan web --map {MAP} --connections empty", 3, "empty lists no connections"),
    Bad("only comments", f"plan web --map {MAP} --connections comments", 3, "comments lists no"),
    Bad(
        "broken list", f"plan web --map {MAP} --connections broken", 3,
        "broken:3: '10.1.0.2' has no port",
    ),
    Bad(
        "no port", f"plan web --map {MAP} --connections port", 3,
        "port:1: 70000 is not a port (1 to 65535)",
    ),
    Bad(
        "mixed families", f"plan web --map {MAP} --connections mixed", 3,
        "mixed:1: [fd00:1::2]:5 and 10.2.0.10:5000 are of different families",
    ),
    Bad(
        "one connection twice", f"plan web --map {MAP} --connections twice", 3,
        "twice:3: the same connection as in line 1",
    ),
    Bad("not text", f"plan web --map {MAP} --connections latin", 3, "latin:1: this is not UTF-8"),
    *(
        Bad(f"{verb}: {name}", arguments.format(folder), 3, message)
        for verb, arguments in (
            ("plan", f"plan web --map {MAP} --image {{}}"),
            ("inspect", "inspect {}"),
        )
        for name, folder, message in (
            ("no such directory", "gone", "cannot open gone: No such file or directory"),
            ("no files.img", "none", "no files.img in none"),
            ("cut files.img", "cut", "cut/files.img, octet "),
            ("foreign files.img", "foreign", "foreign/files.img, octet 0: begins with 7f454c46"),
            ("empty files.img", "nothing", "nothing/files.img, octet 0: begins with nothing"),
            ("FIFO", "fifo", "fifo/files.img is a FIFO, not a regular file"),
            ("symlink", "link", "link/files.img is a symbolic link, not a regular file"),
        )
    ),
    Bad("unknown finding", "explain NO-SUCH", 2, "no finding has the code 'NO-SUCH'"),
    Bad("negative drain", "teardown web --drain=-1", 2, "argument --drain: '-1' is not a number"),
    Bad("drain of nan", "teardown web --drain=nan", 2, "argument --drain: 'nan' is not a number"),
    Bad("negative idle", "teardown web --drain --idle=-1", 2, "argument --idle: '-1' is not a"),
    Bad("idle of words", "teardown web --drain --idle x", 2, "argument --idle: 'x' is not"),
    Bad("idle alone", "teardown web --idle 3", 2, "--idle is for --drain"),
    Bad("drain of words", "teardown --drain web", 2, "argument --drain: 'web' is not a number"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad_input_gets_one_line_a_hint_and_the_exit_code_and_changes_nothing(
    bad: Bad, inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    before = files(inputs)

    code, out, err = natkeep_here(*bad.arguments.split())

    assert (bad.code, "") == (code, out)
    assert err[0].startswith(f"natkeep: {bad.message}")
    # Nothing but a hint follows.
    assert [line for line in err[1:] if not (line.startswith("  (") and line.endswith(")"))] == []
    assert len(err) <= 2
    assert before == files(inputs)
    assert not (inputs / "state").exists()


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_with_json_an_error_is_a_document_too(
    bad: Bad, inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    """As it is on stderr, wherever --json stands."""
    words = bad.arguments.split()
    _, _, told = natkeep_here(*words)
    for arguments in (["--json", *words], [*words, "--json"]):
        code, out, err = natkeep_here(*arguments)
        document = json.loads(out)
        assert tuple(document) == ("schema", "error")
        error = document["error"]
        hint = [f"  ({error['hint']})"] if error["hint"] else []
        assert (code, err) == (bad.code, [f"natkeep: {error['message']}", *hint])
        assert (document["schema"], error["exit"]) == (1, bad.code)
        if "VERB" not in told[0]:  # of which --json may be told to be one, too
            assert err == told


def test_the_table_names_each_case_once() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD)
    assert len({bad.arguments for bad in BAD}) == len(BAD)


def give_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    stdin = None if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "stdin lists no connections"),
        (None, "stdin lists no connections"),
        (b"10.2.0.10:5000 10.1.0.2:1\n\nweb 10.1.0.2:2\n", "stdin:3: 'web' has no port"),
        (b"\xff\xfe", "stdin is not UTF-8 text"),
    ],
)
def test_a_bad_list_on_stdin(
    content: bytes | None,
    message: str,
    natkeep_here: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None: stdin is closed, as CRIU does it to what it starts."""
    give_stdin(monkeypatch, content)
    code, out, err = natkeep_here("plan", "web", "--map", MAP, "--connections", "-")
    assert (3, "", f"natkeep: {message}") == (code, out, err[0])


def test_a_list_on_stdin_is_read(
    natkeep_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_stdin(monkeypatch, LIST.encode())
    code, out, err = natkeep_here("plan", "web", "--map", MAP, "--connections", "-", "--json")
    assert (code, err) == (0, [])
    assert len(json.loads(out)["connections"]) == 2


# ---- plan and inspect, which need no privileges ----------------------------------------------


def test_plan_as_text_is_the_commands_of_prepare_and_open(
    inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    code, out, err = natkeep_here(*PLAN.split(), "--site", "destination=dst")
    lines = out.splitlines()
    assert (code, err) == (0, [])
    assert "ip netns exec dst ip address add 10.2.0.10/32 dev lo" in lines
    assert lines[0] == "# destination=dst: the first move there makes the table too"
    assert lines[1] == "ip netns exec dst nft 'create table inet natkeep'"
    assert "ip netns exec dst nft 'add chain inet natkeep gate-web'" in lines
    assert lines[-3].startswith("# when the sockets are there")
    assert lines[-2].startswith("ip netns exec dst nft 'insert rule inet natkeep gate-web")
    assert not (inputs / "state").exists()


def test_plan_as_json_and_by_the_format_option_are_the_same(
    inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    arguments = [*PLAN.split(), "--site", "gateway=gw", "--site", "destination=dst"]
    outs = [
        natkeep_here(*arguments, *more).out
        for more in (["--json"], ["--format", "json"], ["--json", "--format", "nft"])
    ]
    assert len(set(outs)) == 1
    document = json.loads(outs[0])
    assert tuple(document[key] for key in ("schema", "id", "mode")) == (1, "web", "stateful")
    roles = [(site["role"], site["netns"]) for site in document["sites"]]
    assert roles == [("gateway", "gw"), ("destination", "dst")]


def test_the_connections_of_an_image_are_planned(
    inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    arguments = f"plan web --map {MAP} --map {MAP6} --image image --json".split()
    connections = json.loads(natkeep_here(*arguments).out)["connections"]
    tcp = {"proto": "tcp"}
    assert {**tcp, "local": "10.2.0.10:5000", "peer": "10.1.0.2:43285"} in connections
    assert {**tcp, "local": "[fd00:2::10]:5001", "peer": "[fd00:1::2]:49861"} in connections
    assert not any(row["local"].startswith("127.") for row in connections)


@pytest.mark.needs("nftables")
@pytest.mark.root
def test_plan_as_nft_is_a_script_that_nft_takes(
    inputs: Path, natkeep_here: Callable[..., Said], netns: str
) -> None:
    arguments = f"plan web --map {MAP} --map {MAP6} --image image --format nft".split()
    code, script, _ = natkeep_here(*arguments)
    assert code == 0
    assert script.startswith("# destination\ncreate table inet natkeep\n")
    nft = ["ip", "netns", "exec", netns, "nft", "--file", "-"]
    subprocess.run(nft, input=script, text=True, check=True)
    text = subprocess.run(
        [*nft[:4], "nft", "list", "ruleset"], capture_output=True, text=True, check=True
    ).stdout
    assert "fd00:1::2 . 49861 . 5001" in text


def test_inspect_tells_what_is_kept_and_why_not(
    inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    document = json.loads(natkeep_here("inspect", "image", "--map", MAP, "--json").out)
    assert {"schema", "dump", "sum", "sockets"} == set(document)
    assert sum(document["sum"].values()) == len(document["sockets"])
    reasons = {(row["local"], row["peer"]): row["reason"] for row in document["sockets"]}
    assert reasons["10.2.0.10:5000", "10.1.0.2:43285"] is None
    six = reasons["[fd00:2::10]:5001", "[fd00:1::2]:49861"]
    assert six == "its local address is not an OLD of --map"
    text = natkeep_here("inspect", "image").out
    assert text.startswith("6 kept (1 udp), 0 lost, 5 need nothing, 4 listeners\n")
    assert text.endswith(
        "udp: CRIU drops datagrams that a socket had not read at the dump; no image tells\n"
    )
    assert text.count("\n") == len(document["sockets"]) + 2


def test_a_list_of_an_image_says_what_the_image_says(
    inputs: Path, natkeep_here: Callable[..., Said]
) -> None:
    """TCP and UDP that is kept, at OLD alone with --map, and the dump; nothing else."""
    image = read_checkpoint(inputs / "image")
    listed = parse_listing(natkeep_here("inspect", "image", "--list").out, "it")
    assert [*listed.connections] == [*image.connections]
    assert (listed.udp, listed.udp_servers) == (image.udp, image.udp_servers)
    assert listed.run_id == image.run_id
    some = parse_listing(natkeep_here("inspect", "image", "--list", "--map", MAP).out, "it")
    assert {str(each.destination.address) for each in some.connections} == {"10.2.0.10"}
    tcp = parse_listing(natkeep_here("inspect", "image", "--list", "--no-udp").out, "it")
    assert (tcp.connections, len(tcp.udp)) == (image.connections, 0)
    for more in (["--json"], ["--live", "1"]):
        where = [] if "--live" in more else ["image"]
        assert natkeep_here("inspect", *where, "--list", *more).code == 2


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for option, start in (("--version", "natkeep "), ("--help", "usage: natkeep ")):
        with pytest.raises(SystemExit) as caught:
            cli.main([option])
        out, err = capsys.readouterr()
        assert (caught.value.code, err, out.startswith(start)) == (0, "", True)


def test_every_verb_has_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for verb in ("plan", "prepare", "open", "status", "teardown", "inspect", "lab"):
        assert f"\n  {verb} " in text


# ---- as a program ----------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "natkeep.cli", *arguments]


def run_program(
    arguments: Sequence[str], wrapper: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """The program itself, as a shell would start it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if "input" not in options:
        streams["stdin"] = subprocess.DEVNULL
    return subprocess.run(
        [*wrapper, *command(*arguments)], **{**streams, **options}, text=True, timeout=PATIENCE
    )


def run_fork(arguments: Sequence[str], input: str = "") -> subprocess.CompletedProcess[str]:
    """main() in a process of its own that needs not import everything again: 10 times faster.

    What it forks from may have another thread (pytest-xdist's), so a lock may be held for ever in
    the child: one that does not end says where it is, and is ended.
    """
    with ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        streams[0].write(input)
        streams[0].seek(0)
        child = os.fork()
        if not child:
            code = 99
            try:
                for number, (stream, mode) in enumerate(zip(streams, "rww", strict=True)):
                    os.dup2(stream.fileno(), number)
                    setattr(sys, ("stdin", "stdout", "stderr")[number], os.fdopen(number, mode))
                os.closerange(3, 4096)  # not what pytest has open
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                faulthandler.register(signal.SIGALRM, file=2, chain=True)
                signal.alarm(int(PATIENCE))
                code = cli.main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in streams:
            stream.seek(0)
        return subprocess.CompletedProcess(arguments, code, streams[1].read(), streams[2].read())


@pytest.fixture
def executor() -> Run:
    """Run natkeep in a process of its own; it has to exit with `expect`, without a traceback.

    With options of subprocess.run, or program=True, it is the program that is started.
    """

    def run(
        *arguments: str, expect: int = 0, program: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        whole = program or options.keys() - {"input"}
        done = (run_program if whole else run_fork)(arguments, **options)
        assert "Traceback" not in (done.stderr or "")
        assert expect == done.returncode, done.stderr
        return done

    return run


@pytest.mark.parametrize("arguments", [PLAN, "--help", "inspect image --json"])
def test_a_reader_that_leaves_early_is_no_traceback(arguments: str, inputs: Path) -> None:
    """As `natkeep plan ... | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command(*arguments.split()), stdout=writer, stderr=subprocess.PIPE, text=True, cwd=inputs
    )
    os.close(writer)
    assert (1 if arguments != "--help" else done.returncode, "") == (done.returncode, done.stderr)


def test_a_full_disk_behind_stdout_is_one_line(inputs: Path, executor: Run) -> None:
    with Path("/dev/full").open("w") as full:
        done = executor(*PLAN.split(), expect=1, stdout=full)
    assert done.stderr == "natkeep: [Errno 28] No space left on device\n"


def test_closed_standard_streams_are_no_traceback(inputs: Path, executor: Run) -> None:
    for arguments in (PLAN, f"{PLAN} --json", "inspect image --json"):
        shell = 'exec "$@" <&- >&-'
        done = executor(*arguments.split(), wrapper=("sh", "-c", shell, "sh"))
        assert (done.stdout, done.stderr) == ("", "")


UNPRIVILEGED = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


@pytest.mark.root
@pytest.mark.parametrize(
    "arguments",
    [
        f"prepare web --map {MAP} --connections -",
        f"prepare web --map {MAP} --connections - --dry-run",
        "plan web --map 10.2.0.10=auto --connections -",
        "open web",
        "status",
        "teardown web",
    ],
)
@pytest.mark.needs("powers")
def test_without_privileges_it_is_the_kernel_that_says_no(
    arguments: str, executor: Run, tmp_path: Path
) -> None:
    for wrapper in (UNPRIVILEGED, NOBODY) if arguments == "status" else (UNPRIVILEGED,):
        done = executor(*arguments.split(), wrapper=wrapper, input=LIST, expect=5, cwd="/")
        assert (done.stdout, done.stderr) == (
            "",
            "natkeep: no privileges: natkeep needs CAP_NET_ADMIN\n  (run it as root)\n",
        )
    assert files(tmp_path) == {}
    assert not (tmp_path / "state").exists()


@pytest.mark.root
def test_plan_needs_no_privileges(executor: Run) -> None:
    done = executor(*PLAN.split()[:-1], "-", wrapper=UNPRIVILEGED, input=LIST)
    assert "ip address add 10.2.0.10/32 dev lo" in done.stdout


# ---- a network -------------------------------------------------------------------------------


class Network(NamedTuple):
    gateway: str
    destination: str

    @property
    def options(self) -> list[str]:
        """--site for both, the destination first: the order must not matter."""
        return ["--site", f"destination={self.destination}", "--site", f"gateway={self.gateway}"]

    def run(self, namespace: str, *words: str) -> str:
        return subprocess.run(
            ["ip", "netns", "exec", namespace, *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def observe(self) -> dict[str, str]:
        """What a move may change at its sites, octet by octet."""
        script = "; ".join(
            f"echo '# {look}' && {look}"
            for look in (
                "nft --json list ruleset",
                "ip -json address",
                "ip -json -details link show lo",
                "ip -json route show table all",
                "ip -json -6 route show table all",
                "sysctl net.netfilter net.ipv4.conf net.ipv6.conf | grep -v conntrack_count",
            )
        )
        return {namespace: self.run(namespace, "sh", "-c", script) for namespace in self}

    def is_settled(self, namespace: str, device: str) -> bool:
        """Whether the kernel has noticed the cable and made its own routes, which it does later."""
        link = self.run(namespace, "ip", "link", "show", device)
        routes = self.run(namespace, *["ip", "-6", "route", "show", "table", "all", "dev"], device)
        return "state UP" in link and "local fd00:3::" in routes and "multicast ff00::" in routes

    def addresses_of_lo(self) -> set[str]:
        text = self.run(self.destination, *["ip", "-json", "address", "show", "dev", "lo"])
        return {info["local"] for info in json.loads(text)[0]["addr_info"]}


@pytest.fixture
def network(make_netns: Callable[[], str], require: Callable[[str], None]) -> Network:
    require("nftables")
    for name in ("pyroute2", "nftables", "natkeep.kernel.linux", "natkeep.report"):
        importlib.import_module(name)  # once, here, and not in each fork
    found = Network(make_netns(), make_netns())
    # An index of its own, or the carrier comes up to a second late (linkwatch.c).
    lines = [
        f"link add gate0 index 100 netns {found.gateway} type veth"
        f" peer name dest0 netns {found.destination}"
    ]
    for namespace, device, host in (
        (found.gateway, "gate0", "1"),
        (found.destination, "dest0", "20"),
    ):
        lines += [
            f"-n {namespace} link set {device} addrgenmode none",
            f"-n {namespace} link set {device} up",
            f"-n {namespace} address add 10.3.0.{host}/24 dev {device}",
            f"-n {namespace} address add fd00:3::{host}/64 dev {device} nodad",
        ]
    lines += [
        f"-n {found.destination} route add 10.1.0.0/24 via 10.3.0.1",
        f"-n {found.destination} route add fd00:1::/64 via fd00:3::1",
        f"-n {found.gateway} route add 10.1.0.0/24 via 10.3.0.9",  # peers are behind a router
        f"-n {found.gateway} route add fd00:1::/64 via fd00:3::9",
    ]
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)
    # Of a destination that forwards a plan knows nothing before prepare looks at it.
    host = ["ip", "netns", "exec", found.destination]
    off = ("net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
    subprocess.run([*host, "sysctl", "-qw", *off], check=True)
    for namespace, device in ((found.gateway, "gate0"), (found.destination, "dest0")):
        wait_until(functools.partial(found.is_settled, namespace, device))
    return found


@pytest.fixture
def sites(network: Network) -> Iterator[Network]:
    """The network, which must be at the end as it was, also where no teardown was asked for."""
    before = network.observe()
    yield network
    assert before == network.observe()


def prepare(network: Network, *more: str, move_id: str = "web") -> list[str]:
    """The arguments of a prepare with stdin."""
    return ["prepare", move_id, "--map", MAP, *network.options, "--connections", "-", *more]


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=natkeep-test-nowhere",
            2,
            "no network namespace 'natkeep-test-nowhere': No such file or directory",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=./list",
            2,
            "'./list' is not a network namespace",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=./fifo/files.img",
            2,
            "'./fifo/files.img' is not a network namespace",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=/proc/self/ns/mnt",
            2,
            "'/proc/self/ns/mnt' is not a network namespace",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=pid:0",
            2,
            "no network namespace 'pid:0': No such process",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=pid:x",
            2,
            "'pid:x' is not of the form pid:N",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination=..",
            2,
            "'..' is not the name of a network namespace",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination={destination} "
            "--site gateway=/run/netns/{destination}",
            4,
            "gateway=/run/netns/{destination} and destination={destination} are the same network",
        ),
        (
            "--map 10.2.0.10=10.3.0.99 --site destination={destination}",
            4,
            "destination={destination}: NEW 10.3.0.99 is not an address of this namespace",
        ),
        (
            "--map 10.2.0.10=10.3.0.20 --site destination={destination} --connections far",
            4,
            "destination={destination}: no route to the peer 10.99.0.2",
        ),
        (
            "--map 10.2.0.10=auto --site gateway={gateway}",
            2,
            "NEW can be `auto` only where there is a site destination",
        ),
    ],
)
def test_what_the_sites_do_not_allow_is_refused_before_anything_is_changed(
    arguments: str,
    code: int,
    message: str,
    network: Network,
    inputs: Path,
    natkeep_here: Callable[..., Said],
) -> None:
    names = network._asdict()
    before, on_disk = network.observe(), files(inputs)
    words = arguments.format(**names).split()
    if "--connections" not in words:
        words += ["--connections", "list"]

    for more in ([], ["--dry-run"]):
        said = natkeep_here("prepare", "web", *words, *more)
        assert (code, "") == (said.code, said.out)
        assert said.err[0].startswith(f"natkeep: {message.format(**names)}")
        assert len(said.err) <= 2

    assert before == network.observe()
    assert on_disk == files(inputs)


@pytest.mark.root
def test_new_auto_is_read_at_the_destination(sites: Network, executor: Run, inputs: Path) -> None:
    words = ["--map", "10.2.0.10=auto", "--map", "fd00:2::10=auto", *sites.options]
    done = executor("plan", "web", *words, "--image", "image", "--json")
    maps = [{"old": old, "new": new} for old, new in (m.split("=") for m in (MAP, MAP6))]
    assert maps == json.loads(done.stdout)["maps"]

    sites.run(sites.destination, *["ip", "address", "add", "10.3.0.21/24", "dev", "dest0"])
    done = executor("plan", "web", *words, "--image", "image", expect=4)
    assert "has not one IPv4 address but 10.3.0.20, 10.3.0.21" in done.stderr
    sites.run(sites.destination, *["ip", "address", "delete", "10.3.0.21/24", "dev", "dest0"])


# ---- a whole move ----------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("name", ["by name", "by path", "by pid"])
def test_a_move_from_prepare_to_teardown_leaves_the_sites_as_they_were(
    name: str, sites: Network, executor: Run, tmp_path: Path
) -> None:
    executor = functools.partial(executor, program=name == "by name")
    web = "Redis_6-at-b_c" if name == "by path" else "web"
    with ExitStack() as stack:
        words = sites.options
        if name == "by path":
            words = [word.replace("=", "=/run/netns/") for word in words]
        elif name == "by pid":
            for namespace in sites:
                held = stack.enter_context(
                    subprocess.Popen(
                        ["ip", "netns", "exec", namespace, "cat"], stdin=subprocess.PIPE
                    )
                )
                stack.callback(held.communicate)
                words = [word.replace(f"={namespace}", f"=pid:{held.pid}") for word in words]
                wait_for_namespace(held.pid, namespace)
        rows, options = LIST + LIST6, ["--map", MAP, "--map", MAP6, *words]
        done = executor("prepare", web, *options, "--connections", "-", input=rows)
        assert done.stdout == ""
        netns = {word.partition("=")[0]: word.partition("=")[2] for word in words[1::2]}
        assert done.stderr == (
            f"natkeep: {web}: {MAP}, {MAP6}, 3 connections, at gateway={netns['gateway']}, "
            f"destination={netns['destination']}, gate closed\n"
        )
        assert sites.addresses_of_lo() == {"127.0.0.1", "10.2.0.10", "::1", "fd00:2::10"}

        (move,) = json.loads(executor("status", "--json").stdout)["moves"]
        assert (
            *(move["id"], move["gate"]),
            [site["drift"] for site in move["sites"]],
        ) == (web, "closed", [[], []])
        executor("open", web)
        (move,) = json.loads(executor("status", web, "--json", "--strict").stdout)["moves"]
        assert move["gate"] == "open"
        assert executor("teardown", web).stderr == f"natkeep: {web}: undone\n"
    assert files(tmp_path) == {}
    assert executor("teardown", web).stderr == f"natkeep: {web}: nothing to undo\n"
    # and `sites` looks whether all is as before


@pytest.mark.root
def test_each_change_is_a_line_in_the_systems_log(
    sites: Network, executor: Run, system_log: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Who moved what, and how it ended; not what only looks, or is no command."""
    monkeypatch.setenv("SUDO_USER", "alice\n")
    where = ",".join(word for word in sites.options if "=" in word)
    about, by = f"web {MAP} at {where}", r"(by alice\n)"

    executor(*prepare(sites, "--dry-run"), input=LIST)
    executor("status")
    executor("plan", "web", expect=2)
    assert system_log() == []
    executor(*prepare(sites), input=LIST)
    compared = ("open", "web", "--compare", "--connections", "-")
    assert executor(*compared, input=LIST).stderr.endswith("natkeep: web: gate closed\n")
    executor("open", "web")
    assert executor(*compared, input=LIST).stderr.endswith("natkeep: web: gate open\n")
    executor("repair", "web")
    executor("repair", "--all")
    executor("teardown", "web")
    executor("teardown", "web")
    executor("rollback", "web")
    words = [
        ("prepare", ""), ("open", ", compared alone"), ("open", ""), ("open", ", compared alone"),
        ("teardown", ""),
    ]  # fmt: skip
    assert system_log() == [f"<29>natkeep[PID]: {v} {about}{how}: done {by}" for v, how in words]
    executor("open", "web", expect=7)
    executor(*prepare(sites, move_id="far"), input="10.9.9.9:1 10.1.0.2:2", expect=4)
    told = system_log()
    assert told[0].startswith("<27>natkeep[PID]: open web: failed: no move web in ")
    assert told[1].startswith(f"<27>natkeep[PID]: prepare far {MAP} at {where}: failed: none of ")


def test_a_migration_is_a_line_on_its_controller(
    system_log: Callable[[], list[str]],
    natkeep_here: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")

    assert natkeep_here("migrate", "a:12", "b", "--map", MAP, "--ssh", "false").code == 9
    (line,) = system_log()
    assert line.startswith(f"<27>natkeep[PID]: migrate m12 {MAP} a:12 to b: failed: ")


def test_a_log_that_is_not_there_or_hangs_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from natkeep import system_log

    monkeypatch.setattr("natkeep.system_log.PATH", str(tmp_path / "none"))
    system_log.note("natkeep", "x")
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX, 2) as log:
        log.bind(f"{short}/log")  # and read by nothing
        monkeypatch.setattr("natkeep.system_log.PATH", f"{short}/log")
        for _ in range(2000):
            system_log.note("natkeep", "é" * 2000)
        assert len(log.recv(5000)) < 1200


def wait_for_namespace(pid: int, name: str) -> None:
    """`ip netns exec` enters it before it executes the program, but after it was started."""
    wanted = os.stat(f"/run/netns/{name}").st_ino
    wait_until(lambda: os.stat(f"/proc/{pid}/ns/net").st_ino == wanted)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


MOVE_KEYS = {"id", "mode", "gate", "maps", "sites", "connections"}
MOVE_KEYS |= {"opened_at", "silent_ms", "answered", "listeners"}


@pytest.mark.root
def test_the_json_of_each_verb_has_the_contracts_keys(sites: Network, executor: Run) -> None:
    def document(*arguments: str, **options: Any) -> dict[str, Any]:
        done = executor(*arguments, "--json", **options)
        assert done.stderr == ""
        value: dict[str, Any] = json.loads(done.stdout)
        assert value.pop("schema") == 1
        return value

    map_ = {"old": "10.2.0.10", "new": "10.3.0.20"}
    assert document("status") == {"moves": []}
    plan = document(*prepare(sites, "--dry-run"), input=LIST)
    assert {"id", "mode", "maps", "sites", "connections", "steps"} == set(plan)
    assert {
        **{"id": "web", "mode": "stateful", "maps": [map_], "gate": "closed"},
    } == document(*prepare(sites), input=LIST)
    assert document("open", "web") == {"id": "web", "gate": "open"}
    status = document("status")
    assert {"moves"} == set(status)
    (move,) = status["moves"]
    assert set(move) == MOVE_KEYS
    assert abs(datetime.fromisoformat(move["opened_at"]).timestamp() - time.time()) < PATIENCE
    assert 0 < move["silent_ms"] < PATIENCE * 1000
    host = os.uname().nodename
    assert {
        "id": "web",
        "mode": "stateful",
        "gate": "open",
        "maps": [map_],
        "opened_at": move["opened_at"],
        "silent_ms": move["silent_ms"],
        "answered": 0,
        "listeners": [],
        "sites": [
            {"role": "destination", "netns": sites.destination, "host": host, "drift": []},
            {"role": "gateway", "netns": sites.gateway, "host": host, "drift": []},
        ],
        "connections": [
            {
                "proto": "tcp",
                "local": "10.2.0.10:5000",
                "peer": f"10.1.0.2:{port}",
                "state": None,  # without a socket, while its entry goes on
                "packets": {"in": 0, "out": 0},
            }
            for port in (50594, 50595)
        ],
    } == move
    assert status == document("status", "web")
    assert document("teardown", "web", "--yes") == {"id": "web", "found": True}
    assert document("teardown", "web", "--yes") == {"id": "web", "found": False}


def without_tables(planned: list[str]) -> list[str]:
    """The plan's lines without those that make the tables, which no step of a move says."""
    sizes = {}
    for role in ("gateway", "destination"):
        at_gateway = role == "gateway"
        parts = [base_chains.base_table()]
        parts += base_chains.translation_tables(ROLES[Role(role)], Mode.STATEFUL)
        at_destination = [base_chains.destination_table(), arp.arp_table()]
        at_destination.append(base_chains.dispatch_table(base_chains.HEARD))
        parts += [] if at_gateway else at_destination
        sizes[role] = sum(map(len, parts))
    left, at = [], 0
    while at < len(planned):
        if planned[at].endswith(": the first move there makes the table too"):
            at += sizes[planned[at].removeprefix("# ").partition("=")[0]]
        else:
            left.append(planned[at])
        at += 1
    return left


@pytest.mark.root
def test_quiet_prints_nothing_and_verbose_each_command(sites: Network, executor: Run) -> None:
    planned = executor(*["plan", *prepare(sites)[1:]], input=LIST).stdout.splitlines()
    (cut,) = (n for n, line in enumerate(planned) if line.startswith("# when the sockets"))
    for before, after in ((["-q"], []), ([], ["-q"])):
        for verb in (prepare(sites), ["open", "web"], ["teardown", "web"]):
            done = executor(*before, *verb, *after, input=LIST)
            assert (done.stdout, done.stderr) == ("", "")
    for before, after in ((["-v"], []), ([], ["-v"])):
        done = executor(*before, *prepare(sites), *after, input=LIST)
        *lines, last = done.stderr.splitlines()
        assert [f"[+] {line}" for line in without_tables(planned[:cut])] == lines
        assert last.startswith("natkeep: web: 10.2.0.10=10.3.0.20, 2 connections, at gateway=")
        done = executor(*before, "open", "web", *after)
        opened = [f"[+] {line}" for line in planned[cut + 1 :]]
        assert [*opened, "natkeep: web: gate open"] == done.stderr.splitlines()
        done = executor(*before, "teardown", "web", *after)
        first, *_, last = done.stderr.splitlines()
        assert f"[-] OpenGate at destination={sites.destination}" == first
        assert last == "natkeep: web: undone"


@pytest.mark.root
def test_options_for_all_verbs_stand_before_or_behind_the_verb(
    sites: Network, executor: Run, tmp_path: Path
) -> None:
    other = ["--state-dir", str(tmp_path / "other")]
    executor(*other, *prepare(sites), input=LIST)
    kinds = ("connections", "hold", "journal", "ready")
    assert {"other", "other/lock", *(f"other/web.{kind}" for kind in kinds)} == set(files(tmp_path))
    assert json.loads(executor("status", "--json").stdout)["moves"] == []
    for arguments in (
        [*other, "--json", "status"],
        ["status", *other, "--json"],
        [*other, "status", "--json"],
        ["--json", "status", *other, "--no-color"],
    ):
        assert len(json.loads(executor(*arguments).stdout)["moves"]) == 1
    executor("teardown", "web", *other)


@pytest.mark.root
def test_gate_open_prepares_and_opens(sites: Network, executor: Run) -> None:
    done = executor(*prepare(sites, "--gate", "open"), input=LIST)
    assert done.stderr.endswith(", gate open\n")
    assert json.loads(executor("status", "--json").stdout)["moves"][0]["gate"] == "open"
    executor("teardown", "web")


@pytest.mark.root
def test_dry_run_checks_prints_the_plan_and_changes_nothing(
    sites: Network, executor: Run, tmp_path: Path
) -> None:
    before = sites.observe()
    done = executor(*prepare(sites, "--dry-run"), input=LIST)
    assert executor("plan", *prepare(sites)[1:], input=LIST).stdout == done.stdout
    assert done.stderr == ""
    assert before == sites.observe()
    assert not (tmp_path / "state").exists()


@pytest.mark.root
def test_what_an_image_has_beyond_the_move_is_said(
    sites: Network, executor: Run, inputs: Path
) -> None:
    words = ["prepare", "web", "--map", MAP, *sites.options, "--image", "image"]
    other = ["fd00:2::10/128", "dev", "lo"]
    done = executor(*words, expect=4)
    assert "CRIU could not restore tcp [fd00:2::10]:5001 [fd00:1::2]:49861" in done.stderr
    sites.run(sites.destination, "ip", "address", "add", *other, "nodad")
    done = executor(*words)
    unkept = [line for line in done.stderr.splitlines() if ": not kept: " in line]
    six = "natkeep: not kept: tcp [fd00:2::10]:5001 [fd00:1::2]:49861: its local address is not"
    assert [line for line in unkept if line.startswith(six)]
    assert not [line for line in unkept if "listener" in line]
    executor("teardown", "web")
    sites.run(sites.destination, "ip", "address", "delete", *other)


@pytest.mark.root
def test_ids_in_use_and_unknown_ids(sites: Network, executor: Run, tmp_path: Path) -> None:
    executor(*prepare(sites), input=LIST)
    before, on_disk = sites.observe(), files(tmp_path)

    done = executor(*prepare(sites), input=LIST, expect=4)
    assert done.stderr == "natkeep: the id web is in use\n  (natkeep teardown web, or another id)\n"
    done = executor(*prepare(sites, move_id="api"), input=LIST, expect=4)
    assert done.stderr == (
        "natkeep: 10.1.0.2:50594 > 10.2.0.10:5000 and 10.1.0.2:50594 > 10.2.0.10:5000 "
        "(of move web) would be one tuple at OLD; 2 in all\n"
    )
    for verb in ("open", "status"):
        done = executor(verb, "api", expect=7)
        assert done.stderr.startswith(f"natkeep: no move api in {tmp_path}/state\n")
        done = executor(verb, "a.pi", expect=2)
        assert done.stderr.startswith("natkeep: 'a.pi' is not an id\n")
    assert executor("teardown", "api").stderr == "natkeep: api: nothing to undo\n"
    executor("teardown", "a.pi", expect=2)

    assert (before, on_disk) == (sites.observe(), files(tmp_path))
    executor("teardown", "web")


@pytest.mark.root
def test_after_open_packets_do_not_come_by_the_gates(sites: Network, executor: Run) -> None:
    """Done by a process that holds no pipe of ours, and that open does not wait for."""
    executor(*prepare(sites), input=LIST)

    executor("open", "web", program=True)

    deadline = time.monotonic() + 10
    while any('"name": "gate", "handle"' in text for text in sites.observe().values()):
        assert time.monotonic() < deadline
    status = json.loads(executor("status", "web", "--strict", "--json").stdout)
    assert status["moves"][0]["gate"] == "open"
    executor("teardown", "web")


@pytest.mark.root
def test_two_moves_share_an_address_and_the_last_removes_it(sites: Network, executor: Run) -> None:
    executor(*prepare(sites), input=LIST)
    alone = sites.observe()
    others = LIST.replace("5059", "6059")
    executor(*prepare(sites, move_id="api"), input=others)
    executor("teardown", "api")
    assert [nameless(text) for text in alone.values()] == [
        nameless(text) for text in sites.observe().values()
    ]

    executor(*prepare(sites, move_id="api"), input=others)
    executor("teardown", "web")
    assert "10.2.0.10" in sites.addresses_of_lo()
    assert executor("status", "--strict", "-q").stderr == ""
    executor("teardown", "api")
    assert "10.2.0.10" not in sites.addresses_of_lo()


def nameless(text: str) -> str:
    """An observation without the handles, which nft counts upwards.

    Nor the base chain that is there while a gate is closed (kernel/nftables.py): with all open,
    as at a gateway after prepare, it goes with whatever may wait for that.
    """
    lines = text.splitlines()
    rules = json.loads(lines[1])["nftables"]
    shown = [one for one in rules if not _is_of_chain(one, "gate")]
    return re.sub(r'"handle": [0-9]+', "", "\n".join([json.dumps(shown), *lines[2:]]))


def _is_of_chain(one: dict[str, dict[str, object]], chain: str) -> bool:
    """Whether something that nft lists is this chain, or a rule in it."""
    [(kind, values)] = one.items()
    return chain == values.get({"chain": "name", "rule": "chain"}.get(kind, ""))


# ---- drift -----------------------------------------------------------------------------------

DRIFTS = {
    "the gateway's table": (
        "gateway",
        "nft delete table inet natkeep",
        "table inet natkeep: nothing of move web is there",
    ),
    "the destination's table": (
        "destination",
        "nft delete table inet natkeep",
        "table inet natkeep: nothing of move web is there",
    ),
    "all rules": ("destination", "nft flush ruleset", "table inet natkeep: nothing of move web"),
    "OLD": (
        "destination",
        "ip address delete 10.2.0.10/32 dev lo",
        "address 10.2.0.10: not on this host",
    ),
    "a connection in the set": (
        "gateway",
        "nft delete element inet natkeep kept-web-0 { 10.1.0.2 . 50594 . 5000 }",
        "set kept-web-0: 1 of 2 connections are missing",
    ),
    "a translation": (
        "gateway",
        "nft flush chain inet natkeep in-at-10.2.0.10",
        "chain in-at-10.2.0.10: no rule of this move",
    ),
    "a dispatch": (
        "destination",
        "nft delete element inet natkeep out4 { 10.2.0.10 }",
        "set out4: 10.2.0.10 : jump out-at-10.2.0.10 is missing",
    ),
}


@pytest.mark.root
@pytest.mark.parametrize(("role", "damage", "message"), DRIFTS.values(), ids=DRIFTS)
def test_what_another_program_removed_is_drift_and_teardown_clears_the_rest(
    role: str, damage: str, message: str, sites: Network, executor: Run
) -> None:
    executor(*prepare(sites), input=LIST)
    executor("status", "--strict")
    sites.run(sites._asdict()[role], *damage.split())

    done = executor("status", "--strict", "--json", expect=6)
    assert done.stderr.startswith(f"natkeep: drift: {message}")
    (move,) = json.loads(done.stdout)["moves"]
    drift = {site["role"]: site["drift"] for site in move["sites"]}
    assert drift[role][0].startswith(message)
    assert [found for other, found in drift.items() if other != role] == [[]]

    text = executor("status", "web").stdout  # without --strict it is no failure
    assert f"  {role}={sites._asdict()[role]}: DRIFTED\n    {message}" in text
    executor("teardown", "web")


@pytest.mark.root
def test_open_where_the_gate_is_gone_says_so_and_opens_no_site(
    sites: Network, executor: Run
) -> None:
    executor(*prepare(sites, "--no-hold"), input=LIST)  # with it the gateway is open already
    sites.run(sites.destination, *["nft", "delete", "table", "inet", "natkeep"])
    done = executor("open", "web", expect=5)
    assert done.stderr.startswith(f"natkeep: destination={sites.destination}: ")
    assert json.loads(executor("status", "--json").stdout)["moves"][0]["gate"] == "closed"
    assert "open" not in sites.run(
        sites.gateway, *["nft", "list", "chain", "inet", "natkeep", "gate-web"]
    )
    executor("teardown", "web")


@pytest.mark.root
def test_a_move_of_udp_alone(sites: Network, executor: Run) -> None:
    """A connected socket, and one for any peer; `sites` looks whether all is as before."""
    rows = "udp 10.2.0.10:4433 10.1.0.2:50594\nudp 0.0.0.0:53 *\n"
    done = executor(*prepare(sites), input=rows)
    assert "10.2.0.10=10.3.0.20, 1 connection (1 udp), 1 udp server, at " in done.stderr
    executor("open", "web")
    document = json.loads(executor("status", "web", "--strict", "--json").stdout)
    (move,) = document["moves"]
    assert (move["gate"], move["udp_servers"]) == ("open", ["10.2.0.10:53"])
    (row,) = move["connections"]
    assert (row["proto"], row["local"]) == ("udp", "10.2.0.10:4433")
    executor("teardown", "web", "--yes")


@pytest.mark.root
def test_status_as_text(sites: Network, executor: Run) -> None:
    assert executor("status").stdout == "nothing is prepared\n"
    rows = "".join(f"10.2.0.10:5000 10.1.0.2:{port}\n" for port in range(1, 24))
    executor(*prepare(sites), input=rows)
    lines = executor("status", "web").stdout.splitlines()
    assert [
        f"web: 10.2.0.10=10.3.0.20, 23 connections, at gateway={sites.gateway}, "
        f"destination={sites.destination}, gate closed",
        f"  on {os.uname().nodename}",
        "  held for the process: 0 segments and 0 datagrams, 0 octets",
        f"  destination={sites.destination}: as prepared",
        f"  gateway={sites.gateway}: as prepared",
        "  LOCAL           PEER         STATE   PACKETS IN  OUT",
        "  10.2.0.10:5000  10.1.0.2:1   closed  0           0",
    ] == lines[:7]
    assert (len(lines), lines[-1]) == (27, "  ... (all with -v)")
    assert len(executor("status", "-v").stdout.splitlines()) == 29
    header, line = executor("status").stdout.splitlines()
    assert header.split() == [
        "MOVE", "MAPS", "GATE", "KEPT", "LIVE", "ONE-WAY", "ENDED", "SILENT", "ANSWERED", "OPENED",
        "STANDS",
    ]  # fmt: skip
    told = ["web", MAP, "closed", "23", "0", "0", "0", "0", "-", "-", "as", "prepared"]
    assert line.split() == told
    executor("teardown", "web")


@pytest.mark.root
@pytest.mark.parametrize("more", [(), ("--json",), ("web", "--json")])
def test_status_is_shown_again_until_it_is_interrupted(
    more: tuple[str, ...], sites: Network, executor: Run, tmp_path: Path
) -> None:
    executor(*prepare(sites), input=LIST)
    before = files(tmp_path)
    # Whoever runs the tests may ignore it, as a shell's background job does.
    words = ["env", "--default-signal=INT", *command("status", "--watch", *more)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout
        assert watch.stderr
        looks, text = 0, b""
        while looks < 2:
            text += watch.stdout.readline()
            looks = text.count(b"]}]}\n" if more else b"as prepared\n")
        watch.send_signal(signal.SIGINT)
        rest, said = watch.stdout.read(), watch.stderr.read()
        assert (watch.wait(PATIENCE), said) == (0, b"")
    documents = (text + rest).decode()
    decoder = json.JSONDecoder()
    while more and (documents := documents.lstrip()):
        document, end = decoder.raw_decode(documents)
        assert document["moves"][0]["id"] == "web"
        documents = documents[end:]
    assert b"\x1b" not in text  # which is for terminals
    assert before == files(tmp_path)
    executor("teardown", "web")


@pytest.mark.root
def test_with_strict_a_watch_ends_where_something_drifted(sites: Network, executor: Run) -> None:
    executor(*prepare(sites), input=LIST)
    words = command("status", "web", "--watch", "--strict")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout
        watch.stdout.readline()
        sites.run(sites.destination, *["ip", "address", "delete", "10.2.0.10/32", "dev", "lo"])
        _, said = watch.communicate(timeout=PATIENCE)
        assert watch.returncode == 6
        assert said.startswith(b"natkeep: drift: address 10.2.0.10: not on this host")
    executor("teardown", "web")


@pytest.mark.root
def test_a_source_lets_go_of_peers_whose_connections_have_ended_elsewhere(
    sites: Network, executor: Run
) -> None:
    """Here the gateway's namespace is the source: OLD is its own, and stays so."""
    sites.run(sites.gateway, *["ip", "address", "add", "10.2.0.10/32", "dev", "lo"])
    words = ["prepare", "web", "--map", MAP, "--site", f"source={sites.gateway}"]
    executor(*words, "--connections", "-", input=LIST)

    def told(*states: str | None) -> str:
        ports = zip((50594, 50595), states, strict=False)
        rows = [
            {"local": "10.2.0.10:5000", "peer": f"10.1.0.2:{port}", "state": state}
            for port, state in ports
        ]
        return json.dumps({"schema": 1, "moves": [{"id": "web", "connections": rows}]})

    for text in (told(), told("ended"), told("ended", "live"), told("ended", None)):
        done = executor("teardown", "web", "--ended", "-", input=text, expect=4)
        number = 1 if "ended" in text else 2
        assert f"still has OLD 10.2.0.10: it would answer {number} peers" in done.stderr
    executor("teardown", "web", "--ended", "-", input=told("ended", "ended"))
    assert executor("status").stdout == "nothing is prepared\n"
    sites.run(sites.gateway, *["ip", "address", "delete", "10.2.0.10/32", "dev", "lo"])


# ---- live connections ------------------------------------------------------------------------


@pytest.fixture
def live(sites: Network, executor: Run) -> Iterator[tuple[Network, list[socket.socket]]]:
    """An open move with one of its two connections alive, both ends at the destination."""
    OLD, PEER = ("10.2.0.10", 5000), ("10.1.0.2", 50594)
    for address in (OLD[0], PEER[0]):
        sites.run(sites.destination, *f"ip address add {address}/32 dev lo".split())
    sockets = []
    with entered(sites.destination):
        listener = socket.create_server(OLD)
        client = socket.create_connection(OLD, PATIENCE, source_address=PEER)
    server, _ = listener.accept()
    listener.close()
    for end in (server, client):
        # Closed without a farewell, which the gate would hold up.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sockets.append(end)
    options = ["--site", f"destination={sites.destination}"]
    words = ["prepare", "web", "--map", MAP, *options, "--connections", "-", "--gate", "open"]
    executor(*words, input=LIST)

    yield sites, sockets

    for end in sockets:
        end.close()
    for address in (OLD[0], PEER[0]):
        sites.run(sites.destination, *f"ip address delete {address}/32 dev lo".split())


LIVE = "natkeep: 1 connections of web live and will break"


@pytest.mark.root
def test_teardown_with_live_connections_is_refused_where_nobody_can_be_asked(
    live: tuple[Network, list[socket.socket]], executor: Run, tmp_path: Path
) -> None:
    network, _ = live
    before, on_disk = network.observe(), files(tmp_path)
    for more in ([], ["--drain=0"], ["--drain", "0.01"]):
        done = executor("teardown", "web", *more, expect=4)
        hint = "  (--yes breaks them, --drain waits for their end)"
        assert [LIVE, hint] == done.stderr.splitlines()
        executor("teardown", "web", *more, expect=4, input="y\n")  # a pipe is nobody
    assert (before, on_disk) == (network.observe(), files(tmp_path))

    assert executor("teardown", "web", "--drain=0", "--yes").stderr == "natkeep: web: undone\n"
    assert files(tmp_path) == {}


@pytest.mark.root
def test_teardown_of_live_connections_asks_at_a_terminal(
    live: tuple[Network, list[socket.socket]], executor: Run, tmp_path: Path
) -> None:
    master, slave = pty.openpty()
    for answer, code, last in (("\n", 4, "natkeep: nothing was changed"), ("y\n", 0, "undone")):
        os.write(master, answer.encode())
        done = executor("teardown", "web", stdin=slave, expect=code)
        assert done.stderr.startswith(f"{LIVE}. Go on? [y/N] ")
        assert done.stderr.rstrip().endswith(last)
    os.close(master)
    os.close(slave)
    assert files(tmp_path) == {}


@pytest.mark.root
def test_drain_waits_for_the_end_of_the_connections(
    live: tuple[Network, list[socket.socket]], tmp_path: Path
) -> None:
    _, sockets = live
    with subprocess.Popen(
        command("teardown", "web", "--drain=60", "-v"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "natkeep: 1 connections of web live\n"
        assert running.poll() is None
        for end in sockets:
            end.close()
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err.splitlines()[-1]) == (0, "natkeep: web: undone")
    assert files(tmp_path) == {}


@pytest.mark.root
def test_teardown_behind_a_closed_gate_does_not_ask(sites: Network, executor: Run) -> None:
    """What cannot talk cannot break."""
    executor(*prepare(sites), input=LIST)
    assert executor("teardown", "web").stderr == "natkeep: web: undone\n"


# ---- interruption ----------------------------------------------------------------------------

# natkeep's own main with a kernel that stops after one kind of step, says so, and waits; what
# else it is told to do by a signal comes on top.
STOPPED = """
import os, signal, sys, time
from natkeep import cli
from natkeep.checkpoint.images import read_checkpoint
from natkeep.checkpoint.listing import parse_listing
from natkeep.kernel.linux import LinuxKernel
# Whatever started us may ignore them, as nohup does.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
writer, verb, kind, again = sys.argv[1:5]
real = getattr(LinuxKernel, verb)
stopped = []
def stop():
    if stopped:  # what a signal interrupted is done again
        return
    stopped.append(True)
    os.write(int(writer), b"x")
    while True:  # not pause(): a signal that comes just before it would not end it
        time.sleep(0.02)
def step(self, *given):
    result = real(self, *given)
    if kind in [type(each).__name__ for each in given]:
        stop()
    return result
setattr(LinuxKernel, verb, step)
if again:
    undo = LinuxKernel.revert
    def revert(self, *given):
        os.kill(os.getpid(), getattr(signal, again))  # the user is impatient
        undo(self, *given)
    LinuxKernel.revert = revert
sys.exit(cli.main(sys.argv[5:]))
"""


def run_and_stop(verb: str, kind: str, again: str, *arguments: str) -> subprocess.Popen[str]:
    """natkeep, which has just done a step of that kind and waits."""
    reader, writer = os.pipe()
    running = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(writer), verb, kind, again, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writer],
    )
    os.close(writer)
    assert running.stdin is not None
    running.stdin.write(LIST)
    running.stdin.close()
    running.stdin = None
    assert select.select([reader], [], [], PATIENCE)[0], "it did not come so far"
    assert os.read(reader, 1) == b"x", running.communicate()[1]
    os.close(reader)
    return running


ENDINGS = {
    signal.SIGINT: (130, ["natkeep: interrupted"]),
    signal.SIGTERM: (143, []),
    signal.SIGHUP: (129, []),
}


@pytest.mark.root
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGINT, "AddAddress"),
        (signal.SIGHUP, "AddAddress"),
        (signal.SIGTERM, "InstallGate"),
        (signal.SIGTERM, "InsertEntries"),
        (signal.SIGTERM, "OpenGate"),
    ],
)
def test_a_signal_in_the_middle_of_prepare_leaves_nothing(
    number: signal.Signals, kind: str, sites: Network, tmp_path: Path
) -> None:
    before = sites.observe()
    running = run_and_stop("apply", kind, "", *prepare(sites, "--gate", "open"))
    assert before != sites.observe()
    running.send_signal(number)
    out, err = running.communicate(timeout=PATIENCE)

    assert (*ENDINGS[number], "") == (running.returncode, err.splitlines(), out)
    assert before == sites.observe()
    assert files(tmp_path) == {}


@pytest.mark.root
@pytest.mark.parametrize("again", ["SIGINT", "SIGTERM"])
def test_more_signals_while_it_undoes_do_not_stop_that(
    again: str, sites: Network, tmp_path: Path
) -> None:
    running = run_and_stop("apply", "InsertEntries", again, *prepare(sites))
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert ENDINGS[signal.SIGINT] == (running.returncode, err.splitlines())
    assert files(tmp_path) == {}


@pytest.mark.root
@pytest.mark.parametrize("number", list(ENDINGS))
def test_a_signal_in_the_middle_of_teardown_is_heeded_when_it_is_through(
    number: signal.Signals, sites: Network, executor: Run, tmp_path: Path
) -> None:
    """So there is nothing to say of what is left: nothing is."""
    executor(*prepare(sites), input=LIST)
    running = run_and_stop("revert", "RemoveAddress", "", "teardown", "web")
    running.send_signal(number)
    out, err = running.communicate(timeout=PATIENCE)
    assert (*ENDINGS[number], "") == (running.returncode, err.splitlines(), out)
    assert files(tmp_path) == {}


@pytest.mark.root
def test_a_teardown_that_is_killed_is_finished_by_the_next(
    sites: Network, executor: Run, tmp_path: Path
) -> None:
    executor(*prepare(sites), input=LIST)
    running = run_and_stop("revert", "RemoveAddress", "", "teardown", "web")
    running.kill()
    running.communicate()
    kinds = ("connections", "hold", "journal", "ready")
    assert {f"state/web.{kind}" for kind in kinds} == set(files(tmp_path))
    assert executor("teardown", "web").stderr == "natkeep: web: undone\n"
    assert files(tmp_path) == {}


@pytest.mark.root
@pytest.mark.parametrize("kind", ["InstallGate", "FillSet", "AddAddress", "InsertEntries"])
def test_a_prepare_that_is_killed_cannot_be_opened_and_is_cleaned_by_teardown(
    kind: str, sites: Network, executor: Run, tmp_path: Path
) -> None:
    running = run_and_stop("apply", kind, "", *prepare(sites))
    running.kill()
    running.communicate()
    done = executor("open", "web", expect=7)
    assert done.stderr.startswith("natkeep: move web was not prepared to the end\n")
    executor("teardown", "web")
    assert files(tmp_path) == {}


@pytest.mark.root
def test_the_lock_is_waited_for_and_a_signal_ends_the_waiting(
    sites: Network, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    lock = tmp_path / "state/lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = subprocess.Popen(
            command(*prepare(sites)),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert running.stdin is not None
        running.stdin.write(LIST)
        running.stdin.close()
        running.stdin = None
        wait_until(lambda: str(lock) in open_files(running.pid))
        assert running.poll() is None
        running.terminate()
        _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (143, "")
    assert files(tmp_path) == {}


def open_files(pid: int) -> set[str]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(path))
        except FileNotFoundError:
            continue
    return found


@pytest.mark.root
def test_talk_that_nobody_listens_to_does_not_stop_the_work(sites: Network, executor: Run) -> None:
    """As `natkeep -v prepare ... 2>&1 | true`: half a move would be worse than no talk."""
    reader, writer = os.pipe()
    os.close(reader)
    executor("-v", *prepare(sites), input=LIST, stderr=writer)
    executor("status", "web", "--strict")
    executor("-v", "teardown", "web", stderr=writer)
    os.close(writer)


# ---- the journal, at the command line --------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("verb", ["open", "status", "teardown"])
def test_a_corrupt_journal_is_exit_7_and_nothing_is_guessed_at(
    verb: str, natkeep_here: Callable[..., Said], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state/web.journal").write_text("garbage\n")
    code, out, err = natkeep_here(verb, "web")
    assert (code, out) == (7, "")
    assert err[0].startswith("natkeep: the journal of web is corrupt: ")
    assert files(tmp_path) == {"state/web.journal": b"garbage\n"}


@pytest.mark.root
def test_a_state_directory_that_others_can_write_to_is_exit_7(
    natkeep_here: Callable[..., Said], tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    code, _, err = natkeep_here("status")
    assert (7, f"natkeep: the state directory {tmp_path}/state can be written by others") == (
        code,
        err[0],
    )


@pytest.mark.root
def test_an_error_that_nobody_foresaw_is_one_line_and_exit_1(
    natkeep_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("natkeep.lifecycle.status.read_status", fail)
    monkeypatch.setattr(cli, "silence", lambda stream: None)  # it would be pytest's
    code, out, err = natkeep_here("status")
    assert (code, out, err) == (1, "", ["natkeep: [Errno 5] Input/output error"])


@pytest.mark.root
def test_a_lock_that_another_keeps_is_exit_7(
    sites: Network,
    inputs: Path,
    natkeep_here: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspect.unwrap(StateDirectory.locked), "__defaults__", (0.01,))
    words = ["prepare", "web", "--map", MAP, *sites.options, "--connections", "list"]
    before = files(inputs)
    with StateDirectory(create=True).locked():
        code, _, err = natkeep_here(*words)
    assert (7, f"natkeep: another natkeep holds {inputs}/state/lock") == (code, err[0])
    assert before == files(inputs)
