"""The subject of `check` with a --map: the plan that prepare would carry out, or why it would not.

Rule: what prepare refuses is a finding here, and the rest is looked at all the same.
"""

from __future__ import annotations

from natkeep.checkpoint import Checkpoint
from natkeep.errors import RefusedError
from natkeep.lifecycle.check import check, require_devices
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, ok
from natkeep.plan.kept_connections import find_unkept_servers
from natkeep.plan.move import Move
from natkeep.plan.plan_text import describe_count
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan


def make_subject(
    executor: Executor, move: Move, checkpoint: Checkpoint, image: str, pid: int | None
) -> tuple[Subject, list[Finding]]:
    """What is to be looked at of *move*; and whether prepare would take it, but for the looks.

    image: the directory that *checkpoint* was read from, or empty; pid: the process, or None.
    """
    plan: Plan | None = None
    executor.open_sites(move)
    try:
        plan = check(executor, move, checkpoint.connections, looks=False)
        require_devices(executor, move, checkpoint)
        unkept = len(plan.unkept) + len(find_unkept_servers(move))
        lost = f", {unkept} cannot be" if unkept else ""
        here = (one for one in plan.translations if one.site == move.sites[0])
        found = ok(None, f"{describe_count(move, here)} can be kept{lost}")
    except RefusedError as error:
        found = Finding("refused", None, str(error), error.hint or "")
    if plan is None:
        try:
            plan = make_plan(move, checkpoint.connections)
        except RefusedError:
            plan = None
    state = executor.state
    return Subject(
        executor.kernel, move.sites, plan, checkpoint, image, pid, state, checkpoint.run_id
    ), [found]
