"""Sums of log-probabilities, against loops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.losses import linear_log_probs, sequence_log_probs

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name

TARGET = torch.tensor([[3, -100, 1, 0], [-100, -100, -100, -100], [5, 2, 2, 2]])


def by_loops(log_prob: Tensor, target: Tensor, ignore_index: int, average: bool) -> Tensor:
    results = []
    for row, classes in zip(log_prob.tolist(), target.tolist(), strict=True):
        kept = [value for value, label in zip(row, classes, strict=True) if label != ignore_index]
        results.append(sum(kept) / (max(len(kept), 1) if average else 1))
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_equals_loops(ignore_index: int, average: bool, dtype: torch.dtype) -> None:
    log_prob = torch.randn(3, 4).abs().neg().to(dtype)
    actual = sequence_log_probs(log_prob, TARGET, ignore_index=ignore_index, average=average)
    assert actual.dtype == dtype
    expected = by_loops(log_prob, TARGET, ignore_index, average)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=1e-15)


def test_long_sequences_of_half_precision_are_summed_in_float32() -> None:
    log_prob = torch.full((1, 4096), -0.01).bfloat16()
    total = sequence_log_probs(log_prob, torch.zeros(1, 4096, dtype=torch.int64))
    torch.testing.assert_close(total.double(), log_prob.double().sum(1), rtol=2**-8, atol=0)


def test_gradients() -> None:
    log_prob = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for average in (False, True):
        assert torch.autograd.gradcheck(
            lambda values, average=average: sequence_log_probs(values, TARGET, average=average),
            log_prob,
        )
    unread = log_prob.detach().clone()
    unread[TARGET == -100] = torch.nan
    unread.requires_grad_()
    sequence_log_probs(unread, TARGET).sum().backward()
    assert unread.grad is not None
    assert torch.equal(unread.grad, (TARGET != -100).double())


@pytest.mark.untyped
def test_empty_and_transformed() -> None:
    empty = sequence_log_probs(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.int64))
    assert empty.shape == (0,)
    none = sequence_log_probs(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), average=True)
    assert none.tolist() == [0, 0]
    log_prob = torch.randn(3, 4)
    compiled = torch.compile(sequence_log_probs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(log_prob, TARGET), sequence_log_probs(log_prob, TARGET))
    batched = torch.func.vmap(sequence_log_probs)(log_prob[None], TARGET[None])
    assert torch.equal(batched[0], sequence_log_probs(log_prob, TARGET))


def test_takes_what_linear_log_probs_gives() -> None:
    hidden, head = torch.randn(3, 4, 5), torch.randn(6, 5)
    log_prob = linear_log_probs(hidden, head, TARGET).log_prob
    logits = torch.log_softmax(hidden @ head.T, -1)
    expected = [
        sum(logits[b, t, TARGET[b, t]].item() for t in range(4) if TARGET[b, t] >= 0)
        for b in range(3)
    ]
    torch.testing.assert_close(sequence_log_probs(log_prob, TARGET), torch.tensor(expected))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("log_prob must be a floating-point tensor", TypeError, {"log_prob": TARGET}),
        ("log_prob must be of shape", ValueError, {"log_prob": torch.zeros(4)}),
        ("log_prob must be of shape", ValueError, {"log_prob": torch.zeros(3, 4, 1)}),
        ("target must be int64 of shape", TypeError, {"target": TARGET.int()}),
        ("target must be of shape", ValueError, {"target": TARGET[:2]}),
        ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
        ("average must be a bool", TypeError, {"average": 2}),
        ("target must lie on the device", ValueError, {"target": TARGET.to("meta")}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"log_prob": torch.zeros(3, 4), "target": TARGET} | change
    with pytest.raises(error, match=f"sequence_log_probs: {message}"):
        sequence_log_probs(arguments.pop("log_prob"), arguments.pop("target"), **arguments)


@pytest.mark.untyped
def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        sequence_log_probs(torch.zeros(3, 4), TARGET, -100)  # type: ignore[misc]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            sequence_log_probs,
            lambda: {"log_prob": draw(3, 7), "target": torch.randint(-1, 5, (3, 7))},
            differentiable=("log_prob",),
            options=({"ignore_index": -1}, {"ignore_index": -1, "average": True}),
        ),
    ]
