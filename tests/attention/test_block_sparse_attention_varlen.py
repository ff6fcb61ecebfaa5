from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.attention import (
    BlockLayout,
    block_sparse_attention,
    block_sparse_attention_varlen,
)

import ahead_of_time
import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name

IMPLEMENTATIONS = ("reference", "tiled", "triton")
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]
LENGTHS = [5, 0, 37, 16, 1], [7, 4, 33, 0, 20]


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.attention.block_sparse import tiled

    monkeypatch.setattr(tiled, "SCORES", 3 * 16 * 16 * 4 // torch.get_num_threads())


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def tensors(
    lengths: tuple[list[int], list[int]] = LENGTHS,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query, key and value of packed sequences."""
    shapes = (
        (sum(lengths[0]), heads, 12),
        (sum(lengths[1]), kv_heads, 12),
        (sum(lengths[1]), kv_heads, 6),
    )
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def composed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block: tuple[int, int],
    lengths: tuple[list[int], list[int]],
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Torch's attention of one sequence after the other; blind rows are zero."""
    outputs, lses = [], []
    group = query.shape[1] // key.shape[1]
    parts = zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    )
    for place, part in enumerate(parts):
        q, k, v = (tensor.transpose(0, 1) for tensor in part)
        k, v = (tensor.repeat_interleave(group, 0) for tensor in (k, v))
        blocks = mask[place % len(mask)].repeat_interleave(query.shape[1] // mask.shape[1], 0)
        rows = torch.arange(q.shape[1], device=q.device)[:, None]
        columns = torch.arange(k.shape[1], device=q.device)
        visible = blocks[:, rows // block[0], columns // block[1]]
        if is_causal:
            visible = visible & (columns <= rows)
        blind = ~visible.any(-1, keepdim=True)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind)
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / q.shape[-1] ** 0.5
        lse = scores.masked_fill(~(visible | blind), -torch.inf).logsumexp(-1)
        outputs.append(output.masked_fill(blind, 0).transpose(0, 1))
        lses.append(lse.masked_fill(blind[..., 0], -torch.inf).transpose(0, 1))
    return torch.cat(outputs), torch.cat(lses)


def solve(result: Any, leaves: list[Tensor]) -> list[Tensor]:
    """The results, log-sum-exp 0 where blind, and gradients of both together."""
    output, lse = result
    lse = lse.masked_fill(lse == -torch.inf, 0)
    generator = torch.Generator().manual_seed(0)
    # Rounded as the narrowest dtype takes them.
    upstream = [torch.randn(t.shape, generator=generator).bfloat16().to(t) for t in (output, lse)]
    loss = (output * upstream[0]).sum() + (lse * upstream[1]).sum()
    return [output, lse, *torch.autograd.grad(loss, leaves)]


def check(
    leaves: list[Tensor],
    mask: Tensor,
    block: tuple[int, int],
    implementation: str,
    is_causal: bool,
    lengths: tuple[list[int], list[int]] = LENGTHS,
    index: torch.dtype = torch.int64,
) -> None:
    device = leaves[0].device
    cuts = [borders(part).to(device, index) for part in lengths]
    actual = block_sparse_attention_varlen(
        *leaves,
        BlockLayout.from_dense(mask.to(device), block),
        *cuts,
        is_causal=is_causal,
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )
    assert actual[0].dtype == leaves[0].dtype
    results = [solve(actual, leaves)]
    same = torch.float32 if leaves[0].dtype == torch.float64 else leaves[0].dtype
    for dtype in (same, torch.float64):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        truth = composed(*copies, mask.to(device), block, lengths, is_causal)  # type: ignore[call-arg, arg-type, misc]
        results.append(solve(truth, copies))
    assert torch.equal(actual[1] == -torch.inf, truth[1] == -torch.inf)
    for values in zip(*results, strict=True):
        assert_exact(*values, leaves[0].dtype)


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, is_causal: bool) -> None:
    mask = torch.rand(5, 2, 3, 3) < 0.6
    index = torch.int32 if is_causal else torch.int64
    check(tensors(dtype=dtype), mask, (16, 16), implementation, is_causal, index=index)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("block", "heads"),
    [((32, 16), (1, 1)), ((16, 64), (4, 1)), ((32, 16), (2, 5)), ((16, 64), (2, 5))],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_and_lists(
    implementation: str, block: tuple[int, int], heads: tuple[int, int], is_causal: bool
) -> None:
    # More blocks than the longest sequence has.
    mask = torch.rand(heads[1], heads[0], 5, 4) < 0.6
    check(tensors(), mask, block, implementation, is_causal)


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
@pytest.mark.parametrize("block", [(7, 5), (5, 7), (8, 4), (1, 3)])
def test_odd_blocks(implementation: str, block: tuple[int, int]) -> None:
    mask = torch.rand(5, 4, 37, 12) < 0.4
    for is_causal in (False, True):
        check(tensors(dtype=torch.float64), mask, block, implementation, is_causal)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_lengths_are_a_batch(implementation: str) -> None:
    lengths = [20, 20, 20], [30, 30, 30]
    query, key, value = tensors(lengths)
    layout = BlockLayout.from_dense(torch.rand(3, 4, 2, 2) < 0.7, 16)
    options: dict[str, Any] = {
        "is_causal": True,
        "enable_gqa": True,
        "implementation": implementation,
    }
    packed = block_sparse_attention_varlen(
        query, key, value, layout, *map(borders, lengths), return_lse=True, **options
    )
    batch = [t.unflatten(0, (3, -1)).transpose(1, 2) for t in (query, key, value)]
    expected = block_sparse_attention(*batch, layout, return_lse=True, **options)
    for actual, truth in zip(packed, expected, strict=True):
        torch.testing.assert_close(actual, truth.transpose(1, 2).flatten(0, 1))
    single = block_sparse_attention_varlen(
        query[:20],
        key[:30],
        value[:30],
        BlockLayout.from_dense(layout.to_dense()[:1], 16),
        torch.tensor([0, 20]),
        torch.tensor([0, 30]),
        **options,
    )
    torch.testing.assert_close(single, packed[0][:20])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([0, 0], [3, 2]), ([3, 2], [0, 0])])
def test_nothing(implementation: str, lengths: tuple[list[int], list[int]]) -> None:
    leaves = tensors(lengths)
    layout = BlockLayout.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16)
    output, lse = block_sparse_attention_varlen(
        *leaves,
        layout,
        *map(borders, lengths),
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )
    assert output.shape == (sum(lengths[0]), 4, 6)
    assert lse.shape == (sum(lengths[0]), 4)
    assert not output.any()
    assert (lse == -torch.inf).all()
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_crosses_a_border(implementation: str, is_causal: bool) -> None:
    leaves = tensors()
    poisoned = [leaf.detach().clone() for leaf in leaves]
    cuts = [borders(part) for part in LENGTHS]
    for tensor, cut in zip(poisoned, (cuts[0], cuts[1], cuts[1]), strict=True):
        tensor[cut[2] : cut[3]] = torch.nan
        tensor.requires_grad_()
    layout = BlockLayout.from_dense(torch.ones(1, 1, 3, 3, dtype=torch.bool), 16)
    results = []
    for arguments in (leaves, poisoned):
        output = block_sparse_attention_varlen(
            *arguments,
            layout,
            *cuts,
            is_causal=is_causal,
            enable_gqa=True,
            implementation=implementation,
        )
        results.append([output, *torch.autograd.grad(output.sum(), arguments)])
    for clean, dirty, cut in zip(*results, (cuts[0], cuts[0], cuts[1], cuts[1]), strict=True):
        assert dirty[cut[2] : cut[3]].isnan().any()
        for part in (slice(0, cut[2]), slice(cut[3], None)):
            assert torch.equal(clean[part], dirty[part])


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_strides_and_two_calls(implementation: str) -> None:
    leaves = tensors()
    moved = [
        leaf.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
        for leaf in leaves
    ]
    layout = BlockLayout.from_dense(torch.rand(5, 2, 3, 3) < 0.7, 16)
    function = partial(
        block_sparse_attention_varlen,
        layout=layout,
        cu_seqlens_q=borders(LENGTHS[0]),
        cu_seqlens_k=borders(LENGTHS[1]),
        is_causal=True,
        enable_gqa=True,
        return_lse=True,
        implementation=implementation,
    )
    first, second, third = (
        solve(function(*arguments), arguments) for arguments in (leaves, leaves, moved)
    )
    for once, again, other in zip(first, second, third, strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(other, once)
    assert first[0].is_contiguous()


SMALL = [4, 0, 7], [5, 2, 3]
MASK = [
    [[1, 1, 0], [1, 0, 1], [0, 1, 1]],
    [[1, 1, 1], [0, 1, 1], [1, 0, 1]],
    [[0, 1, 0], [1, 1, 0], [1, 1, 1]],
]
LAYOUT = BlockLayout.from_dense(torch.tensor(MASK, dtype=torch.bool)[:, None], 3)
QUERY, KEY, VALUE = (
    torch.zeros(length, 2, features, dtype=torch.float64)
    for length, features in ((11, 12), (10, 12), (10, 6))
)
OPTIONS: dict[str, Any] = {
    "layout": LAYOUT,
    "cu_seqlens_q": borders(SMALL[0]),
    "cu_seqlens_k": borders(SMALL[1]),
    "is_causal": True,
}


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (QUERY, KEY, VALUE):
        tensor.normal_()


def scalar(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Tensor:
    output, lse = block_sparse_attention_varlen(
        query, key, value, return_lse=True, implementation=implementation, **OPTIONS
    )
    return output.sin().sum() + lse.masked_fill(lse == -torch.inf, 0).cos().sum()


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_gradcheck(implementation: str) -> None:
    leaves = [tensor[..., :3].clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
    loss = partial(scalar, implementation=implementation)
    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=implementation != "reference")


@pytest.mark.untyped
def test_functional_transforms() -> None:
    results = []
    for name in ("tiled", "reference"):
        loss = partial(scalar, implementation=name)
        grads = torch.func.grad(loss, (0, 1, 2))(QUERY, KEY, VALUE)
        tangents = QUERY.sin(), KEY.sin(), VALUE.sin()
        moved = torch.func.jvp(loss, (QUERY, KEY, VALUE), tangents)
        stack = torch.func.vmap(loss, (0, None, None))(torch.stack([QUERY, -QUERY]), KEY, VALUE)
        results.append([*grads, *moved, stack])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_compiles_as_one_graph_for_every_packing(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(
        block_sparse_attention_varlen, layout=LAYOUT, is_causal=True, implementation=implementation
    )
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([4, 6, 5], [3, 8, 7], [9, 2, 9]):
        leaves = tensors((lengths, lengths), 2, 2)
        results = [
            [output, *torch.autograd.grad(output.sin().sum(), leaves)]
            for output in (
                call(*leaves, cu_seqlens_q=borders(lengths)) for call in (compiled, function)
            )
        ]
        torch.testing.assert_close(*results)
    assert len(graphs) == 1


@pytest.mark.untyped
def test_operators() -> None:
    packed = [t.transpose(0, 1)[None].clone().requires_grad_() for t in (QUERY, KEY, VALUE)]
    lists = LAYOUT.kv_num_blocks, LAYOUT.kv_indices, None, None
    cuts = OPTIONS["cu_seqlens_q"], OPTIONS["cu_seqlens_k"]
    options = ([3, 3], True, 0.4, "tiled")
    operators = torch.ops.tilework
    torch.library.opcheck(operators.block_sparse_attention, (*packed, *lists, *cuts, *options))
    output, lse = operators.block_sparse_attention(*packed, *lists, *cuts, *options)
    saved = [t.detach() for t in (*packed, output, lse)]
    given = *saved, *lists, *cuts, *saved[3:], [True, True, True], *options
    torch.library.opcheck(operators.block_sparse_attention_backward, given)


def test_autocast() -> None:
    floats = [tensor.float() for tensor in (QUERY, KEY, VALUE)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block_sparse_attention_varlen(*floats, **OPTIONS)
    halves = [tensor.bfloat16() for tensor in floats]
    assert torch.equal(output, block_sparse_attention_varlen(*halves, **OPTIONS))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("query must be a floating-point tensor", TypeError, {"query": QUERY.long()}),
        ("query must be of shape (T, H, E), got", ValueError, {"query": QUERY[None]}),
        ("key must be of query's", TypeError, {"key": KEY.float()}),
        (
            f"key must be of query's {QUERY.shape[1]} heads, or with enable_gqa=True",
            ValueError,
            {"key": KEY[:, :1]},
        ),
        ("value must be of shape", ValueError, {"value": VALUE[:7]}),
        (
            "layout must be a BlockLayout, which BlockLayout.from_dense makes of a mask",
            TypeError,
            {"layout": LAYOUT.to_dense()},
        ),
        (
            "layout must have a batch of 1 or 3, got 2",
            ValueError,
            {"layout": BlockLayout.from_dense(torch.ones(2, 1, 3, 3, dtype=torch.bool), 3)},
        ),
        (
            "layout must have 1, 2 or 2 heads, got 3",
            ValueError,
            {"layout": BlockLayout.from_dense(torch.ones(1, 3, 3, 3, dtype=torch.bool), 3)},
        ),
        (
            "layout must have at least 3 rows of blocks for the longest sequence of cu_seqlens_q, "
            "7, got 2",
            ValueError,
            {"layout": BlockLayout.from_dense(torch.ones(1, 1, 2, 3, dtype=torch.bool), 3)},
        ),
        (
            "layout must have at least 2 columns of blocks for the longest sequence of "
            "cu_seqlens_k, 5, got 1",
            ValueError,
            {"layout": BlockLayout.from_dense(torch.ones(1, 1, 3, 1, dtype=torch.bool), 3)},
        ),
        (
            "cu_seqlens_q must be an int32 or int64 tensor",
            TypeError,
            {"cu_seqlens_q": borders(SMALL[0]).float()},
        ),
        (
            "cu_seqlens_q must be of shape (S + 1,)",
            ValueError,
            {"cu_seqlens_q": borders(SMALL[0])[None]},
        ),
        ("cu_seqlens_k must be of shape (4,)", ValueError, {"cu_seqlens_k": borders([10])}),
        (
            "cu_seqlens_q must go from 0 to 11, the number of tokens, without a decrease, "
            "got [1, 4, 4, 11]",
            ValueError,
            {"cu_seqlens_q": torch.tensor([1, 4, 4, 11])},
        ),
        (
            "cu_seqlens_q must go from 0 to 11, the number of tokens, without a decrease, "
            "got [0, 5, 4, 11]",
            ValueError,
            {"cu_seqlens_q": torch.tensor([0, 5, 4, 11])},
        ),
        (
            "cu_seqlens_k must go from 0 to 10, the number of tokens, without a decrease, "
            "got [0, 5, 7, 9]",
            ValueError,
            {"cu_seqlens_k": torch.tensor([0, 5, 7, 9])},
        ),
        (
            "cu_seqlens_k must go from 0 to 10, the number of tokens, without a decrease",
            ValueError,
            {"cu_seqlens_k": None},
        ),
        (
            "cu_seqlens_q must lie on the device of query",
            ValueError,
            {"cu_seqlens_q": borders(SMALL[0]).to("meta")},
        ),
        ("scale must be a number", TypeError, {"scale": "large"}),
        ("implementation must be one of", ValueError, {"implementation": "x"}),
        (
            "implementation='triton' cannot be used: it takes float16, bfloat16, float32",
            ValueError,
            {"implementation": "triton"},
        ),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": VALUE, **OPTIONS} | change
    with pytest.raises(error) as caught:
        block_sparse_attention_varlen(**arguments)
    assert f"block_sparse_attention_varlen: {message}" in str(caught.value)


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture() -> None:
    reports = ahead_of_time.compiled(Path(__file__).parent / "block_sparse/varlen_launches.py")
    kernels = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    seen = {(report["arch"], report["kernel"]) for report in reports}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        assert report["matrix"] > 0, report
        # Known: some scalars of gfx942 wait in vector registers.
        assert report["spilled"] == 0 or report["arch"] == "gfx942", report


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("is_causal", [False, True])
def test_on_a_gpu(is_causal: bool, dtype: torch.dtype) -> None:
    lengths = [100, 0, 257, 1, 64], [190, 3, 257, 0, 64]
    leaves = [t.detach().cuda().requires_grad_() for t in tensors(lengths, dtype=dtype)]
    mask = torch.rand(5, 2, 5, 5) < 0.6
    check(leaves, mask, (64, 64), "triton", is_causal, lengths, torch.int32)


def packed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """Two sequences, each with half of the tokens."""
    tokens = query.shape[0]
    borders = torch.arange(3, device=query.device) * tokens // 2
    lengths, options_ = (tokens, tokens), {"left": 0, "num_sink_blocks": 1}
    layout = BlockLayout.from_window(lengths, 16, device=query.device, **options_)
    return block_sparse_attention_varlen(query, key, value, layout, borders, **options)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            block_sparse_attention_varlen,
            lambda: {"query": draw(41, 4, 6), "key": draw(41, 2, 6), "value": draw(41, 2, 5)},
            by=packed,
            differentiable=("query", "key", "value"),
            options=({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True}),
            sizes={4: 8, 2: 4},
        ),
    ]
