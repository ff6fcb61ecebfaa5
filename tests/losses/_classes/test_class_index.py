"""The class-index layout by itself, against loops over positions and torch's cross-entropy."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tilework.losses._classes import class_index

from helpers import FLOATING, HALF, dtype_name
from losses.samples import class_index as draw

each_layout = pytest.mark.parametrize("shape", [(), (5,), (0,), (4, 3), (2, 3, 2)], ids=str)


def made(shape: tuple[int, ...], **options: Any) -> tuple[dict[str, Any], class_index.Positions]:
    tensors: dict[str, Any] = draw(*shape, weight=True)
    if not shape:
        tensors["input"] = tensors["input"].flatten()
    arguments = {"ignore_index": -100} | options
    return tensors, class_index.positions("loss", **tensors, **arguments)


@each_layout
def test_every_position_has_its_class(shape: tuple[int, ...]) -> None:
    tensors, positions = made(shape)
    assert positions.dim == min(len(shape), 1)
    rows = positions.logits.movedim(positions.dim, -1)
    given = tensors["input"].movedim(positions.dim, -1)
    at_target, nll = positions.at_target(positions.logits), positions.nll()
    assert positions.kept.shape == positions.weights.shape == at_target.shape == shape
    assert rows.shape == (*shape, 7)
    for position in itertools.product(*map(range, shape)):
        label = tensors["target"][position].item()
        assert positions.kept[position] == (label != -100)
        if label == -100:
            assert not rows[position].any()
            assert positions.target[position] == positions.weights[position] == 0
            continue
        row = given[position]
        assert torch.equal(rows[position], row)
        assert positions.target[position] == label
        assert positions.weights[position] == tensors["weight"][label]
        assert at_target[position] == row[label]
        torch.testing.assert_close(nll[position], row.exp().sum().log() - row[label])


@each_layout
def test_likelihood_is_torchs(shape: tuple[int, ...]) -> None:
    tensors, positions = made(shape)
    losses = positions.weights * positions.nll()
    for reduction in ("none", "sum", "mean"):
        expected = F.cross_entropy(**tensors, reduction=reduction)
        actual = positions.reduce(losses, reduction)
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_another_class_is_ignored() -> None:
    tensors = draw(40)
    tensors["target"].clamp_(min=0)
    positions = class_index.positions("loss", **tensors, ignore_index=3)
    assert torch.equal(positions.kept, tensors["target"] != 3)
    assert torch.equal(positions.weights, positions.kept.double())
    assert positions.class_weight is None


@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
def test_what_is_ignored_is_not_read(filling: float) -> None:
    input, target = draw(20).values()
    leaf = input.masked_fill((target == -100)[:, None], filling).requires_grad_()
    positions = class_index.positions("loss", leaf, target, -100)
    for reduction in ("none", "sum", "mean"):
        loss = positions.reduce(positions.nll(), reduction)
        expected = F.cross_entropy(input, target, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        assert torch.equal(gradient.any(1), target != -100)


def test_without_a_target_every_position_counts() -> None:
    input = torch.randn(3, 7, 2)
    positions = class_index.positions("loss", input, None, -100)
    assert positions.kept.shape == (3, 2)
    assert positions.kept.all()
    assert (positions.weights == 1).all()
    assert torch.equal(positions.logits, input)
    assert positions.reduce(torch.full((3, 2), 4.0), "mean") == 4


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_dtypes(dtype: torch.dtype) -> None:
    """Logits and weights are those of the computation, losses those of the input."""
    input, target = draw(9).values()
    weight = torch.rand(7).half()
    positions = class_index.positions("loss", input.to(dtype), target, -100, weight=weight)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    assert positions.logits.dtype == positions.weights.dtype == computed
    assert positions.class_weight is not None
    assert positions.class_weight.dtype == computed
    assert positions.dtype == positions.reduce(positions.nll(), "sum").dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = class_index.result_dtype(input.to(dtype))
    assert lowered == (torch.float32 if dtype in HALF else dtype)


@pytest.mark.untyped
def test_a_target_that_is_no_class() -> None:
    """It is an error where looking is free, and else nan in its own position alone."""
    input = torch.randn(4, 7)
    for wrong in (7, -1):
        target = torch.tensor([0, wrong, -100, 6])
        with pytest.raises(
            IndexError,
            match=rf"^loss: target must lie in \[0, 7\) or be ignore_index=-100, got {wrong}$",
        ):
            class_index.positions("loss", input, target, -100)

        def losses(target: torch.Tensor) -> torch.Tensor:
            return class_index.positions("loss", input, target, -100).nll()

        unread = torch.func.vmap(losses)(target[None])[0]
        assert unread.isnan().tolist() == [False, True, False, False]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "call"),
    [
        (
            r"input must be of shape \(C\), \(N, C\) or \(N, C, d1, \.\.\.\), C >= 2, "
            r"got float32 of shape \(4, 1\)",
            ValueError,
            lambda: class_index.check_input("loss", "input", torch.zeros(4, 1), 2),
        ),
        (
            "input must be of shape",
            ValueError,
            lambda: class_index.check_input("loss", "input", torch.tensor(1.0)),
        ),
        (
            "input must be a floating-point tensor",
            TypeError,
            lambda: class_index.check_input("loss", "input", torch.zeros(4, 3).long()),
        ),
        (
            r"labels must be int64 of shape \(4,\), got int32 of shape \(4,\)",
            TypeError,
            lambda: class_index.check_target("loss", "labels", torch.zeros(4).int(), (4,)),
        ),
        (
            r"labels must be of shape \(4,\)",
            ValueError,
            lambda: class_index.check_target("loss", "labels", torch.zeros(3).long(), (4,)),
        ),
        (
            r"labels must be int64 of shape \(4,\)",
            TypeError,
            lambda: class_index.check_target("loss", "labels", [0, 0, 0, 0], (4,)),  # type: ignore[arg-type]
        ),
        (
            "ignore_index must be an int",
            TypeError,
            lambda: class_index.check_options("loss", 1.0, "mean"),  # type: ignore[arg-type]
        ),
        (
            "reduction must be one of 'mean', 'sum', 'none', got 'average'",
            ValueError,
            lambda: class_index.check_options("loss", -100, "average"),
        ),
        (
            r"weight must be of shape \(7,\)",
            ValueError,
            lambda: class_index.positions("loss", **draw(4), ignore_index=9, weight=torch.ones(6)),
        ),
    ],
)
def test_what_is_refused(message: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^loss: {message}"):
        call()


@pytest.mark.untyped
def test_compiles_and_has_derivatives() -> None:
    input, target = draw(4, 3).values()

    def loss(input: torch.Tensor) -> torch.Tensor:
        positions = class_index.positions("loss", input, target, -100)
        return positions.reduce(positions.weights * positions.nll(), "mean")

    leaf = input.requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(leaf), loss(leaf))
