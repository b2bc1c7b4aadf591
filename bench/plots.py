"""the plots: docs/performance/*.png, drawn from the JSON that the benches wrote.

    python -m bench.plots [--from DIR] [--to DIR]

Rule: a plot shows what is in the files and computes nothing but medians; what was not measured is
not drawn. Needs matplotlib, which `make bench-plots` installs and nothing else asks for.
Colours are those of Okabe and Ito, which nearly everybody can tell apart; each line or bar has a
marker or hatching of its own, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.figures import middle_half

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS = ROOT / ".lab/bench", ROOT / "docs/performance"

BLACK, ORANGE, SKY, GREEN, BLUE, RED = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00",
)  # fmt: skip
GREY = "#999999"
SIZE, DPI = (7.0, 4.2), 110

Document = dict[str, Any]


def draw_control(document: Document, axes: Any) -> None:
    """Milliseconds of whole processes by the number of connections."""
    by_count = {int(count): ms for count, ms in document["ms"].items()}
    ways = {
        "natkeep prepare": (("natkeep prepare",), BLUE, "o", "-"),
        "nft -f and conntrack -R": (("nft -f", "conntrack -R"), ORANGE, "s", "-"),
        "iptables-restore": (("iptables-restore",), RED, "^", "-"),
        "conntrack -I, one by one": (("conntrack -I",), GREEN, "v", "-"),
        "floor: packed beforehand": (("floor",), BLACK, ".", "--"),
    }
    for label, (names, colour, marker, line) in ways.items():
        points = [
            (count, sum(statistics.median(ms[name]) for name in names))
            for count, ms in sorted(by_count.items())
            if all(name in ms for name in names)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=line, label=label)
    axes.set(xscale="log", yscale="log", xlabel="connections", ylabel="ms, whole processes")
    axes.set_title("To prepare a destination, by the number of connections")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_stall(document: Document, axes: Any) -> None:
    """Milliseconds that a peer waits for after the blackout, by the blackout."""
    lines = {
        ("repair", "once", True): ("sent once, hold", BLUE, "o", "-"),
        ("repair", "stream", True): ("sends every 20 ms, hold", SKY, "D", "-"),
        ("criu", "once", True): ("sent once, moved by CRIU, hold", GREEN, "v", "-"),
        ("repair", "once", False): ("sent once, --no-hold", ORANGE, "s", "--"),
        ("repair", "stream", False): ("sends every 20 ms, --no-hold", RED, "^", "--"),
        ("in place", "once", False): ("sent once, CRIU alone on one host", GREY, "x", ":"),
    }
    for (engine, pattern, hold), (label, colour, marker, line) in lines.items():
        points = sorted(
            _medians_of(case)
            for case in document["cases"]
            if (case["engine"], case["pattern"], case["hold"]) == (engine, pattern, hold)
            and case["connections"] == 1
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=line, label=label)
    axes.set(xscale="log", xlabel="blackout, s", ylabel="stall beyond the blackout, ms")
    axes.set_xticks(sorted({case["asked_ms"] / 1000 for case in document["cases"]}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("What a peer waits for after the process is back")
    axes.grid(alpha=0.3)
    axes.legend()


def _medians_of(case: dict[str, Any]) -> tuple[float, float]:
    """The blackout in s, and what came after it in ms; a run that failed has neither."""
    good = [run for run in case["runs"] if not run["fault"]]
    if not good:
        return case["asked_ms"] / 1000, float("nan")
    beyond = statistics.median(run["stall_ms"] - run["blackout_ms"] for run in good)
    return statistics.median(run["blackout_ms"] for run in good) / 1000, beyond


def draw_path(document: Document, axes: Any) -> None:
    """Ratios to plain routing, and as a band what plain routing makes of itself."""
    ratios = dict(document["ratios"])
    noise = ratios.pop("plain (the noise)")
    metrics = list(noise)
    colours = (BLUE, SKY, ORANGE, GREEN)
    height = 0.8 / len(metrics)
    for number, (metric, colour) in enumerate(zip(metrics, colours, strict=False)):
        places = [at + number * height for at in range(len(ratios))]
        medians = [statistics.median(taken[metric]) for taken in ratios.values()]
        halves = [middle_half(taken[metric]) for taken in ratios.values()]
        low = [m - least for m, (least, _) in zip(medians, halves, strict=True)]
        high = [most - m for m, (_, most) in zip(medians, halves, strict=True)]
        axes.barh(
            places, medians, height, color=colour, label=metric, edgecolor="white",
            hatch=("", "//", "..", "xx")[number], xerr=(low, high),
            error_kw={"elinewidth": 0.8, "ecolor": BLACK},
        )  # fmt: skip
    halves = [middle_half(taken) for taken in noise.values()]
    least, most = min(low for low, _ in halves), max(high for _, high in halves)
    axes.axvspan(least, most, color="#DDDDDD", zorder=0, label="the noise")
    axes.axvline(1, color=BLACK, lw=0.8, zorder=0)
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(ratios))], list(ratios), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6)
    axes.set_xlabel("ratio to plain routing (median, middle half); 1 is as quick")
    axes.set_title("What a packet's way costs")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=5)


def draw_hook(document: Document, axes: Any) -> None:
    """Milliseconds of single calls and of whole restores: the least, and the median."""
    taken = document["ms"]
    names = list(taken)
    least = [min(taken[name]) for name in names]
    medians = [statistics.median(taken[name]) for name in names]
    axes.hlines(names, least, medians, color=GREY)
    axes.plot(least, names, color=BLUE, marker="|", ls="", ms=10, mew=2, label="minimum")
    axes.plot(medians, names, color=RED, marker="o", ls="", label="median")
    for name, value in zip(names, medians, strict=True):
        axes.annotate(f"{value:.1f}", (value, name), (8, -3), textcoords="offset points", size=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(least) * 0.8, max(medians) * 2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.3)
    axes.set_xlabel("ms, whole programs")
    axes.set_title("What natkeep-hook costs a restore")
    axes.legend()


DRAWN: dict[str, tuple[Callable[[Document, Any], None], float]] = {
    # how it is drawn, and how much taller than the others
    "control": (draw_control, 1),
    "hook": (draw_hook, 1),
    "stall": (draw_stall, 1),
    "path": (draw_path, 1.7),
}


def draw(name: str, document: Document, directory: Path) -> Path:
    """Make the bench's plot; where it is."""
    from matplotlib.figure import Figure  # not pyplot: no display, no state

    drawing, taller = DRAWN[name]
    figure = Figure(figsize=(SIZE[0], SIZE[1] * taller), dpi=DPI, layout="constrained")
    drawing(document, figure.add_subplot())
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    # Without the version that would be written into it, the same data are the same file.
    figure.savefig(path, metadata={"Software": None})
    return path


def main(argv: list[str] | None = None) -> int:
    """Draw all that there are results of; 1 if one is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--to", type=Path, default=PLOTS, metavar="DIR")
    args = parser.parse_args(argv)
    missing = 0
    for name in DRAWN:
        source = args.results / f"{name}.json"
        if not source.exists():
            print(f"no {source}: run `make bench` first", file=sys.stderr)
            missing += 1
            continue
        print(draw(name, json.loads(source.read_text()), args.to))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
