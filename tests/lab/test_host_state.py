"""the tests of what counts as left behind at a host: a loaded module does not, a setting does."""

from __future__ import annotations

import subprocess

import pytest

from natkeep.lab.host_state import COMMANDS, difference, read_untouched

FORWARD = "/proc/sys/net/ipv4/ip_forward:1"
CHECKSUM = "/proc/sys/net/netfilter/nf_conntrack_checksum:1"
LOOSE = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose:"


def compare(before: list[str], after: list[str], *untouched: str) -> str:
    return difference(
        {"sysctls": "\n".join(before)},
        {"sysctls": "\n".join(after)},
        untouched=lambda: "\n".join(untouched),
    )


def test_files_of_a_module_that_was_loaded_meanwhile_are_no_leftovers():
    assert not compare([FORWARD], [FORWARD, CHECKSUM, f"{LOOSE}1"], CHECKSUM, f"{LOOSE}1")


def test_a_setting_of_that_module_that_is_not_its_own_is_one():
    left = compare([FORWARD], [FORWARD, CHECKSUM, f"{LOOSE}0"], CHECKSUM, f"{LOOSE}1")

    assert left == f"sysctls: gone [], new ['{LOOSE}0']"


def test_a_setting_that_was_there_is_one_whatever_a_new_namespace_says():
    left = compare([f"{LOOSE}0", FORWARD], [f"{LOOSE}1", FORWARD, CHECKSUM], f"{LOOSE}1", CHECKSUM)

    assert left == f"sysctls: gone ['{LOOSE}0'], new ['{LOOSE}1']"


def test_a_new_namespace_is_asked_only_where_there_are_new_files():
    def fail() -> str:
        raise AssertionError("asked")

    same = {"sysctls": f"{FORWARD}\n{LOOSE}1"}

    assert not difference(same, dict(same), untouched=fail)


@pytest.mark.root
def test_a_new_namespace_shows_its_sysctls_as_the_surface_does():
    words = ["unshare", "--net", "sh", "-c", COMMANDS["sysctls"]]
    shown = subprocess.run(words, capture_output=True, text=True).stdout

    untouched = read_untouched()

    assert "/proc/sys/net/ipv4/conf/lo/forwarding:" in untouched
    assert set(untouched.splitlines()) == set(shown.splitlines())
