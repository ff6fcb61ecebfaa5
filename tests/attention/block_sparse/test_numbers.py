"""Block-sparse attention against torch's attention under a mask of elements."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import BlockLayout, block_sparse_attention

from helpers import FLOATING, assert_exact, dtype_name

IMPLEMENTATIONS = ("reference", "tiled", "triton")
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.attention.block_sparse import tiled

    monkeypatch.setattr(tiled, "SCORES", 3 * 8 * 8 * 4 // torch.get_num_threads())


def tensors(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    queries: int = 37,
    keys: int = 45,
    features: int = 12,
    values: int = 6,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    shapes = (
        (batch, heads, queries, features),
        (batch, kv_heads, keys, features),
        (batch, kv_heads, keys, values),
    )
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def active(query: Tensor, key: Tensor, block: tuple[int, int], heads: int, batch: int) -> Tensor:
    rows, columns = -(-query.shape[2] // block[0]), -(-key.shape[2] // block[1])
    return torch.rand(batch, heads, rows, columns) < 0.4


def elements(mask: Tensor, block: tuple[int, int], query: Tensor, key: Tensor) -> Tensor:
    """Which keys each query sees, by loops."""
    result = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            blocks = mask[b % len(mask), h * mask.shape[1] // query.shape[1]]
            for i in range(query.shape[2]):
                for j in range(key.shape[2]):
                    result[b, h, i, j] = blocks[i // block[0], j // block[1]]
    return result


def composed(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp from torch's parts; blind rows are zero."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    blind = ~visible.any(-1, keepdim=True)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible | blind, scale=scale
    ).masked_fill(blind, 0)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * factor
    lse = scores.masked_fill(~(visible | blind), -torch.inf).logsumexp(-1)
    return output, lse.masked_fill(blind[..., 0], -torch.inf)


def solve(result: tuple[Tensor, Tensor], leaves: list[Tensor], seed: int) -> list[Tensor]:
    """The results, log-sum-exp 0 where blind, and gradients of both together."""
    output, lse = result
    lse = lse.masked_fill(lse == -torch.inf, 0)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (output, lse)]
    loss = (output * upstream[0]).sum() + (lse * upstream[1]).sum()
    return [output, lse, *torch.autograd.grad(loss, leaves)]


def check(
    leaves: list[Tensor],
    mask: Tensor,
    block: tuple[int, int],
    implementation: str,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> None:
    query, key, _ = leaves
    visible = elements(mask, block, query, key)
    if is_causal:
        visible = visible.tril()
    visible = visible.to(query.device)
    layout = BlockLayout.from_dense(mask.to(query.device), block)
    actual = block_sparse_attention(
        *leaves,
        layout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )
    assert actual[0].dtype == query.dtype
    assert actual[1].dtype == torch.promote_types(query.dtype, torch.float32)
    blind = ~visible.any(-1)
    assert torch.equal(actual[1] == -torch.inf, blind)
    assert not actual[0][blind].any()

    results = [solve(actual, leaves, 0)]
    same = torch.float32 if query.dtype == torch.float64 else query.dtype
    for dtype in (same, torch.float64):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        results.append(solve(composed(*copies, visible, scale), copies, 0))  # type: ignore[call-arg, arg-type]
    for value, composition, truth in zip(*results, strict=True):
        if visible.sum(-1).max() > 1:
            assert_exact(value, composition, truth, query.dtype)
        else:  # the softmax of one key is exact in a composition, and its derivative 0
            torch.testing.assert_close(value, truth.to(value.dtype))


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool) -> None:
    leaves = tensors(dtype=dtype)
    mask = active(leaves[0], leaves[1], (16, 16), 4, 2)
    check(leaves, mask, (16, 16), implementation, is_causal=is_causal, scale=0.4)


@pytest.mark.untyped
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 64), (64, 32)])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 100), (40, 33)])
@pytest.mark.parametrize("features", [(80, 16), (5, 33)])
def test_kernels_for_blocks_lengths_and_features(
    block: tuple[int, int], lengths: tuple[int, int], features: tuple[int, int]
) -> None:
    leaves = tensors(1, 2, 2, *lengths, *features)
    mask = active(leaves[0], leaves[1], block, 2, 1)
    for is_causal in (False, True):
        check(leaves, mask, block, "triton", is_causal=is_causal)


@pytest.mark.filterwarnings("error")  # as of memory that is resized
def test_one_list_exceeds_the_memory_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.attention.block_sparse import tiled

    monkeypatch.setattr(tiled, "SCORES", 8 * 8)
    query, key, value = tensors()
    layout = BlockLayout.from_dense(torch.ones(1, 1, 5, 6, dtype=torch.bool), 8)
    output = block_sparse_attention(query, key, value, layout, implementation="tiled")
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("block", [(8, 8), (16, 8), (8, 16), (7, 5), (5, 7), (64, 64), (1, 3)])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 100), (40, 33), (7, 64)])
def test_blocks_and_lengths(
    implementation: str, block: tuple[int, int], lengths: tuple[int, int]
) -> None:
    leaves = tensors(1, 2, 2, *lengths, dtype=torch.float64)
    mask = active(leaves[0], leaves[1], block, 2, 1)
    for is_causal in (False, True):
        check(leaves, mask, block, implementation, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_on_other_devices(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    """Where torch has no fused attention that would do."""
    from tilework.attention.block_sparse import tiled

    monkeypatch.setattr(tiled, "FUSED", ())
    for block, lengths in (((8, 8), (37, 45)), ((7, 5), (40, 33)), ((5, 7), (7, 64))):
        leaves = tensors(2, 4, 2, *lengths, dtype=torch.float64)
        mask = active(leaves[0], leaves[1], block, 2, 1)
        check(leaves, mask, block, "tiled", is_causal=is_causal)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "layout_heads", "layout_batch"),
    [(4, 2, 1, 1), (4, 2, 2, 2), (4, 2, 4, 1), (6, 1, 6, 2), (6, 1, 1, 2), (3, 3, 1, 1)],
)
def test_grouped_heads(
    implementation: str, heads: int, kv_heads: int, layout_heads: int, layout_batch: int
) -> None:
    dtype = torch.float32 if implementation == "triton" else torch.float64
    leaves = tensors(2, heads, kv_heads, dtype=dtype)
    mask = active(leaves[0], leaves[1], (16, 16), layout_heads, layout_batch)
    check(leaves, mask, (16, 16), implementation, is_causal=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_full_layout_is_dense_attention(implementation: str, is_causal: bool) -> None:
    query, key, value = tensors(queries=37, keys=37, kv_heads=2)
    layout = BlockLayout.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16)
    actual = block_sparse_attention(
        query,
        key,
        value,
        layout,
        is_causal=is_causal,
        enable_gqa=True,
        implementation=implementation,
    )
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(implementation: str, shape: tuple[int, int]) -> None:
    leaves = tensors(2, 2, 2, *shape)
    mask = torch.ones(1, 1, -(-shape[0] // 16), -(-shape[1] // 16), dtype=torch.bool)
    output, lse = block_sparse_attention(
        *leaves,
        BlockLayout.from_dense(mask, 16),
        return_lse=True,
        implementation=implementation,
    )
    assert output.shape == (2, 2, shape[0], 6)
    assert not output.any()
    assert (lse == -math.inf).all()
    for gradient in torch.autograd.grad(output.sum(), leaves):
        assert not gradient.any()
    empty = block_sparse_attention(
        *tensors(0, 2, 2, 5, 5),
        BlockLayout.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16),
        implementation=implementation,
    )
    assert empty.shape == (0, 2, 5, 6)


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_blocks_that_are_not_selected_are_not_read(bad: float, implementation: str) -> None:
    query, key, value = tensors(1, 2, 2, 80, 80)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, [0, 1, 2, 2, 4, 4, 4], [0, 1, 0, 4, 0, 1, 4]] = True
    poisoned = [tensor.detach().clone() for tensor in (key, value)]
    for tensor in poisoned:
        tensor[:, :, 32:64] = bad
    leaves = [query, *(tensor.requires_grad_() for tensor in poisoned)]
    layout = BlockLayout.from_dense(mask, 16)
    function = partial(block_sparse_attention, is_causal=True, implementation=implementation)
    output, clean = function(*leaves, layout), function(query, key, value, layout)
    assert torch.equal(output, clean)
    gradients = torch.autograd.grad(output.sum(), leaves)
    expected = torch.autograd.grad(clean.sum(), (query, key, value))
    for gradient, truth in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, truth)
    assert not gradients[1][:, :, 32:64].any()
    assert not gradients[2][:, :, 32:64].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_scores_and_nan(implementation: str) -> None:
    query, key, value = tensors(1, 1, 1, 32, 32)
    layout = BlockLayout.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16)
    large = [1e4 * query.detach(), key.detach(), value.detach()]
    actual = block_sparse_attention(*large, layout, implementation=implementation)
    truth = F.scaled_dot_product_attention(*(tensor.double() for tensor in large))
    composition = F.scaled_dot_product_attention(*large)
    assert_exact(actual, composition, truth)
    large[0][0, 0, 3, 0] = torch.nan
    output, lse = block_sparse_attention(
        *large, layout, return_lse=True, implementation=implementation
    )
    assert output[0, 0, 3].isnan().all()
    assert lse.isnan().sum() == 1
    assert output.isnan().sum() == output.shape[-1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_are_respected_and_nothing_is_modified(implementation: str) -> None:
    leaves = tensors(2, 3, 3, 48, 48, features=8, values=8)
    layout = BlockLayout.from_window((48, 48), 16, left=1, num_sink_blocks=1, is_causal=True)
    strided = [
        leaf.detach().permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2).requires_grad_()
        for leaf in leaves
    ]
    before = [leaf.detach().clone() for leaf in strided]
    results = [
        solve(
            block_sparse_attention(
                *arguments,
                layout,
                is_causal=True,
                return_lse=True,
                implementation=implementation,
            ),  # type: ignore[arg-type]
            arguments,
            3,
        )
        for arguments in (leaves, strided)
    ]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
    for leaf, copy in zip(strided, before, strict=True):
        assert torch.equal(leaf.detach(), copy)
    expanded = leaves[1][:, :1].expand(2, 3, 48, 8)
    function = partial(block_sparse_attention, is_causal=True, implementation=implementation)
    output = function(leaves[0], expanded, expanded, layout)
    dense = function(leaves[0], expanded.contiguous(), expanded.contiguous(), layout)
    torch.testing.assert_close(output, dense)


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_properties(
    queries: int, keys: int, block: tuple[int, int], is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = tensors(1, 4, 2, queries, keys, dtype=torch.float64)
    mask = active(query, key, block, 2, 1)
    options: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": True}
    output = block_sparse_attention(
        query, key, value, BlockLayout.from_dense(mask, block), **options
    )
    repeated = BlockLayout.from_dense(mask.repeat_interleave(2, 1), block)
    torch.testing.assert_close(
        block_sparse_attention(query, key, value, repeated, **options), output
    )
    if not is_causal:
        # Whole blocks of keys and values change places with the layout's columns.
        whole = keys // block[1]
        order = torch.cat([torch.randperm(whole), torch.arange(whole, mask.shape[-1])])
        places = torch.cat(
            [torch.arange(j * block[1], min(keys, (j + 1) * block[1])) for j in order.tolist()]
        )
        moved = block_sparse_attention(
            query,
            key[:, :, places],
            value[:, :, places],
            BlockLayout.from_dense(mask[..., order], block),
            **options,
        )
        torch.testing.assert_close(moved, output)
    # A weighted mean of values, or zero.
    values = F.pad(value.detach(), (0, 0, 0, 1)).repeat_interleave(2, 1)
    assert (output <= values.amax(2, keepdim=True) + 1e-12).all()
    assert (output >= values.amin(2, keepdim=True) - 1e-12).all()


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_two_calls_are_bitwise_equal(is_causal: bool, implementation: str) -> None:
    leaves = tensors(2, 4, 2)
    layout = BlockLayout.from_dense(active(leaves[0], leaves[1], (16, 16), 2, 2), 16)
    first, second = (
        solve(
            block_sparse_attention(
                *leaves,
                layout,
                is_causal=is_causal,
                enable_gqa=True,
                return_lse=True,
                implementation=implementation,
            ),  # type: ignore[arg-type]
            leaves,
            1,
        )
        for _ in range(2)
    )
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
