"""what gets into nft's text: closed alphabets, whatever was asked for.

Each example takes one word, often a piece of nft or shell grammar, to every place where natkeep
takes a name, an address or a port from outside: an id, a namespace, a role, a mode, a map, an end
of a connection, the run id of a dump. Most places have to refuse most words; from what they take,
whole plans are rendered (nft text of every site, of opening, and of every removal), and a
tokenizer that knows nothing of the renderer reads them.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from natkeep.errors import NatkeepError
from natkeep.plan import base_chains, criu_lock, filters, listeners, syn_block
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.listeners import make_receptions
from natkeep.plan.maps import Map, parse_map
from natkeep.plan.move import Mode, Move, Site, is_id, parse_id
from natkeep.plan.nft import Rule
from natkeep.plan.plan_text import render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.wanted import objects_of
from natkeep.values import replace

EXAMPLES = int(os.environ.get("NATKEEP_EXAMPLES", "5000"))  # `make test-long`: 50,000

# ---- the tokenizer -----------------------------------------------------------------------------

NFT = """
    create add insert delete flush table chain set map rule element inet arp natkeep type filter
    nat hook prerouting postrouting input output priority size ip ip6 tcp icmp ipv6-icmp saddr daddr
    sport dport flags fin syn rst ack meta mark l4proto notrack accept drop jump vmap dnat snat to
    udp set comment iifname oifname lo ipv4_addr ipv6_addr inet_service verdict handle policy
    dstnat srcnat iif oif gate injected leaving half-open inbound outbound arriving departing muted
    errors silent defragment dynamic tproxy socket wildcard sequence 0x0
    ct state established related new peer-inbound peer-outbound invalid-inbound invalid-outbound
    local-gate local-inbound local-outbound invalid-local-inbound invalid-local-outbound route
    from4 from6 to4 to6 invalid-in4 invalid-in6 invalid-from4 invalid-from6 invalid-out4
    invalid-out6 invalid-to4 invalid-to6
    asked asking held4 held6 gate4 gate6 in4 in6 out4 out6 set4 set6 put4 put6 mute4 mute6
    conns4 conns6 urgptr reject with reset : . -
    heard4 heard6 spoken4 spoken6 mark4 mark6 early-resets early-answers marked-resets forward
    said4 said6 said-as-new
    strange here passed come"""
KEYWORDS = frozenset(NFT.split())
TOKEN = re.compile(r'"(?P<string>[^"]*)"|(?P<word>@?[0-9A-Za-z_:.-]+)|(?P<mark>[{};,&|()]|[=!]=)')
OURS = re.compile(
    r"@?(?:(?:kept|outer|ended|heard|spoken|routed|to-outer|to-inner|listen)-(?P<a>[A-Za-z0-9_-]{1,32})-[0-9]{1,2}"
    r"|(?:gate|callers|hold)-(?P<b>[A-Za-z0-9_-]{1,32}))"
)
AT = re.compile(
    r"(?:gate|(?:invalid-)?(?:in|out|from|to)|set|put|mute|heard|spoken|mark|said)-at-(?P<address>[0-9a-f._]+)"
)


def tokens(line: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each token; nothing but single spaces may lie between two."""
    at = 0
    while at < len(line):
        found = TOKEN.match(line, at)
        assert found is not None, f"no token at {line[at:]!r}"
        assert found.lastgroup is not None
        yield found.lastgroup, found[found.lastgroup]
        at = found.end() + (line[found.end() : found.end() + 1] == " ")


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def read_nft(line: str, move_id: str, table: str) -> None:
    """Assert that *line* says nothing but what natkeep's grammar has room for."""
    assert line.isascii()
    assert line.isprintable()
    verb, thing, family, named, *_ = [*line.split(" "), "", "", ""]
    assert verb in ("create", "add", "insert", "delete", "flush"), line
    assert thing in ("table", "chain", "rule", "set", "map", "element"), line
    assert (family, named) in (("inet", "natkeep"), ("arp", "natkeep"), ("inet", table)), line
    depth = 0  # one command a line: a semicolon only ends a property in braces
    for kind, text in tokens(line):
        depth += (kind == "mark") * ((text == "{") - (text == "}"))
        assert depth in ((0, 1) if text != ";" else (1,)), line
        if kind == "string":
            assert text in (move_id, f"{move_id}:listeners", f"{move_id}:hold", "open", "lo"), line
            continue
        if kind == "mark" or text in KEYWORDS or text == table:
            continue
        if re.fullmatch(r":?-?[0-9]+|0xc114", text) or is_address(text):
            continue
        if text[0] == "@" and text[1:] in KEYWORDS:
            continue
        found = OURS.fullmatch(text)
        if found is not None:
            assert move_id in (found["a"], found["b"]), line
            continue
        found = AT.fullmatch(text)
        assert found is not None, f"{text!r} in {line!r}"
        assert is_address(found["address"].replace("_", ":")), line


def test_the_tokenizer_sees_what_is_smuggled_in() -> None:
    """It has to be able to fail."""
    for line in (
        "add table inet natkeep; flush ruleset",
        "add chain inet natkeep gate; delete table inet natkeep",
        "add chain inet natkeep gate } delete table inet natkeep {",
        'add rule inet natkeep gate-web drop comment "web" accept comment "x"',
        "add chain inet natkeep gate-web2",
        "add chain inet natkeep gate-Web",
        "add rule inet natkeep gate accept\nflush ruleset",
        "add rule inet natkeep gate ip daddr fe80::1%eth0 accept",
        "add chain inet natkeep in-at-x",
        "add chain inet filter gate-web",
        "include /etc/passwd",
        "add chain inet natkeep $name",
        "add rule inet natkeep gate-web accept # drop",
        'add rule inet natkeep gate-web drop comment "web\\"',
    ):
        with pytest.raises(AssertionError):
            read_nft(line, "web", "CRIU-")


# ---- the words ---------------------------------------------------------------------------------

MARKS = ";{}\"'\\#$@%,:.-_/=*()|&><!~` \n\t\0\r\x7f\x85\u2028"
DIGITS_AND_LETTERS_OF_OTHERS = "\u0661\uff11\u0430\u212a"
PHRASES = """ flush ruleset|drop|accept|jump|include|}\nflush ruleset\n{|web|a|0|9|10.2.0.10|::1|
fd00:2::10|fd00::1%x;|::ffff:10.2.0.10|%eth0|/32|:80|[fd00::9]:80|=auto|auto|gate|destination|
stateful|pid:1|../|natkeep|inet|CRIU"""
PIECES = st.sampled_from([*MARKS, *DIGITS_AND_LETTERS_OF_OTHERS, *PHRASES.split("|")])
WORDS = st.one_of(
    PIECES,
    st.tuples(PIECES, PIECES).map("".join),
    st.tuples(PIECES, PIECES, PIECES).map("".join),
    st.text(max_size=8),
    st.text("abz019-", min_size=1, max_size=33),
)

# ---- the places --------------------------------------------------------------------------------

MAP4 = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
MAP6 = Map(parse_address("fd00:2::10"), parse_address("fd00:3::20"))


T = TypeVar("T")


def attempt(make: Callable[[], T], otherwise: T) -> T:
    """What *make* makes of the word, or *otherwise* where it refuses, as its callers expect it."""
    try:
        return make()
    except (NatkeepError, ValueError):
        return otherwise


SHAPES = (
    (Role.DESTINATION, Mode.STATEFUL),
    (Role.GATEWAY, Mode.STATELESS),
    (Role.SOURCE, Mode.STATEFUL),
    (Role.DESTINATION, Mode.STATELESS),
    (Role.GATEWAY, Mode.STATEFUL),
)


def make_move(word: str, role: Role, mode: Mode) -> Move | None:
    """A move in which *word* stands wherever it is accepted; None where it is nowhere.

    Each place but the namespace's, which takes any word, and of which nothing may be rendered.
    """
    zoned = ipaddress.IPv6Address  # straight from the library, past parse_address
    move_id = attempt(lambda: parse_id(word), "")
    old, _, new, _ = attempt(lambda: parse_map(word), (MAP4.old, None, MAP4.new, None))
    old = attempt(lambda: parse_address(word), old)
    new = attempt(lambda: parse_map(f"10.2.0.10={word}").new, new)
    map_ = attempt(lambda: Map(old, new or MAP4.new), MAP4)
    ends = [
        attempt(lambda: Endpoint.parse(word), None),
        attempt(lambda: Endpoint.parse(f"10.2.0.10:{word}"), None),
        attempt(lambda: Endpoint.parse(f"[{word}]:80"), None),
        attempt(lambda: Endpoint(zoned(f"fd00:2::10%{word}"), 81), None),
    ]
    six = attempt(lambda: Map(zoned(f"fd00:2::10%{word}"), MAP6.new), None)
    dump = attempt(lambda: DumpLock(NetworkLock.NFTABLES, word), None)
    role, mode = attempt(lambda: Role(word), role), attempt(lambda: Mode(word), mode)
    found = tuple(end for end in ends if end is not None)
    if not move_id and map_ == MAP4 and six is None and dump is None and not found:
        return None
    listeners = tuple(end for end in found if end.address == map_.old)
    # These two ask for more than a word: who the peers are, and by which addresses.
    site = Site(Role.SOURCE if role in (Role.PEER, Role.RELAY) else role, f"./{word}")
    maps = (map_,) if six is None else (map_, six)
    return Move(move_id or "web", maps, (site,), mode, listeners, dump, held=found)


def render_all(move: Move) -> Iterator[str]:
    """Every line of nft text that the move's steps, or their undoing, hand to libnftables."""
    peers = {4: "10.1.0.2:50594", 6: "[fd00:1::2]:50595"}
    kept = Connections.of(
        FourTuple(Endpoint.parse(peers[map_.old.version]), Endpoint(map_.old, 5000))
        for map_ in move.maps
    )
    ends = tuple(Endpoint(map_.old, 53) for map_ in move.maps)
    move = replace(move, udp=kept, udp_servers=ends)
    plan = make_plan(move, kept)
    (site,) = move.sites
    for _, lines in render_nft(plan):
        yield from lines
    objects = [
        *(one for step in plan.steps for one in objects_of(step)),
        *syn_block.block(move.id, move.held, linked=False),
        *listeners.objects(move.id, make_receptions(move, site)),
        filters.opening(move.id),
        listeners.opening(move.id),
    ]
    for one in objects:
        if not (isinstance(one, Rule) and one.is_raw()):
            yield str(one)
        yield from (undo.command(7) for undo in one.undo())
    yield from base_chains.removal()
    if move.lock is not None:
        yield from criu_lock.render_table(move.lock, kept)
        yield from criu_lock.render_table(replace(move.lock, whole=True), kept)
        yield from criu_lock.render_elements("delete", move.lock, kept)


def test_nothing_but_closed_alphabets_gets_into_nft_text() -> None:
    run, rendered, read = 0, 0, set()

    @settings(
        max_examples=EXAMPLES,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(WORDS)
    def check(word: str) -> None:
        nonlocal run, rendered
        run += 1
        move = make_move(word, *SHAPES[run % len(SHAPES)])
        if move is None:
            return
        rendered += 1
        table = move.lock.table if move.lock else "CRIU-"
        assert re.fullmatch(r"CRIU-[0-9A-Za-z-]{0,21}", table)
        for line in render_all(move):
            if line not in read:  # the same for every move: read once
                read_nft(line, move.id, table)
                if not (move.id in line or table in line):
                    read.add(line)

    check()
    assert run >= EXAMPLES
    assert rendered > EXAMPLES / 20  # the others were refused by everyone


IDS = st.from_regex(r"(at-)?[A-Za-z0-9][A-Za-z0-9_-]{0,5}", fullmatch=True).filter(is_id)
ADDRESSES = st.ip_addresses()


@settings(max_examples=200)
@given(IDS, IDS, st.integers(0, 9), st.integers(0, 9), ADDRESSES, ADDRESSES)
def test_two_moves_never_share_a_name(
    one: str, other: str, m: int, n: int, here: object, there: object
) -> None:
    """Also where an id looks like another's name with a number behind it."""

    def names(move_id: str, number: int, address: object) -> list[str]:
        return [
            base_chains.gate_chain(move_id),
            base_chains.kept_set(move_id, number),
            base_chains.outer_set(move_id, number),
            base_chains.routed_set(move_id, number),
            base_chains.outer_map(move_id, number),
            base_chains.inner_map(move_id, number),
            listeners.listen_set(move_id, number),
            listeners.callers_chain(move_id),
            syn_block.chain_name(move_id),
            *(base_chains.address_chain(d, address) for d in base_chains.DISPATCHES),  # type: ignore[arg-type]
        ]

    ours, theirs = names(one, m, here), names(other, n, there)
    assert len(set(ours)) == len(ours)
    for at, name in enumerate(ours):
        same = at == theirs.index(name) if name in theirs else None
        assert same is None or (same and (one == other or here == there))
