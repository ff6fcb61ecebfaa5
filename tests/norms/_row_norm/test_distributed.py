"""Tensors that are spread over processes, against the same tensors in one."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tilework.norms import layer_norm, rms_norm

import processes


def problem() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 6, 8), (4, 6, 8), (8,), (8,), (4, 6, 8))
    ]


def results(tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of both norms, with and without a residual."""
    *leaves, upstream = tensors
    input, residual, weight, bias = leaves
    found = []
    for outputs in (
        [rms_norm(input, 8, weight)],
        [layer_norm(input, 8, weight, bias)],
        list(rms_norm(input, 8, weight, residual=residual)),
        list(layer_norm(input, 8, weight, bias, residual=residual)),
    ):
        loss = sum((output * upstream).sum() for output in outputs)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
        found += [*outputs, *(grad for grad in grads if grad is not None)]
    return found


def spread() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    everything = []
    for dim in (0, 1):
        *tokens, weight, bias, upstream = problem()
        tensors = [
            distribute_tensor(tensor, mesh, [placement]).requires_grad_()
            for tensor, placement in (
                *((tensor, Shard(dim)) for tensor in tokens),
                (weight, Replicate()),
                (bias, Replicate()),
            )
        ]
        tensors.append(distribute_tensor(upstream, mesh, [Shard(dim)]))
        found = results(tensors)
        assert all(isinstance(value, DTensor) for value in found)
        assert found[0].placements == (Shard(dim),)  # type: ignore[attr-defined]
        everything.append([value.full_tensor().detach() for value in found])  # type: ignore[attr-defined]
    return everything


def test_distributed_tensors_equal_one_process() -> None:
    tensors = problem()
    expected = results([tensor.requires_grad_() for tensor in tensors[:-1]] + tensors[-1:])
    for by_dim in processes.run(spread, 2):
        for found in by_dim:
            for value, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(value, truth.detach(), rtol=1e-10, atol=1e-10)
