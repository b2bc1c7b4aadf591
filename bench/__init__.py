"""the benches: what natkeep costs, beside what is asked for; `python -m bench` runs them all."""
