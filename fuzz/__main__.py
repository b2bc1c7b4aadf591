"""the program: `python -m fuzz`, which `make fuzz` runs; see fuzz/__init__.py."""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
import time
from pathlib import Path

from fuzz import lengths, own
from fuzz.targets import TARGETS
from fuzz.trial import LIMIT_MIB, LIMIT_SECONDS, Judge, Tally, keep, read_case

FINDINGS = Path(".lab/findings")
LONG = 300  # seconds; a run as long as that tries every length up to the right one


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="fuzz natkeep's readers")
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="for all targets and engines together")
    add("--mutants", type=int, help="at most so many for each target and engine")
    add("--target", action="append", choices=sorted(TARGETS), help="repeatable; default: all")
    add("--engine", choices=("own", "atheris"), help="default: both, where atheris is installed")
    add("--seed", type=int, help="of the own engine; printed, so that a run can be done again")
    add("--no-lengths", action="store_true", help="leave out the proof about lengths")
    add("--findings", type=Path, default=FINDINGS, help=f"default: {FINDINGS}")
    add("--replay", type=Path, help="judge what a finding kept; with one --target")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    names = args.target or sorted(TARGETS)
    if args.replay:
        return replay(names, args.replay)
    atheris = importlib.util.find_spec("atheris") is not None
    engines = [args.engine] if args.engine else ["own", *(["atheris"] if atheris else [])]
    seed = secrets.randbits(32) if args.seed is None else args.seed
    missing = "" if atheris else "; atheris is not installed here"
    print(f"seed {seed}; engines: {', '.join(engines)}{missing}", flush=True)
    faults, seconds = 0, args.seconds
    if not args.no_lengths:
        began = time.monotonic()
        faults += prove_lengths(lengths.FAR if seconds >= LONG else 0)
        seconds = max(seconds - (time.monotonic() - began), 1.0)
    share = seconds / len(names) / len(engines)
    print(HEAD, flush=True)
    total = 0
    for engine in engines:
        for name in names:
            tally = run(engine, name, seed, share, args.mutants)
            report(tally, args.findings)
            faults += tally.found
            total += tally.mutants
    print(f"{total:,} mutants, {faults} findings")
    return 1 if faults else 0


def run(engine: str, name: str, seed: int, seconds: float, mutants: int | None) -> Tally:
    if engine == "own":
        return own.fuzz(TARGETS[name](), seed, seconds=seconds, mutants=mutants)
    from fuzz import guided

    return guided.fuzz(name, seed, seconds=seconds, mutants=mutants)


HEAD = (
    f"{'target':8} {'engine':8} {'mutants':>11} {'per s':>7} {'accepted':>10} "
    f"{'refused by exit code':>22} {'slowest':>10} {'memory':>10} findings"
)


def report(tally: Tally, findings: Path) -> None:
    """One line, and for each kind of finding where it was kept."""
    rate = tally.mutants / tally.seconds if tally.seconds else 0
    refused = ", ".join(f"{code}: {count:,}" for code, count in sorted(tally.refused.items()))
    print(
        f"{tally.target:8} {tally.engine:8} {tally.mutants:11,} {rate:7,.0f} "
        f"{tally.accepted:10,} {refused or '-':>22} {tally.slowest * 1000:7.1f} ms "
        f"{tally.memory:6.1f} MiB {tally.found}",
        flush=True,
    )
    for kind, finding in sorted(tally.findings.items()):
        print(f"  FINDING {kind}: {keep(finding, findings)}", flush=True)


def prove_lengths(far: int) -> int:
    """The proof about lengths, printed; how many were tolerated."""
    began = time.monotonic()
    proof = lengths.prove(far=far)
    print(
        f"lengths: {proof.lengths:,} of all seeds, {proof.mutants:,} wrong ones, "
        f"{len(proof.tolerated)} not refused; {time.monotonic() - began:.1f} s",
        flush=True,
    )
    for where in proof.tolerated:
        print(f"  FINDING not refused: {where}", flush=True)
    return len(proof.tolerated)


def replay(names: list[str], directory: Path) -> int:
    """Judge one kept case again, from memory and from files."""
    if len(names) != 1:
        sys.exit("python -m fuzz: --replay needs one --target")
    tally = Tally(names[0], "replay")
    judge = Judge(TARGETS[names[0]](), tally)
    with judge.watching():
        judge.judge(read_case(directory), on_files=True)
    for finding in tally.findings.values():
        print(f"{finding.kind}\n{finding.detail}")
    if not tally.found:
        print("accepted" if tally.accepted else f"refused, exit {next(iter(tally.refused))}")
    print(f"limits: {LIMIT_SECONDS:g} s, {LIMIT_MIB:g} MiB; took {tally.slowest * 1000:.1f} ms")
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
