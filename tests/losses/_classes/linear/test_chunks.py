"""Products of a chunk that turn into the gradients of their losses, in both rooms."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.losses._classes.linear import chunked
from tilework.losses._classes.logits import triton
from tilework.losses._classes.statistics import FORMULAS, Formula, Rows, Statistics

from helpers import FLOATING, assert_exact, dtype_name

pytestmark = pytest.mark.usefixtures("small_tiles")
ROOMS: dict[str, Callable[..., Tensor]] = {
    "chunked": chunked.logit_gradient_,
    "triton": triton.logit_gradient_,
}
BUILT = [
    pytest.param(room, dtype, id=f"{room}-{dtype_name(dtype)}")
    for room in ROOMS
    for dtype in FLOATING
    if (room, dtype) != ("triton", torch.float64)
]
TOKENS, CLASSES = 19, 63


def _everything(statistics: Statistics, rows: Rows, factor: float) -> Tensor:
    """Of all statistics, in proportion to the weights."""
    return rows.weight * (
        factor * statistics.squares
        + statistics.class_gap
        + statistics.lse.square()
        - statistics.moment / statistics.total
        - statistics.target_gap
    )


EVERYTHING = Formula(_everything, squares=True, moments=True)


def composed(
    outputs: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    class_weight: Tensor,
    weight: Tensor,
    factor: float,
) -> Tensor:
    """The losses of :func:`_everything` from torch's own parts."""
    logits = outputs if bias is None else outputs + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kept = target != -100
    logits = logits.where(kept[:, None], 0)
    index = target.where(kept, 0)
    # No statistic but that of all logits depends on the shift, and this is a constant.
    away = logits.detach().amax(1, keepdim=True) - logits
    lse = logits.logsumexp(1)
    moment = (torch.exp(-away) * away).sum(1) / torch.exp(-away).sum(1)
    others = logits.square().sum(1) - logits.square().gather(1, index[:, None])[:, 0]
    gaps = (class_weight * away).sum(1) - away.gather(1, index[:, None])[:, 0]
    losses = factor * others + gaps + lse.square() - moment
    return (weight * losses).where(kept, 0)


@pytest.mark.parametrize(("room", "dtype"), BUILT)
@pytest.mark.parametrize("every_option", [False, True])
def test_losses_and_gradients(room: str, dtype: torch.dtype, every_option: bool) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    products = (2 * torch.randn(TOKENS, CLASSES)).to(dtype)
    target = torch.randint(CLASSES, (TOKENS,)).masked_fill(torch.rand(TOKENS) < 0.2, -100)
    bias = torch.randn(CLASSES).to(dtype) if every_option else None
    softcap = 3.0 if every_option else None
    class_weight = torch.rand(CLASSES, dtype=wide)
    weight = torch.rand(TOKENS, dtype=wide).where(target != -100, 0)
    results = []
    for compared in (None, torch.float32 if dtype == torch.float64 else dtype, torch.float64):
        if compared is None:
            gradient = products.clone()
            of_bias = torch.zeros(CLASSES, dtype=wide)
            losses = ROOMS[room](
                gradient,
                target,
                -100,
                bias,
                softcap,
                class_weight,
                EVERYTHING,
                Rows.of(weight, weight, CLASSES, class_weight),
                [0.3],
                of_bias if every_option else None,
            )
        else:
            leaf = products.to(compared, copy=True).requires_grad_()
            computed = torch.promote_types(compared, torch.float32)
            losses = composed(
                leaf.to(computed),
                target,
                None if bias is None else bias.to(computed),
                softcap,
                class_weight.to(computed),
                weight.to(computed),
                0.3,
            )
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
            # As torch's linear layer does, of what is rounded.
            of_bias = gradient.to(computed).sum(0) * every_option
        results.append((losses, gradient, of_bias))
    losses, gradients, sums = zip(*results, strict=True)
    assert_exact(*losses, dtype)
    assert_exact(*gradients, dtype)
    if room == "triton":  # whose interpreter rounds towards zero, which adds up
        sums = sums[0], *(gradients[0].to(one).sum(0) * every_option for one in sums[1:])
    assert_exact(*sums, dtype)


@pytest.mark.parametrize("room", ROOMS)
def test_ignored_rows_have_no_gradient_however_large_the_bias(room: str) -> None:
    """On devices that do not look at targets, they are computed on zeros."""
    gradient, target = torch.zeros(3, CLASSES), torch.tensor([5, -100, 2])
    bias = torch.full((CLASSES,), 500.0)
    bias[::2] = -500.0
    weight, of_bias = torch.tensor([1.0, 0.0, 1.0]), torch.zeros(CLASSES)
    losses = ROOMS[room](
        gradient,
        target,
        -100,
        bias,
        None,
        None,
        FORMULAS["squentropy"],
        Rows(weight, weight, CLASSES, None),
        [],
        of_bias,
    )
    assert not gradient[1].any()
    torch.testing.assert_close(of_bias, gradient[[0, 2]].sum(0))
    truth = F.cross_entropy(bias.expand(3, -1), target, reduction="none")
    squares = CLASSES * 500.0**2 - torch.tensor([500.0, 0.0, 500.0]) ** 2
    expected = (truth + squares / (CLASSES - 1)).where(target >= 0, 0)
    torch.testing.assert_close(losses, expected)
