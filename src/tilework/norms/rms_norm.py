"""Root mean square layer normalization, with a fused residual."""

from collections.abc import Sequence
from typing import overload

from jaxtyping import Float
from torch import Tensor, nn

from tilework import _checks, _implementations
from tilework._implementations import TABLES
from tilework.catalog import implements
from tilework.norms import _row_norm
from tilework.norms._layer import NormLayer

__all__ = ["RMSNorm", "rms_norm"]

_NAME = "rms_norm"
_TABLE = TABLES["norms.rms_norm"] = _row_norm.IMPLEMENTATIONS
_PAPER = implements("Root Mean Square Layer Normalization", year=2019, arxiv="1910.07467")


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@_PAPER
def rms_norm(
    input: Float[Tensor, "*shape"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, "..."] | None = None,
    eps: float | None = None,
    *,
    residual: Float[Tensor, "*shape"] | None = None,
    weight_offset: float = 0.0,
    implementation: str | None = None,
) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Divide by the root mean square over the trailing dimensions, of a residual sum if given.

    With :math:`s` = ``input`` or ``input + residual``, :math:`g` = ``weight``, :math:`o` =
    ``weight_offset`` and the :math:`n` elements that ``normalized_shape`` spans:

    .. math::

        y_i = \frac{s_i}{\sqrt{\frac{1}{n} \sum_j s_j^2 + \epsilon}}\, (g_i + o)

    Without ``weight``, the last factor is 1. Everything, the residual sum too, is computed in
    float32 (float64 for float64 input) and rounded once at the end.

    Args:
        input: Any shape that ends in ``normalized_shape``, any strides.
        normalized_shape: The trailing dimensions to normalize over, an int for the last one.
        weight: Gain, of shape ``normalized_shape`` and any floating dtype. With one dimension more,
            the size of input's dimension before ``normalized_shape``, it has a gain for each entry
            of that dimension, as for the heads of queries and keys.
        eps: Added to the mean square, at least 0. None is the machine epsilon of the dtype of the
            computation: 1.1920929e-07, or 2.220446e-16 for float64.
        residual: Added to ``input`` first; of its shape, any floating dtype.
        weight_offset: Added to ``weight``; 1.0 for weights that are stored around zero.
        implementation: ``"triton"`` (CUDA), ``"torch"`` (its own kernels), ``"tiled"`` (a CPU's
            cache at a time) or ``"reference"``. None picks the first that takes the arguments, and
            ``"tiled"`` where it is faster than torch's kernels.

    Returns:
        The normalized tensor, of ``input``'s shape and dtype. With ``residual`` the pair of it and
        the sum, of the dtype that the two promote to, but float64 for float64 input alone; the
        first is computed from the unrounded sum.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or
            ``weight_offset`` is given without ``weight``.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.norms import rms_norm
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), 2, eps=0.0).square().mean()
        tensor(1.)
        >>> hidden, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> output, hidden = rms_norm(branch, 8, torch.ones(8), residual=hidden)

    Deviations:
        The authors' code adds epsilon to the root mean square; here it is under the root, as in
        torch and in language models. Code in the style of LLaMA rounds to half precision before
        the gain; here, as in torch, once and after it. Under autocast the result keeps ``input``'s
        dtype, where torch's on CUDA is float32.

    Reference:
        Biao Zhang, Rico Sennrich. Root Mean Square Layer Normalization. 2019. arXiv:1910.07467.
    """
    normalized_shape = _checks.sizes(_NAME, "normalized_shape", normalized_shape)
    _check_options(eps, weight_offset, weight is not None)
    return _row_norm.row_norm(
        _NAME,
        _TABLE,
        input,
        normalized_shape,
        weight,
        None,
        eps,
        residual=residual,
        weight_offset=weight_offset,
        centered=False,
        heads=True,
        implementation=implementation,
    )


@_PAPER
class RMSNorm(NormLayer, nn.RMSNorm):  # type: ignore[misc]
    """:func:`rms_norm` with its weight, in place of ``torch.nn.RMSNorm``.

    Args:
        normalized_shape: The trailing dimensions to normalize over, an int for the last one.
        eps: Added to the mean square; None is the machine epsilon of the computation.
        elementwise_affine: Whether there is a parameter ``weight`` of shape ``normalized_shape``.
        device: Device of the weight.
        dtype: Its dtype.
        weight_offset: Added to the weight, which starts at ``1 - weight_offset``.
        implementation: As in :func:`rms_norm`.

    Raises:
        ValueError: A size or option is out of range.

    Example:
        >>> import torch
        >>> from tilework.norms import RMSNorm
        >>> norm = RMSNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, total = norm(torch.randn(2, 5, 8), residual=torch.randn(2, 5, 8))

    Reference:
        As :func:`rms_norm`.
    """

    function = _NAME
    weight_offset: float = 0.0
    implementation: str | None = None

    def _check(self) -> None:
        _check_options(self.eps, self.weight_offset, self.elementwise_affine)
        _implementations.check_name(_NAME, _TABLE, self.implementation)

    def reset_parameters(self) -> None:
        """Set the gain to 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.weight_offset)

    @overload  # type: ignore[override]
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalized tensor, with ``residual`` the pair of it and the sum."""
        return rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            residual=residual,
            **self.options(),
        )


def _check_options(eps: float | None, weight_offset: float, has_weight: bool) -> None:
    if eps is not None:
        _checks.at_least(_NAME, "eps", eps, 0)
    if _checks.number(_NAME, "weight_offset", weight_offset) and not has_weight:
        raise _checks.bad_value(_NAME, "weight_offset", "0 without a weight", weight_offset)
