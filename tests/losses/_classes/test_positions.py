"""What each position counts, from logits and from a head, against loops over positions."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.losses._classes.positions import OfHead, OfLogits, Positions, of_head, of_logits

CLASSES = 7
each_weight = pytest.mark.parametrize("weight", [None, torch.arange(1.0, 8.0)], ids=["", "weight"])


def from_logits(target: Tensor | None, **options: Any) -> OfLogits:
    shape = target.shape if target is not None else options.pop("shape")
    input = torch.randn(*shape[:1], CLASSES, *shape[1:], dtype=options.pop("dtype", None))
    return of_logits("loss", input, target, options.pop("ignore_index", -100), **options)


def from_head(target: Tensor | None, **options: Any) -> OfHead:
    shape = target.shape if target is not None else options.pop("shape")
    dtype = options.pop("dtype", None)
    hidden, head = torch.randn(*shape, 4, dtype=dtype), torch.randn(CLASSES, 4, dtype=dtype)
    ignore_index = options.pop("ignore_index", -100)
    return of_head("loss", hidden, head, target, None, ignore_index, "tiled", **options)


def expected_weights(
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
) -> tuple[list[float], list[float]]:
    """Of positions and of their targets, one after another; those without a target last."""
    of_position, of_target = [], []
    for place in itertools.product(*map(range, target.shape)):
        source = (*place[:-1], place[-1] + shift)
        inside = source[-1] < target.shape[-1]
        label = int(target[source]) if inside else ignore_index
        count = 1.0
        if token_weight is not None and inside:
            count = float(token_weight[source])
        counts = label != ignore_index and count != 0
        of_position.append(count if counts else 0.0)
        of_class = 1.0 if weight is None or not counts else float(weight[label])
        of_target.append(of_position[-1] * of_class)
    return of_position, of_target


def check(positions: Positions, expected: tuple[list[float], list[float]]) -> None:
    of_position, of_target = expected
    assert positions.weight.flatten().tolist() == pytest.approx(of_position, nan_ok=True)
    assert positions.target_weight.flatten().tolist() == pytest.approx(of_target, nan_ok=True)
    assert positions.total_weight.item() == pytest.approx(sum(of_target), nan_ok=True)
    assert positions.kept.flatten().tolist() == [count != 0 for count in of_position]


def draw_target(*shape: int, ignore_index: int = -100) -> Tensor:
    target = torch.randint(CLASSES, shape)
    return target.masked_fill(torch.rand(shape) < 0.3, ignore_index)


@each_weight
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_weights_of_logits(weight: Tensor | None, ignore_index: int) -> None:
    for shape in ((9,), (4, 3), (2, 3, 4)):
        target = draw_target(*shape, ignore_index=ignore_index)
        positions = from_logits(target, weight=weight, ignore_index=ignore_index)
        check(positions, expected_weights(target, weight, ignore_index=ignore_index))
        assert positions.shape == shape
        assert positions.classes == CLASSES
        assert positions.input.dim() == positions.target.dim() + 1 == min(len(shape), 2) + 1


def test_of_one_position() -> None:
    positions = of_logits("loss", torch.randn(CLASSES), torch.tensor(3), -100)
    assert positions.input.shape == (1, CLASSES)
    assert positions.reduce(torch.tensor([2.5]), "none").shape == ()
    assert positions.reduce(torch.tensor([2.5]), "mean") == 2.5


@each_weight
@pytest.mark.parametrize("shift", [0, 1, 4])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_a_head(
    weight: Tensor | None, shift: int, ignore_index: int, weighted: bool
) -> None:
    target = draw_target(3, 5, ignore_index=ignore_index)
    token_weight = None
    if weighted:
        token_weight = torch.rand(3, 5).bfloat16()
        token_weight[1] = 0
        token_weight[target == ignore_index] = torch.nan  # which nobody reads
    options = {"weight": weight, "token_weight": token_weight, "shift": shift}
    positions = from_head(target, ignore_index=ignore_index, **options)
    check(positions, expected_weights(target, weight, token_weight, shift, ignore_index))
    assert positions.shape == (3, 5 - shift)
    assert positions.weight.dtype == torch.float32
    for place, label in enumerate(positions.target.view(3, 5).tolist()):
        moved = target[place, shift:].tolist() + [ignore_index] * shift
        kept = positions.kept.view(3, 5)[place].tolist()
        assert label == [
            one if keep else ignore_index for one, keep in zip(moved, kept, strict=True)
        ]
    losses = torch.arange(15.0)
    restored = positions.reduce(losses, "none")
    cut = losses.where(positions.kept, 0).view(3, 5)[:, : 5 - shift]
    assert torch.equal(restored, cut)
    assert positions.reduce(losses, "sum") == cut.sum()
    torch.testing.assert_close(
        positions.reduce(losses, "mean"), cut.sum() / positions.target_weight.sum()
    )


def test_without_a_target() -> None:
    for positions in (
        from_logits(None, shape=(4, 3)),
        from_head(None, shape=(4, 3)),
        from_head(None, shape=(4, 3), token_weight=torch.full((4, 3), 2.0)),
    ):
        assert positions.kept.all()
        assert (positions.target == 0).all()
        assert positions.weight.unique().numel() == 1
        assert positions.shape == (4, 3)
    target = torch.zeros(4, 3, dtype=torch.int64)
    positions = from_head(None, shape=(4, 3), shift=1)
    assert not positions.kept.view(4, 3)[:, -1].any()
    assert positions.kept.view(4, 3)[:, :-1].all()
    check(positions, expected_weights(target, None, shift=1))


@pytest.mark.untyped
@each_weight
def test_targets_that_are_no_class_are_nan(weight: Tensor | None) -> None:
    """Where values cannot be read; elsewhere they are refused."""
    target = torch.tensor([0, 7, -1, -100, 6])
    for source in (from_logits, from_head):
        with pytest.raises(IndexError, match=r"^loss: target must lie in \[0, 7\) .*, got 7"):
            source(target, weight=weight)

        def weights(target: Tensor, source: Any = source) -> tuple[Tensor, Tensor]:
            positions = source(target, weight=weight)
            return positions.weight, positions.target_weight

        for found in torch.func.vmap(weights, randomness="same")(target[None]):
            assert found[0].isnan().tolist() == [False, True, True, False, False]
            assert found[0, 3] == 0
    token_weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])

    def weighted(target: Tensor) -> Tensor:
        return from_head(target, weight=weight, token_weight=token_weight).target_weight

    found = torch.func.vmap(weighted, randomness="same")(target[None])[0]
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert found[1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    target, wide = draw_target(9), torch.promote_types(dtype, torch.float32)
    for positions, result in (
        (from_logits(target, dtype=dtype, weight=torch.rand(7).double()), dtype),
        (from_head(target, dtype=dtype, weight=torch.rand(7).double()), wide),
    ):
        assert positions.weight.dtype == positions.target_weight.dtype == wide
        assert positions.class_weight is not None
        assert positions.class_weight.dtype == positions.spread.dtype == wide
        assert positions.dtype == result
        assert positions.reduce(torch.ones(9, dtype=wide), "sum").dtype == result


def test_spread() -> None:
    weight = torch.rand(CLASSES)
    assert torch.equal(from_logits(draw_target(9), weight=weight).spread, weight)
    uniform = from_logits(draw_target(9)).spread
    assert uniform.shape == (CLASSES,)
    assert uniform.stride() == (0,)
    assert (uniform == 1).all()


@each_weight
def test_counting(weight: Tensor | None) -> None:
    target = torch.tensor([0, 3, -100, 6, 2])
    counts = torch.tensor([True, False, True, True, False])
    expected = target.where(counts, -100)
    for source in (from_logits, from_head):
        positions = source(target, weight=weight).counting(counts)
        check(positions, expected_weights(expected, weight))
        assert torch.equal(positions.target, expected)


def test_everywhere_and_detached() -> None:
    target = torch.tensor([[0, 3, -100], [6, 2, 1]])
    positions = from_head(target, shift=1)
    everywhere = positions.everywhere()
    assert everywhere.kept.all()
    assert everywhere.target.tolist() == [3, 0, 0, 2, 1, 0]
    positions.input.requires_grad_()
    positions.linear_weight.requires_grad_()
    statistics = positions.detached().statistics()
    assert not any(values.requires_grad for values in statistics)
    assert positions.statistics().total.requires_grad


def test_a_mean_of_no_weight_is_nan() -> None:
    for source in (from_logits, from_head):
        for reduction in ("sum", "mean"):
            positions = source(torch.full((4,), -100))
            actual = positions.loss("squentropy", (), reduction)
            assert actual.isnan() if reduction == "mean" else actual == 0
            weight = torch.zeros(CLASSES)
            actual = source(torch.zeros(4, dtype=torch.int64), weight=weight).loss(
                "squentropy", (), reduction
            )
            assert actual.isnan() if reduction == "mean" else actual == 0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("weight must be of shape", ValueError, {"weight": torch.ones(6)}),
        ("weight must not require", ValueError, {"weight": torch.ones(7, requires_grad=True)}),
        ("token_weight must be of shape", ValueError, {"token_weight": torch.ones(2, 3)}),
        ("token_weight must be a floating", TypeError, {"token_weight": torch.ones(2, 4).int()}),
        ("shift must be", ValueError, {"shift": -1}),
        ("shift must be", TypeError, {"shift": 1.0}),
        ("shift above 0 must come with", ValueError, {"shift": 4}),
        ("linear_weight must be of at least 8 classes", ValueError, {"min_classes": 8}),
    ],
)
def test_refused_by_heads(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    target = torch.zeros(2, 4, dtype=torch.int64)
    from_head(target)
    with pytest.raises(error, match=f"^loss: {message}"):
        from_head(target, **change)


def test_shift_needs_sequences() -> None:
    with pytest.raises(ValueError, match=r"^loss: shift above 0 must come with"):
        from_head(torch.zeros(4, dtype=torch.int64), shift=1)
