"""Transforms of PyTorch, applied to every implementation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tilework.losses import LinearCrossEntropy, linear_cross_entropy

from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem, composed

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.untyped]
EXACT = ("reference", "tiled", "chunked")  # these take float64
OPTIONS = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 0.1}
Loss = Callable[..., Tensor]

HIDDEN = torch.zeros(3, 5, 4, dtype=torch.float64)
HEAD = torch.zeros(3, 31, 4, dtype=torch.float64)
BIAS = torch.zeros(31, dtype=torch.float64)
TARGET = torch.zeros(3, 5, dtype=torch.int64)


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (HIDDEN, HEAD, BIAS):
        tensor.normal_()
    TARGET.random_(31)[:, 1] = -100


def loss_of(function: Loss) -> Loss:
    def loss(hidden: Tensor, head: Tensor, bias: Tensor, target: Tensor = TARGET[0]) -> Tensor:
        return function(hidden, head, target, linear_bias=bias, **OPTIONS)

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
    "vmap": lambda loss: torch.func.vmap(loss, (0, None, None, 0))(HIDDEN, HEAD[0], BIAS, TARGET),
    "vmap over heads": lambda loss: torch.func.vmap(loss, (0, 0, None, 0))(
        HIDDEN, HEAD, BIAS, TARGET
    ),
    "vmap of grad": lambda loss: torch.func.vmap(
        torch.func.grad(loss, (0, 1, 2)), (0, None, None, 0)
    )(HIDDEN, HEAD[0], BIAS, TARGET),
    "jacrev of grad": lambda loss: torch.func.jacrev(torch.func.grad(loss), (0, 2))(*FIRST),
    "hessian": lambda loss: torch.func.hessian(loss, (0, 2))(*FIRST),
    "jvp": lambda loss: torch.func.jvp(loss, FIRST, (HIDDEN[1], HEAD[1], BIAS.sin())),
}


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(transform: Callable[[Loss], Any], implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation)
    actual = tree_leaves(transform(loss_of(function)))
    expected = tree_leaves(transform(loss_of(composed)))
    for result, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10)


def test_functional_transforms_of_kernels() -> None:
    function = partial(linear_cross_entropy, implementation="triton")
    arguments = [tensor.float() for tensor in FIRST]
    gradients = torch.func.grad(loss_of(function), (0, 1, 2))(*arguments)
    truth = torch.func.grad(loss_of(composed), (0, 1, 2))(*FIRST)
    for result, exact in zip(gradients, truth, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-6)
    batched = torch.func.vmap(loss_of(function), (0, None, None, 0))(
        HIDDEN.float(), *arguments[1:], TARGET
    )
    for loss, hidden, target in zip(batched, HIDDEN, TARGET, strict=True):
        exact = loss_of(composed)(hidden, *FIRST[1:], target)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", EXACT)
def test_gradcheck(implementation: str) -> None:
    loss = loss_of(partial(linear_cross_entropy, implementation=implementation))
    leaves = [tensor.clone().requires_grad_() for tensor in FIRST]
    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True)])
def test_second_derivative_of_a_subset(needed: tuple[bool, ...]) -> None:
    leaves = [
        tensor.clone().requires_grad_(need) for tensor, need in zip(FIRST, needed, strict=True)
    ]
    assert torch.autograd.gradgradcheck(loss_of(linear_cross_entropy), leaves)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_retained_graph_and_forward_mode_inside(implementation: str) -> None:
    problem = Problem.random(reduction="none")
    loss = linear_cross_entropy(
        problem.input,
        problem.linear_weight,
        problem.target,
        implementation=implementation,
        reduction="none",
    )
    once = torch.autograd.grad(loss.sum(), problem.leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss.sum(), problem.leaves)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, 2 * first)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_as_one_graph_for_every_length(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(linear_cross_entropy, implementation=implementation, **OPTIONS)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9, 14):
        problem = Problem.random(tokens=tokens, classes=40, bias=True)
        torch.testing.assert_close(problem.solve(compiled), problem.solve(function))
    assert len(graphs) == 1
    if implementation != "reference":
        operators = [node for node in graphs[0].graph.nodes if "tilework" in str(node.target)]
        assert len(operators) == 1


@pytest.mark.parametrize("implementation", EXACT)
def test_compiles_with_inductor(implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation, **OPTIONS)
    problem = Problem.random(tokens=6, classes=40, bias=True, weight=True)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(problem.solve(compiled), problem.solve(function))


def test_functional_transforms_compile() -> None:
    gradient = torch.func.grad(loss_of(linear_cross_entropy), (0, 1, 2))
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*FIRST), gradient(*FIRST))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_operators(implementation: str, every: bool) -> None:
    problem = Problem.random(tokens=5, features=4, classes=30, bias=True)
    input, weight, bias = problem.leaves
    head = {"input": input, "linear_weight": weight, "linear_bias": bias}
    tensors = head | {"target": problem.target, "class_weight": torch.rand(30)}
    options = {
        "softcap": 3.0,
        "temperature": 0.7,
        "ignore_index": -100,
        "squares": every,
        "moments": every,
        "implementation": implementation,
    }
    torch.library.opcheck(
        torch.ops.tilework.linear_logit_stats.default,
        (),
        tensors | options | {"gradient_filter": None},
    )
    names = ["total", "target_gap", "class_gap"] + (["squares", "moment"] if every else [])
    optional = dict.fromkeys(("grad_squares", "grad_moment"))
    upstream = optional | {f"grad_{name}": torch.randn(5) for name in names}
    known = {"shift": torch.randn(5), "total": torch.randn(5), "gradient_filter": 0.1}
    for needed in ([True, True, True], [False, True, False]):
        torch.library.opcheck(
            torch.ops.tilework.linear_logit_stats_backward.default,
            (),
            tensors | options | known | upstream | {"needed": needed},
        )


def test_operator_of_chunks() -> None:
    problem = Problem.random(tokens=5, features=4, classes=30, bias=True)
    for needed in ([True, True, True], [False, True, False]):
        input, weight, bias = (
            leaf.detach().requires_grad_(need)
            for leaf, need in zip(problem.leaves, needed, strict=True)
        )
        torch.library.opcheck(
            torch.ops.tilework.linear_summed_loss.default,
            (),
            {
                "input": input,
                "linear_weight": weight,
                "target": problem.target,
                "linear_bias": bias,
                "class_weight": torch.rand(30),
                "weight": torch.rand(5),
                "target_weight": torch.rand(5),
                "formula": "cross_entropy",
                "numbers": [0.1, 0.01],
                "softcap": 3.0,
                "ignore_index": -100,
                "needed": needed,
            },
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_chunks_are_handed_over_once(reduction: str) -> None:
    problem = Problem.random(bias=True)
    function = partial(linear_cross_entropy, implementation="chunked", reduction=reduction)
    loss = function(
        problem.input, problem.linear_weight, problem.target, linear_bias=problem.linear_bias
    )
    first = torch.autograd.grad(3 * loss, problem.leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    (third,) = torch.autograd.grad(2 * loss, problem.leaves[2:], create_graph=True)
    assert third.requires_grad
    for once, copy, again in zip(first, kept, second, strict=True):
        assert torch.equal(once, copy)
        torch.testing.assert_close(once, 3 * again)
    torch.testing.assert_close(third, 2 * second[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation)
    problem = Problem.random(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(
            problem.input, problem.linear_weight, problem.target, linear_bias=problem.linear_bias
        )
    gradients = torch.autograd.grad(loss, problem.leaves)
    assert loss.dtype == torch.float32
    expected = problem.to(torch.bfloat16).solve(function)
    torch.testing.assert_close(loss, expected[0])
    for leaf, gradient, half in zip(problem.leaves, gradients, expected[1:], strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(gradient, half.float())
    double = problem.to(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double.solve(partial(linear_cross_entropy, implementation="tiled"))[0].dtype == (
            torch.float64
        )


def test_activation_checkpointing() -> None:
    problem = Problem.random()
    checkpointed = partial(
        torch.utils.checkpoint.checkpoint, linear_cross_entropy, use_reentrant=False
    )
    torch.testing.assert_close(problem.solve(checkpointed), problem.solve(linear_cross_entropy))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_recorded_or_modified(implementation: str) -> None:
    problem = Problem.random(bias=True, weight=True, token_weight=True)
    arguments = [*problem.leaves, problem.target, *problem.options.values()]
    before = [tensor.detach().clone() for tensor in arguments]
    with torch.no_grad():
        loss = linear_cross_entropy(
            problem.input,
            problem.linear_weight,
            problem.target,
            linear_bias=problem.linear_bias,
            implementation=implementation,
            **problem.options,
        )
    assert not loss.requires_grad
    problem.solve(partial(linear_cross_entropy, implementation=implementation))
    for tensor, copy in zip(arguments, before, strict=True):
        assert torch.equal(tensor.detach(), copy)


@pytest.mark.parametrize("bad", [-1, 31, 2**40])
def test_bad_target_in_transformed_code_is_nan(bad: int) -> None:
    target = TARGET.clone()
    target[1, 2] = bad
    per_token = partial(
        linear_cross_entropy, reduction="none", implementation="tiled", weight=torch.rand(31)
    )
    losses = torch.func.vmap(per_token, (0, None, 0))(HIDDEN, HEAD[0], target)
    assert losses[1, 2].isnan()
    assert losses.isnan().sum() == 1

    def total(hidden: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, HEAD[0], target, implementation="tiled")

    gradient = torch.func.vmap(torch.func.grad(total))(HIDDEN, target)
    assert gradient[1, 2].isnan().all()
    assert gradient[[0, 2]].isfinite().all()
    compiled = torch.compile(LinearCrossEntropy(), fullgraph=True, backend="aot_eager")
    assert compiled(HIDDEN[1], HEAD[0], target[1]).isnan()
