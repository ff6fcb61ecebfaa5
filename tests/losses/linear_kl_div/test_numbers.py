"""Values and gradients against torch's composition in float64."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilework.losses import linear_kl_div
from tilework.losses.linear_kl_div import tiled

from helpers import FLOATING, assert_exact, dtype_name
from losses.linear_kl_div.problem import DIVERGENCES, IMPLEMENTATIONS, Problem, composed

pytestmark = pytest.mark.usefixtures("small_tiles")
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Those that compute in float64, and do not take long in an interpreter.
PLAIN = pytest.mark.parametrize("implementation", ["reference", "tiled"])
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]


def check(problem: Problem, implementation: str, upstream: torch.Tensor | None = None) -> None:
    actual = problem.solve(partial(linear_kl_div, implementation=implementation), upstream)
    student = problem.student_input.dtype
    composition = problem.to(torch.float32 if student == torch.float64 else student)
    truth = problem.to(torch.float64).solve(composed, upstream)
    for leaf, gradient in zip(problem.leaves, actual[1:], strict=True):
        assert gradient.dtype == leaf.dtype
    assert actual[0].dtype == (torch.float64 if student == torch.float64 else torch.float32)
    for result in zip(actual, composition.solve(composed, upstream), truth, strict=True):
        assert_exact(*result, student)


# What reduces is the same in every dtype.
@pytest.mark.parametrize(
    ("implementation", "dtype", "reduction"),
    [
        pytest.param(*case.values, reduction, id=f"{case.id}-{reduction}")
        for case in BUILT
        for reduction in ("none", "mean", "sum")
        if reduction == "none" or torch.float32 in case.values
    ],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("every_option", [False, True])
def test_equals_torch(
    implementation: str, dtype: torch.dtype, divergence: str, reduction: str, every_option: bool
) -> None:
    options = {"student_softcap": 4.0, "teacher_softcap": 3.0, "temperature": 0.7, "beta": 0.3}
    problem = Problem.random(
        dtype=dtype,
        bias=every_option,
        token_weight=every_option,
        divergence=divergence,
        reduction=reduction,
        **(options if every_option else {}),
    )
    upstream = torch.randn(45) if reduction == "none" else torch.tensor(1.7)
    check(problem, implementation, upstream)


@PLAIN
@pytest.mark.parametrize(
    ("divergence", "bias", "softcaps", "temperature", "mask"),
    [
        *itertools.product(
            DIVERGENCES,
            [False, True],
            [(None, None), (2.0, None), (None, 3.0)],
            [1.0, 2.5],
            [0.7, 1],
        )
    ],
)
def test_every_combination_of_options(
    implementation: str,
    divergence: str,
    bias: bool,
    softcaps: tuple[float | None, float | None],
    temperature: float,
    mask: float,
) -> None:
    problem = Problem.random(
        *(90, 5, 30, torch.float64),
        bias=bias,
        mask=mask,
        divergence=divergence,
        temperature=temperature,
        student_softcap=softcaps[0],
        teacher_softcap=softcaps[1],
    )
    check(problem, implementation)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("tokens", "features", "classes", "teacher_features"),
    [(1, 1, 1, 1), (1, 7, 63, 100), (63, 1, 100, 7), (33, 64, 7, 1), (16, 16, 48, 16)],
)
def test_odd_shapes(
    implementation: str,
    divergence: str,
    tokens: int,
    features: int,
    classes: int,
    teacher_features: int,
) -> None:
    problem = Problem.random(
        *(tokens, features, classes),
        teacher_features=teacher_features,
        bias=True,
        mask=1,
        divergence=divergence,
    )
    if tokens > 1:
        check(problem, implementation)
        return
    # A composition is often right by luck with a single number.
    actual = problem.solve(partial(linear_kl_div, implementation=implementation))
    truth = problem.to(torch.float64).solve(composed)
    for result, exact in zip(actual, truth, strict=True):
        torch.testing.assert_close(result, exact.to(result.dtype))


@EACH
@pytest.mark.parametrize("beta", [1e-9, 0.01, 0.5, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_every_beta(implementation: str, scale: float, beta: float) -> None:
    # Extreme ones show whether the mixture keeps the digits of the lesser share.
    problem = Problem.random(divergence="jsd", beta=beta, mask=1)
    problem.teacher_input *= scale
    check(problem, implementation)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_close_heads(implementation: str, divergence: str) -> None:
    # The divergence is of second order in the difference, its terms are of the first.
    problem = Problem.random(
        teacher_features=19, bias=True, divergence=divergence, reduction="none"
    )
    for mine, theirs in ((1, 3), (0, 2), (4, 5)):
        noise = 1 + 0.01 * torch.randn(problem.tensors[mine].shape)  # type: ignore[union-attr]
        problem.tensors[theirs].copy_(problem.tensors[mine].detach() * noise)  # type: ignore[union-attr]
    for tensor in problem.tensors:
        # Logits are exact then, in whatever order the products of kernels are added.
        assert tensor is not None
        tensor.detach().mul_(2**9).round_().div_(2**9)
    check(problem, implementation, torch.ones(problem.student_input.shape[0]))


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_heads_that_barely_differ(implementation: str, divergence: str) -> None:
    """By 1e-4, of which the last digits of an exponential near 1 would leave a thousandth.

    The composition, which has no more, is no yardstick.
    """
    problem = Problem.random(
        teacher_features=19, bias=True, mask=1, divergence=divergence, reduction="none"
    )
    same = zip(problem.tensors[2:4], problem.tensors[:2], strict=True)
    for theirs, mine in (*same, (problem.teacher_bias, problem.teacher_bias)):
        # Logits and their differences are exact.
        assert theirs is not None
        assert mine is not None
        mine.detach().mul_(2**4).round_().div_(2**4)
        theirs.copy_(mine.detach())
    assert problem.student_bias is not None
    assert problem.teacher_bias is not None
    noise = torch.randint(-1, 2, problem.teacher_bias.shape) * 2.0**-13
    problem.student_bias.detach().copy_(problem.teacher_bias + noise)
    upstream = torch.ones(problem.student_input.shape[0])
    loss, *gradients = problem.solve(
        partial(linear_kl_div, implementation=implementation), upstream
    )
    truth, *exact = problem.to(torch.float64).solve(composed, upstream)
    if divergence == "jsd":
        assert (loss - truth).norm() < 1e-2 * truth.norm()
    for gradient, one in zip(gradients, exact, strict=True):
        assert (gradient - one).norm() < 2e-6 * one.norm()


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", FLOATING[1:], ids=dtype_name)
def test_logits_of_ten_thousand(implementation: str, dtype: torch.dtype, divergence: str) -> None:
    # One of the heads is confident, or none, or both: of one class or of two.
    heads = [torch.randn(60, 8) for _ in range(2)]
    for head, confident in zip(heads, (7, 41), strict=True):
        head[confident] = 0
        head[confident, 0] = 40
    heads[1][7] = 0
    heads[1][7, 0] = -39
    hidden, teacher_hidden = torch.zeros(2, 128, 8)
    hidden[1:, 0] = torch.logspace(-1, 2.4, 127)
    teacher_hidden[:, 0] = hidden[torch.randperm(128), 0]
    hidden[::3] *= -1
    teacher_hidden[::4] *= -1
    problem = Problem(
        hidden.to(dtype).requires_grad_(),
        heads[0].to(dtype).requires_grad_(),
        teacher_hidden.to(dtype),
        heads[1].to(dtype),
        options={"reduction": "none", "divergence": divergence},
    )
    upstream = torch.ones(128)
    if (implementation, divergence) != ("reference", "jsd"):
        check(problem, implementation, upstream)
        return
    # It and torch's composition lose more than they keep of some gradients, by turns; the logits
    # themselves are rounded to 2**-10 in float32.
    actual = problem.solve(partial(linear_kl_div, implementation=implementation), upstream)
    truth = problem.to(torch.float64).solve(composed, upstream)
    eps = max(2**-10, torch.finfo(dtype).eps)
    for result, exact in zip(actual, truth, strict=True):
        assert (result.double() - exact).norm() <= eps * exact.norm()


@EACH
@pytest.mark.parametrize(
    ("divergence", "logits", "teacher_logits"),
    [("reverse", [8.0, 0, -3], [-8192.0, 0, 100]), ("jsd", [20.0, 0, -3], [-5.0, 0, 1])],
)
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_gradient_of_a_confident_student(
    implementation: str,
    divergence: str,
    logits: list[float],
    teacher_logits: list[float],
    order: list[int],
) -> None:
    # What is left of a log-ratio, of up to 1e4, when its mean, nearly the same, is taken away. Only
    # differences from the likeliest class keep its digits; torch's composition, and the reference,
    # lose them.
    if implementation == "reference":
        pytest.skip("computes like torch")
    student, teacher = torch.tensor([logits, teacher_logits])[:, order, None]
    hidden = torch.tensor([[1.0], [0.7], [1.3]], requires_grad=True)
    problem = Problem(hidden, student, torch.ones(3, 1), teacher)
    problem.options = {"divergence": divergence, "reduction": "sum"}
    linear_kl_div(
        *problem.tensors[:4],  # type: ignore[arg-type]
        **problem.options,
        implementation=implementation,
    ).backward()
    exact = problem.to(torch.float64)
    composed(*exact.tensors[:4], **exact.options).backward()  # type: ignore[arg-type]
    assert hidden.grad is not None
    # Logits of 26 have a rounding unit of 2e-6, which an exponential makes a relative error.
    torch.testing.assert_close(hidden.grad.double(), exact.student_input.grad, rtol=4e-6, atol=0)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("owner", ["student", "teacher", "both"])
def test_impossible_classes(implementation: str, divergence: str, owner: str) -> None:
    # Whole tiles of them, the first ones, must not make a running maximum nan.
    problem = Problem.random(bias=True, divergence=divergence, reduction="none", mask=1)
    for name, bias in (("student", problem.student_bias), ("teacher", problem.teacher_bias)):
        if owner in (name, "both"):
            assert bias is not None
            bias.data[:50] = -torch.inf
            bias.data[70] = -torch.inf
    infinite = (divergence, owner) in (("forward", "student"), ("reverse", "teacher"))
    if infinite:
        assert (problem.loss(partial(linear_kl_div, implementation=implementation)) > 1e38).all()
    else:
        check(problem, implementation)
    if (divergence, owner) == ("forward", "student"):
        # p - q is finite where the divergence is not.
        actual = problem.solve(partial(linear_kl_div, implementation=implementation))[1:]
        for gradient, truth in zip(
            actual, problem.to(torch.float64).solve(composed)[1:], strict=True
        ):
            torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_an_infinite_divergence_stays_infinite(implementation: str, bias: float) -> None:
    # The impossible class of the student has a probability that underflows under the teacher,
    # in its own tile or when a later tile raises the maximum.
    problem = Problem.random(bias=True, mask=1, reduction="none")
    assert problem.student_bias is not None
    assert problem.teacher_bias is not None
    problem.student_bias.data[3] = -torch.inf
    problem.teacher_bias[3 if bias < 0 else 90] = bias
    for divergence, swapped in (("forward", False), ("reverse", True)):
        heads = Problem(
            *(problem.teacher_input, problem.teacher_weight),
            *(problem.student_input, problem.student_weight),
            *(problem.teacher_bias, problem.student_bias),
        )
        call = (heads if swapped else problem).with_options(divergence=divergence, reduction="none")
        loss = call.loss(partial(linear_kl_div, implementation=implementation))
        assert (loss == torch.inf).all()


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("owner", ["student_input", "teacher_input"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_show(implementation: str, divergence: str, owner: str, bad: float) -> None:
    problem = Problem.random(tokens=5, mask=1, reduction="none", divergence=divergence)
    getattr(problem, owner).data[2, 3] = bad
    loss = problem.loss(partial(linear_kl_div, implementation=implementation))
    assert loss[2].isnan()
    assert loss[[0, 1, 3, 4]].isfinite().all()


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float16_near_its_largest_value(implementation: str, divergence: str) -> None:
    hidden = torch.full((3, 2), 65504.0, dtype=torch.float16)
    head = torch.tensor([[1.0, -1.0], [0.5, -0.5], [0.0, 2.0**-16]], dtype=torch.float16)
    teacher = torch.tensor([[0.0, 0.0], [2.0**-16, 0.0], [0.0, 2.0**-17]], dtype=torch.float16)
    problem = Problem(hidden, head, hidden, teacher, options={"divergence": divergence})
    loss = problem.loss(partial(linear_kl_div, implementation=implementation))
    truth = problem.to(torch.float64).loss(composed)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_positions_are_not_read(implementation: str, divergence: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(tokens=20, bias=True, token_weight=True, divergence=divergence)
    mask = torch.ones(20, dtype=torch.bool)
    mask[::3] = False
    problem.options["mask"] = mask
    clean = problem.solve(function)
    problem.student_input.data[0] = torch.nan
    problem.teacher_input[3] = torch.inf
    problem.options["token_weight"][::3] = torch.nan
    dirty = problem.solve(function)
    for before, after in zip(clean, dirty, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not dirty[1][::3].any()
    assert not problem.with_options(reduction="none").loss(function)[::3].any()


@EACH
def test_zero_token_weight_counts_for_nothing(implementation: str) -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, -1.0, 3.0, 0.5])
    problem = Problem.random(tokens=6, mask=1).with_options(token_weight=weights)
    keep = [0, 1, 3, 4, 5]
    rest = Problem(
        problem.student_input.detach()[keep].requires_grad_(),
        problem.student_weight,
        problem.teacher_input[keep],
        problem.teacher_weight,
        options={"token_weight": weights[keep]},
    )
    problem.student_input.data[2] = torch.nan
    actual = problem.solve(partial(linear_kl_div, implementation=implementation))
    assert not actual[1][2].any()
    actual[1] = actual[1][keep]
    for result, expected in zip(actual, rest.solve(composed), strict=True):
        torch.testing.assert_close(result, expected)


@EACH
def test_nothing_counted(implementation: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    for tokens, divergence in itertools.product((0, 3), DIVERGENCES):
        problem = Problem.random(tokens=tokens, mask=0, bias=True, divergence=divergence)
        loss, *gradients = problem.solve(function)
        assert loss.isnan()
        assert not any(gradient.any() for gradient in gradients)
        assert not any(t.any() for t in problem.with_options(reduction="sum").solve(function))
        losses = problem.with_options(reduction="none").loss(function)
        assert losses.shape == (tokens,)
        assert not losses.any()


@PLAIN
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_positions_that_cannot_be_counted(
    implementation: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where those that are masked out are computed on zeros.
    def all_rows(ignored: torch.Tensor, *tensors: torch.Tensor) -> Any:
        rows = torch.arange(len(ignored))
        return rows, [tensor.masked_fill(ignored[:, None], 0) for tensor in tensors]

    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(bias=True, divergence=divergence)
    expected = problem.solve(function)
    monkeypatch.setattr(tiled, "kept_rows", all_rows)
    for actual, result in zip(problem.solve(function), expected, strict=True):
        torch.testing.assert_close(actual, result)
    nothing = torch.zeros_like(problem.options["mask"])
    assert not any(
        gradient.any() for gradient in problem.with_options(mask=nothing).solve(function)[1:]
    )
    assert problem.student_bias is not None
    assert problem.teacher_bias is not None
    (problem.teacher_bias if divergence == "reverse" else problem.student_bias).data[0] = -torch.inf
    assert problem.with_options(mask=nothing, reduction="sum").loss(function) == 0


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=3)])
def test_any_subset_of_gradients(
    implementation: str, divergence: str, needed: tuple[bool, ...]
) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(tokens=11, classes=60, bias=True, divergence=divergence)
    everything = problem.solve(function)[1:]
    for leaf, need in zip(problem.leaves, needed, strict=True):
        leaf.requires_grad_(need)
    loss = problem.loss(function)
    assert loss.requires_grad == any(needed)
    if not any(needed):
        return
    loss.backward()
    for leaf, need, gradient in zip(problem.leaves, needed, everything, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)
        else:
            assert leaf.grad is None


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_teacher_is_a_constant(implementation: str, divergence: str) -> None:
    problem = Problem.random(bias=True, divergence=divergence)
    function = partial(linear_kl_div, implementation=implementation)
    expected = problem.solve(function)
    teacher = [
        t.requires_grad_() for t in problem.tensors[2:4] + problem.tensors[5:] if t is not None
    ]
    for actual, result in zip(problem.solve(function), expected, strict=True):
        assert torch.equal(actual, result)
    problem.loss(function).backward()
    assert len(teacher) == 3
    assert all(tensor.grad is None for tensor in teacher)
    for leaf in problem.leaves:
        leaf.requires_grad_(False)
    assert not problem.loss(function).requires_grad


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_teacher_of_another_dtype(
    implementation: str, divergence: str, student: torch.dtype, teacher: torch.dtype
) -> None:
    if implementation == "triton" and torch.float64 in (student, teacher):
        pytest.skip("not in float64")
    problem = Problem.random(dtype=student, divergence=divergence)
    problem.teacher_input = problem.teacher_input.to(teacher)
    problem.teacher_weight = problem.teacher_weight.to(teacher)
    actual = problem.solve(partial(linear_kl_div, implementation=implementation))
    composition, truth = problem.solve(composed), problem.to(torch.float64).solve(composed)
    for leaf, gradient in zip(problem.leaves, actual[1:], strict=True):
        assert gradient.dtype == leaf.dtype
    # Where the student is of float64, the teacher's products are not.
    single = [
        tensor.float() if tensor.dtype == torch.float64 else tensor
        for tensor in (*actual, *composition)
    ]
    for result in zip(single[:3], single[3:], truth, strict=True):
        assert_exact(*result, torch.promote_types(student, torch.float32))


@EACH
def test_three_dimensions(implementation: str) -> None:
    for divergence, reduction in itertools.product(DIVERGENCES, ("mean", "none")):
        problem = Problem.random(tokens=27, classes=50, mask=1)
        problem.student_input = problem.student_input.detach().reshape(3, 9, -1).requires_grad_()
        problem.teacher_input = problem.teacher_input.reshape(3, 9, -1)
        problem.options = {
            "divergence": divergence,
            "reduction": reduction,
            "mask": torch.rand(3, 9) < 0.7,
            "token_weight": torch.rand(3, 9),
        }
        check(problem, implementation, torch.randn(3, 9) if reduction == "none" else None)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_strides(implementation: str, divergence: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    dense = Problem.random(12, 10, 60, bias=True, divergence=divergence)

    def transposed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().T.contiguous().T

    def spaced(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack((tensor.detach(), torch.zeros_like(tensor)), -1)[..., 0]

    strided = Problem(
        transposed(dense.student_input).requires_grad_(),
        spaced(dense.student_weight).requires_grad_(),
        spaced(dense.teacher_input),
        transposed(dense.teacher_weight),
        *dense.tensors[4:],  # type: ignore[arg-type]
        {**dense.options, "mask": spaced(dense.options["mask"])},
    )
    for actual, result in zip(strided.solve(function), dense.solve(function), strict=True):
        torch.testing.assert_close(actual, result)

    row, teacher_row = torch.randn(1, 10), torch.randn(1, 11)
    expanded, repeated = (
        Problem(
            spread(row, 10).requires_grad_(),
            dense.student_weight,
            spread(teacher_row, 11),
            dense.teacher_weight,
            options={"divergence": divergence},
        )
        for spread in (
            lambda tensor, width: tensor.expand(12, width),
            lambda tensor, width: tensor.repeat(12, 1),
        )
    )
    for actual, result in zip(expanded.solve(function), repeated.solve(function), strict=True):
        torch.testing.assert_close(actual, result)


@EACH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_calls_are_bitwise_equal(implementation: str, divergence: str) -> None:
    problem = Problem.random(tokens=70, classes=130, bias=True, divergence=divergence)
    function = partial(linear_kl_div, implementation=implementation)
    for first, second in zip(problem.solve(function), problem.solve(function), strict=True):
        assert torch.equal(first, second)


@EACH
def test_tied_weights_accumulate(implementation: str) -> None:
    embedding, teacher = torch.randn(30, 8, requires_grad=True), torch.randn(30, 5)
    tokens, hidden = torch.randint(30, (12,)), torch.randn(12, 5)
    function = partial(linear_kl_div, implementation=implementation)
    gradients = []
    for loss, dtype in (
        (function, torch.float32),
        (composed, torch.float32),
        (composed, torch.float64),
    ):
        copy = embedding.detach().to(dtype).requires_grad_()
        loss(copy[tokens], copy, hidden.to(dtype), teacher.to(dtype)).backward()
        gradients.append(copy.grad)
    assert_exact(*gradients)  # type: ignore[arg-type]


sizes = st.sampled_from([1, 7, 20, 33])


@PLAIN
@settings(max_examples=25, deadline=None)
@given(
    tokens=sizes,
    classes=sizes,
    seed=st.integers(0, 2**20),
    temperature=st.floats(0.1, 10),
    beta=st.floats(0.01, 0.99),
)
def test_properties(
    implementation: str, tokens: int, classes: int, seed: int, temperature: float, beta: float
) -> None:
    torch.manual_seed(seed)
    problem = Problem.random(
        tokens, 6, classes, torch.float64, bias=True, mask=0.8, temperature=temperature
    )
    names = ("input", "weight", "bias")
    student = {f"student_{name}": leaf for name, leaf in zip(names, problem.leaves, strict=True)}
    theirs = (problem.teacher_input, problem.teacher_weight, problem.teacher_bias)
    teacher = {f"teacher_{name}": tensor for name, tensor in zip(names, theirs, strict=True)}
    swapped = {
        **{f"student_{name}": tensor for name, tensor in zip(names, theirs, strict=True)},
        **{f"teacher_{name}": leaf for name, leaf in zip(names, problem.leaves, strict=True)},
    }
    mask = problem.options["mask"]
    losses = partial(
        linear_kl_div,
        implementation=implementation,
        temperature=temperature,
        mask=mask,
        reduction="none",
    )
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
    result = {name: losses(**student, **teacher, divergence=name) for name in DIVERGENCES}
    mixture = losses(**student, **teacher, divergence="jsd", beta=beta)

    for values in (*result.values(), mixture):
        assert (values >= -1e-13).all()
    close(losses(**swapped, divergence="forward"), result["reverse"])
    close(losses(**swapped, divergence="jsd", beta=1 - beta), mixture)
    close(losses(**swapped, divergence="jsd"), result["jsd"])
    assert (result["jsd"] <= math.log(2) + 1e-12).all()
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (mixture <= entropy + 1e-12).all()
    assert (mixture <= beta * result["forward"] + (1 - beta) * result["reverse"] + 1e-12).all()
    order = torch.randperm(classes)
    permuted = {
        name: tensor if name.endswith("input") or tensor is None else tensor[order]
        for name, tensor in {**student, **teacher}.items()
    }
    for name in DIVERGENCES:
        close(losses(**permuted, divergence=name), result[name])
    moved = {**student, "student_bias": student["student_bias"] + 5}
    for name in DIVERGENCES:
        close(losses(**moved, **teacher, divergence=name), result[name])


@PLAIN
def test_small_beta_tends_to_the_forward_divergence(implementation: str) -> None:
    function = partial(linear_kl_div, implementation=implementation)
    problem = Problem.random(dtype=torch.float64)
    problem.student_weight.data *= 0.1
    problem.teacher_weight *= 0.1
    forward = problem.solve(function)
    mixture = problem.with_options(divergence="jsd", beta=1e-6).solve(function)
    for limit, truth in zip(mixture, forward, strict=True):
        torch.testing.assert_close(limit / 1e-6, truth, rtol=1e-4, atol=1e-6)


@PLAIN
@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=15, deadline=None)
@given(
    tokens=sizes,
    classes=sizes,
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(FLOATING),
    beta=st.floats(0.01, 0.99),
)
def test_equal_heads(
    implementation: str,
    divergence: str,
    tokens: int,
    classes: int,
    seed: int,
    dtype: torch.dtype,
    beta: float,
) -> None:
    torch.manual_seed(seed)
    problem = Problem.random(
        tokens, 6, classes, dtype, bias=True, mask=1, divergence=divergence, beta=beta
    )
    problem.teacher_input, problem.teacher_weight, problem.teacher_bias = (
        leaf.detach().clone() for leaf in problem.leaves
    )
    for result in problem.solve(partial(linear_kl_div, implementation=implementation)):
        if implementation == "tiled":
            assert not result.any()
        else:
            torch.testing.assert_close(result, torch.zeros_like(result))


@pytest.mark.untyped
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_heads_of_kernels(divergence: str) -> None:
    problem = Problem.random(20, 6, 100, bias=True, divergence=divergence, beta=0.3)
    problem.teacher_input, problem.teacher_weight, problem.teacher_bias = (
        leaf.detach().clone() for leaf in problem.leaves
    )
    for result in problem.solve(partial(linear_kl_div, implementation="triton")):
        assert not result.any()
