"""How far a move is, as the status of its object has it.

phase sums it up for a person; programs wait for conditions:

    Ordered    the nodes have been told what the object says
    Accepted   and have said that they follow it: a pod whose nodeName was given may be made
    Prepared   the target pod is prepared, its gate closed: the checkpoint may be taken
    Ready      and the gateways are open: the restore may begin
    Open       the target pod is open: the move is made

Rule: what nodes say is told, never what was meant to be done (fleet/progress.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from natkeep.errors import (
    ImageError,
    NatkeepError,
    RefusedError,
    UnreachableError,
    UsageError,
)
from natkeep.fleet.done import Error
from natkeep.fleet.progress import Node, Progress, describe
from natkeep.fleet.want import Phase
from natkeep.plan.roles import Role

Status = dict[str, Any]


class WaitsError(NatkeepError):
    """Something that the object names is not there yet, so nothing is ordered."""


class Told(NamedTuple):
    """A condition: whether it holds (None: nobody knows), a word for programs, a line for us."""

    type: str
    holds: bool | None
    reason: str
    message: str


_REASONS = {
    WaitsError: "Waiting", UnreachableError: "Unreachable", UsageError: "Invalid",
    ImageError: "Invalid", RefusedError: "Refused",
}  # fmt: skip


def tell_error(error: NatkeepError) -> Told:
    """Why nothing is ordered."""
    reason = next((word for kind, word in _REASONS.items() if isinstance(error, kind)), "Failed")
    holds = None if isinstance(error, UnreachableError) else False
    return Told("Ordered", holds, reason, Error.of(error).message)


def make_status(
    before: Mapping[str, Any], ordered: Told, progress: Progress | None, generation: int | None
) -> Status:
    """The status of an object.

    before: the one that it has. progress: None where nothing is ordered, or the store is away: then
    what was known of the sites stays. generation: that of the object which was ordered, if one was.
    """
    status: Status = {key: before.get(key) for key in ("id", "old", "new", "connections", "sites")}
    status["observedGeneration"] = generation or before.get("observedGeneration")
    told = [ordered]
    if progress is not None:
        it = progress.order
        status |= {
            "id": it.id, "connections": it.listed.count,
            "old": [str(wish.old_end) for wish in it.maps],
            "new": [text.partition("=")[2] for text in _find_maps(progress)],
            "sites": [_describe_site(node) for node in progress.nodes],
        }  # fmt: skip
        told += _tell_progress(progress)
    status["phase"] = _sum_up(before, ordered, progress)
    status["conditions"] = _as_conditions(before.get("conditions") or (), told)
    return status


def _find_maps(progress: Progress) -> list[str]:
    """With NEW, where the destination has found it."""
    [said] = [node.done.maps for node in progress.nodes if node.place.role == Role.DESTINATION]
    return [*(said or map(str, progress.order.maps))]


def _describe_site(node: Node) -> dict[str, Any]:
    error = node.error()
    said = error and {"exit": error.exit, "code": error.code, "message": error.message}
    observed = node.done.observed
    return {
        "node": node.name, "role": str(node.place.role), "phase": str(node.done.phase),
        "heard": node.heard, "alive": node.alive, "error": said,
        "observed": observed and observed.to_json(),
    }  # fmt: skip


def _tell_progress(progress: Progress) -> list[Told]:
    order = progress.order
    if not order.is_wanted():
        ended = "it is undone, or to be"
        kinds = ("Accepted", "Prepared", "Ready", "Open")
        return [Told(kind, False, "Ended", ended) for kind in kinds]
    staged = order.phase == "staged"
    asked = [node for node in progress.nodes if not staged or node.place.role == Role.DESTINATION]
    accepted = _tell("Accepted", [node for node in asked if not node.heard or node.error()])
    lacking = progress.lacking("ready")
    ends = [node for node in lacking if node.place.role == Role.DESTINATION]
    ready = _tell("Ready", lacking)
    if staged:
        ready = Told("Ready", False, "NotFrozen", "the gateways follow when spec.frozen is true")
    opened = ready._replace(type="Open") if staged else _tell("Open", progress.lacking("open"))
    return [accepted, _tell("Prepared", ends), ready, opened]


def _tell(kind: str, lacking: list[Node]) -> Told:
    if not lacking:
        return Told(kind, True, kind, "")
    failed = any(node.error() for node in lacking)
    return Told(kind, False, "Failed" if failed else "Waiting", describe(lacking))


def _sum_up(before: Mapping[str, Any], ordered: Told, progress: Progress | None) -> str:
    if progress is None:
        return str((ordered.holds is None and before.get("phase")) or "Pending")
    order = progress.order
    if not order.is_wanted():
        return "Ended" if not progress.lacking("settled") else "Ending"
    if any(node.error() for node in progress.nodes):
        return "Failed"
    if order.phase == "staged":
        return "Ordered" if progress.lacking("staged") else "Prepared"
    if not progress.lacking("open"):
        return "Open"
    return "Ordered" if progress.lacking("ready") else "Ready"


def _as_conditions(before: Any, told: list[Told]) -> list[dict[str, Any]]:
    """Those that were told, and of the others what was said last, with the time of a change."""
    last = {condition["type"]: condition for condition in before}
    for kind, holds, reason, message in told:
        word = {True: "True", False: "False", None: "Unknown"}[holds]
        known = last.get(kind, {})
        since = known.get("lastTransitionTime") if known.get("status") == word else None
        last[kind] = {
            "type": kind, "status": word, "reason": reason, "message": message[:32768],
            "lastTransitionTime": since or f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        }  # fmt: skip
    return [*last.values()]


def is_opened(progress: Progress) -> bool:
    """Whether the target pod was opened; what it has then no order changes."""
    ends = (node for node in progress.nodes if node.place.role == Role.DESTINATION)
    return any(node.done.phase == Phase.OPEN for node in ends)
