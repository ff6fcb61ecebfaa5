"""How an operator enters ``tilework::`` so that every transform of PyTorch composes with it.

An operator is defined by its kernel, its fake kernel and a plain PyTorch reference of the same
signature. ``torch.compile`` sees one node. A missing rule is taken from the reference.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_library: Any = torch.library.Library("tilework", "DEF")  # type: ignore[no-untyped-call]

T = TypeVar("T")
HALF = (torch.float16, torch.bfloat16)


def computation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def only_reference() -> bool:
    """Whether the code runs under a transform for which operators have no rule.

    These are forward-mode differentiation, and ``torch.func`` inside of ``torch.compile``.
    """
    return torch.autograd.forward_ad._current_level >= 0 or (
        torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    )


def without_autocast(function: Callable[..., T]) -> Callable[..., T]:
    """Keep autocast from lowering the products inside; the first argument is a tensor."""

    @functools.wraps(function)
    def run(input: Tensor, *args: Any, **options: Any) -> T:
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return function(input, *args, **options)
        with torch.autocast(device, enabled=False):
            return function(input, *args, **options)

    return run


def second_derivative(
    function: Callable[..., tuple[Tensor, ...]],
    upstream: Sequence[Tensor],
    leaves: Sequence[Tensor],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of ``upstream`` and of the leaves, through a function's first derivative.

    That derivative takes ``upstream`` back to the leaves of ``function``; ``grads`` belong to those
    of its results that are ``needed``.
    """
    count = len(upstream)

    def first_derivative(*arguments: Tensor) -> tuple[Tensor, ...]:
        pull = torch.func.vjp(function, *arguments[count:])[1]
        results = pull(arguments[:count])
        return tuple(result for result, need in zip(results, needed, strict=True) if need)

    results = torch.func.vjp(first_derivative, *upstream, *leaves)[1](tuple(grads))
    return results[:count], results[count:]


_shardings: list[tuple[Any, Callable[..., Any]]] = []


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _register_shardings() -> None:
    """Tell distributed tensors about the operators, once there may be such tensors."""
    if _shardings and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _shardings:
            operator, sharding = _shardings.pop()
            register_sharding(operator)(sharding)


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    sharding: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``tilework::<schema>`` and return the callable that differentiates and batches.

    ``setup_context`` and ``backward`` are those of :class:`torch.autograd.Function`. Batched calls
    run the kernel once per element of the batch. ``sharding`` is the operator's rule for
    ``torch.distributed.tensor.experimental.register_sharding``.
    """
    name = schema.partition("(")[0]
    _library.define(schema)

    kernel = without_autocast(kernel)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.tilework, name).default
    if sharding is not None:
        _shardings.append((operator, sharding))

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        results = []
        for index in range(info.batch_size):
            element = [
                arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            results.append(apply(*element))
        if not results:
            raise ValueError(f"tilework::{name}: vmap over an empty dimension")
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    transformable: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(operator),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
            "vmap": staticmethod(vmap),
        },
    )

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    # Without a setup_context of its own, as PyTorch inspects the signature at each call of those.
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(name, (torch.autograd.Function,), members)

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            _register_shardings()
            return operator(*args)
        # Autograd formulas of operators do not compose with torch.func, those of functions do.
        if torch._C._are_functorch_transforms_active():
            return transformable.apply(*args)
        if torch._C._len_torch_dispatch_stack():
            return operator(*args)
        # Nobody looks at this call, so that the dispatcher can be spared: it takes as long as the
        # launch of a small kernel.
        needs_grad = False
        for arg in args:
            if isinstance(arg, Tensor):
                if type(arg) not in (Tensor, torch.nn.Parameter):
                    _register_shardings()
                    return operator(*args)
                needs_grad |= arg.requires_grad
        return eager.apply(*args) if needs_grad and torch.is_grad_enabled() else kernel(*args)

    torch.library.register_fake(f"tilework::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"tilework::{name}", backward, setup_context=setup_context, lib=_library
    )
    torch.library.register_vmap(f"tilework::{name}", vmap, lib=_library)
    return apply
