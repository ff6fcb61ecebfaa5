import os
import sys

import pytest
import torch
import torch.nn.functional as F

from tilework.bench import kernels

CPU = torch.device("cpu")


def test_the_operators_that_took_the_time_are_named() -> None:
    left = torch.randn(300, 300)
    assert kernels.names(lambda: (left @ left).sum(), CPU)[0] == "aten::mm"
    query = torch.randn(1, 1, 200, 16)
    found = kernels.names(lambda: F.scaled_dot_product_attention(query, query, query), CPU)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in found
    assert len(found) <= kernels.MOST


def test_a_run_that_does_nothing_has_no_operators() -> None:
    assert kernels.names(lambda: None, CPU) == []


def test_the_profiler_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    kernels.names(lambda: torch.ones(3) + 1, CPU)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"back again")
    sys.stderr.flush()
    assert capfd.readouterr().err == "back again"


def test_an_error_leaves_the_terminal_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kernels.names(fail, CPU)
    os.write(2, b"back again")
    assert capfd.readouterr().err == "back again"


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_named() -> None:
    device = torch.device("cuda")
    left = torch.randn(2048, 2048, device=device)
    assert kernels.names(lambda: left @ left, device)
