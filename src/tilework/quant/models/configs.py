"""How the layers of a model are quantized: a class for each algorithm, with its options."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tilework.catalog import implements, without_paper
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.models._config import Config
from tilework.quant.rounding.gptq_quantize import gptq_quantize
from tilework.quant.rounding.ldlq_quantize import ldlq_quantize

__all__ = ["GPTQConfig", "LDLQConfig", "RTNConfig"]


@without_paper("rounding to nearest, which every algorithm is compared with")
@dataclass(frozen=True)
class RTNConfig(Config):
    """Rounding to nearest, for :func:`quantize_`; it needs no calibration.

    Args:
        bits: As of :func:`rtn_quantize`, and so are the others.
        group_size: Weights of a group; None is a whole row.
        axis: ``"out"``, ``"in"`` or ``"tensor"``.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        mse: Whether ranges may be narrowed for a smaller error.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import RTNConfig
        >>> RTNConfig(bits=8)
        RTNConfig(bits=8, group_size=128, axis='out', scheme='asymmetric', mse=False)

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """

    function = staticmethod(rtn_quantize)
    statistics: ClassVar[Literal["none"]] = "none"

    bits: int = 4
    group_size: int | None = 128
    axis: str = "out"
    scheme: str = "asymmetric"
    mse: bool = False


@implements(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    year=2022,
    arxiv="2210.17323",
)
@dataclass(frozen=True)
class GPTQConfig(Config):
    """GPTQ, for :func:`quantize_`.

    Args:
        bits: As of :func:`gptq_quantize`, and so are the others.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        act_order: Whether important columns come first.
        scales: ``"fresh"``, ``"stale"`` or ``"static"``.
        block_size: Columns that are computed together.
        damp: What is added to the diagonal of the Hessian, in units of its mean.
        mse: Whether ranges may be narrowed for a smaller error.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import GPTQConfig
        >>> GPTQConfig(bits=3, act_order=True).group_size
        128

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """

    function = staticmethod(gptq_quantize)

    bits: int = 4
    group_size: int | None = 128
    scheme: str = "asymmetric"
    act_order: bool = False
    scales: str = "fresh"
    block_size: int = 128
    damp: float = 0.01
    mse: bool = False


@implements(
    "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
    year=2023,
    arxiv="2307.13304",
)
@dataclass(frozen=True)
class LDLQConfig(Config):
    """LDLQ, for :func:`quantize_`.

    Args:
        bits: As of :func:`ldlq_quantize`, and so are the others.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        grid: Scale and zero-point of all layers in the place of fitted ones.
        rounding: ``"nearest"`` or ``"stochastic"``.
        greedy_passes: Passes over all columns that follow.
        damp: What is added to the diagonal of the Hessian, in units of its mean.
        generator: What random numbers are drawn from.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import LDLQConfig
        >>> LDLQConfig(bits=2, greedy_passes=2).rounding
        'nearest'

    Reference:
        Jerry Chee, Yaohui Cai, Volodymyr Kuleshov, Christopher De Sa. QuIP: 2-Bit Quantization of
        Large Language Models With Guarantees. 2023. arXiv:2307.13304.
    """

    function = staticmethod(ldlq_quantize)

    bits: int = 4
    group_size: int | None = None
    scheme: str = "asymmetric"
    grid: tuple[torch.Tensor, torch.Tensor] | None = None
    rounding: str = "nearest"
    greedy_passes: int = 0
    damp: float = 0.01
    generator: torch.Generator | None = None
