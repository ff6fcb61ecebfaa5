"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from tilework.norms._row_norm import IMPLEMENTATIONS as TABLE

import ahead_of_time
from helpers import assert_exact, dtype_name
from norms._row_norm.problem import Problem

HALF_AND_SINGLE = next(entry for entry in TABLE if entry.name == "triton").dtypes


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture() -> None:
    reports = ahead_of_time.compiled(Path(__file__).with_name("launches.py"))
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"forward_kernel", "backward_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report


@pytest.mark.parametrize("arch", [*ahead_of_time.SHARED_MEMORY, "sm_120"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=dtype_name)
def test_configurations_cover_every_size(dtype: torch.dtype, arch: str) -> None:
    from tilework.norms._row_norm import triton

    lanes = triton.LANES.get(arch, triton.USUAL_LANES)
    for num_features in (1, 2, 3, 64, 255, 256, 4096, 8193, 16384, 16385, 2**18, 2**21):
        for num_sums in (None, 0, 1, 2):
            config = triton.choose_config(arch, dtype, num_features, num_sums)
            rows, columns, warps = (
                config[name] for name in ("BLOCK_ROWS", "BLOCK_COLUMNS", "num_warps")
            )
            assert config["HELD"] == (num_features <= columns)
            for value in (rows, columns, warps):
                assert value & (value - 1) == 0
            assert 1 <= warps * lanes <= triton.THREADS
            if num_features <= 256:
                assert config["HELD"]
                assert rows * num_features > 1
            # A program holds no more than its registers can.
            assert rows * columns <= 16384


@pytest.mark.gpu
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_cuda_graph(centered: bool) -> None:
    options = {"weight": torch.bfloat16, "residual": torch.bfloat16}
    problem = Problem.random(centered, (300, 1000), torch.bfloat16, **options).to(device="cuda")
    expected = problem.solve(lambda one: one.run("triton"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.solve(lambda one: one.run("triton"))
    graph.replay()
    for name, result in captured.items():
        assert torch.equal(result, expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=dtype_name)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (999, 7), (4, 33, 128), (300, 1000), (300, 4096), (70, 16384), (5, 40000), (3, 2**18)],
)
def test_on_a_gpu(shape: tuple[int, ...], centered: bool, dtype: torch.dtype) -> None:
    for options in (
        {"weight": dtype},
        {"weight": dtype, "bias": dtype, "residual": dtype, "offset": 1.0},
        {"weight": torch.float32, "heads": not centered and len(shape) > 2},
    ):
        problem = Problem.random(centered, shape, dtype, **options)  # type: ignore[arg-type]
        on_device = problem.to(device="cuda")
        actual, again = (on_device.solve(lambda one: one.run("triton")) for _ in range(2))
        composition = on_device.to(device="cuda").solve(Problem.composed)
        truth = problem.truth()
        for name, result in actual.items():
            assert torch.equal(result, again[name])
            assert_exact(result, composition[name].to(result.dtype), truth[name])
