"""Quantized layers, and the time that rounding takes.

``linear``: a layer of 4 bits in groups of 128, of ``O`` outputs and ``I`` inputs, on ``N`` rows.
``gptq``: rounding of such a layer's weights, given the Hessian of its inputs; the result that is
compared is the loss, as single codes may lie between two levels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.bench.suites import Candidate, Case, Inputs, Results, Step, Suite, Unavailable
from tilework.quant import QuantizedTensor, QuantLinear, gptq_quantize, rtn_quantize

BITS, GROUP, DAMP, BLOCK = 4, 128, 0.01, 128
LINEAR, GPTQ = "linear", "gptq"


def cases(device: str) -> list[Case]:
    """A layer of a model of 7 billion parameters, at one row and at many; and its rounding."""
    size = {"O": 11008, "I": 4096}
    return [
        *(Case(LINEAR, {"N": rows, **size}, ("bfloat16", "float32")) for rows in (1, 16, 128)),
        Case(GPTQ, {"O": 4096, "I": 4096}, ("float32",)),
        Case(LINEAR, {"N": 1, "O": 512, "I": 512}, ("bfloat16",), quick=True),
        Case(GPTQ, {"O": 256, "I": 256}, ("float32",), quick=True),
    ]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Activations and codes, or weights and a Hessian."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = case.sizes

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    weight = drawn(sizes["O"], sizes["I"]) / sizes["I"] ** 0.5
    if case.kind == LINEAR:
        quantized = rtn_quantize(weight, bits=BITS, group_size=GROUP)
        return {
            "input": drawn(sizes["N"], sizes["I"]).to(dtype),
            "codes": quantized.codes,
            "scale": quantized.scale,
            "zero_point": quantized.zero_point,
        }
    rows = drawn(2 * sizes["I"], sizes["I"])
    rows += 0.5 * rows.roll(1, 1)
    return {"weight": weight, "hessian": rows.mT @ rows * (2 / len(rows))}


def _quantized(inputs: Inputs) -> QuantizedTensor:
    grid = inputs["codes"], inputs["scale"], inputs["zero_point"]
    return QuantizedTensor(*grid, bits=BITS, group_size=GROUP)


def truth(case: Case, inputs: Inputs) -> Results:
    """In float64: the product, or the loss of the algorithm written out."""
    if case.kind == LINEAR:
        return {"output": inputs["input"].double() @ _quantized(inputs).dequantize(torch.double).mT}
    weight, hessian = inputs["weight"].double(), inputs["hessian"].double()
    return {"loss": _loss(weight, _written_out(weight, hessian), hessian)}


def _loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    change = weight.double() - rounded.double()
    return (change @ hessian.double() * change).sum()


def _written_out(weight: Tensor, hessian: Tensor) -> Tensor:
    """GPTQ as its paper has it, row-major, with the factor of the inverse."""
    weight, result = weight.clone(), torch.empty_like(weight)
    diagonal = hessian.diagonal().mean() * DAMP
    damped = hessian + diagonal * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    levels = 2**BITS - 1
    for start in range(0, weight.shape[1], BLOCK):
        block = weight[:, start : start + BLOCK].clone()
        errors = torch.zeros_like(block)
        part = upper[start : start + BLOCK, start : start + BLOCK]
        for j in range(block.shape[1]):
            if j % GROUP == 0:
                group = block[:, j : j + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (high - low) / levels
                zero = (-low / scale).round()
            codes = (block[:, j] / scale + zero).round().clamp(0, levels)
            rounded = scale * (codes - zero)
            result[:, start + j] = rounded
            error = (block[:, j] - rounded) / part[j, j]
            block[:, j:] -= error.unsqueeze(1) * part[j, j:].unsqueeze(0)
            errors[:, j] = error
        weight[:, start + BLOCK :] -= errors @ upper[start : start + BLOCK, start + BLOCK :]
    return result


def flops(case: Case) -> int:
    """The product; or two factorizations and the updates of all columns."""
    sizes = case.sizes
    if case.kind == LINEAR:
        return 2 * sizes["N"] * sizes["O"] * sizes["I"]
    return sizes["O"] * sizes["I"] ** 2 + 2 * sizes["I"] ** 3 // 3


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Codes and grids in, and activations; or weights and the Hessian in, codes out."""
    sizes = case.sizes
    weights = sizes["O"] * sizes["I"]
    if case.kind == LINEAR:
        rows = sizes["N"] * (sizes["O"] + sizes["I"]) * dtype.itemsize
        return weights * BITS // 8 + weights // GROUP * 8 + rows
    return dtype.itemsize * weights + 4 * sizes["I"] ** 2 + weights * BITS // 8


Build = Callable[[Case, Inputs], Step]


def _ours(case: Case, inputs: Inputs) -> Step:
    if case.kind == LINEAR:
        layer = QuantLinear(_quantized(inputs))
        return Step(lambda: {"output": layer(inputs["input"])}, "QuantLinear", default=True)

    def run() -> Results:
        weight, hessian = inputs["weight"], inputs["hessian"]
        found = gptq_quantize(weight, hessian, bits=BITS, group_size=GROUP, damp=DAMP)
        return {"quantized": found.dequantize(), **inputs}

    return Step(run, "gptq_quantize", default=True)


def _plain(case: Case, inputs: Inputs) -> Step:
    if case.kind == LINEAR:
        quantized, x = _quantized(inputs), inputs["input"]
        return Step(
            lambda: {"output": F.linear(x, quantized.dequantize(x.dtype))}, "dequantize, F.linear"
        )

    def run() -> Results:
        return {"quantized": _written_out(inputs["weight"], inputs["hessian"]), **inputs}

    return Step(run, "the algorithm written out")


def _float(case: Case, inputs: Inputs) -> Step:
    if case.kind != LINEAR:
        raise Unavailable("it rounds no weights")
    x = inputs["input"]
    weight = _quantized(inputs).dequantize(x.dtype)
    return Step(lambda: {"output": F.linear(x, weight)}, f"F.linear of {x.dtype}")


def compared(results: Results) -> Results:
    """The loss of rounded weights; a product as it is."""
    if "quantized" not in results:
        return results
    return {"loss": _loss(results["weight"], results["quantized"], results["hessian"])}


SUITE = Suite(
    module=__name__,
    about="Layers of 4 bits, and the rounding of their weights",
    cases=cases,
    inputs=inputs,
    candidates=(
        Candidate("tilework", _ours, peer=False),
        Candidate("plain", _plain),
        Candidate("float weights", _float),
    ),
    composition="plain",
    truth=truth,
    flops=flops,
    products=True,
    traffic=traffic,
    rank=5,
    compared=compared,
)
