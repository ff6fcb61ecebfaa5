"""What holds for every straight-through function and module."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilework.quant import training

from calls import Tensors
from helpers import FLOATING
from quant.training.samples import FUNCTIONS, LAYERS, Layer, StraightThrough

every_function = pytest.mark.parametrize("sample", FUNCTIONS, ids=lambda sample: sample.label)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_the_table_is_whole() -> None:
    tried = {sample.function.__name__ for sample in FUNCTIONS} | {layer.label for layer in LAYERS}
    others = {
        "svid_decompose",
        "reste_exponent",
        "OscillationTracker",
        "qk_reparam_scores",
        "balanced_scale_init",
    }
    public = {name for name in training.__all__ if callable(getattr(training, name))}
    assert tried | others >= public


def problem(sample: StraightThrough) -> tuple[Tensors, Callable[..., Tensor], tuple[str, ...]]:
    """Arguments, the function of those that have gradients, and their names."""
    tensors = sample.tensors()
    _, gradients = sample.expected(torch.ones(4, 8, dtype=torch.float64), tensors)
    names = tuple(gradients)

    def function(*moving: Tensor) -> Tensor:
        return sample.run(**(tensors | dict(zip(names, moving, strict=True))))

    return tensors, function, names


def close(sample: StraightThrough, found: Tensor, truth: Tensor) -> None:
    size = truth.abs().max().item()
    torch.testing.assert_close(found, truth, rtol=sample.tolerance, atol=sample.tolerance * size)


@every_function
def test_values_and_gradients(sample: StraightThrough) -> None:
    tensors, function, names = problem(sample)
    moving = [tensors[name].requires_grad_() for name in names]
    upstream = torch.randn(4, 8, dtype=torch.float64)
    values, gradients = sample.expected(upstream, tensors)
    found = function(*moving)
    close(sample, found.detach(), values)
    for name, gradient in zip(names, torch.autograd.grad(found, moving, upstream), strict=True):
        close(sample, gradient, gradients[name])


@every_function
def test_no_other_argument_has_a_gradient(sample: StraightThrough) -> None:
    tensors, _, names = problem(sample)
    for tensor in tensors.values():
        tensor.requires_grad_()
    sample.run(**tensors).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == set(names)


@every_function
def test_forward_mode_and_double_backward(sample: StraightThrough) -> None:
    """Both are the transpose of the rule, which is linear in the gradient that comes."""
    tensors, function, names = problem(sample)
    moving = tuple(tensors[name].requires_grad_() for name in names)
    ways = tuple(torch.randn_like(tensor) for tensor in moving)
    upstream = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    _, tangents = torch.func.jvp(function, tuple(t.detach() for t in moving), ways)
    firsts = torch.autograd.grad(function(*moving), moving, upstream, create_graph=True)
    total = sum((first * way).sum() for first, way in zip(firsts, ways, strict=True))
    assert isinstance(total, Tensor)
    (of_upstream,) = torch.autograd.grad(total, upstream)
    for _ in range(3):
        other = torch.randn(4, 8, dtype=torch.float64)
        _, gradients = sample.expected(other, tensors)
        truth = sum((gradients[n] * way).sum() for n, way in zip(names, ways, strict=True))
        for found in (tangents, of_upstream):
            torch.testing.assert_close((other * found).sum(), truth, rtol=1e-11, atol=1e-11)


@every_function
def test_vmap_and_batched_gradients(sample: StraightThrough) -> None:
    first, second = sample.tensors(), sample.tensors()
    stacked = {name: torch.stack([first[name], second[name]]) for name in first}
    _, _, names = problem(sample)
    found = torch.vmap(lambda t: sample.run(**t))(stacked)
    for one, tensors in zip(found, (first, second), strict=True):
        torch.testing.assert_close(one, sample.run(**tensors), rtol=1e-14, atol=1e-14)
    gradients = torch.vmap(torch.func.grad(lambda t: sample.run(**t).square().sum()))(stacked)
    for name in names:
        for place, tensors in enumerate((first, second)):
            leaf = tensors[name].detach().requires_grad_()
            (truth,) = torch.autograd.grad(
                sample.run(**(tensors | {name: leaf})).square().sum(), leaf
            )
            torch.testing.assert_close(gradients[name][place], truth, rtol=1e-12, atol=1e-12)
    moving = [first[name].requires_grad_() for name in names]
    upstream = torch.randn(3, 4, 8, dtype=torch.float64)
    result = sample.run(**first)
    batched = torch.autograd.grad(
        result, moving, upstream, retain_graph=True, is_grads_batched=True
    )
    for place in range(3):
        single = torch.autograd.grad(result, moving, upstream[place], retain_graph=True)
        for ours, truth in zip(batched, single, strict=True):
            torch.testing.assert_close(ours[place], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.untyped
@every_function
def test_compilation_and_export(sample: StraightThrough) -> None:
    tensors, function, names = problem(sample)
    moving = [tensors[name].requires_grad_() for name in names]
    upstream = torch.randn(4, 8, dtype=torch.float64)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, truth = compiled(*moving), function(*moving)
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(found, moving, upstream)
    theirs = torch.autograd.grad(truth, moving, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    class Model(torch.nn.Module):
        def forward(self, tensors: Tensors) -> Tensor:
            return sample.run(**tensors)

    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    dynamic = {
        name: {0: torch.export.Dim.DYNAMIC} if tensor.shape[0] == 4 else None
        for name, tensor in plain.items()
    }
    program = torch.export.export(Model(), (plain,), dynamic_shapes=(dynamic,)).module()
    larger = {
        name: torch.cat([tensor, tensor]) if dynamic[name] else tensor
        for name, tensor in plain.items()
    }
    torch.testing.assert_close(program(larger), sample.run(**larger), rtol=1e-13, atol=1e-13)


@every_function
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_and_hooks(sample: StraightThrough, reentrant: bool) -> None:
    tensors, function, names = problem(sample)
    moving = [tensors[name].requires_grad_() for name in names]
    upstream = torch.randn(4, 8, dtype=torch.float64)
    truth = torch.autograd.grad(function(*moving), moving, upstream)
    result = checkpoint(function, *moving, use_reentrant=reentrant)
    assert isinstance(result, Tensor)
    result.backward(upstream)
    for tensor, gradient in zip(moving, truth, strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, gradient)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        result = function(*moving)
    for a, b in zip(torch.autograd.grad(result, moving, upstream), truth, strict=True):
        assert torch.equal(a, b)


@every_function
@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes_and_strides(sample: StraightThrough, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in sample.tensors().items()}
    _, _, names = problem(sample)
    for name in names:
        tensors[name].requires_grad_()
    found = sample.run(**tensors)
    assert found.dtype == dtype
    found.sum().backward()
    assert all(tensors[name].grad.dtype == dtype for name in names)
    strided = {
        name: tensor.detach().mT.contiguous().mT.expand(tensor.shape)
        for name, tensor in tensors.items()
    }
    assert torch.equal(sample.run(**strided), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample.run(**tensors), found)
    with torch.no_grad():
        assert not sample.run(**tensors).requires_grad


@every_function
def test_empty_and_meta(sample: StraightThrough) -> None:
    tensors, _, names = problem(sample)
    empty = {
        name: tensor[:0] if tensor.shape[0] == 4 else tensor for name, tensor in tensors.items()
    }
    for name in names:
        empty[name] = empty[name].detach().requires_grad_()
    result = sample.run(**empty)
    assert result.shape == (0, 8)
    result.sum().backward()
    assert all(empty[name].grad.shape == empty[name].shape for name in names)
    meta = sample.run(**{name: tensor.to("meta") for name, tensor in tensors.items()})
    assert (meta.device.type, meta.shape) == ("meta", (4, 8))


@every_layer
def test_state_and_copies(layer: Layer) -> None:
    torch.manual_seed(4)
    module = layer.make()
    assert tuple(module.state_dict()) == layer.state
    input = layer.draw()
    copied = copy.deepcopy(module)
    assert torch.equal(copied(input), module(input))
    other = layer.make()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(input), module(input))
    assert module.double()(input.double()).dtype == torch.float64
    assert module.bfloat16()(input.bfloat16()).dtype == torch.bfloat16
    if layer.state:
        meta = layer.make(device="meta")
        assert meta(input.to("meta")).shape == copied(input).shape
        meta.to_empty(device="cpu")
        torch.manual_seed(4)
        meta.reset_parameters()
        state = copied.state_dict()
        assert all(torch.equal(meta.state_dict()[name], state[name]) for name in state)


@pytest.mark.untyped
@every_layer
def test_a_step_compiled_and_checkpointed(layer: Layer) -> None:
    module = layer.make()
    input = layer.draw().requires_grad_()

    def step(run: Callable[[Tensor], Any]) -> list[Tensor]:
        moving = [input, *module.parameters()]
        return list(torch.autograd.grad(run(input).square().sum(), moving))

    truth = step(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    again = step(lambda x: checkpoint(module, x, use_reentrant=False))
    for found in (step(compiled), again):
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert any(gradient.any() for gradient in truth[1:] or truth)
    parameters = list(module.parameters())
    if parameters:
        before = [parameter.detach().clone() for parameter in parameters]
        compiled(input).square().sum().backward()
        torch.optim.SGD(parameters, 0.1).step()
        assert not all(map(torch.equal, parameters, before))
