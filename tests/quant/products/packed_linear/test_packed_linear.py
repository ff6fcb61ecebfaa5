"""Transforms, autocast, and what the function refuses."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tilework.quant import pack_codes, packed_linear
from tilework.quant.products.packed_linear import reference, tiled
from tilework.quant.products.packed_linear.common import Backward, Product

import samples
from calls import Call, draw
from helpers import Memory
from quant.products.packed_linear.problem import Problem

every = pytest.mark.parametrize("implementation", ["reference", "tiled"])


def function_of(problem: Problem, implementation: str) -> Any:
    """The function of input and bias."""

    def function(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return packed_linear(
            input,
            problem.packed,
            problem.scale,
            problem.zero_point,
            bias,
            bits=problem.bits,
            group_size=problem.group_size,
            implementation=implementation,
        )

    return function


@samples.of(Call)
def calls() -> list[Call]:
    def tensors() -> dict[str, Any]:
        return {
            "input": draw(2, 3, 9),
            "packed": pack_codes(torch.randint(16, (4, 9)), 4),
            "scale": draw(4, 3),
            "zero_point": draw(4, 3),
            "bias": draw(4),
        }

    return [
        Call(
            packed_linear,
            tensors,
            differentiable=("input", "bias"),
            statistics=("scale", "zero_point"),
            options=({"bits": 4, "group_size": 4},),
            # The columns, and with them the bytes and the groups; 3 is a batch too.
            sizes={9: 9, 5: 5, 3: 3},
        )
    ]


@pytest.mark.untyped
@every
def test_second_derivatives(implementation: str) -> None:
    problem = Problem.draw((3,), 9, 5, 4, 4, dtype=torch.float64)
    function = function_of(problem, implementation)
    leaves = [problem.input.requires_grad_(), problem.bias.requires_grad_()]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.untyped
@every
def test_operators(implementation: str) -> None:
    problem = Problem.draw((3,), 9, 5, 4, 4, dtype=torch.float64)
    codes = problem.packed, problem.scale, problem.zero_point
    leaf = problem.input.requires_grad_()
    options = 9, 4, 4, implementation
    operators = torch.ops.tilework
    torch.library.opcheck(operators.packed_linear.default, (leaf, *codes, problem.bias, *options))
    grad = draw(3, 5).requires_grad_()
    torch.library.opcheck(operators.packed_linear_backward.default, (grad, *codes, *options))


@pytest.mark.untyped
@every
def test_functional_transforms(implementation: str) -> None:
    problem = Problem.draw((3,), 9, 5, 4, 4)
    function = function_of(problem, implementation)
    inputs = torch.randn(2, 3, 9)
    expected = torch.stack([function(one, problem.bias) for one in inputs])
    batched = torch.func.vmap(function, (0, None))(inputs, problem.bias)
    torch.testing.assert_close(batched, expected)
    grad = torch.func.grad(lambda one: function(one).square().sum())
    weight = problem.weight().float()
    torch.testing.assert_close(grad(inputs[0]), 2 * inputs[0] @ weight.mT @ weight)


@pytest.mark.untyped
@every
def test_compiles_as_one_graph_for_every_batch(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    problem = Problem.draw((3,), 9, 5, 4, 4)
    function = function_of(problem, implementation)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows in (7, 2, 12):  # no size that another tensor has
        input = torch.randn(rows, 9, requires_grad=True)
        torch.testing.assert_close(compiled(input, problem.bias), function(input, problem.bias))
    assert len(graphs) == 1


@every
def test_checkpoints(implementation: str) -> None:
    problem = Problem.draw((3,), 9, 5, 4, 4)
    function = function_of(problem, implementation)
    input = problem.input.requires_grad_()
    (expected,) = torch.autograd.grad(function(input).sum(), input)
    for use_reentrant in (False, True):
        output = checkpoint(function, input, use_reentrant=use_reentrant)
        output.sum().backward()
        assert torch.equal(input.grad, expected)  # type: ignore[arg-type]
        input.grad = None


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_autocast_is_that_of_linear(implementation: str, dtype: torch.dtype) -> None:
    problem = Problem.draw((3,), 9, 5, 4, 4, dtype=dtype)
    weight = problem.weight().to(dtype)
    input = problem.input.requires_grad_()
    function = function_of(problem, implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.linear(input, weight, problem.bias)
        output = function(input, problem.bias)
    assert output.dtype == expected.dtype
    unit = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output, expected, rtol=4 * unit, atol=64 * unit)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert grad.dtype == dtype


def test_nothing_is_kept_of_the_input() -> None:
    """What is saved are codes and grids."""
    problem = Problem.draw((3,), 9, 5, 4, 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda one: one):
        function_of(problem, "tiled")(problem.input.requires_grad_(), problem.bias)
    weights = problem.packed, problem.scale, problem.zero_point
    assert [one.data_ptr() for one in saved] == [one.data_ptr() for one in weights]


def test_tiles_bound_the_memory() -> None:
    problem = Problem.draw((1,), 1024, 16384, 4, 128)
    whole = 4 * 1024 * 16384
    weights = problem.packed, problem.scale, problem.zero_point
    options = 1024, 4, 128
    for room, low, high in ((tiled, 0, whole / 2), (reference, whole, torch.inf)):
        with Memory(problem.input, *weights) as memory:
            room.forward(Product(problem.input, *weights, problem.bias, *options, "direct"))
            room.backward(Backward(torch.ones(1, 16384), *weights, *options, "direct"))
        assert low <= memory.peak <= high


@pytest.mark.untyped
@every
def test_operations(implementation: str) -> None:
    problem = Problem.draw((2, 3), 9, 5, 4, 4)
    input = problem.input.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        output = function_of(problem, implementation)(input, problem.bias)
        assert counter.get_total_flops() == 2 * 6 * 9 * 5
        output.sum().backward()
    assert counter.get_total_flops() == 4 * 6 * 9 * 5


def arguments() -> dict[str, Any]:
    """Arguments that are accepted."""
    return {
        "input": torch.ones(3, 9),
        "packed": torch.ones(5, 5, dtype=torch.uint8),
        "scale": torch.ones(5, 3),
        "zero_point": torch.ones(5, 3),
        "bias": torch.ones(5),
        "bits": 4,
        "group_size": 4,
    }


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("input must be a floating-point tensor", TypeError, {"input": torch.ones(3, 9).long()}),
        ("input must be of at least one dimension", ValueError, {"input": torch.tensor(1.0)}),
        ("bits must be an int from 1 to 8", ValueError, {"bits": 9}),
        ("bits must be an int, got", TypeError, {"bits": 4.0}),
        ("group_size must be an int of at least 1", ValueError, {"group_size": 0}),
        ("group_size must be an int, got", TypeError, {"group_size": 4.0}),
        ("packed must be a tensor of uint8", TypeError, {"packed": torch.ones(5, 5)}),
        (
            r"packed must be of shape \(out, 5\) for input's 9 features",
            ValueError,
            {"packed": torch.ones(5, 4, dtype=torch.uint8)},
        ),
        (
            r"packed must be of shape \(out, 9\)",
            ValueError,
            {"bits": 8},
        ),
        ("packed must be of shape", ValueError, {"packed": torch.ones(5, dtype=torch.uint8)}),
        (r"scale must be of shape \(5, 3\)", ValueError, {"scale": torch.ones(5, 2)}),
        (
            r"zero_point must be of shape \(5, 1\)",
            ValueError,
            {"group_size": None, "scale": torch.ones(5, 1)},
        ),
        ("scale must be a floating-point tensor", TypeError, {"scale": torch.ones(5, 3).long()}),
        (
            "zero_point must not require a gradient",
            ValueError,
            {"zero_point": torch.ones(5, 3, requires_grad=True)},
        ),
        ("bias must be of input's torch.float32", TypeError, {"bias": torch.ones(5).double()}),
        (r"bias must be of shape \(5,\)", ValueError, {"bias": torch.ones(4)}),
        (
            "bias must lie on the device of input",
            ValueError,
            {"bias": torch.ones(5, device="meta")},
        ),
        ("implementation must be one of", ValueError, {"implementation": "fast"}),
        (
            "implementation='triton' cannot be used: it takes",
            ValueError,
            {"implementation": "triton", "input": torch.ones(3, 9).double(), "bias": None},
        ),
    ],
)
def test_refuses(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    packed_linear(**arguments())
    with pytest.raises(error, match=f"^packed_linear: {message}"):
        packed_linear(**arguments() | change)


@pytest.mark.untyped
def test_the_kernels_take_whole_parts_of_bytes() -> None:
    from tilework.quant.products.packed_linear import IMPLEMENTATIONS

    refuses = IMPLEMENTATIONS[0].refuses
    assert refuses is not None
    taken = {bits for bits in range(1, 9) if refuses(torch.ones(1), bits=bits) is None}
    assert taken == {1, 2, 4, 8}
    call = partial(packed_linear, torch.ones(1, 8), torch.ones(1, 3, dtype=torch.uint8))
    grids = torch.ones(1, 1), torch.ones(1, 1)
    with pytest.raises(ValueError, match="implementation='triton' cannot be used"):
        call(*grids, bits=3, implementation="triton")
    assert call(*grids, bits=3).shape == (1, 1)
