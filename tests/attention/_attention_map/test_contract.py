"""Transforms, operators, memory, and what the functions refuse."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilework.attention import (
    attention_column_mass,
    attention_entropy,
    attention_lse,
    block_pooled_attention,
)
from tilework.attention._attention_map import tiled
from tilework.attention._attention_map.common import Blocks, Columns, Entropy, Queries, Rows

QUERY, KEY = torch.zeros(2, 4, 9, 5).double(), torch.zeros(2, 2, 11, 5).double()
LSE = torch.zeros(2, 4, 9).double()
OPTIONS: dict[str, Any] = {"is_causal": True, "enable_gqa": True}


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (QUERY, KEY):
        tensor.normal_()
    LSE.copy_(attention_lse(QUERY, KEY, **OPTIONS))


def lse(query: Tensor, key: Tensor, implementation: str) -> Tensor:
    return attention_lse(query, key, implementation=implementation, **OPTIONS)


def entropy(query: Tensor, key: Tensor, implementation: str) -> Tensor:
    given = attention_lse(query, key, implementation=implementation, **OPTIONS)
    return attention_entropy(query, key, given, implementation=implementation, **OPTIONS)


def mass(query: Tensor, key: Tensor, implementation: str) -> Tensor:
    given = attention_lse(query, key, implementation=implementation, **OPTIONS)
    return attention_column_mass(
        query, key, given, query_window=5, implementation=implementation, **OPTIONS
    )


def pooled(query: Tensor, key: Tensor, implementation: str) -> Tensor:
    given = attention_lse(query, key, implementation=implementation, **OPTIONS)
    return block_pooled_attention(
        query,
        key,
        given,
        block_size=4,
        pool="mean",
        normalize=True,
        implementation=implementation,
        **OPTIONS,
    )


DIFFERENTIABLE = (lse, entropy)
FUNCTIONS = (lse, entropy, mass, pooled)
pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradcheck(function: Callable[..., Tensor], implementation: str) -> None:
    leaves = [tensor[:1, :, :4, :3].clone().requires_grad_() for tensor in (QUERY, KEY)]
    call = partial(function, implementation=implementation)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("function", [mass, pooled])
def test_others_are_constants(function: Callable[..., Tensor], implementation: str) -> None:
    """Also of a log-sum-exp that has a gradient."""
    leaves = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY)]
    assert not function(*leaves, implementation).requires_grad


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda loss: torch.func.grad(lambda q, k: loss(q, k).sin().sum(), (0, 1))(QUERY, KEY),
    "jvp": lambda loss: torch.func.jvp(loss, (QUERY, KEY), (QUERY.sin(), KEY.cos())),
    "vmap": lambda loss: torch.func.vmap(loss, (0, None))(torch.stack([QUERY, QUERY.sin()]), KEY),
    "vmap of grad": lambda loss: torch.func.vmap(
        torch.func.grad(lambda q, k: loss(q, k).sin().sum()), (0, None)
    )(torch.stack([QUERY, QUERY.sin()]), KEY),
}


@pytest.mark.untyped
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(
    function: Callable[..., Tensor], transform: Callable[..., Any]
) -> None:
    results = (
        tree_leaves(transform(partial(function, implementation=name)))
        for name in ("tiled", "reference")
    )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_as_one_graph_for_every_length(
    function: Callable[..., Tensor], implementation: str
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    call = partial(function, implementation=implementation)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for length in (14, 22, 30):
        leaves = [torch.randn(2, heads, length, 5, requires_grad=True) for heads in (4, 2)]
        results = []
        for output in (compiled(*leaves), call(*leaves)):
            results.append([output])
            if function in DIFFERENTIABLE:
                results[-1] += torch.autograd.grad(output.sin().sum(), leaves)
        torch.testing.assert_close(*results)
    assert len(graphs) == 1


@pytest.mark.untyped
def test_operators() -> None:
    # Some seconds: each check traces an operator and its gradient.
    operators = torch.ops.tilework
    query, key = (tensor.detach().clone().requires_grad_() for tensor in (QUERY, KEY))
    options = (True, 0.4, "tiled")
    opcheck: Any = torch.library.opcheck
    opcheck(operators.attention_lse, (query, key, *options))
    opcheck(operators.attention_entropy, (query, key, LSE, *options))
    opcheck(operators.attention_column_mass, (QUERY, KEY, LSE, 2, *options))
    opcheck(operators.block_pooled_attention, (QUERY, KEY, LSE, 4, 3, True, *options))
    grad = torch.randn_like(LSE).requires_grad_()
    results = operators.attention_entropy(QUERY, KEY, LSE, *options)
    for needed in ([True, True], [False, True]):
        given = grad, needed, *options
        opcheck(operators.attention_lse_backward, (query, key, LSE, *given))
        opcheck(operators.attention_entropy_backward, (query, key, LSE, *results, *given))


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast(function: Callable[..., Tensor], implementation: str) -> None:
    tensors = QUERY.float(), KEY.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = function(*tensors, implementation)
    expected = function(*(tensor.bfloat16() for tensor in tensors), implementation)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("is_causal", [False, True])
def test_scores_are_not_stored(is_causal: bool) -> None:
    query, key = torch.randn(1, 2, 200, 4), torch.randn(1, 1, 200, 4)
    given = torch.zeros(1, 2, 200)
    with Largest() as largest:
        options = is_causal, 1.0, "tiled"
        rows = Rows(query, key, given, *options)
        tiled.attention_lse(Queries(query, key, *options))
        tiled.attention_entropy(rows)
        tiled.attention_column_mass(Columns(query, key, given, 3, *options))
        tiled.block_pooled_attention(Blocks(query, key, given, 8, 8, True, *options))
        tiled.block_pooled_attention(Blocks(query, key, given, 300, 150, False, *options))
        results = Entropy(given, given)
        tiled.attention_entropy_backward(rows, results, results, frozenset(("query", "key")))
    assert largest.numbers <= max(query.numel(), 25 * 25 * 2)


@pytest.mark.parametrize("block", [1, 5, 40])
def test_tiles_beyond_the_diagonal_are_not_computed(block: int) -> None:
    rows = torch.zeros(1, 1, 100, 1)
    planes = tiled._Planes(Queries(rows, rows, True, 1.0, "tiled"), None)
    tiles = list(planes.tiles(block, block))
    assert all(tile.columns.start < tile.rows.stop for tile in tiles)
    seen = torch.zeros(100, 100, dtype=torch.int)
    for tile in tiles:
        seen[tile.rows, tile.columns] += 1
    assert (seen.tril() == torch.ones(100, 100).tril()).all()
    assert seen.max() == 1


NAMES: dict[str, Callable[..., Any]] = {
    "attention_lse": lambda query, key, lse, **options: attention_lse(query, key, **options),
    "attention_entropy": attention_entropy,
    "attention_column_mass": attention_column_mass,
    "block_pooled_attention": block_pooled_attention,
}
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("query must be a floating-point tensor", TypeError, {"query": QUERY.long()}),
    ("query must be of shape (B, H, L, E)", ValueError, {"query": QUERY[0]}),
    ("key must be of query's", TypeError, {"key": KEY.float()}),
    ("key must be of shape", ValueError, {"key": KEY[..., :4]}),
    (
        f"key must be of query's {QUERY.shape[1]} heads, or with enable_gqa=True",
        ValueError,
        {"enable_gqa": False},
    ),
    ("key must be of a number of heads that divides", ValueError, {"query": QUERY[:, :3]}),
    ("key must lie on the device of query", ValueError, {"key": KEY.to("meta")}),
    ("scale must be a number", TypeError, {"scale": "large"}),
    ("implementation must be one of 'triton', 'tiled'", ValueError, {"implementation": "x"}),
    (
        "implementation='triton' cannot be used: it takes float16, bfloat16, float32",
        ValueError,
        {"implementation": "triton"},
    ),
]
BAD_LSE: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("lse must be of shape (2, 4, 9), got", ValueError, {"lse": LSE[..., :8]}),
    ("lse must be a floating-point tensor", TypeError, {"lse": LSE.long()}),
    ("lse must be float64 as query is float64, got", TypeError, {"lse": LSE.float()}),
    ("lse must lie on the device of query", ValueError, {"lse": LSE.to("meta")}),
]
BAD_OPTIONS: list[tuple[str, str, type[Exception], dict[str, Any]]] = [
    ("block_pooled_attention", "pool must be one of", ValueError, {"pool": "min"}),
    ("block_pooled_attention", "block_size must be a pair of ints", ValueError, {"block_size": 0}),
    ("block_pooled_attention", "block_size must be an int", TypeError, {"block_size": 2.5}),
    ("attention_column_mass", "query_window must be an int", TypeError, {"query_window": 2.5}),
    (
        "attention_column_mass",
        "query_window must be an int of at least 1",
        ValueError,
        {"query_window": 0},
    ),
]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("name", "message", "error", "change"),
    [
        *((name, *case) for name in NAMES for case in BAD),
        *((name, *case) for name in list(NAMES)[1:] for case in BAD_LSE),
        *BAD_OPTIONS,
    ],
)
def test_bad_input(name: str, message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "lse": LSE, "enable_gqa": True}
    arguments |= change
    tensors = [arguments.pop(name) for name in ("query", "key", "lse")]
    with pytest.raises(error) as caught:
        NAMES[name](*tensors, **arguments)
    assert f"{name}: {message}" in str(caught.value)


@pytest.mark.untyped
def test_features_that_kernels_do_not_take() -> None:
    query = key = torch.zeros(1, 1, 3, 257)
    with pytest.raises(ValueError, match="it takes 1 to 256 features, got 257"):
        attention_lse(query, key, implementation="triton")


@pytest.mark.untyped
def test_options_are_keywords() -> None:
    for function in (attention_entropy, attention_column_mass, block_pooled_attention):
        with pytest.raises(TypeError, match="positional"):
            function(QUERY, KEY, LSE, True)  # type: ignore[operator]
    with pytest.raises(TypeError, match="positional"):
        attention_lse(QUERY, KEY, True)  # type: ignore[misc]
