"""what natkeep may do: three capabilities for what acts, none for what only reads.

`setpriv` takes all but some capabilities from the bounding set, so that root's number is worth
nothing more. `make test-caps` runs the kernel's and the command line's own tests like that; here a
whole move does in `make test`, in both modes, by command and by the hook.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natkeep.lab.ipv6_addresses import await_addresses

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

ACTING = ("net_admin", "sys_admin", "dac_read_search")
CORPUS = Path(__file__).parent / "checkpoint/corpus/plain"
OLD, NEW = "10.2.0.10", "10.3.0.20"
NOBODY = 65534


def only(*names: str, uid: int = 0) -> list[str]:
    """The front of a command that has these capabilities and no others."""
    kept = ",".join(["-all", *(f"+{name}" for name in names)])
    words = ["setpriv", "--no-new-privs", "--bounding-set", kept, "--inh-caps", kept]
    if uid:
        words += ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return words


def effective(front: list[str]) -> int:
    done = subprocess.run(
        [*front, "grep", "CapEff", "/proc/self/status"], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[1], 16)


@pytest.mark.needs("powers")
def test_the_front_leaves_what_it_says() -> None:
    """CAP_DAC_READ_SEARCH is 2, CAP_NET_ADMIN 12, CAP_SYS_ADMIN 21."""
    assert effective(only(*ACTING)) == 1 << 2 | 1 << 12 | 1 << 21
    assert effective(only()) == 0
    assert effective(only(uid=NOBODY)) == 0


class Site:
    """A destination, and natkeep with what it is given."""

    def __init__(self, netns: str, state: Path, front: list[str]) -> None:
        self.netns, self.state, self.front = netns, state, front

    def natkeep(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "natkeep.cli", *words, **environment)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        usual = {"PATH": os.environ["PATH"], "NATKEEP_STATE_DIR": str(self.state)}
        return subprocess.run(
            [*self.front, *words], env=usual | environment, capture_output=True, text=True
        )

    def done(self, *words: str) -> str:
        done = self.natkeep(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def observe(self) -> str:
        looks = "nft -j list ruleset; ip -j addr; ip -j route show table all; conntrack -L 2>&1"
        return subprocess.run(
            ["ip", "netns", "exec", self.netns, "sh", "-c", looks],
            capture_output=True,
            text=True,
            check=True,
        ).stdout


@pytest.fixture
def site(make_netns: Callable[[], str], tmp_path: Path) -> Site:
    netns = make_netns()
    for line in (
        "link add dest0 type veth peer name wire",
        "link set wire addrgenmode none up",
        "link set dest0 addrgenmode none up",
        f"address add {NEW}/24 dev dest0",
        "route add 10.1.0.0/16 via 10.3.0.1",
        "address add fd00:2::10/128 dev lo nodad",  # of the image's other connection
    ):
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)
    await_addresses(netns)
    return Site(netns, tmp_path / "state", only(*ACTING))


@pytest.fixture
def tree(site: Site) -> Iterator[int]:
    """The root of a restored tree that is in the site's namespace."""
    words = [*site.front, "ip", "netns", "exec", site.netns, "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


PREPARE = ("--map", f"{OLD}={NEW}", "--image", str(CORPUS))


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_a_whole_move_needs_three_capabilities(mode: str, site: Site) -> None:
    before = site.observe()
    at = f"destination={site.netns}"
    site.done("prepare", "web", *PREPARE, "--site", at, "--mode", mode, "--listeners")
    assert before != site.observe()
    site.done("status", "--strict")
    site.done("open", "web")
    assert "gate open" in site.done("status", "web", "--strict")
    subprocess.run(
        ["ip", "-n", site.netns, "address", "delete", f"{OLD}/32", "dev", "lo"], check=True
    )
    site.done("repair", "web")
    site.done("status", "web", "--strict")
    site.done("teardown", "web", "--yes")
    assert before == site.observe()
    assert site.natkeep("check", "--site", at).returncode in (0, 6)


def test_what_stays_dropped_after_an_undo_needs_three_capabilities(site: Site) -> None:
    before = site.observe()
    at = f"destination={site.netns}"
    site.done("prepare", "web", *PREPARE, "--site", at)
    site.done("teardown", "web")
    assert before != site.observe()  # a gateway may still send
    site.done("gc", "--site", at)
    assert before == site.observe()


def test_a_source_is_kept_quiet_with_three_capabilities(site: Site) -> None:
    before = site.observe()
    at = f"source={site.netns}"
    site.done("prepare", "web", "--map", f"{OLD}={NEW}", "--image", str(CORPUS), "--site", at)
    site.done("status", "web", "--strict")
    site.done("teardown", "web", "--yes")
    assert before == site.observe()


@pytest.mark.parametrize("prepared", [True, False], ids=["NATKEEP_ID", "NATKEEP_MAP"])
def test_the_hook_needs_three_capabilities(prepared: bool, site: Site, tree: int) -> None:
    before = site.observe()
    orders = {"NATKEEP_MAP": f"{OLD}={NEW}"}
    if prepared:
        site.done("prepare", "web", *PREPARE, "--site", f"destination={site.netns}")
        orders = {"NATKEEP_ID": "web"}
    # CRIU itself may do no more either: the kernel shows nobody the handles of the mightier.
    criu = 'exec 9<"$0"; export CRTOOLS_IMAGE_DIR=/proc/$$/fd/9; "$@"; exit $?'
    hook = [sys.executable, "-m", "natkeep.criu.hook"]
    call = {"CRTOOLS_SCRIPT_ACTION": "post-restore", "CRTOOLS_INIT_PID": str(tree)}
    done = site.run("sh", "-c", criu, str(CORPUS), *hook, **call, **orders)
    assert done.returncode == 0, done.stderr
    (move,) = json.loads(site.done("status", "--json"))["moves"]
    assert move["gate"] == "open"
    site.done("teardown", move["id"], "--yes")
    assert before == site.observe()


@pytest.mark.parametrize("lacking", ["net_admin", "sys_admin"])
@pytest.mark.needs("powers")
def test_without_one_of_them_it_is_said_and_nothing_changes(lacking: str, site: Site) -> None:
    """So the three are not more than needed; the third is for images of others (below)."""
    before = site.observe()
    site.front = only(*(name for name in ACTING if name != lacking))
    done = site.natkeep("prepare", "web", *PREPARE, "--site", f"destination={site.netns}")
    assert done.returncode == 5
    assert f"natkeep needs CAP_{lacking.upper()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == site.observe()


@pytest.mark.needs("powers")
def test_an_image_that_only_its_owner_may_read_is_read(site: Site, tmp_path: Path) -> None:
    """CAP_DAC_READ_SEARCH: without it root's number does not open others' files."""
    image = tmp_path / "image"
    shutil.copytree(CORPUS, image)
    for path in (*image.iterdir(), image):
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700 if path == image else 0o600)
    site.done("inspect", str(image))
    site.front = only("net_admin", "sys_admin")
    done = site.natkeep("inspect", str(image))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == f"natkeep: cannot open {image}: Permission denied\n"


# ---- what needs none -----------------------------------------------------------------------------


@pytest.fixture
def readable() -> Iterator[Path]:
    """A directory with natkeep's code and an image, which somebody without any powers can read.

    pytest's own directories are for root alone.
    """
    package = Path(__file__).parent.parent / "natkeep"
    with tempfile.TemporaryDirectory(prefix="natkeep-test-") as name:
        directory = Path(name)
        shutil.copytree(package, directory / "code/natkeep", ignore=shutil.ignore_patterns("*.pyc"))
        shutil.copytree(CORPUS, directory / "image")
        (directory / "list").write_text(f"{OLD}:5000 10.1.0.2:50594\n")
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield directory


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"plan web --map {OLD}={NEW} --image image", "ip address add 10.2.0.10/32 dev lo"),
        (f"plan web --map {OLD}={NEW} --connections list --json", '"schema": 1'),
        (f"plan web --map {OLD}={NEW} --connections list --format nft", "create table inet"),
        ("inspect image", "ESTABLISHED"),
        (f"inspect image --map {OLD}={NEW} --json", '"kept": true'),
        ("explain conntrack-full", "conntrack"),
    ],
)
@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root without powers", "nobody"])
@pytest.mark.needs("powers")
def test_plan_inspect_and_explain_need_none(
    words: str, said: str, uid: int, readable: Path
) -> None:
    python = "/usr/bin/python3"  # ours may lie where nobody can read
    done = subprocess.run(
        [*only(uid=uid), python, "-m", "natkeep.cli", *words.split()],
        cwd=readable,
        env={"PYTHONPATH": str(readable / "code"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout
