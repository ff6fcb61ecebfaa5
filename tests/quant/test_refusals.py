"""Bad input of the functions of weights."""

from dataclasses import dataclass

import pytest
import torch

from tilework.quant import (
    adadim_quantize,
    awq_quantize,
    awq_search_clip,
    awq_search_scale,
    dequantize_affine,
    fit_grid,
    gptq_quantize,
    incoherence_preprocess,
    ldlq_quantize,
    quantize_affine,
    quip_quantize,
    rtn_quantize,
    spqr_quantize,
    vptq_quantize,
)

import samples
from quant.refusals import (
    AXES,
    GRIDS,
    HESSIANS,
    INPUTS,
    WEIGHTS,
    weight_and_hessian,
    weight_and_input,
)


@dataclass(frozen=True)
class Quantizer(samples.Sample):
    """A function of weights, by what it refuses."""


_WEIGHT = {"weight": torch.ones(2, 3)}
_GRID = {"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1)}
_SHAPES: samples.Refusals = (
    (r"scale must be of shape \(2, 1\)", ValueError, {"scale": torch.ones(2)}),
    (r"zero_point must be of shape \(2, 1\)", ValueError, {"zero_point": torch.ones(1, 2)}),
    ("scale must be a floating-point tensor", TypeError, {"scale": torch.ones(2, 1).long()}),
    (r"scale must be of shape \(2, 2\)", ValueError, {"group_size": 2}),
)
_SEARCH: samples.Refusals = (
    ("grid must be an int of at least 1", ValueError, {"grid": 0}),
    ("grid must be an int", TypeError, {"grid": 2.5}),
)
_TOKENS: samples.Refusals = (
    ("max_tokens must be an int of at least 1", ValueError, {"max_tokens": 0}),
)
_SHRINK: samples.Refusals = (
    ("max_shrink must be a number above 0 and at most 1", ValueError, {"max_shrink": 0.0}),
    ("max_shrink must be a number above 0 and at most 1", ValueError, {"max_shrink": 1.5}),
)
_NO_FORWARD: samples.Refusals = (
    ("weight must be at least one tensor", ValueError, {"weight": []}),
    (
        r"weight must be of shape \(2, 3\)",
        ValueError,
        {"weight": [torch.ones(2, 3), torch.ones(2, 4)]},
    ),
    ("forward must be a function that returns a tensor", TypeError, {"forward": lambda w: 0.0}),
    (
        "input must have finite outputs",
        ValueError,
        {"forward": lambda w: torch.full((2,), torch.nan)},
    ),
)
_KINDS: samples.Refusals = (
    ("kind must be one of 'kronecker', 'hadamard'", ValueError, {"kind": "random"}),
    ("weight must be of sizes that are powers of two", ValueError, {"kind": "hadamard"}),
)


@samples.of(Quantizer)
def quantizers() -> list[Quantizer]:
    return [
        Quantizer(fit_grid, accepts=_WEIGHT, refuses=WEIGHTS + GRIDS + AXES),
        Quantizer(quantize_affine, accepts=_WEIGHT | _GRID, refuses=WEIGHTS + GRIDS + _SHAPES),
        Quantizer(
            dequantize_affine,
            accepts={"codes": torch.ones(2, 3, dtype=torch.uint8)} | _GRID,
            refuses=(
                *AXES,
                *_SHAPES,
                ("codes must be an integer tensor", TypeError, {"codes": torch.ones(2, 3)}),
                ("codes must be an integer", TypeError, {"codes": torch.ones(2, 3).bool()}),
                ("codes must be a non-empty", ValueError, {"codes": torch.ones(3).long()}),
            ),
        ),
        Quantizer(
            rtn_quantize,
            accepts=_WEIGHT,
            refuses=(
                *WEIGHTS,
                *GRIDS,
                *AXES,
                ("scale must be of", ValueError, {"grid": (torch.ones(1, 1), torch.ones(1, 1))}),
                ("mse must be False", ValueError, {"grid": tuple(_GRID.values()), "mse": True}),
            ),
        ),
        Quantizer(
            gptq_quantize,
            accepts=weight_and_hessian(),
            refuses=(
                *WEIGHTS,
                *GRIDS,
                *HESSIANS,
                ("scales must be one of 'fresh'", ValueError, {"scales": "new"}),
                ("block_size must be an int of at least 1", ValueError, {"block_size": 0}),
            ),
        ),
        *(
            Quantizer(
                function,
                accepts=weight_and_input(),
                refuses=(*WEIGHTS, *GRIDS, *INPUTS, *more),
            )
            for function, more in (
                (adadim_quantize, ()),
                (awq_quantize, _SEARCH + _TOKENS),
                (awq_search_scale, _SEARCH + _NO_FORWARD),
                (awq_search_clip, _SEARCH + _TOKENS + _SHRINK),
            )
        ),
        Quantizer(
            incoherence_preprocess,
            accepts=weight_and_hessian(),
            refuses=(*WEIGHTS, *HESSIANS[:4], *_KINDS),
        ),
        Quantizer(
            quip_quantize,
            accepts=weight_and_hessian(),
            refuses=(
                *WEIGHTS,
                *HESSIANS[:4],
                *HESSIANS[5:],
                *_KINDS,
                ("hessian must be positive definite", ValueError, {"hessian": -torch.eye(3)}),
                ("bits must be an int from 1 to 8", ValueError, {"bits": 0}),
                ("bits must be an int", TypeError, {"bits": 2.0}),
                ("rho must be a finite number above 0", ValueError, {"rho": 0.0}),
                ("greedy_passes must be an int of at least 0", ValueError, {"greedy_passes": -1}),
            ),
        ),
        Quantizer(
            spqr_quantize,
            accepts=weight_and_hessian(),
            refuses=(
                *WEIGHTS,
                *GRIDS,
                *HESSIANS,
                ("outlier_threshold must be at least 0", ValueError, {"outlier_threshold": -0.1}),
                ("outlier_threshold must be at", ValueError, {"outlier_threshold": float("nan")}),
                ("outlier_threshold must be a number", TypeError, {"outlier_threshold": None}),
                ("scale_bits must be an int from 1 to 8", ValueError, {"scale_bits": 9}),
                ("zero_bits must be an int from 1 to 8", ValueError, {"zero_bits": 0}),
                ("zero_bits must be an int", TypeError, {"zero_bits": True}),
                ("statistics_group_size must be an int", ValueError, {"statistics_group_size": 0}),
                ("block_size must be an int of at least 1", ValueError, {"block_size": 0}),
            ),
        ),
        Quantizer(
            vptq_quantize,
            accepts=weight_and_hessian(),
            refuses=(
                *WEIGHTS,
                *HESSIANS,
                ("vector_length must be an int of at least 1", ValueError, {"vector_length": 0}),
                ("num_centroids must be an int of at least 1", ValueError, {"num_centroids": 0}),
                ("residual_centroids must be an int", TypeError, {"residual_centroids": 2.0}),
                (r"initial must be of shape \(256, 8\)", ValueError, {"initial": torch.ones(2, 8)}),
                (
                    "residual_initial must be None",
                    ValueError,
                    {"residual_initial": torch.ones(256, 8)},
                ),
                ("block_size must be an int of at least 1", ValueError, {"block_size": 0}),
                ("iterations must be an int of at least 0", ValueError, {"iterations": -1}),
                ("tol must be a finite number of at least 0", ValueError, {"tol": -1.0}),
            ),
        ),
        Quantizer(
            ldlq_quantize,
            accepts=weight_and_hessian(),
            refuses=(
                *WEIGHTS,
                *GRIDS,
                *HESSIANS,
                ("rounding must be one of 'nearest'", ValueError, {"rounding": "up"}),
                ("greedy_passes must be an int of at", ValueError, {"greedy_passes": -1}),
                (
                    "greedy_passes must be 0 with stochastic rounding",
                    ValueError,
                    {"greedy_passes": 1, "rounding": "stochastic"},
                ),
                ("scale must be of", ValueError, {"grid": (torch.ones(2, 2), torch.ones(2, 2))}),
            ),
        ),
    ]


@pytest.mark.untyped
@samples.every_refusal(Quantizer)
def test_refuses(sample: Quantizer, refusal: samples.Refusal) -> None:
    sample.check_refusal(refusal)
