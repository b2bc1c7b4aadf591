"""the lab: practice networks in which a move is made and judged by wires and applications.

host.py, topology.py     namespaces that are hosts, and the wires between them
traffic.py, repair.py    the application that moves; application.py steers it
engines.py               freeze and restore: CRIU, or TCP_REPAIR alone
translators.py           natkeep by its command line, and the baselines
wire.py, evidence.py     what was captured, and what it proves; surfaces.py: what is left at a site
journey.py, ends.py      several moves and processes; both ends' reports, compared
stage.py, scenario.py    the words of a story; the files that tell one; verdict.py: how it ended

Rule: nothing outside the lab imports it, and it drives natkeep as a user would.
"""
