"""The gate's loss against loops, torch's divergence and its own properties."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.attention import seer_gate_loss

import samples
from calls import Call, draw
from helpers import DEVICES, FLOATING, assert_exact, clones, dtype_name


def maps(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    is_causal: bool = True,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Logits and a target with zeros in it; with ``is_causal``, nothing above the diagonal."""
    logits = 3 * torch.randn(shape)
    target = torch.rand(shape) * (torch.rand(shape) > 0.3)
    target[..., 0] += 0.1
    if is_causal:
        later = torch.ones(shape, dtype=torch.bool).triu(1)
        logits, target = logits.masked_fill(later, -torch.inf), target.masked_fill(later, 0)
    target = target / target.sum(-1, keepdim=True)
    return logits.to(device, dtype).requires_grad_(), target.to(device, dtype)


def by_loops(input: Tensor, target: Tensor, skip_fraction: float, reduction: str) -> Tensor:
    """The definition in float64."""
    batch, heads, rows, columns = input.shape
    kept = range(math.floor(skip_fraction * rows), rows)
    table = torch.zeros(batch, heads, len(kept), columns, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for place, i in enumerate(kept):
                row = input[b, h, i].double()
                log_total = (row - row.max()).exp().sum().log() + row.max()
                for j in range(columns):
                    t = float(target[b, h, i, j])
                    if t > 0:
                        table[b, h, place, j] = t * (math.log(t) - (row[j] - log_total))
    if reduction == "none":
        return table
    divisor = {"mean": table.numel(), "rowmean": batch * heads * len(kept), "sum": 1}[reduction]
    return table.sum() / divisor


def composed(input: Tensor, target: Tensor, skip_fraction: float, reduction: str) -> Tensor:
    first = math.floor(skip_fraction * input.shape[2])
    input, target = input[:, :, first:], target[:, :, first:]
    finite = input.masked_fill(target == 0, -1e4)  # which F.kl_div survives
    logs = input.log_softmax(-1)
    losses = F.kl_div(torch.where(finite == -1e4, 0, logs), target, reduction="none")
    if reduction == "none":
        return losses
    divisor = {"mean": losses.numel(), "rowmean": losses[..., 0].numel(), "sum": 1}[reduction]
    return losses.sum() / divisor


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("reduction", ["mean", "rowmean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "skip_fraction", "is_causal"),
    [
        ((2, 3, 9, 9), 0.25, True),
        ((1, 2, 7, 7), 0.0, True),
        ((2, 1, 5, 12), 0.5, False),
        ((1, 1, 1, 1), 0.99, True),
    ],
)
def test_equals_the_definition(
    shape: tuple[int, ...],
    skip_fraction: float,
    is_causal: bool,
    reduction: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    logits, target = maps(shape, dtype, is_causal=is_causal, device=device)
    wide = [t.detach().float().requires_grad_(t.requires_grad) for t in (logits, target)]
    cpu = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in (logits, target)]
    loss = seer_gate_loss(logits, target, skip_fraction=skip_fraction, reduction=reduction)
    results = [
        loss,
        composed(wide[0], wide[1], skip_fraction, reduction),
        by_loops(cpu[0], cpu[1], skip_fraction, reduction),
    ]
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    inside = torch.promote_types(dtype, torch.float32)
    assert_exact(*results, inside)
    if torch.equal(results[2], torch.zeros_like(results[2])):
        return
    upstream = torch.randn(loss.shape)
    grads = [
        torch.autograd.grad(result, leaf, upstream.to(result))[0]
        for result, leaf in zip(results, (logits, wide[0], cpu[0]), strict=True)
    ]
    assert_exact(*grads, inside)
    first = math.floor(skip_fraction * shape[2])
    assert not grads[0][:, :, :first].any()
    assert not grads[0][logits == -torch.inf].any()


def test_default_options() -> None:
    logits, target = maps((2, 2, 11, 11), torch.float64)
    expected = by_loops(logits, target, 0.25, "mean")
    torch.testing.assert_close(seer_gate_loss(logits, target), expected)


def test_agrees_with_torch_where_no_logit_is_infinite() -> None:
    """Deviation: F.kl_div gives nan at logits of -inf."""
    logits, target = maps((2, 3, 8, 8), torch.float64, is_causal=False)
    criterion = torch.nn.KLDivLoss(reduction="none")
    expected = criterion(logits[:, :, 2:].log_softmax(-1), target[:, :, 2:]).mean()
    torch.testing.assert_close(seer_gate_loss(logits, target), expected)
    logits, target = maps((2, 3, 8, 8), torch.float64)
    assert criterion(logits.log_softmax(-1), target).isnan().any()
    assert seer_gate_loss(logits, target).isfinite()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    skip_fraction=st.floats(0, 0.99),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**20),
)
def test_properties(rows: int, skip_fraction: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, target = maps((2, 2, rows, rows), torch.float64)
    options: dict[str, Any] = {"skip_fraction": skip_fraction, "reduction": "rowmean"}
    loss = seer_gate_loss(logits, target, **options)
    assert loss >= -1e-12
    torch.testing.assert_close(seer_gate_loss(logits + shift, target, **options), loss)
    exact = target.log()
    torch.testing.assert_close(
        seer_gate_loss(exact, target, **options), torch.zeros((), dtype=torch.float64)
    )
    if rows > 2:
        exact[:, :, -1, :2] += torch.tensor([1.0, 0.0])
        if (target[:, :, -1, :2] > 0).all():
            assert seer_gate_loss(exact, target, **options) > 0
    elements = seer_gate_loss(logits, target, skip_fraction=skip_fraction, reduction="none")
    kept = elements.shape[2]
    assert kept == rows - math.floor(skip_fraction * rows)
    torch.testing.assert_close(elements.sum() / (4 * kept), loss)
    mean = seer_gate_loss(logits, target, skip_fraction=skip_fraction)
    torch.testing.assert_close(mean * rows, loss)


def test_rows_without_a_target_and_without_logits() -> None:
    logits, target = maps((1, 1, 3, 3), torch.float64, is_causal=False)
    target[0, 0, 1] = 0
    for value in (-torch.inf, torch.nan):
        hidden = logits.detach().clone()
        hidden[0, 0, 1] = value
        hidden.requires_grad_()
        loss = seer_gate_loss(hidden, target, skip_fraction=0.0, reduction="none")
        assert not loss[0, 0, 1].any()
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
        assert not grad[0, 0, 1].any()
        assert grad.isfinite().all()


def test_infinite_losses_and_nan_show() -> None:
    logits, target = maps((1, 1, 3, 3), torch.float64, is_causal=False)
    hidden = logits.detach().clone()
    hidden[0, 0, 2, 0] = -torch.inf  # where the target is positive
    assert seer_gate_loss(hidden, target, skip_fraction=0.0) == torch.inf
    hidden[0, 0, 2, 0] = torch.nan
    assert seer_gate_loss(hidden, target, skip_fraction=0.0).isnan()
    target[0, 0, 2, 1] = torch.nan
    assert seer_gate_loss(logits, target, skip_fraction=0.0).isnan()


def test_empty() -> None:
    for shape in ((0, 2, 4, 4), (1, 2, 0, 0), (1, 2, 0, 4)):
        logits = torch.zeros(shape, requires_grad=True)
        assert seer_gate_loss(logits, logits.detach()).isnan()
        assert seer_gate_loss(logits, logits.detach(), reduction="sum") == 0
        assert seer_gate_loss(logits, logits.detach(), reduction="none").numel() == 0


def test_target_is_a_constant() -> None:
    logits, target = maps((1, 2, 4, 4))
    target.requires_grad_()
    loss = seer_gate_loss(logits, target)
    grads = torch.autograd.grad(loss, (logits, target), allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is None


def test_large_logits() -> None:
    logits, target = maps((2, 2, 6, 6), is_causal=False)
    logits = (1e4 * logits.detach()).requires_grad_()
    loss = seer_gate_loss(logits, target, skip_fraction=0.0, reduction="sum")
    compared = composed(*clones((logits, target)), 0.0, "sum")  # type: ignore[arg-type]
    assert_exact(loss, compared, by_loops(logits, target, 0.0, "sum"))


def test_derivatives() -> None:
    logits, target = maps((1, 2, 4, 4), torch.float64, is_causal=False)
    for reduction in ("mean", "none"):

        def loss(logits: Tensor, reduction: str = reduction) -> Tensor:
            hidden = logits.masked_fill(target == 0, -torch.inf)
            return seer_gate_loss(hidden, target, reduction=reduction)

        assert torch.autograd.gradcheck(loss, (logits,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.untyped
def test_transforms() -> None:
    logits, target = maps((3, 2, 8, 8))
    one = torch.vmap(seer_gate_loss)(logits[:, None], target[:, None])
    looped = [seer_gate_loss(a[None], b[None]) for a, b in zip(logits, target, strict=True)]
    torch.testing.assert_close(one, torch.stack(looped))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(seer_gate_loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (8, 13, 16):
        logits, target = maps((3, 2, rows, rows))
        torch.testing.assert_close(compiled(logits, target), seer_gate_loss(logits, target))
    assert len(graphs) == 1


def test_strides_and_arguments() -> None:
    logits, target = (t.detach() for t in maps((2, 3, 6, 6)))
    before = clones((logits, target))
    strided = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in (logits, target)]
    torch.testing.assert_close(seer_gate_loss(*strided), seer_gate_loss(logits, target))
    assert all(torch.equal(a, b) for a, b in zip((logits, target), before, strict=True))


LOGITS = torch.zeros(2, 3, 4, 5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "input must be a floating-point tensor", {"input": LOGITS.long()}),
        (ValueError, r"input must be of shape \(B, H, nq, nk\)", {"input": LOGITS[0]}),
        (TypeError, "target must be a floating-point tensor", {"target": LOGITS > 0}),
        (ValueError, r"target must be of shape \(2, 3, 4, 5\)", {"target": LOGITS[:1]}),
        (ValueError, "target must lie on", {"target": LOGITS.to("meta")}),
        (
            ValueError,
            "skip_fraction must be .* at least 0 and below 1, got 1",
            {"skip_fraction": 1},
        ),
        (ValueError, "skip_fraction must be", {"skip_fraction": -0.1}),
        (ValueError, "skip_fraction must be", {"skip_fraction": 1.5}),
        (ValueError, "skip_fraction must be", {"skip_fraction": math.nan}),
        (TypeError, "skip_fraction must be a number", {"skip_fraction": None}),
        (ValueError, "reduction must be one of 'mean', 'rowmean'", {"reduction": "batchmean"}),
    ],
)
def test_bad_input(error: type[Exception], match: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": LOGITS, "target": LOGITS} | change
    input, target = arguments.pop("input"), arguments.pop("target")
    with pytest.raises(error, match=f"seer_gate_loss: {match}"):
        seer_gate_loss(input, target, **arguments)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            seer_gate_loss,
            lambda: {"input": draw(3, 2, 9, 7), "target": draw(3, 2, 9, 7).softmax(-1)},
            differentiable=("input",),
            options=({}, {"reduction": "none"}, {"reduction": "rowmean"}),
        ),
    ]
