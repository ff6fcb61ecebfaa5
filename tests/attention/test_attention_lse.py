import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilework.attention import BlockLayout, attention_lse, block_sparse_attention

import samples
from attention._attention_map.problem import (
    BUILT,
    IMPLEMENTATIONS,
    LENGTHS,
    check,
    scores,
    strided,
    tensors,
)
from attention.tensors import GROUPS, heads
from calls import Call

pytestmark = pytest.mark.usefixtures("small_tiles")


def composed(query, key, is_causal, scale=None):  # type: ignore[no-untyped-def]
    result = scores(query, key, is_causal, scale)
    return result.to(torch.promote_types(query.dtype, torch.float32)).logsumexp(-1)


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool) -> None:
    function = partial(
        attention_lse,
        is_causal=is_causal,
        scale=0.4,
        enable_gqa=True,
        implementation=implementation,
    )
    truth = partial(composed, is_causal=is_causal, scale=0.4)
    check(tensors(dtype=dtype), function, truth, differentiable=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(3, 1, 5), (1, 1, 80)])
def test_lengths_heads_and_features(
    implementation: str, is_causal: bool, lengths: tuple[int, int], heads: tuple[int, int, int]
) -> None:
    heads, kv_heads, features = heads  # type: ignore[assignment]
    leaves = tensors(*lengths, features, batch=1, heads=heads, kv_heads=kv_heads)  # type: ignore[arg-type]
    function = partial(
        attention_lse, is_causal=is_causal, enable_gqa=True, implementation=implementation
    )
    check(leaves, function, partial(composed, is_causal=is_causal), differentiable=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
def test_nothing(implementation: str, shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    leaves = tensors(queries, keys, batch=batch)
    lse = attention_lse(*leaves, enable_gqa=True, implementation=implementation)
    assert lse.shape == (batch, 4, queries)
    assert (lse == -math.inf).all()
    for gradient, leaf in zip(torch.autograd.grad(lse.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_key_is_its_score(implementation: str) -> None:
    query, key = tensors(1, 1)
    lse = attention_lse(query, key, scale=-0.3, enable_gqa=True, implementation=implementation)
    torch.testing.assert_close(lse[..., None], scores(query, key, False, -0.3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_scores(implementation: str) -> None:
    query, key = (leaf.detach() for leaf in tensors(batch=1, heads=1, kv_heads=1))
    function = partial(attention_lse, implementation=implementation)
    large = [(1e4 * query).requires_grad_(), key.clone().requires_grad_()]
    check(large, function, partial(composed, is_causal=False), differentiable=True)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = key.clone()
        bad[0, 0, 20, 3] = value
        expected = composed(query, bad, False)
        assert torch.equal(function(query, bad).isfinite(), expected.isfinite())
        torch.testing.assert_close(function(query, bad), expected, equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_are_respected_and_nothing_is_modified(implementation: str) -> None:
    leaves = tensors()
    moved = [strided(leaf) for leaf in leaves]
    function = partial(
        attention_lse, is_causal=True, enable_gqa=True, implementation=implementation
    )
    results = []
    for arguments in (leaves, moved):
        lse = function(*arguments)
        results.append([lse.detach(), *torch.autograd.grad(lse.sin().sum(), arguments)])
    torch.testing.assert_close(*results)
    for leaf, copy in zip(leaves, moved, strict=True):
        assert torch.equal(leaf, copy)
    expanded = leaves[1][:1, :1].expand(2, 2, 45, 12)
    torch.testing.assert_close(
        function(leaves[0], expanded), function(leaves[0], expanded.contiguous())
    )


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_is_that_of_block_sparse_attention(implementation: str) -> None:
    query, key = tensors(40, 40)
    layout = BlockLayout.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16)
    options = {"is_causal": True, "enable_gqa": True, "implementation": implementation}
    _, lse = block_sparse_attention(query, key, key, layout, return_lse=True, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(attention_lse(query, key, **options), lse)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_keys_after_the_last_query_are_not_read(implementation: str) -> None:
    query, key = tensors(20, 100)
    poisoned = key.detach().clone()
    poisoned[:, :, 36:] = torch.nan
    poisoned.requires_grad_()
    function = partial(
        attention_lse, is_causal=True, enable_gqa=True, implementation=implementation
    )
    gradients = torch.autograd.grad(function(query, poisoned).sum(), (query, poisoned))
    expected = torch.autograd.grad(function(query, key).sum(), (query, key))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_two_calls_are_bitwise_equal(implementation: str) -> None:
    leaves = tensors()
    first, second = (
        attention_lse(*leaves, is_causal=True, enable_gqa=True, implementation=implementation)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    gradients = (torch.autograd.grad(lse.sin().sum(), leaves) for lse in (first, second))
    for once, again in zip(*gradients, strict=True):
        assert torch.equal(once, again)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    is_causal=st.booleans(),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 2**20),
)
def test_properties(queries: int, keys: int, is_causal: bool, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = tensors(queries, keys, dtype=torch.float64)
    function = partial(attention_lse, scale=scale, enable_gqa=True)
    lse = function(query, key, is_causal=is_causal)
    visible = torch.arange(1, queries + 1).clamp(max=keys) if is_causal else torch.tensor(keys)
    counts = visible.double().log().expand(2, 4, queries)
    zero = function(torch.zeros_like(query), key, is_causal=is_causal)
    torch.testing.assert_close(zero, counts)
    largest = scores(query, key, is_causal, scale).amax(-1)
    assert (lse >= largest - 1e-12).all()
    assert (lse <= largest + counts + 1e-12).all()
    if not is_causal:
        order = torch.randperm(keys)
        torch.testing.assert_close(function(query, key[:, :, order]), lse)
        parts = [function(query, part) for part in key.split(keys // 2 + 1, 2)]
        torch.testing.assert_close(torch.stack(parts).logsumexp(0), lse)
    # A vector added to all keys moves a row by its score.
    step = torch.randn(12, dtype=torch.float64)
    moved = function(query, key + step, is_causal=is_causal)
    torch.testing.assert_close(moved, lse + scale * (query @ step))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            attention_lse,
            lambda: heads("query", "key"),
            differentiable=("query", "key"),
            options=({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True}),
            sizes=GROUPS,
        ),
    ]
