"""Whether a standing order ([hook] of natkeep.toml) is about the restore that CRIU is at.

Such an order is asked at every restore on this host, most of which are others'. It is not about one

- whose image has no connection at the OLD of the order, and no socket of UDP that is bound there
  (one at the wildcard address may be any process'),
- at a host where OLD is at home (the process comes back, or never left),
- and with `id`, where no such move is there, or it is of an earlier boot or for another namespace.

ANY in the place of an id is an order to open whatever was prepared for the tree's namespace, if it
is about this restore: each pod has a namespace of its own, and one file of CRIU's is for all.

Then the hook leaves with 0 and nothing is done. What is about this restore and cannot be done ends
it, as an order in CRIU's environment does.

Rule: nothing is changed here, and no lock is taken.
"""

from __future__ import annotations

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.images import read_checkpoint, read_inventory
from natkeep.criu.environment import Call
from natkeep.kernel.interface import Kernel
from natkeep.kernel.old_address import find_at_home
from natkeep.lifecycle.executor import Executor
from natkeep.plan.maps import parse_map
from natkeep.plan.move import Site, parse_id
from natkeep.plan.tuples import Local, is_at
from natkeep.state.directory import read_boot_id


def find_about(call: Call, executor: Executor) -> list[str]:
    """The moves that were prepared for the tree's namespace and are about this restore."""
    site = call.tree_site()
    executor.kernel.open_sites([site])
    here = executor.kernel.identity(site)
    headers = {move_id: executor.state.read_header(move_id) for move_id in executor.state.ids()}
    near = [move_id for move_id, header in headers.items() if header and header.is_at(here)]
    return [move_id for move_id in near if not why_not_about(move_id, call, executor)]


def why_not_about(move_id: str, call: Call, executor: Executor) -> str:
    """Why the order to open *move_id* is not about this restore; empty where it is."""
    if not executor.state.knows(parse_id(move_id)):
        return f"there is no move {move_id}"
    journal = executor.state.load(move_id)
    if journal.boot != read_boot_id():
        return f"move {move_id} is of an earlier boot"
    if not executor.is_home(journal, call.tree_site()):
        return f"move {move_id} is for another namespace"
    if call.images is None:
        return ""
    if journal.image and read_inventory(call.images).run_id == journal.image:
        return ""
    image, olds = read_checkpoint(call.images), [map_.old_end for map_ in journal.move.maps]
    if image.lost_at(olds) or any(_is_at(image, old) for old in olds):
        return ""
    return f"no connection of this image is at an OLD of {move_id}"


def maps_about(
    maps: tuple[str, ...], checkpoint: Checkpoint, kernel: Kernel, site: Site, *, resets: bool
) -> tuple[str, ...]:
    """Those of *maps* that are about a restore of *checkpoint* at *site*.

    resets: connections that cannot be kept count too, since they are to be reset.
    """
    wishes = {text: parse_map(text) for text in maps}
    found = {
        text: wish.old
        for text, wish in wishes.items()
        if _is_at(checkpoint, wish.old_end) or (resets and checkpoint.lost_at([wish.old_end]))
    }
    if not found:
        return ()
    kernel.open_sites([site])
    home = kernel.ask(site, find_at_home, frozenset(found.values()))
    return tuple(text for text, old in found.items() if old not in home)


def _is_at(checkpoint: Checkpoint, old: Local) -> bool:
    bound = any(is_at(end, [old]) for end in checkpoint.udp_servers)
    return bound or any(len(some.at(old)) for some in (checkpoint.connections, checkpoint.udp))
