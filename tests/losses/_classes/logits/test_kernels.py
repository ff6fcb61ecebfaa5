"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ahead_of_time
from helpers import DEVICES, HALF, assert_exact, dtype_name
from losses._classes.logits.problem import DIFFERENTIABLE, definition, draw_targets, measured


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"statistics_kernel", "gradient_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report


@pytest.mark.parametrize("room", ["tiled", "triton"])
@pytest.mark.parametrize("shape", [(600, 5), (3, 600), (2, 5, 300), (600, 3, 2)])
def test_addresses_beyond_32_bits(shape: tuple[int, ...], room: str) -> None:
    """What lies 2**22 elements apart, in memory of which only little is ever touched."""
    far = max(range(len(shape)), key=lambda dim: shape[dim])
    strides, step = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        if dim != far:
            strides[dim], step = step, step * shape[dim]
    strides[far] = 2**23
    assert strides[far] * (shape[far] - 1) > 2**31
    memory = mmap.mmap(-1, 2 * shape[far] << 23)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    spread = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, strides).normal_()
    target = draw_targets(spread)
    leaves = spread.requires_grad_(), spread.detach().contiguous().requires_grad_()
    results, expected = (measured(leaf, target, room=room) for leaf in leaves)
    torch.testing.assert_close(results, expected)
    gradients = [
        torch.autograd.grad(found.moment.sum() + found.target_gap.sum(), leaf)[0]
        for found, leaf in zip((results, expected), leaves, strict=True)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.untyped
@pytest.mark.parametrize("device", DEVICES)
def test_nan_shows_in_what_is_largest(device: str) -> None:
    """Which a GPU's maximum passes over, unlike the interpreter's."""
    input = torch.randn(5, 9000 if device == "cuda" else 100, device=device)
    input[2, 70] = torch.nan
    found = measured(input, torch.zeros(5, dtype=torch.int64, device=device), room="triton")
    for name in ("shift", "total", "target_gap", "squares", "moment"):
        assert getattr(found, name).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    "shape", [(1, 1), (8192, 7), (1000, 1000), (64, 262144), (4, 21, 4099), (2, 151, 128 * 128)]
)
def test_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = (3 * torch.randn(shape, device="cuda")).to(dtype)
    target, weight = draw_targets(input.cpu()).cuda(), torch.rand(shape[1], device="cuda")
    upstream = torch.rand(len(DIFFERENTIABLE), *target.shape, device="cuda") + 0.5

    def solve(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaf = input.to(dtype, copy=True).requires_grad_()
        found = function(leaf, target, weight)
        values = [getattr(found, name) for name in DIFFERENTIABLE]
        loss = sum((value * of.to(value)).sum() for value, of in zip(values, upstream, strict=True))
        return [*values, *torch.autograd.grad(loss, leaf)]  # type: ignore[arg-type]

    def kernels(*arguments: Tensor) -> Any:
        return measured(*arguments, room="triton")

    actual, again = solve(kernels, dtype), solve(kernels, dtype)
    composition, truth = solve(definition, dtype), solve(definition, torch.float64)
    for result, second, *others in zip(actual, again, composition, truth, strict=True):
        assert torch.equal(result, second)
        assert_exact(result, *others, dtype)
