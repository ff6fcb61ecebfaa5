import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from tilework.norms import RMSNorm, rms_norm
from tilework.norms.rms_norm import native, reference

from helpers import DEVICES, FLOATING, HALF, assert_exact, clones

IMPLEMENTATIONS = ("torch", "reference")
SIZES = (1, 7, 63, 100)


def by_rows(
    input: Tensor,
    features: int,
    weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition, row by row in float64 with exact sums."""
    total = input.detach().cpu().double()
    if residual is not None:
        total = total + residual.detach().cpu().double()
    gain = [1.0] * features
    if weight is not None:
        gain = [g + offset for g in weight.detach().cpu().double().reshape(-1).tolist()]
    rows = []
    for row in total.reshape(-1, features).tolist():
        scale = math.sqrt(math.fsum(s * s for s in row) / features + eps)
        rows.append([s / scale * g for s, g in zip(row, gain, strict=True)])
    output = torch.tensor(rows, dtype=torch.float64).reshape(total.shape)
    return output, total


def gradients_by_rows(
    input: Tensor, weight: Tensor, eps: float, residual: Tensor, offset: float, *upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum and of the weight, row by row in float64."""
    features = weight.numel()
    total, grad_output, grad_total = (
        t.detach().cpu().double().reshape(-1, features).tolist()
        for t in (input.double() + residual.double(), *upstream)
    )
    gain = [g + offset for g in weight.detach().cpu().double().reshape(-1).tolist()]
    rows, columns = [], [[] for _ in gain]
    for row, upper, direct in zip(total, grad_output, grad_total, strict=True):
        rate = (math.fsum(s * s for s in row) / features + eps) ** -0.5
        scaled = [u * g for u, g in zip(upper, gain, strict=True)]
        mean = math.fsum(s * u for s, u in zip(row, scaled, strict=True)) / features
        rows.append(
            [rate * u - s * rate**3 * mean + d for s, u, d in zip(row, scaled, direct, strict=True)]
        )
        for column, s, u in zip(columns, row, upper, strict=True):
            column.append(u * s * rate)
    grad_sum = torch.tensor(rows, dtype=torch.float64).reshape(input.shape)
    grad_weight = torch.tensor([math.fsum(column) for column in columns], dtype=torch.float64)
    return grad_sum, grad_weight.reshape(weight.shape)


def leaves_and_copies(*leaves: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and their copies for torch's composition by the error rule."""
    single = torch.float32 if leaves[0].dtype == torch.float64 else None
    return [leaf.requires_grad_() for leaf in leaves], clones(leaves, single)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", FLOATING)
def test_plain_norm_and_gradients(dtype, implementation, device):
    for features in SIZES:
        leaves, copies = leaves_and_copies(
            torch.randn(5, 3, features).to(device, dtype), torch.randn(features).to(device, dtype)
        )
        input, weight = leaves
        upstream = torch.randn(5, 3, features).to(device, dtype)
        actual = rms_norm(input, features, weight, 1e-3, implementation=implementation)
        composition = F.rms_norm(copies[0], (features,), copies[1], 1e-3)
        assert actual.dtype == dtype
        assert_exact(actual, composition, by_rows(input, features, weight, 1e-3)[0])

        nothing = torch.zeros_like(input)
        truth = gradients_by_rows(input, weight, 1e-3, nothing, 0.0, upstream, nothing)
        grads = torch.autograd.grad(actual, leaves, upstream)
        composed = torch.autograd.grad(composition, copies, upstream.to(composition))
        for grad, compared, exact in zip(grads, composed, truth, strict=True):
            assert grad.dtype == dtype
            assert_exact(grad, compared, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_residual_offset_and_mixed_dtypes(dtype, weight_dtype, implementation, device):
    leaves, copies = leaves_and_copies(
        torch.randn(4, 7, 9).to(device, dtype),
        torch.randn(4, 7, 9).to(device, weight_dtype),
        torch.randn(7, 9).to(device, weight_dtype),
    )
    input, residual, weight = leaves
    upstream = [torch.randn(4, 7, 9).to(device, dtype) for _ in range(2)]
    actual = rms_norm(
        input,
        (7, 9),
        weight,
        1e-3,
        residual=residual,
        weight_offset=0.75,
        implementation=implementation,
    )
    total, gain = copies[0].float() + copies[1].float(), copies[2].float() + 0.75
    composition = [F.rms_norm(total, (7, 9), gain, 1e-3), total]
    composition = [t.to(copies[0].dtype) for t in composition]
    truth = by_rows(input, 63, weight, 1e-3, residual, 0.75)
    for result, compared, exact in zip(actual, composition, truth, strict=True):
        assert result.dtype == dtype
        assert_exact(result, compared, exact)

    grad_sum, grad_weight = gradients_by_rows(input, weight, 1e-3, residual, 0.75, *upstream)
    grads = torch.autograd.grad(actual, leaves, upstream)
    others = torch.autograd.grad(composition, copies, [u.to(composition[0]) for u in upstream])
    for leaf, grad, compared, exact in zip(
        leaves, grads, others, (grad_sum, grad_sum, grad_weight), strict=True
    ):
        assert grad.dtype == leaf.dtype
        if leaf.dtype == torch.float64 and dtype != torch.float64:
            grad = grad.float()  # no more exact than the computation
        assert_exact(grad, compared.float() if grad.dtype == torch.float32 else compared, exact)


@pytest.mark.parametrize("weight_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_is_the_norm_of_torch(dtype, weight_dtype):
    input = torch.randn(8, 100).to(dtype)
    weight = torch.randn(100).to(weight_dtype)
    actual = rms_norm(input, (100,), weight)
    torch.testing.assert_close(actual, F.rms_norm(input, (100,), weight))
    assert torch.equal(rms_norm(input, 100, eps=1e-5), F.rms_norm(input, (100,), eps=1e-5))


def test_uses_the_named_implementation(monkeypatch):
    """Forward mode is the reference's, as not every kernel of torch has one."""
    calls = []
    for name, module in (("torch", native), ("reference", reference)):
        kernel = module.rms_norm
        monkeypatch.setattr(
            module,
            "rms_norm",
            lambda *args, kernel=kernel, name=name: calls.append(name) or kernel(*args),
        )
    input = torch.randn(2, 5)
    for name in (None, *IMPLEMENTATIONS):
        rms_norm(input, 5, implementation=name)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        assert forward_ad.unpack_dual(rms_norm(dual, 5)).tangent is not None
    assert calls == ["torch", "torch", "reference", "reference"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_mixed_dtypes_do_not_warn(dtype, implementation, recwarn):
    """Torch's kernel does, and is not the fused one then."""
    torch.set_warn_always(True)
    try:
        for other in FLOATING:
            weight = torch.ones(4, dtype=other)
            rms_norm(torch.ones(2, 4).to(dtype), 4, weight, implementation=implementation)
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_rounds_once(dtype, implementation):
    """A second rounding, of the statistics, the sum or the gain, would show in every fourth one."""
    input, residual = torch.randn(2, 64, 100).to(dtype)
    weight = torch.randn(100).to(dtype)
    output, total = rms_norm(
        input,
        100,
        weight,
        0.0,
        residual=residual,
        weight_offset=0.3,
        implementation=implementation,
    )
    plain = rms_norm(input, 100, weight, 0.0, implementation=implementation)
    truth = by_rows(input, 100, weight, 0.0, residual, 0.3)
    for actual, exact in ((output, truth[0]), (plain, by_rows(input, 100, weight)[0])):
        assert (actual == exact.to(dtype)).double().mean() > 0.99
    assert torch.equal(total, truth[1].to(dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_comes_from_the_unrounded_sum(implementation):
    """Deviation from adding in half precision: here the sum overflows, not its norm."""
    input = torch.full((2, 8), 60000.0, dtype=torch.float16)
    output, total = rms_norm(input, 8, residual=input, implementation=implementation)
    assert torch.equal(output, torch.ones_like(input))
    assert total.isinf().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_epsilon_is_added_under_the_root(implementation):
    """Deviation from the authors' code, which adds it to the root."""
    input = torch.tensor([[3.0, 4.0]])
    output = rms_norm(input, 2, eps=3.5, implementation=implementation)
    torch.testing.assert_close(output, input / 4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_default_epsilon_is_that_of_the_computation(dtype, implementation):
    eps = 2.220446e-16 if dtype == torch.float64 else 1.1920929e-07
    input = torch.full((1, 4), math.sqrt(eps)).to(dtype)
    output = rms_norm(input, 4, implementation=implementation)
    expected = torch.full_like(input, math.sqrt(0.5))
    torch.testing.assert_close(output, expected)
    assert torch.equal(RMSNorm(4, dtype=dtype)(input), rms_norm(input, 4, torch.ones(4).to(dtype)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_strides_and_shapes(dtype, implementation):
    weight = torch.randn(7, 2).to(dtype)[:, 0]
    single = torch.float32 if dtype == torch.float64 else dtype
    base = torch.randn(5, 7, 3).to(dtype)
    for input in (
        base.transpose(1, 2),
        base[:, :, :1].transpose(1, 2).expand(5, 4, 7),
        base[:, :, 0],
        base[0, :, 0],
        base.new_empty(0, 7),
        base.new_empty(3, 0, 7),
    ):
        actual = rms_norm(input, 7, weight, 1e-3, implementation=implementation)
        assert actual.shape == input.shape
        assert_exact(
            actual,
            F.rms_norm(input.to(single), (7,), weight.to(single), 1e-3),
            by_rows(input, 7, weight, 1e-3)[0],
        )
    assert rms_norm(base.new_empty(3, 0), 0, implementation=implementation).shape == (3, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_extreme_and_irregular_values(dtype, implementation):
    largest = 65504.0 if dtype == torch.float16 else 1e18
    input = torch.tensor([[largest, -largest, largest], [1e-4, 1e-4, -1e-4]]).to(dtype)
    actual = rms_norm(input, 3, eps=0.0, implementation=implementation)
    single = torch.float32 if dtype == torch.float64 else dtype
    assert_exact(actual, F.rms_norm(input.to(single), (3,), eps=0.0), by_rows(input, 3)[0])

    input[0, 1] = torch.nan
    actual = rms_norm(input, 3, implementation=implementation)
    assert actual[0].isnan().all()
    assert actual[1].isfinite().all()
    input[0, 1] = torch.inf
    actual = rms_norm(input, 3, implementation=implementation)
    assert actual[0, 1].isnan()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(deadline=None, max_examples=30)
@given(
    features=st.sampled_from(SIZES),
    seed=st.integers(0, 2**31),
    factor=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
)
def test_properties(implementation, features, seed, factor, offset):
    generator = torch.Generator().manual_seed(seed)
    input, residual, upstream = torch.randn(
        3, 4, features, dtype=torch.float64, generator=generator
    )
    weight = torch.randn(features, dtype=torch.float64, generator=generator)

    def norm(input, *args, **kwargs):
        return rms_norm(input, features, *args, **kwargs, implementation=implementation)

    assert_close = torch.testing.assert_close
    plain = norm(input, eps=0.0)
    assert_close(plain.square().mean(-1), torch.ones(4, dtype=torch.float64))
    assert_close(norm(factor * input, eps=0.0), plain)
    assert_close(norm(input, weight, weight_offset=offset), norm(input, offset + weight))

    output, total = norm(input, weight, residual=torch.zeros_like(input))
    assert_close(output, norm(input, weight))
    assert torch.equal(total, input)
    assert torch.equal(norm(input, residual=residual)[1], input + residual)

    leaf = input.clone().requires_grad_()
    (grad,) = torch.autograd.grad(norm(leaf, eps=0.0), leaf, upstream)
    zero = torch.zeros(4, dtype=torch.float64)
    assert_close((grad * input).sum(-1), zero, rtol=0, atol=1e-10 * float(1 + grad.abs().max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives(implementation):
    input, residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def plain(input, weight):
        return rms_norm(input, 5, weight, 0.1, implementation=implementation)

    def full(input, residual, weight):
        return rms_norm(
            input,
            5,
            weight,
            0.1,
            residual=residual,
            weight_offset=0.5,
            implementation=implementation,
        )

    for function, leaves in ((plain, (input, weight)), (full, (input, residual, weight))):
        leaves = clones(leaf.detach().requires_grad_() for leaf in leaves)
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_of_a_zero_row():
    def norm(input):
        return rms_norm(input, 2, eps=0.25)[0]

    hessian = torch.func.hessian(norm)(torch.zeros(2, dtype=torch.float64))
    assert torch.equal(hessian, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transforms(implementation):
    input, residual = torch.randn(2, 6, 3, 5)
    weight = torch.randn(6, 5)

    def norm(input, residual, weight):
        output, total = rms_norm(input, 5, weight, residual=residual, implementation=implementation)
        return output * total

    def loss(*args):
        return norm(*args).square().sum()

    batched = torch.vmap(norm)(input, residual, weight)
    looped = torch.stack([norm(*args) for args in zip(input, residual, weight, strict=True)])
    torch.testing.assert_close(batched, looped)

    grads = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(input, residual, weight)
    leaves = clones(t.requires_grad_() for t in (input, residual, weight))
    sum(loss(*args) for args in zip(*leaves, strict=True)).backward()
    torch.testing.assert_close(grads, tuple(leaf.grad for leaf in leaves))

    tangents = tuple(torch.randn_like(t) for t in (input, residual))
    arguments = (input, residual)
    value, tangent = torch.func.jvp(lambda a, b: norm(a, b, weight[0]), arguments, tangents)
    torch.testing.assert_close(value, norm(*arguments, weight[0]))
    _, pull = torch.func.vjp(lambda a, b: norm(a, b, weight[0]), *arguments)
    upstream = torch.randn_like(value)
    expected = sum((g * t).sum() for g, t in zip(pull(upstream), tangents, strict=True))
    torch.testing.assert_close((upstream * tangent).sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_with_dynamic_shapes(dtype):
    module = RMSNorm(7, weight_offset=1.0)
    nn.init.normal_(module.weight)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    norm = torch.compile(
        lambda input: rms_norm(input, input.shape[1:], implementation="torch"),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for tokens in (3, 5):
        input, residual = torch.randn(2, 2, tokens, 7).to(dtype)
        torch.testing.assert_close(compiled(input, residual), module(input, residual))
        torch.testing.assert_close(norm(input), rms_norm(input, (tokens, 7)))
        compiled(input.requires_grad_()).sum().backward()
        grad, input.grad = input.grad, None
        module(input).sum().backward()
        torch.testing.assert_close(grad, input.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_autocast_changes_nothing(dtype, implementation, device):
    input = torch.randn(4, 7).to(device, dtype)
    for weight in (torch.ones(7, device=device), torch.ones(7, device=device, dtype=dtype)):
        expected = rms_norm(input, 7, weight, implementation=implementation)
        with torch.autocast(device, torch.bfloat16):
            actual = rms_norm(input, 7, weight, implementation=implementation)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_arguments_stay(dtype, implementation):
    input, residual = torch.randn(2, 4, 7).to(dtype).unbind()
    weight = torch.randn(7).to(dtype)
    arguments = (input, residual, weight)
    before = clones(arguments)
    output, total = rms_norm(
        input, 7, weight, residual=residual, weight_offset=1.0, implementation=implementation
    )
    plain = rms_norm(input, 7, implementation=implementation)
    for result in (output, total, plain):
        result.zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    with torch.no_grad():
        leaf = input.clone().requires_grad_()
        assert not rms_norm(leaf, 7, implementation=implementation).requires_grad


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [7, (3, 7), [3, 7]])
def test_module_takes_the_place_of_that_of_torch(shape, dtype):
    ours, theirs = (cls(shape, 1e-5, True, "cpu", dtype) for cls in (RMSNorm, nn.RMSNorm))
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.dtype == dtype
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(2, 3, 7).to(dtype)
    assert torch.equal(ours(input), theirs(input))
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(input), theirs(input))

    assert repr(RMSNorm(shape)) == repr(nn.RMSNorm(shape))
    bare, theirs = RMSNorm(shape, None, False), nn.RMSNorm(shape, None, False)
    assert repr(bare) == repr(theirs)
    assert bare.state_dict() == theirs.state_dict() == {}
    assert torch.equal(bare(input), theirs(input))


def test_module_with_offset_and_residual():
    module = RMSNorm(7, weight_offset=1.0)
    assert torch.equal(module.weight, torch.zeros(7))
    assert repr(module) == "RMSNorm((7,), eps=None, elementwise_affine=True, weight_offset=1.0)"
    input, residual = torch.randn(2, 4, 7)
    torch.testing.assert_close(module(input), nn.RMSNorm(7)(input))
    nn.init.normal_(module.weight)
    expected = rms_norm(input, 7, 1 + module.weight, residual=residual)
    torch.testing.assert_close(module(input, residual), expected)
    module.reset_parameters()
    assert torch.equal(module.weight, torch.zeros(7))
    meta = RMSNorm(7, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype) == ("meta", torch.bfloat16)


INPUT, WEIGHT = torch.randn(3, 4), torch.ones(4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "input must be a floating", (INPUT.long(), 4), {}),
        (TypeError, "input must be a floating", (INPUT.to(torch.complex64), 4), {}),
        (TypeError, "input must be a floating", ([1.0, 2.0], 2), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, ()), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, -1), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, 4.0), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, "4"), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, None), {}),
        (ValueError, r"normalized_shape must be .* \(3, 4\), got \(3,\)", (INPUT, 3), {}),
        (ValueError, "normalized_shape must be the trailing", (INPUT, (2, 3, 4)), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT, 4, torch.ones(1)), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT, 4, torch.ones(1, 4)), {}),
        (TypeError, "weight must be a floating", (INPUT, 4, WEIGHT.long()), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, WEIGHT, -1e-6), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, WEIGHT, math.nan), {}),
        (TypeError, "eps must be a number", (INPUT, 4, WEIGHT, "small"), {}),
        (ValueError, r"residual must be of shape \(3, 4\)", (INPUT, 4), {"residual": INPUT[:1]}),
        (TypeError, "residual must be a floating", (INPUT, 4), {"residual": INPUT.long()}),
        (ValueError, "residual must lie on", (INPUT, 4), {"residual": INPUT.to("meta")}),
        (ValueError, "weight_offset must be 0 without a weight", (INPUT, 4), {"weight_offset": 1}),
        (TypeError, "weight_offset must be a number", (INPUT, 4), {"weight_offset": None}),
        (ValueError, "implementation must be one of", (INPUT, 4), {"implementation": "cuda"}),
    ],
)
def test_bad_input(error, match, arguments, options):
    with pytest.raises(error, match=f"rms_norm: {match}"):
        rms_norm(*arguments, **options)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "normalized_shape", ((),), {}),
        (TypeError, "normalized_shape", (4.0,), {}),
        (ValueError, "eps", (4, -1.0), {}),
        (ValueError, "weight_offset must be 0 without", (4, None, False), {"weight_offset": 1.0}),
    ],
)
def test_bad_module_options(error, match, arguments, options):
    with pytest.raises(error, match=f"rms_norm: {match}"):
        RMSNorm(*arguments, **options)
