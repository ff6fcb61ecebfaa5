"""Floating-point numbers of 8 bits or fewer: their values, rounding to the nearest, their codes."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_broadcastable, computed, is_integer
from tilework.quant.training.straight_through import straight_through

__all__ = [
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4_IEEE",
    "E4M3_FN",
    "E4M3_IEEE",
    "E5M2_IEEE",
    "MinifloatFormat",
    "minifloat_decode",
    "minifloat_encode",
    "minifloat_quantize",
    "minifloat_scale",
]

SPECIALS = ("none", "fn", "ieee")
_PAPER = implements(
    "Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs",
    year=2023,
    arxiv="2311.12359",
)


@_PAPER
@dataclass(frozen=True, init=False)
class MinifloatFormat:
    r"""A format of floating-point numbers: a sign, an exponent and a mantissa in at most 8 bits.

    With :math:`E` = ``exponent_bits``, :math:`M` = ``mantissa_bits`` and :math:`\beta` = ``bias``,
    a code with the sign :math:`\sigma`, the exponent :math:`e` and the mantissa :math:`m` is

    .. math::

        (-1)^\sigma \, 2^{e - \beta} (1 + 2^{-M} m) \quad (e > 0), \qquad
        (-1)^\sigma \, 2^{1 - \beta} \, 2^{-M} m \quad (e = 0)

    ``specials`` says which codes are no numbers:

    - ``"none"``: all are; the largest number is :math:`2^{2^E - 1 - \beta} (2 - 2^{-M})`;
    - ``"fn"``: nan is the magnitude of ones alone, and there is no infinity; the largest number is
      :math:`2^{2^E - 1 - \beta} (2 - 2^{1 - M})`;
    - ``"ieee"``: the largest exponent is infinity with the mantissa 0, and nan with others; the
      largest number is :math:`2^{2^E - 2 - \beta} (2 - 2^{-M})`.

    These are at hand as ``tilework.quant.E2M1``, ``E2M3`` and ``E3M2`` (``"none"``), ``E4M3_FN``
    (``"fn"``), ``E3M4_IEEE``, ``E4M3_IEEE`` and ``E5M2_IEEE`` (``"ieee"``).

    Args:
        exponent_bits: Bits of the exponent, at least 1.
        mantissa_bits: Bits of the mantissa, at least 0 and at most ``7 - exponent_bits``.
        bias: What is taken from the exponent; None is :math:`2^{E - 1} - 1`.
        specials: ``"none"``, ``"fn"``, which needs a bit of the mantissa, or ``"ieee"``, which
            needs two of the exponent.

    Raises:
        ValueError: An option is not one of those above, or float64 does not hold all numbers.
        TypeError: A number is not an int.

    Example:
        >>> from tilework.quant import MinifloatFormat
        >>> E3M0 = MinifloatFormat(3, 0)
        >>> E3M0.max, E3M0.min_normal
        (16.0, 0.25)
        >>> MinifloatFormat(2, 1).values().tolist()[7:]
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    Reference:
        Shivam Aggarwal, Hans Jakob Damsgaard, Alessandro Pappalardo, Giuseppe Franco, Thomas B.
        Preusser, Michaela Blott, Tulika Mitra. Post-Training Quantization with Low-precision
        Minifloats and Integers on FPGAs. 2023. arXiv:2311.12359.
    """

    exponent_bits: int
    mantissa_bits: int
    _: KW_ONLY
    bias: int
    specials: str

    def __init__(
        self,
        exponent_bits: int,
        mantissa_bits: int,
        *,
        bias: int | None = None,
        specials: str = "none",
    ) -> None:
        name = type(self).__name__
        _checks.count(name, "exponent_bits", exponent_bits)
        _checks.count(name, "mantissa_bits", mantissa_bits, 0)
        if exponent_bits > 7:
            raise _checks.bad_value(name, "exponent_bits", "an int from 1 to 7", exponent_bits)
        if exponent_bits + mantissa_bits > 7:
            accepted = f"an int from 0 to {7 - exponent_bits}, 7 bits with those of the exponent"
            raise _checks.bad_value(name, "mantissa_bits", accepted, mantissa_bits)
        _checks.one_of(name, "specials", specials, SPECIALS)
        if specials == "fn" and not mantissa_bits:
            raise _checks.bad_value(name, "mantissa_bits", "at least 1 with 'fn'", mantissa_bits)
        if specials == "ieee" and exponent_bits < 2:
            raise _checks.bad_value(name, "exponent_bits", "at least 2 with 'ieee'", exponent_bits)
        exponents, mantissa = 2 ** int(exponent_bits), int(mantissa_bits)
        bias = exponents // 2 - 1 if bias is None else _checks.integer(name, "bias", bias)
        # The least number is at least that of float64, and the largest is below 2**1024.
        lowest, highest = exponents - 1024, 1075 - mantissa
        if not lowest <= bias <= highest:
            accepted = f"an int from {lowest} to {highest}, as float64 holds all numbers"
            raise _checks.bad_value(name, "bias", accepted, bias)
        fields = {
            "exponent_bits": int(exponent_bits),
            "mantissa_bits": mantissa,
            "bias": bias,
            "specials": specials,
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    def bits(self) -> int:
        """Of a code, the sign among them."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max(self) -> float:
        """The largest finite number."""
        top = 2**self.exponent_bits - (2 if self.specials == "ieee" else 1)
        missing = 2.0 ** ((1 if self.specials == "fn" else 0) - self.mantissa_bits)
        return math.ldexp(2 - missing, top - self.bias)

    @property
    def min_normal(self) -> float:
        """The smallest number above 0 with an exponent above 0."""
        return math.ldexp(1.0, 1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """The smallest number above 0; without a mantissa it is :attr:`min_normal`."""
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    def values(self) -> Tensor:
        """The finite numbers, each once, in order.

        Returns:
            Numbers, of dtype float64 and one dimension.
        """
        positive = [value for value in self._magnitudes[1:] if value < math.inf]
        negative = [-value for value in reversed(positive)]
        return torch.tensor([*negative, 0.0, *positive], dtype=torch.float64)

    @cached_property
    def _magnitudes(self) -> tuple[float, ...]:
        """What each code without its sign stands for: numbers that increase, then nan."""
        return tuple(map(self._magnitude, range(2 ** (self.bits - 1))))

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if self.specials == "fn" and code == 2 ** (self.bits - 1) - 1:
            return math.nan
        if self.specials == "ieee" and exponent == 2**self.exponent_bits - 1:
            return math.nan if mantissa else math.inf
        if exponent:
            mantissa += 2**self.mantissa_bits
        return math.ldexp(mantissa, max(exponent, 1) - self.bias - self.mantissa_bits)


E2M1 = MinifloatFormat(2, 1)
E2M3 = MinifloatFormat(2, 3)
E3M2 = MinifloatFormat(3, 2)
E3M4_IEEE = MinifloatFormat(3, 4, specials="ieee")
E4M3_FN = MinifloatFormat(4, 3, specials="fn")
E4M3_IEEE = MinifloatFormat(4, 3, specials="ieee")
E5M2_IEEE = MinifloatFormat(5, 2, specials="ieee")


def _check_format(name: str, format: object) -> None:
    if not isinstance(format, MinifloatFormat):
        raise _checks.bad_type(name, "format", "a MinifloatFormat", format)


@_PAPER
def minifloat_quantize(
    input: Tensor, format: MinifloatFormat, *, scale: float | Tensor | None = None
) -> Tensor:
    r"""The nearest numbers of a format, times a scale, with a gradient.

    With ``scale`` :math:`s` (1 for None), and :math:`\beta`, :math:`M` and :math:`x_{\max}` the
    bias, the bits of the mantissa and the largest number of the format:

    .. math::

        v = x / s, \qquad p = \max(\lfloor \log_2 \lvert v \rvert \rfloor, 1 - \beta) - M, \qquad
        y = s \min(\max(2^p \, \mathrm{round}(v / 2^p), -x_{\max}), x_{\max})

    Ties are rounded to even. What is finite stays finite; infinities and nan stay what they are,
    whether the format has them or not. The gradient goes to ``input`` alone, where
    :math:`\lvert v \rvert \le x_{\max}`.

    Args:
        input: Values :math:`x`, of any shape.
        format: The format.
        scale: A number above 0, or a tensor of such that broadcasts against ``input``.

    Returns:
        Values of the shape and dtype of ``input``, computed in float32 at least. Where that dtype
        does not hold the nearest number, as float16 does not hold :math:`2^{16}`, it is the next
        one towards 0.

    Raises:
        ValueError: ``scale`` does not broadcast to the shape of ``input``, or is not above 0 and
            finite; tensors are looked at on the CPU alone.
        TypeError: A tensor is not of a real floating dtype, ``format`` is no
            :class:`MinifloatFormat`, or ``scale`` no number.

    Example:
        >>> import torch
        >>> from tilework.quant import E2M1, minifloat_quantize
        >>> x = torch.tensor([0.3, -1.2, 2.5, 100.0], requires_grad=True)
        >>> y = minifloat_quantize(x, E2M1)
        >>> y
        tensor([ 0.5000, -1.0000,  2.0000,  6.0000], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 1., 1., 0.])

    Deviations:
        Casts of PyTorch and of ml_dtypes give infinity or nan above the largest number.

    Reference:
        As :class:`MinifloatFormat`.
    """
    name = "minifloat_quantize"
    _checks.floating(name, "input", input)
    _check_format(name, format)
    factor = _factor(name, 1.0 if scale is None else scale, input)
    dtype = computed(input, factor)
    factor = factor.to(dtype)
    largest = torch.finfo(dtype).max
    values = input.detach()
    scaled = (values.to(dtype) / factor).clamp(-largest, largest)
    step = _step(scaled, format)
    most = format.max if format.max <= largest else math.inf
    steps = scaled / step

    def rounded(whole: Tensor) -> Tensor:
        return ((whole * step).clamp(-most, most) * factor).to(input.dtype)

    nearest = rounded(steps.round())
    result = nearest.where(nearest.isfinite(), rounded(steps.trunc()))
    result = result.where(values.isfinite(), values)
    return straight_through(input, result, scaled.abs() <= most)


def _factor(name: str, scale: float | Tensor, input: Tensor) -> Tensor:
    """The scale as a tensor: a division by a number would be a product on some devices."""
    if not isinstance(scale, Tensor):
        _checks.positive(name, "scale", scale)
        scale = torch.full((), _checks.plain(scale), dtype=computed(input), device=input.device)
    check_broadcastable(name, "scale", scale, input.shape)
    if _checks.holds_values(scale) and not ((scale > 0) & scale.isfinite()).all():
        raise ValueError(f"{name}: scale must be finite and above 0 everywhere")
    return scale.detach()


def _step(values: Tensor, format: MinifloatFormat) -> Tensor:
    """The distance of the numbers of a format about each value, a power of two."""
    mantissa, _ = torch.frexp(values)
    power = values / (2 * mantissa.where(values != 0, 0.5))  # exactly
    # Below the distance of the dtype's own numbers, all are multiples of the step.
    limits = torch.finfo(values.dtype)
    least = max(format.min_subnormal, limits.smallest_normal * limits.eps)
    most = math.ldexp(1.0, math.frexp(limits.max)[1] - 1)
    return (power * 2.0**-format.mantissa_bits).clamp(min(least, most), most)


@_PAPER
@torch.no_grad()
def minifloat_scale(
    input: Tensor, format: MinifloatFormat, *, dim: int | tuple[int, ...] | None = None
) -> Tensor:
    r"""The scale that brings the largest magnitude to the largest number of a format.

    .. math::

        s = \max \lvert x \rvert / x_{\max}

    and 1 where that is 0, with :math:`x_{\max}` of ``format``.

    Args:
        input: Values :math:`x`, of any shape.
        format: The format.
        dim: The dimensions that share a scale, and stay with size 1; None is all.

    Returns:
        Scales, float64 for float64 values and float32 otherwise; of no dimension if ``dim`` is
        None.

    Raises:
        ValueError: ``dim`` is not of dimensions of ``input``, or has none or one of them twice.
        TypeError: ``input`` is not of a real floating dtype, ``format`` no
            :class:`MinifloatFormat`, or ``dim`` not of ints.

    Example:
        >>> import torch
        >>> from tilework.quant import E2M1, minifloat_scale
        >>> minifloat_scale(torch.tensor([[3.0, -12.0], [0.0, 0.0]]), E2M1, dim=1)
        tensor([[2.],
                [1.]])

    Reference:
        As :class:`MinifloatFormat`.
    """
    name = "minifloat_scale"
    _checks.floating(name, "input", input)
    _check_format(name, format)
    dims = None if dim is None else _dims(name, dim, input)
    keepdim = dims is not None
    magnitudes = input.to(computed(input)).abs()
    if not input.numel():  # of which there is no largest, but a sum
        largest = magnitudes.sum(dims, keepdim=keepdim)
    else:
        largest = magnitudes.amax(dims or tuple(range(input.dim())), keepdim=keepdim)
    scale = largest / torch.full_like(largest, format.max)
    return scale.masked_fill(scale == 0, 1.0)


def _dims(name: str, dim: Any, input: Tensor) -> tuple[int, ...]:
    dims = dim if isinstance(dim, tuple) else (dim,)
    whole = [_checks.integer(name, "dim", one) for one in dims]
    count = input.dim()
    if (
        not whole
        or not all(-count <= one < count for one in whole)
        or len({one % count for one in whole}) < len(whole)
    ):
        raise _checks.bad_value(name, "dim", f"of different dimensions of {count}", dim)
    return tuple(whole)


@_PAPER
@torch.no_grad()
def minifloat_encode(input: Tensor, format: MinifloatFormat) -> Tensor:
    """The codes of numbers of a format.

    From the highest bit to the lowest, a code is the sign, the exponent and the mantissa, in the
    low bits of a byte. Zero has the sign that it comes with; of the codes of nan it is the one
    with a magnitude of ones.

    Args:
        input: Numbers of the format, as of :func:`minifloat_quantize`, of any shape.
        format: The format.

    Returns:
        Codes, uint8 of the shape of ``input``.

    Raises:
        ValueError: ``input`` has what is not in the format.
        TypeError: ``input`` is not of a real floating dtype, or ``format`` no
            :class:`MinifloatFormat`.

    Example:
        >>> import torch
        >>> from tilework.quant import E2M1, minifloat_encode
        >>> minifloat_encode(torch.tensor([0.0, 0.5, 6.0, -6.0]), E2M1)
        tensor([ 0,  1,  7, 15], dtype=torch.uint8)

    Reference:
        As :class:`MinifloatFormat`.
    """
    name = "minifloat_encode"
    _checks.floating(name, "input", input)
    _check_format(name, format)
    values = input.double()
    numbers = [value for value in format._magnitudes if not math.isnan(value)]
    table = torch.tensor(numbers, dtype=values.dtype, device=values.device)
    codes = torch.searchsorted(table, values.abs().contiguous()).clamp(max=len(table) - 1)
    found = table[codes] == values.abs()
    last = len(format._magnitudes) - 1
    if len(table) <= last:
        codes = codes.masked_fill(values.isnan(), last)
        found = found | values.isnan()
    if _checks.has_values(input) and not found.all():
        wrong = values[~found][0].item()
        raise ValueError(f"{name}: input must be of numbers of the format, got {wrong}")
    return (codes + (last + 1) * values.signbit()).to(torch.uint8)


@_PAPER
@torch.no_grad()
def minifloat_decode(
    codes: Tensor, format: MinifloatFormat, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The numbers that codes of a format stand for.

    Args:
        codes: Codes as of :func:`minifloat_encode`, of an integer dtype and any shape.
        format: The format.
        dtype: Of the result, by default float32.

    Returns:
        Numbers, infinities and nan of the shape of ``codes``.

    Raises:
        ValueError: A code is out of range.
        TypeError: ``codes`` is not of an integer dtype, ``format`` no :class:`MinifloatFormat`,
            or ``dtype`` not a real floating one.

    Example:
        >>> import torch
        >>> from tilework.quant import E4M3_FN, minifloat_decode
        >>> minifloat_decode(torch.tensor([0, 1, 126, 127, 254]), E4M3_FN)
        tensor([ 0.0000e+00,  1.9531e-03,  4.4800e+02,         nan, -4.4800e+02])

    Reference:
        As :class:`MinifloatFormat`.
    """
    name = "minifloat_decode"
    _check_format(name, format)
    if not isinstance(codes, Tensor) or not is_integer(codes):
        raise _checks.bad_type(name, "codes", "an integer tensor", codes)
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise _checks.bad_type(name, "dtype", "a floating dtype", dtype)
    if _checks.has_values(codes) and codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= 2**format.bits:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: codes must be from 0 to {2**format.bits - 1}, got {wrong}")
    magnitudes = torch.tensor(format._magnitudes, dtype=torch.float64, device=codes.device)
    return torch.cat([magnitudes, -magnitudes]).to(dtype)[codes.long()]
