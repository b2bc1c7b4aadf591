"""kernel/other_rules.py: real rules read, and followed by plan/other_rules.py; both families."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from natkeep.kernel.netns import entered
from natkeep.kernel.other_rules import read_ruleset
from natkeep.plan.criu_lock import DumpLock, NetworkLock, render_restoration, render_table
from natkeep.plan.other_rules import follow, without_lock
from natkeep.plan.packet import ESTABLISHED, NEW, Packet
from natkeep.plan.tuples import NO_CONNECTIONS, Endpoint, FourTuple

pytestmark = pytest.mark.root
Run = Callable[..., str]

OUT = {
    4: FourTuple(Endpoint.parse("10.88.0.5:5000"), Endpoint.parse("10.1.0.2:50001")),
    6: FourTuple(Endpoint.parse("[fd00:88::5]:5000"), Endpoint.parse("[fd00:1::2]:50001")),
}
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
NAT, FILTER = frozenset({"nat"}), frozenset({"filter"})


def effects(netns: str, version: int, hook: str, types: frozenset[str], state: int = NEW) -> list[
    tuple[str, bool]
]:  # fmt: skip
    packet = Packet(OUT[version], (2, "pod"), (3, "eth0"), state)
    with entered(netns):
        found = follow(read_ruleset(version), hook, packet, types)
    return [(effect.does, effect.sure) for effect in found]


MASQUERADES = [
    "{ip} saddr {net} oif {lo} masquerade",
    '{ip} saddr {net} oifname != "pod" masquerade',
    "{ip} saddr {net} {ip} daddr != {other} snat to {to}",
    'iifname "po*" tcp sport 5000 masquerade',
    "meta nfproto {nf} meta l4proto tcp tcp sport {{ 80, 5000 }} masquerade",
    "tcp sport 4000-6000 masquerade",
    "ct state new,untracked masquerade",
    "meta mark 0 counter masquerade",
]
WORDS = {
    4: {"ip": "ip", "net": "10.88.0.0/16", "other": "224.0.0.0/4", "to": "10.3.0.2", "nf": "ipv4"},
    6: {"ip": "ip6", "net": "fd00:88::/64", "other": "ff00::/8", "to": "fd00:3::2", "nf": "ipv6"},
}


@EACH_VERSION
@pytest.mark.parametrize("rule", MASQUERADES)
def test_what_would_be_masqueraded_is_seen(netns: str, run: Run, version: int, rule: str) -> None:
    text = rule.format(lo='"lo"', **WORDS[version])
    chain = "type nat hook postrouting priority 100;"
    run(netns, "nft", "-f", "-", stdin=f"table inet n {{ chain p {{ {chain} {text}; }}; }}\n")
    sure = "lo" not in text  # whose index is another
    expected = [("snat" if "snat" in text else "masquerade", True)] if sure else []
    assert effects(netns, version, "postrouting", NAT) == expected


@EACH_VERSION
def test_what_an_exemption_accepts_or_is_not_meant_is_not(
    netns: str, run: Run, version: int
) -> None:
    words = WORDS[version]
    first = f"{words['ip']} daddr {OUT[version].destination.address} accept"
    second = f"{words['ip']} saddr {words['net']} masquerade"
    chain = "type nat hook postrouting priority 100;"
    script = f"table inet n {{ chain p {{ {chain} {first}; {second}; }}; }}\n"
    run(netns, "nft", "-f", "-", stdin=script)
    assert effects(netns, version, "postrouting", NAT) == []


@EACH_VERSION
def test_the_rules_of_iptables_are_followed_too(netns: str, run: Run, version: int) -> None:
    words, program = WORDS[version], {4: "iptables-nft", 6: "ip6tables-nft"}[version]
    base = [program, "-t", "nat", "-A", "POSTROUTING"]
    run(netns, *base, "-m", "mark", "!", "--mark", "0x4000/0x4000", "-j", "RETURN")
    run(netns, *base, "-j", "MASQUERADE")
    assert effects(netns, version, "postrouting", NAT) == []
    run(netns, program, "-t", "nat", "-F")
    comment = ("-m", "comment", "--comment", "cni")
    run(netns, *base, "-s", words["net"], "!", "-o", "pod", *comment, "-j", "MASQUERADE")
    assert effects(netns, version, "postrouting", NAT) == [("masquerade", True)]


@EACH_VERSION
def test_a_firewall_that_knows_old_alone_drops_and_one_that_asks_for_state_does_not(
    netns: str, run: Run, version: int
) -> None:
    words, base = WORDS[version], "type filter hook forward priority 0; policy drop;"
    other = {4: "10.2.0.10", 6: "fd00:2::10"}[version]
    plain = f"{words['ip']} saddr {other} accept; {words['ip']} daddr {other} accept;"
    run(netns, "nft", "-f", "-", stdin=f"table inet f {{ chain c {{ {base} {plain} }}; }}\n")
    assert effects(netns, version, "forward", FILTER, ESTABLISHED) == [("drop", True)]

    rule = ("rule", "inet", "f", "c", "ct", "state", "established,related", "accept")
    run(netns, "nft", "insert", *rule)
    assert effects(netns, version, "forward", FILTER, ESTABLISHED) == []


def test_a_set_that_others_fill_leaves_it_open_and_ours_is_left_out(netns: str, run: Run) -> None:
    script = """table inet f {
        set s { type ipv4_addr; flags timeout; elements = { 10.1.0.2 }; }
        chain c { type filter hook forward priority 0; ip daddr @s drop; }
    }
    table inet natkeep { chain c { type filter hook forward priority 0; drop; }; }
    """
    run(netns, "nft", "-f", "-", stdin=script)
    assert effects(netns, 4, "forward", FILTER) == [("drop", False)]


SETS = {
    4: {"type": "ipv4_addr", "ip": "ip", "net": "10.0.0.0/8", "to": "10.1.0.1-10.1.0.9"},
    6: {"type": "ipv6_addr", "ip": "ip6", "net": "fd00::/16", "to": "fd00:1::1-fd00:1::9"},
}
LOOK_UPS = [
    "{ip} saddr {{ {net}, {other} }} drop",
    "{ip} daddr @ranges drop",
    "{ip} daddr . tcp dport @both drop",
    "{ip} saddr . {ip} daddr @plain drop",
    "tcp sport vmap {{ 22 : accept, 5000 : jump j }}",
    "tcp sport vmap {{ 22 : accept, * : drop }}",
    "{ip} saddr . tcp sport vmap {{ {net} . 4000-6000 : drop }}",
    "meta mark set tcp sport map {{ 22 : 1, 5000 : 7 }}; meta mark 7 drop",
    "ct state vmap {{ established : accept, new : drop }}",
    "tcp flags & (fin | syn | rst | ack) == ack drop",
]


@EACH_VERSION
@pytest.mark.parametrize("rule", LOOK_UPS)
def test_what_sets_and_maps_have_is_what_the_kernel_says(
    netns: str, run: Run, version: int, rule: str
) -> None:
    words = {**SETS[version], "other": WORDS[version]["other"]}
    text = rule.format(**words).replace("; ", "\n")
    ends = OUT[version]
    script = """table inet f {{
        set ranges {{ type {type}; flags interval; elements = {{ {to} }}
        }}
        set both {{ type {type} . inet_service; flags interval; elements = {{ {net} . 50000-51000 }}
        }}
        set plain {{ type {type} . {type}; elements = {{ {saddr} . {daddr} }}
        }}
        chain j {{ drop
        }}
        chain c {{ type filter hook forward priority 0
            {text}
        }}
    }}
    """.format(text=text, saddr=ends.source.address, daddr=ends.destination.address, **words)
    run(netns, "nft", "-f", "-", stdin=script)
    assert effects(netns, version, "forward", FILTER)[-1:] == [("drop", True)]


DOES = [
    ("nft", "ct zone set 5", "zone"),
    ("nft", 'ct helper set "h"', "helper"),
    ("nft", "tcp dport 50001 synproxy mss 1460 wscale 7", "synproxy"),
    ("nft", "notrack", "notrack"),
    ("nft", "ct mark set 9", "connmark 9"),
    ("nft", "meta mark set ct mark", "mark -1"),
    ("iptables", "-j CONNMARK --set-mark 9", "connmark 9"),
    ("iptables", "-j CONNMARK --save-mark", "connmark 0"),
    ("iptables", "-j CONNMARK --restore-mark", "mark -1"),
    ("iptables", "-j CT --notrack", "notrack"),
    ("iptables", "-j CT --zone 5", "zone"),
    ("iptables", "-p tcp -m conntrack --ctstate UNTRACKED,NEW -j MARK --set-mark 9", "mark 9"),
    ("iptables", "-p tcp -m multiport --sports 22,4000:6000 -j MARK --set-mark 9", "mark 9"),
]


@EACH_VERSION
@pytest.mark.parametrize(("program", "rule", "expected"), DOES)
def test_what_a_rule_does_beside_dropping(
    netns: str, run: Run, version: int, program: str, rule: str, expected: str
) -> None:
    """Of iptables' rules these are in the raw table, where they may stand."""
    hook = "prerouting"
    if program == "iptables":
        words = [{4: "iptables-nft", 6: "ip6tables-nft"}[version], "-t", "raw", "-A", "PREROUTING"]
        run(netns, *words, *rule.split())
    else:
        hook = "forward" if "synproxy" in rule else "prerouting"
        script = f"""table inet f {{
            ct helper h {{ type "ftp" protocol tcp
            }}
            chain c {{ type filter hook {hook} priority {0 if hook == "forward" else "raw"}
                {rule}
            }}
        }}
        """
        run(netns, "nft", "-f", "-", stdin=script)
    assert effects(netns, version, hook, FILTER) == [(expected, True)]


def test_a_limit_may_match_or_not_and_a_device_has_chains_of_its_own(netns: str, run: Run) -> None:
    script = """table inet f {
        limit l { rate 5/second
        }
        chain c { type filter hook forward priority 0
            limit name "l" drop
        }
    }
    table netdev f { chain c { type filter hook ingress device "lo" priority 0
            tcp sport 5000 drop
        }
    }
    """
    run(netns, "nft", "-f", "-", stdin=script)
    assert effects(netns, 4, "forward", FILTER) == [("drop", False)]
    with entered(netns):
        for device, count in ((1, "lo"), 1), ((3, "eth0"), 0):
            found = follow(read_ruleset(4), "ingress", Packet(OUT[4], iif=device), FILTER)
            assert len(found) == count


RUN = "8e2b6e18-503e-446d-ba65-00714c6feaa3"


def dropped_at_end(netns: str, version: int, run_id: str | None) -> list[str]:
    """Where what is delivered and sent is dropped for sure, a restore of *run_id* aside."""
    with entered(netns):
        ruleset = without_lock(read_ruleset(version), run_id)
    ways = (("input", Packet(OUT[version].reply())), ("output", Packet(OUT[version])))
    return [
        effect.where
        for hook, packet in ways
        for effect in follow(ruleset, hook, packet, FILTER)
        if effect.does == "drop" and effect.sure
    ]


@EACH_VERSION
def test_the_lock_of_a_restore_is_no_rule_of_others_but_that_of_another_dump_is(
    netns: str, run: Run, version: int
) -> None:
    """CRIU locks a namespace that exists already before it restores into it."""
    lock = DumpLock(NetworkLock.NFTABLES, RUN, whole=True)
    run(netns, "nft", "-f", "-", stdin="\n".join(render_table(lock, NO_CONNECTIONS)) + "\n")
    both = [f"inet {lock.table} {chain}" for chain in ("input", "output")]
    assert dropped_at_end(netns, version, RUN) == []
    assert dropped_at_end(netns, version, "another") == both
    assert dropped_at_end(netns, version, None) == both

    base = "type filter hook input priority 0;"
    run(netns, "nft", "-f", "-", stdin=f"table inet f {{ chain c {{ {base} drop; }}; }}\n")
    assert dropped_at_end(netns, version, RUN) == ["inet f c"]


@EACH_VERSION
@pytest.mark.parametrize("whole", [True, False])
def test_the_lock_in_a_filter_table_is_left_out_and_what_is_behind_it_is_seen(
    netns: str, run: Run, version: int, *, whole: bool
) -> None:
    program = {4: "iptables-nft", 6: "ip6tables-nft"}[version]
    lines = render_restoration(DumpLock(NetworkLock.IPTABLES, whole=whole), [OUT[version].reply()])
    run(netns, f"{program}-restore", "--noflush", stdin="\n".join(lines) + "\n")
    assert effects(netns, version, "output", FILTER) == [("drop", True)]
    assert dropped_at_end(netns, version, RUN) == []

    run(netns, program, "-A", "OUTPUT", "-p", "tcp", "--sport", "5000", "-j", "DROP")
    ip = {4: "ip", 6: "ip6"}[version]
    assert dropped_at_end(netns, version, RUN) == [f"{ip} filter OUTPUT"]
