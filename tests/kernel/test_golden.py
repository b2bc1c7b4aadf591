"""the golden rulesets of tests/plan/golden, as nft's own dry run sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = sorted(Path(__file__).parent.parent.glob("plan/golden/*.nft"))

pytestmark = pytest.mark.root


def test_there_are_goldens() -> None:
    assert GOLDEN


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_nft_takes_the_golden_ruleset_and_changes_nothing(
    file: Path, netns: str, run: Callable[..., str]
) -> None:
    run(netns, "nft", "-c", "-f", "-", stdin=file.read_text())

    assert run(netns, "nft", "list", "ruleset") == ""


def test_the_dry_run_would_say_no(netns: str, run: Callable[..., str]) -> None:
    """A keyword as a name once looked right in a golden and was refused."""
    text = GOLDEN[0].read_text().replace("kept-web-0", "dst")

    with pytest.raises(pytest.fail.Exception, match="dst"):
        run(netns, "nft", "-c", "-f", "-", stdin=text)
