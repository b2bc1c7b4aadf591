"""The verb `help`."""

from __future__ import annotations

import argparse

from natkeep.cli.parser import make_parser
from natkeep.cli.usage import find_verb
from natkeep.terminal import show


def help(args: argparse.Namespace) -> int:
    """`natkeep help [VERB [VERB]]`."""
    parser: argparse.ArgumentParser = make_parser()
    for word in args.topic:
        parser = find_verb(parser, word)
    show(parser.format_help().rstrip("\n").split("\n"))
    return 0
