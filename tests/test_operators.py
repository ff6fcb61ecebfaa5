"""The choice of an implementation."""

from dataclasses import replace

import pytest
import torch

from tilework import _operators
from tilework._operators import Implementation

SLOW = Implementation(
    "slow",
    devices=(),
    dtypes=(torch.float32, torch.float64),
    memory="none",
    backward="none",
    deterministic=True,
)
FAST = replace(SLOW, name="fast", dtypes=(torch.float32,))
ELSEWHERE = replace(FAST, name="elsewhere", devices=("cuda",))
TABLE = ELSEWHERE, FAST, SLOW
INPUT = torch.zeros(1)


def never() -> str | None:
    raise AssertionError("not asked")


def test_the_first_that_is_made_for_the_device_and_takes_the_arguments() -> None:
    limits = {"elsewhere": never}
    assert _operators.choose("f", TABLE, None, INPUT, limits) == "fast"
    assert _operators.choose("f", TABLE, None, INPUT, limits | {"fast": lambda: None}) == "fast"
    assert _operators.choose("f", TABLE, None, INPUT, limits | {"fast": lambda: "odd"}) == "slow"
    # What does not take the tensor is not asked about the rest.
    assert _operators.choose("f", TABLE, None, INPUT.double(), limits | {"fast": never}) == "slow"


def test_a_named_one_is_taken_or_refused() -> None:
    assert _operators.choose("f", TABLE, "slow", INPUT, {"fast": never}) == "slow"
    assert _operators.choose("f", TABLE, "fast", INPUT, {"fast": lambda: None}) == "fast"
    with pytest.raises(ValueError, match="f: implementation='fast' cannot be used: it is odd"):
        _operators.choose("f", TABLE, "fast", INPUT, {"fast": lambda: "it is odd"})
    with pytest.raises(ValueError, match="cannot be used: it takes float32, not float64"):
        _operators.choose("f", TABLE, "fast", INPUT.double(), {"fast": never})


def test_where_none_is_left_all_reasons_are_given() -> None:
    with pytest.raises(TypeError, match=r"fast: it takes float32, not int64 .*; slow: it is odd"):
        _operators.choose(
            "f",
            (FAST, replace(SLOW, dtypes=(torch.int64,))),
            None,
            INPUT.long(),
            {"slow": lambda: "it is odd"},
        )
