"""What is said about the use of verbs: their groups, examples, and what a typo may have meant.

Rule: this is imported only when help is asked for, a command line is wrong, or pages are made of it
(scripts/make_man.py, the completion); no move waits for it.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn

from natkeep.errors import UsageError

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("move a process by one command, over ssh", ("migrate", "finish", "serve")),
    (
        "move it by hand, at each host",
        ("check", "quiesce", "inspect", "plan", "prepare", "run", "open", "rollback", "teardown"),
    ),
    ("order it of many hosts, in a store that all reach", ("fleet", "agent")),
    ("look, and keep in order", ("status", "explain", "repair", "gc")),
    ("the rest", ("lab", "setup", "help")),
)
"""Every verb, in the order in which one needs them."""

_MOVE = "--map 10.2.0.10=10.3.0.20 --image /images/web"
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "migrate": (
        ("process 1234 of host a goes to host b", "natkeep migrate root@a:1234 root@b"),
        (
            "a server, by the gateway gw, its memory copied twice before it is frozen",
            "natkeep migrate a:1234 b --via gw --listeners --pre-dump 2 --id web",
        ),
        (
            "without a gateway: its peers' own hosts",
            "natkeep migrate root@a:1234 root@b --via peers",
        ),
        ("a container of podman", "natkeep migrate root@a:podman:web root@b"),
        ("with a page of what the peers saw", "natkeep migrate a:1234 b --report /tmp/page"),
        ("the controller was killed: take it back", "natkeep migrate --rollback web"),
    ),
    "finish": (("when its connections have ended", "natkeep finish web"),),
    "serve": (("migrate starts it", "ssh b natkeep serve web --stdio"),),
    "fleet": (
        ("order the move that a file describes", "natkeep fleet apply web.json --store dir:/mnt/f"),
        ("before criu restore", "natkeep fleet wait web --for ready"),
        ("once, where root's password of etcd is", "natkeep fleet init --node gw-1 --node host-b"),
        ("undo it everywhere", "natkeep fleet end web"),
    ),
    "agent": (
        (
            "on a gateway of the group edge",
            "natkeep agent --store etcd:http://10.0.0.1:2379 --node gw-1 --group edge",
        ),
    ),
    "check": (
        ("this machine", "natkeep check"),
        ("this move, at its destination", f"natkeep check web {_MOVE}"),
        ("whether CRIU can take a process that runs", "natkeep check --live 1234"),
    ),
    "quiesce": (
        ("at the source, before criu dump", "natkeep quiesce web --map 10.2.0.10=10.3.0.20"),
    ),
    "inspect": (
        ("what is in an image", "natkeep inspect /images/web"),
        (
            "for prepare at another host, before the freeze",
            "natkeep inspect --live 1234 --json > list",
        ),
    ),
    "plan": (
        ("all that prepare and open would do", f"natkeep plan web {_MOVE}"),
        ("as nft reads it", f"natkeep plan web {_MOVE} --site gateway --format nft"),
    ),
    "prepare": (
        ("at the destination", f"natkeep prepare web {_MOVE}"),
        ("at the gateway", f"natkeep prepare web {_MOVE} --site gateway"),
        (
            "at the source, once the process was dumped",
            f"natkeep prepare web-source {_MOVE} --site source",
        ),
        ("check, and change nothing", f"natkeep prepare web {_MOVE} --dry-run"),
    ),
    "run": (
        (
            "prepare, restore and open at the destination",
            "natkeep run web --map 10.2.0.10=10.3.0.20 -- "
            "criu restore -d -D /images/web --tcp-established",
        ),
    ),
    "open": (
        ("at the gateway, once the destination is prepared", "natkeep open web"),
        ("of a process that was prepared for alive", "natkeep open web --image /images/web"),
    ),
    "rollback": (("the restore failed: begin with the gateway", "natkeep rollback web"),),
    "teardown": (
        ("wait for the end of the connections", "natkeep teardown web --drain"),
        ("at once, though some live", "natkeep teardown web --yes"),
        (
            "its journal is lost, at a gateway",
            "natkeep teardown web --by-name --site gateway",
        ),
    ),
    "status": (
        ("a line for each move", "natkeep status"),
        ("each connection of one", "natkeep status web"),
        ("for monitoring: exit 6 if something drifted", "natkeep status --strict --json"),
    ),
    "explain": (("what check meant", "natkeep explain peer-on-link"),),
    "repair": (
        ("after another program flushed the ruleset", "natkeep repair web"),
        ("every move of this host", "natkeep repair --all"),
    ),
    "gc": (("after a crash: first look", "natkeep gc --dry-run"), ("then clear", "natkeep gc")),
    "lab": (
        ("what there is to see", "natkeep lab list"),
        ("a real server moves", "natkeep lab run server_moves_to_new_address"),
    ),
    "lab list": (("their names and what happens in each", "natkeep lab list"),),
    "lab run": (
        ("a real server moves", "natkeep lab run server_moves_to_new_address"),
        (
            "with what its peer saw, kept as captures",
            "natkeep lab run server_moves_to_new_address --pcap /tmp/seen",
        ),
    ),
    "lab matrix": (("the situations about a reset", "natkeep lab matrix --only reset"),),
    "setup": (
        ("completion in this shell", "natkeep setup --completion bash"),
        ("and in those to come", "natkeep setup --completion bash --install"),
    ),
    "help": (("what there is to say about prepare", "natkeep help prepare"),),
}
"""Of each verb: what for, and the command. A test parses every one."""


def describe(parser: argparse.ArgumentParser) -> str:
    """The help of natkeep, or of one of its verbs, with its examples."""
    topic = parser.prog.removeprefix("natkeep").strip()
    if not topic:
        return _describe_all(parser)
    lines = [argparse.ArgumentParser.format_help(parser).rstrip("\n")]
    examples = EXAMPLES.get(topic, ())
    lines += ["", "examples:"] if examples else []
    for what, command in examples:
        lines += [f"  # {what}", f"  {command}"]
    return "\n".join([*lines, ""])


def _describe_all(parser: argparse.ArgumentParser) -> str:
    """The verbs in their groups, and the options that stand before them."""
    head, options = parser._get_formatter(), parser._get_formatter()
    head.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    head.add_text(parser.description)
    for group in parser._action_groups:
        if group is not parser._positionals and group is not parser._subparsers:
            options.start_section(group.title)
            options.add_arguments(group._group_actions)
            options.end_section()
    return "\n".join([head.format_help(), *_list_verbs(parser), "", options.format_help()])


def _list_verbs(parser: argparse.ArgumentParser) -> Iterator[str]:
    texts = {
        choice.dest: choice.help
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    for title, verbs in GROUPS:
        yield f"{title}:"
        for verb in verbs:
            yield f"  {verb:<10} {texts[verb]}"
        yield ""
    yield "natkeep help VERB has the options of each, and examples."


def find_verb(parser: argparse.ArgumentParser, word: str) -> argparse.ArgumentParser:
    """The parser of a verb of *parser*; UsageError where there is none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            if word in action.choices:
                found: argparse.ArgumentParser = action.choices[word]
                return found
            refuse_verb(parser.prog, word, action.choices)
    raise UsageError(f"{parser.prog} has no verbs: {word!r}", hint=f"natkeep help{parser.prog[7:]}")


def refuse_verb(prog: str, word: str, choices: Collection[str]) -> NoReturn:
    """UsageError, with what is like *word* among the verbs."""
    names = choices if " " in prog else [verb for _, verbs in GROUPS for verb in verbs]
    listed = f"natkeep help{prog.removeprefix('natkeep')} lists them"
    raise UsageError(
        f"no verb {' '.join([*prog.split()[1:], word])!r}",
        hint="; ".join([*suggest(word, names), listed]),
    )


def refuse_rest(verb: argparse.ArgumentParser, rest: Sequence[str]) -> NoReturn:
    """UsageError for words of a command line that *verb* does not know."""
    words = [word.partition("=")[0] for word in rest if word.startswith("--")]
    like = [one for word in words for one in suggest(word, verb._option_string_actions)]
    raise UsageError(
        f"unrecognized arguments: {' '.join(rest)}",
        hint="; ".join([*like[:1], f"{verb.prog} --help"]),
    )


def suggest(word: str, names: Collection[str]) -> list[str]:
    """What *word* may have meant among *names*: a phrase, or none."""
    close = difflib.get_close_matches(word, names, n=1)
    return [f"did you mean {close[0]}"] if close else []
