"""The gate against its definition by loops."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import BlockLayout, SeerGate, seer_gate_loss

from helpers import DEVICES, FLOATING, HALF, assert_exact, clones, dtype_name

POOLS: dict[str, Any] = {
    "max": lambda rows: rows.max(0).values,
    "min": lambda rows: rows.min(0).values,
    "avg": lambda rows: rows.sum(0) / len(rows),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no rotation": {"rope_theta": None},
    "other pools": {"q_pool": ("min", "max"), "k_pool": ("avg",), "rope_theta": 50.0},
    "no projection": {"q_projection": False, "gate_dim": 6, "k_pool": ("max", "avg")},
}


def build(heads: int, kv_heads: int, block_size: int, **options: Any) -> SeerGate:
    gate = SeerGate(6, heads, kv_heads, block_size=block_size, **{"gate_dim": 8} | options)
    for weight in gate.parameters():
        torch.nn.init.normal_(weight)
    return gate


def tensors(
    gate: SeerGate,
    lengths: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    device: str = "cpu",
) -> list[Tensor]:
    """Distinct in a block and exact in every dtype, so that no pool has a choice of gradients."""
    heads = gate.num_heads, gate.num_kv_heads
    return [
        ((torch.randn(batch, h, length, gate.head_dim).argsort(2) - length // 2) / 8)
        .to(device, dtype)
        .requires_grad_()
        for h, length in zip(heads, lengths, strict=True)
    ]


def truth(gate: SeerGate, query: Tensor, key: Tensor, is_causal: bool = True) -> Tensor:
    """The definition, block by block in float64; rotations as products of complex numbers."""
    size = gate.block_size
    rows, columns = (math.ceil(t.shape[2] / size) for t in (query, key))
    result = torch.full((*query.shape[:2], rows, columns), -torch.inf, dtype=torch.float64)

    def pooled(tensor: Tensor, block: int, pools: tuple[str, ...]) -> Tensor:
        positions = tensor[block * size : (block + 1) * size].double()
        return torch.cat([POOLS[pool](positions) for pool in pools])

    def rotated(vector: Tensor, block: int) -> Tensor:
        if gate.rope_theta is None:
            return vector
        half = gate.gate_dim // 2
        turns = [block * size * gate.rope_theta ** (-2 * m / gate.gate_dim) for m in range(half)]
        angles = torch.tensor(turns, dtype=torch.float64)
        turned = torch.complex(vector[:half], vector[half:]) * torch.polar(
            torch.ones(half).double(), angles
        )
        return torch.cat([turned.real, turned.imag])

    group = gate.num_heads // gate.num_kv_heads
    for b in range(len(query)):
        for h in range(gate.num_heads):
            for i in range(rows):
                q = pooled(query[b, h], i, gate.q_pool)
                if gate.q_weight is not None:
                    q = q @ gate.q_weight[h].double()
                for j in range(columns):
                    if is_causal and j > i:
                        continue
                    weight = gate.k_weight[h // group if gate.q_weight is not None else h]
                    k = pooled(key[b, h // group], j, gate.k_pool) @ weight.double()
                    dot = rotated(q, i) @ rotated(k, j)
                    result[b, h, i, j] = dot / math.sqrt(gate.gate_dim)
    return result


def composed(gate: SeerGate, query: Tensor, key: Tensor, is_causal: bool = True) -> Tensor:
    """Torch's pools, einsum and RoPE as models have it."""
    size, group = gate.block_size, gate.num_heads // gate.num_kv_heads

    def pooled(tensor: Tensor, pools: tuple[str, ...]) -> Tensor:
        flat = tensor.flatten(0, 1).mT
        by_name = {
            "max": lambda: F.max_pool1d(flat, size, ceil_mode=True),
            "min": lambda: -F.max_pool1d(-flat, size, ceil_mode=True),
            "avg": lambda: F.avg_pool1d(flat, size, ceil_mode=True),
        }
        return torch.cat([by_name[pool]().mT for pool in pools], -1).unflatten(0, tensor.shape[:2])

    def rotated(tensor: Tensor) -> Tensor:
        if gate.rope_theta is None:
            return tensor
        frequency = gate.rope_theta ** (
            -torch.arange(0, gate.gate_dim, 2).to(tensor) / gate.gate_dim
        )
        angle = (torch.arange(tensor.shape[2]).to(tensor) * size)[:, None] * frequency
        angle = torch.cat((angle, angle), -1)
        first, second = tensor.chunk(2, -1)
        return tensor * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    queries, keys = pooled(query, gate.q_pool), pooled(key, gate.k_pool)
    if gate.q_weight is not None:
        queries = torch.einsum("bhni,hio->bhno", queries, gate.q_weight)
        keys = torch.einsum("bhni,hio->bhno", keys, gate.k_weight).repeat_interleave(group, 1)
    else:
        keys = torch.einsum("bhni,hio->bhno", keys.repeat_interleave(group, 1), gate.k_weight)
    logits = rotated(queries) @ rotated(keys).mT / math.sqrt(gate.gate_dim)
    if is_causal:
        later = torch.ones_like(logits, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def solve(function: Any, gate: SeerGate, leaves: list[Tensor], **options: Any) -> list[Tensor]:
    logits = function(gate, *leaves, **options)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(logits.shape, generator=generator).to(logits)
    wanted = [*leaves, *gate.parameters()]
    return [logits, *torch.autograd.grad(logits, wanted, upstream)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lengths", "block_size", "is_causal"),
    [
        (4, 2, (23, 23), 5, True),
        (3, 3, (16, 16), 4, True),
        (2, 1, (7, 30), 8, False),
        (2, 2, (30, 7), 8, True),
        (1, 1, (1, 1), 64, True),
    ],
)
def test_equals_the_definition(
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    block_size: int,
    is_causal: bool,
    dtype: torch.dtype,
    options: dict[str, Any],
    device: str,
) -> None:
    gate = build(heads, kv_heads, block_size, **options, dtype=torch.float64)
    leaves = tensors(gate, lengths, dtype)
    if dtype != torch.float64:
        gate.float()
    exact = solve(truth, gate, leaves, is_causal=is_causal)
    inside = torch.float64 if dtype == torch.float64 else torch.float32
    compared_gate = build(heads, kv_heads, block_size, **options)
    compared_gate.load_state_dict(gate.state_dict())
    compared = solve(composed, compared_gate, clones(leaves, torch.float32), is_causal=is_causal)  # type: ignore[arg-type]
    gate.to(device)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    actual = solve(lambda gate, *t, **o: gate(*t, **o), gate, leaves, is_causal=is_causal)
    assert actual[0].dtype == inside
    for one, other, right in zip(actual, compared, exact, strict=True):
        assert_exact(one, other, right.double(), inside)


def test_positions_far_away_are_exact() -> None:
    """Angles in float32 would be off by a tenth at a million positions."""
    gate = build(1, 1, 64)
    query, key = (t.detach() for t in tensors(gate, (64, 64), batch=1))
    far = 2**14
    near = gate(query, key)
    moved = gate.score(
        gate.compress_queries(query, first_block=far), gate.compress_keys(key, first_block=far)
    )
    torch.testing.assert_close(moved, near)


def test_half_precision_weights_are_used_as_they_are() -> None:
    gate = build(2, 1, 4)
    query, key = (t.detach() for t in tensors(gate, (9, 9)))
    gate.bfloat16()
    logits = gate(query.bfloat16(), key.bfloat16())
    assert logits.dtype == torch.float32
    wide = build(2, 1, 4)
    wide.load_state_dict(gate.state_dict())
    torch.testing.assert_close(logits, wide(query.bfloat16().float(), key.bfloat16().float()))
    assert gate.double()(query, key).dtype == torch.float64


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 40),
    later=st.integers(0, 20),
    block_size=st.integers(1, 9),
    name=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 2**20),
)
def test_properties(length: int, later: int, block_size: int, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    gate = build(4, 2, block_size, **OPTIONS[name], dtype=torch.float64)
    whole = length // block_size * block_size
    query, key = (t.detach() for t in tensors(gate, (length + later,) * 2, torch.float64))
    blocks = whole // block_size
    # Whole blocks do not depend on what follows.
    prefix = gate(query[:, :, :whole], key[:, :, :whole])
    torch.testing.assert_close(gate(query, key)[:, :, :blocks, :blocks], prefix)
    # Live are the blocks that hold a pair with no key after its query.
    hidden = prefix == -torch.inf
    assert torch.equal(hidden, torch.ones_like(hidden).triu(1))
    # Pools ignore the order inside of a block.
    order = torch.cat(
        [torch.randperm(block_size) + i * block_size for i in range(blocks)]
        or [torch.empty(0, dtype=torch.int64)]
    )
    moved = gate(query[:, :, order], key[:, :, order])
    torch.testing.assert_close(moved, prefix)
    # Without positions, blocks may change places.
    gate.rope_theta = None
    blocks_order = torch.randperm(blocks)
    places = (blocks_order[:, None] * block_size + torch.arange(block_size)).flatten()
    straight = gate(query[:, :, :whole], key[:, :, :whole], is_causal=False)
    changed = gate(query[:, :, places], key[:, :, places], is_causal=False)
    torch.testing.assert_close(changed, straight[:, :, blocks_order][..., blocks_order])


def test_positions_are_relative_and_matter() -> None:
    gate = build(2, 2, 4, dtype=torch.float64)
    query, key = (t.detach() for t in tensors(gate, (16, 16), torch.float64))
    logits = gate(query, key)
    rows = gate.score(
        gate.compress_queries(query, first_block=3), gate.compress_keys(key, first_block=3)
    )
    live = logits != -torch.inf
    torch.testing.assert_close(rows[live], logits[live])
    other = gate.score(gate.compress_queries(query, first_block=1), gate.compress_keys(key))
    assert not torch.allclose(other[live], logits[live])


def test_the_first_block_is_not_turned() -> None:
    gate = build(2, 2, 4, dtype=torch.float64)
    query, _ = (t.detach() for t in tensors(gate, (4, 4), torch.float64))
    assert gate.q_weight is not None
    plain = query.mean(2, keepdim=True) @ gate.q_weight
    torch.testing.assert_close(gate.compress_queries(query), plain)
    later = gate.compress_queries(query, first_block=1)
    assert not torch.allclose(later, plain)
    torch.testing.assert_close(later.norm(dim=-1), plain.norm(dim=-1))


def test_gradients_reach_the_weights_through_live_blocks_only() -> None:
    gate = build(2, 1, 4, dtype=torch.float64)
    query, key = tensors(gate, (12, 12), torch.float64)
    logits = gate(query, key)
    upstream = torch.zeros_like(logits)
    upstream[..., 0, 1] = upstream[..., 1, 2] = 1.0
    grads = torch.autograd.grad(
        logits, [*gate.parameters(), query, key], upstream, retain_graph=True
    )
    assert not any(grad.any() for grad in grads)
    upstream[..., 2, 0] = 1.0
    grads = torch.autograd.grad(logits, [*gate.parameters(), query, key], upstream)
    assert all(grad.any() for grad in grads)
    assert not grads[2][:, :, :8].any()
    assert not grads[3][:, :, 4:].any()


def test_derivatives() -> None:
    gate = SeerGate(2, 2, 1, block_size=2, gate_dim=2, dtype=torch.float64)
    query, key = tensors(gate, (3, 3), torch.float64, batch=1)
    weights = list(gate.parameters())

    def live(query: Tensor, key: Tensor, *weights: Tensor) -> Tensor:
        state = dict(zip(("q_weight", "k_weight"), weights, strict=True))
        logits = torch.func.functional_call(gate, state, (query, key))
        return logits[logits != -torch.inf]

    assert torch.autograd.gradcheck(live, (query, key, *weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(live, (query, key, *weights))


@pytest.mark.untyped
def test_transforms() -> None:
    gate = build(4, 2, 5)
    query, key = (t.detach() for t in tensors(gate, (13, 13), batch=6))
    batched = torch.vmap(gate)(query.unflatten(0, (3, 2)), key.unflatten(0, (3, 2)))
    torch.testing.assert_close(batched.flatten(0, 1), gate(query, key))

    # Some seconds: a graph for lengths with a block that is not full, and one for those without.
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (13, 20):
        leaves = tensors(gate, (length, length))
        results = [
            torch.autograd.grad(logits.exp().sum(), [*leaves, *gate.parameters()])
            for logits in (compiled(*leaves), gate(*leaves))
        ]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_autocast_lowers_nothing(dtype: torch.dtype) -> None:
    gate = build(4, 2, 5)
    query, key = (t.detach() for t in tensors(gate, (13, 13)))
    with torch.autocast("cpu", dtype):
        logits = gate(query, key)
    assert torch.equal(logits, gate(query, key))


def test_empty_extreme_and_irregular_input() -> None:
    gate = build(2, 2, 4)
    assert gate(*tensors(gate, (0, 0))).shape == (2, 2, 0, 0)
    assert gate(*tensors(gate, (5, 0)), is_causal=False).shape == (2, 2, 2, 0)
    assert gate(*tensors(gate, (9, 9), batch=0)).shape == (0, 2, 3, 3)
    query, key = (t.detach() for t in tensors(gate, (12, 12)))
    large = query.clamp(-1, 1).mul(60000).half(), key.clamp(-1, 1).mul(60000).half()
    assert gate(*large, is_causal=False).isfinite().all()
    query[1, 0, 5, 2] = torch.nan
    logits = gate(query, key, is_causal=False)
    assert logits[1, 0, 1].isnan().all()
    assert logits.isnan().sum() == 3


def test_strides_and_arguments() -> None:
    gate = build(2, 2, 4)
    query, key = (t.detach() for t in tensors(gate, (10, 10)))
    before = clones((query, key))
    strided = [t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for t in (query, key)]
    torch.testing.assert_close(gate(*strided), gate(query, key))
    shared = key[:, :1].expand_as(key)
    torch.testing.assert_close(gate(query, shared), gate(query, shared.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip((query, key), before, strict=True))


def test_selects_blocks() -> None:
    """A gate that was fitted to a map finds its blocks."""
    gate = SeerGate(8, 2, 1, block_size=4, gate_dim=16)
    query, key = (t.detach() for t in tensors(gate, (32, 32), batch=1))
    target = torch.rand(1, 2, 8, 8).tril().pow(4)
    target = target / target.sum(-1, keepdim=True)
    optimizer = torch.optim.AdamW(gate.parameters(), 0.05, weight_decay=0.0)
    losses = []
    for _ in range(100):
        loss = seer_gate_loss(gate(query, key), target, skip_fraction=0.0, reduction="rowmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    layout = BlockLayout.from_scores_topk(gate(query, key), 2, 4, is_causal=True)
    best = BlockLayout.from_scores_topk(target, 2, 4, is_causal=True)
    assert (layout.to_dense() & best.to_dense()).sum() > 0.8 * best.to_dense().sum()


def test_module() -> None:
    gate = SeerGate(16, 6, 2, block_size=32, gate_dim=24, q_pool=["max"], k_pool=("avg", "min"))
    assert gate.q_weight is not None
    assert gate.q_weight.shape == (6, 16, 24)
    assert gate.k_weight.shape == (2, 32, 24)
    assert list(gate.state_dict()) == ["q_weight", "k_weight"]
    for weight in gate.parameters():
        torch.testing.assert_close(weight.std().item(), 0.02, rtol=0.1, atol=0)
        assert abs(weight.mean().item()) < 0.002
    assert repr(gate) == (
        "SeerGate(16, 6, 2, block_size=32, gate_dim=24, q_pool=('max',), k_pool=('avg', 'min'), "
        "q_projection=True, rope_theta=10000.0)"
    )
    default = SeerGate(16, 4)
    assert (default.num_kv_heads, default.block_size, default.gate_dim) == (4, 64, 128)
    assert (default.q_pool, default.k_pool) == (("avg",), ("max", "min", "avg"))
    without = SeerGate(16, 6, 2, gate_dim=32, q_pool=("avg", "max"), q_projection=False)
    assert list(without.state_dict()) == ["k_weight"]
    assert without.q_weight is None
    assert without.k_weight.shape == (6, 48, 32)
    odd = SeerGate(16, 2, gate_dim=7, rope_theta=None, device="meta", dtype=torch.float64)
    assert odd.k_weight.device.type == "meta"
    assert odd.k_weight.dtype == torch.float64
    gate.reset_parameters()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "head_dim must be an int, got 2.5", {"head_dim": 2.5}),
        (ValueError, "num_heads must be an int of at least 1", {"num_heads": 0}),
        (ValueError, "num_kv_heads must be a divisor of num_heads=4, got 3", {"num_kv_heads": 3}),
        (TypeError, "num_kv_heads must be an int", {"num_kv_heads": 2.0}),
        (ValueError, "block_size must be", {"block_size": 0}),
        (ValueError, "gate_dim must be", {"gate_dim": 0}),
        (ValueError, "gate_dim must be even with rope_theta, got 7", {"gate_dim": 7}),
        (
            ValueError,
            r"gate_dim must be len\(q_pool\) \* head_dim = 16 with q_projection=False, got 8",
            {"q_projection": False, "gate_dim": 8, "q_pool": ("max", "avg")},
        ),
        (ValueError, "q_pool must be a non-empty sequence of 'max', 'min' and", {"q_pool": ()}),
        (ValueError, r"k_pool must be .*, got \('sum',\)", {"k_pool": ("sum",)}),
        (TypeError, "k_pool must be .*, got 'avg'", {"k_pool": "avg"}),
        (TypeError, "q_pool must be", {"q_pool": None}),
        (ValueError, "rope_theta must be a finite number above 0", {"rope_theta": 0.0}),
        (TypeError, "rope_theta must be a number", {"rope_theta": "x"}),
    ],
)
def test_bad_options(error: type[Exception], match: str, options: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"head_dim": 8, "num_heads": 4} | options
    head_dim, num_heads = arguments.pop("head_dim"), arguments.pop("num_heads")
    num_kv_heads = arguments.pop("num_kv_heads", None)
    with pytest.raises(error, match=f"SeerGate: {match}"):
        SeerGate(head_dim, num_heads, num_kv_heads, **arguments)


QUERY, KEY = torch.ones(2, 4, 9, 8), torch.ones(2, 2, 9, 8)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "query", "key"),
    [
        (TypeError, "query must be a floating-point tensor, got int64", QUERY.long(), KEY),
        (TypeError, "key must be a floating-point tensor", QUERY, None),
        (TypeError, "key must be of query's torch.float32, got float64", QUERY, KEY.double()),
        (ValueError, r"query must be of shape \(B, 4, L, 8\), got", QUERY[0], KEY),
        (ValueError, r"query must be of shape \(B, 4, L, 8\), got", QUERY[:, :3], KEY),
        (ValueError, r"query must be of shape \(B, 4, L, 8\), got", QUERY[..., :7], KEY),
        (ValueError, r"key must be of shape \(B, 2, L, 8\), got", QUERY, QUERY),
        (ValueError, "key must be of query's batch 2, got", QUERY, KEY[:1]),
        (ValueError, "query must lie on the device of k_weight, cpu", QUERY.to("meta"), KEY),
        (ValueError, "key must lie on", QUERY, KEY.to("meta")),
    ],
)
def test_bad_input(error: type[Exception], match: str, query: Any, key: Any) -> None:
    with pytest.raises(error, match=f"SeerGate: {match}"):
        SeerGate(8, 4, 2, block_size=4)(query, key)
