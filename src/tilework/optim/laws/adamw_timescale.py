"""Power laws of weight decay and batch size in pre-training."""

from collections.abc import Callable
from functools import reduce
from typing import Any, overload

import torch
from jaxtyping import Num
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["adamw_timescale", "critical_batch_size", "optimal_batch_size", "optimal_weight_decay"]

Values = int | float | Num[Tensor, "..."]
_PAPER = implements(
    "Power Lines: Scaling Laws for Weight Decay and Batch Size in LLM Pre-training",
    year=2025,
    arxiv="2505.13738",
)


@overload
def adamw_timescale(  # type: ignore[overload-overlap]
    batch_size: float, lr: float, weight_decay: float, num_tokens: float
) -> float: ...


@overload
def adamw_timescale(
    batch_size: float | Tensor,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    num_tokens: float | Tensor,
) -> Tensor: ...


@_PAPER
def adamw_timescale(
    batch_size: Values,
    lr: Values,
    weight_decay: Values,
    num_tokens: Values,
) -> Any:
    r"""The part of a run over which AdamW averages its updates.

    Parameters under decoupled decay are an exponential average of updates. With ``batch_size``
    :math:`B`, ``lr`` :math:`\eta`, ``weight_decay`` :math:`\lambda` and ``num_tokens`` :math:`D`,
    it extends over :math:`1 / (\eta \lambda)` of the :math:`D / B` steps:

    .. math::

        \tau = \frac{B}{\eta \lambda D}

    Arguments are numbers, or tensors that broadcast.

    Args:
        batch_size: Tokens of a step.
        lr: The peak learning rate.
        weight_decay: The weight decay, which takes ``lr * weight_decay`` of a parameter at a step.
        num_tokens: Tokens of the run.

    Returns:
        A number for numbers; with tensors a tensor, of the widest of their floating dtypes.

    Raises:
        ValueError: A number is not above 0, infinite or nan; or, on the CPU, an element of a tensor
            is not above 0. Elsewhere its result is nan.
        TypeError: An argument is neither a number nor a tensor of real numbers.

    Example:
        >>> from tilework.optim import adamw_timescale
        >>> round(adamw_timescale(2**20, 2**-10, 0.125, 2**34), 6)
        0.5

    Reference:
        Shane Bergsma, Nolan Dey, Gurpreet Gosal, and others. Power Lines: Scaling Laws for Weight
        Decay and Batch Size in LLM Pre-training. 2025. arXiv:2505.13738.
    """
    return _evaluate(
        "adamw_timescale",
        lambda batch_size, lr, weight_decay, num_tokens: (
            batch_size / lr / weight_decay / num_tokens
        ),
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        num_tokens=num_tokens,
    )


@overload
def optimal_weight_decay(  # type: ignore[overload-overlap]
    batch_size: float,
    lr: float,
    num_tokens: float,
    num_params: float,
    *,
    coefficient: int | float = 1.084,
    exponent: int | float = -0.527,
) -> float: ...


@overload
def optimal_weight_decay(
    batch_size: float | Tensor,
    lr: float | Tensor,
    num_tokens: float | Tensor,
    num_params: float | Tensor,
    *,
    coefficient: int | float = 1.084,
    exponent: int | float = -0.527,
) -> Tensor: ...


@_PAPER
def optimal_weight_decay(
    batch_size: Values,
    lr: Values,
    num_tokens: Values,
    num_params: Values,
    *,
    coefficient: int | float = 1.084,
    exponent: int | float = -0.527,
) -> Any:
    r"""The weight decay at which AdamW averages over the best part of a run.

    With ``batch_size`` :math:`B`, ``lr`` :math:`\eta`, ``num_tokens`` :math:`D`, ``num_params``
    :math:`N`, and the timescale of :func:`adamw_timescale` that is best for a model that sees
    :math:`D / N` tokens per parameter:

    .. math::

        \tau = \mathrm{coefficient} \cdot (D / N)^{\mathrm{exponent}}, \qquad
        \lambda = \frac{B}{\tau \eta D}

    Arguments are numbers, or tensors that broadcast.

    Args:
        batch_size: Tokens of a step.
        lr: The peak learning rate.
        num_tokens: Tokens of the run.
        num_params: Parameters of the model.
        coefficient: The best timescale at one token per parameter; the paper's fit.
        exponent: How it goes with tokens per parameter; the paper's fit.

    Returns:
        As :func:`adamw_timescale`.

    Raises:
        ValueError: As :func:`adamw_timescale`; or ``exponent`` is not finite.
        TypeError: As :func:`adamw_timescale`.

    Example:
        >>> from tilework.optim import optimal_weight_decay
        >>> round(optimal_weight_decay(500_000, 2e-3, 20e9, 1e9), 4)
        0.0559

    Reference:
        As :func:`adamw_timescale`.
    """
    name = "optimal_weight_decay"
    _check_law(name, coefficient, exponent)
    return _evaluate(
        name,
        lambda batch_size, lr, num_tokens, num_params: (
            batch_size / lr / num_tokens / (coefficient * (num_tokens / num_params) ** exponent)
        ),
        batch_size=batch_size,
        lr=lr,
        num_tokens=num_tokens,
        num_params=num_params,
    )


@overload
def optimal_batch_size(
    num_tokens: float, *, coefficient: int | float = 0.0306, exponent: int | float = 0.383
) -> float: ...


@overload
def optimal_batch_size(
    num_tokens: Tensor, *, coefficient: int | float = 0.0306, exponent: int | float = 0.383
) -> Tensor: ...


@_PAPER
def optimal_batch_size(
    num_tokens: Values,
    *,
    coefficient: int | float = 0.0306,
    exponent: int | float = 0.383,
) -> Any:
    r"""The batch size with the least loss for a number of tokens.

    .. math::

        \mathrm{coefficient} \cdot \mathrm{num\_tokens}^{\mathrm{exponent}}

    in sequences of 2048 tokens; for batches in tokens, multiply by 2048.

    Args:
        num_tokens: Tokens of the run, a number or a tensor of any shape.
        coefficient: The paper's fit.
        exponent: The paper's fit.

    Returns:
        As :func:`adamw_timescale`.

    Raises:
        ValueError: As :func:`adamw_timescale`; or ``exponent`` is not finite.
        TypeError: As :func:`adamw_timescale`.

    Example:
        >>> from tilework.optim import optimal_batch_size
        >>> round(optimal_batch_size(20e9))
        270

    Reference:
        As :func:`adamw_timescale`.
    """
    return _power("optimal_batch_size", num_tokens, coefficient, exponent)


@overload
def critical_batch_size(
    num_tokens: float, *, coefficient: int | float = 0.0471, exponent: int | float = 0.462
) -> float: ...


@overload
def critical_batch_size(
    num_tokens: Tensor, *, coefficient: int | float = 0.0471, exponent: int | float = 0.462
) -> Tensor: ...


@_PAPER
def critical_batch_size(
    num_tokens: Values,
    *,
    coefficient: int | float = 0.0471,
    exponent: int | float = 0.462,
) -> Any:
    r"""The batch size beyond which more parallel data saves little time.

    .. math::

        \mathrm{coefficient} \cdot \mathrm{num\_tokens}^{\mathrm{exponent}}

    in sequences of 2048 tokens; for batches in tokens, multiply by 2048.

    Args:
        num_tokens: Tokens of the run, a number or a tensor of any shape.
        coefficient: The paper's fit.
        exponent: The paper's fit.

    Returns:
        As :func:`adamw_timescale`.

    Raises:
        ValueError: As :func:`adamw_timescale`; or ``exponent`` is not finite.
        TypeError: As :func:`adamw_timescale`.

    Example:
        >>> from tilework.optim import critical_batch_size
        >>> round(critical_batch_size(20e9))
        2705

    Reference:
        As :func:`adamw_timescale`.
    """
    return _power("critical_batch_size", num_tokens, coefficient, exponent)


def _power(
    function: str, num_tokens: Values, coefficient: int | float, exponent: int | float
) -> Any:
    _check_law(function, coefficient, exponent)
    return _evaluate(
        function, lambda num_tokens: coefficient * num_tokens**exponent, num_tokens=num_tokens
    )


def _check_law(function: str, coefficient: int | float, exponent: int | float) -> None:
    _checks.positive(function, "coefficient", coefficient)
    _checks.finite(function, "exponent", exponent)


def _evaluate(function: str, law: Callable[..., Any], **arguments: Values) -> Any:
    """The law of arguments above 0; of tensors in float32 at least, rounded once."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    dtype = reduce(torch.promote_types, floating or [torch.get_default_dtype()])

    def checked(name: str, value: Values) -> Values:
        if not isinstance(value, Tensor):
            _checks.positive(function, name, value)
            return value
        if value.is_complex() or value.dtype == torch.bool:
            raise _checks.bad_type(function, name, "a number or a tensor of real numbers", value)
        if _checks.holds_values(value) and (outside := value[value <= 0]).numel():
            raise ValueError(
                f"{function}: {name} must be above 0 everywhere, got {outside[0].item()}"
            )
        value = value.to(computation_dtype(dtype))
        return value.where(value > 0, torch.nan)

    result = law(*(checked(name, value) for name, value in arguments.items()))
    return result.to(dtype) if tensors else float(result)
