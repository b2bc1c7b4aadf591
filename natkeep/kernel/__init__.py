"""the machine: everything natkeep may do to it; interface.py says what, linux.py does it."""
