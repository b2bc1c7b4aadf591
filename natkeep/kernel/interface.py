"""The interface to a machine: everything natkeep may do to it.

    kernel.open_sites(sites)                 each namespace is found once, and held by handle
      |
      |   kernel.ask(site, question, ...)    what stands there, at any time
      |   kernel.look_around(move, ...)      what make_plan has to know
      v
    kernel.check(step)                       of every step, before the first is done
      v
    kernel.apply(step, remember)             in the plan's order; apply_many: the same step of many
      |
      |   kernel.observe(site, plan)         what stands of it; snapshot(site) for many moves
      |   kernel.mend(patch, remember)       what is missing of it is there again
      |   kernel.unhook_gates()              where no gate is closed, packets pass them by
      v
    kernel.revert(site, undo, prior)         in the reverse order; then nothing is left. The step
      |                                      is not needed: its inverse is data; revert_many
      v
    kernel.close_sites(sites)

`clear_strays` is for what no journal knows. A step goes to the driver of its kind, an
undo to its inverse.

What changes a site has the lock of the state directory: two processes that change one at the same
time are not told apart here. `check` of a step may not count on the steps before it; `apply` may,
and on `check` having let it pass.

Laws, the same for `LinuxKernel` and `FakeKernel` (tests/kernel/test_contract.py holds them):

- `ask`, `observe` and `check` change nothing.
- `apply` calls `remember(prior)` once, before it changes anything, so that a journal can undo a
  step even if the process is killed in the middle of it. What it returns replaces that prior.
- A step that failed in `apply` has changed nothing at its site. Of many that failed some may have
  been done: all of them are to be undone.
- `revert` of a step that is already gone, or that was never applied, succeeds. It removes only
  what the prior says was not there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from natkeep.plan.identity import Identity
from natkeep.plan.move import Move, Site
from natkeep.plan.nft import Key
from natkeep.plan.observation import Observation
from natkeep.plan.step_undo import Undo
from natkeep.plan.steps import Plan, Prior, Step
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.kernel.netns import Namespace
    from natkeep.plan.repair import Patch

Remember = Callable[[Prior], None]
RememberMany = Callable[[Mapping[int, Prior]], None]
"""Of several steps at once, by their places in the list."""
S_contra = TypeVar("S_contra", contravariant=True)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step acts: a site, its open namespace, the state directory (empty: none)."""

    site: Site
    namespace: Namespace
    directory: str


class Driver(Protocol[S_contra]):
    """What one kind of step is to the kernel: check and apply, and beside them its Inverse.

    Drivers derive from this one. They are called in the step's namespace, unless *enters* is
    false: a process that is started must not keep a namespace alive by being in it.
    """

    enters: bool = True

    def check(self, at: Place, step: S_contra) -> None:
        """NatkeepError when *step* could not work; most steps have nothing to check."""
        return

    def apply(self, at: Place, step: S_contra, remember: Remember) -> Prior:
        """Do *step*; OSError or KernelError when the kernel says no."""

    def apply_many(
        self, at: Place, steps: Sequence[S_contra], remember: RememberMany
    ) -> list[Prior]:
        """Do *steps*, of many moves; in one go where the driver has a way to."""
        return [
            self.apply(at, step, lambda prior, place=place: remember({place: prior}))  # type: ignore[misc]
            for place, step in enumerate(steps)
        ]

    def revert_many(self, at: Place, undos: Sequence[tuple[Any, Prior]]) -> None:
        """As Inverse has it, of a driver that is the inverse, too."""
        for undo, prior in undos:
            self.revert(at, undo, prior)  # type: ignore[attr-defined]


U_contra = TypeVar("U_contra", bound=Undo, contravariant=True)


class Inverse(Protocol[U_contra]):
    """What one kind of undo is to the kernel; a driver that makes something is its inverse, too."""

    enters: bool = True

    def revert(self, at: Place, undo: U_contra, prior: Prior) -> None:
        """Take back what was made; done as well where it never was. prior.present is false."""

    def revert_many(self, at: Place, undos: Sequence[tuple[U_contra, Prior]]) -> None:
        """The same of many moves; in one go where the inverse has a way to."""
        for undo, prior in undos:
            self.revert(at, undo, prior)


@dataclass(frozen=True, slots=True)
class Packed:
    """A transaction for the netlink socket of nf_tables, and the number of its last message.

    unhooking: another, of two messages, that takes the base chain of the gates away if nothing was
    changed in between (kernel/nftables.py); empty where a gate stays closed.
    """

    messages: bytes
    last: int
    unhooking: bytes = b""


class Snapshot(Protocol):
    """What a namespace shows, each part read once, for one move or for many that have it as a site.

    What it shows was there when it was read, which is while the snapshot is in use. Something that
    was just being changed may not show: what a shared one shows as missing is to be looked at again
    by one of its own before that is said.
    """

    def observe(self, site: Site, plan: Plan) -> Observation:
        """As Kernel.observe, at a site that is the namespace."""

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """As Kernel.find_lost_routes."""

    def close(self) -> None:
        """Let go of the namespace."""


class Kernel(Protocol):
    """Everything natkeep may do to a machine; see the top of this file."""

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        """Find the namespaces; with *known*, those very ones, or UsageError."""

    def close_sites(self, sites: Iterable[Site]) -> None:
        """Let go of the namespaces of *sites*; those that are not open are passed over."""

    def identity(self, site: Site) -> Identity:
        """Device and inode of an opened site's namespace."""

    def staying(self, sites: Iterable[Site]) -> AbstractContextManager[None]:
        """In the block it is quicker to ask and to change these opened sites, if they are one."""
        ...

    def ask(self, site: Site, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What *question*, a function of kernel/ that only reads, answers about an opened site.

        So are asked rtnetlink.global_addresses and device_names, survey.gather_facts,
        sock_diag.find_listeners, list_sockets and count_waiting, nft_strays.read_table, and what
        nftables.pack_open and pack_gate_hook_removal make of what stands there.
        """
        ...

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What make_plan has to know of the opened sites of *move*."""

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""

    def apply_many(self, steps: Sequence[Step], remember: RememberMany) -> list[Prior]:
        """Do steps of one kind at one site, each of another move; KernelError as for `apply`."""
        ...

    def mend(self, patch: Patch, remember: Remember) -> None:
        """Do what a repair found missing, `remember` as for `apply`; KernelError when refused."""

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""

    def find_missing(self, site: Site, plan: Plan) -> frozenset[Key]:
        """The objects of *plan* that an opened site's tables lack; however many connections."""
        ...

    def clear_strays(self, site: Site, known: frozenset[str], olds: frozenset[Address], *,
                     sure: bool) -> None:  # fmt: skip
        """Take away there what no *known* move owns (see plan/strays.py); or KernelError."""

    def unhook_gates(self) -> bool:
        """At each opened site where no gate is closed take them out of all packets' way.

        False where a gateway waits for a destination to speak, so that it should be done again.
        """
        ...

    def revert(self, site: Site, undo: Undo, prior: Prior) -> None:
        """Undo a step at an opened site, by its inverse; KernelError when the kernel says no."""

    def revert_many(self, site: Site, undos: Sequence[tuple[Undo, Prior]]) -> None:
        """Undo steps of one kind at one site, each of another move; again is fine."""

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now: a snapshot that is used once."""

    def snapshot(self, site: Site) -> Snapshot:
        """What an opened site's namespace shows, for one move or many; it outlives close_sites."""
