"""migrate: all of a move over ssh, in the one order that resets no connection.

    host.py        a host, and what runs there: `natkeep serve` over ssh, or beside us
    record.py      what a migration is, and how far it has come, on the controller's disk
    way.py         who translates for the peers: a gateway, or the source as a relay
    engines.py     what dumps and restores: CRIU itself
    containers.py  the tools of containers: runc, podman
    forward.py     the steps: check, prepare, dump, copy, restore, verify
    image_copy.py  CRIU's image from one host to the other
    back.py        where the process is by now, and the way back to the source
    capture.py     what the peers say meanwhile, for a report
    page.py        the report, as a page
    criu_errors.py the first true error of CRIU's log, and its cure

Rule: which host has the process is asked of the hosts, never assumed; while that cannot be told,
nothing is restored. Nothing here touches a site itself: hosts do, by natkeep's own verbs.
"""

PROTOCOL = 2
"""Of the lines that a controller and `natkeep serve` exchange."""
