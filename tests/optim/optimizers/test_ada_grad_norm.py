"""AdaGradNorm: what is peculiar to it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.optim import AdaGradNorm

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(
    ps: list[Tensor],
    gs: list[Tensor],
    states: list[dict[str, Tensor]],
    options: Options,
    steps: list[int],
) -> list[Tensor]:
    total = options["sum_sq"].to(ps[0].dtype)
    for g in gs:
        for x in g.flatten():
            total = total + x * x
    size = float(options["lr"]) / (total**0.5 + options["eps"])
    return [p - size * g for p, g in zip(ps, gs, strict=True)]


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            AdaGradNorm,
            definition,
            options=(
                {},
                {"lr": 0.5, "eps": 0.3, "weight_decay": 0.1},
                {"lr": 0.2, "weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.4},
            ),
            together=True,
        )
    ]


def groups(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return [
        {"params": [torch.nn.Parameter(torch.randn(5, dtype=dtype)) for _ in range(2)]},
        {"params": [torch.nn.Parameter(torch.randn(2, 3, dtype=dtype))], "lr": 0.3},
    ]


def every(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def sums(optimizer: Any) -> list[Tensor]:
    return [group["sum_sq"] for group in optimizer.param_groups]


def test_each_group_has_its_sum() -> None:
    optimizer = AdaGradNorm(groups(torch.float64))
    expected = [0.0, 0.0]
    for _ in range(3):
        draw_gradients(every(optimizer))
        every(optimizer)[0].grad = None
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                expected[index] += float(p.grad.square().sum()) if p.grad is not None else 0.0
        before = [p.detach().clone() for p in every(optimizer)]
        optimizer.step()
        assert [float(s) for s in sums(optimizer)] == pytest.approx(expected, rel=1e-13)
        assert torch.equal(every(optimizer)[0], before[0])
        last = every(optimizer)[2]
        moved = 0.3 / (expected[1] ** 0.5 + 1e-10) * last.grad  # type: ignore[operator]
        torch.testing.assert_close(last.detach(), before[2] - moved, rtol=1e-13, atol=0)


def test_a_group_without_gradients_keeps_its_sum() -> None:
    optimizer = AdaGradNorm(groups())
    draw_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    first, second = sums(optimizer)
    assert first > 0
    assert second == 0


def test_sums_are_of_the_first_parameters_dtype() -> None:
    kinds = (torch.bfloat16, torch.float32), (torch.float64, torch.float16)
    optimizer = AdaGradNorm(
        [{"params": [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in kind]} for kind in kinds]
    )
    draw_gradients(every(optimizer))
    optimizer.step()
    assert [s.dtype for s in sums(optimizer)] == [torch.float32, torch.float64]
    assert all(s.shape == () for s in sums(optimizer))


def through_a_file(optimizer: AdaGradNorm) -> AdaGradNorm:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = copy.deepcopy(every(optimizer))
    other = AdaGradNorm([{"params": copies[:2]}, {"params": copies[2:]}])
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, through_a_file, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
)
def test_copies_have_sums_of_their_own(copied: Callable[[AdaGradNorm], AdaGradNorm]) -> None:
    first = AdaGradNorm(groups())
    draw_gradients(every(first))
    first.step()
    second = copied(first)
    assert [float(s) for s in sums(second)] == [float(s) for s in sums(first)]
    for _ in range(2):
        draw_gradients(every(first))
        for p, twin in zip(every(first), every(second), strict=True):
            twin.grad = p.grad
        first.step()
        second.step()
        for p, twin in zip(every(first), every(second), strict=True):
            assert torch.equal(p, twin)
    assert all(map(torch.equal, sums(first), sums(second)))


def test_loaded_sums_have_the_dtype_of_the_first_parameter() -> None:
    """An older checkpoint has none, another one a number or a tensor of other precision."""
    optimizer = AdaGradNorm(groups())
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["sum_sq"]
    for given in (2, torch.tensor(2.0, dtype=torch.float64)):
        saved["param_groups"][1]["sum_sq"] = given
        optimizer.load_state_dict(saved)
        assert sums(optimizer) == [0, 2]
        assert all(s.dtype == torch.float32 for s in sums(optimizer))


def test_the_sum_may_be_given() -> None:
    """As groups of another optimizer have one, which is left alone."""
    given = torch.tensor(9.0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdaGradNorm([{"params": [parameter], "sum_sq": given}], lr=1.0, eps=0.0)
    parameter.grad = torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.8]))
    assert given == 9


def test_the_sum_stays_in_its_place() -> None:
    """As a captured graph needs it."""
    optimizer = AdaGradNorm(groups(), capturable=True)
    places = [s.data_ptr() for s in sums(optimizer)]
    draw_gradients(every(optimizer))
    optimizer.step()
    assert [s.data_ptr() for s in sums(optimizer)] == places
