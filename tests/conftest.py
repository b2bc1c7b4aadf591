"""what every test may ask for: tools, root, a network namespace of its own.

Rule: what a test needs and does not find is a skip, unless NATKEEP_REQUIRE names it: then it is a
failure (`make test` as root and `.ci/run` name all). A test says what it needs by a marker
(`root`, `criu`, `lab`, or `needs("pycriu", "scapy")`) or calls the fixture `require`.
Every namespace of a test comes from the fixture `netns` or `make_netns`, and goes by its name.
With several workers (pytest-xdist, `make test`) each stays on one processor, and its labs with it.
What needs no kernel, nor a program that takes seconds (SLOW), is marked `quick` here, by what it
asks for (`make test-quick`), unless it bears the mark `whole`.
At the end the run fails if it left a namespace or an nft table in the host behind.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says how busy the machine is; figures belong to the benches. The
# examples are the same each time, so that no change fails by chance; `make test-long` draws others.
LONG = int(os.environ.get("NATKEEP_EXAMPLES", 0)) > 5000
hypothesis.settings.register_profile("natkeep", deadline=None, derandomize=not LONG)
hypothesis.settings.load_profile("natkeep")

ROOT = Path(__file__).resolve().parent.parent
CRIU = ROOT / ".lab/criu/criu"
# In the name of each namespace of this run, whichever worker makes it: they inherit it.
RUN = os.environ.setdefault("NATKEEP_RUN", secrets.token_hex(3))
OURS = (f"natkeep-test-{RUN}", "natkeep-lab-")
PATIENCE = 120.0  # s; another run's lab is over by then, a leftover is not
# What is said to tests and lab. All else of natkeep's, in the shell that starts us, is not heard.
HEARD = {
    f"NATKEEP_{each}"
    for each in ("RUN", "REQUIRE", "MANY", "EXAMPLES", "GOLDEN", "CRIU", "BIN", "TIME_SCALE")
}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _is_root() -> bool:
    return os.geteuid() == 0 and _run("unshare", "--net", "true").returncode == 0


def _has_powers(*numbers: int) -> bool:
    """Capabilities by their numbers."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return all(effective >> number & 1 for number in numbers)


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _has_tool(name: str) -> bool:
    return bool(shutil.which(name) or Path(sys.executable).with_name(name).exists())


def _has_pycriu() -> bool:
    """Debian's, so asked of Debian's python and not of ours."""
    return _run("/usr/bin/python3", "-c", "import pycriu").returncode == 0


def _has_postgres() -> bool:
    return any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def _has_containerd() -> bool:
    fetched = ROOT / ".lab/containerd/bin/containerd"
    return os.access(fetched, os.X_OK) and _has_module("grpc")


def _has_kernel() -> bool:
    """Another one than this machine's, that can be booted: `make test` fetches it for a qemu."""
    sys.path.append(str(ROOT))  # bench/ is a program beside the package
    from bench.kernels import find_missing

    return not find_missing("own")


# What can be required: how it is found, and what to say where it is not.
PROBES: dict[str, tuple[Callable[[], bool], str]] = {
    "root": (_is_root, "needs root that may make network namespaces"),
    # CHOWN, SETUID, NET_BIND_SERVICE and MKNOD: for what tests arrange, not for natkeep
    "powers": (
        partial(_has_powers, 0, 7, 10, 27),
        "needs more than natkeep's capabilities, to arrange things",
    ),
    "criu": (lambda: os.access(CRIU, os.X_OK), "needs a CRIU that works here: scripts/get-criu"),
    "pycriu": (_has_pycriu, "needs Debian's pycriu (packages criu, python3-protobuf)"),
    "scapy": (lambda: _has_module("scapy"), "needs scapy: scripts/setup"),
    "nftables": (lambda: _has_module("nftables"), "needs libnftables' binding: scripts/setup"),
    "matplotlib": (lambda: _has_module("matplotlib"), "needs matplotlib: scripts/setup"),
    "chromium": (lambda: _has_tool("chromium"), "needs Debian's chromium"),
    "sphinx": (lambda: _has_module("myst_parser"), "needs sphinx, myst-parser: scripts/setup"),
    "ruff": (lambda: _has_tool("ruff"), "needs ruff: scripts/setup"),
    "mypy": (lambda: _has_tool("mypy"), "needs mypy: scripts/setup"),
    "runc": (lambda: _has_tool("runc"), "needs Debian's runc: scripts/setup"),
    "sshd": (lambda: os.access("/usr/sbin/sshd", os.X_OK), "needs Debian's openssh-server"),
    "podman": (lambda: _has_tool("podman"), "needs Debian's podman: scripts/setup"),
    "aioquic": (lambda: _has_module("aioquic"), "needs aioquic: scripts/setup"),
    "dnsmasq": (lambda: _has_tool("dnsmasq"), "needs Debian's dnsmasq-base: scripts/setup"),
    "socat": (lambda: _has_tool("socat"), "needs Debian's socat: scripts/setup"),
    "arping": (lambda: _has_tool("arping"), "needs Debian's iputils-arping: scripts/setup"),
    "iperf3": (lambda: _has_tool("iperf3"), "needs Debian's iperf3: scripts/setup"),
    "openssl": (lambda: _has_tool("openssl"), "needs Debian's openssl: scripts/setup"),
    "redis-server": (lambda: _has_tool("redis-server"), "needs Debian's redis-server"),
    "nginx": (lambda: _has_tool("nginx"), "needs Debian's nginx"),
    "haproxy": (lambda: _has_tool("haproxy"), "needs Debian's haproxy"),
    "postgres": (_has_postgres, "needs Debian's postgresql"),
    "resource": (partial(_has_powers, 24), "needs CAP_SYS_RESOURCE, for CRIU and other users"),
    "websockets": (lambda: _has_module("websockets"), "needs websockets: scripts/setup"),
    "etcd": (lambda: _has_tool("etcd"), "needs Debian's etcd-server: scripts/setup"),
    "containerd": (_has_containerd, "needs containerd 2.1 and grpcio: scripts/get-containerd"),
    "node": (lambda: _has_tool("node"), "needs Debian's nodejs"),
    "kernel": (_has_kernel, "needs qemu and Debian's own kernel: make kernels KERNELS=own"),
    "debhelper": (lambda: _has_tool("dh_python3"), "needs debhelper and dh-python: make test-deb"),
    "lintian": (lambda: _has_tool("lintian"), "needs Debian's lintian: make test-deb"),
    "shellcheck": (lambda: _has_tool("shellcheck"), "needs Debian's shellcheck"),
}
REQUIRED = frozenset(filter(None, os.environ.get("NATKEEP_REQUIRE", "").split(",")))


@functools.cache
def _is_there(name: str) -> bool:
    return PROBES[name][0]()


def require_tool(name: str) -> None:
    """Skip the test that runs where *name* is not there; fail it where it ought to be."""
    if _is_there(name):
        return
    if name in REQUIRED:
        pytest.fail(f"{PROBES[name][1]} (NATKEEP_REQUIRE names it)", pytrace=False)
    pytest.skip(PROBES[name][1])


@pytest.fixture
def require() -> Callable[[str], None]:
    """`require("pycriu")`: skip or fail, from the midst of a test."""
    return require_tool


def pytest_configure(config: pytest.Config) -> None:
    _take_one_processor()
    for name in [each for each in os.environ if each.startswith("NATKEEP_")]:
        if name not in HEARD:
            del os.environ[name]
    config.addinivalue_line("markers", "needs(*names): what NATKEEP_REQUIRE knows by these names")
    if unknown := REQUIRED - PROBES.keys():
        raise pytest.UsageError(
            f"NATKEEP_REQUIRE: unknown {', '.join(sorted(unknown))} (known: {', '.join(PROBES)})"
        )


def _take_one_processor() -> None:
    """Each worker and all it starts on one processor: a lab is not moved about amid its work."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        usual = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {usual[int(worker.removeprefix("gw")) % len(usual)]})


NOT_QUICK = ("root", "criu", "lab", "whole")
SLOW = {"chromium", "etcd", "matplotlib", "sphinx"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick what asks for no kernel, and for no program that is slow."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        needs = {name for mark in item.iter_markers("needs") for name in mark.args}
        slow = SLOW & needs or any(map(item.get_closest_marker, NOT_QUICK))
        if "make_netns" not in fixtures and not slow:
            item.add_marker("quick")


MARKS = {"root": ("root",), "criu": ("root", "criu", "powers"), "lab": ("root", "scapy")}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers():
        for name in mark.args if mark.name == "needs" else MARKS.get(mark.name, ()):
            require_tool(name)


@pytest.fixture
def make_netns() -> Iterator[Callable[[], str]]:
    """Make network namespaces with lo up, each with a name of its own; all go with the test.

    They forward, as a gateway does, which any of them may be: another is refused.
    """
    require_tool("root")
    made: list[str] = []

    def make() -> str:
        name = f"natkeep-test-{RUN}{secrets.token_hex(3)}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        made.append(name)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        on = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", *on], check=True)
        return name

    yield make

    for name in reversed(made):
        if Path("/run/netns", name).exists():  # a test may have removed it itself
            subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def give_inode_again(make_netns: Callable[[], str]) -> Callable[[str], bool]:
    """End a namespace and give its name to another one that has its inode; whether one came.

    The kernel gives the lowest inode that is free, so those that come first are kept. It may go to
    another test's namespace: then begin again.
    """

    def exchange(name: str) -> bool:
        inode = Path("/run/netns", name).stat().st_ino
        subprocess.run(["ip", "netns", "delete", name], check=True)
        for _ in range(60):
            other = make_netns()
            if Path("/run/netns", other).stat().st_ino == inode:
                Path("/run/netns", name).touch()
                command = ["mount", "--bind", f"/run/netns/{other}", f"/run/netns/{name}"]
                subprocess.run(command, check=True)
                subprocess.run(["ip", "netns", "delete", other], check=True)
                return True
        return False

    return exchange


@pytest.fixture
def netns(make_netns: Callable[[], str]) -> str:
    """The name of a fresh network namespace with lo up."""
    return make_netns()


def observe_host() -> frozenset[str]:
    """What natkeep, its lab or CRIU could have left in the host: namespaces and nft tables."""
    folder = Path("/run/netns")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {f"namespace {name}" for name in names if name.startswith(OURS)}
    if os.geteuid() == 0 and shutil.which("nft"):
        answer = _run("nft", "-j", "list", "tables")
        listed = json.loads(answer.stdout)["nftables"] if answer.returncode == 0 else []
        for table in (thing["table"] for thing in listed if "table" in thing):
            if table["name"].startswith(("natkeep", "CRIU")):
                found.add(f"nft table {table['family']} {table['name']}")
    return frozenset(found)


BEFORE = pytest.StashKey[frozenset[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[BEFORE] = observe_host()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for what is there now, was not before, and does not go away."""
    if hasattr(session.config, "workerinput"):
        return  # xdist: other workers still run; the one that started them looks
    left = observe_host() - session.config.stash.get(BEFORE, frozenset())
    deadline = time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:
        time.sleep(0.2)
        left &= observe_host()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.shouldfail = f"left behind in the host: {', '.join(sorted(left))}"


@pytest.fixture
def system_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A /dev/log of our own, and what it was sent since it was last asked."""
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX, 2) as log:
        log.bind(f"{short}/log")
        log.setblocking(False)
        monkeypatch.setattr("natkeep.system_log.PATH", f"{short}/log")

        def read() -> list[str]:
            lines = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    lines.append(re.sub(r"\[\d+\]", "[PID]", log.recv(2000).decode()))
            return lines

        yield read
