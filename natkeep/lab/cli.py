"""The verbs `natkeep lab list`, `natkeep lab run` and `natkeep lab matrix`.

Rule: parse, call scenario.py or matrix.py, print, return the exit code; 0 only for a verdict of
pass. natkeep's own cli imports this file only for `natkeep lab`, and turns errors and signals into
messages and exit codes for it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Any

from natkeep.colour import choose_paint
from natkeep.errors import RefusedError, in_one_line
from natkeep.lab.host import LabError
from natkeep.terminal import say, show, show_json

_TOOLS = {"nsenter": "util-linux", "ip": "iproute2", "nft": "nftables", "tcpdump": "tcpdump"}


def add_parser(
    subparsers: argparse._SubParsersAction[Any],
    *,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> argparse.ArgumentParser:
    """Add `lab` to natkeep's verbs; *parents* hold the options that every verb has, as --json."""
    text = "practice networks: move a real server and see what its peer saw"
    lab: argparse.ArgumentParser = subparsers.add_parser("lab", help=text, description=text)
    verbs = lab.add_subparsers(dest="lab_verb", required=True, metavar="list | run | matrix")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = verbs.add_parser(
            name, parents=list(parents), help=text, description=text
        )
        return verb

    add("list", "name the scenarios")
    running = add("run", "run one scenario, and judge it")
    running.add_argument("scenario", metavar="SCENARIO", help="as lab list names it")
    running.add_argument(
        "--engine", choices=("auto", "criu", "repair", "runc", "podman"), default="auto",
        help="what freezes and restores the server (auto: criu where it works)",
    )  # fmt: skip
    running.add_argument("--pcap", type=Path, metavar="DIR", help="keep the captures in DIR")
    running.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write the report into DIR: as .json, as .txt, and as a page with a plot, .html",
    )
    running.add_argument(
        "--translator", choices=("natkeep", "naive", "naive+purge", "none"), default="natkeep",
        help="who translates: natkeep, or a baseline to compare it with",
    )  # fmt: skip
    running.add_argument(
        "--without-translation", dest="translator", action="store_const", const="none",
        help="leave the translation out; the verdict must then be fail",
    )  # fmt: skip
    _add_matrix(add("matrix", "every situation, with natkeep and the baselines"))
    return lab


def _add_matrix(matrix: argparse.ArgumentParser) -> None:
    matrix.add_argument("--reps", type=_count, default=1, metavar="N", help="runs of each cell")
    matrix.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="a situation's number, or words of its name; repeatable",
    )  # fmt: skip
    matrix.add_argument(
        "--translator", action="append", default=[], choices=("natkeep", "naive", "naive+purge"),
        help="repeatable; default: all",
    )  # fmt: skip
    matrix.add_argument(
        "--mode", action="append", default=[], choices=("stateful", "stateless"),
        help="of natkeep's translations; repeatable; default: both",
    )  # fmt: skip
    matrix.add_argument(
        "--family", action="append", default=[], type=int, choices=(4, 6),
        help="IPv4 or IPv6; repeatable; default: both",
    )  # fmt: skip
    matrix.add_argument(
        "--probe", action="append", default=[], choices=("sent", "lost"),
        help="whether CRIU's window probe arrives; default: both",
    )  # fmt: skip
    matrix.add_argument(
        "--jobs", type=_count, default=len(os.sched_getaffinity(0)), metavar="N",
        help="labs at once; default: one a processor",
    )  # fmt: skip
    matrix.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write matrix.json and matrix.txt into DIR, and captures of what failed",
    )  # fmt: skip


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Do what was parsed; the exit code."""
    verbs = {"list": _list, "run": _run, "matrix": _matrix}
    return verbs[args.lab_verb](args)


def _list(args: argparse.Namespace) -> int:
    from natkeep.lab.scenario import scenarios

    known = [{"name": each.name, "title": each.title} for each in scenarios()]
    if args.json:
        show_json(dumps({"schema": 1, "scenarios": known}, indent=2))
    else:
        width = max((len(each["name"]) for each in known), default=0)
        for each in known:
            show([f"{each['name']:<{width}}  {each['title']}"])
    return 0


def _run(args: argparse.Namespace) -> int:
    from natkeep.lab import report, scenario
    from natkeep.page import demand_matplotlib

    found = scenario.find_scenario(args.scenario)
    require_tools()
    if args.report:
        demand_matplotlib()
    done = scenario.run(
        found, pcap=args.pcap, page=args.report, engine=args.engine, translator=args.translator
    )
    _show(args, "report", done.as_json(), report.render_report(done))
    if args.report:
        say(f"natkeep: as a page: {args.report / done.scenario}.html")
    return 0 if done.passed else 1


def _show(args: argparse.Namespace, name: str, value: dict[str, Any], text: str) -> None:
    """Print the result as --json says, and write both forms of it into --report's directory."""
    document = dumps(value, indent=2)
    text = "\n".join(map(in_one_line, text.split("\n")))  # before it is written, too
    if args.report:
        args.report.mkdir(parents=True, exist_ok=True)
        (args.report / f"{name}.json").write_text(document + "\n", encoding="utf-8")
        (args.report / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    if args.json:
        show_json(document)
    else:
        show(text.split("\n"), choose_paint(no_color=args.no_color))


def _matrix(args: argparse.Namespace) -> int:
    from natkeep.lab import matrix, matrix_table

    selection = matrix.Selection(
        tuple(args.only), tuple(args.translator), tuple(args.mode), tuple(args.family),
        tuple(each == "sent" for each in args.probe),
    )  # fmt: skip
    cells = selection.cells()
    require_tools("conntrack")
    runs = [cell for cell in cells if cell.applies] * args.reps
    began, ended = time.monotonic(), 0

    def show(outcome: matrix.Outcome) -> None:
        nonlocal ended
        ended += 1
        if not args.quiet:
            say(f"{ended}/{len(runs)} {outcome.verdict:<7} {outcome.cell}")

    outcomes = matrix.run(runs, jobs=args.jobs, report=args.report, show=show)
    table = matrix_table.make_table(
        cells, outcomes, reps=args.reps, jobs=args.jobs, seconds=time.monotonic() - began
    )
    _show(args, "matrix", table.as_json(), table.as_text())
    return 1 if table.failed else 0


def require_tools(*more: str) -> None:
    """The lab needs root, a few programs and scapy; NatkeepError when they are not there."""
    if os.geteuid() != 0:
        raise RefusedError("the lab makes network namespaces, which needs root", hint="use sudo")
    tools = {**_TOOLS, **{tool: tool for tool in more}}
    missing = [f"{tool} (package {p})" for tool, p in tools.items() if not shutil.which(tool)]
    if not find_spec("scapy"):
        missing.append("scapy (package python3-scapy, or pip install 'natkeep[lab]')")
    if missing:
        raise LabError(f"the lab needs {', '.join(missing)}")
