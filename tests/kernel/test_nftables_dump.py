"""tests of the dumps of nf_tables: what another program removes meanwhile hides nothing of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from natkeep.kernel import nftables_dump
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import entered

pytestmark = pytest.mark.root

MANY = 5000  # objects of another move: several datagrams


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Do it once, when the first datagram of a dump that has several was received."""

    def arm(act: Callable[[], object]) -> None:
        receive, todo = Netlink._receive_datagram, [act]

        def receive_and_act(netlink: Netlink) -> bytes:
            data = receive(netlink)
            if len(data) > 10_000 and todo:
                todo.pop()()
            return data

        monkeypatch.setattr(Netlink, "_receive_datagram", receive_and_act)

    return arm


def test_rules_that_others_remove_during_a_dump_hide_none_of_ours(netns, run, meanwhile) -> None:
    theirs = "counter comment api\n" * MANY
    ours = "drop comment web\naccept comment web\n"
    text = (
        f"table inet natkeep {{\nchain gate-api {{\n{theirs}}}\nchain gate-web {{\n{ours}}}\n}}\n"
    )
    run(netns, "nft", "-f", "-", stdin=text)
    meanwhile(lambda: run(netns, "nft", "flush chain inet natkeep gate-api"))

    with entered(netns), Netlink(NETLINK_NETFILTER) as netlink:
        _, comments = nftables_dump.find_standing(netlink, "inet")

    assert comments == {"gate-web": ["web", "web"]}


def test_elements_that_others_remove_during_a_dump_hide_none_of_ours(netns, run, meanwhile) -> None:
    numbers = [f"10.1.{number // 250}.{number % 250}" for number in range(MANY)]
    theirs, ours = numbers[: MANY // 2], numbers[MANY // 2 :]
    elements = f"type ipv4_addr\nelements = {{ {', '.join(numbers)} }}"
    text = f"table inet natkeep {{\nset both {{\n{elements}\n}}\n}}\n"
    run(netns, "nft", "-f", "-", stdin=text)
    less = f"delete element inet natkeep both {{ {', '.join(theirs)} }}\n"
    meanwhile(lambda: run(netns, "nft", "-f", "-", stdin=less))

    with entered(netns):
        found = nftables_dump.read_keys("natkeep", "both")

    assert {".".join(map(str, key)) for key in found} == set(ours)
