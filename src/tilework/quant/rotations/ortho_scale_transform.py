"""OSTQuant: a rotation and a scale for each channel, which are trained together."""

from typing import Any

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import implements

__all__ = ["OrthoScaleTransform"]

PAPER = implements(
    "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling "
    "Transformations for Better Distribution Fitting",
    year=2025,
    arxiv="2501.13987",
)


@PAPER
class OrthoScaleTransform(nn.Module):
    r"""A scale for each channel and a rotation, which weights on both sides undo.

    .. math::

        x \mapsto (x \odot s) R, \qquad s = e^{\texttt{log\_scale}}

    with ``rotation`` :math:`R`, which :class:`CayleyAdam` keeps orthogonal in training. At first it
    is the identity, and the scale 1.

    Args:
        dim: The number of channels, at least 1.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: ``dim`` is below 1.
        TypeError: ``dim`` is not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import OrthoScaleTransform
        >>> transform = OrthoScaleTransform(2)
        >>> _ = torch.nn.init.constant_(transform.log_scale, 0.6931472)
        >>> transform(torch.tensor([[1.0, 3.0]])).detach()
        tensor([[2., 6.]])
        >>> transform.transform_weight(torch.tensor([[4.0, 8.0]])).detach()
        tensor([[2., 4.]])

    Reference:
        Xing Hu, Yuan Cheng, Dawei Yang, and others. OstQuant: Refining Large Language Model
        Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting.
        2025. arXiv:2501.13987.
    """

    def __init__(self, dim: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _checks.count(type(self).__name__, "dim", dim)
        place = {"device": device, "dtype": dtype}
        self.rotation = nn.Parameter(torch.empty(dim, dim, **place))
        self.log_scale = nn.Parameter(torch.empty(dim, **place))
        self.reset_parameters()

    @property
    def dim(self) -> int:
        """The number of channels."""
        return len(self.log_scale)

    def reset_parameters(self) -> None:
        """Make the rotation the identity, and the scale 1."""
        nn.init.eye_(self.rotation)
        nn.init.zeros_(self.log_scale)

    def forward(self, input: Tensor) -> Tensor:
        """Scale and rotate activations.

        Args:
            input: Shape ``(..., dim)``.

        Returns:
            Values of the same shape.
        """
        self._check("input", input, -1)
        return (input * self.log_scale.exp()) @ self.rotation

    def transform_weight(self, weight: Tensor) -> Tensor:
        r"""The weight of a layer that reads the activations, :math:`(W \oslash s) R`.

        Args:
            weight: Shape ``(out, dim)``.

        Returns:
            The weight that gives of transformed activations what this one gives of the others.
        """
        self._check("weight", weight, -1)
        return (weight / self.log_scale.exp()) @ self.rotation

    def transform_output_weight(
        self, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""The weight of a layer that writes the activations, :math:`R^\top \mathrm{diag}(s) W`.

        Args:
            weight: Shape ``(dim, in)``.
            bias: Shape ``(dim,)``, which becomes :math:`(b \odot s) R`, or None.

        Returns:
            The weight, or with a bias both, that give transformed activations.
        """
        self._check("weight", weight, 0)
        scale = self.log_scale.exp()
        turned = self.rotation.mT @ (scale.unsqueeze(1) * weight)
        if bias is None:
            return turned
        self._check("bias", bias, -1)
        return turned, (bias * scale) @ self.rotation

    def _check(self, argument: str, tensor: Tensor, dim: int) -> None:
        name = type(self).__name__
        _checks.floating(name, argument, tensor)
        if not tensor.dim() or tensor.shape[dim] != self.dim:
            place = "last" if dim else "first"
            raise _checks.bad_value(name, argument, f"of {self.dim} in its {place} size", tensor)

    def extra_repr(self) -> str:
        """The number of channels."""
        return f"dim={self.dim}"
