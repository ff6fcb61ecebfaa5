"""Exponents of learning rates, against steps of networks of several widths."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tilework.optim import lr_scaling_exponents

LAYERS = ("embedding", "hidden", "readout")
PARAMETERIZATIONS = ("standard", "ntk", "mup", "mean_field")
OPTIMIZERS = ("sgd", "adam", "adafactor")
ALIGNMENTS = ("full", "none")
WIDTHS = (64, 256, 1024)
FEATURES = 64  # of the input and the output, at every width


def multipliers(parameterization: str, width: int) -> dict[str, tuple[float, float]]:
    """What multiplies each trained weight, and its initial standard deviation."""
    root = math.sqrt(width)
    return {
        "standard": {"embedding": (1, 1), "hidden": (1, 1 / root), "readout": (1, 1 / root)},
        "ntk": {"embedding": (1, 1), "hidden": (1 / root, 1), "readout": (1 / root, 1)},
        "mup": {
            "embedding": (root, 1 / root),
            "hidden": (1, 1 / root),
            "readout": (1 / root, 1 / root),
        },
        "mean_field": {"embedding": (1, 1), "hidden": (1 / root, 1), "readout": (1 / width, 1)},
    }[parameterization]


def changes(parameterization: str, optimizer: str, alignment: str, width: int) -> list[Tensor]:
    """How much a step with the learning rate 1 changes the output of each layer."""
    sizes = {
        "embedding": (width, FEATURES),
        "hidden": (width, width),
        "readout": (FEATURES, width),
    }
    factors = multipliers(parameterization, width)
    weights = [
        (factors[layer][1] * torch.randn(sizes[layer], dtype=torch.float64)).requires_grad_()
        for layer in LAYERS
    ]
    signals = [torch.randn(FEATURES, dtype=torch.float64)]
    for layer, weight in zip(LAYERS, weights, strict=True):
        signals.append(factors[layer][0] * (weight @ signals[-1]))
    loss = signals[-1] @ torch.randn(FEATURES, dtype=torch.float64)
    found = []
    for layer, weight, gradient, signal in zip(
        LAYERS, weights, torch.autograd.grad(loss, weights), signals, strict=False
    ):
        update = gradient if optimizer == "sgd" else gradient.sign()
        if optimizer == "adafactor":
            update = update * weight.detach().square().mean().sqrt()
        if alignment == "none":
            order = torch.randperm(update.numel())
            signs = torch.randint(2, update.shape, dtype=torch.float64) * 2 - 1
            update = signs * update.flatten()[order].view_as(update)
        change = factors[layer][0] * (update @ signal.detach())
        found.append(change.square().mean().sqrt())
    return found


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_equals_what_networks_do(parameterization: str, optimizer: str, alignment: str) -> None:
    """Outputs that change as a power of the width need rates that shrink as that power."""
    sizes = [changes(parameterization, optimizer, alignment, width) for width in WIDTHS]
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    powers = (logs[-1] - logs[0]) / math.log(WIDTHS[-1] / WIDTHS[0])
    actual = lr_scaling_exponents(parameterization, optimizer, alignment=alignment)
    assert tuple(actual) == LAYERS
    # Exponents are multiples of one half, so that the nearest one is meant.
    assert [round(2 * power) / 2 for power in powers.tolist()] == list(actual.values())


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize(("optimizer", "shift"), [("adam", -1), ("sgd", -2), ("adafactor", 0)])
def test_moving_a_multiplier_into_the_weight(optimizer: str, shift: int, alignment: str) -> None:
    """What the effective weights are, is the same in both of each pair."""
    for before, after, theta in (
        ("standard", "ntk", (0, 0.5, 0.5)),
        ("mup", "mean_field", (0.5, 0.5, 0.5)),
    ):
        first = lr_scaling_exponents(before, optimizer, alignment=alignment)
        second = lr_scaling_exponents(after, optimizer, alignment=alignment)
        moved = [second[layer] - first[layer] for layer in LAYERS]
        assert moved == [shift * part for part in theta]


def test_known() -> None:
    for parameterization, optimizer, expected in (
        ("mup", "sgd", (0, 0, 0)),
        ("standard", "sgd", (-0.5, 0.5, 1)),
        ("standard", "adam", (0, 1, 1)),
        ("mup", "adam", (0.5, 1, 0.5)),
        ("standard", "adafactor", (0, 0.5, 0.5)),
    ):
        assert tuple(lr_scaling_exponents(parameterization, optimizer).values()) == expected


def test_results_are_fresh_numbers() -> None:
    for case in itertools.product(PARAMETERIZATIONS, OPTIMIZERS):
        first = lr_scaling_exponents(*case)
        assert all(type(value) is float for value in first.values())
        first.clear()
        assert lr_scaling_exponents(*case)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="lr_scaling_exponents: parameterization must be one of"):
        lr_scaling_exponents("muP", "adam")
    with pytest.raises(ValueError, match="lr_scaling_exponents: optimizer must be one of 'sgd'"):
        lr_scaling_exponents("mup", "lion")
    with pytest.raises(ValueError, match="lr_scaling_exponents: alignment must be one of 'full'"):
        lr_scaling_exponents("mup", "adam", alignment="half")
