"""The cache against the gate itself, on whole prefixes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import (
    BlockLayout,
    SeerGate,
    SeerGateCache,
    block_sparse_attention,
    block_sparse_decode,
)

from helpers import DEVICES, FLOATING, clones, dtype_name

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no rotation": {"rope_theta": None},
    "all pools": {"q_pool": ("max", "avg", "min"), "k_pool": ("avg", "min", "max")},
    "no projection": {"q_projection": False, "gate_dim": 6},
}


def build(block_size: int, dtype: torch.dtype = torch.float64, **options: Any) -> SeerGate:
    gate = SeerGate(6, 4, 2, block_size=block_size, **{"gate_dim": 8} | options, dtype=dtype)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight)
    return gate


def tensors(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, heads, length, 6).to(dtype) for heads in (4, 2)]


def ones(length: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    return [torch.ones(batch, heads, length, 6, dtype=dtype) for heads in (4, 2)]


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    block_size=st.integers(1, 9),
    name=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 2**20),
)
def test_every_update_gives_the_last_rows_of_the_whole_prefix(
    chunks: list[int], block_size: int, name: str, seed: int
) -> None:
    """Training, prefill in chunks and decoding agree."""
    torch.manual_seed(seed)
    gate = build(block_size, **OPTIONS[name])
    query, key = tensors(sum(chunks))
    cache, start = SeerGateCache(gate), 0
    for chunk in chunks:
        stop = start + chunk
        logits = cache.update(query[:, :, start:stop], key[:, :, start:stop])
        prefix = gate(query[:, :, :stop], key[:, :, :stop])
        torch.testing.assert_close(logits, prefix[:, :, start // block_size :])
        assert (cache.num_tokens, cache.num_blocks) == (stop, prefix.shape[-1])
        start = stop


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_prefill_then_token_by_token(dtype: torch.dtype, device: str) -> None:
    inside = torch.promote_types(dtype, torch.float32)
    gate = build(4, inside).to(device)
    query, key = (t.to(device) for t in tensors(40, dtype))
    cache = SeerGateCache(gate)
    logits = cache.update(query[:, :, :10], key[:, :, :10])
    torch.testing.assert_close(logits, gate(query[:, :, :10], key[:, :, :10]))
    for length in range(11, 41):
        token = slice(length - 1, length)
        logits = cache.update(query[:, :, token], key[:, :, token])
        assert logits.shape == (2, 4, 1, -(-length // 4))
        assert logits.dtype == inside
        prefix = gate(query[:, :, :length], key[:, :, :length])
        torch.testing.assert_close(logits, prefix[:, :, -1:])


def test_several_tokens_select_as_their_rows_of_the_whole_prefix_do() -> None:
    """The selection that the documentation shows, for tokens that end with a block."""
    size, start, stop, count = 4, 26, 32, 3
    gate = build(size)
    query, key = tensors(stop)
    value = torch.randn_like(key)
    cache = SeerGateCache(gate)
    cache.update(query[:, :, :start], key[:, :, :start])
    logits = cache.update(query[:, :, start:], key[:, :, start:])
    own = torch.arange(start, stop) // size
    scores = logits[:, :, own - start // size].unflatten(1, (2, -1)).amax(2)
    scores[:, :, torch.arange(len(own)), own] = torch.inf
    blocks = scores.topk(count).indices
    output = block_sparse_decode(
        query[:, :, start:], key, value, blocks, block_size=size, is_causal=True
    )

    scores = gate(query, key).unflatten(1, (2, -1)).amax(2)
    scores.diagonal(dim1=2, dim2=3).fill_(torch.inf)
    layout = BlockLayout.from_scores_topk(scores, count, block_size=size, is_causal=True)
    expected = block_sparse_attention(
        query, key, value, layout, is_causal=True, enable_gqa=True, implementation="reference"
    )
    torch.testing.assert_close(output, expected[:, :, start:])


def test_complete_blocks_are_compressed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compress = SeerGate.compress_keys

    def spy(self: SeerGate, key: Tensor, *, first_block: int = 0) -> Tensor:
        seen.append((first_block, key.shape[2]))
        return compress(self, key, first_block=first_block)

    monkeypatch.setattr(SeerGate, "compress_keys", spy)
    gate = build(4)
    query, key = tensors(22)
    cache = SeerGateCache(gate)
    for start, stop in ((0, 14), (14, 15), (15, 16), (16, 17), (17, 22)):
        cache.update(query[:, :, start:stop], key[:, :, start:stop])
    assert seen == [(0, 14), (3, 3), (3, 4), (4, 1), (4, 6)]


def test_memory_is_that_of_blocks() -> None:
    gate = build(16, torch.float32)
    query, key = tensors(1000, torch.float32, batch=1)
    cache = SeerGateCache(gate)
    rooms = set()
    for start in range(0, 1000, 7):
        cache.update(query[:, :, start : start + 7], key[:, :, start : start + 7])
        held = [value for value in (cache._keys, *(cache._running or ())) if value is not None]
        blocks = cache.num_blocks * 2 * gate.gate_dim
        assert sum(value.untyped_storage().nbytes() for value in held) <= 4 * (
            2 * blocks + gate.block_size * 6 * (4 + 2)
        )
        assert cache._keys is not None
        rooms.add(cache._keys.shape[2])
    assert rooms == {1, 2, 4, 8, 16, 32, 64}


def test_a_long_prefill_is_not_kept() -> None:
    gate = build(4)
    query, key = tensors(103)
    cache = SeerGateCache(gate)
    cache.update(query, key)
    assert cache._running is not None
    assert [value.untyped_storage().nbytes() for value in cache._running] == [
        2 * heads * 3 * 6 * 8 for heads in (4, 2)
    ]


def test_reset_and_arguments() -> None:
    gate = build(4)
    query, key = tensors(9)
    before = clones((query, key))
    cache = SeerGateCache(gate)
    first = cache.update(query, key)
    assert not first.requires_grad
    cache.update(query, key)
    cache.reset()
    assert (cache.num_tokens, cache.num_blocks) == (0, 0)
    assert torch.equal(cache.update(query, key), first)
    cache.reset()
    other = tensors(5, torch.float32, batch=3)
    assert cache.update(*other).shape == (3, 4, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip((query, key), before, strict=True))
    cache.reset()
    strided = [t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for t in (query, key)]
    torch.testing.assert_close(cache.update(*strided), first)


def test_nothing() -> None:
    cache = SeerGateCache(build(4))
    assert cache.update(*tensors(0)).shape == (2, 4, 0, 0)
    assert cache.update(*tensors(4)).shape == (2, 4, 1, 1)
    assert cache.update(*tensors(0)).shape == (2, 4, 0, 1)
    empty = SeerGateCache(build(4))
    assert empty.update(*tensors(5, batch=0)).shape == (0, 4, 2, 2)


def test_nan_stays_in_its_sequence_and_blocks() -> None:
    cache = SeerGateCache(build(4))
    query, key = tensors(10)
    key[1, 1, 5, 2] = torch.nan
    cache.update(query[:, :, :9], key[:, :, :9])
    logits = cache.update(query[:, :, 9:], key[:, :, 9:])
    assert logits[1, 2:, 0, 1].isnan().all()
    assert logits.isnan().sum() == 2


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "query", "key"),
    [
        (TypeError, "query must be a floating-point tensor", ones(3)[0].long(), ones(3)[1]),
        (ValueError, r"query must be of shape \(B, 4, L, 6\)", ones(3)[1], ones(3)[1]),
        (ValueError, r"key must be of shape \(B, 2, L, 6\)", ones(3)[0], ones(3)[0]),
        (ValueError, r"key must be of shape \(2, 2, 3, 6\)", ones(3)[0], ones(4)[1]),
        (ValueError, "key must be of query's batch 2", ones(3)[0], ones(3, batch=1)[1]),
        (TypeError, "key must be of query's", ones(3)[0], ones(3)[1].float()),
        (TypeError, "query must be torch.float64 as before", *ones(3, torch.float32)),
        (ValueError, "query must be of the batch 2 as before", *ones(3, batch=1)),
        (ValueError, "query must lie on", ones(3)[0].to("meta"), ones(3)[1]),
    ],
)
def test_bad_input(error: type[Exception], match: str, query: Tensor, key: Tensor) -> None:
    cache = SeerGateCache(build(4))
    cache.update(*tensors(5))
    with pytest.raises(error, match=f"SeerGateCache: {match}"):
        cache.update(query, key)
    assert cache.num_tokens == 5
    with pytest.raises(TypeError, match="SeerGateCache: gate must be a SeerGate"):
        SeerGateCache(torch.nn.Linear(2, 3))  # type: ignore[arg-type]
