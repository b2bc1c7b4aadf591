"""the verbs that put a move back, and those that clear what is left of one: repair and gc."""

from __future__ import annotations

import argparse

from natkeep.cli.arguments import make_lifecycle
from natkeep.cli.output import print_verb, talk
from natkeep.errors import NatkeepError, UsageError
from natkeep.lifecycle.repair import Repaired, Repairing


def repair(args: argparse.Namespace) -> int:
    if (args.id is None) != args.all:
        raise UsageError("repair which move? ID, or --all", hint="natkeep status lists them")
    made = make_lifecycle(args, create=False)
    repairing = Repairing(made.kernel, made.state, made.talk)
    if not args.all:
        repaired = repairing.repair(args.id)
        _tell(args, args.id, repaired)
        if args.json:
            print_verb(args.id, repaired=[*map(_to_json, repaired)])
        return 0
    moves, first = [], None
    for move_id in made.state.ids():
        try:
            repaired = repairing.repair(move_id)
        except NatkeepError as error:
            # One move that cannot be repaired must not keep the others as they are.
            first = first or error
            talk(args, f"natkeep: {move_id}: {error}")
            continue
        _tell(args, move_id, repaired)
        moves.append({"id": move_id, "repaired": [*map(_to_json, repaired)]})
    if args.json:
        from natkeep import report

        report.print_json({"schema": 1, "moves": moves})
    if first is not None:
        raise first
    return 0


def _tell(args: argparse.Namespace, move_id: str, repaired: tuple[Repaired, ...]) -> None:
    if args.json:
        return
    if not repaired:
        talk(args, f"natkeep: {move_id}: nothing to repair")
    for one in repaired:
        for line in one.drift:
            talk(args, f"natkeep: {move_id}: {one.site}: put back: {line}")


def _to_json(repaired: Repaired) -> dict[str, object]:
    site = repaired.site
    return {"role": str(site.role), "netns": site.netns, "drift": [*repaired.drift]}


def gc(args: argparse.Namespace) -> int:
    from natkeep.cli.arguments import parse_sites
    from natkeep.criu.environment import is_abandoned
    from natkeep.lifecycle.gc import Collecting, demand_nothing_left

    made = make_lifecycle(args, create=False)
    collecting = Collecting(made.kernel, made.state, made.talk)
    collected = collecting.gc(parse_sites(args.site), is_abandoned, dry_run=args.dry_run)
    if args.json:
        from natkeep import report

        rows = [{"kind": c.kind, "name": c.name, "reason": c.reason} for c in collected.cleared]
        left = [str(error) for error in collected.left]
        report.print_json({"schema": 1, "cleared": rows, "left": left})
    else:
        verb = "would clear" if args.dry_run else "cleared"
        for one in collected.cleared:
            talk(args, f"natkeep: {verb} {one.kind} {one.name}: {one.reason}")
        if not collected.cleared:
            talk(args, "natkeep: nothing to clear")
    for error in collected.left[1:]:
        talk(args, f"natkeep: {error}" + (f"\n  ({error.hint})" if error.hint else ""))
    demand_nothing_left(collected)
    return 0
