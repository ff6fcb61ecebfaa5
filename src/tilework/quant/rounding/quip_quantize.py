"""QuIP: weights are rotated until no entry stands out, and rounded with linear feedback."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_bits, check_hessian, check_weight, computed
from tilework.quant.rotations.hadamard import (
    random_hadamard_matrix,
    random_orthogonal_matrix,
)
from tilework.quant.rounding.ldlq_quantize import rounded_with_feedback
from tilework.quant.storage._stored import Stored
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["IncoherenceTransform", "incoherence_preprocess", "quip_quantize"]

_PAPER = implements(
    "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
    year=2023,
    arxiv="2307.13304",
)
KINDS = ("kronecker", "hadamard", "orthogonal", "identity")
_LEAST = 1e-8


@_PAPER
@dataclass(frozen=True, eq=False, repr=False)
class IncoherenceTransform(Stored):
    r"""Weights rescaled and rotated on both sides, and back.

    .. math::

        W' = A \, W \, \mathrm{diag}(d) \, B^\top, \qquad
        W = A^\top W' B \, \mathrm{diag}(1/d)

    Args:
        left: The orthogonal :math:`A`, of shape (out, out).
        right: The orthogonal :math:`B`, of shape (in, in).
        column_scale: The factors :math:`d`, of shape (in,).

    Raises:
        ValueError: A tensor is of a shape that does not fit the others.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import IncoherenceTransform
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> transform = IncoherenceTransform(swap, torch.eye(2), torch.tensor([1.0, 2.0]))
        >>> transform.forward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3., 8.],
                [1., 4.]])

    Reference:
        Jerry Chee, Yaohui Cai, Volodymyr Kuleshov, Christopher De Sa. QuIP: 2-Bit Quantization of
        Large Language Models With Guarantees. 2023. arXiv:2307.13304.
    """

    left: Tensor
    right: Tensor
    column_scale: Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        for argument, tensor in self.tensors().items():
            _checks.floating(name, argument, tensor)
        for argument, tensor in (("left", self.left), ("right", self.right)):
            if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
                raise _checks.bad_value(name, argument, "a square matrix", tensor)
        _checks.shape(name, "column_scale", self.column_scale, (len(self.right),))
        _checks.same_device(name, **self.tensors())

    def forward(self, weight: Tensor) -> Tensor:
        """Rotate weights.

        Args:
            weight: Weights :math:`W`, of shape (out, in).

        Returns:
            :math:`W'`, of the same shape.
        """
        return self.left @ (weight.to(self.left.dtype) * self.column_scale) @ self.right.mT

    def inverse(self, weight: Tensor) -> Tensor:
        """Rotate weights back.

        Args:
            weight: Weights :math:`W'`, of shape (out, in).

        Returns:
            :math:`W`, of the same shape.
        """
        return self.left.mT @ weight.to(self.left.dtype) @ self.right / self.column_scale

    def __repr__(self) -> str:
        """In one line, without values."""
        return f"{type(self).__name__}({len(self.left)}, {len(self.right)})"


@_PAPER
@torch.no_grad()
@without_autocast
def incoherence_preprocess(
    weight: Tensor,
    hessian: Tensor,
    *,
    rescale: bool = True,
    kind: str = "kronecker",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, IncoherenceTransform]:
    r"""Weights and a Hessian rotated at random, so that no entry stands out.

    .. math::

        W' = A \, W \, \mathrm{diag}(d) \, B^\top, \qquad
        H' = B \, \mathrm{diag}(1/d) \, H \, \mathrm{diag}(1/d) \, B^\top

    with random orthogonal :math:`A` and :math:`B`, by ``kind``:

    - ``"kronecker"``: :math:`P_2 (R_p \otimes R_q) P_1` with rotations of two factors of the size
      and permutations; the prime factors of the size, in rising order, go to :math:`p` and
      :math:`q` in turn;
    - ``"hadamard"``: :func:`random_hadamard_matrix`, for powers of two;
    - ``"orthogonal"``: :func:`random_orthogonal_matrix`;
    - ``"identity"``: none.

    With ``rescale``, :math:`d = \max((h / v)^{1/4}, 10^{-8})`, where :math:`h` is the diagonal of
    :math:`H / \max \lvert H \rvert` and :math:`v` that of :math:`W^\top W`, both at least
    :math:`10^{-8}`; otherwise :math:`d = 1`.

    Args:
        weight: Weights :math:`W`, of shape (out, in).
        hessian: :math:`H`, as of :class:`HessianAccumulator`, of shape (in, in), symmetric.
        rescale: Whether columns are rescaled.
        kind: ``"kronecker"``, ``"hadamard"``, ``"orthogonal"`` or ``"identity"``.
        generator: What is drawn from, by default torch's own.

    Returns:
        :math:`W'`, :math:`H'` and the transform, float64 if a tensor is, otherwise float32.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, ``kind`` is not one of those
            above, or a size is not a power of two for ``"hadamard"``.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import incoherence_preprocess
        >>> weight = torch.zeros(64, 64)
        >>> weight[3, 5] = 64.0
        >>> rotated, _, transform = incoherence_preprocess(weight, torch.eye(64), rescale=False)
        >>> bool(rotated.abs().max() < 32)
        True
        >>> torch.allclose(transform.inverse(rotated), weight, atol=1e-4)
        True

    Deviations:
        The released code divides the rescaled Hessian by its largest entry, which changes nothing,
        and adds to its diagonal here and again later; here that is left to ``damp``.

    Reference:
        As :class:`IncoherenceTransform`.
    """
    name = "incoherence_preprocess"
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    _check_kind(name, kind, weight)
    _checks.same_device(name, weight=weight, hessian=hessian)
    dtype = computed(weight, hessian)
    weight, hessian = weight.to(dtype), hessian.to(dtype)
    scale = _rescaling(weight, hessian) if rescale else weight.new_ones(weight.shape[1])
    left, right = (_rotation(size, kind, weight, generator) for size in weight.shape)
    transform = IncoherenceTransform(left, right, scale)
    turned = right @ (hessian / scale / scale.unsqueeze(1)) @ right.mT
    return transform.forward(weight), (turned + turned.mT) / 2, transform


def _check_kind(name: str, kind: str, weight: Tensor) -> None:
    _checks.one_of(name, "kind", kind, KINDS)
    if kind == "hadamard" and any(size & (size - 1) for size in weight.shape):
        accepted = "of sizes that are powers of two with kind='hadamard'"
        raise _checks.bad_value(name, "weight", accepted, weight)


def _rescaling(weight: Tensor, hessian: Tensor) -> Tensor:
    largest = hessian.abs().amax()
    inputs = hessian.diagonal() / largest.where(largest > 0, 1.0)
    weights = weight.square().sum(0)
    ratio = inputs.clamp(min=_LEAST) / weights.clamp(min=_LEAST)
    return ratio.pow(0.25).clamp(min=_LEAST)


def _rotation(size: int, kind: str, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random orthogonal matrix of the dtype and device of a tensor."""
    place = {"dtype": like.dtype, "device": like.device}
    if kind == "identity":
        return torch.eye(size, **place)  # type: ignore[call-overload, no-any-return]
    if kind == "orthogonal":
        return random_orthogonal_matrix(size, generator=generator, **place)  # type: ignore[arg-type]
    if kind == "hadamard":
        return random_hadamard_matrix(size, generator=generator, **place)  # type: ignore[arg-type]
    parts = []
    for part in _factors(size):
        matrix = random_orthogonal_matrix(part, generator=generator, **place)  # type: ignore[arg-type]
        matrix[:, 0] *= torch.linalg.det(matrix).sign()
        parts.append(matrix)
    first, second = (
        torch.randperm(size, generator=generator, device=like.device) for _ in range(2)
    )
    return torch.kron(*parts)[first][:, second]


def _factors(size: int) -> tuple[int, int]:
    """Two factors, to which the prime ones go in turn, the smallest first."""
    parts, turn, prime = [1, 1], 0, 2
    while size > 1:
        while size % prime:
            prime += 1
        size //= prime
        parts[turn] *= prime
        turn = 1 - turn
    return parts[0], parts[1]


@_PAPER
@torch.no_grad()
@without_autocast
def quip_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 2,
    rho: float = 2.4,
    rescale: bool = True,
    kind: str = "kronecker",
    greedy_passes: int = 0,
    damp: float = 0.01,
    generator: torch.Generator | None = None,
) -> QuantizedTensor:
    r"""Weights rotated by :func:`incoherence_preprocess` and rounded by :func:`ldlq_quantize`.

    The one grid of all rotated weights :math:`W'`, of shape :math:`O \times I`, has, with
    ``bits`` :math:`b` and ``rho`` :math:`\rho`:

    .. math::

        r = \rho \frac{\lVert W' \rVert_F}{\sqrt{O I}} + 10^{-16}, \qquad
        s = \frac{2 r}{2^b - 1}, \qquad z = \frac{2^b - 1}{2}

    Args:
        weight: Weights, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), symmetric.
        bits: Bits of a code, from 1 to 8.
        rho: Half the range of the grid, in units of the root mean square, above 0.
        rescale: Whether columns are rescaled.
        kind: ``"kronecker"``, ``"hadamard"``, ``"orthogonal"`` or ``"identity"``.
        greedy_passes: As of :func:`ldlq_quantize`.
        damp: What is added to the diagonal of the rotated Hessian, in units of its mean.
        generator: What is drawn from, by default torch's own.

    Returns:
        The quantized weights, with an :class:`IncoherenceTransform`; they dequantize to the dtype
        of ``weight``.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import hessian_loss, quip_quantize, rtn_quantize
        >>> _ = torch.manual_seed(0)
        >>> weight, x = torch.randn(64, 64), torch.randn(256, 64) @ torch.randn(64, 64)
        >>> hessian = x.T @ x
        >>> quantized = quip_quantize(weight, hessian, bits=2)
        >>> nearest = rtn_quantize(weight, bits=2)
        >>> losses = [hessian_loss(weight, q.dequantize(), hessian) for q in (quantized, nearest)]
        >>> bool(losses[0] < 0.5 * losses[1])
        True

    Deviations:
        As of :func:`ldlq_quantize` and :func:`incoherence_preprocess`. The transform holds whole
        matrices, also where they are products of small ones.

    Reference:
        As :class:`IncoherenceTransform`.
    """
    name = "quip_quantize"
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    check_bits(name, bits)
    _checks.positive(name, "rho", rho)
    _check_kind(name, kind, weight)
    _checks.same_device(name, weight=weight, hessian=hessian)
    _checks.count(name, "greedy_passes", greedy_passes, 0)
    _checks.at_least(name, "damp", damp, 0)
    rotated, turned, transform = incoherence_preprocess(
        weight, hessian, rescale=rescale, kind=kind, generator=generator
    )
    levels = 2**bits - 1
    radius = rho * rotated.square().mean().sqrt() + 1e-16
    scale = (2 * radius / levels).reshape(1, 1)
    grid = scale, torch.full_like(scale, levels / 2)
    rounded = rounded_with_feedback(
        name, rotated, turned, bits=bits, grid=grid, greedy_passes=greedy_passes, damp=damp
    )
    return replace(rounded, transform=transform, dtype=weight.dtype)
