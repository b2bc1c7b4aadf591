"""scenario gateway_comes_late in both modes and families, and by half a minute."""

from __future__ import annotations

import pytest
from scenario_run import assert_passes

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(
    ("family", "mode", "late_s"),
    [(6, "stateful", 0.5), (4, "stateless", 0.5), (6, "stateless", 0.5), (4, "stateful", 30.0)],
)
def test_peers_that_reset_new_until_the_gateway_is_there_go_on(
    family: int, mode: str, late_s: float
) -> None:
    assert_passes("gateway_comes_late", family, mode, late_s=late_s)
