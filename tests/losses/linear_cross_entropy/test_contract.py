"""What the public names accept, refuse and hold."""

import os
import pickle
import re
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tilework import _implementations
from tilework._implementations import TABLES
from tilework.losses import LinearCrossEntropy, LinearCrossEntropyLoss, linear_cross_entropy

import samples
from calls import Call, draw
from helpers import clones, dtype_name
from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem, composed
from losses.linear_forms import LINEAR_LEAVES, linear_tensors

HIDDEN, HEAD, TARGET = torch.ones(4, 7), torch.ones(9, 7), torch.tensor([0, 8, 3, -100])
BATCH = torch.ones(2, 3, 7)

BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("input must be a floating-point tensor", TypeError, {"input": HIDDEN.long()}),
    ("input must be a floating-point tensor", TypeError, {"input": [1.0]}),
    ("input must be of shape (..., D)", ValueError, {"input": HIDDEN[0, 0]}),
    ("input must be of shape", ValueError, {"input": HIDDEN[:, :0], "linear_weight": HEAD[:, :0]}),
    ("linear_weight must be a floating-point tensor", TypeError, {"linear_weight": HEAD.int()}),
    ("linear_weight must be of input's torch.float32", TypeError, {"linear_weight": HEAD.half()}),
    ("linear_weight must be of shape (V, 7)", ValueError, {"linear_weight": HEAD[:, :6]}),
    ("linear_weight must be of shape (V, 7)", ValueError, {"linear_weight": HEAD[None]}),
    ("linear_weight must be of shape (V, 7)", ValueError, {"linear_weight": HEAD[:0]}),
    ("target must be int64 of shape (4,)", TypeError, {"target": TARGET.int()}),
    ("target must be int64 of shape (4,)", TypeError, {"target": torch.ones(4, 9)}),
    ("target must be of shape (4,)", ValueError, {"target": TARGET[:3]}),
    ("target must be of shape (2, 3)", ValueError, {"input": BATCH, "target": TARGET}),
    ("linear_bias must be of shape (9,)", ValueError, {"linear_bias": torch.ones(7)}),
    ("linear_bias must be of input's", TypeError, {"linear_bias": torch.ones(9).double()}),
    ("weight must be of shape (9,)", ValueError, {"weight": torch.ones(4)}),
    ("weight must be a floating-point tensor", TypeError, {"weight": torch.ones(9).long()}),
    ("weight must not require a gradient", ValueError, {"weight": torch.ones(9).requires_grad_()}),
    ("token_weight must be of shape (4,)", ValueError, {"token_weight": torch.ones(9)}),
    (
        "token_weight must not require a gradient",
        ValueError,
        {"token_weight": torch.ones(4).requires_grad_()},
    ),
    ("reduction must be one of 'mean', 'sum', 'none', got 'avg'", ValueError, {"reduction": "avg"}),
    ("ignore_index must be an int", TypeError, {"ignore_index": 1.5}),
    ("ignore_index must be an int", TypeError, {"ignore_index": None}),
    ("label_smoothing must be a number from 0 to 1", ValueError, {"label_smoothing": 1.1}),
    ("label_smoothing must be a number from 0 to 1", ValueError, {"label_smoothing": -0.1}),
    ("label_smoothing must be a number", TypeError, {"label_smoothing": "0.1"}),
    ("softcap must be a finite number above 0", ValueError, {"softcap": 0.0}),
    ("softcap must be a finite number above 0", ValueError, {"softcap": float("inf")}),
    ("z_loss must be a finite number of at least 0", ValueError, {"z_loss": -1e-4}),
    ("z_loss must be a finite number of at least 0", ValueError, {"z_loss": float("nan")}),
    ("shift must be an int of at least 0", ValueError, {"shift": -1}),
    ("shift must be an int", TypeError, {"shift": 1.0}),
    ("shift above 0 must come with input of shape (..., B, T, D)", ValueError, {"shift": 1}),
    (
        "be below T, got shift=3",
        ValueError,
        {"input": BATCH, "target": torch.zeros(2, 3, dtype=torch.int64), "shift": 3},
    ),
    (
        "implementation must be one of 'triton', 'chunked', 'tiled', 'reference', got 'cuda'",
        ValueError,
        {"implementation": "cuda"},
    ),
    (
        "no implementation takes these tensors (triton: it takes float16, bfloat16, float32, not",
        TypeError,
        {"input": HIDDEN.to(torch.float8_e4m3fn), "linear_weight": HEAD.to(torch.float8_e4m3fn)},
    ),
    (
        "target must lie in [0, 9) or be ignore_index=-100, got 9",
        IndexError,
        {"target": TARGET + 1},
    ),
    ("target must lie in [0, 9)", IndexError, {"target": TARGET - 1, "ignore_index": -101}),
    ("got -100", IndexError, {"ignore_index": 3}),
    (
        "linear_weight must lie on the device of input, cpu, got meta",
        ValueError,
        {"linear_weight": HEAD.to("meta")},
    ),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), BAD)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"input": HIDDEN, "linear_weight": HEAD, "target": TARGET, **change}
    with pytest.raises(error, match="linear_cross_entropy: .*" + re.escape(message)):
        linear_cross_entropy(**arguments)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "option",
    [
        {"reduction": "avg"},
        {"label_smoothing": 2},
        {"softcap": -1.0},
        {"z_loss": -1.0},
        {"shift": -1},
        {"implementation": "cuda"},
        {"ignore_index": "x"},
    ],
)
def test_modules_refuse_options_at_construction(option: dict[str, Any]) -> None:
    (name,) = option
    for build in (LinearCrossEntropy, lambda **kw: LinearCrossEntropyLoss(3, 4, **kw)):
        with pytest.raises((ValueError, TypeError), match=name):
            build(**option)


@pytest.mark.untyped
def test_misspelt_and_positional_options() -> None:
    with pytest.raises(TypeError, match="label_smooth"):
        linear_cross_entropy(HIDDEN, HEAD, TARGET, label_smooth=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        linear_cross_entropy(HIDDEN, HEAD, TARGET, torch.rand(9))  # type: ignore[misc]


@pytest.mark.untyped
def test_triton_where_it_cannot_run() -> None:
    # Some seconds: two processes, of which each imports torch.
    with pytest.raises(ValueError, match=r"'triton' cannot be used: it takes float16.*float64"):
        linear_cross_entropy(HIDDEN.double(), HEAD.double(), TARGET, implementation="triton")
    code = """if True:
        import sys, torch
        {hide}
        from tilework.losses import linear_cross_entropy
        hidden, head, target = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
        print(linear_cross_entropy(hidden, head, target).item())
        try:
            linear_cross_entropy(hidden, head, target, implementation="triton")
        except ValueError as error:
            print(error)
    """
    absent = "sys.modules['triton'] = None"
    for hide, reason in (("", "it runs on cuda, not on cpu"), (absent, "it runs on cuda")):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        output = subprocess.run(
            [sys.executable, "-c", code.format(hide=hide)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert f"implementation='triton' cannot be used: {reason}" in output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_default_on_the_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.losses._classes.linear import chunked, schedule, tiled

    calls = []
    for module, name in ((tiled, "forward"), (chunked, "loss_and_gradients")):
        function = getattr(module, name)
        record = partial(lambda name, f, *args: calls.append(name) or f(*args), name, function)
        monkeypatch.setattr(module, name, record)
    hidden, head = HIDDEN.to(dtype), HEAD.to(dtype)
    trained = head.clone().requires_grad_()
    linear_cross_entropy(hidden, head, TARGET)
    assert calls == ["forward"]
    linear_cross_entropy(hidden, trained, TARGET)
    assert calls[1:] == ["loss_and_gradients"]
    with torch.no_grad():
        linear_cross_entropy(hidden, trained, TARGET)
    linear_cross_entropy(hidden, trained, TARGET, reduction="none")
    monkeypatch.setattr(schedule, "SMALL", 0)
    monkeypatch.setattr(chunked, "extra_bytes", lambda *args: 2**30)
    linear_cross_entropy(hidden, trained, TARGET)
    assert calls[2:] == ["forward"] * 3


def test_costs_of_the_schedules() -> None:
    from tilework.losses._classes.linear import schedule

    def shapes(tokens: int, features: int, classes: int, dtype: torch.dtype) -> Any:
        one = torch.empty((), dtype=dtype, requires_grad=True)
        return one.expand(tokens, features), one.expand(classes, features)

    def default(input: torch.Tensor, linear_weight: torch.Tensor, is_sum: bool = True) -> str:
        given = {"linear_weight": linear_weight, "is_sum": is_sum}
        return _implementations.choose(
            "", TABLES["losses.linear_cross_entropy"], None, input, **given
        )

    again, chunks = schedule.costs(*shapes(2048, 768, 50304, torch.float32))
    assert again.operations == 8 * 2048 * 768 * 50304
    assert chunks.operations == 6 * 2048 * 768 * 50304
    assert chunks.extra_bytes == 512 * 50304 * 4
    assert again.extra_bytes < chunks.extra_bytes
    head = shapes(2048, 768, 50304, torch.float32)
    assert default(*head) == "chunked"
    # Positions of two dimensions are the same tokens.
    assert default(head[0].unflatten(0, (4, 512)), head[1]) == "chunked"
    # 512 tokens of float32 logits are small beside a head of 256000 classes and 2304 features.
    large = shapes(1024, 2304, 256000, torch.float32)
    assert schedule.costs(*large)[1].extra_bytes == 512 * 256000 * 4
    assert default(*large) == "chunked"
    narrow = shapes(1024, 64, 500000, torch.float32)
    assert schedule.costs(*narrow)[1].extra_bytes == 256 * 500000 * 4
    assert default(*shapes(4096, 64, 1000000, torch.float32)) == "tiled"
    batched = shapes(4096, 64, 1000000, torch.float32)
    assert default(batched[0].unflatten(0, (64, 64)), batched[1]) == "tiled"
    # Both sides of the bounds: what is small, and half of the gradients.
    assert schedule.costs(*shapes(4096, 64, 2**18, torch.float32))[1].extra_bytes == schedule.SMALL
    assert default(*shapes(4096, 64, 2**18, torch.float32)) == "chunked"
    assert default(*shapes(4096, 64, 2**18 + 1, torch.float32)) == "tiled"
    assert default(*shapes(2053, 511, 2**20, torch.float32)) == "chunked"
    assert default(*shapes(2052, 511, 2**20, torch.float32)) == "tiled"
    # On other devices than a CPU they are for those who ask for them.
    small = shapes(64, 32, 100, torch.float32)
    assert default(*small) == "chunked"
    assert default(*(tensor.to("meta").requires_grad_() for tensor in small)) == "tiled"
    # Without gradients, of single losses and in float16 there is nothing to take early.
    assert default(*head, is_sum=False) == "tiled"
    assert default(*shapes(2048, 768, 50304, torch.float16)) == "tiled"
    with torch.no_grad():
        assert default(*head) == "tiled"


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_memory_of_half_precision(
    dtype: torch.dtype, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.losses._classes import tiles
    from tilework.losses._classes.linear import schedule

    monkeypatch.setattr(tiles, "_BFLOAT16_PRODUCTS", products)
    size = 2 if products and dtype == torch.bfloat16 else 4
    # A float32 copy of the weight for the products, unless they are of half precision.
    cast = (size - 2) * 2 * 50304 * 768
    for tokens, chunk, added in ((2048, 2048, 0), (2049, 512, 4 * 50304 * 768)):
        one = torch.empty((), dtype=dtype)
        again, chunks = schedule.costs(one.expand(tokens, 768), one.expand(50304, 768))
        assert chunks.extra_bytes == size * chunk * 50304 + added + cast
        # Tiles of 2048 x 1024, and the float32 gradients of the input and of a tile of the weight.
        assert again.extra_bytes == 4 * (3 * 2048 * 1024 + tokens * 768 + 1024 * 768)


@pytest.mark.parametrize(
    "options", [{"gradient_filter": 1e-3}, {"reduction": "none"}, {"implementation": "tiled"}]
)
def test_no_chunks_for_what_they_cannot_give(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.losses._classes.linear import chunked

    def refuse(*_: object) -> None:
        raise AssertionError("chunks were taken")

    monkeypatch.setattr(chunked, "loss_and_gradients", refuse)
    head = HEAD.clone().requires_grad_()
    linear_cross_entropy(HIDDEN, head, TARGET, **options).sum().backward()
    with pytest.raises(AssertionError, match="chunks were taken"):
        linear_cross_entropy(HIDDEN, head, TARGET)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_small_gradients_of_float16_are_scaled_before_they_are_rounded(
    implementation: str | None,
) -> None:
    hidden, head = (torch.randn(*shape).half().requires_grad_() for shape in ((4, 7), (9, 7)))
    weight = torch.full((4,), 2.0**-20)
    loss = linear_cross_entropy(
        hidden,
        head,
        TARGET,
        token_weight=weight,
        reduction="sum",
        implementation=implementation,
    )
    scaled = torch.autograd.grad(loss * 2**20, (hidden, head))
    loss = linear_cross_entropy(hidden, head, TARGET, reduction="sum", implementation="tiled")
    for gradient, expected in zip(scaled, torch.autograd.grad(loss, (hidden, head)), strict=True):
        # In units of half precision, in which kernels hold the gradients of logits.
        assert (gradient - expected).norm() <= 2 * torch.finfo(torch.float16).eps * expected.norm()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_modules_equal_the_function(implementation: str) -> None:
    options: dict[str, Any] = {
        "reduction": "none",
        "label_smoothing": 0.1,
        "softcap": 5.0,
        "z_loss": 0.1,
        "shift": 1,
        "ignore_index": 2,
        "implementation": implementation,
    }
    weight, token_weight, target = torch.rand(9), torch.rand(2, 3), torch.randint(9, (2, 3))
    owner = LinearCrossEntropyLoss(7, 9, bias=True, weight=weight, **options)
    input = torch.randn(2, 3, 7)
    expected = linear_cross_entropy(
        input,
        owner.linear.weight,
        target,
        linear_bias=owner.linear.bias,
        weight=weight,
        token_weight=token_weight,
        **options,
    )
    assert torch.equal(owner(input, target, token_weight=token_weight), expected)
    guest = LinearCrossEntropy(weight, **options)
    actual = guest(
        input,
        owner.linear.weight,
        target,
        linear_bias=owner.linear.bias,
        token_weight=token_weight,
    )
    assert torch.equal(actual, expected)
    assert set(guest.state_dict()) == {"weight"}
    assert not LinearCrossEntropy().state_dict()
    assert "softcap=5.0" in repr(guest)
    assert "reduction" not in repr(LinearCrossEntropy())
    assert torch.equal(
        pickle.loads(pickle.dumps(owner))(input, target, token_weight=token_weight), expected
    )


@pytest.mark.skipif(
    not hasattr(nn, "LinearCrossEntropyLoss"), reason="torch has this layer since 2.13"
)
@pytest.mark.parametrize("bias", [False, True])
def test_takes_the_place_of_torchs_layer(bias: bool) -> None:
    weight = torch.rand(9)
    options: dict[str, Any] = {"bias": bias, "weight": weight, "label_smoothing": 0.1}
    torch.manual_seed(1)
    theirs = nn.LinearCrossEntropyLoss(7, 9, **options, ignore_index=-100)
    torch.manual_seed(1)
    ours = LinearCrossEntropyLoss(7, 9, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(4, 7)
    torch.testing.assert_close(ours(input, TARGET), theirs(input, TARGET))


def test_zero_token_weight_counts_for_nothing() -> None:
    problem = Problem.random(tokens=6, ignored=0.0, bias=True)
    assert problem.linear_bias is not None
    with torch.no_grad():
        problem.linear_bias[problem.target[2]] = -torch.inf  # an infinite loss
    token_weight = torch.tensor([1.0, 2.0, 0.0, -1.0, 3.0, 0.5])
    problem.options = {"token_weight": token_weight}
    keep = [0, 1, 3, 4, 5]
    input, weight = clones((problem.input, problem.linear_weight))
    rest = Problem(input, weight, problem.target[keep])  # type: ignore[arg-type]
    rest.linear_bias = problem.linear_bias
    rest.input = problem.input.detach()[keep].requires_grad_()
    rest.options = {"token_weight": token_weight[keep]}
    for actual, expected in zip(
        problem.solve(linear_cross_entropy), rest.solve(composed), strict=True
    ):
        actual = actual[keep] if actual.shape == problem.input.shape else actual
        torch.testing.assert_close(actual, expected)


def test_memory_stays_within_the_promise() -> None:
    # Some seconds, of logits that are more than the rest of the process.
    code = """if True:
        import resource, sys, torch
        from tilework.losses import linear_cross_entropy
        torch.manual_seed(0)
        train = sys.argv[1] == "train"
        def call(tokens, classes):
            hidden = torch.randn(tokens, 256, requires_grad=train)
            head = torch.randn(classes, 256, requires_grad=train)
            target = torch.randint(classes, (tokens,))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            loss = linear_cross_entropy(hidden, head, target)
            if train:
                loss.backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        call(64, 2000)
        print(call(2048, 64000) / 1024)
    """
    for mode, limit in (("train", 256), ("infer", 150)):
        output = subprocess.run(
            [sys.executable, "-c", code, mode], check=True, capture_output=True, text=True
        ).stdout
        assert float(output) < limit


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            linear_cross_entropy,
            linear_tensors,
            differentiable=LINEAR_LEAVES,
            options=(
                {},
                {"reduction": "none", "z_loss": 0.1, "softcap": 4.0},
                {"reduction": "sum", "label_smoothing": 0.1},
                {"gradient_filter": 0.01},
            ),
        ),
        Call(
            linear_cross_entropy,
            lambda: (
                {"input": draw(3, 5, 6), "linear_weight": draw(17, 6)}
                | {"target": torch.randint(17, (3, 5))}
            ),
            differentiable=("input", "linear_weight"),
            options=({"shift": 1},),
        ),
    ]
