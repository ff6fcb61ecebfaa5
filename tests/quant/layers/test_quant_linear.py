"""A layer of codes computes what its weights would, keeps all of them, and moves as layers do."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilework.quant import QuantizedTensor, QuantLinear, rtn_quantize
from tilework.quant.storage._stored import Stored, StoredWeights


@dataclass(frozen=True, eq=False)
class Turned(Stored):
    left: Tensor

    def inverse(self, weight: Tensor) -> Tensor:
        return self.left.mT @ weight


@dataclass(frozen=True, eq=False)
class Book(StoredWeights):
    """Weights that are rows of a book."""

    indices: Tensor
    book: Tensor
    size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.indices), self.size))

    def limits(self) -> dict[str, int]:
        return {"indices": len(self.book)}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.book[self.indices].to(dtype or self.book.dtype)


def quantized(form: str = "plain") -> Any:
    """Weights of shape (6, 10)."""
    codes = torch.randint(0, 8, (6, 10), dtype=torch.uint8)
    grid = {"scale": torch.rand(6, 3) + 0.1, "zero_point": torch.randint(0, 8, (6, 3)).float()}
    options: dict[str, Any] = {"bits": 3, "group_size": 4}
    if form == "ordered":
        options["group_index"] = torch.randint(0, 3, (10,))
    elif form == "scaled":
        options["input_scale"] = torch.rand(10) + 0.5
    elif form == "turned":
        options["transform"] = Turned(torch.linalg.qr(torch.randn(6, 6))[0])
    elif form == "book":
        indices = torch.tensor([0, 40_000, 299, 49_999, 32_768, 7])
        return Book(indices, torch.randn(50_000, 10), 10)
    return QuantizedTensor(codes, **grid, **options)


FORMS = ["plain", "ordered", "scaled", "turned", "book"]
every = pytest.mark.parametrize("form", FORMS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values(form: str, dtype: torch.dtype) -> None:
    weights = quantized(form)
    bias = nn.Parameter(torch.randn(6, dtype=dtype))
    layer = QuantLinear.from_quantized(weights, bias)
    assert layer.bias is bias
    assert (layer.in_features, layer.out_features) == (10, 6)
    assert torch.equal(layer.weight, weights.dequantize())
    assert torch.equal(layer.quantized.dequantize(), weights.dequantize())
    for shape in [(10,), (3, 10), (2, 0, 10), (2, 3, 10)]:
        x = torch.randn(shape, dtype=dtype)
        output = layer(x)
        assert output.dtype == dtype
        exact = x.double() @ weights.dequantize().to(dtype).double().mT + bias.double()
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(output, exact.to(dtype), rtol=tolerance, atol=tolerance)


def test_buffers_have_the_names_and_values_of_what_is_stored() -> None:
    weights = quantized("ordered")
    state = QuantLinear(weights, torch.ones(6)).state_dict()
    assert set(state) == {"bias", "packed_codes", "scale", "zero_point", "group_index"}
    assert torch.equal(state["packed_codes"], weights.packed())
    assert torch.equal(state["group_index"], weights.group_index)
    assert {"input_scale"} < set(QuantLinear(quantized("scaled")).state_dict())
    assert {"left"} < set(QuantLinear(quantized("turned")).state_dict())
    book = QuantLinear(quantized("book")).state_dict()
    assert book["indices"].dtype == torch.int16
    assert QuantLinear(quantized("book")).quantized.indices.dtype == torch.int64


def test_bits_per_weight_count_all_that_is_stored() -> None:
    weights = quantized()
    assert QuantLinear(weights).bits_per_weight == 8 * (6 * 4 + 2 * 6 * 3 * 4) / 60


@every
def test_a_state_goes_into_a_layer_of_the_same_form(form: str) -> None:
    torch.manual_seed(1)
    first = QuantLinear(quantized(form), torch.randn(6))
    second = QuantLinear(quantized(form), torch.randn(6))
    second.load_state_dict(first.state_dict(), strict=True)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    assert torch.equal(first.weight, second.weight)


@every
def test_copies_casts_and_pickles(form: str) -> None:
    layer = QuantLinear(quantized(form), torch.randn(6))
    x = torch.randn(4, 10)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    half = copy.deepcopy(layer).half()
    assert half.bias is not None
    assert half.bias.dtype == torch.float16
    assert torch.equal(half.weight, layer.weight)
    assert half(x.half()).dtype == torch.float16
    assert all(tensor.is_meta for tensor in layer.to("meta").state_dict().values())


@every
@pytest.mark.untyped
def test_compiled_exported_and_checkpointed(form: str) -> None:
    layer = QuantLinear(quantized(form), torch.randn(6))
    x = torch.randn(4, 10, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    rows = torch.export.Dim("rows")
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes={"input": {0: rows}})
    more = torch.randn(7, 10)
    torch.testing.assert_close(program.module()(more), layer(more))
    for reentrant in (False, True):
        x.grad = None
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(x.grad, gradient)  # type: ignore[arg-type]
    exact = 2 * expected.double() @ layer.weight.double()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_bias_trains_and_codes_do_not() -> None:
    layer = QuantLinear(quantized(), nn.Parameter(torch.zeros(6)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(torch.randn(3, 10)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 3.0))  # type: ignore[union-attr]


def test_autocast_computes_as_a_linear_layer_does() -> None:
    layer = QuantLinear(quantized())
    x = torch.randn(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, F.linear(x, layer.weight), rtol=2**-6, atol=2**-5)


@pytest.mark.untyped
def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"^QuantLinear: quantized must be quantized weights"):
        QuantLinear(torch.rand(2, 3))  # type: ignore[arg-type]
    weights = rtn_quantize(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"^QuantLinear: bias must be of shape \(2,\)"):
        QuantLinear(weights, torch.zeros(3))
    with pytest.raises(TypeError, match=r"^QuantLinear: bias must be a floating-point tensor"):
        QuantLinear(weights, torch.zeros(2, dtype=torch.int64))


def test_a_transform_without_tensors_is_refused() -> None:
    class Unknown:
        def inverse(self, weight: Tensor) -> Tensor:
            return weight

        def to(self, device: torch.device | str) -> "Unknown":
            return self

    codes, one = torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 1)
    weights = QuantizedTensor(codes, one, one, bits=2, transform=Unknown())
    with pytest.raises(TypeError, match=r"transform must be one of tilework\.quant"):
        QuantLinear(weights)


def of_four_bits(rows: int = 32, columns: int = 128, **options: Any) -> QuantLinear:
    weight = torch.randn(rows, columns) + 0.1
    given = {"bits": 4, "group_size": 32, **options}
    return QuantLinear(rtn_quantize(weight, **given), torch.randn(rows).bfloat16())


def relative_error(output: Tensor, exact: Tensor) -> float:
    return float((output.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "minmax"])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_product_of_torch_is_as_exact_as_dequantized_weights(
    size: int, scheme: str, rows: int
) -> None:
    layer = of_four_bits(group_size=size, scheme=scheme)
    for x in (torch.randn(rows, 128), torch.rand(2, rows, 128)):
        x = x.bfloat16()
        output = layer(x)
        assert layer._prepared is not None
        assert (output.shape, output.dtype) == ((*x.shape[:-1], 32), torch.bfloat16)
        exact = x.double() @ layer.quantized.dequantize(torch.float64).mT + layer.bias.double()
        plain = F.linear(x, layer.quantized.dequantize(torch.bfloat16), layer.bias)
        assert relative_error(output, exact) <= 2 * relative_error(plain, exact) + 2**-8


def test_the_product_of_torch_follows_the_buffers() -> None:
    layer, other = of_four_bits(), of_four_bits()
    x = torch.randn(2, 128).bfloat16()
    first = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), first)
    layer.load_state_dict(of_four_bits().state_dict(), assign=True)
    changed = layer(x)
    assert not torch.equal(changed, other(x))
    layer.scale.mul_(2)
    assert not torch.equal(layer(x), changed)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied._prepared is None
        assert torch.equal(copied(x), layer(x))
    assert layer.to(torch.float16)._prepared is None
    assert set(layer.state_dict()) == {"packed_codes", "scale", "zero_point", "bias"}


def test_where_the_product_of_torch_is_not_taken() -> None:
    x = torch.randn(3, 128).bfloat16()
    for layer, input in [
        (of_four_bits(), x.float()),
        (of_four_bits(), x.clone().requires_grad_()),
        (of_four_bits(), torch.randn(600, 128).bfloat16()),
        (of_four_bits(), x[:0]),
        (of_four_bits(bits=3), x),
        (of_four_bits(group_size=16), x),
        (of_four_bits(group_size=None), x),
        (of_four_bits(axis="in"), x),
        (of_four_bits(rows=24), x),
        (of_four_bits(columns=144), torch.randn(3, 144).bfloat16()),
    ]:
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        layer.bias = None if bias is None else nn.Parameter(bias)
        expected = F.linear(input, layer.quantized.dequantize(input.dtype), bias)
        eps = 16 * torch.finfo(input.dtype).eps
        torch.testing.assert_close(layer(input), expected, rtol=eps, atol=eps)
        assert layer._prepared is None
    layer = of_four_bits()
    input = x.clone().requires_grad_()
    layer(input).sum().backward()
    exact = layer.quantized.dequantize(torch.bfloat16).sum(0).expand(3, 128)
    torch.testing.assert_close(input.grad, exact, rtol=2**-6, atol=2**-4)
    with torch.no_grad():
        layer(input)
    assert layer._prepared is not None
    layer(x).sum().backward()
    assert layer.bias is not None
    assert torch.equal(layer.bias.grad, torch.full((32,), 6.0).bfloat16())
