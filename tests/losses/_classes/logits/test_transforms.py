"""Transforms of PyTorch, applied to the statistics of logits in every room."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tilework.losses import comp_sum_loss, error_norm_truncation_loss, squentropy

from losses._classes.logits.problem import (
    DIFFERENTIABLE,
    ROOMS,
    definition,
    draw,
    draw_targets,
    measured,
)

pytestmark = [pytest.mark.usefixtures("small_tiles"), pytest.mark.untyped]
every_room = pytest.mark.parametrize("room", ROOMS)
every_exact_room = pytest.mark.parametrize("room", ["reference", "tiled"])  # these take float64
Statistics = Callable[..., Any]

INPUT = torch.zeros(3, 2, 40, 3, dtype=torch.float64)
TARGET = torch.zeros(3, 2, 3, dtype=torch.int64)
WEIGHT = torch.zeros(40, dtype=torch.float64)


@pytest.fixture(autouse=True)
def drawn() -> None:
    INPUT.normal_()
    WEIGHT.uniform_()
    TARGET.random_(40)[:, 1, 1] = -100


def scalar_of(statistics: Statistics) -> Callable[..., Tensor]:
    """Something of every statistic, none of whose derivatives is constant."""

    def scalar(input: Tensor, target: Tensor = TARGET[0]) -> Tensor:
        found = statistics(input, target, WEIGHT.to(input.dtype))
        values = [getattr(found, name) for name in DIFFERENTIABLE]
        return sum((value.sin() * (1 + index)).sum() for index, value in enumerate(values))  # type: ignore[return-value]

    return scalar


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda scalar: torch.func.grad(scalar)(INPUT[0]),
    "vmap": lambda scalar: torch.func.vmap(scalar)(INPUT, TARGET),
    "vmap over positions": lambda scalar: torch.func.vmap(scalar, (1, 0))(
        INPUT.movedim(0, 1), TARGET
    ),
    "vmap of grad": lambda scalar: torch.func.vmap(torch.func.grad(scalar))(INPUT, TARGET),
    "jvp": lambda scalar: torch.func.jvp(scalar, (INPUT[0],), (INPUT[1],)),
    "hessian": lambda scalar: torch.func.hessian(scalar)(INPUT[0]),
    "grad of grad": lambda scalar: torch.func.grad(
        lambda input: torch.func.grad(scalar)(input).sin().sum()
    )(INPUT[0]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@every_exact_room
def test_functional_transforms(room: str, transform: Callable[..., Any]) -> None:
    actual = tree_leaves(transform(scalar_of(partial(measured, room=room))))
    expected = tree_leaves(transform(scalar_of(definition)))
    for result, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10)


def test_functional_transforms_of_kernels() -> None:
    def both(statistics: Statistics, dtype: torch.dtype) -> Any:
        gradient = torch.func.grad_and_value(scalar_of(statistics))
        return tree_leaves(torch.func.vmap(gradient)(INPUT.to(dtype), TARGET))

    actual = both(partial(measured, room="triton"), torch.float32)
    for result, truth in zip(actual, both(definition, torch.float64), strict=True):
        torch.testing.assert_close(result, truth.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("moments", [False, True])
@every_exact_room
def test_gradcheck(room: str, moments: bool, squares: bool) -> None:
    """Of what does not depend on the shift, a constant for all gradients but numerical ones."""

    def function(input: Tensor) -> tuple[Tensor, ...]:
        found = measured(input, TARGET[0], WEIGHT, room=room, moments=moments, squares=squares)
        log_sum = found.total.log()
        values = [found.target_gap + log_sum, found.class_gap + WEIGHT.sum() * log_sum]
        values += [found.squares] if squares else []
        values += [found.moment / found.total + log_sum] if moments else []
        return tuple(values)

    input = INPUT[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, input, check_batched_grad=True)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("room", ["tiled", "triton"])
def test_operators(room: str, every: bool) -> None:
    for shape in ((5, 40), (2, 40, 3)):
        input = draw(*shape).requires_grad_()
        target = draw_targets(input)
        given: dict[str, Any] = {
            "input": input,
            "target": target,
            "class_weight": torch.rand(40) if every else None,
            "ignore_index": -100,
            "squares": every,
            "moments": every,
            "implementation": room,
        }
        torch.library.opcheck(torch.ops.tilework.logit_stats.default, (), given)
        known = {"shift": torch.randn(target.shape), "total": torch.rand(target.shape) + 1}
        names = DIFFERENTIABLE if every else ("total", "target_gap")
        upstream = {
            f"grad_{name}": torch.randn(target.shape).requires_grad_() if name in names else None
            for name in DIFFERENTIABLE
        }
        torch.library.opcheck(
            torch.ops.tilework.logit_stats_backward.default,
            (),
            given | known | upstream | {"needed": [True]},
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_of_a_sum(dtype: torch.dtype) -> None:
    for shape in ((5, 40), (2, 40, 3)):
        input = draw(*shape, dtype=dtype).requires_grad_()
        target = draw_targets(input)
        torch.library.opcheck(
            torch.ops.tilework.logit_summed_loss.default,
            (),
            {
                "input": input,
                "target": target,
                "class_weight": torch.rand(40),
                "weight": torch.rand(target.shape),
                "target_weight": torch.rand(target.shape),
                "formula": "cross_entropy",
                "numbers": [0.1, 0.01],
                "ignore_index": -100,
                "implementation": "tiled",
            },
        )


@every_room
def test_compiles_for_every_size(room: str) -> None:
    scalar = scalar_of(partial(measured, room=room))
    compiled = torch.compile(scalar, fullgraph=True, dynamic=True, backend="aot_eager")
    dtype = torch.float32 if room == "triton" else torch.float64
    for shape in ((2, 40, 3), (5, 40, 4)):
        input = draw(*shape, dtype=dtype).requires_grad_()
        target = draw_targets(input)
        expected, actual = scalar(input, target), compiled(input, target)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, input), torch.autograd.grad(expected, input)
        )


@every_room
def test_autocast_changes_nothing(room: str) -> None:
    input = draw(5, 40).requires_grad_()
    target, weight = draw_targets(input), torch.rand(40)
    expected = measured(input, target, weight, room=room)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = measured(input, target, weight, room=room)
        (gradient,) = torch.autograd.grad(actual.class_gap.sum() + actual.total.sum(), input)
    for values, others in zip(actual, expected, strict=True):
        assert torch.equal(values, others)
    (truth,) = torch.autograd.grad(expected.class_gap.sum() + expected.total.sum(), input)
    assert torch.equal(gradient, truth)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("loss", [comp_sum_loss, squentropy, error_norm_truncation_loss])
def test_modes_around_a_loss(loss: Callable[..., Tensor], reduction: str) -> None:
    """A counter and fake tensors see one operator each way, which has the shapes of the real."""
    options = {"fraction": 0.1} if loss is error_norm_truncation_loss else {}
    for shape in ((5, 40), (2, 40, 3)):
        input = draw(*shape).requires_grad_()
        target = draw_targets(input, ignored=0.0)
        expected = loss(input, target, reduction=reduction, **options)
        (truth,) = torch.autograd.grad(expected.sum(), input)
        with FlopCounterMode(display=False) as counter:
            counted = loss(input, target, reduction=reduction, **options)
            (gradient,) = torch.autograd.grad(counted.sum(), input)
        assert counter.get_total_flops() == 0
        torch.testing.assert_close([counted, gradient], [expected, truth])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(input.detach()).requires_grad_()
            result = loss(fake, mode.from_tensor(target), reduction=reduction, **options)
            (gradient,) = torch.autograd.grad(result.sum(), fake)
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
        assert gradient.shape == truth.shape
        assert gradient.dtype == truth.dtype


@every_room
def test_nothing_is_recorded_or_modified(room: str) -> None:
    input = draw(5, 40).requires_grad_()
    tensors = input, draw_targets(input), torch.rand(40)
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        assert not any(values.requires_grad for values in measured(*tensors, room=room))
    found = measured(*tensors, room=room)
    assert {name for name in found._fields if getattr(found, name).requires_grad} == set(
        DIFFERENTIABLE
    )
    sum(getattr(found, name).sum() for name in DIFFERENTIABLE).backward()
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), copy)
