"""the table at a site: its rules put in and taken out again, move by move.

Rule: rules in shared chains are found by their comment, and nothing is deleted that does not
bear the move's. The text comes from plan/; what stands there is read by elements.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from natkeep import faultpoints
from natkeep.kernel import nft, nftables, passing
from natkeep.kernel import quiet as quietness
from natkeep.kernel.interface import Remember
from natkeep.plan import quiet, reception, resets, ruleset
from natkeep.plan.drift import Gate
from natkeep.plan.move import Role, Site
from natkeep.plan.reception import Reception
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import (
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    OpenGate,
    Prior,
    SendResets,
    TranslateErrors,
)
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address


def install_gate(step: InstallGate, remember: Remember) -> Prior:
    """The table where there is none, and the move's gate, closed."""
    closing = passing.closing_lines()
    prior = Prior(facts={"unhooked": True}) if ruleset.render_hook()[0] in closing else Prior()
    lines = [*closing, *step.lines()]
    if step.site.role == Role.DESTINATION:
        if not nftables.has_table(nftables.ARP, TABLE):
            lines = [*ruleset.render_arp_static(), *lines]
        if not nftables.has_chain(TABLE, ruleset.LEAVING):
            lines = [*ruleset.render_leaving(), *lines]
    if step.site.role == Role.SOURCE:
        lines = [*quietness.missing_static_lines(), *lines]
    if not nftables.has_table(nftables.INET, TABLE):
        lines = [*ruleset.render_static(), *lines]
    remember(prior)
    nft.run_transaction(lines)
    return prior


def remove_gate(step: InstallGate, prior: Prior) -> None:
    """The move's gate and sets go; with the last move the tables go too."""
    own = {name for t in step.translations for name in ruleset.sets_of(step.move_id, t)}
    if not quietness.is_shared(own):
        # The last move takes the tables with it; others may come only under the same lock.
        if nftables.has_table(nftables.INET, TABLE) or nftables.has_table(nftables.ARP, TABLE):
            nft.run_transaction(ruleset.render_removal())
        return
    _withdraw(step.move_id, _gate_chains(step))
    _withdraw_from(ruleset.HALF_OPEN, step.move_id)
    faultpoints.reach("withdrawn", "gate")
    olds = [translation.map.old for translation in step.translations]
    lines = _end_silence(step.site, olds)
    lines += ruleset.render_gate_removal(step.move_id, step.translations)
    _run_what_is_there(lines)
    passing.let_pass()
    if prior.facts.get("unhooked"):
        passing.unhook()


def _end_silence(site: Site, olds: Iterable[Address]) -> list[str]:
    """What lets each OLD be heard again that no move has a gate for any more."""
    if site.role != Role.DESTINATION:
        return []
    return [
        line
        for old in olds
        if not nftables.rules(TABLE, ruleset.address_chain(ruleset.GATE, old))
        for line in ruleset.render_speech(old)
    ]


def missing_mode_lines(some: Iterable[Translation | Reception]) -> list[str]:
    """The base chains of the modes of *some*, as far as they are not there yet."""
    modes = dict.fromkeys(one.mode for one in some)
    return [
        line
        for mode in modes
        if not nftables.has_chain(TABLE, ruleset.base_chain_of(mode))
        for line in ruleset.render_mode(mode)
    ]


def _gate_chains(step: InstallGate) -> list[tuple[str, Address]]:
    return [chain for t in step.translations for chain in quiet.gate_chains(t)]


def withdraw_translation(step: InstallTranslation) -> None:
    """The rules that translate go."""
    chains = [chain for t in step.translations for chain in ruleset.translating_chains(t)]
    _withdraw(step.move_id, chains)
    faultpoints.reach("withdrawn", "translation")


def withdraw_reception(step: InstallReception) -> None:
    """The rules for callers go."""
    chains = [chain for receiving in step.receptions for chain in reception.chains(receiving)]
    _withdraw(reception.comment(step.move_id), chains)
    _withdraw_from(ruleset.HALF_OPEN, reception.comment(step.move_id))
    faultpoints.reach("withdrawn", "reception")
    if nftables.has_chain(TABLE, reception.callers_chain(step.move_id)):
        lines = _end_silence(step.site, [receiving.map.old for receiving in step.receptions])
        lines += reception.render_removal(step.move_id, step.receptions)
        _run_what_is_there(lines)


def install_resets(step: InstallResets) -> None:
    """What leads the connections that cannot be kept to a drop, until it is opened."""
    lines = list(step.lines())
    [dispatch] = {reset.dispatch for reset in step.resets}
    if not nftables.has_chain(TABLE, resets.base_chain_of(dispatch)):
        lines = [*resets.render_static(dispatch), *lines]
    nft.run_transaction(lines)


def withdraw_resets(step: InstallResets) -> None:
    """It goes, its sets too."""
    _withdraw(resets.comment(step.move_id), [reset.chain for reset in step.resets])
    if nftables.has_chain(TABLE, resets.reset_chain(step.move_id)):
        lines = _end_silence(step.site, [reset.old for reset in step.resets])
        lines += resets.render_removal(step.move_id, step.resets)
        _run_what_is_there(lines)


def withdraw_error_rules(step: TranslateErrors) -> None:
    """Those in the chain that all moves share; in an address chain they go with its others."""
    _withdraw_from(ruleset.ERRORS, step.move_id, reception.comment(step.move_id))


def _withdraw_from(chain: str, *comments: str) -> None:
    """Take the rules with these comments out of a chain that all moves share, and that stays."""
    _run_what_is_there(
        [
            f"delete rule inet {TABLE} {chain} handle {rule.handle}"
            for rule in nftables.rules(TABLE, chain)
            if rule.comment in comments
        ]
    )


def _withdraw(comment: str, chains: Iterable[tuple[str, Address]]) -> None:
    """Take the rules with this comment out of address chains, and empty chains with them."""
    lines: list[str] = []
    for dispatch, local in dict.fromkeys(chains):
        rules = nftables.rules(TABLE, ruleset.address_chain(dispatch, local))
        ours = [rule.handle for rule in rules if rule.comment == comment]
        if ours:
            last = len(ours) == len(rules)
            lines += ruleset.render_withdrawal(dispatch, local, ours, last=last)
    _run_what_is_there(lines)


def _run_what_is_there(lines: list[str]) -> None:
    """Run deletions in one transaction, or, when something is gone already, one by one."""
    if not lines:
        return
    try:
        nft.run_transaction(lines)
    except nft.NftError:
        for line in lines:
            try:
                nft.run_transaction([line])
            except nft.NftError as error:
                if "No such file" not in str(error):
                    raise


def gate_state(move_id: str) -> Gate:
    """Absent, closed or open, by the rules of the move's gate chain."""
    return chain_state(ruleset.gate_chain(move_id))


def chain_state(chain: str) -> Gate:
    """The same of any chain that is a gate."""
    return state_of([rule.comment for rule in nftables.rules(TABLE, chain)])


def state_of(comments: Collection[str]) -> Gate:
    """The same, by the comments of its rules."""
    if not comments:
        return Gate.ABSENT
    return Gate.OPEN if ruleset.OPEN in comments else Gate.CLOSED


def close_gate(step: OpenGate | SendResets) -> None:
    """Take away what opened the gate, or what resets."""
    _run_what_is_there(
        [
            *(passing.closing_lines() if isinstance(step, OpenGate) else ()),
            *(
                f"delete rule inet {TABLE} {chain} handle {rule.handle}"
                for chain in step.chains()
                for rule in nftables.rules(TABLE, chain)
                if rule.comment == ruleset.OPEN
            ),
        ]
    )
