"""Small floating-point formats, against their codes read bit by bit, and PyTorch's own."""

import copy
import math
import pickle
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework import quant
from tilework.quant import (
    MinifloatFormat,
    minifloat_decode,
    minifloat_encode,
    minifloat_quantize,
    minifloat_scale,
)

import samples
from calls import Call, draw

NAMED = {
    "E2M1": (2, 1, "none", 6.0),
    "E2M3": (2, 3, "none", 7.5),
    "E3M2": (3, 2, "none", 28.0),
    "E3M4_IEEE": (3, 4, "ieee", 15.5),
    "E4M3_FN": (4, 3, "fn", 448.0),
    "E4M3_IEEE": (4, 3, "ieee", 240.0),
    "E5M2_IEEE": (5, 2, "ieee", 57344.0),
}
LEGAL = [
    (exponent, mantissa, specials)
    for exponent, mantissa in product(range(1, 8), range(7))
    for specials in ("none", "fn", "ieee")
    if exponent + mantissa <= 7
    and not (specials == "fn" and mantissa == 0)
    and not (specials == "ieee" and exponent == 1)
]
BIASES = (None, -3, 0, 20)
every_format = pytest.mark.parametrize(("exponent", "mantissa", "specials"), LEGAL)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            minifloat_quantize,
            lambda: {"input": 3 * draw(4, 3), "scale": draw(4, 1).abs() + 0.5},
            differentiable=("input",),
            sizes={1: 1},
            options=({"format": quant.E2M1}, {"format": quant.E4M3_FN}),
        )
    ]


def read(code: int, exponent_bits: int, mantissa_bits: int, bias: int, specials: str) -> float:
    """What a code stands for, from the text of its bits."""
    text = f"{code:0{1 + exponent_bits + mantissa_bits}b}"
    sign, exponent, mantissa = text[0], text[1 : 1 + exponent_bits], text[1 + exponent_bits :]
    if specials == "fn" and "0" not in text[1:]:
        return math.nan
    if specials == "ieee" and "0" not in exponent:
        return math.nan if "1" in mantissa else (-1) ** int(sign) * math.inf
    field, value = int(exponent, 2), Fraction(0 if "1" not in exponent else 1)
    for place, bit in enumerate(mantissa, 1):
        value += Fraction(int(bit), 2**place)
    return (-1.0) ** int(sign) * float(value * Fraction(2) ** (max(field, 1) - bias))


def numbers(exponent: int, mantissa: int, bias: int, specials: str) -> list[float]:
    """By code, the special ones among them."""
    return [
        read(code, exponent, mantissa, bias, specials)
        for code in range(2 ** (1 + exponent + mantissa))
    ]


def finite(table: list[float]) -> list[float]:
    return sorted({value + 0.0 for value in table if math.isfinite(value)})


def nearest(values: list[float], x: float) -> float:
    """By comparison with all; ties to the even multiple of the gap."""
    x = min(max(x, values[0]), values[-1])
    for low, high in pairwise(values):
        if low <= x <= high:
            below, above = Fraction(x) - Fraction(low), Fraction(high) - Fraction(x)
            if below == above:
                gap = Fraction(high) - Fraction(low)
                return low if Fraction(low) / gap % 2 == 0 else high
            return low if below < above else high
    raise AssertionError


def tried(values: list[float]) -> list[float]:
    """The values, the middles between them, what is beside both, and beyond."""
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    points = np.array([*values, *middles, 1.5 * values[-1], 1e4 * values[-1], -3 * values[-1]])
    return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])


@every_format
@pytest.mark.parametrize("bias", BIASES)
def test_all_codes(exponent: int, mantissa: int, specials: str, bias: int | None) -> None:
    form = MinifloatFormat(exponent, mantissa, bias=bias, specials=specials)
    usual = 2 ** (exponent - 1) - 1 if bias is None else bias
    assert (form.bias, form.bits) == (usual, 1 + exponent + mantissa)
    table = numbers(exponent, mantissa, usual, specials)
    values = finite(table)
    assert form.values().tolist() == values
    assert form.values().dtype == torch.float64
    assert form.max == values[-1]
    assert form.min_subnormal == min(value for value in values if value > 0)
    assert form.min_normal == read(1 << mantissa, exponent, mantissa, usual, specials)
    codes = torch.arange(len(table))
    decoded = minifloat_decode(codes, form, dtype=torch.float64)
    np.testing.assert_array_equal(decoded.numpy(), table)
    assert torch.equal(
        decoded.signbit() | decoded.isnan(), (codes >= len(table) // 2) | decoded.isnan()
    )
    known = codes[~decoded.isnan()]
    encoded = minifloat_encode(decoded[known], form)
    assert encoded.dtype == torch.uint8
    assert encoded.tolist() == known.tolist()
    again = minifloat_quantize(decoded, form)
    torch.testing.assert_close(again, decoded, rtol=0, atol=0, equal_nan=True)
    if decoded.isnan().any():
        pair = minifloat_encode(torch.tensor([torch.nan, -torch.nan]), form)
        assert minifloat_decode(pair, form).isnan().all()


@every_format
@pytest.mark.parametrize("bias", [None, 5])
def test_the_nearest_number(exponent: int, mantissa: int, specials: str, bias: int | None) -> None:
    form = MinifloatFormat(exponent, mantissa, bias=bias, specials=specials)
    values = form.values().tolist()
    points = tried(values)
    grid = np.array(values)
    # The neighbours of a point hold the nearest value; Fractions of all would take long.
    place = np.clip(np.searchsorted(grid, points), 1, len(values) - 1)
    expected = [
        nearest(values[max(i - 1, 0) : i + 1], x) for i, x in zip(place, points, strict=True)
    ]
    input = torch.from_numpy(points)
    found = minifloat_quantize(input, form)
    assert found.tolist() == expected
    assert torch.equal(found.signbit(), input.signbit())
    assert torch.equal(minifloat_quantize(-input, form), -found)
    assert torch.equal(minifloat_quantize(found, form), found)
    order = input.argsort()
    assert (found[order].diff() >= 0).all()


@pytest.mark.parametrize("name", NAMED)
def test_named_formats(name: str) -> None:
    exponent, mantissa, specials, largest = NAMED[name]
    form = getattr(quant, name)
    assert form == MinifloatFormat(exponent, mantissa, specials=specials)
    assert form.max == largest
    assert hash(form) == hash(copy.deepcopy(form))
    assert pickle.loads(pickle.dumps(form)) == form
    assert form != MinifloatFormat(exponent, mantissa, bias=9, specials=specials)


ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E3M4_IEEE": ml_dtypes.float8_e3m4,
    "E4M3_FN": ml_dtypes.float8_e4m3fn,
    "E4M3_IEEE": ml_dtypes.float8_e4m3,
    "E5M2_IEEE": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize(("name", "theirs"), ML_DTYPES.items(), ids=list(ML_DTYPES))
def test_agrees_with_ml_dtypes(name: str, theirs: type) -> None:
    form = getattr(quant, name)
    assert NAMED.keys() == ML_DTYPES.keys()
    assert name in quant.__all__
    codes = torch.arange(2**form.bits, dtype=torch.uint8)
    values = torch.from_numpy(codes.numpy().view(theirs).astype(np.float32))
    decoded = minifloat_decode(codes, form)
    torch.testing.assert_close(decoded, values, rtol=0, atol=0, equal_nan=True)
    finite = decoded[decoded.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    input = torch.cat([form.max * torch.randn(3000) / 2, form.min_normal * torch.randn(500)])
    input = torch.cat([input, finite, middles])
    input = input[input.abs() <= form.max]
    expected = input.numpy().astype(theirs)
    found = minifloat_quantize(input, form)
    assert found.tolist() == expected.astype(np.float32).tolist()
    assert minifloat_encode(found, form).tolist() == expected.view(np.uint8).tolist()


@pytest.mark.parametrize(
    ("name", "theirs"), [("E4M3_FN", torch.float8_e4m3fn), ("E5M2_IEEE", torch.float8_e5m2)]
)
def test_agrees_with_pytorch(name: str, theirs: torch.dtype) -> None:
    form = getattr(quant, name)
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(theirs).float()
    decoded = minifloat_decode(codes, form)
    torch.testing.assert_close(decoded, values, rtol=0, atol=0, equal_nan=True)
    input = torch.cat([torch.randn(5000) * 2.0 ** torch.randint(-12, 8, (5000,)), decoded])
    input = input[input.abs() <= form.max]
    found, expected = minifloat_quantize(input, form), input.to(theirs)
    assert torch.equal(found, expected.float())
    assert torch.equal(minifloat_encode(found, form), expected.view(torch.uint8))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "number", "tensor"])
def test_scales(name: str, dtype: torch.dtype, kind: str) -> None:
    form = getattr(quant, name)
    input = (5 * torch.randn(7, 5)).to(dtype).requires_grad_()
    tensor = torch.rand(7, 1) + 0.1
    scale = {"none": None, "number": 0.3, "tensor": tensor}[kind]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = {"none": torch.ones(7, 1), "number": torch.full((7, 1), 0.3, dtype=wide)}
    factors = factor.get(kind, tensor).to(wide)
    found = minifloat_quantize(input, form, scale=scale)
    upstream = torch.randn(7, 5).to(dtype)
    (gradient,) = torch.autograd.grad(found, input, upstream)
    assert found.dtype == gradient.dtype == dtype
    values = form.values().tolist()
    for i, j in product(range(7), range(5)):
        scaled = input[i, j].detach().to(wide) / factors[i, 0]
        expected = torch.tensor(nearest(values, scaled.item()), dtype=wide) * factors[i, 0]
        assert found[i, j] == expected.to(dtype)
        assert gradient[i, j] == (upstream[i, j] if abs(scaled.item()) <= form.max else 0)


@pytest.mark.parametrize("exponent", [4, 5, 7])
def test_what_is_finite_stays_finite(exponent: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        input = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan], dtype=dtype)
        for mantissa, bias in ((0, None), (7 - exponent, None), (0, -60), (0, -3)):
            form = MinifloatFormat(exponent, mantissa, bias=bias)
            found = minifloat_quantize(input, form)
            assert found[:2].isfinite().all()
            held = [v for v in form.values().tolist() if v <= largest]
            assert found[0].item() == -found[1].item() == held[-1]
            torch.testing.assert_close(found[2:], input[2:], rtol=0, atol=0, equal_nan=True)
    tiny = minifloat_quantize(torch.tensor([1e30, -1e30]), quant.E2M1, scale=1e-30)
    torch.testing.assert_close(tiny, torch.tensor([6e-30, -6e-30]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [-1017, -120, 126, 140, 1073])
def test_biases_at_the_ends_of_the_dtypes(bias: int) -> None:
    form = MinifloatFormat(2, 2, bias=bias)
    values = form.values().tolist()
    for dtype in (torch.float32, torch.float64):
        limits = torch.finfo(dtype)
        smallest = limits.smallest_normal * limits.eps
        points = [smallest, 5 * smallest, limits.smallest_normal, 1.0, 1e30, *values[-3:]]
        input = torch.tensor(points, dtype=dtype)
        input = input[input.isfinite()]
        for x, y in zip(input.tolist(), minifloat_quantize(input, form).tolist(), strict=True):
            held = [v for v in values if abs(v) <= limits.max]
            expected = torch.tensor(nearest(held, x) if len(held) > 1 else 0.0, dtype=dtype)
            assert y == expected.item()


@given(st.integers(-20, 20), st.sampled_from(sorted(NAMED)), st.integers(0, 2**32))
def test_powers_of_two_pass_through(power: int, name: str, seed: int) -> None:
    form = getattr(quant, name)
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(20, dtype=torch.float64, generator=generator)
    found = minifloat_quantize(input, form)
    moved = minifloat_quantize(2.0**power * input, form)
    sizes = torch.stack([found.abs(), input.abs(), moved.abs(), 2.0**power * input.abs()])
    normal = ((sizes >= form.min_normal) & (sizes < form.max)).all(0)
    assert torch.equal(moved[normal], 2.0**power * found[normal])
    scaled = minifloat_quantize(2.0**power * input, form, scale=2.0**power)
    assert torch.equal(scaled, 2.0**power * found)


def test_no_gradient_goes_to_the_scale() -> None:
    scale = torch.ones(3, requires_grad=True)
    input = torch.tensor([0.5, torch.nan, torch.inf], requires_grad=True)
    minifloat_quantize(input, quant.E2M1, scale=scale).sum().backward()
    assert scale.grad is None
    assert input.grad is not None
    assert input.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize("dim", [None, 0, -1, (0, 2), (1,), (0, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scale_of_the_largest(dim: Any, dtype: torch.dtype) -> None:
    input = torch.randn(3, 4, 5).to(dtype).requires_grad_()
    with torch.no_grad():
        input[1] = 0
    scale = minifloat_scale(input, quant.E4M3_FN, dim=dim)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not scale.requires_grad
    over = (0, 1, 2) if dim is None else (dim,) if isinstance(dim, int) else dim
    largest = np.abs(input.detach().double().numpy()).max(over, keepdims=dim is not None)
    expected = np.where(largest == 0, 1, largest / 448)
    np.testing.assert_allclose(
        scale.double().numpy(), expected, rtol=float(torch.finfo(scale.dtype).eps)
    )
    assert scale.shape == expected.shape
    back = minifloat_quantize(input.detach().double(), quant.E4M3_FN, scale=scale)
    assert back.isfinite().all()


def test_scale_of_nothing_and_of_what_is_not_finite() -> None:
    assert minifloat_scale(torch.zeros(0), quant.E2M1) == 1
    assert minifloat_scale(torch.zeros(2, 0), quant.E2M1, dim=1).tolist() == [[1], [1]]
    assert minifloat_scale(torch.zeros(2, 0), quant.E2M1, dim=0).shape == (1, 0)
    assert minifloat_scale(torch.tensor(-12.0), quant.E2M1) == 2
    assert minifloat_scale(torch.tensor([1.0, torch.nan]), quant.E2M1).isnan()
    assert minifloat_scale(torch.tensor([1.0, -torch.inf]), quant.E2M1) == torch.inf


def test_shapes_and_strides() -> None:
    input = torch.randn(4, 6)
    for view in (input.T, input[::2, ::3], input[:0], input[0, 0], input[:1].expand(3, 6)):
        found = minifloat_quantize(view, quant.E3M2)
        assert found.shape == view.shape
        assert torch.equal(found, minifloat_quantize(view.contiguous(), quant.E3M2))
        codes = minifloat_encode(found, quant.E3M2)
        assert codes.shape == view.shape
        assert torch.equal(minifloat_decode(codes, quant.E3M2), found)


@pytest.mark.untyped
def test_transforms_and_compilation() -> None:
    input, scale = 3 * torch.randn(5, 4), torch.rand(5, 1) + 0.5
    scale = scale.squeeze(1)

    def function(x: Tensor, s: Tensor) -> Tensor:
        return minifloat_quantize(x, quant.E2M3, scale=s)

    expected = torch.stack([function(x, s) for x, s in zip(input, scale, strict=True)])
    assert torch.equal(torch.vmap(function)(input, scale), expected)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(input[0], scale[0]), expected[0])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 3), {}, ValueError, "exponent_bits must be an int of at least 1"),
        ((8, 0), {}, ValueError, "exponent_bits must be an int from 1 to 7"),
        ((4, 4), {}, ValueError, "mantissa_bits must be an int from 0 to 3"),
        ((4, -1), {}, ValueError, "mantissa_bits must be an int of at least 0"),
        ((4, 3.0), {}, TypeError, "mantissa_bits must be an int"),
        ((True, 3), {}, TypeError, "exponent_bits must be an int"),
        ((4, 0), {"specials": "fn"}, ValueError, "mantissa_bits must be at least 1 with 'fn'"),
        ((1, 2), {"specials": "ieee"}, ValueError, "exponent_bits must be at least 2 with 'ieee'"),
        ((4, 3), {"specials": "inf"}, ValueError, "specials must be one of 'none', 'fn', 'ieee'"),
        ((4, 3), {"bias": 1.0}, TypeError, "bias must be an int"),
        ((4, 3), {"bias": 1073}, ValueError, "bias must be an int from -1008 to 1072"),
        ((4, 3), {"bias": -1009}, ValueError, "bias must be an int from"),
    ],
)
def test_formats_that_are_none(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^MinifloatFormat: {message}"):
        MinifloatFormat(*arguments, **options)


@pytest.mark.untyped
def test_scalars_of_numpy_are_numbers() -> None:
    form = MinifloatFormat(np.int64(4), np.int32(3), bias=np.int64(7), specials="fn")
    assert form == quant.E4M3_FN
    assert repr(form) == repr(quant.E4M3_FN)
    assert minifloat_quantize(torch.tensor(3.4), form, scale=np.float32(0.5)) == 3.5


def test_formats_do_not_change() -> None:
    with pytest.raises(AttributeError):
        quant.E2M1.bias = 3  # type: ignore[misc]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [
        (
            minifloat_quantize,
            {"input": torch.ones(2).long()},
            TypeError,
            "input must be a floating",
        ),
        (minifloat_quantize, {"format": "E2M1"}, TypeError, "format must be a MinifloatFormat"),
        (minifloat_quantize, {"scale": 0.0}, ValueError, "scale must be a finite number above 0"),
        (minifloat_quantize, {"scale": 1e-60}, ValueError, "scale must be finite and above 0"),
        (minifloat_quantize, {"scale": "1"}, TypeError, "scale must be a number"),
        (minifloat_quantize, {"scale": torch.ones(3)}, ValueError, "scale must be broadcastable"),
        (
            minifloat_quantize,
            {"scale": torch.ones(2).long()},
            TypeError,
            "scale must be a floating",
        ),
        (minifloat_quantize, {"scale": torch.tensor(-1.0)}, ValueError, "scale must be finite and"),
        (
            minifloat_quantize,
            {"scale": torch.tensor(torch.nan)},
            ValueError,
            "scale must be finite",
        ),
        (minifloat_scale, {"input": torch.ones(2).long()}, TypeError, "input must be a floating"),
        (minifloat_scale, {"format": None}, TypeError, "format must be a MinifloatFormat"),
        (minifloat_scale, {"dim": 1}, ValueError, "dim must be of different dimensions of 1"),
        (minifloat_scale, {"dim": ()}, ValueError, "dim must be of different dimensions"),
        (minifloat_scale, {"dim": (0, -1)}, ValueError, "dim must be of different dimensions"),
        (minifloat_scale, {"dim": 0.0}, TypeError, "dim must be an int"),
        (minifloat_encode, {"input": torch.ones(2).long()}, TypeError, "input must be a floating"),
        (minifloat_encode, {"format": 3}, TypeError, "format must be a MinifloatFormat"),
        (minifloat_encode, {"input": torch.tensor([0.7])}, ValueError, "input must be of numbers"),
        (minifloat_encode, {"input": torch.tensor([8.0])}, ValueError, "input must be of numbers"),
        (minifloat_encode, {"input": torch.tensor([torch.nan])}, ValueError, "input must be of"),
        (minifloat_encode, {"input": torch.tensor([-torch.inf])}, ValueError, "input must be of"),
        (minifloat_decode, {"codes": torch.ones(2)}, TypeError, "codes must be an integer tensor"),
        (minifloat_decode, {"codes": torch.tensor([16])}, ValueError, "codes must be from 0 to 15"),
        (minifloat_decode, {"codes": torch.tensor([-1])}, ValueError, "codes must be from 0 to 15"),
        (minifloat_decode, {"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
        (minifloat_decode, {"format": 3}, TypeError, "format must be a MinifloatFormat"),
    ],
)
def test_bad_input(
    function: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    first = {"codes": torch.ones(2).long()} if function is minifloat_decode else {}
    accepted = (first or {"input": torch.ones(2)}) | {"format": quant.E2M1}
    function(**accepted)
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**(accepted | change))
