"""Where the peers' packets are translated: which maps, and at which hosts.

    NEW      the address from which the destination would answer the peers
    gateway  a host that passes on what the peers send, and that natkeep may act at; or
    relay    the source itself, which goes on receiving what is sent to OLD; or
    peer     each peer's own host

Unasked they are tried in this order, the gateway being this host: what the user has named comes
before what has not been, and the peers' hosts are asked where nothing else is left.

Rule: what natkeep's own `check` at a host stops is no way; what was chosen, and why, is said.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from natkeep.errors import RefusedError, UnreachableError, UsageError
from natkeep.migrate.host import LOCAL, Host, HostError
from natkeep.migrate.record import GATEWAY, PEER, RELAY, Record
from natkeep.plan.maps import Map, parse_map
from natkeep.plan.tuples import Address, Endpoint, parse_address

Reach = Callable[[str, str], Host]
"""The host of that name, connected; its role is for messages."""

_SHOWN = 3  # connections that are lost
_UNASKED = 8  # peers' hosts, at most, that are looked for though --via names none
_STOPPED = 6  # the exit code of a check that found what stops a move


def read_sockets(source: Host, record: Record) -> dict[str, Any]:
    """What `inspect --live` tells of the process at the source."""
    words = ["inspect", "--live", str(record.pid), *record.inspect_options(), "--json"]
    return source.natkeep(*words).document()


def parse_via(words: Sequence[str]) -> tuple[str, list[str]]:
    """The role and the hosts that `--via` names: nothing, one gateway, a relay, peers' hosts."""
    hosts = [word.removeprefix("peer:") for word in words if word.startswith("peer:")]
    if not all(hosts):
        raise UsageError("--via peer: which host?")
    if hosts and len(hosts) == len(words):
        return PEER, [*dict.fromkeys(hosts)]
    if len(words) > 1:
        raise UsageError(
            "--via names one gateway", hint="several: --via peer:HOST of each peer's own host"
        )
    roles = {"peers": PEER, RELAY: RELAY}
    for word in words:
        return (roles[word], []) if word in roles else (GATEWAY, [word])
    return "", []


def find_maps(
    sockets: dict[str, Any], destination: Host, netns: Mapping[str, str],
    asked: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """`OLD=NEW` for each address that a kept connection has; RefusedError where there is none.

    netns: as the record's. asked: maps that were asked for are all there are; their NEW may be
    `auto`.
    """
    peers: dict[Address, Address] = {}
    for old, peer in _find_ends(sockets):
        peers.setdefault(old, peer)
    wishes = [parse_map(text) for text in asked or (f"{old}=auto" for old in peers)]
    if not wishes:
        raise RefusedError(
            "the process has no connection that can be kept",
            hint="natkeep inspect --live PID there; --map OLD=NEW for a server of UDP",
        )
    found = []
    for one in wishes:
        if (new := one.new) is None:
            if one.old not in peers:
                raise RefusedError(f"{one.old} has no peer that tells NEW", hint="--map OLD=NEW")
            new = _find_new(destination, peers[one.old], netns)
        found.append(str(Map(one.old, new, one.old_port, one.new_port)))
    return found


def find_olds(sockets: dict[str, Any]) -> set[str]:
    """The addresses that the kept connections have at the source."""
    return {str(old) for old, _ in _find_ends(sockets)}


def _find_ends(sockets: dict[str, Any]) -> Iterator[tuple[Address, Address]]:
    """OLD and the peer's address of each kept connection."""
    for each in sockets["sockets"]:
        if each["kept"] and each["local"] and each["peer"]:
            old, peer = (Endpoint.parse(each[end]).address for end in ("local", "peer"))
            if not old.is_loopback:  # the process' own, both ends of which CRIU restores
                yield old, peer


def find_lost(sockets: dict[str, Any]) -> list[dict[str, Any]]:
    """Each connection that the move ends."""
    return [one for one in sockets["sockets"] if one["outcome"] == "lost"]


def describe_lost(lost: list[dict[str, Any]]) -> list[str]:
    """What is said of each, and why it is so; of many of the first."""
    lines = [f"{one['local']} to {one['peer']}: {one['reason']}" for one in lost[:_SHOWN]]
    return [*lines, *([f"{len(lost) - _SHOWN} more"] if len(lost) > _SHOWN else [])]


def find_ports(sockets: dict[str, Any]) -> list[str]:
    """quiesce's words for the ports at which the process listens, to others than itself."""
    listening = (
        Endpoint.parse(each["local"])
        for each in sockets["sockets"]
        if each["protocol"] == "tcp" and each["local"] and not each["peer"]
    )
    ports = {end.port for end in listening if not end.address.is_loopback}
    return [word for port in sorted(ports) for word in ("--port", str(port))]


def _find_new(destination: Host, peer: Address, netns: Mapping[str, str]) -> Address:
    """The address from which *destination*, or its container, speaks to *peer*."""
    path = netns.get("destination")
    inside = ["nsenter", f"--net={path}", "--"] if path else []
    answer = destination.run(*inside, "ip", "-json", "route", "get", str(peer), ok=None)
    try:
        return parse_address(json.loads(answer.stdout)[0]["prefsrc"])
    except (ValueError, LookupError):
        why = f"no way to {peer}: {answer.stderr.strip() or 'no route'}"
        raise RefusedError(f"{destination} has {why}", hint="--map OLD=NEW") from None


def refuse_cut_off(record: Record, hosts: Sequence[Host]) -> None:
    """RefusedError where the move itself cuts ssh off: at the destination OLD will be its own.

    hosts: all that have a part in it.
    """
    if record.netns.get("destination"):
        return  # OLD will be the container's
    olds = {parse_address(old) for old in record.olds}
    news = (parse_map(each).new for each in record.maps)
    at_destination = any(_is_here(new) for new in news if new is not None)
    for host in hosts:
        seen, called = host.find_ssh_ends() or (None, None)
        if host.target == record.destination and seen in olds:
            raise RefusedError(
                f"{host} sees this host as {seen}, which is to be an address of its own",
                hint="give it on another machine, or let ssh take another address (BindAddress)",
            )
        if at_destination and called in olds:
            raise RefusedError(
                f"{host} is reached at {called}, which is to be an address of this host",
                hint="give it on another machine, or let ssh know the host by another address",
            )


def choose(record: Record, reach: Reach, sockets: str) -> str:
    """Decide who translates, and say so in one line; HostError with what stops it.

    record: its role and translators are what `--via` asked for, and then what was chosen.
    sockets: the document of the process' sockets.
    """
    if record.role:
        return _WAYS[record.role](record, reach, sockets)
    found = list[str]()
    for way in _WAYS.values():
        try:
            chosen = way(record, reach, sockets)
        except (HostError, UnreachableError, UsageError) as error:
            found.append(str(error))
        else:
            return f"{chosen} ({'; '.join(found)})" if found else chosen
    raise HostError("; ".join(found), hint="--via names who translates (docs/topologies.md)")


def _choose_gateway(record: Record, reach: Reach, sockets: str) -> str:
    [target] = record.translators or [LOCAL]
    gateway = reach(target, GATEWAY)
    if found := check(gateway, record, GATEWAY, sockets):
        raise HostError(f"{gateway} is no gateway for this move: {found}")
    record.role, record.translators = GATEWAY, [gateway.target]
    return f"{gateway} translates, as the gateway"


def _choose_relay(record: Record, reach: Reach, sockets: str) -> str:
    source = reach(record.source, "source")
    record.vias = _read_vias(source, record, sockets)
    record.role, record.translators = RELAY, [source.target]
    return f"{source} goes on receiving for OLD, as a relay from {', '.join(record.vias)}"


def _choose_peers(record: Record, reach: Reach, sockets: str) -> str:
    peers = {peer for _, peer in _find_ends(json.loads(sockets))}
    if not record.netns.get("destination"):  # else lo carries those that are there
        peers -= read_addresses(reach(record.destination, "destination"))
    if not (peers or record.translators):
        raise HostError("no connection has a peer at another host, which could translate for it")
    if not record.role and len(peers) > _UNASKED:
        raise HostError(f"{len(peers)} peers' hosts are not asked unless by --via peers")
    hosts = _reach_peers(record, reach, sorted(peers, key=str))
    for host in hosts:
        host.role = PEER  # this host may have been asked whether it is the gateway
        if found := check(host, record, PEER, sockets):
            raise HostError(f"{host} cannot translate for the peers there: {found}")
    record.role, record.translators = PEER, [host.target for host in hosts]
    return f"{name_translators(hosts)}, as the peers' own hosts"


_WAYS = {GATEWAY: _choose_gateway, RELAY: _choose_relay, PEER: _choose_peers}


def name_translators(hosts: Sequence[Host]) -> str:
    """`HOST translates`, or the names of more."""
    verb = "translates" if len(hosts) == 1 else "translate"
    return f"{', '.join(map(str, hosts))} {verb}"


def _reach_peers(record: Record, reach: Reach, peers: Sequence[Address]) -> list[Host]:
    """The hosts of all *peers*, each once: those that were named, or where each has its address.

    One after the other: a host with two addresses is not to be asked twice.
    """
    hosts = [reach(target, PEER) for target in record.translators]
    known = {address for host in hosts for address in read_addresses(host)}
    ends = {end: read_addresses(reach(end, "")) for end in (record.source, record.destination)}
    for peer in peers:
        for end in (end for end, addresses in ends.items() if peer in addresses):
            raise HostError(f"peer {peer} is at {end} itself")
        if peer in known:
            continue
        if record.translators:
            raise HostError(f"peer {peer} is at no host of --via peer:HOST")
        host = reach(_name_peer(record, peer), PEER)
        if peer not in (found := read_addresses(host)):
            raise HostError(f"{host} lacks the address {peer}: its peers are behind it")
        known |= found
        hosts.append(host)
    return hosts


def _name_peer(record: Record, peer: Address) -> str:
    """The host of that address to ssh: `local`, or the same user as at the source."""
    if _is_here(peer):
        return LOCAL
    hosts = (record.source, record.destination)
    user = next((host.rpartition("@")[0] for host in hosts if host != LOCAL), "")
    return f"{user}@{peer}" if user else str(peer)


def _is_here(address: Address) -> bool:
    """Whether this host would speak to *address* from that very one."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((str(address), 9))  # which sends nothing
        except OSError:
            return False
        return bool(asking.getsockname()[0] == str(address))


def read_boot(host: Host) -> str:
    """Another one after each boot of *host*."""
    return host.run("cat", "/proc/sys/kernel/random/boot_id").stdout.strip()


def read_addresses(host: Host) -> frozenset[Address]:
    """All addresses of its devices but lo's own."""
    devices = json.loads(host.run("ip", "-json", "address").stdout)
    found = (parse_address(one["local"]) for each in devices for one in each["addr_info"])
    return frozenset(address for address in found if not address.is_loopback)


def check(host: Host, record: Record, role: str, sockets: str) -> str:
    """What stops the move at a site of *role* at *host*, as natkeep's check says; else empty.

    RefusedError for what the process has, which is the fault of no host.
    """
    # By a relay nothing is prepared for a process that lives, so its connections alone are told.
    listed = _as_list(json.loads(sockets)) if record.vias else sockets
    words = ["check", record.id, *record.options(), "--site", record.site(role)]
    words += ["--connections", "-", "--json"]
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
    words = ["plan", record.id, *record.options(), "--site", record.site(RELAY)]
    words += ["--connections", "-", "--json"]
    document = source.natkeep(*words, stdin=_as_list(json.loads(sockets))).document()
    return [via for site in document["sites"] for via in site.get("via", [])]


def _as_list(document: dict[str, Any]) -> str:
    """What is kept as lines of `[udp] LOCAL PEER`, and `udp LOCAL *`."""
    words = {"tcp": "", "udp": "udp "}
    kept = (one for one in document["sockets"] if one["kept"])
    lines = (f"{words[one['protocol']]}{one['local']} {one['peer'] or '*'}" for one in kept)
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))
