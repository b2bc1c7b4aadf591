"""a plan as text: the commands of its steps, or an nft script for each site.

This file must never run anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from natkeep.plan.base_chains import SAID, base_table, dispatch_table, translation_tables
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.steps import (
    FillSet,
    HoldListeners,
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    Loads,
    PassKept,
    Plan,
    as_commands,
)
from natkeep.plan.translation import Translation


def describe_plan(plan: Plan) -> Iterator[str]:
    """The commands of the whole plan, for a person."""
    for step in plan.prepare:
        if isinstance(step, InstallGate):
            yield f"# {step.site}: the first move there makes the table too"
            yield from as_commands(step.site, _static_lines(step, plan.move.mode))
        elif isinstance(step, Loads) and (why := _why_more(step)):
            yield f"# {step.site}: the first move with {why} there makes these too"
            yield from as_commands(step.site, _static_lines(step))
        yield from step.describe()
    yield "# when the sockets are there (natkeep open, or natkeep-hook at post-restore):"
    for step in plan.open:
        yield from step.describe()


def _why_more(step: Loads) -> str:
    """Whose steps need more of the part that all moves share than the gate and the mode do."""
    match step:
        case InstallResets():
            return "--unkept reset"
        case PassKept():
            return "relay that is to forward"
        case InstallReception() if step.answers_as_old:
            return "UDP for any peer"
    return ""


def _static_lines(step: Loads, mode: Mode | None = None) -> list[str]:
    """The part that all moves share: the gate's, with that of the *mode*, or what is its alone."""
    if isinstance(step, InstallReception):
        return [str(one) for one in dispatch_table(SAID)]
    base, *more = step.static()
    if isinstance(step, InstallGate) and mode is not None and not step.site.row.mutes:
        peers = any(one.turns_peers for one in step.translations)
        more = [*translation_tables(step.site.row, mode, peers=peers), *more]
    return [str(one) for part in (base, *more) for one in part]


def render_nft(plan: Plan) -> Iterator[tuple[Site, tuple[str, ...]]]:
    """For each site the complete nft script of prepare, static part included."""
    for site in plan.move.ordered_sites():
        lines: list[str] = []
        for step in plan.prepare:
            if step.site != site:
                continue
            if isinstance(step, InstallGate):
                lines += _static_lines(step, plan.move.mode)
            elif isinstance(step, Loads) and _why_more(step):
                lines += _static_lines(step)
            elif isinstance(step, HoldListeners) and not lines:
                lines += map(str, (*base_table(), *dispatch_table("mute")))
            if isinstance(
                step,
                InstallGate
                | FillSet
                | InstallTranslation
                | InstallReception
                | HoldListeners
                | InstallResets
                | PassKept,
            ):
                lines += step.lines()
        yield site, tuple(lines)


def describe_count(move: Move, translations: Iterable[Translation]) -> str:
    """How much a site's *translations* keep, as `20 connections (12 udp), 1 udp server`."""
    found = Counter[str]()
    for translation in translations:
        found[translation.protocol.name] += len(translation.kept)
    count, udp, servers = found.total(), found["udp"], len(move.kept_servers)
    of_udp = f" ({udp} udp)" if udp else ""
    also = f", {servers} udp server{'s' * (servers != 1)}" if servers else ""
    return f"{count} connection{'s' * (count != 1)}{of_udp}{also}"
