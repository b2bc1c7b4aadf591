"""The lab: networks of namespaces in which a move is made and judged by captures and applications.

lab.py                        one lab; it is composed of the following
topology.py, host.py          hosts that are namespaces, and the wires between them
traffic_words.py              the kept connections; listeners.py: those that begin later
traffic.py, tcp_repair.py     the application that moves, and its sockets; application.py steers it
network_conditions.py         what other programs install on the way
engine.py, engines/           freeze and restore: CRIU, runc, podman, or TCP_REPAIR alone
translators.py                natkeep by its command line, and the baselines
capture.py, wire_checks.py    tcpdump, and what its frames prove; host_state.py: what is left
report.py                     assertions, and the report of one run
time_scale.py                 how slow the machine is, for every deadline
scenario.py, situations/      the moves that are made: `lab run` and `lab matrix`
criu_restore.py, unkept.py, intruder.py    what only some of them need

Rule: nothing outside the lab imports it, and it drives natkeep as a user would.
"""
