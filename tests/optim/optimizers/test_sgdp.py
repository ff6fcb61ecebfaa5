"""SGDP: its rule; ``test_adamp`` has what both share."""

import torch
from torch import Tensor

from tilework.optim import SGDP

import samples
from optim.optimizers.test_adamp import projected
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    lr, momentum = float(options["lr"]), options["momentum"]
    b = momentum * state.get("momentum_buffer", torch.zeros_like(p))
    b = state["momentum_buffer"] = b + (1 - options["dampening"]) * g
    u, factor = projected(p, g, g + momentum * b if options["nesterov"] else b, options)
    return p * (1 - lr * options["weight_decay"] * factor / (1 - momentum)) - lr * u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            SGDP,
            definition,
            options=(
                {},
                {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
                {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.3}
                | {"eps": 0.1, "delta": 0.7, "wd_ratio": 0.3},
            ),
            standard_decay=False,
            elementwise=False,
            refuses=(
                ("dampening must be a number from 0 to 1", ValueError, {"dampening": 1.1}),
                ("delta must be a finite number of at least 0", ValueError, {"delta": -0.1}),
                ("wd_ratio must be a finite number of at least 0", ValueError, {"wd_ratio": -1}),
            ),
        )
    ]


def test_the_buffer_is_not_projected() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = SGDP([parameter], lr=0.1, momentum=0.5, delta=1e6)
    expected = torch.zeros(4, 3)
    for _ in range(3):
        draw_gradients([parameter])
        assert parameter.grad is not None
        expected = 0.5 * expected + parameter.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], expected)


def test_dampening_acts_from_the_first_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    SGDP([parameter], lr=1.0, momentum=0.5, dampening=0.25).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -0.75))
