"""ALRSHB: what is peculiar to it; ``test_alrsmag.py`` has what is common to both."""

import torch
from torch import Tensor

from tilework.optim import ALRSHB

import samples
from optim.samples import LOSS, Optimized, Options


def definition(
    ps: list[Tensor],
    gs: list[Tensor],
    states: list[dict[str, Tensor]],
    options: Options,
    steps: list[int],
) -> list[Tensor]:
    deltas = [state.get("delta", torch.zeros_like(p)) for p, state in zip(ps, states, strict=True)]
    norm_sq = sum(x * x for g in gs for x in g.flatten())
    inner = sum(
        x * y
        for g, delta in zip(gs, deltas, strict=True)
        for x, y in zip(g.flatten(), delta.flatten(), strict=True)
    )
    eta = (LOSS - options["lower_bound"]) / norm_sq + options["momentum"] * inner / norm_sq
    eta = min(max(eta, 0.0), float(options["lr"]))
    news = []
    for p, g, delta, state in zip(ps, gs, deltas, states, strict=True):
        state["delta"] = -eta * g + options["momentum"] * delta
        news.append(p * (1 - options["weight_decay"] * eta) + state["delta"])
    return news


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            ALRSHB,
            definition,
            options=(
                {},
                {"lr": 1e-3, "weight_decay": 0.3},
                {"lr": float("inf"), "momentum": 0.5, "lower_bound": 0.2, "weight_decay": 0.1},
                {"lower_bound": 0.9},
            ),
            standard_decay=False,
            together=True,
            takes_loss=True,
            refuses=(
                ("lower_bound must be a finite number", ValueError, {"lower_bound": torch.nan}),
            ),
        )
    ]


def test_the_ball_rolls_on_without_a_step() -> None:
    """Up the slope by the momentum, until the loss is worth a step again."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = ALRSHB([parameter], lr=1.0, momentum=0.5)
    parameter.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optimizer.step(loss=0.8)
    assert parameter.tolist() == [-0.8, 0.0]
    optimizer.step(loss=0.3)  # 0.3 - 0.5 * 0.8 is below 0
    assert optimizer.last_step_size == [0.0]
    torch.testing.assert_close(parameter.detach()[0].item(), -1.2)
    optimizer.step(loss=0.3)  # 0.3 - 0.5 * 0.4
    torch.testing.assert_close(optimizer.last_step_size[0].item(), 0.1)
    torch.testing.assert_close(parameter.detach()[0].item(), -1.5)
