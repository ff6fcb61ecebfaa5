"""Power laws of weight decay and batch size, in logarithms, with the paper's constants."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import (
    adamw_timescale,
    critical_batch_size,
    optimal_batch_size,
    optimal_weight_decay,
)

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name

BATCHES = st.integers(1, 10**8)
RATES = st.floats(1e-6, 1)
TOKENS = st.floats(1e6, 1e14)
PARAMS = st.floats(1e5, 1e13)


@given(BATCHES, RATES, st.floats(1e-4, 10), TOKENS)
def test_timescale(batch: int, lr: float, decay: float, tokens: float) -> None:
    """The part of the run after which a parameter without gradient has decayed to 1 / e."""
    part = adamw_timescale(batch, lr, decay, tokens)
    assert isinstance(part, float)
    steps = part * (tokens / batch)
    assert steps * lr * decay == pytest.approx(1)


@given(BATCHES, RATES, TOKENS, PARAMS)
def test_weight_decay(batch: int, lr: float, tokens: float, params: float) -> None:
    decay = optimal_weight_decay(batch, lr, tokens, params)
    assert isinstance(decay, float)
    best = math.exp(math.log(1.084) - 0.527 * (math.log(tokens) - math.log(params)))
    assert adamw_timescale(batch, lr, decay, tokens) == pytest.approx(best)
    assert optimal_weight_decay(3 * batch, lr, tokens, params) == pytest.approx(3 * decay)
    longer = optimal_weight_decay(batch, lr, 2 * tokens, params)
    assert adamw_timescale(batch, lr, longer, 2 * tokens) < best
    other = optimal_weight_decay(batch, lr, tokens, params, coefficient=2, exponent=-1)
    expected = math.log(batch) - math.log(lr) - math.log(2 * params)
    assert math.log(other) == pytest.approx(expected)


@given(TOKENS)
def test_batch_sizes(tokens: float) -> None:
    logarithm = math.log(tokens)
    best = optimal_batch_size(tokens)
    assert best == pytest.approx(math.exp(math.log(0.0306) + 0.383 * logarithm))
    critical = critical_batch_size(tokens)
    assert critical == pytest.approx(math.exp(math.log(0.0471) + 0.462 * logarithm))
    for function in (optimal_batch_size, critical_batch_size):
        other = function(tokens, coefficient=3, exponent=0.5)
        assert other == pytest.approx(3 * math.sqrt(tokens))


def by_loops(function: Any, tensors: list[Tensor]) -> Tensor:
    """The function of numbers, element by element."""
    wide = torch.broadcast_tensors(*(tensor.double() for tensor in tensors))
    flat = zip(*(tensor.flatten().tolist() for tensor in wide), strict=True)
    values = [function(*numbers) for numbers in flat]
    return torch.tensor(values, dtype=torch.float64).reshape(wide[0].shape)


FUNCTIONS = [
    (adamw_timescale, 4),
    (optimal_weight_decay, 4),
    (optimal_batch_size, 1),
    (critical_batch_size, 1),
]
each = pytest.mark.parametrize(
    ("function", "count"), FUNCTIONS, ids=lambda one: getattr(one, "__name__", None)
)


@each
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_elementwise(function: Any, count: int, dtype: torch.dtype) -> None:
    shapes = ((3, 1), (5,), (), (2, 1, 5))
    tensors = [(torch.rand(shape) + 0.5).to(dtype) for shape in shapes[:count]]
    before = [tensor.clone() for tensor in tensors]
    actual = function(*tensors)
    assert actual.dtype == dtype
    truth = by_loops(function, tensors)
    eps = torch.finfo(dtype).eps
    unit = eps if dtype in (torch.bfloat16, torch.float16) else 8 * eps  # one for each operation
    torch.testing.assert_close(actual.double(), truth, rtol=unit, atol=0)
    assert all(map(torch.equal, tensors, before))
    empty = function(torch.ones(0, 1, dtype=dtype), *tensors[1:3], *[1.0] * (count > 1))
    assert empty.shape == ((0, 5) if count > 1 else (0, 1))


def test_half_precision_keeps_its_range() -> None:
    """A product of rate and decay, and tokens, that float16 does not hold."""
    lr = torch.tensor([1e-4], dtype=torch.float16)
    actual = adamw_timescale(2**20, lr, 1e-4, 2**33)
    assert actual.dtype == torch.float16
    assert actual.item() == pytest.approx(2**-13 * 1e8, rel=1e-3)


def test_numbers_and_tensors() -> None:
    counts = torch.tensor([10**9, 4 * 10**9])
    half = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    assert optimal_batch_size(counts).dtype == torch.float32
    assert adamw_timescale(counts, half, 0.1, 1e9).dtype == torch.bfloat16
    assert adamw_timescale(counts, half, half.double(), 1e9).dtype == torch.float64
    assert adamw_timescale(counts, 0.5, 0.5, 4 * 10**9).tolist() == [1, 4]
    assert optimal_batch_size(torch.tensor(1e9)).shape == ()


def test_of_no_values() -> None:
    """What is nan or infinite shows; what is refused is nan where reading is not free."""
    tokens = torch.tensor([math.nan, math.inf])
    assert optimal_batch_size(tokens).tolist() == pytest.approx([math.nan, math.inf], nan_ok=True)
    unread = torch.func.vmap(lambda lr: adamw_timescale(1.0, lr, 1.0, 1.0))
    assert unread(torch.tensor([-1.0, 0.5])).tolist() == pytest.approx([math.nan, 2], nan_ok=True)


@each
@pytest.mark.untyped
def test_transforms(function: Any, count: int) -> None:
    tensors = [(torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(count)]
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    expected = function(*tensors)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    torch.testing.assert_close(torch.func.vmap(function)(*tensors), expected)


@pytest.mark.untyped
def test_scalars_of_numpy() -> None:
    actual = adamw_timescale(np.int64(2**20), np.float64(0.5), np.float64(0.5), np.int64(2**22))
    assert type(actual) is float
    assert actual == 1
    assert type(optimal_batch_size(np.int64(10**9))) is float


def refusals() -> list[tuple[Any, str, type[Exception], dict[str, Any]]]:
    cases: list[tuple[Any, str, type[Exception], dict[str, Any]]] = []
    for function, arguments in ACCEPTS.items():
        for name in arguments:
            message = f"{name} must be a finite number above 0"
            cases += [(function, message, ValueError, {name: bad}) for bad in (0, -1.0, math.nan)]
            cases += [
                (function, f"{name} must be above 0 every", ValueError, {name: torch.zeros(2)}),
                (function, f"{name} must be a number", TypeError, {name: "1"}),
                (function, f"{name} must be a number or a t", TypeError, {name: torch.ones(2) > 0}),
            ]
        if function is not adamw_timescale:
            cases += [
                (function, "coefficient must be a finite n", ValueError, {"coefficient": 0}),
                (function, "exponent must be a finite numb", ValueError, {"exponent": math.inf}),
            ]
    return cases


ACCEPTS: dict[Any, dict[str, Any]] = {
    adamw_timescale: {"batch_size": 1, "lr": 0.1, "weight_decay": 0.1, "num_tokens": 5},
    optimal_weight_decay: {"batch_size": 1, "lr": 0.1, "num_tokens": 5, "num_params": 3},
    optimal_batch_size: {"num_tokens": 5},
    critical_batch_size: {"num_tokens": 5},
}


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("function", "message", "error", "change"),
    refusals(),
    ids=lambda one: getattr(one, "__name__", None),
)
def test_bad_input(
    function: Any, message: str, error: type[Exception], change: dict[str, Any]
) -> None:
    function(**ACCEPTS[function])
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**ACCEPTS[function] | change)


@samples.of(Call)
def calls() -> list[Call]:
    def tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
        return {name: draw(5).abs() + 0.5 for name in arguments}

    return [
        Call(
            function,
            lambda arguments=arguments: tensors(arguments),  # type: ignore[misc]
            differentiable=tuple(arguments),
        )
        for function, arguments in ACCEPTS.items()
    ]
