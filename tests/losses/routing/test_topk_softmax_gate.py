"""The gate, against a sort in Python and torch's topk and softmax."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import TopKGate, topk_softmax_gate

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name


def definition(row: list[float], k: int) -> tuple[list[float], list[int]]:
    order = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:k]
    powers = [math.exp(row[expert] - row[order[0]]) for expert in order]
    return [power / sum(powers) for power in powers], order


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=63),
    st.integers(1, 63),
)
def test_equals_its_definition_with_ties(row: list[int], k: int) -> None:
    k = min(k, len(row))
    input = torch.tensor(row, dtype=torch.float64)
    weights, indices = topk_softmax_gate(input, k)
    expected, order = definition(input.tolist(), k)
    assert indices.tolist() == order
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    dense = topk_softmax_gate(input, k, dense=True)
    torch.testing.assert_close(dense, torch.zeros_like(input).scatter(0, indices, weights))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(("shape", "k"), [((7,), 3), ((63, 100), 8), ((2, 5, 4), 4), ((0, 6), 2)])
def test_equals_topk_and_softmax(shape: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    # No two logits of a row are equal, in any dtype.
    rows = torch.rand(shape).argsort(-1).double() / 16 - 2
    input = rows.to(dtype).requires_grad_()
    composed = rows.to(torch.float32 if dtype == torch.float64 else dtype).requires_grad_()
    exact = rows.clone().requires_grad_()
    gate = topk_softmax_gate(input, k)
    assert isinstance(gate, TopKGate)
    assert torch.equal(gate.indices, exact.topk(k, dim=-1).indices)
    weights = (gate.weights, *(t.topk(k, dim=-1).values.softmax(-1) for t in (composed, exact)))
    assert gate.weights.dtype == dtype
    assert_exact(*weights, dtype)
    upstream = torch.rand_like(exact.detach())[..., :k]
    assert_exact(
        *(
            torch.autograd.grad(weight, leaf, upstream.to(weight.dtype))[0]
            for weight, leaf in zip(weights, (input, composed, exact), strict=True)
        ),
        dtype,
    )


@given(st.integers(1, 63), st.integers(1, 63), st.integers(0, 10**6))
def test_is_the_restricted_softmax(experts: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, experts)
    input = torch.randn(5, experts, dtype=torch.float64)
    dense = topk_softmax_gate(input, k, dense=True)
    kept = dense != 0
    assert (kept.sum(-1) == k).all()
    full = input.softmax(-1) * kept
    torch.testing.assert_close(dense, full / full.sum(-1, keepdim=True))
    torch.testing.assert_close(topk_softmax_gate(input + 3, k, dense=True), dense)
    torch.testing.assert_close(topk_softmax_gate(input, experts, dense=True), input.softmax(-1))


def test_one_expert_has_weight_1_and_no_gradient() -> None:
    input = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weights, indices = topk_softmax_gate(input, 1)
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(indices[:, 0], input.argmax(-1))
    (gradient,) = torch.autograd.grad(weights.sum(), input)
    assert not gradient.any()


def test_gradient_reaches_chosen_logits_only() -> None:
    input = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    dense = topk_softmax_gate(input, 3, dense=True)
    (gradient,) = torch.autograd.grad(dense, input, torch.rand_like(dense))
    assert torch.equal(gradient != 0, dense != 0)


def test_extreme_logits_and_nan() -> None:
    input = torch.tensor([[1e4, -1e4, 1e4, -torch.inf], [0.0, torch.nan, 0.0, 0.0]])
    dense = topk_softmax_gate(input, 3, dense=True)
    assert dense[0].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert dense[1].isnan().any()
    half = topk_softmax_gate(torch.tensor([65504.0, -65504.0, 65472.0], dtype=torch.half), 2)
    torch.testing.assert_close(half.weights, torch.tensor([1.0, math.exp(-32)]).half())


@pytest.mark.untyped
@pytest.mark.parametrize("dense", [False, True])
def test_derivatives(dense: bool) -> None:
    def gate(input: Tensor) -> Tensor:
        result = topk_softmax_gate(input, 3, dense=dense)
        return result if dense else result.weights

    input = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(gate, input)


@pytest.mark.untyped
def test_transforms() -> None:
    input = torch.randn(4, 3, 6)
    expected = topk_softmax_gate(input, 2)
    vmapped = torch.func.vmap(lambda rows: topk_softmax_gate(rows, 2))(input)
    compiled = torch.compile(topk_softmax_gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for result in (vmapped, compiled(input, 2)):
        torch.testing.assert_close(tuple(result), tuple(expected))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert topk_softmax_gate(input, 2).weights.dtype == torch.float32
        assert topk_softmax_gate(input.bfloat16(), 2).weights.dtype == torch.bfloat16
    wide = torch.zeros(4, 3, 6, 2)
    wide[..., 1] = input
    torch.testing.assert_close(tuple(topk_softmax_gate(wide[..., 1], 2)), tuple(expected))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("input must be of shape", ValueError, {"input": torch.zeros(())}),
        ("input must be of shape", ValueError, {"input": torch.zeros(3, 0)}),
        ("input must be a floating-point tensor", TypeError, {"input": torch.zeros(3).int()}),
        ("k must be from 1 to 4, got 0", ValueError, {"k": 0}),
        ("k must be from 1 to 4, got 5", ValueError, {"k": 5}),
        ("k must be an int", TypeError, {"k": 2.0}),
        ("dense must be a bool", TypeError, {"dense": 1}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(3, 4), "k": 2}
    with pytest.raises(error, match=f"topk_softmax_gate: {message}"):
        topk_softmax_gate(**(arguments | change))
    with pytest.raises(TypeError, match="unexpected keyword"):
        topk_softmax_gate(torch.zeros(3, 4), 2, densely=True)  # type: ignore[call-overload]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            topk_softmax_gate,
            lambda: {"input": draw(5, 3, 6)},
            differentiable=("input",),
            options=({"k": 2}, {"k": 2, "dense": True}),
        ),
    ]
