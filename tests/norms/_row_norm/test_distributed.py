"""Tensors that are spread over processes, against the same tensors in one."""

from typing import Any

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
        for shape in ((7, 5, 8), (7, 5, 8), (8,), (8,), (7, 5, 8))  # no half of 7 or 5
    ]


def results(tensors: list[Tensor], implementation: str | None = None) -> list[Tensor]:
    """Outputs and gradients of both norms, with and without a residual."""
    *leaves, upstream = tensors
    input, residual, weight, bias = leaves
    found = []
    chosen: dict[str, Any] = {"implementation": implementation}
    for outputs in (
        [rms_norm(input, 8, weight, **chosen)],
        [layer_norm(input, 8, weight, bias, **chosen)],
        list(rms_norm(input, 8, weight, residual=residual, **chosen)),
        list(layer_norm(input, 8, weight, bias, residual=residual, **chosen)),
    ):
        loss = sum((output * upstream).sum() for output in outputs)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
        found += [*outputs, *(grad for grad in grads if grad is not None)]
    return found


def spread() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    everything = []
    # "tiled" is an operator of ours, as "triton" is; "torch" is made of torch's, which refuses
    # sharded features.
    cases = [("tiled", 0), ("tiled", 1), ("tiled", 2), ("torch", 0), ("torch", 1)]
    for implementation, dim in cases:
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
        found = results(tensors, implementation)
        assert all(isinstance(value, DTensor) for value in found)
        assert found[0].shape == (7, 5, 8)
        if dim < 2:  # the features themselves are gathered
            assert found[0].placements == (Shard(dim),)  # type: ignore[attr-defined]
        everything.append([value.full_tensor().detach() for value in found])  # type: ignore[attr-defined]
    return everything


def test_distributed_tensors_equal_one_process() -> None:
    tensors = problem()
    expected = results([tensor.requires_grad_() for tensor in tensors[:-1]] + tensors[-1:])
    for by_case in processes.run(spread, 2):
        for found in by_case:
            for value, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(value, truth.detach(), rtol=1e-10, atol=1e-10)


def spread_heads() -> list[list[Tensor]]:
    """Heads with weights of their own, compiled and not, over two processes."""
    mesh = init_device_mesh("cpu", (2,))
    everything = []
    for run in (torch.compile(normed_heads, fullgraph=True, backend="aot_eager"), normed_heads):
        input, weight = (
            distribute_tensor(tensor, mesh, [Shard(dim)]).requires_grad_()
            for tensor, dim in zip(heads(), (1, 0), strict=True)
        )
        output = run(input, weight)
        grads = torch.autograd.grad(output.square().sum(), (input, weight))
        assert output.placements == grads[0].placements == (Shard(1),)
        assert grads[1].placements == (Shard(0),)
        everything.append([value.full_tensor().detach() for value in (output, *grads)])
    return everything


def heads() -> tuple[Tensor, Tensor]:
    input, *_, weight = problem()
    return input, weight[0]


def normed_heads(input: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(input, 8, weight, implementation="tiled")  # type: ignore[return-value]


def test_heads_stay_where_they_are() -> None:
    leaves = [tensor.requires_grad_() for tensor in heads()]
    output = normed_heads(*leaves)
    expected = (output, *torch.autograd.grad(output.square().sum(), leaves))
    for by_case in processes.run(spread_heads, 2):
        for found in by_case:
            for value, truth in zip(found, expected, strict=True):
                torch.testing.assert_close(value, truth.detach(), rtol=1e-10, atol=1e-10)
