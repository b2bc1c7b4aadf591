"""`natkeep check` about a move, and prepare, which refuses what it stops: in real namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from natkeep.cli import main
from natkeep.kernel import survey
from natkeep.kernel.netns import entered
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lifecycle.other_rules import judge
from natkeep.plan.move import Mode, Site
from natkeep.plan.roles import Role

MAPS = {4: "10.2.0.10=10.3.0.20", 6: "fd00:2::10=fd00:3::20"}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
PEERS = {4: "10.1.0.2", 6: "fd00:1::2"}
Natkeep = Callable[..., subprocess.CompletedProcess[str]]


class Network:
    """A gateway with the networks of peers, OLD and NEW, and a destination in the last."""

    def __init__(self, make_netns: Callable[[], str], place: Path) -> None:
        self.gateway, self.destination, self.rest = (make_netns() for _ in range(3))
        self.source = ""
        self.place = place
        for number, (name, other) in enumerate(
            (("near", self.rest), ("home", self.rest), ("far", self.destination)), 1
        ):
            self.ip(
                f"link add {name} netns {self.gateway} type veth peer name {name} netns {other}"
            )
            for netns, host in ((self.gateway, "1"), (other, {3: "20"}.get(number, "9"))):
                self.ip(f"-n {netns} link set {name} up")
                self.ip(f"-n {netns} address add 10.{number}.0.{host}/24 dev {name}")
                self.ip(f"-n {netns} address add fd00:{number}::{host}/64 dev {name} nodad")
        self.ip(f"-n {self.destination} route add default via 10.3.0.1")
        self.ip(f"-n {self.destination} -6 route add default via fd00:3::1")
        for netns in (self.gateway, self.destination, self.rest):
            await_addresses(netns)

    def ip(self, line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True)

    def run(self, netns: str, *words: str) -> int:
        return subprocess.run(["ip", "netns", "exec", netns, *words]).returncode

    def nft(self, netns: str, script: str) -> None:
        command = ["ip", "netns", "exec", netns, "nft", "-f", "-"]
        subprocess.run(command, input=script, text=True, check=True)

    def natkeep(
        self,
        verb: str,
        version: int,
        *more: str,
        peer: str = "",
        port: int = 5000,
        sites: tuple[str, ...] = ("gateway", "destination"),
        udp: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """A verb about one connection, and one of UDP besides if asked for."""
        old = MAPS[version].partition("=")[0]
        ends = [f"[{end}]" if version == 6 else end for end in (old, peer or PEERS[version])]
        text = f"{ends[0]}:{port} {ends[1]}:50001\n"
        text += f"udp {text}" * udp
        named = [f"{site}={getattr(self, site)}" for site in sites]
        words = [*verb.split(), "--map", MAPS[version], "--connections", "-", *more]
        words += [word for site in named for word in ("--site", site)]
        state = str(self.place / "state")
        command = [sys.executable, "-m", "natkeep.cli", "--state-dir", state, *words]
        return subprocess.run(command, input=text, text=True, capture_output=True)

    def codes(self, version: int, *more: str, **about: Any) -> list[str]:
        """The codes that stop a move, as `check --json` has them."""
        said = self.natkeep("check", version, "--json", *more, **about)
        document = json.loads(said.stdout)
        codes = [one["code"] for one in document["looks"] if one["result"] == "stop"]
        assert said.returncode == (6 if codes else 0), said.stderr
        assert document["stops"] == len(codes)
        return codes


@pytest.fixture
def network(make_netns: Callable[[], str], tmp_path: Path) -> Network:
    return Network(make_netns, tmp_path)


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_move_that_nothing_stops_says_so_in_its_last_line(network: Network, version: int) -> None:
    said = network.natkeep("check", version)
    lines = said.stdout.splitlines()
    assert said.returncode == 0, said.stdout + said.stderr
    assert lines[0] == "ok    1 connection can be kept"
    assert lines[-1] == "nothing stops this move"
    assert any("via" in line and "dev far" in line for line in lines)
    assert any("no other host on the link has NEW" in line for line in lines)
    assert network.natkeep("prepare web", version).returncode == 0


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_what_check_stops_prepare_refuses_and_changes_nothing(
    network: Network, version: int
) -> None:
    neighbour = {4: "10.3.0.7", 6: "fd00:3::7"}[version]
    assert network.codes(version, peer=neighbour) == ["peer-on-link"]

    said = network.natkeep("prepare web", version, peer=neighbour)

    assert said.returncode == 4
    assert f"peer {neighbour} is on NEW's link far" in said.stderr
    assert not (network.place / "state" / "web.journal").exists()


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_forwarding_that_is_off_stops_a_move(network: Network, version: int) -> None:
    setting = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}[version]
    command = ["ip", "netns", "exec", network.gateway, "sysctl", "-qw", f"{setting}=0"]
    subprocess.run(command, check=True)
    assert network.codes(version) == ["forwarding-off"]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_firewall_that_knows_old_alone_stops_a_move(network: Network, version: int) -> None:
    ip, old = {4: ("ip", "10.2.0.10"), 6: ("ip6", "fd00:2::10")}[version]
    network.nft(
        network.gateway,
        "table inet f { chain c { type filter hook forward priority 0; policy drop; "
        f"{ip} saddr {old} accept; {ip} daddr {old} accept; }}; }}\n",
    )
    assert network.codes(version) == ["dropped"]
    network.nft(network.gateway, "insert rule inet f c ct state established accept\n")
    assert network.codes(version) == []


def test_a_flowtable_stops_mode_stateless_and_is_named_in_the_other() -> None:
    offloads = {("flow offload", "inet f c"): "10.1.0.2:50001 > 10.3.0.20:5000"}
    site = Site(Role.GATEWAY)
    assert [one.code for one in judge(site, offloads, Mode.STATELESS)] == ["flowtable-past-rules"]
    assert [one.code for one in judge(site, offloads, Mode.STATEFUL)] == ["flowtable"]


DROPS = {
    "gateway, before OLD becomes NEW": ("gateway", "prerouting", -150, "{ip} daddr {old} drop"),
    "gateway, from NEW": ("gateway", "prerouting", -150, 'iifname "far" {ip} saddr {new} drop'),
    "gateway, to NEW": ("gateway", "postrouting", 0, "{ip} daddr {new} drop"),
    "gateway, as OLD": ("gateway", "postrouting", 100, "{ip} saddr {old} drop"),
    "destination, to NEW": ("destination", "prerouting", -300, "{ip} daddr {new} drop"),
    "destination, to OLD": ("destination", "input", 0, "{ip} daddr {old} drop"),
    "destination, from OLD": ("destination", "output", 0, "{ip} saddr {old} drop"),
    "destination, as NEW": ("destination", "postrouting", 100, "{ip} saddr {new} drop"),
}
PASSES = [
    ("gateway", "prerouting", -110, "{ip} daddr {old} drop"),
    ("gateway", "postrouting", 70, "{ip} saddr {old} drop"),
    ("destination", "prerouting", -110, "{ip} daddr {new} drop"),
    ("destination", "postrouting", 70, "{ip} saddr {new} drop"),
]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_what_drops_a_packet_anywhere_on_its_way_stops_a_move(
    network: Network, version: int
) -> None:
    """It has OLD's or NEW's address by the priority of the chain."""
    old, new = MAPS[version].split("=")
    words = {"ip": {4: "ip", 6: "ip6"}[version], "old": old, "new": new}
    for expected, cases in (["dropped"], DROPS.values()), ([], PASSES):
        for where, hook, priority, rule in cases:
            netns = getattr(network, where)
            chain = f"type filter hook {hook} priority {priority}; {rule.format(**words)};"
            network.nft(netns, f"table inet f {{ chain c {{ {chain} }}; }}\n")
            assert network.codes(version) == expected, (where, hook, priority)
            network.nft(netns, "delete table inet f\n")


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_the_peers_own_host_has_to_reach_new_and_a_neighbour_of_new_is_warned_of(
    network: Network, version: int
) -> None:
    neighbour = {4: "10.3.0.7", 6: "fd00:3::7"}[version]
    said = network.natkeep("check", version, peer=neighbour, sites=("destination",))
    assert said.returncode == 0
    assert "warn  needs-peer-site" in said.stdout

    own = {4: "10.1.0.9", 6: "fd00:1::9"}[version]
    network.peer = network.rest
    both: dict[str, Any] = {"peer": own, "sites": ("peer", "destination")}
    assert network.codes(version, **both) == ["no-way-there"]
    assert network.natkeep("prepare web", version, **both).returncode == 4
    via = own.removesuffix("9") + "1"
    network.ip(
        f"-n {network.rest} -{version} route add {MAPS[version].partition('=')[2]} via {via}"
    )
    assert network.codes(version, **both) == []
    assert network.natkeep("prepare web", version, **both).returncode == 0
    routes = ["ip", "-n", network.rest, f"-{version}", "route", "show", "dev", "lo"]
    assert MAPS[version].partition("=")[0] not in subprocess.check_output(routes, text=True)


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_what_others_do_to_kept_packets_is_named(network: Network, version: int) -> None:
    script = """table inet f {
        ct helper h { type "ftp" protocol tcp
        }
        map m { type inet_service : verdict; elements = { 5000 : jump n }
        }
        chain n { notrack
        }
        chain r { type filter hook prerouting priority raw; ct zone set 4
            tcp sport vmap @m
        }
        chain c { type filter hook forward priority 0; tcp dport 5000 ct helper set "h"
            tcp dport 5000 ct state invalid synproxy mss 1460 wscale 7
        }
    }
    """
    network.nft(network.gateway, script)
    document = json.loads(network.natkeep("check", version, "--json").stdout)
    named = {one["code"] for one in document["looks"]}
    assert {"helper", "zone", "not-tracked", "synproxy"} <= named
    assert document["stops"] == 0
    said = network.natkeep("prepare web", version)
    assert said.returncode == 0
    assert "warn helper: gateway" in said.stderr
    assert "warn synproxy: gateway" in said.stderr
    assert main(["--state-dir", str(network.place / "state"), "teardown", "web", "--yes"]) == 0
    for code in ("helper", "zone", "not-tracked", "synproxy", "tproxy", "queued", "flowtable"):
        assert main(["explain", code]) == 0

    # A firewall that lets pass what conntrack knows drops what it was told not to track.
    base = "type filter hook forward priority 0; policy drop; ct state established accept;"
    network.nft(network.gateway, f"table inet g {{ chain c {{ {base} }}; }}\n")
    assert network.codes(version) == ["dropped"]
    # And a SYNPROXY drops all that was not begun with it.
    network.nft(network.gateway, "delete table inet g\n")
    network.nft(network.gateway, "add rule inet f c tcp sport 5000 ct state untracked synproxy\n")
    assert network.codes(version) == ["dropped"]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
@pytest.mark.parametrize("where", ["gateway", "source"])
def test_headers_that_rules_rewrite_stop_a_move(network: Network, version: int, where: str) -> None:
    """A port that is turned without conntrack: no entry tells that the peer knows another."""
    network.source = network.rest
    base = "type filter hook {} priority -310;"
    text = f"""table inet r {{
        chain i {{ {base.format("prerouting")} tcp dport 80 tcp dport set 5000
        }}
        chain o {{ {base.format("output" if where == "source" else "prerouting")}
            tcp sport 5000 tcp sport set 80
        }}
    }}
    """
    network.nft(getattr(network, where), text)
    code = {"gateway": "rewritten", "source": "source-translates"}[where]
    assert network.codes(version, sites=("gateway", "destination", "source")) == [code]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_rules_of_iptables_legacy_are_warned_of(network: Network, version: int) -> None:
    program = {4: "iptables-legacy", 6: "ip6tables-legacy"}[version]
    command = ["ip", "netns", "exec", network.gateway, program, "-P", "FORWARD", "DROP"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no iptables-legacy, or not in this kernel")
    said = network.natkeep("prepare web", version)
    assert said.returncode == 0
    assert "warn legacy-iptables: gateway" in said.stderr
    assert network.natkeep("check", version).stdout.count("legacy-iptables") == 1


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_rule_about_old_alone_stops_a_move_and_one_about_new_is_carried_over(
    network: Network, version: int
) -> None:
    old, new = MAPS[version].split("=")
    at = f"-n {network.destination} -{version}"
    network.ip(f"{at} rule add from {new} lookup 100")
    network.ip(f"{at} route add default via {new.replace('20', '1')} table 100")
    said = network.natkeep("check", version)
    assert f"`ip rule from {new}` will hold for OLD {old}, too" in said.stdout
    assert network.natkeep("prepare web", version).returncode == 0
    shown = ["ip", "-n", network.destination, f"-{version}", "rule"]
    assert f"from {old} lookup 100" in subprocess.check_output(shown, text=True)

    # What another program takes away is drift, and put back.
    network.ip(f"{at} rule del from {old} lookup 100")
    state = ["--state-dir", str(network.place / "state")]
    assert main([*state, "status", "web", "--strict"]) == 6
    assert main([*state, "repair", "web"]) == 0
    assert main([*state, "status", "web", "--strict"]) == 0
    assert f"from {old} lookup 100" in subprocess.check_output(shown, text=True)
    assert main([*state, "teardown", "web", "--yes"]) == 0
    assert f"from {old}" not in subprocess.check_output(shown, text=True)

    network.ip(f"{at} rule add from {old} lookup 200")
    assert network.codes(version) == ["old-routed-apart"]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
@pytest.mark.parametrize("where", ["gateway", "destination"])
def test_marks_that_rules_give_old_and_not_new_or_the_other_way_stop_a_move(
    network: Network, version: int, where: str
) -> None:
    """With two uplinks by `ip rule fwmark`: at a gateway OLD has the mark, at a destination NEW."""
    ip, ends = {4: "ip", 6: "ip6"}[version], MAPS[version].split("=")
    netns, hook, device, router = {
        "gateway": (network.gateway, "filter hook prerouting", "home", "10.2.0.9 fd00:2::9"),
        "destination": (network.destination, "route hook output", "wire", "10.9.0.9 fd00:9::9"),
    }[where]
    marked = ends[0 if where == "gateway" else 1]
    if where == "destination":
        network.ip(f"link add wire netns {netns} type veth peer name wire netns {network.rest}")
        network.ip(f"-n {netns} link set wire up")
        network.ip(f"-n {network.rest} link set wire up")
        network.ip(f"-n {netns} address add 10.9.0.20/24 dev wire")
        network.ip(f"-n {netns} address add fd00:9::20/64 dev wire nodad")
    script = f"type {hook} priority mangle; {ip} saddr {marked} meta mark set 0x2;"
    network.nft(netns, f"table inet w {{ chain c {{ {script} }}; }}\n")
    assert network.codes(version) == []

    via = router.split()[0 if version == 4 else 1]
    network.ip(f"-n {netns} -{version} route add default via {via} dev {device} table 200")
    network.ip(f"-n {netns} -{version} rule add fwmark 2 lookup 200")
    assert network.codes(version) == ["marked-apart"]

    both = f"{ip} saddr {{ {ends[0]}, {ends[1]} }} meta mark set 0x2"
    network.nft(netns, f"flush chain inet w c\nadd rule inet w c {both}\n")
    assert network.codes(version) == []


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_mark_that_new_connections_alone_get_stops_a_move(network: Network, version: int) -> None:
    """With two uplinks, answers follow the device that their connection came in by."""
    netns, new = network.destination, MAPS[version].partition("=")[2]
    network.ip(f"link add wire netns {netns} type veth peer name wire netns {network.rest}")
    for each in (netns, network.rest):
        network.ip(f"-n {each} link set wire up")
    network.ip(f"-n {netns} address add 10.9.0.20/24 dev wire")
    network.ip(f"-n {netns} address add fd00:9::20/64 dev wire nodad")
    router = {4: "10.9.0.9", 6: "fd00:9::9"}[version]
    network.ip(f"-n {netns} -{version} route add default via {new.replace('20', '1')} table 100")
    network.ip(f"-n {netns} -{version} rule add fwmark 2 lookup 100")
    network.ip(f"-n {netns} -{version} route replace default via {router} dev wire")
    script = """table inet w {{
        chain i {{ type filter hook prerouting priority mangle; {when} ct mark set 2; }}
        chain o {{ type route hook output priority mangle; meta mark set ct mark; }}
    }}
    """
    network.nft(netns, script.format(when="ct state new"))
    assert "marked-apart" in network.codes(version)
    network.nft(netns, "delete table inet w\n" + script.format(when=""))
    assert network.codes(version) == []


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_mark_by_which_peers_do_not_reach_new_stops_a_move(
    network: Network, version: int
) -> None:
    """It was made for OLD: the table has a route to it alone."""
    at, router = f"-n {network.gateway} -{version}", {4: "10.2.0.9", 6: "fd00:2::9"}[version]
    network.ip(f"{at} route add default via {router} table 200")
    network.ip(f"{at} rule add fwmark 5 lookup 200")
    base = "type filter hook prerouting priority mangle;"
    network.nft(
        network.gateway,
        f"table inet w {{ chain c {{ {base} tcp dport 5000 meta mark set 5; }}; }}\n",
    )
    assert network.codes(version) == ["marked-apart"]


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_filter_of_the_reverse_path_by_rules_drops_what_comes_in_elsewhere(
    network: Network, version: int
) -> None:
    """The destination's answers come to another device of the gateway than NEW is reached by."""
    near, far = {4: ("10.9.0.1", "10.9.0.20"), 6: ("fd00:9::1", "fd00:9::20")}[version]
    size, nodad = {4: (24, ""), 6: (64, " nodad")}[version]
    pair = f"uplink netns {network.gateway} type veth peer name uplink netns {network.destination}"
    network.ip(f"link add {pair}")
    for netns, address in ((network.gateway, near), (network.destination, far)):
        network.ip(f"-n {netns} link set uplink up")
        network.ip(f"-n {netns} address add {address}/{size} dev uplink{nodad}")
    base = "type filter hook prerouting priority mangle;"
    rule = "fib saddr . iif oif missing drop"
    network.nft(network.gateway, f"table inet w {{ chain c {{ {base} {rule}; }}; }}\n")
    assert network.codes(version) == []
    network.ip(f"-n {network.destination} -{version} route replace default via {near}")
    assert network.codes(version) == ["dropped"]


HOP_RULES = {
    "type nat hook postrouting priority 100; {ip} daddr != @local masquerade": "hop-translates",
    "type filter hook forward priority 0; policy drop; ct state established accept": "dropped",
    "type filter hook forward priority 0; policy drop; ct state established accept; "
    'iifname "far" accept': "",
    "type nat hook postrouting priority 100; {ip} saddr != @peers {ip} daddr != @peers "
    "masquerade": "",
}


@pytest.mark.root
@pytest.mark.needs("nftables")
@EACH_VERSION
def test_a_host_in_between_that_natkeep_runs_on_is_asked_for_its_rules(
    network: Network, version: int
) -> None:
    """The router is no site here, as the host of a container."""
    hop, peer = network.gateway, PEERS[version]
    for rule, code in HOP_RULES.items():
        kind = {4: "ipv4_addr", 6: "ipv6_addr"}[version]
        text = rule.format(ip={4: "ip", 6: "ip6"}[version])
        script = f"""table inet h {{
            set local {{ type {kind}; elements = {{ {MAPS[version].partition("=")[0]} }}
            }}
            set peers {{ type {kind}; elements = {{ {peer} }}
            }}
            chain c {{ {text}; }}
        }}
        """
        network.nft(hop, script)
        with entered(hop):
            assert network.codes(version, sites=("destination",)) == ([code] if code else []), rule
        network.nft(hop, "delete table inet h\n")
    setting = {4: "net.ipv4.conf.far.forwarding", 6: "net.ipv6.conf.all.forwarding"}[version]
    network.run(hop, "sysctl", "-qw", f"{setting}=0")
    with entered(hop):
        assert network.codes(version, sites=("destination",), udp=True) == ["forwarding-off"]
    network.run(hop, "sysctl", "-qw", f"{setting}=1")
    legacy = {4: "iptables-legacy", 6: "ip6tables-legacy"}[version]
    if network.run(hop, legacy, "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE") == 0:
        with entered(hop):
            said = network.natkeep("prepare web", version, sites=("destination",))
        assert "warn legacy-iptables: this host is between" in said.stderr


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_an_ipv6_route_that_names_new_as_its_source_stops_a_move(network: Network) -> None:
    at = f"-n {network.destination} -6"
    network.ip(f"{at} route del default")
    network.ip(f"{at} route add default from fd00:3::/64 via fd00:3::1 dev far")
    assert network.codes(6) == ["old-routed-apart"]
    network.ip(f"{at} route add fd00:1::2 from fd00:2::10 via fd00:3::1 dev far")
    assert network.codes(6) == []


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_what_prepare_would_refuse_is_a_finding(network: Network) -> None:
    network.ip(f"-n {network.destination} address del 10.3.0.20/24 dev far")
    said = network.natkeep("check", 4)
    assert said.returncode == 6
    assert "stop  refused" in said.stdout
    assert "NEW 10.3.0.20 is not an address of this namespace" in said.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["check", "web"], 2, "which move? --map OLD=NEW"),
        (["check", "--connections", "list"], 2, "which move? --map OLD=NEW"),
        (["check", "--map", MAPS[4]], 2, "which connections?"),
        (["check", "--map", MAPS[4], "--image", "gone"], 3, "cannot open gone"),
    ],
)
@pytest.mark.root
def test_bad_input_is_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--state-dir", str(tmp_path / "state"), *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"natkeep: {message}")
    assert not (tmp_path / "state").exists()


def test_without_rights_it_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "is_privileged", lambda: False)
    state = ["--state-dir", str(tmp_path / "state")]
    assert main([*state, "check", "--map", MAPS[4], "--image", "gone"]) == 5
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", "natkeep: no privileges: natkeep needs CAP_NET_ADMIN")
