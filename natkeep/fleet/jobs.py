"""What an agent does to the moves of its node: of many at once, since thousands may be ordered.

Agent decides move by move, and hands over what is to be done of each as a job; jobs that came
together are carried out together, and each move hears how its own ended.

Rule: a job that fails, or is refused, is that of one move alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

from natkeep import policy
from natkeep.checkpoint import Checkpoint
from natkeep.errors import NatkeepError, RefusedError
from natkeep.fleet.done import Done
from natkeep.fleet.want import Want
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.many import Wanted, open_many, prepare_many
from natkeep.lifecycle.many_undo import MOST, Failed, teardown_many
from natkeep.plan.move import Move
from natkeep.values import dataclass

TOGETHER = 100  # keys of one transaction; etcd takes 128


@dataclass(frozen=True, slots=True)
class Prepare:
    """again: it was there before the last boot."""

    move: Move
    want: Want
    checkpoint: Checkpoint
    again: bool


@dataclass(frozen=True, slots=True)
class Open:
    """What was prepared to be open, by an agent that was killed before it did."""

    move_id: str


@dataclass(frozen=True, slots=True)
class Teardown:
    """drops: as an Executor has it."""

    move_id: str
    drops: int


Job = Prepare | Open | Teardown | Done
"""Done: it is to be told."""
Work = Generator[Job, None, None]
"""The jobs of a move, one after the other; it is thrown what was wrong with the last."""


Tell = Callable[[Mapping[str, Done]], None]


def work_off(
    works: Mapping[str, Work], executor: Executor, bounds: policy.Agent, tell: Tell
) -> Failed:
    """Carry out all jobs of moves, by their ids; what each of them raised."""
    failed: Failed = {}
    ids = [*works]
    for start in range(0, len(ids), MOST):
        wrong: Failed = {}
        left = ids[start : start + MOST]
        while left:
            jobs: dict[str, Job] = {}
            for move_id in left:
                _advance(works[move_id], move_id, wrong.get(move_id), jobs, failed)
            wrong = _change(jobs, executor, bounds) | _tell(jobs, tell)
            left = [*jobs]
    return failed


def _advance(
    work: Work, move_id: str, wrong: Exception | None, jobs: dict[str, Job], failed: Failed
) -> None:
    """Take the next job of a move, if there is one."""
    try:
        jobs[move_id] = next(work) if wrong is None else work.throw(wrong)
    except StopIteration:
        pass
    except Exception as error:
        failed[move_id] = error


def _change(jobs: Mapping[str, Job], executor: Executor, bounds: policy.Agent) -> Failed:
    """Do what is to be done at the sites."""
    wanted = {move_id: job for move_id, job in jobs.items() if isinstance(job, Prepare)}
    failed, allowed = _refuse(wanted, executor, bounds)
    failed |= prepare_many(executor, allowed)
    executor.warned.clear()
    wrong = open_many(executor, [job.move_id for job in jobs.values() if isinstance(job, Open)])
    undone = [job for job in jobs.values() if isinstance(job, Teardown)]
    for executor.drops in {job.drops for job in undone}:
        alike = [job.move_id for job in undone if job.drops == executor.drops]
        wrong |= teardown_many(executor, alike)
    for move_id, job in jobs.items():
        if isinstance(job, Open | Teardown) and job.move_id in wrong:
            failed[move_id] = wrong[job.move_id]
    return failed


def _refuse(
    wanted: Mapping[str, Prepare], executor: Executor, bounds: policy.Agent
) -> tuple[Failed, list[Wanted]]:
    """What the operator's file does not allow, and what it does."""
    failed: Failed = {}
    allowed: list[Wanted] = []
    most = bounds.max_moves
    there = len(executor.state.ids()) if wanted and most is not None else 0
    for move_id, job in wanted.items():
        if most is not None and there + len(allowed) >= most:
            failed[move_id] = RefusedError(
                f"{bounds.node} has {most} moves already", hint="agent.max_moves"
            )
            continue
        connections = job.checkpoint.connections
        allowed.append(Wanted(job.move, connections, job.want.gate, job.want.image, job.again))
    return failed, allowed


def _tell(jobs: Mapping[str, Job], tell: Tell) -> Failed:
    """Tell the store, of many moves at a time."""
    failed: Failed = {}
    told = [(move_id, job) for move_id, job in jobs.items() if isinstance(job, Done)]
    for start in range(0, len(told), TOGETHER):
        some = dict(told[start : start + TOGETHER])
        try:
            tell(some)
        except NatkeepError as error:  # it is away, or refuses it
            failed |= dict.fromkeys(some, error)
    return failed
