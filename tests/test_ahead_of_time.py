"""The compilation ahead of time."""

from functools import partial

import torch

import ahead_of_time


def launch(dtype: torch.dtype, *, features: int = 1) -> None: ...


def test_a_launch_has_a_name() -> None:
    named, plain = (partial(launch, torch.float32, features=3) for _ in range(2))
    named.__name__ = "three"  # type: ignore[attr-defined]
    assert [ahead_of_time.label(one) for one in (launch, named, plain)] == [
        "launch",
        "three",
        "launch(torch.float32, features=3)",
    ]
