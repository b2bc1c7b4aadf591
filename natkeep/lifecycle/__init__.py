"""The verbs of a move, a file each: functions on an Executor; order, rollback and locking.

    executor.py   one kernel and one state directory; steps done, undone and noted in the journal
    progress.py   how far a move got, from its journal and its plan
    check.py      what is asked before anything is changed; conflicts.py: because of another move
    prepare.py    replace.py    quiesce.py
    open.py       compare.py: with the image, for a move that was prepared from a living process
    status.py     drain.py: what a teardown would break
    repair.py     teardown.py   gc.py
    many.py       many_undo.py: prepare, open and teardown of a list of moves in one transaction
    examine.py    what stops or endangers a move, of a subject.py; path.py and other_rules.py:
                  its packets' way; examine_move.py: as prepare would make it
    live.py       the sockets of a living process; sockets.py: what a site lacks or does of them
    process.py    what CRIU needs for a restore

Rule: these files know when things happen and nothing of how. They check everything before they
change anything, write the journal before and after each step, and undo in reverse; they never
flush. Each is imported by itself where one verb is all that is wanted, as in a hook.
"""
