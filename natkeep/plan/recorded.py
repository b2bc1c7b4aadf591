"""The plan of a journal that another natkeep wrote: its steps in its order, by its names.

A journal says of each step its kind, and once it was begun its site, what undoes it and what it
loaded (but for the first natkeeps'). Where that is what this natkeep would do, the plan is made as
ever. Where it differs (a chain has another name since, a rule came, steps have another order), each
step is that of this natkeep which does the same, with the objects that were loaded then. So what is
missed, put back, opened and undone is what was done, and nothing that came since is asked for.

Rule: values only. A step that no natkeep of today takes is Unknown, and never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.plan.move import Site
from natkeep.plan.steps import (
    FillSet,
    Loads,
    OpenGate,
    Plan,
    Recorded,
    SendResets,
    Step,
    Unknown,
)
from natkeep.plan.tuples import Address
from natkeep.values import dataclass, replace


@dataclass(frozen=True, slots=True)
class Written:
    """What a journal says of a step; site and all below it: None where it does not say.

    fills: the sets that it filled. address: that it added.
    """

    kind: str
    site: Site | None = None
    recorded: Recorded | None = None
    fills: tuple[str, ...] | None = None
    address: Address | None = None


def follow(plan: Plan, steps: Iterable[Written]) -> Plan:
    """*plan*, which this natkeep has made, as the journal has it."""
    left, opening = list(plan.steps), {id(step) for step in plan.open}
    found: list[Step] = []
    opens = 0
    for written in steps:
        alike = [step for step in left if _is_done_by(step, written)]
        if not alike:
            found.append(Unknown(written.site or plan.move.sites[0], written.kind))
            opens = 0
            continue
        step = next((one for one in alike if _fills(one) == written.fills), alike[0])
        left = [one for one in left if one is not step]
        opens = opens + 1 if id(step) in opening else 0
        found.append(_as_written(step, written))
    middle = len(found) - opens
    later = tuple(one for one in found[middle:] if isinstance(one, OpenGate | SendResets))
    return replace(plan, prepare=tuple(found[:middle]), open=later, written=True)


def _is_done_by(step: Step, written: Written) -> bool:
    if type(step).__name__ != written.kind or step.site != (written.site or step.site):
        return False
    return written.address is None or getattr(step, "address", None) == written.address


def _fills(step: Step) -> tuple[str, ...]:
    return tuple(one.name for one in step.fillings()) if isinstance(step, FillSet) else ()


def _as_written(step: Step, written: Written) -> Step:
    if isinstance(step, FillSet):
        names = written.fills or _fills(step)
        more = (one._replace(name=name) for one, name in zip(step.more, names[1:], strict=False))
        return replace(step, name=names[0], more=tuple(more))
    if not isinstance(step, Loads):
        return step
    return step if written.recorded is None else replace(step, recorded=written.recorded)
