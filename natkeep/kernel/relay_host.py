"""What a relay's host is asked, and the settings by which it passes packets on.

Rule: of settings only those are written that a step names, and what they were is in its prior. All
functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from ipaddress import ip_address

from natkeep.errors import RefusedError
from natkeep.kernel import conntrack_own, nftables_dump, path, rtnetlink, sock_diag, sysctl
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_ROUTE, Netlink, attributes
from natkeep.plan.base_chains import PASSING
from natkeep.plan.move import Move
from natkeep.plan.nft import TABLE
from natkeep.plan.relay import RelayFacts, Setting, forwarding_of, is_plain, routes_of
from natkeep.plan.step_undo import RestoreForwarding
from natkeep.plan.steps import Prior, SwitchForwarding
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections

_RTA_PREFSRC = 7
_PASSING = 0x01 | 0x08 | 0x20 | 0x40
"""IFA_F_TEMPORARY, DADFAILED, DEPRECATED and TENTATIVE: IPv6 addresses that do not last."""
_ALL = forwarding_of(6, "all")
_EPHEMERAL = "ipv4/ip_local_port_range"
"""Of both IP versions."""


def find_source(new: Address, olds: frozenset[Address]) -> Address | None:
    """The address that this host uses towards *new*, or another that is none of *olds*."""
    with Netlink(NETLINK_ROUTE) as netlink:
        answer = rtnetlink.look_up_route(netlink, new)
        lasting = {
            rtnetlink.local_address(found)
            for header, found in rtnetlink.read_addresses(netlink)
            if header[0] != socket.AF_INET6 or not _flags(found) & _PASSING
        }
    found = attributes(answer[rtnetlink.ROUTE.size :]) if answer else {}
    own = [ip_address(found[_RTA_PREFSRC])] if _RTA_PREFSRC in found else []
    for address in (*own, *rtnetlink.global_addresses(new.version)):
        if address not in olds and not address.is_link_local and address.packed in lasting:
            return address
    return None


def _flags(found: dict[int, bytes]) -> int:
    return int.from_bytes(found.get(rtnetlink.IFA_FLAGS, b""), sys.byteorder)


def survey_relay(translation: Translation, sources: tuple[Address, ...]) -> RelayFacts:
    """What stands here in the way of a relay, which has these *sources* for what it passes on."""
    new, protocol = translation.map.new, translation.protocol
    living = sock_diag.read_sockets(protocol)
    with closing(path.Links()) as links:
        routed = links.look_up(new)[0].kind == "unicast"
        local = frozenset(one for one in sources if links.is_local(one))
    low, _, high = (sysctl.read(_EPHEMERAL) or "").partition("\t")
    back = translation.inner.turned()
    taken = sock_diag.find_alive(back, living)
    for source in sources if taken is None else ():
        own = next(conntrack_own.find_own(back.at(source), protocol=protocol), None)
        if own is not None:
            taken = next(iter(Connections.of_records([own.record])))
            break
    return RelayFacts(
        routed, local, range(int(low or 1), int(high or 0) + 1), taken,
        len(sock_diag.find_kept(translation.kept, living)),
    )  # fmt: skip


def find_forwarding(move: Move, connections: Connections) -> tuple[str, ...]:
    """The settings to switch on so that what peers and NEW say of what is kept is passed on.

    connections: the move's, of TCP.
    """
    comments = [rule.comment for rule in nftables_dump.rules(TABLE, PASSING)]
    found: dict[str, None] = {}
    with closing(path.Links()) as links:
        for map_, *kept in zip(move.maps, *map(move.share, (connections, move.udp)), strict=True):
            version = map_.old.version
            peers = frozenset[bytes]().union(*(move.on_wire(some).peers() for some in kept))
            if version == 6 and (sysctl.read(_ALL.name) == "1" or not _knows_one_device()):
                found |= dict.fromkeys(_find_of_all_devices(comments))
                continue
            ends = (map_.new, *links.first(peers))
            for index in sorted({links.look_up(end)[1] for end in ends} - {0, rtnetlink.LOOPBACK}):
                setting = forwarding_of(version, links.device(index)[1])
                if _is_off(setting) or setting.is_of_natkeep(comments):
                    found[setting.name] = None
    return tuple(found)


def _knows_one_device() -> bool:
    """Whether one device alone can pass IPv6 on (Linux 6.17)."""
    return sysctl.read("ipv6/conf/default/force_forwarding") is not None


def _find_of_all_devices(comments: Sequence[str]) -> Iterator[str]:
    """The same where all devices have to, in this order (R3).

    Their forwarding purges the routes that routers have told of, and ends the hearing of more,
    unless accept_ra is 2. RefusedError where the way back would switch a device off that is on.
    """
    ours = _ALL.is_of_natkeep(comments)
    if sysctl.read(_ALL.name) == "1" and not ours:
        return
    for device in sysctl.names("ipv6/conf"):
        if device in ("all", "default", "lo"):
            continue
        if not ours and sysctl.read(f"ipv6/conf/{device}/forwarding") == "1":
            raise RefusedError(
                "this kernel cannot have one device alone pass IPv6 on, and net.ipv6.conf."
                f"{device}.forwarding would not outlive all.forwarding",
                hint="sysctl -w net.ipv6.conf.all.forwarding=1, and first accept_ra=2 of the "
                "devices that have a route by router advertisement",
            )
        routes = routes_of(device)
        if sysctl.read(routes.name) == routes.off or routes.is_of_natkeep(comments):
            _refuse_strange(device)
            yield routes.name
    yield _ALL.name


def _is_off(setting: Setting) -> bool:
    value = sysctl.read(setting.name)
    if value == setting.off:
        _refuse_strange(setting.device)
    return value == setting.off


def _refuse_strange(device: str) -> None:
    if not is_plain(device):
        raise RefusedError(f"forwarding is off for a device called {device!r}")


class ForwardingDriver(Driver[SwitchForwarding]):
    """A device passes packets on."""

    def apply(self, at: Place, step: SwitchForwarding, remember: Remember) -> Prior:
        """prior.facts["before"]: as the operator had it, which another move may have changed."""
        name, off = step.setting.name, step.setting.off
        ours = self._is_on_for_another(step.setting, step.move_id)
        prior = Prior(facts={"before": off if ours else sysctl.read(name) or off})
        remember(prior)
        if not sysctl.write(name, step.setting.on):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), name)
        return prior

    def revert(self, at: Place, undo: RestoreForwarding, prior: Prior) -> None:
        """As it was before, unless another move passes packets on by that device."""
        setting = Setting(undo.setting)
        if sysctl.read(undo.setting) is None:  # the device is gone
            return
        if not self._is_on_for_another(setting, undo.move_id):
            sysctl.write(undo.setting, str(prior.facts.get("before", setting.off)))

    @staticmethod
    def _is_on_for_another(setting: Setting, move_id: str) -> bool:
        comments = [rule.comment for rule in nftables_dump.rules(TABLE, PASSING)]
        return setting.is_of_natkeep(comments, move_id)
