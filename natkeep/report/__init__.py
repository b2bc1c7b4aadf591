"""The words and the JSON: how plans, moves and checkpoints are shown to a person or a script.

Rule: values in, text or JSON values out; the keys are DESIGN's contract. Addresses are written
as `ipaddress` prints them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from natkeep.checkpoint import Checkpoint, Inventory, Outcome, Socket
from natkeep.plan.criu_lock import NetworkLock
from natkeep.plan.findings import CATALOGUE, Finding, Severity
from natkeep.plan.kept_connections import find_unkept_servers
from natkeep.plan.move import Fate, Site
from natkeep.plan.plan_text import describe_count, render_nft
from natkeep.plan.process import Tree
from natkeep.plan.protocols import TCP
from natkeep.plan.resets import NOT_TOLD, describe_fates
from natkeep.plan.roles import Role
from natkeep.plan.steps import Plan, SwitchForwarding
from natkeep.plan.translation import Compared, Translation
from natkeep.plan.tuples import Connections, FourTuple, Local


def move_to_json(plan: Plan) -> dict[str, Any]:
    """The part of a move that does not depend on its sites' state."""
    move = plan.move
    document: dict[str, Any] = {
        "id": move.id,
        "mode": str(move.mode),
        "maps": [map_.to_json() for map_ in move.maps],
    }
    if move.peer_maps:
        document["peer_maps"] = [one.to_json() for one in move.peer_maps]
    if move.unkept == Fate.RESET:
        fates = describe_fates(plan.resets).items()
        document["unkept"] = [{**_tuple_to_json(end), "fate": fate} for end, fate in fates]
    if servers := move.kept_servers:
        document["udp_servers"] = [str(end) for end in servers]
    return document


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """What prepare and open would do."""
    nft = {site: list(lines) for site, lines in render_nft(plan)}
    return {
        "schema": 1,
        **move_to_json(plan),
        "sites": [
            site_to_json(site, nft=nft[site], **relay_to_json(plan, site))
            for site in plan.move.ordered_sites()
        ],
        "connections": [*_connections_to_json(plan)],
        "steps": [
            {"step": type(step).__name__, "site": str(step.site), "commands": step.describe()}
            for step in plan.steps
        ],
    }


def relay_to_json(
    plan: Plan, site: Site, before: Mapping[str, str] | None = None
) -> dict[str, object]:
    """What more is said of a site that is a relay: its addresses, and what it switches on.

    before: of each setting what it was; otherwise as one that is switched on has to be.
    """
    if not site.row.relays:
        return {}
    before = before or {}
    steps = (s for s in plan.prepare if isinstance(s, SwitchForwarding) and s.site == site)
    return {
        "via": [str(via) for via in plan.move.vias],
        "forwarding": [
            {"device": of.device, "setting": of.name, "before": before.get(of.name, of.off)}
            for of in (step.setting for step in steps)
        ],
    }


def site_to_json(site: Site, **more: object) -> dict[str, object]:
    """A site, and what more is said of it."""
    return {"role": str(site.role), "netns": site.netns, **more}


def _connections_to_json(plan: Plan) -> Iterator[dict[str, Any]]:
    for translation in at_first_site(plan):
        wires, proto = find_wires(translation), translation.protocol.name
        for number, tuple_ in enumerate(translation.kept):
            wire = {"wire": _tuple_to_json(wires[number])} if number in wires else {}
            yield {"proto": proto, **_tuple_to_json(tuple_), **wire}


def find_wires(translation: Translation) -> dict[int, FourTuple]:
    """By their place the connections whose peers have moved, as they are on the wire to NEW."""
    wire, map_ = translation.wire, translation.map
    if not translation.site.row.leaves or wire.toward(map_.old_end) == translation.kept:
        return {}
    pairs = enumerate(zip(translation.kept, wire, strict=True))
    return {number: there for number, (kept, there) in pairs if kept.source != there.source}


def _tuple_to_json(inbound: FourTuple) -> dict[str, Any]:
    return {"local": str(inbound.destination), "peer": str(inbound.source)}


def kept_of(plan: Plan) -> Iterator[Connections]:
    """Each kept connection once, though every site translates it."""
    return (translation.kept for translation in at_first_site(plan))


def at_first_site(plan: Plan) -> Iterator[Translation]:
    """The translations of the first site; where peers' own hosts are, of what has all."""
    sites = dict.fromkeys(one.site for one in plan.translations)
    some = [*sites][:1]
    if any(site.row.own for site in sites):
        ends = [site for site in sites if site.row.puts_old]
        ways = [site for site in sites if not site.row.own][:1]
        some = ends or [*(site for site in sites if site.row.own), *ways]
    return (one for one in plan.translations if one.site in some)


def summary(plan: Plan) -> str:
    """A move in one line."""
    maps = ", ".join(str(map_) for map_ in plan.move.maps)
    if plan.move.peer_maps:
        maps += f", peers {', '.join(map(str, plan.move.peer_maps))}"
    sites = ", ".join(str(site) for site in plan.move.ordered_sites())
    return f"{plan.move.id}: {maps}, {describe_count(plan.move, at_first_site(plan))}, at {sites}"


def checkpoint_to_json(checkpoint: Checkpoint, olds: Sequence[Local]) -> dict[str, Any]:
    """The document of `inspect --json`."""
    dump = checkpoint.inventory
    return {
        "schema": 1,
        **({"live": True} if checkpoint.live else {}),
        **({} if dump is None else {"dump": _dump_to_json(dump)}),
        **({} if checkpoint.tree is None else {"tree": _tree_to_json(checkpoint.tree)}),
        "sum": {str(outcome): number for outcome, number in _sum_up(checkpoint, olds).items()},
        "sockets": [
            {
                "protocol": socket.protocol,
                "state": str(socket.state) if socket.state else None,
                "local": str(socket.local) if socket.local else None,
                "peer": str(socket.peer) if socket.peer else None,
                "device": socket.bound_device,
                "unsent": socket.unsent,
                "unread": socket.unread,
                "kept": (verdict := socket.why_left(olds)) is None,
                "reason": verdict,
                "outcome": str(socket.outcome(olds)),
            }
            for socket in checkpoint.sockets
        ],
    }


def _tree_to_json(tree: Tree) -> dict[str, Any]:
    return {
        "home": tree.home,
        "ids": sorted(tree.ids),
        "files": [{"name": f.name, "size": f.size, "mode": f.mode} for f in tree.files],
        "directories": [*tree.directories],
        "own_mounts": tree.own_mounts,
        "shared_memory": [*tree.shared_memory],
    }


def _dump_to_json(dump: Inventory) -> dict[str, Any]:
    return {
        "network_lock": str(dump.network_lock),
        "run_id": dump.run_id,
        "tcp_close": dump.tcp_close,
        "own_netns": dump.own_netns,
    }


def _sum_up(checkpoint: Checkpoint, olds: Sequence[Local]) -> dict[Outcome, int]:
    found = Counter(socket.outcome(olds) for socket in checkpoint.sockets)
    return {outcome: found[outcome] for outcome in Outcome}


def checkpoint_lines(checkpoint: Checkpoint, olds: Sequence[Local]) -> Iterator[str]:
    """The same for a person, the sum first."""
    if not checkpoint.sockets:
        yield "no inet sockets"
        return
    found = _sum_up(checkpoint, olds)
    some, listeners = found[Outcome.RESTORED], found[Outcome.LISTENER]
    udp = [each.protocol == "udp" and each.outcome(olds) for each in checkpoint.sockets]
    of_udp = f" ({count} udp)" if (count := udp.count(Outcome.KEPT)) else ""
    words = [f"{found[Outcome.KEPT]} kept{of_udp}", f"{found[Outcome.LOST]} lost"]
    words += [f"{some} need{'s' * (some == 1)} nothing"] if some else []
    words += [f"{listeners} listener{'s' * (listeners != 1)}"] if listeners else []
    yield ", ".join(words)
    for socket in checkpoint.sockets:
        yield "  ".join(
            [
                f"{socket.protocol:4}",
                f"{socket.state or '':12}",
                f"{socket.local or '*'!s:24}",
                f"{socket.peer or '*'!s:24}",
                _verdict(socket, olds) + _describe_queues(socket),
            ]
        )
    if of_udp and not checkpoint.live:
        yield "udp: CRIU drops datagrams that a socket had not read at the dump; no image tells"


def _describe_queues(socket: Socket) -> str:
    if socket.unread:
        return f" ({socket.unread} octets of its buffer are unread datagrams, which CRIU drops)"
    return f" ({socket.unsent} octets unsent)" if socket.unsent else ""


def _verdict(socket: Socket, olds: Sequence[Local]) -> str:
    reason = socket.why_left(olds)
    match socket.outcome(olds):
        case Outcome.KEPT:
            return "kept"
        case Outcome.LISTENER:
            return str(reason)
        case Outcome.LOST:
            return f"LOST: {reason}"
    if socket.both_ends:
        return f"comes back: its other end, {socket.peer}, moves too"
    if socket.listens_on_loopback():
        return "comes back: a listener that this host alone reaches"
    return f"needs nothing: {reason}"


def compared_lines(compared: Compared) -> Iterator[str]:
    """How an image differs from what was prepared."""
    if compared.came:
        yield f"{compared.came} connections came after prepare, and were added"
    if compared.went:
        yield f"{compared.went} connections went after prepare"
    yield from (f"came after prepare, not kept: {line}" for line in compared.unkept)


def lock_lines(plan: Plan) -> Iterator[str]:
    """What of CRIU's own lock is left at a source, and why."""
    move = plan.move
    sources = (Role.SOURCE, Role.RELAY)
    if not any(site.role in sources for site in move.sites) or move.quiesces:
        return
    if move.lock is None:
        yield "CRIU's lock is left: a list of connections does not say which dump's it is"
    elif move.lock.method == NetworkLock.SKIP:
        yield "the dump had no lock (--network-lock skip): until now nothing kept the source quiet"
    elif not move.lock.is_known():
        yield "CRIU's lock is left: an image from before CRIU 4.1 does not say what it is called"


def unkept_lines(checkpoint: Checkpoint, plan: Plan) -> Iterator[str]:
    """What of the checkpoint the move leaves behind, without the listeners."""
    olds = [map_.old_end for map_ in plan.move.maps]
    fates, resets = describe_fates(plan.resets), plan.move.unkept == Fate.RESET
    for unkept in plan.unkept:
        inbound, proto = unkept.inbound, unkept.protocol.name
        fate = f"; {fates.get(inbound, NOT_TOLD)}" if resets and unkept.protocol is TCP else ""
        yield f"{proto} {inbound.destination} {inbound.source}: {unkept.reason}{fate}"
    yield from (f"udp {one.local} *: {one.reason}" for one in find_unkept_servers(plan.move))
    lost = frozenset(plan.move.lost) if resets else frozenset()
    told = {(unkept.protocol.name, unkept.inbound) for unkept in plan.unkept}
    for socket in checkpoint.sockets:
        inbound_ = socket.inbound()
        if socket.outcome(olds) == Outcome.LOST and (socket.protocol, inbound_) not in told:
            verdict = socket.why_left(olds)
            told_of = inbound_ if socket.protocol != "udp" and inbound_ in lost else None
            fate = f"; {fates.get(told_of, NOT_TOLD)}" if told_of else ""
            yield f"{socket}: {verdict}{fate}"
    if not checkpoint.sockets:
        one_sided = checkpoint.connections.minus(plan.inner)
        every = (one_sided, checkpoint.udp)
        others = sum(len(some) - sum(map(len, plan.move.share(some))) for some in every)
        if others:
            yield f"{others} connections whose local address is not an OLD of --map"


def findings_to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The document of `check --json`: findings as ever, and all that was looked at."""
    looks = [
        {
            "result": str(finding.severity),
            "code": finding.code or None,
            "site": finding.site and site_to_json(finding.site),
            "what": finding.detail,
            "remedy": finding.remedy or None,
        }
        for finding in findings
    ]
    return {
        "schema": 1,
        "findings": [
            {
                "code": finding.code,
                "severity": str(finding.severity),
                "site": finding.site and site_to_json(finding.site),
                "detail": finding.detail,
            }
            for finding in findings
            if finding.code
        ],
        "looks": looks,
        "stops": _count(findings, Severity.STOP),
        "warns": _count(findings, Severity.WARN),
    }


def _count(findings: Sequence[Finding], severity: Severity) -> int:
    return sum(finding.severity == severity for finding in findings)


def warning_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """What a prepare says of what it found, and was not stopped by."""
    yield from (f"warn {finding.code}: {finding.what()}" for finding in findings)


def finding_lines(findings: Sequence[Finding], about: str) -> Iterator[str]:
    """The same for a person, the verdict last; about: what is judged, as `this move`."""
    for finding in findings:
        code = f"{finding.code} " if finding.code else ""
        yield f"{finding.severity:4}  {code}{finding.what()}"
        if finding.remedy:
            yield f"      ({finding.remedy})"
    stops, warns = (_count(findings, each) for each in (Severity.STOP, Severity.WARN))
    warned = f"; {warns} warning{'s' * (warns != 1)}" if warns else ""
    if stops:
        yield f"{stops} stop{'s' * (stops == 1)} {about}{warned}"
    else:
        yield f"nothing stops {about}{warned}"


def explanation_to_json(code: str) -> dict[str, Any]:
    """The document of `explain --json`."""
    explanation = CATALOGUE[code]
    return {
        "schema": 1,
        "code": code,
        "severity": str(explanation.severity),
        "meaning": explanation.meaning,
        "remedy": explanation.remedy,
    }


def explanation_lines(code: str) -> Iterator[str]:
    """The same for a person."""
    explanation = CATALOGUE[code]
    yield f"{code} ({explanation.severity})"
    yield f"  {explanation.meaning}"
    yield f"  {explanation.remedy}"
