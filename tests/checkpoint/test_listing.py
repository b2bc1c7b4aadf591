"""tests of the connections file: what it may hold, what is refused and where, and how fast."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natkeep.checkpoint import Checkpoint, listing
from natkeep.checkpoint.listing import parse_listing, read_listing, write_listing
from natkeep.errors import ImageError
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple

GOOD = "10.2.0.10:5000 10.1.0.2:50594\n"


def found_in(text: str) -> list[str]:
    return [f"{each.destination} {each.source}" for each in parse_listing(text, "f").connections]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, ["10.2.0.10:5000 10.1.0.2:50594"]),
        (GOOD.strip(), ["10.2.0.10:5000 10.1.0.2:50594"]),
        ("\n\n  \t\n" + GOOD, ["10.2.0.10:5000 10.1.0.2:50594"]),
        ("# web1\n" + GOOD + "#\n", ["10.2.0.10:5000 10.1.0.2:50594"]),
        (GOOD.replace("\n", " # kept\r\n"), ["10.2.0.10:5000 10.1.0.2:50594"]),
        (GOOD.replace("\n", "# kept, für immer"), ["10.2.0.10:5000 10.1.0.2:50594"]),
        ("\t10.2.0.10:5000\t \t10.1.0.2:1 \n", ["10.2.0.10:5000 10.1.0.2:1"]),
        ("[::1]:80 [::2]:9\n", ["[::1]:80 [::2]:9"]),
        ("[FD00::0:1]:80 [fd00:0::2]:65535", ["[fd00::1]:80 [fd00::2]:65535"]),
        ("[::ffff:10.2.0.10]:1 10.1.0.2:2", ["10.2.0.10:1 10.1.0.2:2"]),
        ("[::2]:1 [::3]:2\n10.2.0.10:1 10.1.0.2:2", ["10.2.0.10:1 10.1.0.2:2", "[::2]:1 [::3]:2"]),
        ("10.2.0.10:1 10.1.0.2:2\n10.2.0.10:1 10.1.0.2:3", None),
    ],
)
def test_lists_that_are_understood(text: str, expected: list[str] | None) -> None:
    assert found_in(text) == (expected or text.split("\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("10.2.0.10:5000", "'10.2.0.10:5000' is not `LOCAL PEER`"),
        ("10.2.0.10:5000 10.1.0.2:5 x", "'10.2.0.10:5000 10.1.0.2:5 x' is not `LOCAL PEER`"),
        ("10.2.0.10:5000 abc", "'abc' has no port"),
        ("abc 10.2.0.10:5000", "'abc' has no port"),
        ("abc:1 10.1.0.2:5", "'abc' does not appear to be an IPv4 or IPv6 address"),
        ("10.2.0.256:1 10.1.0.2:5", "'10.2.0.256' does not appear to be an IPv4 or IPv6 address"),
        ("10.2.0.010:1 10.1.0.2:5", "'10.2.0.010' does not appear to be an IPv4 or IPv6 address"),
        ("10.2.10:1 10.1.0.2:5", "'10.2.10' does not appear to be an IPv4 or IPv6 address"),
        ("10.2.0.10:0 10.1.0.2:5", "0 is not a port (1 to 65535)"),
        ("10.2.0.10:65536 10.1.0.2:5", "65536 is not a port (1 to 65535)"),
        ("10.2.0.10:1 10.1.0.2:-5", "'-5' is not a port (1 to 65535)"),
        ("10.2.0.10:1 10.1.0.2:1_0", "'1_0' is not a port (1 to 65535)"),
        ("10.2.0.10:1 10.1.0.2:٣", "'٣' is not a port (1 to 65535)"),
        ("10.2.0.10:1 10.1.0.2:", "'' is not a port (1 to 65535)"),
        ("::1:80 ::2:9", "'::1:80': write IPv6 as [address]:port"),
        ("[fe80::1%eth0]:80 [fe80::2]:9", "'fe80::1%eth0' has a zone"),
        ("[::1]:80 10.1.0.2:9", "10.1.0.2:9 and [::1]:80 are of different families"),
        (f"{'x' * 1000}:1 10.1.0.2:9", "x..."),
        ("udp", "'udp' is not `udp LOCAL PEER`"),
        ("udp 10.2.0.10:1", "'udp 10.2.0.10:1' is not `udp LOCAL PEER`"),
        ("udp 10.2.0.10:1 * x", "'udp 10.2.0.10:1 * x' is not `udp LOCAL PEER`"),
        ("udp * 10.2.0.10:1", "'*' has no port"),
        ("udp *:53 *", "'*' does not appear to be an IPv4 or IPv6 address"),
        ("udp 10.2.0.10:0 *", "0 is not a port (1 to 65535)"),
        ("udp [::1]:80 10.1.0.2:9", "10.1.0.2:9 and [::1]:80 are of different families"),
        ("UDP 10.2.0.10:1 10.1.0.2:9", "is not `LOCAL PEER`"),
        ("tcp 10.2.0.10:1 10.1.0.2:9", "is not `LOCAL PEER`"),
        ("10.2.0.10:1 *", "'*' has no port"),
        ("dump", "not `dump RUN-ID`, of letters, digits and hyphens"),
        ("dump 1 2", "not `dump RUN-ID`, of letters, digits and hyphens"),
        ("dump a/b", "not `dump RUN-ID`, of letters, digits and hyphens"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_listing(f"# comment\n\n{GOOD}{line}\n{GOOD}", "web.list")

    assert str(caught.value).startswith("web.list:4: ")
    assert str(caught.value).endswith(message)
    assert len(str(caught.value)) < 200
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "again", [GOOD, "10.2.0.10:05000 10.1.0.2:50594", "[::ffff:10.2.0.10]:5000 10.1.0.2:50594 #"]
)
def test_a_line_twice_is_refused_with_both_numbers(again: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_listing(f"\n{GOOD}10.2.0.10:5000 10.1.0.2:1\n{again}", "f")

    assert str(caught.value) == "f:4: the same connection as in line 2"


def test_lines_of_udp_are_told_apart_from_those_of_tcp() -> None:
    """10.2.0.10:5000 may have one peer by both; 117.100.112.x is `udp`, packed."""
    text = (
        f"{GOOD}udp {GOOD}udp 0.0.0.0:53 *\n udp [::]:53\t* # any\nudp 117.100.112.1:1 10.1.0.2:2"
    )

    checkpoint = parse_listing(f"{text}\n117.100.112.1:1 10.1.0.2:2", "f")

    assert checkpoint.connections == checkpoint.udp
    assert [*map(str, checkpoint.udp_servers)] == ["0.0.0.0:53", "[::]:53"]
    assert len(checkpoint.udp) == 2


@pytest.mark.parametrize("line", [f"udp {GOOD.strip()}", "udp 0.0.0.0:53 *"])
def test_a_line_of_udp_twice_is_refused(line: str) -> None:
    with pytest.raises(ImageError, match=r"^f:3: the same connection as in line 1$"):
        parse_listing(f"{line}\n{GOOD}{line} # again", "f")


def test_a_list_says_which_dump_it_is_of() -> None:
    connections = parse_listing(GOOD, "f").connections
    text = write_listing(connections, dump="2d9c5a5c-1")

    assert parse_listing(text, "f") == Checkpoint(connections, listed_dump="2d9c5a5c-1")
    assert parse_listing(text, "f").run_id == "2d9c5a5c-1"
    assert parse_listing(GOOD, "f").run_id is None
    assert parse_listing("dump 2d9c5a5c-1", "f").connections == NO_CONNECTIONS  # all have ended
    with pytest.raises(ImageError, match=r"^f:4: another dump than in line 1$"):
        parse_listing(f"{text}# more\ndump 3\n", "f")


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n  \n"])
def test_an_empty_list_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match=r"^f lists no connections$"):
        parse_listing(text, "f")


def test_too_many_lines_are_not_looked_at() -> None:
    """Each blank line takes a microsecond, and 32 MiB of them would take minutes."""
    with pytest.raises(ImageError, match=r"^f: more than 1048576 lines$"):
        parse_listing("\n" * (listing.MAX_LINES + 1), "f")

    assert found_in("\n" * 1000 + GOOD) == [GOOD.strip()]


ENDPOINTS4 = st.builds(Endpoint, st.ip_addresses(v=4), st.integers(1, 65535))
ENDPOINTS6 = st.builds(
    Endpoint, st.ip_addresses(v=6).filter(lambda ip: not ip.ipv4_mapped), st.integers(1, 65535)
)
TUPLES = st.builds(FourTuple, ENDPOINTS4, ENDPOINTS4) | st.builds(FourTuple, ENDPOINTS6, ENDPOINTS6)


@given(st.lists(TUPLES, min_size=1, max_size=20, unique=True))
def test_what_was_written_is_read(inbound: list[FourTuple]) -> None:
    connections = Connections.of(inbound)

    assert parse_listing(write_listing(connections), "f") == Checkpoint(connections)


@given(st.text(alphabet="0123456789.:[]af# \n", max_size=60))
def test_quick_and_exact_reading_agree(line: str) -> None:
    """A line is understood as Endpoint.parse understands its two words, or it is an error."""
    try:
        checkpoint = parse_listing(line, "f")
    except ImageError:
        return
    exact = [
        FourTuple(*reversed([Endpoint.parse(word) for word in words]))
        for each in line.split("\n")
        if (words := each.partition("#")[0].split())
    ]
    assert Connections.of(exact) == checkpoint.connections


USUAL = st.builds(
    "{}:{} {}:{}\n".format,
    st.sampled_from(["10.2.0.10", "110.2.0.10", "0.2.0.10"]),
    st.sampled_from(["80", "080", "5000"]),
    st.sampled_from(["10.1.0.2", "10.1.0.3", "1.1.0.2"]),
    st.integers(1, 4),
)
CHANGES = st.tuples(st.integers(0), st.integers(0, 2), st.sampled_from("0.: \n[]#x\t\rü"))


def changed(text: str, changes: list[tuple[int, int, str]]) -> str:
    for at, cut, put in changes:
        at %= len(text) + 1
        text = text[:at] + put + text[at + cut :]
    return text


def read(text: str) -> Checkpoint | str:
    try:
        return parse_listing(text, "f")
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("block", [1, 40, listing._BLOCK])
@given(st.lists(USUAL, min_size=1, max_size=8), st.lists(CHANGES, max_size=3))
def test_what_is_read_by_the_block_is_what_its_lines_say(
    block: int, lines: list[str], changes: list[tuple[int, int, str]]
) -> None:
    text = changed("".join(lines), changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_BLOCK", block)
        by_block = read(text)
        patch.setattr(listing, "_read_usual", lambda data: None)
        assert by_block == read(text)


@pytest.mark.parametrize("local", ["10.2.0.10:{}", "10.2.0.10:5000"])
def test_a_usual_list_is_read_by_the_block(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{local.format(n)} 10.1.{n % 9}.2:{n}\n" for n in range(1, 5000))
    by_line = listing._read_lines(text, "f")
    monkeypatch.delattr(listing, "_read_lines")

    assert by_line == parse_listing(text, "f") == parse_listing(text[:-1], "f")


# ---- files and pipes ----------------------------------------------------------------------


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "web.list"
    path.write_text(GOOD)

    assert len(read_listing(path).connections) == 1
    assert read_listing(str(path)) == parse_listing(GOOD, "")


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """As with `--connections <(ss ...)`; the writer comes late and writes slowly."""
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def write() -> None:
        with open(path, "w") as file:
            for part in (GOOD[:9], GOOD[9:], "10.2.0.10:1 10.1.0.2:2\n"):
                file.write(part)
                file.flush()
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    checkpoint = read_listing(path)
    writer.join()

    assert len(checkpoint.connections) == 2


def test_a_fifo_without_a_writer_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PATIENCE", 0.05)
    path = tmp_path / "fifo"
    os.mkfifo(path)

    with pytest.raises(ImageError, match=r"/fifo: no end of it within 0.05 s$"):
        read_listing(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot read {}: No such file or directory"),
        ("directory", "{} is neither a file nor a pipe"),
        ("text", "{}:2: this is not UTF-8 text"),
        ("long", "{}: more than 40 octets"),
    ],
)
def test_a_file_that_is_none(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MAX_LISTING", 40)
    (tmp_path / "directory").mkdir()
    (tmp_path / "text").write_bytes(b"#\n\xff\n")
    (tmp_path / "long").write_text(GOOD * 2)
    path = tmp_path / name

    with pytest.raises(ImageError) as caught:
        read_listing(path)

    assert str(caught.value) == message.format(path)


def test_a_device_is_not_opened() -> None:
    with pytest.raises(ImageError, match=r"^/dev/zero is neither a file nor a pipe$"):
        read_listing("/dev/zero")


def test_a_hundred_thousand_lines_are_read_in_time() -> None:
    """0.03 s when measured; the bound is for a busy machine."""
    text = "".join(
        f"10.2.0.10:5000 10.1.{n // 250 % 250}.{n % 250}:{1024 + n // 2}\n" for n in range(100_000)
    )

    start = time.process_time()
    checkpoint = parse_listing(text, "f")

    assert time.process_time() - start < 1.0
    assert len(checkpoint.connections) == 100_000
