"""the interface to a machine: everything natkeep may do to it, in four methods.

    kernel.open_sites(sites)            namespaces found once, held by handle
    for step in plan.steps:
        kernel.check(step)              could it work? nothing is changed
    for step in plan.steps:
        prior = kernel.apply(step, remember)
    ...
    for step in reversed(plan.steps):
        kernel.revert(step, prior)
    kernel.observe(site, plan)          what the site shows of the plan now

Laws, the same for `LinuxKernel` and `FakeKernel` (tests/kernel/test_contract.py holds them):

- `check` changes nothing.
- `apply` calls `remember(prior)` once, before it changes anything, so that whoever keeps a
  journal can undo a step even if the process is killed in the middle of it. What it returns
  replaces that prior.
- A step that failed in `apply` has changed nothing at its site.
- `revert` of a step that is already gone, or that was never applied, succeeds. It removes only
  what the prior says was not there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Observation
from natkeep.plan.steps import Identity, OpenGate, Plan, Prior, Step
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.kernel.netns import Namespace
    from natkeep.kernel.sock_diag import Shown
    from natkeep.plan.diagnostics import Facts
    from natkeep.plan.repair import Patch
    from natkeep.plan.strays import SeenTable

Remember = Callable[[Prior], None]
S_contra = TypeVar("S_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step acts: a site, its open namespace, the state directory (empty: none)."""

    site: Site
    namespace: Namespace
    directory: str


class Driver(Protocol[S_contra]):
    """What one kind of step is to the kernel: check, apply and revert, side by side in one file.

    Drivers derive from this one. They are called in the step's namespace, unless *enters* is
    false: a process that is started must not keep a namespace alive by being in it.
    """

    enters: bool = True

    def check(self, at: Place, step: S_contra) -> None:
        """NatkeepError when *step* could not work; most steps have nothing to check."""
        return

    def apply(self, at: Place, step: S_contra, remember: Remember) -> Prior:
        """Do *step*; OSError or KernelError when the kernel says no."""

    def revert(self, at: Place, step: S_contra, prior: Prior) -> None:
        """Undo *step*; done as well where it was never applied."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A transaction for the netlink socket of nf_tables, and the number of its last message.

    with_pass: another one, with one message more, that only works as long as nothing changes; it
    is tried first, if there is one. unhooking: what may follow that one once nobody waits, if
    nothing else was in between, of two messages (kernel/passing.py).
    """

    messages: bytes
    last: int
    with_pass: bytes = b""
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

    def addresses(self, site: Site, version: int) -> tuple[Address, ...]:
        """The addresses of IP *version* that others can reach an opened site at."""

    def survey(self, site: Site) -> Facts:
        """What findings are made of, at an opened site."""

    def devices(self, site: Site) -> frozenset[str]:
        """Names of the network devices at an opened site."""

    def find_listeners(self, site: Site, olds: frozenset[Address]) -> tuple[Endpoint, ...]:
        """Where somebody listens at one of *olds*, or at a wildcard address, at an opened site."""

    def list_sockets(self, site: Site) -> list[Shown]:
        """Every inet socket at an opened site that a descriptor can open."""

    def count_waiting(self, site: Site, listeners: tuple[Endpoint, ...]) -> dict[Endpoint, int]:
        """How many callers of each listener have not been accepted yet; none is left out."""

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What make_plan has to know of the opened sites of *move*."""

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""

    def mend(self, patch: Patch, remember: Remember) -> None:
        """Do what a repair found missing, `remember` as for `apply`; KernelError when refused."""

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""

    def find_strays(self, site: Site) -> SeenTable:
        """What stands in the tables natkeep of an opened site, whosever it is."""

    def clear_strays(self, site: Site, known: frozenset[str], olds: frozenset[Address], *,
                     sure: bool) -> None:  # fmt: skip
        """Take away there what no *known* move owns (see plan/strays.py); or KernelError."""

    def pack_open(self, step: OpenGate) -> Packed | None:
        """What `apply` would send for *step*, ready to be sent; None where that is unknown."""

    def pack_unhooking(self, site: Site) -> bytes:
        """What takes the gates of an opened site out of all packets' way, as things stand now.

        Of two messages, and refused once anything has changed; empty where a gate is closed.
        """

    def unhook_gates(self) -> None:
        """At each opened site where no gate is closed take them out of all packets' way."""

    def revert(self, step: Step, prior: Prior) -> None:
        """Undo *step*; KernelError when the kernel says no."""

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now: a snapshot that is used once."""

    def snapshot(self, site: Site) -> Snapshot:
        """What an opened site's namespace shows, for one move or many; it outlives close_sites."""
