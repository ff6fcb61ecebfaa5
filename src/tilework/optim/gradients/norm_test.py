"""Tests whether a batch is large enough for its gradient, and batch sizes that follow them."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype, without_autocast
from tilework.catalog import implements

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeTest",
    "inner_product_test",
    "microbatch_norm_test",
    "norm_test",
]

_PAPER = implements(
    "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
    year=2024,
    arxiv="2402.11215",
)


@_PAPER
class BatchSizeTest(NamedTuple):
    """What a test of a batch's gradient has found: scalar tensors.

    Args:
        passed: Whether the batch has at least ``batch_size`` samples.
        variance: The variance of one sample's gradient, as the test measures it.
        grad_sq_norm: The squared norm of the mean gradient.
        batch_size: The proposal: the least batch size that passes, in float64 and not rounded.

    Example:
        >>> import torch
        >>> from tilework.optim import norm_test
        >>> norm_test(torch.tensor([[1.0], [3.0]]), eta=0.5)._fields
        ('passed', 'variance', 'grad_sq_norm', 'batch_size')

    Reference:
        As :func:`norm_test`.
    """

    passed: Bool[Tensor, ""]
    variance: Float[Tensor, ""]
    grad_sq_norm: Float[Tensor, ""]
    batch_size: Float64[Tensor, ""]


@_PAPER
def norm_test(
    per_sample_grads: Float[Tensor, "batch ..."] | Sequence[Float[Tensor, "..."]],
    *,
    eta: float = 0.1,
    coordinatewise: bool = False,
) -> BatchSizeTest:
    r"""Test whether the variance of the mean gradient is small beside its squared norm.

    With the ``per_sample_grads`` :math:`g_i`, :math:`i = 1, \dots, b`, all parameters together,
    their mean :math:`\bar g`, the unbiased variances :math:`V_j` of their coordinates and
    :math:`\eta` = ``eta``, the proposed batch size is

    .. math::

        \frac{\sum_j V_j}{\eta^2 \lVert \bar g \rVert^2}
        \qquad \text{or, coordinate-wise,} \qquad
        \max_{j : V_j > 0} \frac{V_j}{\eta^2 \, \bar g_j^2}

    and the test passes if that is at most :math:`b`. Without variance the proposal is 0, with some
    but a mean of 0 infinite. Computed in float32 (float64 for float64).

    Args:
        per_sample_grads: The gradient of each sample, shape ``(b, ...)``, ``b >= 2``, or a sequence
            of such, one for each parameter.
        eta: The largest standard deviation of the mean relative to its norm, above 0.
        coordinatewise: Whether each coordinate must pass, as AdaGrad's theory asks.

    Returns:
        Whether the test passes, the variance :math:`\sum_j V_j`, :math:`\lVert \bar g \rVert^2` and
        the proposal; nothing is read from the device.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import norm_test
        >>> test = norm_test(torch.tensor([[1.0], [3.0]]), eta=0.5)
        >>> test.passed, test.variance, test.grad_sq_norm, test.batch_size
        (tensor(True), tensor(2.), tensor(4.), tensor(2., dtype=torch.float64))

    Reference:
        Tim Tsz-Kit Lau, Han Liu, Mladen Kolar. AdAdaGrad: Adaptive Batch Size Schemes for Adaptive
        Gradient Methods. 2024. arXiv:2402.11215.
    """
    name = "norm_test"
    _checks.positive(name, "eta", eta)
    grads = _rows(name, "per_sample_grads", per_sample_grads)
    moments = [torch.var_mean(rows, 0) for rows in grads]
    variance = _total(variances for variances, _ in moments)
    sq_norm = _total(mean.square() for _, mean in moments)
    ratio = _ratio(variance, sq_norm)
    if coordinatewise:
        ratios = [_ratio(variances, mean.double().square()) for variances, mean in moments]
        ratio = torch.cat([torch.zeros_like(ratio)[None], *ratios]).amax()
    return _judge(variance, sq_norm, ratio / eta**2, grads[0].shape[0])


@_PAPER
def inner_product_test(
    per_sample_grads: Float[Tensor, "batch ..."] | Sequence[Float[Tensor, "..."]],
    *,
    theta: float = 0.9,
) -> BatchSizeTest:
    r"""Test whether the samples' gradients agree with their mean along it.

    With the ``per_sample_grads`` :math:`g_i`, :math:`i = 1, \dots, b`, all parameters together,
    their mean :math:`\bar g` and :math:`\theta` = ``theta``, the proposed batch size is

    .. math::

        \frac{\operatorname{Var}_i \langle g_i, \bar g \rangle}
            {\theta^2 \lVert \bar g \rVert^4}

    with the unbiased variance, and the test passes if that is at most :math:`b`. What varies across
    :math:`\bar g` does not count, so that batches may be smaller than for :func:`norm_test`.
    Without variance the proposal is 0, with some but a mean of 0 infinite. Computed in float32
    (float64 for float64).

    Args:
        per_sample_grads: The gradient of each sample, shape ``(b, ...)``, ``b >= 2``, or a sequence
            of such, one for each parameter.
        theta: The largest standard deviation of the inner product with the mean of a batch,
            relative to its expectation, above 0.

    Returns:
        Whether the test passes, the variance of the inner products, :math:`\lVert \bar g \rVert^2`
        and the proposal; nothing is read from the device.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import inner_product_test
        >>> test = inner_product_test(torch.tensor([[1.0, 5.0], [3.0, -5.0]]), theta=0.5)
        >>> test.variance, test.grad_sq_norm, test.batch_size
        (tensor(8.), tensor(4.), tensor(2., dtype=torch.float64))

    Deviations:
        The released code sums the variances of each parameter's inner products, which is not the
        variance of the whole one.

    Reference:
        As :func:`norm_test`.
    """
    name = "inner_product_test"
    _checks.positive(name, "theta", theta)
    grads = _rows(name, "per_sample_grads", per_sample_grads)
    means = [rows.mean(0) for rows in grads]
    variance = _products(grads, means).var()
    sq_norm = _total(mean.square() for mean in means)
    ratio = _ratio(variance, sq_norm.double().square())
    return _judge(variance, sq_norm, ratio / theta**2, grads[0].shape[0])


@_PAPER
def microbatch_norm_test(
    means: Float[Tensor, "batches ..."] | Sequence[Float[Tensor, "..."]],
    *,
    micro_batch_size: int,
    variances: Float[Tensor, " batches"] | None = None,
    eta: float = 0.1,
) -> BatchSizeTest:
    r"""As :func:`norm_test`, from the mean gradients of micro-batches or of processes.

    With the ``means`` :math:`\mu_j`, :math:`j = 1, \dots, J`, of :math:`n` = ``micro_batch_size``
    samples each, their mean :math:`\bar g`, and the summed unbiased ``variances`` :math:`v_j`
    within each micro-batch, the variance of one sample's gradient is

    .. math::

        \frac{(n - 1) \sum_j v_j + n \sum_j \lVert \mu_j - \bar g \rVert^2}{J n - 1}
        \qquad \text{or, without them,} \qquad
        \frac{n}{J - 1} \sum_j \lVert \mu_j - \bar g \rVert^2

    The first is that of all samples exactly. The rest is :func:`norm_test` with :math:`b = J n`.

    Args:
        means: The mean gradient of each micro-batch, shape ``(J, ...)``, ``J >= 2``, or a sequence
            of such, one for each parameter.
        micro_batch_size: The number ``n`` of samples that each is of, at least 1.
        variances: For each micro-batch the unbiased variances of the coordinates of its samples'
            gradients, summed, shape ``(J)``.
        eta: As in :func:`norm_test`.

    Returns:
        As :func:`norm_test`.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import microbatch_norm_test, norm_test
        >>> grads = torch.randn(8, 5) + 1
        >>> micro = grads.reshape(2, 4, 5)
        >>> variances = micro.var(1).sum(1)
        >>> test = microbatch_norm_test(micro.mean(1), micro_batch_size=4, variances=variances)
        >>> torch.testing.assert_close(test.variance, norm_test(grads).variance)

    Reference:
        As :func:`norm_test`.
    """
    name = "microbatch_norm_test"
    _checks.count(name, "micro_batch_size", micro_batch_size)
    _checks.positive(name, "eta", eta)
    rows = _rows(name, "means", means)
    batches = rows[0].shape[0]
    moments = [torch.var_mean(one, 0) for one in rows]
    variance = micro_batch_size * _total(one for one, _ in moments)
    if variances is not None:
        _checks.floating(name, "variances", variances)
        _checks.shape(name, "variances", variances, (batches,))
        _checks.same_device(name, means=rows[0], variances=variances)
        within = (micro_batch_size - 1) * variances.to(variance.dtype).sum()
        variance = (within + (batches - 1) * variance) / (batches * micro_batch_size - 1)
    sq_norm = _total(mean.square() for _, mean in moments)
    ratio = _ratio(variance, sq_norm)
    return _judge(variance, sq_norm, ratio / eta**2, batches * micro_batch_size)


def _rows(name: str, argument: str, grads: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The tensor of each parameter, with a row for each sample, in the computation's dtype."""
    if not isinstance(grads, Tensor | Sequence):
        raise _checks.bad_type(name, argument, "a tensor or a sequence of such", grads)
    tensors = {argument: grads} if isinstance(grads, Tensor) else _named(argument, grads)
    if not tensors:
        raise _checks.bad_value(name, argument, "a tensor or a non-empty sequence of such", grads)
    for each, tensor in tensors.items():
        _checks.floating(name, each, tensor)
        if tensor.dim() == 0 or tensor.shape[0] < 2:
            raise _checks.bad_value(name, each, "of at least 2 rows", tensor)
    first = next(iter(tensors.values()))
    for each, tensor in tensors.items():
        if tensor.shape[0] != first.shape[0]:
            raise _checks.bad_value(name, each, f"of {first.shape[0]} rows as the first", tensor)
    _checks.same_device(name, **tensors)
    wide = [tensor.to(computation_dtype(tensor.dtype)) for tensor in tensors.values()]
    return [tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in wide]


def _named(argument: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{argument}[{index}]": tensor for index, tensor in enumerate(tensors)}


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(add, (part.sum() for part in parts))


@without_autocast
def _products(grads: list[Tensor], means: list[Tensor]) -> Tensor:
    """The inner product of each sample's gradient with the mean."""
    return reduce(add, (rows @ mean for rows, mean in zip(grads, means, strict=True)))


def _ratio(variance: Tensor, square: Tensor) -> Tensor:
    """The quotient in float64, 0 without variance."""
    return (variance.double() / square.double()).where(variance != 0, 0)


def _judge(variance: Tensor, sq_norm: Tensor, proposal: Tensor, samples: int) -> BatchSizeTest:
    return BatchSizeTest(proposal <= samples, variance, sq_norm, proposal)


@_PAPER
class AdaptiveBatchSize:
    """A batch size that grows with the proposals of tests, and never falls.

    Every ``every``-th :meth:`update` raises ``batch_size`` to the test's proposal, rounded up to a
    multiple of ``multiple_of``, but not above ``max_batch_size``. A proposal of infinity gives
    ``max_batch_size``, one of nan changes nothing.

    Args:
        batch_size: The batch size at the start, at least 1.
        max_batch_size: The largest one.
        every: How many updates come to one that is looked at, at least 1.
        multiple_of: What batch sizes are multiples of, unless it is the first or the largest, at
            least 1: the number of processes, or the size of a micro-batch.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: An option is not an int.

    Example:
        >>> import torch
        >>> from tilework.optim import AdaptiveBatchSize, norm_test
        >>> size = AdaptiveBatchSize(2, max_batch_size=64, multiple_of=8)
        >>> size.update(norm_test(torch.tensor([[1.0], [3.0]]), eta=0.2))  # proposes 12.5
        16
        >>> size.batch_size
        16

    Reference:
        As :func:`norm_test`.
    """

    def __init__(
        self, batch_size: int, *, max_batch_size: int, every: int = 1, multiple_of: int = 1
    ) -> None:
        name = type(self).__name__
        _checks.count(name, "batch_size", batch_size)
        _checks.count(name, "max_batch_size", max_batch_size, batch_size)
        _checks.count(name, "every", every)
        _checks.count(name, "multiple_of", multiple_of)
        self.batch_size = int(batch_size)
        self.max_batch_size = int(max_batch_size)
        self.every = int(every)
        self.multiple_of = int(multiple_of)
        self._calls = 0

    def update(self, test: BatchSizeTest) -> int:
        """Take the result of a test, and return the batch size of what follows.

        This waits for the device, in the updates that look at the test.
        """
        self._calls += 1
        if self._calls % self.every == 0:
            proposal = float(test.batch_size)
            if proposal == math.inf:
                self.batch_size = self.max_batch_size
            elif not math.isnan(proposal):
                multiples = -(-math.ceil(proposal) // self.multiple_of)  # rounded up
                wanted = max(self.batch_size, multiples * self.multiple_of)
                self.batch_size = min(wanted, self.max_batch_size)
        return self.batch_size

    def state_dict(self) -> dict[str, int]:
        """Return the batch size and the number of updates."""
        return {"batch_size": self.batch_size, "calls": self._calls}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from what :meth:`state_dict` has returned."""
        name, size = type(self).__name__, state_dict["batch_size"]
        if not 1 <= _checks.integer(name, "batch_size", size) <= self.max_batch_size:
            accepted = f"from 1 to {self.max_batch_size} in a state"
            raise _checks.bad_value(name, "batch_size", accepted, size)
        self.batch_size, self._calls = size, state_dict["calls"]
