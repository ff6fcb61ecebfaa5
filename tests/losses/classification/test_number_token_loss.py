"""The number token losses, against scipy's Wasserstein distance and boolean indexing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from tilework import _checks
from tilework.losses import (
    NumberTokenCrossEntropyLoss,
    NumberTokenLoss,
    number_token_cross_entropy,
    number_token_loss,
)

import samples
from helpers import FLOATING, assert_exact, dtype_name
from losses.samples import Arguments, Loss, class_index, zeros

VALUES = torch.tensor([2.0, torch.nan, 0.5, -1.0, torch.nan, 2.0, 3.0], dtype=torch.float64)


def definition(
    input: Tensor,
    target: Tensor,
    token_values: Tensor,
    *,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    kept = target != ignore_index
    true_value = token_values[target.where(kept, 0)]
    kept = kept & ~true_value.isnan()
    numbers = ~token_values.isnan()
    q = input[kept][:, numbers].softmax(1)
    gaps = token_values[numbers] - true_value[kept, None]
    losses = torch.zeros_like(input[:, 0])
    if kind == "wasserstein":
        losses[kept] = (q * gaps.abs()).sum(1)
    else:
        losses[kept] = (q * gaps).sum(1).square()
    if reduction == "none":
        return losses
    return losses.sum() / (max(1, int(kept.sum())) if reduction == "mean" else 1)


def with_cross_entropy(
    input: Tensor,
    target: Tensor,
    token_values: Tensor,
    *,
    ntl_weight: float = 0.3,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    likelihood = F.cross_entropy(input, target, label_smoothing=label_smoothing, **options)
    return likelihood + ntl_weight * definition(input, target, token_values, kind=kind, **options)


def draw(*positions: int) -> Arguments:
    """A nan is put at the first token, a number, of the first position."""
    tensors = class_index(*positions)
    tensors["target"].view(-1)[0] = 6
    return tensors | {"token_values": VALUES.clone()}


REFUSED: samples.Refusals = (
    ("kind must be one of 'wasserstein', 'mse', got 'l1'", ValueError, {"kind": "l1"}),
    (
        "token_values must be finite or nan, with a finite one at least",
        ValueError,
        {"token_values": torch.full((3,), torch.nan)},
    ),
    (
        "token_values must be finite or nan, with a finite one at least",
        ValueError,
        {"token_values": torch.tensor([1.0, -torch.inf, 2.0])},
    ),
    (r"token_values must be of shape", ValueError, {"token_values": torch.ones(3, 1)}),
    ("token_values must be a floating-point", TypeError, {"token_values": torch.ones(3).int()}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            number_token_loss,
            definition,
            NumberTokenLoss,
            lambda: draw(13),
            options=({}, {"kind": "mse"}),
            owned=("token_values",),
            checks_owned=True,
            mean_of_nothing=0.0,
            accepts=zeros() | {"token_values": torch.ones(3)},
            refuses=REFUSED,
        ),
        Loss(
            number_token_cross_entropy,
            with_cross_entropy,
            NumberTokenCrossEntropyLoss,
            lambda: draw(13),
            options=({}, {"kind": "mse", "ntl_weight": 0.7, "label_smoothing": 0.2}),
            owned=("token_values",),
            checks_owned=True,
            accepts=zeros() | {"token_values": torch.ones(3)},
            refuses=(
                *REFUSED,
                (
                    "ntl_weight must be a finite number of at least 0",
                    ValueError,
                    {"ntl_weight": -0.1},
                ),
                (
                    "label_smoothing must be a number from 0 to 1",
                    ValueError,
                    {"label_smoothing": 1.1},
                ),
            ),
        ),
    ]


# Where values cannot be read, other tokens are masked instead of left out.
each_form = pytest.mark.parametrize("reads", [True, False], ids=["selected", "masked"])


@pytest.fixture
def masking(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not reads:
        monkeypatch.setattr(_checks, "holds_values", lambda tensor: False)


@pytest.mark.usefixtures("masking")
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("kind", ["wasserstein", "mse"])
@each_form
def test_both_forms_equal_the_definition(reads: bool, kind: str, dtype: torch.dtype) -> None:
    positions = class_index(63, classes=100)
    values = torch.randint(-50, 50, (100,)).double() / 4
    tensors = positions | {"token_values": values.masked_fill(torch.rand(100) < 0.6, torch.nan)}
    leaves = [
        {
            name: tensor.to(dtype).to(other) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
        for other in (dtype, torch.float32 if dtype == torch.float64 else dtype, torch.float64)
    ]
    results, gradients = [], []
    for loss, arguments in zip((number_token_loss, definition, definition), leaves, strict=True):
        arguments["input"].requires_grad_()
        results.append(loss(**arguments, kind=kind, reduction="none"))
        gradients.append(torch.autograd.grad(results[-1].sum(), arguments["input"])[0])
    assert_exact(*results, dtype)
    assert_exact(*gradients, dtype)


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_equals_scipy(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, dtype=torch.float64, generator=generator) * 10
    input = torch.randn(tokens, tokens, dtype=torch.float64, generator=generator)
    losses = number_token_loss(input, torch.arange(tokens), values, reduction="none")
    for row, value, loss in zip(input.softmax(1), values, losses, strict=True):
        expected = wasserstein_distance(values.numpy(), [value.item()], row.numpy())
        torch.testing.assert_close(loss.item(), expected)


def test_digits_differ_by_their_distribution_functions() -> None:
    input = torch.randn(10, 10, dtype=torch.float64)
    losses = number_token_loss(
        input, torch.arange(10), torch.arange(10.0).double(), reduction="none"
    )
    steps = (torch.arange(10) >= torch.arange(10)[:, None]).double()
    torch.testing.assert_close(losses, (input.softmax(1).cumsum(1) - steps).abs().sum(1))


def test_half_on_each_side() -> None:
    values = torch.tensor([4.0, 5.0, 6.0, torch.nan])
    input = torch.tensor([[0.0, -torch.inf, 0.0, 7.0]])
    assert number_token_loss(input, torch.tensor([1]), values) == 1
    assert number_token_loss(input, torch.tensor([1]), values, kind="mse") == 0


@given(st.sampled_from(["wasserstein", "mse"]), st.integers(0, 10**6))
def test_is_0_where_all_lies_on_the_true_value(kind: str, seed: int) -> None:
    """Which more than one token may have."""
    torch.manual_seed(seed)
    input = torch.randn(1, 7, dtype=torch.float64)
    same = VALUES == 2
    sure = input.masked_fill(~same & ~VALUES.isnan(), -torch.inf)
    assert number_token_loss(sure, torch.tensor([5]), VALUES, kind=kind) == 0
    assert number_token_loss(input, torch.tensor([5]), VALUES) > 0


@pytest.mark.usefixtures("masking")
@each_form
def test_other_tokens_are_not_read(reads: bool) -> None:
    tensors = draw(13)
    expected = number_token_loss(**tensors)
    others = VALUES.isnan()
    torch.testing.assert_close(
        number_token_loss(**(tensors | {"input": tensors["input"] + 5})), expected
    )
    for filling in (1e30, torch.inf, torch.nan):
        input = tensors["input"].masked_fill(others, filling).requires_grad_()
        loss = number_token_loss(**(tensors | {"input": input}))
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, input)
        assert not gradient[:, others].any()
        assert gradient[:, ~others].any()


@pytest.mark.usefixtures("masking")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@each_form
def test_text_without_numbers_is_0(reads: bool, reduction: str) -> None:
    input = torch.randn(4, 7, requires_grad=True)
    target = torch.tensor([1, 4, -100, 1])
    for criterion in (
        lambda: number_token_loss(input, target, VALUES.float(), reduction=reduction),
        lambda: NumberTokenLoss(VALUES.float(), reduction=reduction)(input, target),
    ):
        with torch.autograd.set_detect_anomaly(True):  # which stops at any nan on the way
            loss = criterion()
            (gradient,) = torch.autograd.grad(loss.sum(), input)
        assert not loss.any()
        assert not gradient.any()
    both = number_token_cross_entropy(input, target, VALUES.float(), reduction=reduction)
    torch.testing.assert_close(both, F.cross_entropy(input, target, reduction=reduction))


def test_each_part_has_its_own_mean() -> None:
    input, target, values = draw(13).values()
    target[1] = 1
    numbers = (target >= 0) & ~VALUES[target.clamp(min=0)].isnan()
    assert numbers.sum() < (target >= 0).sum()
    losses = number_token_loss(input, target, values, reduction="none")
    assert not losses[~numbers].any()
    mean = losses[numbers].mean()
    torch.testing.assert_close(number_token_loss(input, target, values), mean)
    both = number_token_cross_entropy(input, target, values, ntl_weight=0.5)
    torch.testing.assert_close(both, F.cross_entropy(input, target) + 0.5 * mean)
    alone = number_token_cross_entropy(input, target, values, ntl_weight=0.0)
    torch.testing.assert_close(alone, F.cross_entropy(input, target))


@pytest.mark.parametrize("kind", ["wasserstein", "mse"])
def test_large_values_close_together(kind: str) -> None:
    values = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    input = torch.randn(5, 3)
    target = torch.tensor([0, 1, 2, 0, 1])
    shifted = number_token_loss(input, target, values - 1e6, kind=kind)
    torch.testing.assert_close(number_token_loss(input, target, values, kind=kind), shifted)


def test_values_of_another_dtype() -> None:
    """They are used as they are, where bfloat16 would round them."""
    input = torch.zeros(1, 2, dtype=torch.bfloat16)
    values = torch.tensor([1000.0, 1001.0])
    assert number_token_loss(input, torch.tensor([0]), values) == 0.5


def test_the_sum_is_rounded_once() -> None:
    input, target, values = draw(63).values()
    half = input.half()
    expected = with_cross_entropy(half.double(), target, values, reduction="none").half()
    actual = number_token_cross_entropy(half, target, values, reduction="none")
    assert (actual == expected).sum() >= 62  # float32 may fall on the other side of a tie


def test_modules_index_anew_when_they_load_values() -> None:
    input, target, _ = draw(13).values()
    values = VALUES.roll(1)
    values[2] = 7.0
    for module, function in (
        (NumberTokenLoss, number_token_loss),
        (NumberTokenCrossEntropyLoss, number_token_cross_entropy),
    ):
        for assign in (False, True):
            criterion = module(VALUES.clone())
            criterion.load_state_dict({"token_values": values}, assign=assign)
            torch.testing.assert_close(criterion(input, target), function(input, target, values))


@pytest.mark.untyped
def test_modules_compile_to_the_selection() -> None:
    """Without a look at values, whose number the graph could not know."""
    input, target, values = draw(13).values()
    selected = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        selected.extend(node for node in graph.graph.nodes if "index_select" in str(node.target))
        return graph

    criterion = NumberTokenLoss(values)
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(input, target), number_token_loss(input, target, values))
    assert selected


@pytest.mark.untyped
def test_values_of_other_tokens() -> None:
    tensors = {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    for loss, module in (
        (number_token_loss, NumberTokenLoss),
        (number_token_cross_entropy, NumberTokenCrossEntropyLoss),
    ):
        for call in (
            lambda v, loss=loss: loss(**tensors, token_values=v),
            lambda v, module=module: module(v)(**tensors),
        ):
            with pytest.raises(
                ValueError, match=rf"{loss.__name__}: token_values must be of shape \(3,\)"
            ):
                call(torch.ones(4))
        with pytest.raises(ValueError, match=f"{loss.__name__}: token_values must not require"):
            loss(**tensors, token_values=torch.ones(3, requires_grad=True))


@pytest.mark.untyped
@pytest.mark.usefixtures("masking")
@pytest.mark.parametrize("reads", [False])
def test_values_that_are_not_read_show(reads: bool) -> None:
    values = torch.tensor([1.0, torch.inf, 2.0])
    losses = number_token_loss(torch.zeros(2, 3), torch.tensor([0, 1]), values, reduction="none")
    assert not losses.isfinite().any()


@pytest.mark.parametrize("cls", [NumberTokenLoss, NumberTokenCrossEntropyLoss])
def test_bfloat16_keeps_token_values(cls: Callable[[Tensor], torch.nn.Module]) -> None:
    """Of which it has no 1001."""
    values = torch.tensor([1000.0, 1001.0, torch.nan])
    input, target = torch.randn(5, 3).bfloat16(), torch.tensor([0, 1, 0, 1, 1])
    module = cls(values)
    expected = module(input, target)
    assert torch.equal(module.to(torch.bfloat16)(input, target), expected)
    assert torch.equal(torch.nn.Sequential(module).half()[0].token_values[:2], values[:2])


def test_on_meta_the_number_of_numbers_waits_for_values() -> None:
    with torch.device("meta"):
        module = NumberTokenLoss(torch.tensor([torch.nan, 4.0, 5.0]))
    assert module.numbers is None
    assert module(torch.zeros(2, 3, device="meta"), torch.zeros(2, device="meta").long()).is_meta
    module.to_empty(device="cpu").load_state_dict({"token_values": VALUES[:3].float()})
    assert module.numbers.tolist() == [0, 2]
