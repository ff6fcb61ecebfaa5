"""What every linear form keeps. The test file of its loss has its table."""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tilework.losses
from tilework.losses import VocabShard

import processes
import samples
from helpers import FLOATING, HALF, assert_exact, dtype_name, of_numpy
from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem
from losses.linear_forms import LinearForm

pytestmark = pytest.mark.usefixtures("small_tiles")
EXACT = ("reference", "tiled")
REDUCTIONS = ("none", "sum", "mean")
SHARDS = [0, 29, 41]  # the last process holds the first classes

every_form = samples.every(LinearForm, name="form")
every_weighted_form = samples.every(LinearForm, lambda form: form.token_weight, name="form")


def test_every_linear_form_is_here() -> None:
    names = set()
    for name in tilework.losses.__all__:
        function = getattr(tilework.losses, name)
        folder = ".classification." in function.__module__
        names |= {name} if folder and name.startswith("linear_") else set()
    assert names == {form.name for form in samples.collect(LinearForm)}


LINEAR = [getattr(tilework.losses, n) for n in tilework.losses.__all__ if n.startswith("linear_")]


@pytest.mark.parametrize("implementation", [None, "reference", "tiled"])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (2, 0, 3), (2, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("function", LINEAR, ids=lambda function: function.__name__)
def test_any_number_of_leading_dimensions(
    function: Callable[..., Any], leading: tuple[int, ...], implementation: str | None
) -> None:
    """They are those of rows: results are the same, in the shape of the positions."""
    rows, classes, features = math.prod(leading), 9, 4
    names = inspect.signature(function).parameters
    required = [name for name, p in names.items() if p.default is p.empty]
    every, flat = {}, {}
    for name in [*required, *({"token_weight", "mask"} & names.keys())]:
        size = () if "input" not in name else (features,)
        if name.endswith("weight") and name != "token_weight":
            every[name] = flat[name] = torch.randn(classes, features)
            continue
        tensor = torch.randn(rows, *size) if size else torch.randint(classes, (rows,))
        tensor = tensor.float().abs() if name == "token_weight" else tensor
        tensor = tensor > 2 if name == "mask" else tensor
        flat[name], every[name] = tensor, tensor.reshape((*leading, *size))
    for tensors in (flat, every):
        for name in required[:2]:
            tensors[name] = tensors[name].detach().clone().requires_grad_()
    for options in ({"reduction": "none"}, {}) if "reduction" in names else ({},):
        options = options | {"implementation": implementation}
        expected, actual = function(**flat, **options), function(**every, **options)
        gradients = []
        for tensors, result in ((flat, expected), (every, actual)):
            values = result if isinstance(result, tuple) else (result,)
            total = sum(value.sum() for value in values if value.is_floating_point())
            gradients.append(torch.autograd.grad(total, [tensors[name] for name in required[:2]]))
        pairs = zip(
            actual if isinstance(actual, tuple) else (actual,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        )
        for ours, theirs in pairs:
            shape = leading if isinstance(actual, tuple) or "reduction" in options else ()
            assert ours.shape == shape
            torch.testing.assert_close(ours, theirs.reshape(shape), equal_nan=True)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours.reshape(theirs.shape), theirs, equal_nan=True)


@every_form
def test_shift_along_the_last_of_many_dimensions(form: LinearForm) -> None:
    input, weight = torch.randn(2, 3, 5, 4), torch.randn(9, 4)
    target = torch.randint(9, (2, 3, 5))
    options = {"shift": 2, "reduction": "none"}
    expected = form.function(input.flatten(0, 1), weight, target.flatten(0, 1), **options)
    actual = form.function(input, weight, target, **options)
    torch.testing.assert_close(actual, expected.reshape(2, 3, 3))


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["triton", None])
@every_form
def test_scalars_of_numpy(form: LinearForm, implementation: str | None) -> None:
    input, weight = torch.randn(2, 5, 4), torch.randn(9, 4)
    target = torch.randint(9, (2, 5))
    for options in form.options:
        options = options | {"ignore_index": 3, "shift": 1, "implementation": implementation}
        expected = form.function(input, weight, target, **options)
        actual = form.function(input, weight, target, **of_numpy(options))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check(form: LinearForm, problem: Problem, implementation: str) -> None:
    function = partial(form.function, implementation=implementation)
    given = problem.input.dtype
    dtype = torch.float32 if given == torch.float64 else given
    problem.options["reduction"] = "none"
    upstream = torch.rand(problem.target.shape).double() + 0.5
    results = (
        problem.solve(function, upstream),
        problem.to(dtype).solve(form.composed, upstream),
        problem.to(torch.float64).solve(form.composed, upstream),
    )
    assert results[0][0].dtype == torch.promote_types(given, torch.float32)
    for actual, composition, truth in zip(*results, strict=True):
        assert_exact(actual, composition, truth, given)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_equals_the_loss_of_the_logits(
    form: LinearForm, implementation: str, dtype: torch.dtype
) -> None:
    for options in form.options[:1] if form.steps and dtype in HALF else form.options:
        problem = Problem.random(200, dtype=dtype, bias=True, weight=form.weight, scale=0.3)
        problem.options |= options
        check(form, problem, implementation)


@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_reductions(form: LinearForm, implementation: str) -> None:
    for options in form.options:
        for reduction in REDUCTIONS:
            problem = Problem.random(weight=form.weight, reduction=reduction)
            problem.options |= options
            problem = problem.to(torch.float64)
            function = partial(form.function, implementation=implementation)
            torch.testing.assert_close(problem.solve(function), problem.solve(form.composed))


@pytest.mark.parametrize("implementation", ["triton", "chunked", None])
@every_form
def test_other_implementations(form: LinearForm, implementation: str) -> None:
    problem = Problem.random(20, 5, 50, bias=True, scale=0.5, **form.options[-1])
    check(form, problem, implementation)


@pytest.mark.parametrize(
    ("tokens", "features", "classes"), [(1, 7, 63), (63, 1, 100), (33, 64, 7), (7, 3, 2)]
)
@every_form
def test_odd_shapes(form: LinearForm, tokens: int, features: int, classes: int) -> None:
    problem = Problem.random(tokens, features, classes, ignored=0.0, **form.options[-1])
    check(form, problem, "tiled")


@every_form
def test_sequences_and_strides(form: LinearForm) -> None:
    problem = Problem.random(15, 6, 40, torch.float64, bias=True)
    expected = problem.solve(form.function)
    wide = torch.zeros(6, 3, 5, 2, dtype=torch.float64)
    wide[..., 1] = problem.input.detach().reshape(3, 5, 6).movedim(-1, 0)
    problem.input = wide[..., 1].movedim(0, -1).requires_grad_()
    problem.target = problem.target.reshape(3, 5)
    head = problem.linear_weight.detach().T.contiguous().T.requires_grad_()
    problem.linear_weight = head
    actual = problem.solve(form.function)
    actual[1] = actual[1].reshape(15, 6)
    torch.testing.assert_close(actual, expected)
    problem.options["reduction"] = "none"
    assert problem.solve(form.function)[0].shape == (3, 5)


@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_gradients_one_at_a_time(form: LinearForm, implementation: str) -> None:
    problem = Problem.random(9, 4, 30, torch.float64, bias=True)
    expected = problem.solve(form.function)[1:]
    for index, leaf in enumerate(problem.leaves):
        for other in problem.leaves:
            other.requires_grad_(other is leaf)
        loss = form.function(
            problem.input,
            problem.linear_weight,
            problem.target,
            linear_bias=problem.linear_bias,
            implementation=implementation,
        )
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected[index])


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
@every_form
def test_ignored_positions_do_not_count(
    form: LinearForm, filling: float, implementation: str
) -> None:
    function = partial(form.function, implementation=implementation)
    for ignore_index in (-100, 3):
        for reduction in REDUCTIONS:
            options = form.options[-1] | {"reduction": reduction, "ignore_index": ignore_index}
            problem = Problem.random(12, 4, 20, bias=True, ignored=0.3, **options)
            ignored = problem.target == ignore_index
            with torch.no_grad():
                problem.input[ignored] = filling
            few = Problem(
                problem.input.detach()[~ignored].requires_grad_(),
                problem.linear_weight,
                problem.target[~ignored],
                problem.linear_bias,
                options,
            )
            loss, grad_input, *grads = problem.solve(function)
            expected, expected_input, *expected_grads = few.solve(function)
            if reduction == "none":
                assert not loss[ignored].any()
                loss = loss[~ignored]
            assert not grad_input[ignored].any()
            torch.testing.assert_close(
                [loss, grad_input[~ignored], *grads], [expected, expected_input, *expected_grads]
            )


@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_of_nothing(form: LinearForm, implementation: str) -> None:
    for tokens, ignored in ((0, 0.0), (4, 1.0)):
        for reduction in REDUCTIONS:
            problem = Problem.random(tokens, 3, 5, ignored=ignored, reduction=reduction)
            problem.options |= form.options[-1] | {"implementation": implementation}
            loss, *gradients = problem.solve(form.function)
            if reduction == "mean":
                assert loss.isnan()
            else:
                assert not loss.any()
                assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_nan_shows_and_stays_in_its_row(form: LinearForm, implementation: str) -> None:
    problem = Problem.random(5, ignored=0.0)
    hidden = problem.input.detach().clone()
    hidden[2, 0] = torch.nan
    for options in form.options:
        losses = form.function(
            hidden,
            problem.linear_weight,
            problem.target,
            reduction="none",
            implementation=implementation,
            **options,
        )
        assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_far_logits(form: LinearForm, implementation: str) -> None:
    """Logits of 1e4 and more; hidden states and head are whole numbers, exact in every dtype."""
    for dtype, size in ((torch.float32, 1e4), (torch.bfloat16, 8192.0), (torch.float16, 128.0)):
        problem = Problem.random(14, 3, 9, dtype, ignored=0.0)
        with torch.no_grad():
            problem.input.copy_(size * problem.input.sign())
            problem.linear_weight.copy_(problem.linear_weight.round())
        check(form, problem, implementation)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_derivatives(form: LinearForm, implementation: str) -> None:
    problem = Problem.random(5, 3, 11, torch.float64, bias=True, weight=form.weight, scale=0.5)
    for options in (form.options[0], form.options[-1]):

        def function(hidden, head, bias, options=options):
            return form.function(
                hidden,
                head,
                problem.target,
                linear_bias=bias,
                implementation=implementation,
                **problem.options,
                **options,
            )

        assert torch.autograd.gradcheck(function, problem.leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, problem.leaves)


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", EXACT)
@every_form
def test_vmap(form: LinearForm, implementation: str) -> None:
    hidden, head = torch.randn(3, 5, 4).double(), torch.randn(31, 4).double()
    target = torch.randint(31, (3, 5))
    target[:, 1] = -100
    options = form.options[-1] | {"implementation": implementation}
    gradient = torch.func.grad_and_value(partial(form.function, **options), (0, 1))
    actual = torch.func.vmap(gradient, (0, None, 0))(hidden, head, target)
    expected = [gradient(h, head, t) for h, t in zip(hidden, target, strict=True)]
    for index in range(3):
        (of_hidden, of_head), value = expected[index]
        (all_hidden, all_head), values = actual
        torch.testing.assert_close(
            [all_hidden[index], all_head[index], values[index]], [of_hidden, of_head, value]
        )


@pytest.mark.untyped
@every_form
def test_compiles(form: LinearForm) -> None:
    function = partial(form.function, implementation="tiled", **form.options[-1])
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 9):
        problem = Problem.random(tokens, 4, 30, bias=True, ignored=0.0)
        torch.testing.assert_close(problem.solve(compiled), problem.solve(function))
    # Values are not read there: a target that is no class shows in the loss and in its gradient.
    problem.target[2] = 30
    loss, of_input, *_ = problem.solve(compiled)
    assert loss.isnan()
    assert of_input[2].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every_form
def test_autocast(form: LinearForm, implementation: str) -> None:
    problem = Problem.random(9, 4, 30, bias=True)
    options = form.options[-1] | {"linear_bias": problem.linear_bias}
    options["implementation"] = implementation
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = form.function(problem.input, problem.linear_weight, problem.target, **options)
    half = problem.to(torch.bfloat16)
    half.options = form.options[-1] | {"implementation": implementation}
    expected, *half_gradients = half.solve(form.function)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for gradient, other in zip(
        torch.autograd.grad(loss, problem.leaves), half_gradients, strict=True
    ):
        assert torch.equal(gradient, other.float())


@pytest.mark.untyped
@every_form
def test_bad_targets(form: LinearForm) -> None:
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(IndexError, match=rf"^{form.name}: target must lie in \[0, 9\).*, got 9"):
        form.function(hidden, head, torch.tensor([0, 9, 1]))
    # Where values cannot be read, such as under a transform, the loss is nan.
    for options in form.options:

        def losses(hidden, target, options=options):
            return form.function(hidden, head, target, reduction="none", **options)

        def gradient(target, losses=losses):
            return torch.func.grad(lambda hidden: losses(hidden, target).sum())(hidden)

        unread = torch.tensor([[0, -1, -100]])
        values = torch.func.vmap(partial(losses, hidden))(unread)[0]
        gradients = torch.func.vmap(gradient)(unread)[0]
        for results in (values[:, None], gradients):
            assert results.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        (r"input must be of shape \(\.\.\., D\)", ValueError, {"input": torch.zeros(())}),
        ("input must be a floating-point tensor", TypeError, {"input": torch.zeros(3, 4).int()}),
        ("linear_weight must be of shape", ValueError, {"linear_weight": torch.zeros(9, 3)}),
        (
            "linear_weight must be of input's",
            TypeError,
            {"linear_weight": torch.zeros(9, 4).half()},
        ),
        ("linear_bias must be of shape", ValueError, {"linear_bias": torch.zeros(8)}),
        ("target must be int64 of shape", TypeError, {"target": torch.zeros(3)}),
        ("target must be of shape", ValueError, {"target": torch.zeros(2, dtype=torch.int64)}),
        ("ignore_index must be an int", TypeError, {"ignore_index": None}),
        ("reduction must be one of", ValueError, {"reduction": "average"}),
        ("implementation must be one of", ValueError, {"implementation": "cut"}),
        ("linear_weight must lie on", ValueError, {"linear_weight": torch.zeros(9, 4).to("meta")}),
        ("linear_bias must lie on", ValueError, {"linear_bias": torch.zeros(9).to("meta")}),
    ],
)
@every_form
def test_bad_input(
    form: LinearForm, message: str, error: type[Exception], change: dict[str, Any]
) -> None:
    arguments = {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(9, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=f"^{form.name}: {message}"):
        form.function(**(arguments | change))


@pytest.mark.parametrize("implementation", [*EXACT, "chunked"])
@every_form
def test_shift_is_slicing(form: LinearForm, implementation: str) -> None:
    function = partial(form.function, implementation=implementation)
    for options in form.options:
        for reduction in REDUCTIONS:
            for shift in (1, 4):
                problem = sequences(form, reduction=reduction, shift=shift, **options)
                actual = problem.solve(function)
                torch.testing.assert_close(actual, problem.solve(form.composed))
                if reduction == "none":
                    assert actual[0].shape == (3, 6 - shift)
                assert not actual[1][:, 6 - shift :].any()


@pytest.mark.parametrize("implementation", [*EXACT, "chunked"])
@every_weighted_form
def test_token_weights(form: LinearForm, implementation: str) -> None:
    """Those of ignored positions are not read, and a position of weight 0 is ignored."""
    function = partial(form.function, implementation=implementation)
    for options in form.options:
        for reduction in REDUCTIONS:
            for shift in (0, 2):
                problem = sequences(form, reduction=reduction, shift=shift, **options)
                weight = torch.rand(problem.target.shape).double() + 0.5
                weight[0, 3:5] = 0.0
                weight[problem.target < 0] = torch.nan
                problem.options["token_weight"] = weight
                expected = problem.solve(form.composed)
                torch.testing.assert_close(problem.solve(function), expected)
                hidden = problem.input.detach().clone()
                hidden[0, 3 - shift : 5 - shift] = torch.nan
                problem.input = hidden.requires_grad_()
                torch.testing.assert_close(problem.solve(function), expected)


@every_weighted_form
def test_token_weights_of_any_dtype(form: LinearForm) -> None:
    problem = sequences(form)
    weight = torch.rand(problem.target.shape).bfloat16()
    problem.options["token_weight"] = weight.double()
    expected = problem.solve(form.composed)
    for dtype in FLOATING:
        problem.options["token_weight"] = weight.to(dtype)
        if dtype != torch.float16:  # in which these are not exact
            torch.testing.assert_close(problem.solve(form.function), expected)
        half = problem.to(torch.bfloat16)
        half.options["token_weight"] = weight.to(dtype)
        assert half.solve(form.function)[0].dtype == torch.float32


def sequences(form: LinearForm, **options: Any) -> Problem:
    """Three sequences of six tokens in float64."""
    problem = Problem.random(18, 5, 41, torch.float64, bias=True, weight=form.weight, **options)
    problem.input = problem.input.detach().reshape(3, 6, 5).requires_grad_()
    problem.target = problem.target.reshape(3, 6)
    return problem.to(torch.float64)


def drawn_cases() -> list[tuple[LinearForm, Problem]]:
    """Every form with its options, the same in every process."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(7)
        cases = []
        for form in samples.collect(LinearForm):
            for index, options in enumerate(form.options):
                reduction = REDUCTIONS[index % 3]
                problem = sequences(form, reduction=reduction, shift=index % 2, **options)
                problem.target[0, :3] = torch.tensor([40, 28, 29])
                if form.token_weight:
                    problem.options["token_weight"] = torch.rand(3, 6).double()
                cases.append((form, problem))
        return cases


def with_shards() -> list[list[Tensor]]:
    """Loss and gradients of what this process holds of the head."""
    place = dist.get_world_size() - 1 - dist.get_rank()
    shard = VocabShard(*SHARDS[place : place + 2])
    held = slice(shard.start, shard.stop)
    results = []
    for form, whole in drawn_cases():
        assert whole.linear_bias is not None
        part = Problem(
            whole.input,
            whole.linear_weight.detach()[held].clone().requires_grad_(),
            whole.target,
            whole.linear_bias.detach()[held].clone().requires_grad_(),
            whole.options,
        )
        for implementation in EXACT:
            function = partial(form.function, implementation=implementation, vocab_parallel=shard)
            results.append(part.solve(weighed(function)))
    return results


def weighed(function: Any) -> Any:
    """Losses that are not reduced, added up with different weights."""

    def scalar(*arguments: Any, **options: Any) -> Tensor:
        losses = function(*arguments, **options)
        return (losses * torch.arange(1, losses.numel() + 1).view(losses.shape)).sum()

    return scalar


def test_sharded_over_processes() -> None:
    expected = [
        (form, problem.solve(weighed(form.composed)))
        for form, problem in drawn_cases()
        for _ in EXACT
    ]
    for rank, results in enumerate(processes.run(with_shards, 2)):
        held = slice(*SHARDS[1 - rank : 3 - rank])
        for values, (form, (*others, head, bias)) in zip(results, expected, strict=True):
            for value, truth in zip(values, [*others, head[held], bias[held]], strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10, msg=form.name)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("shift must be an int", TypeError, {"shift": 1.0}),
        ("shift must be an int of at least 0", ValueError, {"shift": -1}),
        ("shift above 0 must come with .*, got shift=6 and", ValueError, {"shift": 6}),
        (
            "shift above 0 must come with",
            ValueError,
            {
                "shift": 1,
                "input": torch.zeros(3, 5),
                "target": torch.zeros(3, dtype=torch.int64),
            },
        ),
        ("vocab_parallel must be a VocabShard", TypeError, {"vocab_parallel": (0, 41)}),
        ("token_weight must be of shape", ValueError, {"token_weight": torch.ones(18)}),
        (
            "token_weight must not require",
            ValueError,
            {"token_weight": torch.ones(3, 6, requires_grad=True)},
        ),
        (
            "token_weight must be a floating-point tensor",
            TypeError,
            {"token_weight": torch.ones(3, 6).int()},
        ),
        ("token_weight must be a floating-point tensor", TypeError, {"token_weight": 1.0}),
        ("token_weight must lie on", ValueError, {"token_weight": torch.ones(3, 6).to("meta")}),
    ],
)
@every_form
def test_bad_sequences(
    form: LinearForm, message: str, error: type[Exception], change: dict[str, Any]
) -> None:
    if "token_weight" in change and not form.token_weight:
        pytest.skip("takes no weights of positions")
    arguments = {
        "input": torch.zeros(3, 6, 5),
        "linear_weight": torch.zeros(41, 5),
        "target": torch.zeros(3, 6, dtype=torch.int64),
    }
    form.function(**arguments, shift=5)
    with pytest.raises(error, match=f"^{form.name}: {message}"):
        form.function(**(arguments | change))


@pytest.mark.untyped
@samples.every_refusal(LinearForm)
def test_refuses(sample: LinearForm, refusal: samples.Refusal) -> None:
    sample.check_refusal(refusal)


@pytest.mark.untyped
@every_form
def test_options(form: LinearForm) -> None:
    problem = Problem.random(3, 4, 9)
    tensors = problem.input, problem.linear_weight, problem.target
    with pytest.raises(TypeError, match="positional"):
        form.function(*tensors, None)
    with pytest.raises(TypeError, match="unexpected keyword"):
        form.function(*tensors, reductoin="mean")
    loss = getattr(tilework.losses, form.name.removeprefix("linear_"))
    plain = inspect.signature(loss).parameters
    for name, parameter in inspect.signature(form.function).parameters.items():
        if name in plain and name not in ("input", "target"):
            assert parameter.default == plain[name].default
            assert parameter.kind is parameter.KEYWORD_ONLY
    if not form.weight:
        return
    for message, error, weight in (
        ("weight must be of shape", ValueError, torch.ones(8)),
        ("weight must not require", ValueError, torch.ones(9, requires_grad=True)),
        ("weight must be a floating-point tensor", TypeError, torch.ones(9).int()),
        ("weight must lie on", ValueError, torch.ones(9).to("meta")),
    ):
        with pytest.raises(error, match=f"^{form.name}: {message}"):
            form.function(*tensors, weight=weight)


def test_store_no_logits() -> None:
    # Some seconds, of logits that are more than the rest of the process.
    code = """if True:
        import resource, sys, torch, tilework.losses
        options = {"linear_error_norm_truncation_loss": {"fraction": 0.1}}
        def call(name, tokens, classes):
            function = getattr(tilework.losses, name)
            hidden = torch.randn(tokens, 64, requires_grad=True)
            head = torch.randn(classes, 64, requires_grad=True)
            target = torch.randint(classes, (tokens,))
            given = options.get(name, {}) | {"implementation": "tiled"}
            function(hidden, head, target, **given).backward()
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for name in sys.argv[1:]:
            call(name, 64, 2000)
        before = peak()
        for name in sys.argv[1:]:
            call(name, 1024, 48000)
        print(peak() - before)
    """
    names = [form.name for form in samples.collect(LinearForm)]
    output = subprocess.run(
        [sys.executable, "-c", code, *names], check=True, capture_output=True, text=True
    ).stdout
    assert float(output) < 90  # MiB; the logits are 188, the head and its gradient 12 each
