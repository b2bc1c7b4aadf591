"""The agent of a node: compares what is ordered with what the journals say, and acts.

Whatever wakes it, it looks at the whole of a move again, so one that was killed knows as much as
one that was not. Three things alone are remembered: which order was followed (followed.py, on
disk), what was told, and what other nodes say.

Rule: see natkeep/fleet/__init__.py for what undoes a move. A gateway opens only while the
destination is what it was seen to be, and a destination is undone by its deadline only while no
gateway has begun to open: each is written in one transaction with a look at the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from typing import NoReturn

from natkeep import policy
from natkeep.errors import LeftoverError, NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import keys, pod_orders, restored, site
from natkeep.fleet.done import Done, Error, describe_alive, parse_done
from natkeep.fleet.followed import (
    DeadlineError,
    Followed,
    FollowedFile,
    demand_ours,
    refuse_again,
    state_under,
)
from natkeep.fleet.jobs import TOGETHER, Job, Open, Prepare, Teardown, Work, work_off
from natkeep.fleet.known import Known, Order
from natkeep.fleet.listing import fetch
from natkeep.fleet.nodes import find_sending
from natkeep.fleet.observed import Observed
from natkeep.fleet.retries import Retries
from natkeep.fleet.site import Seen, Standing
from natkeep.fleet.store import Item, Store
from natkeep.fleet.wake import Heard, Wake
from natkeep.fleet.want import Phase, Want, is_known
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.many_undo import Failed
from natkeep.lifecycle.open import remove_gate_hooks
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.undone import SECONDS
from natkeep.values import replace

_TICK = 0.25  # s
_HOOKS = 40  # times that it is looked whether a gate's hooks can go (lifecycle/open.py)


_Waits = Generator[Job, None, dict[str, Phase]]
"""What is to be done of a move, and in the end what it waits for."""


class Agent:
    """See above. follow: asked to have changes below a prefix of the store heard, too."""

    def __init__(
        self, bounds: policy.Agent, store: Store, make_executor: Callable[[], Executor],
        follow: Callable[[Agent, str], object], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.bounds, self.node, self.store = bounds, bounds.node, store
        self._make_executor, self._follow, self._say = make_executor, follow, say
        self.followed = FollowedFile(make_executor().state.path)
        self.known = Known(self.node, bounds.groups)
        self._retries = Retries()
        self._hooked: dict[str, tuple[str, int]] = {}  # by namespace: the move that was opened last
        self._away = False

    def run(self, wake: Wake) -> NoReturn:
        """Go on until a signal ends it."""
        for prefix in self.known.prefixes:
            wake.follow(prefix)
        rest = time.monotonic() + 1
        while True:
            ids = self._retries.overdue()
            for heard in wake.wait(_TICK):
                if isinstance(heard, NatkeepError):
                    self._note_away(heard)
                elif isinstance(heard, dict):
                    self.note_observed(heard)
                else:
                    ids |= self.known.about(heard) if isinstance(heard, set) else self.hear(heard)
            self.reconcile(ids)
            if time.monotonic() > rest:
                began = time.monotonic()
                self.remove_hooks()
                rest = time.monotonic() + max(1, 10 * (time.monotonic() - began))  # of thousands

    def hear(self, heard: Heard) -> set[str]:
        """Take what a follower has heard; the ids of the moves to be looked at."""
        if self._away:
            self._away = False
            self._say("the store is back")
        first = not self.known.is_whole()
        ids = self.known.take(heard)
        for move_id in ids:
            self._retries.succeed(move_id)
        return ids | {*self.followed.known} if first and self.known.is_whole() else ids

    def reconcile(self, ids: Iterable[str]) -> Failed:
        """Look at each of these moves, and do what is to be done; why some could not be told of."""
        executor, works = self._make_executor(), dict[str, Work]()
        for move_id in sorted(ids):
            self._retries.begin(move_id)
            works[move_id] = self._reconcile(executor, move_id)
        failed = work_off(works, executor, self.bounds, self._write)
        for move_id, error in failed.items():
            if isinstance(error, UnreachableError):
                self._retries.after(move_id)
                self._note_away(error)
            else:  # the state directory, or the store refuses it; the other moves go on
                self._retries.fail(move_id)
                self._say(f"{move_id}: {Error.of(error).message}")
        return failed

    def describe_alive(self) -> str:
        """What is in the store while it lives, but for its pid and version."""
        return describe_alive(self.bounds, [*self.known.told.values()])  # by another thread

    def note_observed(self, seen: Mapping[str, Observed]) -> None:
        """Say what was seen of moves, by their ids here, where it is another than was said."""
        with suppress(NatkeepError):  # the next look says it
            changed = [*self.known.compare(seen).items()]
            for start in range(0, len(changed), TOGETHER):
                self._write(dict(changed[start : start + TOGETHER]))

    def remove_hooks(self) -> None:
        """What only makes packets quicker, once the blackout is over."""
        for netns, (move_id, times) in [*self._hooked.items()]:
            self._hooked[netns] = (move_id, times - 1)
            if times == _HOOKS:
                continue  # the blackout is hardly over
            if remove_gate_hooks(self._make_executor(), move_id) or times == 1:
                del self._hooked[netns]

    def close(self) -> None:
        """Let go of what another agent of this node would need."""
        self.followed.close()

    def _reconcile(self, executor: Executor, move_id: str) -> Work:
        followed, order = self.followed.known.get(move_id), self._find_order(move_id)
        want, told = order if isinstance(order, Want) else None, self.known.told.get(move_id)
        here = restored.find_id(executor.state, move_id, want, told)
        generation = order.generation if isinstance(order, Want) else 0
        if order is None and not self.known.is_whole():
            return
        if order is None and followed is None:
            return self._forget(move_id)
        error, waits = None, dict[str, Phase]()
        try:
            if order is None:
                if followed and site.look(executor.state, here).standing == Standing.GONE:
                    return self._forget(move_id)
                error = Error(0, "no-order", "its order is no longer there; nothing is undone")
            elif isinstance(order, NatkeepError):
                raise order.with_traceback(None)  # each time: it would hold all frames
            elif followed and generation < followed.generation:
                raise RefusedError(
                    f"order {generation} is older than {followed.generation}, which was followed",
                    hint=f"natkeep fleet apply, or end {move_id}, makes a newer one",
                )
            elif order.wanted and order.by_restore():
                self._let_restore(executor, move_id, here, order, followed)
            elif order.wanted:
                waits = yield from self._make_ready(executor, move_id, order, followed)
            else:
                waits = yield from self._undo(executor, move_id, here, order, followed)
        except UnreachableError:
            raise
        except Exception as failed:
            self._retries.fail(move_id)
            error = Error.of(failed)
        if error is None:
            self._retries.succeed(move_id)
        try:
            seen = site.look(executor.state, here)
            phase, maps = seen.standing.phase(), tuple(map(str, seen.maps))
        except NatkeepError as unread:  # it is not gone, and nothing may build upon it
            phase, maps, error = Phase.OPENING, (), error or Error.of(unread)
        generation = max(generation, followed.generation if followed else 0)
        hooked = here if here != move_id else ""
        yield from self._tell(move_id, Done(phase, generation, error, waits, maps, hooked))

    def _find_order(self, move_id: str) -> Order | None:
        """What is ordered, with NEW as the destination says it where its restore finds it."""
        order = self.known.find_order(move_id)
        if isinstance(order, Want) and not order.by_restore() and not is_known(order.maps):
            for node in order.after:
                heard = self._hear_of(node, move_id)
                order = restored.with_new(order, parse_done(heard and heard.value))
        return order

    def _let_restore(
        self, executor: Executor, move_id: str, here: str, want: Want, followed: Followed | None
    ) -> None:
        """Have its restore prepare it, by a pod's order perhaps, until it was open once."""
        standing = site.look(executor.state, here).standing
        if followed is None or standing == Standing.GONE:
            site.refuse_out_of_bounds(want, self.bounds)
        if standing == Standing.OPEN or state_under(followed, want) == "opened":
            pod_orders.take_away(executor, move_id, want)
            self._note(move_id, want, "opened")
        else:
            pod_orders.put(self.store, executor, move_id, want)
            self._note(move_id, want, "prepared")

    def _make_ready(
        self, executor: Executor, move_id: str, want: Want, followed: Followed | None
    ) -> _Waits:
        """Have it prepared, as ordered; and what it waits for."""
        seen = site.look_calmly(executor.state, move_id)
        if seen.standing in (Standing.STALE, Standing.HALF):
            followed = demand_ours(self.node, move_id, followed)
            ended = state_under(followed, want)
            if seen.standing == Standing.HALF and (seen.touched or ended == "prepared"):
                raise LeftoverError(
                    f"{move_id} is half undone by another hand", hint=f"natkeep teardown {move_id}"
                )
            if ended != "expired":
                self._note(move_id, want, "begun")
                followed = self.followed.known[move_id]
            self._say(f"{move_id}: what an earlier start left is cleared")
            yield Teardown(move_id, SECONDS)
            seen = Seen(Standing.GONE)
        if seen.standing == Standing.GONE:
            refuse_again(move_id, want, followed, self.known.told.get(move_id))
            return (yield from self._prepare(executor, move_id, want))
        if not is_known(want.maps):  # the destination does not say it just now: nothing is undone
            return self._find_waits(move_id, want)
        if demand_ours(self.node, move_id, followed).digest != want.digest():
            return (yield from self._prepare_anew(executor, move_id, want, seen))
        self._note(move_id, want, "prepared")
        if seen.standing == Standing.PREPARED and want.gate == Gate.OPEN and not seen.closed:
            return (yield from self._open(move_id, want))
        # Where a process was, silence is safe.
        if not seen.touched and want.role != Role.SOURCE and want.deadline:
            self._heed_deadline(executor, move_id, want, seen)
        return {}

    def _prepare(self, executor: Executor, move_id: str, want: Want) -> _Waits:
        site.refuse_out_of_bounds(want, self.bounds)
        if waits := self._find_waits(move_id, want):
            return waits
        checkpoint = fetch(self.store, move_id, want)
        move = site.make_move(move_id, want, checkpoint)
        told = self.known.told.get(move_id)
        again = told is not None and told.was_ready()  # and since, it has booted
        if not self._claim(move_id, want, again=again):
            return self._find_waits(move_id, want)
        self._note(move_id, want, "begun")
        yield Prepare(move, want, checkpoint, again)
        self._note(move_id, want, "prepared")
        self._say(f"{move_id}: prepared as {want.role}, gate {want.gate}")
        if want.gate == Gate.OPEN:
            self._hooked[want.netns] = (move_id, _HOOKS)
        elif want.deadline:
            self._retries.after(move_id, want.deadline)
        return {}

    def _open(self, move_id: str, want: Want) -> _Waits:
        """What had been prepared to be open, when the agent was killed."""
        waits = self._find_waits(move_id, want)
        if not waits and self._claim(move_id, want):
            yield Open(move_id)
            self._hooked[want.netns] = (move_id, _HOOKS)
        return waits

    def _claim(self, move_id: str, want: Want, *, again: bool = False) -> bool:
        """Say that it opens, if those that it waits for are still what they were."""
        if want.gate != Gate.OPEN or not want.after:
            return True
        others = {node: self.known.other(node, move_id) for node in want.after}
        seen = {keys.done(node, move_id): i.revision for node, i in others.items() if i}
        return self._say_if(move_id, Done(Phase.OPENING, want.generation, lost=again), seen)

    def _say_if(self, move_id: str, told: Done, others: Mapping[str, int]) -> bool:
        """Say this, if what others said is what it was; else it is looked at again."""
        if self.store.txn({keys.done(self.node, move_id): told.write(time.time())}, others):
            self.known.told[move_id] = told
            return True
        self._retries.after(move_id)
        return False

    def _heed_deadline(self, executor: Executor, move_id: str, want: Want, seen: Seen) -> None:
        """Undo it where its gate has been closed for too long, and nothing is sent to it."""
        if (left := seen.left(want.deadline)) > 0:
            self._retries.after(move_id, left)
            return
        late = f"its gate was not opened within {want.deadline} s"
        end = f"natkeep fleet end {move_id}"
        sending, others = find_sending(self.store, move_id, want)
        if sending:
            who = " and ".join(sending)
            raise RefusedError(f"{late}; not undone, since peers are sent here by {who}", hint=end)
        error = DeadlineError(f"{late}: undone", hint="natkeep fleet apply orders it anew")
        if not self._say_if(move_id, Done(Phase.GONE, want.generation, Error.of(error)), others):
            return
        self._note(move_id, want, "expired")
        if site.clear(executor, move_id, want):
            self._say(f"{move_id}: {error}")
            raise error
        self._note(move_id, want, "prepared")  # it was opened at that moment

    def _prepare_anew(self, executor: Executor, move_id: str, want: Want, seen: Seen) -> _Waits:
        """What a later order has otherwise: the connections since the freeze, say."""
        if self._is_restored_anew(move_id, want):
            yield Teardown(move_id, SECONDS)
            return (yield from self._prepare(executor, move_id, want))
        sending, others = find_sending(self.store, move_id, want)
        # Where the process was peers would be reset in between.
        stays = bool(sending) or seen.standing != Standing.PREPARED or want.role == Role.SOURCE
        if not stays and not self._say_if(move_id, Done(Phase.OPENING, want.generation), others):
            return {}
        if stays or not site.clear(executor, move_id, want):
            raise RefusedError(
                f"{move_id} is {seen.standing.value} as an earlier order had it",
                hint=f"natkeep fleet end {move_id} first",
            )
        return (yield from self._prepare(executor, move_id, want))

    def _is_restored_anew(self, move_id: str, want: Want) -> bool:
        """Whether NEW is another one since a restore that failed, and nothing was opened there."""
        order = self.known.find_order(move_id)
        if not isinstance(order, Want) or is_known(order.maps):
            return False
        told = (self._hear_of(node, move_id) for node in want.after)
        return all(item and parse_done(item.value).phase == Phase.PREPARED for item in told)

    def _undo(
        self, executor: Executor, move_id: str, here: str, want: Want, followed: Followed | None
    ) -> _Waits:
        """Undo it by order; and what it waits for. here: its id at this node."""
        pod_orders.take_away(executor, move_id, want)
        standing = site.look(executor.state, here).standing
        if standing != Standing.GONE:
            if not want.by_restore():
                demand_ours(self.node, move_id, followed)
            elif followed is None:
                site.refuse_out_of_bounds(want, self.bounds)
            if waits := self._find_waits(move_id, want):
                return waits
            if standing == Standing.STALE:
                yield Teardown(here, SECONDS)
            else:
                yield site.undo(executor, here, want)
            self._say(f"{move_id}: undone")
        self._note(move_id, want, "gone")
        return {}

    def _note_away(self, error: NatkeepError) -> None:
        if not self._away:
            self._away = True
            self._say(f"the store is away, nothing is undone: {error}")

    # ---- what it needs for that ------------------------------------------------------------------

    def _find_waits(self, move_id: str, want: Want) -> dict[str, Phase]:
        waits = {}
        for node, phase in want.after.items():
            heard = self._hear_of(node, move_id)
            if heard is None or not parse_done(heard.value).reaches(phase, want.generation):
                waits[node] = phase
        return waits

    def _hear_of(self, node: str, move_id: str) -> Item | None:
        """What another node says of a move."""
        if self.known.other(node, move_id) is None:
            self._follow(self, keys.dones(node))
        return self.known.other(node, move_id)

    def _note(self, move_id: str, want: Want, state: str) -> None:
        self.followed.note(move_id, want.generation, state, want.digest())

    def _tell(self, move_id: str, done: Done) -> Work:
        before = self.known.told.get(move_id)
        if before is not None and before.phase == done.phase:
            done = replace(done, observed=before.observed)
        if before is not None and before.was_ready() and done.phase == Phase.GONE:
            followed = self.followed.known.get(move_id)
            done = replace(done, lost=followed is None or followed.state == "begun")  # not undone
        if done == before:
            return
        yield done
        if done.error is not None and (before is None or before.error != done.error):
            self._say(f"{move_id}: {done.error.message}")

    def _write(self, said: Mapping[str, Done]) -> None:
        now = time.time()
        self.store.txn({keys.done(self.node, each): done.write(now) for each, done in said.items()})
        self.known.told |= said

    def _forget(self, move_id: str) -> None:
        """Nothing is ordered and nothing is there, so nothing is to be said of it."""
        if move_id in self.known.told:
            self.store.txn({keys.done(self.node, move_id): None})
            del self.known.told[move_id]
