"""the tests of the scale of deadlines: what is waited for in vain is waited for longer."""

from __future__ import annotations

import pytest

from natkeep.errors import UsageError
from natkeep.lab.host import LabError, await_true
from natkeep.lab.time_scale import VARIABLE, scaled


@pytest.mark.parametrize(("text", "times"), [("", 1), ("1", 1), ("12", 12), ("2.5", 2.5)])
def test_deadlines_are_times_what_the_variable_says(monkeypatch, text, times):
    monkeypatch.setenv(VARIABLE, text)

    assert scaled(4) == 4 * times


@pytest.mark.parametrize("text", ["0", "0.9", "101", "x", "-3", "1e1", "nan", "٣", "1\n"])
def test_what_is_no_scale_is_a_usage_error(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)

    with pytest.raises(UsageError, match="is not a number from 1 to 100"):
        scaled(1)


def test_a_wait_in_vain_says_how_long_it_was(monkeypatch):
    monkeypatch.setenv(VARIABLE, "4")

    with pytest.raises(LabError, match=r"waited 0\.04 s in vain for nothing"):
        await_true(lambda: False, "nothing", seconds=0.01)
