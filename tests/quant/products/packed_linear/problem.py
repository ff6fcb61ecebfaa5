"""Products to solve, and what they are in float64 by plain loops."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.quant import packed_linear

from helpers import assert_exact


@dataclass
class Problem:
    """Inputs, and codes with grids whose zero-points are no integers."""

    input: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bits: int
    group_size: int | None

    @classmethod
    def draw(
        cls,
        rows: tuple[int, ...],
        columns: int,
        outputs: int,
        bits: int,
        group_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
    ) -> "Problem":
        groups = 1 if group_size is None else -(-columns // group_size)
        return cls(
            torch.randn(*rows, columns).to(dtype),
            torch.randint(256, (outputs, -(-columns * bits // 8)), dtype=torch.uint8),
            torch.rand(outputs, groups) + 0.1,
            2**bits * torch.rand(outputs, groups),
            torch.randn(outputs).to(dtype) if bias else None,
            bits,
            group_size,
        )

    def weight(self) -> Tensor:
        """The weights in float64, by NumPy and a loop over columns."""
        columns = self.input.shape[-1]
        stream = np.unpackbits(self.packed.cpu().numpy(), axis=1, bitorder="little")
        scale, zero_point = (one.double().cpu() for one in (self.scale, self.zero_point))
        weight = torch.empty(len(stream), columns, dtype=torch.float64)
        for column in range(columns):
            part = stream[:, column * self.bits : (column + 1) * self.bits]
            code = torch.from_numpy(part @ (1 << np.arange(self.bits))).double()
            group = 0 if self.group_size is None else column // self.group_size
            weight[:, column] = scale[:, group] * (code - zero_point[:, group])
        return weight

    def solve(self, implementation: str | None, grad: Tensor) -> list[Tensor]:
        """The output and the gradients of input and bias."""
        leaves = [
            one.detach().requires_grad_() for one in (self.input, self.bias) if one is not None
        ]
        output = packed_linear(
            leaves[0],
            self.packed,
            self.scale,
            self.zero_point,
            *leaves[1:],
            bits=self.bits,
            group_size=self.group_size,
            implementation=implementation,
        )
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def composed(self, dtype: torch.dtype, grad: Tensor) -> list[Tensor]:
        """The same by torch's composition."""
        leaves = [
            one.detach().cpu().to(dtype).requires_grad_()
            for one in (self.input, self.bias)
            if one is not None
        ]
        output = F.linear(leaves[0], self.weight().to(dtype), *leaves[1:])
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.cpu().to(dtype))]

    def check(self, implementation: str | None) -> list[Tensor]:
        """Hold an implementation to the error rule."""
        grad = torch.randn(*self.input.shape[:-1], len(self.packed)).to(self.input)
        found = self.solve(implementation, grad)
        dtype = self.input.dtype
        ours = torch.float32 if dtype == torch.float64 else dtype
        composed, truth = self.composed(ours, grad), self.composed(torch.float64, grad)
        for actual, other, exact in zip(found, composed, truth, strict=True):
            assert actual.dtype == dtype
            assert_exact(actual, other, exact)
        return found
