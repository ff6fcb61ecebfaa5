"""Aggregated quantiles, against loops over models and levels."""

import math

import pytest
import torch
from torch import Tensor

from tilework.losses import QuantileAggregator, aggregate_quantiles

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name


def by_loops(input: Tensor, weight_logits: Tensor) -> Tensor:
    logits = weight_logits.broadcast_to(input.shape)
    results = torch.zeros(*input.shape[:-2], input.shape[-1], dtype=torch.float64)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in results.shape]).reshape(
        -1, results.dim()
    ):
        *batch, k = index.tolist()
        weights = [math.exp(value) for value in logits[(*batch, slice(None), k)].tolist()]
        values = input[(*batch, slice(None), k)].tolist()
        total = math.fsum(w * value for w, value in zip(weights, values, strict=True))
        results[(*batch, k)] = total / math.fsum(weights)
    return results


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (3, 1)),
        ((3, 4), (3, 4)),
        ((5, 3, 4), (3, 1)),
        ((5, 3, 4), (5, 3, 4)),
        ((2, 5, 3, 4), (5, 3, 1)),
        ((2, 5, 3, 4), (2, 1, 3, 4)),
        ((5, 3, 4), (1, 1)),
        ((5, 3, 4), (5, 1, 4)),
        ((7, 1, 1), (1, 1)),
        ((63, 1), (63, 1)),
    ],
    ids=str,
)
def test_equals_loops(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    input, logits = (torch.randn(shape).to(dtype) for shape in shapes)
    single = torch.float32 if dtype == torch.float64 else dtype
    composed = logits.to(single).broadcast_to(input.shape).softmax(-2) * input.to(single)
    actual = aggregate_quantiles(input, logits)
    assert actual.dtype == dtype
    truth = by_loops(input.double(), logits.double())
    assert_exact(actual, composed.sum(-2), truth, dtype)


def test_of_equal_models_is_the_identity() -> None:
    row = torch.randn(5, 1, 4).double()
    actual = aggregate_quantiles(row.expand(-1, 3, -1), torch.randn(3, 4).double())
    torch.testing.assert_close(actual, row[:, 0])


def test_of_nothing_and_of_extremes() -> None:
    assert aggregate_quantiles(torch.zeros(0, 3, 4), torch.zeros(3, 1)).shape == (0, 4)
    logits = torch.tensor([[1e4], [-1e4]])
    assert aggregate_quantiles(torch.tensor([[1.0], [2.0]]), logits).item() == 1
    assert aggregate_quantiles(torch.tensor([[1.0], [torch.nan]]), logits).isnan()
    large = torch.full((3, 1), 65504.0, dtype=torch.float16)
    assert aggregate_quantiles(large, torch.zeros(3, 1).half()).item() == 65504


@pytest.mark.untyped
def test_gradients_and_transforms() -> None:
    input = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    before = input.detach().clone(), logits.detach().clone()
    assert torch.autograd.gradcheck(
        aggregate_quantiles, (input, logits), check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(aggregate_quantiles, (input, logits))
    assert torch.equal(input, before[0])
    assert torch.equal(logits, before[1])
    compiled = torch.compile(aggregate_quantiles, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = aggregate_quantiles(input, logits)
    torch.testing.assert_close(compiled(input, logits), expected)
    batched = torch.func.vmap(aggregate_quantiles, in_dims=(0, None))(input, logits)
    torch.testing.assert_close(batched, expected)
    strided = torch.stack([input, input], -1)[..., 0]
    torch.testing.assert_close(aggregate_quantiles(strided, logits), expected)


@pytest.mark.parametrize("per_level", [False, True])
def test_module(per_level: bool) -> None:
    module = QuantileAggregator(3, 4, per_level=per_level)
    assert list(module.state_dict()) == ["weight_logits"]
    assert module.weight_logits.shape == (3, 4 if per_level else 1)
    input = torch.randn(5, 3, 4)
    torch.testing.assert_close(module(input), input.mean(-2))
    torch.nn.init.normal_(module.weight_logits)
    assert torch.equal(module(input), aggregate_quantiles(input, module.weight_logits))
    module(input).square().sum().backward()
    assert module.weight_logits.grad is not None
    assert module.weight_logits.grad.any()
    module.reset_parameters()
    assert not module.weight_logits.any()
    shown = ", per_level=True" if per_level else ""
    assert repr(module) == f"QuantileAggregator(num_models=3, num_levels=4{shown})"


@pytest.mark.untyped
def test_bad_input() -> None:
    input, logits = torch.zeros(5, 3, 4), torch.zeros(3, 1)
    for shape in ((4,), (0, 4), (3, 0)):
        with pytest.raises(ValueError, match=r"aggregate_quantiles: input must be of shape \(\.\."):
            aggregate_quantiles(torch.zeros(shape), logits)
    for shape in ((4,), (), (2, 1), (3, 3), (2, 3, 1), (1, 5, 3, 4)):
        with pytest.raises(
            ValueError,
            match=r"aggregate_quantiles: weight_logits must be of at least 2 dimensions that "
            r"broadcast to shape \(5, 3, 4\)",
        ):
            aggregate_quantiles(input, torch.zeros(shape))
    with pytest.raises(TypeError, match="aggregate_quantiles: input must be a floating-point"):
        aggregate_quantiles(input.int(), logits)
    with pytest.raises(TypeError, match="aggregate_quantiles: weight_logits must be a floating"):
        aggregate_quantiles(input, logits.int())
    with pytest.raises(ValueError, match="aggregate_quantiles: weight_logits must lie on the dev"):
        aggregate_quantiles(input, logits.to("meta"))
    with pytest.raises(ValueError, match=r"QuantileAggregator: input must be of shape \(\.\.\., 3"):
        QuantileAggregator(3, 4)(torch.zeros(5, 4, 3))
    with pytest.raises(ValueError, match="QuantileAggregator: num_models must be an int of at lea"):
        QuantileAggregator(0, 4)
    with pytest.raises(TypeError, match="QuantileAggregator: num_levels must be an int"):
        QuantileAggregator(3, 4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="QuantileAggregator: per_level must be a bool"):
        QuantileAggregator(3, 4, per_level=1)  # type: ignore[arg-type]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            aggregate_quantiles,
            lambda: {"input": draw(5, 3, 4), "weight_logits": draw(3, 4)},
            differentiable=("input", "weight_logits"),
        ),
    ]
