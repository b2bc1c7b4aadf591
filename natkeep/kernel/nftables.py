"""the tables at a site: objects of plan/nft.py loaded, sets filled, objects taken out again.

Rule: text goes by libnftables, one transaction a call; what is packed in nft_messages.py goes by
itself. Nothing is listed through libnftables (nftables_dump.py reads). A rule in a chain that moves
share is found by its comment, and what moves share goes only when no move needs it any more.
The `nftables` binding is imported only here.

Two traps. close() of a netlink socket after any nf_tables *deletion* waits for an RCU grace period
(6 to 47 ms): nothing is deleted inside a blackout. And where the base chain `gate` is not there no
gate closes anything: what closes one makes it anew, in the same transaction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from natkeep.errors import KernelError
from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.interface import Packed
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink, find_attribute
from natkeep.kernel.nft_messages import (
    SUBSYSTEM,
    Message,
    nfgenmsg,
    pack_batch,
    pack_chain_removal,
    pack_fill,
    pack_objects,
    pack_removal,
)
from natkeep.plan import syn_block
from natkeep.plan.base_chains import (
    DISPATCHES,
    EARLY,
    GATE,
    OPEN,
    early_hook,
    gate_hook,
    is_address_chain,
    removal,
    shared_names,
)
from natkeep.plan.kept_sets import Filling
from natkeep.plan.move import ID
from natkeep.plan.nft import DROP, TABLE, Chain, Object, Rule, Table, Undo
from natkeep.plan.observation import Gate
from natkeep.plan.steps import HoldListeners, Loads, OpenGate

_MESSAGE = re.compile(r"(?:Error|Warning): (.*)")
_INET = 1  # NFPROTO_INET
_GATES = re.compile(rf"(?:gate|callers)-{ID}")
"""Chains that drop until they are opened; an address chain's name is never of that form."""


class NftError(KernelError):
    """libnftables refused a transaction; nothing of it was done."""


def run_transaction(lines: Iterable[str]) -> None:
    """Load text in the namespace we are in, all or nothing; NftError otherwise."""
    # Imported here, since a hook that has nothing to do must not pay for it; and a context for
    # each call, because it holds a netlink socket of the namespace that it was made in.
    import nftables

    code, _, error = nftables.Nftables().cmd("\n".join(lines))
    if code:
        found = _MESSAGE.search(error)
        reason = found.group(1) if found else error.strip() or "no reason given"
        raise NftError(f"nft: {reason}")


def is_available() -> bool:
    """Whether libnftables and its binding can be loaded."""
    try:
        import nftables

        nftables.Nftables()
    except (ImportError, OSError):
        return False
    return True


def send_batch(messages: Sequence[Message], generation: int = 0) -> None:
    """Send them as one nf_tables transaction; OSError if refused. generation: as of pack_batch."""
    if messages:  # the kernel would have nothing to acknowledge
        with Netlink(NETLINK_NETFILTER) as netlink:
            netlink.send_transaction(pack_batch(messages, generation), len(messages))


def fill_sets(fillings: Iterable[Filling]) -> None:
    """Fill these sets and maps, each of one IP version, in one transaction; or OSError."""
    send_batch([packed for one in fillings for packed in pack_fill(TABLE, *one)])


# ---- in ------------------------------------------------------------------------------------------


def load(objects: Iterable[Object], first: Iterable[str] = (), *, bulk: bool = False) -> None:
    """Add *objects*, all or nothing but for raw rules, which come last; NftError or OSError.

    first: text that goes in front of them, in the same transaction. bulk: of so many moves that
    they are packed here, as far as they can be.
    """
    objects = tuple(objects)
    raw = [one for one in objects if isinstance(one, Rule) and one.is_raw()]
    closes = any(_closes_gate(one) for one in objects)
    hook = missing_gate_hook() if closes and gate_hook()[0] not in objects else ()
    packed = _pack_bulk(objects) if bulk and not (raw or hook or first) else ()
    if packed:
        send_batch(packed)
    else:
        text = [*first, *(str(one) for one in objects if one not in raw)]
        _run_behind_hook(hook, text, closes=closes)
    if closes:
        _hook_again()
    for dispatch in EARLY:
        begins = f"{dispatch}-at-"
        if any(isinstance(one, Rule) and one.chain.startswith(begins) for one in objects):
            _hook_early(dispatch)
    send_batch(pack_objects(raw))


def _pack_bulk(objects: Iterable[Object]) -> list[Message]:
    """All of them packed; none where one goes by its text."""
    try:
        return pack_objects(objects)
    except TypeError:
        return []


def _run_behind_hook(hook: Iterable[Object], text: Sequence[str], *, closes: bool) -> None:
    try:
        run_transaction([*map(str, hook), *text])
    except NftError:
        late = missing_gate_hook() if closes and not hook else ()
        if not late:
            raise
        run_transaction([*map(str, late), *text])  # it went since we looked


def _hook_again() -> None:
    """The base chain `gate` may have been removed since we looked: before our gate was there.

    From now on it is not, since a gate is closed.
    """
    if late := missing_gate_hook():
        run_transaction(map(str, late))


def _hook_early(dispatch: str) -> None:
    """The same of the base chain for resets, now that not all ends are heard."""
    if not dump.has_chain(TABLE, DISPATCHES[dispatch].chain):
        run_transaction(map(str, early_hook(dispatch)))


def load_steps(steps: Sequence[Loads]) -> None:
    """Add what these steps add, behind what all moves share, as far as that is missing."""
    missing = _missing_shared(steps)
    objects = [*missing, *(one for step in steps for one in step.objects())]
    load(objects, bulk=len(steps) > 1 and not missing)


def _missing_shared(steps: Sequence[Loads]) -> list[Object]:
    parts = dict.fromkeys(part for step in steps for part in step.static())
    return [one for part in parts if not _stands(part) for one in part]


def load_block(step: HoldListeners) -> None:
    """Block these listeners and no others, whatever the move has blocked before."""
    links = (rule.comment for rule in dump.rules(TABLE, GATE))
    linked = syn_block.comment(step.move_id) in links
    chain = syn_block.chain_name(step.move_id)
    flush = [f"flush chain inet {TABLE} {chain}"] if dump.has_chain(TABLE, chain) else []
    load([*_missing_shared([step]), *step.make(linked=linked)], flush)


def _stands(part: tuple[Object, ...]) -> bool:
    """Whether a part that all moves share is there: by its table, or its first base chain."""
    first = next(one for one in part if isinstance(one, Table | Chain))
    if isinstance(first, Table):
        return dump.has_table(first.family, TABLE)
    return dump.has_chain(TABLE, first.name)


def _closes_gate(one: Object) -> bool:
    """Whether packets have to get to the gates once this is loaded."""
    if not isinstance(one, Rule):
        return False
    drops = one.statements == (DROP,) and _GATES.fullmatch(one.chain) is not None
    return one.chain == GATE or drops


# ---- out -----------------------------------------------------------------------------------------


def unload(undos: Iterable[Undo], *, whole: bool = False) -> None:
    """Take objects away; what is gone already is fine. With the last move the tables go.

    Rules first, and what they refer to behind them, in one transaction. whole: of many moves, and
    NftError or OSError where one has something that is gone: then nothing went.
    """
    undos = tuple(dict.fromkeys(undos))
    names = {undo.name for undo in undos if undo.kind in ("chain", "set", "map")}
    if not names or _has_another(names) or _has_others(names):
        remove(undos, whole=whole)
    # The last move takes the tables with it; others may come only under the same lock.
    elif dump.has_table("inet", TABLE) or dump.has_table("arp", TABLE):
        run_transaction(removal())


def _has_another(own: set[str]) -> bool:
    """The same where it is so; the one that is told first, of a hundred thousand, is enough."""
    with Netlink(NETLINK_NETFILTER) as netlink, suppress(FileNotFoundError):
        for answer in netlink.request(SUBSYSTEM | dump.GETCHAIN, NLM_F_DUMP, nfgenmsg(_INET)):
            table, name = (dump.text(find_attribute(answer[4:], at)) for at in (1, 3))
            if table == TABLE and _GATES.fullmatch(name) and name not in own:
                return True
    return False


def _has_others(own: set[str]) -> bool:
    """Whether the table has a chain or a set of another move than the one that has *own*."""
    # Whatever another natkeep calls them: what is not shared is a move's.
    left = (dump.chain_names(TABLE) | dump.set_names(TABLE)) - own - shared_names()
    # A set without a name, as a rule has it in braces, is called __set0 by the kernel.
    return not all(is_address_chain(name) or name.startswith("__") for name in left)


def remove(undos: Sequence[Undo], *, whole: bool = False) -> None:
    """Take these objects away, whatever else is there; whole: as unload has it."""
    looked_at = [u.name for u in undos if u.kind in ("rule", "chain")]
    looked_at += [undo.unused for undo in undos if undo.unused]
    seen = dump.rules_by_chain(TABLE, dict.fromkeys(looked_at))
    _run_what_is_there(_order_removals(undos, seen), whole=whole)


def _order_removals(
    undos: Sequence[Undo], seen: dict[str, tuple[dump.SeenRule, ...]]
) -> list[tuple[Undo, int]]:
    """What goes; a rule with its number, and all of a chain by 0."""
    comments: dict[str, set[str]] = {}
    for undo in undos:
        if undo.kind == "rule":
            comments.setdefault(undo.name, set()).add(undo.what)
    left, found = {name: len(rules) for name, rules in seen.items()}, []
    for chain, wanted in comments.items():
        for rule in seen.get(chain, ()):
            if rule.comment in wanted:
                found.append((Undo("inet", "rule", chain), rule.handle))
                left[chain] -= 1
    going = [u for u in undos if u.kind != "rule" and not (u.unused and left.get(u.unused, 0))]
    order = {"element": 0, "chain": 1, "set": 2, "map": 2}
    for undo in sorted(going, key=lambda undo: order[undo.kind]):
        if undo.kind == "chain" and not undo.unused and left.get(undo.name, 0):
            found.append((Undo(undo.family, "rule", undo.name), 0))
        found.append((undo, 0))
    return found


def _say(undo: Undo, handle: int) -> str:
    if undo.kind == "rule" and not handle:
        return f"flush chain {undo.family} {TABLE} {undo.name}"
    return undo.command(handle)


def _run_what_is_there(
    removals: Sequence[tuple[Undo, int]], first: Sequence[str] = (), *, whole: bool = False
) -> None:
    """Run deletions in one transaction, or, when something is gone already, one by one.

    first: text that goes in front of them. whole: as unload has it.
    """
    packed = pack_removal(removals) if whole and not first else None
    if packed is not None:
        return send_batch(packed)
    lines = [*first, *(_say(*each) for each in removals)]
    if not lines:
        return
    try:
        run_transaction(lines)
    except NftError:
        if whole:
            raise
        for line in lines:
            try:
                run_transaction([line])
            except NftError as error:
                if "No such file" not in str(error):
                    raise


# ---- the gates -----------------------------------------------------------------------------------


def chain_state(chain: str) -> Gate:
    """Absent, closed or open, by the rules of a chain that drops until it is opened."""
    return state_of([rule.comment for rule in dump.rules(TABLE, chain)])


def state_of(comments: Collection[str]) -> Gate:
    """The same, by the comments of its rules."""
    if not comments:
        return Gate.ABSENT
    return Gate.OPEN if OPEN in comments else Gate.CLOSED


def open_gates(opening: Sequence[Rule]) -> None:
    """Let the connections of these gates through, all or none; or OSError."""
    send_batch(pack_objects(opening))


def close_gates(chains: Iterable[str], *, whole: bool = False) -> None:
    """Take away what opened the gates of these chains, the gate hook back with the first.

    whole: as unload has it.
    """
    first, removals = [*map(str, missing_gate_hook())], []
    for chain in chains:
        rules = (rule for rule in dump.rules(TABLE, chain) if rule.comment == OPEN)
        removals += [(Undo("inet", "rule", chain), rule.handle) for rule in rules]
    _run_what_is_there(removals, first, whole=whole)
    _hook_again()


def missing_gate_hook() -> tuple[Object, ...]:
    """The base chain `gate` and its rules, where the table is there and this chain is not."""
    if dump.has_chain(TABLE, GATE) or not dump.has_table("inet", TABLE):
        return ()
    return gate_hook()


def remove_gate_hook() -> None:
    """Take the gates out of all packets' way, where none is closed; refused if anything changes.

    No lock is needed: what closes a gate at the same time looks again, behind its transaction.
    """
    if packed := pack_gate_hook_removal():
        with Netlink(NETLINK_NETFILTER) as netlink, suppress(OSError):  # it only saves time
            netlink.send_transaction(packed, 2)


def remove_early_hooks() -> bool:
    """As remove_gate_hook, where every end was heard: their resets are not asked for any more.

    Whether they have gone. A prepare makes them anew.
    """
    return all([_remove_early_hook(dispatch) for dispatch in EARLY])


def _remove_early_hook(dispatch: str) -> bool:
    chain = DISPATCHES[dispatch].chain
    with Netlink(NETLINK_NETFILTER) as netlink, suppress(OSError):  # it only saves time
        generation = dump.read_generation()
        if not dump.has_chain(TABLE, chain):
            return True
        if dump.are_all_heard(netlink, dispatch):
            netlink.send_transaction(pack_batch(pack_chain_removal(chain), generation), 2)
            return True
    return False


def pack_gate_hook_removal(opening: Sequence[Rule] = ()) -> bytes:
    """The transaction of remove_gate_hook, of two messages; empty where the chain has to stay.

    opening: what will be opened before, in a transaction of its own, so one state later.
    """
    try:
        generation = dump.read_generation()
        if not _may_remove({rule.chain for rule in opening}):
            return b""
    except OSError:  # what is opened or prepared shall not fail by it
        return b""
    return pack_batch(pack_chain_removal(GATE), generation + (1 if opening else 0))


def _may_remove(opened: set[str]) -> bool:
    seen, hooked = set(opened), False
    for rule in dump.rules_of_chains(TABLE, GATE, "callers-"):
        if rule.chain == GATE:
            hooked = True
            if syn_block.is_comment(rule.comment):  # listeners are blocked in the base chain
                return False
        elif rule.chain not in seen and _GATES.fullmatch(rule.chain):
            seen.add(rule.chain)  # what opens a gate is its first rule
            if rule.comment != OPEN:
                return False
    return hooked


def pack_open(step: OpenGate) -> Packed:
    """The transaction that opens these gates, and what may follow it once no restore waits."""
    opening = step.rules()
    batch = pack_batch(pack_objects(opening))
    return Packed(batch, len(opening), unhooking=pack_gate_hook_removal(opening))
