"""The resume state of the data: a few integers, versioned."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.core.errors import CheckpointError
from pipeline.data.loading.resume_state import STATE_VERSION, DataState, load_data_state

STATE = DataState(dataset="abc", seed=3, batch=8, position=80)


def test_it_is_a_few_numbers_and_an_identity_and_comes_back() -> None:
    content = STATE.model_dump()
    assert len(content) == 6
    assert load_data_state(content, 10, "x") == STATE


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dataset", "def", "dataset 'abc', not 'def'"),
        ("seed", 4, "run.seed 3, not 4"),
        ("order", 1, r"order version 2, not 1"),
        ("batch", 16, "schedule.batch 8, not 16"),
    ],
)
def test_another_order_is_refused_by_name(name: str, value: Any, expected: str) -> None:
    other = STATE.model_copy(update={name: value})
    with pytest.raises(CheckpointError, match=rf"step-10 was trained with {expected}"):
        STATE.check_same_order(other, "step-10")
    STATE.check_same_order(STATE.model_copy(update={"position": 0}), "step-10")


def test_an_older_version_is_upgraded() -> None:
    first = {"dataset": "abc", "seed": 3, "order_version": 2, "batch": 8}
    assert load_data_state(first, 10, "x") == STATE
    with pytest.raises(CheckpointError, match="order version 1, not 2"):
        load_data_state({**first, "order_version": 1}, 10, "x").check_same_order(STATE, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": STATE_VERSION + 1}, "data state version 3, but this release reads 2"),
        ({**STATE.model_dump(), "position": -1}, "malformed at position"),
        ({**STATE.model_dump(), "workers": 4}, "malformed at workers"),
        (None, "malformed at"),
    ],
)
def test_a_state_that_cannot_be_read_is_named(content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_data_state(content, 10, "x")
