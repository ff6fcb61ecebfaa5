"""Divergences on the top entries, by plain loops and torch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.quant import kl_top_loss

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            kl_top_loss,
            lambda: {"input": draw(4, 5), "target": draw(4, 5)},
            differentiable=("input",),
            options=(
                {"k": 2},
                {"k": 2, "renormalize": True, "reduction": "sum"},
                {"reduction": "none"},
            ),
        )
    ]


def plain(student: list[float], teacher: list[float], k: int, renormalize: bool) -> float:
    order = sorted(range(len(teacher)), key=lambda j: (-teacher[j], j))[:k]
    among = order if renormalize else range(len(teacher))
    total = [sum(math.exp(values[j]) for j in among) for values in (student, teacher)]
    result = 0.0
    for j in order:
        q, p = math.exp(student[j]) / total[0], math.exp(teacher[j]) / total[1]
        result += p * (math.log(p) - math.log(q))
    return result


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("k", [1, 3, 7, 1000])
def test_plain_loops(k: int, renormalize: bool) -> None:
    student = torch.randn(2, 3, 7, dtype=torch.float64)
    teacher = torch.randn(2, 3, 7, dtype=torch.float64).round(decimals=1)
    found = kl_top_loss(student, teacher, k=k, renormalize=renormalize, reduction="none")
    for i in range(2):
        for j in range(3):
            rows = student[i, j].tolist(), teacher[i, j].tolist()
            assert found[i, j].item() == pytest.approx(plain(*rows, k, renormalize), abs=1e-12)
    for reduction, expected in (("mean", found.mean()), ("sum", found.sum())):
        other = kl_top_loss(student, teacher, k=k, renormalize=renormalize, reduction=reduction)
        torch.testing.assert_close(other, expected)


def test_ties_go_to_the_lowest_index() -> None:
    teacher = torch.zeros(1, 6, dtype=torch.float64)
    student = torch.arange(6.0, dtype=torch.float64).unsqueeze(0)
    expected = plain(student[0].tolist(), teacher[0].tolist(), 3, False)
    assert kl_top_loss(student, teacher, k=3).item() == pytest.approx(expected)


def test_ties_of_a_large_vocabulary() -> None:
    teacher = torch.zeros(2, 5000, dtype=torch.float64)
    student = torch.randn(2, 5000, dtype=torch.float64)
    first = (-math.log(5000) - student.log_softmax(-1)[:, :9]).sum(1) / 5000
    torch.testing.assert_close(kl_top_loss(student, teacher, k=9, reduction="none"), first)


def test_the_whole_vocabulary_is_the_divergence_of_torch() -> None:
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    expected = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl_top_loss(student, teacher, reduction="none"), expected)
    shifted = kl_top_loss(student + 5, teacher - torch.arange(4.0).unsqueeze(1), k=3)
    torch.testing.assert_close(shifted, kl_top_loss(student, teacher, k=3))


def test_gradients_go_to_the_student() -> None:
    student = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for options in ({"k": 2}, {"k": 2, "renormalize": True}, {}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: kl_top_loss(x, teacher.detach(), **o), student
        )
        assert not kl_top_loss(student.detach(), teacher, **options).requires_grad


def test_entries_without_probability() -> None:
    teacher = torch.tensor([[1.0, 0.0, -torch.inf, -torch.inf]])
    student = torch.tensor([[1.0, 0.0, -torch.inf, 3.0]], requires_grad=True)
    loss = kl_top_loss(student, teacher)
    expected = plain([1.0, 0.0, 3.0], [1.0, 0.0, -800.0], 2, False)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    impossible = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]])
    assert kl_top_loss(impossible, teacher).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_no_rows(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 3, 8).to(dtype)
    loss = kl_top_loss(student, teacher, k=4)
    assert loss.dtype == torch.float32
    exact = kl_top_loss(student.double(), teacher.double(), k=4)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    assert kl_top_loss(student[:0], teacher[:0]).isnan()
    assert kl_top_loss(student[:0], teacher[:0], reduction="sum").item() == 0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.ones(2, 4)}, ValueError, r"target must be of shape \(2, 3\)"),
        ({"input": torch.ones(2, 0)}, ValueError, "input must be of shape"),
        ({"input": torch.ones(2, 3).long()}, TypeError, "input must be a floating-point"),
        ({"target": torch.ones(2, 3).long()}, TypeError, "target must be a floating-point"),
        ({"k": 0}, ValueError, "k must be an int of at least 1"),
        ({"k": 1.0}, TypeError, "k must be an int"),
        ({"reduction": "all"}, ValueError, "reduction must be one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Tensor] = {"input": torch.ones(2, 3), "target": torch.ones(2, 3)}
    with pytest.raises(error, match=rf"^kl_top_loss: {message}"):
        kl_top_loss(**(given | change))
