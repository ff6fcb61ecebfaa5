"""Log-probabilities, log-sum-exp, entropy and argmax against torch's composition in float64."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tilework.losses import LinearLogProbs, linear_cross_entropy, linear_log_probs

import samples
from calls import Call
from helpers import FLOATING, assert_exact, dtype_name
from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem
from losses.linear_forms import LINEAR_LEAVES, linear_tensors

pytestmark = pytest.mark.usefixtures("small_tiles")
EXACT = ("reference", "tiled")
EVERY_OPTION = {"softcap": 4.0, "temperature": 0.7}
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]


def composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> LinearLogProbs:
    output = F.linear(input, linear_weight, linear_bias)
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    logits = output if softcap is None else softcap * torch.tanh(output / softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    kept = target != ignore_index
    of_target = log_probs.gather(-1, target.where(kept, 0)[..., None])[..., 0]
    # log(0) is -inf, and 0 times that is nan.
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)
    lse = (logits / temperature).logsumexp(-1)
    return LinearLogProbs(of_target.where(kept, 0), lse, entropy, output.argmax(-1))


def solve(
    problem: Problem, function: Callable[..., LinearLogProbs], upstream: list[Tensor | None]
) -> list[Tensor]:
    """The fields, and gradients of those with an upstream gradient."""
    result = function(
        problem.input,
        problem.linear_weight,
        problem.target,
        linear_bias=problem.linear_bias,
        **problem.options,
    )
    loss = sum(
        (field * grad.to(field.dtype)).sum()
        for field, grad in zip(result, upstream, strict=False)
        if grad is not None
    )
    return [*result[:3], *torch.autograd.grad(loss, problem.leaves)]  # type: ignore[arg-type]


def check(problem: Problem, implementation: str, upstream: list[Tensor | None]) -> None:
    actual = solve(problem, partial(linear_log_probs, implementation=implementation), upstream)
    given_dtype = problem.input.dtype
    dtype = torch.float32 if given_dtype == torch.float64 else given_dtype
    composition = solve(problem.to(dtype), composed, upstream)
    truth = solve(problem.to(torch.float64), composed, upstream)
    for result in actual[:3]:
        assert result.dtype == torch.promote_types(given_dtype, torch.float32)
        assert result.shape == problem.target.shape
    for results in zip(actual, composition, truth, strict=True):
        assert_exact(*results, given_dtype)


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("every_option", [False, True])
def test_equals_torch(implementation: str, dtype: torch.dtype, every_option: bool) -> None:
    options: dict[str, Any] = EVERY_OPTION if every_option else {}
    problem = Problem.random(dtype=dtype, bias=every_option, scale=0.3, **options)
    check(problem, implementation, list(torch.randn(3, 37)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("field", range(3))
def test_fields_one_at_a_time(implementation: str, field: int) -> None:
    upstream: list[Tensor | None] = [None, None, None]
    upstream[field] = torch.randn(3, 5)
    problem = Problem.random(15, bias=True, **EVERY_OPTION)
    problem.input = problem.input.detach().reshape(3, 5, -1).requires_grad_()
    problem.target = problem.target.reshape(3, 5)
    check(problem, implementation, upstream)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "features", "classes"),
    [(1, 7, 63), (63, 1, 100), (33, 64, 7), (16, 16, 48), (100, 3, 2), (0, 3, 5)],
)
def test_odd_shapes(implementation: str, tokens: int, features: int, classes: int) -> None:
    problem = Problem.random(tokens, features, classes, bias=True)
    check(problem, implementation, list(torch.randn(3, tokens)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_class_is_certain(implementation: str) -> None:
    problem = Problem.random(3, 2, 1, bias=True, ignored=0.0)
    upstream: list[Tensor | None] = list(torch.randn(3, 3))
    actual = solve(problem, partial(linear_log_probs, implementation=implementation), upstream)
    for result, exact in zip(
        actual, solve(problem.to(torch.float64), composed, upstream), strict=True
    ):
        torch.testing.assert_close(result, exact.to(result.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_argmax_is_the_first_of_the_largest(implementation: str) -> None:
    function = partial(linear_log_probs, implementation=implementation)
    head = torch.randint(-2, 3, (150, 2)).float()
    hidden = torch.randint(-1, 2, (40, 2)).float()
    target = torch.zeros(40, dtype=torch.int64)
    outputs = (hidden @ head.T).tolist()
    expected = [row.index(max(row)) for row in outputs]
    assert function(hidden, head, target).argmax.tolist() == expected
    # A softcap makes ties of different outputs, which still decide.
    flat = function(1e3 * hidden, head, target, softcap=0.5, temperature=3.0)
    assert flat.argmax.tolist() == expected
    ignored = function(hidden, head, target - 100)
    assert ignored.argmax.tolist() == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_do_not_cancel(implementation: str) -> None:
    # Entropies of about 1 beside logits of 1e4: only the rounding of terms up to 1 is left.
    head = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    hidden = torch.tensor([[2.0**13, 0.5], [2.0**13, 3.0], [-(2.0**13), 1.0]])
    target = torch.tensor([0, 1, 2])
    actual = linear_log_probs(hidden, head, target, implementation=implementation)
    truth = composed(hidden.double(), head.double(), target)
    assert (truth.entropy[:2] > 0.1).all()
    for result, exact in zip(actual[:3], truth, strict=False):
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=2**-22)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_classes_of_bias_minus_infinity(implementation: str) -> None:
    problem = Problem.random(bias=True, ignored=0.0, classes=60)
    bias = problem.linear_bias
    assert bias is not None
    absent = torch.arange(60) % 3 == 1
    problem.target = problem.target // 3 * 3
    problem.linear_bias = bias.detach().masked_fill(absent, -torch.inf).requires_grad_()
    actual = solve(
        problem, partial(linear_log_probs, implementation=implementation), [torch.ones(37)] * 3
    )
    kept = Problem(
        problem.input.detach().requires_grad_(),
        problem.linear_weight.detach()[~absent].requires_grad_(),
        problem.target - (problem.target + 1) // 3,
        bias.detach()[~absent].requires_grad_(),
    )
    expected = solve(kept.to(torch.float64), composed, [torch.ones(37)] * 3)
    for index in (4, 5):
        assert not actual[index][absent].any()
        actual[index] = actual[index][~absent]
    for result, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(implementation: str, bad: float) -> None:
    problem = Problem.random(tokens=5, ignored=0.0)
    hidden = problem.input.detach().clone()
    hidden[2, 0] = bad
    result = linear_log_probs(
        hidden, problem.linear_weight, problem.target, implementation=implementation
    )
    for field in result[:3]:
        assert not field[2].isfinite()
        assert field[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.untyped
def test_bad_targets() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(IndexError, match=r"linear_log_probs: target must lie in \[0, 9\)"):
        linear_log_probs(hidden, head, torch.tensor([0, 9, 1]))
    compiled = torch.compile(linear_log_probs, fullgraph=True, backend="eager")
    result = compiled(hidden, head, torch.tensor([0, -1, -100]), implementation="tiled")
    assert result.log_prob.isnan().tolist() == [False, True, False]
    assert result.log_prob[2] == 0
    assert result.lse.isfinite().all()


def test_unused_fields_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.losses._classes.linear import tiled

    moments = []
    backward = tiled.backward

    def record(given: Any, results: Any, grads: Any, needed: Any) -> Any:
        moments.append(grads.moment)
        return backward(given, results, grads, needed)

    monkeypatch.setattr(tiled, "backward", record)
    problem = Problem.random()
    for field in ("log_prob", "lse", "entropy"):
        result = linear_log_probs(problem.input, problem.linear_weight, problem.target)
        getattr(result, field).sum().backward()
    assert [moment is None for moment in moments] == [True, True, False]


@pytest.mark.parametrize("implementation", EXACT)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 20]),
    classes=st.sampled_from([1, 7, 63]),
    seed=st.integers(0, 2**20),
    temperature=st.floats(0.2, 5),
)
def test_properties(
    implementation: str, tokens: int, classes: int, seed: int, temperature: float
) -> None:
    torch.manual_seed(seed)
    function = partial(linear_log_probs, implementation=implementation)
    problem = Problem.random(tokens, 6, classes, torch.float64, bias=True, ignored=0.3)
    hidden, head, bias = problem.leaves
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    result = function(hidden, head, problem.target, linear_bias=bias, temperature=temperature)
    scaled = function(hidden, head / temperature, problem.target, linear_bias=bias / temperature)
    for field, other in zip(result, scaled, strict=True):
        close(field, other)
    losses = linear_cross_entropy(
        hidden, head / temperature, problem.target, linear_bias=bias / temperature, reduction="none"
    )
    close(result.log_prob, -losses)
    assert (result.log_prob <= 1e-12).all()
    assert (result.entropy >= -1e-12).all()
    assert (result.entropy <= math.log(classes) + 1e-12).all()
    (of_entropy,) = torch.autograd.grad(result.entropy.sum(), bias, retain_graph=True)
    (of_lse,) = torch.autograd.grad(result.lse.sum(), bias)
    close(of_entropy.sum(), torch.zeros((), dtype=torch.float64))
    close(of_lse.sum(), torch.tensor(tokens / temperature, dtype=torch.float64))


HIDDEN = torch.zeros(3, 5, 4, dtype=torch.float64)
HEAD = torch.zeros(31, 4, dtype=torch.float64)
TARGET = torch.zeros(3, 5, dtype=torch.int64)


@pytest.fixture(autouse=True)
def drawn() -> None:
    for tensor in (HIDDEN, HEAD):
        tensor.normal_()
    TARGET.random_(31)[:, 1] = -100


def scalar(function: Callable[..., LinearLogProbs]) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, head: Tensor, target: Tensor = TARGET[0]) -> Tensor:
        result = function(hidden, head, target, **EVERY_OPTION)
        return (result.log_prob.sin() + result.lse.cos() + result.entropy.square()).sum()

    return loss


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda loss: torch.func.grad(loss, (0, 1))(HIDDEN[0], HEAD),
    "hessian": lambda loss: torch.func.hessian(loss)(HIDDEN[0], HEAD),
    "jvp": lambda loss: torch.func.jvp(loss, (HIDDEN[0], HEAD), (HIDDEN[1], HEAD.sin())),
    "vmap": lambda loss: torch.func.vmap(loss, (0, None, 0))(HIDDEN, HEAD, TARGET),
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None, 0))(
        HIDDEN, HEAD, TARGET
    ),
}


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_functional_transforms(transform: Callable[..., Any], implementation: str) -> None:
    actual = transform(scalar(partial(linear_log_probs, implementation=implementation)))
    expected = transform(scalar(composed))
    for result, truth in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", EXACT)
def test_gradcheck(implementation: str) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (HIDDEN[0], HEAD)]

    def fields(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        return linear_log_probs(
            hidden, head, TARGET[0], implementation=implementation, **EVERY_OPTION
        )[:3]

    assert torch.autograd.gradcheck(fields, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fields, leaves)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_as_one_graph_for_every_length(implementation: str) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = partial(linear_log_probs, implementation=implementation, **EVERY_OPTION)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9, 14):
        problem = Problem.random(tokens=tokens, classes=40, bias=True)
        upstream = list(torch.randn(3, tokens))
        torch.testing.assert_close(
            solve(problem, compiled, upstream), solve(problem, function, upstream)
        )
    assert len(graphs) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast(implementation: str) -> None:
    problem = Problem.random()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = linear_log_probs(
            problem.input, problem.linear_weight, problem.target, implementation=implementation
        )
    half = problem.to(torch.bfloat16)
    expected = linear_log_probs(
        half.input, half.linear_weight, half.target, implementation=implementation
    )
    for field, other in zip(result, expected, strict=True):
        assert torch.equal(field, other)


def test_forward_stores_no_logits() -> None:
    code = """if True:
        import resource, torch
        from tilework.losses import linear_log_probs
        def call(tokens, classes):
            hidden, head = torch.randn(tokens, 64), torch.randn(classes, 64)
            target = torch.randint(classes, (tokens,))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            linear_log_probs(hidden, head, target)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        call(64, 2000)
        print(call(4096, 64000) / 1024)
    """
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert float(output) < 60  # MiB; the logits are 1000


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("input must be of shape", ValueError, {"input": torch.zeros(())}),
        ("linear_weight must be of shape", ValueError, {"linear_weight": torch.zeros(9, 3)}),
        (
            "linear_weight must be of input's",
            TypeError,
            {"linear_weight": torch.zeros(9, 4).half()},
        ),
        ("linear_bias must be of shape", ValueError, {"linear_bias": torch.zeros(8)}),
        ("target must be int64 of shape", TypeError, {"target": torch.zeros(3)}),
        ("target must be of shape", ValueError, {"target": torch.zeros(2, dtype=torch.int64)}),
        ("temperature must be a finite number above 0", ValueError, {"temperature": 0.0}),
        ("temperature must be a number", TypeError, {"temperature": "hot"}),
        ("softcap must be a finite number above 0", ValueError, {"softcap": -1.0}),
        ("ignore_index must be an int", TypeError, {"ignore_index": None}),
        ("implementation must be one of", ValueError, {"implementation": "cut"}),
        ("linear_weight must lie on", ValueError, {"linear_weight": torch.zeros(9, 4).to("meta")}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(9, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    } | change
    tensors = [arguments.pop(name) for name in ("input", "linear_weight", "target")]
    with pytest.raises(error, match=f"linear_log_probs: {message}"):
        linear_log_probs(*tensors, **arguments)


@pytest.mark.untyped
def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        linear_log_probs(torch.zeros(3, 4), torch.zeros(9, 4), TARGET[0, :3], None)  # type: ignore[misc]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            linear_log_probs,
            linear_tensors,
            differentiable=LINEAR_LEAVES,
            options=({}, {"softcap": 4.0, "temperature": 0.7}),
        ),
    ]
