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
from typing import TYPE_CHECKING, Protocol

from natkeep.plan.drift import Observation
from natkeep.plan.move import Move, Site, Surroundings
from natkeep.plan.steps import Identity, OpenGate, Plan, Prior, Step
from natkeep.plan.tuples import Address, Connections, Endpoint
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.kernel.sockets import Shown
    from natkeep.plan.findings import Facts
    from natkeep.plan.mending import Patch
    from natkeep.plan.strays import SeenTable

Remember = Callable[[Prior], None]


@dataclass(frozen=True, slots=True)
class Packed:
    """A transaction for the netlink socket of nf_tables, and the number of its last message."""

    messages: bytes
    last: int


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

    def find_lost_ways(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the ways that InstallTranslation *noted* (`ways`) which are there no more."""

    def find_strays(self, site: Site) -> SeenTable:
        """What stands in the tables natkeep of an opened site, whosever it is."""

    def clear_strays(self, site: Site, known: frozenset[str], olds: frozenset[Address], *,
                     sure: bool) -> None:  # fmt: skip
        """Take away there what no *known* move owns (see plan/strays.py); or KernelError."""

    def pack_open(self, step: OpenGate) -> Packed | None:
        """What `apply` would send for *step*, ready to be sent; None where that is unknown."""

    def revert(self, step: Step, prior: Prior) -> None:
        """Undo *step*; KernelError when the kernel says no."""

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
