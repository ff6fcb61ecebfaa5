"""Transforms of PyTorch, applied to every implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tilework.norms import LayerNorm, RMSNorm, layer_norm, rms_norm
from tilework.norms._row_norm import reference
from tilework.norms._row_norm import torch as fused
from tilework.norms._row_norm.common import Backward, RowNorm

from helpers import DEVICES, FLOATING, clones
from norms._row_norm.problem import EXACT, IMPLEMENTATIONS, Problem

pytestmark = pytest.mark.untyped
Norm = Callable[..., Any]
NORMS: dict[str, Norm] = {
    "rms": partial(rms_norm, normalized_shape=5, eps=0.1, weight_offset=0.5),
    "layer": partial(layer_norm, normalized_shape=5, eps=0.1),
}
by_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

INPUT, RESIDUAL = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
WEIGHT, BIAS = torch.zeros(2, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (INPUT, RESIDUAL, WEIGHT, BIAS):
        tensor.normal_()


def product(norm: Norm, *tensors: Tensor, **options: Any) -> Tensor:
    """Of both results, for input, residual, weight and, if the norm has one, bias."""
    input, residual, *parameters = tensors
    if norm.func is rms_norm:  # type: ignore[attr-defined]
        parameters = parameters[:1]
    names = ("weight", "bias")
    options |= dict(zip(names, parameters, strict=False))
    output, total = norm(input, residual=residual, **options)
    return output * total.sin()


def composed(norm: Norm, *tensors: Tensor) -> Tensor:
    return product(norm, *tensors, implementation="reference")


def total(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors).square().sum()


def scalar_of_gradients(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scalar(*arguments: Tensor) -> Tensor:
        gradients = torch.func.grad(loss, (0, 1, 2, 3))(*arguments)
        return torch.stack([gradient.sin().sum() for gradient in gradients]).sum()

    return scalar


ALL = (0, 1, 2, 3)
FIRST = (INPUT[0], RESIDUAL[0], WEIGHT, BIAS)
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(total(f), ALL)(*FIRST),
    "grad of grad": lambda f: torch.func.grad(scalar_of_gradients(total(f)), ALL)(*FIRST),
    "vmap": lambda f: torch.func.vmap(f, (0, 0, None, None))(INPUT, RESIDUAL, WEIGHT, BIAS),
    "vmap over weights": lambda f: torch.func.vmap(f, (None, None, 0, 1))(
        *FIRST[:2], INPUT[:, 0], INPUT[0].T[:, :3]
    ),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(total(f), ALL), (0, 0, None, None))(
        INPUT, RESIDUAL, WEIGHT, BIAS
    ),
    "jacrev": lambda f: torch.func.jacrev(f, (0, 2))(*FIRST),
    "hessian": lambda f: torch.func.hessian(total(f), (0, 2))(*FIRST),
    "jvp": lambda f: torch.func.jvp(f, FIRST, tuple(t.cos() for t in FIRST)),
}


@by_norm
@by_implementation
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(
    transform: Callable[[Callable[..., Tensor]], Any], implementation: str, norm: Norm
) -> None:
    expected = tree_leaves(transform(partial(composed, norm)))
    function = partial(product, norm, implementation=implementation)
    if implementation == "triton":
        double = function
        function = lambda *tensors: double(*(t.float() for t in tensors)).double()  # noqa: E731
    tolerance = 1e-5 if implementation == "triton" else 1e-9
    for result, truth in zip(tree_leaves(transform(function)), expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=tolerance, atol=10 * tolerance)


@by_norm
@pytest.mark.parametrize("implementation", EXACT)
def test_gradcheck(implementation: str, norm: Norm) -> None:
    used = FIRST[:3] if norm is NORMS["rms"] else FIRST
    leaves = clones(leaf.detach().requires_grad_() for leaf in used)
    function = partial(product, norm, implementation=implementation)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@by_norm
@pytest.mark.parametrize("fused", [False, True])
def test_second_derivative_of_kernels(norm: Norm, fused: bool) -> None:
    """It is the reference's, of the gradients that the kernels computed."""
    used = [*FIRST[:1], *FIRST[2:3]] if norm is NORMS["rms"] else [*FIRST[:1], *FIRST[2:]]
    used = [*used, FIRST[1]] if fused else used
    results = []
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in used]
        parameters = leaves[1:-1] if fused else leaves[1:]
        options: dict[str, Any] = dict(zip(("weight", "bias"), parameters, strict=False))
        outputs = norm(
            leaves[0],
            residual=leaves[-1] if fused else None,
            implementation=implementation,
            **options,
        )
        value = sum(output.sin().sum() for output in (outputs if fused else (outputs,)))
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_forward_mode_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every kernel has a forward derivative."""
    calls = []
    for name, module in (("torch", fused), ("reference", reference)):
        kernel = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *args, kernel=kernel, name=name: calls.append(name) or kernel(*args),
        )
    input = torch.randn(2, 5)
    for implementation in (None, "torch", "reference"):
        rms_norm(input, 5, implementation=implementation)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        assert forward_ad.unpack_dual(layer_norm(dual, 5)).tangent is not None
    assert calls == ["torch", "torch", "reference", "reference"]


@by_norm
@by_implementation
def test_compiles_as_one_graph_for_every_length(implementation: str, norm: Norm) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(product, norm, implementation=implementation)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 5, 11):
        tensors = (*torch.randn(2, tokens, 5), WEIGHT.float(), BIAS.float())
        leaves, copies = (clones(t.requires_grad_() for t in tensors[:3]) for _ in range(2))
        actual = compiled(*leaves, tensors[3])
        expected = function(*copies, tensors[3])
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()
        expected.sum().backward()
        for leaf, copy in zip(leaves, copies, strict=True):
            torch.testing.assert_close(leaf.grad, copy.grad)
    assert len(graphs) == 1
    operators = [node for node in graphs[0].graph.nodes if "tilework" in str(node.target)]
    assert len(operators) == (implementation in ("triton", "tiled"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_compile_with_inductor(dtype: torch.dtype) -> None:
    for module in (RMSNorm(7, weight_offset=1.0), LayerNorm(7)):
        torch.nn.init.normal_(module.weight)
        compiled = torch.compile(module, fullgraph=True)
        input, residual = torch.randn(2, 4, 7).to(dtype)
        torch.testing.assert_close(compiled(input, residual), module(input, residual))


@by_norm
def test_functional_transforms_compile(norm: Norm) -> None:
    gradient = torch.func.grad(total(partial(product, norm)), ALL[:3])
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*FIRST), gradient(*FIRST))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_operators(fused: bool, centered: bool) -> None:
    dtype = torch.float32
    problem = Problem.random(
        centered, (3, 2, 7), weight=dtype, bias=dtype, residual=dtype if fused else None
    )
    tensors = (problem.input, problem.residual, problem.weight, problem.bias)
    options = (1, 7, 1e-3, 0.0, centered)
    operators = torch.ops.tilework
    operator = operators.row_norm_of_sum if fused else operators.row_norm
    for implementation in ("triton", "tiled"):
        given = RowNorm(*tensors, *options, dtype, dtype if fused else None, implementation)
        torch.library.opcheck(operator, tuple(given))
    upstream = [torch.randn(3, 2, 7, requires_grad=True) for _ in range(1 + fused)]
    upstream += [None] * (2 - len(upstream))  # type: ignore[list-item]
    mean = torch.randn(3, 2) if centered else torch.empty(0)
    for needed in ([True, True, centered], [False, True, False], [True, False, False]):
        given = Backward(
            *upstream,
            problem.input,
            problem.weight,
            problem.bias,
            mean,
            torch.rand(3, 2),
            *options,
            dtype,
            needed,
            "triton",
        )
        torch.library.opcheck(operators.row_norm_backward, tuple(given))


@pytest.mark.parametrize("device", DEVICES)
@by_implementation
@by_norm
def test_autocast_changes_nothing(norm: Norm, implementation: str, device: str) -> None:
    for dtype in FLOATING:
        if implementation == "triton" and dtype == torch.float64:
            continue
        input = torch.randn(4, 5).to(device, dtype)
        for weight in (torch.ones(5, device=device), torch.ones(5, device=device, dtype=dtype)):
            expected = norm(input, weight=weight, implementation=implementation)
            with torch.autocast(device, torch.bfloat16):
                actual = norm(input, weight=weight, implementation=implementation)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected)


@by_norm
@by_implementation
def test_nothing_is_recorded_or_modified(implementation: str, norm: Norm) -> None:
    tensors = [tensor.float() for tensor in FIRST]
    before = clones(tensors)
    output = product(norm, *tensors, implementation=implementation)
    output.zero_()
    norm(tensors[0], weight=tensors[2], implementation=implementation).zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    with torch.no_grad():
        leaf = tensors[0].clone().requires_grad_()
        assert not norm(leaf, weight=WEIGHT, implementation=implementation).requires_grad


def test_modes_see_the_operators() -> None:
    """A plain eager call spares the dispatcher; where somebody looks at it, it is an operator."""
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[misc]
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    leaf = torch.randn(3, 5, requires_grad=True)
    with Mode():
        rms_norm(leaf, 5, implementation="triton").sum().backward()
    assert "tilework.row_norm.default" in seen
    assert "tilework.row_norm_backward.default" in seen
    with FakeTensorMode() as mode:
        output = rms_norm(mode.from_tensor(leaf), 5, implementation="triton")
    assert isinstance(output, FakeTensor)
    assert output.shape == (3, 5)


@by_norm
def test_activation_checkpointing(norm: Norm) -> None:
    leaves, copies = (clones(t.float().requires_grad_() for t in FIRST[:3]) for _ in range(2))
    function = partial(product, norm, implementation="triton")
    checkpointed = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    checkpointed.sum().backward()
    function(*copies).sum().backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        assert torch.equal(leaf.grad, copy.grad)
