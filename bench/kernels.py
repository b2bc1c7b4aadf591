"""`make kernels`: boots Debian's kernels in virtual machines, and what passes on each of them.

    python -m bench.kernels [own|newest …] [--quick] [--minutes 60]

`own` is the kernel of this Debian release, `newest` the newest of all its suites;
scripts/get-kernels fetches them into .lab/kernels/. virtme-ng boots one, without help of the
hardware (TCG), and with this machine's files as its own, which it cannot change.
scripts/kernel-guest does the checks there, with deadlines stretched by how slow it is
(NATKEEP_TIME_SCALE). What they printed stays in .lab/kernels/NAME/results/. Exit code 0 only if
all that was tried has passed.

Rule: nothing is installed here, and no kernel but a virtual machine's is changed.
"""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / ".lab/kernels"
NAMES = ("own", "newest")
_TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static", "depmod": "kmod"}
_LOOK_EVERY_S = 0.5
# Of each kind of network one, by number; `natkeep lab matrix --only` takes these.
SITUATIONS = (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 14, 16, 17, 18)
CONTRACT = ("test_contract.py", "test_contract_resets.py", "test_contract_source.py")

Tally = tuple[int, int]
"""How many passed, and how many were tried."""


def tally_command(code: int, printed: str) -> Tally:
    """One thing, which has passed if it says so itself."""
    return int(code == 0 and "verdict: pass" in printed), 1


def tally_pytest(code: int, printed: str) -> Tally:
    """The tests that pytest's last line counts; a skip is none, and a run cut short has failed."""
    lines = [line for line in printed.splitlines() if re.search(r" in [0-9.]+s\b", line)]
    found = re.findall(r"(\d+) (passed|failed|errors?)\b", lines[-1] if lines else "")
    tried = sum(int(number) for number, _ in found)
    passed = sum(int(number) for number, word in found if word == "passed")
    return (passed, tried) if tried > passed or code == 0 else (passed, tried + 1)


def tally_matrix(code: int, printed: str) -> Tally:
    """The runs of the matrix' two modes; a refusal where one may be is as good as a pass."""
    found = re.findall(r"^natkeep \w+ +(\d+) of (\d+) runs passed(?:, (\d+) ref)?", printed, re.M)
    tried = sum(int(runs) for _, runs, _ in found)
    passed = sum(int(each) + int(refused or 0) for each, _, refused in found)
    return (passed, tried) if tried > passed or code == 0 else (passed, tried + 1)


@dataclass(frozen=True, slots=True)
class Check:
    """One line that a kernel's machine runs in the checkout, and how its result is read."""

    name: str
    command: str
    tally: Callable[[int, str], Tally]


def _demo(engine: str) -> Check:
    lab = f".venv/bin/natkeep lab run server_moves_to_new_address --engine {engine}"
    return Check(f"make demo, {engine}", lab, tally_command)


def _pytest(files: Iterable[str], expression: str, workers: str) -> str:
    paths = [f"tests/kernel/{name}" for name in files]
    line = [".venv/bin/python", "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    return shlex.join([*line, "--timeout=3600", "-k", expression, *paths])


def _matrix(name: str, situations: Iterable[int], *more: str) -> Check:
    only = [f"--only={number}" for number in situations]
    line = [".venv/bin/natkeep", "lab", "matrix", "--translator=natkeep", *only, *more]
    return Check(name, shlex.join([*line, "--report=/mnt/matrix"]), tally_matrix)


# The first meets the kernel as it was booted: what prepare loads then is no leftover.
CHECKS = (
    _demo("repair"),
    _demo("criu"),
    Check("contract tests", _pytest(CONTRACT, "linux", "auto"), tally_pytest),
    _matrix(f"{len(SITUATIONS)} situations, IPv4", SITUATIONS, "--family=4", "--probe=sent"),
)
QUICK = (
    _demo("repair"),
    Check("some contract tests", _pytest(CONTRACT[:1], "linux and opened_site", "0"), tally_pytest),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one check came to on one kernel; nothing passed where it did not come to its end."""

    kernel: str
    check: str
    passed: int
    tried: int
    seconds: float | None = None

    @property
    def ok(self) -> bool:
        """Whether something was tried, and all of it passed."""
        return 0 < self.tried == self.passed


def read_result(kernel: str, check: Check, number: int, results: Path) -> Result | None:
    """What scripts/kernel-guest wrote of its line *number*; None before its end."""
    ended = results / f"{number}.code"
    if not ended.exists():
        return None
    code, seconds = ended.read_text().split()
    printed = (results / f"{number}.out").read_text(encoding="utf-8", errors="replace")
    return Result(kernel, check.name, *check.tally(int(code), printed), float(seconds))


def find_missing(name: str) -> str:
    """What keeps kernel *name* from being booted here, in a few words; empty: nothing."""
    if platform.machine() != "x86_64":
        return f"no machine for {platform.machine()}"
    for tool, package in _TOOLS.items():
        if not shutil.which(tool):
            return f"needs {tool} (Debian's {package})"
    if not _vng().exists():
        return "needs virtme-ng in .venv: scripts/setup"
    if not (KERNELS / name / "release").exists():
        why = KERNELS / f"{name}.unavailable"
        return why.read_text().strip() if why.exists() else f"needs scripts/get-kernels {name}"
    return ""


def _vng() -> Path:
    return Path(sys.executable).with_name("vng")


def run_kernel(
    name: str, checks: Sequence[Check], results: Path, *, seconds: float, processors: int,
    tell: Callable[[Result], None] = lambda _: None,
) -> list[Result]:  # fmt: skip
    """Boot kernel *name*, and do *checks* there, in *seconds* at most; *tell* hears each result.

    results: a new directory, which the virtual machine writes into.
    """
    release = (KERNELS / name / "release").read_text().strip()
    compileall.compile_dir(ROOT / "natkeep", quiet=1)  # there it would be each time anew
    results.mkdir(parents=True)
    (results / "checks").write_text("".join(f"{each.command}\n" for each in checks))
    done: list[Result] = []
    with open(results / "console", "wb") as console:
        machine = subprocess.Popen(
            _boot_line(name, release, results, processors), stdin=subprocess.DEVNULL,
            stdout=console, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
            env={
                **os.environ, "PATH": f"{_vng().parent}:{os.environ['PATH']}",
                "TMPDIR": str(results),
            },
        )  # fmt: skip
        try:
            deadline, over = time.monotonic() + seconds, False
            while not over:  # and once more, when it is
                over = machine.poll() is not None or time.monotonic() >= deadline
                while len(done) < len(checks):
                    number = len(done)
                    result = read_result(release, checks[number], number, results)
                    if result is None:
                        break
                    done.append(result)
                    tell(result)
                time.sleep(0 if over else _LOOK_EVERY_S)
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)  # virtme-ng's shell, and qemu
                machine.wait()
    for check in checks[len(done) :]:
        done.append(Result(release, check.name, 0, 1))
        tell(done[-1])
    return done


def _boot_line(name: str, release: str, results: Path, processors: int) -> list[str]:
    image = KERNELS / name / "root/boot" / f"vmlinuz-{release}"
    # Read-only, and a second time: the guest mounts this one with a cache.
    again = (
        "-fsdev local,id=natkeep-host,path=/,security_model=none,readonly=on,multidevs=remap "
        "-device virtio-9p-pci,fsdev=natkeep-host,mount_tag=natkeep-host"
    )
    return [
        # --disable-kvm: the same everywhere, also where KVM is there and hangs.
        str(_vng()), "--verbose", "--disable-kvm", "--force-9p", "--run", str(image),
        "--cpus", str(processors), "--memory", "2G", f"--rwdir=/mnt={results}",
        f"--qemu-opts={again}",
        "--exec", shlex.join(["sh", str(ROOT / "scripts/kernel-guest"), str(ROOT)]),
    ]  # fmt: skip


def render_row(result: Result) -> str:
    """One line of the table."""
    took = "did not end" if result.seconds is None else f"{result.seconds:.0f} s"
    share = f"{result.passed}/{result.tried}"
    words = f"{result.kernel:<24} {result.check:<24} {share:>9} {took:>11}"
    return words + ("" if result.ok else "  FAILED")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("kernel", nargs="*", metavar="own|newest", help="default: both")
    parser.add_argument("--quick", action="store_true", help="as the suite does: a small part")
    parser.add_argument("--minutes", type=float, default=120, help="at most, for each kernel")
    args = parser.parse_args(argv)
    names = args.kernel or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: there are {' and '.join(NAMES)}")
    found: list[Result] = []
    print(f"{'kernel':<24} {'what':<24} {'passed':>9} {'took':>11}", flush=True)
    for name in names:
        if missing := find_missing(name):
            print(f"{name}: {missing}", file=sys.stderr)
            found.append(Result(name, "boot", 0, 1))
            continue
        results = KERNELS / name / "results"
        shutil.rmtree(results, ignore_errors=True)
        found += run_kernel(
            name, QUICK if args.quick else CHECKS, results, seconds=60 * args.minutes,
            processors=len(os.sched_getaffinity(0)),
            tell=lambda result: print(render_row(result), flush=True),
        )  # fmt: skip
    failed = [each for each in found if not each.ok]
    for each in failed:
        print(f"{each.kernel}, {each.check}: see .lab/kernels/*/results/", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
