"""The destination has two uplinks, and a policy rule by which NEW's packets leave by the gateway's.

    client 10.1.0.2         gateway                      ip rule: from 10.3.0.20 lookup 100
    ┌──────┐  10.2.0.10   ┌───────┐  table 100   ┌─────────────────────────┐
    │ peer │══════════════│OLD⇄NEW│══════════════│ destination 10.3.0.20   │
    └──────┘              └───────┘              │ server at 10.2.0.10     │──▶ main: nowhere
                                                 └─────────────────────────┘

What the restored socket sends has OLD as its source, which no rule of the host is about. So from
`prepare` to `teardown` the rules for NEW hold for OLD as well.
"""


def run(lab):
    at = lab.topology["destination"]
    for version, new, router in ((4, "10.3.0.20", "10.3.0.1"), (6, "fd00:3::20", "fd00:3::1")):
        ip = ("ip", f"-{version}")
        at.run(*ip, "route", "add", "default", "via", router, "table", "100")
        at.run(*ip, "route", "del", "default")
        at.run(*ip, "route", "add", "unreachable", "default", "metric", "1")
        at.run(*ip, "rule", "add", "from", new, "lookup", "100")
    before = [at.run("ip", version, "rule").stdout for version in ("-4", "-6")]
    lab.begin()
    lab.move()
    rules = at.run("ip", f"-{lab.family}", "rule").stdout
    lab.report.check("the rule holds for OLD", f"from {lab.old} lookup 100" in rules, rules)
    lab.traffic.talk_on()
    lab.finish()
    after = [at.run("ip", version, "rule").stdout for version in ("-4", "-6")]
    lab.report.check("the rules are as before", before == after, "\n".join(after))
