"""ScaledGD: what is peculiar to it; the shared tests run on single factors."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import ScaledGD, precondition_low_rank, step_in_backward

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name
from optim.samples import Optimized, Options, draw_gradients


def solved(g: Tensor, other: Tensor, damping: float) -> Tensor:
    """``g (otherᵀ other + damping I)⁻¹``, by NumPy."""
    if not g.numel():
        return g
    a, b = other.numpy(), g.numpy()
    system = a.T @ a + np.asarray(damping, a.dtype) * np.eye(a.shape[1], dtype=a.dtype)
    return torch.from_numpy(np.linalg.solve(system, b.T).T.copy())


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    return p - float(options["lr"]) * solved(g, p, options["damping"])


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            ScaledGD,
            definition,
            options=(
                {},
                {"lr": 0.3, "damping": 0.5},
                {"damping": 0.0},
            ),
            shapes=((9, 3), (8, 2), (0, 3), (2, 0)),
            standard_decay=False,
            elementwise=False,
            takes_groups=False,
            refuses=(
                ("damping must be a finite number of at least 0", ValueError, {"damping": -1e-3}),
                ("layout must be one of 'factors', 'lora'", ValueError, {"layout": "svd"}),
                (
                    "factors must be pairs with layout='lora', got 1",
                    ValueError,
                    {"layout": "lora", "params": [torch.zeros(3, 2)]},
                ),
                (
                    "factors must be pairs or single parameters with layout='factors', got 3",
                    ValueError,
                    {"params": [[torch.zeros(3, 2)] * 3]},
                ),
                ("factors must be matrices", ValueError, {"params": [torch.zeros(3)]}),
                (
                    r"factors must be of one rank, got \[2, 3\]",
                    ValueError,
                    {"params": [(torch.zeros(3, 2), torch.zeros(2, 3))]},
                ),
                (
                    r"factors must be of one rank, got \[3, 2\]",
                    ValueError,
                    {"params": [(torch.zeros(3, 2), torch.zeros(3, 2))], "layout": "lora"},
                ),
                (
                    "factors must be an iterable of pairs",
                    TypeError,
                    {"params": torch.zeros(3, 2)},
                ),
                ("factors must be an iterable of pairs", TypeError, {"params": 3}),
            ),
        )
    ]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            precondition_low_rank,
            lambda: {"grad": draw(4, 2), "other": draw(5, 2)},
            options=({}, {"damping": 0.5}),
            differentiable=("grad", "other"),
        )
    ]


Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]


def pair(layout: str, dtype: torch.dtype = torch.float64) -> Pair:
    shapes = ((9, 2), (8, 2)) if layout == "factors" else ((2, 9), (8, 2))
    first, last = (
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes
    )
    return first, last


LAYOUTS = ("factors", "lora")
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_both_factors_see_the_other_as_it_was(
    layout: str, damping: float, dtype: torch.dtype
) -> None:
    first, last = pair(layout, dtype)
    optimizer = ScaledGD([(first, last)], lr=0.1, damping=damping, layout=layout)
    for _ in range(3):
        draw_gradients([first, last])
        results = []
        for wide in (torch.float32, torch.float64):
            a, b, g, h = (
                t.detach().to(wide).clone()  # type: ignore[union-attr]
                for t in (first, last, first.grad, last.grad)
            )
            if layout == "factors":
                results += [a - 0.1 * solved(g, b, damping), b - 0.1 * solved(h, a, damping)]
            else:
                results += [
                    a - 0.1 * solved(g.mT, b, damping).mT,
                    b - 0.1 * solved(h, a.mT, damping),
                ]
        optimizer.step()
        assert_exact(first.detach().clone(), results[0], results[2])
        assert_exact(last.detach().clone(), results[1], results[3])


@layouts
def test_a_factor_without_gradient_preconditions_the_other(layout: str) -> None:
    for missing in (0, 1):
        both, alone = pair(layout), pair(layout)
        for p, twin in zip(both, alone, strict=True):
            twin.data.copy_(p.detach())
        draw_gradients(both)
        alone[1 - missing].grad = both[1 - missing].grad
        for factors in (both, alone):
            ScaledGD([factors], lr=0.1, layout=layout).step()
        assert torch.equal(both[1 - missing], alone[1 - missing])
        assert not torch.equal(both[missing], alone[missing])


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_the_product_does_not_depend_on_the_factors(seed: int, rank: int) -> None:
    """Of a function of the product, without damping."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    left, right = drawn(6, rank), drawn(5, rank)
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    change = torch.eye(rank, dtype=torch.float64) + 0.3 * drawn(rank, rank) / rank
    target = drawn(6, 5)
    products = []
    starts = (left, right), (left @ change, right @ torch.linalg.inv(change).mT)
    for start in starts:
        first, last = (torch.nn.Parameter(t.clone()) for t in start)
        optimizer = ScaledGD([(first, last)], lr=0.1, damping=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            (first @ last.mT - target).square().sum().backward()
            optimizer.step()
        products.append((first @ last.mT).detach())
    torch.testing.assert_close(*products, rtol=1e-9, atol=1e-9)


@layouts
def test_with_much_damping_it_is_gradient_descent(layout: str) -> None:
    factors = pair(layout)
    start = [p.detach().clone() for p in factors]
    optimizer = ScaledGD([factors], lr=1e11, damping=1e12, layout=layout)
    draw_gradients(factors)
    optimizer.step()
    for p, old in zip(factors, start, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad, rtol=1e-9, atol=1e-9)


def test_starts_where_one_factor_is_zero() -> None:
    a, b = pair("lora", torch.float32)
    b.data.zero_()
    optimizer = ScaledGD([(a, b)], lr=0.1, damping=0.01, layout="lora")
    draw_gradients((a, b))
    before = a.detach().clone()
    optimizer.step()
    assert a.grad is not None
    torch.testing.assert_close(a.detach(), before - 10 * a.grad)
    assert b.isfinite().all()


def test_what_makes_a_group() -> None:
    one, (left, right), (first, last) = pair("factors")[0], pair("factors"), pair("factors")
    optimizer = ScaledGD(
        iter(
            [
                one,
                (left, right),
                {"params": [first, last], "lr": 0.5},
                {"params": torch.nn.Parameter(torch.ones(2, 2)), "damping": 1},
            ]
        )
    )
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == [1, 2, 2, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.5, 0.01]
    assert optimizer.param_groups[3]["damping"] == 1
    optimizer.add_param_group({"params": list(pair("lora")), "layout": "lora"})
    named = ScaledGD(
        [("one", one), (("left", left), ("right", right)), {"params": (("a", first), ("b", last))}]
    )
    names = [group["param_names"] for group in named.param_groups]
    assert names == [["one"], ["left", "right"], ["a", "b"]]
    assert named.param_groups[1]["params"] == [left, right]


def through_a_file(optimizer: ScaledGD) -> ScaledGD:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [copy.deepcopy(tuple(group["params"])) for group in optimizer.param_groups]
    other = ScaledGD(groups[:1])
    other.add_param_group({"params": groups[1], "layout": "lora"})
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, through_a_file, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
)
def test_pairs_stay_pairs(copied: Callable[[Any], Any]) -> None:
    def every(optimizer: Any) -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    groups = [pair("factors"), {"params": pair("lora"), "layout": "lora"}]
    one = ScaledGD(groups, lr=0.3, damping=0.1)
    draw_gradients(every(one))
    one.step()
    two = copied(one)
    for _ in range(2):
        draw_gradients(every(one))
        for p, twin in zip(every(one), every(two), strict=True):
            twin.grad = p.grad
        one.step()
        two.step()
        assert all(map(torch.equal, every(one), every(two)))


@pytest.mark.untyped
@layouts
def test_compiled_pairs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile_(f, backend="eager", **kwargs)
    )
    plain, other = pair(layout), pair(layout)
    for p, twin in zip(plain, other, strict=True):
        twin.data.copy_(p.detach())
    optimizers = [
        ScaledGD([factors], lr=0.1, layout=layout, compiled=factors is other)
        for factors in (plain, other)
    ]
    for _ in range(2):
        draw_gradients(plain)
        for p, twin in zip(plain, other, strict=True):
            twin.grad = p.grad
        for optimizer in optimizers:
            optimizer.step()
        for p, twin in zip(plain, other, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-12, atol=1e-12)


def test_pairs_need_both_gradients_in_the_backward_pass() -> None:
    with pytest.raises(ValueError, match="must update each parameter by its own gradient"):
        step_in_backward(ScaledGD([pair("factors")]))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize(
    "shapes", [((7, 3), (9, 3)), ((2, 1, 2, 3), (2, 1, 9, 3)), ((0, 2), (3, 2))]
)
@pytest.mark.parametrize("damping", [1e-3, 0.5, 0.0])
def test_preconditioned_gradients(
    dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], damping: float
) -> None:
    grad, other = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    results = []
    for wide in (torch.float32, torch.float64):
        g, o = (t.to(wide)[None].flatten(0, -3) for t in (grad, other))
        each = [solved(*matrices, damping) for matrices in zip(g, o, strict=True)]
        results.append(torch.stack(each).reshape(grad.shape))
    narrow = torch.float32 if dtype == torch.float64 else dtype
    result = precondition_low_rank(grad, other, damping=damping)
    assert result.dtype == dtype
    assert_exact(result, results[0].to(narrow), results[1])


def test_the_wider_dtype_is_computed_in() -> None:
    grad, other = torch.randn(4, 2), torch.randn(5, 2, dtype=torch.float64)
    result = precondition_low_rank(grad, other)
    wide = precondition_low_rank(grad.double(), other)
    assert torch.equal(result, wide.float())


def test_what_cannot_be_solved_is_nan() -> None:
    grad = torch.ones(2, 2)
    other = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    assert precondition_low_rank(grad, other).isnan().all()


def test_a_singular_system_is_nan_by_cholesky_and_a_number_by_lu() -> None:
    """Where rounding makes a matrix of rank 1 indefinite, Cholesky's factor may be finite."""
    other = torch.randint(1, 200, (1000, 1, 2)) / 7
    failed = torch.linalg.cholesky_ex(other.mT @ other).info != 0
    assert failed.any()
    grad = torch.ones(1000, 1, 2)
    assert precondition_low_rank(grad, other, damping=1e-30)[failed].isnan().all()
    assert precondition_low_rank(grad, other, damping=0.0)[failed].isfinite().any()
    for damping, expected in ((1e-30, Tensor.isnan), (0.0, lambda p: ~p.isnan())):
        parameters = [torch.nn.Parameter(matrix) for matrix in other[failed]]
        for parameter in parameters:
            parameter.grad = torch.ones(1, 2)
        ScaledGD(parameters, damping=damping).step()
        assert any(expected(parameter).all() for parameter in parameters)


def test_gradients() -> None:
    grad, other = (torch.randn(s, 2, dtype=torch.float64, requires_grad=True) for s in (4, 5))
    assert torch.autograd.gradcheck(precondition_low_rank, (grad, other))
    assert torch.autograd.gradgradcheck(precondition_low_rank, (grad, other))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("grad must be a floating-point tensor", TypeError, {"grad": torch.ones(4, 2).long()}),
        ("other must be a floating-point tensor", TypeError, {"other": 1.0}),
        ("grad must be a matrix or a batch of them", ValueError, {"grad": torch.ones(2)}),
        (r"other must be of shape \(q, 2\)", ValueError, {"other": torch.ones(5, 3)}),
        (r"other must be of shape \(q, 2\)", ValueError, {"other": torch.ones(2)}),
        (r"other must be of shape \(q, 2\)", ValueError, {"other": torch.ones(1, 5, 2)}),
        ("damping must be a finite number of at least 0", ValueError, {"damping": -1.0}),
        ("other must lie on the device", ValueError, {"other": torch.ones(5, 2, device="meta")}),
    ],
)
def test_refuses(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    accepted = {"grad": torch.ones(4, 2), "other": torch.ones(5, 2)}
    precondition_low_rank(**accepted)
    with pytest.raises(error, match=f"^precondition_low_rank: {message}"):
        precondition_low_rank(**(accepted | change))
