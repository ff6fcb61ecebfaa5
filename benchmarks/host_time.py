"""The time that a call spends on the host, on a machine without a GPU: kernels are not launched.

    python benchmarks/host_time.py

prints microseconds of the process for each call, the best of several runs.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the module of kernels is imported

import torch

from tilework.norms import layer_norm, rms_norm
from tilework.norms._row_norm import triton as kernels
from tilework.optim import AdamW, Lion
from tilework.optim._optimizer import step
from tilework.optim._optimizer import triton as optimizer_kernels


class NoKernel:
    """Takes a kernel's place and its arguments, and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **options: None


def microseconds(function: Callable[[], Any], calls: int, runs: int = 7) -> float:
    """The least time of a call over some runs of many."""
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        for _ in range(calls):
            function()
        seconds.append(time.process_time() - start)
    return min(seconds) / calls * 1e6


def host_times(calls: int) -> dict[str, float]:
    """Microseconds by what is called, of a few rows of 128 features."""
    input, residual = torch.randn(2, 64, 128)
    weight, bias = torch.ones(128), torch.zeros(128)
    options: dict[str, Any] = {"implementation": "triton"}
    functions = {
        "rms_norm": lambda: rms_norm(input, 128, weight, **options),
        "rms_norm, residual": lambda: rms_norm(input, 128, weight, residual=residual, **options),
        "layer_norm": lambda: layer_norm(input, 128, weight, bias, **options),
    }
    times = {}
    for gradients in ("", ", with gradients"):
        for tensor in (input, weight, bias, residual):
            tensor.requires_grad_(bool(gradients))
        for name, function in functions.items():
            times[name + gradients] = microseconds(function, calls)
    output = functions["rms_norm"]()
    upstream = torch.ones_like(output)  # type: ignore[arg-type]
    times["rms_norm, backward"] = microseconds(
        lambda: torch.autograd.grad(output, (input, weight), upstream, retain_graph=True), calls
    )
    return times


def optimizer_times(calls: int) -> dict[str, float]:
    """Microseconds of a step of 200 tensors; torch's is without its operators but the counters'."""
    parameters = [torch.nn.Parameter(torch.randn(8)) for _ in range(200)]
    for parameter in parameters:
        parameter.grad = torch.randn(8)
    times = {}
    for kind in (AdamW, Lion):
        optimizer = kind(parameters)
        optimizer.step()
        times[f"{kind.__name__}, 200 tensors"] = microseconds(optimizer.step, calls)
    torchs = torch.optim.AdamW(parameters, foreach=True)
    torchs.step()
    count = torch._foreach_add_

    def only_counters(tensors: Any, *others: Any, **options: Any) -> None:
        if not tensors[0].dim():
            count(tensors, *others, **options)

    patches = {
        name: (lambda *args, **options: None) if name.endswith("_") else lambda first, *args: first
        for name in dir(torch)
        if name.startswith("_foreach")
    }
    with mock.patch.multiple(torch, **patches | {"_foreach_add_": only_counters}):
        times["torch's AdamW, foreach"] = microseconds(torchs.step, calls)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Host time of calls, without launching kernels")
    parser.add_argument("--calls", type=int, default=2000, help="calls of a run (default 2000)")
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    with (
        mock.patch.object(kernels, "forward_kernel", NoKernel()),
        mock.patch.object(kernels, "backward_kernel", NoKernel()),
        mock.patch.object(optimizer_kernels, "step_kernel", NoKernel()),
        mock.patch.object(optimizer_kernels, "_table", functools.cache(lambda *key: None)),
        mock.patch.object(step, "_KERNEL_DEVICES", ("cpu",)),
    ):
        for name, time_ in (host_times(calls) | optimizer_times(max(1, calls // 20))).items():
            print(f"{name:32} {time_:6.1f} us")


if __name__ == "__main__":
    main()
