"""The operators that reduce the map of attention and how they differentiate.

The log-sum-exp and the entropy have gradients of one form: that of score ``s_ij`` is ``p_ij *
(offset_i + slope_i * log p_ij)``. Pooled blocks and columns are constants.
"""

from functools import partial
from typing import Any

from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.attention._attention_map import reference, tiled


def attention_lse(*args: Any) -> Tensor:
    """See ``reference``; the implementation comes last, as in all that follow."""
    return _reference_or(_lse, "attention_lse", args)


def attention_entropy(*args: Any) -> Tensor:
    """See ``reference``."""

    def entropy(*args: Any) -> Tensor:
        result: Tensor = _entropy(*args)[0]
        return result

    return _reference_or(entropy, "attention_entropy", args)


def attention_column_mass(*args: Any) -> Tensor:
    """See ``reference``."""
    return _reference_or(_column_mass, "attention_column_mass", args)


def block_pooled_attention(*args: Any) -> Tensor:
    """See ``reference``."""
    return _reference_or(_block_pooled, "block_pooled_attention", args)


def _reference_or(operator: Any, name: str, args: tuple[Any, ...]) -> Tensor:
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        result: Tensor = getattr(reference, name)(*arguments)
        return result
    result = operator(*args)
    return result


def refusal(features: int) -> str | None:
    """Why the kernels do not take so many features, if they do not."""
    reason: str | None = _kernels("triton").refusal(features)
    return reason


def _kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.attention._attention_map import triton

        return triton
    return tiled


def _run(name: str, *args: Any) -> Any:
    *arguments, implementation = args
    return getattr(_kernels(implementation), name)(*arguments)


def _per_query(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=computation_dtype(query.dtype))


def _lse_fake(query: Tensor, *_: Any) -> Tensor:
    return _per_query(query)


def _entropy_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _per_query(query), _per_query(query)


def _column_mass_fake(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    dtype = computation_dtype(query.dtype)
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=dtype)


def _block_pooled_fake(
    query: Tensor, key: Tensor, lse: Tensor, block_size: list[int], *_: Any
) -> Tensor:
    rows, columns = -(-query.shape[2] // block_size[0]), -(-key.shape[2] // block_size[1])
    dtype = computation_dtype(query.dtype)
    return query.new_empty((*query.shape[:2], rows, columns), dtype=dtype)


def _save_lse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, *ctx.options = inputs
    ctx.save_for_backward(query, key, output)


def _differentiate_lse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _rows_backward(grad, *ctx.saved_tensors, None, None, *ctx.options)
    return *_needed(ctx, gradients), *[None] * 3


def _save_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, lse, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, lse, *output)


def _differentiate_entropy(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients = _rows_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *_needed(ctx, gradients), *[None] * 4


def _needed(ctx: Any, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(
        gradient if need else None
        for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)
    )


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    total: Tensor | None,
    is_causal: bool,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key; of the entropy where it is given, of the log-sum-exp if not."""
    offset, slope = grad, None
    if entropy is not None and total is not None:
        # The exact log-sum-exp has the slope p / total, so that a row's gradients add up to 0.
        offset, slope = -grad * (entropy / total).masked_fill(total == 0, 0), -grad
    results: tuple[Tensor, Tensor] = _run(
        "backward", query, key, lse, offset, slope, is_causal, scale, implementation
    )
    return results


def _backward_fake(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, query, key, lse, entropy, _total, *ctx.options, _implementation = inputs
    ctx.is_entropy = entropy is not None
    ctx.save_for_backward(grad, query, key, lse)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is that of the reference's first."""
    grad, query, key, lse = ctx.saved_tensors

    def statistic(query: Tensor, key: Tensor) -> tuple[Tensor]:
        if ctx.is_entropy:
            return (reference.attention_entropy(query, key, lse, *ctx.options),)
        return (reference.attention_lse(query, key, *ctx.options),)

    results = _operators.second_derivative(statistic, [grad], [query, key], [True, True], grads)
    return *results[0], *results[1], *[None] * 6


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs)
    ctx.mark_non_differentiable(output)


def _no_gradient(ctx: Any, *_: Any) -> tuple[None, ...]:
    return tuple([None] * ctx.count)


_OPTIONS = "bool is_causal, float scale, str implementation"
_lse = _operators.define_by_position(
    f"attention_lse(Tensor query, Tensor key, {_OPTIONS}) -> Tensor",
    partial(_run, "attention_lse"),
    _lse_fake,
    setup_context=_save_lse,
    backward=_differentiate_lse,
)
_entropy = _operators.define_by_position(
    f"attention_entropy(Tensor query, Tensor key, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor)",
    partial(_run, "attention_entropy"),
    _entropy_fake,
    setup_context=_save_entropy,
    backward=_differentiate_entropy,
)
_rows_backward = _operators.define_by_position(
    "attention_rows_backward(Tensor grad, Tensor query, Tensor key, Tensor lse, Tensor? entropy, "
    f"Tensor? total, {_OPTIONS}) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_backward,
    backward=_differentiate_backward,
)
_column_mass = _operators.define_by_position(
    "attention_column_mass(Tensor query, Tensor key, Tensor lse, SymInt first_query, "
    f"{_OPTIONS}) -> Tensor",
    partial(_run, "attention_column_mass"),
    _column_mass_fake,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
_block_pooled = _operators.define_by_position(
    "block_pooled_attention(Tensor query, Tensor key, Tensor lse, int[2] block_size, "
    f"bool largest, {_OPTIONS}) -> Tensor",
    partial(_run, "block_pooled_attention"),
    _block_pooled_fake,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
