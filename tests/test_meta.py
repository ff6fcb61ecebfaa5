"""Shapes and dtypes without values: on the meta device and under ``FakeTensorMode``."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import calls
from calls import Call, Tensors

pytestmark = pytest.mark.untyped
Kinds = list[tuple[torch.Size, torch.dtype]]


def kinds(call: Call, tensors: Tensors) -> Kinds:
    """The shapes and dtypes of results and gradients."""
    results = tree_leaves(call.run(**tensors))
    leaves = tree_leaves([tensors[name] for name in call.differentiable])
    sums = [result.sum() for result in results if result.requires_grad]
    gradients = torch.autograd.grad(sums, leaves) if leaves else ()
    return [(tensor.shape, tensor.dtype) for tensor in (*results, *gradients)]


@calls.every_call
def test_on_meta(call: Call) -> None:
    expected = kinds(call, call.draw(torch.bfloat16))
    tensors = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), call.tensors())
    for one in call.of_implementations():
        assert kinds(one, one.leaves(tensors, torch.bfloat16)) == expected, one.label


@calls.every_call
def test_under_fake_mode(call: Call) -> None:
    mode, tensors = FakeTensorMode(), call.draw(torch.float32)
    expected = kinds(call, tensors)
    fakes = tree_map_only(Tensor, mode.from_tensor, tensors)
    with mode:
        for one in call.of_implementations():
            assert kinds(one, fakes) == expected, one.label


@calls.every_call
def test_real_constants_under_fake_mode(call: Call) -> None:
    """Of which nothing may be read, as what comes of it has no values."""
    mode, tensors = FakeTensorMode(allow_non_fake_inputs=True), call.draw(torch.float32)
    expected = [result.shape for result in tree_leaves(call.run(**tensors))]
    first, *_ = tensors
    tensors[first] = tree_map_only(Tensor, mode.from_tensor, tensors[first])
    with mode:
        assert [result.shape for result in tree_leaves(call.run(**tensors))] == expected
