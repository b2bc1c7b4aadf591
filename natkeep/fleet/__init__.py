"""Moves ordered in a store that all hosts reach, and realised by an agent at each.

    store.py      five calls: range, watch, txn, lease, delete; stores.py opens one
    etcd.py       the store in etcd; directory.py: in a directory
    keys.py       where what is in the store
    want.py       what a node is ordered; done.py: what it says of that; listing.py: connections
    order.py      a move as a person orders it; apply.py writes it, progress.py says how far it is
    agent.py      compares what is ordered here with what the journals say, and acts
    pod_orders.py  what natkeep-cni is to do for a pod that is to come
    site.py       a move's phase by its journal, and what is done to it, through the lifecycle
    restored.py   a destination that natkeep-hook prepares, since NEW is known at the restore only
    ready.py      answers a restore that asks by the agent's socket (natkeep/agent_socket.py)
    jobs.py       what is to be done of many moves, done at once
    followed.py   which order of a move was followed last, on disk
    nodes.py      which nodes there are, and which send to a destination
    retries.py    when what failed is tried again
    wake.py       what wakes the agent: the store's changes, and those of journals

Rule: nothing is undone because of what the store does not say. An order undoes a move, or the
deadline of a gate that was never opened; an order that vanishes, one that is older than what was
followed, a store that is away: nothing is undone, and it is said.
"""
