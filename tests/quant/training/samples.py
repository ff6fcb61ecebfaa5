"""The straight-through functions and modules, with rules for values and gradients.

A rule is stated without the code under test: from the gradient of the result it gives the values
and the gradients of the arguments.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from scipy import linalg
from torch import Tensor, nn

from tilework import quant

from calls import Tensors, draw

Gradients = Mapping[str, Tensor]
Rule = Callable[..., tuple[Tensor, Gradients]]


@dataclass(frozen=True)
class StraightThrough:
    """A function with its rule."""

    function: Callable[..., Tensor]
    tensors: Callable[[], Tensors]
    """Draws arguments in float64, of which the first dimension is open."""
    rule: Rule
    _: KW_ONLY
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    """Of values and gradients in float64, relative; 0 where the rule rounds as the code does."""

    @property
    def label(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items() if name != "format")
        return "-".join((self.function.__name__, *options))

    def run(self, **tensors: Tensor) -> Tensor:
        return self.function(**tensors, **self.options)

    def expected(self, upstream: Tensor, tensors: Tensors) -> tuple[Tensor, Gradients]:
        plain = {name: tensor.detach() for name, tensor in tensors.items()}
        return self.rule(upstream, **plain, **self.options)


@dataclass(frozen=True)
class Layer:
    """A module with what its state holds."""

    label: str
    make: Callable[..., nn.Module]
    features: int
    state: tuple[str, ...] = ()
    _: KW_ONLY
    trailing: tuple[int, ...] = ()
    """Dimensions of the input after the features."""

    def draw(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(3, self.features, *self.trailing, dtype=dtype)


def half_to_even(values: Tensor) -> Tensor:
    """By the floor."""
    floor = values.floor()
    part = values - floor
    up = (part > 0.5) | ((part == 0.5) & (floor % 2 == 1))
    return floor + up


def signs(input: Tensor) -> Tensor:
    return torch.where(input >= 0, 1.0, -1.0).to(input)


def of_straight_through(
    upstream: Tensor, input: Tensor, quantized: Tensor, mask: Tensor
) -> tuple[Tensor, Gradients]:
    return quantized, {"input": upstream * mask}


def of_fake_quantize(
    upstream: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    gradient: str = "clipped",
) -> tuple[Tensor, Gradients]:
    codes = half_to_even(input / scale + zero_point)
    top = 2**bits - 1
    inside = (codes >= 0) & (codes <= top)
    kept = torch.minimum(torch.maximum(codes, torch.zeros_like(codes)), torch.full_like(codes, top))
    passes = inside if gradient == "clipped" else torch.ones_like(inside)
    return scale * (kept - zero_point), {"input": upstream * passes}


def of_minifloat(
    upstream: Tensor, input: Tensor, scale: Tensor, format: quant.MinifloatFormat
) -> tuple[Tensor, Gradients]:
    values, ratio = format.values(), input / scale
    place = (ratio.unsqueeze(-1) - values).abs().argmin(-1)
    return scale * values[place], {"input": upstream * (ratio.abs() <= format.max)}


def of_sign_ste(upstream: Tensor, input: Tensor) -> tuple[Tensor, Gradients]:
    return signs(input), {"input": upstream * (1.001 - 1 + 1 / input.cosh() ** 2)}


def of_reste(
    upstream: Tensor, input: Tensor, exponent: float, threshold: float, interval: float
) -> tuple[Tensor, Gradients]:
    size = input.abs()
    slope = size ** (1 / exponent - 1) / exponent
    slope = torch.where(size <= interval, interval ** (1 / exponent - 1), slope)
    return signs(input), {"input": upstream * slope * (size <= threshold)}


def of_quest(
    upstream: Tensor, input: Tensor, block_size: int | None, rotate_back: bool
) -> tuple[Tensor, Gradients]:
    n = input.shape[-1]
    size = block_size or 1
    block = linalg.hadamard(size) / math.sqrt(size)
    matrix = torch.from_numpy(linalg.block_diag(*[block] * (n // size)))
    back = matrix if rotate_back else torch.eye(n, dtype=torch.float64)
    rotated = input @ matrix
    deviation = rotated.square().mean(-1, keepdim=True).sqrt()
    clip = 2.513930578568423 * deviation + 1e-8
    levels = clip.unsqueeze(-1) * torch.linspace(-1, 1, 16, dtype=torch.float64)
    nearest = (rotated.unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
    values = levels.expand(*rotated.shape, 16).gather(-1, nearest).squeeze(-1)
    inside = rotated.abs() <= clip * 16 / 15
    return values @ back, {"input": ((upstream @ back) * inside) @ matrix}


def of_statsq(
    upstream: Tensor, input: Tensor, bits: int, boundary_range: float | None = None
) -> tuple[Tensor, Gradients]:
    half = 2 ** (bits - 1)
    scale = 2 * input.abs().mean(-1, keepdim=True)
    levels = scale.unsqueeze(-1) * (torch.arange(-half, half) + 0.5) / half
    nearest = (input.unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
    values = levels.expand(*input.shape, 2 * half).gather(-1, nearest).squeeze(-1)
    if boundary_range is None:
        return values, {"input": upstream}
    borders = scale.unsqueeze(-1) * torch.arange(1 - half, half) / half
    reach = scale * boundary_range / half
    near = (input.unsqueeze(-1) - borders).abs().amin(-1) <= reach
    return values, {"input": upstream * near}


def of_lsq(
    upstream: Tensor, input: Tensor, scale: Tensor, lower: int, upper: int, gradient_scale: float
) -> tuple[Tensor, Gradients]:
    ratio = input / scale
    inside = (ratio >= lower) & (ratio <= upper)
    whole = half_to_even(ratio)
    whole = torch.where(whole < lower, float(lower), whole)
    whole = torch.where(whole > upper, float(upper), whole)
    local = upstream * (whole - ratio * inside) * gradient_scale
    return scale * whole, {"input": upstream * inside, "scale": local.sum_to_size(scale.shape)}


def of_balanced(
    upstream: Tensor, weight: Tensor, scale: Tensor, bits: int, gradient_scale: float
) -> tuple[Tensor, Gradients]:
    most = 2 ** (bits - 1)
    values, gradients = of_lsq(upstream, weight, scale, -most, most, gradient_scale)
    return values, {"weight": gradients["input"], "scale": gradients["scale"]}


def _steps() -> Tensor:
    return draw(1, 8).abs() + 0.5


FUNCTIONS = [
    StraightThrough(
        quant.straight_through,
        lambda: {"input": draw(4, 8), "quantized": draw(4, 8), "mask": draw(4, 8)},
        of_straight_through,
    ),
    *(
        StraightThrough(
            quant.fake_quantize,
            lambda: {"input": 2 * draw(4, 8), "scale": _steps(), "zero_point": 2 + draw(1, 8)},
            of_fake_quantize,
            options={"bits": 2, "gradient": gradient},
        )
        for gradient in ("clipped", "straight_through")
    ),
    StraightThrough(
        quant.minifloat_quantize,
        lambda: {"input": 4 * draw(4, 8), "scale": _steps()},
        of_minifloat,
        options={"format": quant.E2M1},
    ),
    StraightThrough(quant.sign_ste, lambda: {"input": draw(4, 8)}, of_sign_ste, tolerance=1e-12),
    StraightThrough(
        quant.reste_sign,
        lambda: {"input": draw(4, 8)},
        of_reste,
        options={"exponent": 2.0, "threshold": 1.2, "interval": 0.2},
        tolerance=1e-12,
    ),
    *(
        StraightThrough(
            quant.quest_quantize,
            lambda: {"input": draw(4, 8) ** 3},
            of_quest,
            options={"block_size": block_size, "rotate_back": rotate_back},
            tolerance=1e-12,
        )
        for block_size, rotate_back in ((None, True), (4, True), (8, False))
    ),
    *(
        StraightThrough(
            quant.statsq_quantize,
            lambda: {"input": draw(4, 8)},
            of_statsq,
            options=options,
            tolerance=1e-14,
        )
        for options in ({"bits": 2}, {"bits": 3, "boundary_range": 0.3})
    ),
    StraightThrough(
        quant.lsq_quantize,
        lambda: {"input": 2 * draw(4, 8), "scale": _steps()},
        of_lsq,
        options={"lower": -2, "upper": 1, "gradient_scale": 0.5},
        tolerance=1e-13,
    ),
    StraightThrough(
        quant.balanced_quantize,
        lambda: {"weight": 2 * draw(4, 8), "scale": _steps()},
        of_balanced,
        options={"bits": 1, "gradient_scale": 0.5},
        tolerance=1e-13,
    ),
]

LAYERS = [
    Layer(
        "QuestLinear",
        lambda **place: quant.QuestLinear(8, 5, block_size=4, **place),
        8,
        ("weight", "bias"),
    ),
    Layer(
        "OneBitLinear",
        lambda **place: quant.OneBitLinear(8, 5, True, **place),
        8,
        ("weight", "bias", "weight_scale", "input_factor"),
    ),
    Layer(
        "ReSTELinear",
        lambda **place: quant.ReSTELinear(8, 5, **place),
        8,
        ("weight", "bias"),
    ),
    Layer(
        "ReSTEConv2d",
        lambda **place: quant.ReSTEConv2d(2, 3, 3, **place),
        2,
        ("weight", "bias"),
        trailing=(5, 6),
    ),
    Layer("QuestQuantizer", lambda: quant.QuestQuantizer(block_size=8), 8),
    Layer("StatsQuantizer", lambda: quant.StatsQuantizer(2, boundary_range=0.3), 8),
]
