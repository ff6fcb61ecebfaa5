"""Moments of channels, against plain loops."""

import pytest
import torch

from tilework.quant import distribution_loss

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            distribution_loss,
            lambda: {"input": draw(4, 3), "target": draw(4, 3)},
            differentiable=("input",),
        )
    ]


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_plain_loops(rows: int) -> None:
    x = torch.randn(rows, 2, 5, dtype=torch.float64)
    y = torch.randn(3, 5, dtype=torch.float64) * 2 + 1
    total = 0.0
    for c in range(5):
        moments = []
        for values in (x[..., c].flatten().tolist(), y[:, c].tolist()):
            mean = sum(values) / len(values)
            moments.append((mean, sum((v - mean) ** 2 for v in values) / len(values)))
        total += sum(abs(a - b) for a, b in zip(*moments, strict=True))
    assert distribution_loss(x, y).item() == pytest.approx(total / 5)
    order = torch.randperm(rows)
    assert distribution_loss(x[order], x).item() == pytest.approx(0.0, abs=1e-12)


def test_gradients_and_dtypes() -> None:
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    distribution_loss(x, y).backward()
    assert y.grad is None
    assert torch.autograd.gradcheck(lambda x: distribution_loss(x, y.detach()), x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = distribution_loss(x.to(dtype), y.to(dtype))
        assert found.dtype == torch.float32
        exact = distribution_loss(x.to(dtype).double(), y.to(dtype).double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert distribution_loss(torch.ones(1, 3), torch.ones(2, 3)).item() == 0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, "target must be of 3 channels"),
        (torch.ones(0, 3), torch.ones(2, 3), ValueError, "input must be non-empty"),
        (torch.ones(2, 3), torch.ones(0, 3), ValueError, "target must be non-empty"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), TypeError, "input must be a floating-point"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(x: torch.Tensor, y: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^distribution_loss: {message}"):
        distribution_loss(x, y)
