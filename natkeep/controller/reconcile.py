"""One ConnectionMove: what it says is ordered, how far it is goes into its status.

Level-triggered: each call looks at the object, the store and the API anew. A controller that was
killed knows as much as one that was not, and to order the same again is harmless.

Rule: a move that was ordered once is not looked up in the API again: the pods' addresses are those
that its nodes have, and the source pod may be gone by then. What ended by another hand
(`natkeep fleet end`) is not ordered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natkeep import report
from natkeep.checkpoint.listing import parse_octets
from natkeep.controller.cluster import Cluster
from natkeep.controller.connection_move import ConnectionMove, find_id, parse
from natkeep.controller.status import (
    Status,
    Told,
    WaitsError,
    is_opened,
    make_status,
    tell_error,
)
from natkeep.errors import JournalError, NatkeepError, RefusedError, UsageError
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, progress
from natkeep.fleet.order import Order, Place
from natkeep.fleet.progress import Progress
from natkeep.fleet.store import Store, read
from natkeep.fleet.want import parse_maps, parse_want
from natkeep.plan.maps import Wish
from natkeep.plan.roles import Role

GATEWAY = ".gateway"
"""The agent of a node's own namespace is named NODE.gateway, the one of its pods NODE."""
_POD = "pod:"


def reconcile(body: Mapping[str, Any], store: Store, cluster: Cluster) -> Status:
    """Order what the object says, if that is not done yet; its status."""
    before = body.get("status") or {}
    now, generation = None, None
    told = Told("Ordered", True, "Ordered", "")
    try:
        now = _look(store, find_id(body))
        if now is None or now.order.is_wanted():
            move = parse(body)
            new, lines = _order(move, store, cluster, now, before)
            if new:
                now, generation = _look(store, move.id), move.generation
            told = told._replace(message=_describe_unkept(lines) or _message(before))
        else:
            if now.order.phase == "gone" and not now.lacking("settled"):
                orders.forget(store, now.order)
            told = Told("Ordered", False, "Ended", "by natkeep fleet end; delete this object")
    except NatkeepError as error:
        told = tell_error(error)
    return make_status(before, told, now, generation)


def end(body: Mapping[str, Any], store: Store) -> Status | None:
    """Order that it is undone everywhere; its status while that is under way, None when it is."""
    before, now = body.get("status") or {}, None
    forced = (body.get("spec") or {}).get("endConnections") is True
    try:
        move_id = find_id(body)
        now = _look(store, move_id)
        if now is None or now.order.phase == "settled":
            return None
        if now.order.is_wanted() or (forced and not _is_forced(store, now.order)):
            orders.end(store, move_id, force=forced)
            now = _look(store, move_id) or now
        lacking = now.lacking("settled")
        if not lacking:
            orders.forget(store, now.order)
            return None
        told = Told("Ordered", False, "Ending", f"to be undone: {now.describe(lacking)}")
    except NatkeepError as error:
        told = tell_error(error)
    return make_status(before, told, now, None)


def _look(store: Store, move_id: str) -> Progress | None:
    try:
        return progress.look(store, move_id)
    except JournalError:
        return None  # nothing is ordered


def _is_forced(store: Store, order: Order) -> bool:
    [place] = [place for place in order.places if place.role == Role.DESTINATION]
    item = read(store, place.key(order.id))
    return item is None or parse_want(item.value).force


def _order(
    move: ConnectionMove, store: Store, cluster: Cluster, now: Progress | None,
    before: Mapping[str, Any],
) -> tuple[bool, list[str]]:  # fmt: skip
    """Whether it was ordered, and what of the connections is not kept."""
    if now is not None and is_opened(now):
        return False, []
    wish = _make_order(move, cluster, now and now.order)
    if now is not None and before.get("observedGeneration") == move.generation:
        known = {place.key(move.id) for place in now.order.places}
        if known >= {place.key(move.id) for place in wish.places}:
            return False, []
    checkpoint = parse_octets(move.connections.encode(), "spec.connections")
    plan = orders.make_plans(wish, checkpoint)[Role.DESTINATION]
    lines = [*report.unkept_lines(checkpoint, plan)]
    if lines and move.refuses_unkept:
        raise RefusedError(
            _describe_unkept(lines), hint="spec.unkept: report orders it all the same"
        )
    orders.apply(store, wish, checkpoint)
    return True, lines


def _make_order(move: ConnectionMove, cluster: Cluster, known: Order | None) -> Order:
    """The order that the object is; WaitsError where a pod of it is not there yet."""
    if known is None:
        maps, places = _find_ends(move, cluster)
    else:
        maps = known.maps
        # A node that is gone from the cluster may have something standing all the same.
        places = [place for place in known.places if not place.group]
    there = {place.key(move.id) for place in places}
    for each in _gateways(move, cluster):
        if each.key(move.id) not in there:
            places.append(each)
            there.add(each.key(move.id))
    if not any(place.role == Role.GATEWAY for place in places):
        raise WaitsError("gateways: no node has these labels")
    phase = "frozen" if move.frozen else "staged"
    return Order(move.id, maps, tuple(places), move.mode, move.deadline, phase)


def _find_ends(move: ConnectionMove, cluster: Cluster) -> tuple[tuple[Wish, ...], list[Place]]:
    """The maps and the destination, which natkeep-cni prepares where there is no pod yet."""
    olds = _addresses(_find_pod(cluster, move.namespace, move.source, move.source_uid))
    if move.target_node and cluster.find_pod(move.namespace, move.target) is None:
        pod, node = f"{_POD}{move.namespace}/{move.target}", keys.parse_name(move.target_node)
        place = Place(Role.DESTINATION, pod, (node,))
        return parse_maps([f"{old}=auto" for old in olds.values()]), [place]
    target = _find_pod(cluster, move.namespace, move.target)
    return parse_maps(_pair(olds, _addresses(target))), [_place(target)]


def _gateways(move: ConnectionMove, cluster: Cluster) -> list[Place]:
    places = []
    for each in move.gateways:
        if each.group:
            places.append(Place(Role.GATEWAY, "", (), each.group))
        for node in cluster.list_nodes(each.labels) if each.labels else ():
            places.append(Place(Role.GATEWAY, "", (keys.parse_name(node + GATEWAY),)))
    return places


# ---- pods ----------------------------------------------------------------------------------------


def _find_pod(cluster: Cluster, namespace: str, name: str, uid: str = "") -> dict[str, Any]:
    """A pod that has an address; WaitsError where it has none yet."""
    pod = cluster.find_pod(namespace, name)
    if pod is None:
        raise WaitsError(f"there is no pod {name} yet")
    found = pod["metadata"].get("uid", "")
    if uid and uid != found:
        raise RefusedError(f"the pod {name} is another one: its uid is {found}, not {uid}")
    spec, status = pod.get("spec", {}), pod.get("status", {})
    if spec.get("hostNetwork"):
        raise RefusedError(
            f"the pod {name} has its node's address",
            hint="hosts are moved by natkeep fleet apply or natkeep migrate",
        )
    if status.get("phase") in ("Succeeded", "Failed"):
        raise RefusedError(f"the pod {name} has ended ({status['phase']})")
    if not spec.get("nodeName") or not status.get("podIP"):
        raise WaitsError(f"the pod {name} has no address yet")
    return pod


def _addresses(pod: Mapping[str, Any]) -> dict[bool, str]:
    """A pod's address of each family, by whether it is IPv6."""
    status = pod["status"]
    ips = [each["ip"] for each in status.get("podIPs") or ()] or [status["podIP"]]
    return {":" in ip: ip for ip in ips}


def _pair(olds: Mapping[bool, str], news: Mapping[bool, str]) -> list[str]:
    for is_ipv6, old in olds.items():
        if is_ipv6 not in news:
            family = "IPv6" if is_ipv6 else "IPv4"
            raise RefusedError(f"the target pod has no {family} address, the source pod has {old}")
    return [f"{old}={news[family]}" for family, old in olds.items()]


def _place(target: Mapping[str, Any]) -> Place:
    uid = target["metadata"].get("uid")
    if not uid:
        raise UsageError("the target pod has no uid")
    node = keys.parse_name(target["spec"]["nodeName"])
    return Place(Role.DESTINATION, f"{_POD}{uid}", (node,))


# ---- words ---------------------------------------------------------------------------------------


def _describe_unkept(lines: list[str]) -> str:
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f"not kept: {', '.join(lines[:3])}{more}" if lines else ""


def _message(before: Mapping[str, Any]) -> str:
    """What was not kept, as it was said when it was ordered."""
    known = {each["type"]: each for each in before.get("conditions") or ()}
    last = known.get("Ordered", {})
    return str(last.get("message", "")) if last.get("reason") == "Ordered" else ""
