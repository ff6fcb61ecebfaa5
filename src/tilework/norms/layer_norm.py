"""Layer normalization, with a fused residual."""

from collections.abc import Sequence
from dataclasses import InitVar, field
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tilework import _checks, _implementations
from tilework._implementations import TABLES
from tilework.catalog import implements
from tilework.norms import _row_norm
from tilework.norms._layer import NormLayer

__all__ = ["LayerNorm", "layer_norm"]

_NAME = "layer_norm"
_TABLE = TABLES["norms.layer_norm"] = _row_norm.IMPLEMENTATIONS
_PAPER = implements("Layer Normalization", year=2016, arxiv="1607.06450")


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@_PAPER
def layer_norm(
    input: Float[Tensor, "*shape"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    eps: float = 1e-5,
    *,
    residual: Float[Tensor, "*shape"] | None = None,
    implementation: str | None = None,
) -> Float[Tensor, "*shape"] | tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Shift and scale the trailing dimensions, of a residual sum if given, to mean 0, variance 1.

    With :math:`s` = ``input`` or ``input + residual``, :math:`g` = ``weight``, :math:`b` = ``bias``
    and the :math:`n` elements that ``normalized_shape`` spans:

    .. math::

        \mu = \frac{1}{n} \sum_j s_j, \qquad
        v = \frac{1}{n} \sum_j (s_j - \mu)^2, \qquad
        y_i = \frac{s_i - \mu}{\sqrt{v + \epsilon}}\, g_i + b_i

    Without ``weight`` :math:`g_i` is 1, without ``bias`` :math:`b_i` is 0. Everything, the residual
    sum too, is computed in float32 (float64 for float64 input) and rounded once at the end.

    Args:
        input: Any shape that ends in ``normalized_shape``, any strides.
        normalized_shape: The trailing dimensions to normalize over, an int for the last one.
        weight: Gain, of shape ``normalized_shape`` and any floating dtype.
        bias: Shift after the gain, of shape ``normalized_shape`` and any floating dtype.
        eps: Added to the variance, at least 0.
        residual: Added to ``input`` first; of its shape, any floating dtype.
        implementation: ``"triton"`` (CUDA), ``"torch"`` (its own kernels), ``"tiled"`` (a CPU's
            cache at a time) or ``"reference"``. None picks the first that takes the arguments, and
            ``"tiled"`` where it is faster than torch's kernels, or more exact: for gradients of
            weight and bias in half precision on a CPU.

    Returns:
        The normalized tensor, of ``input``'s shape and dtype. With ``residual`` the pair of it and
        the sum, of the dtype that the two promote to, but float64 for float64 input alone; the
        first is computed from the unrounded sum.

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.norms import layer_norm
        >>> layer_norm(torch.tensor([[1.0, 3.0]]), 2, eps=0.0)
        tensor([[-1.,  1.]])
        >>> hidden, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> output, hidden = layer_norm(branch, 8, torch.ones(8), residual=hidden)

    Deviations:
        The paper has no epsilon; here it is under the root, as in torch. Under autocast the result
        keeps ``input``'s dtype, where torch's on CUDA is float32.

    Reference:
        Jimmy Lei Ba, Jamie Ryan Kiros, Geoffrey E. Hinton. Layer Normalization. 2016.
        arXiv:1607.06450.
    """
    normalized_shape = _checks.sizes(_NAME, "normalized_shape", normalized_shape)
    _checks.at_least(_NAME, "eps", eps, 0)
    return _row_norm.row_norm(
        _NAME,
        _TABLE,
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        residual=residual,
        weight_offset=0.0,
        centered=True,
        implementation=implementation,
    )


@_PAPER
class LayerNorm(NormLayer, nn.LayerNorm):  # type: ignore[misc]
    """:func:`layer_norm` with its weight and bias, in place of ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: The trailing dimensions to normalize over, an int for the last one.
        eps: Added to the variance.
        elementwise_affine: Whether there is a parameter ``weight`` of shape ``normalized_shape``.
        bias: Whether there is a parameter ``bias`` too.
        device: Device of the parameters.
        dtype: Their dtype.
        implementation: As in :func:`layer_norm`.

    Raises:
        ValueError: A size or option is out of range.

    Example:
        >>> import torch
        >>> from tilework.norms import LayerNorm
        >>> norm = LayerNorm(8)
        >>> norm(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> output, total = norm(torch.randn(2, 5, 8), residual=torch.randn(2, 5, 8))

    Reference:
        As :func:`layer_norm`.
    """

    function = _NAME
    eps: float = field(default=1e-5, kw_only=False)
    bias: InitVar[bool] = field(default=True, kw_only=False)
    implementation: str | None = None

    def __post_init__(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__post_init__(device, dtype, bias)

    def _check(self) -> None:
        _checks.at_least(_NAME, "eps", self.eps, 0)
        _implementations.check_name(_NAME, _TABLE, self.implementation)

    @overload  # type: ignore[override]
    def forward(self, input: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the normalized tensor, with ``residual`` the pair of it and the sum."""
        return layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            **self.options(),
        )
