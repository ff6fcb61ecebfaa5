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
from tilework.quant.rounding.quip_quantize import quip_quantize
from tilework.quant.rounding.spqr_quantize import spqr_quantize
from tilework.quant.rounding.vptq_quantize import vptq_quantize
from tilework.quant.smoothing.adadim_quantize import adadim_quantize
from tilework.quant.smoothing.awq_quantize import awq_quantize

__all__ = [
    "AWQConfig",
    "AdaDimConfig",
    "GPTQConfig",
    "LDLQConfig",
    "QuIPConfig",
    "RTNConfig",
    "SpQRConfig",
    "VPTQConfig",
]


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


@implements(
    "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
    year=2023,
    arxiv="2306.03078",
)
@dataclass(frozen=True)
class SpQRConfig(Config):
    """SpQR, for :func:`quantize_`.

    Args:
        bits: As of :func:`spqr_quantize`, and so are the others.
        group_size: Weights of a group; None is a whole row.
        outlier_threshold: At least 0, where all inexact weights are outliers; none are with inf.
        act_order: Whether important columns come first.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        scale_bits: Bits of the code of a scale; None leaves them.
        zero_bits: Bits of the code of a zero-point; None leaves them.
        statistics_group_size: Rows whose scales share a grid.
        leave_one_out: Whether grids are fitted without outliers.
        block_size: Columns that are computed together.
        damp: What is added to the diagonal of the Hessian, in units of its mean.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import SpQRConfig
        >>> SpQRConfig(outlier_threshold=0.1).group_size
        16

    Reference:
        Tim Dettmers, Ruslan Svirschevski, Vage Egiazarian, and others. SpQR: A Sparse-Quantized
        Representation for Near-Lossless LLM Weight Compression. 2023. arXiv:2306.03078.
    """

    function = staticmethod(spqr_quantize)

    bits: int = 3
    group_size: int | None = 16
    outlier_threshold: float = 0.2
    act_order: bool = False
    scheme: str = "minmax"
    scale_bits: int | None = 3
    zero_bits: int | None = 3
    statistics_group_size: int = 16
    leave_one_out: bool = True
    block_size: int = 128
    damp: float = 0.01


@implements(
    "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
    year=2023,
    arxiv="2307.13304",
)
@dataclass(frozen=True)
class QuIPConfig(Config):
    """QuIP, for :func:`quantize_`.

    Args:
        bits: As of :func:`quip_quantize`, and so are the others.
        rho: Half the range of the grid, in units of the root mean square.
        rescale: Whether columns are rescaled.
        kind: ``"kronecker"``, ``"hadamard"``, ``"orthogonal"`` or ``"identity"``.
        greedy_passes: Passes over all columns that follow.
        damp: What is added to the diagonal of the rotated Hessian, in units of its mean.
        generator: What rotations are drawn from.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import QuIPConfig
        >>> QuIPConfig(kind="hadamard").bits
        2

    Reference:
        Jerry Chee, Yaohui Cai, Volodymyr Kuleshov, Christopher De Sa. QuIP: 2-Bit Quantization of
        Large Language Models With Guarantees. 2023. arXiv:2307.13304.
    """

    function = staticmethod(quip_quantize)

    bits: int = 2
    rho: float = 2.4
    rescale: bool = True
    kind: str = "kronecker"
    greedy_passes: int = 0
    damp: float = 0.01
    generator: torch.Generator | None = None


@implements(
    "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
    year=2024,
    arxiv="2409.17066",
)
@dataclass(frozen=True)
class VPTQConfig(Config):
    """VPTQ, for :func:`quantize_`.

    Args:
        vector_length: As of :func:`vptq_quantize`, and so are the others.
        num_centroids: Vectors of the codebook.
        residual_centroids: Vectors of the codebook of residuals; None is no such book.
        act_order: Whether important columns come first.
        normalize: Whether columns are shifted and rescaled.
        block_size: Columns that are computed together.
        damp: What is added to the diagonal of the Hessian, in units of its mean.
        initial: The codebook to begin with, for all layers.
        residual_initial: That of residuals to begin with.
        iterations: Of :func:`weighted_kmeans`.
        tol: Of :func:`weighted_kmeans`.
        generator: What first codebooks are drawn from.

    Raises:
        ValueError: By :func:`quantize_`: an option is not one that the function takes.

    Example:
        >>> from tilework.quant import VPTQConfig
        >>> VPTQConfig(vector_length=4).num_centroids
        256

    Reference:
        Yifei Liu, Jicheng Wen, Yang Wang, Shengyu Ye, Li Lyna Zhang, Ting Cao, Cheng Li, Mao Yang.
        VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models. 2024.
        arXiv:2409.17066.
    """

    function = staticmethod(vptq_quantize)

    vector_length: int = 8
    num_centroids: int = 256
    residual_centroids: int | None = None
    act_order: bool = False
    normalize: bool = False
    block_size: int = 128
    damp: float = 0.01
    initial: torch.Tensor | None = None
    residual_initial: torch.Tensor | None = None
    iterations: int = 100
    tol: float = 1e-5
    generator: torch.Generator | None = None
