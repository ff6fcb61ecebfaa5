"""What the tests share: the seed of the run, the error rule, dtypes and devices."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEED = int(os.environ.get("TILEWORK_SEED", "0"))
DRAWS = 16  # of a test whose own draw exceeds the error rule
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Comparison = tuple[Tensor, Tensor, Tensor, torch.dtype | None]
_noted: list[Comparison] | None = None  # while a test is drawn again


class Inexact(AssertionError):
    """An error exceeds what the error rule allows, by so little that it may be bad luck."""


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

    A test whose own draw exceeds this, by no more than a factor of 2, is drawn again and judged by
    ``assert_exact_over_draws``.
    """
    assert truth.dtype == torch.float64
    assert actual.shape == truth.shape == composition.shape
    if _noted is not None:
        _noted.append((actual, composition, truth, dtype))
        return
    scale, units = 1.0, 1
    if actual.dtype == torch.float64:
        assert composition.dtype == torch.float32, "compose in float32 for a float64 result"
        scale, units = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps, 2
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
        if not error <= limit:
            kind = Inexact if error <= 2 * limit else AssertionError
            raise kind(f"error {error:.3g} in norm {norm}, at most {limit:.3g} allowed")


def assert_exact_over_draws(test: Callable[[], object]) -> None:
    """Hold what a test compares to the error rule, all draws of a result as one tensor.

    Errors of two equally good computations of one small problem often differ by more than a factor
    of 2: a few elements make most of them, or one of the two is exact by luck, as the softmax of a
    single class is. Over ``DRAWS`` draws, the run's own among them, this evens out, while digits
    that are lost each time stay lost. The rule means this; one draw that passes stands for all,
    as it is cheaper. Draws that compare more or fewer results than the run's own do not count.
    """
    global _noted
    draws: list[list[Comparison]] = []
    try:
        for draw in range(DRAWS):
            torch.manual_seed(SEED + draw)
            _noted = []
            test()
            draws.append(_noted)
    finally:
        _noted = None
    for result in zip(*(draw for draw in draws if len(draw) == len(draws[0])), strict=True):
        *tensors, dtypes = zip(*result, strict=True)
        actual, composition, truth = (torch.cat([t.flatten() for t in each]) for each in tensors)
        assert_exact(actual, composition, truth, dtypes[0])


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
