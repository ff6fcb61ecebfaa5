"""Weights as signs with a scale for each row and a factor for each column."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_weight, computed
from tilework.quant.storage.pack_codes import pack_codes
from tilework.quant.training.straight_through import straight_through

__all__ = ["OneBitLinear", "sign_ste", "svid_decompose"]

_PAPER = implements(
    "OneBit: Towards Extremely Low-bit Large Language Models", year=2024, arxiv="2402.11295"
)
_EPS = 1e-5
_LATENT = 0.01


def sign(input: Tensor) -> Tensor:
    """1 for 0 and above, -1 below; nan stays nan."""
    signs = torch.ones_like(input).where(input >= 0, -1.0)
    return signs.where(~input.isnan(), input)


@_PAPER
def sign_ste(input: Tensor) -> Tensor:
    r"""The sign, 1 for 0, with the gradient of a hyperbolic tangent.

    .. math::

        y = \begin{cases} 1 & x \ge 0 \\ -1 & x < 0 \end{cases}, \qquad
        \frac{\partial y}{\partial x} := 1.001 - \tanh^2 x

    Derivatives of all orders are those of :math:`\tanh x + 0.001 x`, in float32 at least.

    Args:
        input: Values :math:`x`, of any shape.

    Returns:
        Ones of both signs, and nan where ``input`` is nan, of its shape and dtype.

    Raises:
        TypeError: ``input`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import sign_ste
        >>> x = torch.tensor([-2.0, 0.0], requires_grad=True)
        >>> y = sign_ste(x)
        >>> y
        tensor([-1.,  1.], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([0.0717, 1.0010])

    Deviations:
        The sign of 0 is 1; the released code has 0 for it, a third value. Compiled, an infinite
        entry has no gradient, as of :func:`straight_through`.

    Reference:
        Yuzhuang Xu, Xu Han, Zonghan Yang, Shuo Wang, Qingfu Zhu, Zhiyuan Liu, Weidong Liu, Wanxiang
        Che. OneBit: Towards Extremely Low-bit Large Language Models. 2024. arXiv:2402.11295.
    """
    _checks.floating("sign_ste", "input", input)
    moving = input.to(computed(input))
    smooth = moving.tanh() + 0.001 * moving
    return straight_through(smooth, sign(input.detach()).to(smooth.dtype)).to(input.dtype)


@_PAPER
@torch.no_grad()
def svid_decompose(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The signs of a matrix, and the best approximation of its magnitudes by a single product.

    With the largest singular value :math:`\sigma` of :math:`\lvert W \rvert` and its vectors
    :math:`u, v \ge 0`:

    .. math::

        W \approx \mathrm{sign}(W) \odot a b^\top, \qquad
        a = \sqrt \sigma \, u, \qquad b = \sqrt \sigma \, v

    Args:
        weight: Weights :math:`W`, of shape (out, in).

    Returns:
        The signs, 1 for 0, of shape (out, in); the scales of the rows :math:`a`, of shape (out,);
        and the factors of the columns :math:`b`, of shape (in,); float64 for float64 weights and
        float32 otherwise.

    Raises:
        ValueError: ``weight`` is not a finite non-empty matrix.
        TypeError: ``weight`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import svid_decompose
        >>> sign, scale, factor = svid_decompose(torch.tensor([[1.0, -2.0], [-2.0, -4.0]]))
        >>> sign
        tensor([[ 1., -1.],
                [-1., -1.]])
        >>> torch.outer(scale, factor)
        tensor([[1.0000, 2.0000],
                [2.0000, 4.0000]])

    Deviations:
        The released code factorizes the magnitudes iteratively into factors that are not negative;
        the best ones are the singular vectors, which are taken directly.

    Reference:
        As :func:`sign_ste`.
    """
    check_weight("svid_decompose", weight)
    return _decomposed(weight)


def _decomposed(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.to(computed(weight))
    left, sizes, right = torch.linalg.svd(weight.abs(), full_matrices=False)
    # Of a matrix without negative entries, the magnitudes of singular vectors of the largest value
    # are such vectors too.
    root = sizes[0].sqrt()
    return sign(weight), root * left[:, 0].abs(), root * right[0].abs()


@_PAPER
class OneBitLinear(nn.Linear):
    r"""Linear layer of signs, with a factor for each input and a scale for each output.

    With :math:`W` = ``weight``, of which the gradient is that of :func:`sign_ste`, and
    :math:`b` = ``input_factor`` and :math:`a` = ``weight_scale``:

    .. math::

        y = \mathrm{LN}\big( ((x \odot b) \, \mathrm{sign}(W)^\top) \odot a \big) + \texttt{bias}

    where LN is layer normalization over the outputs with :math:`\epsilon = 10^{-5}`, without
    parameters.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        bias: Whether there is a bias, which is added last.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: As ``nn.Linear``.
        TypeError: As ``nn.Linear``.

    Example:
        >>> import torch
        >>> from tilework.quant import OneBitLinear
        >>> layer = OneBitLinear.from_linear(torch.nn.Linear(16, 8))
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 8])
        >>> layer.packed_sign().shape
        torch.Size([8, 2])

    Deviations:
        The released code leaves ``weight`` as the memory was; here it starts as that of
        ``nn.Linear``.

    Reference:
        As :func:`sign_ste`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plain = _checks.plain
        super().__init__(plain(in_features), plain(out_features), bias, device, dtype)
        self.weight_scale = nn.Parameter(torch.ones(out_features, device=device, dtype=dtype))
        self.input_factor = nn.Parameter(torch.ones(in_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the weight and the bias as ``nn.Linear`` does, and set the others to 1."""
        super().reset_parameters()
        if hasattr(self, "input_factor"):  # not yet when nn.Linear itself is made
            nn.init.ones_(self.weight_scale)
            nn.init.ones_(self.input_factor)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "OneBitLinear":
        """The layer whose scales, factors and signs are those of :func:`svid_decompose`.

        Args:
            linear: A layer with a finite weight, which stays as it is.

        Returns:
            A layer with a weight of 0.01 times the signs, and a copy of the bias.

        Raises:
            ValueError: The weight is not finite, or empty.
            TypeError: ``linear`` is not an ``nn.Linear``, or its weight not of a real floating
                dtype.
        """
        name = f"{cls.__name__}.from_linear"
        if not isinstance(linear, nn.Linear):
            raise _checks.bad_type(name, "linear", "an nn.Linear", linear)
        weight, bias = linear.weight.detach(), linear.bias
        check_weight(name, weight, "linear.weight")
        rows, columns = weight.shape
        layer = cls(columns, rows, bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            signs, scale, factor = _decomposed(weight)
            layer.weight.copy_(_LATENT * signs)
            layer.weight_scale.copy_(scale)
            layer.input_factor.copy_(factor)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer.train(linear.training)

    def packed_sign(self) -> Tensor:
        """The signs of the weight as bits, 1 for a negative one, as of :func:`pack_codes`.

        Returns:
            Bytes, uint8 of shape (out_features, ceil(in_features / 8)).
        """
        return pack_codes((self.weight < 0).to(torch.uint8), 1)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized map of the input by signs.

        Args:
            input: Shape ``(..., in_features)``.

        Returns:
            Shape ``(..., out_features)``.
        """
        mapped = F.linear(input * self.input_factor, sign_ste(self.weight)) * self.weight_scale
        output = F.layer_norm(mapped, (self.out_features,), eps=_EPS)
        return output if self.bias is None else output + self.bias
