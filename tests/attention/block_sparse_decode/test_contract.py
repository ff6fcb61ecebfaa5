"""Transforms, and what the functions refuse."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tilework.attention import block_sparse_decode, paged_block_sparse_decode

import samples
from attention.tensors import GROUPS, heads
from calls import Call, Tensors, draw

QUERY, QUERIES = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 3, 8)
KEY, VALUE = torch.zeros(2, 2, 20, 8), torch.zeros(2, 2, 20, 3)
INDICES = torch.tensor([[[2, 0], [1, 4]], [[3, 1], [0, 2]]])
COUNTS = torch.tensor([[2, 1], [0, 2]])
LENGTHS = torch.tensor([20, 13])
LISTS = {"kv_indices": INDICES, "kv_num_blocks": COUNTS, "seq_lengths": LENGTHS, "block_size": 4}
KEYS, VALUES = torch.zeros(9, 8, 2, 8), torch.zeros(9, 8, 2, 3)
TABLE = torch.tensor([[3, 8, 1], [0, 7, -1]])
LISTS_OF_TOKENS = {
    "kv_indices": torch.stack([INDICES, INDICES.flip(2), INDICES], 2),
    "kv_num_blocks": torch.stack([COUNTS, COUNTS, COUNTS.flip(1)], 2),
}


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (QUERY, QUERIES, KEY, VALUE, KEYS, VALUES):
        tensor.normal_()


def decode(implementation: str, **lists: Any) -> Callable[..., Any]:
    options = LISTS | lists | {"is_causal": True, "return_lse": True}
    options |= {"implementation": implementation}
    return partial(block_sparse_decode, **options)  # type: ignore[arg-type]


@pytest.mark.untyped
def test_gradients_are_refused() -> None:
    for name in range(3):
        leaves = [tensor.clone() for tensor in (QUERY, KEY, VALUE)]
        leaves[name].requires_grad_()
        with pytest.raises(RuntimeError, match="block_sparse_decode: it is for inference"):
            block_sparse_decode(*leaves)
        with torch.no_grad():
            assert not block_sparse_decode(*leaves).requires_grad  # type: ignore[union-attr]
        caches = [QUERY.clone(), KEYS.clone(), VALUES.clone()]
        caches[name].requires_grad_()
        with pytest.raises(RuntimeError, match="paged_block_sparse_decode: it is for inference"):
            paged_block_sparse_decode(*caches, TABLE, LENGTHS, block_size=8)

    def loss(query: Tensor) -> Tensor:
        return block_sparse_decode(query, KEY, VALUE).sum()  # type: ignore[union-attr]

    with pytest.raises(RuntimeError, match="it is for inference"):
        torch.func.grad(loss)(QUERY)
    operator = torch.ops.tilework.block_sparse_decode
    output, _ = operator(
        QUERY.clone().requires_grad_(), KEYS[:2], VALUES[:2], *[None] * 4, 4, 0.1, "tiled"
    )
    with pytest.raises(RuntimeError, match="has no gradients"):
        output.sum().backward()


KINDS = pytest.mark.parametrize(
    ("one", "lists"),
    [(QUERY, {}), (QUERIES, {}), (QUERIES, LISTS_OF_TOKENS)],
    ids=["one token", "several tokens", "lists of tokens"],
)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@KINDS
def test_functional_transforms(one: Tensor, lists: dict[str, Any], implementation: str) -> None:
    function = decode(implementation, **lists)
    queries = torch.stack([one, -one])
    batched = torch.func.vmap(function, (0, None, None))(queries, KEY, VALUE)
    for index, query in enumerate(queries):
        single = function(query, KEY, VALUE)
        for actual, expected in zip(batched, single, strict=True):
            torch.testing.assert_close(actual[index], expected)
    tangents = [torch.randn_like(tensor) for tensor in (one, KEY, VALUE)]
    _, tangent = torch.func.jvp(lambda *t: function(*t)[0], (one, KEY, VALUE), tuple(tangents))
    wide = [tensor.double() for tensor in (one, KEY, VALUE)]
    steps = [
        function(*(t + sign * 1e-6 * d for t, d in zip(wide, tangents, strict=True)))[0]
        for sign in (1, -1)
    ]
    torch.testing.assert_close(tangent.double(), (steps[0] - steps[1]) / 2e-6, rtol=1e-4, atol=1e-5)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@KINDS
def test_compiles_as_one_graph_for_every_length(
    one: Tensor, lists: dict[str, Any], implementation: str
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = decode(implementation, **lists)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (20, 24, 33):
        key, value = torch.randn(2, 2, tokens, 8), torch.randn(2, 2, tokens, 3)
        torch.testing.assert_close(compiled(one, key, value), function(one, key, value))
    assert len(graphs) == 1


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_compiles_as_one_graph_for_every_number_of_tokens(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = decode(implementation)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 6, 7):
        query = torch.randn(2, 4, tokens, 8)
        torch.testing.assert_close(compiled(query, KEY, VALUE), function(query, KEY, VALUE))
    assert len(graphs) == 1


@pytest.mark.untyped
def test_operator() -> None:
    lists = TABLE, LENGTHS, INDICES[:, :1], COUNTS
    of_tokens = TABLE, LENGTHS, *LISTS_OF_TOKENS.values()
    operator = torch.ops.tilework.block_sparse_decode
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for arguments in (
        (QUERY, KEYS, VALUES, *lists),
        (QUERIES, KEYS, VALUES, *lists),
        (QUERIES, KEYS, VALUES, *of_tokens),
        (QUERY, KEYS[:2], VALUES[:2], *[None] * 4),
    ):
        torch.library.opcheck(
            operator,
            (*arguments, 4, 0.3, "tiled"),
            test_utils=(*tests, "test_autograd_registration"),
        )


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_autocast_changes_nothing(implementation: str) -> None:
    expected = decode(implementation)(QUERY, KEY, VALUE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = decode(implementation)(QUERY, KEY, VALUE)
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert torch.equal(one, other)


def test_chooses_by_device() -> None:
    default = block_sparse_decode(QUERY, KEY, VALUE)
    tiled = block_sparse_decode(QUERY, KEY, VALUE, implementation="tiled")
    assert torch.equal(default, tiled)  # type: ignore[arg-type]


BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("query must be a floating-point tensor", TypeError, {"query": QUERY.long()}),
    (
        "query must be of shape (B, Hq, 1, E), or with is_causal=True (B, Hq, T, E), got float32",
        ValueError,
        {"query": QUERY[0], "is_causal": True},
    ),
    ("query must be of shape (B, Hq, 1, E), or with", ValueError, {"query": QUERIES}),
    ("query must be of shape (B, Hq, 1, E), or with", ValueError, {"query": QUERIES[:, :, :0]}),
    ("kv_indices must be an integer tensor, got float32", TypeError, {"kv_indices": INDICES / 1}),
    ("kv_indices must be an integer tensor, got bool", TypeError, {"kv_indices": INDICES > 0}),
    (
        "kv_indices must be of shape (2, 2 or 1, K) or (2, 2 or 1, 1, K), got",
        ValueError,
        {"kv_indices": INDICES[0]},
    ),
    (
        "kv_indices must be of shape (2, 2 or 1, K) or (2, 2 or 1, 3, K), got",
        ValueError,
        {
            "query": QUERY.expand(2, 4, 3, 8),
            "is_causal": True,
            "kv_indices": INDICES[:, :, None].expand(2, 2, 2, 2),
            "kv_num_blocks": None,
        },
    ),
    (
        "kv_num_blocks must be of shape (2, 2 or 1, 1), got int64 of shape (2, 2)",
        ValueError,
        {"kv_indices": INDICES[:, :, None]},
    ),
    (
        "kv_num_blocks must be of shape (2, 2 or 1), got int64 of shape (2, 2, 1)",
        ValueError,
        {"kv_num_blocks": COUNTS[..., None]},
    ),
    ("kv_indices must be of shape (2, 2 or 1, K)", ValueError, {"kv_indices": INDICES[:1]}),
    (
        "kv_indices must be of shape (2, 2 or 1, K)",
        ValueError,
        {"kv_indices": INDICES.repeat(1, 2, 1)},
    ),
    ("kv_indices must lie on", ValueError, {"kv_indices": INDICES.to("meta")}),
    (
        "kv_indices must be distinct within a list, got 2 more than once",
        ValueError,
        {"kv_indices": INDICES.masked_fill(INDICES == 0, 2)},
    ),
    (
        "kv_indices must be distinct within a list, got 1 more than once",
        ValueError,
        {"kv_indices": INDICES.masked_fill(INDICES == 4, 1), "kv_num_blocks": None},
    ),
    ("kv_num_blocks must be an integer tensor", TypeError, {"kv_num_blocks": COUNTS / 1}),
    ("kv_num_blocks must be of shape (2, 2 or 1)", ValueError, {"kv_num_blocks": COUNTS[0]}),
    ("kv_num_blocks must be of shape (2, 2 or 1)", ValueError, {"kv_num_blocks": COUNTS[:1]}),
    ("kv_num_blocks must lie on", ValueError, {"kv_num_blocks": COUNTS.to("meta")}),
    (
        "kv_num_blocks must be from 0 to 2, got 0 to 3",
        ValueError,
        {"kv_num_blocks": COUNTS.where(COUNTS != 1, 3)},
    ),
    ("kv_num_blocks must be from 0 to 2", ValueError, {"kv_num_blocks": COUNTS - 1}),
    ("kv_num_blocks must be None without kv_indices", ValueError, {"kv_indices": None}),
    ("seq_lengths must be an integer tensor", TypeError, {"seq_lengths": LENGTHS / 1}),
    ("seq_lengths must be of shape (2,)", ValueError, {"seq_lengths": LENGTHS[:1]}),
    ("seq_lengths must lie on", ValueError, {"seq_lengths": LENGTHS.to("meta")}),
    ("seq_lengths must be from 0 to 2", ValueError, {"seq_lengths": LENGTHS - 14}),
    ("block_size must be an int", TypeError, {"block_size": 4.0}),
    ("block_size must be an int of at least 1", ValueError, {"block_size": 0}),
    ("scale must be a number", TypeError, {"scale": "large"}),
    ("implementation must be one of 'triton', 'tiled', 'ref", ValueError, {"implementation": "x"}),
]
BAD_CONTIGUOUS: list[tuple[str, type[Exception], dict[str, Any]]] = [
    (
        "kv_indices must be from 0 to 4 within the counts, got -1 to 1",
        ValueError,
        {"kv_indices": INDICES.where(INDICES != 2, -1)},
    ),
    (
        "kv_indices must be from 0 to 4 within the counts, got 0 to 5",
        ValueError,
        {"kv_indices": INDICES.where(INDICES != 4, 5), "kv_num_blocks": None},
    ),
    ("key must be of shape (B, Hkv, S, E)", ValueError, {"key": KEY[0]}),
    ("key must be of query's torch.float32, got float64", TypeError, {"key": KEY.double()}),
    ("value must be of query's torch.float32", TypeError, {"value": VALUE.half()}),
    ("value must be a floating-point tensor", TypeError, {"value": VALUE.long()}),
    ("key must be of shape (2, 2, 20, 8)", ValueError, {"key": KEY[..., :7]}),
    ("key must be of shape (2, 2, 20, 8)", ValueError, {"key": KEY[:1]}),
    ("value must be of shape (2, 2, 20, 3)", ValueError, {"value": VALUE[:, :, :19]}),
    ("value must lie on the device of query", ValueError, {"value": VALUE.to("meta")}),
    (
        "key must be of a number of heads that divides query's 4",
        ValueError,
        {"key": KEY.repeat(1, 2, 1, 1)[:, :3]},
    ),
    ("key must be of a number of heads that divides query's 4", ValueError, {"key": KEY[:, :0]}),
    (
        "seq_lengths must be from 0 to 20, got 13 to 21",
        ValueError,
        {"seq_lengths": LENGTHS.where(LENGTHS < 20, 21)},
    ),
]
BAD_PAGED: list[tuple[str, type[Exception], dict[str, Any]]] = [
    (
        "kv_indices must be from 0 to 5 within the counts, got 0 to 6",
        ValueError,
        {"kv_indices": INDICES.where(INDICES != 4, 6), "kv_num_blocks": None},
    ),
    (
        "key_cache must be of shape (num_pages, page_size, Hkv, E)",
        ValueError,
        {"key_cache": KEYS[0]},
    ),
    ("value_cache must be of query's", TypeError, {"value_cache": VALUES.half()}),
    ("key_cache must be of shape (9, 8, 2, 8)", ValueError, {"key_cache": KEYS[..., :7]}),
    ("value_cache must be of shape (9, 8, 2, 3)", ValueError, {"value_cache": VALUES[:8]}),
    (
        "key_cache must be of a number of heads that divides",
        ValueError,
        {"key_cache": KEYS.repeat(1, 1, 2, 1)[:, :, :3]},
    ),
    ("key_cache must lie on", ValueError, {"key_cache": KEYS.to("meta")}),
    ("block_table must be an integer tensor", TypeError, {"block_table": TABLE / 1}),
    ("block_table must be of shape (2, max_pages)", ValueError, {"block_table": TABLE[0]}),
    ("block_table must be of shape (2, max_pages)", ValueError, {"block_table": TABLE[:1]}),
    ("block_table must lie on", ValueError, {"block_table": TABLE.to("meta")}),
    (
        "block_table must be from 0 to 8 within the sequences, got 0 to 9",
        ValueError,
        {"block_table": TABLE.where(TABLE != 8, 9)},
    ),
    (
        "block_table must be from 0 to 8 within the sequences, got -1 to 8",
        ValueError,
        {"block_table": TABLE.where(TABLE != 7, -1)},
    ),
    (
        "seq_lengths must be from 0 to 24, got 13 to 25",
        ValueError,
        {"seq_lengths": LENGTHS.where(LENGTHS < 20, 25)},
    ),
    (
        "block_size must be a multiple or a divisor of the page size 8, got 12",
        ValueError,
        {"block_size": 12},
    ),
    (
        "block_size must be a multiple or a divisor of the page size 0",
        ValueError,
        {"key_cache": KEYS[:, :0], "value_cache": VALUES[:, :0]},
    ),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), BAD + BAD_CONTIGUOUS)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | LISTS | change
    tensors = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(error) as caught:
        block_sparse_decode(*tensors, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"block_sparse_decode: {message}")


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), BAD_PAGED + BAD)
def test_bad_input_with_pages(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    caches = {"query": QUERY, "key_cache": KEYS, "value_cache": VALUES, "block_table": TABLE}
    arguments = caches | LISTS | change
    tensors = [arguments.pop(name) for name in (*caches, "seq_lengths")]
    with pytest.raises(error) as caught:
        paged_block_sparse_decode(*tensors, **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"paged_block_sparse_decode: {message}")


@pytest.mark.untyped
def test_sizes_and_dtypes_that_kernels_do_not_take() -> None:
    wide = torch.zeros(1, 1, 1, 257)
    with pytest.raises(ValueError, match="it takes 1 to 256 features, got 257 and 257"):
        block_sparse_decode(wide, wide, wide, implementation="triton")
    double = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="it takes float16, bfloat16, float32, not float64"):
        block_sparse_decode(double, double, double, implementation="triton")


def ranked(
    query: Tensor, key: Tensor, value: Tensor, scores: Tensor, seq_lengths: Tensor, **options: Any
) -> Any:
    blocks = scores.argsort(-1)[..., :2]
    return block_sparse_decode(query, key, value, blocks, seq_lengths=seq_lengths, **options)


@samples.of(Call)
def calls() -> list[Call]:
    def lengths() -> Tensor:
        return torch.tensor([41, 20, 7])

    def paged() -> Tensors:
        return {
            "query": draw(3, 4, 1, 6),
            "key_cache": draw(11, 8, 2, 6),
            "value_cache": draw(11, 8, 2, 5),
            "block_table": torch.randint(11, (3, 6)),
            "seq_lengths": lengths(),
        }

    sizes = GROUPS | {1: 1, 8: 8, 41: 97}
    return [
        Call(
            block_sparse_decode,
            lambda: (
                heads("query", "key", "value", queries=1, keys=41)
                | {"scores": draw(3, 2, 3), "seq_lengths": lengths()}
            ),
            by=ranked,
            options=({"block_size": 16}, {"block_size": 16, "return_lse": True}),
            sizes=sizes,
        ),
        Call(
            block_sparse_decode,
            lambda: heads("query", "key", "value", queries=3, keys=41),
            options=({"block_size": 16, "is_causal": True},),
            sizes=sizes,
        ),
        Call(paged_block_sparse_decode, paged, options=({"block_size": 16},), sizes=sizes),
    ]
