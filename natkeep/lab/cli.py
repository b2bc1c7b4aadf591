"""the lab's door: `natkeep lab list` and `natkeep lab run`.

Rule: parse, call scenario.py, print, return the exit code; 0 only for a verdict of pass.
natkeep's own cli imports this file only for `natkeep lab`, and turns errors and signals into
messages and exit codes for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from natkeep.errors import RefusedError
from natkeep.lab.host import LabError

_TOOLS = {"nsenter": "util-linux", "ip": "iproute2", "nft": "nftables", "tcpdump": "tcpdump"}


def add_parser(
    subparsers: argparse._SubParsersAction[Any],
    *,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add `lab` to natkeep's verbs; *parents* hold the options that every verb has, as --json."""
    text = "practice networks: move a real server and see what its peer saw"
    lab: argparse.ArgumentParser = subparsers.add_parser("lab", help=text, description=text)
    verbs = lab.add_subparsers(dest="lab_verb", required=True, metavar="list | run")
    verbs.add_parser("list", parents=list(parents), help="name the scenarios")
    running = verbs.add_parser("run", parents=list(parents), help="run one, and judge it")
    running.add_argument("scenario", metavar="SCENARIO")
    running.add_argument(
        "--engine", choices=("auto", "criu", "repair"), default="auto",
        help="what freezes and restores the server (auto: criu where it works)",
    )  # fmt: skip
    running.add_argument("--pcap", type=Path, metavar="DIR", help="keep the captures in DIR")
    running.add_argument(
        "--report", type=Path, metavar="DIR", help="write report.json and report.txt into DIR"
    )
    running.add_argument(
        "--translator", choices=("natkeep", "naive", "naive+purge", "none"), default="natkeep",
        help="who translates: natkeep, or a baseline to compare it with",
    )  # fmt: skip
    running.add_argument(
        "--without-translation", dest="translator", action="store_const", const="none",
        help="leave the translation out; the verdict must then be fail",
    )  # fmt: skip
    return lab


def run(args: argparse.Namespace) -> int:
    """Do what was parsed; the exit code."""
    return _list(args) if args.lab_verb == "list" else _run(args)


def _list(args: argparse.Namespace) -> int:
    from natkeep.lab.scenario import scenarios

    known = [{"name": each.name, "title": each.title} for each in scenarios()]
    if args.json:
        print(dumps({"schema": 1, "scenarios": known}, indent=2))
    else:
        width = max((len(each["name"]) for each in known), default=0)
        for each in known:
            print(f"{each['name']:<{width}}  {each['title']}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from natkeep.lab import scenario, verdict

    found = scenario.find_scenario(args.scenario)
    require_tools()
    report = scenario.run(found, pcap=args.pcap, engine=args.engine, translator=args.translator)
    document = dumps(report.as_json(), indent=2, ensure_ascii=False)
    story = verdict.tell_story(report)
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / "report.json").write_text(document + "\n", encoding="utf-8")
        (args.report / "report.txt").write_text(story + "\n", encoding="utf-8")
    print(document if args.json else story)
    return 0 if report.passed else 1


def require_tools() -> None:
    """The lab needs root and a few programs; NatkeepError when they are not there."""
    if os.geteuid() != 0:
        raise RefusedError("the lab makes network namespaces, which needs root", hint="use sudo")
    missing = [f"{tool} (package {p})" for tool, p in _TOOLS.items() if not shutil.which(tool)]
    if missing:
        raise LabError(f"the lab needs {', '.join(missing)}", hint="`make demo` installs them")
