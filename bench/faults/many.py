"""the verb `many` of the stories: prepare or teardown of several moves at once at one gateway.

    many m0 prepare GATEWAY LIST       a move of each connection in LIST, all of one OLD and NEW
    many m0 teardown GATEWAY LIST

natkeep has no such verb; its agent does this (natkeep/lifecycle/many.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from natkeep.checkpoint.listing import parse_listing
from natkeep.errors import NatkeepError
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.many import Wanted, prepare_many
from natkeep.lifecycle.many_undo import teardown_many
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import parse_address
from natkeep.state.directory import StateDirectory


def main(words: Sequence[str], old: str, new: str) -> int:
    """The exit code of the worst that befell one of the moves; each is said."""
    _, _, what, gateway, listing = words
    state = StateDirectory(os.environ["NATKEEP_STATE_DIR"], create=True)
    executor = Executor(LinuxKernel(state.path), state)
    lines = Path(listing).read_text().splitlines()
    ids = [f"m{number}" for number, _ in enumerate(lines)]
    if what == "teardown":
        failed = teardown_many(executor, ids)
    else:
        map_ = Map(parse_address(old), parse_address(new))
        site = Site(Role.GATEWAY, gateway)
        failed = prepare_many(
            executor,
            [
                Wanted(
                    Move(move_id, (map_,), (site,), hold=False),
                    parse_listing(line, "list").connections,
                    Gate.OPEN,
                )
                for move_id, line in zip(ids, lines, strict=True)
            ],
        )
    for move_id, error in failed.items():
        print(f"{move_id}: {error}", file=sys.stderr)
    codes = (e.exit_code if isinstance(e, NatkeepError) else 1 for e in failed.values())
    return max(codes, default=0)
