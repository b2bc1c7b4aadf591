"""the conductor: prepare, open, status, teardown; order, rollback and locking.

    ground.py      what every verb stands on: doing, undoing, and noting both in the journal
    preparing.py   prepare; what it refuses because of another move is in conflicts.py
    opening.py     open
    looking.py     status, and what lives
    ending.py      teardown
    quiescing.py   quiesce
    verbs.py       all of them: Lifecycle

Rule: these files know when things happen and nothing of how. They check everything before they
change anything, write the journal before and after each step, and undo in reverse; they never
flush. Each is imported by itself where one verb is all that is wanted, as in a hook.
"""
