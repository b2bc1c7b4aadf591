"""the surfaces: everything that a translation could leave behind at a site, as text.

Rule: what is compared is what a person would look at: nft's ruleset, addresses, routes, policy
rules, and every readable sysctl of the network namespace. Only what changes by itself is left
out.
"""

from __future__ import annotations

from natkeep.lab.host import Host

# Counts what passes, so it differs between any two looks.
_ALIVE = ("/proc/sys/net/netfilter/nf_conntrack_count:",)

_LOOKS = {
    "ruleset": "nft -j list ruleset",
    "addresses": "ip -j address",
    "routes": "ip -j route show table all",
    "routes, IPv6": "ip -j -6 route show table all",
    "policy rules": "ip -j rule; ip -j -6 rule",
    "sysctls": "grep -rs '' /proc/sys/net",
}
_MARK = "=== "


def read_surfaces(host: Host) -> dict[str, str]:
    """Each surface of *host* by its name."""
    script = "\n".join(f"echo '{_MARK}{name}'; {look}" for name, look in _LOOKS.items())
    shown = host.run("sh", "-c", script + "\ntrue").stdout
    surfaces: dict[str, str] = {}
    for part in shown.split(f"\n{_MARK}"):
        name, _, text = part.removeprefix(_MARK).partition("\n")
        surfaces[name] = text
    lines = surfaces["sysctls"].splitlines()
    surfaces["sysctls"] = "\n".join(line for line in lines if not line.startswith(_ALIVE))
    return surfaces


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """What differs, in one line; empty when nothing does."""
    found = []
    for name, text in before.items():
        if text != after[name]:
            old, new = set(_words(text)), set(_words(after[name]))
            found.append(f"{name}: gone {sorted(old - new)[:3]}, new {sorted(new - old)[:3]}")
    return "; ".join(found)


def _words(text: str) -> list[str]:
    return text.replace("}, {", "},\n{").splitlines()
