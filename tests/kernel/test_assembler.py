"""kernel/assembler.py: what the kernel has of it is what it has of libnftables."""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from natkeep.errors import KernelError
from natkeep.kernel import nft, nftables
from natkeep.kernel.assembler import assemble
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink, attribute, attributes
from natkeep.kernel.netns import inside, open_namespace
from natkeep.kernel.statements import NotUnderstood
from natkeep.plan import guard
from natkeep.plan.move import Map, Mode, Move, Role, Site
from natkeep.plan.plan import make_plan
from natkeep.plan.ruleset import TABLE
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

GOLDEN = sorted(Path(__file__).parent.parent.glob("plan/golden/*.nft"))

LEFT_TO_LIBNFTABLES = (
    r"add element inet natkeep \S+ \{ \S+ \. .*",  # natkeep fills these in bulk, never as text
    r"add set .* flags dynamic; \}",
    r"add rule \S+ \S+ \S+ meta l4proto \{ icmp, ipv6-icmp \} jump errors",
    r".* return comment \S+",
)
"""All that has a form of its own."""

Shown = dict[int, object]
"""An object's attributes, by number."""

TABLES, CHAINS, RULES, SETS, ELEMENTS = 1, 4, 7, 10, 13
PASSING: dict[int, set[int]] = {TABLES: {4}, CHAINS: {2}, RULES: {3, 6}, SETS: {16, 19}}
"""What tells an object from others of its kind (handles, an address), and not what it is."""
USERDATA, TYPEOF = 13, 3


def is_understood(line: str) -> bool:
    try:
        assemble([line])
    except NotUnderstood:
        return False
    return True


def dump(netlink: Netlink, kind: int, body: bytes) -> Iterator[dict[int, bytes]]:
    for answer in netlink.request(10 << 8 | kind, NLM_F_DUMP, body):
        yield {0: answer[:1], **attributes(answer[4:])}


def user_data(told: bytes) -> list[bytes]:
    """Its entries, without the one in which nft 1.0.6 notes of what expression a type was made.

    It is empty, and `list` shows the type of the set with it and without.
    """
    found = []
    while told:
        entry, told = told[: 2 + told[1]], told[2 + told[1] :]
        if entry[0] != TYPEOF:
            found.append(entry)
    return found


def all_elements(netlink: Netlink, one: dict[int, bytes]) -> list[bytes]:
    """In an order of their own: a hash has none that two sets would share."""
    body = one[0] + bytes(3) + attribute(1, one[1]) + attribute(2, one[2])
    found = []
    for answer in dump(netlink, ELEMENTS, body):
        some = answer.get(3, b"")
        while some:
            length = struct.unpack_from("=H", some)[0] + 3 & ~3
            found.append(some[:length])
            some = some[length:]
    return sorted(found)


def ruleset() -> dict[int, list[Shown]]:
    """All that is in the namespace that we are in, in the kernel's own words."""
    seen: dict[int, list[Shown]] = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        for kind, passing in PASSING.items():
            seen[kind] = []
            for one in list(dump(netlink, kind, bytes(4))):
                shown: Shown = {n: value for n, value in one.items() if n not in passing}
                if kind == SETS:
                    shown[USERDATA] = user_data(one[USERDATA])
                    shown[ELEMENTS] = all_elements(netlink, one)
                seen[kind].append(shown)
    return seen


def load(netns: str, lines: Iterable[str], way: Callable[[list[str]], None]) -> tuple[object, str]:
    """Load *lines*, one after the other; what the kernel says then, and what nft does."""
    with inside(open_namespace(netns)):
        for line in lines:
            (way if is_understood(line) else nft.run_by_libnftables)([line])
        seen = ruleset()
        command = ["nft", "--json", "list", "ruleset"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        nft.run_by_libnftables(["flush ruleset"])
    return seen, re.sub(r"\"(handle|elem)\": (\d+|\[.*?\]\]?)", "", text)


def send(lines: list[str]) -> None:
    nftables.send_batch(assemble(lines))


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_kernel_has_the_same_of_both(file: Path, netns: str) -> None:
    lines = file.read_text().splitlines()

    ours, theirs = (load(netns, lines, way) for way in (send, nft.run_by_libnftables))

    assert "kept-web-0" in ours[1]
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
@pytest.mark.parametrize(("old", "new", "peer"), [
    ("10.2.0.10", "10.3.0.20", "10.1.0.2"), ("fd00:2::10", "fd00:3::20", "fd00:1::2"),
])  # fmt: skip
def test_so_it_has_of_a_guard(old: str, new: str, peer: str, role: Role, netns: str) -> None:
    """But for what it belongs to: it would be gone before one could look."""
    ends = Endpoint(ip_address(peer), 5000), Endpoint(ip_address(old), 80)
    move = Move("web", (Map(ip_address(old), ip_address(new)),), (Site(role, netns),))
    plan = make_plan(move, Connections.of([FourTuple(*ends)]))
    text = "\n".join(guard.render("web", plan.translations))
    lines = text.replace(guard.table_name("web"), TABLE).replace(" { flags owner; }", "")

    assert all(map(is_understood, text.replace(guard.table_name("web"), TABLE).splitlines()))
    ours, theirs = (load(netns, lines.splitlines(), way) for way in (send, nft.run_by_libnftables))
    assert "outer-0" in ours[1]
    assert ours == theirs


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_a_difference_would_show(netns: str) -> None:
    """One register, one octet, one order."""
    lines = GOLDEN[0].read_text().splitlines()
    other = [line.replace("fin | syn", "syn") for line in lines]

    ours, theirs = load(netns, lines, send), load(netns, other, nft.run_by_libnftables)

    assert ours[0] != theirs[0]
    assert ours[1] != theirs[1]


def golden_lines() -> list[str]:
    """Each form once, whatever move and address it is of."""
    forms: dict[str, str] = {}
    for file in GOLDEN:
        for line in file.read_text().splitlines():
            forms.setdefault(re.sub(r"[0-9a-f_:.]*[0-9][0-9a-f_:.]*", "", line), line)
    return list(forms.values())


def test_only_these_forms_are_left_to_libnftables() -> None:
    left = [line for line in golden_lines() if not is_understood(line)]

    assert left
    for line in left:
        assert any(re.fullmatch(form, line) for form in LEFT_TO_LIBNFTABLES), line
    for form in LEFT_TO_LIBNFTABLES:
        assert any(re.fullmatch(form, line) for line in left), form


@pytest.mark.parametrize(
    "line",
    [
        "",
        "list ruleset",
        "add table inet other",
        "add table ip natkeep",
        "add rule inet other gate drop",
        "add chain inet natkeep gate { type filter hook prerouting priority raw; }",
        "add chain inet natkeep gate { type filter hook nowhere priority 0; }",
        "add chain inet natkeep gate { type filter hook output priority 0; policy drop; }",
        "add set inet natkeep one { type ipv4_addr; flags interval; }",
        "add set inet natkeep one { type mark; }",
        "add map inet natkeep one { type ipv4_addr : ipv4_addr; }",
        "add element inet natkeep one { 10.1.0.0/16 }",
        "add element inet natkeep one { 10.1.0.2-10.1.0.9 }",
        "add element inet natkeep one { 10.1.0.2 timeout 1s }",
        "add element inet natkeep one { 70000 }",
        "add element inet natkeep one { http }",
        "add element inet natkeep one { 10.1.0.2 : goto elsewhere }",
        "delete rule inet natkeep gate handle first",
        "add rule inet natkeep gate",
        "add rule inet natkeep gate queue",
        "add rule inet natkeep gate counter drop",
        "add rule inet natkeep gate jump",
        "add rule inet natkeep gate tcp dport 80-90 drop",
        "add rule inet natkeep gate tcp dport != 80 drop",
        "add rule inet natkeep gate tcp flags syn drop",
        "add rule inet natkeep gate tcp flags & ( syn | urg ) == syn drop",
        "add rule inet natkeep gate tcp flags & ( syn ) < syn drop",
        "add rule inet natkeep gate udp dport 80 drop",
        "add rule inet natkeep gate ip saddr 10.1.0.0/16 drop",
        "add rule inet natkeep gate ip saddr != 10.1.0.2 drop",
        "add rule inet natkeep gate ip saddr",
        "add rule inet natkeep gate ip saddr . ip daddr @one drop",
        "add rule inet natkeep gate ip protocol tcp drop",
        "add rule inet natkeep gate ip saddr fd00::1 drop",
        "add rule inet natkeep gate ip6 saddr 10.1.0.2 drop",
        "add rule inet natkeep gate ip daddr set fd00::1",
        "add rule inet natkeep gate tcp dport 10.1.0.2 drop",
        "add rule inet natkeep gate ip saddr 80 drop",
        "add rule inet natkeep gate ip saddr vmap one",
        'add rule inet natkeep gate iif != "eth0" drop',
        'add rule inet natkeep gate iif "lo" drop',
        "add rule inet natkeep gate meta mark and 1 == 1 drop",
        "add rule inet natkeep gate dnat ip to 10.1.0.2",
        "add rule inet natkeep gate dnat ip to 10.1.0.2 : 80-90",
        "add rule inet natkeep gate dnat ip to fd00::1 : 80",
        "add rule inet natkeep gate snat ip6 to 10.1.0.2 : 80",
        "add rule arp natkeep asked ip saddr 10.1.0.2 drop",
        "add rule arp natkeep asked arp daddr ip @silent accept",
        "add rule arp natkeep asked arp saddr ether 00:00:00:00:00:01 drop",
    ],
)
def test_what_is_not_known_for_certain_is_not_assembled(line: str) -> None:
    assert not is_understood(line)


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_what_is_assembled_of_a_changed_line_is_what_libnftables_makes_of_it(netns: str) -> None:
    """Words left out, doubled, exchanged for others: it is not understood, or in the same way."""
    chance, compared = random.Random(6), 0
    lines = [line for line in golden_lines() if is_understood(line)]
    # Of what type a set is libnftables alone knows, so none is exchanged for another.
    words = sorted({word for line in lines for word in line.split() if word[0] != "@"})
    names = {line.split()[4] for line in lines if len(line.split()) > 4}  # no keyword is one
    for _ in range(4000):
        changed = chance.choice(lines).split()
        at = chance.randrange(len(changed))
        changed[at : at + 1] = chance.choice(
            [[], [changed[at]] * 2, [chance.choice(words)], [changed[at], chance.choice(words)]]
        )
        line = " ".join(changed)
        if is_understood(line) and line not in lines and names.issuperset(line.split()[4:5]):
            seen = [attempt(netns, lines, line, way) for way in (send, nft.run_by_libnftables)]
            assert seen[0] in (None, seen[1]), line  # refused, it would be libnftables' turn
            compared += seen[0] is not None
    assert compared > 40


def attempt(netns: str, lines: list[str], line: str, way: Callable[[list[str]], None]) -> object:
    """What *line* makes of a ruleset that has all that lines may name; None if it is refused."""
    static = [one for one in lines if one.split()[1] in ("table", "set", "map", "chain")]
    with inside(open_namespace(netns)):
        nft.run_by_libnftables(static)
        try:
            way([line])
        except (OSError, KernelError):
            return None
        else:
            return ruleset()
        finally:
            nft.run_by_libnftables(["flush ruleset"])


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
@pytest.mark.parametrize("mode", [Mode.STATEFUL, Mode.STATELESS])
def test_a_move_needs_libnftables_only_where_it_is_the_first_stateless_one(
    role: Role, mode: Mode, netns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, site = LinuxKernel(), Site(role, netns)
    kernel.open_sites([site])
    loaded: list[object] = []
    monkeypatch.setattr(nft, "run_by_libnftables", loaded.append)
    if mode == Mode.STATELESS:
        monkeypatch.undo()
    for number in (1, 2):
        old, new = (ip_address(f"10.{net}.0.{number}") for net in (2, 3))
        move = Move(f"m{number}", (Map(old, new),), (site,), mode)
        peer = Endpoint(ip_address("10.1.0.2"), 5000)
        plan = make_plan(move, Connections.of([FourTuple(peer, Endpoint(old, 80))]))
        priors = [kernel.apply(step, lambda prior: None) for step in plan.steps]
        monkeypatch.setattr(nft, "run_by_libnftables", loaded.append)
    kernel.unhook_gates()
    for step, prior in reversed(list(zip(plan.steps, priors, strict=True))):
        kernel.revert(step, prior)

    assert not loaded


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_no_text_at_all_is_loaded_at_once(netns: str) -> None:
    """The kernel would acknowledge nothing, and who waits for that waits for ever."""
    with inside(open_namespace(netns)):
        nft.run_transaction([])

        assert not ruleset()[TABLES]


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_what_the_kernel_refuses_libnftables_explains(netns: str) -> None:
    lines = ["create table inet natkeep", "add rule inet natkeep nowhere drop"]
    with inside(open_namespace(netns)):
        with pytest.raises(FileNotFoundError):
            send(lines)
        with pytest.raises(nft.NftError, match="No such file"):
            nft.run_transaction(lines)

        assert not ruleset()[TABLES]


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_what_may_be_there_already_is_not_loaded_again(
    netns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel took it, and its answer was lost."""
    send_packed = nftables.send_packed

    def lose_answer(batch: bytes, last: int) -> None:
        send_packed(batch, last)
        raise OSError(105, "No buffer space available")

    monkeypatch.setattr(nftables, "send_packed", lose_answer)
    lines = ["add table inet natkeep", "add chain inet natkeep one",
             "add rule inet natkeep one drop"]  # fmt: skip
    with inside(open_namespace(netns)):
        with pytest.raises(nft.NftError, match="No buffer space"):
            nft.run_transaction(lines)

        assert len(ruleset()[RULES]) == 1
