"""the fuzzing of what natkeep reads: image directory, journal, connections file.

    python -m fuzz [--seconds N] [--mutants N] [--target NAME]... [--engine own|atheris] [--seed N]
    python -m fuzz --replay DIR --target NAME

It stands beside bench/ and not in tests/, since it is a program that is run for as long as
somebody likes; tests/test_fuzz.py runs each part of it for a moment.

    seeds.py        what mutants are made of: the real dumps of tests/checkpoint/corpus
    structure.py    where an image's entries, fields and lengths are, read independently of natkeep
    mutants.py      from a seed to a mutant, by octets or knowing the structure
    targets.py      the four readers, each from memory and from files
    trial.py        one mutant judged: accepted, refused with the right error, or a finding
    lengths.py      each length of each seed, wrong in each way: all of it has to be refused
    own.py          engine: a seeded generator, so that number N of seed S is always the same
    guided.py       engine: atheris, which looks for mutants that reach new code
    within.py       the process in which atheris runs

Rule: a reader may return a value or raise the one error that the contract has for it, within 1 s
of processor time and 128 MiB. All else is a finding: it is kept as files, and ends the run in 1.
"""
