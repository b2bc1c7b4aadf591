"""Who translates for the peers of a migration: what is asked for, what can, and what is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from natkeep.errors import RefusedError, UnreachableError, UsageError
from natkeep.migrate.host import Answer, Host, HostError, Ssh
from natkeep.migrate.record import Record
from natkeep.migrate.way import Reach, choose, parse_via, refuse_cut_off
from natkeep.plan.tuples import parse_address

OLD, PEERS = "10.2.0.10", ("10.1.0.2", "10.1.0.3")
ALL = {"root@a": [OLD], "root@b": ["10.3.0.20"], **{f"root@{peer}": [peer] for peer in PEERS}}
"""The hosts by their names, and the addresses of each."""


def sockets(*peers: str) -> str:
    rows = [
        {"kept": True, "protocol": "tcp", "local": f"{OLD}:80", "peer": f"{peer}:40000"}
        for peer in peers
    ]
    return json.dumps({"sockets": rows})


class Fake:
    """A host of these addresses, at which a site of one of *roles* could be prepared."""

    def __init__(self, target: str, addresses: list[str], roles: tuple[str, ...]) -> None:
        self.target, self.addresses, self.roles, self.role = target, addresses, roles, ""

    def __str__(self) -> str:
        return self.target

    def run(self, *words: str) -> Answer:
        assert words == ("ip", "-json", "address")
        told = [{"addr_info": [{"local": each} for each in ["127.0.0.1", *self.addresses]]}]
        return Answer(0, json.dumps(told), "")

    def natkeep(self, *words: str, stdin: str, ok: object = ()) -> Answer:
        role = words[words.index("--site") + 1]
        if words[0] == "plan":
            if role not in self.roles:
                raise HostError(f"{self}: natkeep plan: no other address than OLD")
            return Answer(0, json.dumps({"sites": [{"via": ["10.2.0.11"]}]}), "")
        look = {"result": "stop", "what": f"not a {role}", "code": "refused"}
        return Answer(0, json.dumps({"looks": [] if role in self.roles else [look]}), "")


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("192.0.2.1 40000 192.0.2.2 22", ("192.0.2.1", "192.0.2.2")),
        ("fe80::1%eth0 40000 fe80::2%eth0 22", ("fe80::1", "fe80::2")),
        ("::ffff:192.0.2.1 40000 ::ffff:192.0.2.2 22", ("192.0.2.1", "192.0.2.2")),
        ("UNKNOWN 65535 UNKNOWN 65535", None),
        ("", None),
    ],
)
def test_what_sshd_tells_of_its_connection(tmp_path: Path, told: str, found: object) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\necho '{told}'\n")
    ssh.chmod(0o755)
    ends = Host("a", "source", Ssh((str(ssh),)), "web").find_ssh_ends()
    assert (ends and tuple(map(str, ends))) == found


@pytest.mark.parametrize(
    ("ends", "new", "told"),
    [
        ({"root@b": (OLD, "10.3.0.20")}, "10.3.0.20", f"root@b sees this host as {OLD}"),
        ({"root@a": ("127.0.0.1", OLD)}, "127.0.0.1", f"root@a is reached at {OLD}"),
        ({"root@a": ("10.9.0.1", OLD), "root@b": ("10.9.0.1", "10.3.0.20")}, "10.3.0.20", None),
    ],
)
def test_it_is_refused_where_ssh_would_be_cut_off(ends, new: str, told: str | None) -> None:
    """The second is given on the destination, whose address is one of this host."""

    class Seen(Fake):
        def find_ssh_ends(self) -> object:
            found = ends.get(self.target)
            return found and tuple(map(parse_address, found))

    hosts = [cast(Host, Seen(name, [], ())) for name in ("root@a", "root@b")]
    moved = record()
    moved.maps = [f"{OLD}={new}"]
    if told is None:
        refuse_cut_off(moved, hosts)
        return
    with pytest.raises(RefusedError, match=told):
        refuse_cut_off(moved, hosts)
    moved.netns["destination"] = "/run/netns/web"
    refuse_cut_off(moved, hosts)  # OLD will be the container's


def reach(hosts: Mapping[str, list[str]] = ALL, **roles: str) -> tuple[Reach, list[str]]:
    """Hosts to be reached, and the names of those that were. roles: of `local`, a, b, and peers."""
    asked = list[str]()
    made = {
        name: Fake(name, addresses, (roles.get(name[-1:], roles.get("peers", "peer")),))
        for name, addresses in {**hosts, "local": []}.items()
    }
    made["local"].roles = (roles.get("local", ""),)

    def ask(name: str, role: str) -> Host:
        asked.append(name)
        if name not in made:
            raise UnreachableError(f"{name} cannot be reached: No route to host")
        return cast(Host, made[name])

    return ask, asked


def record(*via: str) -> Record:
    role, hosts = parse_via(via)
    return Record("web", "root@a", 7, "root@b", role, hosts, maps=[f"{OLD}=10.3.0.20"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ("", [])),
        (["relay"], ("relay", [])),
        (["peers"], ("peer", [])),
        (["local"], ("gateway", ["local"])),
        (["root@gw"], ("gateway", ["root@gw"])),
        (["peer:c", "peer:root@d", "peer:c"], ("peer", ["c", "root@d"])),
    ],
)
def test_what_via_asks_for(words: list[str], found: tuple[str, list[str]]) -> None:
    assert parse_via(words) == found


@pytest.mark.parametrize("words", [["c", "d"], ["peer:c", "d"], ["peers", "relay"], ["peer:"]])
def test_one_way_at_a_time(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--via"):
        parse_via(words)


def test_the_peers_hosts_are_found_by_their_addresses() -> None:
    asked = record("peers")
    said = choose(asked, reach()[0], sockets(*PEERS, PEERS[0]))
    assert said == "root@10.1.0.2, root@10.1.0.3 translate, as the peers' own hosts"
    assert (asked.role, asked.translators) == ("peer", ["root@10.1.0.2", "root@10.1.0.3"])


def test_a_host_with_several_addresses_is_asked_once() -> None:
    """Two `natkeep serve` of one id at one host would take each other's place."""
    asked = record("peers")
    hosts = {**ALL, "root@10.1.0.2": [*PEERS]}
    ask, names = reach(hosts)
    choose(asked, ask, sockets(*PEERS))
    assert asked.translators == ["root@10.1.0.2"]
    assert "root@10.1.0.3" not in names


def test_hosts_that_were_named_are_all_that_is_asked() -> None:
    asked = record("peer:c", "peer:d")
    hosts = {**ALL, "c": [PEERS[1], "10.9.0.1"], "d": [PEERS[0]]}
    said = choose(asked, reach(hosts)[0], sockets(*PEERS))
    assert said == "c, d translate, as the peers' own hosts"
    assert asked.translators == ["c", "d"]


def test_a_host_that_was_named_needs_no_peer_yet() -> None:
    """Of a UDP server, or with --listeners; its own check says whether that is right."""
    asked = record("peer:c")
    nothing = json.dumps({"sockets": []})
    assert choose(asked, reach({**ALL, "c": []})[0], nothing).startswith("c translates")
    with pytest.raises(HostError, match="no connection has a peer"):
        choose(record("peers"), reach()[0], nothing)


def test_peers_at_the_destination_need_no_host() -> None:
    asked = record("peers")
    choose(asked, reach()[0], sockets(PEERS[0], "10.3.0.20"))
    assert asked.translators == ["root@10.1.0.2"]


@pytest.mark.parametrize(
    ("via", "peers", "told"),
    [
        (["peers"], ["10.1.0.9"], "root@10.1.0.9 cannot be reached"),
        (["peers"], [OLD], f"peer {OLD} is at root@a itself"),
        (["peers"], ["10.3.0.20"], "no connection has a peer at another host"),
        (["peer:root@10.1.0.2"], PEERS, "peer 10.1.0.3 is at no host of --via peer:HOST"),
    ],
)
def test_a_peer_that_no_host_can_translate_for_is_named(via, peers, told: str) -> None:
    asked = record(*via)
    before = [*asked.translators]
    with pytest.raises((HostError, UnreachableError), match=told):
        choose(asked, reach()[0], sockets(*peers))
    assert asked.translators == before


def test_a_host_that_has_the_peer_behind_it_is_named() -> None:
    """As behind a masquerading router."""
    ask, _ = reach({**ALL, "root@10.1.0.2": ["192.168.0.1"]})
    with pytest.raises(HostError, match=r"lacks the address 10\.1\.0\.2"):
        choose(record("peers"), ask, sockets(*PEERS))


def test_a_peers_host_whose_check_stops_is_named() -> None:
    ask, _ = reach(peers="none")
    with pytest.raises(HostError, match=r"root@10\.1\.0\.2 cannot .* not a peer \(refused\)"):
        choose(record("peers"), ask, sockets(*PEERS))


@pytest.mark.parametrize(
    ("roles", "chosen", "said"),
    [
        ({"local": "gateway", "a": "relay"}, ("gateway", ["local"]), "local translates, as the"),
        ({"a": "relay"}, ("relay", ["root@a"]), "as a relay from 10.2.0.11 (local is no gateway"),
        ({}, ("peer", ["root@10.1.0.2"]), "peers' own hosts (local is no gateway"),
    ],
)
def test_unasked_the_first_that_can_is_chosen_and_it_is_said_why(roles, chosen, said) -> None:
    unasked = record()
    ask, names = reach(**roles)
    assert said in choose(unasked, ask, sockets(PEERS[0]))
    assert (unasked.role, unasked.translators) == chosen
    # A peer's host is asked only where nothing else is left.
    assert ("root@10.1.0.2" in names) == (chosen[0] == "peer")


def test_where_nothing_can_every_reason_is_told() -> None:
    with pytest.raises(HostError) as error:
        choose(record(), reach()[0], sockets("10.1.0.9"))
    for reason in ("is no gateway", "no other address than OLD", "10.1.0.9 cannot be reached"):
        assert reason in str(error.value)
    many = [f"10.1.1.{number}" for number in range(9)]
    ask, names = reach()
    with pytest.raises(HostError, match="9 peers' hosts are not asked"):
        choose(record(), ask, sockets(*many))
    assert not {f"root@{peer}" for peer in many} & {*names}
