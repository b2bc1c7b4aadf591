"""A move as an earlier natkeep left it, made of today's: fewer rules, an older journal."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from natkeep.plan.base_chains import is_later

_LATER_KEYS = ("cookies", "begun", "joined", "entries", "opening")
_LATER_KEYS_OF_RECORDS = ("objects", "shared", "sets")


def remove_later(netns: str) -> None:
    """Take away what natkeeps before this one did not make; it must have been there."""
    within = ["ip", "netns", "exec", netns]
    if "inet natkeep" not in subprocess.getoutput(" ".join([*within, "nft", "list", "tables"])):
        return
    listing = [*within, "nft", "-j", "list", "table", "inet", "natkeep"]
    listed = json.loads(subprocess.run(listing, check=True, capture_output=True).stdout)
    objects = [next(iter(each.items())) for each in listed["nftables"]]
    later = [(kind, one["name"]) for kind, one in objects if is_later(one.get("name", ""))]
    chains = [f"inet natkeep {name}" for kind, name in later if kind == "chain"]
    sets = [f"{kind} inet natkeep {name}" for kind, name in later if kind != "chain"]
    assert chains
    lines = [f"flush chain {name}" for name in chains] + [f"flush {name}" for name in sets]
    lines += [f"delete chain {name}" for name in chains] + [f"delete {name}" for name in sets]
    subprocess.run([*within, "nft", "-f", "-"], check=True, input="\n".join(lines).encode())


def write_older(journal: Path, schema: int) -> None:
    """The journal of a move without what came later; in schema 1 no record says what undoes it."""
    header, *records = map(json.loads, journal.read_text().splitlines())
    header = {key: value for key, value in header.items() if key not in _LATER_KEYS}
    later = frozenset(_LATER_KEYS_OF_RECORDS)
    records = [{k: v for k, v in one.items() if k not in later} for one in records]
    if schema == 1:
        del header["prepare"]
        records = [{k: v for k, v in one.items() if k not in ("site", "undo")} for one in records]
    lines = [json.dumps(each) + "\n" for each in ({**header, "schema": schema}, *records)]
    journal.write_text("".join(lines))
