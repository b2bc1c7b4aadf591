"""Writes natkeep's man pages into a directory, as man1/natkeep.1: `python scripts/make_man.py DIR`.

    natkeep(1), natkeep-VERB(1)        from the parser, natkeep/cli/usage.py and docs/reference.md
    natkeep-hook(8), natkeep.toml(5)   from docs/hook.md
    natkeep-cni(8)                     from docs/kubernetes.md

Rule: no word about natkeep is here but what a page needs around them.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from natkeep import __version__
from natkeep.cli.parser import EVERYWHERE, make_parser
from natkeep.cli.usage import EXAMPLES, GROUPS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PURPOSE = "keep TCP connections alive when CRIU restores a process at another address"


# ---- Markdown, as far as docs/ use it ------------------------------------------------------------


def escape(text: str) -> str:
    """*text* as roff prints it: nothing in it is a command or becomes another sign."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    text = text.replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")
    text = "".join(sign if sign.isascii() else f"\\[u{ord(sign):04X}]" for sign in text)
    return f"\\&{text}" if text.startswith(".") else text


def inline(text: str) -> str:
    """A line of Markdown: code and bold are bold, a link is its text."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text.strip())
    line = ""
    for part in re.split(r"(`[^`]+`|\*\*.+?\*\*|\*\w[^*]*\*)", text):
        marks = next((marks for marks in ("`", "**", "*") if part.startswith(marks)), "")
        inner = escape(part.strip(marks or None).replace("\\|", "|")) if marks else escape(part)
        line += f"\\f{'I' if marks == '*' else 'B'}{inner}\\fR" if marks and inner else inner
    return line


BLOCK = re.compile(r"^```.*?^```$|(?:^(?!```)[^\n]+\n?)+", re.DOTALL | re.MULTILINE)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def convert(markdown: str) -> Iterator[str]:
    """Lines of roff for paragraphs, lists, tables of two columns, code and headings."""
    for block in BLOCK.findall(markdown):
        lines = block.strip("\n").split("\n")
        if lines[0].startswith("```"):
            yield from (".PP", ".in +4", ".nf")
            yield from (escape(line) or "\\&" for line in lines[1:-1])
            yield from (".fi", ".in")
        elif lines[0].startswith("#"):
            yield f".SS {inline(lines[0].lstrip('# '))}"
            yield from convert("\n".join(lines[1:])) if lines[1:] else ()
        elif lines[0].startswith("|"):
            for row in lines[2:]:
                first, *rest = cells(row)
                yield from (".TP", inline(first), inline("; ".join(rest)) or "\\&")
        else:
            yield ".PP"
            for line in lines:
                item = line.startswith("- ")
                yield from [".IP \\(bu 2"] if item else []
                yield inline(line.removeprefix("- "))


def section(page: str, title: str) -> str:
    """What stands below a heading of docs/*page*, without it; all before the first for `""`."""
    text = re.sub(r"<!-- .* -->\n", "", (DOCS / page).read_text(encoding="utf-8"))
    if not title:
        return text.partition("\n## ")[0].partition("\n")[2]
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit(f"docs/{page} has no section {title!r}")
    return found[1]


# ---- pages ---------------------------------------------------------------------------------------


def head(name: str, number: int, purpose: str) -> list[str]:
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(epoch))
    manual = {1: "User Commands", 5: "File Formats", 8: "System Administration"}[number]
    title = f'.TH {name.upper()} {number} {date} "natkeep {__version__}" "{manual}"'
    return [title, ".SH NAME", f"{escape(name)} \\- {escape(purpose)}"]


def synopsis(parser: argparse.ArgumentParser) -> list[str]:
    own = [a for a in parser._actions if a.dest != "help" and a not in everywhere(parser)]
    formatter = argparse.HelpFormatter(parser.prog, width=10_000)
    formatter.add_usage(None, own, parser._mutually_exclusive_groups)
    usage = " ".join(formatter.format_help().removeprefix("usage: ").split())
    return [".PP", f"\\fB{escape(parser.prog)}\\fR{escape(usage.removeprefix(parser.prog))}"]


def everywhere(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options that every verb has."""
    return [a for g in parser._action_groups if g.title == EVERYWHERE for a in g._group_actions]


def options(actions: list[argparse.Action]) -> Iterator[str]:
    for action in actions:
        if isinstance(action, argparse._SubParsersAction) or action.dest == "help":
            continue
        value = action.metavar or "|".join(map(str, action.choices or ()))
        names = ", ".join(f"\\fB{escape(name)}\\fR" for name in action.option_strings)
        yield ".TP"
        shown = f"\\fI{escape(str(value))}\\fR" if value else ""
        yield " ".join(filter(None, (names, shown)))
        yield escape((action.help or "").replace("%%", "%"))


def examples(topic: str) -> Iterator[str]:
    for what, command in EXAMPLES[topic]:
        yield from (".PP", f"{escape(what[0].upper() + what[1:])}:")
        yield from (".PP", ".in +4", ".nf", escape(command), ".fi", ".in")


def explained(topic: str) -> Iterator[str]:
    """What docs/reference.md says of a verb: its rows in the table of commands."""
    for row in section("reference.md", "Commands").split("\n"):
        named = re.match(r"\| `natkeep ((?:lab )?[a-z]+)", row)
        if named and named[1] == topic:
            command, text = cells(row)
            yield from (".PP", f"{inline(command)}: {inline(text)}.")


def verb_page(topic: str, parser: argparse.ArgumentParser) -> list[str]:
    lines = head(f"natkeep-{topic.replace(' ', '-')}", 1, parser.description or "")
    lines += [".SH SYNOPSIS", *synopsis(parser), ".SH DESCRIPTION"]
    lines += list(explained(topic)) or [".PP", escape(f"{parser.description}.")]
    own = [action for action in parser._actions if action not in everywhere(parser)]
    told = list(options(own))
    lines += [".SH OPTIONS", *told] if told else []
    lines += [".PP", "The options of every verb, and exit codes, are in", ".BR natkeep (1)."]
    return [*lines, ".SH EXAMPLES", *examples(topic), ".SH SEE ALSO", ".BR natkeep (1)"]


def main_page(
    parser: argparse.ArgumentParser, verbs: dict[str, argparse.ArgumentParser]
) -> list[str]:
    lines = [
        *head("natkeep", 1, PURPOSE),
        ".SH SYNOPSIS",
        ".PP",
        "\\fBnatkeep\\fR [OPTIONS] VERB ...",
    ]
    lines += [".SH DESCRIPTION", *convert(section("../README.md", "").partition("\n```")[0])]
    lines.append(".SH VERBS")
    for title, names in GROUPS:
        lines.append(f".SS {escape(title[0].upper() + title[1:])}")
        for name in names:
            lines += [".TP", f".BR natkeep\\-{name} (1)", escape(verbs[name].description or "")]
    shown = [a for a in parser._actions if a.dest == "version"]
    lines += [".SH OPTIONS", *options([*everywhere(parser), *shown])]
    lines += [".SH EXIT STATUS", *convert(section("reference.md", "Exit codes"))]
    lines += [".SH OUTPUT", *convert(section("reference.md", "Output").partition("\n### ")[0])]
    see = ("natkeep-prepare (1)", "natkeep-migrate (1)", "natkeep-hook (8)", "natkeep.toml (5)")
    also = ",\n".join(f".BR {escape(page)}" for page in (*see, "criu (8)", "nft (8)"))
    return [*lines, ".SH SEE ALSO", also]


def hook_page() -> list[str]:
    lines = head("natkeep-hook", 8, "have CRIU itself prepare or open a move")
    lines += [".SH SYNOPSIS", ".PP", escape("criu restore ... --action-script natkeep-hook")]
    lines += [".SH DESCRIPTION", *convert(section("hook.md", ""))]
    lines += [".SH ENVIRONMENT", *convert(section("hook.md", "Orders"))]
    title = "Where NEW is known only at the restore"
    lines += [f".SH {title.upper()}", *convert(section("hook.md", title))]
    return [*lines, ".SH SEE ALSO", ".BR natkeep (1),", ".BR natkeep.toml (5),", ".BR criu (8)"]


def cni_page() -> list[str]:
    lines = head("natkeep-cni", 8, "have a pod's network prepare a move")
    lines += [".SH DESCRIPTION", *convert(section("kubernetes.md", "natkeep-cni"))]
    return [*lines, ".SH SEE ALSO", ".BR natkeep (1),", ".BR natkeep\\-hook (8)"]


def configuration_page() -> list[str]:
    lines = head("natkeep.toml", 5, "what may be moved, and standing orders for natkeep-hook")
    lines += [".SH SYNOPSIS", ".PP", "/etc/natkeep/natkeep.toml"]
    lines += [".SH DESCRIPTION", *convert(section("hook.md", "/etc/natkeep/natkeep.toml"))]
    return [*lines, ".SH SEE ALSO", ".BR natkeep (1),", ".BR natkeep\\-hook (8)"]


def walk(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield verb.prog.removeprefix("natkeep "), verb
                yield from walk(verb)


def make_pages() -> dict[str, str]:
    """Each page's path below a man directory, and its text."""
    parser = make_parser()
    verbs = dict(walk(parser))
    pages = {f"natkeep-{t.replace(' ', '-')}.1": verb_page(t, verb) for t, verb in verbs.items()}
    pages["natkeep.1"] = main_page(parser, verbs)
    pages["natkeep-hook.8"] = hook_page()
    pages["natkeep-cni.8"] = cni_page()
    pages["natkeep.toml.5"] = configuration_page()
    return {f"man{name[-1]}/{name}": "\n".join(lines) + "\n" for name, lines in pages.items()}


if __name__ == "__main__":
    for path, text in make_pages().items():
        place = Path(sys.argv[1], path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
