"""Transforms of PyTorch, applied to every implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tilework.losses import linear_kl_div
from tilework.losses.linear_kl_div.common import Heads

from losses.linear_kl_div.problem import DIVERGENCES, IMPLEMENTATIONS, Problem, composed

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.untyped]
Loss = Callable[..., Tensor]
EXACT = ("reference", "tiled")  # in float64

HIDDEN = torch.zeros(3, 5, 4, dtype=torch.float64)
HEAD = torch.zeros(3, 31, 4, dtype=torch.float64)
BIAS = torch.zeros(31, dtype=torch.float64)
TEACHER_HIDDEN = torch.zeros(3, 5, 6, dtype=torch.float64)
TEACHER_HEAD = torch.zeros(31, 6, dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, True])


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (HIDDEN, HEAD, BIAS, TEACHER_HIDDEN, TEACHER_HEAD):
        tensor.normal_()


def loss_of(function: Loss, divergence: str) -> Loss:
    def loss(
        hidden: Tensor, head: Tensor, bias: Tensor, teacher: Tensor = TEACHER_HIDDEN[0]
    ) -> Tensor:
        return function(
            *(hidden, head, teacher, TEACHER_HEAD),
            student_bias=bias,
            divergence=divergence,
            beta=0.3,
            temperature=1.3,
            student_softcap=5.0,
            teacher_softcap=4.0,
            mask=MASK,
        )

    return loss


def scalar_of_gradients(loss: Loss) -> Loss:
    def scalar(*arguments: Tensor) -> Tensor:
        gradients = torch.func.grad(loss, (0, 1, 2))(*arguments)
        return torch.stack([gradient.sin().sum() for gradient in gradients]).sum()

    return scalar


FIRST = (HIDDEN[0], HEAD[0], BIAS)
TRANSFORMS: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda loss: torch.func.grad(loss, (0, 1, 2))(*FIRST),
    "grad of grad": lambda loss: torch.func.grad(scalar_of_gradients(loss), (0, 1, 2))(*FIRST),
    "third order": lambda loss: torch.func.grad(
        scalar_of_gradients(scalar_of_gradients(loss)), (0, 1, 2)
    )(*FIRST),
    "vmap": lambda loss: torch.func.vmap(loss, (0, None, None, 0))(
        HIDDEN, HEAD[0], BIAS, TEACHER_HIDDEN
    ),
    "vmap over heads": lambda loss: torch.func.vmap(loss, (0, 0, None))(HIDDEN, HEAD, BIAS),
    "vmap of grad": lambda loss: torch.func.vmap(
        torch.func.grad(loss, (0, 1, 2)), (0, None, None, 0)
    )(HIDDEN, HEAD[0], BIAS, TEACHER_HIDDEN),
    "jacrev of grad": lambda loss: torch.func.jacrev(torch.func.grad(loss), (0, 2))(*FIRST),
    "hessian": lambda loss: torch.func.hessian(loss, (0, 2))(*FIRST),
    "jvp": lambda loss: torch.func.jvp(loss, FIRST, (HIDDEN[1], HEAD[1], BIAS.sin())),
}


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(
    transform: Callable[[Loss], Any], divergence: str, implementation: str
) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    actual = tree_leaves(transform(loss_of(function, divergence)))
    expected = tree_leaves(transform(loss_of(composed, divergence)))
    for result, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_functional_transforms_of_kernels(divergence: str) -> None:
    function = partial(linear_kl_div, implementation="triton")

    def single(*arguments: Tensor) -> Tensor:
        hidden, head, bias, teacher = (tensor.float() for tensor in arguments)
        return function(
            *(hidden, head, teacher, TEACHER_HEAD.float()),
            student_bias=bias,
            divergence=divergence,
            mask=MASK,
        )

    def double(*arguments: Tensor) -> Tensor:
        hidden, head, bias, teacher = arguments
        return composed(
            *(hidden, head, teacher, TEACHER_HEAD),
            student_bias=bias,
            divergence=divergence,
            mask=MASK,
        )

    arguments = (*FIRST, TEACHER_HIDDEN[0])
    gradients = torch.func.grad(single, (0, 1, 2))(*arguments)
    truth = torch.func.grad(double, (0, 1, 2))(*arguments)
    for result, exact in zip(gradients, truth, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-6)
    batched = torch.func.vmap(single, (0, None, None, 0))(HIDDEN, *FIRST[1:], TEACHER_HIDDEN)
    for loss, hidden, teacher in zip(batched, HIDDEN, TEACHER_HIDDEN, strict=True):
        exact = double(hidden, *FIRST[1:], teacher)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", EXACT)
def test_the_teacher_has_no_derivative(implementation: str) -> None:
    def loss(teacher: Tensor) -> Tensor:
        loss = loss_of(partial(linear_kl_div, implementation=implementation), "jsd")
        return loss(*FIRST, teacher)

    teacher = TEACHER_HIDDEN[0]
    assert not torch.func.grad(loss)(teacher).any()
    assert not torch.func.jvp(loss, (teacher,), (teacher.sin(),))[1].any()


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(implementation: str, divergence: str) -> None:
    loss = loss_of(partial(linear_kl_div, implementation=implementation), divergence)
    leaves = [tensor.clone().requires_grad_() for tensor in FIRST]
    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_second_derivative_of_a_subset(bias: bool, needed: tuple[bool, ...]) -> None:
    loss = loss_of(linear_kl_div, "reverse")
    leaves = [
        tensor.clone().requires_grad_(need) for tensor, need in zip(FIRST, needed, strict=True)
    ]
    if bias:
        assert torch.autograd.gradgradcheck(loss, leaves)
    else:
        assert torch.autograd.gradgradcheck(lambda *heads: loss(*heads, None), leaves[:2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_retained_graph(implementation: str) -> None:
    problem = Problem.random(reduction="none")
    loss = problem.loss(partial(linear_kl_div, implementation=implementation))
    once = torch.autograd.grad(loss.sum(), problem.leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss.sum(), problem.leaves)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiles_as_one_graph_for_every_length(implementation: str, divergence: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(linear_kl_div, implementation=implementation)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9, 14):
        problem = Problem.random(
            tokens, 4, 40, bias=True, token_weight=True, divergence=divergence, temperature=2.0
        )
        problem.options["mask"] = torch.arange(tokens) != 1
        torch.testing.assert_close(problem.solve(compiled), problem.solve(function))
    assert len(graphs) == 1
    if implementation != "reference":
        operators = [node for node in graphs[0].graph.nodes if "tilework" in str(node.target)]
        assert len(operators) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_with_inductor(implementation: str) -> None:
    # Some seconds, of a C++ compiler where torch's cache is empty.
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(6, 4, 40, bias=True, mask=0.9, divergence="jsd")
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(problem.solve(compiled), problem.solve(function))


def test_functional_transforms_compile() -> None:
    gradient = torch.func.grad(loss_of(linear_kl_div, "jsd"), (0, 1, 2))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*FIRST), gradient(*FIRST))


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize(
    ("divergence", "bias"), [("forward", False), ("reverse", True), ("jsd", True)]
)
def test_operators(implementation: str, divergence: str, bias: bool) -> None:
    # Some seconds: each check traces an operator and its gradient.
    problem = Problem.random(5, 4, 30, bias=bias)
    student = (problem.student_input, problem.student_weight, problem.student_bias)
    teacher = (problem.teacher_input, problem.teacher_weight, problem.teacher_bias)
    counted = torch.tensor([True, True, False, True, True])
    options = (3.0, None, 0.7, divergence, 0.4)
    given = Heads(*student, *teacher, counted, *options, implementation)
    torch.library.opcheck(torch.ops.tilework.linear_kl_div, tuple(given))
    _, statistics = torch.ops.tilework.linear_kl_div(*given)
    for needed in ([True, True, bias], [False, True, False]):
        torch.library.opcheck(
            torch.ops.tilework.linear_kl_div_backward,
            (
                *(*student, *teacher, counted, statistics.detach(), torch.randn(5)),
                *(needed, *options, implementation),
            ),
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast(implementation: str, divergence: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(bias=True, divergence=divergence)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = problem.loss(function)
    gradients = torch.autograd.grad(loss, problem.leaves)
    assert loss.dtype == torch.float32
    half = problem.to(torch.bfloat16)
    half.options = problem.options
    expected = half.solve(function)
    torch.testing.assert_close(loss, expected[0])
    for leaf, gradient, result in zip(problem.leaves, gradients, expected[1:], strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(gradient, result.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if implementation != "triton":
            assert problem.to(torch.float64).solve(function)[0].dtype == torch.float64


def test_activation_checkpointing() -> None:
    problem = Problem.random()
    checkpointed = partial(torch.utils.checkpoint.checkpoint, linear_kl_div, use_reentrant=False)
    torch.testing.assert_close(problem.solve(checkpointed), problem.solve(linear_kl_div))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_is_recorded_or_modified(implementation: str, divergence: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(bias=True, token_weight=True, divergence=divergence)
    options = [value for value in problem.options.values() if isinstance(value, Tensor)]
    arguments = [tensor for tensor in (*problem.tensors, *options) if tensor is not None]
    assert len(arguments) == 8
    before = [tensor.detach().clone() for tensor in arguments]
    with torch.no_grad():
        assert not problem.loss(function).requires_grad
    problem.solve(function)
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor.detach(), copy)
