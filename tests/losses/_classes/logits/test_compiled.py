"""What compilers are given of losses over logits: few loops, and the same numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.testing import assert_close

from tilework.losses import (
    cross_entropy_with_z_loss,
    error_norm_truncation_loss,
    number_token_cross_entropy,
)

pytestmark = pytest.mark.untyped  # traces
CLASSES = 13
VALUES = torch.tensor([1.0, torch.nan, 4.0, -2.5] + [torch.nan] * (CLASSES - 4))


def plain(input: Tensor, target: Tensor) -> Tensor:
    return cross_entropy_with_z_loss(input, target, z_loss=0.01)


def truncated(input: Tensor, target: Tensor) -> Tensor:
    return error_norm_truncation_loss(input, target, threshold=1.2)


def numbers(input: Tensor, target: Tensor) -> Tensor:
    return number_token_cross_entropy(input, target, VALUES)


def squares(input: Tensor, target: Tensor) -> Tensor:
    return number_token_cross_entropy(input, target, VALUES, kind="mse")


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor]:
    """Positions that are ignored, sure, of words, of numbers, and without logits of numbers."""
    input = 3 * torch.randn(8, CLASSES)
    target = torch.tensor([0, 5, -100, 2, 7, 3, -100, 0])
    input[1, VALUES.isfinite()] = -torch.inf
    input[2, 3], input[6, 0] = torch.nan, torch.inf
    input[4, 7] = 100.0
    input[7, 0] = -100.0
    return input, target


@pytest.mark.parametrize("loss", [plain, truncated, numbers, squares])
@pytest.mark.parametrize("inner", [(), (3,)], ids=["rows", "images"])
def test_numbers_are_those_of_eager_mode(
    loss: Callable[..., Tensor], inner: tuple[int, ...], tensors: tuple[Tensor, Tensor]
) -> None:
    input, target = (
        tensor.reshape(*tensor.shape, *[1] * len(inner)).expand(*tensor.shape, *inner)
        for tensor in tensors
    )
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = input.clone().requires_grad_()
        value = function(leaf, target)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    (expected, expected_gradient), (actual, gradient) = results
    assert expected.isfinite()
    assert_close(actual, expected)
    assert_close(gradient, expected_gradient)
    assert not gradient[target == -100 if not inner else (target == -100)[:, 0]].any()


@pytest.mark.parametrize("loss", [plain, numbers])
def test_no_mask_is_stored(loss: Callable[..., Tensor], tensors: tuple[Tensor, Tensor]) -> None:
    """One that the gradient needs would be made before the loops over classes, and split them."""
    stored: list[Any] = []

    def forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        stored.extend(node.meta["val"] for node in graph.graph.output_node().args[0])
        return graph

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    input, target = tensors
    compiled(input.requires_grad_(), target)
    assert len(stored) > 2
    assert not any(tensor.dtype == torch.bool for tensor in stored)
