from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import (
    BlockLayout,
    attention_lse,
    block_pooled_attention,
    block_sparse_attention,
)

import samples
from attention._attention_map.problem import (
    BUILT,
    IMPLEMENTATIONS,
    check,
    exact_lse,
    strided,
    tensors,
    weights,
)
from attention.tensors import GROUPS, heads, with_lse
from calls import Call

pytestmark = pytest.mark.usefixtures("small_tiles")
POOLS = ("max", "mean", "sum")


def composed(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block: tuple[int, int],
    pool: str,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Torch's pooling of the dense map."""
    dense = weights(query, key, lse, is_causal, scale)
    if pool == "max":
        return F.max_pool2d(dense, block, ceil_mode=True)
    divisor = 1 if pool == "sum" else None
    return F.avg_pool2d(dense, block, ceil_mode=True, divisor_override=divisor)


def compare(
    leaves: list[Tensor],
    implementation: str,
    block: tuple[int, int],
    pool: str,
    is_causal: bool,
    scale: float | None = None,
) -> Tensor:
    lse = exact_lse(*leaves, is_causal, scale)
    return check(
        leaves,
        lambda query, key: block_pooled_attention(
            query,
            key,
            lse,
            block_size=block,
            pool=pool,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True,
            implementation=implementation,
        ),
        lambda query, key: composed(query, key, lse, block, pool, is_causal, scale),
        differentiable=False,
    )


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize(
    ("pool", "is_causal"), [("max", False), ("max", True), ("mean", True), ("sum", False)]
)
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool, pool: str) -> None:
    compare(tensors(dtype=dtype), implementation, (16, 16), pool, is_causal, 0.4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", [(8, 32), (17, 9), (64, 16), (40, 40), (128, 200)])
@pytest.mark.parametrize("lengths", [(100, 63), (40, 33), (7, 64)])
def test_blocks_and_lengths(
    implementation: str, block: tuple[int, int], lengths: tuple[int, int]
) -> None:
    leaves = tensors(*lengths, 5, batch=1, heads=2, kv_heads=1)
    pool = "max" if block[0] < 40 else "mean"
    compare(leaves, implementation, block, pool, is_causal=block[0] != 64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_log_sum_exp_gives_the_softmax(is_causal: bool) -> None:
    query, key = tensors(dtype=torch.float64)
    lse = attention_lse(query, key, is_causal=is_causal, enable_gqa=True)
    actual = block_pooled_attention(
        query, key, lse, block_size=(16, 7), is_causal=is_causal, enable_gqa=True
    )
    hidden = torch.ones(37, 45, dtype=torch.bool).triu(1) & is_causal
    values = torch.einsum("bhgie,bhje->bhgij", query.view(2, 2, 2, 37, 12), key) / 12**0.5
    softmax = values.masked_fill(hidden, -torch.inf).softmax(-1).flatten(1, 2)
    expected = F.max_pool2d(softmax, (16, 7), ceil_mode=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_normalize(implementation: str, pool: str) -> None:
    query, key = tensors()
    lse = exact_lse(query, key, True, None)
    lse[:, :, 16:32] = -torch.inf
    options: dict[str, Any] = {
        "block_size": 16,
        "is_causal": True,
        "enable_gqa": True,
        "pool": pool,
        "implementation": implementation,
    }
    plain = block_pooled_attention(query, key, lse, **options)
    actual = block_pooled_attention(query, key, lse, normalize=True, **options)
    assert not plain[:, :, 1].any()
    torch.testing.assert_close(actual * plain.sum(-1, keepdim=True), plain)
    expected = torch.tensor([1.0, 0, 1]).expand(2, 4, 3)
    torch.testing.assert_close(actual.sum(-1), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_log_sum_exp(implementation: str) -> None:
    query, key = (leaf.detach() for leaf in tensors(40, 40))
    mask = torch.rand(1, 2, 3, 3) < 0.6
    mask[0, 0, 1] = False
    _, lse = block_sparse_attention(
        query, key, key, BlockLayout.from_dense(mask, 16), enable_gqa=True, return_lse=True
    )
    actual = block_pooled_attention(
        query,
        key,
        lse,
        block_size=(20, 10),
        pool="sum",
        enable_gqa=True,
        implementation=implementation,
    )
    dense = weights(query.double(), key.double(), lse, False, None)
    dense = dense.masked_fill((lse == -torch.inf)[..., None], 0)
    expected = F.avg_pool2d(dense, (20, 10), divisor_override=1)
    torch.testing.assert_close(actual, expected.float())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
def test_nothing(implementation: str, shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    query, key = tensors(queries, keys, batch=batch)
    for pool in POOLS:
        pooled = block_pooled_attention(
            query,
            key,
            torch.zeros(batch, 4, queries),
            block_size=4,
            pool=pool,
            normalize=True,
            enable_gqa=True,
            implementation=implementation,
        )
        assert pooled.shape == (batch, 4, -(-queries // 4), -(-keys // 4))
        assert not pooled.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pool", ["max", "sum"])
def test_nan_stays_in_its_blocks(implementation: str, pool: str) -> None:
    query, key = (leaf.detach() for leaf in tensors(40, 40))
    lse = exact_lse(query, key, False, None)
    query[0, 1, 20, 3] = torch.nan
    lse[1, 2, 35] = torch.nan
    pooled = block_pooled_attention(
        query,
        key,
        lse,
        block_size=(16, 20),
        pool=pool,
        enable_gqa=True,
        implementation=implementation,
    )
    expected = torch.zeros(2, 4, 3, 2, dtype=torch.bool)
    expected[0, 1, 1] = expected[1, 2, 2] = True
    assert torch.equal(pooled.isnan(), expected)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_strides_and_two_calls(implementation: str) -> None:
    query, key = tensors(batch=1)
    lse = exact_lse(query, key, True, None)
    function = partial(
        block_pooled_attention,
        block_size=(16, 24),
        is_causal=True,
        enable_gqa=True,
        pool="sum",
        implementation=implementation,
    )
    first = function(query, key, lse)
    assert torch.equal(first, function(query, key, lse))
    moved = function(strided(query), strided(key), strided(lse))
    torch.testing.assert_close(moved, first)


def test_is_a_constant() -> None:
    query, key = tensors(dtype=torch.float64)
    lse = attention_lse(query, key, enable_gqa=True)
    for implementation in ("reference", "tiled"):
        pooled = block_pooled_attention(
            query, key, lse, enable_gqa=True, implementation=implementation
        )
        assert not pooled.requires_grad


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_properties(
    queries: int, keys: int, block: tuple[int, int], is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key = tensors(queries, keys, dtype=torch.float64)
    lse = attention_lse(query, key, is_causal=is_causal, enable_gqa=True)
    function = partial(
        block_pooled_attention, block_size=block, is_causal=is_causal, enable_gqa=True
    )
    largest, mean, total = (function(query, key, lse, pool=pool) for pool in POOLS)
    starts = torch.arange(0, queries, block[0])
    counts = (queries - starts).clamp(max=block[0]).double()
    torch.testing.assert_close(total.sum(-1), counts.expand(2, 4, -1))
    for pooled in (largest, mean):
        assert (pooled >= 0).all()
        assert (pooled <= 1 + 1e-12).all()
    assert (mean <= largest + 1e-12).all()
    assert (largest <= total + 1e-12).all()
    if is_causal:
        last = (starts + block[0]).clamp(max=queries) - 1
        live = torch.arange(0, keys, block[1]) <= last[:, None]
        for pooled in (largest, mean, total):
            assert torch.equal(pooled != 0, live.expand_as(pooled))
    for pool in POOLS:
        normal = function(query, key, lse, pool=pool, normalize=True)
        torch.testing.assert_close(normal.sum(-1), torch.ones_like(counts).expand(2, 4, -1))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            block_pooled_attention,
            lambda: with_lse(heads("query", "key")),
            statistics=("lse",),
            options=(
                {"enable_gqa": True, "block_size": 4},
                {"enable_gqa": True, "block_size": 4, "is_causal": True, "normalize": True},
                {"enable_gqa": True, "block_size": 4, "pool": "sum"},
            ),
            sizes=GROUPS,
        ),
    ]
