"""The calls that tests over all public functions run on."""

import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

import calls
from calls import Call

FUNCTIONS = calls.public_functions()


def test_every_public_function_of_tensors_has_a_call() -> None:
    left = FUNCTIONS.keys() - {call.name for call in calls.all_calls()}
    assert not left, "their test files must register calls with @samples.of(Call)"


@calls.every_call
def test_the_larger_problem_is_larger_and_valid(call: Call) -> None:
    pairs = zip(tree_leaves(call.draw()), tree_leaves(call.draw_larger()), strict=True)
    assert any(larger.numel() > tensor.numel() for tensor, larger in pairs)
    leaves = tree_leaves(call.run(**call.draw_larger()))
    assert leaves
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)


@calls.every_call
def test_gradients_reach_the_differentiable_arguments(call: Call) -> None:
    if not call.differentiable:
        pytest.skip("has no gradient")
    tensors = call.draw()
    results = [one for one in tree_leaves(call.run(**tensors)) if one.requires_grad]
    leaves = tree_leaves([tensors[name] for name in call.differentiable])
    for gradient in torch.autograd.grad([one.sum() for one in results], leaves):
        assert gradient.isfinite().all()
    assert set(call.differentiable) <= set(inspect.signature(call.by or call.function).parameters)
