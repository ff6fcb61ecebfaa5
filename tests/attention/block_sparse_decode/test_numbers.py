"""Block-sparse decoding against torch's attention to the selected tokens."""

import itertools
import math
from dataclasses import dataclass, replace
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
    block_sparse_attention,
    block_sparse_decode,
    paged_block_sparse_decode,
)

from helpers import FLOATING, HALF, assert_exact, dtype_name

IMPLEMENTATIONS = ("reference", "tiled", "triton")
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]


@pytest.fixture(autouse=True)
def few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.attention.block_sparse_decode import tiled

    monkeypatch.setattr(tiled, "ELEMENTS", 1024)
    monkeypatch.setattr(tiled, "PLACES", 4)


@dataclass
class Case:
    """A query, its caches, and what each sequence, head of keys and query token sees."""

    query: Tensor
    key: Tensor
    value: Tensor
    seq_lengths: Tensor
    kv_indices: Tensor | None
    kv_num_blocks: Tensor | None
    block_size: int
    seen: list[list[list[list[int]]]]

    def selected(self, b: int, h: int) -> list[int]:
        """The tokens that any query token sees."""
        return sorted(set().union(*self.seen[b][h]))

    def solve(self, implementation: str | None, **options: Any) -> tuple[Tensor, Tensor]:
        """The result from the contiguous cache."""
        result = block_sparse_decode(
            self.query,
            self.key,
            self.value,
            self.kv_indices,
            self.kv_num_blocks,
            seq_lengths=self.seq_lengths,
            block_size=self.block_size,
            is_causal=self.query.shape[2] != 1,
            return_lse=True,
            implementation=implementation,
            **options,
        )
        assert isinstance(result, tuple)
        return result

    def solve_paged(
        self, implementation: str | None, page_size: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The result from pages in any order; what may not be read is nan or no page at all."""
        batch, kv_heads, tokens, _ = self.key.shape
        per_sequence = -(-tokens // page_size)
        order = torch.randperm(batch * per_sequence + 3)[: batch * per_sequence]
        table = order.view(batch, per_sequence)
        caches = []
        for tensor in (self.key, self.value):
            shape = (batch * per_sequence + 3, page_size, kv_heads, tensor.shape[3])
            cache = torch.full(shape, torch.nan).to(tensor)
            for b in range(batch):
                for h in range(kv_heads):
                    for t in self.selected(b, h):
                        cache[table[b, t // page_size], t % page_size, h] = tensor[b, h, t]
            caches.append(cache)
        past = torch.arange(per_sequence) * page_size >= self.seq_lengths[:, None].cpu()
        table = table.masked_fill(past, 10**6).to(self.seq_lengths)
        result = paged_block_sparse_decode(
            self.query,
            *caches,
            table,
            self.seq_lengths,
            self.kv_indices,
            self.kv_num_blocks,
            block_size=self.block_size,
            is_causal=self.query.shape[2] != 1,
            return_lse=True,
            implementation=implementation,
            **options,
        )
        assert isinstance(result, tuple)
        return result

    def expected(self, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """SDPA of each head to the gathered tokens, and the log-sum-exp."""
        batch, heads, length, features = self.query.shape
        group = heads // self.key.shape[1]
        output = torch.zeros(batch, heads, length, self.value.shape[3], dtype=dtype)
        lse = torch.full(
            (batch, heads, length), -torch.inf, dtype=torch.promote_types(dtype, torch.float32)
        )
        factor = 1 / math.sqrt(features) if scale is None else scale
        for b, h, i in itertools.product(range(batch), range(heads), range(length)):
            tokens = self.seen[b][h // group][i]
            if not tokens:
                continue
            q = self.query[b, h, i : i + 1].to(dtype)[None]
            k, v = (t[b, h // group, tokens].to(dtype)[None] for t in (self.key, self.value))
            output[b, h, i] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0, 0]
            lse[b, h, i] = ((q @ k.mT).to(lse.dtype) * factor).logsumexp(-1)[0, 0]
        return output, lse


def case(
    batch: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 63,
    features: int = 12,
    values: int = 6,
    block_size: int = 16,
    length: int = 1,
    *,
    of_tokens: bool = False,
    list_heads: int | None = None,
    width: int | None = 3,
    counted: bool = True,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
) -> Case:
    query = torch.randn(batch, heads, length, features).to(dtype)
    key = torch.randn(batch, kv_heads, tokens, features).to(dtype)
    value = torch.randn(batch, kv_heads, tokens, values).to(dtype)
    seq_lengths = torch.randint(min(1, tokens), tokens + 1, (batch,))
    if batch > 1:
        seq_lengths[1] = tokens
    if batch > 2:
        seq_lengths[2] = 0
    blocks = -(-tokens // block_size)
    kv_indices = kv_num_blocks = None
    chosen = [[[list(range(tokens))] * length] * kv_heads] * batch
    if width is not None:
        width = min(width, blocks)
        lists = kv_heads if list_heads is None else list_heads
        each = (batch, lists, length) if of_tokens else (batch, lists)
        kv_indices = torch.rand(*each, blocks).argsort(-1)[..., :width]
        counts = torch.full(each, width)
        if counted:
            counts = kv_num_blocks = torch.randint(0, width + 1, each)

        def listed(b: int, h: int, i: int) -> list[int]:
            place = (b, h % lists, i) if of_tokens else (b, h % lists)
            first = (j * block_size for j in kv_indices[place][: counts[place]].tolist())
            return [t for start in first for t in range(start, start + block_size)]

        chosen = [
            [[listed(b, h, i) for i in range(length)] for h in range(kv_heads)]
            for b in range(batch)
        ]
        if counted:  # what does not count is not read: other blocks, or none at all
            past = torch.arange(width) >= counts[..., None]
            past[::2] = False
            none = 100 if index_dtype == torch.uint8 else 10**6
            kv_indices = kv_indices.masked_fill(past, none)
        kv_indices = kv_indices.to(index_dtype)
        kv_num_blocks = None if kv_num_blocks is None else kv_num_blocks.to(index_dtype)
    seen = [
        [
            [[t for t in chosen[b][h][i] if t <= n - length + i] for i in range(length)]
            for h in range(kv_heads)
        ]
        for b, n in enumerate(seq_lengths.tolist())
    ]
    return Case(
        query,
        key,
        value,
        seq_lengths.to(index_dtype),
        kv_indices,
        kv_num_blocks,
        block_size,
        seen,
    )


def check(one: Case, actual: tuple[Tensor, Tensor], scale: float | None = None) -> None:
    dtype = one.query.dtype
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.promote_types(dtype, torch.float32)
    same = torch.float32 if dtype == torch.float64 else dtype
    compositions, truths = one.expected(same, scale), one.expected(torch.float64, scale)
    blind = truths[1] == -torch.inf
    assert torch.equal(actual[1].cpu() == -torch.inf, blind)
    assert not actual[0].cpu()[blind].any()
    seen = ~blind
    for value, composition, truth in zip(actual, compositions, truths, strict=True):
        assert_exact(value.cpu()[seen], composition[seen], truth[seen], dtype)


SHAPES = {
    "lists for each head": {},
    "one list for all heads": {"list_heads": 1},
    "no counts": {"counted": False, "index_dtype": torch.int32},
    "everything": {"width": None, "index_dtype": torch.int32},
    "many heads of one key": {"heads": 20, "kv_heads": 1, "batch": 2},
    "no groups, wide values": {"heads": 3, "kv_heads": 3, "values": 40, "features": 7},
    "long": {"batch": 1, "heads": 2, "kv_heads": 1, "tokens": 700, "width": 20, "counted": False},
    "small blocks": {"block_size": 4, "tokens": 100, "width": 12},
    "odd blocks": {"block_size": 7, "tokens": 100, "width": 9},
    "one token": {"tokens": 1, "batch": 2},
    "few of many integers": {"index_dtype": torch.uint8, "batch": 2},
    "two tokens": {"length": 2},
    "tokens over blocks": {"length": 9, "block_size": 4, "width": 12, "index_dtype": torch.uint8},
    "many tokens": {"length": 40, "width": None, "values": 20},
    "more tokens than keys": {"length": 7, "tokens": 5, "block_size": 4},
    "tokens of no groups": {"length": 5, "heads": 3, "kv_heads": 3, "list_heads": 1, "width": 4},
    "lists of tokens": {"length": 3, "of_tokens": True},
    "one list for all heads of tokens": {"length": 5, "of_tokens": True, "list_heads": 1},
    "no counts of tokens": {"length": 4, "of_tokens": True, "counted": False, "block_size": 7},
    "a list of one token": {"of_tokens": True, "index_dtype": torch.int32},
}
PAGES = {16: (4, 16, 32), 4: (2, 4, 8), 7: (1, 7, 21)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
def test_equals_torch(implementation: str, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    one = case(**shape, dtype=dtype)
    contiguous = one.solve(implementation)
    check(one, contiguous)
    # What is read where is the same in every dtype.
    for page_size in PAGES[one.block_size][slice(None) if dtype == torch.float32 else slice(1)]:
        paged = one.solve_paged(implementation, page_size)
        check(one, paged)
        for there, here in zip(paged, contiguous, strict=True):
            torch.testing.assert_close(there, here)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_equals_dense_attention(implementation: str) -> None:
    one = case(width=None)
    full = block_sparse_decode(one.query, one.key, one.value, implementation=implementation)
    expected = F.scaled_dot_product_attention(one.query, one.key, one.value, enable_gqa=True)
    torch.testing.assert_close(full, expected)
    blocks = torch.arange(4).expand(3, 1, 4)
    listed = block_sparse_decode(
        one.query, one.key, one.value, blocks, block_size=16, implementation=implementation
    )
    torch.testing.assert_close(listed, expected)
    blocks = torch.arange(1).expand(3, 2, 1)
    default = block_sparse_decode(
        one.query, one.key, one.value, blocks, implementation=implementation
    )
    torch.testing.assert_close(default, expected, msg="blocks of 64 by default")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scale_and_extreme_scores(implementation: str) -> None:
    one = case(batch=2)
    for scale in (0.0, -2.0, 1e4):
        check(one, one.solve(implementation, scale=scale), scale)
        check(one, one.solve_paged(implementation, 8, scale=scale), scale)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_selected_does_not_matter(bad: float, implementation: str) -> None:
    one = case(list_heads=2)
    clean = one.solve(implementation)
    for tensor in (one.key, one.value):
        for b in range(len(tensor)):
            for h in range(tensor.shape[1]):
                others = sorted(set(range(tensor.shape[2])) - set(one.selected(b, h)))
                tensor[b, h, others] = bad
    for actual, expected in zip(one.solve(implementation), clean, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_shows_where_it_is_selected(implementation: str) -> None:
    one = case(batch=2, tokens=400, width=None)
    one.seq_lengths[:] = 400
    one.key[0, 1, 399, 3] = torch.nan
    output, lse = one.solve(implementation)
    assert output[0, 2:].isnan().all()
    assert lse[0, 2:].isnan().all()
    assert lse.isnan().sum() == 2
    assert output.isnan().sum() == 2 * output.shape[-1]
    one.key[0, 1, 399, 3] = 0
    one.value[1, 0, 5, 2] = torch.inf
    output, lse = one.solve(implementation)
    assert (output[1, :2, 0, 2] == torch.inf).all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty(implementation: str) -> None:
    one = case(tokens=0, width=None, batch=1)
    one.seq_lengths[:] = 0
    for output, lse in (one.solve(implementation), one.solve_paged(implementation, 4)):
        assert output.shape == (1, 4, 1, 6)
        assert not output.any()
        assert (lse == -torch.inf).all()
    none = paged_block_sparse_decode(
        one.query,
        torch.zeros(0, 4, 2, 12),
        torch.zeros(0, 4, 2, 6),
        torch.tensor([[5, 5]]),
        torch.tensor([0]),
        block_size=4,
        implementation=implementation,
    )
    assert not none.any()  # type: ignore[union-attr]
    lists = torch.zeros(3, 1, 0, dtype=torch.int64)
    one = case()
    output = block_sparse_decode(
        one.query, one.key, one.value, lists, implementation=implementation
    )
    assert not output.any()  # type: ignore[union-attr]
    one = case(batch=0)
    assert one.solve(implementation)[0].shape == (0, 4, 1, 6)
    for of_tokens in (False, True):
        one = case(length=0, of_tokens=of_tokens)
        assert one.solve(implementation)[0].shape == (3, 4, 0, 6)
        one = case(1, tokens=0, length=2, of_tokens=of_tokens)
        output, lse = one.solve(implementation)
        assert not output.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_are_respected_and_nothing_is_modified(implementation: str) -> None:
    one = case(index_dtype=torch.int32)
    expected = one.solve(implementation)
    for name in ("query", "key", "value"):
        strided = getattr(one, name).permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        setattr(one, name, strided)
    assert one.kv_indices is not None
    one.kv_indices = one.kv_indices.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert one.kv_num_blocks is not None
    one.kv_num_blocks = one.kv_num_blocks.T.contiguous().T
    one.seq_lengths = one.seq_lengths.repeat_interleave(2)[::2]
    arguments = [value for value in vars(one).values() if isinstance(value, Tensor)]
    before = [argument.clone() for argument in arguments]
    for actual, right in zip(one.solve(implementation), expected, strict=True):
        torch.testing.assert_close(actual, right)
    for argument, copy in zip(arguments, before, strict=True):
        assert torch.equal(argument, copy)
    shared = one.key[:1, :1].expand_as(one.key), one.value[:1, :1].expand_as(one.value)
    one.key, one.value = shared
    views = one.solve(implementation)
    one.key, one.value = (tensor.contiguous() for tensor in shared)
    expected = one.solve(implementation)
    for actual, right in zip(views, expected, strict=True):
        torch.testing.assert_close(actual, right)
    for more in (1, one.key.shape[3]):  # features of wider rows
        wide = replace(one, key=F.pad(one.key, (0, more))[..., :-more])
        for actual, right in zip(wide.solve(implementation), expected, strict=True):
            torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.uint8], ids=dtype_name)
def test_short_sequences_leave_the_first_tokens_blind(
    index_dtype: torch.dtype, implementation: str
) -> None:
    one = case(length=4, width=None, index_dtype=index_dtype)
    one.seq_lengths[:] = torch.tensor([3, 4, 0])
    output, lse = one.solve(implementation)
    blind = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()[:, None].expand(3, 4, 4)
    assert torch.equal(lse == -torch.inf, blind)
    assert not output[blind].any()
    torch.testing.assert_close(output[1, :, 0], one.value[1, :, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_several_tokens_equal_single_ones_as_the_sequence_grows(
    of_tokens: bool, implementation: str
) -> None:
    one = case(length=5, block_size=4, width=9, of_tokens=of_tokens)
    for solve in (one.solve, partial(one.solve_paged, page_size=8)):
        together = solve(implementation)
        for i in range(5):
            single = replace(
                one,
                query=one.query[:, :, i : i + 1],
                seq_lengths=(one.seq_lengths - 4 + i).clamp(min=0),
            )
            if of_tokens:
                assert one.kv_indices is not None
                assert one.kv_num_blocks is not None
                single.kv_indices = one.kv_indices[:, :, i]
                single.kv_num_blocks = one.kv_num_blocks[:, :, i]
            for actual, expected in zip(together, single.solve(implementation), strict=True):
                torch.testing.assert_close(actual[:, :, i : i + 1], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("of_tokens", [False, True])
def test_equals_the_last_rows_of_block_sparse_attention(
    of_tokens: bool, implementation: str
) -> None:
    """The layout of all tokens has one list for each, or the same for all."""
    query = torch.randn(2, 4, 30, 12)
    key, value = torch.randn(2, 2, 30, 12), torch.randn(2, 2, 30, 6)
    lists = torch.rand(2, 2, 30 if of_tokens else 1, 8).argsort(-1)[..., :3]
    mask = torch.zeros(2, 2, lists.shape[2], 8, dtype=torch.bool).scatter(3, lists, True)
    layout = BlockLayout.from_dense(mask.expand(2, 2, 30, 8), (1, 4), seq_lengths=(30, 30))
    expected = block_sparse_attention(
        query, key, value, layout, is_causal=True, enable_gqa=True, return_lse=True
    )
    actual = block_sparse_decode(
        query[:, :, -7:],
        key,
        value,
        lists[:, :, -7:] if of_tokens else lists[:, :, 0],
        block_size=4,
        is_causal=True,
        return_lse=True,
        implementation=implementation,
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other[:, :, -7:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_later_tokens_do_not_matter(bad: float, dtype: torch.dtype, implementation: str) -> None:
    one = case(1, length=6, tokens=90, width=None, dtype=dtype)
    one.seq_lengths[:] = 80
    clean = one.solve(implementation)
    for name, slot in itertools.product(("key", "value"), (74, 77, 79)):
        tensor = getattr(one, name)
        dirty = tensor.clone()
        dirty[0, 1, slot, 2] = bad
        output, lse = replace(one, **{name: dirty}).solve(implementation)
        before = slot - 74
        assert torch.equal(output[:, :, :before], clean[0][:, :, :before])
        assert torch.equal(lse[:, :, :before], clean[1][:, :, :before])
        assert torch.equal(output[:, :2], clean[0][:, :2])
        assert torch.equal(lse[:, :2], clean[1][:, :2])
        if name == "value":
            assert torch.equal(lse, clean[1])
            after = output[0, 2:, before:]
            if implementation == "triton":
                assert after.isnan().all()
            else:
                torch.testing.assert_close(
                    after[..., 2], torch.full_like(after[..., 2], bad), equal_nan=True
                )
                others = [0, 1, 3, 4, 5]
                torch.testing.assert_close(
                    after[..., others], clean[0][0, 2:, before:, others], atol=0, rtol=0
                )
        elif bad != bad:
            assert output[0, 2:, before:].isnan().all()
            assert lse[0, 2:, before:].isnan().all()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 60),
    block_size=st.integers(1, 9),
    width=st.integers(1, 5),
    page_factor=st.sampled_from([1, 2, 3]),
    length=st.integers(1, 4),
    of_tokens=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_properties(
    tokens: int,
    block_size: int,
    width: int,
    page_factor: int,
    length: int,
    of_tokens: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    one = case(
        2,
        tokens=tokens,
        block_size=block_size,
        length=length,
        of_tokens=of_tokens,
        width=width,
        counted=False,
        dtype=torch.float64,
    )
    output, lse = one.solve(None)
    # The order of the list is irrelevant, and so are the pages.
    assert one.kv_indices is not None
    one.kv_indices = one.kv_indices[..., torch.randperm(one.kv_indices.shape[-1])]
    torch.testing.assert_close(one.solve(None), (output, lse))
    torch.testing.assert_close(one.solve_paged(None, page_factor * block_size), (output, lse))
    # A part of the list sees less, and the rest of it the rest.
    half = one.kv_indices.shape[-1] // 2
    parts = []
    for indices in (one.kv_indices[..., :half], one.kv_indices[..., half:]):
        parts.append(
            block_sparse_decode(
                one.query,
                one.key,
                one.value,
                indices,
                seq_lengths=one.seq_lengths,
                block_size=block_size,
                is_causal=True,
                return_lse=True,
            )
        )
    weights = torch.stack([part[1] for part in parts]).softmax(0).nan_to_num()[..., None]
    torch.testing.assert_close((weights * torch.stack([part[0] for part in parts])).sum(0), output)
    # A weighted mean of values, or zero.
    values = F.pad(one.value, (0, 0, 0, 1)).repeat_interleave(2, 1)
    assert (output <= values.amax(2, keepdim=True) + 1e-12).all()
    assert (output >= values.amin(2, keepdim=True) - 1e-12).all()


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_two_calls_are_bitwise_equal(implementation: str) -> None:
    one = case(batch=1, tokens=300, width=None)
    first, second = one.solve(implementation), one.solve(implementation)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("splits", "length"), [(1, 1), (2, 7), (5, 3), (14, 1)])
def test_any_number_of_splits_by_triton(
    splits: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.attention.block_sparse_decode import triton

    one = case(heads=6, tokens=260, width=13, length=length)  # one of the sequences is empty
    monkeypatch.setattr(triton, "count_splits", lambda *_: splits)
    check(one, one.solve("triton"))
    check(one, one.solve_paged("triton", 8))
    check(one, one.solve("triton", scale=1e3), 1e3)  # one part outweighs the others by far


def test_splits_are_those_of_the_list_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.attention.block_sparse_decode import triton

    seen = []
    monkeypatch.setattr(triton, "count_splits", lambda *args: seen.append(args[:2]) or 1)
    one = case(tokens=320, width=6)
    one.solve("triton")
    one.solve_paged("triton", 32)
    one.kv_indices = one.kv_num_blocks = None
    one.solve("triton")
    tile = triton.ONE.choose("interpreter", torch.float32, 16).keys
    assert seen == [(6, 96 // tile), (6, 96 // tile), (6, 320 // tile)]


def test_groups_of_more_heads_than_a_tile_by_triton() -> None:
    one = case(batch=1, heads=40, kv_heads=2, tokens=150, width=5)
    check(one, one.solve("triton"))


def test_splits_of_triton_fill_a_gpu_and_no_more() -> None:
    from tilework import _triton
    from tilework.attention.block_sparse_decode.triton import count_splits

    device = torch.device("cpu")
    most = 2 * _triton.multiprocessors(device)
    assert count_splits(1, 1000, device) == most
    assert count_splits(1, 2, device) == 2
    assert count_splits(10**6, 1000, device) == 1
    assert count_splits(1, 0, device) == 1
    assert count_splits(3, 1000, device) == -(-most // 3)
