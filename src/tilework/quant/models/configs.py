"""How the layers of a model are quantized: a class for each algorithm, with its options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from tilework.catalog import implements, without_paper
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.models._config import Config
from tilework.quant.rounding.gptq_quantize import gptq_quantize
from tilework.quant.rounding.ldlq_quantize import ldlq_quantize
from tilework.quant.smoothing.adadim_quantize import adadim_quantize
from tilework.quant.smoothing.awq_quantize import awq_quantize

__all__ = ["AWQConfig", "AdaDimConfig", "GPTQConfig", "LDLQConfig", "RTNConfig"]


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


@implements(
    "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    year=2023,
    arxiv="2306.00978",
)
@dataclass(frozen=True)
class AWQConfig(Config):
    """AWQ, for :func:`quantize_`, with the factors of inputs in the layer itself.

    Args:
        bits: As of :func:`awq_quantize`, and so are the others.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        grid: The number of exponents that are tried, and of steps of a magnitude.
        clip: Whether ranges are narrowed.
        max_tokens: The number of rows that are used, the first that reach the layer.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import AWQConfig
        >>> AWQConfig(bits=3).grid
        20

    Reference:
        Ji Lin, Jiaming Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan
        Xiao, Xingyu Dang, Chuang Gan, Song Han. AWQ: Activation-aware Weight Quantization for LLM
        Compression and Acceleration. 2023. arXiv:2306.00978.
    """

    function = staticmethod(awq_quantize)
    statistics: ClassVar[Literal["rows"]] = "rows"

    bits: int = 4
    group_size: int | None = 128
    scheme: str = "asymmetric"
    grid: int = 20
    clip: bool = True
    max_tokens: int = 512


@implements(
    "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large "
    "Language Models",
    year=2023,
    arxiv="2309.15531",
)
@dataclass(frozen=True)
class AdaDimConfig(Config):
    """AdaDim, for :func:`quantize_`.

    Args:
        bits: As of :func:`adadim_quantize`, and so are the others but the last.
        group_size: Weights of a group; None is a whole row or column.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        mse: Whether ranges may be narrowed for a smaller error.
        forward: The output of a layer for its weights; None is its outputs on the rows.
        max_tokens: The number of rows that are used, the first that reach the layer.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import AdaDimConfig
        >>> AdaDimConfig(bits=3).max_tokens
        512

    Reference:
        Jung Hwan Heo, Jeonghoon Kim, Beomseok Kwon, Byeongwook Kim, Se Jung Kwon, Dongsoo Lee.
        Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large
        Language Models. 2023. arXiv:2309.15531.
    """

    function = staticmethod(adadim_quantize)
    statistics: ClassVar[Literal["rows"]] = "rows"

    bits: int = 4
    group_size: int | None = 128
    scheme: str = "asymmetric"
    mse: bool = False
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None
    max_tokens: int = 512

    def options(self) -> dict[str, Any]:
        """Those of the function, which takes all rows that it gets."""
        options = super().options()
        del options["max_tokens"]
        return options
