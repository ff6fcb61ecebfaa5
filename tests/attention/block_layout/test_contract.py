import builtins
import math
import sys
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tilework.attention import BlockLayout, causal_topk
from tilework.attention.block_layout import tiled

import samples
from calls import Call, Tensors, draw
from helpers import DEVICES, dtype_name

INT32 = torch.iinfo(torch.int32)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
GRIDS = [
    # lengths, block size
    ((1, 1), (1, 1)),
    ((63, 100), (16, 16)),
    ((100, 63), (16, 8)),
    ((100, 100), (7, 20)),
    ((20, 50), (8, 4)),
    ((64, 64), (32, 16)),
    ((20, 6), (5, 4)),
    ((20, 20), (5, 3)),
    ((0, 20), (4, 4)),
    ((20, 0), (4, 4)),
    ((0, 0), (64, 64)),
]


def blocks_of(lengths, size):
    """Each block's positions, by rows and by columns."""
    return [
        [list(range(length))[start : start + step] for start in range(0, length, step)]
        for length, step in zip(lengths, size, strict=True)
    ]


def live_and_diagonal(lengths, size):
    """Two sets of (row, column), from the positions one by one."""
    queries, keys = blocks_of(lengths, size)
    live, diagonal = set(), set()
    for (i, row), (j, column) in product(enumerate(queries), enumerate(keys)):
        if any(k <= q for q in row for k in column):
            live.add((i, j))
        # The block's places count, also those past the last key.
        if any(j * size[1] <= q < (j + 1) * size[1] for q in row):
            diagonal.add((i, j))
    return live, diagonal


def active(layout):
    """The blocks of the row lists, by the definition, with the order checked."""
    blocks = set()
    counts, indices = layout.kv_num_blocks.tolist(), layout.kv_indices.tolist()
    assert layout.kv_num_blocks.dtype == layout.kv_indices.dtype == torch.int32
    for b, h, i in product(*map(range, layout.shape[:3])):
        row = indices[b][h][i][: counts[b][h][i]]
        assert len(row) == counts[b][h][i]
        assert all(0 <= j < layout.shape[3] for j in row)
        assert all(x < y for x, y in pairwise(row))
        blocks |= {(b, h, i, j) for j in row}
    return blocks


def transposed(layout):
    blocks = set()
    counts, indices = layout.q_num_blocks, layout.q_indices
    assert counts.dtype == indices.dtype == torch.int32
    batch, heads, rows, columns = layout.shape
    assert counts.shape == indices.shape[:3] == (batch, heads, columns)
    for b, h, j in product(range(batch), range(heads), range(columns)):
        column = indices[b, h, j, : counts[b, h, j]].tolist()
        assert len(column) == counts[b, h, j]
        assert all(0 <= i < rows for i in column)
        assert all(x < y for x, y in pairwise(column))
        blocks |= {(b, h, i, j) for i in column}
    return blocks


def dense_of(blocks, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for block in blocks:
        mask[block] = True
    return mask


def poisoned(layout):
    """The same layout with nonsense after the counts, and more of it."""
    indices = F.pad(layout.kv_indices, (0, 3))
    unread = torch.arange(indices.shape[-1]) >= layout.kv_num_blocks[..., None]
    nonsense = torch.tensor([INT32.max, INT32.min, -1, layout.shape[3], 0], dtype=torch.int32)
    fill = nonsense[torch.arange(indices.numel()) % 5].reshape(indices.shape)
    return BlockLayout(
        layout.kv_num_blocks,
        torch.where(unread, fill, indices),
        layout.num_kv_blocks,
        layout.block_size,
        layout.seq_lengths,
    )


def random_layout(shape, size=(4, 4), lengths=None, density=0.4):
    return BlockLayout.from_dense(torch.rand(shape) < density, size, seq_lengths=lengths)


def shape_of(lengths, size):
    return [math.ceil(length / step) for length, step in zip(lengths, size, strict=True)]


lengths_and_size = st.tuples(
    st.tuples(*[st.sampled_from([0, 1, 2, 5, 7, 12, 20, 63])] * 2),
    st.tuples(*[st.sampled_from([1, 2, 3, 4, 7, 16])] * 2),
).filter(lambda drawn: math.prod(shape_of(*drawn)) <= 150)
quick = settings(max_examples=40, deadline=None)


@quick
@given(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 7), st.integers(0, 9)),
    st.sampled_from([0, 0.1, 0.5, 1]),
    st.integers(0, 99),
)
def test_dense_and_back(shape, density, seed):
    torch.manual_seed(seed)
    mask = torch.rand(shape) < density
    original = mask.clone()
    layout = BlockLayout.from_dense(mask, (4, 8))
    expected = {tuple(block) for block in mask.nonzero().tolist()}
    assert layout.shape == shape
    assert active(layout) == expected
    width = max([0, *layout.kv_num_blocks.flatten().tolist()])
    assert layout.kv_indices.shape == (*shape[:3], width)
    for same in (layout, poisoned(layout)):
        assert torch.equal(same.to_dense(), mask)
        assert same.to_dense().is_contiguous()
        assert transposed(same) == expected
        assert same.q_indices.shape[-1] == max([0, *mask.sum(-2).flatten().tolist()])
        assert same.q_indices is same.q_indices
        assert same == layout
    assert torch.equal(mask, original)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16]
)
def test_indices_in_any_order(dtype):
    mask = torch.rand(2, 3, 5, 7) < 0.5
    expected = BlockLayout.from_dense(mask, 16)
    indices = torch.full((2, 3, 5, 9), torch.iinfo(dtype).max)
    counts = torch.zeros(2, 3, 5, dtype=torch.int64)
    for b, h, i, j in reversed(mask.nonzero().tolist()):
        indices[b, h, i, int(counts[b, h, i])] = j
        counts[b, h, i] += 1
    indices, counts = indices.to(dtype), counts.to(dtype)
    before = indices.clone(), counts.clone()
    layout = BlockLayout.from_indices(indices, counts, 7, 16)
    assert layout == expected
    assert active(layout) == active(expected)
    assert layout.shape == (2, 3, 5, 7)
    assert torch.equal(indices, before[0])
    assert torch.equal(counts, before[1])


@pytest.mark.filterwarnings("error")
def test_lists_are_contiguous():
    scores = torch.rand(4, 5, 3, 2).permute(3, 2, 0, 1)
    indices = torch.rand(7, 4, 3, 2).argsort(0).permute(3, 2, 1, 0)
    counts = torch.full((4, 3, 2), 2).permute(2, 1, 0)
    strided = BlockLayout.from_dense(scores > 0.5)
    for layout in (
        strided,
        BlockLayout.from_indices(indices, counts, 7),
        BlockLayout.from_scores_topk(scores, 2),
        BlockLayout.from_scores_topk(scores, 0),
        BlockLayout.from_window((256, 256), left=[0, 1], num_sink_blocks=1),
        strided | strided,
        strided & strided,
        BlockLayout.cat([strided, strided], 1),
    ):
        lists = layout.kv_num_blocks, layout.kv_indices, layout.q_num_blocks, layout.q_indices
        assert all(x.is_contiguous() for x in lists)
        assert transposed(layout) == active(layout)


def kept_by_topk(row, k, forced, eligible):
    rest = sorted((j for j in eligible if j not in forced), key=lambda j: (-row[j], j))
    return forced | set(rest[: max(0, k - len(forced))])


@settings(max_examples=80, deadline=None)
@given(
    lengths_and_size,
    st.integers(0, 7),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.integers(0, 99),
)
def test_topk(drawn, k, is_causal, force_diagonal, sinks, dtype, known, seed):
    torch.manual_seed(seed)
    lengths, size = drawn
    rows, columns = shape_of(lengths, size)
    shape = (2, 2, rows, columns)
    scores = torch.randint(-2, 3, shape).float()  # ties
    scores[torch.rand(shape) < 0.2] = -torch.inf if dtype != torch.float8_e4m3fn else torch.nan
    scores[torch.rand(shape) < 0.05] = torch.nan
    scores = scores.to(dtype)
    original = scores.clone()
    places = torch.randint(0, k + 1, (2, 1, rows)) if seed % 2 == 0 else k
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "AT_ONCE", (0, 3 * rows * columns, 2**21)[seed % 3])
        layout = BlockLayout.from_scores_topk(
            scores,
            places,
            size,
            is_causal=is_causal,
            force_diagonal=force_diagonal,
            num_sink_blocks=sinks,
            seq_lengths=lengths if known else None,
        )
    covered = lengths if known else (rows * size[0], columns * size[1])
    live, diagonal = live_and_diagonal(covered, size)
    values, expected = scores.double().tolist(), set()
    for b, h, i in product(range(2), range(2), range(rows)):
        row = values[b][h][i]
        allowed = [j for j in range(columns) if not is_causal or (i, j) in live]
        forced = {j for j in allowed if j < sinks or (force_diagonal and (i, j) in diagonal)}
        eligible = [j for j in allowed if row[j] > -math.inf]
        wanted = k if isinstance(places, int) else int(places[b, 0, i])
        kept = kept_by_topk(row, wanted, forced, eligible)
        assert len(kept) == max(len(forced), min(wanted, len(forced | set(eligible))))
        expected |= {(b, h, i, j) for j in kept}
    assert active(layout) == expected
    assert transposed(poisoned(layout)) == expected
    assert torch.equal(scores.double().nan_to_num(7), original.double().nan_to_num(7))
    if isinstance(places, int):
        most = sinks + 1 + (size[0] + size[1] - 2) // size[1]
        assert layout.kv_indices.shape[-1] <= min(columns, max(k, most))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32])
def test_k_of_any_integer_dtype(dtype):
    scores = torch.rand(1, 2, 3, 9)
    k = torch.tensor([[[3, 0, 200], [1, 2, 5]]])
    layout = BlockLayout.from_scores_topk(scores, k.to(dtype), force_diagonal=False)
    assert layout.kv_num_blocks.tolist() == [[[3, 0, 9], [1, 2, 5]]]


def test_topk_takes_the_earlier_of_equal_scores():
    scores = torch.zeros(1, 1, 3, 300)
    scores[..., ::2] = 1.0
    layout = BlockLayout.from_scores_topk(scores, 200, force_diagonal=False)
    assert layout.kv_indices.shape == (1, 1, 3, 200)
    expected = sorted([*range(0, 300, 2), *range(1, 101, 2)])
    assert layout.kv_indices[0, 0].tolist() == [expected] * 3


def test_topk_keeps_infinite_scores_and_forced_blocks_without_one():
    infinity = torch.inf
    scores = torch.tensor([[-infinity, infinity, 1, infinity, -infinity]])[None, None]
    for k, sinks, expected in [(2, 0, [1, 3]), (2, 1, [0, 1]), (9, 0, [1, 2, 3]), (0, 2, [0, 1])]:
        layout = BlockLayout.from_scores_topk(
            scores, k, force_diagonal=False, num_sink_blocks=sinks
        )
        assert layout.kv_indices[0, 0, 0, : layout.kv_num_blocks].tolist() == expected


@quick
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_topk_ignores_a_constant(blocks, k, seed):
    torch.manual_seed(seed)
    scores = torch.randint(-9, 9, (1, 2, blocks, blocks)).float()
    constant = torch.randint(-9, 9, (1, 2, blocks, 1))
    for is_causal in (False, True):
        layout = BlockLayout.from_scores_topk(scores, k, is_causal=is_causal)
        assert BlockLayout.from_scores_topk(scores + constant, k, is_causal=is_causal) == layout
        assert layout.to_dense().diagonal(dim1=-2, dim2=-1).all()


@quick
@given(
    lengths_and_size,
    st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(FLOATS),
    st.integers(0, 99),
)
def test_threshold(drawn, threshold, is_causal, force_diagonal, sinks, dtype, seed):
    torch.manual_seed(seed)
    lengths, size = drawn
    rows, columns = shape_of(lengths, size)
    scores = torch.randint(-4, 5, (1, 3, rows, columns)) / 2
    scores[torch.rand(scores.shape) < 0.1] = torch.nan
    if dtype != torch.float8_e4m3fn:
        scores[torch.rand(scores.shape) < 0.1] = -torch.inf
    scores = scores.to(dtype)
    options = {
        "is_causal": is_causal,
        "force_diagonal": force_diagonal,
        "num_sink_blocks": sinks,
        "seq_lengths": lengths,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "AT_ONCE", (0, 2 * rows * columns, 2**21)[seed % 3])
        layout = BlockLayout.from_scores_threshold(scores, threshold, size, **options)
    live, diagonal = live_and_diagonal(lengths, size)
    values, expected = scores.double().tolist(), set()
    for h, i, j in product(range(3), range(rows), range(columns)):
        forced = j < sinks or (force_diagonal and (i, j) in diagonal)
        above = values[0][h][i][j] > max(threshold, -sys.float_info.max)
        if (forced or above) and (not is_causal or (i, j) in live):
            expected.add((0, h, i, j))
    assert active(layout) == expected
    higher = torch.full((3, 1, 1), threshold).nextafter(torch.tensor(math.inf))
    fewer = BlockLayout.from_scores_threshold(scores, higher, size, **options)
    assert active(fewer) <= expected
    assert fewer & layout == fewer


def test_threshold_of_each_head():
    scores = torch.rand(2, 3, 4, 5)
    threshold = torch.tensor([0.2, 0.5, 0.8])[:, None, None]
    layout = BlockLayout.from_scores_threshold(scores, threshold, force_diagonal=False)
    limits = threshold.flatten().tolist()
    for h, limit in enumerate(limits):
        kept = {x for x in active(layout) if x[1] == h}
        assert kept == {tuple(x) for x in scores.gt(limit).nonzero().tolist() if x[1] == h}


def windowed(lengths, size, left, right, sinks, marked, is_causal):
    """One head, from the positions."""
    live, _ = live_and_diagonal(lengths, size)
    rows, columns = shape_of(lengths, size)
    kept = set()
    for i, queries in enumerate(blocks_of(lengths, size)[0]):
        holders = {q // size[1] for q in queries}
        for j in range(columns):
            near = (left is None or j >= min(holders) - left) and (
                right is None or j <= max(holders) + right
            )
            if (near or j < sinks or j in marked or i in marked) and (
                not is_causal or (i, j) in live
            ):
                kept.add((i, j))
    assert rows == len(blocks_of(lengths, size)[0])
    return kept


@settings(max_examples=80, deadline=None)
@given(
    lengths_and_size,
    *[st.lists(st.sampled_from([None, 0, 1, 2, 9]), min_size=2, max_size=2)] * 2,
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.sets(st.integers(0, 9), max_size=2),
    st.booleans(),
)
@example(((40, 40), (4, 4)), [0, 0], [0, 0], [0, 0], {0, 9}, False)
@example(((40, 12), (4, 4)), [0, None], [0, 1], [0, 2], {2, 9}, False)
def test_window(drawn, left, right, sinks, marked, is_causal):
    lengths, size = drawn
    rows, columns = shape_of(lengths, size)
    marked = {block for block in marked if block < max(rows, columns)}
    options = {"global_blocks": marked, "is_causal": is_causal}
    layout = BlockLayout.from_window(
        lengths, size, left=left, right=right, num_sink_blocks=sinks, **options
    )
    heads = [
        windowed(lengths, size, *pattern, marked, is_causal)
        for pattern in zip(left, right, sinks, strict=True)
    ]
    assert layout.shape == (1, 2, rows, columns)
    assert layout.seq_lengths == lengths
    assert active(layout) == {(0, h, i, j) for h, kept in enumerate(heads) for i, j in kept}

    scalar = BlockLayout.from_window(
        lengths, size, left=left[0], right=right[0], num_sink_blocks=sinks[0], **options
    )
    assert scalar.shape == (1, 1, rows, columns)
    assert active(scalar) == {(0, 0, i, j) for i, j in heads[0]}
    mixed = BlockLayout.from_window(
        lengths, size, left=left, right=right[0], num_sink_blocks=sinks[0], **options
    )
    assert mixed.shape[1] == 2


def test_window_is_compact():
    narrow = BlockLayout.from_window((6400, 6400), left=2, right=1, num_sink_blocks=1)
    assert narrow.kv_indices.shape == (1, 1, 100, 5)
    causal = BlockLayout.from_window((6400, 6400), left=2, is_causal=True)
    assert causal.kv_indices.shape == (1, 1, 100, 3)
    assert BlockLayout.from_window((130, 70), 64).to_dense().all()


@quick
@given(
    st.sampled_from([0, 1, 5, 20]),
    st.tuples(*[st.sampled_from([1, 3, 4, 7])] * 2),
    st.booleans(),
    st.sampled_from([1, 4, 30]),
    st.integers(0, 99),
)
def test_documents(length, size, is_causal, documents, seed):
    torch.manual_seed(seed)
    ids = torch.randint(-documents, documents, (2, length)) * 10**12
    if seed % 2:
        ids = ids.sort().values
    layout = BlockLayout.from_documents(ids, size, is_causal=is_causal)
    queries, keys = blocks_of((length, length), size)
    live, _ = live_and_diagonal((length, length), size)
    expected = {
        (b, 0, i, j)
        for b, (i, row), (j, column) in product(range(2), enumerate(queries), enumerate(keys))
        if any(ids[b, q] == ids[b, k] for q in row for k in column)
        and (not is_causal or (i, j) in live)
    }
    assert layout.shape == (2, 1, *shape_of((length, length), size))
    assert layout.seq_lengths == (length, length)
    assert active(layout) == expected


@quick
@given(lengths_and_size, st.booleans(), st.integers(0, 99))
def test_causal(drawn, known, seed):
    torch.manual_seed(seed)
    lengths, size = drawn
    rows, columns = shape_of(lengths, size)
    shape = (2, 3, rows, columns)
    mask = torch.rand(shape) < 0.5
    layout = BlockLayout.from_dense(mask, size, seq_lengths=lengths if known else None)
    covered = lengths if known else (rows * size[0], columns * size[1])
    live, _ = live_and_diagonal(covered, size)
    for same in (layout, poisoned(layout)):
        trimmed = same.trim_causal()
        assert active(trimmed) == {x for x in active(layout) if x[2:] in live}
        assert trimmed.trim_causal() == trimmed
        assert transposed(trimmed) == active(trimmed)
        for is_causal, kept, total in (
            (False, len(active(layout)), mask.numel()),
            (True, len(active(trimmed)), 6 * len(live)),
        ):
            density = same.density(is_causal=is_causal)
            assert density.dtype == torch.float32
            assert density.shape == ()
            expected = torch.tensor(kept / total if total else math.nan)
            torch.testing.assert_close(density, expected, equal_nan=True)


@quick
@given(
    st.tuples(*[st.sampled_from([0, 1, 2])] * 2, st.integers(0, 5), st.integers(0, 7)),
    st.sampled_from([(False, False), (True, False), (False, True), (True, True)]),
    st.integers(0, 99),
)
def test_union_and_intersection(shape, shared, seed):
    torch.manual_seed(seed)
    first = torch.rand(shape) < 0.4
    second = torch.rand([1 if s else n for s, n in zip(shared, shape, strict=False)] + [*shape[2:]])
    second = second < 0.6
    a, b = (BlockLayout.from_dense(mask, (4, 8)) for mask in (first, second))
    for x, y in ((a, b), (b, a), (poisoned(a), poisoned(b))):
        assert torch.equal((x | y).to_dense(), first | second)
        assert torch.equal((x & y).to_dense(), first & second)
        assert active(x | y) == {tuple(block) for block in (first | second).nonzero().tolist()}
        assert active(x & y) == {tuple(block) for block in (first & second).nonzero().tolist()}
        assert (x & y).kv_indices.shape[-1] <= shape[3] + 3
        assert (x | y).kv_indices.shape[-1] <= shape[3]
    assert torch.equal(a.to_dense(), first)


def test_union_keeps_the_lengths_that_are_known():
    known = random_layout((1, 1, 3, 4), lengths=(11, 15))
    free = random_layout((1, 1, 3, 4))
    for result in (known | free, free | known, known & free, free & known):
        assert result.seq_lengths == (11, 15)
    assert (free | free).seq_lengths is None


@pytest.mark.parametrize("dim", [0, 1])
def test_cat(dim):
    shapes = [[2, 2, 3, 5] for _ in range(3)]
    for size, shape in enumerate(shapes):
        shape[dim] = size
    layouts = [
        random_layout(shape, lengths=(11, 18), density=d)
        for shape, d in zip(shapes, (0.5, 0.2, 0.9), strict=True)
    ]
    dense = torch.cat([layout.to_dense() for layout in layouts], dim)
    for joined in (BlockLayout.cat(layouts, dim), BlockLayout.cat([*map(poisoned, layouts)], dim)):
        assert torch.equal(joined.to_dense(), dense)
        assert active(joined) == {tuple(block) for block in dense.nonzero().tolist()}
        assert (joined.block_size, joined.seq_lengths) == ((4, 4), (11, 18))
    assert BlockLayout.cat(layouts[1:2], dim) == layouts[1]


@pytest.mark.parametrize(("lengths", "size"), GRIDS)
def test_elements(lengths, size):
    rows, columns = shape_of(lengths, size)
    layout = random_layout((2, 2, rows, columns), size)
    known = random_layout((2, 2, rows, columns), size, lengths)
    whole = (rows * size[0], columns * size[1])
    for x, arguments, (queries, keys) in (
        (layout, lengths, lengths),
        (layout, (), whole),
        (layout, (None, lengths[1]), (whole[0], lengths[1])),
        (known, (), lengths),
        (poisoned(known), lengths, lengths),
    ):
        elements = x.to_elements(*arguments)
        assert elements.shape == (2, 2, queries, keys)
        expected = {
            (b, h, q, k)
            for b, h, i, j in active(x)
            for q in range(queries)
            for k in range(keys)
            if (q // size[0], k // size[1]) == (i, j)
        }
        assert torch.equal(elements, dense_of(expected, elements.shape))


def flex_lists(block_mask, kind):
    prefix = {"full": "full_kv", "partial": "kv"}[kind]
    counts, indices = (getattr(block_mask, f"{prefix}_{x}") for x in ("num_blocks", "indices"))
    return {
        (b, h, i, j)
        for b, h, i in product(*map(range, counts.shape))
        for j in indices[b, h, i, : counts[b, h, i]].tolist()
    }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("lengths", "size"), GRIDS)
def test_flex_lists(lengths, size, is_causal):
    rows, columns = shape_of(lengths, size)
    layout = random_layout((2, 2, rows, columns), size, lengths, density=0.7)
    queries, keys = blocks_of(lengths, size)
    full, partial = set(), set()
    for block in active(layout):
        pairs = product(queries[block[2]], keys[block[3]])
        visible = [k <= q or not is_causal for q, k in pairs]
        if all(visible):
            full.add(block)
        elif any(visible):
            partial.add(block)
    for same in (layout, poisoned(layout)):
        block_mask = same.to_flex(is_causal=is_causal)
        assert (block_mask.BLOCK_SIZE, block_mask.seq_lengths) == (size, lengths)
        assert flex_lists(block_mask, "full") == full
        assert flex_lists(block_mask, "partial") == partial
        assert block_mask.kv_indices.shape == block_mask.full_kv_indices.shape
        assert block_mask.kv_indices.shape == (2, 2, rows, columns)
        assert all(
            ((t >= 0) & (t < max(columns, 1))).all()
            for t in (block_mask.kv_indices, block_mask.full_kv_indices)
        )
    if not is_causal:
        back = BlockLayout.from_flex(layout.to_flex())
        assert back == layout
        assert back.seq_lengths == lengths
        free = random_layout((2, 2, rows, columns), size)
        back = BlockLayout.from_flex(free.to_flex())
        assert torch.equal(back.to_dense(), free.to_dense())
        assert back.seq_lengths == (rows * size[0], columns * size[1])
    else:
        kept = BlockLayout.from_flex(layout.to_flex(is_causal=True), partial="keep")
        assert kept == layout.trim_causal()


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "size", "shape", "heads"),
    [((23, 30), (8, 4), (2, 2), None), ((30, 23), 8, (1, 2), 4), ((17, 9), 16, (1, 1), None)],
)
def test_flex_attention_agrees(lengths, size, shape, heads, is_causal):
    pair = size if isinstance(size, tuple) else (size, size)
    layout = random_layout((*shape, *shape_of(lengths, pair)), size, lengths, density=0.6)
    layout |= BlockLayout.from_window(lengths, size, left=None, right=0) & layout.from_window(
        lengths, size, left=0, right=0, num_sink_blocks=1
    )  # no row without a key, for which the two differ
    query_heads = heads or shape[1]
    query = torch.randn(2, query_heads, lengths[0], 16)
    key, value = (torch.randn(2, query_heads, lengths[1], 16) for _ in range(2))
    mask = layout.to_elements().repeat_interleave(query_heads // shape[1], 1)
    if is_causal:
        mask = mask & (torch.arange(lengths[1]) <= torch.arange(lengths[0])[:, None])
    block_mask = layout.to_flex(is_causal=is_causal, num_heads=heads)
    assert block_mask.kv_num_blocks.shape[:2] == (shape[0], query_heads)
    actual = flex_attention(query, key, value, block_mask=block_mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(actual, expected)

    # torch's own lists of the same mask_mod hold the same blocks, sorted otherwise.
    theirs = create_block_mask(
        block_mask.mask_mod, shape[0], query_heads, *lengths, device="cpu", BLOCK_SIZE=pair
    )
    ours = BlockLayout.from_flex(block_mask, partial="keep")
    assert BlockLayout.from_flex(theirs, partial="keep") == ours
    assert flex_lists(theirs, "full") <= flex_lists(block_mask, "full")


@pytest.mark.untyped
def test_flex_without_batch_or_heads():
    def near(b, h, q_idx, kv_idx):
        return (q_idx - kv_idx).abs() <= 8

    block_mask = create_block_mask(near, None, None, 60, 44, device="cpu", BLOCK_SIZE=(8, 4))
    expected = {
        (0, 0, i, j)
        for (i, row), (j, column) in product(*map(enumerate, blocks_of((60, 44), (8, 4))))
        if any(abs(q - k) <= 8 for q in row for k in column)
    }
    layout = BlockLayout.from_flex(block_mask, partial="keep")
    assert active(layout) == expected
    assert (layout.block_size, layout.seq_lengths) == ((8, 4), (60, 44))
    flat = BlockMask.from_kv_blocks(
        block_mask.kv_num_blocks[0, 0],
        block_mask.kv_indices[0, 0],
        BLOCK_SIZE=(8, 4),
        seq_lengths=(60, 44),
        compute_q_blocks=False,
    )
    only = BlockLayout.from_flex(flat, partial="keep")
    assert only.shape == (1, 1, 8, 11)
    assert active(only) == flex_lists(block_mask, "partial")


def test_equality():
    mask = torch.rand(2, 2, 3, 4) < 0.5
    mask[0, 0, 0] = torch.tensor([True, False, True, False])
    layout = BlockLayout.from_dense(mask, 4)
    assert layout == poisoned(layout)
    assert layout == BlockLayout.from_dense(mask, (4, 4))
    assert layout != BlockLayout.from_dense(mask, (4, 8))
    assert layout != BlockLayout.from_dense(mask, 4, seq_lengths=(12, 16))
    assert layout != BlockLayout.from_dense(mask[:1], 4)
    assert layout != "layout"
    for changed in ([True, False, False, True], [True, True, True, False]):
        other = mask.clone()
        other[0, 0, 0] = torch.tensor(changed)
        assert layout != BlockLayout.from_dense(other, 4)


def test_repr():
    layout = BlockLayout.from_window((128, 256), (32, 64), left=0, right=0)
    expected = "BlockLayout(shape=(1, 1, 4, 4), block_size=(32, 64), seq_lengths=(128, 256), "
    assert repr(layout) == expected + "density=0.25)"
    free = BlockLayout.from_dense(torch.ones(1, 2, 3, 1, dtype=torch.bool), 16)
    assert repr(free) == "BlockLayout(shape=(1, 2, 3, 1), block_size=(16, 16), density=1)"


@pytest.mark.untyped
def test_is_immutable_and_moves():
    layout = random_layout((1, 2, 3, 4))
    with pytest.raises(AttributeError):
        layout.kv_indices = layout.kv_indices
    assert layout.to("meta")._columns is None
    assert layout.q_indices.shape[:3] == (1, 2, 4)
    moved = layout.to("meta")
    tensors = moved.kv_num_blocks, moved.kv_indices, moved.q_num_blocks, moved.q_indices
    assert {t.device.type for t in tensors} == {"meta"}
    assert moved.device.type == "meta"
    assert moved.shape == layout.shape
    assert layout.device.type == "cpu"


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda layout, other: layout.trim_causal(), lambda mask, _: mask.tril()),
        (lambda layout, other: layout | other, lambda mask, other: mask | other),
        (lambda layout, other: layout & other, lambda mask, other: mask & other),
        (lambda layout, other: BlockLayout.cat([layout, other], 0), lambda *both: torch.cat(both)),
        (lambda layout, other: BlockLayout.cat([layout], 1), lambda mask, _: mask),
        (lambda layout, other: layout.to("cpu"), lambda mask, _: mask),
    ],
    ids=["trim_causal", "or", "and", "cat", "cat of one", "to"],
)
def test_columns_are_those_of_the_new_rows(operation, expected):
    """Also where those of the old ones were read before."""
    masks = torch.rand(2, 1, 3, 5, 5) < 0.5
    layouts = [BlockLayout.from_dense(mask, 4) for mask in masks]
    for layout in layouts:
        layout.q_indices  # noqa: B018
    result = operation(*layouts)
    assert torch.equal(result.to_dense(), expected(*masks))
    assert transposed(result) == active(result)
    for layout, mask in zip(layouts, masks, strict=True):
        assert transposed(layout) == {tuple(block) for block in mask.nonzero().tolist()}


@pytest.mark.untyped
def test_lists_of_columns_in_traced_code():
    """They are made in the graph, and what has no values does not stay behind."""
    layout = random_layout((1, 2, 3, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layout.q_num_blocks.shape == (1, 2, 4)

    def count(input: Tensor) -> Tensor:
        return input + layout.q_num_blocks

    compiled = torch.compile(count, fullgraph=True, backend="eager")
    expected = layout.to_dense().sum(2)
    assert torch.equal(compiled(torch.zeros(1, 2, 4)), expected.float())
    assert torch.equal(layout.q_num_blocks, expected.int())


@pytest.mark.untyped
def test_compiled_code_closes_over_it():
    layout = random_layout((1, 2, 3, 4))
    layout.q_indices  # noqa: B018

    @torch.compile(fullgraph=True, backend="eager")
    def total(input):
        rows = input * layout.kv_num_blocks
        return rows.sum() + layout.q_num_blocks.sum() + layout.shape[3] + layout.block_size[0]

    assert total(torch.ones(3)) == 2 * len(active(layout)) + 4 + 4


@pytest.mark.untyped
def test_plot(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    layout = poisoned(random_layout((2, 3, 4, 6), (8, 4)))
    axes = layout.plot(1, 2)
    try:
        drawn = torch.tensor(axes.images[0].get_array().data)
        assert torch.equal(drawn.bool(), layout.to_dense()[1, 2])
        assert axes.get_xlabel() == "block of 4 keys"
        assert axes.get_ylabel() == "block of 8 queries"
        assert axes.get_aspect() == 2
        kept = layout.to_dense()[1, 2].float().mean()
        assert axes.get_title() == f"batch 1, head 2, density {kept:.3g}"
        assert layout.plot(ax=axes) is axes
        assert torch.equal(
            torch.tensor(axes.images[1].get_array().data).bool(), layout.to_dense()[0, 0]
        )
    finally:
        pyplot.close(axes.figure)

    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("no module matplotlib")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"BlockLayout.plot: needs matplotlib: pip install"):
        layout.plot()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
def test_waits_only_where_a_size_needs_it(dtype, device):
    scores = torch.randn(1, 2, 9, 9).to(device, dtype)
    expected = BlockLayout.from_scores_topk(scores.cpu(), 3, is_causal=True)
    other = random_layout((1, 1, 9, 9), 64).to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        layout = BlockLayout.from_scores_topk(scores, 3, is_causal=True)
        union, both, live = layout | other, layout & other, layout.trim_causal()
        joined = BlockLayout.cat([layout, union], 1)
        results = [joined.to_dense(), both.to_elements(), live.density(is_causal=True)]
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert layout == expected
    assert {t.device.type for t in results} == {device}
    assert transposed(layout.to("cpu")) == active(expected)


def test_causal_topk():
    assert causal_topk(512, 0.19) == 51
    assert causal_topk(100, 0.75) == 50
    assert [causal_topk(n, d) for n, d in [(0, 1.0), (10, 0.0), (10, 1.0), (3, 1e-9)]] == [
        1,
        1,
        10,
        1,
    ]
    for density in (0.05, 0.1, 0.3, 0.7):
        k = causal_topk(400, density)
        layout = BlockLayout.from_scores_topk(torch.rand(1, 1, 400, 400), k, is_causal=True)
        assert abs(layout.density(is_causal=True) - density) < 0.01


MASK = torch.ones(2, 3, 4, 5, dtype=torch.bool)
SCORES = MASK.float()
COUNTS = torch.full((2, 3, 4), 2)
INDICES = torch.tensor([3, 1, 77]).expand(2, 3, 4, 3)
IDS = torch.zeros(2, 9, dtype=torch.long)
LAYOUT = BlockLayout.from_dense(MASK, 8)
topk, threshold = BlockLayout.from_scores_topk, BlockLayout.from_scores_threshold
window, indices = BlockLayout.from_window, BlockLayout.from_indices


def changed(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2, 3] = value
    return tensor


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "from_dense: mask must be a bool", lambda: LAYOUT.from_dense(SCORES)),
        (TypeError, "from_dense: mask must be a bool", lambda: LAYOUT.from_dense([[True]])),
        (ValueError, r"mask must be of shape \(B, H, nq, nk\)", lambda: LAYOUT.from_dense(MASK[0])),
        (ValueError, "block_size must be a pair", lambda: LAYOUT.from_dense(MASK, 0)),
        (ValueError, "block_size must be a pair", lambda: LAYOUT.from_dense(MASK, (8, 0))),
        (ValueError, "block_size must be a pair", lambda: LAYOUT.from_dense(MASK, (8, 8, 8))),
        (TypeError, "block_size must be an int", lambda: LAYOUT.from_dense(MASK, (8, 8.0))),
        (
            ValueError,
            r"seq_lengths must be lengths that give \(4, 5\) blocks of \(8, 8\), got \(33, 40\)",
            lambda: LAYOUT.from_dense(MASK, 8, seq_lengths=(33, 40)),
        ),
        (
            ValueError,
            "seq_lengths must be lengths that give",
            lambda: topk(SCORES, 2, 8, seq_lengths=(32, 32)),
        ),
        (
            ValueError,
            "seq_lengths must be a pair",
            lambda: threshold(SCORES, 2, 8, seq_lengths=(-1, 40)),
        ),
        (
            ValueError,
            "seq_lengths must be lengths that give",
            lambda: indices(INDICES, COUNTS, 5, 8, seq_lengths=(32, 32)),
        ),
        (
            TypeError,
            "kv_indices must be an integer tensor",
            lambda: indices(INDICES.float(), COUNTS, 5),
        ),
        (
            TypeError,
            "kv_num_blocks must be an integer tensor, got bool",
            lambda: indices(INDICES, COUNTS.bool(), 5),
        ),
        (ValueError, "kv_indices must be of shape", lambda: indices(INDICES[0], COUNTS[0], 5)),
        (
            ValueError,
            r"kv_num_blocks must be of shape \(2, 3, 4\)",
            lambda: indices(INDICES, COUNTS[:1], 5),
        ),
        (
            ValueError,
            "kv_num_blocks must be from 0 to 3, got 2 to 4",
            lambda: indices(INDICES, changed(COUNTS, 4), 5),
        ),
        (
            ValueError,
            "kv_num_blocks must be from 0 to 3",
            lambda: indices(INDICES, changed(COUNTS, -1), 5),
        ),
        (
            ValueError,
            "kv_indices must be from 0 to 2 within the counts, got 1 to 3",
            lambda: indices(INDICES, COUNTS, 3),
        ),
        (
            ValueError,
            "kv_indices must be from 0 to 4 within the counts, got -1 to 3",
            lambda: indices(changed(INDICES, -1), COUNTS, 5),
        ),
        (
            ValueError,
            "kv_indices must be distinct within a row, got 2 more than once",
            lambda: indices(changed(INDICES, 2), COUNTS, 5),
        ),
        (TypeError, "num_kv_blocks must be an int", lambda: indices(INDICES, COUNTS, 5.0)),
        (ValueError, "num_kv_blocks must be", lambda: indices(INDICES, COUNTS, -1)),
        (ValueError, "must lie on the device", lambda: indices(INDICES, COUNTS.to("meta"), 5)),
        (TypeError, "from_scores_topk: scores must be a floating", lambda: topk(MASK, 2)),
        (ValueError, "scores must be of shape", lambda: topk(SCORES[0], 2)),
        (ValueError, "k must be .* at least 0, got -1", lambda: topk(SCORES, -1)),
        (TypeError, "k must be an int, got 2.0", lambda: topk(SCORES, 2.0)),
        (TypeError, "k must be an integer tensor", lambda: topk(SCORES, torch.ones(4))),
        (TypeError, "k must be an integer tensor", lambda: topk(SCORES, torch.tensor(True))),
        (TypeError, "k must be an integer tensor", lambda: topk(SCORES, torch.ones(4).cfloat())),
        (ValueError, "k must be at least 0, got -3", lambda: topk(SCORES, torch.tensor([-3]))),
        (ValueError, r"k must be broadcastable to \(2, 3, 4\)", lambda: topk(SCORES, COUNTS[None])),
        (ValueError, "k must be broadcastable to", lambda: topk(SCORES, COUNTS[..., :2])),
        (ValueError, "k must lie on", lambda: topk(SCORES, COUNTS.to("meta"))),
        (ValueError, "num_sink_blocks must be", lambda: topk(SCORES, 2, num_sink_blocks=-1)),
        (TypeError, "num_sink_blocks must be an", lambda: topk(SCORES, 2, num_sink_blocks=None)),
        (TypeError, "from_scores_threshold: scores must be", lambda: threshold(MASK, 2)),
        (TypeError, "threshold must be a number", lambda: threshold(SCORES, "0.1")),
        (ValueError, "threshold must be a number", lambda: threshold(SCORES, math.nan)),
        (ValueError, "threshold must be broadcast", lambda: threshold(SCORES, torch.ones(4))),
        (
            ValueError,
            "threshold must lie on",
            lambda: threshold(SCORES, torch.ones(5, device="meta")),
        ),
        (ValueError, "from_window: seq_lengths must be a pair", lambda: window((8,))),
        (TypeError, "seq_lengths must be an int", lambda: window((8, 8.5))),
        (ValueError, "left must be .* at least 0", lambda: window((8, 8), left=-1)),
        (ValueError, "right must be .* at least 0", lambda: window((8, 8), right=[1, -1])),
        (TypeError, "left must be an int", lambda: window((8, 8), left=[1, 1.5])),
        (TypeError, "num_sink_blocks must be an", lambda: window((8, 8), num_sink_blocks=None)),
        (ValueError, "same number of heads", lambda: window((8, 8), left=[1], right=[1, 2])),
        (ValueError, "same number of heads", lambda: window((8, 8), left=[])),
        (
            ValueError,
            "global_blocks must be from 0 to below 3, got 3",
            lambda: window((9, 20), 8, global_blocks=[3]),
        ),
        (ValueError, "global_blocks must be from 0", lambda: window((9, 20), global_blocks=[-1])),
        (TypeError, "global_blocks must be an", lambda: window((9, 20), global_blocks=[0.0])),
        (TypeError, "document_ids must be an int", lambda: LAYOUT.from_documents(IDS.bool())),
        (ValueError, "document_ids must be of shape", lambda: LAYOUT.from_documents(IDS[0])),
        (ValueError, "block_size must be a pair", lambda: LAYOUT.from_documents(IDS, 0)),
        (TypeError, "block_mask must be a BlockMask", lambda: LAYOUT.from_flex(MASK)),
        (
            ValueError,
            "partial must be one of 'error', 'keep', got 'drop'",
            lambda: LAYOUT.from_flex(LAYOUT.to_flex(), partial="drop"),
        ),
        (
            ValueError,
            "block_mask must have no partial blocks with partial='error', got 24",
            lambda: LAYOUT.from_flex(LAYOUT.to_flex(is_causal=True)),
        ),
        (ValueError, "num_heads must be a multiple of", lambda: LAYOUT.to_flex(num_heads=4)),
        (ValueError, "num_heads must be a multiple of", lambda: LAYOUT.to_flex(num_heads=0)),
        (TypeError, "num_heads must be an int", lambda: LAYOUT.to_flex(num_heads=3.0)),
        (ValueError, "cat: dim must be one of 0, 1", lambda: LAYOUT.cat([LAYOUT], 2)),
        (ValueError, "layouts must be at least one", lambda: LAYOUT.cat([], 0)),
        (TypeError, "layouts must be BlockLayouts", lambda: LAYOUT.cat([LAYOUT, MASK], 0)),
        (
            ValueError,
            "cat: layouts must agree",
            lambda: LAYOUT.cat([LAYOUT, BlockLayout.from_dense(MASK[:, :1], 8)], 0),
        ),
        (
            ValueError,
            "cat: layouts must agree",
            lambda: LAYOUT.cat([LAYOUT, BlockLayout.from_dense(MASK, 16)], 0),
        ),
        (
            ValueError,
            "cat: layouts must agree",
            lambda: LAYOUT.cat([LAYOUT, BlockLayout.from_dense(MASK, 8, seq_lengths=(32, 40))], 0),
        ),
        (ValueError, "cat: layouts must agree", lambda: LAYOUT.cat([LAYOUT, LAYOUT.to("meta")], 0)),
        (
            ValueError,
            r"\|: layouts must have the same blocks",
            lambda: LAYOUT | BlockLayout.from_dense(MASK, 16),
        ),
        (
            ValueError,
            "&: layouts must have the same blocks",
            lambda: LAYOUT & BlockLayout.from_dense(MASK[..., :4], 8),
        ),
        (
            ValueError,
            r"\|: layouts must have the same blocks",
            lambda: LAYOUT | BlockLayout.from_dense(MASK[:, :2], 8),
        ),
        (
            ValueError,
            "&: layouts must have the same blocks",
            lambda: window((31, 40), 8) & window((32, 40), 8),
        ),
        (ValueError, "right must lie on", lambda: LAYOUT | LAYOUT.to("meta")),
        (TypeError, "unsupported operand", lambda: LAYOUT | MASK),
        (TypeError, "unsupported operand", lambda: LAYOUT & 3),
        (ValueError, "to_elements: seq_lengths must be", lambda: LAYOUT.to_elements(33, 40)),
        (
            ValueError,
            r"to_elements: lengths must be those of the layout, \(9, 9\), got \(9, 10\)",
            lambda: window((9, 9), 8).to_elements(key_length=10),
        ),
        (ValueError, "plot: batch must be from 0 to below 2", lambda: LAYOUT.plot(2)),
        (ValueError, "plot: head must be from 0 to below 3", lambda: LAYOUT.plot(0, -1)),
        (TypeError, "unhashable", lambda: hash(LAYOUT)),
        (TypeError, "causal_topk: num_blocks must be an int", lambda: causal_topk(8.0, 0.5)),
        (ValueError, "causal_topk: num_blocks must be", lambda: causal_topk(-1, 0.5)),
        (ValueError, "causal_topk: density must be a number from 0", lambda: causal_topk(8, 1.5)),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call()


def lists(layout: BlockLayout) -> tuple[Tensor, ...]:
    """What a layout holds; its lists, which may have room for more, as a mask of their blocks."""
    counts, indices = layout.q_num_blocks, layout.q_indices
    columns = BlockLayout(counts, indices, layout.shape[2], layout.block_size)
    return layout.kv_num_blocks, layout.to_dense(), columns.to_dense(), layout.density()


@samples.of(Call)
def calls() -> list[Call]:
    def scores() -> Tensors:
        return {"scores": draw(3, 2, 5, 7)}

    def window(input: Tensor) -> tuple[Tensor, ...]:
        lengths = (input.shape[0], input.shape[0])
        return lists(
            BlockLayout.from_window(lengths, 4, left=1, is_causal=True, device=input.device)
        )

    return [
        Call(
            BlockLayout,
            scores,
            by=lambda scores: lists(BlockLayout.from_scores_topk(scores, 2, is_causal=True)),
        ),
        Call(
            BlockLayout,
            scores,
            by=lambda scores: lists(BlockLayout.from_scores_threshold(scores, 0.3)),
        ),
        Call(BlockLayout, scores, by=lambda scores: lists(BlockLayout.from_dense(scores > 0.3))),
        Call(
            BlockLayout,
            lambda: {"document_ids": torch.randint(3, (2, 13))},
            by=lambda document_ids: lists(BlockLayout.from_documents(document_ids, 4)),
        ),
        Call(BlockLayout, lambda: {"input": draw(13)}, by=window),
    ]
