"""Statistics of logits and their gradients against the definition in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilework.losses._classes.statistics import Statistics

from helpers import FLOATING, assert_exact, dtype_name
from losses._classes.logits.problem import (
    DIFFERENTIABLE,
    ROOMS,
    definition,
    draw,
    draw_targets,
    measured,
)

pytestmark = pytest.mark.usefixtures("small_tiles")
every_room = pytest.mark.parametrize("room", ROOMS)
BUILT = [
    pytest.param(room, dtype, id=f"{room}-{dtype_name(dtype)}")
    for room, dtype in itertools.product(ROOMS, FLOATING)
    if (room, dtype) != ("triton", torch.float64)
]
SHAPES = [(1, 1), (7, 1), (1, 7), (9, 63), (5, 100), (2, 400), (3, 63, 7), (13, 7, 3), (2, 100, 1)]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda dense: dense.transpose(0, 1).contiguous().transpose(0, 1),
    "classes last": lambda dense: dense.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda dense: torch.stack((dense, torch.full_like(dense, torch.nan)), -1)[..., 0],
    "one row": lambda dense: dense[:1].expand_as(dense),
    "one class": lambda dense: dense[:, :1].expand_as(dense),
}


def check(
    input: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    *,
    room: str,
    ignore_index: int = -100,
    squares: bool = True,
    moments: bool = True,
    alone: bool = False,
) -> None:
    """Every statistic and the gradient of all together, or also of each of them ``alone``."""
    dtype = input.dtype
    compared = torch.float32 if dtype == torch.float64 else dtype
    leaves = [
        input.detach().requires_grad_(),
        input.detach().to(compared, copy=True).requires_grad_(),
        input.detach().double().requires_grad_(),
    ]
    wanted = {"squares": squares, "moment": moments, "top": moments, "argmax": moments}
    results = (
        measured(
            leaves[0],
            target,
            class_weight,
            room=room,
            ignore_index=ignore_index,
            squares=squares,
            moments=moments,
        ),
        *(definition(leaf, target, class_weight, ignore_index=ignore_index) for leaf in leaves[1:]),
    )
    for name in Statistics._fields:
        actual, composition, truth = (getattr(found, name) for found in results)
        if not wanted.get(name, True):
            assert actual.numel() == 0
        elif name == "argmax":
            assert torch.equal(actual, truth)
        else:
            assert actual.dtype == torch.promote_types(dtype, torch.float32)
            assert_exact(actual, composition, truth, dtype)
    upstream = {name: torch.randn(target.shape).double() for name in DIFFERENTIABLE}
    names = [name for name in DIFFERENTIABLE if wanted.get(name, True)]
    if class_weight is None:
        names.remove("class_gap")
    for chosen in [names, *([name] for name in names if alone)]:
        gradients = []
        for found, leaf in zip(results, leaves, strict=True):
            weighted = [
                (upstream[name].to(getattr(found, name)) * getattr(found, name)).sum()
                for name in chosen
            ]
            gradients += torch.autograd.grad(sum(weighted), leaf, retain_graph=True)  # type: ignore[arg-type]
        assert gradients[0].dtype == dtype
        assert_exact(gradients[0], gradients[1], gradients[2], dtype)


@pytest.mark.parametrize(("room", "dtype"), BUILT)
@pytest.mark.parametrize("shape", [(13, 63), (2, 40, 5)])
def test_equals_the_definition(room: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    input = draw(*shape, dtype=dtype)
    weight = torch.rand(shape[1]).to(torch.promote_types(dtype, torch.float32))
    check(input, draw_targets(input), weight, room=room, alone=True)


@pytest.mark.parametrize("shape", SHAPES)
@every_room
def test_odd_shapes(room: str, shape: tuple[int, ...]) -> None:
    input = draw(*shape)
    check(input, draw_targets(input, ignored=0.0), torch.rand(shape[1]), room=room)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("weight", ["none", "some", "uniform"])
@every_room
def test_only_what_was_asked_for(room: str, weight: str, moments: bool, squares: bool) -> None:
    for shape in ((3, 40), (1, 40, 3)):
        input = draw(*shape)
        weights = {"none": None, "some": torch.rand(40), "uniform": torch.tensor([0.7]).expand(40)}
        check(
            input,
            draw_targets(input),
            weights[weight],
            room=room,
            squares=squares,
            moments=moments,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 40), (3, 40, 5)])
@every_room
def test_strides(room: str, shape: tuple[int, ...], layout: str) -> None:
    input = LAYOUTS[layout](draw(*shape))
    target, weight = draw_targets(input), torch.rand(40)
    wide = torch.stack((target, target + 1), -1)[..., 0]
    check(input, wide, torch.stack((weight, weight + 1), -1)[:, 0], room=room)


@every_room
def test_of_no_rows(room: str) -> None:
    for shape in ((0, 7), (0, 7, 3), (3, 7, 0)):
        input = draw(*shape).requires_grad_()
        target = draw_targets(input)
        found = measured(input, target, torch.rand(7), room=room)
        assert all(values.shape == target.shape for values in found)
        (gradient,) = torch.autograd.grad(found.total.sum(), input)
        assert gradient.shape == shape


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 2**40])
@pytest.mark.parametrize("filling", [torch.nan, torch.inf, -torch.inf])
@every_room
def test_ignored_positions_are_hidden(room: str, filling: float, ignore_index: int) -> None:
    for shape in ((8, 20), (3, 20, 3)):
        input = draw(*shape)
        target = draw_targets(input, 0.4, ignore_index)
        input.movedim(1, -1)[target == ignore_index] = filling
        check(input, target, torch.rand(20), room=room, ignore_index=ignore_index)


@every_room
def test_everything_ignored(room: str) -> None:
    input = torch.full((5, 40), torch.nan)
    check(input, torch.full((5,), -100), torch.rand(40), room=room)


@pytest.mark.parametrize("wrong", [-1, 40, 41, -(2**40), 2**40])
@every_room
def test_targets_that_are_no_class(room: str, wrong: int) -> None:
    """Their gap is nan; all else is as if no class were the target, gradients too."""
    for shape in ((6, 40), (2, 40, 3)):
        input = draw(*shape).requires_grad_()
        target = draw_targets(input, ignored=0.0)
        target.view(-1)[4] = wrong
        found = measured(input, target, torch.rand(40), room=room)
        expected = definition(input, target)
        assert found.target_gap.isnan().flatten().tolist() == [False] * 4 + [True, False]
        for name in ("shift", "total", "moment", "argmax"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        (of_total,) = torch.autograd.grad(found.total.sum(), input, retain_graph=True)
        torch.testing.assert_close(of_total, torch.autograd.grad(expected.total.sum(), input)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_room
def test_what_is_not_finite_stays_in_its_row(room: str, bad: float) -> None:
    for shape, place in (((5, 70), (2, 33)), ((2, 70, 3), (1, 33, 1))):
        input = draw(*shape)
        target = draw_targets(input, ignored=0.0)
        at = (*place[:1], *place[2:])
        target[at] = 5
        input[place] = bad
        input.requires_grad_()
        found = measured(input, target, torch.rand(70), room=room)
        if bad == -torch.inf:
            # A class of probability 0.
            assert found.total[at].isfinite()
            assert found.moment[at].isfinite()
            assert found.class_gap[at] == torch.inf
        else:
            assert found.total[at].isnan()
            assert found.moment[at].isnan()
        assert found.squares[at].isnan() if bad != bad else found.squares[at] == torch.inf
        others = torch.ones_like(target, dtype=torch.bool)
        others[at] = False
        for values in found:
            assert values[others].isfinite().all()
        loss = sum(getattr(found, name).sum() for name in DIFFERENTIABLE)
        (gradient,) = torch.autograd.grad(loss, input)
        assert gradient.movedim(1, -1)[others].isfinite().all()
        if bad != -torch.inf:
            assert gradient.movedim(1, -1)[at].isnan().any()


@pytest.mark.parametrize("shape", [(4, 100), (2, 100, 3)])
@every_room
def test_logits_of_minus_infinity(room: str, shape: tuple[int, ...]) -> None:
    """The first tile has no other logit, whose maximum must not be subtracted."""
    input = draw(*shape)
    input[:, :40] = -torch.inf
    target = draw_targets(input, ignored=0.0).clamp(min=40)
    input.requires_grad_()
    exact = input.detach().double().requires_grad_()
    found, expected = measured(input, target, room=room), definition(exact, target)
    names = ("total", "target_gap", "moment")
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).float())
        (actual,) = torch.autograd.grad(getattr(found, name).sum(), input, retain_graph=True)
        assert not actual[:, :40].any()
        kept = exact.detach()[:, 40:].requires_grad_()
        alone = getattr(definition(kept, target - 40), name)
        (truth,) = torch.autograd.grad(alone.sum(), kept)
        torch.testing.assert_close(actual[:, 40:], truth.float())
    target = torch.zeros_like(target)
    assert (measured(input, target, room=room).target_gap == torch.inf).all()


@every_room
def test_rows_of_minus_infinity_alone_show(room: str) -> None:
    """As in torch, their loss is nan, and that of other rows is not."""
    input = draw(3, 40)
    input[1] = -torch.inf
    target = torch.tensor([3, 4, 5])
    nll = measured(input, target, room=room).nll
    torch.testing.assert_close(
        nll, torch.nn.functional.cross_entropy(input, target, reduction="none"), equal_nan=True
    )


@pytest.mark.parametrize(("room", "dtype"), BUILT)
def test_far_logits(room: str, dtype: torch.dtype) -> None:
    for shape in ((4, 63), (2, 63, 3)):
        far = torch.where(torch.randn(shape) > 0, 1e4, -1e4)
        far += 100 * torch.randn(shape)
        near = 1e4 + draw(*shape, scale=1e-3)
        for input in (far.to(dtype), near.to(dtype)):
            weight = torch.rand(63).to(torch.promote_types(dtype, torch.float32))
            check(input, draw_targets(input), weight, room=room)


@every_room
def test_the_first_of_equal_maxima(room: str) -> None:
    for shape in ((4, 100), (2, 100, 3)):
        input = draw(*shape).clamp(max=2.0)
        input[:, [35, 36, 90]] = 3.0
        found = measured(input, draw_targets(input, ignored=0.0), room=room)
        assert (found.argmax == 35).all()
        assert (found.top == 3.0).all()


@every_room
def test_class_weights_of_any_sign(room: str) -> None:
    input = draw(4, 70)
    check(input, draw_targets(input), torch.randn(70), room=room)
    check(input, draw_targets(input), torch.zeros(70), room=room)


@every_room
def test_two_calls_are_bitwise_equal(room: str) -> None:
    input = draw(9, 70).requires_grad_()
    target, weight = draw_targets(input), torch.rand(70)
    first, second = (measured(input, target, weight, room=room) for _ in range(2))
    for values, others in zip(first, second, strict=True):
        assert torch.equal(values, others)
    gradients = [
        torch.autograd.grad(sum(getattr(found, name).sum() for name in DIFFERENTIABLE), input)
        for found in (first, second)
    ]
    assert torch.equal(*gradients[0], *gradients[1])


@pytest.mark.parametrize("room", ["tiled", "reference"])
def test_the_total_of_many_classes_is_a_careful_sum(room: str) -> None:
    """One that dwarfs each of the others, of which torch's softmax loses the last digits."""
    input = 2 * torch.randn(8, 50000)
    input[:, 7] = 12.0
    total = measured(input, torch.zeros(8, dtype=torch.int64), room=room).total
    truth = (input.double() - input.amax(1, keepdim=True)).exp().sum(1)
    assert_exact(total, (input - input.amax(1, keepdim=True)).exp().sum(1), truth)
