"""Problems for the tests of row normalization, their float64 truth, and what torch makes of them.

The truth goes row by row through the definition and its derivative, with exact sums.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.norms import layer_norm, rms_norm

from helpers import clones

IMPLEMENTATIONS = ("triton", "torch", "tiled", "reference")
EXACT = ("torch", "tiled", "reference")  # these take float64
SIZES = (1, 7, 63, 100)
Results = dict[str, Tensor]


@dataclass
class Problem:
    """The tensors of one call, as leaves that require gradients, and its options."""

    centered: bool
    input: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-3
    offset: float = 0.0
    upstream: list[Tensor] = field(default_factory=list)

    @classmethod
    def random(
        cls,
        centered: bool,
        shape: tuple[int, ...] = (4, 3, 9),
        dtype: torch.dtype = torch.float32,
        *,
        residual: torch.dtype | None = None,
        weight: torch.dtype | None = None,
        bias: torch.dtype | None = None,
        heads: bool = False,
        offset: float = 0.0,
    ) -> "Problem":
        """Normalization over the last dimension, with tensors of the dtypes that are given."""
        parameter = shape[-2:] if heads else shape[-1:]

        def leaf(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else torch.randn(shape).to(dtype).requires_grad_()

        problem = cls(
            centered,
            torch.randn(shape).to(dtype).requires_grad_(),
            leaf(shape, residual),
            leaf(parameter, weight),
            leaf(parameter, bias) if centered else None,
            offset=0.0 if centered else offset,
        )
        dtypes = [dtype] if residual is None else [dtype, problem.sum_dtype]
        problem.upstream = [torch.randn(shape).to(dtype) for dtype in dtypes]
        return problem

    @property
    def sum_dtype(self) -> torch.dtype:
        """The wider dtype of the two, but float64 for float64 input alone."""
        if self.residual is None or self.input.dtype == torch.float64:
            return self.input.dtype
        wider = (self.input + self.residual).dtype
        return torch.float32 if wider == torch.float64 else wider

    @property
    def leaves(self) -> dict[str, Tensor]:
        names = ("input", "residual", "weight", "bias")
        return {name: leaf for name in names if (leaf := getattr(self, name)) is not None}

    def to(self, dtype: torch.dtype | None = None, device: str = "cpu") -> "Problem":
        """The same values in new leaves."""
        tensors = clones((self.input, self.residual, self.weight, self.bias), dtype)
        leaves = [t if t is None else t.detach().to(device).requires_grad_() for t in tensors]
        upstream = [tensor.to(device, dtype or tensor.dtype) for tensor in self.upstream]
        names = ("input", "residual", "weight", "bias")
        return replace(self, upstream=upstream, **dict(zip(names, leaves, strict=True)))

    def run(self, implementation: str | None = None) -> tuple[Tensor, ...]:
        """The outputs of the public function."""
        options: dict[str, Any] = {"residual": self.residual, "implementation": implementation}
        size = self.input.shape[-1]
        if self.centered:
            result = layer_norm(self.input, size, self.weight, self.bias, self.eps, **options)
        else:
            options["weight_offset"] = self.offset
            result = rms_norm(self.input, size, self.weight, self.eps, **options)
        return result if isinstance(result, tuple) else (result,)

    def composed(self) -> tuple[Tensor, ...]:
        """Torch's norm, of torch's sum; in the computation dtype if the dtypes are not all one."""
        dtypes = {leaf.dtype for leaf in self.leaves.values()}
        plain = self.residual is None and not self.offset and len(dtypes) == 1
        dtype = torch.float64 if self.input.dtype == torch.float64 else torch.float32
        total, residual, gain, shift = (
            t if t is None or plain else t.to(dtype)
            for t in (self.input, self.residual, self.weight, self.bias)
        )
        assert total is not None
        total = total if residual is None else total + residual
        size = total.shape[-1:]
        gain = gain if gain is None else gain + self.offset
        if self.centered:
            output = F.layer_norm(total, size, gain, shift, self.eps)
        elif gain is not None and gain.dim() > 1:
            output = F.rms_norm(total, size, None, self.eps) * gain
        else:
            output = F.rms_norm(total, size, gain, self.eps)
        outputs = (output.to(self.input.dtype), total.to(self.sum_dtype))
        return outputs if residual is not None else outputs[:1]

    def solve(self, run: Callable[["Problem"], Iterable[Tensor]]) -> Results:
        """Outputs and gradients."""
        outputs = tuple(run(self))
        leaves = self.leaves
        grads = torch.autograd.grad(outputs, list(leaves.values()), self.upstream)
        named = zip(("output", "sum"), outputs, strict=False)
        return dict(named) | {
            f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)
        }

    def truth(self) -> Results:
        """The definition and its derivative in float64."""
        features = self.input.shape[-1]
        parts = (self.input, self.residual)
        total = sum(t.detach().cpu().double() for t in parts if t is not None)
        assert isinstance(total, Tensor)
        rows = total.reshape(-1, features).tolist()
        grad_output = self.upstream[0].cpu().double().reshape(-1, features).tolist()
        gains = self._rows_of(self.weight, self.offset, 1.0)
        shifts = self._rows_of(self.bias, 0.0, 0.0)
        outputs, grads = [], []
        weight_terms: list[list[list[float]]] = [[[] for _ in row] for row in gains]
        bias_terms: list[list[list[float]]] = [[[] for _ in row] for row in shifts]
        for number, (row, upper) in enumerate(zip(rows, grad_output, strict=True)):
            gain, shift = gains[number % len(gains)], shifts[number % len(shifts)]
            mean = math.fsum(row) / features if self.centered else 0.0
            variance = math.fsum((s - mean) ** 2 for s in row) / features
            rstd = 1 / math.sqrt(variance + self.eps)
            normal = [(s - mean) * rstd for s in row]
            outputs.append([s * g + b for s, g, b in zip(normal, gain, shift, strict=True)])
            scaled = [u * g for u, g in zip(upper, gain, strict=True)]
            c2 = math.fsum(scaled) / features if self.centered else 0.0
            c1 = math.fsum(u * s for u, s in zip(scaled, normal, strict=True)) / features
            grads.append([rstd * (u - c2 - s * c1) for u, s in zip(scaled, normal, strict=True)])
            for column, u, s in zip(range(features), upper, normal, strict=True):
                weight_terms[number % len(gains)][column].append(u * s)
                bias_terms[number % len(shifts)][column].append(u)

        def tensor(values: list[list[float]], shape: torch.Size) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).reshape(shape)

        def summed(terms: list[list[list[float]]], shape: torch.Size) -> Tensor:
            return tensor([[math.fsum(column) for column in row] for row in terms], shape)

        results = {"output": tensor(outputs, total.shape)}
        grad_sum = tensor(grads, total.shape)
        if self.residual is not None:
            results["sum"] = total
            grad_sum = grad_sum + self.upstream[1].cpu().double()
            results["grad residual"] = grad_sum
        results["grad input"] = grad_sum
        if self.weight is not None:
            results["grad weight"] = summed(weight_terms, self.weight.shape)
        if self.bias is not None:
            results["grad bias"] = summed(bias_terms, self.bias.shape)
        return results

    def _rows_of(
        self, parameter: Tensor | None, offset: float, default: float
    ) -> list[list[float]]:
        """A parameter as a row for each head, or for all of them."""
        features = self.input.shape[-1]
        if parameter is None:
            return [[default] * features]
        values = parameter.detach().cpu().double() + offset
        rows: list[list[float]] = values.reshape(-1, features).tolist()
        return rows
