"""What the tests share: the seed of the run, the error rule, dtypes and devices."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEED = int(os.environ.get("TILEWORK_SEED", "0"))
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_exact(
    actual: Tensor, composition: Tensor, truth: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Hold a result to the error rule of the project.

    Its error against the float64 ``truth`` is at most twice that of torch's own ``composition`` in
    the same dtype, plus one rounding unit of the output, both in the mean square. The largest
    element, which is a matter of luck, may have twice that. The composition's error counts as half
    a unit at least, for a single number half a unit of the computation's ``dtype``: it can be right
    by luck. nan and infinities stand where the truth has them. A float64 result, which the truth
    does not exceed in precision, is held to a float32 composition scaled by the rounding units,
    which double for the truth's own error.
    """
    assert truth.dtype == torch.float64
    scale, units = 1.0, 1
    if actual.dtype == torch.float64:
        assert composition.dtype == torch.float32, "compose in float32 for a float64 result"
        scale, units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps, 2
    assert actual.shape == truth.shape == composition.shape
    unit = units * torch.finfo(actual.dtype).eps
    luck = unit if dtype is None or truth.numel() > 1 else max(unit, torch.finfo(dtype).eps)
    actual, composition, truth = (t.detach().cpu().double() for t in (actual, composition, truth))
    regular = truth.isfinite()
    torch.testing.assert_close(actual[~regular], truth[~regular], rtol=0, atol=0, equal_nan=True)
    if not regular.any():
        return
    for norm, slack in ((2, 1), (torch.inf, 2)):
        error, allowed, size = (
            float(torch.linalg.vector_norm(t[regular], norm))
            for t in (actual - truth, composition - truth, truth)
        )
        limit = slack * (max(2 * scale * allowed, luck * size) + unit * size)
        assert error <= limit, f"error {error:.3g} in norm {norm}, at most {limit:.3g} allowed"


def clones(
    tensors: Iterable[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Leaves with the same values and ``requires_grad``, in another dtype if one is given."""
    return [
        None
        if tensor is None
        else tensor.detach()
        .to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype)
        .clone()
        .requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def of_numpy(values: dict[str, Any]) -> dict[str, Any]:
    """The same with scalars of NumPy in place of Python's numbers."""
    kinds = {int: np.int64, float: np.float64}
    return {
        name: kinds.get(type(value), lambda same: same)(value) for name, value in values.items()
    }


class Memory(TorchDispatchMode):
    """The largest number of bytes that operations held at once, without those of the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._inputs:
                    self._held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._held = {key: one for key, one in self._held.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return result
