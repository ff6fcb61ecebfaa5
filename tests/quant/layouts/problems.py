"""Quantized weights, and words read bit by bit."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tilework.quant import QuantizedTensor


def drawn(
    rows: int, columns: int, bits: int, size: int | None, *, ordered: bool = True, least: int = 0
) -> QuantizedTensor:
    groups = 1 if size is None else columns // size
    options: dict[str, Any] = {"bits": bits, "group_size": size}
    if not ordered:
        index = torch.arange(columns) // (size or columns)
        options["group_index"] = index[torch.randperm(columns)]
    return QuantizedTensor(
        torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8),
        (torch.rand(rows, groups) + 0.1).half().float(),
        torch.randint(least, 2**bits, (rows, groups)).float(),
        **options,
    )


def read(stream: Tensor, bits: int, length: int) -> np.ndarray:
    """Codes along the last dimension of int32 words, each bit looked up by its place."""
    words = stream.numpy().astype(np.uint32)
    result = np.zeros((*words.shape[:-1], length), dtype=np.int64)
    for j in range(length):
        for k in range(bits):
            place = j * bits + k
            bit = words[..., place // 32] >> np.uint32(place % 32) & np.uint32(1)
            result[..., j] += bit.astype(np.int64) << k
    return result
