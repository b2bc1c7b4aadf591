"""scenario rollback_in_any_order in both orders, modes and families."""

from __future__ import annotations

import pytest
from scenario_run import assert_passes

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(
    ("family", "mode", "order"),
    [
        (4, "stateless", ("destination", "gateway")),
        (6, "stateful", ("destination", "gateway")),
        (6, "stateless", ("gateway", "destination")),
    ],
)
def test_no_peer_hears_of_a_rollback_whichever_machine_comes_first(
    family: int, mode: str, order: tuple[str, ...]
) -> None:
    assert_passes("rollback_in_any_order", family, mode, order=order)
