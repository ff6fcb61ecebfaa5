"""What training with quantized values rests on: values of one tensor, gradients of another."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant._arguments import check_bits, check_broadcastable, computed

__all__ = ["fake_quantize", "straight_through"]

GRADIENTS = ("clipped", "straight_through")


class _Zero(torch.autograd.Function):
    """Zeros with the gradient of the input, which no operation has where that is not finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return torch.zeros_like(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()


@without_paper("the estimator that quantized training rests on")
def straight_through(input: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The values of ``quantized``, exactly, with the gradient of ``input``.

    The gradient :math:`g` of the result goes to ``input`` alone, as :math:`g`, or with a ``mask``
    :math:`m` as :math:`g \odot m`; in forward mode the same is done to tangents.

    Args:
        input: What is trained, of any shape.
        quantized: The values in its place, of the same shape.
        mask: What gradients are multiplied by, bool or floating, of the same shape.

    Returns:
        The values of ``quantized``, of its dtype.

    Raises:
        ValueError: ``quantized`` or ``mask`` is not of the shape of ``input``.
        TypeError: ``input`` or ``quantized`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import straight_through
        >>> weight = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> rounded = straight_through(weight, weight.round())
        >>> rounded.square().sum().backward()
        >>> weight.grad
        tensor([0., 4.])

    Deviations:
        The usual ``input + (quantized - input).detach()`` rounds, and is nan where ``input`` is
        infinite. Compiled and exported, an entry of ``input`` that is not finite has no gradient.

    Reference:
        Yoshua Bengio, Nicholas Leonard, Aaron Courville. Estimating or Propagating Gradients
        Through Stochastic Neurons for Conditional Computation. 2013. arXiv:1308.3432.
    """
    name = "straight_through"
    for argument, tensor in (("input", input), ("quantized", quantized)):
        _checks.floating(name, argument, tensor)
    _checks.shape(name, "quantized", quantized, input.shape)
    moving = input.to(quantized.dtype)
    if mask is not None:
        _checks.shape(name, "mask", mask, input.shape)
        moving = moving * mask.detach().to(moving.dtype)
    finite = moving.isfinite()
    inside = moving.where(finite, 0.0)
    # The difference is a zero that keeps the sign of a zero which it is taken from.
    result = quantized.detach() - (inside.detach() - inside)
    if torch.compiler.is_compiling():  # which has no functions with a forward mode of their own
        return result
    # For what is not finite alone: forward mode within forward mode takes _Zero for a constant.
    return result - _Zero.apply(-moving.masked_fill(finite, 0.0))  # type: ignore[no-untyped-call, no-any-return]


@without_paper("an affine grid in training")
def fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int = 8,
    gradient: str = "clipped",
) -> Tensor:
    r"""The nearest levels of an affine grid, with a gradient.

    With ``scale`` :math:`s`, ``zero_point`` :math:`z` and :math:`Q = 2^b - 1` for ``bits``
    :math:`b`:

    .. math::

        q = \mathrm{round}(x / s + z), \qquad y = s (\min(\max(q, 0), Q) - z)

    The gradient goes to ``input`` alone: for ``"clipped"`` where :math:`0 \le q \le Q`, for
    ``"straight_through"`` everywhere.

    Args:
        input: Values :math:`x`, of any shape.
        scale: Scales that broadcast against ``input``, above 0.
        zero_point: Zero-points that broadcast against ``input``.
        bits: Bits of a code, from 1 to 8.
        gradient: ``"clipped"`` or ``"straight_through"``.

    Returns:
        Levels of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``scale`` or ``zero_point`` does not broadcast to the shape of ``input``, or an
            option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or ``bits`` not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import fake_quantize
        >>> x = torch.tensor([-0.6, 0.3, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.5), torch.tensor(1.0), bits=2)
        >>> y
        tensor([-0.5000,  0.5000,  1.0000], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 1., 0.])

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "fake_quantize"
    bits = check_bits(name, bits)
    _checks.one_of(name, "gradient", gradient, GRADIENTS)
    _checks.floating(name, "input", input)
    for argument, tensor in (("scale", scale), ("zero_point", zero_point)):
        check_broadcastable(name, argument, tensor, input.shape)
    dtype = computed(input, scale, zero_point)
    scale, zero_point = scale.detach().to(dtype), zero_point.detach().to(dtype)
    codes = (input.detach().to(dtype) / scale + zero_point).round()
    kept = codes.clamp(0, 2**bits - 1)
    values = (scale * (kept - zero_point)).to(input.dtype)
    return straight_through(input, values, codes == kept if gradient == "clipped" else None)
