import math

import pytest
import torch
from torch import Tensor, nn

from tilework import _implementations
from tilework.norms import PartialRMSNorm, partial_rms_norm, rms_norm

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, clones

CASES = [("reference", dtype) for dtype in FLOATING]
CASES += [("triton", dtype) for dtype in FLOATING if dtype != torch.float64]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The implementation that the function takes, which has no argument for it."""
    monkeypatch.setattr(_implementations, "choose", lambda *_, **__: request.param)
    return str(request.param)


def by_rows(
    input: Tensor, weight: Tensor, eps: float, measured: int, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition and its gradients, row by row in float64."""
    features = len(weight)
    gain = weight.detach().double().tolist()
    outputs, grads, columns = [], [], [[] for _ in gain]
    rows, upper = (t.detach().double().reshape(-1, features).tolist() for t in (input, upstream))
    for row, up in zip(rows, upper, strict=True):
        rstd = (math.fsum(s * s for s in row[:measured]) / measured + eps) ** -0.5
        outputs.append([s * rstd * g for s, g in zip(row, gain, strict=True)])
        c1 = math.fsum(s * u * g for s, u, g in zip(row, up, gain, strict=True))
        grads.append(
            [
                rstd * up[i] * gain[i] - (row[i] * rstd**3 * c1 / measured) * (i < measured)
                for i in range(features)
            ]
        )
        for column, s, u in zip(columns, row, up, strict=True):
            column.append(u * s * rstd)
    sums = [math.fsum(column) for column in columns]
    shaped = [torch.tensor(t, dtype=torch.float64) for t in (outputs, grads, sums)]
    return shaped[0].reshape(input.shape), shaped[1].reshape(input.shape), shaped[2]


def composed(input: Tensor, weight: Tensor, eps: float, measured: int) -> Tensor:
    total = input.float()
    rstd = (total[..., :measured].pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return (total * rstd * weight.float()).to(input.dtype)


@pytest.mark.parametrize(("chosen", "dtype"), CASES, indirect=["chosen"])
@pytest.mark.parametrize(
    ("features", "fraction", "measured"),
    [(1, 0.5, 1), (7, 0.0625, 1), (7, 1.0, 7), (63, 0.3, 19), (100, 0.07, 7), (100, 0.9, 90)],
)
def test_outputs_and_gradients(features, fraction, measured, chosen, dtype):
    input = torch.randn(2, 3, features).to(dtype).requires_grad_()
    weight = torch.randn(features).to(dtype).requires_grad_()
    upstream = torch.randn(2, 3, features).to(dtype)
    output = partial_rms_norm(input, features, weight, 1e-2, fraction=fraction)
    actual = (output, *torch.autograd.grad(output, (input, weight), upstream))
    copies = clones((input, weight), torch.float32 if dtype == torch.float64 else None)
    compared = composed(*copies, 1e-2, measured)
    composition = (compared, *torch.autograd.grad(compared, copies, upstream.to(compared)))
    truth = by_rows(input, weight, 1e-2, measured, upstream)
    for result, other, exact in zip(actual, composition, truth, strict=True):
        assert result.dtype == dtype
        assert_exact(result, other, exact)


def test_the_count_is_rounded_up_and_exact():
    """Deviation from the authors' code, which rounds down."""
    for features, fraction, measured in ((10, 0.01, 1), (10, 0.11, 2), (100, 0.07, 7), (3, 0.5, 2)):
        input = torch.zeros(features)
        input[:measured] = 2
        input[measured:] = 6
        output = partial_rms_norm(input, features, eps=0.0, fraction=fraction)
        torch.testing.assert_close(output, input / 2)


def test_epsilon_is_under_the_root():
    """Deviation from the authors' code, which adds it to the root."""
    output = partial_rms_norm(torch.tensor([3.0, 8.0]), 2, eps=7.0, fraction=0.5)
    torch.testing.assert_close(output, torch.tensor([0.75, 2.0]))


@pytest.mark.parametrize("dtype", FLOATING)
def test_the_whole_is_rms_norm(dtype):
    input, weight = torch.randn(4, 7).to(dtype), torch.randn(7).to(dtype)
    actual = partial_rms_norm(input, [7], weight, fraction=1.0)
    torch.testing.assert_close(actual, rms_norm(input, 7, weight, implementation="reference"))
    first = partial_rms_norm(input, 7, fraction=0.5)
    other = torch.cat((input[:, :4], torch.randn(4, 3).to(dtype)), 1)
    assert torch.equal(first[:, :4], partial_rms_norm(other, 7, fraction=0.5)[:, :4])


def test_derivatives_and_transforms():
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def norm(input, weight):
        return partial_rms_norm(input, 5, weight, 0.1, fraction=0.4)

    assert torch.autograd.gradcheck(norm, (input, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, (input, weight))
    batched = torch.vmap(norm, (0, None))(input, weight)
    torch.testing.assert_close(batched, norm(input, weight))


@pytest.mark.parametrize("chosen", ["reference", "triton"], indirect=True)
def test_strides_empty_and_irregular_input(chosen):
    base = torch.randn(4, 7, 3)
    input = base.transpose(1, 2)
    expected = partial_rms_norm(input.contiguous(), 7, fraction=0.3)
    torch.testing.assert_close(partial_rms_norm(input, 7, fraction=0.3), expected)
    assert partial_rms_norm(base[:0], 3).shape == (0, 7, 3)
    assert partial_rms_norm(base[..., :0], 0).shape == (4, 7, 0)
    large = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert torch.equal(partial_rms_norm(large, 2), large.sign())
    bad = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan], [1.0, torch.inf]])
    output = partial_rms_norm(bad, 2)
    assert output.isnan().tolist() == [[True, True], [False, True], [False, False]]
    assert output[2].tolist() == [1.0, torch.inf]


@pytest.mark.untyped
@pytest.mark.parametrize("chosen", ["reference", "triton"], indirect=True)
def test_compiles_with_dynamic_shapes(chosen):
    module = PartialRMSNorm(7, fraction=0.5)
    nn.init.normal_(module.weight)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5):
        input = torch.randn(tokens, 7)
        torch.testing.assert_close(compiled(input), module(input))


@pytest.mark.parametrize("dtype", FLOATING)
def test_module(dtype):
    module = PartialRMSNorm(7, 0.1, fraction=0.5, dtype=dtype)
    theirs = nn.RMSNorm(7, dtype=dtype)
    module.load_state_dict(theirs.state_dict())
    assert torch.equal(module.weight, torch.ones(7, dtype=dtype))
    nn.init.normal_(module.weight)
    theirs.load_state_dict(module.state_dict())
    input = torch.randn(2, 7).to(dtype)
    expected = partial_rms_norm(input, 7, module.weight, 0.1, fraction=0.5)
    assert torch.equal(module(input), expected)
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(7, dtype=dtype))
    assert repr(module) == "PartialRMSNorm((7,), eps=0.1, elementwise_affine=True, fraction=0.5)"
    assert PartialRMSNorm([7], None, False).weight is None
    assert PartialRMSNorm(7, device="meta").weight.device.type == "meta"


INPUT = torch.ones(3, 4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "input must be a floating", (INPUT.long(), 4), {}),
        (ValueError, "normalized_shape must be .* one int", (INPUT, (3, 4)), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, ()), {}),
        (ValueError, "normalized_shape must be the trailing", (INPUT, 3), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT, 4, torch.ones(3, 4)), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, None, -1e-6), {}),
        (
            ValueError,
            "fraction must be a number above 0 and at most 1",
            (INPUT, 4),
            {"fraction": 0.0},
        ),
        (
            ValueError,
            "fraction must be a number above 0 and at most 1",
            (INPUT, 4),
            {"fraction": 1.01},
        ),
        (TypeError, "fraction must be a number", (INPUT, 4), {"fraction": "half"}),
    ],
)
def test_bad_input(error, match, arguments, options):
    with pytest.raises(error, match=f"partial_rms_norm: {match}"):
        partial_rms_norm(*arguments, **options)
    if "fraction" in options:
        with pytest.raises(error, match=f"partial_rms_norm: {match}"):
            PartialRMSNorm(4, **options)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            partial_rms_norm,
            lambda: {"input": draw(3, 5, 6), "weight": draw(6)},
            differentiable=("input", "weight"),
            options=({"normalized_shape": 6, "fraction": 0.5},),
            sizes={6: 6},
        ),
    ]
