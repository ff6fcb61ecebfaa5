"""Gradients that are taken in the forward pass are the gradients, whatever is asked of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tilework.losses import linear_squentropy, linear_z_loss, squentropy, z_loss
from tilework.losses._classes import early
from tilework.losses._classes.logits import tiled
from tilework.losses._classes.logits.common import LogitStats, SummedLoss

from helpers import assert_exact, dtype_name
from losses.classification.test_squentropy import definition

pytestmark = pytest.mark.usefixtures("small_tiles")
Loss = Callable[..., Tensor]


@dataclass
class Source:
    """A loss whose gradients are taken early, its leaves, and what else it is called with."""

    function: Loss
    leaves: list[Tensor]
    target: Tensor
    options: dict[str, Any]

    def loss(self, *leaves: Tensor, reduction: str = "mean") -> Tensor:
        logits_or_head = leaves or tuple(self.leaves)
        if len(logits_or_head) == 1:
            return self.function(*logits_or_head, self.target, reduction=reduction, **self.options)
        hidden, head, bias = logits_or_head
        options = self.options | {"linear_bias": bias, "implementation": "chunked"}
        return self.function(hidden, head, self.target, reduction=reduction, **options)

    def late(self, *leaves: Tensor, reduction: str = "mean") -> Tensor:
        """The same from the unreduced losses, whose gradients are never taken early."""
        losses = self.loss(*leaves, reduction="none")
        if reduction == "sum":
            return losses.sum()
        weight = self.options.get("weight")
        kept = (self.target != -100).to(losses)
        counts = kept if weight is None else kept * weight.to(losses)[self.target.clamp(min=0)]
        return losses.sum() / counts.sum()

    def composed(self, reduction: str) -> Tensor:
        """The loss from torch's own parts; half-precision logits are upcast, as trainers do."""
        logits = self.leaves[0] if len(self.leaves) == 1 else F.linear(*self.leaves)
        dtype, rows = torch.promote_types(logits.dtype, torch.float32), logits
        if logits.dim() == 3:
            rows = logits.movedim(1, -1).flatten(0, 1)
        weight = self.options["weight"].to(dtype)
        loss = definition(rows.to(dtype), self.target.flatten(), weight, reduction=reduction)
        return loss.to(logits.dtype) if logits is self.leaves[0] else loss

    def to(self, dtype: torch.dtype) -> "Source":
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        return replace(self, leaves=leaves)


def of_logits(positions: tuple[int, ...] = (40,)) -> Source:
    input = torch.randn(*positions[:1], 23, *positions[1:], requires_grad=True)
    target = torch.randint(23, positions).masked_fill(torch.rand(positions) < 0.2, -100)
    return Source(squentropy, [input], target, {"weight": torch.rand(23)})


def of_head() -> Source:
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((40, 5), (23, 5), (23,))]
    target = torch.randint(23, (40,)).masked_fill(torch.rand(40) < 0.2, -100)
    return Source(linear_squentropy, leaves, target, {"weight": torch.rand(23)})


SOURCES: dict[str, Callable[[], Source]] = {
    "logits": of_logits,
    "images": lambda: of_logits((6, 7)),
    "head": of_head,
}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    return SOURCES[request.param]()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes each time whether gradients are taken early."""
    answers: list[bool] = []
    is_possible = early.is_possible

    def note(*leaves: Tensor | None) -> bool:
        answers.append(is_possible(*leaves))
        return answers[-1]

    monkeypatch.setattr(early, "is_possible", note)
    return answers


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_equal_those_of_the_backward_pass(
    source: Source, dtype: torch.dtype, reduction: str, taken: list[bool]
) -> None:
    given = source.to(dtype)
    compared = source.to(dtype).to(torch.float32 if dtype == torch.float64 else dtype)
    exact = source.to(dtype).to(torch.float64)
    losses = (
        given.loss(reduction=reduction),
        compared.composed(reduction=reduction),
        exact.composed(reduction=reduction),
    )
    assert_exact(*losses, dtype)
    gradients = [
        torch.autograd.grad(3 * loss, one.leaves)
        for loss, one in zip(losses, (given, compared, exact), strict=True)
    ]
    for gradient, *others in zip(*gradients, strict=True):
        assert gradient.dtype == dtype
        assert_exact(gradient, *others, dtype)
    assert taken == [True]


def test_float16_and_transforms_wait(source: Source, taken: list[bool]) -> None:
    half = source.to(torch.float16)
    torch.autograd.grad(half.loss(), half.leaves)
    leaves = [leaf.detach() for leaf in source.leaves]
    everything = tuple(range(len(leaves)))
    gradients = torch.func.grad(source.loss, everything)(*leaves)
    torch.func.jvp(source.loss, tuple(leaves), tuple(leaves))
    source.loss(*leaves)  # nobody will ask for a gradient
    with torch.no_grad():
        source.loss()
    assert not any(taken)
    torch.testing.assert_close(gradients, torch.autograd.grad(source.late(), source.leaves))
    assert taken


def test_small_gradients_of_float16_are_scaled_before_they_are_rounded() -> None:
    input = torch.zeros(2, 1000, dtype=torch.float16, requires_grad=True)
    loss = z_loss(input, coefficient=1e-6)
    (gradient,) = torch.autograd.grad(loss * 2.0**12, input)
    truth = 2.0**12 * 1e-6 * torch.tensor(1000.0).log() / 1000
    torch.testing.assert_close(gradient, truth.half().expand_as(gradient), rtol=1e-2, atol=0)


def test_are_given_as_often_as_asked(source: Source) -> None:
    expected = torch.autograd.grad(source.late(), source.leaves)
    loss = source.loss()
    for scale in (3.0, 0.5):
        scaled = torch.autograd.grad(scale * loss, source.leaves, retain_graph=True)
        torch.testing.assert_close(scaled, tuple(scale * gradient for gradient in expected))
    loss.backward(retain_graph=True)
    first = [leaf.grad for leaf in source.leaves]
    torch.testing.assert_close(first, list(expected))
    for times in (2, 3):
        loss.backward(retain_graph=True)
        accumulated = [leaf.grad for leaf in source.leaves]
        torch.testing.assert_close(accumulated, [times * gradient for gradient in expected])
    # The last one may be the saved tensor itself.
    again = torch.autograd.grad(loss, source.leaves)
    torch.testing.assert_close(again, expected)


def test_accumulate_over_calls(source: Source) -> None:
    """What the first call hands over becomes ``.grad``, to which the second one adds."""
    losses = [source.loss(), source.loss(reduction="sum")]
    for loss in losses:
        loss.backward()
    expected = torch.autograd.grad(source.late() + source.late(reduction="sum"), source.leaves)
    torch.testing.assert_close([leaf.grad for leaf in source.leaves], list(expected))


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
def test_scaled(source: Source, scale: float) -> None:
    expected = torch.autograd.grad(scale * source.late(), source.leaves)
    actual = torch.autograd.grad(scale * source.loss(), source.leaves)
    torch.testing.assert_close(actual, expected)


def test_only_those_that_are_needed(source: Source) -> None:
    expected = torch.autograd.grad(source.late(), source.leaves)
    for leaf, gradient in zip(source.leaves, expected, strict=True):
        (alone,) = torch.autograd.grad(source.loss(), leaf)
        torch.testing.assert_close(alone, gradient)
        for other in source.leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(source.loss(), leaf)
        torch.testing.assert_close(alone, gradient)
        for other in source.leaves:
            other.requires_grad_()


@pytest.mark.untyped
def test_second_derivatives(source: Source) -> None:
    source = source.to(torch.float64)

    def second(loss: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(loss.square(), source.leaves, create_graph=True)
        scalar = sum(gradient.sin().sum() for gradient in first)
        return [*first, *torch.autograd.grad(scalar, source.leaves)]  # type: ignore[arg-type]

    torch.testing.assert_close(second(source.loss()), second(source.late()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(source: Source, use_reentrant: bool) -> None:
    expected = torch.autograd.grad(source.late(), source.leaves)
    checkpoint(source.loss, *source.leaves, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close([leaf.grad for leaf in source.leaves], list(expected))


def test_saved_tensor_hooks_that_unpack_once(source: Source) -> None:
    expected = torch.autograd.grad(source.late(), source.leaves)
    unpacked: list[int] = []

    def unpack(packed: tuple[int, list[Tensor]]) -> Tensor:
        place, stored = packed
        unpacked.append(place)
        return stored.pop()

    places: Iterator[int] = iter(range(1000))
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (next(places), [one]), unpack):
        loss = source.loss()
    torch.testing.assert_close(torch.autograd.grad(loss, source.leaves), expected)
    assert unpacked
    assert len(set(unpacked)) == len(unpacked)


def test_saved_on_cpu(source: Source) -> None:
    expected = torch.autograd.grad(source.late(), source.leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = source.loss()
    torch.testing.assert_close(torch.autograd.grad(loss, source.leaves), expected)


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("retain_graph", [False, True])
def test_batched_gradients(source: Source, retain_graph: bool, dtype: torch.dtype) -> None:
    source = source.to(dtype)
    scales = torch.tensor([1.0, -2.0, 0.5])
    together = torch.autograd.grad(
        source.loss(), source.leaves, scales, retain_graph=retain_graph, is_grads_batched=True
    )
    for index, scale in enumerate(scales):
        alone = torch.autograd.grad(source.loss(), source.leaves, scale)
        for batch, gradient in zip(together, alone, strict=True):
            assert batch.dtype == dtype
            torch.testing.assert_close(batch[index], gradient)


def test_a_mean_over_nothing_has_gradients_of_zero(source: Source) -> None:
    """As unreduced losses divided by hand have nan, this is what the forward pass decides."""
    source.target.fill_(-100)
    loss = source.loss()
    assert loss.isnan()
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, source.leaves))
    total = source.loss(reduction="sum")
    assert total == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, source.leaves))


def test_leave_the_logits_alone(source: Source) -> None:
    before = [leaf.detach().clone() for leaf in source.leaves]
    source.loss().backward()
    for leaf, copy in zip(source.leaves, before, strict=True):
        assert torch.equal(leaf.detach(), copy)


def test_of_strided_logits() -> None:
    dense = of_logits()
    expected = torch.autograd.grad(dense.late(), dense.leaves)
    wide = torch.stack((dense.leaves[0].detach(), torch.full((40, 23), torch.nan)), -1)
    for strided in (dense.leaves[0].detach().T.contiguous().T, wide[..., 0]):
        source = replace(dense, leaves=[strided.requires_grad_()])
        loss = source.loss()
        torch.testing.assert_close(torch.autograd.grad(loss, source.leaves), expected)


def test_without_class_weights() -> None:
    """A penalty has no part at the target; its weights count alone."""
    target = torch.tensor([3, -100, 5, 0])
    input = torch.randn(4, 23, requires_grad=True)
    hidden, head = torch.randn(4, 5, requires_grad=True), torch.randn(23, 5, requires_grad=True)
    for leaves, loss in (
        ([input], z_loss(input, target)),
        ([hidden, head], linear_z_loss(hidden, head, target, implementation="chunked")),
    ):
        logits = leaves[0] if len(leaves) == 1 else hidden @ head.T
        truth = 1e-4 * logits.logsumexp(1).square()[target >= 0].mean()
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves)
        )


class Allocations(TorchDispatchMode):
    """The sizes in bytes of all memory that operations allocate, none of which is used again."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            one.untyped_storage().data_ptr()
            for one in tree_leaves((args, kwargs))
            if isinstance(one, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self._storages[one.untyped_storage().data_ptr()] = one.untyped_storage()
        return result

    @property
    def sizes(self) -> list[int]:
        return [storage.nbytes() for storage in self._storages.values()]


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("positions", [(400,), (20, 21)])
def test_no_second_tensor_of_the_logits_size(
    positions: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Called directly, as dispatch modes see nothing inside of an operator."""
    source = of_logits(positions).to(dtype)
    input, weight = source.leaves[0].detach(), source.options["weight"]
    counts = torch.rand(source.target.shape)
    summed = SummedLoss(
        input, source.target, weight, counts, counts, "squentropy", [], -100, "tiled"
    )
    with Allocations() as of_sum:
        tiled.loss_and_gradient(summed)
    given = LogitStats(input, source.target, weight, -100, True, True, "tiled")
    with Allocations() as of_forward:
        results = tiled.forward(given)
    grads = results._replace(shift=None, top=None, argmax=None)  # type: ignore[arg-type]
    with Allocations() as of_backward:
        tiled.backward(given, results, grads, frozenset({"input"}))
    for allocations, expected in ((of_sum, 1), (of_forward, 0), (of_backward, 1)):
        assert sum(size >= input.nbytes for size in allocations.sizes) == expected
        assert max(size for size in allocations.sizes if size != input.nbytes) < input.nbytes / 4
