"""policy.py: what the operator's file allows, and which files are none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks_of

from natkeep import policy
from natkeep.criu.environment import read_orders
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import parse_address


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file is; there is none yet."""
    path = tmp_path / "natkeep.toml"
    monkeypatch.setattr(policy, "PATH", str(path))
    return path


def write(path: Path, text: str) -> None:
    path.write_text(text)
    if os.geteuid():
        pytest.skip("needs root: the file has to belong to it")


def move(*pairs: str) -> Move:
    maps = tuple(Map(*map(parse_address, pair.split("="))) for pair in pairs)
    return Move("web", maps, (Site(Role.DESTINATION),))


V4, V6 = "10.2.0.10=10.3.0.20", "fd00:2::10=fd00:3::20"


@pytest.mark.usefixtures("path")
def test_without_a_file_what_was_named_is_allowed() -> None:
    policy.authorise(move(V4, V6), 1_000_000)
    assert policy.read_policy() == policy.Policy()


def test_without_a_file_no_toml_is_imported() -> None:
    code = "import sys; from natkeep import policy; policy.PATH = '/nowhere'; policy.read_policy()"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('tomllib' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_the_file_of_the_page_is_read(path: Path) -> None:
    [block] = blocks_of("test_the_file_of_the_page_is_read")
    write(path, block.text)
    policy.authorise(move(V4), 10_000)
    for pairs, count in (("10.9.0.10=10.3.0.20", 1), ("10.2.0.10=10.9.0.20", 1), (V4, 10_001)):
        with pytest.raises(RefusedError):
            policy.authorise(move(pairs), count)
    orders = read_orders({})
    assert orders is not None
    assert (orders.maps, orders.vias) == (("10.2.0.10=auto",), ("10.2.0.11",))


@pytest.mark.parametrize(
    ("text", "pairs", "count", "refusal"),
    [
        ("", (V4,), 9, None),
        ('allow_old = ["10.2.0.0/24"]', (V4,), 1, None),
        ('allow_old = ["10.2.0.10"]\nallow_new = ["10.3.0.0/16"]', (V4,), 1, None),
        ('allow_old = ["10.9.0.0/16", "fd00:2::/64"]', (V6,), 1, None),
        ('allow_old = ["10.2.1.0/24"]', (V4,), 1, "OLD 10.2.0.10 is not allowed"),
        ("allow_old = []", (V4,), 1, "OLD 10.2.0.10 is not allowed"),
        ('allow_old = ["10.2.0.0/24"]', (V4, V6), 1, "OLD fd00:2::10 is not allowed"),
        ('allow_new = ["10.2.0.0/24"]', (V4,), 1, "NEW 10.3.0.20 is not allowed"),
        ("max_connections = 10", (V4,), 10, None),
        ("max_connections = 10", (V4,), 11, "11 connections are more than this machine allows"),
        ("max_connections = 0", (V4,), 1, "1 connections are more"),
    ],
)
def test_bounds_are_held(
    text: str, pairs: tuple[str, ...], count: int, refusal: str | None, path: Path
) -> None:
    write(path, text)
    if refusal is None:
        policy.authorise(move(*pairs), count)
        return
    with pytest.raises(RefusedError, match=refusal) as caught:
        policy.authorise(move(*pairs), count)
    assert caught.value.exit_code == 4
    assert str(path) in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("allow = []", "unknown key allow"),
        ("[hooks]", "unknown key hooks"),
        ('[hook]\nids = "web"', r"unknown key hook\.ids"),
        ("hook = 3", "hook is not a table"),
        ("allow_old = 3", "allow_old is not a list of texts"),
        ("allow_old = [3]", "allow_old is not a list of texts"),
        ('allow_old = ["10.2.0.10/24"]', "allow_old: 10.2.0.10/24 has host bits set"),
        ('allow_new = ["here"]', "allow_new: 'here' does not appear to be"),
        ("max_connections = -1", "max_connections is not a number from 0 on"),
        ("max_connections = true", "max_connections is not a number"),
        ('max_connections = "9"', "max_connections is not a number"),
        ("[hook]\nid = 3", r"hook\.id is not a text"),
        ('[hook]\nmap = "10.2.0.10=auto"', r"hook\.map is not a list of texts"),
        ('[hook]\nmode = "magic"', "'magic' is none of stateful, stateless"),
        ("allow_old = [", "Invalid"),
        ("x = 1\nx = 2", "Cannot overwrite"),
    ],
)
def test_a_file_that_is_wrong_is_told_in_one_line(text: str, said: str, path: Path) -> None:
    write(path, text)
    with pytest.raises(UsageError, match=said) as caught:
        policy.read_policy()
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_standing_orders_are_read(path: Path) -> None:
    write(path, '[hook]\nmap = ["10.2.0.10=auto"]\nmode = "stateless"\nstate_dir = "/x"\n')
    expected = policy.Standing("", ("10.2.0.10=auto",), "stateless", "/x")
    assert policy.read_policy().hook == expected


@pytest.mark.root
@pytest.mark.needs("powers")
def test_a_file_that_others_can_write_is_no_word_of_the_operators(path: Path) -> None:
    write(path, "")
    for mode in (0o602, 0o620, 0o666):
        path.chmod(mode)
        with pytest.raises(UsageError, match="can be written by others"):
            policy.read_policy()
    path.chmod(0o644)
    os.chown(path, 65534, 0)
    with pytest.raises(UsageError, match="can be written by others"):
        policy.read_policy()


@pytest.mark.parametrize("kind", ["directory", "fifo", "large", "latin"])
def test_what_is_no_such_file_is_refused_without_waiting(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        write(path, "#" * (2 << 20))
    else:
        path.write_bytes(b"# caf\xe9")
    with pytest.raises(NatkeepError) as caught:
        policy.read_policy()
    assert caught.value.exit_code == 2


@pytest.mark.root
def test_the_file_is_the_one_in_etc_whatever_the_environment_says(tmp_path: Path) -> None:
    """In a mount namespace of its own: what this machine has in /etc is not touched."""
    (tmp_path / "list").write_text("10.2.0.10:5000 10.1.0.2:50594\n")
    (tmp_path / "natkeep.toml").write_text("")
    script = (
        "mount -t tmpfs none /etc && mkdir /etc/natkeep && "
        'echo \'allow_old = ["10.9.0.0/16"]\' >/etc/natkeep/natkeep.toml && exec "$@"'
    )
    words = [*("prepare", "web", "--map", V4, "--connections", "list", "--dry-run")]
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", script, "sh"),
            sys.executable,
            "-m",
            "natkeep.cli",
            *words,
        ],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path),
            "NATKEEP_CONFIG": str(tmp_path / "natkeep.toml"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "natkeep: OLD 10.2.0.10 is not allowed on this machine\n"
        "  (allow_old in /etc/natkeep/natkeep.toml)\n"
    )
