"""A controller for Kubernetes: what a ConnectionMove says becomes a fleet's order, and back.

    connection_move.py   the object, as a value: what is in its spec
    cluster.py           reads pods and nodes of the API
    reconcile.py         one object: orders what it says (fleet/apply.py), ends it when it goes
    status.py            how far it is, as its status has it
    operator.py          kopf, which watches the objects and calls reconcile.py
    __main__.py          `python -m natkeep.controller`

Nothing of it is imported by the rest, and kopf (`pip install natkeep[kubernetes]`) by operator.py
alone. It has no state of its own: the id of a move is its object's uid, and all else is in the
store and in the object.

Rule: an object that is deleted with our finalizer is undone, by an order. One that vanishes
otherwise undoes nothing; its move stands in the store.
"""
