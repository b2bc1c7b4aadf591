"""the owned table: it drops what is un-translated, also after a flush (kernel/owned_table.py).

    input, forward    -350   to the outer address still, behind the translation: dropped
    postrouting        350   from the inner address still, behind the translation: dropped

Rule: it names the exact tuples of the move and nobody else's, and never translates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.plan import ruleset
from natkeep.plan.move import Role
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections

_CHAINS = {
    "arriving": ("input", -350),
    "passing": ("forward", -350),
    "leaving": ("postrouting", 350),
}
"""Name, hook and priority."""


def table_name(move_id: str) -> str:
    """Name of the guard's inet table; natkeep's own table is another."""
    return f"natkeep-guard-{move_id}"


def sets_of(translation: Translation) -> dict[str, Connections]:
    """The translation's sets by name, and what is in them."""
    number = translation.number
    return {f"outer-{number}": translation.outer, f"inner-{number}": translation.inner}


def render(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """The whole table, its sets empty; it lives as long as the socket that makes it."""
    translations, table = tuple(translations), table_name(move_id)
    return (
        f"create table inet {table} {{ flags owner; }}",
        *(
            f"add chain inet {table} {name} {{ type filter hook {hook} priority {priority}; }}"
            for name, (hook, priority) in _CHAINS.items()
        ),
        *(
            ruleset.render_set(name, translation, table)
            for translation in translations
            for name in sets_of(translation)
        ),
        *(
            f'add rule inet {table} {chain} {text} drop comment "{move_id}"'
            for translation in translations
            for chain, text in _rules(translation)
        ),
    )


def _rules(translation: Translation) -> Iterator[tuple[str, str]]:
    """What is still un-translated where everything should be translated."""
    outer, inner = sets_of(translation)
    before, after = translation.before, translation.after
    family = ruleset.IP[before.version]
    arrived = f"{family} daddr {before} {ruleset.inbound_key(before)} @{outer}"
    yield "arriving", arrived
    yield "passing", arrived
    # A peer on the destination itself is not translated.
    to_wire = 'oif != "lo" ' if translation.site.role == Role.DESTINATION else ""
    yield "leaving", f"{to_wire}{family} saddr {after} {ruleset.outbound_key(after)} @{inner}"
