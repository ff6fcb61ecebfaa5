"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path

import pytest
import torch

from tilework.norms._row_norm import IMPLEMENTATIONS as TABLE

import ahead_of_time
from helpers import dtype_name

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
