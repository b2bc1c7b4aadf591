"""The pages name every verb, option and exit code that there is, and nothing that there is not.

The pages are README.md, which stays a first page, and docs/*.md.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ALL, BLOCKS, PAGES, README, ROOT, Block, commands

from natkeep import errors
from natkeep.cli import make_parser
from natkeep.migrate.criu_errors import CURES

TEXT = "\n".join(page.read_text() for page in PAGES)
REFERENCE = (ROOT / "docs/reference.md").read_text()


def verbs(parser: argparse.ArgumentParser, prefix: str = "natkeep"):
    """Each verb's full name and its parser, sub-verbs included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield f"{prefix} {name}", verb
                yield from verbs(verb, f"{prefix} {name}")


PARSER = make_parser()
VERBS = dict(verbs(PARSER))
OPTIONS = sorted(
    {
        option
        for parser in (PARSER, *VERBS.values())
        for action in parser._actions
        for option in action.option_strings
        if option not in ("-h", "--help")
    }
)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "natkeep lab"])
def test_the_reference_names_each_verb(verb: str) -> None:
    """A verb lands with its line in the reference."""
    assert f"| `{verb}" in REFERENCE


@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_names_each_option(option: str) -> None:
    """An option lands with its line in the reference."""
    assert re.search(rf"[`\[( ]{re.escape(option)}[`\] )]", REFERENCE)


def test_no_table_names_an_option_that_there_is_not() -> None:
    """What the tables of commands and options promise exists."""
    tables = [line for line in TEXT.splitlines() if line.startswith("| `")]
    promised = set(re.findall(r"--[a-z][a-z-]+", "\n".join(tables)))
    foreign = {"--action-script", "--network-lock", "--tcp-established", "--feature"}  # CRIU's
    foreign |= {"--ext-unix-sk", "--file-locks", "--shell-job", "--ghost-limit"}

    assert promised - foreign <= set(OPTIONS)


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_gives_a_verb_its_own_options(verb: str) -> None:
    """What stands behind a command in the table of commands is an option of that verb."""
    rows = re.findall(rf"^\| `{verb} ((?!list|run|matrix)[^`]*)`", REFERENCE, re.MULTILINE)
    given = {
        option for row in rows for option in re.findall(r"--[a-z][a-z-]+", row.split(" -- ")[0])
    }

    assert given <= {option for action in VERBS[verb]._actions for option in action.option_strings}


def parse(words: list[str]) -> None:
    """Have natkeep's own parser read *words*; nothing is done."""
    if words[-1] not in ("--help", "--version"):
        PARSER.parse_args([re.sub("^SECONDS$", "1", word) for word in words])


GIVEN = {"sh": r"(.*)", "console": r"^\$ (.*)"}
"""What is given to a shell in a block of a language: each line, or what stands behind a prompt."""


def given(block: Block) -> list[list[str]]:
    lines = re.findall(GIVEN.get(block.language, "(?!)"), block.text, re.MULTILINE)
    return list(commands("\n".join(lines)))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_each_block_says_what_is_done_with_it(block: Block) -> None:
    """As tests/pages.py has it. A text is none that would be given to a shell."""
    assert block.language in (*GIVEN, "text", "toml", "python")
    if block.mark:
        assert re.fullmatch(r"run by test_\w+(, test_\w+)*|parsed|not run: \S.+", block.mark)
    else:
        assert block.language == "text"
    if block.language == "text":
        programs = "criu|runc|podman|make|nft|ip|apt|pip|systemctl|sudo|[$]"
        typed = rf"^(({programs}) |natkeep ({'|'.join(name[8:] for name in VERBS)})\b)"
        assert not re.search(typed, block.text, re.MULTILINE)


@pytest.mark.parametrize("block", [block for block in BLOCKS if given(block)], ids=str)
def test_natkeep_and_make_take_what_a_block_gives_them(block: Block) -> None:
    """Parsed without effect, whether a test runs the block or not."""
    targets = re.findall(r"^([\w-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in given(block):
        if Path(words[0]).name == "natkeep":
            parse(words[1:])
        elif words[0] == "make":
            assert {*words[1:2]} <= {*targets}
        else:
            assert block.mark != "parsed", words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_natkeep_takes_what_a_sentence_names(page: Path) -> None:
    """A command within a line; a `…` is a value, or more options. A table has synopses."""
    text = re.sub(r"^\| `natkeep .*", "", page.read_text(), flags=re.MULTILINE)
    for span in re.findall(r"`([^`\n]*natkeep [^`\n]*)`", text):
        for words in commands(re.sub(r"( [^-]\S*) …$", r"\1", span)):
            if words[0] == "natkeep" and " ".join(words) not in VERBS:
                parse(words[1:])


def test_a_block_that_is_run_is_asked_for_by_its_test() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for block in BLOCKS:
        for name in re.findall(r"test_\w+", block.mark) if block.mark[:6] == "run by" else ():
            assert f"def {name}(" in tests, block
            assert f'blocks_of("{name}")' in tests, block


RECIPES = [
    block
    for block in BLOCKS
    if re.search(r"^# (source|gateway|destination)\b", block.text, re.MULTILINE)
]
"""Code blocks that say what is done at which machine."""


def steps(recipe: str) -> list[str]:
    """What happens to the machines, in order."""
    found = []
    for role, script in re.findall(r"# (source|gateway|destination)\b.*\n((?:.+\n?)+)", recipe):
        for line in script.replace("\\\n", "").splitlines():
            if re.search(r"natkeep (prepare|run) ", line):
                found.append(f"{role} prepared")
            if role != "destination" and re.search(r"natkeep open |--gate open", line):
                found.append(f"{role} open")
            if re.search(r"natkeep fleet wait \w+ --for ready", line):  # it is what that means
                found += ["destination prepared", "gateway prepared", "gateway open"]
            if re.search(r"(criu|runc|container) restore", line):
                found.append("restored")
    return found


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_a_recipe_keeps_the_order_and_is_run(block: Block) -> None:
    """No gateway is open before the destination is prepared, or prepared after the restore."""
    order = steps(block.text)
    assert block.mark.startswith("run by ")
    assert "restored" in order
    if "rollback" in block.text:
        assert order == ["restored"]
    elif "NATKEEP_READY" in block.text:  # the hook asks for the gateway, whenever it is prepared
        assert "NATKEEP_TELL" in block.text
    elif "--site relay" in block.text:
        assert order == ["destination prepared", "source prepared", "source open", "restored"]
    else:
        assert order.index("gateway prepared") < order.index("restored")
        assert order.index("destination prepared") < order.index("gateway open")


def test_each_block_that_prepares_is_such_a_recipe() -> None:
    """All but a way back, and scripts that only set variables for the hook."""
    assert len(RECIPES) >= 5
    for block in BLOCKS:
        if re.search(r"natkeep (prepare|run) ", block.text):
            assert block in RECIPES


@pytest.mark.parametrize("verb", list(VERBS))
def test_each_verb_has_help(verb: str) -> None:
    """`natkeep --help` says what each verb is for."""
    parents = verb.rsplit(" ", 1)[0]
    parser = PARSER if parents == "natkeep" else VERBS[parents]
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))

    assert any(c.dest == verb.rsplit(" ", 1)[1] and c.help for c in action._choices_actions)


def test_the_reference_lists_each_exit_code() -> None:
    """The table of exit codes is that of errors.py."""
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", REFERENCE, re.MULTILINE)}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]

    assert listed == {0} | {c.exit_code for c in classes if issubclass(c, errors.NatkeepError)}


def test_readme_is_a_first_page() -> None:
    """It can be read in five minutes, and names what is tried first and each other page."""
    readme = README.read_text()

    assert len(readme.splitlines()) <= 150
    assert all(command in readme for command in ("make demo", "make test", ".ci/run"))
    assert all(f"(docs/{page.name})" in readme for page in PAGES if page != README)


def anchors(page: Path) -> set[str]:
    """The headings of *page* as GitHub makes links of them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_each_link_has_a_target(page: Path) -> None:
    """Files of the repository, and headings in them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_what_a_page_names_of_the_repository_exists(page: Path) -> None:
    """Paths below natkeep/, tests/ and the like, and tests by their names."""
    text = page.read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"(?<![\w/])(?:natkeep|tests|bench|scenarios)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_a_page_is_plain(page: Path) -> None:
    """Words that hide who does what."""
    hidden = r"\b(whoever|nobody|somebody|whom|anybody)\b"

    assert not re.findall(hidden, page.read_text(), re.IGNORECASE)


@pytest.mark.needs("sphinx")
def test_the_pages_are_a_site_without_a_warning(tmp_path):
    """A link that leads nowhere is one, and a page that is in no chapter."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    made = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {f"{page.relative_to(ROOT).with_suffix('')}.html" for page in ALL} <= made


def test_what_cures_an_error_of_crius_is_on_the_page():
    """Each of the log's words that migrate knows, by an example that it matches."""
    page = (ROOT / "docs/when-it-fails.md").read_text().split("## CRIU fails")[1]
    examples = re.findall(r"`([^`]+)`", page)
    lost = [p for p in CURES if not any(re.search(p, example) for example in examples)]
    assert lost == []
