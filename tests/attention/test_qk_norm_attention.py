import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilework.attention import QKNormAttention, qk_norm_attention

import samples
from attention.tensors import GROUPS, heads
from calls import Call, draw
from helpers import DEVICES, FLOATING, HALF, assert_exact, clones

SHAPES = [
    # batch, heads, kv_heads, queries, keys, features, values
    (1, 1, 1, 1, 1, 1, 1),
    (30, 3, 3, 7, 7, 8, 8),
    (5, 4, 2, 7, 63, 16, 16),
    (3, 6, 1, 100, 7, 5, 3),
    (0, 2, 2, 7, 7, 4, 4),
    (2, 2, 2, 0, 7, 4, 4),
]


def truth(query, key, value, scale, *, mask=None, is_causal=False, eps=1e-12):
    """The definition, head by head in float64."""
    query, key, value = (t.double() for t in (query, key, value))
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    queries, keys = query.shape[2], key.shape[2]
    bias = torch.zeros(*query.shape[:3], keys, dtype=torch.float64, device=query.device)
    if is_causal:
        later = torch.arange(keys) > torch.arange(queries)[:, None]
        bias = bias.masked_fill(later.to(bias.device), -torch.inf)
    elif mask is not None and mask.dtype == torch.bool:
        bias = bias.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        bias = bias + mask.double()
    heads = []
    for head in range(query.shape[1]):
        q, k, v = query[:, head], key[:, head // group], value[:, head // group]
        dot = torch.einsum("bqe,bke->bqk", q, k)
        q_norm, k_norm = (t.square().sum(-1).clamp_min(eps**2).sqrt() for t in (q, k))
        g = scale
        if isinstance(scale, Tensor):
            g = (scale if scale.dim() == 0 else scale[head]).double()
        exponent = g * dot / (q_norm[:, :, None] * k_norm[:, None]) + bias[:, head]
        peak = exponent.detach().amax(-1, keepdim=True)
        weight = (exponent - peak.where(peak > -torch.inf, 0)).exp()
        total = weight.sum(-1)
        summed = torch.einsum("bqk,bke->bqe", weight, v)
        heads.append(summed / total.where(total > 0, 1)[..., None])
    return torch.stack(heads, 1)


def composed(query, key, value, scale, *, mask=None, is_causal=False):
    """Torch's composition. A scale of its own that is not positive breaks its fused kernels."""
    if isinstance(scale, Tensor):
        scale = scale.to(query.dtype).reshape(-1, 1, 1)
    return F.scaled_dot_product_attention(
        F.normalize(query, dim=-1) * scale,
        F.normalize(key, dim=-1),
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def tensors(shape, dtype=torch.float32, device="cpu"):
    batch, heads, kv_heads, queries, keys, features, values = shape
    return [
        torch.randn(size).to(device, dtype).requires_grad_()
        for size in (
            (batch, heads, queries, features),
            (batch, kv_heads, keys, features),
            (batch, kv_heads, keys, values),
        )
    ]


def masks(shape, dtype):
    batch, heads, _, queries, keys, _, _ = shape
    visible = torch.rand(batch, heads, queries, keys) > 0.4
    visible[..., 0] = True
    bias = torch.randn(queries, keys)
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"mask": visible},
        "bias": {"mask": bias.to(dtype)},
        "float32 bias": {"mask": bias.masked_fill(bias > 1.5, -torch.inf)},
        "keys": {"mask": visible[:, :1, :1]},
    }


def call(query, key, value, scale, *, mask=None, is_causal=False, **options):
    return qk_norm_attention(
        query,
        key,
        value,
        scale,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )


def solve(function, leaves, scale, upstream, **mask):
    """The output and the gradients of query, key, value and a scale that wants one."""
    leaves, wanted = list(leaves), isinstance(scale, Tensor)
    output = function(*leaves, scale, **mask)
    inputs = [*leaves, scale] if wanted else leaves
    return output, *torch.autograd.grad(output, inputs, upstream.to(output.dtype))


def three_ways(leaves, scale, **mask):
    """The result, torch's composition by the error rule, and the truth."""
    dtype = leaves[0].dtype
    same = torch.float32 if dtype == torch.float64 else dtype
    upstream = torch.randn(*leaves[0].shape[:3], leaves[2].shape[3]).to(leaves[0])
    scales = scale, scale, scale
    if isinstance(scale, Tensor):
        scales = scale, *(clones([scale], d)[0] for d in (same, torch.float64))
    cast = dict(mask)
    if mask.get("mask") is not None and mask["mask"].dtype == torch.float64:
        cast["mask"] = mask["mask"].to(same)
    return (
        solve(call, leaves, scales[0], upstream, **mask),
        solve(composed, clones(leaves, same), scales[1], upstream, **cast),
        solve(truth, clones(leaves, torch.float64), scales[2], upstream, **mask),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "float32 bias", "keys"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATING)
def test_values_and_gradients(dtype, shape, kind, device):
    mask = masks(shape, dtype)[kind]
    mask = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in mask.items()}
    for scale in (-3.0, torch.linspace(-4, 12, shape[1], device=device)):
        leaves = tensors(shape, dtype, device)
        scale = scale.requires_grad_() if isinstance(scale, Tensor) else scale
        for results in zip(*three_ways(leaves, scale, **mask), strict=True):
            if results[0].shape != (shape[1],):
                assert results[0].dtype == dtype
                assert_exact(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("kind", ["none", "causal", "float32 bias"])
@pytest.mark.parametrize("dtype", FLOATING)
def test_gradient_of_the_scale(dtype, kind, shape, device):
    """Over many draws, as a sum of so many terms that cancel may be exact by luck."""
    for scale_dtype in {dtype, torch.float32}:
        draws = []
        for _ in range(16):
            sizes = (2, 4, 2, 7, 9, 8, 8)
            mask = masks(sizes, dtype)[kind]
            mask = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in mask.items()}
            scale = (5 * torch.randn(shape)).to(device, scale_dtype).requires_grad_()
            results = three_ways(tensors(sizes, dtype, device), scale, **mask)
            draws.append([result[-1] for result in results])
        actual, compared, exact = map(torch.stack, zip(*draws, strict=True))
        assert actual.dtype == scale_dtype
        assert_exact(
            actual, compared.to(torch.float32) if dtype == torch.float64 else compared, exact
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
@pytest.mark.parametrize("values", [8, 5])
@pytest.mark.parametrize("dtype", FLOATING)
def test_a_query_that_sees_nothing_gives_zeros(dtype, values, backend, device):
    visible = torch.rand(2, 4, 7, 9, device=device) > 0.5
    visible[0, 1, 3] = visible[1, :, 0] = visible[1, 2] = False
    bias = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1)
    for mask, scale in product((visible, bias, bias.to(dtype)), (5.0, -5.0, 0.0)):
        leaves = tensors((2, 4, 4, 7, 9, 8, values), dtype, device)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            actual, compared, exact = three_ways(leaves, scale, mask=mask)
        assert (actual[0][blind] == 0).all()
        assert (actual[0][~blind] != 0).any(-1).all()
        assert (actual[1][blind] == 0).all()
        for results in zip(actual, compared, exact, strict=True):
            assert_exact(*results)


def test_masks_that_hide_everything():
    query, key, value = (t.detach() for t in tensors((2, 3, 3, 4, 5, 8, 8)))
    nothing = torch.zeros(2, 3, 4, 8)
    for mask in (
        torch.zeros(4, 5, dtype=torch.bool),
        torch.zeros(1, 1, dtype=torch.bool),
        torch.full((2, 1, 1, 5), -torch.inf),
    ):
        assert torch.equal(qk_norm_attention(query, key, value, 2.0, attn_mask=mask), nothing)
    rows = torch.tensor([[True], [False], [True], [False]])
    output = qk_norm_attention(query, key, value, 2.0, attn_mask=rows)
    assert torch.equal(output[:, :, 1::2], nothing[:, :, 1::2])
    seen = qk_norm_attention(query, key, value, 2.0)
    torch.testing.assert_close(output[:, :, ::2], seen[:, :, ::2])

    leaves = [t.requires_grad_() for t in (query, key[:, :, :0], value[:, :, :0])]
    output = qk_norm_attention(*leaves, 2.0)
    assert torch.equal(output, nothing)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert torch.equal(grads[0], torch.zeros_like(query))

    query = query.detach().index_fill(2, torch.tensor([1]), torch.nan)
    output = qk_norm_attention(query, key, value, 2.0, attn_mask=rows)
    assert torch.equal(output[:, :, 1::2], nothing[:, :, 1::2])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(*[st.sampled_from((1, 7, 20))] * 3),
    seed=st.integers(0, 2**31),
    scale=st.floats(-30, 30),
    is_causal=st.booleans(),
)
def test_properties(sizes, seed, scale, is_causal):
    queries, keys, features = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    query, key = draw(2, 3, queries, features), draw(2, 3, keys, features)
    value = torch.eye(keys, dtype=torch.float64).expand(2, 3, keys, keys)
    visible = torch.ones(queries, keys, dtype=torch.bool)
    visible = visible.tril() if is_causal else visible

    def attend(query, key, scale):
        return qk_norm_attention(query, key, value, scale, is_causal=is_causal)

    weight = attend(query, key, scale)
    lengths = [10 ** draw(*t.shape[:3], 1) for t in (query, key)]
    scaled = attend(query * lengths[0], key * lengths[1], scale)
    torch.testing.assert_close(scaled, weight)

    logit = weight.where(visible, weight.amax(-1, keepdim=True)).log()
    assert (logit.amax(-1) - logit.amin(-1) <= 2 * abs(scale) + 1e-9).all()

    uniform = (visible / visible.sum(-1, keepdim=True).double()).expand_as(weight)
    torch.testing.assert_close(attend(query, key, 0.0), uniform)
    torch.testing.assert_close(attend(0 * query, key, scale), uniform)
    torch.testing.assert_close(
        weight, composed(query, key, value, scale, is_causal=is_causal), atol=1e-12, rtol=1e-9
    )


def test_epsilon_bounds_the_norms():
    query, key, value = tensors((2, 2, 2, 5, 6, 4, 4), torch.float64)
    actual = qk_norm_attention(query, key, value, 3.0, eps=2.0)
    torch.testing.assert_close(actual, truth(query, key, value, 3.0, eps=2.0))
    assert not torch.allclose(actual, qk_norm_attention(query, key, value, 3.0))
    for eps in (0.0, 1e-30):
        actual = qk_norm_attention(0 * query.float(), key.float(), value.float(), 3.0, eps=eps)
        mean = value.float().mean(2, keepdim=True)
        torch.testing.assert_close(actual, mean.expand_as(actual))


@pytest.mark.parametrize("dtype", HALF)
def test_rounds_once(dtype, monkeypatch):
    """A second rounding, of the norm or before the scale, would show in every fourth element."""
    attend, seen = F.scaled_dot_product_attention, []

    def spy(query, key, *args, **kwargs):
        seen.extend((query, key))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    query, key, value = (t.detach() for t in tensors((2, 3, 3, 20, 20, 16, 16), dtype))
    scale = torch.tensor([11.3, -0.7, 3.1])
    qk_norm_attention(query, key, value, scale)
    exact = [t.double() / t.double().norm(dim=-1, keepdim=True) for t in (query, key)]
    exact[0] = exact[0] * scale.double()[:, None, None]
    for actual, expected in zip(seen, exact, strict=True):
        assert (actual == expected.to(dtype)).double().mean() > 0.99


@pytest.mark.parametrize("dtype", FLOATING)
def test_extreme_values(dtype):
    largest = 60000.0 if dtype == torch.float16 else 1e18
    leaves = [t.detach() for t in tensors((8, 2, 2, 7, 6, 4, 4), dtype)]
    wide = [(t / t.abs().amax(-1, keepdim=True) * largest).to(dtype) for t in leaves[:2]]
    wide = clones(t.requires_grad_() for t in (*wide, leaves[2]))
    for results in zip(*three_ways(wide, -10.0), strict=True):
        assert_exact(*results)
    cosine = F.normalize(wide[0].double(), dim=-1) @ F.normalize(wide[1].double(), dim=-1).mT
    for scale in (3e4, -3e4):
        order = (scale * cosine).sort(-1, descending=True)
        clear = order.values[..., 0] - order.values[..., 1] > 1000
        first = wide[2].gather(2, order.indices[..., :1].expand(-1, -1, -1, 4))
        actual = qk_norm_attention(*wide, scale)
        assert clear.any()
        torch.testing.assert_close(actual[clear], first[clear])


@pytest.mark.parametrize("keys", [6, 40])
@pytest.mark.parametrize("dtype", FLOATING)
def test_nan_and_infinity_show(dtype, keys):
    query, key, value = (t.detach() for t in tensors((2, 2, 2, 5, keys, 4, 4), dtype))
    for irregular in (torch.nan, torch.inf):
        query[0, 0, 2, 1] = irregular
        actual = qk_norm_attention(query, key, value, 3.0)
        assert actual[0, 0, 2].isnan().all()
        assert actual.isnan().sum() == 4
    value[1, 0, 0, 0] = torch.inf
    actual = qk_norm_attention(query, key, value, 3.0)
    assert (actual[1, 0, :, 0] == torch.inf).all()
    key[1, 1, 0, 0] = torch.nan
    assert qk_norm_attention(query, key, value, 3.0)[1, 1].isnan().all()


@pytest.mark.parametrize("dtype", FLOATING)
def test_strides_and_arguments(dtype):
    query, key, value = (t.detach() for t in tensors((2, 7, 7, 3, 3, 4, 4), dtype))
    scale, mask = torch.tensor([2.0, -1.0, 5.0]), torch.randn(7, 7).to(dtype)
    mask[3] = -torch.inf
    arguments = (query, key, value, scale, mask)
    before = clones(arguments)
    strided = [t.transpose(1, 2) for t in (query, key, value)]
    dense = [t.contiguous() for t in strided]
    for some, other in (
        (strided, dense),
        ((strided[0], *(t[:, :, :1].expand_as(t) for t in strided[1:])),) * 2,
    ):
        other = [t.contiguous() for t in other]
        for attn_mask in (None, mask):
            actual = qk_norm_attention(*some, scale, attn_mask=attn_mask)
            expected = qk_norm_attention(*other, scale, attn_mask=attn_mask)
            torch.testing.assert_close(actual, expected)
            actual.zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("mask", ["none", "causal", "blind", "bias"])
def test_derivatives(mask):
    query, key, value = tensors((1, 2, 1, 3, 4, 3, 2), torch.float64)
    scale = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    options = {
        "none": {},
        "causal": {"is_causal": True},
        "blind": {"attn_mask": torch.tensor([[True, False, True, True]] + [[False] * 4] * 2)},
        "bias": {},
    }[mask]
    leaves = [query, key, value, scale]
    if mask == "bias":
        bias = torch.randn(3, 4, dtype=torch.float64)
        bias[1] = -torch.inf
        offset = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        leaves.append(offset)

    def attend(query, key, value, scale, offset=None):
        keywords = options if offset is None else {"attn_mask": bias + offset}
        return qk_norm_attention(query, key, value, scale, enable_gqa=True, **keywords)

    assert torch.autograd.gradcheck(attend, leaves, check_forward_ad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(attend, leaves)


def test_second_derivatives_need_the_composed_attention():
    """Deviation: torch's fused kernels have none, and say so."""
    leaves = tensors((1, 2, 2, 3, 3, 4, 4), torch.float64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = qk_norm_attention(*leaves, 2.0)
    grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(grads[0].sum(), leaves)


def test_zero_vectors_have_finite_gradients():
    query, key, value = (t.detach() for t in tensors((1, 2, 2, 3, 4, 4, 4), torch.float64))
    query[0, 0, 1] = key[0, 1, 2] = 0
    leaves = [t.requires_grad_() for t in (query, key, value)]
    with sdpa_kernel(SDPBackend.MATH):
        output = qk_norm_attention(*leaves, 2.0, eps=0.5)
        grads = torch.autograd.grad(output.sum(), leaves, create_graph=True)
        seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    exact = truth(*leaves, 2.0, eps=0.5)
    exacts = torch.autograd.grad(exact.sum(), leaves, create_graph=True)
    exact_seconds = torch.autograd.grad(sum(g.square().sum() for g in exacts), leaves)
    torch.testing.assert_close((output, *grads, *seconds), (exact, *exacts, *exact_seconds))


@pytest.mark.untyped
def test_transforms():
    query, key, value = (t.detach() for t in tensors((6, 4, 2, 5, 7, 8, 8)))
    query, key, value = (t.unflatten(0, (3, 2)) for t in (query, key, value))
    scale = torch.randn(3, 4)
    mask = torch.rand(3, 5, 7) > 0.5
    mask[:, 2] = False

    def attend(query, key, value, scale, mask):
        return qk_norm_attention(query, key, value, scale, attn_mask=mask, enable_gqa=True)

    def loss(*arguments):
        return attend(*arguments).square().sum()

    batched = torch.vmap(attend)(query, key, value, scale, mask)
    looped = [attend(*arguments) for arguments in zip(query, key, value, scale, mask, strict=True)]
    torch.testing.assert_close(batched, torch.stack(looped))

    grads = torch.vmap(torch.func.grad(loss, (0, 1, 2, 3)))(query, key, value, scale, mask)
    leaves = clones(t.requires_grad_() for t in (query, key, value, scale))
    sum(loss(*arguments) for arguments in zip(*leaves, mask, strict=True)).backward()
    torch.testing.assert_close(grads, tuple(leaf.grad for leaf in leaves))

    arguments = query[0], scale[0]
    tangents = tuple(torch.randn_like(t) for t in arguments)

    def partly(query, scale):
        return attend(query, key[0], value[0], scale, mask[0])

    result, tangent = torch.func.jvp(partly, arguments, tangents)
    torch.testing.assert_close(result, partly(*arguments))
    upstream = torch.randn_like(result)
    pulled = torch.func.vjp(partly, *arguments)[1](upstream)
    expected = sum((g * t).sum() for g, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close((upstream * tangent).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_dynamic_shapes(dtype):
    # Some seconds: a graph for each way of masking.
    module = QKNormAttention(64, num_heads=4)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((5, 7), (9, 11)):
        leaves = tensors((2, 4, 2, queries, keys, 8, 8), dtype)
        mask = torch.rand(queries, keys) > 0.5
        mask[2] = False
        for options in ({"is_causal": True}, {"attn_mask": mask}):
            expected = module(*leaves, **options, enable_gqa=True)
            actual = compiled(*leaves, **options, enable_gqa=True)
            torch.testing.assert_close(actual, expected)
            upstream = torch.randn_like(actual)
            wanted = [*leaves, module.scale]
            torch.testing.assert_close(
                torch.autograd.grad(actual, wanted, upstream),
                torch.autograd.grad(expected, wanted, upstream),
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_is_that_of_the_attention(dtype, device):
    query, key, value = tensors((2, 2, 2, 7, 9, 8, 8), torch.float32, device)
    scale = torch.tensor([11.0, -2.0], device=device)
    with torch.autocast(device, dtype):
        actual = qk_norm_attention(query, key, value, scale)
        mixed = qk_norm_attention(query, key.to(dtype), value.to(dtype), scale)
        compared = composed(query, key, value, scale)
    assert actual.dtype == mixed.dtype == compared.dtype == dtype
    exact = truth(query, key, value, scale)
    assert_exact(actual, compared, exact)
    assert_exact(mixed, compared, exact)


def test_module():
    for length in (2, 3, 512):
        scale = QKNormAttention(length).scale
        assert scale.shape == ()
        torch.testing.assert_close(scale.item(), math.log2(length) + math.log2(length - 1))
    module = QKNormAttention(100, num_heads=3, eps=2.5, dtype=torch.float64)
    assert module.scale.tolist() == [math.log2(9900)] * 3
    assert list(module.state_dict()) == ["scale"]
    assert repr(module) == "QKNormAttention(seq_length=100, num_heads=3, eps=2.5)"
    assert QKNormAttention(9, device="meta").scale.device.type == "meta"

    nn.init.normal_(module.scale)
    leaves = tensors((2, 3, 3, 5, 5, 4, 4), torch.float64)
    for options in ({"is_causal": True}, {"mask": torch.rand(5, 5) > 0.5}):
        keywords = {"attn_mask" if k == "mask" else k: v for k, v in options.items()}
        expected = truth(*leaves, module.scale, eps=2.5, **options)
        torch.testing.assert_close(module(*leaves, **keywords), expected)
    shared = [leaves[0], *(t[:, :1] for t in leaves[1:])]
    expected = truth(*shared, module.scale, eps=2.5)
    torch.testing.assert_close(module(*shared, enable_gqa=True), expected)
    module(*leaves).sum().backward()
    assert (module.scale.grad != 0).all()
    module.reset_parameters()
    assert module.scale.tolist() == [math.log2(9900)] * 3


QUERY, KEY, VALUE = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 6, 8), torch.ones(2, 2, 6, 3)
MASK = torch.ones(5, 6, dtype=torch.bool)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, "query must be a floating", {"query": QUERY.long()}),
        (TypeError, "value must be a floating", {"value": VALUE.to(torch.complex64)}),
        (TypeError, "key must be of query's torch.float32, got float64", {"key": KEY.double()}),
        (TypeError, "value must be of query's", {"value": VALUE.half()}),
        (ValueError, r"query must be of shape \(B, H, L, E\)", {"query": QUERY[0]}),
        (ValueError, r"key must be of shape \(B, H, L, E\)", {"key": KEY[None]}),
        (ValueError, "key must be of query's 4 heads, or with enable_gqa", {"enable_gqa": False}),
        (ValueError, "key must be of a number of heads that divides", {"query": QUERY[:, :3]}),
        (ValueError, "key must be of a number of heads that divides", {"key": KEY[:, :0]}),
        (ValueError, r"key must be of shape \(2, 2, 6, 8\)", {"key": KEY[..., :7]}),
        (ValueError, r"key must be of shape \(2, 2, 6, 8\)", {"key": KEY[:1]}),
        (ValueError, r"value must be of shape \(2, 2, 6, 3\)", {"value": VALUE[:, :, 1:]}),
        (ValueError, r"value must be of shape \(2, 2, 6, 3\)", {"value": VALUE[:, :1]}),
        (ValueError, r"scale must be a number or .* \(4,\), got", {"scale": torch.ones(2)}),
        (ValueError, "scale must be a number or of shape", {"scale": torch.ones(4, 1, 1)}),
        (TypeError, "scale must be a floating", {"scale": torch.tensor(3)}),
        (TypeError, "scale must be a number", {"scale": None}),
        (ValueError, "attn_mask must be None", {"attn_mask": MASK, "is_causal": True}),
        (TypeError, "attn_mask must be bool, float32 or", {"attn_mask": MASK.long()}),
        (TypeError, "attn_mask must be bool, float32 or", {"attn_mask": MASK.half()}),
        (TypeError, "attn_mask must be bool, float32 or", {"attn_mask": "causal"}),
        (ValueError, r"attn_mask must be broadcastable to \(2, 4, 5, 6\)", {"attn_mask": MASK.T}),
        (ValueError, "attn_mask must be broadcastable to", {"attn_mask": MASK[0]}),
        (ValueError, "attn_mask must be broadcastable to", {"attn_mask": MASK[None, None, None]}),
        (ValueError, "attn_mask must lie on", {"attn_mask": MASK.to("meta")}),
        (ValueError, "scale must lie on", {"scale": torch.ones(4, device="meta")}),
        (ValueError, "eps must be .* at least 0", {"eps": -1e-12}),
        (TypeError, "eps must be a number", {"eps": None}),
    ],
)
def test_bad_input(error, match, changed):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "scale": 2.0, "enable_gqa": True}
    with pytest.raises(error, match=f"qk_norm_attention: {match}"):
        qk_norm_attention(**arguments | changed)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "seq_length", "options"),
    [
        (ValueError, "seq_length must be .* at least 2", 1, {}),
        (TypeError, "seq_length must be an int", 2.5, {}),
        (ValueError, "num_heads must be", 8, {"num_heads": 0}),
        (TypeError, "num_heads must be an int", 8, {"num_heads": 2.0}),
        (ValueError, "eps must be", 8, {"eps": -1.0}),
    ],
)
def test_bad_module_options(error, match, seq_length, options):
    with pytest.raises(error, match=f"qk_norm_attention: {match}"):
        QKNormAttention(seq_length, **options)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            qk_norm_attention,
            lambda: heads("query", "key", "value") | {"scale": draw(4)},
            differentiable=("query", "key", "value", "scale"),
            options=({"enable_gqa": True}, {"enable_gqa": True, "is_causal": True}),
            sizes=GROUPS,
        ),
    ]
