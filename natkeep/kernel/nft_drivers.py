"""the drivers of the steps that load nft objects: check, apply and revert side by side.

Rule: what a step adds is in plan/, how it gets into the kernel and out again in nftables.py; here
is only what a kind of step needs beside that.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from natkeep.kernel.interface import Driver, Inverse, Place, Remember, RememberMany
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
        return self.apply_many(at, [step], lambda priors: remember(priors[0]))[0]

    def apply_many(self, at: Place, steps: Sequence[L], remember: RememberMany) -> list[Prior]:
        """The same of many, in one transaction."""
        priors = self.find_priors(steps)
        remember(dict(enumerate(priors)))
        nftables.load_steps(steps)
        return priors

    def find_priors(self, steps: Sequence[L]) -> list[Prior]:
        """What is to be remembered of the site as it is before each."""
        return [Prior() for _ in steps]


class UnloadInverse(Inverse[Unload]):
    """Objects are unloaded."""

    def revert(self, at: Place, undo: Unload, prior: Prior) -> None:
        """What is gone already is fine."""
        self.revert_many(at, [(undo, prior)])

    def revert_many(self, at: Place, undos: Sequence[tuple[Unload, Prior]]) -> None:
        """The same, in one transaction."""
        objects = (one for undo, _ in undos for one in undo.objects)
        nftables.unload(objects, whole=len(undos) > 1)
        for part in {undo.part for undo, _ in undos if undo.part}:
            faultpoints.reach("withdrawn", part)


class GateDriver(LoadDriver[InstallGate]):
    """The gate, closed."""

    def check(self, at: Place, step: InstallGate) -> None:
        """No other move of this id may be there."""
        if nftables.chain_state(gate_chain(step.move_id)) != Gate.ABSENT:
            raise RefusedError(
                f"{step.site}: move {step.move_id} is prepared there already",
                hint=f"natkeep teardown {step.move_id}, or another id",
            )

    def find_priors(self, steps: Sequence[InstallGate]) -> list[Prior]:
        """Whether the gate hook, which comes with it, was taken away since all gates were open."""
        first = Prior(facts={"unhooked": True}) if nftables.missing_gate_hook() else Prior()
        return [first, *(Prior() for _ in steps[1:])]

    def revert(self, at: Place, undo: RemoveGate, prior: Prior) -> None:
        """The gate and its sets go; the gate hook too, if it was not there before."""
        self.revert_many(at, [(undo, prior)])

    def revert_many(self, at: Place, undos: Sequence[tuple[RemoveGate, Prior]]) -> None:
        """The same, in one transaction."""
        objects = (one for undo, _ in undos for one in undo.objects)
        nftables.unload(objects, whole=len(undos) > 1)
        faultpoints.reach("withdrawn", "gate")
        if any(prior.facts.get("unhooked") for _, prior in undos):
            nftables.remove_gate_hook()
        nftables.remove_early_hooks()  # which came with it, unless others' peers are not heard
        undone_table.remove()
        delete_untracked({old for undo, _ in undos for old in undo.olds})


class FillDriver(Driver[FillSet]):
    """A set is filled; it goes with its gate."""

    def apply(self, at: Place, step: FillSet, remember: Remember) -> Prior:
        """All connections in one transaction."""
        return self.apply_many(at, [step], lambda priors: remember(priors[0]))[0]

    def apply_many(
        self, at: Place, steps: Sequence[FillSet], remember: RememberMany
    ) -> list[Prior]:
        """Also those of many moves."""
        remember({place: Prior() for place, _ in enumerate(steps)})
        nftables.fill_sets(one for step in steps for one in step.fillings())
        return [Prior() for _ in steps]


class TranslationDriver(LoadDriver[InstallTranslation]):
    """The rules that translate."""

    def check(self, at: Place, step: InstallTranslation) -> None:
        """At the destination NEW must be there, and no socket may have a kept tuple at NEW."""
        if step.site.role == Role.DESTINATION:
            lost_routes.check_destination(step)

    def apply_many(
        self, at: Place, steps: Sequence[InstallTranslation], remember: RememberMany
    ) -> list[Prior]:
        """Load it; the gate stands by now, and drops what was dropped since an earlier undo."""
        priors = super().apply_many(at, steps, remember)
        for step in steps:
            if step.site.row.puts_old:
                undone_table.remove(Connections.joined(t.outer for t in step.translations))
        return priors

    def find_priors(self, steps: Sequence[InstallTranslation]) -> list[Prior]:
        """The routes and the address that the translation stands on, for a repair."""
        return [*map(self._find_prior, steps)]

    def _find_prior(self, step: InstallTranslation) -> Prior:
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
        return self.apply_many(at, [step], lambda priors: remember(priors[0]))[0]

    def apply_many(
        self, at: Place, steps: Sequence[OpenGate], remember: RememberMany
    ) -> list[Prior]:
        """The gates of many moves in one transaction; what has been held, one after the other."""
        gates = [step.rules() for step in steps]
        states = [nftables.chain_state(rules[0].chain) for rules in gates]
        priors = [Prior(present=state == Gate.OPEN) for state in states]
        remember(dict(enumerate(priors)))
        for step, prior in zip(steps, priors, strict=True):
            if step.datagrams and at.directory and not prior.present:
                segment_holder.deliver_datagrams(at.directory, step.move_id)
        pairs = zip(gates, priors, strict=True)
        nftables.open_gates([one for rules, prior in pairs if not prior.present for one in rules])
        return [self._deliver(at, *each) for each in zip(steps, priors, strict=True)]

    def _deliver(self, at: Place, step: OpenGate, prior: Prior) -> Prior:
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

    def revert_many(self, at: Place, undos: Sequence[tuple[CloseGates, Prior]]) -> None:
        """The same, in one transaction."""
        chains = (chain for undo, _ in undos for chain in undo.chains)
        nftables.close_gates(chains, whole=len(undos) > 1)


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
