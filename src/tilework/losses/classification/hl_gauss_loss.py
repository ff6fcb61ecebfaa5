"""Regression by classification into bins, with a Gaussian around the true value as target."""

import math
from dataclasses import field

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index
from tilework.losses._reduction import reduce_rows
from tilework.losses.classification import _value_bins
from tilework.losses.classification.categorical_value import categorical_value

__all__ = ["HLGaussLoss", "hl_gauss_loss", "hl_gauss_targets"]

_NAME = "hl_gauss_loss"
_PAPER = implements(
    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    year=2024,
    arxiv="2403.03950",
)


@_PAPER
def hl_gauss_targets(
    target: Float[Tensor, "*batch"],
    *,
    min_value: float,
    max_value: float,
    num_bins: int,
    sigma: float | None = None,
) -> Float[Tensor, "*batch bins"]:
    r"""Probabilities that a Gaussian around each value gives to bins.

    The ``num_bins`` = :math:`m` bins have the edges :math:`b_k = b_0 + k \varsigma` from
    :math:`b_0` = ``min_value`` to :math:`b_m` = ``max_value``. With a value :math:`y` of
    ``target``, clamped to them, :math:`\sigma` = ``sigma`` and the normal distribution function
    :math:`\Phi`:

    .. math::

        p_k = \frac{\Phi\big(\frac{b_{k+1} - y}{\sigma}\big) - \Phi\big(\frac{b_k - y}{\sigma}\big)}
            {\Phi\big(\frac{b_m - y}{\sigma}\big) - \Phi\big(\frac{b_0 - y}{\sigma}\big)}

    Args:
        target: Values of any shape.
        min_value: Lower edge of the first bin.
        max_value: Upper edge of the last bin.
        num_bins: Number of bins, at least 2.
        sigma: Standard deviation in the units of ``target``; None for three quarters of a bin's
            width :math:`\varsigma`.

    Returns:
        Shape ``(..., num_bins)``, of the dtype of ``target``, without a gradient. Rows sum to 1.

    Raises:
        ValueError: An option is out of range.
        TypeError: ``target`` is not of a floating dtype, or an option is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import hl_gauss_targets
        >>> hl_gauss_targets(torch.tensor(0.0), min_value=-2.0, max_value=2.0, num_bins=4)
        tensor([0.0881, 0.4119, 0.4119, 0.0881])

    Deviations:
        The paper has one symbol for two supports. As in its code, bins have edges here, and
        :func:`two_hot_targets` and :func:`c51_targets` have points.

    Reference:
        As :func:`hl_gauss_loss`.
    """
    name = "hl_gauss_targets"
    _checks.floating(name, "target", target)
    _check_options(name, min_value, max_value, sigma)
    _checks.count(name, "num_bins", num_bins, 2)
    return _targets(target, min_value, max_value, num_bins, sigma).to(target.dtype)


@_PAPER
def hl_gauss_loss(
    input: Float[Tensor, "*batch bins"],
    target: Float[Tensor, "*batch"],
    *,
    min_value: float,
    max_value: float,
    sigma: float | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy with a Gaussian around the true value as target, over bins of values.

    With the logits :math:`z_i` of a value in ``input`` and :math:`p_i` its
    :func:`hl_gauss_targets`, over as many bins as there are logits:

    .. math::

        \ell_i = -\sum_k p_{ik} \log \mathrm{softmax}(z_i)_k

    :func:`categorical_value` turns logits into values.

    Args:
        input: Logits of the bins, shape ``(..., num_bins)``, ``num_bins >= 2``.
        target: True values, shape ``(...)``; clamped to the interval of bins. They get no gradient.
        min_value: Lower edge of the first bin.
        max_value: Upper edge of the last bin.
        sigma: Standard deviation in the units of ``target``; None for three quarters of a bin's
            width.
        reduction: ``"mean"`` over values, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target``; of the dtype of ``input``, for half
        precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` or ``target`` is not of a floating dtype, or an option is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import hl_gauss_loss
        >>> input, target = torch.zeros(3, 51), torch.tensor([-1.0, 0.3, 7.0])
        >>> hl_gauss_loss(input, target, min_value=-10.0, max_value=10.0)  # log(51)
        tensor(3.9318)

    Deviations:
        None but those of :func:`hl_gauss_targets`.

    Reference:
        Jesse Farebrother, Jordi Orbay, Quan Vuong, and others. Stop Regressing: Training Value
        Functions via Classification for Scalable Deep RL. 2024. arXiv:2403.03950.
    """
    _check_options(_NAME, min_value, max_value, sigma)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
    _value_bins.check_input(_NAME, "input", input)
    _checks.floating(_NAME, "target", target)
    _checks.shape(_NAME, "target", target, input.shape[:-1])
    _checks.same_device(_NAME, input=input, target=target)

    def entropies(input: Tensor, target: Tensor) -> Tensor:
        dtype = computation_dtype(input.dtype)
        target = target.to(torch.promote_types(target.dtype, dtype))
        probabilities = _targets(target, min_value, max_value, input.shape[-1], sigma).to(dtype)
        return -(probabilities * input.to(dtype).log_softmax(-1)).sum(-1)

    loss = reduce_rows(entropies, (input, target), (), reduction)
    return loss.to(class_index.result_dtype(input))


@_PAPER
class HLGaussLoss(OptionsModule):
    """:func:`hl_gauss_loss` as a module, which also encodes and decodes values.

    The number of bins, ``num_bins``, is at least 2.

    Example:
        >>> import torch
        >>> from tilework.losses import HLGaussLoss
        >>> criterion = HLGaussLoss(-10.0, 10.0, 51)
        >>> input, target = torch.zeros(3, 51), torch.tensor([-1.0, 0.3, 7.0])
        >>> criterion(input, target)
        tensor(3.9318)
        >>> criterion.value(criterion.targets(target).log())
        tensor([-1.0000,  0.3000,  7.0000])
    """

    min_value: float = field(kw_only=False)
    max_value: float = field(kw_only=False)
    num_bins: int = field(kw_only=False)
    sigma: float | None = None
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(_NAME, self.min_value, self.max_value, self.sigma)
        _checks.count(_NAME, "num_bins", self.num_bins, 2)
        _checks.one_of(_NAME, "reduction", self.reduction, _checks.REDUCTIONS)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`hl_gauss_loss`."""
        self._check_input(input)
        return hl_gauss_loss(
            input,
            target,
            min_value=self.min_value,
            max_value=self.max_value,
            **self.options(),
        )

    def targets(self, target: Tensor) -> Tensor:
        """Return the probabilities of bins, as :func:`hl_gauss_targets`."""
        return hl_gauss_targets(
            target,
            min_value=self.min_value,
            max_value=self.max_value,
            num_bins=self.num_bins,
            sigma=self.sigma,
        )

    def value(self, input: Tensor) -> Tensor:
        """Return the values that logits stand for, as :func:`categorical_value`."""
        self._check_input(input)
        return categorical_value(input, min_value=self.min_value, max_value=self.max_value)

    def _check_input(self, input: Tensor) -> None:
        _checks.floating(_NAME, "input", input)
        if input.shape[-1:] != (self.num_bins,):
            raise _checks.bad_value(_NAME, "input", f"of shape (..., {self.num_bins})", input)


def _check_options(function: str, min_value: float, max_value: float, sigma: float | None) -> None:
    _value_bins.check_range(function, min_value, max_value)
    if sigma is not None:
        _checks.positive(function, "sigma", sigma)


def _targets(
    target: Tensor, min_value: float, max_value: float, num_bins: int, sigma: float | None
) -> Tensor:
    """The probabilities of bins in float32 or better."""
    if sigma is None:
        sigma = 0.75 * (max_value - min_value) / num_bins
    gaps = _value_bins.gaps(target, min_value, max_value, num_bins)
    below = torch.erf(gaps / (math.sqrt(2) * sigma))
    return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])
