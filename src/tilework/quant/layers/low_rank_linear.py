"""What quantization changes, made up for by two small matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_weight, computed
from tilework.quant.layers.quant_linear import QuantLinear
from tilework.quant.storage._stored import StoredWeights

__all__ = ["LowRankLinear", "low_rank_compensation"]

_PAPER = implements(
    "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low "
    "Rank Compensation",
    year=2023,
    arxiv="2303.08302",
)


@_PAPER
@torch.no_grad()
@without_autocast
def low_rank_compensation(
    weight: Tensor, quantized_weight: Tensor | StoredWeights, *, rank: int = 8
) -> tuple[Tensor, Tensor]:
    r"""The best approximation of what quantization changed by a product of two thin matrices.

    With the singular values :math:`\sigma_i` and vectors of :math:`W - \hat W`:

    .. math::

        W - \hat W = \sum_i \sigma_i u_i v_i^\top, \qquad
        \texttt{up} = [\sqrt{\sigma_1} u_1, \dots, \sqrt{\sigma_r} u_r], \qquad
        \texttt{down} = [\sqrt{\sigma_1} v_1, \dots, \sqrt{\sigma_r} v_r]^\top

    where of each :math:`u_i` the entry of largest magnitude, the first one of several, is positive.

    Args:
        weight: Weights :math:`W`, of shape (out, in).
        quantized_weight: What stands in their place :math:`\hat W`, as a tensor of shape (out, in)
            or as quantized weights.
        rank: The rank :math:`r`, at least 1 and at most the smaller size of ``weight``.

    Returns:
        ``up``, of shape (out, rank), and ``down``, of shape (rank, in), float64 if a tensor is,
        otherwise float32.

    Raises:
        ValueError: ``rank`` is out of its range, or the shapes of the weights differ.
        TypeError: A tensor is not of a real floating dtype, or ``rank`` is not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import low_rank_compensation
        >>> weight = torch.tensor([[4.0, 0.0], [0.0, -1.0]])
        >>> low_rank_compensation(weight, torch.zeros(2, 2), rank=1)
        (tensor([[2.],
                [0.]]), tensor([[2., 0.]]))

    Reference:
        Zhewei Yao, Xiaoxia Wu, Cheng Li, Stephen Youn, Yuxiong He. ZeroQuant-V2: Exploring
        Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation. 2023.
        arXiv:2303.08302.
    """
    name = "low_rank_compensation"
    check_weight(name, weight)
    if isinstance(quantized_weight, StoredWeights):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        quantized_weight = quantized_weight.dequantize(wide)
    check_weight(name, quantized_weight, "quantized_weight")
    _checks.shape(name, "quantized_weight", quantized_weight, weight.shape)
    _checks.same_device(name, weight=weight, quantized_weight=quantized_weight)
    most = min(weight.shape)
    if not 1 <= _checks.integer(name, "rank", rank) <= most:
        raise _checks.bad_value(name, "rank", f"an int from 1 to {most}", rank)
    dtype = computed(weight, quantized_weight)
    error = weight.to(dtype) - quantized_weight.to(dtype)
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank].sqrt(), right[:rank]
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    signs = torch.ones_like(largest).copysign(largest)
    return left * signs * sizes, right * (signs * sizes).mT


@_PAPER
class LowRankLinear(QuantLinear):
    r"""A linear layer with quantized weights and two thin matrices that are trained.

    .. math::

        y = x \hat W^\top + (x \, \texttt{down}^\top) \, \texttt{up}^\top + b

    Codes and grids are buffers, as of :class:`QuantLinear`; ``up``, ``down`` and the bias are
    parameters.

    Args:
        quantized: Quantized weights of shape (out, in).
        up: Of shape (out, rank), as of :func:`low_rank_compensation`.
        down: Of shape (rank, in).
        bias: A bias of shape (out,), or None.

    Raises:
        ValueError: A tensor is of a shape that does not fit.
        TypeError: ``quantized`` is not quantized weights, or a tensor not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import LowRankLinear, low_rank_compensation, rtn_quantize
        >>> weight = torch.randn(8, 16)
        >>> quantized = rtn_quantize(weight, bits=2)
        >>> layer = LowRankLinear(quantized, *low_rank_compensation(weight, quantized, rank=8))
        >>> x = torch.randn(3, 16)
        >>> torch.allclose(layer(x), x @ weight.T, atol=1e-4)
        True

    Reference:
        As :func:`low_rank_compensation`.
    """

    def __init__(
        self, quantized: StoredWeights, up: Tensor, down: Tensor, bias: Tensor | None = None
    ) -> None:
        super().__init__(quantized, bias)
        name = type(self).__name__
        for argument, tensor in (("up", up), ("down", down)):
            _checks.floating(name, argument, tensor)
            if tensor.dim() != 2:
                raise _checks.bad_value(name, argument, "a matrix", tensor)
        rank = up.shape[1]
        _checks.shape(name, "up", up, (self.out_features, rank))
        _checks.shape(name, "down", down, (rank, self.in_features))
        self.up = up if isinstance(up, nn.Parameter) else nn.Parameter(up)
        self.down = down if isinstance(down, nn.Parameter) else nn.Parameter(down)

    def forward(self, input: Tensor) -> Tensor:
        """Take the inputs of shape (..., in) to outputs of shape (..., out)."""
        thin = F.linear(input, self.down.to(input.dtype))
        return super().forward(input) + F.linear(thin, self.up.to(input.dtype))

    def extra_repr(self) -> str:
        """The sizes, and the form of the weights."""
        return f"{super().extra_repr()}, rank={self.up.shape[1]}"
