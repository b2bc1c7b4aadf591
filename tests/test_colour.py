"""Colours are for a person at a terminal, who has not forbidden them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from natkeep.colour import paint


@pytest.mark.parametrize(
    "line",
    [
        "ok    [32]destination: nf_tables can be read and changed",
        "warn  [33]flowtable destination: a flowtable takes them",
        "stop  [1;31]dropped gateway=gw: inet f c drops 10.1.0.2:50001 > 10.3.0.20:5000",
        "note  [2]queued gateway: a rule",
        "1 stops this move; 2 warnings[1;31]",
        "nothing stops a move; 1 warning[32]",
        "MOVE  MAPS  GATE  KEPT[1]",
        "  10.2.0.10:80  10.1.0.2:50001  live[32]  12  13",
        "  10.2.0.10:80  10.1.0.2:50001  one-way[33]  12  0",
        "  10.2.0.10:80  10.1.0.2:50001  no socket[1;31]  12  0",
        "  10.2.0.10:53  -  silent[2]  12  0",
        "  ok  [32] the four-tuple is unchanged",
        "  FAIL[1;31] no reset",
        "engine criu: four-tuple a unchanged; verdict: pass[32]",
        # what only looks like it: names, ids, hosts
        "live: 10.2.0.10=10.3.0.20, 2 connections, gate open",
        "  live, on host ended, 2 live, 1 ended",
        "  okay: as prepared",
    ],
)
def test_a_line_is_painted_where_it_says_how_things_stand(line: str) -> None:
    """The code stands behind what it paints."""
    plain = re.sub(r"\[[\d;]+\]", "", line)
    found = re.search(r"\[([\d;]+)\]", line)
    painted = paint(plain)

    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == plain
    if not found:
        assert painted == plain
        return
    [(code, inside)] = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", painted)
    assert code == found[1]
    assert line[: found.start()].rstrip().endswith(inside)


def test_a_drifted_site_is_painted_to_the_end() -> None:
    assert paint("  destination: DRIFTED") == "  destination: \x1b[1;31mDRIFTED\x1b[0m"


@pytest.mark.root
@pytest.mark.parametrize(
    ("words", "environment", "coloured"),
    [((), {}, True), (("--no-color",), {}, False), ((), {"NO_COLOR": "1"}, False),
     ((), {"NO_COLOR": ""}, True), ((), {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_colours_are_for_terminals(
    words: tuple[str, ...], environment: dict[str, str], coloured: bool
) -> None:
    command = [sys.executable, "-m", "natkeep.cli", "check", *words]
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    reader, terminal = os.openpty()
    with os.fdopen(reader, "rb", buffering=0) as seen:
        subprocess.run(command, stdout=terminal, stderr=terminal, env=plain | environment)
        os.close(terminal)
        text = seen.read(1 << 16)
    assert (b"\x1b[" in text) == coloured
    assert b"stops a move" in text

    piped = subprocess.run(command, capture_output=True, env=plain | environment)
    assert b"\x1b" not in piped.stdout
