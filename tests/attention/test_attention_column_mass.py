from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import attention_column_mass, attention_lse, block_pooled_attention

import samples
from attention._attention_map.problem import (
    BUILT,
    IMPLEMENTATIONS,
    LENGTHS,
    check,
    exact_lse,
    strided,
    tensors,
    weights,
)
from attention.tensors import GROUPS, heads, with_lse
from calls import Call

pytestmark = pytest.mark.usefixtures("small_tiles")


def composed(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float | None,
    window: int | None,
) -> Tensor:
    dense = weights(query, key, lse, is_causal, scale)
    return (dense if window is None else dense[:, :, -window:]).sum(2)


def compare(
    leaves: list[Tensor],
    implementation: str,
    is_causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> None:
    lse = exact_lse(*leaves, is_causal, scale)
    check(
        leaves,
        lambda query, key: attention_column_mass(
            query,
            key,
            lse,
            is_causal=is_causal,
            scale=scale,
            query_window=window,
            enable_gqa=True,
            implementation=implementation,
        ),
        lambda query, key: composed(query, key, lse, is_causal, scale, window),
        differentiable=False,
    )


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool) -> None:
    compare(tensors(dtype=dtype), implementation, is_causal, 0.4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS[1:])
@pytest.mark.parametrize("window", [1, 20])
def test_lengths_and_windows(
    implementation: str, is_causal: bool, lengths: tuple[int, int], window: int
) -> None:
    leaves = tensors(*lengths, 5, batch=1, heads=2, kv_heads=1)
    compare(leaves, implementation, is_causal, window=window)


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_log_sum_exp_gives_the_softmax(is_causal: bool) -> None:
    query, key = tensors(dtype=torch.float64)
    lse = attention_lse(query, key, is_causal=is_causal, enable_gqa=True)
    actual = attention_column_mass(query, key, lse, is_causal=is_causal, enable_gqa=True)
    hidden = torch.ones(37, 45, dtype=torch.bool).triu(1) & is_causal
    values = torch.einsum("bhgie,bhje->bhgij", query.view(2, 2, 2, 37, 12), key) / 12**0.5
    softmax = values.masked_fill(hidden, -torch.inf).softmax(-1).flatten(1, 2)
    torch.testing.assert_close(actual, softmax.sum(2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reduce_groups(implementation: str) -> None:
    query, key = (leaf.detach() for leaf in tensors(heads=6, kv_heads=2))
    lse = exact_lse(query, key, True, None)
    function = partial(
        attention_column_mass,
        query,
        key,
        lse,
        is_causal=True,
        enable_gqa=True,
        implementation=implementation,
    )
    each = function()
    expected = torch.stack([each[:, :3].mean(1), each[:, 3:].mean(1)], 1)
    torch.testing.assert_close(function(reduce_groups=True), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
def test_nothing(implementation: str, shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    query, key = tensors(queries, keys, batch=batch)
    mass = attention_column_mass(
        query,
        key,
        torch.zeros(batch, 4, queries),
        enable_gqa=True,
        reduce_groups=True,
        implementation=implementation,
    )
    assert mass.shape == (batch, 2, keys)
    assert not mass.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_that_see_nothing_and_nan(implementation: str) -> None:
    query, key = (leaf.detach() for leaf in tensors())
    lse = exact_lse(query, key, False, None)
    function = partial(attention_column_mass, enable_gqa=True, implementation=implementation)
    expected = function(query[:, :, 20:], key, lse[:, :, 20:])
    lse[:, :, :20] = -torch.inf
    torch.testing.assert_close(function(query, key, lse), expected)
    key[1, 0, 7, 2] = torch.nan
    bad = torch.zeros(2, 4, 45, dtype=torch.bool)
    bad[1, :2, 7] = True
    assert torch.equal(function(query, key, lse).isnan(), bad)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_strides_and_two_calls(implementation: str) -> None:
    query, key = tensors()
    lse = exact_lse(query, key, True, None)
    function = partial(
        attention_column_mass, is_causal=True, enable_gqa=True, implementation=implementation
    )
    first = function(query, key, lse)
    assert torch.equal(first, function(query, key, lse))
    torch.testing.assert_close(function(strided(query), strided(key), strided(lse)), first)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    window=st.integers(1, 50),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_properties(queries: int, keys: int, window: int, is_causal: bool, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = tensors(queries, keys, dtype=torch.float64)
    lse = attention_lse(query, key, is_causal=is_causal, enable_gqa=True)
    function = partial(attention_column_mass, is_causal=is_causal, enable_gqa=True)
    mass = function(query, key, lse, query_window=window)
    counted = torch.full((2, 4), min(window, queries), dtype=torch.float64)
    torch.testing.assert_close(mass.sum(-1), counted)
    assert (mass >= 0).all()
    whole = function(query, key, lse)
    assert (mass <= whole + 1e-12).all()
    blocks = block_pooled_attention(
        query,
        key,
        lse,
        block_size=(queries, 1),
        pool="sum",
        is_causal=is_causal,
        enable_gqa=True,
    )
    torch.testing.assert_close(whole, blocks[:, :, 0])


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            attention_column_mass,
            lambda: with_lse(heads("query", "key")),
            statistics=("lse",),
            options=(
                {"enable_gqa": True},
                {"enable_gqa": True, "is_causal": True, "query_window": 3},
            ),
            sizes=GROUPS,
        ),
    ]
