"""the drivers of the steps that load nft objects: check, apply and revert side by side.

Rule: what a step adds is in plan/, how it gets into the kernel and out again in nftables.py; here
is only what a kind of step needs beside that.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, TypeVar

from natkeep import faultpoints
from natkeep.errors import RefusedError
from natkeep.kernel import (
    conntrack_listeners,
    lost_routes,
    nftables,
    segment_holder,
    undone_table,
)
from natkeep.kernel.conntrack_purge import delete_untracked
from natkeep.kernel.interface import Driver, Inverse, Place, Remember
from natkeep.plan.base_chains import gate_chain
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import CloseGates, RemoveGate, RemoveListeners, Unload
from natkeep.plan.steps import (
    FillSet,
    HoldListeners,
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    Loads,
    OpenGate,
    PassKept,
    Prior,
    SendResets,
    TranslateErrors,
)
from natkeep.plan.tuples import Connections

L = TypeVar("L", bound=Loads)


class LoadDriver(Driver[L]):
    """Objects are loaded; nothing else."""

    def apply(self, at: Place, step: L, remember: Remember) -> Prior:
        """Load what the step adds, behind what all moves share."""
        prior = self.find_prior(step)
        remember(prior)
        nftables.load_step(step, step.objects())
        return prior

    def find_prior(self, step: L) -> Prior:
        """What is to be remembered of the site as it is before."""
        return Prior()


class UnloadInverse(Inverse[Unload]):
    """Objects are unloaded."""

    def revert(self, at: Place, undo: Unload, prior: Prior) -> None:
        """What is gone already is fine."""
        nftables.unload(undo.objects)
        if undo.part:
            faultpoints.reach("withdrawn", undo.part)


class GateDriver(LoadDriver[InstallGate]):
    """The gate, closed."""

    def check(self, at: Place, step: InstallGate) -> None:
        """No other move of this id may be there."""
        if nftables.chain_state(gate_chain(step.move_id)) != Gate.ABSENT:
            raise RefusedError(
                f"{step.site}: move {step.move_id} is prepared there already",
                hint=f"natkeep teardown {step.move_id}, or another id",
            )

    def find_prior(self, step: InstallGate) -> Prior:
        """Whether the gate hook, which comes with it, was taken away since all gates were open."""
        return Prior(facts={"unhooked": True}) if nftables.missing_gate_hook() else Prior()

    def revert(self, at: Place, undo: RemoveGate, prior: Prior) -> None:
        """The gate and its sets go; the gate hook too, if it was not there before."""
        nftables.unload(undo.objects)
        faultpoints.reach("withdrawn", "gate")
        if prior.facts.get("unhooked"):
            nftables.remove_gate_hook()
        nftables.remove_early_hooks()  # which came with it, unless others' peers are not heard
        undone_table.remove()
        delete_untracked(undo.olds)


class FillDriver(Driver[FillSet]):
    """A set is filled; it goes with its gate."""

    def apply(self, at: Place, step: FillSet, remember: Remember) -> Prior:
        """All connections in one transaction."""
        remember(Prior())
        nftables.fill_sets(step.fillings())
        return Prior()


class TranslationDriver(LoadDriver[InstallTranslation]):
    """The rules that translate."""

    def check(self, at: Place, step: InstallTranslation) -> None:
        """At the destination NEW must be there, and no socket may have a kept tuple at NEW."""
        if step.site.role == Role.DESTINATION:
            lost_routes.check_destination(step)

    def apply(self, at: Place, step: InstallTranslation, remember: Remember) -> Prior:
        """Load it; the gate stands by now, and drops what was dropped since an earlier undo."""
        prior = super().apply(at, step, remember)
        if step.site.row.puts_old:
            undone_table.remove(Connections.joined(t.outer for t in step.translations))
        return prior

    def find_prior(self, step: InstallTranslation) -> Prior:
        """The routes and the address that the translation stands on, for a repair."""
        news = [t.map.new for t in step.translations]
        peers = sorted({peer for t in step.translations for peer in t.outer.peers()})
        others = [ip_address(peer) for peer in peers]
        if step.site.row.own:
            others = [t.before for t in step.translations]
        at_destination = step.site.role == Role.DESTINATION
        own, others = (news, others) if at_destination else ([], [*news, *others])
        noted = lost_routes.note(own, others)
        return Prior(facts={"ways": noted} if noted else {})


class ListenersDriver(LoadDriver[InstallReception]):
    """The rules by which new connections reach listeners that moved."""

    def check(self, at: Place, step: InstallReception) -> None:
        """At the destination no other socket may listen at NEW's port."""
        if step.site.role == Role.DESTINATION:
            lost_routes.check_reception(step)

    def revert(self, at: Place, undo: RemoveListeners, prior: Prior) -> None:
        """The rules go, and behind them the entries of those that came in meanwhile."""
        nftables.unload(undo.objects)
        faultpoints.reach("withdrawn", "reception")
        for reception in undo.listeners:
            conntrack_listeners.delete_translated(reception)


class ErrorsDriver(Driver[TranslateErrors]):
    """The raw rules that translate what ICMP errors quote."""

    def apply(self, at: Place, step: TranslateErrors, remember: Remember) -> Prior:
        """In front of their chains."""
        remember(Prior())
        nftables.load(step.objects())
        return Prior()


class BlockDriver(LoadDriver[HoldListeners]):
    """Listeners of the source are blocked."""

    def apply(self, at: Place, step: HoldListeners, remember: Remember) -> Prior:
        """These listeners and no others; again is fine."""
        remember(Prior())
        nftables.load_block(step)
        return Prior()


class OpenDriver(Driver[OpenGate]):
    """The kept connections are let through, and callers to the listeners."""

    def apply(self, at: Place, step: OpenGate, remember: Remember) -> Prior:
        """One rule in front of each drop; what has been held is delivered, datagrams before."""
        prior = Prior(present=nftables.chain_state(step.rules()[0].chain) == Gate.OPEN)
        remember(prior)
        if not prior.present:
            if step.datagrams and at.directory:
                segment_holder.deliver_datagrams(at.directory, step.move_id)
            nftables.open_gates(step.rules())
        if not (step.delivers and at.directory):
            return prior
        held = segment_holder.deliver(at.directory, step.move_id)
        facts: dict[str, int] = {}
        if held is not None:
            facts = {"segments": held.segments, "refused": held.refused}
            facts |= {"datagrams": held.datagrams} if step.datagrams else {}
        return Prior(prior.present, {**prior.facts, **facts})

    def revert(self, at: Place, undo: CloseGates, prior: Prior) -> None:
        """Closed again; and of resets: nothing is answered any more, what was reset stays reset."""
        nftables.close_gates(undo.chains)


class SendResetsDriver(Driver[SendResets]):
    """Connections that cannot be kept are reset, at both ends."""

    def apply(self, at: Place, step: SendResets, remember: Remember) -> Prior:
        """From now on what an end says is answered, and an end that says nothing is asked."""
        prior = Prior(present=nftables.chain_state(step.rules()[0].chain) == Gate.OPEN)
        remember(prior)
        if prior.present:
            return prior
        nftables.open_gates(step.rules())
        from natkeep.kernel.tcp_probe import probe

        return Prior(facts={"asked": probe(step.questions())})


NFT_DRIVERS: dict[type, Any] = {
    InstallGate: GateDriver(),
    FillSet: FillDriver(),
    InstallTranslation: TranslationDriver(),
    InstallReception: ListenersDriver(),
    TranslateErrors: ErrorsDriver(),
    HoldListeners: BlockDriver(),
    InstallResets: LoadDriver[InstallResets](),
    PassKept: LoadDriver[PassKept](),
    OpenGate: OpenDriver(),
    SendResets: SendResetsDriver(),
}

NFT_INVERSES: dict[type, Inverse[Any]] = {
    Unload: UnloadInverse(),
    RemoveGate: NFT_DRIVERS[InstallGate],
    RemoveListeners: NFT_DRIVERS[InstallReception],
    CloseGates: NFT_DRIVERS[OpenGate],
}
