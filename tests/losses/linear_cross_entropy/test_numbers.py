"""Values and gradients against torch's composition in float64."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilework.losses import linear_cross_entropy

from helpers import FLOATING, HALF, assert_exact, dtype_name
from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem, composed

pytestmark = pytest.mark.usefixtures("small_tiles")
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]


def check(problem: Problem, implementation: str, upstream: torch.Tensor | None = None) -> None:
    actual = problem.solve(partial(linear_cross_entropy, implementation=implementation), upstream)
    dtype = torch.float32 if problem.input.dtype == torch.float64 else problem.input.dtype
    composition = problem.to(dtype).solve(composed, upstream)
    truth = problem.to(torch.float64).solve(composed, upstream)
    for leaf, gradient in zip(problem.leaves, actual[1:], strict=True):
        assert gradient.dtype == leaf.dtype
    assert actual[0].dtype == (
        torch.float64 if problem.input.dtype == torch.float64 else torch.float32
    )
    for result in zip(actual, composition, truth, strict=True):
        assert_exact(*result, problem.input.dtype)


@pytest.mark.parametrize(("implementation", "dtype"), BUILT)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("every_option", [False, True])
def test_equals_torch(
    implementation: str, dtype: torch.dtype, reduction: str, every_option: bool
) -> None:
    options = {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2} if every_option else {}
    problem = Problem.random(
        dtype=dtype,
        bias=every_option,
        weight=every_option,
        token_weight=every_option,
        reduction=reduction,
        **options,
    )
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(1.7)
    check(problem, implementation, upstream)


@pytest.mark.parametrize("implementation", ["reference", "tiled", "chunked"])
@pytest.mark.parametrize(
    ("bias", "weight", "token_weight", "label_smoothing", "softcap", "z_loss"),
    [*itertools.product([0, 1], [0, 1], [0, 1], [0.0, 0.3, 1.0], [None, 3.0], [0.0, 0.1])],
)
def test_every_combination_of_options(
    implementation: str,
    bias: int,
    weight: int,
    token_weight: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
) -> None:
    problem = Problem.random(
        tokens=9,
        features=5,
        classes=30,
        dtype=torch.float64,
        bias=bool(bias),
        weight=bool(weight),
        token_weight=bool(token_weight),
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
    )
    check(problem, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "features", "classes"),
    [(1, 1, 1), (1, 7, 63), (63, 1, 100), (33, 64, 7), (16, 16, 48), (17, 33, 49), (100, 3, 2)],
)
def test_odd_shapes(implementation: str, tokens: int, features: int, classes: int) -> None:
    check(Problem.random(tokens, features, classes, bias=True, ignored=0.0), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_confident_rows_keep_their_small_losses(implementation: str, dtype: torch.dtype) -> None:
    # Logits of 1e4: the loss of a right answer is far below the rounding of the log-sum-exp.
    classes, features = 40, 8
    weight = torch.randn(classes, features)
    weight[7] = 0
    weight[7, 0] = 40
    hidden = torch.zeros(6, features)
    hidden[:, 0] = torch.tensor([250.0, 1.0, 0.5, 0.1, -250.0, 200.0])
    problem = Problem(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.full((6,), 7),
        options={"reduction": "none"},
    )
    check(problem, implementation, torch.ones(6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_near_its_largest_value(implementation: str) -> None:
    hidden = torch.full((3, 2), 65504.0, dtype=torch.float16)
    weight = torch.tensor([[1.0, -1.0], [0.5, -0.5], [0.0, 2.0**-16]], dtype=torch.float16)
    loss = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 1, 2]), reduction="none", implementation=implementation
    )
    truth = composed(hidden.double(), weight.double(), torch.tensor([0, 1, 2]), reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_show(implementation: str, bad: float) -> None:
    problem = Problem.random(tokens=5, ignored=0.0, reduction="none")
    with torch.no_grad():
        problem.input[2, 3] = bad
    loss = problem.solve(partial(linear_cross_entropy, implementation=implementation))[0]
    assert loss[2].isnan()
    assert loss[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_classes_of_bias_minus_infinity(implementation: str) -> None:
    # A whole tile of them, the first one, must not make the running maximum nan.
    problem = Problem.random(tokens=64, classes=101, bias=True, ignored=0.0)
    with torch.no_grad():
        assert problem.linear_bias is not None
        problem.linear_bias[:50] = -torch.inf
    problem.target = problem.target % 51 + 50
    check(problem, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_rows_are_not_read(implementation: str) -> None:
    problem = Problem.random(tokens=20, ignored=0.0, token_weight=True, label_smoothing=0.1)
    problem.target[::3] = -100
    clean = problem.solve(partial(linear_cross_entropy, implementation=implementation))
    with torch.no_grad():
        problem.input[0] = torch.nan
        problem.input[3] = torch.inf
        problem.options["token_weight"][::3] = torch.nan
    dirty = problem.solve(partial(linear_cross_entropy, implementation=implementation))
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not dirty[1][::3].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_kept(implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation)
    for tokens in (0, 3):
        problem = Problem.random(tokens=tokens, ignored=1.1, bias=True)
        assert problem.solve(function)[0].isnan()
        problem.options = {"reduction": "sum"}
        assert all(not result.any() for result in problem.solve(function))
        problem.options = {"reduction": "none"}
        assert problem.solve(function)[0].shape == (tokens,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=3)])
def test_any_subset_of_gradients(implementation: str, needed: tuple[bool, ...]) -> None:
    problem = Problem.random(tokens=11, classes=60, bias=True, z_loss=0.01)
    everything = problem.solve(partial(linear_cross_entropy, implementation=implementation))[1:]
    for leaf, need in zip(problem.leaves, needed, strict=True):
        leaf.requires_grad_(need)
    loss = linear_cross_entropy(
        problem.input,
        problem.linear_weight,
        problem.target,
        linear_bias=problem.linear_bias,
        implementation=implementation,
        **problem.options,
    )
    assert loss.requires_grad == any(needed)
    if not any(needed):
        return
    loss.backward()
    for leaf, need, gradient in zip(problem.leaves, needed, everything, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_three_dimensions_and_shift(implementation: str) -> None:
    tokens = torch.randint(50, (3, 9))
    tokens[1, 4] = -100
    for shift in (0, 1, 4):
        for reduction in ("mean", "none"):
            problem = Problem.random(tokens=27, classes=50)
            problem.input = problem.input.detach().reshape(3, 9, -1).requires_grad_()
            problem.target = tokens
            problem.options = {
                "shift": shift,
                "reduction": reduction,
                "token_weight": torch.rand(3, 9),
            }
            upstream = torch.randn(3, 9 - shift) if reduction == "none" else None
            check(problem, implementation, upstream)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides(implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation)
    dense = Problem.random(tokens=12, features=10, classes=60, bias=True)
    expected = dense.solve(function)
    strided = Problem(
        dense.input.detach().T.contiguous().T.requires_grad_(),
        torch.stack((dense.linear_weight.detach(), torch.zeros(60, 10)), -1)[..., 0]
        .detach()
        .requires_grad_(),
        torch.stack((dense.target, dense.target), 1)[:, 0],
        dense.linear_bias,
    )
    for actual, result in zip(strided.solve(function), expected, strict=True):
        torch.testing.assert_close(actual, result)

    row = torch.randn(1, 10)
    expanded = Problem(row.expand(12, 10).requires_grad_(), dense.linear_weight, dense.target)
    repeated = Problem(row.repeat(12, 1).requires_grad_(), dense.linear_weight, dense.target)
    for actual, result in zip(expanded.solve(function), repeated.solve(function), strict=True):
        torch.testing.assert_close(actual, result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignore_index_may_be_a_class(implementation: str) -> None:
    check(Problem.random(classes=20, ignore_index=3), implementation)


@pytest.mark.parametrize("implementation", ["tiled", "chunked", "triton"])
def test_two_calls_are_bitwise_equal(implementation: str) -> None:
    problem = Problem.random(tokens=70, classes=130, bias=True, label_smoothing=0.1)
    function = partial(linear_cross_entropy, implementation=implementation)
    for first, second in zip(problem.solve(function), problem.solve(function), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tied_weights_accumulate(implementation: str) -> None:
    embedding = torch.randn(30, 8, requires_grad=True)
    tokens = torch.randint(30, (12,))
    linear_cross_entropy(
        embedding[tokens], embedding, tokens.roll(-1), implementation=implementation
    ).backward()
    gradients = [embedding.grad]
    for dtype in (torch.float32, torch.float64):
        copy = embedding.detach().to(dtype).requires_grad_()
        composed(copy[tokens], copy, tokens.roll(-1)).backward()
        gradients.append(copy.grad)
    assert_exact(*gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_target_entry_is_formed_before_rounding(implementation: str, dtype: torch.dtype) -> None:
    # p - 1 of a confident row is lost if p is rounded to half precision first.
    hidden = torch.tensor([[1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=dtype)
    linear_cross_entropy(
        hidden, weight, torch.tensor([0]), implementation=implementation
    ).backward()
    assert hidden.grad is not None
    truth = -8 * torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(
        hidden.grad[0, 0].float(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0
    )


sizes = st.sampled_from([1, 7, 20, 33])


@pytest.mark.parametrize("implementation", ["reference", "tiled", "chunked"])
@settings(max_examples=25, deadline=None)
@given(tokens=sizes, classes=sizes, seed=st.integers(0, 2**20), smoothing=st.floats(0, 1))
def test_properties(
    implementation: str, tokens: int, classes: int, seed: int, smoothing: float
) -> None:
    torch.manual_seed(seed)
    function = partial(
        linear_cross_entropy, implementation=implementation, label_smoothing=smoothing
    )
    problem = Problem.random(tokens, 6, classes, torch.float64, bias=True, ignored=0.3)
    hidden, head, target, bias = (
        problem.input,
        problem.linear_weight,
        problem.target,
        problem.linear_bias,
    )
    assert bias is not None
    weight = torch.rand(classes, dtype=torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10, equal_nan=True)
    mean = function(hidden, head, target, linear_bias=bias, weight=weight)
    total = function(hidden, head, target, linear_bias=bias, reduction="sum")

    order = torch.randperm(classes)
    place = order.argsort()
    moved = place[target.clamp(min=0)].where(target >= 0, target)
    close(function(hidden, head[order], moved, linear_bias=bias[order], weight=weight[order]), mean)

    kept = target >= 0
    close(function(hidden[kept], head, target[kept], linear_bias=bias, weight=weight), mean)

    lse = F.linear(hidden, head, bias)[kept].logsumexp(-1)
    close(
        function(hidden, head, target, linear_bias=bias, z_loss=0.3, reduction="sum") - total,
        0.3 * lse.square().sum(),
    )
    close(
        function(hidden, head, target, linear_bias=bias + 5, z_loss=0.3, reduction="sum") - total,
        0.3 * (lse + 5).square().sum(),
    )

    counts = torch.randint(0, 4, (tokens,))
    repeated = target.repeat_interleave(counts)
    close(
        function(
            hidden, head, target, linear_bias=bias, weight=weight, token_weight=counts.double()
        ),
        function(
            hidden.repeat_interleave(counts, 0), head, repeated, linear_bias=bias, weight=weight
        ),
    )
    constant = torch.full((tokens,), 2.5)
    close(
        function(hidden, head, target, linear_bias=bias, weight=weight, token_weight=constant), mean
    )


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("every_option", [False, True])
def test_chunks_with_the_kernel(
    every_option: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some seconds, in the interpreter: several chunks of several tiles.
    from tilework.losses._classes.linear import operators

    if dtype != torch.float64:
        monkeypatch.setattr(operators, "has_kernels", lambda input: True)
    options = {"label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2} if every_option else {}
    problem = Problem.random(
        tokens=75,
        classes=201,
        dtype=dtype,
        bias=every_option,
        weight=every_option,
        token_weight=every_option,
        **options,
    )
    check(problem, "chunked", torch.tensor(1.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_name)
def test_chunks_without_instructions_for_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.losses._classes import tiles

    monkeypatch.setattr(tiles, "_BFLOAT16_PRODUCTS", False)
    for tokens in (20, 75):
        check(Problem.random(tokens=tokens, features=8, dtype=dtype, bias=True), "chunked")


def test_ignored_rows_that_are_computed_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on other devices than the CPU, which cannot look at the rows.
    from tilework.losses._classes.linear import tiled

    def all_rows(ignored: torch.Tensor, hidden: torch.Tensor, target: torch.Tensor) -> Any:
        return torch.arange(len(ignored)), [hidden.masked_fill(ignored[:, None], 0), target]

    problem = Problem.random(bias=True)
    assert problem.linear_bias is not None
    problem.linear_bias.data += 200
    expected = problem.solve(linear_cross_entropy)
    monkeypatch.setattr(tiled, "kept_rows", all_rows)
    actual = problem.solve(partial(linear_cross_entropy, implementation="tiled"))
    torch.testing.assert_close(actual, expected)
