"""Where the peers' packets are translated: which maps, and at which host.

    NEW      the address from which the destination would answer the peers
    gateway  a host that passes on what the peers send, and that natkeep may act at; or
    relay    the source itself, which goes on receiving what is sent to OLD

Rule: what natkeep's own `check` at a host stops is no way; what was chosen, and why, is said.
"""

from __future__ import annotations

import json
from typing import Any

from natkeep.errors import RefusedError
from natkeep.migrate.host import Host, HostError
from natkeep.migrate.record import GATEWAY, RELAY, Record
from natkeep.plan.tuples import Endpoint

_SHOWN = 3  # connections that are lost
_STOPPED = 6  # the exit code of a check that found what stops a move


def read_sockets(source: Host, record: Record) -> dict[str, Any]:
    """What `inspect --live` tells of the process at the source."""
    words = ["inspect", "--live", str(record.pid), *record.options(listeners=False), "--json"]
    return source.natkeep(*words).document()


def find_maps(sockets: dict[str, Any], destination: Host) -> list[str]:
    """`OLD=NEW` for each address that a kept connection has; RefusedError where there is none."""
    peers: dict[str, str] = {}
    for each in sockets["sockets"]:
        if each["kept"] and each["local"] and each["peer"]:
            old, peer = (Endpoint.parse(each[end]).address for end in ("local", "peer"))
            if not old.is_loopback:  # the process' own, both ends of which CRIU restores
                peers.setdefault(str(old), str(peer))
    if not peers:
        raise RefusedError(
            "the process has no connection that can be kept",
            hint="natkeep inspect --live PID there",
        )
    return [f"{old}={_find_new(destination, peer)}" for old, peer in peers.items()]


def find_lost(sockets: dict[str, Any]) -> list[str]:
    """A line for each connection that the move ends, or for the first of many."""
    lost = [one for one in sockets["sockets"] if one["outcome"] == "lost"]
    lines = [f"LOST {one['local']} to {one['peer']}: {one['reason']}" for one in lost[:_SHOWN]]
    return [*lines, *([f"LOST {len(lost) - _SHOWN} more"] if len(lost) > _SHOWN else [])]


def find_ports(sockets: dict[str, Any]) -> list[str]:
    """quiesce's words for the ports at which the process listens, to others than itself."""
    listening = (
        Endpoint.parse(each["local"])
        for each in sockets["sockets"]
        if each["protocol"] == "tcp" and each["local"] and not each["peer"]
    )
    ports = {end.port for end in listening if not end.address.is_loopback}
    return [word for port in sorted(ports) for word in ("--port", str(port))]


def _find_new(destination: Host, peer: str) -> str:
    """The address from which *destination* speaks to *peer*."""
    answer = destination.run("ip", "-json", "route", "get", peer, ok=None)
    try:
        return str(json.loads(answer.stdout)[0]["prefsrc"])
    except (ValueError, LookupError):
        why = f"no way to {peer}: {answer.stderr.strip() or 'no route'}"
        raise RefusedError(f"{destination} has {why}", hint="--map OLD=NEW") from None


def choose(record: Record, source: Host, gateway: Host, asked: str, sockets: str) -> str:
    """Decide who translates, and say so in one line; HostError with what stops it.

    asked: `relay`, a host, or empty: this host if it can, else the source as a relay.
    sockets: the document of the process' sockets.
    """
    if asked != RELAY:
        found = check(gateway, record, GATEWAY, sockets)
        if not found:
            record.gateway, record.role = gateway.target, GATEWAY
            return f"{gateway} translates, as the gateway"
        if asked:
            raise HostError(f"{gateway} is no gateway for this move: {found}")
    else:
        found = ""
    try:
        record.vias = _read_vias(source, record, sockets)
    except HostError as error:
        none = f"{gateway} is no gateway for this move: {found}; " if found else ""
        raise HostError(f"{none}and as a relay {error}") from error
    record.gateway, record.role = source.target, RELAY
    why = f" ({gateway} is no gateway for it: {found})" if found else ""
    return f"{source} goes on receiving for OLD, as a relay from {', '.join(record.vias)}{why}"


def check(host: Host, record: Record, role: str, sockets: str) -> str:
    """What stops the move at a site of *role* at *host*, as natkeep's check says; else empty.

    RefusedError for what the process has, which is the fault of no host.
    """
    # By a relay nothing is prepared for a process that lives, so its connections alone are told.
    listed = _as_list(json.loads(sockets)) if record.vias else sockets
    words = ["check", record.id, *record.options(), "--site", role, "--connections", "-", "--json"]
    looks = host.natkeep(*words, stdin=listed, ok=(0, _STOPPED)).document()["looks"]
    for one in looks:
        if one["code"] == "sysv-ipc":
            why = "have System V shared memory, which CRIU would not dump"
            raise RefusedError(f"{one['what']} {why}", hint=one["remedy"])
    stops = [f"{one['what']} ({one['code']})" for one in looks if one["result"] == "stop"]
    return stops[0] if stops else ""


def _read_vias(source: Host, record: Record, sockets: str) -> list[str]:
    """The addresses of *source* as a relay; HostError where it cannot be one.

    The plan alone: as long as the process lives there, a check would refuse it.
    """
    words = ["plan", record.id, *record.options(), "--site", RELAY, "--connections", "-", "--json"]
    document = source.natkeep(*words, stdin=_as_list(json.loads(sockets))).document()
    return [via for site in document["sites"] for via in site.get("via", [])]


def _as_list(document: dict[str, Any]) -> str:
    """What is kept as lines of `[udp] LOCAL PEER`, and `udp LOCAL *`."""
    words = {"tcp": "", "udp": "udp "}
    kept = (one for one in document["sockets"] if one["kept"])
    lines = (f"{words[one['protocol']]}{one['local']} {one['peer'] or '*'}" for one in kept)
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))
